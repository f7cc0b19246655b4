//! Workers that are one command's own: they go with their process, and with them the jobs that wait for nobody else.

use kiln_core::dispatch::own_labels;
use kiln_core::{FailureClass, JobState, WorkerId};
use kiln_db::{NewJob, NewWorker, Placement};

use crate::on_both;
use crate::support::{World, class, end, facts, id, job, passed, placement};

on_both!(
    a_commands_worker_goes_with_the_jobs_that_wait_for_it,
    a_worker_that_holds_a_lease_stays_until_it_is_over,
    workers_of_dead_commands_are_forgotten,
    a_commands_lease_lives_as_long_as_its_process,
    what_a_dead_command_held_is_lost_at_once,
);

async fn own(w: &World, name: &str) -> WorkerId {
    let worker: WorkerId = name.parse().expect("name");
    let new = NewWorker {
        id: worker.clone(),
        facts: facts(),
        certificate: None,
    };
    let placement = Placement {
        labels: own_labels(&worker),
        ..placement()
    };
    w.db.admit_worker(new, placement).await.expect("joins").id
}

fn only(name: &str, worker: &WorkerId) -> NewJob {
    let mut new = job(name);
    new.request.dispatch.requires.only_own(worker);
    new.request.dispatch.attempts_max = 1;
    new
}

async fn ended(w: &World, name: &str) -> Option<FailureClass> {
    let job = w.db.job(&id(name)).await.expect("answers").expect("there");
    match job.state {
        JobState::Finished { outcome } => class(&outcome),
        state => panic!("{name} is {}", state.name()),
    }
}

async fn a_commands_worker_goes_with_the_jobs_that_wait_for_it(w: World) {
    let (mine, other) = (own(&w, "command-1").await, own(&w, "command-2").await);
    let fleet = w.worker("w1").await;
    w.submit_as(only("b1", &mine)).await;
    w.submit_as(only("b2", &other)).await;
    w.submit("b3").await;
    assert!(w.db.forget_own_worker(&mine).await.expect("answers"));
    assert_eq!(ended(&w, "b1").await, Some(FailureClass::Lost));
    for waits in ["b2", "b3"] {
        let job = w.db.job(&id(waits)).await.expect("answers").expect("there");
        assert_eq!(job.state.name(), "queued", "{waits}");
    }
    assert!(w.db.worker(&mine).await.expect("answers").is_none());
    // Neither one that is nobody's own, nor one that is gone.
    assert!(!w.db.forget_own_worker(&fleet).await.expect("answers"));
    assert!(!w.db.forget_own_worker(&mine).await.expect("answers"));
    assert!(w.db.worker(&fleet).await.expect("answers").is_some());
}

async fn a_worker_that_holds_a_lease_stays_until_it_is_over(w: World) {
    let mine = own(&w, "command-1").await;
    w.submit_as(only("b1", &mine)).await;
    let lease = w.claim("b1", 1, &mine).await;
    assert!(!w.db.forget_own_worker(&mine).await.expect("answers"));
    w.db.finish(&lease, end(passed())).await.expect("finishes");
    assert!(w.db.forget_own_worker(&mine).await.expect("answers"));
}

async fn workers_of_dead_commands_are_forgotten(w: World) {
    let (mine, busy) = (own(&w, "command-1").await, own(&w, "command-2").await);
    w.submit_as(only("b1", &mine)).await;
    w.submit_as(only("b2", &busy)).await;
    w.claim("b2", 1, &busy).await;
    w.advance(20_001);
    w.sweep().await;
    assert_eq!(w.db.forget_lost_own_workers().await.expect("answers"), 0);
    w.advance(86_400_000);
    assert_eq!(w.db.forget_lost_own_workers().await.expect("answers"), 1);
    assert_eq!(ended(&w, "b1").await, Some(FailureClass::Lost));
    let left = w.db.workers(None).await.expect("answers");
    let left: Vec<_> = left.into_iter().map(|worker| worker.id).collect();
    assert_eq!(left, [busy]);
}

async fn a_commands_lease_lives_as_long_as_its_process(w: World) {
    let mine = own(&w, "command-1").await;
    w.submit_as(only("b1", &mine)).await;
    let lease = w.claim("b1", 1, &mine).await;
    // The computer sleeps over a holiday.
    w.advance(20 * 86_400_000);
    assert!(w.sweep().await.expired.is_empty());
    w.db.check_lease(&lease).await.expect("lives");
    let held = std::slice::from_ref(&lease);
    w.db.heartbeat(&mine, &facts(), held)
        .await
        .expect("answers");
    w.advance(20 * 86_400_000);
    assert!(w.sweep().await.expired.is_empty());
    w.db.finish(&lease, end(passed())).await.expect("finishes");
}

async fn what_a_dead_command_held_is_lost_at_once(w: World) {
    let mine = own(&w, "command-1").await;
    let fleet = w.worker("w1").await;
    w.submit_as(only("b1", &mine)).await;
    w.submit_as(only("b2", &mine)).await;
    w.claim("b1", 1, &mine).await;
    let other = w.leased("b3", &fleet).await;
    assert!(w.db.bury_own_worker(&mine).await.expect("answers"));
    for lost in ["b1", "b2"] {
        assert_eq!(ended(&w, lost).await, Some(FailureClass::Lost));
    }
    assert!(!w.db.bury_own_worker(&mine).await.expect("answers"));
    w.db.check_lease(&other).await.expect("nobody else's");
}
