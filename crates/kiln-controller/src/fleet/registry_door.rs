//! `/v2` of a controller: workers of other hosts push what they verified into the quarantine of their attempt, with a token that is bound to
//! its live epoch. The host then verifies again and names it (`POST …/image`).
//!
//! The lease is checked at every request, and by the registry again before a write takes effect.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, StatusCode, header};
use hyper_util::rt::TokioIo;
use kiln_core::lease::LeaseRefused;
use kiln_core::{JobKind, Lease};
use kiln_db::DoorError;
use kiln_store::registry::{AttemptAuthority, Authority, LeaseCheck, RepoName};

use super::who::now_unix_ms;
use crate::state::Controller;

/// Bytes between this server and the registry that may wait in memory, each way.
const PIPE_BYTES: usize = 256 * 1024;

/// What one attempt may do in the registry. Asks the database whether its lease is the live one.
struct LiveLease {
    controller: Controller,
    runtime: tokio::runtime::Handle,
}

impl LeaseCheck for LiveLease {
    fn check(&self, lease: &Lease) -> Result<(), LeaseRefused> {
        let ask = live(&self.controller, lease.clone());
        tokio::task::block_in_place(|| self.runtime.block_on(ask))
    }
}

async fn live(controller: &Controller, lease: Lease) -> Result<(), LeaseRefused> {
    match controller.db.check_lease(&lease).await {
        Ok(()) => Ok(()),
        Err(DoorError::Lease(refused)) => Err(refused),
        // Without an answer nothing is published.
        Err(_) => Err(LeaseRefused::Expired {
            attempt: lease.attempt,
        }),
    }
}

/// The authority of an attempt over its quarantine. Layers of the images it is to name lie here already and are mounted, not sent.
pub(super) async fn authority(controller: &Controller, lease: Lease) -> AttemptAuthority {
    let job = controller.db.job(&lease.attempt.job).await.ok().flatten();
    let named: Vec<RepoName> = match job.map(|job| job.request.kind) {
        Some(JobKind::SourceBuild(build)) => build
            .tags
            .iter()
            .filter_map(|tag| tag.repository.parse().ok())
            .collect(),
        _ => Vec::new(),
    };
    let check = LiveLease {
        controller: controller.clone(),
        runtime: tokio::runtime::Handle::current(),
    };
    AttemptAuthority::new(lease, Arc::new(check)).with_sources(named)
}

/// Any request below `/v2`.
pub async fn serve(State(controller): State<Controller>, request: Request) -> Response {
    let Some(token) = token(request.headers()) else {
        return refuse("a token is needed");
    };
    let verified = controller
        .access
        .verify_registry(&token, now_unix_ms(), |lease| {
            let controller = controller.clone();
            async move { live(&controller, lease).await }
        });
    let grant = match verified.await {
        Ok(grant) => grant,
        Err(error) => return refuse(&error.to_string()),
    };
    let Some(lease) = grant.lease() else {
        return refuse("this token is not of an attempt");
    };
    let authority = Authority::Attempt(authority(&controller, lease).await);
    match forward(&controller, authority, request).await {
        Ok(response) => response,
        Err(error) => {
            tracing::warn!(%error, "the registry did not answer");
            StatusCode::BAD_GATEWAY.into_response()
        }
    }
}

/// The token of a request: a bearer, or the password of a login, as registry clients send either.
fn token(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, rest) = value.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(rest.trim().to_owned());
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(rest.trim()).ok()?).ok()?;
    Some(decoded.split_once(':')?.1.to_owned())
}

fn refuse(why: &str) -> Response {
    let body = serde_json::json!({ "errors": [{ "code": "UNAUTHORIZED", "message": why }] });
    let headers = [
        (header::WWW_AUTHENTICATE, "Basic realm=\"kiln\""),
        (header::CONTENT_TYPE, "application/json"),
    ];
    (StatusCode::UNAUTHORIZED, headers, body.to_string()).into_response()
}

/// The registry may be this process's or another's: it is spoken to over a connection either way.
async fn forward(
    controller: &Controller,
    authority: Authority,
    mut request: Request,
) -> Result<Response, Box<dyn std::error::Error + Send + Sync>> {
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let registry = controller.registry.clone();
    tokio::spawn(async move {
        // What broke one connection is its peer's to see.
        let _ended = registry.serve_connection(far, authority).await;
    });
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(near)).await?;
    tokio::spawn(connection);
    request.headers_mut().remove(header::AUTHORIZATION);
    let response = sender.send_request(request).await?;
    Ok(response.map(Body::new))
}
