//! The simulated channel: one byte stream of the guest whose host end can be replaced.
//!
//! It behaves like a virtio-serial port: while no host is connected, what the guest writes is lost and reads wait; the guest is not told
//! that a host went or came. Faults cut it, still it or take it over.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// Bytes under way in one direction.
const PIPE_BYTES: usize = 256 * 1024;

/// The guest's device. Clones are the same device.
#[derive(Clone, Debug, Default)]
pub(super) struct Port {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    host: Option<DuplexStream>,
    waiting: Vec<Waker>,
    mode: Mode,
    /// Bytes the guest may still write before the channel breaks for good.
    left: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Mode {
    #[default]
    Open,
    /// Nothing moves any more.
    Silent,
    /// What the session writes is swallowed; only raw bytes go out.
    Hijacked,
    /// There is no device any more.
    Closed,
}

impl Port {
    pub(super) fn dying_after(bytes: Option<u64>) -> Self {
        let port = Self::default();
        port.lock().left = bytes;
        port
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new host end; an earlier one reads end-of-file.
    pub(super) fn connect(&self) -> DuplexStream {
        let (host, guest) = tokio::io::duplex(PIPE_BYTES);
        let mut inner = self.lock();
        if inner.mode != Mode::Closed && inner.left != Some(0) {
            inner.host = Some(guest);
        }
        inner.wake();
        host
    }

    /// Nothing is read or written from now on; the host sees an open channel.
    pub(super) fn silence(&self) {
        self.lock().mode = Mode::Silent;
    }

    /// The machine stopped.
    pub(super) fn close(&self) {
        let mut inner = self.lock();
        inner.mode = Mode::Closed;
        inner.host = None;
        inner.wake();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().mode == Mode::Closed
    }

    /// Takes the channel away from the session and sends these bytes instead of whatever it would say.
    pub(super) async fn hijack(&self, bytes: &[u8]) {
        self.lock().mode = Mode::Hijacked;
        let mut rest = bytes;
        while !rest.is_empty() {
            let written = std::future::poll_fn(|cx| {
                let mut inner = self.lock();
                if inner.mode == Mode::Closed {
                    return Poll::Ready(rest.len());
                }
                inner.poll_host_write(cx, rest)
            });
            rest = &rest[written.await.min(rest.len())..];
        }
    }
}

impl Inner {
    fn wake(&mut self) {
        for waker in self.waiting.drain(..) {
            waker.wake();
        }
    }

    fn wait(&mut self, cx: &Context<'_>) {
        self.waiting.retain(|waker| !waker.will_wake(cx.waker()));
        self.waiting.push(cx.waker().clone());
    }

    /// Writes to the host; without one the bytes are lost, as a real port loses them.
    fn poll_host_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<usize> {
        let most = self.left.map_or(bytes.len(), |left| {
            bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX))
        });
        let Some(host) = &mut self.host else {
            return Poll::Ready(bytes.len());
        };
        match ready!(Pin::new(host).poll_write(cx, &bytes[..most])) {
            Ok(written) => {
                if let Some(left) = &mut self.left {
                    *left -= written as u64;
                    if *left == 0 {
                        self.host = None;
                    }
                }
                Poll::Ready(written)
            }
            Err(_) => {
                self.host = None;
                Poll::Ready(bytes.len())
            }
        }
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = self.lock();
        if inner.mode == Mode::Closed {
            return Poll::Ready(Ok(()));
        }
        let silent = inner.mode == Mode::Silent;
        if let Some(host) = inner.host.as_mut().filter(|_| !silent) {
            let before = buf.filled().len();
            match Pin::new(host).poll_read(cx, buf) {
                Poll::Ready(Ok(())) if buf.filled().len() > before => return Poll::Ready(Ok(())),
                Poll::Pending => {}
                // The host is gone; the device does not say so.
                Poll::Ready(_) => inner.host = None,
            }
        }
        inner.wait(cx);
        Poll::Pending
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.lock();
        match inner.mode {
            Mode::Closed => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            Mode::Silent => {
                inner.wait(cx);
                Poll::Pending
            }
            Mode::Hijacked => Poll::Ready(Ok(bytes.len())),
            Mode::Open => {
                let written = inner.poll_host_write(cx, bytes);
                if written.is_pending() {
                    inner.wait(cx);
                }
                written.map(Ok)
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
