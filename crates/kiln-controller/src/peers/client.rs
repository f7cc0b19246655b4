//! What one controller asks another: HTTP/1.1 over verified TLS, each request with a token of its own, few at a time.
//!
//! The other's certificate is of the authority they share, or one the host trusts; its name is the one in its URL.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client as Pool;
use hyper_util::rt::{TokioExecutor, TokioIo};
use kiln_core::JobId;
use kiln_proto::fleet::MACHINE_UPGRADE;
use kiln_store::dial::Dial;
use kiln_store::logs::{LogName, READ_MAX};
use tokio::sync::Semaphore;

use super::routes;
use crate::access::Authority;
use crate::api::LogPiece;
use crate::fleet::machines::{OPEN_TIMEOUT, Way};
use crate::fleet::secrets::JOB_BYTES_MAX;
use crate::fleet::who::now_unix_ms;
use crate::state::Controller;

/// Time for the connection to another controller, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Time until another controller has answered, beside what it was asked to wait.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Requests to other controllers at a time.
const ASKED_MAX: usize = 256;
/// Connections that are kept for the next request, to each.
const IDLE_MAX: usize = 16;

/// Why another controller gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// It is not reached, or the connection broke.
    #[error("the other controller at {url} does not answer")]
    Unreachable {
        /// Where.
        url: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It has not what was asked for.
    #[error("the other controller has no such thing")]
    NotFound,
    /// It refused.
    #[error("the other controller refused ({0})")]
    Refused(StatusCode),
    /// No token could be made.
    #[error("no token for the other controller could be made")]
    Sign(#[from] crate::access::SignError),
}

/// A part of a log that is asked for.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    path: String,
    wait: Duration,
}

impl Asked {
    /// At most `max` bytes from `offset` on; with none there yet the other waits for `wait`.
    pub(super) fn log(name: &LogName, offset: u64, max: usize, wait: Duration) -> Self {
        let (path, wait_ms) = (routes::log_path(name), wait.as_millis());
        Self {
            path: format!(
                "{path}?offset={offset}&max={}&wait_ms={wait_ms}",
                max.min(READ_MAX)
            ),
            wait,
        }
    }
}

/// A request that was handed on is not handed on again.
const RELAYED: &str = "kiln-relayed";

/// A request that another controller may be able to answer.
#[derive(Clone, Debug)]
pub(crate) struct Relayed {
    method: Method,
    path: String,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Relayed {
    /// A question of our own, with the proof of whoever needs the answer.
    pub(crate) fn get(path: String, proof: HeaderValue) -> Self {
        Self {
            method: Method::GET,
            path,
            headers: vec![(header::AUTHORIZATION, proof)],
        }
    }

    /// What of a request is handed on; none when it has a body, or was handed on before.
    pub(crate) fn of<B>(request: &Request<B>) -> Option<Self> {
        let reads = matches!(*request.method(), Method::GET | Method::HEAD);
        if !reads || request.headers().contains_key(RELAYED) {
            return None;
        }
        let kept = [header::AUTHORIZATION, header::ACCEPT, header::RANGE];
        let headers = kept.into_iter().filter_map(|name| {
            let value = request.headers().get(&name)?.clone();
            Some((name, value))
        });
        Some(Self {
            method: request.method().clone(),
            path: request.uri().path_and_query()?.to_string(),
            headers: headers.collect(),
        })
    }
}

/// A part of a log that another controller keeps.
#[derive(Clone, Debug)]
pub(super) struct FarPiece {
    pub(super) piece: LogPiece,
    /// Nothing more will come.
    pub(super) ended: bool,
}

/// Connections to other controllers.
pub(super) struct Client {
    pool: Pool<Dial, Empty<Bytes>>,
    slots: Semaphore,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("peers::Client")
    }
}

impl Client {
    pub(super) fn new(authority: &Authority) -> Result<Self, rustls::Error> {
        let mut roots = rustls::RootCertStore::empty();
        // Controllers may show certificates of the operator's own, which the host trusts.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots.add(authority.der().clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        // Every controller of a database has the same authority, whatever it shows to people.
        config.alpn_protocols = vec![kiln_proto::fleet::ALPN.to_vec(), b"http/1.1".to_vec()];
        let dial = Dial::new(Arc::new(config), CONNECT_TIMEOUT);
        let pool = Pool::builder(TokioExecutor::new())
            .pool_max_idle_per_host(IDLE_MAX)
            .build(dial);
        Ok(Self {
            pool,
            slots: Semaphore::new(ASKED_MAX),
        })
    }

    pub(super) async fn log(
        &self,
        controller: &Controller,
        url: &str,
        asked: &Asked,
    ) -> Result<FarPiece, PeerError> {
        let answer = self.ask(controller, Method::GET, url, &asked.path, asked.wait);
        let answer = answer.await?;
        let number =
            |name: &str| -> Option<u64> { answer.headers().get(name)?.to_str().ok()?.parse().ok() };
        let size = number(routes::SIZE).unwrap_or(0);
        let truncated = number(routes::TRUNCATED) == Some(1);
        let ended = number(routes::ENDED) == Some(1);
        let bytes = body(answer, url, READ_MAX).await?;
        let piece = LogPiece {
            bytes,
            size,
            truncated,
        };
        Ok(FarPiece { piece, ended })
    }

    pub(super) async fn end(
        &self,
        controller: &Controller,
        url: &str,
        name: &LogName,
    ) -> Result<(), PeerError> {
        let path = format!("{}/end", routes::log_path(name));
        self.ask(controller, Method::POST, url, &path, Duration::ZERO)
            .await
            .map(drop)
    }

    pub(super) async fn secret(
        &self,
        controller: &Controller,
        url: &str,
        job: &JobId,
        name: &str,
    ) -> Result<Vec<u8>, PeerError> {
        let path = routes::secret_path(job, name);
        let answer = self.ask(controller, Method::GET, url, &path, Duration::ZERO);
        let bytes = body(answer.await?, url, JOB_BYTES_MAX).await?;
        Ok(bytes.to_vec())
    }

    /// Hands a request without a body on to another controller, with the caller's own proof; its answer is streamed back.
    pub(super) async fn relay(
        &self,
        url: &str,
        asked: &Relayed,
    ) -> Result<Response<Body>, PeerError> {
        let lost = |source: Box<dyn std::error::Error + Send + Sync>| PeerError::Unreachable {
            url: url.to_owned(),
            source,
        };
        let _slot = self
            .slots
            .acquire()
            .await
            .map_err(|shut| lost(shut.into()))?;
        let mut request = Request::builder()
            .method(asked.method.clone())
            .uri(format!("{url}{}", asked.path))
            .header(RELAYED, "1");
        for (name, value) in &asked.headers {
            request = request.header(name, value);
        }
        let request = request
            .body(Empty::new())
            .map_err(|error| lost(error.into()))?;
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, self.pool.request(request)).await;
        let mut answer = answer
            .map_err(|late| lost(late.into()))?
            .map_err(|error| lost(error.into()))?;
        for name in [header::CONNECTION, header::TRANSFER_ENCODING] {
            answer.headers_mut().remove(name);
        }
        Ok(answer.map(Body::new))
    }

    /// A way to a machine.
    pub(super) async fn way(
        &self,
        controller: &Controller,
        url: &str,
        path: &str,
    ) -> Result<Way, PeerError> {
        let lost = |source: Box<dyn std::error::Error + Send + Sync>| PeerError::Unreachable {
            url: url.to_owned(),
            source,
        };
        let access = &controller.access;
        let token = access.issue_controller(controller.peers.id(), now_unix_ms())?;
        let request = Request::get(format!("{url}{path}"))
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, MACHINE_UPGRADE)
            .body(Empty::new())
            .map_err(|error| lost(error.into()))?;
        let opened = async {
            let answer = self.pool.request(request).await;
            let answer = answer.map_err(|error| lost(error.into()))?;
            if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
                return Err(PeerError::Refused(answer.status()));
            }
            let upgraded = hyper::upgrade::on(answer).await;
            upgraded
                .map(TokioIo::new)
                .map_err(|error| lost(error.into()))
        };
        let most = OPEN_TIMEOUT + ANSWER_TIMEOUT;
        let opened = tokio::time::timeout(most, opened).await;
        opened.unwrap_or_else(|late| Err(lost(late.into())))
    }

    async fn ask(
        &self,
        controller: &Controller,
        method: Method,
        url: &str,
        path: &str,
        wait: Duration,
    ) -> Result<Response<Incoming>, PeerError> {
        let lost = |source: Box<dyn std::error::Error + Send + Sync>| PeerError::Unreachable {
            url: url.to_owned(),
            source,
        };
        let _slot = self
            .slots
            .acquire()
            .await
            .map_err(|shut| lost(shut.into()))?;
        let access = &controller.access;
        let token = access.issue_controller(controller.peers.id(), now_unix_ms())?;
        let request = Request::builder()
            .method(method)
            .uri(format!("{url}{path}"))
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .body(Empty::new())
            .map_err(|error| lost(error.into()))?;
        let asked = tokio::time::timeout(wait + ANSWER_TIMEOUT, self.pool.request(request));
        let answer = asked
            .await
            .map_err(|late| lost(late.into()))?
            .map_err(|error| lost(error.into()))?;
        match answer.status() {
            status if status.is_success() => Ok(answer),
            StatusCode::NOT_FOUND => Err(PeerError::NotFound),
            status => Err(PeerError::Refused(status)),
        }
    }
}

async fn body(answer: Response<Incoming>, url: &str, max: usize) -> Result<Bytes, PeerError> {
    let lost = |source: Box<dyn std::error::Error + Send + Sync>| PeerError::Unreachable {
        url: url.to_owned(),
        source,
    };
    let whole = Limited::new(answer.into_body(), max).collect();
    let whole = tokio::time::timeout(ANSWER_TIMEOUT, whole).await;
    Ok(whole
        .map_err(|late| lost(late.into()))?
        .map_err(lost)?
        .to_bytes())
}
