//! `GET /v1/jobs/{id}/logs`: the bytes of a job's log, from an offset, to what there is or until the job is over.

use std::io;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, header};
use kiln_core::Action;
use kiln_db::{Job, Wake};
use serde::Deserialize;
use tokio::sync::broadcast::Receiver;
use tokio::time::Instant;
use utoipa::IntoParams;

use super::caller::Caller;
use super::events::{follower, woken};
use super::extract::{Asked, Named};
use super::limits::Slot;
use super::problem::{Problem, ProblemBody};
use super::{Api, LogPiece};

/// Bytes of one look.
pub(crate) const PIECE: usize = 64 * 1024;

/// Which part.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct LogsAsked {
    /// First byte, from 0.
    offset: u64,
    /// Go on until the job is over.
    follow: bool,
}

/// Reads a job's log.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/logs", tag = "jobs", params(("id" = String, Path), LogsAsked),
    responses(
        (status = 200, description = "Bytes from the offset on; the header `kiln-log-size` says how many the log has now, `kiln-log-truncated` whether more was written than is kept",
            body = String, content_type = "text/plain"),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
    Asked(asked): Asked<LogsAsked>,
) -> Result<Response, Problem> {
    if asked.offset > i64::MAX as u64 {
        return Err(Problem::bad_request("there is no byte at this offset"));
    }
    let job = caller.job(&api, &id, Action::LogRead).await?;
    let slot = follower(&api, &job.request.tenant)?;
    let wakes = api.db().subscribe();
    let first = api.backend().read_log(&job, asked.offset, PIECE).await;
    let first = first.map_err(|error| Problem::unavailable(&error))?;
    let (size, truncated) = (first.size, first.truncated);
    let reader = Reader {
        wakes,
        recheck: Instant::now() + api.config.heartbeat,
        offset: asked.offset + first.bytes.len() as u64,
        first: Some(first.bytes).filter(|bytes| !bytes.is_empty()),
        follow: asked.follow,
        api,
        caller,
        job,
        _slot: slot,
    };
    let pieces = stream::unfold(Some(reader), |state| async move {
        let mut reader = state?;
        match reader.next().await {
            Ok(Some(bytes)) => Some((Ok(bytes), Some(reader))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    });
    let mut response = Body::from_stream(pieces).into_response();
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert("kiln-log-size", HeaderValue::from(size));
    let truncated = if truncated { "true" } else { "false" };
    headers.insert("kiln-log-truncated", HeaderValue::from_static(truncated));
    Ok(response)
}

struct Reader {
    api: Arc<Api>,
    caller: Caller,
    job: Job,
    offset: u64,
    first: Option<Bytes>,
    follow: bool,
    recheck: Instant,
    wakes: Receiver<Wake>,
    _slot: Slot,
}

impl Reader {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        if let Some(bytes) = self.first.take() {
            return Ok(Some(bytes));
        }
        loop {
            // Asked before the log is read: what is written until then is read.
            let over = !self.follow || self.reread().await?;
            let read = self.api.backend().read_log(&self.job, self.offset, PIECE);
            let piece = match read.await {
                Ok(piece) => piece,
                // The controller that keeps it is away for a moment, or for good: then the worker goes to another.
                Err(_) if !over => LogPiece::default(),
                Err(error) => return Err(error),
            };
            if !piece.bytes.is_empty() {
                self.offset += piece.bytes.len() as u64;
                return Ok(Some(piece.bytes));
            }
            if over {
                return Ok(None);
            }
            let longer = self.api.backend().log_longer_than(&self.job, self.offset);
            let changed = async {
                tokio::select! {
                    () = longer => {}
                    // The job may be over without another line.
                    () = woken(&mut self.wakes, &self.job.request.id) => {}
                }
            };
            let _timer = tokio::time::timeout_at(self.recheck, changed).await;
            if Instant::now() >= self.recheck {
                self.recheck = Instant::now() + self.api.config.heartbeat;
                if !self.caller.is_still_good(&self.api).await {
                    return Err(io::Error::other("the token's time is over"));
                }
            }
        }
    }

    async fn reread(&mut self) -> io::Result<bool> {
        let _turn = self.api.look().await;
        let job = self.api.db().job(&self.job.request.id).await;
        match job.map_err(io::Error::other)? {
            Some(job) => self.job = job,
            None => return Ok(true),
        }
        Ok(self.job.state.is_terminal())
    }
}
