//! Failures of the host's interface, alike whether the registry is owned here or by another process.

use std::io;
use std::path::PathBuf;

use crate::registry::{BindError, ErrorKind, OpenError, SecretError, StoreError};

/// Why a host operation on the registry failed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The store in this process refused or failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The owning process refused or failed; its words.
    #[error("{message}")]
    Remote {
        /// Broad kind.
        kind: ErrorKind,
        /// What it said.
        message: String,
    },
    /// The owning process went away in the middle. Asking again finds or becomes the next owner.
    #[error("the process that owned the registry went away")]
    OwnerGone {
        /// What the connection said.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The owning process is there but does not answer.
    #[error("the kiln process that owns the registry in {} does not answer", dir.display())]
    OwnerSilent {
        /// The store.
        dir: PathBuf,
    },
    /// The owning process is another version of kiln.
    #[error(
        "the registry is owned by a kiln process that speaks version {found} of the private protocol, this one speaks {known}: stop it first"
    )]
    OwnerVersion {
        /// What it speaks.
        found: u32,
        /// What we speak.
        known: u32,
    },
    /// Another user's process listens on the private socket.
    #[error("the private socket in {} belongs to user {uid}", dir.display())]
    OwnerStranger {
        /// The store.
        dir: PathBuf,
        /// Who listens.
        uid: u32,
    },
    /// The store could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The private socket could not be made.
    #[error("the private socket in {} cannot be made", dir.display())]
    Socket {
        /// The store.
        dir: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The registry's token could not be used.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The loopback door could not open.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The source of an upload failed, or the target of a download.
    #[error("cannot {what} the content")]
    Stream {
        /// Verb.
        what: &'static str,
        /// What the stream said.
        #[source]
        source: io::Error,
    },
    /// The owner's answer could not be understood.
    #[error("the owner of the registry sent an answer that cannot be understood: {what}")]
    Protocol {
        /// What was wrong with it.
        what: String,
    },
}

impl HostError {
    /// Which broad kind this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Store(error) => error.kind(),
            Self::Remote { kind, .. } => *kind,
            Self::OwnerGone { .. } | Self::OwnerSilent { .. } => ErrorKind::Unavailable,
            Self::Open(OpenError::Owned { .. }) => ErrorKind::Unavailable,
            _ => ErrorKind::Internal,
        }
    }

    /// Whether what was asked for is simply not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.kind() == ErrorKind::NotFound
    }

    pub(crate) fn gone(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::OwnerGone {
            source: Some(source.into()),
        }
    }
}
