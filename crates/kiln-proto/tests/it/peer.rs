//! What the tests share: runtimes, session pairs, and a peer that speaks frames by hand.

use kiln_proto::frame::{Frame, FrameBuffer};
use kiln_proto::preamble::{ECHO_LEN, Preamble, RunScanner, Scan};
use kiln_proto::{Hello, Incoming, Session, SessionLimits};
use std::future::Future;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

/// No test waits longer for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Runs `test` on a current-thread and on a multi-thread runtime, with a deadline.
pub(crate) fn on_both_runtimes<F: Future<Output = ()>>(test: impl Fn() -> F) {
    for threads in [0, 2] {
        let mut builder = match threads {
            0 => tokio::runtime::Builder::new_current_thread(),
            _ => tokio::runtime::Builder::new_multi_thread(),
        };
        let runtime = builder
            .worker_threads(threads.max(1))
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            tokio::time::timeout(PATIENCE, test())
                .await
                .expect("in time")
        });
        runtime.shutdown_background();
    }
}

pub(crate) fn hello() -> Hello {
    Hello::new("0.1.0-test", "boot", &["exec", "tree"])
}

/// Both ends of a running session.
pub(crate) struct Pair {
    pub(crate) host: Session,
    pub(crate) host_incoming: Incoming,
    pub(crate) guest: Session,
    pub(crate) guest_incoming: Incoming,
}

pub(crate) async fn pair() -> Pair {
    pair_with(SessionLimits::default(), SessionLimits::default()).await
}

pub(crate) async fn pair_with(host: SessionLimits, guest: SessionLimits) -> Pair {
    let (near, far) = duplex(64 * 1024);
    let (host, guest) = tokio::join!(
        Session::connect(near, host, PATIENCE),
        Session::accept(far, hello(), guest)
    );
    let (host, said, host_incoming) = host.unwrap();
    assert_eq!(said, hello());
    let (guest, guest_incoming) = guest.unwrap();
    Pair {
        host,
        host_incoming,
        guest,
        guest_incoming,
    }
}

/// A peer without a session: it sends what it is told.
pub(crate) struct Raw {
    pub(crate) io: DuplexStream,
    input: FrameBuffer,
}

impl Raw {
    /// The guest's end before any handshake.
    pub(crate) fn new(io: DuplexStream) -> Self {
        Self {
            io,
            input: FrameBuffer::new(256 * 1024),
        }
    }

    async fn read_more(&mut self) -> usize {
        let count = self.io.read(self.input.spare()).await.unwrap_or(0);
        self.input.filled(count);
        count
    }

    /// Waits for a host's run.
    pub(crate) async fn preamble(&mut self) -> Preamble {
        let mut scanner = RunScanner::default();
        loop {
            match scanner.scan(self.input.rest()) {
                Scan::Consumed(count) => self.input.consume(count),
                Scan::Found(preamble, count) => {
                    self.input.consume(count);
                    let copy = preamble.to_bytes();
                    while self.input.rest().starts_with(&copy) {
                        self.input.consume(copy.len());
                    }
                    return preamble;
                }
            }
            assert_ne!(self.read_more().await, 0, "the host left");
        }
    }

    /// Sends a host's run and waits for the guest's echo and Hello.
    pub(crate) async fn introduce(&mut self, preamble: &Preamble) -> Hello {
        self.send_bytes(&preamble.run()).await;
        let echo = preamble.echo();
        while self.input.rest().len() < ECHO_LEN {
            assert_ne!(self.read_more().await, 0, "the guest left");
        }
        assert_eq!(self.input.rest()[..ECHO_LEN], echo);
        self.input.consume(ECHO_LEN);
        self.next(|frame| match frame {
            Frame::Hello(body) => Hello::parse(body).unwrap(),
            other => panic!("{other:?}"),
        })
        .await
        .unwrap()
    }

    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) {
        self.io.write_all(bytes).await.unwrap();
    }

    /// Sends frames; a peer that hung up in between is fine.
    pub(crate) async fn send(&mut self, frames: &[Frame<'_>]) {
        let mut bytes = Vec::new();
        for frame in frames {
            frame.encode_into(&mut bytes);
        }
        let _ = self.io.write_all(&bytes).await;
    }

    /// Shows the next frame to `look`; `None` at the end of the transport.
    pub(crate) async fn next<T>(&mut self, look: impl FnOnce(Frame<'_>) -> T) -> Option<T> {
        loop {
            // A second look at the borrowed frame; the first one told that it is complete.
            if Frame::decode(self.input.rest()).unwrap().is_some() {
                return Some(look(self.input.next_frame().unwrap().unwrap()));
            }
            if self.read_more().await == 0 {
                return None;
            }
        }
    }
}

/// A host session and a guest that speaks by hand.
pub(crate) async fn host_and_raw(limits: SessionLimits) -> (Session, Incoming, Raw) {
    let (near, far) = duplex(64 * 1024);
    let mut raw = Raw::new(far);
    let connect = Session::connect(near, limits, PATIENCE);
    let answer = async {
        let preamble = raw.preamble().await;
        raw.send_bytes(&preamble.echo()).await;
        raw.send(&[Frame::Hello(&hello().to_body().unwrap())]).await;
    };
    let (connected, ()) = tokio::join!(connect, answer);
    let (session, _, incoming) = connected.unwrap();
    (session, incoming, raw)
}

pub(crate) fn preamble(seed: u8) -> Preamble {
    Preamble {
        nonce: [seed; 16],
        generation_min: 1,
        generation_max: 1,
    }
}

/// A guest session and a host that speaks by hand.
pub(crate) async fn guest_and_raw(limits: SessionLimits) -> (Session, Incoming, Raw) {
    let (near, far) = duplex(64 * 1024);
    let mut raw = Raw::new(far);
    let wanted = preamble(7);
    let (accepted, said) = tokio::join!(
        Session::accept(near, hello(), limits),
        raw.introduce(&wanted)
    );
    assert_eq!(said, hello());
    let (session, incoming) = accepted.unwrap();
    (session, incoming, raw)
}
