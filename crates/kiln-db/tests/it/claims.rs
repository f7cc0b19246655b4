//! Claims: what the plan assumed is checked again, and only the leader of a pool claims.

use std::collections::BTreeSet;

use kiln_core::dispatch::{QuotaScope, Room, WorkerState};
use kiln_core::{ByteSize, PoolName, TenantName};
use kiln_db::{
    ClaimError, ClaimRefused, GlobalLimits, Leadership, NewWorker, Placement, Quota, WEIGHT_DEFAULT,
};

use crate::on_both;
use crate::support::{World, assign, end, facts, id, job, passed, placement};

on_both!(
    a_batch_is_claimed_in_order_and_each_job_once,
    limits_hold_within_a_batch,
    a_concurrency_group_runs_one_at_a_time,
    queues_cancels_and_states_are_checked_again,
    workers_are_checked_again,
    two_schedulers_have_one_leader,
    many_schedulers_never_pass_a_limit,
);

fn refusals(claimed: &kiln_db::Claimed) -> Vec<Option<&ClaimRefused>> {
    claimed.iter().map(|one| one.as_ref().err()).collect()
}

async fn a_batch_is_claimed_in_order_and_each_job_once(w: World) {
    let (one, two) = (w.worker("w1").await, w.worker("w2").await);
    for n in 0..4 {
        w.submit(&format!("b{n}")).await;
    }
    let lead = w.lead().await;
    let batch = vec![
        assign("b1", 1, &one),
        assign("b0", 1, &two),
        assign("b1", 1, &two),
        assign("b2", 2, &one),
        assign("gone", 1, &one),
    ];
    let claimed = w.db.claim(&lead, batch).await.expect("leads");
    let lease = claimed[0].as_ref().expect("claims");
    assert_eq!((&lease.attempt.job, &lease.worker), (&id("b1"), &one));
    assert_eq!(claimed[1].as_ref().expect("claims").worker, two);
    assert!(matches!(
        claimed[2],
        Err(ClaimRefused::NotQueued {
            state: "leased",
            attempt: 1
        })
    ));
    assert!(matches!(
        claimed[3],
        Err(ClaimRefused::NotQueued {
            state: "queued",
            attempt: 1
        })
    ));
    assert_eq!(claimed[4], Err(ClaimRefused::Gone));
    let again =
        w.db.claim(&lead, vec![assign("b1", 1, &two)])
            .await
            .expect("leads");
    assert!(again[0].is_err());
    assert!(
        w.db.claim(&lead, Vec::new())
            .await
            .expect("leads")
            .is_empty()
    );
}

async fn limits_hold_within_a_batch(w: World) {
    let worker = w.worker("w1").await;
    for n in 0..6 {
        w.submit(&format!("b{n}")).await;
    }
    let batch = |from: u32| {
        (from..6)
            .map(|n| assign(&format!("b{n}"), 1, &worker))
            .collect()
    };
    let (local, queue) = (TenantName::local(), "default".parse().expect("name"));
    let lead = w.lead().await;
    let quota = Quota {
        running_max: Some(1),
        ..Quota::default()
    };
    w.db.set_quota(&local, quota).await.expect("sets");
    let claimed = w.db.claim(&lead, batch(0)).await.expect("leads");
    let quota = |scope, running, limit| {
        Err(ClaimRefused::Quota {
            scope,
            running,
            limit,
        })
    };
    assert!(claimed[0].is_ok());
    assert_eq!(claimed[1], quota(QuotaScope::Tenant, 1, 1));
    // What a plan gives beyond the quota is claimed as far as the burst goes, and no further.
    let bursting = Quota {
        running_max: Some(0),
        burst: 1,
        ..Quota::default()
    };
    w.db.set_quota(&local, bursting).await.expect("sets");
    let claimed = w.db.claim(&lead, batch(1)).await.expect("leads");
    assert_eq!(claimed[0], quota(QuotaScope::Tenant, 1, 1));
    w.db.set_quota(&local, Quota::default())
        .await
        .expect("sets");
    w.db.set_queue_limits(&queue, WEIGHT_DEFAULT, Some(2))
        .await
        .expect("sets");
    let claimed = w.db.claim(&lead, batch(1)).await.expect("leads");
    assert!(claimed[0].is_ok());
    assert_eq!(claimed[1], quota(QuotaScope::Queue, 2, 2));
    w.db.set_queue_limits(&queue, WEIGHT_DEFAULT, None)
        .await
        .expect("sets");
    let limits = GlobalLimits {
        running_max: Some(3),
        ..GlobalLimits::default()
    };
    w.db.set_global_limits(limits).await.expect("sets");
    let claimed = w.db.claim(&lead, batch(2)).await.expect("leads");
    assert!(claimed[0].is_ok());
    assert_eq!(claimed[1], quota(QuotaScope::Global, 3, 3));
}

async fn a_concurrency_group_runs_one_at_a_time(w: World) {
    let worker = w.worker("w1").await;
    let other: TenantName = "acme".parse().expect("name");
    w.db.create_tenant(&other, Quota::default())
        .await
        .expect("makes");
    for (name, tenant) in [
        ("b1", TenantName::local()),
        ("b2", TenantName::local()),
        ("b3", other),
    ] {
        let mut new = job(name);
        new.request.tenant = tenant;
        new.request.dispatch.concurrency_group = Some("deploy".parse().expect("label"));
        w.submit_as(new).await;
    }
    let lead = w.lead().await;
    let batch = vec![
        assign("b1", 1, &worker),
        assign("b2", 1, &worker),
        assign("b3", 1, &worker),
    ];
    let claimed = w.db.claim(&lead, batch).await.expect("leads");
    assert_eq!(
        claimed[1],
        Err(ClaimRefused::GroupBusy { holder: id("b1") })
    );
    assert!(
        claimed[2].is_ok(),
        "another tenant's group of the same name is another group"
    );
    let later =
        w.db.claim(&lead, vec![assign("b2", 1, &worker)])
            .await
            .expect("leads");
    assert_eq!(later[0], Err(ClaimRefused::GroupBusy { holder: id("b1") }));
    let lease = claimed[0].as_ref().expect("claims");
    w.db.finish(lease, end(passed())).await.expect("finishes");
    let later =
        w.db.claim(&lead, vec![assign("b2", 1, &worker)])
            .await
            .expect("leads");
    assert!(later[0].is_ok());
}

async fn queues_cancels_and_states_are_checked_again(w: World) {
    let worker = w.worker("w1").await;
    w.submit("b1").await;
    w.submit("b2").await;
    let lead = w.lead().await;
    let queue = "default".parse().expect("name");
    w.db.pause_queue(&queue, "user:x", Some("night"))
        .await
        .expect("pauses");
    w.db.pause_queue(&queue, "user:y", None)
        .await
        .expect("again is no error");
    let paused =
        w.db.queues()
            .await
            .expect("lists")
            .remove(0)
            .paused
            .expect("paused");
    assert_eq!(
        (paused.by.as_str(), paused.reason.as_deref()),
        ("user:x", Some("night"))
    );
    let claimed =
        w.db.claim(&lead, vec![assign("b1", 1, &worker)])
            .await
            .expect("leads");
    assert_eq!(claimed[0], Err(ClaimRefused::Paused(queue.clone())));
    w.db.resume_queue(&queue).await.expect("resumes");
    w.db.cancel(&id("b1"), "user:x", None)
        .await
        .expect("cancels");
    let batch = vec![assign("b1", 1, &worker), assign("b2", 1, &worker)];
    let claimed = w.db.claim(&lead, batch).await.expect("leads");
    assert_eq!(refusals(&claimed), [Some(&ClaimRefused::Gone), None]);
}

async fn workers_are_checked_again(w: World) {
    let small = NewWorker {
        id: "small".parse().expect("name"),
        facts: kiln_core::dispatch::WorkerFacts {
            capacity: Room {
                cpus: 1,
                memory: ByteSize::gib(4),
                disk: ByteSize::gib(10),
                machines: 4,
            },
            ..facts()
        },
        certificate: None,
    };
    let tenants: BTreeSet<TenantName> = ["acme".parse().expect("name")].into();
    let own = Placement {
        tenants: Some(tenants),
        ..placement()
    };
    let elsewhere = Placement {
        pool: "other".parse().expect("name"),
        ..placement()
    };
    let named = |name: &str| NewWorker {
        id: name.parse().expect("name"),
        ..small.clone()
    };
    w.db.admit_worker(small.clone(), placement())
        .await
        .expect("joins");
    w.db.admit_worker(named("theirs"), own)
        .await
        .expect("joins");
    w.db.admit_worker(named("far"), elsewhere)
        .await
        .expect("joins");
    let tired = w.worker("tired").await;
    w.db.set_worker_state(&tired, WorkerState::Draining, "user:x", None)
        .await
        .expect("drains");
    let gone = w.worker("gone").await;
    w.db.remove_worker(&gone).await.expect("removes");
    for n in 1..=6 {
        w.submit(&format!("b{n}")).await;
    }
    let lead = w.lead().await;
    let at = |job: &str, worker: &str| assign(job, 1, &worker.parse().expect("name"));
    let batch = vec![
        at("b1", "small"),
        at("b2", "small"),
        at("b3", "theirs"),
        at("b4", "far"),
        at("b5", "tired"),
        at("b6", "gone"),
    ];
    let claimed = w.db.claim(&lead, batch).await.expect("leads");
    assert!(claimed[0].is_ok());
    assert!(matches!(claimed[1], Err(ClaimRefused::NoRoom { .. })));
    assert!(matches!(
        claimed[2],
        Err(ClaimRefused::TenantNotAllowed { .. })
    ));
    assert_eq!(claimed[3], Err(ClaimRefused::OtherPool));
    assert!(matches!(
        claimed[4],
        Err(ClaimRefused::WorkerUnavailable {
            state: WorkerState::Draining,
            ..
        })
    ));
    assert!(matches!(claimed[5], Err(ClaimRefused::UnknownWorker(_))));
    // What one batch gave away is gone for the next.
    let claimed =
        w.db.claim(&lead, vec![at("b2", "small")])
            .await
            .expect("leads");
    assert!(matches!(claimed[0], Err(ClaimRefused::NoRoom { .. })));
}

async fn two_schedulers_have_one_leader(w: World) {
    let worker = w.worker("w1").await;
    w.submit("b1").await;
    w.submit("b2").await;
    let pool = PoolName::default_pool();
    let one =
        w.db.lead(&pool, "one", 10_000)
            .await
            .expect("answers")
            .expect("leads");
    assert_eq!(
        w.db.lead(&pool, "two", 10_000).await.expect("answers"),
        None
    );
    w.advance(5_000);
    let renewed =
        w.db.lead(&pool, "one", 10_000)
            .await
            .expect("answers")
            .expect("renews");
    assert_eq!(renewed.epoch, one.epoch);
    w.advance(10_000);
    let claimed = w.db.claim(&renewed, vec![assign("b1", 1, &worker)]).await;
    assert!(
        matches!(claimed, Err(ClaimError::NotLeader(_))),
        "its right has ended"
    );
    let two =
        w.db.lead(&pool, "two", 10_000)
            .await
            .expect("answers")
            .expect("leads");
    assert!(two.epoch > one.epoch);
    assert!(
        w.db.claim(&two, vec![assign("b1", 1, &worker)])
            .await
            .is_ok()
    );
    for dead in [
        &one,
        &Leadership {
            until_unix_ms: u64::MAX,
            ..renewed
        },
    ] {
        let claimed = w.db.claim(dead, vec![assign("b2", 1, &worker)]).await;
        assert!(matches!(claimed, Err(ClaimError::NotLeader(_))));
    }
    w.db.resign(&one).await.expect("resigns in vain");
    assert_eq!(
        w.db.lead(&pool, "one", 10_000).await.expect("answers"),
        None
    );
    w.db.resign(&two).await.expect("resigns");
    let back =
        w.db.lead(&pool, "one", 10_000)
            .await
            .expect("answers")
            .expect("leads");
    assert!(back.epoch > two.epoch);
    let other = "other".parse().expect("name");
    assert!(
        w.db.lead(&other, "two", 10_000)
            .await
            .expect("answers")
            .is_some()
    );
}

/// Claims of two pools at once share the tenant's limit exactly.
async fn many_schedulers_never_pass_a_limit(w: World) {
    const LIMIT: u32 = 7;
    let other: PoolName = "other".parse().expect("name");
    let queue = "far".parse().expect("name");
    w.db.create_queue(&queue, &other).await.expect("makes");
    let near = w.worker("near").await;
    let far = NewWorker {
        id: "far".parse().expect("name"),
        facts: facts(),
        certificate: None,
    };
    let place = Placement {
        pool: other.clone(),
        ..placement()
    };
    let far = w.db.admit_worker(far, place).await.expect("joins").id;
    for n in 0..20 {
        w.submit(&format!("n{n}")).await;
        let mut new = job(&format!("f{n}"));
        new.request.dispatch.queue = queue.clone();
        w.submit_as(new).await;
    }
    let quota = Quota {
        running_max: Some(LIMIT),
        ..Quota::default()
    };
    w.db.set_quota(&TenantName::local(), quota)
        .await
        .expect("sets");
    let near_lead = w.lead().await;
    let far_lead =
        w.db.lead(&other, "two", 3_600_000)
            .await
            .expect("answers")
            .expect("leads");
    let second = if w.is_postgres() {
        w.second().await
    } else {
        w.db.clone()
    };
    let mut tasks = Vec::new();
    for n in 0..20 {
        for (db, lead, name, worker) in [
            (
                w.db.clone(),
                near_lead.clone(),
                format!("n{n}"),
                near.clone(),
            ),
            (
                second.clone(),
                far_lead.clone(),
                format!("f{n}"),
                far.clone(),
            ),
        ] {
            tasks.push(tokio::spawn(async move {
                let claimed = db.claim(&lead, vec![assign(&name, 1, &worker)]).await;
                u32::from(claimed.expect("leads")[0].is_ok())
            }));
        }
    }
    let mut running = 0;
    for task in tasks {
        running += task.await.expect("runs");
    }
    assert_eq!(running, LIMIT);
}
