//! A controller as the public API sees it.

use std::collections::HashMap;
use std::io;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _};
use kiln_core::{Digest, JobId, TenantName};
use kiln_db::{Artifact, Database, Job};
use kiln_store::logs::{LogError, LogName};

use crate::access::{Access, Door};
use crate::api::{Backend, LogPiece, Pieces, SourceRefused};
use crate::fleet::source::SourceError;
use crate::state::Controller;

impl Controller {
    /// The log of a job's running or last attempt; none before the first.
    async fn log_of(&self, job: &Job) -> io::Result<Option<LogName>> {
        let number = match &job.lease {
            Some(lease) => Some(lease.attempt.number),
            None => {
                let attempts = self.db.attempts(&job.request.id).await;
                let attempts = attempts.map_err(io::Error::other)?;
                attempts.last().map(|attempt| attempt.id.number)
            }
        };
        let name =
            |number| LogName::new(job.request.tenant.clone(), job.request.id.clone(), number);
        Ok(number.map(name))
    }
}

impl Backend for Controller {
    fn db(&self) -> &Database {
        &self.db
    }

    fn access(&self) -> &Access {
        &self.access
    }

    fn put_source<'a>(
        &'a self,
        tenant: &'a TenantName,
        pieces: Pieces<'a>,
    ) -> BoxFuture<'a, Result<(Digest, u64), SourceRefused>> {
        async move {
            let stored = self.sources.put(tenant, pieces).await;
            let stored = stored.map_err(|error| match error {
                SourceError::TooLarge { max } => SourceRefused::TooLarge(max),
                SourceError::Cut(error) => SourceRefused::Cut(error),
                error @ SourceError::Io { .. } => SourceRefused::Store(error.into()),
            })?;
            Ok((stored.digest, stored.size))
        }
        .boxed()
    }

    fn hold_secrets(&self, job: &JobId, values: HashMap<String, Vec<u8>>) -> Result<(), String> {
        let held = self.secrets.hold(job.clone(), values);
        held.map_err(|refused| refused.to_string())
    }

    fn forget_secrets(&self, job: &JobId) {
        self.secrets.forget(job);
    }

    fn read_log<'a>(
        &'a self,
        job: &'a Job,
        offset: u64,
        max: usize,
    ) -> BoxFuture<'a, io::Result<LogPiece>> {
        async move {
            let Some(name) = self.log_of(job).await? else {
                return Ok(LogPiece::default());
            };
            let Some(status) = self.logs.status(&name).await.map_err(io::Error::other)? else {
                return Ok(LogPiece::default());
            };
            let bytes = match self.logs.read(&name, offset, max).await {
                Ok(bytes) => bytes,
                Err(LogError::NotFound { .. }) => bytes::Bytes::new(),
                Err(error) => return Err(io::Error::other(error)),
            };
            Ok(LogPiece {
                bytes,
                size: status.bytes,
                truncated: status.truncated,
            })
        }
        .boxed()
    }

    fn log_longer_than<'a>(&'a self, job: &'a Job, offset: u64) -> BoxFuture<'a, ()> {
        async move {
            let Ok(Some(name)) = self.log_of(job).await else {
                return std::future::pending().await;
            };
            let mut follower = std::pin::pin!(self.logs.follow(&name, offset));
            // A log that ended gives nothing more: the caller's own timer looks at the job then.
            if follower.next().await.is_none() {
                std::future::pending::<()>().await;
            }
        }
        .boxed()
    }

    fn open_artifact<'a>(
        &'a self,
        _job: &'a Job,
        _artifact: &'a Artifact,
    ) -> BoxFuture<'a, io::Result<Pieces<'static>>> {
        // No worker of this generation stores artifacts, so there are no rows to ask for.
        async { Err(io::ErrorKind::NotFound.into()) }.boxed()
    }

    fn count(&self, door: Door, action: &'static str, refused: Option<&'static str>) {
        self.metrics.access(door.name(), refused.is_none());
        tracing::debug!(door = door.name(), action, refused, "asked");
    }
}
