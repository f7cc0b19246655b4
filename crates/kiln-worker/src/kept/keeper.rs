//! The keeper of one machine: adopts it, serves its egress, answers whoever may ask, and ends it.
//!
//! It runs in a process of its own, because its machine must outlive the command that made it, and because everything a machine needs then ends with
//! that one process: its gateway, its socket, its deadline. It ends the machine at its deadline, when it is told to, when the guest breaks the
//! protocol or powers off; and its own death, by whatever signal, leaves the machine to the next command's reaper.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kiln_core::FailureClass;
use kiln_machine::bring_up::{self, Deadlines, Ready};
use kiln_machine::driver::{Kept, Machine};
use kiln_machine::ledger::{Need, Ticket};
use kiln_network::gateway::{Gateway, Services as KilnNames};
use kiln_network::record::EgressLog;
use kiln_proto::Session;
use kiln_proto::msg::Order;
use kiln_store::private_socket;
use rustix::time::{ClockId, clock_gettime};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::ask::Reply;
use super::container::Beside;
use super::egress::{self as records, NOTED_EVERY};
use super::incident::{self, Evidence};
use super::journal::Journal;
use super::{FACTS_FILE, Facts, Handover, LOG_FILE, SCHEMA, STAYS_MAX, dir_of, socket_of};
use crate::attempt::STOP_TIMEOUT;
use crate::connections::Bounds;
use crate::event::{Event, Events};
use crate::failure::Failure;
use crate::fleet::mask::Mask;
use crate::fleet::told;
use crate::host::{Host, QUEUE_TIMEOUT, now_unix_ms};
use crate::orders;
use crate::services::Services;
use crate::site::Site;

/// Most questions that are answered at once: commands, copies, connections to ports.
pub const CONNECTIONS_MAX: usize = 64;
/// How often the deadline is looked at: a timer would not run while the host sleeps.
const TICK: Duration = Duration::from_millis(500);
/// How long a machine is still kept once it has its keeper: from then on it ends with that process.
const UNKEEP: Duration = Duration::from_millis(50);
/// How long who asked for the end may take to read that it came.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long the connections of a machine that is gone may take to end, to be in its record.
const LAST_FLOWS: Duration = Duration::from_secs(2);
/// Pause after a connection that could not be taken: descriptors are short.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Milliseconds of a clock that never jumps and runs while the host sleeps.
fn boot_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds
        .saturating_mul(1000)
        .saturating_add(nanos / 1_000_000)
}

/// How somebody wants it to end.
#[derive(Debug)]
pub(super) enum Wish {
    /// Its guest powers off first.
    Stop,
    /// At once.
    Remove,
    /// At once, and what tells of it stays.
    Incident(String),
}

/// A wish, and how it is answered.
#[derive(Debug)]
pub(super) struct Wished {
    pub(super) wish: Wish,
    pub(super) answer: oneshot::Sender<Reply>,
    /// Ends when the answer was passed on.
    pub(super) told: oneshot::Receiver<()>,
}

/// What every question needs.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) facts: Facts,
    until_boot_ms: u64,
    pub(super) machine: Arc<dyn Machine>,
    pub(super) session: Session,
    pub(super) egress: Arc<EgressLog>,
    gateway: Gateway,
    /// What stands in no record.
    pub(super) mask: Mask,
    pub(super) beside: Option<Beside>,
    pub(super) journal: Journal,
    pub(super) busy: AtomicUsize,
    pub(super) wishes: mpsc::Sender<Wished>,
    home: PathBuf,
}

impl Held {
    /// Milliseconds until its deadline.
    pub(super) fn left_ms(&self) -> u64 {
        self.until_boot_ms.saturating_sub(boot_ms())
    }
}

/// Why it ends.
#[derive(Debug)]
enum End {
    Deadline,
    Told,
    Stopped(String),
    Asked(Wished),
}

/// Keeps a machine until its end. `ready` is told once whoever may can reach it; `mask` has the secrets that its records are told without.
///
/// # Errors
/// When the machine cannot be adopted; then it is kept for [`super::HANDOVER_MAX`] at most. Or when something of it could not be removed.
pub async fn keep(
    host: &Host,
    site: &Site,
    handover: Handover,
    mask: Mask,
    cancel: &CancellationToken,
    ready: impl FnOnce(&Facts) + Send,
) -> Result<(), Failure> {
    if handover.schema != SCHEMA {
        let message = "the machine was handed over by another version of kiln";
        return Err(Failure::new(FailureClass::Infrastructure, message));
    }
    let infrastructure = |error: &dyn std::error::Error| Failure::infrastructure(error);
    let adopted = bring_up::adopt(&*host.driver, &handover.machine, Deadlines::default());
    let Ready {
        machine,
        session,
        incoming,
        identity,
        ..
    } = adopted.await.map_err(|error| infrastructure(&error))?;
    // From here on the machine ends with this process: its record says no longer that it outlives its owner.
    let until_unix_ms = now_unix_ms().saturating_add(ms(UNKEEP));
    machine
        .keep(Kept {
            until_unix_ms,
            identity,
        })
        .map_err(|error| infrastructure(&error))?;

    let egress = Arc::new(EgressLog::new());
    let bounds = Bounds::of_kept(&handover);
    let mut config = bounds.gateway(handover.network.clone(), &egress);
    config.exceptions = site.exceptions();
    config.proxy = site.proxy.clone();
    config.services = KilnNames::default();
    let (events, told) = Events::channel();
    let gateway = Gateway::new(config);
    let services = Services::new(gateway.clone(), events.clone());
    let serving = services.serve(incoming);
    bounds.allow(&session, &events).await;
    let result = Box::pin(hold(
        host,
        handover,
        (machine, session),
        (egress, gateway, mask),
        told,
        cancel,
        ready,
    ))
    .await;
    serving.abort();
    result
}

async fn hold(
    host: &Host,
    handover: Handover,
    (machine, session): (Arc<dyn Machine>, Session),
    (egress, gateway, mask): (Arc<EgressLog>, Gateway, Mask),
    mut said: mpsc::Receiver<Event>,
    cancel: &CancellationToken,
    ready: impl FnOnce(&Facts) + Send,
) -> Result<(), Failure> {
    let home = host.home.data.clone();
    let dir = dir_of(&home, &handover.machine);
    let failed = |error: io::Error| Failure::infrastructure(&error);
    let beside = match &handover.runc {
        None => None,
        Some(runc) => {
            let read = Beside::read(&session, runc.clone(), &handover.secret_env).await;
            Some(read.map_err(|error| Failure::new(FailureClass::GuestFault, error.message))?)
        }
    };
    let facts = facts_of(handover);
    let journal = Journal::open(&dir.join(LOG_FILE)).map_err(failed)?;
    journal.note("kept", &facts.machine.ended);
    let listener =
        private_socket::listen(&socket_of(&home, &facts.machine.machine)).map_err(failed)?;
    write_facts(&dir, &facts).map_err(failed)?;
    let (wishes, mut wished) = mpsc::channel(1);
    let held = Arc::new(Held {
        until_boot_ms: boot_ms().saturating_add(facts.machine.stays_ms),
        facts,
        machine,
        session,
        egress,
        gateway,
        mask,
        beside,
        journal,
        busy: AtomicUsize::new(0),
        wishes,
        home,
    });
    ready(&held.facts);
    let room = tokio::spawn(room(host.ledger.clone(), held.facts.clone()));
    let noting = {
        let held = Arc::clone(&held);
        tokio::spawn(async move {
            while let Some(event) = said.recv().await {
                held.note_event(&event);
            }
        })
    };
    let recording = tokio::spawn(record(Arc::clone(&held)));
    let end = until_its_end(&held, listener, &mut wished, cancel).await;
    recording.abort();
    let result = finish(&held, end).await;
    noting.abort();
    room.abort();
    result
}

impl Held {
    /// What the guest tells: bounded by its sender.
    fn note_event(&self, event: &Event) {
        match event {
            Event::Warning { text } => self.journal.note("warning", text),
            Event::Note { text } | Event::Log { text, .. } => self.journal.note("guest", text),
            _ => {}
        }
    }
}

/// Writes down what the machine reaches, so that little is lost when this process is killed.
async fn record(held: Arc<Held>) {
    let mut every = tokio::time::interval(NOTED_EVERY);
    let mut noted = 0;
    loop {
        every.tick().await;
        let taken = held.egress.taken();
        if taken != noted {
            held.note_egress(false).await;
            noted = taken;
        }
    }
}

impl Held {
    /// What it reached until now, in one line.
    pub(super) fn egress_line(&self) -> String {
        let mut summary = self.egress.snapshot().summary();
        told::summary(&mut summary, &self.mask);
        summary.to_string()
    }

    /// Writes down what the machine reached until now. One that cannot be written is told in the log: the machine's work does not end with it.
    async fn note_egress(&self, over: bool) {
        let (home, machine) = (self.home.clone(), self.facts.machine.clone());
        let (record, mask) = (self.egress.snapshot(), self.mask.clone());
        let noting = move || records::note(&home, &machine, &record, over, &mask);
        let noted = tokio::task::spawn_blocking(noting).await;
        if let Err(error) = noted.map_err(io::Error::other).and_then(|noted| noted) {
            tracing::warn!(%error, "what a kept machine reached could not be written down");
        }
    }
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn facts_of(mut machine: Handover) -> Facts {
    machine.stays_ms = machine.stays_ms.min(ms(STAYS_MAX));
    let now = now_unix_ms();
    Facts {
        uid: rustix::process::geteuid().as_raw(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        since_unix_ms: now,
        until_unix_ms: now.saturating_add(machine.stays_ms),
        machine,
    }
}

fn write_facts(dir: &Path, facts: &Facts) -> io::Result<()> {
    super::write_whole(&dir.join(FACTS_FILE), &serde_json::to_vec(facts)?, false)
}

/// Holds room in the host's ledger for as long as this is not dropped. The machine runs meanwhile: it had its room a moment ago.
async fn room(ledger: kiln_machine::ledger::Ledger, facts: Facts) -> Option<Ticket> {
    let need = Need::of(facts.machine.cpus, facts.machine.memory);
    let ticket = ledger
        .acquire(need, facts.id(), QUEUE_TIMEOUT, |_| {})
        .await;
    match ticket {
        Ok(ticket) => {
            // Until the task is aborted.
            let _held = ticket;
            std::future::pending().await
        }
        Err(error) => {
            tracing::warn!(
                error = orders::chain(&error),
                "a kept machine has no room in the ledger"
            );
            None
        }
    }
}

async fn until_its_end(
    held: &Arc<Held>,
    listener: UnixListener,
    wished: &mut mpsc::Receiver<Wished>,
    cancel: &CancellationToken,
) -> End {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut tick = tokio::time::interval(TICK);
    let stopped = held.machine.stopped();
    let closed = held.session.closed();
    tokio::pin!(stopped, closed);
    loop {
        tokio::select! {
            state = &mut stopped => return End::Stopped(format!("its machine stopped: {state:?}")),
            reason = &mut closed => return End::Stopped(format!("its channel ended: {reason}")),
            () = cancel.cancelled() => return End::Told,
            Some(wish) = wished.recv() => return End::Asked(wish),
            _ = tick.tick() => if held.left_ms() == 0 { return End::Deadline },
            accepted = listener.accept() => match accepted {
                Ok((asker, _)) => admit(held, &slots, asker),
                Err(_) => tokio::time::sleep(ACCEPT_AGAIN).await,
            },
        }
    }
}

/// Only the user who owns it is answered, and at most so many at once.
fn admit(held: &Arc<Held>, slots: &Arc<Semaphore>, asker: UnixStream) {
    let peer = asker.peer_cred().map(|peer| peer.uid());
    if !matches!(peer, Ok(uid) if is_owner(uid, held.facts.uid)) {
        held.journal
            .note("refused", "somebody who is not its owner asked");
        return;
    }
    let slot = Arc::clone(slots).try_acquire_owned();
    let held = Arc::clone(held);
    tokio::spawn(async move {
        let Ok(_slot) = slot else {
            return super::doors::too_many(asker).await;
        };
        held.busy.fetch_add(1, Ordering::Relaxed);
        super::doors::serve(&held, asker).await;
        held.busy.fetch_sub(1, Ordering::Relaxed);
    });
}

/// Nobody else, not even the host's root: who became root is asked to become the owner.
fn is_owner(uid: u32, owner: u32) -> bool {
    uid == owner
}

async fn finish(held: &Held, end: End) -> Result<(), Failure> {
    let (why, wished) = match end {
        End::Deadline => ("its time was over".to_owned(), None),
        End::Told => ("its keeper was told to end".to_owned(), None),
        End::Stopped(why) => (why, None),
        End::Asked(wished) => ("somebody asked for its end".to_owned(), Some(wished)),
    };
    held.journal.note("ends", &why);
    if matches!(
        &wished,
        Some(Wished {
            wish: Wish::Stop,
            ..
        })
    ) {
        // The answer may never arrive: the machine's end is what counts.
        let _answer =
            orders::call(&held.session, "power off", &Order::Shutdown, STOP_TIMEOUT).await;
        let _state = held.machine.stop(STOP_TIMEOUT).await;
    }
    let evidence = match &wished {
        Some(Wished {
            wish: Wish::Incident(note),
            ..
        }) => Some(Evidence::take(held, &held.home, note)),
        _ => None,
    };
    held.session.close(0, "the machine is not kept any more");
    let report = held.machine.destroy().await;
    // Connections are recorded when they end, as they do now.
    let _cut_off = tokio::time::timeout(LAST_FLOWS, held.gateway.idle()).await;
    held.note_egress(true).await;
    let incident =
        evidence.map(|evidence| incident::preserve(&held.home, &evidence, &report.leaks));
    let incident = match incident {
        None => None,
        Some(Ok(dir)) => Some(dir),
        Some(Err(error)) => {
            tracing::warn!(%error, "what tells of an incident could not be kept");
            None
        }
    };
    let leaks = report.leaks;
    if let Some(Wished { answer, told, .. }) = wished {
        let leaks = leaks.clone();
        let _asker_gone = answer.send(Reply::Gone { leaks, incident });
        let _asker_slow = tokio::time::timeout(LAST_WORDS, told).await;
    }
    match leaks.first() {
        None => Ok(()),
        Some(leak) => {
            let message = format!("something of the machine could not be removed: {leak}");
            Err(Failure::new(FailureClass::Infrastructure, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_owner_is_answered() {
        assert!(is_owner(1000, 1000) && is_owner(0, 0));
        assert!(!is_owner(1001, 1000) && !is_owner(0, 1000) && !is_owner(1000, 0));
    }

    #[test]
    fn a_mistaken_time_is_cut() {
        let asked = Handover {
            stays_ms: u64::MAX,
            ..super::super::sample("ra1-1-run").machine
        };
        let facts = facts_of(asked);
        assert_eq!(facts.machine.stays_ms, ms(STAYS_MAX));
        assert!(facts.until_unix_ms > facts.since_unix_ms);
    }
}
