//! A peer that breaks the protocol: the session ends, memory stays bounded, everybody is told.

use crate::peer::{PATIENCE, Raw, guest_and_raw, hello, host_and_raw, on_both_runtimes};
use kiln_proto::frame::{DATA_LEN_MAX, Frame, FrameError};
use kiln_proto::mux::{CLOSE_PROTOCOL, REFUSALS_MAX, WINDOW};
use kiln_proto::session::{CONTROL_MAX, STREAMS_MAX};
use kiln_proto::{CloseReason, ProtocolError, Session, SessionError, SessionLimits};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

/// Streams that one guest tries to open.
const MANY_OPENS: u32 = 100_000;

/// Sends `frames` as a guest and expects the host's verdict.
async fn verdict(frames: &[Frame<'_>], expected: ProtocolError) {
    let (host, _incoming, mut raw) = host_and_raw(SessionLimits::default()).await;
    // One stream of the host's own, id 1, for frames that need one.
    let stream = host.open(1, b"").await.unwrap();
    raw.next(|frame| assert!(matches!(frame, Frame::Open { stream: 1, .. })))
        .await
        .unwrap();
    raw.send(frames).await;
    let closed = host.closed().await;
    assert!(closed.is_peer_fault());
    assert_eq!(closed, CloseReason::Protocol(expected.clone()));
    let said = loop {
        let close = raw.next(|frame| match frame {
            Frame::Close { code, reason } => Some((code, reason.to_owned())),
            _ => None,
        });
        if let Some(said) = close.await.expect("a close before the end") {
            break said;
        }
    };
    assert_eq!(said, (CLOSE_PROTOCOL, expected.to_string()));
    drop(stream);
}

fn open(stream: u32) -> Frame<'static> {
    Frame::Open {
        stream,
        kind: 1,
        payload: b"",
    }
}

#[test]
fn every_violation_has_its_name() {
    on_both_runtimes(|| async {
        let body = hello().to_body().unwrap();
        let data = Frame::Data {
            stream: 2,
            bytes: b"x",
        };
        let reset = Frame::Reset {
            stream: 2,
            code: 1,
            reason: "",
        };
        let end = Frame::Eof { stream: 2 };
        verdict(&[Frame::Hello(&body)], ProtocolError::SecondHello).await;
        verdict(&[open(3)], ProtocolError::StreamId { stream: 3 }).await;
        verdict(&[open(4), open(2)], ProtocolError::StreamId { stream: 2 }).await;
        verdict(&[open(4), open(4)], ProtocolError::StreamId { stream: 4 }).await;
        verdict(&[data], ProtocolError::UnknownStream { stream: 2 }).await;
        verdict(
            &[Frame::Eof { stream: 3 }],
            ProtocolError::UnknownStream { stream: 3 },
        )
        .await;
        verdict(&[open(2), end, data], ProtocolError::AfterEnd { stream: 2 }).await;
        verdict(&[open(2), end, end], ProtocolError::AfterEnd { stream: 2 }).await;
        verdict(
            &[open(2), reset, data],
            ProtocolError::AfterEnd { stream: 2 },
        )
        .await;
        verdict(
            &[open(2), reset, reset],
            ProtocolError::AfterEnd { stream: 2 },
        )
        .await;
        let credit = Frame::Credit {
            stream: 1,
            bytes: 1,
        };
        verdict(&[credit], ProtocolError::CreditOverflow { stream: 1 }).await;
        let much = Frame::Credit {
            stream: 1,
            bytes: u32::MAX,
        };
        verdict(&[much], ProtocolError::CreditOverflow { stream: 1 }).await;
        verdict(&[Frame::Pong(1)], ProtocolError::Pong { number: 1 }).await;
    });
}

#[test]
fn malformed_frames_end_the_session() {
    on_both_runtimes(|| async {
        for (bytes, expected) in [
            (&[0, 0, 2, 0][..], FrameError::Length { len: 131072 }),
            (&[0; 4], FrameError::Length { len: 0 }),
            (&[9, 0, 0, 0, 200], FrameError::UnknownType { kind: 200 }),
        ] {
            let (host, _incoming, mut raw) = host_and_raw(SessionLimits::default()).await;
            raw.send_bytes(bytes).await;
            let expected = ProtocolError::Frame(expected);
            assert_eq!(host.closed().await, CloseReason::Protocol(expected));
        }
    });
}

#[test]
fn a_guest_judges_a_host_alike() {
    on_both_runtimes(|| async {
        let (guest, _incoming, mut raw) = guest_and_raw(SessionLimits::default()).await;
        raw.send(&[open(2)]).await;
        let expected = ProtocolError::StreamId { stream: 2 };
        assert_eq!(guest.closed().await, CloseReason::Protocol(expected));
    });
}

#[test]
fn data_beyond_credit_ends_the_session_and_what_fits_is_kept() {
    on_both_runtimes(|| async {
        let (host, mut incoming, mut raw) = host_and_raw(SessionLimits::default()).await;
        raw.send(&[open(2)]).await;
        let mut stream = incoming.next().await.unwrap().stream;
        let body = vec![5; DATA_LEN_MAX];
        let mut sent = 0;
        while sent + body.len() <= WINDOW as usize {
            raw.send(&[Frame::Data {
                stream: 2,
                bytes: &body,
            }])
            .await;
            sent += body.len();
        }
        raw.send(&[Frame::Data {
            stream: 2,
            bytes: &body,
        }])
        .await;
        let credit = WINDOW - sent as u32;
        let expected = ProtocolError::CreditExceeded {
            stream: 2,
            len: body.len(),
            credit,
        };
        assert_eq!(host.closed().await, CloseReason::Protocol(expected));
        let mut got = Vec::new();
        assert!(stream.read_to_end(&mut got).await.is_err());
        assert_eq!(got.len(), sent);
    });
}

#[test]
fn too_many_streams_end_the_session() {
    on_both_runtimes(|| async {
        let (host, _incoming, mut raw) = host_and_raw(SessionLimits::default()).await;
        let frames: Vec<_> = (1..=STREAMS_MAX as u32 + 1)
            .map(|index| open(2 * index))
            .collect();
        raw.send(&frames).await;
        let stream = 2 * (STREAMS_MAX as u32 + 1);
        let expected = ProtocolError::TooManyStreams {
            stream,
            max: STREAMS_MAX,
        };
        assert_eq!(host.closed().await, CloseReason::Protocol(expected));
    });
}

#[test]
fn a_peer_that_opens_and_never_reads_is_a_flood() {
    on_both_runtimes(|| async {
        let (host, incoming, mut raw) = host_and_raw(SessionLimits::default()).await;
        drop(incoming); // Every open is answered by a reset.
        let mut bytes = Vec::new();
        // As many answers as the transport and the queue can hold, and then some.
        let opens = MANY_OPENS.max((CONTROL_MAX + REFUSALS_MAX + 20_000) as u32);
        for index in 1..=opens {
            open(2 * index).encode_into(&mut bytes);
        }
        let _ = raw.io.write_all(&bytes).await;
        assert_eq!(
            host.closed().await,
            CloseReason::Protocol(ProtocolError::Flood)
        );
    });
}

#[test]
fn a_hundred_thousand_opens_that_nobody_wants_are_refused_one_by_one_and_leave_nothing() {
    on_both_runtimes(|| async {
        let (host, incoming, mut raw) = host_and_raw(SessionLimits::default()).await;
        drop(incoming);
        // One that reads its refusals may go on; more at once than may be open at a time.
        let batch = STREAMS_MAX as u32 * 2;
        let mut index = 0;
        while index < MANY_OPENS {
            let frames: Vec<_> = (0..batch)
                .map(|more| open(2 * (index + more + 1)))
                .collect();
            raw.send(&frames).await;
            index += batch;
            let mut refused = 0;
            while refused < batch {
                let reset = raw.next(|frame| matches!(frame, Frame::Reset { .. }));
                refused += u32::from(reset.await.expect("the session goes on"));
            }
        }
        let _stream = host.open(1, b"").await.expect("it is served as before");
        let opened = raw.next(|frame| matches!(frame, Frame::Open { stream: 1, .. }));
        assert_eq!(opened.await, Some(true));
    });
}

#[test]
fn unread_pongs_are_dropped_not_queued() {
    on_both_runtimes(|| async {
        let (host, _incoming, mut raw) = host_and_raw(SessionLimits::default()).await;
        let mut bytes = Vec::new();
        for number in 0..200_000 {
            Frame::Ping(number).encode_into(&mut bytes);
        }
        // All are taken although nobody reads the answers.
        raw.io.write_all(&bytes).await.unwrap();
        let mut last = 0;
        let mut count = 0;
        while last < 199_999 {
            last = raw
                .next(|frame| match frame {
                    Frame::Pong(number) => number,
                    other => panic!("{other:?}"),
                })
                .await
                .unwrap();
            count += 1;
        }
        assert!(
            count < 60_000,
            "{count} pongs were kept for a peer that did not read"
        );
        assert_eq!(host.close_reason(), None);
    });
}

#[test]
fn a_channel_that_dies_inside_a_frame_ends_every_stream() {
    on_both_runtimes(|| async {
        let (host, mut incoming, mut raw) = host_and_raw(SessionLimits::default()).await;
        let mut idle = host.open(1, b"").await.unwrap();
        let mut bytes = Vec::new();
        open(2).encode_into(&mut bytes);
        Frame::Data {
            stream: 2,
            bytes: b"whole",
        }
        .encode_into(&mut bytes);
        let whole = bytes.len();
        Frame::Data {
            stream: 2,
            bytes: b"broken",
        }
        .encode_into(&mut bytes);
        raw.send_bytes(&bytes[..whole + 11]).await;
        drop(raw);
        let mut stream = incoming.next().await.unwrap().stream;
        let mut got = Vec::new();
        let error = stream.read_to_end(&mut got).await.unwrap_err();
        assert_eq!(got, b"whole");
        assert_eq!(kiln_proto::session_end_of(&error), Some(&CloseReason::Eof));
        assert!(idle.read(&mut [0; 1]).await.is_err());
        assert!(idle.write_all(b"x").await.is_err());
        assert_eq!(host.closed().await, CloseReason::Eof);
    });
}

/// Connects to a guest that answers the preamble with `answer(echo)`.
async fn connect_to(answer: impl FnOnce(Vec<u8>) -> Vec<u8>) -> SessionError {
    let (near, far) = duplex(64 * 1024);
    let mut raw = Raw::new(far);
    let limits = SessionLimits {
        discard_max: 100_000,
        ..SessionLimits::default()
    };
    let connect = Session::connect(near, limits, Duration::from_millis(300));
    let reply = async {
        let preamble = raw.preamble().await;
        let bytes = answer(preamble.echo().to_vec());
        let _ = raw.io.write_all(&bytes).await;
        // Stays connected and swallows what the host says until it gives up.
        let mut sink = vec![0; 4096];
        while raw.io.read(&mut sink).await.is_ok_and(|count| count > 0) {}
    };
    let (connected, ()) = tokio::join!(connect, reply);
    connected.expect_err("no session")
}

#[test]
fn a_guest_that_introduces_itself_badly_gets_no_session() {
    on_both_runtimes(|| async {
        let with = |mut echo: Vec<u8>, frame: Frame<'_>| {
            frame.encode_into(&mut echo);
            echo
        };
        let error = connect_to(|echo| with(echo, Frame::Ping(1))).await;
        assert!(
            matches!(error, SessionError::Protocol(ProtocolError::NoHello)),
            "{error:?}"
        );
        let error = connect_to(|echo| with(echo, Frame::Hello(b"[]"))).await;
        assert!(
            matches!(error, SessionError::Protocol(ProtocolError::Hello(_))),
            "{error:?}"
        );
        let error = connect_to(|echo| [&echo[..], &[255; 9]].concat()).await;
        assert!(
            matches!(error, SessionError::Protocol(ProtocolError::Frame(_))),
            "{error:?}"
        );
        let error = connect_to(|_| vec![1; 100_001]).await;
        assert!(
            matches!(error, SessionError::NoEcho { max: 100_000 }),
            "{error:?}"
        );
        let error = connect_to(|echo| echo[..40].to_vec()).await;
        assert!(
            matches!(error, SessionError::Deadline { echoed: false, .. }),
            "{error:?}"
        );
        let error = connect_to(|echo| [&[3; 50][..], &echo].concat()).await;
        assert!(
            matches!(
                error,
                SessionError::Deadline {
                    echoed: true,
                    discarded: 50,
                    ..
                }
            ),
            "{error:?}"
        );
        let mut future = hello();
        (future.generation_min, future.generation_max) = (8, 9);
        let body = future.to_body().unwrap();
        let error = connect_to(|echo| with(echo, Frame::Hello(&body))).await;
        let SessionError::Generation { ours, theirs } = error else {
            panic!("{error:?}")
        };
        assert_eq!((ours, theirs), ((1, 1), (8, 9)));
    });
}

#[test]
fn ranges_that_do_not_meet_are_told_to_both_sides() {
    on_both_runtimes(|| async {
        let (near, far) = duplex(64 * 1024);
        let mut old = hello();
        (old.generation_min, old.generation_max) = (3, 4);
        let (host, guest) = tokio::join!(
            Session::connect(near, SessionLimits::default(), PATIENCE),
            Session::accept(far, old, SessionLimits::default()),
        );
        let Err(SessionError::Generation { theirs, .. }) = host else {
            panic!("a session")
        };
        assert_eq!(theirs, (3, 4));
        let Err(SessionError::Generation { theirs, .. }) = guest else {
            panic!("a session")
        };
        assert_eq!(theirs, (1, 1));
    });
}

#[test]
fn a_transport_that_only_loops_back_is_no_guest() {
    on_both_runtimes(|| async {
        let (near, mut far) = duplex(64 * 1024);
        let loops = async {
            let mut bytes = vec![0; 4096];
            while let Ok(count @ 1..) = far.read(&mut bytes).await {
                if far.write_all(&bytes[..count]).await.is_err() {
                    break;
                }
            }
        };
        let connect = Session::connect(near, SessionLimits::default(), Duration::from_millis(150));
        let (connected, ()) = tokio::join!(connect, loops);
        assert!(matches!(
            connected.err(),
            Some(SessionError::Deadline { echoed: false, .. })
        ));
    });
}
