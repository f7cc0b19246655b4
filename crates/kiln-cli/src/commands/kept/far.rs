//! A way to a machine through a server, whose end without a word is told as what it is.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use kiln_worker::fleet::http::Upgraded;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The bytes of such a way.
#[derive(Debug)]
pub(super) struct Way<S = Upgraded>(pub(super) S);

/// TLS says of a peer that died, for whoever writes a server, that it did not say goodbye.
fn told(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
            io::Error::new(error.kind(), "the server ended the connection")
        }
        _ => error,
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Way<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = ready!(Pin::new(&mut self.0).poll_read(context, buffer));
        Poll::Ready(read.map_err(told))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Way<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    /// As TLS does when its peer dies.
    struct Died;

    impl AsyncRead for Died {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let text = "peer closed connection without sending TLS close_notify";
            Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, text)))
        }
    }

    #[tokio::test]
    async fn a_server_that_died_ended_the_connection() {
        let error = Way(Died).read_u8().await.expect_err("died");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(error.to_string(), "the server ended the connection");
    }
}
