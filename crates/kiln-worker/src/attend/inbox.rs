//! Standard input on its way to a command: bounded, and its end is said, never guessed: an attender who is gone ends nothing of it.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use kiln_proto::kept::attend::STDIN_ROOM;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::Notify;

/// The writing end.
#[derive(Clone, Debug, Default)]
pub(super) struct Inbox {
    shared: Arc<Shared>,
}

/// The reading end.
#[derive(Debug)]
pub(super) struct Reader {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    held: Mutex<Held>,
    /// Something was read.
    eaten: Notify,
}

#[derive(Debug, Default)]
struct Held {
    bytes: VecDeque<u8>,
    /// Read since the attender was last told.
    eaten: usize,
    ended: bool,
    reader: Option<Waker>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inbox {
    pub(super) fn reader(&self) -> Reader {
        Reader {
            shared: Arc::clone(&self.shared),
        }
    }

    /// Takes bytes. False when more come than there was room for, or after the end.
    pub(super) fn put(&self, bytes: &[u8]) -> bool {
        let mut held = self.shared.lock();
        // What was read and not told yet is no room that the attender knows of.
        if held.ended || held.bytes.len() + held.eaten + bytes.len() > STDIN_ROOM {
            return false;
        }
        held.bytes.extend(bytes);
        if let Some(reader) = held.reader.take() {
            reader.wake();
        }
        true
    }

    /// Nothing more comes.
    pub(super) fn end(&self) {
        let mut held = self.shared.lock();
        held.ended = true;
        if let Some(reader) = held.reader.take() {
            reader.wake();
        }
    }

    /// Waits until there is room that the attender was not told of; gives how much, bytes.
    pub(super) async fn room(&self) -> u32 {
        loop {
            let eaten = std::mem::take(&mut self.shared.lock().eaten);
            if eaten > 0 {
                return u32::try_from(eaten).unwrap_or(u32::MAX);
            }
            self.shared.eaten.notified().await;
        }
    }
}

impl AsyncRead for Reader {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut held = self.shared.lock();
        if held.bytes.is_empty() {
            if held.ended {
                return Poll::Ready(Ok(()));
            }
            held.reader = Some(context.waker().clone());
            return Poll::Pending;
        }
        let (front, _) = held.bytes.as_slices();
        let count = front.len().min(buffer.remaining());
        buffer.put_slice(&front[..count]);
        held.bytes.drain(..count);
        held.eaten += count;
        drop(held);
        self.shared.eaten.notify_one();
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn what_is_put_is_read_and_its_room_given_back() {
        let inbox = Inbox::default();
        let mut reader = inbox.reader();
        let mut buffer = [0; 8];
        assert!(poll!(Box::pin(reader.read(&mut buffer))).is_pending());
        assert!(inbox.put(b"hello"));
        assert_eq!(reader.read(&mut buffer[..3]).await.expect("reads"), 3);
        assert_eq!(&buffer[..3], b"hel");
        assert_eq!(inbox.room().await, 3);
        assert!(poll!(Box::pin(inbox.room())).is_pending());
        inbox.end();
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).await.expect("reads");
        assert_eq!(rest, b"lo");
        assert!(!inbox.put(b"x"), "after its end");
    }

    #[tokio::test]
    async fn no_more_is_held_than_there_was_room_for() {
        let inbox = Inbox::default();
        let mut reader = inbox.reader();
        assert!(inbox.put(&vec![1; STDIN_ROOM]));
        assert!(!inbox.put(b"x"));
        let mut some = vec![0; 1000];
        let count = reader.read(&mut some).await.expect("reads");
        assert!(!inbox.put(b"x"), "that room was not told of yet");
        assert_eq!(inbox.room().await as usize, count);
        assert!(inbox.put(b"x"));
    }
}
