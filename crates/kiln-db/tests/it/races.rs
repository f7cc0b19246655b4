//! Cancels, finishes and expiries at once: each job is over once, as whoever came first said.

use kiln_core::{FailureClass, JobState, Lease};
use kiln_db::{Cancelled, Finish};

use crate::on_both;
use crate::support::{World, assign, class, end, facts, id, job, passed};

on_both!(
    cancels_race_finishes,
    cancels_race_claims,
    finishes_race_expiries
);

/// Jobs of a race; as many as `KILN_RACES` says in `make soak`.
const MANY: usize = 2_000;
const BATCH: usize = 200;

#[expect(
    clippy::disallowed_methods,
    reason = "whoever starts the long version talks to it this way"
)]
fn many() -> usize {
    let asked = std::env::var("KILN_RACES").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(MANY)
}

/// Submits and claims many; gives their leases.
async fn lease_many(w: &World, count: usize) -> Vec<Lease> {
    let worker = w.worker("w1").await;
    let mut leases = Vec::with_capacity(count);
    let names: Vec<_> = (0..count).map(|n| format!("b{n}")).collect();
    for part in names.chunks(BATCH) {
        let submits: Vec<_> = part
            .iter()
            .map(|name| {
                let (db, name) = (w.db.clone(), name.clone());
                tokio::spawn(async move { db.submit(job(&name)).await.map(drop) })
            })
            .collect();
        for submit in submits {
            submit.await.expect("runs").expect("submits");
        }
        let lead = w.lead().await;
        let batch = part.iter().map(|name| assign(name, 1, &worker)).collect();
        let claimed = w.db.claim(&lead, batch).await.expect("leads");
        leases.extend(claimed.into_iter().map(|one| one.expect("claims")));
    }
    leases
}

async fn cancels_race_finishes(w: World) {
    let count = many();
    let leases = lease_many(&w, count).await;
    let (mut won, mut lost) = (0, 0);
    for part in leases.chunks(BATCH) {
        let (cancelled, finished) = race(&w, part).await;
        won += cancelled;
        lost += finished;
    }
    assert_eq!(won + lost, count);
    assert!(
        won > 0 && lost > 0,
        "no race: {won} cancelled, {lost} finished"
    );
}

/// A finish and a cancel for each at once; gives how many were cancelled and how many not.
async fn race(w: &World, leases: &[Lease]) -> (usize, usize) {
    let mut tasks = Vec::new();
    for (n, lease) in leases.iter().enumerate() {
        let finish = || {
            let (db, lease) = (w.db.clone(), lease.clone());
            tokio::spawn(async move {
                let done = db.finish(&lease, end(passed())).await;
                done.expect("is the holder")
            })
        };
        let cancel = || {
            let (db, job) = (w.db.clone(), lease.attempt.job.clone());
            tokio::spawn(async move { db.cancel(&job, "user:x", None).await.expect("is there") })
        };
        let (finish, cancel) = if n % 2 == 0 {
            let cancel = cancel();
            (finish(), cancel)
        } else {
            (finish(), cancel())
        };
        tasks.push((n, finish, cancel));
    }
    let (mut won, mut lost) = (0, 0);
    for (n, finish, cancel) in tasks {
        let finish: Finish = finish.await.expect("runs");
        let cancel = cancel.await.expect("runs");
        let job =
            w.db.job(&leases[n].attempt.job)
                .await
                .expect("reads")
                .expect("is there");
        assert_eq!(
            job.state, finish.state,
            "what the worker was told is what is kept"
        );
        let JobState::Finished { outcome } = job.state else {
            panic!("not over: {:?}", job.state);
        };
        match cancel {
            Cancelled::TooLate(known) => {
                assert_eq!((known, outcome), (passed(), passed()));
                lost += 1;
            }
            Cancelled::Asked => {
                assert_eq!(class(&outcome), Some(FailureClass::Cancelled));
                won += 1;
            }
            Cancelled::Ended => panic!("it had a worker"),
        }
        over_once(w, &leases[n]).await;
    }
    (won, lost)
}

/// One end, in the events and in the webhooks' order: nothing follows it.
async fn over_once(w: &World, lease: &Lease) {
    let events =
        w.db.events_after(&lease.attempt.job, 0, 500)
            .await
            .expect("reads");
    let ends = events
        .iter()
        .filter(|event| event.kind == "finished")
        .count();
    assert_eq!(ends, 1, "{events:?}");
    assert_eq!(
        events.last().map(|event| event.kind.as_str()),
        Some("finished")
    );
    assert!(
        events.iter().zip(1..).all(|(event, seq)| event.seq == seq),
        "{events:?}"
    );
}

async fn cancels_race_claims(w: World) {
    let worker = w.worker("w1").await;
    for n in 0..100 {
        w.submit(&format!("b{n}")).await;
    }
    let lead = w.lead().await;
    let mut tasks = Vec::new();
    for n in 0..100 {
        let name = format!("b{n}");
        let cancel = {
            let (db, job) = (w.db.clone(), id(&name));
            tokio::spawn(async move { db.cancel(&job, "user:x", None).await.expect("is there") })
        };
        let claim = {
            let (db, lead, assignment) = (w.db.clone(), lead.clone(), assign(&name, 1, &worker));
            tokio::spawn(async move {
                db.claim(&lead, vec![assignment])
                    .await
                    .expect("leads")
                    .remove(0)
            })
        };
        tasks.push((name, cancel, claim));
    }
    for (name, cancel, claim) in tasks {
        let (cancel, claim) = (cancel.await.expect("runs"), claim.await.expect("runs"));
        let job =
            w.db.job(&id(&name))
                .await
                .expect("reads")
                .expect("is there");
        match (cancel, claim) {
            (Cancelled::Ended, Err(_)) => assert!(job.state.is_terminal()),
            (Cancelled::Asked, Ok(lease)) => {
                assert_eq!(job.lease.as_ref(), Some(&lease));
                let beat =
                    w.db.heartbeat(&worker, &facts(), &[lease])
                        .await
                        .expect("answers");
                assert!(matches!(
                    beat.leases[0].1,
                    kiln_db::LeaseAnswer::Live { cancel: true, .. }
                ));
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

async fn finishes_race_expiries(w: World) {
    let leases = lease_many(&w, 60).await;
    // Past the end of the leases for a sweep without grace, while finishes that came just before are on their way.
    w.advance(14_999);
    let mut tasks = Vec::new();
    for lease in &leases {
        let (db, lease) = (w.db.clone(), lease.clone());
        tasks.push(tokio::spawn(async move {
            db.finish(&lease, end(passed())).await
        }));
    }
    let sweeper = {
        let db = w.db.clone();
        let sweep = kiln_db::Sweep {
            grace_ms: 0,
            ..crate::support::sweep()
        };
        tokio::spawn(async move {
            let mut expired = Vec::new();
            for _ in 0..30 {
                expired.extend(db.expire(sweep).await.expect("sweeps").expired);
            }
            expired
        })
    };
    w.advance(1);
    let expired = sweeper.await.expect("runs");
    for (lease, task) in leases.iter().zip(tasks) {
        let finished = task.await.expect("runs").is_ok();
        let given_up = expired.iter().any(|one| one.lease == *lease);
        assert!(!(finished && given_up), "both ended {}", lease.attempt);
        let job =
            w.db.job(&lease.attempt.job)
                .await
                .expect("reads")
                .expect("is there");
        assert_eq!(job.state.is_terminal(), finished);
        if finished {
            over_once(&w, lease).await;
        }
    }
}
