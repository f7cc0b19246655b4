//! Logs of attempts: written while they happen, followed by many, kept as long as they must be.
//!
//! One log per attempt. A writer appends bytes with their offset and may say the same twice; a gap is refused. While it is written a log is a few
//! append-only files on this host ([`live`], [`segment`]); when it ends it becomes compressed packs with an index in a folder or a
//! bucket ([`archive`], [`objects`]) and is read from there without the reader noticing. A follower holds an offset and one piece,
//! nothing else: a slow one costs nobody.
//!
//! What this room does not know: who may write or read. The tenant is part of a log's name, so that a log cannot be reached under another's.
//! A log is bounded ([`LogConfig::bytes_max`]); where it was cut, it says so.
//!
//! Start at [`LogStore`].

mod archive;
mod error;
mod http;
mod live;
pub mod load;
pub(crate) mod objects;
mod retention;
pub(crate) mod seal;
mod segment;
mod store;

use std::fmt;
use std::path::PathBuf;

use kiln_core::{AttemptId, JobId, TenantName};

pub use error::LogError;
pub use objects::{ConditionalPut, ObjectTarget, S3Credentials, S3Target};
pub(crate) use objects::{connector, open as open_objects, open_amazon};
pub use retention::RetentionClass;
pub use seal::{KEY_BYTES, LogKey, LogKeys};
pub use store::LogStore;

/// Most bytes of a log unless the operator says otherwise.
pub const LOG_BYTES_MAX: u64 = 64 << 20;
/// Most bytes of one append.
pub const PIECE_MAX: usize = 256 * 1024;
/// Most bytes one read gives.
pub const READ_MAX: usize = 256 * 1024;
/// Bytes at the end of a followed log that followers get without a file being read.
pub const TAIL_BYTES: usize = 256 * 1024;

/// Names one log.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct LogName {
    /// Whose.
    pub tenant: TenantName,
    /// Of which attempt.
    pub attempt: AttemptId,
}

impl LogName {
    /// Of attempt `number` (from 1) of a job.
    #[must_use]
    pub fn new(tenant: TenantName, job: JobId, number: u32) -> Self {
        Self {
            tenant,
            attempt: AttemptId { job, number },
        }
    }
}

impl fmt::Display for LogName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.attempt)
    }
}

/// What an acknowledged append survives.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Durability {
    /// The end of this process at any moment. A power cut may take what was written in the last seconds.
    #[default]
    Kill,
    /// A power cut as well: every append waits for the disk.
    PowerCut,
}

/// How logs are kept.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// Folder of the logs that are being written; on this host.
    pub live: PathBuf,
    /// Where ended logs go.
    pub ended: ObjectTarget,
    /// Most bytes of one log.
    pub bytes_max: u64,
    /// What an acknowledged append survives.
    pub durability: Durability,
    /// Keys that logs are sealed with; none: they are not encrypted.
    pub keys: LogKeys,
}

impl LogConfig {
    /// Everything below one folder of this host, with the usual limit, not encrypted.
    #[must_use]
    pub fn in_folder(dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        Self {
            live: dir.join("live"),
            ended: ObjectTarget::Folder(dir.join("ended")),
            bytes_max: LOG_BYTES_MAX,
            durability: Durability::default(),
            keys: LogKeys::default(),
        }
    }
}

/// Answer to an append.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Appended {
    /// The next offset that is wanted.
    pub next: u64,
    /// The limit is reached: more is counted and not kept.
    pub full: bool,
}

/// What is known of a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LogStatus {
    /// The next offset that is wanted of its writer.
    pub next: u64,
    /// Bytes that can be read, the line about a cut included.
    pub bytes: u64,
    /// Bytes that came and were not kept.
    pub dropped: u64,
    /// It was cut at its limit.
    pub truncated: bool,
    /// Nothing more will come.
    pub ended: bool,
    /// It is where ended logs are.
    pub archived: bool,
}
