//! The channel under load, half-closed, and taken over by another host.

use std::time::Duration;

use kiln_proto::msg::{GuestError, Place, PutFile, TreeReport, kind};
use kiln_proto::{read_chunk, read_msg};
use tokio::io::AsyncWriteExt as _;

use super::under_test::UnderTest;
use crate::host::{collect, request};

const FLOOD: usize = 8 << 20;

pub(crate) async fn flood_and_stuck_reader(test: &UnderTest) {
    let (machine, host) = test.boot("flood").await;
    let count = FLOOD.to_string();
    // A stream that nobody reads must hold up nobody else.
    let endless = request(&["head", "-c", "1000000000", "/dev/zero"]);
    let stuck = host.open(kind::EXEC, &endless).await.expect("opened");
    let flood = async || {
        let ran = host.exec(&["head", "-c", &count, "/dev/zero"]).await;
        ran.expect("ran").stdout.len()
    };
    let (a, b, small) = tokio::join!(flood(), flood(), host.exec(&["echo", "through"]));
    assert_eq!((a, b), (FLOOD, FLOOD));
    assert_eq!(small.expect("ran").text(), "through");
    drop(stuck);
    let ran = host.exec(&["echo", "after"]).await.expect("ran");
    assert_eq!(ran.text(), "after");
    test.destroy(&*machine).await;
}

pub(crate) async fn half_close(test: &UnderTest) {
    let (machine, host) = test.boot("half").await;
    // The host's end of the stream is the end of the input; the answer still comes.
    let bytes = vec![b'k'; 1 << 20];
    let ran = host.exec_with(request(&["cat"]), &bytes).await;
    let ran = ran.expect("ran");
    assert_eq!(ran.exit.code, Some(0));
    assert!(ran.stdout == bytes, "what went in came out");
    let order = PutFile {
        place: Place::CaBundle,
        bytes_max: 1 << 20,
    };
    let mut stream = host.open(kind::PUT_FILE, &order).await.expect("opened");
    stream.write_all(b"certificate").await.expect("written");
    stream.shutdown().await.expect("half-closed");
    let report: Result<TreeReport, GuestError> = read_msg(&mut stream, 4096).await.expect("reply");
    assert_eq!(report.expect("put").bytes, 11);
    // More than allowed is refused, not kept.
    let mut stream = host.open(kind::PUT_FILE, &order).await.expect("opened");
    let too_much = vec![0; (1 << 20) + 1];
    let _ = stream.write_all(&too_much).await;
    let _ = stream.shutdown().await;
    let report: Result<TreeReport, GuestError> = read_msg(&mut stream, 4096).await.expect("reply");
    assert!(report.is_err(), "{report:?}");
    test.destroy(&*machine).await;
}

pub(crate) async fn host_replaced_mid_output(test: &UnderTest) {
    let (machine, host) = test.boot("replaced").await;
    let first_boot = host.hello.boot_id.clone();
    for _ in 0..3 {
        let host = test.host(&*machine).await;
        let endless = request(&["head", "-c", "1000000000", "/dev/zero"]);
        let mut stream = host.open(kind::EXEC, &endless).await.expect("opened");
        for _ in 0..4 {
            let piece = read_chunk(&mut stream).await.expect("output");
            assert!(piece.is_some());
        }
        // The host goes away in the middle of a frame, as after kill -9.
        drop((stream, host));
    }
    let host = test.host(&*machine).await;
    assert_eq!(host.hello.boot_id, first_boot, "the same guest");
    let stream = host.open(kind::EXEC, &request(&["echo", "back"])).await;
    let (mut input, _output) = tokio::io::split(stream.expect("opened"));
    let ran = tokio::time::timeout(Duration::from_secs(60), collect(&mut input)).await;
    assert_eq!(ran.expect("in time").expect("ran").text(), "back");
    test.destroy(&*machine).await;
}
