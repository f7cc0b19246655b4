//! A worker that starts no machine: it speaks the real protocol over the private socket, "runs" jobs that are a script, fences itself by
//! the real [`crate::fence`], and can be killed, cut off or lied to about the time.
//!
//! A job's command line is its script: `sim LINES MS` prints that many lines, one every so many milliseconds.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_core::dispatch::{Room, WorkerFacts};
use kiln_core::{AttemptId, ByteSize, Epoch, JobKind, Lease, Outcome, Verdict};
use kiln_proto::fleet::{
    Finish, GENERATION, GENERATION_HEADER, Heartbeat, HeartbeatAnswer, HeldLease, JobEvents, Join,
    Joined, LEASE_HEADER, LeaseAnswer, LeaseHeader, Leased, LogAnswer, Poll, PollAnswer,
    WORKER_HEADER,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::fence::Fence;
use crate::server::{Got, parse};

/// Longest wait for a short answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Wait before something is sent again.
const AGAIN: Duration = Duration::from_millis(60);
/// How long a new lease waits for the heartbeat that confirms it: shorter than any TTL here, as the real one is.
const CONFIRM_MS: u64 = 2_000;

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
        warm: BTreeSet::new(),
    }
}

/// What all workers of a test saw.
#[derive(Default)]
pub(crate) struct Ledger {
    /// Who works for which job right now, by its name.
    working: Mutex<BTreeMap<String, Vec<String>>>,
    /// Finishes that were taken: job, attempt and epoch.
    pub(crate) finished: Mutex<Vec<(AttemptId, Epoch)>>,
    /// Times at which two worked for one job.
    pub(crate) twice: AtomicU64,
    pub(crate) fenced: AtomicU64,
    pub(crate) refused: AtomicU64,
    /// When each attempt began.
    pub(crate) began: Mutex<Vec<(AttemptId, String, Instant)>>,
}

impl Ledger {
    fn begins(&self, lease: &Lease, worker: &str) {
        let mut working = self.working.lock().expect("lock");
        let all = working.entry(lease.attempt.job.to_string()).or_default();
        all.push(worker.to_owned());
        if all.len() > 1 {
            self.twice.fetch_add(1, Ordering::SeqCst);
        }
        let began = (lease.attempt.clone(), worker.to_owned(), Instant::now());
        self.began.lock().expect("lock").push(began);
    }

    fn ends(&self, lease: &Lease, worker: &str) {
        let mut working = self.working.lock().expect("lock");
        let all = working.entry(lease.attempt.job.to_string()).or_default();
        if let Some(at) = all.iter().position(|other| other == worker) {
            all.remove(at);
        }
    }
}

struct Running {
    lease: Lease,
    arrived_ms: u64,
    confirmed: CancellationToken,
    fenced: CancellationToken,
}

#[derive(Default)]
struct State {
    fence: Fence,
    running: BTreeMap<AttemptId, Running>,
}

/// A worker's process. Dropping it, or [`Self::kill`], ends it without a word.
pub(crate) struct SimWorker {
    pub(crate) line: Line,
    /// Added to its clock, milliseconds.
    pub(crate) skew_ms: Arc<AtomicI64>,
    killed: CancellationToken,
}

struct Inner {
    line: Line,
    machines: u32,
    beat_every: Duration,
    began: Instant,
    skew_ms: Arc<AtomicI64>,
    state: Mutex<State>,
    beat_now: Notify,
    ledger: Arc<Ledger>,
    killed: CancellationToken,
}

impl SimWorker {
    /// Joins, and works until it is killed.
    pub(crate) fn start(
        line: Line,
        machines: u32,
        beat_every: Duration,
        ledger: &Arc<Ledger>,
    ) -> Self {
        let killed = CancellationToken::new();
        let skew_ms = Arc::new(AtomicI64::new(0));
        let inner = Arc::new(Inner {
            line: line.clone(),
            machines,
            beat_every,
            began: Instant::now(),
            skew_ms: Arc::clone(&skew_ms),
            state: Mutex::default(),
            beat_now: Notify::new(),
            ledger: Arc::clone(ledger),
            killed: killed.clone(),
        });
        let stop = killed.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = inner.clone().live() => {}
            }
        });
        Self {
            line,
            skew_ms,
            killed,
        }
    }

    /// `kill -9`.
    pub(crate) fn kill(&self) {
        self.killed.cancel();
    }
}

impl Drop for SimWorker {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Inner {
    /// This worker's clock; only differences count, so it may be wrong by any amount.
    fn clock(&self) -> u64 {
        let since = u64::try_from(self.began.elapsed().as_millis()).expect("short");
        let skew = self.skew_ms.load(Ordering::SeqCst);
        (10_000_000 + since).saturating_add_signed(skew)
    }

    fn held(&self) -> Vec<HeldLease> {
        let state = self.state.lock().expect("lock");
        let held = state.fence.held();
        held.into_iter()
            .map(|(attempt, epoch)| HeldLease { attempt, epoch })
            .collect()
    }

    async fn live(self: Arc<Self>) {
        while self.line.join(self.machines).await.is_err() {
            tokio::time::sleep(AGAIN).await;
        }
        // A worker that has just started holds nothing, whatever an earlier one of its name held.
        let nothing = serde_json::json!({});
        let release = || {
            let line = &self.line;
            line.call::<serde_json::Value>("/worker/v1/release", None, &nothing, ANSWER)
        };
        while matches!(release().await, Err(NoAnswer::Gone)) {
            tokio::time::sleep(AGAIN).await;
        }
        tokio::join!(self.beats(), self.polls(), self.fences());
    }

    async fn beats(&self) {
        loop {
            let _woken = tokio::time::timeout(self.beat_every, self.beat_now.notified()).await;
            self.beat().await;
        }
    }

    async fn beat(&self) {
        let (held, sent_ms) = (self.held(), self.clock());
        let Ok(answer) = self.line.beat(held.clone(), self.machines).await else {
            return;
        };
        let mut state = self.state.lock().expect("lock");
        for (held, told) in held.into_iter().zip(answer.leases) {
            match told {
                LeaseAnswer::Live { .. } => {
                    state
                        .fence
                        .renewed(&held.attempt, held.epoch, sent_ms, answer.ttl_ms);
                    let holds = state.fence.until_ms(&held.attempt).is_some();
                    let running = state.running.get(&held.attempt);
                    if let Some(running) = running.filter(|_| holds)
                        && sent_ms >= running.arrived_ms
                    {
                        running.confirmed.cancel();
                    }
                }
                LeaseAnswer::Gone { .. } => {
                    state.fence.ended(&held.attempt);
                    if let Some(running) = state.running.get(&held.attempt) {
                        running.fenced.cancel();
                    }
                }
            }
        }
    }

    async fn fences(&self) {
        loop {
            {
                let now = self.clock();
                let mut state = self.state.lock().expect("lock");
                for attempt in state.fence.expire(now) {
                    self.ledger.fenced.fetch_add(1, Ordering::SeqCst);
                    if let Some(running) = state.running.get(&attempt) {
                        running.fenced.cancel();
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn polls(self: &Arc<Self>) {
        loop {
            let running = {
                let state = self.state.lock().expect("lock");
                let leases = state.running.values().map(|running| &running.lease);
                leases
                    .map(|lease| HeldLease {
                        attempt: lease.attempt.clone(),
                        epoch: lease.epoch,
                    })
                    .collect()
            };
            match self.line.poll(running).await {
                Ok(leases) => leases.into_iter().for_each(|leased| self.begin(leased)),
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        }
    }

    fn begin(self: &Arc<Self>, leased: Leased) {
        let (lease, arrived_ms) = (leased.lease.clone(), self.clock());
        let (confirmed, fenced) = (CancellationToken::new(), CancellationToken::new());
        {
            let mut state = self.state.lock().expect("lock");
            if state.running.contains_key(&lease.attempt) {
                return;
            }
            state
                .fence
                .granted(lease.attempt.clone(), lease.epoch, arrived_ms, CONFIRM_MS);
            let running = Running {
                lease: lease.clone(),
                arrived_ms,
                confirmed: confirmed.clone(),
                fenced: fenced.clone(),
            };
            state.running.insert(lease.attempt.clone(), running);
        }
        self.beat_now.notify_one();
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let work = async {
                confirmed.cancelled().await;
                this.ledger.begins(&lease, &this.line.worker);
                let ended = Ends(&this, &lease);
                let passed = this.work(&leased).await;
                drop(ended);
                if passed {
                    this.finish(&lease).await;
                }
            };
            tokio::select! {
                () = work => {}
                () = fenced.cancelled() => {}
                () = this.killed.cancelled() => {}
            }
            let mut state = this.state.lock().expect("lock");
            state.fence.ended(&lease.attempt);
            state.running.remove(&lease.attempt);
        });
    }

    /// The script of a job; false when its lease was refused.
    async fn work(&self, leased: &Leased) -> bool {
        let (lines, pause) = script(leased);
        let lease = &leased.lease;
        let started = JobEvents {
            from: 0,
            events: vec![serde_json::json!({ "event": "phase", "name": "machine" })],
            started: true,
        };
        let said = self.until_taken(|| self.line.event(lease, &started));
        if said.await.is_none() {
            return false;
        }
        let (mut all, mut at) = (String::new(), 0);
        for number in 0..lines {
            tokio::time::sleep(pause).await;
            all += &text(&lease.attempt, number);
            if !self.say(lease, &all, &mut at).await {
                return false;
            }
        }
        // A controller that did not hear the beginning wants it all.
        self.say(lease, &all, &mut at).await
    }

    /// Sends what is missing of a log; false when its lease was refused.
    async fn say(&self, lease: &Lease, all: &str, at: &mut usize) -> bool {
        loop {
            let from = *at;
            let sent = || self.line.log(lease, from as u64, &all.as_bytes()[from..]);
            let Some(answer) = self.until_taken(sent).await else {
                return false;
            };
            *at = usize::try_from(answer.next).expect("short").min(all.len());
            if *at == all.len() {
                return true;
            }
        }
    }

    async fn until_taken<T, F>(&self, send: impl Fn() -> F) -> Option<T>
    where
        F: Future<Output = Result<T, NoAnswer>>,
    {
        loop {
            match send().await {
                Ok(answer) => return Some(answer),
                Err(NoAnswer::Gone) => tokio::time::sleep(AGAIN).await,
                Err(NoAnswer::Refused(..)) => {
                    self.ledger.refused.fetch_add(1, Ordering::SeqCst);
                    return None;
                }
            }
        }
    }

    /// Says the end until it is answered; an answer that was lost is asked for again.
    async fn finish(&self, lease: &Lease) {
        loop {
            match self.line.finish(lease).await {
                Ok(_) => {
                    let end = (lease.attempt.clone(), lease.epoch);
                    self.ledger.finished.lock().expect("lock").push(end);
                    return;
                }
                Err(NoAnswer::Gone) => tokio::time::sleep(AGAIN).await,
                Err(NoAnswer::Refused(..)) => {
                    self.ledger.refused.fetch_add(1, Ordering::SeqCst);
                    return;
                }
            }
        }
    }
}

/// Tells the ledger that nobody works here any more, however that came.
struct Ends<'a>(&'a Inner, &'a Lease);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.ledger.ends(self.1, &self.0.line.worker);
    }
}

/// A line of an attempt's log.
pub(crate) fn text(attempt: &AttemptId, number: u64) -> String {
    format!("{attempt} line {number}\n")
}

fn script(leased: &Leased) -> (u64, Duration) {
    let JobKind::Run(run) = &leased.request.kind else {
        panic!("not a script: {:?}", leased.request.kind);
    };
    let number = |at: usize| run.argv.get(at).and_then(|text| text.parse().ok());
    (
        number(1).expect("a script"),
        Duration::from_millis(number(2).expect("a script")),
    )
}
