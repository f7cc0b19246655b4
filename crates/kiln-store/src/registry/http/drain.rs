//! Reads, within bounds, what is left of the body of a refused request. A TCP client that is still
//! sending when the connection closes would see a reset instead of the reason.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use http_body_util::BodyExt;

/// Most bytes read and thrown away.
const DRAIN_BYTES_MAX: usize = 64 << 20;
/// Most time spent on it.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(5);

/// A body that a handler uses, and that can be read on after the handler dropped it.
pub(crate) struct Lent(Arc<Mutex<Body>>);

/// Splits a body into the handler's end and ours.
pub(crate) fn lend(body: Body) -> (Lent, Body) {
    let shared = Arc::new(Mutex::new(body));
    (Lent(shared.clone()), Body::new(Lent(shared)))
}

impl Lent {
    /// Throws away what is left, up to the bounds.
    pub(crate) async fn drain(mut self) {
        let mut seen = 0;
        let reading = async {
            while let Some(Ok(frame)) = self.frame().await {
                seen += frame.data_ref().map_or(0, Bytes::len);
                if seen > DRAIN_BYTES_MAX {
                    return;
                }
            }
        };
        // Out of time: the connection is closed, and the client may see a reset.
        let _ = tokio::time::timeout(DRAIN_TIME_MAX, reading).await;
    }
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, axum::Error>>> {
        let mut body = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Pin::new(&mut *body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        let body = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        let body = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        body.size_hint()
    }
}
