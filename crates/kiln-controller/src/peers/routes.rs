//! `/peer/v1`: what other controllers of the same database may ask. Their token proves that they have the same keys; it says nothing
//! about people, so whoever asks has decided about those already.

use std::time::Duration;

use axum::extract::{FromRequestParts, Path, Query, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Extension, Router, body::Body};
use futures_util::StreamExt as _;
use http::request::Parts;
use http::{StatusCode, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use kiln_core::{JobId, TenantName};
use kiln_store::logs::{LogError, LogName, READ_MAX};
use serde::Deserialize;

use crate::access::Door;
use crate::fleet::machines::{self, Way};
use crate::fleet::refusal::Refused;
use crate::fleet::reports;
use crate::fleet::who::now_unix_ms;
use crate::state::Controller;

/// Bytes of the log so far.
pub(super) const SIZE: &str = "kiln-log-size";
/// `1`: more was written than is kept.
pub(super) const TRUNCATED: &str = "kiln-log-truncated";
/// `1`: nothing more will come.
pub(super) const ENDED: &str = "kiln-log-ended";
/// Longest wait for a log to grow.
const WAIT_MAX: Duration = Duration::from_secs(20);

/// The routes of other controllers.
pub fn router(controller: Controller) -> Router {
    Router::new()
        .route("/peer/v1/logs/{tenant}/{job}/{attempt}", get(log))
        .route("/peer/v1/logs/{tenant}/{job}/{attempt}/end", post(end))
        .route("/peer/v1/secrets/{job}/{name}", get(secret))
        .route("/peer/v1/machines/{job}/way", get(way))
        .route("/peer/v1/jobs/{job}/way", get(way_to_attempt))
        .with_state(controller)
}

pub(super) fn log_path(name: &LogName) -> String {
    let attempt = &name.attempt;
    format!(
        "/peer/v1/logs/{}/{}/{}",
        name.tenant, attempt.job, attempt.number
    )
}

/// Names of secrets may be any text.
pub(super) fn secret_path(job: &JobId, name: &str) -> String {
    format!("/peer/v1/secrets/{job}/{}", hex::encode(name))
}

/// Another controller, proven by its token.
struct Peer;

impl FromRequestParts<Controller> for Peer {
    type Rejection = Refused;

    async fn from_request_parts(
        parts: &mut Parts,
        controller: &Controller,
    ) -> Result<Self, Refused> {
        let text = parts.headers.get(header::AUTHORIZATION);
        let text = text.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let verified = text.map(|text| controller.access.verify_controller(text, now_unix_ms()));
        let why = match verified {
            Some(Ok(_)) => {
                controller.metrics.access(Door::Controller.name(), true);
                return Ok(Self);
            }
            Some(Err(refused)) => refused.to_string(),
            None => "there is no token".to_owned(),
        };
        let path = parts.uri.path();
        controller
            .turned_away(Door::Controller, "peer", path, &why)
            .await;
        Err(Refused::new(
            StatusCode::UNAUTHORIZED,
            "unauthenticated",
            format!("only controllers of this database are answered here: {why}"),
        ))
    }
}

fn named(tenant: &str, job: &str, attempt: u32) -> Result<LogName, Refused> {
    let (tenant, job) = (tenant.parse::<TenantName>(), job.parse::<JobId>());
    match (tenant, job) {
        (Ok(tenant), Ok(job)) => Ok(LogName::new(tenant, job, attempt)),
        _ => Err(Refused::bad("the path names no log")),
    }
}

#[derive(Deserialize)]
struct Asked {
    offset: u64,
    max: usize,
    wait_ms: u64,
}

async fn log(
    State(controller): State<Controller>,
    _: Peer,
    Path((tenant, job, attempt)): Path<(String, String, u32)>,
    Query(asked): Query<Asked>,
) -> Result<Response, Refused> {
    let name = named(&tenant, &job, attempt)?;
    let max = asked.max.min(READ_MAX);
    let failed = |error: LogError| match error {
        LogError::NotFound { .. } => Refused::missing("there is no such log here"),
        error => {
            tracing::warn!(log = %name, error = &error as &dyn std::error::Error, "a log was not read for another controller");
            Refused::unavailable("the log could not be read")
        }
    };
    let nothing_yet = || Refused::missing("there is no such log here");
    let mut status = controller.logs.status(&name).await.map_err(failed)?;
    let known = status.ok_or_else(nothing_yet)?;
    if known.bytes <= asked.offset && !known.ended && asked.wait_ms > 0 {
        let wait = Duration::from_millis(asked.wait_ms).min(WAIT_MAX);
        let mut follower = std::pin::pin!(controller.logs.follow(&name, asked.offset));
        let _either = tokio::time::timeout(wait, follower.next()).await;
        status = controller.logs.status(&name).await.map_err(failed)?;
    }
    let status = status.ok_or_else(nothing_yet)?;
    let bytes = match max {
        0 => bytes::Bytes::new(),
        max => controller
            .logs
            .read(&name, asked.offset, max)
            .await
            .map_err(failed)?,
    };
    let headers = [
        (SIZE, status.bytes.to_string()),
        (TRUNCATED, u8::from(status.truncated).to_string()),
        (ENDED, u8::from(status.ended).to_string()),
    ];
    Ok((StatusCode::OK, headers, Body::from(bytes)).into_response())
}

/// Puts a log away whose attempt is over: the database says so, not who asks.
async fn end(
    State(controller): State<Controller>,
    _: Peer,
    Path((tenant, job, attempt)): Path<(String, String, u32)>,
) -> Result<StatusCode, Refused> {
    let name = named(&tenant, &job, attempt)?;
    if controller.logs.is_here(&name) {
        reports::end_log_if_over(&controller, &name).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn secret(
    State(controller): State<Controller>,
    _: Peer,
    Path((job, name)): Path<(String, String)>,
) -> Result<Vec<u8>, Refused> {
    let missing = || Refused::missing("there is no such secret here");
    let job: JobId = job.parse().map_err(|_| missing())?;
    let name = hex::decode(name)
        .ok()
        .and_then(|name| String::from_utf8(name).ok());
    let name = name.ok_or_else(missing)?;
    controller.secrets.get(&job, &name).ok_or_else(missing)
}

/// Opens a way to a machine whose worker speaks to this controller.
async fn way(
    State(controller): State<Controller>,
    _: Peer,
    Path(job): Path<String>,
    upgrade: Option<Extension<OnUpgrade>>,
) -> Result<Response, Refused> {
    let missing = || Refused::missing("there is no way to such a machine here");
    let Some(Extension(upgrade)) = upgrade else {
        return Err(Refused::bad("a way to a machine is an upgraded connection"));
    };
    let job: JobId = job.parse().map_err(|_| missing())?;
    let kept = controller.db.kept(&job).await?.ok_or_else(missing)?;
    let near = controller.near_way(&kept).await;
    let near = near.map_err(|why| Refused::unavailable(why.to_string()))?;
    Ok(joined(&controller, upgrade, near))
}

/// Opens a way to a command that is attended, where its worker has a request held open here.
async fn way_to_attempt(
    State(controller): State<Controller>,
    _: Peer,
    Path(job): Path<String>,
    upgrade: Option<Extension<OnUpgrade>>,
) -> Result<Response, Refused> {
    let missing = || Refused::missing("there is no way to such a command here");
    let Some(Extension(upgrade)) = upgrade else {
        return Err(Refused::bad("a way to a command is an upgraded connection"));
    };
    let job: JobId = job.parse().map_err(|_| missing())?;
    let lease = controller.db.job(&job).await?.and_then(|job| job.lease);
    let lease = lease.ok_or_else(missing)?;
    if !controller.ways.hears(&lease.worker) {
        return Err(missing());
    }
    let near = controller.near_way_to_attempt(&lease).await;
    let near = near.map_err(|why| Refused::unavailable(why.to_string()))?;
    Ok(joined(&controller, upgrade, near))
}

/// Whoever asked for it bounds it.
fn joined(controller: &Controller, upgrade: OnUpgrade, mut near: Way) -> Response {
    let closing = controller.closing().clone();
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let mut far = TokioIo::new(upgraded);
        tokio::select! {
            _ended = kiln_proto::relay::join(&mut far, &mut near, || {}) => {}
            () = closing.cancelled() => {}
        }
    });
    machines::switching()
}
