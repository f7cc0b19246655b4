//! A body whose pieces another task brings, one at a time.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tokio::sync::mpsc;

/// A body.
#[derive(Debug)]
pub(super) struct Pieces {
    /// What is there already.
    first: Option<Bytes>,
    more: Option<mpsc::Receiver<Option<Bytes>>>,
    length: Option<u64>,
}

impl Pieces {
    /// All at once.
    pub(super) fn whole(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self {
            length: Some(bytes.len() as u64),
            first: Some(bytes).filter(|bytes| !bytes.is_empty()),
            more: None,
        }
    }

    /// Through a channel that holds one piece; `None` is the end. One whose sender is gone without it is cut off, and its reader sees that.
    pub(super) fn brought(length: Option<u64>) -> (mpsc::Sender<Option<Bytes>>, Self) {
        let (sender, more) = mpsc::channel(1);
        let pieces = Self {
            first: None,
            more: Some(more),
            length,
        };
        (sender, pieces)
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        let Some(more) = &mut self.more else {
            return Poll::Ready(None);
        };
        more.poll_recv(context).map(|piece| match piece {
            Some(Some(bytes)) => Some(Ok(Frame::data(bytes))),
            Some(None) => {
                self.more = None;
                None
            }
            None => Some(Err(io::ErrorKind::UnexpectedEof.into())),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && (self.more.is_none() || self.length == Some(0))
    }

    fn size_hint(&self) -> SizeHint {
        self.length
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// The next data of a body; none at its end. Trailers are left out.
pub(super) async fn next(body: &mut Incoming) -> Option<Result<Bytes, hyper::Error>> {
    loop {
        let frame =
            std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await?;
        match frame.map(Frame::into_data) {
            Ok(Ok(data)) => return Some(Ok(data)),
            Ok(Err(_trailers)) => {}
            Err(error) => return Some(Err(error)),
        }
    }
}
