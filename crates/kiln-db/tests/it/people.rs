//! Tokens, sessions, join tokens, certificates.

use kiln_core::{Digest, TenantName, TokenId};
use kiln_db::{
    AuditFilter, AuditFrom, Certificate, JoinError, NewAudit, NewJoinToken, NewToken, NewWorker,
    Placement, TokenRefused,
};

use crate::on_both;
use crate::support::{World, facts, placement};

on_both!(
    a_token_opens_until_it_ends_or_is_revoked,
    a_join_token_is_good_once,
    a_join_token_used_by_many_at_once_lets_one_in,
    names_and_keys_of_workers_are_not_taken_over,
    a_revoked_session_stays_revoked_until_its_end,
    the_audit_trail_is_read_a_bounded_part_at_a_time,
);

async fn the_audit_trail_is_read_a_bounded_part_at_a_time(w: World) {
    for n in 0..6_u32 {
        let entry = NewAudit {
            actor: format!("user:u_{n}"),
            tenant: (n % 2 == 0).then(TenantName::local),
            action: "job:read".to_owned(),
            target: n.to_string(),
            allowed: n != 3,
            reason: None,
            detail: None,
        };
        w.db.audit(entry).await.expect("writes");
        w.advance(1000);
    }
    let read = |filter: AuditFilter, from| {
        let db = w.db.clone();
        async move {
            let page = db.audit_page(filter, from, 2).await.expect("reads");
            let targets = page.rows.iter().map(|row| row.entry.target.clone());
            (targets.collect::<String>(), page.next)
        }
    };
    let all = AuditFilter::default;
    let (first, next) = read(all(), AuditFrom::After(0)).await;
    assert_eq!(first, "01");
    let (second, _) = read(all(), AuditFrom::After(next.expect("more"))).await;
    assert_eq!(second, "23");
    let (newest, next) = read(all(), AuditFrom::Before(u64::MAX >> 1)).await;
    assert_eq!(newest, "54");
    let (then, _) = read(all(), AuditFrom::Before(next.expect("more"))).await;
    assert_eq!(then, "32");
    let refused = AuditFilter {
        allowed: Some(false),
        ..all()
    };
    assert_eq!(
        read(refused, AuditFrom::After(0)).await,
        ("3".to_owned(), None)
    );
    let now = w.db.now().await.expect("now");
    let times = AuditFilter {
        from_unix_ms: Some(now - 4000),
        until_unix_ms: Some(now - 3000),
        ..all()
    };
    assert_eq!(read(times.clone(), AuditFrom::After(0)).await.0, "23");
    let odd = AuditFilter {
        tenant: Some(TenantName::local()),
        ..times
    };
    assert_eq!(read(odd, AuditFrom::Before(u64::MAX >> 1)).await.0, "2");
    for (actor, found) in [
        ("U_1", "1"),
        ("u_1", "1"),
        ("u%", ""),
        ("_5", "5"),
        ("!", ""),
    ] {
        let by = AuditFilter {
            actor: Some(actor.to_owned()),
            ..all()
        };
        assert_eq!(read(by, AuditFrom::After(0)).await.0, found, "{actor}");
    }
}

fn token(name: &str, expires_unix_ms: Option<u64>) -> NewToken {
    NewToken {
        id: name.parse().expect("name"),
        hash: Digest::of(name.as_bytes()),
        tenant: TenantName::local(),
        role: "developer".to_owned(),
        scopes: ["jobs:read".to_owned()].into(),
        claims: serde_json::json!({ "priority_max": 10 }),
        description: "a laptop".to_owned(),
        expires_unix_ms,
        created_by: "user:x".to_owned(),
    }
}

async fn a_token_opens_until_it_ends_or_is_revoked(w: World) {
    let now = w.db.now().await.expect("now");
    assert!(
        w.db.create_token(token("one", Some(now + 1000)))
            .await
            .expect("keeps")
    );
    assert!(
        !w.db
            .create_token(token("one", None))
            .await
            .expect("refuses a name twice")
    );
    assert!(w.db.create_token(token("two", None)).await.expect("keeps"));
    let (one, two) = (Digest::of(b"one"), Digest::of(b"two"));
    let used = w.db.use_token(&one).await.expect("opens");
    assert_eq!(
        (used.role.as_str(), used.last_used_unix_ms),
        ("developer", None)
    );
    assert_eq!(used.claims["priority_max"], 10);
    let listed =
        w.db.tokens(Some(&TenantName::local()))
            .await
            .expect("lists");
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[0].last_used_unix_ms, Some(now));
    w.advance(1000);
    assert!(matches!(
        w.db.use_token(&one).await,
        Err(TokenRefused::Expired(_))
    ));
    w.db.use_token(&two).await.expect("opens");
    let name: TokenId = "two".parse().expect("name");
    let other: TenantName = "acme".parse().expect("name");
    assert!(
        !w.db
            .revoke_token(&name, Some(&other))
            .await
            .expect("is not theirs")
    );
    assert!(w.db.revoke_token(&name, None).await.expect("revokes"));
    assert!(matches!(
        w.db.use_token(&two).await,
        Err(TokenRefused::Revoked(_))
    ));
    let unknown = w.db.use_token(&Digest::of(b"three")).await;
    assert!(matches!(unknown, Err(TokenRefused::Unknown)));
    assert!(w.db.tokens(Some(&other)).await.expect("lists").is_empty());
}

async fn join_token(w: &World, secret: &[u8], place: Placement) -> Digest {
    let hash = Digest::of(secret);
    let token = NewJoinToken {
        id: format!("j{}", hash.short(8)).parse().expect("name"),
        hash,
        placement: place,
        expires_unix_ms: w.db.now().await.expect("now") + 60_000,
        created_by: "user:x".to_owned(),
    };
    w.db.create_join_token(token).await.expect("keeps");
    hash
}

fn worker(name: &str, key: &[u8]) -> NewWorker {
    NewWorker {
        id: name.parse().expect("name"),
        facts: facts(),
        certificate: Some(Certificate {
            fingerprint: Digest::of(key),
            until_unix_ms: 9_000_000_000_000,
        }),
    }
}

async fn a_join_token_is_good_once(w: World) {
    let place = Placement {
        pool: "gpu".parse().expect("name"),
        labels: [(
            "gpu".parse().expect("label"),
            "a100".parse().expect("label"),
        )]
        .into(),
        tenants: Some([TenantName::local()].into()),
    };
    let secret = join_token(&w, b"s", place.clone()).await;
    let joined =
        w.db.join(&secret, worker("w1", b"key1"))
            .await
            .expect("joins");
    assert_eq!(joined.placement, place);
    let again = w.db.join(&secret, worker("w2", b"key2")).await;
    assert!(matches!(again, Err(JoinError::Used(by)) if by.as_str() == "w1"));
    let unknown = w.db.join(&Digest::of(b"x"), worker("w2", b"key2")).await;
    assert!(matches!(unknown, Err(JoinError::UnknownToken)));
    let old = join_token(&w, b"old", placement()).await;
    w.advance(60_000);
    assert!(matches!(
        w.db.join(&old, worker("w2", b"key2")).await,
        Err(JoinError::Expired)
    ));
    let back = join_token(&w, b"back", placement()).await;
    let name = w.db.join_tokens().await.expect("lists")[0].id.clone();
    assert!(w.db.revoke_join_token(&name).await.expect("revokes"));
    assert!(matches!(
        w.db.join(&back, worker("w2", b"key2")).await,
        Err(JoinError::Revoked)
    ));
    let found =
        w.db.worker_of_key(&Digest::of(b"key1"))
            .await
            .expect("reads");
    assert_eq!(found.map(|found| found.id), Some(joined.id));
}

async fn a_join_token_used_by_many_at_once_lets_one_in(w: World) {
    let secret = join_token(&w, b"s", placement()).await;
    let tries = (0..8).map(|n| {
        let (db, name) = (w.db.clone(), format!("w{n}"));
        tokio::spawn(async move {
            db.join(&secret, worker(&name, name.as_bytes()))
                .await
                .is_ok()
        })
    });
    let mut joined = 0;
    for tried in tries.collect::<Vec<_>>() {
        joined += u32::from(tried.await.expect("runs"));
    }
    assert_eq!(joined, 1);
    assert_eq!(w.db.workers(None).await.expect("lists").len(), 1);
}

async fn names_and_keys_of_workers_are_not_taken_over(w: World) {
    let first = join_token(&w, b"1", placement()).await;
    let one =
        w.db.join(&first, worker("w1", b"key1"))
            .await
            .expect("joins");
    let second = join_token(&w, b"2", placement()).await;
    let thief = w.db.join(&second, worker("w1", b"key2")).await;
    assert!(matches!(thief, Err(JoinError::NameTaken(_))));
    let twin = w.db.join(&second, worker("w2", b"key1")).await;
    assert!(matches!(twin, Err(JoinError::NameTaken(_))));
    let local = NewWorker {
        certificate: None,
        ..worker("w1", b"")
    };
    let local = w.db.admit_worker(local, placement()).await;
    assert!(matches!(local, Err(JoinError::NameTaken(_))));
    // A refused join leaves the token good; a removed worker's name is free for another key.
    w.db.remove_worker(&one.id).await.expect("removes");
    assert!(w.db.workers(None).await.expect("lists").is_empty());
    let removed =
        w.db.worker_of_key(&Digest::of(b"key1"))
            .await
            .expect("reads");
    assert!(removed.expect("is remembered").removed_unix_ms.is_some());
    let next = Certificate {
        fingerprint: Digest::of(b"key1"),
        until_unix_ms: 1,
    };
    assert!(w.db.renew_certificate(&one.id, next).await.is_err());
    w.db.join(&second, worker("w1", b"key2"))
        .await
        .expect("joins");
    assert_eq!(w.db.workers(None).await.expect("lists").len(), 1);
}

async fn a_revoked_session_stays_revoked_until_its_end(w: World) {
    let now = w.db.now().await.expect("now");
    w.db.revoke_session("jti-1", now + 1000)
        .await
        .expect("revokes");
    assert!(w.db.session_revoked("jti-1").await.expect("reads"));
    assert!(!w.db.session_revoked("jti-2").await.expect("reads"));
    w.advance(2000);
    w.db.revoke_session("jti-2", now + 9000)
        .await
        .expect("revokes");
    assert!(
        !w.db
            .session_revoked("jti-1")
            .await
            .expect("is forgotten after its end")
    );
}
