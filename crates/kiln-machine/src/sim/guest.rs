//! The simulated guest: waits for a host, serves its streams, and meets its faults.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_proto::frame::Frame;
use kiln_proto::msg::{GuestError, GuestErrorCode, GuestEvent, feature, kind};
use kiln_proto::mux::RESET_REFUSED;
use kiln_proto::preamble::{RunScanner, Scan};
use kiln_proto::{Hello, Inbound, Incoming, Session, SessionLimits, Stream, write_msg};
use tokio::io::AsyncReadExt as _;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;

use super::fault::{Fault, Lie, Step, Trouble, Violation};
use super::memory::Memory;
use super::port::Port;
use super::script::Script;
use super::{exec, orders, tree};
use crate::driver::{CONSOLE_BYTES_MAX, StopReason};

/// Events that wait for a host that reads slowly; older ones are lost.
const EVENTS_KEPT: usize = 64;

/// What this guest says it can do.
const FEATURES: &[&str] = &[
    feature::REIDENTIFY,
    feature::EXEC,
    feature::TREE,
    feature::FORWARD,
    feature::EGRESS,
    feature::BUILDKIT,
    feature::CONTAINER,
    feature::SECRET_FILES,
    feature::WORK,
];

/// One simulated guest. Its tasks end with the [`watch`] on its power.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) port: Port,
    pub(super) script: Script,
    faults: Vec<Fault>,
    memory: Mutex<Memory>,
    power: watch::Sender<Option<StopReason>>,
    session: Mutex<Option<Session>>,
    events: broadcast::Sender<GuestEvent>,
    console: Mutex<String>,
    streams_open: AtomicU32,
}

impl Guest {
    pub(super) fn new(memory: Memory, faults: Vec<Fault>, script: Script) -> Self {
        let cut = faults.iter().find_map(|fault| match fault {
            Fault::ChannelDiesAfter { bytes } => Some(*bytes),
            _ => None,
        });
        Self {
            port: Port::dying_after(cut),
            script,
            faults,
            memory: Mutex::new(memory),
            power: watch::Sender::new(None),
            session: Mutex::new(None),
            events: broadcast::Sender::new(EVENTS_KEPT),
            console: Mutex::new(String::new()),
            streams_open: AtomicU32::new(0),
        }
    }

    /// Boots, then serves one host after the other.
    pub(super) async fn run(self: Arc<Self>, boot_time: Duration) {
        self.print("kiln sim guest: boots");
        if let Err(error) = self.meet(Step::Boot, 1).await {
            self.print(&format!("kiln sim guest: boot failed: {}", error.message));
            self.power_off(StopReason::GuestPanic);
        }
        tokio::time::sleep(boot_time).await;
        self.print("kiln sim guest: ready");
        while !self.port.is_closed() {
            if self.trouble_at(Step::Hello).is_some() {
                self.break_hello().await;
            }
            let boot_id = self.memory().boot_id.clone();
            let hello = Hello::new("sim", &boot_id, FEATURES);
            let accepted = Session::accept(self.port.clone(), hello, SessionLimits::default());
            if let Ok((session, incoming)) = accepted.await {
                self.serve(session, incoming).await;
            }
        }
    }

    async fn serve(self: &Arc<Self>, session: Session, mut incoming: Incoming) {
        *self.lock_session() = Some(session.clone());
        let mut tasks = JoinSet::new();
        // Subscribed before any order is served: no event is lost.
        tasks.spawn(send_events(session.clone(), self.events.subscribe()));
        loop {
            tokio::select! {
                next = incoming.next() => match next {
                    Some(inbound) => {
                        tasks.spawn(Arc::clone(self).serve_stream(inbound));
                    }
                    None => break,
                },
                Some(_) = tasks.join_next() => {}
            }
        }
        // Dropping the tasks ends what still runs: its host has gone.
        drop(tasks);
        *self.lock_session() = None;
        session.closed().await;
    }

    async fn serve_stream(self: Arc<Self>, inbound: Inbound) {
        self.streams_open.fetch_add(1, Ordering::Relaxed);
        let _open = OpenStream(Arc::clone(&self));
        match inbound.kind {
            kind::CALL => orders::serve(&self, inbound).await,
            kind::EXEC => exec::serve(&self, inbound).await,
            kind::PUT_TREE => tree::serve_put(&self, inbound).await,
            kind::GET_TREE => tree::serve_get(&self, inbound).await,
            kind::PUT_FILE => tree::serve_file(&self, inbound).await,
            kind::FORWARD => exec::serve_forward(&self, inbound).await,
            _ => inbound.stream.reset(RESET_REFUSED, "no such kind"),
        }
    }

    /// Tells the host, if one listens.
    pub(super) fn event(&self, event: GuestEvent) {
        // Without a host nobody listens: events are not kept.
        let _ = self.events.send(event);
    }

    /// Lets the faults of a step strike. Returns when the guest may go on; with an error when it must refuse.
    pub(super) async fn meet(&self, step: Step, stream: u32) -> Result<(), GuestError> {
        self.meet_slow().await;
        match self.trouble_at(step) {
            None => Ok(()),
            Some(Trouble::Refuses(code)) => Err(GuestError {
                code,
                message: format!("the simulated guest refuses at {step:?}"),
            }),
            Some(Trouble::Stops(reason)) => {
                self.power_off(reason);
                std::future::pending().await
            }
            Some(Trouble::Silent) => {
                self.port.silence();
                std::future::pending().await
            }
            Some(Trouble::Violates(violation)) => {
                self.port.hijack(&violation.bytes(stream)).await;
                std::future::pending().await
            }
        }
    }

    /// Takes the time that a slow guest takes.
    pub(super) async fn meet_slow(&self) {
        for fault in &self.faults {
            if let Fault::Slow { per_step } = fault {
                tokio::time::sleep(*per_step).await;
            }
        }
    }

    fn trouble_at(&self, step: Step) -> Option<Trouble> {
        self.faults.iter().find_map(|fault| match fault {
            Fault::At(at, trouble) if *at == step => Some(*trouble),
            _ => None,
        })
    }

    /// Meets a fault at the greeting. A violation there follows a correct echo: before the echo a host ignores everything.
    async fn break_hello(&self) {
        if let Some(Trouble::Violates(violation)) = self.trouble_at(Step::Hello) {
            let mut scanner = RunScanner::default();
            let mut port = self.port.clone();
            let mut seen = Vec::new();
            let echo = loop {
                match scanner.scan(&seen) {
                    Scan::Found(preamble, _) => break preamble.echo(),
                    Scan::Consumed(taken) => drop(seen.drain(..taken)),
                }
                let mut buffer = [0; 4096];
                match port.read(&mut buffer).await {
                    Ok(count) if count > 0 => seen.extend_from_slice(&buffer[..count]),
                    _ => return,
                }
            };
            let mut bytes = echo.to_vec();
            match violation {
                Violation::NotJson => Frame::Hello(b"hello").encode_into(&mut bytes),
                other => bytes.extend(other.bytes(1)),
            }
            self.port.hijack(&bytes).await;
            std::future::pending().await
        }
        // The others strike before any answer.
        let knock = self.port.clone().read(&mut [0; 1]).await;
        if knock.is_ok_and(|count| count > 0) {
            let _ = self.meet(Step::Hello, 1).await;
        }
    }

    pub(super) fn lies(&self, lie: Lie) -> bool {
        self.faults.contains(&Fault::Lies(lie))
    }

    /// The machine ends for this reason. The first one counts.
    pub(super) fn power_off(&self, reason: StopReason) {
        if reason == StopReason::GuestPanic {
            self.print("Kernel panic - not syncing: simulated");
        }
        self.power.send_if_modified(|power| {
            let first = power.is_none();
            power.get_or_insert(reason);
            first
        });
    }

    pub(super) fn power(&self) -> watch::Receiver<Option<StopReason>> {
        self.power.subscribe()
    }

    /// Whether a command may run: not while the workload is frozen.
    pub(super) fn may_run(&self) -> Result<(), GuestError> {
        let mut memory = self.memory();
        if !memory.frozen {
            return Ok(());
        }
        if self.lies(Lie::FalselyFrozen) {
            memory.workload_ran += 1;
            return Ok(());
        }
        Err(GuestError {
            code: GuestErrorCode::Invalid,
            message: "the workload is frozen".to_owned(),
        })
    }

    /// Streams open besides the one that asks.
    pub(super) fn other_streams(&self) -> u32 {
        self.streams_open.load(Ordering::Relaxed).saturating_sub(1)
    }

    /// Opens a stream to the host.
    pub(super) async fn open(&self, kind: u8, payload: &[u8]) -> Result<Stream, GuestError> {
        let session = self.lock_session().clone();
        let refused = |message: String| GuestError {
            code: GuestErrorCode::System,
            message,
        };
        let session = session.ok_or_else(|| refused("no host is connected".to_owned()))?;
        session
            .open(kind, payload)
            .await
            .map_err(|error| refused(error.to_string()))
    }

    pub(super) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_session(&self) -> MutexGuard<'_, Option<Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line on the console.
    pub(super) fn print(&self, line: &str) {
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        console.push_str(line);
        console.push('\n');
        if let Some(excess) = console.len().checked_sub(CONSOLE_BYTES_MAX) {
            let cut = (excess..=console.len())
                .find(|at| console.is_char_boundary(*at))
                .unwrap_or(0);
            console.drain(..cut);
        }
    }

    pub(super) fn console(&self) -> String {
        self.console
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Counts a stream down when its task ends, however it ends.
struct OpenStream(Arc<Guest>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.streams_open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Sends events on a stream of their own until the session ends.
async fn send_events(session: Session, mut events: broadcast::Receiver<GuestEvent>) {
    let Ok(mut stream) = session.open(kind::EVENTS, b"").await else {
        return;
    };
    loop {
        match events.recv().await {
            Ok(event) => {
                if write_msg(&mut stream, &event).await.is_err() {
                    return;
                }
            }
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}
