//! Two honest ends.

use crate::peer::{PATIENCE, Pair, host_and_raw, on_both_runtimes, pair, pair_with};
use kiln_proto::frame::{Frame, OPEN_PAYLOAD_MAX};
use kiln_proto::mux::{CLOSE_NORMAL, RESET_DROPPED, RESET_REFUSED, WINDOW};
use kiln_proto::{
    CloseReason, Inbound, Incoming, OpenError, PingError, SessionLimits, Stream, read_chunk,
    read_msg, reset_of, session_end_of, write_chunk, write_msg,
};
use std::future::Future;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Polls `future` once; it must have to wait.
async fn must_wait<F: Future + Unpin>(future: &mut F, what: &str) {
    let waits = std::future::poll_fn(|cx| {
        Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx).is_pending())
    });
    assert!(waits.await, "{what} must wait");
}

/// The next stream if one waits.
async fn take_now(incoming: &mut Incoming) -> Option<Inbound> {
    let mut next = pin!(incoming.next());
    std::future::poll_fn(|cx| {
        Poll::Ready(match next.as_mut().poll(cx) {
            Poll::Ready(inbound) => inbound,
            Poll::Pending => None,
        })
    })
    .await
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let step = |state: &mut u64| {
        *state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (*state >> 56) as u8
    };
    (0..len).map(|_| step(&mut state)).collect()
}

/// A stream of `pair` with both its ends, the host's first.
async fn opened(pair: &mut Pair) -> (Stream, Stream) {
    let near = pair.host.open(1, b"").await.unwrap();
    let far = pair.guest_incoming.next().await.unwrap().stream;
    (near, far)
}

#[test]
fn both_sides_open_streams_with_kind_and_payload() {
    on_both_runtimes(|| async {
        let mut pair = pair().await;
        assert_eq!((pair.host.generation(), pair.guest.generation()), (1, 1));
        let payload = vec![7; OPEN_PAYLOAD_MAX];
        let mut near = pair.host.open(9, &payload).await.unwrap();
        let mut far = pair.guest_incoming.next().await.unwrap();
        assert_eq!((far.kind, &far.payload[..]), (9, &payload[..]));
        near.write_all(b"ping").await.unwrap();
        let mut bytes = [0; 4];
        far.stream.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"ping");
        write_msg(&mut far.stream, &("answer", 42)).await.unwrap();
        let answer: (String, u32) = read_msg(&mut near, 100).await.unwrap();
        assert_eq!(answer, ("answer".to_owned(), 42));

        let mut near = pair.guest.open(3, b"connect").await.unwrap();
        let mut far = pair.host_incoming.next().await.unwrap();
        assert_eq!((far.kind, &far.payload[..]), (3, &b"connect"[..]));
        assert_eq!((near.id() % 2, far.stream.id()), (0, near.id()));
        write_chunk(&mut near, 2, &[1; 60 * 1024]).await.unwrap();
        assert_eq!(
            read_chunk(&mut far.stream)
                .await
                .unwrap()
                .unwrap()
                .body
                .len(),
            60 * 1024
        );
        let long = vec![0; OPEN_PAYLOAD_MAX + 1];
        let refused = pair.host.open(1, &long).await.unwrap_err();
        assert_eq!(
            refused,
            OpenError::Payload {
                len: OPEN_PAYLOAD_MAX + 1
            }
        );
    });
}

#[test]
fn many_streams_carry_much_data_unharmed_in_both_directions() {
    on_both_runtimes(|| async {
        let mut pair = pair().await;
        let mut tasks = tokio::task::JoinSet::new();
        for index in 0..12u64 {
            let (near, far) = opened(&mut pair).await;
            for (stream, seed) in [(near, index), (far, index + 100)] {
                let other = if seed < 100 { seed + 100 } else { seed - 100 };
                tasks.spawn(async move {
                    let (mut reader, mut writer) = tokio::io::split(stream);
                    let sent = pattern(700_000 + seed as usize * 977, seed);
                    let expected = pattern(700_000 + other as usize * 977, other);
                    let write = async {
                        for piece in sent.chunks(1 + seed as usize * 3001) {
                            writer.write_all(piece).await.unwrap();
                        }
                        writer.shutdown().await.unwrap();
                    };
                    let mut got = Vec::new();
                    let (_, read) = tokio::join!(write, reader.read_to_end(&mut got));
                    read.unwrap();
                    assert!(got == expected, "stream {seed}: {} bytes", got.len());
                });
            }
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        assert_eq!(pair.host.close_reason(), None);
    });
}

#[test]
fn a_stuck_reader_stops_its_own_writer_and_nobody_else() {
    on_both_runtimes(|| async {
        let mut pair = pair().await;
        let (mut stuck, mut stuck_far) = opened(&mut pair).await;
        let (mut busy, mut busy_far) = opened(&mut pair).await;
        let window = pattern(WINDOW as usize, 1);
        stuck.write_all(&window).await.unwrap();
        let mut one_more = Box::pin(stuck.write_all(b"!"));
        must_wait(&mut one_more, "a write without credit").await;

        let much = pattern(8 * WINDOW as usize, 2);
        let transfer = async {
            let write = async {
                busy.write_all(&much).await.unwrap();
                busy.shutdown().await.unwrap();
            };
            let mut got = Vec::new();
            let (_, read) = tokio::join!(write, busy_far.read_to_end(&mut got));
            read.unwrap();
            assert!(got == much);
        };
        tokio::select! {
            biased;
            _ = &mut one_more => panic!("written without credit"),
            () = transfer => {}
        }
        pair.host.ping(PATIENCE).await.unwrap();
        must_wait(&mut one_more, "a write without credit").await;

        let mut got = vec![0; WINDOW as usize + 1];
        let (wrote, read) = tokio::join!(one_more, stuck_far.read_exact(&mut got));
        wrote.unwrap();
        read.unwrap();
        assert!(got[..window.len()] == window && got.ends_with(b"!"));
    });
}

#[test]
fn each_direction_ends_by_itself() {
    on_both_runtimes(|| async {
        let mut pair = pair().await;
        let (mut near, mut far) = opened(&mut pair).await;
        near.write_all(b"question").await.unwrap();
        near.shutdown().await.unwrap();
        near.shutdown().await.unwrap();
        let late = near.write(b"late").await.unwrap_err();
        assert_eq!(late.kind(), std::io::ErrorKind::BrokenPipe);
        let mut question = String::new();
        far.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        assert_eq!(far.read(&mut [0; 8]).await.unwrap(), 0);
        let answer = pattern(2 * WINDOW as usize, 3);
        let expected = answer.clone();
        let reply = tokio::spawn(async move {
            far.write_all(&answer).await.unwrap();
            far.shutdown().await.unwrap();
        });
        let mut got = Vec::new();
        near.read_to_end(&mut got).await.unwrap();
        assert!(got == expected);
        reply.await.unwrap();
    });
}

#[test]
fn a_reset_gives_what_came_before_and_then_code_and_reason() {
    on_both_runtimes(|| async {
        let mut pair = pair().await;
        let (mut near, mut far) = opened(&mut pair).await;
        near.write_all(b"last words").await.unwrap();
        near.flush().await.unwrap();
        near.reset(77, "no more");
        let mut got = Vec::new();
        let error = far.read_to_end(&mut got).await.unwrap_err();
        assert_eq!(got, b"last words");
        let reset = reset_of(&error).unwrap();
        assert_eq!((reset.code, reset.reason.as_str()), (77, "no more"));
        let error = far.write(b"x").await.unwrap_err();
        assert_eq!(reset_of(&error).unwrap().code, 77);

        let (near, mut far) = opened(&mut pair).await;
        drop(near);
        let error = far.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(reset_of(&error).unwrap().code, RESET_DROPPED);
    });
}

#[test]
fn a_stream_dropped_after_its_shutdown_still_delivers() {
    on_both_runtimes(|| async {
        let mut pair = pair().await;
        let (mut near, mut far) = opened(&mut pair).await;
        let bytes = pattern(100_000, 4);
        near.write_all(&bytes).await.unwrap();
        {
            let mut shutdown = pin!(near.shutdown());
            let _ = std::future::poll_fn(|cx| Poll::Ready(shutdown.as_mut().poll(cx))).await;
        }
        drop(near);
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.unwrap();
        assert!(got == bytes);
        // Nobody will read an answer, and the writer learns it.
        let error = loop {
            if let Err(error) = far.write_all(&bytes).await {
                break error;
            }
        };
        assert_eq!(reset_of(&error).unwrap().code, RESET_DROPPED);
    });
}

#[test]
fn close_delivers_what_was_written_and_tells_why() {
    on_both_runtimes(|| async {
        let mut pair = pair().await;
        let (mut near, mut far) = opened(&mut pair).await;
        near.write_all(b"report").await.unwrap();
        pair.host.close(20, "done here");
        let mut got = Vec::new();
        let error = far.read_to_end(&mut got).await.unwrap_err();
        assert_eq!(got, b"report");
        let reason = CloseReason::PeerClosed {
            code: 20,
            reason: "done here".into(),
        };
        assert_eq!(session_end_of(&error), Some(&reason));
        assert_eq!(pair.guest.closed().await, reason);
        assert_eq!(pair.guest.closed().await, reason, "level-triggered");
        let local = CloseReason::Local {
            code: 20,
            reason: "done here".into(),
        };
        assert_eq!(pair.host.closed().await, local);
        assert!(near.write(b"x").await.is_err());
        assert!(pair.guest_incoming.next().await.is_none());
        assert_eq!(
            pair.host.open(1, b"").await.unwrap_err(),
            OpenError::Ended(local.clone())
        );
        assert_eq!(
            pair.host.ping(PATIENCE).await.unwrap_err(),
            PingError::Ended(local)
        );
        pair.host.close(21, "again");
    });
}

#[test]
fn the_last_handle_ends_the_session() {
    on_both_runtimes(|| async {
        let Pair {
            host,
            host_incoming,
            guest,
            mut guest_incoming,
        } = pair().await;
        let mut near = host.open(1, b"").await.unwrap();
        let mut far = guest_incoming.next().await.unwrap().stream;
        drop((host, host_incoming));
        near.write_all(b"alive").await.unwrap();
        let mut got = [0; 5];
        far.read_exact(&mut got).await.unwrap();
        drop(near);
        let closed = guest.closed().await;
        assert!(
            matches!(
                closed,
                CloseReason::PeerClosed {
                    code: CLOSE_NORMAL,
                    ..
                }
            ),
            "{closed}"
        );
    });
}

#[test]
fn streams_nobody_takes_are_refused() {
    on_both_runtimes(|| async {
        let mut pair = pair().await;
        let mut waiting = pair.host.open(1, b"").await.unwrap();
        drop(pair.guest_incoming);
        let mut late = pair.host.open(1, b"").await.unwrap();
        for stream in [&mut waiting, &mut late] {
            let error = stream.read(&mut [0; 1]).await.unwrap_err();
            assert_eq!(reset_of(&error).unwrap().code, RESET_REFUSED);
        }
        // The other direction still works.
        let _near = pair.guest.open(1, b"").await.unwrap();
        assert!(pair.host_incoming.next().await.is_some());
    });
}

#[test]
fn streams_are_bounded_and_come_back() {
    on_both_runtimes(|| async {
        let few = SessionLimits {
            streams_max: 4,
            ..SessionLimits::default()
        };
        let full = pair_with(few, few).await;
        let mut streams = Vec::new();
        for _ in 0..4 {
            streams.push(full.host.open(1, b"").await.unwrap());
        }
        let error = full.host.open(1, b"").await.unwrap_err();
        assert_eq!(error, OpenError::TooMany { max: 4 });
        streams.pop();
        full.host.open(1, b"").await.unwrap();

        // Two wait in the backlog, two are refused.
        let limits = SessionLimits {
            accept_backlog: 2,
            ..few
        };
        let mut pair = pair_with(limits, limits).await;
        let mut streams = Vec::new();
        for _ in 0..4 {
            streams.push(pair.host.open(1, b"").await.unwrap());
        }
        for refused in &mut streams[2..] {
            let error = refused.read(&mut [0; 1]).await.unwrap_err();
            assert_eq!(reset_of(&error).unwrap().code, RESET_REFUSED);
        }
        streams.truncate(2);
        for _ in 0..100 {
            let near = pair.host.open(2, b"").await.unwrap();
            drop(near);
            pair.host.ping(PATIENCE).await.unwrap();
            while let Some(inbound) = take_now(&mut pair.guest_incoming).await {
                drop(inbound);
            }
        }
        assert_eq!(pair.host.close_reason(), None);
        assert_eq!(pair.guest.close_reason(), None);
    });
}

#[test]
fn a_peer_that_takes_nothing_is_given_up() {
    on_both_runtimes(|| async {
        let deadline = Duration::from_millis(80);
        let limits = SessionLimits {
            stall_deadline: deadline,
            ..SessionLimits::default()
        };
        let (host, _incoming, raw) = host_and_raw(limits).await;
        let mut stream = host.open(1, b"").await.unwrap();
        let begun = std::time::Instant::now();
        let error = stream
            .write_all(&pattern(WINDOW as usize * 2, 5))
            .await
            .unwrap_err();
        assert_eq!(session_end_of(&error), Some(&CloseReason::Stalled));
        assert_eq!(host.closed().await, CloseReason::Stalled);
        assert!(begun.elapsed() >= deadline);
        drop(raw);
    });
}

#[test]
fn pings_have_deadlines_and_late_pongs_do_no_harm() {
    on_both_runtimes(|| async {
        let pair = pair().await;
        pair.guest.ping(PATIENCE).await.unwrap();
        let (host, _incoming, mut raw) = host_and_raw(SessionLimits::default()).await;
        let short = Duration::from_millis(10);
        let error = host.ping(short).await.unwrap_err();
        assert_eq!(error, PingError::Deadline { waited: short });
        let number = raw.next(|frame| match frame {
            Frame::Ping(number) => number,
            other => panic!("{other:?}"),
        });
        let number = number.await.unwrap();
        raw.send(&[Frame::Pong(number), Frame::Ping(5)]).await;
        raw.next(|frame| assert_eq!(frame, Frame::Pong(5)))
            .await
            .unwrap();
        assert_eq!(host.close_reason(), None);
    });
}

#[test]
fn a_runtime_that_goes_away_ends_the_session_for_those_who_wait() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let pair = runtime.block_on(pair());
    runtime.shutdown_timeout(PATIENCE);
    let other = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let closed = other.block_on(pair.host.closed());
    assert!(matches!(
        closed,
        CloseReason::Local { .. } | CloseReason::PeerClosed { .. }
    ));
}
