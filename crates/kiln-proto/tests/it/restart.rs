//! A host that died and another that connects to the same, still running guest.
//!
//! The transport is one that never ends, as a virtio-serial port whose disconnect nobody saw.

use crate::peer::{PATIENCE, Raw, hello, on_both_runtimes, preamble};
use kiln_proto::frame::{DATA_LEN_MAX, Frame};
use kiln_proto::preamble::{ECHO_LEN, ECHO_MAGIC};
use kiln_proto::{CloseReason, Session, SessionError, SessionLimits};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex,
};

/// A handle of a transport that outlives it; one reader and one writer at a time.
#[derive(Clone)]
struct Port {
    io: Arc<Mutex<DuplexStream>>,
    /// Bytes this handle may still write before its process dies; `None`: it lives.
    life: Option<Arc<Mutex<usize>>>,
}

impl Port {
    fn new(io: DuplexStream) -> Self {
        Self {
            io: Arc::new(Mutex::new(io)),
            life: None,
        }
    }

    /// A handle of a process that dies after writing `bytes` bytes.
    fn dying_after(&self, bytes: usize) -> Self {
        Self {
            io: Arc::clone(&self.io),
            life: Some(Arc::new(Mutex::new(bytes))),
        }
    }

    fn dead(&self) -> bool {
        self.life
            .as_ref()
            .is_some_and(|life| *life.lock().unwrap() == 0)
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.dead() {
            return Poll::Pending;
        }
        Pin::new(&mut *self.io.lock().unwrap()).poll_read(cx, buf)
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let most = self
            .life
            .as_ref()
            .map_or(usize::MAX, |life| *life.lock().unwrap());
        if most == 0 {
            return Poll::Ready(Ok(bytes.len())); // Into the void.
        }
        let part = &bytes[..bytes.len().min(most)];
        let written = Pin::new(&mut *self.io.lock().unwrap()).poll_write(cx, part);
        if let (Some(life), Poll::Ready(Ok(count))) = (&self.life, &written) {
            *life.lock().unwrap() -= count;
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The guest's loop: echoes every stream, session after session; reports how each ended.
async fn serve(port: Port, ends: tokio::sync::mpsc::UnboundedSender<CloseReason>) {
    loop {
        let accepted = Session::accept(port.clone(), hello(), SessionLimits::default()).await;
        let (session, mut incoming) = accepted.unwrap();
        let serving = tokio::spawn(async move {
            while let Some(inbound) = incoming.next().await {
                tokio::spawn(async move {
                    let (mut reader, mut writer) = tokio::io::split(inbound.stream);
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                    let _ = writer.shutdown().await;
                });
            }
        });
        let _ = ends.send(session.closed().await);
        serving.abort();
    }
}

/// Checks that a session works: bytes there and back.
async fn works(session: &Session) {
    let mut stream = session.open(1, b"").await.unwrap();
    stream.write_all(b"still there?").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut got = String::new();
    stream.read_to_string(&mut got).await.unwrap();
    assert_eq!(got, "still there?");
}

const RUN_LEN: usize = kiln_proto::preamble::RUN_COPIES * kiln_proto::preamble::PREAMBLE_LEN;

#[test]
fn a_new_host_takes_over_wherever_the_old_one_died() {
    on_both_runtimes(|| async {
        // Where the first host stops: inside its preambles, the Open (15 bytes), the header of
        // the Data frame, its body, or between frames.
        for cut in [
            1,
            100,
            RUN_LEN - 1,
            RUN_LEN,
            RUN_LEN + 1,
            RUN_LEN + 12,
            RUN_LEN + 14,
        ]
        .into_iter()
        .chain((RUN_LEN + 15..RUN_LEN + 28).step_by(3))
        .chain([
            RUN_LEN + 1000,
            RUN_LEN + 50_000,
            RUN_LEN + 65_000,
            RUN_LEN + 90_000,
        ]) {
            let (near, far) = duplex(16 * 1024);
            let (host_port, guest_port) = (Port::new(near), Port::new(far));
            let (ends_sender, mut ends) = tokio::sync::mpsc::unbounded_channel();
            let guest = tokio::spawn(serve(guest_port, ends_sender));

            let dying = host_port.dying_after(cut);
            let probe = dying.clone();
            let limits = SessionLimits::default();
            let first = tokio::spawn(async move {
                let (session, _, _incoming) =
                    Session::connect(dying, limits, PATIENCE).await.unwrap();
                let mut stream = session.open(1, b"").await.unwrap();
                // Ends only with the session: the port swallows all of it.
                let _ = stream.write_all(&vec![b'k'; 1 << 20]).await;
                session.closed().await
            });
            while !probe.dead() {
                tokio::task::yield_now().await;
            }
            let (second, said, _incoming) =
                Session::connect(host_port, limits, PATIENCE).await.unwrap();
            assert_eq!(said, hello());
            works(&second).await;
            if cut > RUN_LEN + 64 {
                let end = ends.recv().await.unwrap();
                assert_eq!(end, CloseReason::Restarted, "cut {cut}");
            }
            first.abort();
            guest.abort();
        }
    });
}

#[test]
fn stale_bytes_of_the_guest_are_dropped_until_the_echo() {
    on_both_runtimes(|| async {
        let (near, far) = duplex(64 * 1024);
        let mut raw = Raw::new(far);
        let connect = Session::connect(near, SessionLimits::default(), PATIENCE);
        let answer = async {
            // The rest of a frame, an echo of somebody else, and the magic cut short.
            raw.send_bytes(&[9; 10_000]).await;
            raw.send_bytes(&preamble(3).echo()).await;
            raw.send_bytes(&ECHO_MAGIC[..11]).await;
            let wanted = raw.preamble().await;
            let mut bytes = wanted.echo().to_vec();
            Frame::Hello(&hello().to_body().unwrap()).encode_into(&mut bytes);
            Frame::Open {
                stream: 2,
                kind: 5,
                payload: b"early",
            }
            .encode_into(&mut bytes);
            raw.send_bytes(&bytes).await;
        };
        let (connected, ()) = tokio::join!(connect, answer);
        let (_session, _, mut incoming) = connected.unwrap();
        // A frame in the same breath as the Hello is not lost.
        assert_eq!(incoming.next().await.unwrap().kind, 5);
    });
}

#[test]
fn a_lost_run_is_sent_again() {
    on_both_runtimes(|| async {
        // In a narrow transport the echo overtakes the run in the middle of a copy.
        for (capacity, lost) in [
            (256 * 1024, 10_000),
            (1000, 10_000),
            (77, 64),
            (999, 65_663),
        ] {
            let (near, far) = duplex(capacity);
            let port = Port::new(far);
            let connect = Session::connect(near, SessionLimits::default(), PATIENCE);
            let guest = async {
                // The guest reopens its device: what it had read by then is gone.
                let mut gone = vec![0; lost];
                port.clone().read_exact(&mut gone).await.unwrap();
                Session::accept(port.clone(), hello(), SessionLimits::default())
                    .await
                    .unwrap()
            };
            let (connected, (_guest, mut guest_incoming)) = tokio::join!(connect, guest);
            let (host, _, _incoming) = connected.unwrap();
            let _stream = host.open(4, b"").await.unwrap();
            assert_eq!(guest_incoming.next().await.unwrap().kind, 4);
        }
    });
}

#[test]
fn tenants_bytes_never_start_a_session() {
    on_both_runtimes(|| async {
        let (near, far) = duplex(64 * 1024);
        let port = Port::new(far);
        let mut raw = Raw::new(near);
        let genuine = preamble(1);
        let (accepted, _) = tokio::join!(
            Session::accept(port.clone(), hello(), SessionLimits::default()),
            raw.introduce(&genuine),
        );
        let (session, mut incoming) = accepted.unwrap();
        // A file full of another host's preambles, in the largest frames there are.
        let forged = preamble(66).to_bytes().repeat(RUN_LEN / 64 + 2);
        let file: Vec<_> = (0..3)
            .map(|_| Frame::Data {
                stream: 1,
                bytes: &forged[..DATA_LEN_MAX],
            })
            .collect();
        raw.send(&[
            Frame::Open {
                stream: 1,
                kind: 1,
                payload: b"",
            },
            file[0],
        ])
        .await;
        let mut stream = incoming.next().await.unwrap().stream;
        let mut got = vec![0; DATA_LEN_MAX];
        stream.read_exact(&mut got).await.unwrap();
        assert!(got == forged[..DATA_LEN_MAX], "delivered as data");

        // The guest leaves the session; the file goes on, now right into the search for a host.
        session.close(0, "");
        session.closed().await;
        let accept = Session::accept(port.clone(), hello(), SessionLimits::default());
        let host = async {
            raw.send(&file).await;
            raw.send(&[Frame::Data {
                stream: 1,
                bytes: &forged[..17],
            }])
            .await;
            raw.send_bytes(&preamble(2).run()).await;
            let mut bytes = Vec::new();
            loop {
                let mut part = [0; 4096];
                let count = raw.io.read(&mut part).await.unwrap();
                bytes.extend_from_slice(&part[..count]);
                if let Some(at) = bytes.windows(16).position(|window| window == ECHO_MAGIC)
                    && bytes.len() >= at + ECHO_LEN
                {
                    return bytes[at..at + ECHO_LEN].to_vec();
                }
            }
        };
        let (accepted, echo) = tokio::join!(accept, host);
        accepted.unwrap();
        assert_eq!(
            echo,
            preamble(2).echo(),
            "the first echo is for the real host"
        );
    });
}

#[test]
fn a_transport_without_a_host_says_so() {
    on_both_runtimes(|| async {
        let (near, far) = duplex(1024);
        drop(near);
        let error = Session::accept(far, hello(), SessionLimits::default())
            .await
            .err()
            .unwrap();
        assert!(matches!(error, SessionError::TransportEnded), "{error:?}");
        let (near, far) = duplex(1024);
        drop(far);
        let error = Session::connect(near, SessionLimits::default(), PATIENCE)
            .await
            .err()
            .unwrap();
        assert!(matches!(
            error,
            SessionError::TransportEnded | SessionError::Transport(_)
        ));
    });
}

#[test]
fn closed_means_that_the_transport_is_free_again() {
    on_both_runtimes(|| async {
        let (near, far) = duplex(64 * 1024);
        let port = Port::new(far);
        let (host, guest) = tokio::join!(
            Session::connect(near, SessionLimits::default(), PATIENCE),
            Session::accept(port.clone(), hello(), SessionLimits::default()),
        );
        let (guest, _incoming) = guest.unwrap();
        host.unwrap().0.close(0, "");
        guest.closed().await;
        assert_eq!(
            Arc::strong_count(&port.io),
            1,
            "only the test holds the port"
        );
    });
}
