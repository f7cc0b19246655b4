//! hypeman's build interface, for clients that speak it: `/builds`, its states, its events. What it left open is closed here: a build is
//! its tenant's, `cache_scope` must be the token's, fields that were ignored are refused.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequestParts, Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use http::request::Parts;
use http::{HeaderValue, StatusCode, header};
use kiln_core::{Action, FailureClass, JobKind, JobState, PendingReason, Verdict};
use kiln_db::{Job, JobFilter, Wake};
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::Receiver;
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::ask::BuildAsk;
use super::builds::submit_asked;
use super::caller::Caller;
use super::events::{SentEvent, event_stream, follower};
use super::extract::{Answer, Asked, Named};
use super::limits::Slot;
use super::logs::PIECE;
use super::problem::Problem;
use super::upload::{self, Form};

/// How often a follower looks without being woken.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// A refusal as hypeman's clients read it.
#[derive(Debug)]
pub(crate) struct Refusal(Problem);

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

/// What a request says, refused in hypeman's words when it is wrong.
#[derive(Debug)]
pub(crate) struct Spoken<T>(pub(crate) T);

impl<T: FromRequestParts<Arc<Api>, Rejection = Problem>> FromRequestParts<Arc<Api>> for Spoken<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Refusal> {
        Ok(Self(T::from_request_parts(parts, api).await?))
    }
}

/// Body of a refusal.
#[derive(Serialize, ToSchema)]
pub(crate) struct RefusalBody {
    /// `invalid_request`, `invalid_source`, `not_found`, `conflict`, `internal_error`, or kiln's own.
    code: String,
    /// One sentence.
    message: String,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let problem = self.0;
        let code = match problem.code {
            "invalid" | "bad_request" | "media_type" => "invalid_request",
            "finished" => "conflict",
            "unavailable" => "internal_error",
            other => other,
        };
        let body = RefusalBody {
            code: code.to_owned(),
            message: problem.detail.clone(),
        };
        let body = serde_json::to_vec(&body).unwrap_or_default();
        let mut response = problem.into_response();
        *response.body_mut() = Body::from(body);
        let headers = response.headers_mut();
        headers.remove(header::CONTENT_LENGTH);
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        response
    }
}

/// A build as hypeman shows it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct BuildObject {
    /// Id.
    id: String,
    /// `queued`, `building`, `pushing`, `ready`, `failed` or `cancelled`.
    status: String,
    /// Place in the queue, from 1, when it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_position: Option<u32>,
    /// Digest of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    image_digest: Option<String>,
    /// Its name in the registry.
    #[serde(skip_serializing_if = "Option::is_none")]
    image_ref: Option<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// When it came, RFC 3339.
    created_at: String,
    /// When its machine was ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    started_at: Option<String>,
    /// When it was over.
    #[serde(skip_serializing_if = "Option::is_none")]
    completed_at: Option<String>,
    /// From ready to over.
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_ms: Option<u64>,
}

fn rfc3339(unix_ms: u64) -> String {
    let seconds = i64::try_from(unix_ms / 1000).unwrap_or(0);
    let at = time::OffsetDateTime::from_unix_timestamp(seconds)
        .unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        at.year(),
        u8::from(at.month()),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        unix_ms % 1000
    )
}

fn status(state: &JobState, phase: Option<&str>) -> &'static str {
    match state {
        JobState::Queued { .. } => "queued",
        JobState::Leased { .. } | JobState::Running { .. } => match phase {
            Some("push" | "publish") => "pushing",
            _ => "building",
        },
        JobState::Finished { outcome } => match &outcome.verdict {
            Verdict::Passed => "ready",
            Verdict::Failed {
                class: FailureClass::Cancelled,
                ..
            } => "cancelled",
            Verdict::Failed { .. } => "failed",
        },
    }
}

impl BuildObject {
    fn of(job: &Job) -> Self {
        let error = match &job.state {
            JobState::Finished { outcome } => match &outcome.verdict {
                Verdict::Failed { message, .. } => Some(message.clone()),
                Verdict::Passed => None,
            },
            _ => None,
        };
        let receipt = job
            .receipt
            .as_ref()
            .and_then(|r| serde_json::to_value(r).ok());
        let text = |name: &str| Some(receipt.as_ref()?[name].as_str()?.to_owned());
        let digest = text("manifest").or_else(|| text("image"));
        let times = job.started_unix_ms.zip(job.finished_unix_ms);
        Self {
            id: job.request.id.to_string(),
            status: status(&job.state, job.phase.as_deref()).to_owned(),
            queue_position: match &job.reason {
                Some(PendingReason::Behind { jobs }) => Some(jobs + 1),
                _ => None,
            },
            image_ref: digest.as_ref().and_then(|_| image_ref(job)),
            image_digest: digest,
            error,
            created_at: rfc3339(job.created_unix_ms),
            started_at: job.started_unix_ms.map(rfc3339),
            completed_at: job.finished_unix_ms.map(rfc3339),
            duration_ms: times.map(|(from, to)| to.saturating_sub(from)),
        }
    }
}

fn image_ref(job: &Job) -> Option<String> {
    let JobKind::SourceBuild(build) = &job.request.kind else {
        return None;
    };
    let name = build
        .tags
        .first()
        .map_or_else(|| build.name.clone(), ToString::to_string);
    Some(format!("t/{}/{name}", job.request.tenant))
}

/// The parts that hypeman's clients send.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it only describes the form")]
pub(crate) struct HypemanForm {
    /// The source tree: tar.gz.
    #[schema(value_type = String, format = Binary)]
    source: Vec<u8>,
    /// The Dockerfile's text, instead of one in the source.
    dockerfile: Option<String>,
    /// Refused: name bases in the Dockerfile.
    base_image_digest: Option<String>,
    /// Must be the token's tenant.
    cache_scope: Option<String>,
    /// Wall time in seconds.
    timeout_seconds: Option<String>,
    /// JSON: `[{"id": "name"}]`.
    secrets: Option<String>,
}

#[derive(Deserialize)]
struct SecretAsked {
    id: String,
}

/// Starts a build (hypeman's interface).
#[utoipa::path(
    post, path = "/builds", tag = "hypeman",
    request_body(content = HypemanForm, content_type = "multipart/form-data"),
    responses(
        (status = 202, description = "Queued", body = BuildObject),
        (status = "4XX", description = "Refused", body = RefusalBody),
        (status = "5XX", description = "Not now", body = RefusalBody),
    )
)]
pub(crate) async fn create(
    State(api): State<Arc<Api>>,
    Spoken(caller): Spoken<Caller>,
    request: Request,
) -> Result<Answer<BuildObject>, Refusal> {
    let tenant = caller
        .acting_for(&api, None, Action::JobSubmit, "build")
        .await?;
    let (parts, body) = request.into_parts();
    let mut form = Form::new(&api, &tenant, &parts.headers, body)?;
    let mut asked = BuildAsk::default();
    let mut source = None;
    while let Some((name, field)) = form.next(&api).await? {
        match name.as_str() {
            "source" if source.is_some() => {
                return Err(Problem::invalid(name, "there are two parts source").into());
            }
            "source" => {
                source = Some(upload::source(&api, &tenant, field).await?);
            }
            "cache_scope" => {
                let scope = form.text(&api, "cache_scope", field).await?;
                if scope != tenant.as_str() {
                    caller
                        .note(
                            &api,
                            Action::JobSubmit,
                            Some(tenant),
                            "cache_scope",
                            Some("cache_scope"),
                        )
                        .await?;
                    return Err(
                        Problem::forbidden("cache_scope must be the token's own tenant").into(),
                    );
                }
            }
            "timeout_seconds" => {
                let text = form.text(&api, "timeout_seconds", field).await?;
                let seconds = text.trim().parse().map_err(|_| {
                    Problem::invalid("timeout_seconds", "it must be a number of seconds")
                })?;
                asked.common.timeout_seconds = Some(seconds);
            }
            "secrets" => {
                let text = form.small(&api, field).await?;
                let secrets: Vec<SecretAsked> = serde_json::from_slice(&text).map_err(|_| {
                    Problem::invalid("secrets", "it must be a JSON array of objects with `id`")
                })?;
                asked.secrets = secrets.into_iter().map(|secret| secret.id).collect();
            }
            "dockerfile" => {
                asked.dockerfile_text = Some(form.text(&api, "dockerfile", field).await?);
            }
            "base_image_digest" => {
                return Err(Problem::invalid(
                    name,
                    "it is not taken: name bases in the Dockerfile",
                )
                .into());
            }
            other => return Err(upload::no_such_part(other).into()),
        }
    }
    let job = submit_asked(&api, &caller, &tenant, &asked, source).await?;
    Ok(Answer(StatusCode::ACCEPTED, BuildObject::of(&job)))
}

/// Lists the tenant's newest builds (hypeman's interface).
#[utoipa::path(
    get, path = "/builds", tag = "hypeman",
    responses(
        (status = 200, description = "At most 100, newest first", body = Vec<BuildObject>),
        (status = "4XX", description = "Refused", body = RefusalBody),
        (status = "5XX", description = "Not now", body = RefusalBody),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    Spoken(caller): Spoken<Caller>,
) -> Result<Answer<Vec<BuildObject>>, Refusal> {
    let tenant = caller
        .acting_for(&api, None, Action::JobRead, "builds")
        .await?;
    let filter = JobFilter {
        tenant: Some(tenant),
        ..JobFilter::default()
    };
    let page = api
        .db()
        .jobs(&filter, None, 100)
        .await
        .map_err(Problem::from)?;
    let mut builds = Vec::new();
    for line in page.items.iter().filter(|line| line.kind != "run") {
        if let Some(job) = api.db().job(&line.id).await.map_err(Problem::from)? {
            builds.push(BuildObject::of(&job));
        }
    }
    Ok(Answer(StatusCode::OK, builds))
}

async fn find(api: &Api, caller: &Caller, id: &str, action: Action) -> Result<Job, Problem> {
    let job = caller.job(api, id, action).await?;
    if matches!(job.request.kind, JobKind::Run(_)) {
        return Err(Problem::not_found("job", id));
    }
    Ok(job)
}

/// Shows a build (hypeman's interface).
#[utoipa::path(
    get, path = "/builds/{id}", tag = "hypeman", params(("id" = String, Path)),
    responses(
        (status = 200, description = "The build", body = BuildObject),
        (status = "4XX", description = "Refused", body = RefusalBody),
        (status = "5XX", description = "Not now", body = RefusalBody),
    )
)]
pub(crate) async fn show(
    State(api): State<Arc<Api>>,
    Spoken(caller): Spoken<Caller>,
    Spoken(Named(id)): Spoken<Named>,
) -> Result<Answer<BuildObject>, Refusal> {
    let job = find(&api, &caller, &id, Action::JobRead).await?;
    Ok(Answer(StatusCode::OK, BuildObject::of(&job)))
}

/// Cancels a build (hypeman's interface).
#[utoipa::path(
    delete, path = "/builds/{id}", tag = "hypeman", params(("id" = String, Path)),
    responses(
        (status = 204, description = "Cancelled, or about to be"),
        (status = "4XX", description = "Refused", body = RefusalBody),
        (status = "5XX", description = "Not now", body = RefusalBody),
    )
)]
pub(crate) async fn cancel(
    State(api): State<Arc<Api>>,
    Spoken(caller): Spoken<Caller>,
    Spoken(Named(id)): Spoken<Named>,
) -> Result<StatusCode, Refusal> {
    find(&api, &caller, &id, Action::JobRead).await?;
    super::jobs::cancelled(&api, &caller, &id, None).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// How to follow.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct FollowAsked {
    /// Go on until the build is over.
    #[serde(default)]
    follow: bool,
}

/// Log and states of a build as server-sent events (hypeman's interface).
#[utoipa::path(
    get, path = "/builds/{id}/events", tag = "hypeman", params(("id" = String, Path), FollowAsked),
    responses(
        (status = 200, description = "`data: {type: log|status|heartbeat, timestamp, content, status}`", body = SentEvent, content_type = "text/event-stream"),
        (status = "4XX", description = "Refused", body = RefusalBody),
        (status = "5XX", description = "Not now", body = RefusalBody),
    )
)]
pub(crate) async fn events(
    State(api): State<Arc<Api>>,
    Spoken(caller): Spoken<Caller>,
    Spoken(Named(id)): Spoken<Named>,
    Spoken(Asked(asked)): Spoken<Asked<FollowAsked>>,
) -> Result<Response, Refusal> {
    // Listening begins before the first look, so that a build that ends in between does not leave a reader hanging.
    let wakes = api.db().subscribe();
    let job = find(&api, &caller, &id, Action::LogRead).await?;
    let slot = follower(&api, &job.request.tenant)?;
    let reader = Reader {
        heartbeat: Instant::now() + api.config.heartbeat,
        api,
        caller,
        job,
        wakes,
        follow: asked.follow,
        offset: 0,
        told: "",
        last: false,
        _slot: slot,
    };
    let events = stream::unfold(Some(reader), |state| async move {
        let mut reader = state?;
        let text = reader.next().await;
        let rest = if reader.last { None } else { Some(reader) };
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(text)), rest))
    });
    Ok(event_stream(Body::from_stream(events)))
}

/// How many bytes there are before a character that is not whole yet.
fn whole(bytes: &[u8]) -> usize {
    let tail = (1..=bytes.len().min(3)).find(|back| bytes[bytes.len() - back] >= 0xc0);
    let Some(back) = tail else {
        return bytes.len();
    };
    let first = bytes[bytes.len() - back];
    let needed = if first >= 0xf0 {
        4
    } else if first >= 0xe0 {
        3
    } else {
        2
    };
    match back < needed {
        true => bytes.len() - back,
        false => bytes.len(),
    }
}

struct Reader {
    api: Arc<Api>,
    caller: Caller,
    job: Job,
    wakes: Receiver<Wake>,
    follow: bool,
    offset: u64,
    told: &'static str,
    heartbeat: Instant,
    last: bool,
    _slot: Slot,
}

impl Reader {
    async fn next(&mut self) -> String {
        loop {
            match self.api.db().job(&self.job.request.id).await {
                Ok(Some(job)) => self.job = job,
                Ok(None) | Err(_) => return self.goodbye(),
            }
            let now = status(&self.job.state, self.job.phase.as_deref());
            let over = self.job.state.is_terminal();
            if now != self.told && !over {
                self.told = now;
                return self.event("status", None, Some(now));
            }
            let piece = self
                .api
                .backend()
                .read_log(&self.job, self.offset, PIECE)
                .await;
            let piece = match piece {
                Ok(piece) => piece,
                // The controller that keeps it is away for a moment, or for good: then the worker goes to another.
                Err(_) if !over && self.follow => super::LogPiece::default(),
                Err(_) => return self.goodbye(),
            };
            // More may come of what is cut off in a character.
            let more = piece.bytes.len() == PIECE || (self.follow && !over);
            let end = match more {
                true => whole(&piece.bytes),
                false => piece.bytes.len(),
            };
            if end > 0 {
                self.offset += end as u64;
                let text = String::from_utf8_lossy(&piece.bytes[..end]).into_owned();
                return self.event("log", Some(&text), None);
            }
            if over || !self.follow {
                self.last = true;
                return self.event("status", None, Some(now));
            }
            if Instant::now() >= self.heartbeat {
                self.heartbeat = Instant::now() + self.api.config.heartbeat;
                if !self.caller.is_still_good(&self.api).await {
                    return self.goodbye();
                }
                return self.event("heartbeat", None, None);
            }
            let until = self.heartbeat.min(Instant::now() + LOOK_EVERY);
            let longer = self.api.backend().log_longer_than(&self.job, self.offset);
            let id = self.job.request.id.clone();
            let wakes = &mut self.wakes;
            let changed = async move {
                loop {
                    match wakes.recv().await {
                        Ok(Wake::Job(job)) if job != id => {}
                        Ok(Wake::Job(_) | Wake::Everything) => return,
                        Ok(_) => {}
                        Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => return,
                        Err(_) => std::future::pending::<()>().await,
                    }
                }
            };
            tokio::select! {
                () = longer => {}
                () = changed => {}
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    fn goodbye(&mut self) -> String {
        self.last = true;
        String::new()
    }

    fn event(&self, kind: &str, content: Option<&str>, status: Option<&str>) -> String {
        let mut data = serde_json::json!({"type": kind, "timestamp": rfc3339(self.api.now_ms())});
        if let Some(content) = content {
            data["content"] = content.into();
        }
        if let Some(status) = status {
            data["status"] = status.into();
        }
        format!("data: {data}\n\n")
    }
}

#[cfg(test)]
mod tests {
    use super::whole;

    #[test]
    fn a_character_is_not_cut_and_what_is_none_is_not_waited_for() {
        let text = "a\u{e9}\u{20ac}\u{1f600}";
        let ends: Vec<usize> = (0..=text.len())
            .map(|n| whole(&text.as_bytes()[..n]))
            .collect();
        assert_eq!(ends, [0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10]);
        for odd in [&b"\x80"[..], b"\xbf\xbf\xbf\xbf", b"a\xff\xff\xff\xff"] {
            assert!(whole(odd) > 0 || odd.len() < 4, "{odd:?}");
        }
        assert_eq!(whole(b"\xbf\xbf\xbf\xbf"), 4);
    }
}
