//! A controller as the public API sees it.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use kiln_core::{Digest, JobId, Lease, TenantName};
use kiln_db::{Artifact, Database, Job, Kept, NamedImage};
use kiln_store::artifacts::{ArtifactError, Stored};
use kiln_store::logs::{LogError, LogName};
use kiln_store::registry::RepoName;

use crate::access::{Access, Door};
use crate::api::{Backend, LogPiece, Pieces, SecretsUnheld, SourceRefused, Trouble};
use crate::fleet::machines::{NoWay, Way};
use crate::fleet::secrets::SecretsRefused;
use crate::fleet::source::SourceError;
use crate::images;
use crate::peers::{Home, PeerError};
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

    /// A piece of a log from here or from where ended logs are.
    async fn near_piece(&self, name: &LogName, offset: u64, max: usize) -> io::Result<LogPiece> {
        let Some(status) = self.logs.status(name).await.map_err(io::Error::other)? else {
            return Ok(LogPiece::default());
        };
        let bytes = match self.logs.read(name, offset, max).await {
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

    /// A piece of a log that another controller keeps, or kept; nothing when what is near is all that can be had.
    async fn far_piece(
        &self,
        job: &Job,
        name: &LogName,
        home: &Home,
        offset: u64,
        max: usize,
    ) -> io::Result<Option<LogPiece>> {
        let runs = job
            .lease
            .as_ref()
            .is_some_and(|lease| lease.attempt == name.attempt);
        if !runs {
            let archived = self.logs.is_archived(name).await;
            if archived.map_err(io::Error::other)? {
                // What a worker sent here before it moved is a part of it.
                self.logs.discard(name).await.map_err(io::Error::other)?;
                return Ok(None);
            }
        }
        let Home::At(url) = home else {
            return Ok(None);
        };
        match self.far_log(url, name, offset, max).await {
            Ok(piece) => Ok(Some(piece)),
            Err(PeerError::NotFound) => Ok(None),
            // The reader comes back; by then the other one answers, or is known to be away.
            Err(error) => Err(io::Error::other(error)),
        }
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
        kept_max: Option<u64>,
        pieces: Pieces<'a>,
    ) -> BoxFuture<'a, Result<(Digest, u64), SourceRefused>> {
        async move {
            let stored = self.sources.put(tenant, kept_max, pieces).await;
            let stored = stored.map_err(|error| match error {
                SourceError::TooLarge { max } => SourceRefused::TooLarge(max),
                SourceError::Full { max } => SourceRefused::Full(max),
                SourceError::Cut(error) => SourceRefused::Cut(error),
                error => SourceRefused::Store(error.into()),
            })?;
            Ok((stored.digest, stored.size))
        }
        .boxed()
    }

    fn keep_source<'a>(
        &'a self,
        tenant: &'a TenantName,
        digest: &'a Digest,
    ) -> BoxFuture<'a, io::Result<bool>> {
        async move {
            let kept = self.sources.keep(tenant, digest).await;
            kept.map_err(io::Error::other)
        }
        .boxed()
    }

    fn hold_secrets(
        &self,
        tenant: &TenantName,
        job: &JobId,
        values: HashMap<String, Vec<u8>>,
    ) -> Result<(), SecretsUnheld> {
        let held = self.secrets.hold(tenant, job.clone(), values);
        held.map_err(|refused| match refused {
            SecretsRefused::JobTooLarge => SecretsUnheld::TooLarge(refused.to_string()),
            SecretsRefused::TenantFull | SecretsRefused::Full => {
                SecretsUnheld::Full(refused.to_string())
            }
        })
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
            let attempt = &name.attempt;
            let home = self.home_of(attempt).await.map_err(io::Error::other)?;
            if home != Home::Here
                && let Some(piece) = self.far_piece(job, &name, &home, offset, max).await?
            {
                return Ok(piece);
            }
            self.near_piece(&name, offset, max).await
        }
        .boxed()
    }

    fn log_longer_than<'a>(&'a self, job: &'a Job, offset: u64) -> BoxFuture<'a, ()> {
        async move {
            let Ok(Some(name)) = self.log_of(job).await else {
                return std::future::pending().await;
            };
            match self.home_of(&name.attempt).await {
                Ok(Home::Here) => {}
                Ok(Home::At(url)) => return self.far_log_longer(&url, &name, offset).await,
                // It goes on elsewhere, or not at all: the caller's own timer looks.
                Ok(Home::Away) | Err(_) => return std::future::pending().await,
            }
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
        job: &'a Job,
        artifact: &'a Artifact,
        range: Range<u64>,
    ) -> BoxFuture<'a, io::Result<Pieces<'static>>> {
        async move {
            let stored = Stored {
                digest: artifact.digest,
                size: artifact.size,
            };
            let (tenant, id) = (&job.request.tenant, &job.request.id);
            let pieces = self.artifacts.read(tenant, id, stored, range).await;
            let pieces = pieces.map_err(|error| match error {
                ArtifactError::NotFound => io::ErrorKind::NotFound.into(),
                error => io::Error::other(error),
            })?;
            let id = id.clone();
            let pieces = pieces.map_err(move |error| {
                tracing::warn!(job = %id, error = &error as &dyn std::error::Error, "an artifact broke off");
                io::Error::other(error)
            });
            Ok(pieces.boxed())
        }
        .boxed()
    }

    fn images<'a>(
        &'a self,
        tenant: &'a TenantName,
        after: (String, String),
        limit: u32,
    ) -> BoxFuture<'a, Result<Vec<NamedImage>, Trouble>> {
        async move {
            let named = images::names::list(self, tenant, &after, limit).await;
            named.map_err(Trouble::from)
        }
        .boxed()
    }

    fn withdraw_image<'a>(
        &'a self,
        repo: &'a str,
        tag: &'a str,
    ) -> BoxFuture<'a, Result<bool, Trouble>> {
        async move {
            // What is no name of a repository names none.
            let Ok(repo) = repo.parse::<RepoName>() else {
                return Ok(false);
            };
            let gone = images::names::withdraw(self, &repo, tag).await;
            gone.map_err(Trouble::from)
        }
        .boxed()
    }

    fn way_to<'a>(&'a self, kept: &'a Kept) -> BoxFuture<'a, Result<Way, NoWay>> {
        Controller::way_to(self, kept).boxed()
    }

    fn way_to_attempt<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<Way, NoWay>> {
        Controller::way_to_attempt(self, lease).boxed()
    }

    fn closing(&self) -> BoxFuture<'static, ()> {
        Controller::closing(self).clone().cancelled_owned().boxed()
    }

    fn count(&self, door: Door, action: &'static str, refused: Option<&'static str>) {
        self.metrics.access(door.name(), refused.is_none());
        tracing::debug!(door = door.name(), action, refused, "asked");
    }
}
