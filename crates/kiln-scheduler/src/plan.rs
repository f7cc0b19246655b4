//! The decision: [`plan`] and what it gives.

use kiln_core::dispatch::{Assignment, PendingReason};
use kiln_core::{JobId, WorkerId};
use serde::{Deserialize, Serialize};

use crate::prepare;
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

/// Decides. `docs/concepts/scheduling.md` tells the order, the limits and the reasons.
#[must_use]
pub fn plan(view: &PoolView) -> Plan {
    let mut decision = prepare::decision(view);
    decision.run();
    decision.finish()
}
