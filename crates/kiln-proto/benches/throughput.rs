//! How fast a session moves bytes and opens streams over a Unix socket pair.
//!
//! `cargo bench -p kiln-proto` prints one line per measurement; with `--quick` it moves less.
//! Both ends share one runtime, so the numbers are those of two drivers on the given threads.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark prints or fails"
)]

use kiln_proto::{Hello, Incoming, Session, SessionLimits, Stream};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

async fn sessions() -> (Session, Incoming, Session, Incoming) {
    let (near, far) = UnixStream::pair().unwrap();
    let limits = SessionLimits::default();
    let hello = Hello::new("bench", "", &[]);
    let (host, guest) = tokio::join!(
        Session::connect(near, limits, PATIENCE),
        Session::accept(far, hello, limits)
    );
    let (host, _, host_incoming) = host.unwrap();
    let (guest, guest_incoming) = guest.unwrap();
    (host, host_incoming, guest, guest_incoming)
}

/// Writes `total` bytes in writes of `write_len`, then ends the direction.
async fn pour(mut stream: Stream, total: usize, write_len: usize) -> Stream {
    let bytes = vec![0x5a; write_len];
    let mut left = total;
    while left > 0 {
        let count = left.min(write_len);
        stream.write_all(&bytes[..count]).await.unwrap();
        left -= count;
    }
    stream.shutdown().await.unwrap();
    stream
}

async fn drain(mut stream: Stream) -> usize {
    let mut buffer = vec![0; 64 * 1024];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).await.unwrap() {
            0 => return total,
            count => total += count,
        }
    }
}

fn report(name: &str, begun: Instant, amount: f64, unit: &str) {
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{name:<52} {:>10.1} {unit}/s   ({seconds:.3} s)",
        amount / seconds
    );
}

async fn bulk(flavour: &str, streams: usize, write_len: usize, total: usize) {
    let (host, _host_incoming, _guest, mut incoming) = sessions().await;
    let begun = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..streams {
        let near = host.open(1, b"").await.unwrap();
        let far = incoming.next().await.unwrap().stream;
        tasks.spawn(async move {
            let (near, got) = tokio::join!(pour(near, total / streams, write_len), drain(far));
            drop(near);
            got
        });
    }
    let mut moved = 0;
    while let Some(count) = tasks.join_next().await {
        moved += count.unwrap();
    }
    assert_eq!(moved, total / streams * streams);
    let name = format!("{flavour}: {streams} streams, writes of {write_len} bytes");
    report(&name, begun, moved as f64 / MIB as f64, "MiB");
}

async fn requests(flavour: &str, count: u32) {
    let (host, _host_incoming, _guest, mut incoming) = sessions().await;
    let server = tokio::spawn(async move {
        while let Some(inbound) = incoming.next().await {
            let mut stream = inbound.stream;
            let mut question = [0; 64];
            stream.read_exact(&mut question).await.unwrap();
            stream.write_all(&question).await.unwrap();
            stream.shutdown().await.unwrap();
            let _ = stream.read(&mut question).await;
        }
    });
    let begun = Instant::now();
    for _ in 0..count {
        let mut stream = host.open(1, b"question").await.unwrap();
        stream.write_all(&[1; 64]).await.unwrap();
        let mut answer = Vec::new();
        stream.shutdown().await.unwrap();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer.len(), 64);
    }
    report(
        &format!("{flavour}: open, ask, answer, end"),
        begun,
        f64::from(count),
        "streams",
    );
    let begun = Instant::now();
    for _ in 0..count {
        host.ping(PATIENCE).await.unwrap();
    }
    report(
        &format!("{flavour}: pings one after the other"),
        begun,
        f64::from(count),
        "pings",
    );
    drop(host);
    server.abort();
}

async fn starts(flavour: &str, count: u32) {
    let begun = Instant::now();
    for _ in 0..count {
        drop(sessions().await);
    }
    report(
        &format!("{flavour}: sessions started and dropped"),
        begun,
        f64::from(count),
        "starts",
    );
}

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick" || argument == "--test");
    let total = if quick { 16 * MIB } else { 1024 * MIB };
    let count = if quick { 100 } else { 20_000 };
    for (flavour, threads) in [("current_thread", 0), ("multi_thread(2)", 2)] {
        let mut builder = match threads {
            0 => tokio::runtime::Builder::new_current_thread(),
            _ => tokio::runtime::Builder::new_multi_thread(),
        };
        let runtime = builder.worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            bulk(flavour, 1, 64 * 1024, total).await;
            bulk(flavour, 1, MIB, total).await;
            bulk(flavour, 8, 64 * 1024, total).await;
            bulk(flavour, 1, 4096, total / 4).await;
            requests(flavour, count).await;
            starts(flavour, count / 40).await;
        });
    }
}
