//! Machines that stay on this worker when their jobs are over: each has its keeper here, a lease of its own, and ways that this worker opens to it.
//!
//! The controller is asked first, under the live lease of the attempt; then a keeper, the same as a command's own ([`crate::kept::keeper`]), adopts the
//! machine, in this process: it ends with it, and where that is killed, a process that watches it removes the machine ([`super::job::Watch`]). Heartbeats renew the machine's lease; one that is not renewed in time, or refused, ends the machine.
//! Who wants to reach a machine calls through the controller: one request is held open for that, and each call is answered with a connection of this
//! worker's to the controller, joined to the keeper's private socket. The keeper judges what is asked as always.
//!
//! A machine whose command is attended while it runs is reached by the same calls: until its attempt is over, they lead to that command's door
//! ([`crate::attend::door`]).

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_core::{AttemptId, Epoch, FailureClass, Lease, MachineName};
use kiln_proto::fleet::{
    AwaitCalls, Calls, HeldLease, KEPT_MAX, KeepMachine, LeaseAnswer, MachineCall, MachinesGone,
    MayStay, POLL_MS,
};
use kiln_proto::kept::Handover;
use kiln_store::private_socket;
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::{LinkError, REQUEST_TIMEOUT, job_path};
use super::clock::boot_ms;
use super::fence::Fence;
use super::job::{Watched, Workshop};
use super::mask::Mask;
use super::report::To;
use crate::attend::door::Door;
use crate::failure::Failure;
use crate::kept::egress::hand_in;
use crate::kept::{keeper, socket_of};

/// Longest wait for the controller's word whether a machine may stay. With [`ADOPT_TIMEOUT`] it is shorter than a machine lives without an owner.
const ASK_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest wait for a keeper to adopt its machine.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(35);
/// How long a machine is kept without a heartbeat that named it.
const CONFIRM_MS: u64 = 10_000;
/// Time between two looks at leases: a timer would not run while the host sleeps.
const TICK: Duration = Duration::from_millis(500);
/// Wait before a request that failed is sent again.
const RETRY: Duration = Duration::from_millis(500);
/// Wait before records that the controller could not take are handed in again.
const RECORDS_AGAIN: Duration = Duration::from_secs(2);
/// Ways that are open at a time, to all machines here.
const WAYS_MAX: usize = 512;
/// How long a way may take to carry the last of what was said when its machine is gone.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Longest time in which a way must be open.
const WAY_TIMEOUT: Duration = Duration::from_secs(15);
/// How long keepers get to end their machines when this worker stops.
const END_TIMEOUT: Duration = Duration::from_secs(8);

/// Machines that are kept here.
#[derive(Debug, Default)]
pub(super) struct Staying {
    state: Mutex<State>,
    /// One came or went.
    changed: Notify,
    keepers: TaskTracker,
}

#[derive(Debug, Default)]
struct State {
    fence: Fence,
    kept: HashMap<AttemptId, Here>,
    /// Attempts that run, and whose commands are attended.
    attended: HashMap<AttemptId, (Epoch, Arc<Door>)>,
}

#[derive(Debug)]
struct Here {
    epoch: Epoch,
    machine: MachineName,
    end: CancellationToken,
}

impl Staying {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that is kept here, for a heartbeat.
    pub(super) fn held(&self) -> Vec<(AttemptId, Epoch)> {
        self.lock().fence.held()
    }

    /// The attempts whose machines have an owner here, also while that ends them.
    pub(super) fn attempts(&self) -> BTreeSet<AttemptId> {
        self.lock().kept.keys().cloned().collect()
    }

    /// Takes the controller's word about what [`Staying::held`] said in a heartbeat sent at `sent_ms`. An older controller has none: it keeps nothing.
    pub(super) fn answered(
        &self,
        held: &[(AttemptId, Epoch)],
        answers: Vec<LeaseAnswer>,
        sent_ms: u64,
        ttl_ms: u64,
    ) {
        let mut state = self.lock();
        for ((attempt, epoch), answer) in held.iter().zip(answers) {
            match answer {
                LeaseAnswer::Live { .. } => {
                    state.fence.renewed(attempt, *epoch, sent_ms, ttl_ms);
                }
                LeaseAnswer::Gone { why, .. } => state.end(attempt, &why),
            }
        }
    }

    /// Ends what is kept of an attempt that lost its lease before it was over.
    pub(super) fn lost(&self, attempt: &AttemptId) {
        self.lock().end(attempt, "its attempt's lease is over");
    }

    /// From now on calls lead to this door, until what is given is dropped.
    pub(super) fn attended(self: &Arc<Self>, lease: &Lease, door: Arc<Door>) -> AtDoor {
        let attempt = lease.attempt.clone();
        let mut state = self.lock();
        state
            .attended
            .insert(attempt.clone(), (lease.epoch, Arc::clone(&door)));
        drop(state);
        self.changed.notify_waiters();
        AtDoor {
            staying: Arc::clone(self),
            attempt,
            door,
        }
    }

    /// Ends machines whose leases nothing renewed in time; runs for ever.
    pub(super) async fn watch(&self) {
        loop {
            tokio::time::sleep(TICK).await;
            let mut state = self.lock();
            for attempt in state.fence.expire(boot_ms()) {
                state.end(&attempt, "no heartbeat was answered in time");
            }
        }
    }

    /// Ends all machines.
    pub(super) async fn end_all(&self) {
        for here in self.lock().kept.values() {
            here.end.cancel();
        }
        self.keepers.close();
        if tokio::time::timeout(END_TIMEOUT, self.keepers.wait())
            .await
            .is_err()
        {
            tracing::warn!("kept machines did not end in time; the next kiln command removes them");
        }
    }

    /// Keeps a machine without an owner, of an attempt whose lease lives. When it may not stay, or cannot, it is destroyed.
    ///
    /// # Errors
    /// Why it does not stay.
    pub(super) async fn stay(
        self: &Arc<Self>,
        shop: &Arc<Workshop>,
        to: &To,
        mut handover: Handover,
        (watched, mask): (Watched, Mask),
    ) -> Result<(), Failure> {
        let machine = handover.machine.clone();
        let stays = async {
            if self.lock().kept.len() >= KEPT_MAX {
                let message = format!("this worker keeps {KEPT_MAX} machines already");
                return Err(Failure::new(FailureClass::Infrastructure, message));
            }
            let MayStay { stays_ms } = ask(to, &handover).await?;
            handover.stays_ms = stays_ms;
            handover.worker = Some(to.lease.worker.clone());
            self.adopt(shop, &to.lease, handover, (watched, mask)).await
        };
        let stayed = stays.await;
        if stayed.is_err() {
            discard(shop, &machine).await;
        }
        stayed
    }

    async fn adopt(
        self: &Arc<Self>,
        shop: &Arc<Workshop>,
        lease: &Lease,
        handover: Handover,
        (watched, mask): (Watched, Mask),
    ) -> Result<(), Failure> {
        let (attempt, end) = (lease.attempt.clone(), CancellationToken::new());
        {
            let mut state = self.lock();
            // Until the first heartbeat that names it was answered, the attempt's own lease says as much.
            let again = attempt.clone();
            state
                .fence
                .granted(again, lease.epoch, boot_ms(), CONFIRM_MS);
            let here = Here {
                epoch: lease.epoch,
                machine: handover.machine.clone(),
                end: end.clone(),
            };
            state.kept.insert(attempt.clone(), here);
        }
        self.changed.notify_waiters();
        let (ready, adopted) = oneshot::channel();
        let (shop, this, stop) = (Arc::clone(shop), Arc::clone(self), end.clone());
        let held = HeldLease {
            attempt,
            epoch: lease.epoch,
        };
        let runtime = tokio::runtime::Handle::current();
        // A thread of its own, as jobs have: it borrows parts of this host over its waits, and lives long.
        self.keepers.spawn_blocking(move || {
            let _watched = watched;
            let over = Over { this: &this, held };
            runtime.block_on(async {
                let told = |_: &kiln_proto::kept::Facts| {
                    let _nobody_waits = ready.send(());
                };
                let kept = keeper::keep(&shop.host, &shop.site, handover, mask, &stop, told);
                if let Err(failure) = kept.await {
                    tracing::warn!(%failure, "a machine is not kept any more");
                }
                say_gone(&shop, over).await;
            });
        });
        match tokio::time::timeout(ADOPT_TIMEOUT, adopted).await {
            Ok(Ok(())) => Ok(()),
            _ => {
                end.cancel();
                let message = "the machine could not be kept: its keeper did not take it";
                Err(Failure::new(FailureClass::Infrastructure, message))
            }
        }
    }

    /// Hands in what machines reached that were kept here, also before this process started; runs for ever.
    pub(super) async fn records(&self, shop: &Workshop) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let home = &shop.host.home.data;
            let left = hand_in(home, &shop.client, Some(shop.client.worker())).await;
            let again = match left {
                0 => None,
                _ => Some(RECORDS_AGAIN),
            };
            tokio::select! {
                () = changed => {}
                () = at(again) => {}
            }
        }
    }

    /// Answers calls while a machine is kept here, or a command attended; runs for ever.
    pub(super) async fn calls(self: &Arc<Self>, shop: &Arc<Workshop>) {
        let ways = Arc::new(Semaphore::new(WAYS_MAX));
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.lock().calls_nobody() {
                changed.await;
                continue;
            }
            let longest = Duration::from_millis(POLL_MS) + REQUEST_TIMEOUT;
            let asked = AwaitCalls::default();
            let path = "/worker/v1/machines/calls";
            let answer = shop.client.call::<_, Calls>(path, None, &asked, longest);
            match answer.await {
                Ok(Calls { calls }) => {
                    for call in calls.into_iter().take(WAYS_MAX) {
                        let Ok(slot) = Arc::clone(&ways).try_acquire_owned() else {
                            tracing::warn!("too many ways to machines of this worker are open");
                            break;
                        };
                        let (shop, this) = (Arc::clone(shop), Arc::clone(self));
                        tokio::spawn(async move {
                            let _slot = slot;
                            this.answer(&shop, call).await;
                        });
                    }
                }
                Err(error) => {
                    tracing::debug!(error = crate::orders::chain(&error), "nobody calls");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Opens one way, and joins it to the keeper's socket until either is over.
    async fn answer(&self, shop: &Workshop, call: MachineCall) {
        let MachineCall {
            way,
            attempt,
            epoch,
        } = call;
        let legal = !way.is_empty() && way.len() <= 64;
        if !legal || !way.bytes().all(|b| b.is_ascii_hexdigit()) {
            return;
        }
        let door = self.lock().door(&attempt, epoch);
        if let Some(door) = door {
            let path = format!("/worker/v1/machines/ways/{way}");
            match tokio::time::timeout(WAY_TIMEOUT, shop.client.upgrade(&path)).await {
                Ok(Ok(far)) => door.serve(Box::new(far)).await,
                Ok(Err(error)) => {
                    tracing::debug!(%attempt, error = crate::orders::chain(&error), "no way");
                }
                Err(_) => {}
            }
            return;
        }
        let (machine, end) = {
            let state = self.lock();
            let Some(here) = state.kept.get(&attempt).filter(|here| here.epoch == epoch) else {
                return;
            };
            (here.machine.clone(), here.end.clone())
        };
        let opened = async {
            let near = private_socket::connect(&socket_of(&shop.host.home.data, &machine)).await;
            let near = near.map_err(|error| LinkError::Unreachable(error.into()))?;
            let path = format!("/worker/v1/machines/ways/{way}");
            Ok::<_, LinkError>((near, shop.client.upgrade(&path).await?))
        };
        let opened = tokio::time::timeout(WAY_TIMEOUT, opened).await;
        let (mut near, mut far) = match opened {
            Ok(Ok(both)) => both,
            Ok(Err(error)) => {
                return tracing::debug!(%attempt, error = crate::orders::chain(&error), "no way");
            }
            Err(_) => return,
        };
        let joined = kiln_proto::relay::join(&mut far, &mut near, || {});
        tokio::pin!(joined);
        tokio::select! {
            _ended = &mut joined => return,
            () = end.cancelled() => {}
        }
        // What its keeper said last, how it ended above all, is on its way still; the keeper's end closes the rest.
        let _cut_off = tokio::time::timeout(LAST_WORDS, joined).await;
    }
}

impl State {
    fn calls_nobody(&self) -> bool {
        self.kept.is_empty() && self.attended.is_empty()
    }

    /// Where calls for an attempt that runs lead, under its own claim alone.
    fn door(&self, attempt: &AttemptId, epoch: Epoch) -> Option<Arc<Door>> {
        let (claim, door) = self.attended.get(attempt)?;
        (*claim == epoch).then(|| Arc::clone(door))
    }

    fn end(&mut self, attempt: &AttemptId, why: &str) {
        self.fence.ended(attempt);
        if let Some(here) = self.kept.get(attempt)
            && !here.end.is_cancelled()
        {
            tracing::warn!(%attempt, why, "a kept machine is destroyed");
            here.end.cancel();
        }
    }
}

/// That a command is attended.
#[derive(Debug)]
pub(super) struct AtDoor {
    staying: Arc<Staying>,
    attempt: AttemptId,
    door: Arc<Door>,
}

impl Drop for AtDoor {
    fn drop(&mut self) {
        self.staying.lock().attended.remove(&self.attempt);
        self.door.close();
    }
}

/// Gives up what a machine had when its keeper is over, however it ended.
struct Over<'a> {
    this: &'a Staying,
    held: HeldLease,
}

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let mut state = self.this.lock();
        state.fence.ended(&self.held.attempt);
        if let Some(here) = state.kept.remove(&self.held.attempt) {
            here.end.cancel();
        }
        drop(state);
        self.this.changed.notify_waiters();
    }
}

/// Tells the controller at once, once: it finds out by itself when this is lost.
async fn say_gone(shop: &Workshop, over: Over<'_>) {
    let gone = MachinesGone {
        gone: vec![over.held.clone()],
    };
    drop(over);
    let path = "/worker/v1/machines/gone";
    let client = &shop.client;
    let said = client.call::<_, serde_json::Value>(path, None, &gone, REQUEST_TIMEOUT);
    if let Err(error) = said.await {
        tracing::debug!(error = crate::orders::chain(&error), "not told");
    }
}

/// Completes after this time; never without one.
async fn at(again: Option<Duration>) {
    match again {
        Some(again) => tokio::time::sleep(again).await,
        None => std::future::pending().await,
    }
}

/// Whether the machine may stay.
async fn ask(to: &To, handover: &Handover) -> Result<MayStay, Failure> {
    let asked = KeepMachine {
        facts: Box::new(handover.clone()),
    };
    let path = job_path(&to.lease.attempt.job, "keep");
    let asking = async {
        loop {
            let lease = Some(&to.lease);
            let sent = to
                .client
                .call::<_, MayStay>(&path, lease, &asked, REQUEST_TIMEOUT);
            match sent.await {
                Ok(may) => return Ok(may),
                Err(error) if error.is_passing() => tokio::time::sleep(RETRY).await,
                Err(error) => return Err(error),
            }
        }
    };
    match tokio::time::timeout(ASK_TIMEOUT, asking).await {
        Ok(Ok(may)) => Ok(may),
        Ok(Err(LinkError::Refused { message, .. })) => {
            Err(Failure::new(FailureClass::Policy, message))
        }
        Ok(Err(error)) => Err(Failure::infrastructure(&error)),
        Err(_) => {
            let message = "the controller did not say whether the machine may stay";
            Err(Failure::new(FailureClass::Infrastructure, message))
        }
    }
}

/// Nobody else will.
async fn discard(shop: &Workshop, machine: &MachineName) {
    match shop.host.driver.adopt(machine).await {
        Ok(machine) => {
            let _next_reaper = machine.destroy().await;
        }
        // Its keeper has it, or its time is over soon.
        Err(error) => {
            tracing::debug!(%machine, error = crate::orders::chain(&error), "not adopted")
        }
    }
}
