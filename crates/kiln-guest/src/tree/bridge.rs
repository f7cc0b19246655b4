//! Between streams, which are asynchronous, and the tar reader and writer, which block.
//!
//! Both directions are queues of a few chunks: the slower side sets the pace.

use std::io::{self, Read, Write};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// Chunks on their way.
const QUEUE: usize = 8;
/// Bytes of one chunk.
const CHUNK: usize = 64 * 1024;

/// The blocking end of an incoming stream.
#[derive(Debug)]
pub(super) struct Source {
    chunks: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.current = chunk?,
                None => return Ok(0),
            }
        }
        let count = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

/// A blocking reader, and the future that feeds it until the stream or the reader ends.
pub(super) fn reader(mut stream: impl AsyncRead + Unpin) -> (Source, impl Future<Output = ()>) {
    let (sender, chunks) = mpsc::channel(QUEUE);
    let pump = async move {
        loop {
            let mut chunk = BytesMut::with_capacity(CHUNK);
            let item = match stream.read_buf(&mut chunk).await {
                Ok(0) => return,
                Ok(_) => Ok(chunk.freeze()),
                Err(error) => Err(error),
            };
            let last = item.is_err();
            if sender.send(item).await.is_err() || last {
                return;
            }
        }
    };
    (
        Source {
            chunks,
            current: Bytes::new(),
        },
        pump,
    )
}

/// The blocking end of an outgoing stream.
#[derive(Debug)]
pub(super) struct Sink {
    chunks: mpsc::Sender<Bytes>,
    current: BytesMut,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(CHUNK - self.current.len());
        self.current.extend_from_slice(&bytes[..count]);
        if self.current.len() >= CHUNK {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.current.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.current, BytesMut::with_capacity(CHUNK)).freeze();
        self.chunks
            .blocking_send(full)
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// A blocking writer and what comes out of it.
pub(super) fn writer() -> (Sink, mpsc::Receiver<Bytes>) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (
        Sink {
            chunks: sender,
            current: BytesMut::with_capacity(CHUNK),
        },
        receiver,
    )
}

/// Sends what a writer writes until it is dropped.
pub(super) async fn drain(
    chunks: &mut mpsc::Receiver<Bytes>,
    stream: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    while let Some(chunk) = chunks.recv().await {
        stream.write_all(&chunk).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_pass_in_both_directions() {
        let data: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
        let (mut source, pump) = reader(&data[..]);
        let (mut sink, mut chunks) = writer();
        let copy = tokio::task::spawn_blocking(move || {
            let copied = io::copy(&mut source, &mut sink).unwrap();
            sink.flush().unwrap();
            copied
        });
        let mut out = Vec::new();
        let (copied, (), sent) = tokio::join!(copy, pump, drain(&mut chunks, &mut out));
        sent.unwrap();
        assert_eq!((copied.unwrap(), out), (1_000_000, data));
    }
}
