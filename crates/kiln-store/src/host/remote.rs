//! The other side of the private socket: one short connection per request to the owning process.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;

use super::call::{
    AUTHORITY_HEADER, About, CALL_PATH, Call, PRIVATE_VERSION, Reply, WireAuthority,
};
use super::error::HostError;
use super::socket;
use crate::registry::ErrorKind;
use crate::registry::http::answer::ERROR_KIND;

/// A dead or hung owner is given up after this long without the head of an answer to a quick call.
const QUICK_WAIT_MAX: Duration = Duration::from_secs(30);
/// Calls that walk or hash the whole store, and commits of large blobs, may take this long.
const SLOW_WAIT_MAX: Duration = Duration::from_secs(3600);
/// Largest answer to a call, bytes (lists of names are the bulk).
const REPLY_BYTES_MAX: usize = 64 << 20;

/// Where the owner is found.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    dir: PathBuf,
}

/// A request that could not even be made: nothing was sent, so it may be made again elsewhere.
#[derive(Debug)]
pub(crate) struct NotConnected(pub(crate) io::Error);

impl Remote {
    pub(crate) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// One connection to the owner.
    pub(crate) async fn connect(&self) -> Result<Connection, ConnectError> {
        let stream = socket::connect(&self.dir)
            .await
            .map_err(|error| ConnectError::Absent(NotConnected(error)))?;
        let uid =
            socket::peer_uid(&stream).map_err(|error| ConnectError::Absent(NotConnected(error)))?;
        if uid != socket::own_uid() {
            return Err(ConnectError::Refused(HostError::OwnerStranger {
                dir: self.dir.clone(),
                uid,
            }));
        }
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| ConnectError::Absent(NotConnected(io::Error::other(error))))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the registry's owner ended");
            }
        });
        Ok(Connection {
            sender,
            dir: self.dir.clone(),
        })
    }

    /// Finds out who owns the registry and whether it speaks our version.
    pub(crate) async fn about(&self) -> Result<About, ConnectError> {
        let connection = self.connect().await?;
        let reply = connection.call(&Call::About).await;
        match reply.map_err(ConnectError::Refused)? {
            Reply::About(about) if about.version == PRIVATE_VERSION => Ok(about),
            Reply::About(about) => Err(ConnectError::Refused(HostError::OwnerVersion {
                found: about.version,
                known: PRIVATE_VERSION,
            })),
            other => Err(ConnectError::Refused(unexpected(&other))),
        }
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum ConnectError {
    /// Nobody listens: the owner is gone, or not there yet.
    Absent(NotConnected),
    /// Somebody is there, but not for us.
    Refused(HostError),
}

/// A connection good for one request.
#[derive(Debug)]
pub(crate) struct Connection {
    sender: hyper::client::conn::http1::SendRequest<Body>,
    dir: PathBuf,
}

impl Connection {
    /// Sends a request, its whole body included, as `authority`, and gives the head of the answer;
    /// `wait_max` bounds all of that.
    pub(crate) async fn send(
        mut self,
        mut request: Request<Body>,
        authority: &WireAuthority,
        wait_max: Duration,
    ) -> Result<Response<Incoming>, HostError> {
        let text = serde_json::to_string(authority).unwrap_or_default();
        let value = HeaderValue::try_from(text).map_err(|error| HostError::Protocol {
            what: error.to_string(),
        })?;
        let host = HeaderValue::from_static("registry.kiln.internal");
        request.headers_mut().insert(AUTHORITY_HEADER, value);
        request.headers_mut().insert(http::header::HOST, host);
        self.sender.ready().await.map_err(HostError::gone)?;
        match tokio::time::timeout(wait_max, self.sender.send_request(request)).await {
            Err(_) => Err(HostError::OwnerSilent {
                dir: self.dir.clone(),
            }),
            Ok(answer) => answer.map_err(HostError::gone),
        }
    }

    /// Runs a call on the owner.
    pub(crate) async fn call(self, call: &Call) -> Result<Reply, HostError> {
        let wait_max = match call {
            Call::Gc { .. } | Call::Scrub | Call::Adopt { .. } | Call::Mount { .. } => {
                SLOW_WAIT_MAX
            }
            _ => QUICK_WAIT_MAX,
        };
        let body = serde_json::to_vec(call).map_err(|error| HostError::Protocol {
            what: error.to_string(),
        })?;
        let request = request(Method::POST, CALL_PATH, Body::from(body))?;
        let answer = self
            .send(request, &WireAuthority::Operator, wait_max)
            .await?;
        let bytes = collect(answer.into_body(), REPLY_BYTES_MAX).await?;
        let reply = serde_json::from_slice(&bytes).map_err(|error| HostError::Protocol {
            what: error.to_string(),
        })?;
        match reply {
            Reply::Failed { kind, message } => Err(HostError::Remote { kind, message }),
            reply => Ok(reply),
        }
    }
}

pub(crate) fn request(method: Method, path: &str, body: Body) -> Result<Request<Body>, HostError> {
    Request::builder()
        .method(method)
        .uri(path)
        .body(body)
        .map_err(|error| HostError::Protocol {
            what: error.to_string(),
        })
}

/// Reads a bounded body.
pub(crate) async fn collect(body: Incoming, max: usize) -> Result<Bytes, HostError> {
    let collected = Limited::new(body, max).collect().await;
    Ok(collected.map_err(HostError::gone)?.to_bytes())
}

/// An error answer in the words of the owner.
pub(super) async fn refusal(answer: Response<Body>) -> HostError {
    let status = answer.status();
    let kind = answer
        .headers()
        .get(ERROR_KIND)
        .and_then(|value| value.to_str().ok())
        .and_then(|word| serde_json::from_value(Value::from(word)).ok())
        .unwrap_or(match status {
            StatusCode::NOT_FOUND => ErrorKind::NotFound,
            status if status.is_client_error() => ErrorKind::Invalid,
            _ => ErrorKind::Internal,
        });
    let body = Limited::new(answer.into_body(), REPLY_BYTES_MAX);
    let bytes = body.collect().await.map(|body| body.to_bytes());
    let value: Value = serde_json::from_slice(&bytes.unwrap_or_default()).unwrap_or_default();
    let message = value["errors"][0]["message"]
        .as_str()
        .map_or_else(|| format!("the owner answered {status}"), str::to_owned);
    HostError::Remote { kind, message }
}

pub(crate) fn unexpected(reply: &Reply) -> HostError {
    let mut what = format!("unexpected {reply:?}");
    what.truncate(
        what.char_indices()
            .nth(200)
            .map_or(what.len(), |(at, _)| at),
    );
    HostError::Protocol { what }
}
