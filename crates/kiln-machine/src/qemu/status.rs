//! A machine's state as the host sees it: what QEMU's events and its end mean.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Signal, pidfd_send_signal};
use serde_json::Value;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};

use super::console::Ring;
use super::qmp::{Event, Qmp};
use crate::driver::{MachineState, StopReason};

/// What the kernel says before it resets after a panic. It is the guest's word: for people, not for decisions.
const PANIC_WORDS: &str = "Kernel panic - not syncing";
/// How long after the process's end its last events are awaited.
const LAST_EVENTS: Duration = Duration::from_secs(1);

/// How far the saving of device state got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Migration {
    /// Not asked for, or under way.
    Pending,
    /// Everything is written or read.
    Completed,
    /// It failed.
    Failed,
}

/// Shared by a machine and its monitor.
#[derive(Debug)]
pub(crate) struct Status {
    state: watch::Sender<MachineState>,
    migration: watch::Sender<Migration>,
    reason: Mutex<Option<StopReason>>,
    pidfd: OwnedFd,
    /// Its owner let go of it: nothing here may end it any more.
    released: AtomicBool,
}

impl Status {
    /// State of a VMM that was just started.
    pub(crate) fn new(pidfd: OwnedFd) -> Arc<Self> {
        Arc::new(Self {
            state: watch::Sender::new(MachineState::Starting),
            migration: watch::Sender::new(Migration::Pending),
            reason: Mutex::new(None),
            pidfd,
            released: AtomicBool::new(false),
        })
    }

    pub(crate) fn state(&self) -> MachineState {
        *self.state.borrow()
    }

    /// Moves on; a final state stays.
    pub(crate) fn advance(&self, next: MachineState) {
        self.state.send_if_modified(|state| {
            let moves = !state.is_terminal() && *state != next;
            if moves {
                *state = next;
            }
            moves
        });
    }

    /// The first reason wins: what happens afterwards follows from it.
    pub(crate) fn set_reason(&self, reason: StopReason) {
        let mut slot = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert(reason);
    }

    fn reason(&self) -> Option<StopReason> {
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills the process, for this reason if there is none yet.
    pub(crate) fn kill(&self, reason: StopReason) {
        if self.state().is_terminal() || self.is_released() {
            return;
        }
        self.set_reason(reason);
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// The process runs on without this owner.
    pub(crate) fn release(&self) {
        self.released.store(true, Ordering::SeqCst);
        self.advance(MachineState::Stopped(StopReason::Released));
    }

    fn is_released(&self) -> bool {
        self.released.load(Ordering::SeqCst)
    }

    /// Waits for a final state.
    pub(crate) async fn stopped(&self) -> MachineState {
        let mut watch = self.state.subscribe();
        let state = watch.wait_for(|state| state.is_terminal()).await;
        state
            .map(|state| *state)
            .unwrap_or(MachineState::Stopped(StopReason::VmmDied))
    }

    /// Waits for a final state at most this long.
    pub(crate) async fn stopped_within(&self, deadline: Duration) -> Option<MachineState> {
        tokio::time::timeout(deadline, self.stopped()).await.ok()
    }

    /// Waits until device state is written or read, or the machine has stopped.
    pub(crate) async fn migrated(&self) -> Migration {
        let mut watch = self.migration.subscribe();
        tokio::select! {
            done = watch.wait_for(|state| *state != Migration::Pending) => {
                done.map(|state| *state).unwrap_or(Migration::Failed)
            }
            _ = self.stopped() => Migration::Failed,
        }
    }
}

/// The console and the task that reads it, which ends with the VMM.
#[derive(Debug)]
pub(crate) struct Console {
    pub(crate) ring: Ring,
    pub(crate) reader: tokio::task::JoinHandle<()>,
    /// What the VMM itself said.
    pub(crate) words: Ring,
}

/// Watches a VMM until its end. It is the only place where a machine's state becomes final.
pub(crate) async fn monitor(
    status: Arc<Status>,
    child: Option<Child>,
    mut events: mpsc::Receiver<Event>,
    qmp: Arc<Qmp>,
    console: Console,
) {
    let ended = watch_end(&status);
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(event) => heed(&status, &event, &qmp).await,
                None => break,
            },
            () = ended.wait() => break,
        }
    }
    if status.is_released() {
        drop((qmp, console));
        // It stays this process's child until it ends.
        if let Some(mut child) = child {
            ended.wait().await;
            let _ = tokio::task::spawn_blocking(move || child.wait()).await;
        }
        return;
    }
    // The socket may end before the process does, or the other way round.
    if tokio::time::timeout(LAST_EVENTS, ended.wait())
        .await
        .is_err()
    {
        status.kill(StopReason::VmmDied);
    }
    // An adopted one is another process's child: how it ended is not told.
    let mut reaped = None;
    if let Some(mut child) = child {
        let waited = tokio::task::spawn_blocking(move || child.wait()).await;
        reaped = waited.ok().and_then(io::Result::ok);
    }
    tracing::debug!(?reaped, "a VMM ended");
    while let Ok(Some(event)) = tokio::time::timeout(LAST_EVENTS, events.recv()).await {
        heed(&status, &event, &qmp).await;
    }
    // What the guest said last may still be on its way from the socket to the ring.
    let _ = tokio::time::timeout(LAST_EVENTS, console.reader).await;
    let reason = status.reason().unwrap_or(StopReason::VmmDied);
    let reason = refined(reason, &console.ring.text());
    if reason == StopReason::VmmDied {
        let line = obituary(reaped, &console.words);
        console.ring.push(line.as_bytes());
    }
    status.advance(MachineState::Stopped(reason));
}

/// The line of the console that says how a VMM ended which nobody here told to.
fn obituary(how: Option<ExitStatus>, words: &Ring) -> String {
    let how = how.map_or_else(|| "unknown".to_owned(), |how| how.to_string());
    let words = words.text();
    let words = words.trim();
    match words.is_empty() {
        true => format!("\nQEMU ended ({how}) without a word\n"),
        false => format!("\nQEMU ended ({how}): {words}\n"),
    }
}

fn watch_end(status: &Status) -> Ended {
    let registered = status.pidfd.try_clone().and_then(|pidfd| {
        #[expect(unsafe_code, reason = "a descriptor is registered with the runtime")]
        // SAFETY: an `OwnedFd` names the same open descriptor for as long as the `AsyncFd` owns it.
        let watched = unsafe { AsyncFd::register(pidfd) };
        watched.map_err(io::Error::from)
    });
    registered.map_or_else(Ended::Unwatched, Ended::Pidfd)
}

/// A way to learn of the process's end.
enum Ended {
    Pidfd(AsyncFd<OwnedFd>),
    Unwatched(io::Error),
}

impl Ended {
    async fn wait(&self) {
        match self {
            Self::Pidfd(pidfd) => {
                let _ = pidfd.readable().await;
            }
            Self::Unwatched(error) => {
                tracing::warn!(%error, "the end of a VMM cannot be watched, only its control socket's");
                std::future::pending::<()>().await;
            }
        }
    }
}

async fn heed(status: &Status, event: &Event, qmp: &Qmp) {
    let text = |key: &str| event.data[key].as_str().unwrap_or_default();
    match event.name.as_str() {
        "SHUTDOWN" => {
            if event.data["guest"].as_bool() == Some(true) {
                status.set_reason(shutdown_reason(text("reason")));
            }
            // Closes the disks in order.
            let _ = qmp.send("quit", Value::Null, None).await;
        }
        "BLOCK_IO_ERROR" if text("action") == "stop" => {
            tracing::warn!(
                device = text("node-name"),
                reason = text("reason"),
                "the host's disk failed under a machine"
            );
            status.kill(StopReason::HostIo);
        }
        // Nobody here stops a machine that runs, and what does (a full disk, the guest's end) was told before: QEMU could not go on,
        // for example because KVM gave up. A machine that stands still would be waited for until its job's end.
        "STOP" if status.state() == MachineState::Running && status.reason().is_none() => {
            tracing::warn!("QEMU stopped a machine by itself");
            status.kill(StopReason::VmmDied);
        }
        "MIGRATION" => match text("status") {
            "completed" => drop(status.migration.send_replace(Migration::Completed)),
            "failed" | "cancelled" => drop(status.migration.send_replace(Migration::Failed)),
            _ => {}
        },
        _ => {}
    }
}

fn shutdown_reason(word: &str) -> StopReason {
    match word {
        "guest-shutdown" => StopReason::PoweredOff,
        "guest-panic" => StopReason::GuestPanic,
        _ => StopReason::Reset,
    }
}

/// A reset after a panic is a panic. Asked only once the whole console was read.
fn refined(reason: StopReason, console: &str) -> StopReason {
    match reason {
        StopReason::Reset if console.contains(PANIC_WORDS) => StopReason::GuestPanic,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the machine of a stand-in process comes to by these events.
    async fn heeded(state: MachineState, events: &[(&str, Value)]) -> (Option<StopReason>, bool) {
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let pidfd = rustix::process::pidfd_open(
            rustix::process::Pid::from_child(&child),
            rustix::process::PidfdFlags::empty(),
        );
        let status = Status::new(pidfd.unwrap());
        status.advance(state);
        let (near, _far) = tokio::net::UnixStream::pair().unwrap();
        let (qmp, _events) = Qmp::new(near);
        for (name, data) in events {
            let event = Event {
                name: (*name).to_owned(),
                data: data.clone(),
            };
            heed(&status, &event, &qmp).await;
        }
        let signalled = status
            .reason()
            .is_some_and(|reason| matches!(reason, StopReason::HostIo | StopReason::VmmDied));
        if !signalled {
            child.kill().unwrap();
        }
        // Ends at once only when it was killed.
        child.wait().unwrap();
        (status.reason(), signalled)
    }

    #[tokio::test]
    async fn a_machine_that_qemu_stops_by_itself_ends_with_the_first_reason() {
        use serde_json::json;
        let stop = ("STOP", Value::Null);
        let full = (
            "BLOCK_IO_ERROR",
            json!({ "action": "stop", "nospace": true, "reason": "No space left on device" }),
        );
        let ignored = ("BLOCK_IO_ERROR", json!({ "action": "report" }));
        let off = (
            "SHUTDOWN",
            json!({ "guest": true, "reason": "guest-shutdown" }),
        );
        let running = MachineState::Running;
        let host_io = Some(StopReason::HostIo);
        assert_eq!(
            heeded(running, &[full.clone(), stop.clone()]).await,
            (host_io, true)
        );
        assert_eq!(heeded(running, &[ignored]).await, (None, false));
        let died = Some(StopReason::VmmDied);
        assert_eq!(heeded(running, &[stop.clone(), full]).await, (died, true));
        let powered_off = Some(StopReason::PoweredOff);
        assert_eq!(
            heeded(running, &[off, stop.clone()]).await,
            (powered_off, false)
        );
        assert_eq!(heeded(MachineState::Saving, &[stop]).await, (None, false));
    }

    #[tokio::test]
    async fn how_a_vmm_ended_by_itself_is_the_consoles_last_line() {
        let child = std::process::Command::new("sh")
            .args(["-c", "kill -ABRT $$"])
            .spawn()
            .unwrap();
        let pidfd = rustix::process::pidfd_open(
            rustix::process::Pid::from_child(&child),
            rustix::process::PidfdFlags::empty(),
        )
        .unwrap();
        let ended = rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN);
        rustix::event::poll(&mut [ended], None).unwrap();
        let status = Status::new(pidfd);
        let (near, far) = tokio::net::UnixStream::pair().unwrap();
        let (qmp, events) = Qmp::new(near);
        drop(far);
        let (ring, words) = (Ring::new(4096), Ring::new(4096));
        words.push(b"assertion failed: x\n");
        let console = Console {
            ring: ring.clone(),
            reader: tokio::spawn(async {}),
            words,
        };
        monitor(
            Arc::clone(&status),
            Some(child),
            events,
            Arc::new(qmp),
            console,
        )
        .await;
        assert_eq!(status.state(), MachineState::Stopped(StopReason::VmmDied));
        let text = ring.text();
        assert!(
            text.contains("SIGABRT") && text.ends_with("assertion failed: x\n"),
            "{text}"
        );
    }

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let reset = shutdown_reason("guest-reset");
        assert_eq!(refined(reset, "quiet"), StopReason::Reset);
        let words = "[ 1.0] Kernel panic - not syncing: x\n";
        assert_eq!(refined(reset, words), StopReason::GuestPanic);
        let off = shutdown_reason("guest-shutdown");
        assert_eq!(refined(off, words), StopReason::PoweredOff);
    }
}
