//! The way from a worker to its controller: what is asked, how refusals read.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use kiln_core::{JobId, Lease, WorkerId};
use kiln_proto::fleet::{
    BODY_MAX, GENERATION, GENERATION_HEADER, LEASE_HEADER, LeaseHeader, MACHINE_UPGRADE, Refusal,
    WORKER_HEADER,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::http::{Body, Http, Target, Upgraded};

/// Longest wait for a short answer.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a request had no answer that can be used.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The controller was not reached, or the connection broke: worth another try.
    #[error("the controller does not answer")]
    Unreachable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It took too long: worth another try.
    #[error("the controller took longer than {0:?} to answer")]
    Timeout(Duration),
    /// The controller is there and cannot now: worth another try.
    #[error("the controller cannot now: {0}")]
    Unavailable(String),
    /// The lease is not live: what runs for it is to be destroyed.
    #[error("the lease was refused: {0}")]
    LeaseRefused(String),
    /// The controller refused for another reason.
    #[error("the controller refused ({status}, {code}): {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Stable short name.
        code: String,
        /// One sentence.
        message: String,
    },
    /// An answer that makes no sense.
    #[error("the controller's answer could not be read: {0}")]
    Answer(String),
}

impl LinkError {
    /// Whether the same request may succeed later.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Unreachable(_) | Self::Timeout(_) | Self::Unavailable(_)
        )
    }
}

/// A worker's connection to its controller. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    http: Http,
    worker: WorkerId,
}

impl Client {
    /// Towards a controller, as this worker; nothing is connected yet.
    #[must_use]
    pub fn new(target: Target, worker: WorkerId) -> Self {
        Self {
            http: Http::new(target),
            worker,
        }
    }

    /// The worker it speaks as.
    #[must_use]
    pub fn worker(&self) -> &WorkerId {
        &self.worker
    }

    /// The controller's host, unless it is this one over a private socket.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        self.http.host()
    }

    /// Sends a message and reads the answer. `path` begins with a slash.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        path: &str,
        lease: Option<&Lease>,
        message: &Q,
        timeout: Duration,
    ) -> Result<A, LinkError> {
        let bytes =
            serde_json::to_vec(message).map_err(|error| LinkError::Answer(error.to_string()))?;
        self.post(path, lease, bytes.into(), "application/json", timeout)
            .await
    }

    /// Sends bytes and reads the answer.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn post<A: DeserializeOwned>(
        &self,
        path: &str,
        lease: Option<&Lease>,
        bytes: Bytes,
        content_type: &'static str,
        timeout: Duration,
    ) -> Result<A, LinkError> {
        let body = Full::new(bytes).map_err(|never| match never {}).boxed();
        let asked = async {
            let response = self
                .send(Method::POST, path, lease, content_type, body)
                .await?;
            let bytes = read(response.into_body()).await?;
            serde_json::from_slice(&bytes).map_err(|error| LinkError::Answer(error.to_string()))
        };
        tokio::time::timeout(timeout, asked)
            .await
            .unwrap_or(Err(LinkError::Timeout(timeout)))
    }

    /// Asks for a body that is streamed.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn get(&self, path: &str, lease: Option<&Lease>) -> Result<Incoming, LinkError> {
        let empty = Full::default().map_err(|never| match never {}).boxed();
        let send = self.send(Method::GET, path, lease, "application/json", empty);
        let response = tokio::time::timeout(REQUEST_TIMEOUT, send)
            .await
            .unwrap_or(Err(LinkError::Timeout(REQUEST_TIMEOUT)))?;
        Ok(response.into_body())
    }

    /// Sends a body that is streamed.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn put(
        &self,
        path: &str,
        lease: Option<&Lease>,
        body: Body,
        timeout: Duration,
    ) -> Result<(), LinkError> {
        let send = self.send(Method::PUT, path, lease, "application/octet-stream", body);
        tokio::time::timeout(timeout, send)
            .await
            .unwrap_or(Err(LinkError::Timeout(timeout)))
            .map(drop)
    }

    /// Turns a connection into a way to a kept machine.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn upgrade(&self, path: &str) -> Result<Upgraded, LinkError> {
        let request = Request::get(self.http.uri(path))
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, MACHINE_UPGRADE)
            .header(GENERATION_HEADER, GENERATION)
            .header(WORKER_HEADER, self.worker.as_str())
            .body(Full::default().map_err(|never| match never {}).boxed())
            .map_err(|error| LinkError::Answer(error.to_string()))?;
        let response = self.http.request(request).await;
        let response = response.map_err(|error| LinkError::Unreachable(error.into()))?;
        let status = response.status();
        if status != StatusCode::SWITCHING_PROTOCOLS {
            let bytes = read(response.into_body()).await.unwrap_or_default();
            return Err(refusal(status, &bytes));
        }
        let upgraded = super::http::upgraded(response).await;
        upgraded.map_err(|error| LinkError::Unreachable(error.into()))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        lease: Option<&Lease>,
        content_type: &'static str,
        body: Body,
    ) -> Result<Response<Incoming>, LinkError> {
        let mut request = Request::builder()
            .method(method)
            .uri(self.http.uri(path))
            .header(CONTENT_TYPE, content_type)
            .header(GENERATION_HEADER, GENERATION)
            .header(WORKER_HEADER, self.worker.as_str());
        if let Some(lease) = lease {
            request = request.header(LEASE_HEADER, LeaseHeader::of(lease).to_string());
        }
        let request = request
            .body(body)
            .map_err(|error| LinkError::Answer(error.to_string()))?;
        let response = self
            .http
            .request(request)
            .await
            .map_err(|error| LinkError::Unreachable(error.into()))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let bytes = read(response.into_body()).await.unwrap_or_default();
        Err(refusal(status, &bytes))
    }
}

async fn read(body: Incoming) -> Result<Bytes, LinkError> {
    let limited = Limited::new(body, BODY_MAX);
    let read = limited.collect().await.map_err(LinkError::Unreachable)?;
    Ok(read.to_bytes())
}

fn refusal(status: StatusCode, bytes: &[u8]) -> LinkError {
    let refusal: Refusal = serde_json::from_slice(bytes).unwrap_or_else(|_| Refusal {
        code: "unknown".to_owned(),
        message: String::from_utf8_lossy(bytes).chars().take(300).collect(),
    });
    if refusal.code == "lease_refused" {
        return LinkError::LeaseRefused(refusal.message);
    }
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        return LinkError::Unavailable(format!("{status}: {}", refusal.message));
    }
    LinkError::Refused {
        status: status.as_u16(),
        code: refusal.code,
        message: refusal.message,
    }
}

/// Path of a request about a job.
#[must_use]
pub fn job_path(job: &JobId, what: &str) -> String {
    format!("/worker/v1/jobs/{job}/{what}")
}
