//! What is kept of a job: the words of the public API, and how a row becomes one.

use std::collections::{BTreeMap, BTreeSet};

use kiln_core::dispatch::{Requirements, Room};
use kiln_core::{
    AttemptId, Digest, Epoch, JobId, JobKind, JobRequest, JobState, Label, Lease, Outcome,
    PendingReason, PoolName, Priority, QueueName, Receipt, TenantName, WorkerId,
};
use serde::{Deserialize, Serialize};

use crate::engine::Row;
use crate::error::DbError;

/// A job on its way in.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// What is asked, validated.
    pub request: JobRequest,
    /// Makes a repeated submission give the same job.
    pub idempotency: Option<Idempotency>,
    /// Who asked, for people and audit rows.
    pub submitted_by: String,
    /// Where this job's own webhooks go.
    pub notify_url: Option<String>,
    /// Free labels for lists and filters.
    pub labels: BTreeMap<Label, Label>,
}

/// An `Idempotency-Key` and what was sent with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Idempotency {
    /// The key, within the tenant.
    pub key: String,
    /// Digest of the request as it was sent: the same key with another body is an error of the caller.
    pub body: Digest,
}

/// When a scheduler thinks a job begins, and what it thinks so from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Estimate {
    /// Milliseconds until it begins.
    pub wait_ms: u64,
    /// Finished jobs this was learnt from; 0 means a guess.
    pub samples: u32,
    /// In words: `median of the last 50 builds of this queue`.
    pub basis: String,
}

/// Somebody asked to stop a job.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CancelMark {
    /// When, milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// Who.
    pub by: String,
    /// Why, if they said.
    pub reason: Option<String>,
}

/// A job, in the queue or over.
#[derive(Clone, PartialEq, Debug)]
pub struct Job {
    /// What was asked.
    pub request: JobRequest,
    /// Where it stands.
    pub state: JobState,
    /// Its pool of workers.
    pub pool: PoolName,
    /// Free labels.
    pub labels: BTreeMap<Label, Label>,
    /// Who asked.
    pub submitted_by: String,
    /// Where its own webhooks go.
    pub notify_url: Option<String>,
    /// When it came, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// When it may run, while it is queued: later than `created_unix_ms` after a failed attempt.
    pub ready_unix_ms: Option<u64>,
    /// The live lease.
    pub lease: Option<Lease>,
    /// When the running or last attempt was leased.
    pub leased_unix_ms: Option<u64>,
    /// When its machine was ready.
    pub started_unix_ms: Option<u64>,
    /// When it was over.
    pub finished_unix_ms: Option<u64>,
    /// The worker that has or had it last.
    pub worker: Option<WorkerId>,
    /// Whether somebody asked to stop it.
    pub cancel: Option<CancelMark>,
    /// Why it waits, while it is queued.
    pub reason: Option<PendingReason>,
    /// When it is expected to begin, while it is queued.
    pub estimate: Option<Estimate>,
    /// Phase of the running attempt.
    pub phase: Option<String>,
    /// Workers that are used last, because an attempt failed there.
    pub avoid: BTreeSet<WorkerId>,
    /// What was stored, once it passed.
    pub receipt: Option<Receipt>,
    /// What the host saw, as it reported it.
    pub observed: Option<serde_json::Value>,
    /// Number of its last event.
    pub last_event: u64,
    /// Bytes of log of the running or last attempt.
    pub log_bytes: u64,
    /// What is still kept of it.
    pub tier: Option<Tier>,
    /// Kept whatever the retention rules say.
    pub hold: bool,
}

/// How much of a finished job is kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Everything.
    Hot,
    /// Logs and artifacts have gone to cheap storage.
    Warm,
    /// The record, its outcome and its statements.
    Cold,
}

impl Tier {
    /// Stable short name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }

    pub(crate) fn parse(text: &str) -> Result<Self, DbError> {
        match text {
            "hot" => Ok(Self::Hot),
            "warm" => Ok(Self::Warm),
            "cold" => Ok(Self::Cold),
            other => Err(DbError::unreadable("tier", other)),
        }
    }
}

/// One try of a job, as it is kept.
#[derive(Clone, PartialEq, Debug)]
pub struct Attempt {
    /// Which.
    pub id: AttemptId,
    /// Who had it.
    pub worker: WorkerId,
    /// Its claim.
    pub epoch: Epoch,
    /// When it was leased.
    pub leased_unix_ms: u64,
    /// When its machine was ready.
    pub started_unix_ms: Option<u64>,
    /// When it ended.
    pub ended_unix_ms: Option<u64>,
    /// How it ended.
    pub outcome: Option<Outcome>,
}

/// A short name of what kind of job it is.
#[must_use]
pub fn kind_name(kind: &JobKind) -> &'static str {
    match kind {
        JobKind::SourceBuild(_) => "source_build",
        JobKind::ImageBuild(_) => "image_build",
        JobKind::Run(_) => "run",
    }
}

/// A short name for lists: what is built, or the command.
pub(crate) fn title(kind: &JobKind) -> String {
    /// Longest title.
    const TITLE_MAX: usize = 120;
    let text = match kind {
        JobKind::SourceBuild(build) => build.name.clone(),
        JobKind::ImageBuild(build) => build
            .tags
            .first()
            .map_or_else(|| build.source.to_string(), ToString::to_string),
        JobKind::Run(run) => kiln_core::run_script::shown(&run.argv).join(" "),
    };
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(TITLE_MAX)
        .collect()
}

/// `passed` or the class of the failure.
pub(crate) fn verdict_name(outcome: &Outcome) -> String {
    match &outcome.verdict {
        kiln_core::Verdict::Passed => "passed".to_owned(),
        kiln_core::Verdict::Failed { class, .. } => match serde_json::to_value(class) {
            Ok(serde_json::Value::String(name)) => name,
            _ => "failed".to_owned(),
        },
    }
}

/// A row of the queue: what a transaction needs to decide about a job.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    pub(crate) id: JobId,
    pub(crate) tenant: TenantName,
    pub(crate) pool: PoolName,
    pub(crate) queue: QueueName,
    pub(crate) group: Option<Label>,
    pub(crate) notify_url: Option<String>,
    pub(crate) state: JobState,
    pub(crate) attempts_max: u32,
    pub(crate) need: Room,
    pub(crate) ready_ms: u64,
    pub(crate) avoid: BTreeSet<WorkerId>,
    pub(crate) worker: Option<WorkerId>,
    pub(crate) epoch: Epoch,
    pub(crate) until_ms: Option<u64>,
    pub(crate) leased_ms: Option<u64>,
    pub(crate) started_ms: Option<u64>,
    pub(crate) cancel: Option<CancelMark>,
    pub(crate) event_seq: u64,
    pub(crate) log_next: u64,
    pub(crate) log_home: String,
}

impl Live {
    pub(crate) fn from_row(row: &Row) -> Result<Self, DbError> {
        Ok(Self {
            id: row.parse("id")?,
            tenant: row.parse("tenant")?,
            pool: row.parse("pool")?,
            queue: row.parse("queue")?,
            group: row.opt_parse("grp")?,
            notify_url: row.opt_text("notify_url")?,
            state: live_state(row)?,
            attempts_max: row.u32("attempts_max")?,
            need: need(row)?,
            ready_ms: row.u64("ready_ms")?,
            avoid: row.json("avoid")?,
            worker: row.opt_parse("worker")?,
            epoch: Epoch {
                incarnation: row.u64("life")?,
                count: row.u64("epoch")?,
            },
            until_ms: row.opt_u64("until_ms")?,
            leased_ms: row.opt_u64("leased_ms")?,
            started_ms: row.opt_u64("started_ms")?,
            cancel: cancel_mark(row)?,
            event_seq: row.u64("event_seq")?,
            log_next: row.u64("log_next")?,
            log_home: row.text("log_home")?,
        })
    }

    /// The attempt that runs, or the next one.
    pub(crate) fn attempt(&self) -> AttemptId {
        let number = match &self.state {
            JobState::Queued { attempts } => attempts + 1,
            JobState::Leased { attempt } | JobState::Running { attempt } => *attempt,
            JobState::Finished { .. } => 0,
        };
        AttemptId {
            job: self.id.clone(),
            number,
        }
    }

    /// The live lease, if a worker holds the job.
    pub(crate) fn lease(&self) -> Option<Lease> {
        Some(Lease {
            attempt: self.attempt(),
            tenant: self.tenant.clone(),
            worker: self.worker.clone()?,
            epoch: self.epoch,
            deadline_unix_ms: self.until_ms?,
        })
    }
}

/// State of a row of the queue.
pub(crate) fn live_state(row: &Row) -> Result<JobState, DbError> {
    let attempts = row.u32("attempts")?;
    match row.text("state")?.as_str() {
        "queued" => Ok(JobState::Queued { attempts }),
        "leased" => Ok(JobState::Leased {
            attempt: attempts + 1,
        }),
        "running" => Ok(JobState::Running {
            attempt: attempts + 1,
        }),
        other => Err(DbError::unreadable("state", other)),
    }
}

pub(crate) fn need(row: &Row) -> Result<Room, DbError> {
    Ok(Room {
        cpus: row.u32("cpus")?,
        memory: kiln_core::ByteSize(row.u64("memory")?),
        disk: kiln_core::ByteSize(row.u64("disk")?),
        machines: 1,
    })
}

pub(crate) fn cancel_mark(row: &Row) -> Result<Option<CancelMark>, DbError> {
    let Some(at_unix_ms) = row.opt_u64("cancel_ms")? else {
        return Ok(None);
    };
    Ok(Some(CancelMark {
        at_unix_ms,
        by: row.opt_text("cancel_by")?.unwrap_or_default(),
        reason: row.opt_text("cancel_reason")?,
    }))
}

/// A job of the queue, with its request.
pub(crate) fn live_job(row: &Row) -> Result<Job, DbError> {
    let live = Live::from_row(row)?;
    let queued = matches!(live.state, JobState::Queued { .. });
    Ok(Job {
        request: row.json("body")?,
        lease: live.lease(),
        pool: live.pool,
        labels: row.json("labels")?,
        submitted_by: row.text("submitted_by")?,
        notify_url: live.notify_url,
        created_unix_ms: row.u64("created_ms")?,
        ready_unix_ms: queued.then_some(live.ready_ms),
        leased_unix_ms: row.opt_u64("leased_ms")?,
        started_unix_ms: live.started_ms,
        finished_unix_ms: None,
        worker: live.worker,
        cancel: live.cancel,
        reason: if queued {
            row.opt_json("reason")?
        } else {
            None
        },
        estimate: if queued {
            row.opt_json("estimate")?
        } else {
            None
        },
        phase: row.opt_text("phase")?,
        avoid: live.avoid,
        receipt: None,
        observed: None,
        last_event: live.event_seq,
        log_bytes: live.log_next,
        tier: None,
        hold: false,
        state: live.state,
    })
}

/// A finished job, with its request.
pub(crate) fn finished_job(row: &Row) -> Result<Job, DbError> {
    Ok(Job {
        request: row.json("body")?,
        state: JobState::Finished {
            outcome: row.json("outcome")?,
        },
        pool: row.parse("pool")?,
        labels: row.json("labels")?,
        submitted_by: row.text("submitted_by")?,
        notify_url: row.opt_text("notify_url")?,
        created_unix_ms: row.u64("created_ms")?,
        ready_unix_ms: None,
        lease: None,
        leased_unix_ms: row.opt_u64("leased_ms")?,
        started_unix_ms: row.opt_u64("started_ms")?,
        finished_unix_ms: row.opt_u64("finished_ms")?,
        worker: row.opt_parse("worker")?,
        cancel: cancel_mark(row)?,
        reason: None,
        estimate: None,
        phase: None,
        avoid: BTreeSet::new(),
        receipt: row.opt_json("receipt")?,
        observed: row.opt_json("observed")?,
        last_event: row.u64("event_seq")?,
        log_bytes: row.u64("log_next")?,
        tier: Some(Tier::parse(&row.text("tier")?)?),
        hold: row.flag("hold")?,
    })
}

/// What the scheduler sees of a job that waits.
#[derive(Clone, PartialEq, Debug)]
pub struct PendingJob {
    /// The attempt that would be next.
    pub attempt: AttemptId,
    /// Whose.
    pub tenant: TenantName,
    /// Where it waits.
    pub queue: QueueName,
    /// Its order there.
    pub priority: Priority,
    /// `source_build`, `image_build` or `run`.
    pub kind: String,
    /// Room it needs.
    pub need: Room,
    /// What else it needs of a host.
    pub requires: Requirements,
    /// Its concurrency group.
    pub group: Option<Label>,
    /// When it came.
    pub created_unix_ms: u64,
    /// When it may run; later than now after a failed attempt.
    pub ready_unix_ms: u64,
    /// Workers to use last.
    pub avoid: BTreeSet<WorkerId>,
    /// Longest wall time it may take.
    pub timeout_ms: u64,
    /// The reason that is stored now.
    pub reason: PendingReason,
}

/// What the scheduler sees of a job that has a worker.
#[derive(Clone, PartialEq, Debug)]
pub struct HeldJob {
    /// Its lease.
    pub lease: Lease,
    /// Where it waited.
    pub queue: QueueName,
    /// `source_build`, `image_build` or `run`.
    pub kind: String,
    /// Room it takes.
    pub need: Room,
    /// Its concurrency group.
    pub group: Option<Label>,
    /// Whole CPUs of the host for this machine alone.
    pub pinned_cpus: bool,
    /// When it was leased.
    pub leased_unix_ms: u64,
    /// When its machine was ready.
    pub started_unix_ms: Option<u64>,
    /// Whether somebody asked to stop it.
    pub cancelled: bool,
}
