//! The loops of a worker: heartbeats, polls, and the fence that ends what may no longer run.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_core::dispatch::{Room, WorkerFacts};
use kiln_core::{AttemptId, ByteSize, Epoch, JobKind, Label, Lease};
use kiln_machine::ledger::Capacity;
use kiln_network::OwnPlaces;
use kiln_network::gateway::{CONTROLLER, host_addresses};
use kiln_proto::fleet::{
    HEARTBEAT_MS, Heartbeat, HeartbeatAnswer, HeldLease, LEASES_MAX, LeaseAnswer, Leased,
    OWN_PLACES_MAX, POLL_MS, Poll, PollAnswer, Release, Released, WORKER_ADDRESSES_MAX,
};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::client::{LinkError, REQUEST_TIMEOUT};
use super::clock::boot_ms;
use super::fence::Fence;
use super::idle::{self, Recent};
use super::job::{self, Stop, Workshop};
use super::reconcile::{self, Reconciler};
use super::staying::Staying;
use crate::event::Events;
use crate::fork;
use crate::host::{CPU_OVERCOMMIT_PERCENT, MEMORY_RESERVE, steady_unix_ms};

/// Wait before a poll or heartbeat that failed is sent again.
const RETRY: Duration = Duration::from_millis(500);
/// Longest wait for the controller when the worker leaves.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for the answer to a heartbeat. Short, so that one that went into a dead connection leaves time for another within a lease's life.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(6);
/// How long machines get to end after the worker was asked to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// How a worker presents itself.
#[derive(Clone, Debug)]
pub struct Offer {
    /// What it is.
    pub facts: WorkerFacts,
    /// Take work; without it the worker only ends what it has.
    pub takes_jobs: bool,
    /// It is one command's own, under a name that was never used before: nothing can be held in it yet, nobody else may have what it holds, and
    /// so its leases end with its process, not with time.
    pub own: bool,
}

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// The controller does not know it any more: it was removed, or another controller's database answers.
    #[error("the controller does not know this worker: {0}")]
    Unknown(String),
}

struct Running {
    lease: Lease,
    stop: Stop,
    /// When its lease arrived. A poll is held open, so its answer does not tell when the lease was granted: nothing runs before a heartbeat sent
    /// after this was answered.
    arrived_ms: u64,
    confirmed: CancellationToken,
}

struct State {
    fence: Fence,
    running: HashMap<AttemptId, Running>,
    /// Attempts whose machines were destroyed here because their lease was over. Offered again, as a controller may that was away, they are
    /// lost: an attempt runs once.
    destroyed: BTreeSet<(AttemptId, Epoch)>,
    /// Machines without a lease that were destroyed and that the controller was not told of yet.
    orphans: u64,
}

struct Daemon {
    shop: Arc<Workshop>,
    offer: Offer,
    state: Mutex<State>,
    /// A lease came or went: the fence's next deadline and the room left are others now.
    changed: Notify,
    /// A heartbeat is wanted at once.
    beat: Notify,
    /// A heartbeat was not answered: what else waits on the line waits in vain.
    silent: Notify,
    /// How many jobs there are.
    busy: watch::Sender<usize>,
    /// Who built here last.
    recent: Mutex<Recent>,
    /// Machines that stay when their jobs are over.
    staying: Arc<Staying>,
}

/// Works for the controller until `stop`, or until the controller no longer knows this worker. Jobs that run then are lost for this worker and
/// go on elsewhere; no machine outlives this call.
///
/// # Errors
/// See [`Ended`].
pub async fn serve(
    shop: Arc<Workshop>,
    offer: Offer,
    stop: CancellationToken,
) -> Result<(), Ended> {
    let daemon = Arc::new(Daemon {
        shop,
        offer,
        state: Mutex::new(State {
            fence: Fence::default(),
            running: HashMap::new(),
            destroyed: BTreeSet::new(),
            orphans: 0,
        }),
        changed: Notify::new(),
        beat: Notify::new(),
        silent: Notify::new(),
        busy: watch::Sender::new(0),
        recent: Mutex::default(),
        staying: Arc::default(),
    });
    if !daemon.offer.own {
        let released = tokio::select! {
            released = daemon.release() => released,
            () = stop.cancelled() => return Ok(()),
        };
        released?;
    }
    let mut jobs = JoinSet::new();
    let ended = tokio::select! {
        ended = daemon.heartbeats() => Err(ended),
        never = daemon.fence() => match never {},
        never = daemon.reconcile() => match never {},
        never = daemon.idle() => match never {},
        () = daemon.staying.watch() => Ok(()),
        () = daemon.staying.calls(&daemon.shop) => Ok(()),
        () = daemon.staying.records(&daemon.shop), if !daemon.offer.own => Ok(()),
        ended = daemon.polls(&mut jobs) => Err(ended),
        () = stop.cancelled() => Ok(()),
    };
    // What runs is destroyed, not cancelled: nobody asked to stop those jobs, and they go on elsewhere.
    for running in daemon.lock().running.values() {
        running.stop.fenced.cancel();
    }
    let ending = async { while jobs.join_next().await.is_some() {} };
    if tokio::time::timeout(STOP_TIMEOUT, ending).await.is_err() {
        tracing::warn!("machines did not end in time; the next kiln command removes them");
    }
    jobs.shutdown().await;
    daemon.staying.end_all().await;
    if ended.is_ok() {
        // Without this the controller would wait for the silence to become long.
        let leave = Release { leaving: true };
        let client = &daemon.shop.client;
        let said = client.call::<_, Released>("/worker/v1/release", None, &leave, LEAVE_TIMEOUT);
        let _controller_gone_too = said.await;
    }
    ended
}

enum Never {}

impl Daemon {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up what an earlier process of this worker held: its machines ended with it.
    async fn release(&self) -> Result<(), Ended> {
        let message = Release::default();
        loop {
            let client = &self.shop.client;
            let asked = client.call("/worker/v1/release", None, &message, REQUEST_TIMEOUT);
            match asked.await {
                Ok(Released { leases: 0 }) => return Ok(()),
                Ok(Released { leases }) => {
                    tracing::warn!(leases, "attempts of an earlier process are lost");
                    return Ok(());
                }
                Err(LinkError::Refused { code, message, .. }) if code == "unknown_worker" => {
                    return Err(Ended::Unknown(message));
                }
                Err(error) => {
                    tracing::debug!(error = crate::orders::chain(&error), "not released yet");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// How long a lease lives that would live so long by the controller's word.
    fn ttl_ms(&self, ttl_ms: u64) -> u64 {
        match self.offer.own {
            true => OWN_TTL_MS,
            false => ttl_ms,
        }
    }

    /// Ends what runs on leases that nothing renewed in time.
    async fn fence(&self) -> Never {
        loop {
            let now = boot_ms();
            let next = {
                let mut state = self.lock();
                for attempt in state.fence.expire(now) {
                    self.destroy(&mut state, &attempt, "no heartbeat was answered in time");
                }
                state.fence.next_ms()
            };
            let wait = next.map_or(Duration::from_secs(3600), |next| {
                // Time asleep does not count for the timer: it is asked again often enough.
                Duration::from_millis(next.saturating_sub(now).clamp(1, 500))
            });
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.changed.notified() => {}
            }
        }
    }

    /// Ends machines that no lease answers for: see [`super::reconcile`].
    async fn reconcile(&self) -> Never {
        let mut reconciler = Reconciler::default();
        loop {
            tokio::time::sleep(reconcile::EVERY).await;
            let held = {
                let state = self.lock();
                let live = state
                    .running
                    .iter()
                    .filter(|(_, running)| !running.stop.fenced.is_cancelled());
                let live: BTreeSet<_> = live.map(|(attempt, _)| attempt.clone()).collect();
                &live | &self.staying.attempts()
            };
            let found = reconciler.look(&self.shop.host, &held).await;
            self.lock().orphans += found.orphans();
        }
    }

    fn destroy(&self, state: &mut State, attempt: &AttemptId, why: &str) {
        state.fence.ended(attempt);
        self.shop.host.leases.end(attempt);
        if let Some(running) = state.running.get(attempt) {
            tracing::warn!(%attempt, why, "the lease is over: its machine is destroyed");
            running.stop.fenced.cancel();
            self.staying.lost(attempt);
            let gone = (attempt.clone(), running.lease.epoch);
            if state.destroyed.len() >= DESTROYED_MAX {
                // Ids sort by time: the oldest goes.
                state.destroyed.pop_first();
            }
            state.destroyed.insert(gone);
        }
    }

    /// Prepares what the next builds start from while nothing runs; stops at once when a job comes.
    async fn idle(&self) -> Never {
        let mut busy = self.busy.subscribe();
        let (events, mut told) = Events::channel();
        let _said = tokio::spawn(async move { while told.recv().await.is_some() {} });
        let mut wait = idle::IDLE_AFTER;
        loop {
            // The sender lives as long as this.
            let _idle = busy.wait_for(|jobs| *jobs == 0).await.is_ok();
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = busy.changed() => {
                    wait = idle::IDLE_AFTER;
                    continue;
                }
            }
            let recent = {
                let recent = self.recent.lock();
                recent.unwrap_or_else(PoisonError::into_inner).clone()
            };
            let preparing = idle::prepare_next(&self.shop.host, &recent, &events);
            let done = tokio::select! {
                biased;
                _ = busy.wait_for(|jobs| *jobs > 0) => {
                    wait = idle::IDLE_AFTER;
                    continue;
                }
                done = preparing => done,
            };
            wait = match done {
                Ok(idle::Done::Made) => Duration::ZERO,
                Ok(idle::Done::Nothing | idle::Done::NoRoom) => idle::LOOK_AGAIN,
                Err(failure) => {
                    tracing::warn!(%failure, "idle: nothing was prepared");
                    idle::LOOK_AGAIN
                }
            };
        }
    }

    async fn heartbeats(&self) -> Ended {
        let mut failed = false;
        loop {
            let wait = match failed {
                true => RETRY,
                false => Duration::from_millis(HEARTBEAT_MS),
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.beat.notified() => {}
            }
            match self.heartbeat().await {
                Ok(()) => failed = false,
                Err(LinkError::Refused { code, message, .. }) if code == "unknown_worker" => {
                    return Ended::Unknown(message);
                }
                Err(error) => {
                    tracing::debug!(error = crate::orders::chain(&error), "no heartbeat");
                    failed = true;
                    self.silent.notify_waiters();
                }
            }
        }
    }

    async fn heartbeat(&self) -> Result<(), LinkError> {
        let (held, orphans) = {
            let state = self.lock();
            (state.fence.held(), state.orphans)
        };
        let named = held.iter().map(held_lease).collect();
        let kept = self.staying.held();
        let message = Heartbeat {
            addresses: host_addresses(WORKER_ADDRESSES_MAX),
            kept: kept.iter().map(held_lease).collect(),
            facts: self.offer.facts.clone(),
            held: named,
            draining: !self.offer.takes_jobs,
            orphans,
        };
        let sent_ms = boot_ms();
        let answer: HeartbeatAnswer = self
            .shop
            .client
            .call("/worker/v1/heartbeat", None, &message, HEARTBEAT_TIMEOUT)
            .await?;
        if answer.leases.len() != held.len() {
            return Err(LinkError::Answer(
                "it answers about other leases".to_owned(),
            ));
        }
        let own = answer.own.iter().map(String::as_str);
        let own = own.take(OWN_PLACES_MAX).chain(self.shop.client.host());
        OwnPlaces::of_process().set(CONTROLLER, own);
        self.staying
            .answered(&kept, answer.kept, sent_ms, answer.ttl_ms);
        let ttl_ms = self.ttl_ms(answer.ttl_ms);
        let mut state = self.lock();
        state.orphans = state.orphans.saturating_sub(orphans);
        for ((attempt, epoch), lease) in held.into_iter().zip(answer.leases) {
            match lease {
                LeaseAnswer::Live { cancel } => {
                    let first = state.running.get(&attempt).is_some_and(|running| {
                        sent_ms >= running.arrived_ms && !running.confirmed.is_cancelled()
                    });
                    match first {
                        // What was believed until now was a guess: the controller's word replaces it, be it shorter.
                        true => {
                            let again = attempt.clone();
                            state.fence.granted(again, epoch, sent_ms, ttl_ms);
                        }
                        false => state.fence.renewed(&attempt, epoch, sent_ms, ttl_ms),
                    }
                    let until = state.fence.until_ms(&attempt);
                    if let (Some(running), Some(until)) = (state.running.get(&attempt), until) {
                        self.shop
                            .host
                            .leases
                            .grant(with_deadline(&running.lease, until));
                        if sent_ms >= running.arrived_ms {
                            running.confirmed.cancel();
                        }
                        if cancel {
                            running.stop.cancel.cancel();
                        }
                    }
                }
                LeaseAnswer::Gone { why, incident } => {
                    let running = state.running.get(&attempt);
                    if let (Some(running), Some(incident)) = (running, incident) {
                        let _told_before = running.stop.incident.set(incident);
                    }
                    // Nothing runs for it any more, and it hears the answer to its own last word.
                    if running.is_none_or(|running| !running.stop.finishing.is_cancelled()) {
                        self.destroy(&mut state, &attempt, &why);
                    }
                }
            }
        }
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    async fn polls(self: &Arc<Self>, jobs: &mut JoinSet<()>) -> Ended {
        loop {
            while jobs.try_join_next().is_some() {}
            if !self.offer.takes_jobs || self.lock().running.len() >= LEASES_MAX {
                self.changed.notified().await;
                continue;
            }
            // A poll is held open for long: on a line that is dead it would keep this worker idle long after there is another one.
            let polled = tokio::select! {
                polled = self.poll() => polled,
                () = self.silent.notified() => {
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            match polled {
                Ok(answer) => {
                    if answer.beat {
                        self.beat.notify_one();
                    }
                    for leased in answer.leases {
                        let name = (leased.lease.attempt.clone(), leased.lease.epoch);
                        let over = self.lock().destroyed.contains(&name);
                        match over {
                            true => job::give_up(&self.shop.client, &leased.lease).await,
                            false => self.start(leased, jobs),
                        }
                    }
                }
                Err(LinkError::Refused { code, message, .. }) if code == "unknown_worker" => {
                    return Ended::Unknown(message);
                }
                Err(error) => {
                    tracing::debug!(error = crate::orders::chain(&error), "no poll");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn poll(&self) -> Result<PollAnswer, LinkError> {
        let poll = Poll { held: self.held() };
        let longest = Duration::from_millis(POLL_MS) + REQUEST_TIMEOUT;
        let client = &self.shop.client;
        client.call("/worker/v1/poll", None, &poll, longest).await
    }

    /// Everything that runs here, also what is being destroyed.
    fn held(&self) -> Vec<HeldLease> {
        let state = self.lock();
        let leases = state.running.values().map(|running| &running.lease);
        leases
            .map(|lease| held_lease(&(lease.attempt.clone(), lease.epoch)))
            .collect()
    }

    /// Starts a lease. One that is told twice runs once: an answer may get lost on its way.
    fn start(self: &Arc<Self>, leased: Leased, jobs: &mut JoinSet<()>) {
        let attempt = leased.lease.attempt.clone();
        let (stop, confirmed) = (Stop::default(), CancellationToken::new());
        {
            let mut state = self.lock();
            if state.running.contains_key(&attempt) {
                return;
            }
            let arrived_ms = boot_ms();
            let epoch = leased.lease.epoch;
            state
                .fence
                .granted(attempt.clone(), epoch, arrived_ms, self.ttl_ms(CONFIRM_MS));
            let running = Running {
                lease: leased.lease.clone(),
                stop: stop.clone(),
                arrived_ms,
                confirmed: confirmed.clone(),
            };
            state.running.insert(attempt.clone(), running);
            self.busy.send_replace(state.running.len());
        }
        if !matches!(leased.request.kind, JobKind::Run(_)) {
            let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
            recent.built(&fork::scope(&leased.request, false), &leased.request.limits);
        }
        self.changed.notify_one();
        self.beat.notify_one();
        let daemon = Arc::clone(self);
        let runtime = tokio::runtime::Handle::current();
        // A thread of its own: a job keeps borrowed parts of this host over its waits, and lives long.
        jobs.spawn_blocking(move || {
            // However it ends, a panic included: a lease without a job would be kept alive for ever.
            let _over = Over {
                daemon: &daemon,
                attempt,
            };
            runtime.block_on(async {
                tokio::select! {
                    () = confirmed.cancelled() => job::run(&daemon.shop, &daemon.staying, leased, stop).await,
                    () = stop.fenced.cancelled() => {}
                }
            });
        });
    }
}

/// Gives up what a job had when it is over.
struct Over<'a> {
    daemon: &'a Daemon,
    attempt: AttemptId,
}

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let mut state = self.daemon.lock();
        state.fence.ended(&self.attempt);
        state.running.remove(&self.attempt);
        self.daemon.busy.send_replace(state.running.len());
        self.daemon.shop.host.leases.end(&self.attempt);
        drop(state);
        self.daemon.changed.notify_one();
    }
}

fn held_lease((attempt, epoch): &(AttemptId, Epoch)) -> HeldLease {
    HeldLease {
        attempt: attempt.clone(),
        epoch: *epoch,
    }
}

/// Destroyed attempts that are remembered.
const DESTROYED_MAX: usize = 1024;
/// How long a new lease waits for the heartbeat that confirms it.
const CONFIRM_MS: u64 = 10_000;
/// How long a command's own leases live: as long as its process.
const OWN_TTL_MS: u64 = 10 * 365 * 86_400_000;

/// The lease with its end as this process's registry counts time.
fn with_deadline(lease: &Lease, until_boot_ms: u64) -> Lease {
    let left = until_boot_ms.saturating_sub(boot_ms());
    Lease {
        deadline_unix_ms: steady_unix_ms().saturating_add(left),
        ..lease.clone()
    }
}

/// What this host is, for the controller.
#[must_use]
pub fn facts(shop: &Workshop, machines_max: u32) -> WorkerFacts {
    let all = Capacity::of_host(CPU_OVERCOMMIT_PERCENT, MEMORY_RESERVE);
    let capacity = all.map(|all| all.0).unwrap_or_default();
    let label = |text: &str| text.parse::<Label>().ok();
    let arch = label(ARCH).unwrap_or_else(|| unreachable!("a constant label"));
    let runtimes = ["node", "python"].into_iter().filter_map(label);
    let heads = shop.host.heads.list().unwrap_or_default();
    let warm: BTreeSet<_> = heads
        .iter()
        .filter_map(|head| kiln_image::heads::tenant_of(&head.scope))
        .take(WARM_MAX)
        .collect();
    WorkerFacts {
        arch,
        runtimes: runtimes.collect(),
        capacity: Room {
            cpus: u32::try_from(capacity.cpu_milli / 1000).unwrap_or(u32::MAX),
            memory: capacity.memory,
            disk: free_disk(&shop.host.home.data),
            machines: machines_max,
        },
        whole_cpus: kiln_machine::pins::usable()
            .ok()
            .and_then(|cpus| u32::try_from(cpus.len()).ok()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        generation: kiln_core::dispatch::ATTEND_GENERATION,
        warm,
    }
}

/// Tenants with a warm head that are told.
const WARM_MAX: usize = 1000;
/// This host's architecture in OCI terms.
const ARCH: &str = "amd64";

fn free_disk(path: &std::path::Path) -> ByteSize {
    match rustix::fs::statvfs(path) {
        Ok(stat) => ByteSize(stat.f_bavail.saturating_mul(stat.f_frsize)),
        Err(_) => ByteSize(0),
    }
}
