//! What the public API needs of the rest of a controller, as one trait: files or S3, one controller or several, a fake in a test.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use kiln_core::{Digest, JobId, Lease, TenantName};
use kiln_db::{Artifact, Database, Job, Kept, NamedImage};

use crate::access::{Access, Door};
use crate::fleet::machines::{NoWay, Way};

/// A piece of a job's log.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LogPiece {
    /// From the asked offset on, as much as there is and was asked for.
    pub bytes: Bytes,
    /// Bytes of the whole log so far.
    pub size: u64,
    /// More was written than is kept.
    pub truncated: bool,
}

/// Why a source was not stored.
#[derive(Debug, thiserror::Error)]
pub enum SourceRefused {
    /// It is larger than the operator allows.
    #[error("the source has more than {0} bytes")]
    TooLarge(u64),
    /// With it, all that is kept for the tenant has more bytes than the operator allows.
    #[error("more than {0} bytes would be kept for the tenant")]
    Full(u64),
    /// The upload broke; its sender is to blame, or the line.
    #[error("the upload ended before it was whole")]
    Cut(#[source] io::Error),
    /// The store could not.
    #[error("the source could not be stored")]
    Store(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Why secrets that came with a request are not held, in words for the caller.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SecretsUnheld {
    /// They are too large, now and for ever.
    TooLarge(String),
    /// There is no room for them now.
    Full(String),
}

/// What of a body arrives, piece by piece.
pub type Pieces<'a> = BoxStream<'a, io::Result<Bytes>>;

/// What of ours does not work now.
pub type Trouble = Box<dyn std::error::Error + Send + Sync>;

/// The rest of a controller.
pub trait Backend: Send + Sync {
    /// Every durable row.
    fn db(&self) -> &Database;

    /// Keys and tokens.
    fn access(&self) -> &Access;

    /// Streams a source to where sources are kept, for a tenant alone, all of whose sources have at most `kept_max` bytes then; gives its digest and bytes, computed as it arrived. Its limit
    /// may be lower than the API's. A stream that breaks leaves nothing.
    fn put_source<'a>(
        &'a self,
        tenant: &'a TenantName,
        kept_max: Option<u64>,
        pieces: Pieces<'a>,
    ) -> BoxFuture<'a, Result<(Digest, u64), SourceRefused>>;

    /// Keeps a stored source for another while; false when it is gone.
    fn keep_source<'a>(
        &'a self,
        tenant: &'a TenantName,
        digest: &'a Digest,
    ) -> BoxFuture<'a, io::Result<bool>>;

    /// Holds secrets that came with a job, until it is over.
    ///
    /// # Errors
    /// When they are too large, or too many.
    fn hold_secrets(
        &self,
        tenant: &TenantName,
        job: &JobId,
        values: HashMap<String, Vec<u8>>,
    ) -> Result<(), SecretsUnheld>;

    /// Forgets a job's secrets.
    fn forget_secrets(&self, job: &JobId);

    /// Bytes of a job's log (of its running or last attempt) from `offset` on, at most `max`. An empty piece: no more yet.
    fn read_log<'a>(
        &'a self,
        job: &'a Job,
        offset: u64,
        max: usize,
    ) -> BoxFuture<'a, io::Result<LogPiece>>;

    /// Waits until the log is longer than `offset`; may come back early, never later than the caller's own timer.
    fn log_longer_than<'a>(&'a self, job: &'a Job, offset: u64) -> BoxFuture<'a, ()>;

    /// The content of an artifact, of it this range of bytes.
    fn open_artifact<'a>(
        &'a self,
        job: &'a Job,
        artifact: &'a Artifact,
        range: Range<u64>,
    ) -> BoxFuture<'a, io::Result<Pieces<'static>>>;

    /// Names of a tenant's images, by name, after a repository and tag.
    fn images<'a>(
        &'a self,
        tenant: &'a TenantName,
        after: (String, String),
        limit: u32,
    ) -> BoxFuture<'a, Result<Vec<NamedImage>, Trouble>>;

    /// Takes the name of an image away, of a repository that is the caller's; false when there is none.
    fn withdraw_image<'a>(
        &'a self,
        repo: &'a str,
        tag: &'a str,
    ) -> BoxFuture<'a, Result<bool, Trouble>>;

    /// Opens a way to a machine that a worker keeps. What goes over it is `kiln_proto::kept`.
    fn way_to<'a>(&'a self, kept: &'a Kept) -> BoxFuture<'a, Result<Way, NoWay>> {
        let _it = kept;
        Box::pin(std::future::ready(Err(NoWay::Silent)))
    }

    /// Opens a way to a command that runs and is attended, under its attempt's lease.
    fn way_to_attempt<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<Way, NoWay>> {
        let _it = lease;
        Box::pin(std::future::ready(Err(NoWay::Silent)))
    }

    /// Completes when what is held open should end: this controller is about to stop.
    fn closing(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }

    /// Counts one attempt to do something, allowed or refused. Label sets are closed: names of actions and codes of refusals.
    fn count(&self, door: Door, action: &'static str, refused: Option<&'static str>);
}
