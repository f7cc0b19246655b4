//! The record itself, its schema, and what can go wrong with one.

use std::io;
use std::path::PathBuf;

use kiln_core::{FailureClass, JobId, Outcome, Receipt, TenantName, Verdict};
use serde::{Deserialize, Serialize};

use super::process::ProcessMark;

/// Schema this code writes, and the newest it reads.
pub const RECORD_SCHEMA: u32 = 1;

/// What is known when a job starts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewRecord {
    /// The job.
    pub id: JobId,
    /// Whose.
    pub tenant: TenantName,
    /// Kind of job in one word, such as `image-build` or `run`.
    pub kind: String,
    /// What it does, on one line for a list.
    pub title: String,
    /// Start, milliseconds since the Unix epoch.
    pub started_unix_ms: u64,
}

/// State as written.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub(super) enum WrittenState {
    Running,
    Finished {
        outcome: Outcome,
        ended_unix_ms: u64,
    },
}

/// How a job stands, as seen now.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum RecordState {
    /// The process that runs it is alive.
    Running,
    /// It ended and said how.
    Finished {
        /// How.
        outcome: Outcome,
        /// When, milliseconds since the Unix epoch.
        ended_unix_ms: u64,
    },
    /// The process that ran it is gone and did not say how it ended.
    Lost,
}

impl RecordState {
    /// One word for a list.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Lost => "lost",
            Self::Finished { outcome, .. } => match &outcome.verdict {
                Verdict::Passed => "passed",
                Verdict::Failed {
                    class: FailureClass::Cancelled,
                    ..
                } => "cancelled",
                Verdict::Failed {
                    class: FailureClass::Timeout,
                    ..
                } => "timeout",
                Verdict::Failed { .. } => "failed",
            },
        }
    }
}

/// `record.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Written {
    pub(super) schema: u32,
    pub(super) id: JobId,
    pub(super) tenant: TenantName,
    pub(super) kind: String,
    pub(super) title: String,
    pub(super) started_unix_ms: u64,
    pub(super) process: ProcessMark,
    #[serde(flatten)]
    pub(super) state: WrittenState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) receipt: Option<Receipt>,
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub(super) details: serde_json::Value,
    #[serde(default)]
    pub(super) log_bytes: u64,
    #[serde(default)]
    pub(super) log_cut_bytes: u64,
}

/// A job's record as read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct JobRecord {
    /// The job.
    pub id: JobId,
    /// Whose.
    pub tenant: TenantName,
    /// Kind of job in one word.
    pub kind: String,
    /// What it does, on one line.
    pub title: String,
    /// Start, milliseconds since the Unix epoch.
    pub started_unix_ms: u64,
    /// How it stands.
    #[serde(flatten)]
    pub state: RecordState,
    /// What was stored, where.
    pub receipt: Option<Receipt>,
    /// Whatever else its kind of job keeps (JSON).
    pub details: serde_json::Value,
    /// Bytes of output, and how many of them were cut from the log. Known when it has finished.
    pub log_bytes: u64,
    /// See `log_bytes`.
    pub log_cut_bytes: u64,
}

impl From<Written> for JobRecord {
    fn from(written: Written) -> Self {
        let state = match written.state {
            WrittenState::Running if written.process.is_alive() => RecordState::Running,
            WrittenState::Running => RecordState::Lost,
            WrittenState::Finished {
                outcome,
                ended_unix_ms,
            } => RecordState::Finished {
                outcome,
                ended_unix_ms,
            },
        };
        Self {
            id: written.id,
            tenant: written.tenant,
            kind: written.kind,
            title: written.title,
            started_unix_ms: written.started_unix_ms,
            state,
            receipt: written.receipt,
            details: written.details,
            log_bytes: written.log_bytes,
            log_cut_bytes: written.log_cut_bytes,
        }
    }
}

/// Why a record cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// No record of this job.
    #[error("there is no record of job {id}")]
    Unknown {
        /// The job.
        id: JobId,
    },
    /// A job of this id has a record already.
    #[error("job {id} has a record already")]
    Exists {
        /// The job.
        id: JobId,
    },
    /// Written by a newer kiln.
    #[error(
        "{} has schema {found}, this kiln reads up to {RECORD_SCHEMA}: use a newer kiln",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u64,
    },
    /// Not a record.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Larger than a record may be.
    #[error("{} is larger than {max} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The bound.
        max: u64,
    },
    /// A file operation failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// Verb.
        what: &'static str,
        /// Which path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl RecordError {
    pub(super) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
