//! A whole host session against a guest that says `input` after its Hello, then goes away.
//!
//! The host behaves as a worker does: it opens a stream, takes what the guest opens, and reads
//! and writes on all. The session must end, whatever comes.
#![no_main]

use kiln_proto::frame::Frame;
use kiln_proto::preamble::{ECHO_MAGIC, PREAMBLE_LEN};
use kiln_proto::{Hello, Session, SessionLimits, Stream};
use libfuzzer_sys::fuzz_target;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

/// Answers the first preamble; the rest of what it says is fixed.
struct Guest {
    heard: Vec<u8>,
    words: Vec<u8>,
    said: usize,
    after: Vec<u8>,
    waker: Option<std::task::Waker>,
}

impl AsyncRead for Guest {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.words.is_empty() {
            self.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        // Small pieces let the host's tasks run in between.
        let count = buf.remaining().min(self.words.len() - self.said).min(512);
        buf.put_slice(&self.words[self.said..self.said + count]);
        self.said += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Guest {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.words.is_empty() {
            self.heard.extend_from_slice(bytes);
            if self.heard.len() >= PREAMBLE_LEN {
                let mut words = ECHO_MAGIC.to_vec();
                words.extend_from_slice(&self.heard[16..48]);
                let hello = Hello::new("fuzz", "", &[])
                    .to_body()
                    .expect("a short hello");
                Frame::Hello(&hello).encode_into(&mut words);
                words.append(&mut self.after);
                self.words = words;
                if let Some(waker) = self.waker.take() {
                    waker.wake();
                }
            }
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

async fn serve(mut stream: Stream) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
    let _ = stream.shutdown().await;
}

fuzz_target!(|input: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (heard, words, after) = (Vec::new(), Vec::new(), input.to_vec());
        let guest = Guest {
            heard,
            words,
            said: 0,
            after,
            waker: None,
        };
        let patience = Duration::from_secs(5);
        let connected = Session::connect(guest, SessionLimits::default(), patience).await;
        let (session, _, mut incoming) = connected.expect("the hello is right");
        if let Ok(stream) = session.open(1, b"order").await {
            tokio::spawn(serve(stream));
        }
        while let Some(inbound) = incoming.next().await {
            tokio::spawn(serve(inbound.stream));
        }
        tokio::time::timeout(patience, session.closed())
            .await
            .expect("the session ends");
    });
});
