//! Why another registry could not be used.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use kiln_core::Digest;

use super::credentials::CredentialsError;
use crate::host::HostError;

/// Why a push or a pull failed. Nothing of a failed push is tagged at the other registry, nothing of a failed pull here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// The reference cannot be pushed to.
    #[error("{reference} cannot be pushed to: {why}")]
    Target {
        /// As written.
        reference: String,
        /// What is wrong.
        why: &'static str,
        /// What to write.
        hint: &'static str,
    },
    /// The user's login cannot be read.
    #[error("the login for {registry} could not be read")]
    Credentials {
        /// For which registry.
        registry: String,
        /// What is wrong.
        #[source]
        source: CredentialsError,
    },
    /// The CA bundle is no bundle.
    #[error("the CA bundle cannot be used: {why}")]
    Ca {
        /// What is wrong.
        why: String,
    },
    /// The registry does not know who is asking.
    #[error("{registry} wants a login{}{}", if *.logged_in { ", and refuses the one that is kept for it" } else { ", and none is kept for it" }, words(.detail))]
    Unauthorized {
        /// The registry.
        registry: String,
        /// Whether a login was sent.
        logged_in: bool,
        /// The registry's words.
        detail: String,
    },
    /// The registry knows, and refuses.
    #[error("{registry} does not allow {doing} {repository}{}", words(.detail))]
    Forbidden {
        /// What was tried.
        doing: &'static str,
        /// The registry.
        registry: String,
        /// The repository.
        repository: String,
        /// The registry's words.
        detail: String,
    },
    /// The registry knows no such repository.
    #[error("{registry} has no repository {repository}{}", words(.detail))]
    NotFound {
        /// The registry.
        registry: String,
        /// The repository.
        repository: String,
        /// The registry's words.
        detail: String,
    },
    /// Any other refusal.
    #[error("{registry} answered {status} when asked to {what}{}", words(.detail))]
    Status {
        /// The registry.
        registry: String,
        /// What it was asked.
        what: &'static str,
        /// HTTP status.
        status: u16,
        /// How long it asks to wait.
        retry_after: Option<Duration>,
        /// The registry's words.
        detail: String,
    },
    /// The network, or TLS, failed.
    #[error("could not {what} at {registry}")]
    Network {
        /// The registry.
        registry: String,
        /// What was tried.
        what: &'static str,
        /// How it failed.
        #[source]
        source: Box<ureq::Error>,
    },
    /// It answered something that is not the protocol.
    #[error("{registry} does not follow the registry protocol: {why}")]
    Protocol {
        /// The registry.
        registry: String,
        /// What it did.
        why: String,
    },
    /// The image cannot be read from kiln's own registry.
    #[error("cannot read {digest} of the image")]
    Read {
        /// Which part.
        digest: Digest,
        /// What failed.
        #[source]
        source: Box<HostError>,
    },
    /// A part of the image broke off while it was read.
    #[error("{digest} of the image broke off")]
    Stream {
        /// Which part.
        digest: Digest,
        /// What the stream said.
        #[source]
        source: io::Error,
    },
    /// What came is not what its digest says.
    #[error("{registry} sent something else as {expected}: {why}")]
    Content {
        /// The registry.
        registry: String,
        /// What was asked for.
        expected: Digest,
        /// How it differs.
        why: String,
    },
    /// It is no image that kiln takes.
    #[error("{image} cannot be used: {why}")]
    Unusable {
        /// Which one.
        image: String,
        /// Why not.
        why: String,
    },
    /// kiln's own registry did not take it.
    #[error("{digest} cannot be stored")]
    Write {
        /// Which part.
        digest: Digest,
        /// What failed.
        #[source]
        source: Box<HostError>,
    },
    /// Certificates of a private authority cannot be read.
    #[error("{path:?} cannot be read")]
    Certificates {
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Whoever asked went away.
    #[error("the transfer was cancelled")]
    Cancelled,
    /// The thread that worked ended early.
    #[error("the transfer ended unexpectedly")]
    Task(#[source] tokio::task::JoinError),
}

fn words(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!(": {text}")
    }
}

impl RemoteError {
    /// Whether the reference, the login or a setting is to be changed, rather than the network mended.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Target { .. }
                | Self::Credentials { .. }
                | Self::Ca { .. }
                | Self::Certificates { .. }
                | Self::Unusable { .. }
                | Self::Unauthorized { .. }
                | Self::Forbidden { .. }
                | Self::NotFound { .. }
        )
    }

    /// Whether the same request may succeed soon.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Network { source, .. } => match &**source {
                ureq::Error::Io(error) => error.kind() != io::ErrorKind::InvalidData,
                ureq::Error::Timeout(_)
                | ureq::Error::HostNotFound
                | ureq::Error::ConnectionFailed
                | ureq::Error::Protocol(_)
                | ureq::Error::BodyStalled => true,
                _ => false,
            },
            Self::Status { status, .. } => matches!(status, 429 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// How long the registry asks to wait.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// What to try.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Target { hint, .. } => Some((*hint).to_owned()),
            Self::Unauthorized { registry, .. } => {
                Some(format!("log in with `docker login {registry}`, `podman login {registry}` or `skopeo login {registry}`"))
            }
            Self::Forbidden { .. } | Self::NotFound { .. } => {
                Some("check the repository's name and the rights of the login".to_owned())
            }
            Self::Network { source, .. } => match &**source {
                ureq::Error::Rustls(_) | ureq::Error::Tls(_) => Some(
                    "plain HTTP is spoken to loopback only; a private certificate authority belongs into the host's CA \
                     bundle, or into /etc/docker/certs.d/HOST/ca.crt"
                        .to_owned(),
                ),
                ureq::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => Some(
                    "is this port TLS? plain HTTP is spoken to loopback only".to_owned(),
                ),
                _ => None,
            },
            _ => None,
        }
    }
}
