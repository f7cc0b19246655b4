//! The decision: [`plan`] and what it gives.

use kiln_core::dispatch::{Assignment, PendingReason, Room, WorkerState};
use kiln_core::{JobId, WorkerId};
use serde::{Deserialize, Serialize};

use crate::view::PoolView;

/// What to do now, and why the rest waits.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Plan {
    /// Leases to make, the most urgent first.
    pub assignments: Vec<Assignment>,
    /// One entry for every pending job without an assignment, in the order they were queued.
    pub reasons: Vec<Waiting>,
    /// Hosts that are kept for large jobs. Give them back in the next view.
    pub reservations: Vec<Reservation>,
}

/// `(job, reason, estimate)` of a job that waits.
pub type Waiting = (JobId, PendingReason, Option<Estimate>);

/// When a job should start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Estimate {
    /// Milliseconds since the Unix epoch.
    pub start_unix_ms: u64,
    /// What the number rests on.
    pub basis: EstimateBasis,
}

/// What an estimate rests on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "basis")]
pub enum EstimateBasis {
    /// When jobs that run now are expected to end.
    ExpectedEnds,
    /// The p50 of jobs that come before it, too; the one with the shortest history had so many runs.
    P50 {
        /// Runs.
        runs: u32,
    },
}

/// A host kept for a job that needs more room than any host has free.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Reservation {
    /// For whom.
    pub job: JobId,
    /// Where.
    pub worker: WorkerId,
    /// When there should be room, milliseconds since the Unix epoch; none when a job that must end first has no expected end.
    pub from_unix_ms: Option<u64>,
}

/// Decides. See `docs/concepts/scheduling.md` for the order and the limits.
#[must_use]
pub fn plan(view: &PoolView) -> Plan {
    let mut order: Vec<_> = view.pending.iter().collect();
    order.sort_by(|a, b| (a.queued_unix_ms, &a.attempt).cmp(&(b.queued_unix_ms, &b.attempt)));
    let mut workers: Vec<_> = view.workers.iter().collect();
    workers.sort_by(|a, b| a.id.cmp(&b.id));
    let mut held: Vec<Room> = workers.iter().map(|worker| worker.held).collect();
    let mut plan = Plan::default();
    for job in order {
        let due = !view.settling && job.not_before_unix_ms <= view.now_unix_ms;
        let host = workers.iter().zip(&held).position(|(worker, held)| {
            let capacity = &worker.facts.capacity;
            due && worker.state == WorkerState::Active
                && worker
                    .tenants
                    .as_ref()
                    .is_none_or(|may| may.contains(&job.tenant))
                && job
                    .requires
                    .arch
                    .as_ref()
                    .is_none_or(|arch| *arch == worker.facts.arch)
                && capacity.holds(&plus(held, &job.need))
        });
        match host {
            Some(host) => {
                held[host] = plus(&held[host], &job.need);
                plan.assignments.push(Assignment {
                    attempt: job.attempt.clone(),
                    worker: workers[host].id.clone(),
                });
            }
            None => {
                let reason = if view.settling {
                    PendingReason::Settling
                } else {
                    PendingReason::New
                };
                plan.reasons.push((job.attempt.job.clone(), reason, None));
            }
        }
    }
    plan
}

fn plus(a: &Room, b: &Room) -> Room {
    Room {
        cpus: a.cpus.saturating_add(b.cpus),
        memory: kiln_core::ByteSize(a.memory.0.saturating_add(b.memory.0)),
        disk: kiln_core::ByteSize(a.disk.0.saturating_add(b.disk.0)),
        machines: a.machines.saturating_add(b.machines),
    }
}
