//! The outbox: written with the change, taken by one sender at a time, retried, given up, replayed.

use std::collections::BTreeSet;

use kiln_core::TenantName;
use kiln_db::{Quota, Rotated, Webhook};

use crate::on_both;
use crate::support::{World, end, id, job, passed};

on_both!(
    every_change_is_told_to_those_who_asked,
    messages_are_taken_once_and_tried_again,
    a_refused_change_tells_nobody,
    two_keys_sign_while_receivers_change_over,
);

fn hook(name: &str, tenant: Option<&str>, kinds: &[&str]) -> Webhook {
    Webhook {
        id: name.parse().expect("name"),
        tenant: tenant.map(|name| name.parse().expect("name")),
        url: format!("https://{name}.invalid/"),
        secret: "key-1".to_owned(),
        old: None,
        kinds: kinds.iter().map(|kind| (*kind).to_owned()).collect(),
        enabled: true,
        created_by: "user:x".to_owned(),
    }
}

async fn every_change_is_told_to_those_who_asked(w: World) {
    let acme: TenantName = "acme".parse().expect("name");
    w.db.create_tenant(&acme, Quota::default())
        .await
        .expect("makes");
    for hook in [
        hook("all", None, &[]),
        hook("ends", Some("local"), &["finished"]),
        hook("theirs", Some("acme"), &[]),
        Webhook {
            enabled: false,
            ..hook("off", None, &[])
        },
    ] {
        w.db.put_webhook(hook).await.expect("keeps");
    }
    assert_eq!(w.db.webhooks(Some(&acme)).await.expect("lists").len(), 1);
    let worker = w.worker("w1").await;
    let mut new = job("b1");
    new.notify_url = Some("https://own.invalid/x".to_owned());
    w.submit_as(new).await;
    let lease = w.claim("b1", 1, &worker).await;
    w.db.started(&lease).await.expect("starts");
    w.db.finish(&lease, end(passed())).await.expect("finishes");
    let all = w.db.outbox_take(100, 1000).await.expect("takes");
    let told: BTreeSet<_> = all
        .iter()
        .map(|m| (m.webhook.as_ref().map(ToString::to_string), m.kind.clone()))
        .collect();
    let hook = |name: &str, kind: &str| (Some(name.to_owned()), kind.to_owned());
    let own = |kind: &str| (None, kind.to_owned());
    let expected = ["queued", "leased", "running", "finished"]
        .into_iter()
        .flat_map(|kind| [hook("all", kind), own(kind)])
        .chain([hook("ends", "finished")])
        .collect();
    assert_eq!(told, expected);
    let last = all
        .iter()
        .find(|m| m.kind == "finished" && m.webhook.is_none())
        .expect("told");
    assert_eq!(
        (last.url.as_str(), &last.secret),
        ("https://own.invalid/x", &None)
    );
    let body: serde_json::Value = serde_json::from_str(&last.body).expect("json");
    assert_eq!(body["type"], "job.finished");
    assert_eq!(body["data"]["verdict"], "passed");
    assert_eq!(body["seq"], last.seq);
    let name = "all".parse().expect("name");
    assert!(w.db.remove_webhook(&name).await.expect("removes"));
    w.advance(1000);
    let left = w.db.outbox_take(100, 1000).await.expect("takes");
    assert_eq!(left.len(), 5);
}

async fn messages_are_taken_once_and_tried_again(w: World) {
    w.db.put_webhook(hook("all", None, &["queued"]))
        .await
        .expect("keeps");
    for n in 0..3 {
        w.submit(&format!("b{n}")).await;
    }
    let now = w.db.now().await.expect("now");
    assert_eq!(w.db.outbox_next().await.expect("looks"), Some(now));
    let takers = (0..4).map(|_| {
        let db = w.db.clone();
        tokio::spawn(async move { db.outbox_take(2, 10_000).await.expect("takes") })
    });
    let mut taken = Vec::new();
    for taker in takers.collect::<Vec<_>>() {
        taken.extend(taker.await.expect("runs"));
    }
    let ids: BTreeSet<_> = taken.iter().map(|message| message.id.clone()).collect();
    assert_eq!((taken.len(), ids.len()), (3, 3));
    assert!(
        w.db.outbox_take(10, 10_000)
            .await
            .expect("takes")
            .is_empty()
    );
    w.db.outbox_sent(&taken[0].id).await.expect("notes");
    w.db.outbox_failed(&taken[1].id, "500", Some(60_000))
        .await
        .expect("notes");
    w.db.outbox_failed(&taken[2].id, "gone", None)
        .await
        .expect("notes");
    w.advance(10_000);
    assert!(w.db.outbox_take(10, 1).await.expect("takes").is_empty());
    w.advance(50_000);
    let again = w.db.outbox_take(10, 1).await.expect("takes");
    assert_eq!(again.len(), 1);
    assert_eq!((&again[0].id, again[0].tries), (&taken[1].id, 1));
    assert_eq!(again[0].last_error.as_deref(), Some("500"));
    let dead = w.db.dead_letters(None, None, 10).await.expect("lists");
    assert_eq!(dead.len(), 1);
    assert_eq!(dead[0].last_error.as_deref(), Some("gone"));
    let acme: TenantName = "acme".parse().expect("name");
    assert!(
        !w.db
            .replay(&dead[0].id, Some(&acme))
            .await
            .expect("is not theirs")
    );
    assert!(w.db.replay(&dead[0].id, None).await.expect("replays"));
    assert!(!w.db.replay(&dead[0].id, None).await.expect("is not dead"));
    let back = w.db.outbox_take(10, 1).await.expect("takes");
    assert!(
        back.iter()
            .any(|message| message.id == dead[0].id && message.tries == 0)
    );
}

async fn a_refused_change_tells_nobody(w: World) {
    w.db.put_webhook(hook("all", None, &[]))
        .await
        .expect("keeps");
    w.submit("b1").await;
    assert!(w.db.submit(job("b1")).await.is_err());
    let all = w.db.outbox_take(100, 1000).await.expect("takes");
    assert_eq!(all.len(), 1);
    assert_eq!(
        w.db.events_after(&id("b1"), 0, 10)
            .await
            .expect("reads")
            .len(),
        1
    );
}

async fn two_keys_sign_while_receivers_change_over(w: World) {
    let name = "all".parse().expect("name");
    w.db.put_webhook(hook("all", None, &[]))
        .await
        .expect("keeps");
    w.submit("b1").await;
    let keys = async || {
        let all = w.db.outbox_take(100, 0).await.expect("takes").remove(0);
        (all.secret.expect("a key"), all.old_secret)
    };
    let rotate = async |key: &str, overlap_ms: u64, end: bool| {
        let done = w.db.rotate_webhook(&name, key, overlap_ms, end).await;
        done.expect("answers")
    };
    assert_eq!(keys().await, ("key-1".to_owned(), None));
    assert!(matches!(
        rotate("key-2", 1000, false).await,
        Rotated::Done(_)
    ));
    let both = ("key-2".to_owned(), Some("key-1".to_owned()));
    assert_eq!(keys().await, both);
    let refused = rotate("key-3", 1000, false).await;
    assert!(matches!(refused, Rotated::Overlaps { .. }), "{refused:?}");
    // Another change leaves the keys alone.
    w.db.put_webhook(hook("all", None, &["queued"]))
        .await
        .expect("keeps");
    assert_eq!(keys().await, both);
    w.advance(1000);
    assert_eq!(keys().await, ("key-2".to_owned(), None));
    let known = w.db.webhook(&name).await.expect("reads").expect("is there");
    assert_eq!(known.old, None);
    assert!(matches!(
        rotate("key-3", 1000, false).await,
        Rotated::Done(_)
    ));
    // Told to, the overlap ends before its time.
    assert!(matches!(
        rotate("key-4", 1000, true).await,
        Rotated::Done(_)
    ));
    assert_eq!(keys().await, ("key-4".to_owned(), Some("key-3".to_owned())));
    assert!(matches!(rotate("key-5", 0, true).await, Rotated::Done(_)));
    assert_eq!(keys().await, ("key-5".to_owned(), None));
    let nobody = "nobody".parse().expect("name");
    let none = w.db.rotate_webhook(&nobody, "key-1", 0, true).await;
    assert_eq!(none.expect("answers"), Rotated::Absent);
}
