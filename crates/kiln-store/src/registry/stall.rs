//! A connection whose peer stops reading is ended: else it would hold its slot and buffers for ever.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// A peer that takes no byte of an answer for this long is given up.
pub(crate) const STALL_MAX: Duration = Duration::from_secs(300);

/// A stream whose writes must make progress.
#[derive(Debug)]
pub(crate) struct Progressing<T> {
    io: T,
    stall_max: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<T> Progressing<T> {
    pub(crate) fn new(io: T, stall_max: Duration) -> Self {
        Self {
            io,
            stall_max,
            stalled: None,
        }
    }

    /// Passes progress on; without any, counts the time since it stopped.
    fn watch<V>(
        &mut self,
        context: &mut Context<'_>,
        done: Poll<io::Result<V>>,
    ) -> Poll<io::Result<V>> {
        if done.is_ready() {
            self.stalled = None;
            return done;
        }
        let max = self.stall_max;
        let stalled = self
            .stalled
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(max)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Progressing<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Progressing<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.io).poll_write(context, bytes);
        self.watch(context, done)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.io).poll_write_vectored(context, pieces);
        self.watch(context, done)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.io).poll_flush(context);
        self.watch(context, done)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.io).poll_shutdown(context);
        self.watch(context, done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_stops_reading_is_given_up_and_a_slow_one_is_not() {
        let (ours, mut theirs) = tokio::io::duplex(4);
        let mut ours = Progressing::new(ours, Duration::from_millis(30));
        let slow = async {
            let mut byte = [0; 1];
            for _ in 0..8 {
                tokio::time::sleep(Duration::from_millis(10)).await;
                theirs.read_exact(&mut byte).await.expect("a byte");
            }
        };
        let (written, ()) = tokio::join!(ours.write_all(&[7; 12]), slow);
        written.expect("slow is fine");
        let error = ours.write_all(&[7; 12]).await.expect_err("nobody reads");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
