//! Random orders of submits, claims, starts, finishes, cancels, heartbeats, expiries and time, against a small model in memory.

use std::collections::BTreeMap;

use kiln_core::{FailureClass, JobState, Lease, Outcome, WorkerId};
use kiln_db::Cancelled;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::support::{World, assign, class, end, facts, failed, id, job, passed};

const JOBS: usize = 3;
const WORKERS: usize = 2;

#[derive(Clone, Copy, Debug)]
enum Step {
    Submit(usize),
    Claim(usize, usize),
    Start(usize),
    Finish(usize, u8),
    Cancel(usize),
    Beat(usize),
    Sweep,
    Pass(u64),
    /// A worker reports with a lease that it held before.
    OldFinish(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let job = 0..JOBS;
    let worker = 0..WORKERS;
    prop_oneof![
        job.clone().prop_map(Step::Submit),
        (job.clone(), worker.clone()).prop_map(|(j, w)| Step::Claim(j, w)),
        (job.clone(), worker.clone()).prop_map(|(j, w)| Step::Claim(j, w)),
        job.clone().prop_map(Step::Start),
        (job.clone(), 0_u8..4).prop_map(|(j, how)| Step::Finish(j, how)),
        job.clone().prop_map(Step::Cancel),
        worker.prop_map(Step::Beat),
        Just(Step::Sweep),
        prop_oneof![
            Just(1_000_u64),
            Just(5_000),
            Just(15_000),
            Just(20_000),
            Just(400_000)
        ]
        .prop_map(Step::Pass),
        job.prop_map(Step::OldFinish),
    ]
}

/// What the model knows of a job.
#[derive(Clone, Debug)]
struct Known {
    state: JobState,
    cancelled: bool,
    lease: Option<Lease>,
    old: Option<Lease>,
    epoch: u64,
    ready: u64,
    over: Option<Outcome>,
}

struct Model {
    now: u64,
    jobs: BTreeMap<usize, Known>,
    seen: [u64; WORKERS],
    lost: [bool; WORKERS],
}

fn name(job: usize) -> String {
    format!("b{job}")
}

impl Model {
    fn alive(&self, lease: &Lease) -> bool {
        self.now < lease.deadline_unix_ms
    }
}

/// How an attempt ends in the model.
fn ending(how: u8) -> Outcome {
    match how {
        0 => passed(),
        1 => failed(FailureClass::User),
        2 => failed(FailureClass::GuestFault),
        _ => failed(FailureClass::Infrastructure),
    }
}

struct Run {
    w: World,
    workers: Vec<WorkerId>,
    model: Model,
}

impl Run {
    async fn new(w: World) -> Self {
        let mut workers = Vec::new();
        for n in 0..WORKERS {
            workers.push(w.worker(&format!("w{n}")).await);
        }
        let now = w.db.now().await.expect("now");
        let model = Model {
            now,
            jobs: BTreeMap::new(),
            seen: [now; WORKERS],
            lost: [false; WORKERS],
        };
        Self { w, workers, model }
    }

    async fn step(&mut self, step: Step) {
        match step {
            Step::Submit(job_index) => self.submit(job_index).await,
            Step::Claim(job, worker) => self.claim(job, worker).await,
            Step::Start(job) => {
                let Some(lease) = self.held(job) else { return };
                let opened = self.w.db.started(&lease).await.is_ok();
                assert_eq!(opened, self.model.alive(&lease));
                if opened && let Some(known) = self.model.jobs.get_mut(&job) {
                    known.state = JobState::Running {
                        attempt: lease.attempt.number,
                    };
                }
            }
            Step::Finish(job, how) => self.finish(job, how).await,
            Step::Cancel(job) => self.cancel(job).await,
            Step::Beat(worker) => self.beat(worker).await,
            Step::Sweep => self.sweep().await,
            Step::Pass(ms) => {
                self.w.advance(ms);
                self.model.now += ms;
            }
            Step::OldFinish(job) => {
                let known = self.model.jobs.get(&job);
                if let Some(old) = known.and_then(|known| known.old.clone()) {
                    let answer = self.w.db.finish(&old, end(passed())).await;
                    assert!(answer.is_err(), "a lost attempt reported: {answer:?}");
                }
            }
        }
        self.same().await;
    }

    fn held(&self, job: usize) -> Option<Lease> {
        self.model
            .jobs
            .get(&job)
            .and_then(|known| known.lease.clone())
    }

    async fn submit(&mut self, job_index: usize) {
        let fresh = !self.model.jobs.contains_key(&job_index);
        let submitted = self.w.db.submit(job(&name(job_index))).await;
        assert_eq!(submitted.is_ok(), fresh);
        let known = Known {
            state: JobState::new(),
            cancelled: false,
            lease: None,
            old: None,
            epoch: 0,
            ready: self.model.now,
            over: None,
        };
        self.model.jobs.entry(job_index).or_insert(known);
    }

    async fn claim(&mut self, job: usize, worker: usize) {
        let Some(known) = self.model.jobs.get_mut(&job) else {
            return;
        };
        let number = match &known.state {
            JobState::Queued { attempts } => attempts + 1,
            JobState::Leased { attempt } | JobState::Running { attempt } => *attempt,
            JobState::Finished { .. } => 1,
        };
        let may = matches!(known.state, JobState::Queued { .. })
            && known.ready <= self.model.now
            && !self.model.lost[worker];
        let lead = self.w.lead().await;
        let assignment = assign(&name(job), number, &self.workers[worker]);
        let claimed = self
            .w
            .db
            .claim(&lead, vec![assignment])
            .await
            .expect("leads")
            .remove(0);
        let quarantined = matches!(
            claimed,
            Err(kiln_db::ClaimRefused::WorkerUnavailable { .. })
        );
        assert!(
            claimed.is_ok() == may || (may && quarantined),
            "{claimed:?}, {known:?}"
        );
        if let Ok(lease) = claimed {
            assert_eq!(lease.epoch.count, known.epoch + 1, "every claim counts");
            known.epoch += 1;
            known.state = JobState::Leased { attempt: number };
            known.lease = Some(lease);
        }
    }

    async fn finish(&mut self, job: usize, how: u8) {
        let Some(lease) = self.held(job) else { return };
        let alive = self.model.alive(&lease);
        let answer = self.w.db.finish(&lease, end(ending(how))).await;
        assert_eq!(answer.is_ok(), alive, "{answer:?}");
        let (Some(known), Ok(done)) = (self.model.jobs.get_mut(&job), answer) else {
            return;
        };
        known.lease = None;
        match done.state {
            JobState::Finished { outcome } => {
                if known.cancelled {
                    assert_eq!(class(&outcome), Some(FailureClass::Cancelled));
                }
                known.state = JobState::Finished {
                    outcome: outcome.clone(),
                };
                known.over = Some(outcome);
            }
            JobState::Queued { attempts } => {
                assert!(
                    how == 3
                        && !known.cancelled
                        && attempts == lease.attempt.number
                        && attempts < 3
                );
                known.state = JobState::Queued { attempts };
                let found = self
                    .w
                    .db
                    .job(&id(&name(job)))
                    .await
                    .expect("reads")
                    .expect("is there");
                known.ready = found.ready_unix_ms.expect("waits");
                assert!(known.ready >= self.model.now + 5_000);
            }
            other => panic!("{other:?}"),
        }
    }

    async fn cancel(&mut self, job: usize) {
        let answer = self.w.db.cancel(&id(&name(job)), "user:x", None).await;
        let Some(known) = self.model.jobs.get_mut(&job) else {
            assert!(answer.is_err());
            return;
        };
        match answer.expect("is there") {
            Cancelled::TooLate(outcome) => assert_eq!(known.over, Some(outcome)),
            Cancelled::Asked => {
                assert!(known.lease.is_some() && known.over.is_none());
                known.cancelled = true;
            }
            Cancelled::Ended => {
                assert!(matches!(known.state, JobState::Queued { .. }));
                let found = self
                    .w
                    .db
                    .job(&id(&name(job)))
                    .await
                    .expect("reads")
                    .expect("is there");
                let JobState::Finished { outcome } = found.state else {
                    panic!("not over");
                };
                known.state = JobState::Finished {
                    outcome: outcome.clone(),
                };
                known.over = Some(outcome);
            }
        }
    }

    async fn beat(&mut self, worker: usize) {
        let own = |lease: &&Lease| lease.worker == self.workers[worker];
        let held: Vec<Lease> = self
            .model
            .jobs
            .values()
            .filter_map(|known| known.lease.as_ref())
            .filter(own)
            .cloned()
            .collect();
        let beat = self
            .w
            .db
            .heartbeat(&self.workers[worker], &facts(), &held)
            .await
            .expect("answers");
        assert!(beat.unnamed.is_empty());
        for (lease, (_, answer)) in held.iter().zip(&beat.leases) {
            let lives = matches!(answer, kiln_db::LeaseAnswer::Live { .. });
            assert_eq!(lives, self.model.alive(lease), "{answer:?}");
            for known in self.model.jobs.values_mut() {
                if let Some(own) = known.lease.as_mut().filter(|own| **own == *lease)
                    && let kiln_db::LeaseAnswer::Live {
                        until_unix_ms,
                        cancel,
                    } = answer
                {
                    assert_eq!(*until_unix_ms, self.model.now + 15_000);
                    assert_eq!(*cancel, known.cancelled);
                    own.deadline_unix_ms = *until_unix_ms;
                }
            }
        }
        self.model.seen[worker] = self.model.now;
        self.model.lost[worker] = false;
    }

    async fn sweep(&mut self) {
        let swept = self.w.sweep().await;
        let now = self.model.now;
        for worker in 0..WORKERS {
            let silent = !self.model.lost[worker] && self.model.seen[worker] + 20_000 <= now;
            assert_eq!(silent, swept.lost.contains(&self.workers[worker]));
            self.model.lost[worker] |= silent;
        }
        let mut given_up = 0;
        for (job, known) in &mut self.model.jobs {
            let due = known
                .lease
                .as_ref()
                .is_some_and(|l| l.deadline_unix_ms + 5_000 <= now);
            if !due {
                continue;
            }
            given_up += 1;
            let lease = known.lease.take().expect("due");
            let one = swept
                .expired
                .iter()
                .find(|one| one.lease == lease)
                .expect("given up");
            known.state = one.state.clone();
            known.old = Some(lease.clone());
            match &one.state {
                JobState::Finished { outcome } => {
                    let expected = if known.cancelled {
                        FailureClass::Cancelled
                    } else {
                        FailureClass::Lost
                    };
                    assert_eq!(class(outcome), Some(expected));
                    assert!(known.cancelled || lease.attempt.number == 3);
                    known.over = Some(outcome.clone());
                }
                JobState::Queued { .. } => {
                    assert!(!known.cancelled);
                    let found = self
                        .w
                        .db
                        .job(&id(&name(*job)))
                        .await
                        .expect("reads")
                        .expect("is there");
                    known.ready = found.ready_unix_ms.expect("waits");
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(swept.expired.len(), given_up);
    }

    /// The database says of every job what the model says.
    async fn same(&self) {
        for (job, known) in &self.model.jobs {
            let found = self
                .w
                .db
                .job(&id(&name(*job)))
                .await
                .expect("reads")
                .expect("is there");
            assert_eq!(found.state, known.state);
            assert_eq!(found.lease, known.lease);
            let events = self
                .w
                .db
                .events_after(&id(&name(*job)), 0, 500)
                .await
                .expect("reads");
            assert!(events.iter().zip(1..).all(|(event, seq)| event.seq == seq));
            assert_eq!(found.last_event, events.len() as u64);
            let ends = events
                .iter()
                .filter(|event| event.kind == "finished")
                .count();
            assert_eq!(ends, usize::from(known.over.is_some()));
        }
    }
}

fn check(cases: u32, world: impl AsyncFn() -> World) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("runtime");
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Config::default()
    };
    let steps = prop::collection::vec(step(), 1..40);
    let mut runner = TestRunner::new(config);
    let result = runner.run(&steps, |steps| {
        runtime.block_on(async {
            let mut run = Run::new(world().await).await;
            for step in steps {
                run.step(step).await;
            }
            run.w.db.close().await;
        });
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn any_order_gives_what_the_model_says_on_sqlite() {
    check(40, World::sqlite);
}

#[test]
fn any_order_gives_what_the_model_says_on_postgres() {
    check(6, World::postgres);
}
