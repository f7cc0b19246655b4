//! `GET /v1/jobs/{id}/events`: what happens to a job, as server-sent events that resume where they were cut.
//!
//! Events come from the database, in order; wake-ups only say when to look. So a slow or lost follower costs a look, never an
//! event, and nothing is kept for anybody: what is in memory is one page.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, header};
use kiln_core::{Action, JobId};
use kiln_db::{Event, Wake};
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::caller::Caller;
use super::extract::{Asked, Named};
use super::limits::Slot;
use super::problem::{Problem, ProblemBody};

/// Events of one look.
const PAGE: u32 = 100;
/// How often a follower looks without being woken: a lost wake-up costs no more than this.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// One server-sent event.
#[derive(Serialize, ToSchema)]
pub(crate) struct SentEvent {
    /// Number of the event within the job.
    id: Option<String>,
    /// What happened.
    event: Option<String>,
    /// JSON.
    data: Option<String>,
}

/// Where to begin.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct EventsAsked {
    /// Number of the last event that was seen; the header `Last-Event-ID` wins.
    after: Option<u64>,
}

/// Follows a job until it is over. Ends with the event `end`, or with `unauthenticated` when the token's time is over: come back
/// with `Last-Event-ID` and a new one.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/events", tag = "jobs",
    params(("id" = String, Path), EventsAsked,
        ("Last-Event-ID" = Option<u64>, Header, description = "Number of the last event that was seen.")),
    responses(
        (status = 200, description = "Server-sent events", body = SentEvent, content_type = "text/event-stream"),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn follow(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
    Asked(asked): Asked<EventsAsked>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let after = match headers.get("last-event-id") {
        None => asked.after.unwrap_or(0),
        Some(value) => number(value)
            .ok_or_else(|| Problem::bad_request("Last-Event-ID is not the number of an event"))?,
    };
    if after > i64::MAX as u64 {
        return Err(Problem::bad_request("there is no event of this number"));
    }
    // Listening begins before the first look: what happens in between wakes it.
    let wakes = api.db().subscribe();
    let job = caller.job(&api, &id, Action::JobRead).await?;
    let slot = follower(&api, &job.request.tenant)?;
    let follower = Follower {
        heartbeat: Instant::now() + api.config.heartbeat,
        job: job.request.id,
        api,
        caller,
        wakes,
        after,
        last: false,
        _slot: slot,
    };
    let events = stream::unfold(Some(follower), |state| async move {
        let mut follower = state?;
        let text = follower.next().await;
        let rest = if follower.last { None } else { Some(follower) };
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(text)), rest))
    });
    Ok(event_stream(Body::from_stream(events)))
}

fn number(value: &HeaderValue) -> Option<u64> {
    let text = value.to_str().ok()?;
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// A follower's slot of its tenant.
pub(crate) fn follower(api: &Api, tenant: &kiln_core::TenantName) -> Result<Slot, Problem> {
    api.followers.take(tenant.as_str()).ok_or_else(|| {
        Problem::too_many("followers", "this tenant follows too many jobs at once").retry_after(5)
    })
}

/// An answer of server-sent events.
pub(crate) fn event_stream(body: Body) -> Response {
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct Follower {
    api: Arc<Api>,
    caller: Caller,
    job: JobId,
    wakes: Receiver<Wake>,
    after: u64,
    heartbeat: Instant,
    last: bool,
    _slot: Slot,
}

impl Follower {
    /// The next piece of text: events, or a sign of life, or the last words.
    async fn next(&mut self) -> String {
        loop {
            let Ok((page, over)) = self.look().await else {
                return self.goodbye("unavailable");
            };
            if let Some(last) = page.last() {
                self.after = last.seq;
                return page.iter().map(frame).collect();
            }
            if over {
                return self.goodbye("end");
            }
            if Instant::now() >= self.heartbeat {
                self.heartbeat = Instant::now() + self.api.config.heartbeat;
                if !self.caller.is_still_good(&self.api).await {
                    return self.goodbye("unauthenticated");
                }
                return ": \n\n".to_owned();
            }
            let until = self.heartbeat.min(Instant::now() + LOOK_EVERY);
            let woken = woken(&mut self.wakes, &self.job);
            let _look_anyway = tokio::time::timeout_at(until, woken).await;
        }
    }

    /// What is new, and whether nothing more will come: that is asked before the events are read, so that none is missed.
    async fn look(&self) -> Result<(Vec<Event>, bool), kiln_db::DbError> {
        let _turn = self.api.look().await;
        let Some(mark) = self.api.db().event_mark(&self.job).await? else {
            return Ok((Vec::new(), true));
        };
        if mark.last <= self.after {
            return Ok((Vec::new(), mark.over));
        }
        let events = self.api.db().events_after(&self.job, self.after, PAGE);
        Ok((events.await?, mark.over))
    }

    fn goodbye(&mut self, word: &str) -> String {
        self.last = true;
        format!("event: {word}\ndata: {{}}\n\n")
    }
}

/// Waits until something about this job was committed.
pub(crate) async fn woken(wakes: &mut Receiver<Wake>, job: &JobId) {
    loop {
        match wakes.recv().await {
            Ok(Wake::Job(woken)) if woken == *job => return,
            Ok(Wake::Everything) | Err(RecvError::Lagged(_)) => return,
            Ok(_) => {}
            // No more wake-ups come: the timer looks.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

fn frame(event: &Event) -> String {
    let kind: String = event
        .kind
        .chars()
        .filter(|c| !kiln_policy::unseen(*c))
        .collect();
    let data = serde_json::json!({
        "seq": event.seq, "at_unix_ms": event.at_unix_ms, "kind": kind, "data": event.data,
    });
    format!("id: {}\nevent: {kind}\ndata: {data}\n\n", event.seq)
}
