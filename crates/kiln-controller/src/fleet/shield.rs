//! What every request of a worker, and every one below `/v2`, passes first: bounds of time, rate and number, and bodies that stand still.
//! Heads and connections are bounded by the sockets (`api::listen`).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use kiln_core::TenantName;
use kiln_proto::fleet::{POLL_MS, WORKER_HEADER};

use super::refusal::Refused;
use crate::access::Peer;
use crate::access::peer::network_of;
use crate::api::limits::{Rates, Slots};
use crate::api::shield::{UPLOAD_TIME, URI_MAX, bounded};

/// Requests per second of one worker, in the long run: logs and events of all its jobs.
const WORKER_RATE: u32 = 500;
/// And at once.
const WORKER_BURST: u32 = 2_000;
/// Requests of one worker that are open at the same time.
const WORKER_OPEN_MAX: u32 = 1_024;
/// Requests per second of an address (of a /64 of IPv6) that shows no certificate: workers that join or push, people who pull.
const ADDRESS_RATE: u32 = 100;
/// And at once.
const ADDRESS_BURST: u32 = 500;
/// Writes per second into the registry for one tenant, by its workers and its people together.
const PUSH_RATE: u32 = 100;
/// And at once.
const PUSH_BURST: u32 = 1_000;
/// Tokens of the registry per second for one who is known.
const LOGIN_RATE: u32 = 10;
/// And at once.
const LOGIN_BURST: u32 = 200;
/// Longest time until a request is answered that has no time of its own.
const ANSWER_TIME: Duration = Duration::from_secs(60);
/// Longest time for an image to be read back and named.
const NAME_TIME: Duration = Duration::from_secs(600);

/// Bounds of the doors of workers and of the registry.
#[derive(Debug)]
pub struct DoorLimits {
    workers: Rates,
    addresses: Rates,
    pushes: Rates,
    logins: Rates,
    open: Arc<Slots>,
    body_stall: Duration,
}

impl DoorLimits {
    /// The usual bounds; bodies may stand still for `body_stall`.
    #[must_use]
    pub fn new(body_stall: Duration) -> Self {
        Self {
            workers: Rates::new(WORKER_RATE, WORKER_BURST),
            addresses: Rates::new(ADDRESS_RATE, ADDRESS_BURST),
            pushes: Rates::new(PUSH_RATE, PUSH_BURST),
            logins: Rates::new(LOGIN_RATE, LOGIN_BURST),
            open: Slots::new(WORKER_OPEN_MAX),
            body_stall,
        }
    }

    /// Whether somebody may ask for a token of the registry now.
    pub(super) fn may_log_in(&self, subject: &str) -> bool {
        self.logins.take(subject, Instant::now())
    }

    /// Whether a tenant may write into the registry now.
    pub(super) fn may_push(&self, tenant: &TenantName) -> bool {
        self.pushes.take(tenant.as_str(), Instant::now())
    }
}

/// Puts the shield around routes.
pub(super) fn around<S: Clone + Send + Sync + 'static>(
    router: Router<S>,
    limits: &Arc<DoorLimits>,
) -> Router<S> {
    router.layer(middleware::from_fn_with_state(Arc::clone(limits), guard))
}

/// Who is counted: a worker by its certificate, one of this host by its name, others by where they come from. For these bounds alone.
enum Counted {
    Worker(String),
    Address(IpAddr),
}

fn counted(request: &Request) -> Counted {
    let peer = request.extensions().get::<Peer>();
    if let Some(certificate) = peer.and_then(Peer::worker) {
        return Counted::Worker(certificate.worker.to_string());
    }
    match peer {
        Some(Peer::Tls { address, .. } | Peer::Plain { address }) => {
            Counted::Address(network_of(address.ip()))
        }
        Some(Peer::Local { .. }) | None => {
            let named = request.headers().get(WORKER_HEADER);
            let named = named.and_then(|name| name.to_str().ok()).unwrap_or("");
            Counted::Worker(named.chars().take(64).collect())
        }
    }
}

fn longest(path: &str) -> Duration {
    match path {
        "/worker/v1/poll" | "/worker/v1/machines/calls" => {
            Duration::from_millis(POLL_MS) + ANSWER_TIME
        }
        path if path.starts_with("/v2") || path.contains("/artifacts/") => UPLOAD_TIME,
        path if path.ends_with("/image") => NAME_TIME,
        _ => ANSWER_TIME,
    }
}

async fn guard(State(limits): State<Arc<DoorLimits>>, request: Request, next: Next) -> Response {
    let uri = request.uri();
    if uri.path().len() + uri.query().map_or(0, str::len) > URI_MAX {
        let status = StatusCode::URI_TOO_LONG;
        return Refused::new(status, "uri", "the address is too long").into_response();
    }
    let (name, rates) = match counted(&request) {
        Counted::Worker(worker) => (format!("worker {worker}"), &limits.workers),
        Counted::Address(address) => (format!("from {address}"), &limits.addresses),
    };
    if !rates.take(&name, Instant::now()) {
        return too_many("rate", "too many requests come at once");
    }
    let Some(_open) = limits.open.take(&name) else {
        return too_many("open", "too many requests are open at once");
    };
    let time = longest(request.uri().path());
    let request = request.map(|body| bounded(body, limits.body_stall));
    match tokio::time::timeout(time, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let status = StatusCode::REQUEST_TIMEOUT;
            Refused::new(status, "timeout", "this took too long").into_response()
        }
    }
}

fn too_many(code: &'static str, why: &str) -> Response {
    let mut response = Refused::new(StatusCode::TOO_MANY_REQUESTS, code, why).into_response();
    let again = http::HeaderValue::from_static("1");
    response
        .headers_mut()
        .insert(http::header::RETRY_AFTER, again);
    response
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, Bytes};
    use axum::routing::post;
    use futures_util::stream;
    use tower::ServiceExt as _;

    use super::*;

    fn router(limits: &Arc<DoorLimits>) -> Router {
        let read = |body: Bytes| async move { body.len().to_string() };
        around(Router::new().route("/worker/v1/x", post(read)), limits)
    }

    fn request(worker: &str, path: &str, body: Body) -> Request {
        let built = http::Request::post(path).header(WORKER_HEADER, worker);
        built.body(body).expect("legal")
    }

    async fn status(router: &Router, request: Request) -> StatusCode {
        let answer = router.clone().oneshot(request).await;
        answer.expect("infallible").status()
    }

    #[tokio::test]
    async fn one_worker_that_asks_too_much_holds_up_itself_alone() {
        let limits = Arc::new(DoorLimits::new(Duration::from_secs(20)));
        let router = router(&limits);
        let mut refused = 0;
        for _ in 0..WORKER_BURST + WORKER_RATE {
            let said = status(&router, request("w1", "/worker/v1/x", Body::empty())).await;
            refused += u32::from(said == StatusCode::TOO_MANY_REQUESTS);
        }
        assert!(refused > 0, "w1 is not bounded");
        let other = status(&router, request("w2", "/worker/v1/x", Body::empty())).await;
        assert_eq!(other, StatusCode::OK);
        let long = format!("/worker/v1/x?{}", "a".repeat(URI_MAX));
        let said = status(&router, request("w2", &long, Body::empty())).await;
        assert_eq!(said, StatusCode::URI_TOO_LONG);
        let slots: Vec<_> = (0..WORKER_OPEN_MAX)
            .map(|_| limits.open.take("worker w3").expect("a slot"))
            .collect();
        let said = status(&router, request("w3", "/worker/v1/x", Body::empty())).await;
        assert_eq!(said, StatusCode::TOO_MANY_REQUESTS);
        drop(slots);
        let said = status(&router, request("w3", "/worker/v1/x", Body::empty())).await;
        assert_eq!(said, StatusCode::OK);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stands_still_ends() {
        let limits = Arc::new(DoorLimits::new(Duration::from_secs(20)));
        let first = stream::iter([Ok::<_, std::io::Error>(Bytes::from("half"))]);
        let never = futures_util::StreamExt::chain(first, stream::pending());
        let asked = request("w1", "/worker/v1/x", Body::from_stream(never));
        let said = tokio::time::timeout(ANSWER_TIME / 2, status(&router(&limits), asked)).await;
        assert!(said.expect("an answer").is_client_error());
    }

    #[test]
    fn long_requests_have_long_times() {
        assert!(longest("/worker/v1/poll") > Duration::from_millis(POLL_MS));
        assert_eq!(longest("/v2/t/acme/app/blobs/uploads/1"), UPLOAD_TIME);
        assert_eq!(longest("/worker/v1/jobs/b1/artifacts/a"), UPLOAD_TIME);
        assert_eq!(longest("/worker/v1/heartbeat"), ANSWER_TIME);
    }
}
