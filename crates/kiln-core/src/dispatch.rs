//! How a job is queued: its queue, order, what it needs of a host, and why it still waits.
//!
//! Meaning only: `kiln-db` keeps these as rows, `kiln-scheduler` decides with them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{AttemptId, ByteSize, JobId, QueueName, TenantName, WorkerId};

/// Most labels one job may ask for, and one worker may have.
pub const LABELS_MAX: usize = 32;
/// Longest label name or value, concurrency group or tag, in bytes.
pub const LABEL_BYTES_MAX: usize = 120;
/// Most tags of one job.
pub const TAGS_MAX: usize = 16;
/// Labels that begin so are kiln's own: no request and no join token may name them.
pub const RESERVED_PREFIX: &str = "kiln/";
/// Label of a worker that is one command's own: it runs only jobs that ask for it with its value.
pub const OWN_LABEL: &str = "kiln/own";

/// First generation of the workers' protocol whose workers hold a job to its policy.
pub const POLICY_GENERATION: u32 = 2;
/// First generation whose workers keep a machine when its job is over.
pub const KEEP_GENERATION: u32 = 2;
/// First generation whose workers let somebody hold a command's streams while it runs.
pub const ATTEND_GENERATION: u32 = 3;
/// First generation whose workers read the policy of an untrusted commit from a trusted ref of its repository.
pub const POLICY_REF_GENERATION: u32 = 3;
/// First generation whose workers bound the rate of a machine's disks and the open files of its processes.
pub const BOUNDS_GENERATION: u32 = 3;

/// Why a text is not a label.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is not a label: use 1-120 letters, digits and - _ . / : (no spaces or control characters)"
)]
pub struct ParseLabelError(String);

/// A word of a label, tag or concurrency group: printable, no white space, bounded. Safe in logs, tables, URLs and metrics.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Label(String);

impl Label {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Label {
    type Error = ParseLabelError;

    fn try_from(text: String) -> Result<Self, ParseLabelError> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"-_./:".contains(&b);
        if text.is_empty() || text.len() > LABEL_BYTES_MAX || !text.bytes().all(legal) {
            return Err(ParseLabelError(text.chars().take(80).collect()));
        }
        Ok(Self(text))
    }
}

impl std::str::FromStr for Label {
    type Err = ParseLabelError;

    fn from_str(text: &str) -> Result<Self, ParseLabelError> {
        text.to_owned().try_into()
    }
}

impl From<Label> for String {
    fn from(label: Label) -> Self {
        label.0
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Order among jobs: -100 (last) to 100 (first). What a caller may ask for is bounded by its token.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize,
)]
#[serde(try_from = "i16", into = "i16")]
pub struct Priority(i16);

/// Why a number is not a priority.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("priority {0} is out of range: -100 (last) to 100 (first)")]
pub struct PriorityRange(i16);

impl Priority {
    /// The number.
    #[must_use]
    pub fn get(self) -> i16 {
        self.0
    }
}

impl TryFrom<i16> for Priority {
    type Error = PriorityRange;

    fn try_from(value: i16) -> Result<Self, PriorityRange> {
        if (-100..=100).contains(&value) {
            Ok(Self(value))
        } else {
            Err(PriorityRange(value))
        }
    }
}

impl From<Priority> for i16 {
    fn from(priority: Priority) -> Self {
        priority.0
    }
}

/// What a job needs of a host besides room.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Requirements {
    /// CPU architecture in OCI terms (`amd64`, `arm64`); none means any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arch: Option<Label>,
    /// Language runtime the host must have a base for (`node`, `python`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime: Option<Label>,
    /// Labels the worker must have with these values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<Label, Label>,
    /// Whole CPUs of the host for this machine alone.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub pinned_cpus: bool,
    /// Oldest generation of the workers' protocol that the worker speaks; 0 where any does. Set by the controller, never by a request.
    #[serde(skip_serializing_if = "is_any_generation")]
    pub generation: u32,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands fields by reference"
)]
fn is_any_generation(generation: &u32) -> bool {
    *generation == 0
}

impl Requirements {
    /// Asks for the one worker that is a command's own.
    pub fn only_own(&mut self, worker: &WorkerId) {
        self.labels.extend(own_labels(worker));
    }

    /// The worker that alone may run the job, when it is some command's own.
    #[must_use]
    pub fn own(&self) -> Option<&Label> {
        let mut labels = self.labels.iter();
        labels.find_map(|(name, value)| (name.as_str() == OWN_LABEL).then_some(value))
    }
}

/// The labels of a worker that is one command's own.
#[must_use]
pub fn own_labels(worker: &WorkerId) -> BTreeMap<Label, Label> {
    // A worker's name has only characters that a label may have.
    let value = worker.as_str().parse();
    OWN_LABEL.parse().ok().zip(value.ok()).into_iter().collect()
}

/// How a job is queued.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dispatch {
    /// Where it waits.
    pub queue: QueueName,
    /// Its order there.
    pub priority: Priority,
    /// What it needs of a host.
    pub requires: Requirements,
    /// At most one job of this group of the tenant runs at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency_group: Option<Label>,
    /// Free words for lists and filters.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub tags: BTreeSet<Label>,
    /// Most attempts, the first included; only infrastructure failures and lost workers use more than one.
    pub attempts_max: u32,
}

impl Dispatch {
    /// Attempts of a job unless it says otherwise: the first and two retries.
    pub const ATTEMPTS_MAX: u32 = 3;
}

impl Default for Dispatch {
    fn default() -> Self {
        Self {
            queue: QueueName::default_queue(),
            priority: Priority::default(),
            requires: Requirements::default(),
            concurrency_group: None,
            tags: BTreeSet::new(),
            attempts_max: Self::ATTEMPTS_MAX,
        }
    }
}

/// Room that a job needs or a host has left.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize,
)]
pub struct Room {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory: ByteSize,
    /// Disk.
    pub disk: ByteSize,
    /// Machines.
    pub machines: u32,
}

impl Room {
    /// Whether `need` fits into this.
    #[must_use]
    pub fn holds(&self, need: &Self) -> bool {
        need.cpus <= self.cpus
            && need.memory <= self.memory
            && need.disk <= self.disk
            && need.machines <= self.machines
    }
}

/// The scheduler's decision, before it is leased.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Assignment {
    /// Which job; its next attempt is meant.
    pub attempt: AttemptId,
    /// To whom.
    pub worker: WorkerId,
}

/// Why a job still waits. Stored with the job as data; a person reads it by `kiln job why`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reason")]
pub enum PendingReason {
    /// It came just now; no decision was made yet.
    New,
    /// No worker is connected at all.
    NoWorkers,
    /// Workers there are, but none fits; the first requirement that leaves none.
    NoWorkerMatches {
        /// What is missing, for example `label gpu=a100`, `arch arm64`, `runtime node`.
        missing: String,
        /// Workers that were looked at.
        workers: u32,
    },
    /// Every fitting worker is drained, cordoned, quarantined or lost.
    WorkersUnavailable {
        /// How many fit otherwise.
        workers: u32,
    },
    /// Fitting workers have too little room now.
    Capacity {
        /// What it needs.
        need: Room,
        /// The most that one fitting worker has free.
        best: Room,
    },
    /// It is larger than any fitting worker is when empty.
    TooLarge {
        /// What it needs.
        need: Room,
        /// The largest fitting worker.
        largest: Room,
    },
    /// A limit on running jobs is reached.
    Quota {
        /// Whose: `tenant`, `queue` or `global`.
        scope: QuotaScope,
        /// Running now.
        running: u32,
        /// Most at a time.
        limit: u32,
    },
    /// Another job of its concurrency group is first. A holder of another tenant is never named.
    ConcurrencyGroup {
        /// The group.
        group: Label,
        /// Who holds it, if it may be named.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        holder: Option<JobId>,
    },
    /// Its queue is paused.
    Paused {
        /// The queue.
        queue: QueueName,
    },
    /// It failed for reasons of ours and waits before the next attempt.
    Backoff {
        /// When it may go on, milliseconds since the Unix epoch.
        until_unix_ms: u64,
    },
    /// Jobs of fairer share or higher priority come first.
    Behind {
        /// Jobs before it in the order.
        jobs: u32,
    },
    /// A larger job that waited longer has this host reserved.
    Reserved,
    /// The controller started just now and waits for its workers to report.
    Settling,
}

/// Whose limit.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuotaScope {
    /// The tenant's.
    Tenant,
    /// The queue's.
    Queue,
    /// The whole installation's.
    Global,
}

impl PendingReason {
    /// A stable short name, for metrics and filters.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::New => "new",
            Self::NoWorkers => "no_workers",
            Self::NoWorkerMatches { .. } => "no_worker_matches",
            Self::WorkersUnavailable { .. } => "workers_unavailable",
            Self::Capacity { .. } => "capacity",
            Self::TooLarge { .. } => "too_large",
            Self::Quota { .. } => "quota",
            Self::ConcurrencyGroup { .. } => "concurrency_group",
            Self::Paused { .. } => "paused",
            Self::Backoff { .. } => "backoff",
            Self::Behind { .. } => "behind",
            Self::Reserved => "reserved",
            Self::Settling => "settling",
        }
    }

    /// Every short name there is, so that metrics can exist from the start.
    pub const CODES: [&'static str; 13] = [
        "new",
        "no_workers",
        "no_worker_matches",
        "workers_unavailable",
        "capacity",
        "too_large",
        "quota",
        "concurrency_group",
        "paused",
        "backoff",
        "behind",
        "reserved",
        "settling",
    ];
}

/// What a worker is and has, as it says when it joins and with each heartbeat; labels, tenants and pool are fixed by its join token.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WorkerFacts {
    /// CPU architecture in OCI terms.
    pub arch: Label,
    /// Language runtimes it has bases for.
    pub runtimes: BTreeSet<Label>,
    /// Room of the whole host for machines.
    pub capacity: Room,
    /// CPUs of the host that can be given to a machine whole; none means as many as its capacity, that is, no overcommitment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole_cpus: Option<u32>,
    /// Program version.
    pub version: String,
    /// Tenants whose head it holds, so that warm hosts are preferred. Bounded by the worker.
    pub warm: BTreeSet<TenantName>,
    /// Generation of the workers' protocol that it speaks: the controller writes here what the worker's requests say, whatever this says.
    #[serde(default = "first_generation")]
    pub generation: u32,
}

/// What a worker speaks of whom nothing newer is known.
fn first_generation() -> u32 {
    1
}

/// Whether a worker gets jobs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// It gets jobs.
    Active,
    /// It finishes what it has and gets no more.
    Draining,
    /// An operator marked it unusable; what runs may go on.
    Cordoned,
    /// It failed too often in a row for reasons of its own.
    Quarantined,
    /// Its heartbeat is missing.
    Lost,
}

impl WorkerState {
    /// Whether the scheduler may give it jobs.
    #[must_use]
    pub fn takes_jobs(self) -> bool {
        matches!(self, Self::Active)
    }

    /// Stable short name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Draining => "draining",
            Self::Cordoned => "cordoned",
            Self::Quarantined => "quarantined",
            Self::Lost => "lost",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_could_break_a_line_a_query_or_a_page_are_refused() {
        for bad in [
            "",
            "a b",
            "a\nb",
            "x\u{1b}[2J",
            "<b>",
            "a'--",
            "a\"",
            "é",
            &"a".repeat(121),
        ] {
            assert!(bad.parse::<Label>().is_err(), "{bad:?}");
        }
        for good in ["gpu", "team/build:1.2_x"] {
            assert!(good.parse::<Label>().is_ok(), "{good}");
        }
    }

    #[test]
    fn a_priority_stays_in_its_range() {
        assert!(Priority::try_from(101).is_err());
        assert!(serde_json::from_str::<Priority>("-101").is_err());
        assert_eq!(
            serde_json::from_str::<Priority>("100")
                .map(Priority::get)
                .ok(),
            Some(100)
        );
    }

    #[test]
    fn every_reason_has_its_code_in_the_list() {
        let reason = PendingReason::Paused {
            queue: QueueName::default_queue(),
        };
        let value = serde_json::to_value(&reason).expect("serialises");
        assert_eq!(value["reason"], reason.code());
        assert!(PendingReason::CODES.contains(&reason.code()));
    }

    #[test]
    fn room_holds_only_what_fits_in_every_part() {
        let room = Room {
            cpus: 4,
            memory: ByteSize::mib(1024),
            disk: ByteSize::mib(10),
            machines: 1,
        };
        assert!(room.holds(&room));
        assert!(!room.holds(&Room {
            machines: 2,
            ..room
        }));
        assert!(!room.holds(&Room {
            memory: ByteSize::mib(1025),
            ..room
        }));
    }
}
