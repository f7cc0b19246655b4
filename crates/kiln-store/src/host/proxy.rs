//! Serves a peer's connection from the owner's store here, or through the owner's private socket.
//!
//! Attached, this process is the door: it knows who the peer is and whether its lease is live. A
//! write is forwarded only while it is, and the last bytes of its body only if it still is then, so
//! that the owner never completes a write under a lease that ended on the way.

use std::io;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use http::header::{
    ACCEPT, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderName, RANGE, TRANSFER_ENCODING,
};
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use tokio::io::{AsyncRead, AsyncWrite};
use tower::ServiceExt;

use super::call::WireAuthority;
use super::error::HostError;
use super::remote::{ConnectError, Connection, request};
use super::{HostRegistry, OWNERS_MAX, Role};
use crate::registry::Authority;
use crate::registry::http::answer;
use crate::registry::http::route::Route;
use crate::registry::http::transfer::BODY_IDLE_MAX;
use crate::registry::serve::serve_router;

/// A forwarded request, its body included, may take this long.
const FORWARD_WAIT_MAX: Duration = Duration::from_secs(3600);
/// Headers of a request that mean something to the registry; no others are forwarded.
const FORWARDED: [HeaderName; 5] = [ACCEPT, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE];

#[derive(Clone)]
struct Proxy {
    host: HostRegistry,
    authority: Authority,
}

pub(super) async fn serve(
    host: HostRegistry,
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    authority: Authority,
) -> Result<(), hyper::Error> {
    let proxy = Proxy { host, authority };
    serve_router(io, Router::new().fallback(handle).with_state(proxy)).await
}

async fn handle(State(proxy): State<Proxy>, mut request: Request) -> Response {
    // Only the registry's own endpoints: nothing else of the private socket is in reach.
    if let Err(error) = Route::parse(request.uri().path()) {
        return answer::route_error(error);
    }
    let mut role = proxy.host.role().await;
    for _ in 0..OWNERS_MAX {
        let remote = match role {
            Role::Owner(owner) => {
                request.extensions_mut().insert(proxy.authority);
                return match owner.router.clone().oneshot(request).await {
                    Ok(response) => response,
                    Err(never) => match never {},
                };
            }
            Role::Attached(remote) => remote,
        };
        match remote.connect().await {
            Ok(connection) => return forward(connection, request, &proxy.authority).await,
            Err(ConnectError::Absent(_)) => match proxy.host.next_owner().await {
                Ok(next) => role = next,
                Err(error) => return unavailable(&error),
            },
            Err(ConnectError::Refused(error)) => return unavailable(&error),
        }
    }
    unavailable(&HostError::OwnerGone { source: None })
}

async fn forward(connection: Connection, asked: Request, authority: &Authority) -> Response {
    let writes = !matches!(*asked.method(), Method::GET | Method::HEAD);
    if writes && let Err(error) = authority.check_live() {
        return answer::store_error(&error);
    }
    let (parts, body) = asked.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let has_body = parts.headers.contains_key(TRANSFER_ENCODING)
        || parts
            .headers
            .get(CONTENT_LENGTH)
            .is_some_and(|length| length != "0");
    let body = match has_body {
        true => guarded(body, authority.clone()),
        false => Body::empty(),
    };
    let mut forwarded = match request(parts.method, path, body) {
        Ok(request) => request,
        Err(error) => return unavailable(&error),
    };
    for name in FORWARDED {
        if let Some(value) = parts.headers.get(&name) {
            forwarded.headers_mut().insert(name, value.clone());
        }
    }
    let wire = WireAuthority::from(authority);
    match connection.send(forwarded, &wire, FORWARD_WAIT_MAX).await {
        Ok(answer) => answer.map(Body::new),
        Err(error) => match authority.check_live() {
            // The body was cut off here, because the lease ended on the way.
            Err(lease) if writes => answer::store_error(&lease),
            _ => unavailable(&error),
        },
    }
}

/// Passes a body on, one piece behind: the last piece only while the lease is live.
fn guarded(body: Body, authority: Authority) -> Body {
    let state = (Some(body), Bytes::new(), authority);
    Body::from_stream(stream::try_unfold(
        state,
        |(body, held, authority)| async move {
            let Some(mut body) = body else {
                return Ok(None);
            };
            let mut held = held;
            loop {
                let frame = tokio::time::timeout(BODY_IDLE_MAX, body.frame())
                    .await
                    .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
                let data = match frame {
                    Some(frame) => frame.map_err(io::Error::other)?.into_data(),
                    None => break,
                };
                let data = data.unwrap_or_default();
                if data.is_empty() {
                    continue;
                }
                let ready = std::mem::replace(&mut held, data);
                if !ready.is_empty() {
                    return Ok(Some((ready, (Some(body), held, authority))));
                }
            }
            authority.check_live().map_err(io::Error::other)?;
            if held.is_empty() {
                return Ok(None);
            }
            Ok::<_, io::Error>(Some((held, (None, Bytes::new(), authority))))
        },
    ))
}

fn unavailable(error: &HostError) -> Response {
    tracing::warn!(%error, "the registry cannot be reached");
    answer::error(
        StatusCode::SERVICE_UNAVAILABLE,
        "UNKNOWN",
        "the registry's owner went away: try again",
    )
}
