//! What every request passes first and every answer last: bounds of time, bodies that stand still, headers a browser obeys.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, BodyDataStream, Bytes, HttpBody as _};
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt as _, stream};
use http::{HeaderName, HeaderValue, Method, StatusCode, header};

use super::Api;
use super::problem::Problem;
use super::upload::Stalled;

/// Longest time an upload may take as a whole.
pub(crate) const UPLOAD_TIME: Duration = Duration::from_secs(2 * 3600);
/// How long a body is read on that nobody wants any more, so that its sender reads the answer.
const LINGER: Duration = Duration::from_secs(5);
/// How much of it, bytes.
const LINGER_BYTES_MAX: usize = 64 << 20;
/// Longest path and query.
pub(crate) const URI_MAX: usize = 8 * 1024;

/// Headers that every answer has.
const HEADERS: [(HeaderName, &str); 6] = [
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-store"),
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; frame-ancestors 'none'",
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
];

/// Puts the shields around every route.
pub(crate) fn around(router: Router, api: &Arc<Api>) -> Router {
    router
        .layer(middleware::from_fn_with_state(Arc::clone(api), guard))
        .layer(middleware::from_fn(finish))
}

/// Answers where there is no route.
pub(crate) async fn nothing_here(request: Request) -> Problem {
    Problem::not_found("route", request.uri().path())
        .hint("the routes are described at /v1/openapi.json")
}

/// Answers a method that a route does not have.
pub(crate) async fn other_methods() -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method",
        "this route does not have this method",
    )
}

async fn guard(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let uri = request.uri();
    let length = uri.path().len() + uri.query().map_or(0, str::len);
    if length > URI_MAX {
        return Problem::new(StatusCode::URI_TOO_LONG, "uri", "the address is too long")
            .into_response();
    }
    if let Some(refused) = other_host(&api, &request) {
        return refused.into_response();
    }
    let upload = request.method() == Method::POST
        && matches!(request.uri().path(), "/v1/builds" | "/v1/runs" | "/builds");
    let time = if upload {
        UPLOAD_TIME
    } else {
        api.config.request_timeout
    };
    let request = request.map(|body| bounded(body, api.config.body_stall));
    match tokio::time::timeout(time, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::new(StatusCode::REQUEST_TIMEOUT, "timeout", "this took too long")
            .retry_after(5)
            .into_response(),
    }
}

/// A page of another site that a browser was told is here (DNS rebinding) names itself in `Host`.
fn other_host(api: &Api, request: &Request) -> Option<Problem> {
    if api.config.hosts.is_empty() {
        return None;
    }
    let host = request
        .headers()
        .get(header::HOST)?
        .to_str()
        .unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name
        .trim_matches(['[', ']'])
        .parse::<std::net::IpAddr>()
        .is_ok();
    let known = api
        .config
        .hosts
        .iter()
        .any(|known| known.eq_ignore_ascii_case(name));
    let local = name.eq_ignore_ascii_case("localhost");
    (!address && !known && !local).then(|| {
        Problem::new(
            StatusCode::MISDIRECTED_REQUEST,
            "host",
            "this server has another name",
        )
    })
}

/// A body that ends with [`Stalled`] when no byte comes for `stall`. What a handler leaves of it unread is read and thrown away for a
/// moment: a connection that is closed with bytes unread is reset, and whoever sends before they read never sees why they were refused.
pub(crate) fn bounded(body: Body, stall: Duration) -> Body {
    if body.is_end_stream() {
        return body;
    }
    let pieces = Lingering(Some(body.into_data_stream()));
    Body::from_stream(stream::unfold(Some(pieces), move |state| async move {
        let mut pieces = state?;
        match tokio::time::timeout(stall, pieces.next()).await {
            Ok(Some(Ok(piece))) => Some((Ok(piece), Some(pieces))),
            Ok(Some(Err(error))) => Some((Err(axum::BoxError::from(error)), pieces.ended())),
            Ok(None) => {
                pieces.ended();
                None
            }
            Err(_) => Some((Err(axum::BoxError::from(Stalled)), pieces.ended())),
        }
    }))
}

/// The pieces of a body; what is left when it is dropped is read for [`LINGER`], [`LINGER_BYTES_MAX`] at most.
struct Lingering(Option<BodyDataStream>);

impl Lingering {
    async fn next(&mut self) -> Option<Result<Bytes, axum::Error>> {
        self.0.as_mut()?.next().await
    }

    /// There is nothing left that is worth reading.
    fn ended(mut self) -> Option<Self> {
        self.0 = None;
        None
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let Some(mut pieces) = self.0.take() else {
            return;
        };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let rest = async move {
            let mut left = LINGER_BYTES_MAX;
            while let Some(Ok(piece)) = pieces.next().await {
                let Some(less) = left.checked_sub(piece.len()) else {
                    return;
                };
                left = less;
            }
        };
        runtime.spawn(tokio::time::timeout(LINGER, rest));
    }
}

async fn finish(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    for (name, value) in HEADERS {
        headers
            .entry(name)
            .or_insert(HeaderValue::from_static(value));
    }
    response
}
