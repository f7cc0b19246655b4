//! What a decision is made of: jobs that wait, jobs that run, workers, rules, history. Plain data, read from the database at one moment.

use std::collections::{BTreeMap, BTreeSet};

use kiln_core::dispatch::{Requirements, Room, WorkerFacts, WorkerState};
use kiln_core::{AttemptId, JobId, Label, Priority, QueueName, TenantName, WorkerId};
use serde::{Deserialize, Serialize};

use crate::plan::Reservation;

/// Everything a decision may depend on. Lists may come in any order; job and worker ids are unique in them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolView {
    /// The database's time, milliseconds since the Unix epoch.
    pub now_unix_ms: u64,
    /// The controller started just now: nothing is given away before its workers had one lease time to report.
    pub settling: bool,
    /// How hosts are filled.
    pub profile: Profile,
    /// Most jobs that run at a time in the whole installation; none means no limit.
    pub running_max: Option<u32>,
    /// Jobs that wait.
    pub pending: Vec<PendingJob>,
    /// Attempts that hold a live lease, on whatever worker, also on those of other pools: they count for limits, shares and groups.
    pub running: Vec<RunningJob>,
    /// Workers of this pool, in every state.
    pub workers: Vec<Worker>,
    /// Rules of tenants; one that is missing has [`TenantRule::default`].
    pub tenants: BTreeMap<TenantName, TenantRule>,
    /// Rules of queues; one that is missing has [`QueueRule::default`].
    pub queues: BTreeMap<QueueName, QueueRule>,
    /// How long such jobs took before.
    pub history: BTreeMap<HistoryKey, Typical>,
    /// What the last plan reserved, so that a host stays reserved for the job it was reserved for, even before jobs of fairer share. Empty after a
    /// start; always empty would let a large job of a busy tenant wait longer.
    pub reserved: Vec<Reservation>,
}

/// How hosts are filled.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// The emptiest host first: the fastest jobs.
    #[default]
    Spread,
    /// The fullest host first: hosts become empty and can be switched off.
    Pack,
}

/// A job that waits.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PendingJob {
    /// The attempt that would start now.
    pub attempt: AttemptId,
    /// Whose.
    pub tenant: TenantName,
    /// Where it waits.
    pub queue: QueueName,
    /// Its order there.
    pub priority: Priority,
    /// What it needs of a host besides room.
    pub requires: Requirements,
    /// Room it needs. `machines` is 1 unless it uses several at a time.
    pub need: Room,
    /// At most one job of this group of the tenant runs at a time, in the order they were queued.
    pub group: Option<Label>,
    /// When the job was queued first, milliseconds since the Unix epoch.
    pub queued_unix_ms: u64,
    /// Not before this time (backoff after a failure of ours); 0 means at once.
    pub not_before_unix_ms: u64,
    /// Hosts where an earlier attempt failed for reasons of ours: used only when there is no other.
    pub avoid: BTreeSet<WorkerId>,
    /// What kind of work, the last part of its [`HistoryKey`] (`build`, `run`).
    pub kind: Label,
    /// The template a machine for it would be cloned from; a worker that has it in [`Worker::templates`] is preferred.
    pub template: Option<Label>,
}

/// An attempt that holds a live lease.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunningJob {
    /// The job.
    pub job: JobId,
    /// Whose.
    pub tenant: TenantName,
    /// Where it waited.
    pub queue: QueueName,
    /// Where it runs.
    pub worker: WorkerId,
    /// Room it holds.
    pub room: Room,
    /// Its CPUs are whole CPUs of the host.
    pub pinned_cpus: bool,
    /// The group it holds.
    pub group: Option<Label>,
    /// When its attempt was leased, milliseconds since the Unix epoch.
    pub started_unix_ms: u64,
    /// When it should end by the p50 of such jobs, if there is one.
    pub expected_end_unix_ms: Option<u64>,
}

/// A host that runs attempts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Worker {
    /// Its id.
    pub id: WorkerId,
    /// Whether it gets jobs.
    pub state: WorkerState,
    /// What it says of itself. `warm` names tenants whose head it holds.
    pub facts: WorkerFacts,
    /// Labels fixed by its join token.
    pub labels: BTreeMap<Label, Label>,
    /// Tenants it may serve, fixed by its join token; none means all.
    pub tenants: Option<BTreeSet<TenantName>>,
    /// Room of its capacity that is taken, by leases or otherwise. Never counted as less than what [`PoolView::running`] holds there.
    pub held: Room,
    /// CPUs of the host that can be given to a machine whole; none means as many as its capacity, that is, no overcommitment.
    pub whole_cpus: Option<u32>,
    /// Infrastructure failures of late.
    pub infra_failures: u32,
    /// Templates it has ready.
    pub templates: BTreeSet<Label>,
}

/// What an operator allows a tenant.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct TenantRule {
    /// Its share, relative to the weights of others; 0 counts as 1.
    pub weight: u32,
    /// Most of its jobs that run at a time; none means no limit.
    pub running_max: Option<u32>,
    /// How many more than `running_max` may run when what it uses would otherwise be idle.
    pub burst: u32,
    /// Running jobs it is sure of: it comes first below this, and others leave as much of the global limit.
    pub reserved: u32,
}

impl Default for TenantRule {
    fn default() -> Self {
        Self {
            weight: 100,
            running_max: None,
            burst: 0,
            reserved: 0,
        }
    }
}

/// What an operator set for a queue. The limit counts all tenants' jobs of that queue; the weight shares each tenant's part among its queues.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct QueueRule {
    /// Its share of the tenant's part, relative to the tenant's other queues; 0 counts as 1.
    pub weight: u32,
    /// Nothing starts from it.
    pub paused: bool,
    /// Most of its jobs that run at a time; none means no limit.
    pub running_max: Option<u32>,
}

impl Default for QueueRule {
    fn default() -> Self {
        Self {
            weight: 100,
            paused: false,
            running_max: None,
        }
    }
}

/// Jobs that are alike for estimates. Serialises as one text, so that it can be the key of a JSON object.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct HistoryKey {
    /// Whose.
    pub tenant: TenantName,
    /// Which queue.
    pub queue: QueueName,
    /// What kind of work.
    pub kind: Label,
}

/// Why a text is not a [`HistoryKey`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a history key is TENANT QUEUE KIND")]
pub struct ParseHistoryKeyError;

impl From<HistoryKey> for String {
    fn from(key: HistoryKey) -> Self {
        format!("{} {} {}", key.tenant, key.queue, key.kind)
    }
}

impl TryFrom<String> for HistoryKey {
    type Error = ParseHistoryKeyError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let parts: Vec<&str> = text.split(' ').collect();
        let [tenant, queue, kind] = parts[..] else {
            return Err(ParseHistoryKeyError);
        };
        Ok(Self {
            tenant: tenant.parse().map_err(|_| ParseHistoryKeyError)?,
            queue: queue.parse().map_err(|_| ParseHistoryKeyError)?,
            kind: kind.parse().map_err(|_| ParseHistoryKeyError)?,
        })
    }
}

/// How long jobs of one key took.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Typical {
    /// Median from lease to end, milliseconds.
    pub p50_ms: u64,
    /// How many runs that is the median of.
    pub runs: u32,
}
