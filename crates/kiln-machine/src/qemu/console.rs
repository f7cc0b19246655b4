//! The last bytes of a machine's console, and the VMM's own last words. Bounded; reading never stops, so that a guest never blocks on it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// A ring of bytes with one writer.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    bytes: Arc<Mutex<VecDeque<u8>>>,
    max: usize,
}

impl Ring {
    /// An empty ring of at most `max` bytes.
    pub(crate) fn new(max: usize) -> Self {
        Self {
            bytes: Arc::default(),
            max,
        }
    }

    /// Adds bytes; the oldest go.
    pub(crate) fn push(&self, new: &[u8]) {
        let new = &new[new.len().saturating_sub(self.max)..];
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let excess = (bytes.len() + new.len()).saturating_sub(self.max);
        bytes.drain(..excess);
        bytes.extend(new);
    }

    /// What is in it, as text a terminal can show: control characters other than newline and tab are left out.
    pub(crate) fn text(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let (front, back) = bytes.as_slices();
        let all = [front, back].concat();
        drop(bytes);
        let shown = |c: &char| !c.is_control() || matches!(c, '\n' | '\t');
        String::from_utf8_lossy(&all)
            .chars()
            .filter(shown)
            .collect()
    }

    /// Reads a stream into the ring until it ends.
    pub(crate) async fn drain(self, mut stream: impl AsyncRead + Unpin) {
        let mut buffer = vec![0; 4096];
        while let Ok(count) = stream.read(&mut buffer).await {
            if count == 0 {
                break;
            }
            self.push(&buffer[..count]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_keeps_the_last_bytes_and_never_more() {
        let ring = Ring::new(8);
        ring.push(b"hello ");
        ring.push(b"world");
        assert_eq!(ring.text(), "lo world");
        ring.push(b"0123456789\x1b\n");
        assert_eq!(ring.text(), "456789\n");
    }

    #[tokio::test]
    async fn a_stream_without_end_of_line_is_bounded_too() {
        let ring = Ring::new(64);
        ring.clone().drain(&vec![b'x'; 1 << 20][..]).await;
        assert_eq!(ring.text().len(), 64);
    }
}
