//! Streams joined with connections.

use kiln_proto::relay::{join, relay};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::peer::{PATIENCE, on_both_runtimes, pair};

/// As an HTTP server that closes: it answers, ends its direction and is gone, while the client's direction is open.
#[test]
fn an_answer_arrives_although_its_stream_was_dropped_right_after_it() {
    on_both_runtimes(|| async {
        let mut pair = pair().await;
        let (mut program, mut connection) = tokio::io::duplex(1024);
        let mut stream = pair.guest.open(7, b"").await.unwrap();
        program.write_all(b"question").await.unwrap();
        let mut relaying = pin!(relay(&mut stream, &mut connection));
        // It has taken the question, and is then too slow to see anything before the answer, the end and the Reset are all there.
        must_wait(relaying.as_mut()).await;
        let mut served = pair.host_incoming.next().await.unwrap().stream;
        let mut question = [0; 8];
        served.read_exact(&mut question).await.unwrap();
        served.write_all(b"answer").await.unwrap();
        served.shutdown().await.unwrap();
        drop(served);
        pair.host.ping(PATIENCE).await.unwrap();
        let client = async {
            let mut answer = String::new();
            program.read_to_string(&mut answer).await.unwrap();
            drop(program);
            answer
        };
        let (relayed, answer) = tokio::join!(relaying, client);
        assert_eq!(answer, "answer");
        relayed.unwrap();
    });
}

/// What was promised and did not come is an error, after what did come.
#[test]
fn a_peer_that_breaks_off_is_an_error_after_what_it_said() {
    on_both_runtimes(|| async {
        let mut pair = pair().await;
        let (mut program, mut connection) = tokio::io::duplex(1024);
        let mut stream = pair.guest.open(7, b"").await.unwrap();
        let mut served = pair.host_incoming.next().await.unwrap().stream;
        served.write_all(b"half an ans").await.unwrap();
        served.flush().await.unwrap();
        served.reset(99, "broken");
        let broken = relay(&mut stream, &mut connection).await.unwrap_err();
        assert_eq!(kiln_proto::reset_of(&broken).unwrap().code, 99);
        drop(connection);
        let mut answer = String::new();
        program.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "half an ans");
    });
}

/// Each direction ends by itself.
#[test]
fn one_direction_goes_on_after_the_others_end() {
    on_both_runtimes(|| async {
        let mut pair = pair().await;
        let (mut program, mut connection) = tokio::io::duplex(1024);
        let mut stream = pair.guest.open(7, b"").await.unwrap();
        let mut served = pair.host_incoming.next().await.unwrap().stream;
        let peer = async {
            let mut question = Vec::new();
            served.read_to_end(&mut question).await.unwrap();
            served.write_all(&question).await.unwrap();
            served.shutdown().await.unwrap();
        };
        let client = async {
            program.write_all(&[5; 300_000]).await.unwrap();
            program.shutdown().await.unwrap();
            let mut answer = Vec::new();
            program.read_to_end(&mut answer).await.unwrap();
            assert!(answer == [5; 300_000]);
        };
        let (relayed, (), ()) = tokio::join!(relay(&mut stream, &mut connection), peer, client);
        relayed.unwrap();
    });
}

/// As a command's end on its way through a controller: its keeper says how it ended and closes, while input for it is on its way.
#[tokio::test]
async fn the_last_words_of_a_connection_arrive_although_it_takes_nothing_more() {
    for flushed in [false, true] {
        let (mut person, mut near) = tokio::net::UnixStream::pair().unwrap();
        let (mut far, mut keeper) = tokio::net::UnixStream::pair().unwrap();
        let pieces = std::cell::Cell::new(0);
        // What comes before anybody looks, and what comes while both are joined.
        person.write_all(b"input").await.unwrap();
        keeper.write_all(b"how it ended").await.unwrap();
        if flushed {
            person.shutdown().await.unwrap();
        }
        drop(keeper);
        let told = || pieces.set(pieces.get() + 1);
        let joined = async move { join(&mut near, &mut far, told).await };
        let client = async {
            let mut said = Vec::new();
            // A reset instead of an end, when input was thrown away: after everything that was said.
            let _reset = person.read_to_end(&mut said).await;
            drop(person);
            said
        };
        let (_joined, said) = tokio::join!(joined, client);
        assert_eq!(said, b"how it ended");
        assert_eq!(pieces.get(), 1);
    }
}

/// One poll.
async fn must_wait<F: Future>(mut future: Pin<&mut F>) {
    let waits = poll_fn(|context| Poll::Ready(future.as_mut().poll(context).is_pending()));
    assert!(waits.await);
}
