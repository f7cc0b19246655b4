//! Thousands follow one job of one controller; some of them never read. A few in the suite, 5,000 with `KILN_FOLLOWERS=5000`.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_core::Lease;
use kiln_db::LeaseTimes;
use kiln_proto::fleet::{HeldLease, JobEvents};
use kiln_testkit::wait_until;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use crate::fleet_lease_sim::asked;
use crate::fleet_server::{BEAT, Served, socket};
use crate::fleet_worker::{Line, send};

/// Followers in the suite.
const FEW: u64 = 200;
/// Events that a job tells while they follow.
const EVENTS: u64 = 20;
/// The log is longer than what the kernel keeps for a follower that does not read.
const LOG: usize = 512 * 1024;
/// Bytes of one piece of log.
const PIECE: usize = 64 * 1024;
/// Memory of the controller that one follower may cost.
const FOLLOWER_BYTES_MAX: u64 = 128 * 1024;
/// Longest wait for everything to have arrived everywhere.
const LONG: Duration = Duration::from_secs(400);
/// A lease that a busy host does not lose.
const LEASE: LeaseTimes = LeaseTimes {
    ttl_ms: 120_000,
    grace_ms: 5_000,
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    Events,
    Log,
}

/// One follower that has asked.
async fn follower(socket: &Path, job: &str, what: What) -> io::Result<UnixStream> {
    let path = match what {
        What::Events => format!("/v1/jobs/{job}/events"),
        What::Log => format!("/v1/jobs/{job}/logs?follow=true"),
    };
    let mut line = UnixStream::connect(socket).await?;
    let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    line.write_all(head.as_bytes()).await?;
    Ok(line)
}

/// What one follower read until the server closed the line: bytes, and events.
async fn read(mut line: UnixStream, what: What) -> (What, usize, u64, bool) {
    let (mut bytes, mut text) = (0, Vec::new());
    let mut piece = vec![0; 16 * 1024];
    loop {
        match line.read(&mut piece).await {
            Ok(0) | Err(_) => break,
            Ok(read) => {
                bytes += read;
                if what == What::Events {
                    text.extend_from_slice(&piece[..read]);
                }
            }
        }
    }
    let text = String::from_utf8_lossy(&text);
    let events = text.lines().filter(|line| line.starts_with("id: ")).count();
    let ended = text.contains("event: end\n");
    (what, bytes, events as u64, ended)
}

fn allow_open_files(count: u64) {
    let now = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: Some(count),
        maximum: Some(now.maximum.map_or(count, |most| most.max(count))),
    };
    if now.current.is_some_and(|current| current < count) {
        setrlimit(Resource::Nofile, wanted).expect("this many open files");
    }
}

/// Resident bytes of a process.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    number.expect("a number") * 1024
}

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("it lives")
        .count()
}

/// The slowest of some short requests of somebody else.
async fn slowest(socket: &Path) -> Duration {
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        let asked = Instant::now();
        let got = send(socket, "GET", "/v1/jobs?limit=1", &[], b"").await;
        assert_eq!(got.expect("answers").status, 200);
        slowest = slowest.max(asked.elapsed());
    }
    slowest
}

/// A job that runs on a worker which does nothing but keep its lease.
async fn running(socket: &Path) -> (Line, Lease, tokio::task::JoinHandle<()>) {
    let line = Line::new(socket, "w1");
    line.join(1).await.expect("joins");
    let headers = [("content-type", "application/json")];
    let body = br#"{"argv": ["sim", "1", "1"], "cpus": 1, "memory": "512M", "disk": "1G"}"#;
    let got = send(socket, "POST", "/v1/runs", &headers, body).await;
    assert_eq!(got.expect("answers").status, 202);
    let lease = line
        .poll(Vec::new())
        .await
        .expect("answers")
        .remove(0)
        .lease;
    let held = HeldLease {
        attempt: lease.attempt.clone(),
        epoch: lease.epoch,
    };
    let beating = line.clone();
    let beats = tokio::spawn(async move {
        loop {
            let _kept = beating.beat(vec![held.clone()], 1).await;
            tokio::time::sleep(BEAT * 4).await;
        }
    });
    (line, lease, beats)
}

/// The job says everything there is to say, and ends.
async fn say_all(line: &Line, lease: &Lease) {
    for number in 0..EVENTS {
        let message = JobEvents {
            from: number,
            events: vec![serde_json::json!({ "event": "note", "text": format!("note {number}") })],
            started: number == 0,
        };
        while line.event(lease, &message).await.is_err() {}
    }
    let piece = vec![b'x'; PIECE];
    let mut at = 0;
    while at < LOG {
        match line.log(lease, at as u64, &piece).await {
            Ok(answer) => at = usize::try_from(answer.next).expect("small"),
            Err(_) => tokio::time::sleep(BEAT).await,
        }
    }
    while line.finish(lease).await.is_err() {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_follow_and_the_slow_ones_cost_nobody() {
    let many = asked("KILN_FOLLOWERS").unwrap_or(FEW);
    allow_open_files(many * 2 + 1_000);
    let folder = tempfile::tempdir().expect("folder");
    let (served, socket) = (
        Served::start_with(folder.path(), LEASE),
        socket(folder.path()),
    );
    let (line, lease, beats) = running(&socket).await;
    let job = lease.attempt.job.to_string();
    let quiet = slowest(&socket).await;
    let (files, memory) = (open_files(served.id()), resident(served.id()));

    let (mut slow, mut readers) = (Vec::new(), JoinSet::new());
    for number in 0..many {
        let what = match number % 5 {
            0 => What::Log,
            _ => What::Events,
        };
        let line = follower(&socket, &job, what).await.expect("connects");
        match number % 10 {
            // A tenth of each kind never reads a byte.
            5 | 9 => slow.push(line),
            _ => drop(readers.spawn(read(line, what))),
        }
    }
    let all = usize::try_from(many).expect("small");
    wait_until("all are followed", LONG, || {
        open_files(served.id()) >= files + all
    })
    .await;
    let idle = slowest(&socket).await;
    let began = Instant::now();
    say_all(&line, &lease).await;
    let busy = slowest(&socket).await;
    beats.abort();
    let mut missed = 0;
    while let Some(read) = tokio::time::timeout(LONG, readers.join_next())
        .await
        .expect("ends")
    {
        let (what, bytes, events, ended) = read.expect("reads");
        let whole = match what {
            What::Log => bytes >= LOG,
            // queued, leased, started and finished are events, too.
            What::Events => ended && events >= EVENTS + 3,
        };
        missed += u64::from(!whole);
    }
    let told = began.elapsed();
    let each = resident(served.id()).saturating_sub(memory) / many;
    let after = slowest(&socket).await;
    let left_slow = slow.len();
    drop(slow);
    // The database may keep a few connections more than it had.
    wait_until("all lines are closed", LONG, || {
        open_files(served.id()) <= files + 8
    })
    .await;
    println!(
        "{many} followers, {left_slow} of them never read: {each} bytes each, all told in {told:?}; others' slowest request {quiet:?} \
         before, {idle:?} while they wait, {busy:?} while they are told, {after:?} after; missed something {missed}, left open 0"
    );
    assert_eq!(missed, 0, "followers that missed something");
    assert!(each <= FOLLOWER_BYTES_MAX, "{each} bytes for each follower");
    assert!(
        idle.max(busy).max(after) < Duration::from_secs(20),
        "{idle:?} {busy:?} {after:?}"
    );
    served.kill();
}
