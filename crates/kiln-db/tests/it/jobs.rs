//! The life of a job, lists, idempotency keys, tenants and queues.

use std::collections::BTreeSet;

use kiln_core::{Digest, FailureClass, JobState, PendingReason};
use kiln_db::{
    Estimate, GlobalLimits, Idempotency, JobFilter, NameError, Quota, SubmitError, Tier, Wake,
};

use crate::on_both;
use crate::support::{World, class, end, failed, id, job, passed};

on_both!(
    a_job_from_submit_to_history,
    the_same_key_is_the_same_job_and_another_body_is_refused,
    the_same_key_at_once_makes_one_job,
    what_does_not_exist_or_is_too_much_is_refused,
    lists_go_page_by_page_and_filter,
    reasons_are_written_only_when_they_change,
    a_view_shows_the_pool_and_no_flood_hides_a_tenant,
    usage_and_depths_add_up,
    retention_ages_and_holds_keep,
    commits_wake_and_nothing_else_does,
);

async fn a_job_from_submit_to_history(w: World) {
    let worker = w.worker("w1").await;
    let lease = w.leased("b1", &worker).await;
    let found = w.db.job(&id("b1")).await.expect("reads").expect("is there");
    assert_eq!(found.state, JobState::Leased { attempt: 1 });
    assert_eq!(found.lease.as_ref(), Some(&lease));
    assert_eq!(lease.epoch.count, 1);
    assert_eq!(
        lease.deadline_unix_ms,
        w.db.now().await.expect("now") + 15_000
    );
    w.advance(100);
    w.db.started(&lease).await.expect("starts");
    w.db.started(&lease).await.expect("says it twice");
    w.db.phase(&lease, "guest").await.expect("phase");
    w.advance(900);
    let done = w.db.finish(&lease, end(passed())).await.expect("finishes");
    assert_eq!(done.state, JobState::Finished { outcome: passed() });
    let again =
        w.db.finish(&lease, end(passed()))
            .await
            .expect("reports again");
    assert!(again.repeated && again.state == done.state);

    let over = w.db.job(&id("b1")).await.expect("reads").expect("is there");
    assert_eq!(over.state, done.state);
    assert_eq!(over.request, job("b1").request);
    assert_eq!((over.lease, over.worker), (None, Some(worker.clone())));
    assert_eq!(
        over.finished_unix_ms,
        over.leased_unix_ms.map(|at| at + 1000)
    );
    assert_eq!(over.tier, Some(Tier::Hot));
    assert!(over.observed.is_some());
    let events = w.db.events_after(&id("b1"), 0, 100).await.expect("reads");
    let kinds: Vec<_> = events.iter().map(|e| e.kind.as_str()).collect();
    assert_eq!(kinds, ["queued", "leased", "running", "phase", "finished"]);
    let seqs: Vec<_> = events.iter().map(|e| e.seq).collect();
    assert_eq!(seqs, [1, 2, 3, 4, 5]);
    assert_eq!(over.last_event, 5);
    let later = w.db.events_after(&id("b1"), 3, 1).await.expect("reads");
    assert_eq!(later, events[3..4]);
    let attempts = w.db.attempts(&id("b1")).await.expect("reads");
    assert_eq!(attempts.len(), 1);
    assert_eq!(attempts[0].outcome, Some(passed()));
    assert_eq!(attempts[0].epoch, lease.epoch);
}

fn keyed(name: &str, key: &str, body: &[u8]) -> kiln_db::NewJob {
    let mut new = job(name);
    new.idempotency = Some(Idempotency {
        key: key.to_owned(),
        body: Digest::of(body),
    });
    new
}

async fn the_same_key_is_the_same_job_and_another_body_is_refused(w: World) {
    let first =
        w.db.submit(keyed("b1", "k", b"one"))
            .await
            .expect("submits");
    assert!(!first.repeated);
    let again =
        w.db.submit(keyed("b2", "k", b"one"))
            .await
            .expect("repeats");
    assert!(again.repeated);
    assert_eq!(again.job.request.id, id("b1"));
    let other = w.db.submit(keyed("b3", "k", b"two")).await;
    assert!(matches!(other, Err(SubmitError::KeyConflict { job, .. }) if job == id("b1")));
    // Another tenant's key is another key.
    let tenant = "acme".parse().expect("name");
    w.db.create_tenant(&tenant, Quota::default())
        .await
        .expect("makes");
    let mut theirs = keyed("b4", "k", b"two");
    theirs.request.tenant = tenant;
    assert!(!w.db.submit(theirs).await.expect("submits").repeated);
    // A refused request leaves its key free.
    let mut wrong = keyed("b5", "fresh", b"x");
    wrong.request.dispatch.queue = "nowhere".parse().expect("name");
    assert!(matches!(
        w.db.submit(wrong).await,
        Err(SubmitError::UnknownQueue(_))
    ));
    assert!(
        !w.db
            .submit(keyed("b6", "fresh", b"y"))
            .await
            .expect("submits")
            .repeated
    );
    assert!(w.db.job(&id("b2")).await.expect("reads").is_none());
}

async fn the_same_key_at_once_makes_one_job(w: World) {
    let tries = (0..24).map(|n| {
        let db = w.db.clone();
        tokio::spawn(async move { db.submit(keyed(&format!("b{n}"), "k", b"one")).await })
    });
    let mut made = BTreeSet::new();
    let mut fresh = 0;
    for tried in tries.collect::<Vec<_>>() {
        let submitted = tried.await.expect("runs").expect("submits");
        fresh += u32::from(!submitted.repeated);
        made.insert(submitted.job.request.id);
    }
    assert_eq!((fresh, made.len()), (1, 1));
    let all =
        w.db.jobs(&JobFilter::default(), None, 100)
            .await
            .expect("lists");
    assert_eq!(all.items.len(), 1);
}

async fn what_does_not_exist_or_is_too_much_is_refused(w: World) {
    let mut stranger = job("b1");
    stranger.request.tenant = "nobody".parse().expect("name");
    assert!(matches!(
        w.db.submit(stranger).await,
        Err(SubmitError::UnknownTenant(_))
    ));
    let local = kiln_core::TenantName::local();
    let quota = Quota {
        pending_max: Some(1),
        ..Quota::default()
    };
    w.db.set_quota(&local, quota).await.expect("sets");
    w.submit("b2").await;
    let refused = w.db.submit(job("b3")).await;
    assert!(matches!(
        refused,
        Err(SubmitError::TooManyPending {
            pending: 1,
            limit: 1,
            ..
        })
    ));
    w.db.set_quota(&local, Quota::default())
        .await
        .expect("sets");
    assert!(matches!(
        w.db.submit(job("b2")).await,
        Err(SubmitError::Exists(_))
    ));
    let stored = w.db.tenants().await.expect("reads")[0].stored;
    let full = Quota {
        stored_max: Some(stored),
        ..Quota::default()
    };
    w.db.set_quota(&local, full).await.expect("sets");
    let refused = w.db.submit(job("b4")).await;
    assert!(matches!(refused, Err(SubmitError::TooMuchStored { limit, .. }) if limit == stored));
    let more = Quota {
        stored_max: Some(stored * 2),
        ..Quota::default()
    };
    w.db.set_quota(&local, more).await.expect("sets");
    w.submit("b4").await;
    assert!(w.db.tenants().await.expect("reads")[0].stored > stored);
    let unknown = "nobody".parse().expect("name");
    let refused = w.db.set_quota(&unknown, quota).await;
    assert!(matches!(refused, Err(NameError::Unknown { .. })));
    let refused = w.db.create_tenant(&local, quota).await;
    assert!(matches!(refused, Err(NameError::Exists { .. })));
}

async fn lists_go_page_by_page_and_filter(w: World) {
    let worker = w.worker("w1").await;
    for n in 0..25 {
        let mut new = job(&format!("b{n:02}"));
        if n % 5 == 0 {
            new.request.dispatch.tags = ["night".parse().expect("label")].into();
            new.labels = [(
                "team".parse().expect("label"),
                "a_b".parse().expect("label"),
            )]
            .into();
        }
        w.submit_as(new).await;
        if n % 3 == 0 {
            w.advance(1);
        }
    }
    for n in 0..10 {
        let lease = w.claim(&format!("b{n:02}"), 1, &worker).await;
        let outcome = if n < 4 {
            passed()
        } else {
            failed(FailureClass::User)
        };
        if n < 8 {
            w.db.finish(&lease, end(outcome)).await.expect("finishes");
        }
    }
    let mut seen = Vec::new();
    let mut after = None;
    loop {
        let page =
            w.db.jobs(&JobFilter::default(), after.as_ref(), 7)
                .await
                .expect("lists");
        seen.extend(
            page.items
                .iter()
                .map(|item| (item.created_unix_ms, item.id.clone())),
        );
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    let mut sorted = seen.clone();
    sorted.sort_by(|a, b| b.cmp(a));
    sorted.dedup();
    assert_eq!(seen, sorted);
    assert_eq!(seen.len(), 25);

    let count = async |filter: JobFilter| {
        let all = w.db.jobs(&filter, None, 500).await.expect("lists");
        let tenant = Some(kiln_core::TenantName::local());
        let own =
            w.db.jobs(&JobFilter { tenant, ..filter }, None, 500)
                .await
                .expect("lists");
        assert_eq!(all, own);
        all.items.len()
    };
    let states = |names: &[&str]| JobFilter {
        states: names.iter().map(|name| (*name).to_owned()).collect(),
        ..JobFilter::default()
    };
    assert_eq!(count(states(&["queued"])).await, 15);
    assert_eq!(count(states(&["leased"])).await, 2);
    assert_eq!(count(states(&["finished", "leased"])).await, 10);
    let verdict = |name: &str| JobFilter {
        verdict: Some(name.to_owned()),
        ..JobFilter::default()
    };
    assert_eq!(count(verdict("passed")).await, 4);
    assert_eq!(count(verdict("user")).await, 4);
    let tag = |name: &str| JobFilter {
        tag: Some(name.parse().expect("label")),
        ..JobFilter::default()
    };
    assert_eq!(count(tag("night")).await, 5);
    assert_eq!(count(tag("nigh")).await, 0);
    let label = |value: &str| JobFilter {
        label: Some((
            "team".parse().expect("label"),
            value.parse().expect("label"),
        )),
        ..JobFilter::default()
    };
    assert_eq!(count(label("a_b")).await, 5);
    assert_eq!(count(label("aXb")).await, 0);
    let by = |name: &str| JobFilter {
        submitted_by: Some(name.to_owned()),
        ..JobFilter::default()
    };
    assert_eq!(count(by("user:tester")).await, 25);
    assert_eq!(count(by("' or ''='")).await, 0);
    let on = JobFilter {
        worker: Some(worker),
        ..JobFilter::default()
    };
    assert_eq!(count(on).await, 10);
}

async fn reasons_are_written_only_when_they_change(w: World) {
    w.submit("b1").await;
    w.submit("b2").await;
    let estimate = Estimate {
        wait_ms: 5,
        samples: 2,
        basis: "a guess".to_owned(),
    };
    let reasons = vec![
        (id("b1"), PendingReason::NoWorkers, None),
        (id("b2"), PendingReason::New, Some(estimate.clone())),
        (id("gone"), PendingReason::New, None),
    ];
    assert_eq!(
        w.db.store_reasons(reasons.clone()).await.expect("writes"),
        2
    );
    assert_eq!(w.db.store_reasons(reasons).await.expect("writes"), 0);
    let found = w.db.job(&id("b1")).await.expect("reads").expect("is there");
    assert_eq!(
        (found.reason, found.estimate),
        (Some(PendingReason::NoWorkers), None)
    );
    let found = w.db.job(&id("b2")).await.expect("reads").expect("is there");
    assert_eq!(found.estimate, Some(estimate));
}

async fn a_view_shows_the_pool_and_no_flood_hides_a_tenant(w: World) {
    let worker = w.worker("w1").await;
    let light = "light".parse().expect("name");
    w.db.create_tenant(&light, Quota::default())
        .await
        .expect("makes");
    for n in 0..40 {
        w.submit(&format!("b{n:02}")).await;
    }
    let mut theirs = job("z1");
    theirs.request.tenant = light.clone();
    w.submit_as(theirs).await;
    let lease = w.claim("b00", 1, &worker).await;
    let pool = kiln_core::PoolName::default_pool();
    let view = w.db.pool_view(&pool, 10).await.expect("views");
    assert_eq!((view.pending.len(), view.pending_total), (10, 40));
    assert!(view.pending.iter().any(|job| job.tenant == light));
    assert_eq!(view.held.len(), 1);
    assert_eq!(view.held[0].lease, lease);
    let free = view.workers[0].1;
    assert_eq!(free.cpus, view.workers[0].0.facts.capacity.cpus - 1);
    assert_eq!(free.machines, 19_999);
    assert_eq!(view.queues.len(), 1);
    assert_eq!(view.tenants.len(), 2);
    assert_eq!(view.running.values().sum::<u32>(), 1);
    let all = w.db.pool_view(&pool, 1000).await.expect("views");
    assert_eq!(all.pending.len(), 40);
    let other = "other".parse().expect("name");
    assert_eq!(
        w.db.pool_view(&other, 10)
            .await
            .expect("views")
            .pending_total,
        0
    );
}

async fn usage_and_depths_add_up(w: World) {
    let worker = w.worker("w1").await;
    let from = w.db.now().await.expect("now");
    w.submit("b1").await;
    w.submit("b2").await;
    w.submit("b3").await;
    w.advance(3_000);
    let lease = w.claim("b1", 1, &worker).await;
    w.claim("b2", 1, &worker).await;
    w.advance(2_000);
    w.db.finish(&lease, end(passed())).await.expect("finishes");
    let local = kiln_core::TenantName::local();
    let used = w.db.usage(&local, from, from + 10_000).await.expect("adds");
    assert_eq!(
        (used.jobs, used.passed, used.pending, used.running),
        (1, 1, 1, 1)
    );
    assert_eq!(
        (used.cpu_ms, used.memory_mib_s, used.wait_ms),
        (2_000, 1_024, 3_000)
    );
    let learnt = w.db.learnt().await.expect("learns");
    assert_eq!(learnt.len(), 1);
    assert_eq!(
        (learnt[0].run_p50_ms, learnt[0].wait_p95_ms),
        (2_000, 3_000)
    );
    let depths = w.db.depths().await.expect("counts");
    assert_eq!((depths[0].pending, depths[0].running), (1, 1));
    assert_eq!(depths[0].oldest_unix_ms, Some(from));
    let limits = GlobalLimits {
        running_max: Some(7),
        filling: kiln_db::Filling::Pack,
    };
    w.db.set_global_limits(limits).await.expect("sets");
    assert_eq!(w.db.global_limits().await.expect("reads"), limits);
}

async fn retention_ages_and_holds_keep(w: World) {
    let worker = w.worker("w1").await;
    for name in ["b1", "b2"] {
        let lease = w.leased(name, &worker).await;
        w.db.finish(&lease, end(passed())).await.expect("finishes");
    }
    let rule = kiln_db::Retention {
        hot_ms: 1_000,
        warm_ms: 2_000,
        cold_ms: 3_000,
    };
    let job = kiln_db::Hold::Job(id("b2"));
    let held = w.db.hold(job.clone(), "security", "a case").await;
    assert_eq!(held.expect("holds").tenant.as_str(), "local");
    let again = w.db.hold(job.clone(), "other", "another").await;
    assert_eq!(again.expect("stays").reason, "a case");
    // A job that is not over is kept from when it is.
    let later = w.leased("b3", &worker).await;
    let job = kiln_db::Hold::Job(id("b3"));
    w.db.hold(job.clone(), "security", "a case")
        .await
        .expect("holds");
    w.db.finish(&later, end(passed())).await.expect("finishes");
    let held = w.db.job(&id("b3")).await.expect("reads").expect("is there");
    assert!(held.hold);
    assert!(w.db.release(job).await.expect("lets go"));
    let held = w.db.job(&id("b3")).await.expect("reads").expect("is there");
    assert!(!held.hold);
    let none = kiln_db::Hold::Job(id("b9"));
    let none = w.db.hold(none, "security", "a case").await;
    assert!(matches!(none, Err(kiln_db::HoldError::Unknown(_))));
    assert!(
        w.db.retention_sweep(rule, false)
            .await
            .expect("sweeps")
            .is_empty()
    );
    w.advance(1_000);
    let planned = w.db.retention_sweep(rule, true).await.expect("plans");
    let jobs: Vec<_> = planned.iter().map(|aged| aged.job.as_str()).collect();
    assert_eq!((jobs, planned[0].to), (vec!["b1", "b3"], Some(Tier::Warm)));
    let local = kiln_core::TenantName::local();
    let plan = |rule| {
        let (db, local) = (w.db.clone(), local.clone());
        async move {
            db.retention_plan(&local, rule)
                .await
                .expect("plans")
                .expect("is there")
        }
    };
    let now = plan(rule).await;
    assert_eq!(
        (now.to_warm, now.to_cold, now.deleted, now.held),
        (2, 0, 0, 1)
    );
    let at_once = kiln_db::Retention {
        hot_ms: 0,
        warm_ms: 0,
        cold_ms: 0,
    };
    let all = plan(at_once).await;
    assert_eq!((all.to_warm, all.deleted, all.held), (0, 2, 1));
    let told: Vec<_> = all
        .jobs
        .iter()
        .map(|job| (job.from, job.to, job.held))
        .collect();
    assert_eq!(
        told,
        [
            (Tier::Hot, None, false),
            (Tier::Hot, None, true),
            (Tier::Hot, None, false)
        ]
    );
    let nobody = "nobody".parse().expect("name");
    assert_eq!(
        w.db.retention_plan(&nobody, rule).await.expect("plans"),
        None
    );
    assert_eq!(
        w.db.retention_sweep(rule, false).await.expect("sweeps"),
        planned
    );
    assert!(
        w.db.retention_sweep(rule, false)
            .await
            .expect("sweeps")
            .is_empty()
    );
    w.advance(1_000);
    w.db.retention_sweep(rule, false).await.expect("sweeps");
    let found = w.db.job(&id("b1")).await.expect("reads").expect("is there");
    assert_eq!(found.tier, Some(Tier::Cold));
    assert_eq!(plan(at_once).await.jobs[0].from, Tier::Cold);
    let all = kiln_db::Hold::Tenant(local.clone());
    w.db.hold(all.clone(), "security", "all of it")
        .await
        .expect("holds");
    assert_eq!(w.db.holds().await.expect("lists").len(), 2);
    w.advance(1_000);
    assert!(
        w.db.retention_sweep(rule, false)
            .await
            .expect("sweeps")
            .is_empty()
    );
    assert!(w.db.release(all.clone()).await.expect("lets go"));
    assert!(!w.db.release(all).await.expect("is gone"));
    let stored = || async { w.db.tenants().await.expect("reads")[0].stored };
    let before = stored().await;
    w.db.retention_sweep(rule, false).await.expect("sweeps");
    assert!(stored().await < before && stored().await > 0);
    assert!(w.db.job(&id("b1")).await.expect("reads").is_none());
    assert!(w.db.job(&id("b2")).await.expect("reads").is_some());
}

async fn commits_wake_and_nothing_else_does(w: World) {
    let mut wakes = w.db.subscribe();
    w.submit("b1").await;
    let mut got = Vec::new();
    while let Ok(wake) = wakes.try_recv() {
        got.push(wake);
    }
    assert!(got.contains(&Wake::Job(id("b1"))), "{got:?}");
    assert!(
        got.contains(&Wake::Queue(kiln_core::PoolName::default_pool())),
        "{got:?}"
    );
    assert!(w.db.submit(job("b1")).await.is_err());
    while let Ok(wake) = wakes.try_recv() {
        // On PostgreSQL the listener says once that it began to listen.
        assert_eq!(wake, Wake::Everything);
    }
    w.db.cancel(&id("b1"), "user:x", Some("not needed"))
        .await
        .expect("cancels");
    let found = w.db.job(&id("b1")).await.expect("reads").expect("is there");
    let JobState::Finished { outcome } = found.state else {
        panic!("{found:?}");
    };
    assert_eq!(class(&outcome), Some(FailureClass::Cancelled));
    assert_eq!(found.cancel.map(|mark| mark.by).as_deref(), Some("user:x"));
}
