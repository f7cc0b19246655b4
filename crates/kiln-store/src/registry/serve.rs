//! Serves HTTP on one connection: a machine's channel, a unix socket, a loopback TCP connection.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tower::ServiceExt;

use super::authority::Authority;
use super::http::router_for;
use super::stall::{Progressing, STALL_MAX};
use super::store::Store;

/// A peer must send the head of its (next) request within this time, else the connection is closed.
pub const HEAD_WAIT_MAX: Duration = Duration::from_secs(120);
/// The same at the door that every user of the host can reach: who holds connections open keeps others out for this long.
pub const LOOPBACK_HEAD_WAIT_MAX: Duration = Duration::from_secs(10);
/// Bytes hyper may buffer per connection.
const CONNECTION_BUFFER_BYTES: usize = 512 << 10;
/// Headers accepted in one request.
const HEADERS_MAX: usize = 64;

/// Serves one connection whose peer is `authority`, until it ends.
///
/// # Errors
/// What broke the connection; the store is unharmed.
pub async fn serve_connection(
    store: Arc<Store>,
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    authority: Authority,
) -> Result<(), hyper::Error> {
    serve_router(io, router_for(store, authority), HEAD_WAIT_MAX).await
}

/// Serves any router on one connection with this room's bounds.
pub(crate) async fn serve_router(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    router: Router,
    head_wait: Duration,
) -> Result<(), hyper::Error> {
    let service = service_fn(move |request| router.clone().oneshot(request));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_wait)
        .max_buf_size(CONNECTION_BUFFER_BYTES)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(Progressing::new(io, STALL_MAX)), service)
        .await
}
