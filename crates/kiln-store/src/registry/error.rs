//! What can go wrong in the registry's store, and how each case is told to an OCI client.
//!
//! Codes: OCI distribution-spec v1.1, "Error Codes". 4xx answers carry only those codes.

use std::io;
use std::path::PathBuf;

use http::StatusCode;
use kiln_core::Digest;
use kiln_core::lease::LeaseRefused;

use super::name::{Reference, RepoName};

/// Why the store refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No such blob in this repository, whatever other repositories hold.
    #[error("blob {digest} is not in repository {repo}")]
    BlobUnknown {
        /// Where it was looked for.
        repo: RepoName,
        /// What was looked for.
        digest: Digest,
    },
    /// The bytes on disk do not have the digest in their name; they were set aside.
    #[error("the stored copy of {digest} was corrupt and has been set aside: push it again")]
    Corrupt {
        /// The digest it should have had.
        digest: Digest,
    },
    /// No such manifest or tag in this repository.
    #[error("manifest {reference} is not in repository {repo}")]
    ManifestUnknown {
        /// Where it was looked for.
        repo: RepoName,
        /// Tag or digest.
        reference: Reference,
    },
    /// No such repository.
    #[error("repository {repo} does not exist")]
    RepoUnknown {
        /// Its name.
        repo: RepoName,
    },
    /// A manifest names something that is not in its repository.
    #[error("the manifest refers to {digest}, which is not in repository {repo}")]
    ReferenceMissing {
        /// The repository of the manifest.
        repo: RepoName,
        /// What is missing.
        digest: Digest,
    },
    /// A manifest could not be accepted.
    #[error("manifest refused: {why}")]
    ManifestInvalid {
        /// What is wrong with it.
        why: String,
    },
    /// A manifest or body is larger than the bound.
    #[error("{what} is larger than {max} bytes")]
    TooLarge {
        /// What was too large.
        what: &'static str,
        /// The bound.
        max: u64,
    },
    /// Content does not have the digest that was promised.
    #[error("the content has digest {actual}, not {expected}")]
    DigestMismatch {
        /// What was promised.
        expected: Digest,
        /// What arrived.
        actual: Digest,
    },
    /// A descriptor states another size than the stored content has.
    #[error("{digest} has {actual} bytes, its descriptor says {stated}")]
    SizeMismatch {
        /// The content.
        digest: Digest,
        /// Bytes in the descriptor.
        stated: u64,
        /// Bytes stored.
        actual: u64,
    },
    /// No such upload session, or it belongs to somebody else.
    #[error("upload session is unknown, finished or expired")]
    UploadUnknown,
    /// Another request is writing to this session right now.
    #[error("another request is writing to this upload session")]
    UploadBusy,
    /// A chunk does not continue where the session stands.
    #[error("the chunk does not start at byte {expected}")]
    UploadOffset {
        /// Where the next chunk must start.
        expected: u64,
    },
    /// The body ended before all promised bytes came, or brought more.
    #[error("the body does not have the promised length: {got} bytes instead of {promised}")]
    UploadLength {
        /// Bytes promised by a header.
        promised: u64,
        /// Bytes received.
        got: u64,
    },
    /// The client went silent or its connection broke.
    #[error("the upload body broke off")]
    BodyBroken {
        /// What the connection said, if anything.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// A bound on how much may be going on or kept at once.
    #[error("{what}: at most {max}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        max: u64,
    },
    /// An attempt's share of the disk is used up.
    #[error("this attempt may store at most {max} bytes, all of it is used")]
    Quota {
        /// The bound in bytes.
        max: u64,
    },
    /// The host's disk has no room. Nothing stored is affected.
    #[error("the registry's disk is full ({}): free space and push again", path.display())]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// What the system said, where it was the system that refused.
        #[source]
        source: Option<io::Error>,
    },
    /// The write came with a lease that is no longer live.
    #[error("write refused: the lease is not live")]
    Lease(#[source] LeaseRefused),
    /// This caller may not do this.
    #[error("not allowed: {action} on {repo}")]
    Denied {
        /// What was tried.
        action: &'static str,
        /// On which repository.
        repo: RepoName,
    },
    /// A garbage collection or scrub is already running.
    #[error("another collection is running")]
    Collecting,
    /// A file operation failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// Verb: what was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Broad kinds of failure, the same whether the registry is in this process or behind its socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// What was asked for is not there.
    NotFound,
    /// What was sent is wrong.
    Invalid,
    /// Stored bytes were found corrupt and set aside.
    Corrupt,
    /// The disk is full.
    DiskFull,
    /// A named bound was reached.
    Limit,
    /// The caller may not do this, or its lease is over.
    Denied,
    /// Try again: busy, or the process that owned the registry went away.
    Unavailable,
    /// The host failed.
    Internal,
}

impl StoreError {
    /// Wraps a failed file operation; a full disk becomes [`StoreError::DiskFull`].
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull {
                path,
                source: Some(source),
            },
            _ => Self::Io { what, path, source },
        }
    }

    /// Which broad kind this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::BlobUnknown { .. }
            | Self::ManifestUnknown { .. }
            | Self::RepoUnknown { .. }
            | Self::UploadUnknown => ErrorKind::NotFound,
            Self::Corrupt { .. } => ErrorKind::Corrupt,
            Self::ReferenceMissing { .. }
            | Self::ManifestInvalid { .. }
            | Self::TooLarge { .. }
            | Self::DigestMismatch { .. }
            | Self::SizeMismatch { .. }
            | Self::UploadOffset { .. }
            | Self::UploadLength { .. }
            | Self::BodyBroken { .. } => ErrorKind::Invalid,
            Self::TooMany { .. } | Self::Quota { .. } => ErrorKind::Limit,
            Self::DiskFull { .. } => ErrorKind::DiskFull,
            Self::Lease(_) | Self::Denied { .. } => ErrorKind::Denied,
            Self::Collecting | Self::UploadBusy => ErrorKind::Unavailable,
            Self::Io { .. } => ErrorKind::Internal,
        }
    }

    /// HTTP status and OCI error code. `UNKNOWN` (distribution's own code) appears in 5xx answers only.
    #[must_use]
    pub fn status_and_code(&self) -> (StatusCode, &'static str) {
        use StatusCode as S;
        match self {
            Self::BlobUnknown { .. } | Self::Corrupt { .. } => (S::NOT_FOUND, "BLOB_UNKNOWN"),
            Self::ManifestUnknown { .. } => (S::NOT_FOUND, "MANIFEST_UNKNOWN"),
            Self::RepoUnknown { .. } => (S::NOT_FOUND, "NAME_UNKNOWN"),
            Self::ReferenceMissing { .. } => (S::BAD_REQUEST, "MANIFEST_BLOB_UNKNOWN"),
            Self::ManifestInvalid { .. } => (S::BAD_REQUEST, "MANIFEST_INVALID"),
            Self::TooLarge { .. } => (S::PAYLOAD_TOO_LARGE, "SIZE_INVALID"),
            Self::DigestMismatch { .. } => (S::BAD_REQUEST, "DIGEST_INVALID"),
            Self::SizeMismatch { .. } => (S::BAD_REQUEST, "SIZE_INVALID"),
            Self::UploadUnknown => (S::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN"),
            Self::UploadBusy => (S::CONFLICT, "BLOB_UPLOAD_INVALID"),
            Self::UploadOffset { .. } => (S::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID"),
            Self::UploadLength { .. } => (S::BAD_REQUEST, "SIZE_INVALID"),
            Self::BodyBroken { .. } => (S::BAD_REQUEST, "BLOB_UPLOAD_INVALID"),
            Self::TooMany { .. } => (S::TOO_MANY_REQUESTS, "TOOMANYREQUESTS"),
            Self::Quota { .. } | Self::Lease(_) | Self::Denied { .. } => (S::FORBIDDEN, "DENIED"),
            Self::DiskFull { .. } => (S::INSUFFICIENT_STORAGE, "UNKNOWN"),
            Self::Collecting => (S::SERVICE_UNAVAILABLE, "UNKNOWN"),
            Self::Io { .. } => (S::INTERNAL_SERVER_ERROR, "UNKNOWN"),
        }
    }
}
