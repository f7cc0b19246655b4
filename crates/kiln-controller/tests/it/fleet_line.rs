//! What a worker asks, over the private socket, as whoever it says it is: the real protocol without a machine behind it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use kiln_core::dispatch::{Room, WorkerFacts};
use kiln_core::{ByteSize, Lease, Outcome, Verdict};
use kiln_proto::fleet::{
    Finish, GENERATION, GENERATION_HEADER, Heartbeat, HeartbeatAnswer, HeldLease, JobEvents, Join,
    Joined, LEASE_HEADER, LeaseHeader, Leased, LogAnswer, Poll, PollAnswer, WORKER_HEADER,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::server::{Got, parse};

/// Longest wait for a short answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(5);
/// Wait before something is sent again.
pub(crate) const AGAIN: Duration = Duration::from_millis(60);

/// Why there is no answer to use.
#[derive(Debug)]
pub(crate) enum NoAnswer {
    /// Not reached, cut, or too late.
    Gone,
    /// Reached, and refused with this code.
    Refused(String),
}

/// Sends one request over the private socket, on a connection of its own.
pub(crate) async fn send(
    socket: &Path,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> std::io::Result<Got> {
    let mut line = tokio::net::UnixStream::connect(socket).await?;
    let mut head = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "\r\n";
    line.write_all(head.as_bytes()).await?;
    // A server that refuses early need not read the rest.
    let _refused = line.write_all(body).await;
    let mut answer = Vec::new();
    match line.read_to_end(&mut answer).await {
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => return Err(error),
        _ => {}
    }
    if !answer.windows(4).any(|w| w == b"\r\n\r\n") {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(parse(&answer))
}

/// What one worker asks, as whoever it says it is.
#[derive(Clone)]
pub(crate) struct Line {
    pub(crate) socket: PathBuf,
    /// Sockets of other controllers: gone to when the one that was used last does not answer.
    pub(crate) others: Vec<PathBuf>,
    at: Arc<AtomicUsize>,
    pub(crate) worker: String,
    /// Generation of the protocol that it speaks.
    pub(crate) generation: u32,
    /// Nothing gets through.
    pub(crate) cut: Arc<AtomicBool>,
}

impl Line {
    pub(crate) fn new(socket: &Path, worker: &str) -> Self {
        Self {
            socket: socket.to_owned(),
            others: Vec::new(),
            at: Arc::default(),
            worker: worker.to_owned(),
            generation: GENERATION,
            cut: Arc::default(),
        }
    }

    pub(crate) async fn raw(
        &self,
        method: &str,
        path: &str,
        lease: Option<&str>,
        body: &[u8],
    ) -> std::io::Result<Got> {
        let generation = self.generation.to_string();
        let mut headers = vec![
            (GENERATION_HEADER, generation.as_str()),
            (WORKER_HEADER, self.worker.as_str()),
            ("content-type", "application/json"),
        ];
        headers.extend(lease.map(|lease| (LEASE_HEADER, lease)));
        let all = 1 + self.others.len();
        let at = self.at.load(Ordering::SeqCst) % all;
        let socket = match at {
            0 => &self.socket,
            other => &self.others[other - 1],
        };
        let sent = send(socket, method, path, &headers, body).await;
        if sent.is_err() && all > 1 {
            let next = (at + 1) % all;
            let _moved = self
                .at
                .compare_exchange(at, next, Ordering::SeqCst, Ordering::SeqCst);
        }
        sent
    }

    pub(crate) async fn post<A: DeserializeOwned>(
        &self,
        path: &str,
        lease: Option<&Lease>,
        body: &[u8],
        patience: Duration,
    ) -> Result<A, NoAnswer> {
        if self.cut.load(Ordering::SeqCst) {
            // A half-open line: nothing comes back, for a while.
            tokio::time::sleep(AGAIN).await;
            return Err(NoAnswer::Gone);
        }
        let lease = lease.map(|lease| LeaseHeader::of(lease).to_string());
        let asked = self.raw("POST", path, lease.as_deref(), body);
        let got = tokio::time::timeout(patience, asked).await;
        // What was on its way when the line was cut does not arrive.
        let (Ok(Ok(got)), false) = (got, self.cut.load(Ordering::SeqCst)) else {
            return Err(NoAnswer::Gone);
        };
        match got.status {
            200 => serde_json::from_slice(&got.body).map_err(|_| NoAnswer::Gone),
            500.. | 429 => Err(NoAnswer::Gone),
            _ => Err(NoAnswer::Refused(got.code())),
        }
    }

    pub(crate) async fn call<A: DeserializeOwned>(
        &self,
        path: &str,
        lease: Option<&Lease>,
        message: &impl Serialize,
        patience: Duration,
    ) -> Result<A, NoAnswer> {
        let body = serde_json::to_vec(message).expect("serialises");
        self.post(path, lease, &body, patience).await
    }

    pub(crate) async fn join(&self, machines: u32) -> Result<Joined, NoAnswer> {
        let join = Join {
            worker: self.worker.parse().expect("name"),
            token: String::new(),
            csr: String::new(),
            labels: BTreeMap::new(),
            facts: facts(machines),
        };
        self.call("/worker/v1/join", None, &join, ANSWER).await
    }

    pub(crate) async fn beat(
        &self,
        held: Vec<HeldLease>,
        machines: u32,
    ) -> Result<HeartbeatAnswer, NoAnswer> {
        let beat = Heartbeat {
            addresses: Vec::new(),
            kept: Vec::new(),
            facts: facts(machines),
            held,
            draining: false,
            orphans: 0,
        };
        self.call("/worker/v1/heartbeat", None, &beat, ANSWER).await
    }

    pub(crate) async fn poll(&self, held: Vec<HeldLease>) -> Result<Vec<Leased>, NoAnswer> {
        let poll = Poll { held };
        let patience = Duration::from_secs(40);
        let answer: PollAnswer = self.call("/worker/v1/poll", None, &poll, patience).await?;
        Ok(answer.leases)
    }

    pub(crate) async fn log(
        &self,
        lease: &Lease,
        from: u64,
        bytes: &[u8],
    ) -> Result<LogAnswer, NoAnswer> {
        let path = format!("/worker/v1/jobs/{}/log?from={from}", lease.attempt.job);
        self.post(&path, Some(lease), bytes, ANSWER).await
    }

    pub(crate) async fn event(
        &self,
        lease: &Lease,
        message: &JobEvents,
    ) -> Result<serde_json::Value, NoAnswer> {
        let path = format!("/worker/v1/jobs/{}/event", lease.attempt.job);
        self.call(&path, Some(lease), message, ANSWER).await
    }

    pub(crate) async fn finish(&self, lease: &Lease) -> Result<String, NoAnswer> {
        let path = format!("/worker/v1/jobs/{}/finish", lease.attempt.job);
        let finish = Finish {
            egress: Vec::new(),
            outcome: Outcome {
                verdict: Verdict::Passed,
                phases_ms: Vec::new(),
            },
            receipt: None,
            observed: None,
            runtime: None,
            details: serde_json::json!({ "by": self.worker }),
        };
        let done: serde_json::Value = self.call(&path, Some(lease), &finish, ANSWER).await?;
        Ok(done["state"].as_str().unwrap_or_default().to_owned())
    }
}

pub(crate) fn facts(machines: u32) -> WorkerFacts {
    WorkerFacts {
        arch: "amd64".parse().expect("label"),
        runtimes: BTreeSet::new(),
        capacity: Room {
            cpus: machines * 2,
            memory: ByteSize::gib(u64::from(machines) * 4),
            disk: ByteSize::gib(u64::from(machines) * 20),
            machines,
        },
        whole_cpus: None,
        version: "1".to_owned(),
        generation: kiln_core::dispatch::POLICY_GENERATION,
        warm: BTreeSet::new(),
    }
}
