//! What can go wrong with a log.

use std::io;
use std::path::{Path, PathBuf};

use super::LogName;

/// Why a log could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Bytes before these are missing. Nothing was kept; send again from `wanted`.
    #[error("bytes {given} came, but {wanted} is the next that is wanted")]
    Gap {
        /// The next offset that is wanted.
        wanted: u64,
        /// The offset that came.
        given: u64,
    },
    /// The log has ended; nothing more is taken.
    #[error("the log of {name} has ended at {end}")]
    Ended {
        /// Which log.
        name: LogName,
        /// Its length as its writer counts.
        end: u64,
    },
    /// More than [`super::PIECE_MAX`] at once.
    #[error("a piece of {len} bytes is longer than the limit of {max}")]
    PieceTooLong {
        /// Bytes that came.
        len: usize,
        /// Most that are taken.
        max: usize,
    },
    /// There is no such log.
    #[error("there is no log of {name}")]
    NotFound {
        /// Which log.
        name: LogName,
    },
    /// It was written with a key this store was not given.
    #[error("the log of {name} is sealed with the key {key}, which is not among the keys given")]
    Key {
        /// Which log.
        name: LogName,
        /// Id of the missing key: [`super::LogKey::id`].
        key: String,
    },
    /// What is stored is not what was written.
    #[error("the log of {name} is damaged: {what}")]
    Damaged {
        /// Which log.
        name: LogName,
        /// What does not fit.
        what: &'static str,
    },
    /// A file operation failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The object store refused or could not be reached.
    #[error("cannot {what} in the object store")]
    Objects {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The object store's settings are not usable.
    #[error("the log store's target is not usable: {why}")]
    Target {
        /// What is wrong with them.
        why: String,
    },
    /// The process is going down: work was given up.
    #[error("the log store is stopping")]
    Stopping,
}

impl LogError {
    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    pub(super) fn objects(what: &'static str) -> impl FnOnce(object_store::Error) -> Self {
        move |source| Self::Objects {
            what,
            source: Box::new(source),
        }
    }

    /// Whether the files went away under the reader, as they do when a log moves to the object store.
    pub(super) fn is_absent(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}
