//! Secrets: one value per version, given under a live lease to jobs of its scope alone, each answer an audit row.

use kiln_core::job::TrustClass;
use kiln_core::secret::{SECRETS_MAX, SecretRefused, SecretScope};
use kiln_core::{JobKind, JobRequest, Lease, SecretName, TenantName};
use kiln_db::{
    AuditRow, DoorError, NewJob, NewValue, Opened, SECRET_READ, Secret, SecretFrom, SecretValue,
    Written,
};

use crate::on_both;
use crate::support::{World, job};

on_both!(
    a_value_is_kept_replaced_and_forgotten,
    of_two_writers_one_sees_the_other,
    a_tenant_keeps_a_bounded_number,
    a_lease_opens_what_its_job_may_have,
    a_scope_counts_from_the_moment_it_changes,
    a_dead_lease_opens_nothing,
    a_request_is_judged_before_it_is_queued,
);

fn name(text: &str) -> SecretName {
    text.parse().expect("name")
}

fn value(secret: &str, version: u64, sealed: &str) -> NewValue {
    NewValue {
        tenant: TenantName::local(),
        name: name(secret),
        version,
        value: SecretValue::Sealed(sealed.to_owned()),
        scope: None,
        by: "ann".to_owned(),
    }
}

async fn keep(w: &World, new: NewValue) -> Written {
    w.db.write_secret(new).await.expect("answers")
}

async fn kept(w: &World, secret: &str) -> Option<Secret> {
    let found = w.db.secret(&TenantName::local(), &name(secret)).await;
    found.expect("answers")
}

/// A command that asks for the secret `A`.
fn asks(id: &str, trust: TrustClass) -> NewJob {
    let mut new = job(id);
    let JobKind::Run(run) = &mut new.request.kind else {
        panic!("a run");
    };
    run.secrets = vec!["A".parse().expect("a secret")];
    new.request.trust = trust;
    new
}

async fn leased(w: &World, id: &str, trust: TrustClass) -> (Lease, JobRequest) {
    let worker = w.worker("w1").await;
    let new = asks(id, trust);
    let request = new.request.clone();
    w.submit_as(new).await;
    (w.claim(id, 1, &worker).await, request)
}

async fn accesses(w: &World, secret: &str) -> Vec<AuditRow> {
    let (tenant, name) = (TenantName::local(), name(secret));
    let rows = w.db.secret_accesses(&tenant, &name, 0, 100);
    rows.await.expect("answers")
}

async fn a_value_is_kept_replaced_and_forgotten(w: World) {
    assert_eq!(keep(&w, value("A", 1, "one")).await, Written::Kept);
    let first = kept(&w, "A").await.expect("is there");
    assert_eq!((first.version, first.rotated_unix_ms), (1, None));
    assert_eq!(first.scope, SecretScope::default());
    w.advance(5);
    let scope: SecretScope =
        serde_json::from_str(r#"{"repositories":["h.example/**"],"uses":["run"]}"#).expect("scope");
    let mut second = value("A", 2, "two");
    second.scope = Some(scope.clone());
    assert_eq!(keep(&w, second).await, Written::Kept);
    assert_eq!(keep(&w, value("A", 3, "three")).await, Written::Kept);
    let third = kept(&w, "A").await.expect("is there");
    assert_eq!(third.value, SecretValue::Sealed("three".to_owned()));
    assert_eq!(third.scope, scope, "a value alone changes no scope");
    assert_eq!(third.rotated_unix_ms, Some(first.created_unix_ms + 5));
    assert_eq!(third.rotated_by.as_deref(), Some("ann"));
    let other: TenantName = "acme".parse().expect("name");
    let (db, local) = (&w.db, TenantName::local());
    assert!(
        db.secret(&other, &name("A"))
            .await
            .expect("answers")
            .is_none()
    );
    assert!(db.secrets(&other).await.expect("answers").is_empty());
    assert!(!db.remove_secret(&other, &name("A")).await.expect("answers"));
    assert_eq!(db.secrets(&local).await.expect("answers").len(), 1);
    assert!(db.remove_secret(&local, &name("A")).await.expect("answers"));
    assert!(!db.remove_secret(&local, &name("A")).await.expect("answers"));
    assert!(kept(&w, "A").await.is_none());
    let set = db.set_secret_scope(&local, &name("A"), &scope).await;
    assert!(!set.expect("answers"), "there is none");
}

async fn of_two_writers_one_sees_the_other(w: World) {
    assert_eq!(keep(&w, value("A", 1, "one")).await, Written::Kept);
    assert_eq!(keep(&w, value("A", 1, "late")).await, Written::Changed);
    assert_eq!(keep(&w, value("A", 2, "two")).await, Written::Kept);
    assert_eq!(keep(&w, value("A", 2, "late")).await, Written::Changed);
    assert_eq!(keep(&w, value("B", 2, "no first")).await, Written::Changed);
    let found = kept(&w, "A").await.expect("is there");
    assert_eq!(found.value, SecretValue::Sealed("two".to_owned()));
}

async fn a_tenant_keeps_a_bounded_number(w: World) {
    for n in 0..SECRETS_MAX {
        let written = keep(&w, value(&format!("s{n}"), 1, "x")).await;
        assert_eq!(written, Written::Kept, "{n}");
    }
    assert_eq!(keep(&w, value("more", 1, "x")).await, Written::TooMany);
    assert_eq!(keep(&w, value("s0", 2, "y")).await, Written::Kept);
}

async fn a_lease_opens_what_its_job_may_have(w: World) {
    keep(&w, value("A", 1, "sealed")).await;
    let (lease, request) = leased(&w, "r1", TrustClass::Trusted).await;
    let open = async |from, secret: &str| {
        let opened = w.db.open_secret(&lease, &request, secret, from).await;
        opened.expect("the lease is live")
    };
    let Opened::Allowed(secret) = open(SecretFrom::Store, "A").await else {
        panic!("it may have it");
    };
    assert_eq!(secret.value, SecretValue::Sealed("sealed".to_owned()));
    assert_eq!(open(SecretFrom::Store, "B").await, Opened::Missing);
    assert_eq!(open(SecretFrom::Store, "not/a name").await, Opened::Missing);
    let here = SecretFrom::Request { here: true };
    assert_eq!(open(here, "A").await, Opened::Given);
    let lost = SecretFrom::Request { here: false };
    assert_eq!(
        open(lost, "A").await,
        Opened::Missing,
        "never another value"
    );
    let rows = accesses(&w, "A").await;
    let told: Vec<_> = rows
        .iter()
        .map(|row| (row.entry.allowed, row.entry.reason.as_deref()))
        .collect();
    assert_eq!(told, [(true, None), (true, None), (false, Some("missing"))]);
    let row = &rows[0].entry;
    assert_eq!(
        (row.action.as_str(), row.actor.as_str()),
        (SECRET_READ, "worker:w1")
    );
    let detail = row.detail.as_ref().expect("says more");
    assert_eq!(
        (&detail["job"], &detail["version"]),
        (&"r1".into(), &1.into())
    );
    assert!(!format!("{rows:?}").contains("sealed"));
}

async fn a_scope_counts_from_the_moment_it_changes(w: World) {
    keep(&w, value("A", 1, "x")).await;
    let (lease, request) = leased(&w, "r1", TrustClass::Trusted).await;
    let scope: SecretScope = serde_json::from_str(r#"{"uses":["build"]}"#).expect("scope");
    let (tenant, secret) = (TenantName::local(), name("A"));
    let set = w.db.set_secret_scope(&tenant, &secret, &scope);
    assert!(set.await.expect("answers"));
    let opened = w.db.open_secret(&lease, &request, "A", SecretFrom::Store);
    let opened = opened.await.expect("the lease is live");
    assert_eq!(opened, Opened::Refused(SecretRefused::Use));
    let untrusted = JobRequest {
        trust: TrustClass::Untrusted,
        ..request
    };
    let opened = w.db.open_secret(&lease, &untrusted, "A", SecretFrom::Store);
    let opened = opened.await.expect("the lease is live");
    assert_eq!(opened, Opened::Refused(SecretRefused::Untrusted));
    let rows = accesses(&w, "A").await;
    let reasons: Vec<_> = rows.iter().map(|row| row.entry.reason.as_deref()).collect();
    assert_eq!(reasons, [Some("use"), Some("untrusted")]);
}

async fn a_dead_lease_opens_nothing(w: World) {
    keep(&w, value("A", 1, "x")).await;
    let (lease, request) = leased(&w, "r1", TrustClass::Trusted).await;
    let stale = Lease {
        worker: "w2".parse().expect("name"),
        ..lease.clone()
    };
    for lease in [&stale, &lease] {
        if *lease != stale {
            w.advance(60_000);
        }
        let opened = w.db.open_secret(lease, &request, "A", SecretFrom::Store);
        assert!(matches!(opened.await, Err(DoorError::Lease(_))));
    }
    let rows = accesses(&w, "A").await;
    assert_eq!(rows.len(), 2);
    assert!(rows.iter().all(|row| !row.entry.allowed));
}

async fn a_request_is_judged_before_it_is_queued(w: World) {
    let judge = async |trust| {
        let judged = w.db.refused_secret(&asks("r1", trust).request).await;
        judged.expect("answers").map(|(name, opened)| {
            assert_eq!(name.as_str(), "A");
            opened
        })
    };
    assert_eq!(judge(TrustClass::Trusted).await, Some(Opened::Missing));
    keep(&w, value("A", 1, "x")).await;
    assert_eq!(judge(TrustClass::Trusted).await, None);
    let refused = Opened::Refused(SecretRefused::Untrusted);
    assert_eq!(judge(TrustClass::Untrusted).await, Some(refused));
    let none = w.db.refused_secret(&job("r2").request).await;
    assert_eq!(none.expect("answers"), None);
}
