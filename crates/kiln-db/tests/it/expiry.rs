//! Heartbeats, expiry, backoff, lost and quarantined workers.

use kiln_core::dispatch::WorkerState;
use kiln_core::{FailureClass, JobState, PendingReason};
use kiln_db::{ClaimRefused, HeartbeatError, LeaseAnswer, Sweep};

use crate::on_both;
use crate::support::{World, assign, class, end, facts, failed, id, job, passed, sweep};

on_both!(
    a_heartbeat_extends_what_is_held_and_nothing_else,
    an_expired_lease_goes_back_and_elsewhere_first,
    a_dead_workers_job_may_run_elsewhere_within_25_seconds,
    attempts_are_bounded,
    nothing_expires_right_after_a_start,
    a_lost_worker_returns,
    three_failures_in_a_row_quarantine_a_worker,
    a_removed_worker_loses_its_leases,
);

async fn a_heartbeat_extends_what_is_held_and_nothing_else(w: World) {
    let worker = w.worker("w1").await;
    let held = w.leased("b1", &worker).await;
    let forgotten = w.leased("b2", &worker).await;
    w.advance(10_000);
    let beat =
        w.db.heartbeat(&worker, &facts(), std::slice::from_ref(&held))
            .await;
    let beat = beat.expect("answers");
    assert_eq!(beat.state, WorkerState::Active);
    let until = w.db.now().await.expect("now") + 15_000;
    let live = LeaseAnswer::Live {
        until_unix_ms: until,
        cancel: false,
    };
    assert_eq!(beat.leases, [(held.attempt.clone(), live)]);
    assert_eq!(beat.unnamed.len(), 1);
    assert_eq!(
        (&beat.unnamed[0].lease, beat.unnamed[0].age_ms),
        (&forgotten, 10_000)
    );
    w.advance(10_000);
    let swept = w.sweep().await;
    assert_eq!(swept.expired.len(), 1);
    assert_eq!(swept.expired[0].lease.attempt, forgotten.attempt);
    w.db.check_lease(&held).await.expect("lives on");
    // A heartbeat that comes too late revives nothing.
    w.advance(5_000);
    let beat =
        w.db.heartbeat(&worker, &facts(), &[held, forgotten])
            .await
            .expect("answers");
    assert!(
        beat.leases
            .iter()
            .all(|(_, answer)| matches!(answer, LeaseAnswer::Refused(_)))
    );
    let stranger =
        w.db.heartbeat(&"w9".parse().expect("name"), &facts(), &[])
            .await;
    assert!(matches!(stranger, Err(HeartbeatError::UnknownWorker(_))));
}

async fn an_expired_lease_goes_back_and_elsewhere_first(w: World) {
    let worker = w.worker("w1").await;
    let lease = w.leased("b1", &worker).await;
    w.db.started(&lease).await.expect("starts");
    w.advance(19_999);
    assert!(w.sweep().await.expired.is_empty(), "grace is not over");
    w.advance(1);
    let swept = w.sweep().await;
    assert_eq!(swept.expired[0].state, JobState::Queued { attempts: 1 });
    assert_eq!(swept.expired[0].lease, lease);
    assert!(w.sweep().await.expired.is_empty());
    let found = w.db.job(&id("b1")).await.expect("reads").expect("is there");
    let ready = found.ready_unix_ms.expect("waits");
    assert!(
        matches!(found.reason, Some(PendingReason::Backoff { until_unix_ms }) if until_unix_ms == ready)
    );
    assert!(found.avoid.contains(&worker));
    let first = w.db.attempts(&id("b1")).await.expect("reads").remove(0);
    assert_eq!(
        first.outcome.as_ref().and_then(class),
        Some(FailureClass::Lost)
    );
    let now = w.db.now().await.expect("now");
    if ready > now {
        let lead = w.lead().await;
        let early =
            w.db.claim(&lead, vec![assign("b1", 2, &worker)])
                .await
                .expect("leads");
        assert!(matches!(
            early[0],
            Err(ClaimRefused::Backoff { .. }) | Err(ClaimRefused::WorkerUnavailable { .. })
        ));
        w.advance(ready - now);
    }
    let other = w.worker("w2").await;
    let next = w.claim("b1", 2, &other).await;
    assert_eq!(next.epoch.count, 2);
    let late = w.db.finish(&lease, end(passed())).await;
    assert!(late.is_err(), "the first worker's report comes too late");
    w.db.finish(&next, end(passed())).await.expect("finishes");
}

async fn a_dead_workers_job_may_run_elsewhere_within_25_seconds(w: World) {
    let (dead, other) = (w.worker("w1").await, w.worker("w2").await);
    for n in 0..20 {
        w.leased(&format!("b{n}"), &dead).await;
    }
    // It dies right after a heartbeat; sweeps come every second.
    let mut waited = 0;
    while w.sweep().await.expired.is_empty() {
        w.advance(1_000);
        waited += 1_000;
    }
    assert_eq!(waited, 20_000);
    w.advance(25_000 - waited - 500);
    w.db.heartbeat(&other, &facts(), &[])
        .await
        .expect("is there");
    let lead = w.lead().await;
    let all = (0..20)
        .map(|n| assign(&format!("b{n}"), 2, &other))
        .collect();
    let claimed = w.db.claim(&lead, all).await.expect("leads");
    assert!(claimed.iter().all(Result::is_ok), "{claimed:?}");
}

async fn attempts_are_bounded(w: World) {
    let worker = w.worker("w1").await;
    let mut new = job("b1");
    new.request.dispatch.attempts_max = 3;
    w.submit_as(new).await;
    for number in 1..=3 {
        let lease = w.claim("b1", number, &worker).await;
        assert_eq!(lease.epoch.count, u64::from(number));
        let outcome = failed(FailureClass::Infrastructure);
        let done = w.db.finish(&lease, end(outcome)).await.expect("finishes");
        assert_eq!(done.state.is_terminal(), number == 3);
        w.db.set_worker_state(&worker, WorkerState::Active, "user:x", None)
            .await
            .expect("resumes");
        w.advance(300_000);
    }
    assert_eq!(w.db.attempts(&id("b1")).await.expect("reads").len(), 3);
    // What is nobody's fault but the user's or the guest's is not tried again.
    for (name, class) in [("b2", FailureClass::User), ("b3", FailureClass::GuestFault)] {
        let lease = w.leased(name, &worker).await;
        let done =
            w.db.finish(&lease, end(failed(class)))
                .await
                .expect("finishes");
        assert!(done.state.is_terminal());
    }
}

async fn nothing_expires_right_after_a_start(w: World) {
    let worker = w.worker("w1").await;
    w.leased("b1", &worker).await;
    w.advance(60_000);
    let from = w.db.sweep_from().await.expect("now");
    let guarded = Sweep {
        not_before_unix_ms: from,
        ..sweep()
    };
    assert_eq!(w.db.expire(guarded).await.expect("sweeps").expired, []);
    w.advance(14_999);
    let swept = w.db.expire(guarded).await.expect("sweeps");
    assert!(swept.expired.is_empty() && swept.lost.is_empty());
    w.advance(1);
    assert_eq!(w.db.expire(guarded).await.expect("sweeps").expired.len(), 1);
}

async fn a_lost_worker_returns(w: World) {
    let worker = w.worker("w1").await;
    w.advance(20_000);
    assert_eq!(w.sweep().await.lost, std::slice::from_ref(&worker));
    assert!(w.sweep().await.lost.is_empty());
    let found =
        w.db.worker(&worker)
            .await
            .expect("reads")
            .expect("is there");
    assert_eq!(found.state, WorkerState::Lost);
    w.submit("b1").await;
    let lead = w.lead().await;
    let refused =
        w.db.claim(&lead, vec![assign("b1", 1, &worker)])
            .await
            .expect("leads");
    assert!(matches!(
        refused[0],
        Err(ClaimRefused::WorkerUnavailable {
            state: WorkerState::Lost,
            ..
        })
    ));
    let beat =
        w.db.heartbeat(&worker, &facts(), &[])
            .await
            .expect("answers");
    assert_eq!(beat.state, WorkerState::Active);
    w.claim("b1", 1, &worker).await;
}

async fn three_failures_in_a_row_quarantine_a_worker(w: World) {
    let worker = w.worker("w1").await;
    let run = async |name: &str, outcome| {
        let lease = w.leased(name, &worker).await;
        w.db.finish(&lease, end(outcome))
            .await
            .expect("finishes")
            .quarantined
    };
    let ours = || failed(FailureClass::Infrastructure);
    assert_eq!(run("b1", ours()).await, None);
    assert_eq!(run("b2", ours()).await, None);
    // A passed job breaks the row; a guest fault neither counts nor breaks it.
    assert_eq!(run("b3", passed()).await, None);
    assert_eq!(run("b4", ours()).await, None);
    assert_eq!(run("b5", failed(FailureClass::GuestFault)).await, None);
    assert_eq!(run("b6", ours()).await, None);
    let reason = run("b7", ours()).await.expect("quarantined");
    assert!(reason.contains("3 jobs in a row"), "{reason}");
    let found =
        w.db.worker(&worker)
            .await
            .expect("reads")
            .expect("is there");
    assert_eq!(
        (found.state, found.infra_failures),
        (WorkerState::Quarantined, 3)
    );
    w.db.set_worker_state(&worker, WorkerState::Active, "user:x", None)
        .await
        .expect("resumes");
    let found =
        w.db.worker(&worker)
            .await
            .expect("reads")
            .expect("is there");
    assert_eq!(
        (found.state, found.infra_failures),
        (WorkerState::Active, 0)
    );
    assert_eq!(run("b8", ours()).await, None);
}

async fn a_removed_worker_loses_its_leases(w: World) {
    let worker = w.worker("w1").await;
    let lease = w.leased("b1", &worker).await;
    w.db.remove_worker(&worker).await.expect("removes");
    assert!(w.db.check_lease(&lease).await.is_err());
    let beat = w.db.heartbeat(&worker, &facts(), &[lease]).await;
    assert!(matches!(beat, Err(HeartbeatError::UnknownWorker(_))));
    assert!(
        w.sweep().await.expired.is_empty(),
        "its machines have the grace to go"
    );
    w.advance(5_000);
    assert_eq!(w.sweep().await.expired.len(), 1);
    assert!(w.db.remove_worker(&worker).await.is_err());
}
