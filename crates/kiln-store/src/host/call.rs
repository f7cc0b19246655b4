//! The host's operations as values, so that the owner runs them the same way for itself and for
//! processes attached to its private socket.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kiln_core::lease::LeaseRefused;
use kiln_core::{Digest, Lease};
use serde::{Deserialize, Serialize};

use crate::registry::{
    Adopted, AttemptAuthority, Authority, Collected, ErrorKind, LeaseCheck, Reference, RepoName,
    Scrubbed, Stats, Store, StoreError, UserAuthority,
};

/// Version of everything on the private socket. Both sides must speak the same.
pub(crate) const PRIVATE_VERSION: u32 = 1;
/// Path of calls on the private socket.
pub(crate) const CALL_PATH: &str = "/_kiln/call";
/// Header that carries a [`WireAuthority`] on the private socket.
pub(crate) const AUTHORITY_HEADER: &str = "kiln-authority";

/// What the host can ask of its registry, streams aside.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "call")]
pub(crate) enum Call {
    About,
    Resolve {
        repo: RepoName,
        reference: String,
    },
    Tag {
        repo: RepoName,
        tag: String,
        digest: Digest,
    },
    Mount {
        from: RepoName,
        to: RepoName,
        digest: Digest,
    },
    Adopt {
        from: RepoName,
        to: RepoName,
        digest: Digest,
    },
    Repositories {
        tree: Option<RepoName>,
    },
    Tags {
        repo: RepoName,
    },
    DeleteManifest {
        repo: RepoName,
        reference: String,
    },
    DeleteTree {
        tree: RepoName,
    },
    Gc {
        grace_ms: u64,
    },
    Scrub,
    Stats,
}

/// Whether and where the loopback door is open.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoopbackState {
    /// Not asked for.
    #[default]
    Off,
    /// Open at this address.
    Open(SocketAddr),
    /// Could not open; why, in words for a person.
    Failed(String),
}

/// The owner of the registry.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct About {
    /// Version of the private protocol.
    pub version: u32,
    /// Process id of the owner.
    pub pid: u32,
    /// Its loopback door.
    pub loopback: LoopbackState,
}

/// Answers to [`Call`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply", content = "with")]
pub(crate) enum Reply {
    Done,
    About(About),
    Digest(Digest),
    Bytes(u64),
    Adopted(Adopted),
    Repositories(Vec<RepoName>),
    Tags(Vec<String>),
    Collected(Collected),
    Scrubbed(Scrubbed),
    Stats(Stats),
    Failed { kind: ErrorKind, message: String },
}

/// Runs a call on the store. Blocks.
pub(crate) fn execute(store: &Store, about: &About, call: Call) -> Result<Reply, StoreError> {
    Ok(match call {
        Call::About => Reply::About(about.clone()),
        Call::Resolve { repo, reference } => {
            let reference = parse(&reference)?;
            let digest = store.resolve(&repo, &reference)?;
            Reply::Digest(store.require_manifest(&repo, &digest)?)
        }
        Call::Tag { repo, tag, digest } => {
            match parse(&tag)? {
                Reference::Tag(tag) => store.tag(&repo, &tag, &digest)?,
                Reference::Digest(_) => return Err(bad_reference(&tag)),
            }
            Reply::Done
        }
        Call::Mount { from, to, digest } => Reply::Bytes(store.mount_blob(&from, &to, &digest)?),
        Call::Adopt { from, to, digest } => Reply::Adopted(store.adopt(&from, &to, &digest)?),
        Call::Repositories { tree } => Reply::Repositories(store.repositories(tree.as_ref())?),
        Call::Tags { repo } => Reply::Tags(store.tags(&repo)?),
        Call::DeleteManifest { repo, reference } => {
            store.delete_manifest(&repo, &parse(&reference)?)?;
            Reply::Done
        }
        Call::DeleteTree { tree } => {
            store.delete_tree(&tree)?;
            Reply::Done
        }
        Call::Gc { grace_ms } => Reply::Collected(store.gc(Duration::from_millis(grace_ms))?),
        Call::Scrub => Reply::Scrubbed(store.scrub()?),
        Call::Stats => Reply::Stats(store.stats()?),
    })
}

fn parse(text: &str) -> Result<Reference, StoreError> {
    text.parse().map_err(|_| bad_reference(text))
}

fn bad_reference(text: &str) -> StoreError {
    let text: String = text.chars().take(200).collect();
    StoreError::ManifestInvalid {
        why: format!("{text:?} is not a legal tag or digest here"),
    }
}

/// A failure as it travels.
pub(crate) fn failed(error: &StoreError) -> Reply {
    let cause = std::error::Error::source(error);
    Reply::Failed {
        kind: error.kind(),
        message: match cause {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        },
    }
}

/// An authority on its way from an attached process, which has checked it, to the owner.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WireAuthority {
    Operator,
    Attempt {
        lease: Lease,
        pull: Vec<String>,
        #[serde(default)]
        sources: Vec<RepoName>,
        bytes_max: u64,
    },
    User(UserAuthority),
    Anonymous {
        pull: Vec<String>,
    },
}

/// The attached process asks its own lease book, before each write and before its end (see `proxy`).
struct CheckedThere;

impl LeaseCheck for CheckedThere {
    fn check(&self, _lease: &Lease) -> Result<(), LeaseRefused> {
        Ok(())
    }
}

impl From<&Authority> for WireAuthority {
    fn from(authority: &Authority) -> Self {
        match authority {
            Authority::Operator => Self::Operator,
            Authority::Attempt(attempt) => Self::Attempt {
                lease: attempt.lease().clone(),
                pull: attempt.pull_trees().to_vec(),
                sources: attempt.sources().to_vec(),
                bytes_max: attempt.bytes_max(),
            },
            Authority::User(user) => Self::User(user.clone()),
            Authority::Anonymous { pull } => Self::Anonymous { pull: pull.clone() },
        }
    }
}

impl From<WireAuthority> for Authority {
    fn from(wire: WireAuthority) -> Self {
        match wire {
            WireAuthority::Operator => Self::Operator,
            WireAuthority::Attempt {
                lease,
                pull,
                sources,
                bytes_max,
            } => Self::Attempt(
                AttemptAuthority::new(lease, Arc::new(CheckedThere))
                    .with_pull(pull.into_iter().skip(1))
                    .with_sources(sources)
                    .with_bytes_max(bytes_max),
            ),
            WireAuthority::User(user) => Self::User(user),
            WireAuthority::Anonymous { pull } => Self::Anonymous { pull },
        }
    }
}
