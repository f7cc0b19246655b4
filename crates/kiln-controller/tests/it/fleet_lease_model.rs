//! The controller of the simulation: what `kiln-db` does with leases, without a database. See [`crate::fleet_lease_sim`].

use kiln_core::job::JobEvent;
use kiln_core::{
    AttemptId, Epoch, FailureClass, JobState, Lease, Outcome, TenantName, Verdict, WorkerId,
};

use crate::fleet_lease_sim::Broken;

const TTL_MS: u64 = 15_000;
const GRACE_MS: u64 = 5_000;
const BACKOFF_MS: u64 = 5_000;
const BACKOFF_MAX_MS: u64 = 300_000;
const ATTEMPTS_MAX: u32 = 3;

/// What came of a finish.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Finished {
    Now,
    Before,
    Refused,
}

/// How the jobs of a schedule ended.
#[derive(Default, Debug)]
pub(crate) struct Ends {
    pub(crate) passed: u64,
    pub(crate) lost: u64,
    pub(crate) cancelled: u64,
}

struct Job {
    state: JobState,
    live: Option<Lease>,
    count: u64,
    ready_ms: u64,
    cancel: bool,
    /// Attempts that their workers ended.
    reported: Vec<Lease>,
    /// The newest epoch whose side effect was taken.
    newest: u64,
    /// How often the job was over.
    over: u32,
}

pub(crate) struct Controller {
    jobs: Vec<Job>,
    offset: u64,
    not_before_ms: u64,
    broken: Broken,
}

fn name(worker: usize) -> WorkerId {
    format!("w{worker}").parse().expect("name")
}

fn outcome(class: Option<FailureClass>) -> Outcome {
    let verdict = match class {
        None => Verdict::Passed,
        Some(class) => Verdict::Failed {
            class,
            message: String::new(),
            hint: None,
            command_code: None,
            reason: None,
        },
    };
    Outcome {
        verdict,
        phases_ms: Vec::new(),
    }
}

impl Job {
    fn apply(&mut self, event: JobEvent) -> Result<(), String> {
        let next = self.state.apply(event);
        self.state = next.map_err(|error| error.to_string())?;
        self.over += u32::from(self.state.is_terminal());
        Ok(())
    }

    fn number(&self) -> u32 {
        match self.state {
            JobState::Queued { attempts } => attempts + 1,
            JobState::Leased { attempt } | JobState::Running { attempt } => attempt,
            JobState::Finished { .. } => 0,
        }
    }
}

impl Controller {
    pub(crate) fn new(jobs: usize, offset: u64, broken: Broken) -> Self {
        let job = || Job {
            state: JobState::new(),
            live: None,
            count: 0,
            ready_ms: 0,
            cancel: false,
            reported: Vec::new(),
            newest: 0,
            over: 0,
        };
        Self {
            jobs: (0..jobs).map(|_| job()).collect(),
            offset,
            not_before_ms: 0,
            broken,
        }
    }

    fn job(&mut self, attempt: &AttemptId) -> &mut Job {
        let number = attempt.job.as_str().trim_start_matches('j');
        let number: usize = number.parse().expect("a job of this world");
        &mut self.jobs[number]
    }

    fn presented(worker: usize, attempt: &AttemptId, epoch: Epoch) -> Lease {
        Lease {
            attempt: attempt.clone(),
            tenant: TenantName::local(),
            worker: name(worker),
            epoch,
            deadline_unix_ms: 0,
        }
    }

    /// Some: it lives, and whether somebody asked to stop it.
    pub(crate) fn beat(
        &mut self,
        now: u64,
        worker: usize,
        attempt: &AttemptId,
        epoch: Epoch,
    ) -> Option<bool> {
        let now = self.offset + now;
        let job = self.job(attempt);
        let presented = Self::presented(worker, attempt, epoch);
        presented.check(job.live.as_ref(), now).ok()?;
        let live = job.live.as_mut()?;
        live.deadline_unix_ms = now + TTL_MS;
        Some(job.cancel)
    }

    pub(crate) fn leases_of(&self, worker: usize, held: &[(AttemptId, Epoch)]) -> Vec<Lease> {
        let own = name(worker);
        let leases = self.jobs.iter().filter_map(|job| job.live.clone());
        leases
            .filter(|lease| lease.worker == own)
            .filter(|lease| !held.contains(&(lease.attempt.clone(), lease.epoch)))
            .collect()
    }

    /// Whether a side effect was taken. An older epoch after a newer one breaks the protocol, and so does one of a job that is over.
    pub(crate) fn effect(
        &mut self,
        now: u64,
        worker: usize,
        attempt: &AttemptId,
        epoch: Epoch,
    ) -> Result<bool, String> {
        let (now, broken) = (self.offset + now, self.broken);
        let job = self.job(attempt);
        let presented = Self::presented(worker, attempt, epoch);
        let taken = match broken {
            Broken::DoorIgnoresEpoch => job.live.is_some(),
            _ => presented.check(job.live.as_ref(), now).is_ok(),
        };
        if !taken {
            return Ok(false);
        }
        if job.over > 0 || epoch.count < job.newest {
            return Err(format!(
                "a side effect of {attempt}, epoch {epoch}, was taken after one of epoch {}",
                job.newest
            ));
        }
        job.newest = epoch.count;
        Ok(true)
    }

    pub(crate) fn finish(
        &mut self,
        now: u64,
        worker: usize,
        attempt: &AttemptId,
        epoch: Epoch,
    ) -> Result<Finished, String> {
        let now = self.offset + now;
        let job = self.job(attempt);
        let presented = Self::presented(worker, attempt, epoch);
        if presented.check(job.live.as_ref(), now).is_err() {
            let same = |lease: &Lease| {
                lease.attempt == *attempt
                    && lease.epoch == epoch
                    && lease.worker == presented.worker
            };
            let before = job.reported.iter().any(same);
            return Ok(if before {
                Finished::Before
            } else {
                Finished::Refused
            });
        }
        let class = job.cancel.then_some(FailureClass::Cancelled);
        job.apply(JobEvent::Ended {
            outcome: outcome(class),
        })?;
        job.reported.extend(job.live.take());
        Ok(Finished::Now)
    }

    pub(crate) fn claim(&mut self, now: u64, worker: usize) -> Option<Lease> {
        let now = self.offset + now;
        let (place, job) = self.jobs.iter_mut().enumerate().find(|(_, job)| {
            matches!(job.state, JobState::Queued { .. }) && job.ready_ms <= now && !job.cancel
        })?;
        let lease = Lease {
            attempt: AttemptId {
                job: format!("j{place}").parse().expect("name"),
                number: job.number(),
            },
            tenant: TenantName::local(),
            worker: name(worker),
            epoch: Epoch {
                incarnation: 1,
                count: job.count + 1,
            },
            deadline_unix_ms: now + TTL_MS,
        };
        job.count += 1;
        job.apply(JobEvent::Leased).expect("it is queued");
        job.live = Some(lease.clone());
        Some(lease)
    }

    /// Gives up what was not renewed in time.
    pub(crate) fn expire(&mut self, now: u64) -> Vec<Lease> {
        let now = self.offset + now;
        if now < self.not_before_ms {
            return Vec::new();
        }
        let grace = match self.broken {
            Broken::NoGrace => 0,
            _ => GRACE_MS,
        };
        let mut expired = Vec::new();
        for job in &mut self.jobs {
            let over = |live: &Lease| live.deadline_unix_ms + grace <= now;
            if !job.live.as_ref().is_some_and(over) {
                continue;
            }
            let Some(lease) = job.live.take() else {
                continue;
            };
            let event = match job.cancel {
                true => JobEvent::Ended {
                    outcome: outcome(Some(FailureClass::Cancelled)),
                },
                false => JobEvent::AttemptFailed {
                    outcome: outcome(Some(FailureClass::Lost)),
                    attempts_max: ATTEMPTS_MAX,
                },
            };
            job.apply(event).expect("it had a lease");
            job.ready_ms = lease.deadline_unix_ms + BACKOFF_MS;
            expired.push(lease);
        }
        expired
    }

    pub(crate) fn cancel(&mut self, job: usize) {
        let job = &mut self.jobs[job];
        if job.state.is_terminal() || job.cancel {
            return;
        }
        job.cancel = true;
        if job.live.is_none() {
            let outcome = outcome(Some(FailureClass::Cancelled));
            job.apply(JobEvent::Ended { outcome }).expect("it waits");
        }
    }

    /// The file is opened again: leases live for one TTL more, and nothing expires within it.
    pub(crate) fn restarted(&mut self, now: u64, offset: u64) {
        self.offset = offset;
        let now = offset + now;
        self.not_before_ms = now + TTL_MS;
        for job in &mut self.jobs {
            if let Some(live) = &mut job.live {
                live.deadline_unix_ms = now + TTL_MS;
            }
            if job.ready_ms > now + BACKOFF_MAX_MS {
                job.ready_ms = now;
            }
        }
    }

    pub(crate) fn all_over(&self) -> bool {
        self.jobs.iter().all(|job| job.state.is_terminal())
    }

    pub(crate) fn states(&self) -> Vec<&JobState> {
        self.jobs.iter().map(|job| &job.state).collect()
    }

    /// Every job was over exactly once, for a reason, and holds no lease.
    pub(crate) fn check_end(&self) -> Result<Ends, String> {
        let mut ends = Ends::default();
        for (place, job) in self.jobs.iter().enumerate() {
            let JobState::Finished { outcome } = &job.state else {
                return Err(format!("job {place} was lost: {:?}", job.state));
            };
            if job.over != 1 || job.live.is_some() {
                return Err(format!("job {place} was over {} times", job.over));
            }
            let reports = job.reported.len();
            match &outcome.verdict {
                Verdict::Passed if reports == 1 => ends.passed += 1,
                Verdict::Failed {
                    class: FailureClass::Cancelled,
                    ..
                } if reports <= 1 && job.cancel => ends.cancelled += 1,
                Verdict::Failed {
                    class: FailureClass::Lost,
                    ..
                } if reports == 0 && job.count == u64::from(ATTEMPTS_MAX) => ends.lost += 1,
                other => return Err(format!("job {place} ended as {other:?}")),
            }
        }
        Ok(ends)
    }
}
