//! Why a commit's files were not taken.

use std::io;

use super::object::{ObjectId, ObjectKind};

/// Whose fault a [`GitTreeError`] is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whose {
    /// The repository holds something that is refused, or too much.
    Repository,
    /// Whoever sent the objects broke the protocol or sent others than were asked for.
    Sender,
    /// The connection to the sender ended.
    Connection,
    /// This host.
    Host,
}

/// Why a commit's files were not taken. Nothing of the folder may be used then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GitTreeError {
    /// The sender ended or could not be read.
    #[error("git objects could not be read")]
    Read(#[source] io::Error),
    /// The sender could not be asked.
    #[error("git objects could not be asked for")]
    Ask(#[source] io::Error),
    /// The sender's answer is not that of `git cat-file --batch`.
    #[error("git's answer about {id} is not in its batch format: {why}")]
    Batch {
        /// What was asked for.
        id: ObjectId,
        /// What is wrong.
        why: &'static str,
    },
    /// The sender does not have an object that it must have.
    #[error("git does not have the object {id}")]
    Missing {
        /// Which.
        id: ObjectId,
    },
    /// An object of another kind than its place asks for.
    #[error("{id} is a {found}, not a {expected}")]
    Kind {
        /// Which.
        id: ObjectId,
        /// What it should be.
        expected: ObjectKind,
        /// What the sender calls it.
        found: ObjectKind,
    },
    /// Bytes that do not have the id they were asked by.
    #[error("what came as {asked} is {found}")]
    Mismatch {
        /// The id asked for.
        asked: ObjectId,
        /// The id of what came.
        found: ObjectId,
    },
    /// Bytes made to collide with others under SHA-1.
    #[error("{id} bears the marks of a SHA-1 collision attack")]
    Collision {
        /// Which.
        id: ObjectId,
    },
    /// A commit or tree that git itself would not write.
    #[error("{kind} {id} is malformed: {why}")]
    Malformed {
        /// Which.
        id: ObjectId,
        /// What it is.
        kind: ObjectKind,
        /// What is wrong.
        why: &'static str,
    },
    /// A name that must not be made on a host.
    #[error("the path {path:?} is refused: {why}")]
    Name {
        /// The whole path, invalid UTF-8 replaced.
        path: String,
        /// What is wrong.
        why: &'static str,
    },
    /// More than is taken.
    #[error("the commit holds more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The folder could not be written.
    #[error("could not write {path:?}")]
    Write {
        /// Where, invalid UTF-8 replaced.
        path: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl GitTreeError {
    /// Whose fault it is.
    #[must_use]
    pub fn whose(&self) -> Whose {
        match self {
            Self::Read(error) if error.kind() == io::ErrorKind::InvalidData => Whose::Sender,
            Self::Read(_) | Self::Ask(_) => Whose::Connection,
            Self::Batch { .. } | Self::Missing { .. } | Self::Mismatch { .. } => Whose::Sender,
            // The parent's hash was right: the repository itself says so. But only the sender calls it that.
            Self::Kind { .. } => Whose::Sender,
            Self::Collision { .. }
            | Self::Malformed { .. }
            | Self::Name { .. }
            | Self::Limit { .. } => Whose::Repository,
            Self::Write { .. } => Whose::Host,
        }
    }
}
