//! A worker that starts no machine: it speaks the real protocol by a [`Line`], "runs" jobs that are a script, fences itself by the real
//! [`crate::fence`], and can be killed, cut off or lied to about the time.
//!
//! A job's command line is its script: `sim LINES MS` prints that many lines, one every so many milliseconds.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_core::{AttemptId, Epoch, JobKind, Lease};
use kiln_proto::fleet::{HeldLease, JobEvents, LeaseAnswer, Leased};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::fence::Fence;
use crate::fleet_line::{AGAIN, ANSWER};
pub(crate) use crate::fleet_line::{Line, NoAnswer, facts, send};

/// How long a new lease waits for the heartbeat that confirms it: shorter than any TTL here, as the real one is.
const CONFIRM_MS: u64 = 2_000;

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
