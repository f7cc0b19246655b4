//! Handles of single streams, and of those the peer opens.

use crate::mux::{StreamFault, StreamReset};
use crate::session::{Anchor, CloseReason};
use bytes::Bytes;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The session ended under a stream; inside the `io::Error` of reads and writes.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the session of the stream is over")]
pub struct SessionEnded(#[source] pub CloseReason);

/// One duplex stream of a session.
///
/// - A read gives 0 after the peer's Eof. Bytes that came before a Reset or the session's end are
///   still given; then the read fails, with [`StreamReset`] or [`SessionEnded`] inside the error
///   ([`reset_of`] finds the former).
/// - A write waits while the peer's reader lags a window behind. A successful `flush` means that
///   the transport took the bytes; only `shutdown` on both sides tells that all arrived.
/// - `shutdown` ends this direction only.
/// - Dropping it before both directions ended resets the stream; what was written and not
///   flushed is lost, unless `shutdown` was begun.
#[derive(Debug)]
pub struct Stream {
    anchor: Arc<Anchor>,
    id: u32,
    gone: bool,
}

impl Stream {
    pub(crate) fn new(anchor: Arc<Anchor>, id: u32) -> Self {
        Self {
            anchor,
            id,
            gone: false,
        }
    }

    /// The id on the wire, for logs; unique within its session.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Ends both directions at once and tells the peer why. Codes below
    /// [`crate::mux::CODE_FIRST_FREE`] belong to this crate.
    pub fn reset(mut self, code: u16, reason: &str) {
        self.gone = true;
        self.anchor
            .shared
            .with(|mux| mux.abandon(self.id, Some((code, reason))));
    }

    fn poll_parts<'a>(
        &self,
        cx: &mut Context<'_>,
        parts: impl Iterator<Item = &'a [u8]>,
    ) -> Poll<io::Result<usize>> {
        settled(
            self.anchor
                .shared
                .with(|mux| mux.write(self.id, cx.waker(), parts)),
        )
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.gone {
            self.anchor.shared.with(|mux| mux.abandon(self.id, None));
        }
    }
}

fn settled<T>(result: Result<Option<T>, StreamFault>) -> Poll<io::Result<T>> {
    match result {
        Ok(Some(value)) => Poll::Ready(Ok(value)),
        Ok(None) => Poll::Pending,
        Err(fault) => Poll::Ready(Err(io_error(fault))),
    }
}

fn io_error(fault: StreamFault) -> io::Error {
    match fault {
        StreamFault::Reset(reset) => io::Error::new(io::ErrorKind::ConnectionReset, reset),
        StreamFault::Ended(reason) => {
            io::Error::new(io::ErrorKind::ConnectionAborted, SessionEnded(reason))
        }
        StreamFault::AfterShutdown => {
            io::Error::new(io::ErrorKind::BrokenPipe, "write after shutdown")
        }
    }
}

/// The peer's reset inside an error of a stream, if that is what it is.
pub fn reset_of(error: &io::Error) -> Option<&StreamReset> {
    error.get_ref()?.downcast_ref()
}

/// The session's end inside an error of a stream, if that is what it is.
pub fn session_end_of(error: &io::Error) -> Option<&CloseReason> {
    error
        .get_ref()?
        .downcast_ref()
        .map(|SessionEnded(reason)| reason)
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let most = buf.remaining();
        let result = self
            .anchor
            .shared
            .with(|mux| mux.read(self.id, cx.waker(), most, |bytes| buf.put_slice(bytes)));
        settled(result).map_ok(|_| ())
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_parts(cx, std::iter::once(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_parts(cx, parts.iter().map(|part| &**part))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = self
            .anchor
            .shared
            .with(|mux| mux.flushed(self.id, cx.waker()));
        settled(flushed.map(|done| done.then_some(())))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = self
            .anchor
            .shared
            .with(|mux| mux.shutdown(self.id, cx.waker()));
        settled(ended.map(|done| done.then_some(())))
    }
}

/// A stream the peer opened.
#[derive(Debug)]
pub struct Inbound {
    /// What it is for.
    pub kind: u8,
    /// The opener's first bytes, at most [`crate::frame::OPEN_PAYLOAD_MAX`].
    pub payload: Bytes,
    /// The stream.
    pub stream: Stream,
}

/// The streams the peer opens. Take them promptly and serve each in a task of its own: those
/// beyond the backlog are refused. When it is dropped, all are refused.
#[derive(Debug)]
pub struct Incoming {
    anchor: Arc<Anchor>,
}

impl Incoming {
    pub(crate) fn new(anchor: Arc<Anchor>) -> Self {
        Self { anchor }
    }

    /// The next stream, `None` once the session is over. Safe to cancel.
    pub async fn next(&mut self) -> Option<Inbound> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Inbound>> {
        let (waiting, ended) = self.anchor.shared.with(|mux| {
            let waiting = mux.take_waiting(cx.waker());
            (waiting, mux.ended().is_some())
        });
        match waiting {
            Some(waiting) => Poll::Ready(Some(Inbound {
                kind: waiting.kind,
                payload: waiting.payload,
                stream: Stream::new(Arc::clone(&self.anchor), waiting.stream),
            })),
            None if ended => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.anchor.shared.with(|mux| mux.refuse_incoming());
    }
}
