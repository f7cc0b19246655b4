//! One QEMU process as a [`Machine`].

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_core::{ByteSize, DiskRole, DiskSlot, MachineName, MachineSpec};
use serde_json::{Value, json};

use super::argv::{self, Accel};
use super::console::Ring;
use super::disks::{self, MachineDisk, Sets};
use super::qmp::{Qmp, QmpError};
use super::status::Status;
use super::{CHANNEL_SOCKET, save};
use crate::adopt;
use crate::driver::{
    BoxFuture, Channel, HostStats, Kept, LaunchError, LeakReport, Machine, MachineError,
    MachineState, StopReason, TemplateRef,
};
use crate::record::MachineDir;

/// Longest wait for the answer to one command.
pub(crate) const CONTROL_DEADLINE: Duration = Duration::from_secs(20);
/// What is asked of a machine that was not launched for it.
const NOT_KEEPABLE: &str = "keep a machine that was not launched to be kept";
/// Longest wait for a killed or quitting VMM.
pub(crate) const END_DEADLINE: Duration = Duration::from_secs(10);

/// Guest memory of a machine.
#[derive(Debug)]
pub(crate) enum Ram {
    /// Anonymous memory that the VMM shares with kiln: it can be saved.
    Own(OwnMemory),
    /// A template's file, mapped copy-on-write.
    Clone,
    /// Whatever an earlier owner gave it.
    Adopted,
}

/// What a template of a machine needs to know of it.
#[derive(Debug)]
pub(crate) struct OwnMemory {
    pub(crate) file: OwnedFd,
    pub(crate) cpus: u32,
    pub(crate) size: ByteSize,
    pub(crate) accel: Accel,
    /// The QEMU that runs it: see `program::Program::identity`.
    pub(crate) vmm: String,
}

/// What a machine is made of.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) ram: Ram,
    /// Number of the VMM process.
    pub(crate) pid: u32,
    /// Keeps the template from being pruned.
    pub(crate) _template: Option<std::fs::File>,
}

/// A running QEMU.
#[derive(Debug)]
pub(crate) struct QemuMachine {
    pub(crate) name: MachineName,
    pub(crate) dir: Arc<MachineDir>,
    /// The machine's directory: sockets are reached through it, because their paths may be too long.
    pub(crate) dir_fd: OwnedFd,
    pub(crate) body: Body,
    pub(crate) disks: Mutex<Vec<MachineDisk>>,
    /// Those that are added get their part of the machine's rate.
    pub(crate) disks_rated: bool,
    pub(crate) qmp: Arc<Qmp>,
    pub(crate) status: Arc<Status>,
    pub(crate) console: Ring,
    /// The connection of the present channel, to end it when another one is made.
    pub(crate) channel: Mutex<Option<StdUnixStream>>,
    pub(crate) next_set: AtomicU32,
    /// What can be kept beyond this owner.
    pub(crate) keepable: Option<Keepable>,
}

/// What a machine that may be kept has beyond others.
#[derive(Debug)]
pub(crate) struct Keepable {
    /// What the machine is made of; disks are those of the start.
    pub(crate) spec: MachineSpec,
    pub(crate) template: Option<TemplateRef>,
    /// Connections to control socket and console: ended on release, so that the next owner's are taken.
    pub(crate) connections: [OwnedFd; 2],
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl QemuMachine {
    pub(crate) fn disks(&self) -> MutexGuard<'_, Vec<MachineDisk>> {
        held(&self.disks)
    }

    /// Sends one command and waits for its answer.
    pub(crate) async fn control(
        &self,
        command: &'static str,
        arguments: Value,
    ) -> Result<Value, MachineError> {
        let answer = self.qmp.call(command, arguments, CONTROL_DEADLINE).await;
        answer.map_err(|error| self.control_error(command, error))
    }

    pub(crate) fn control_error(&self, command: &'static str, error: QmpError) -> MachineError {
        match self.status.state() {
            MachineState::Stopped(reason) => MachineError::Stopped(reason),
            _ => control_failure(command, error),
        }
    }

    /// Ends the channel's connection, if there is one.
    pub(crate) fn hang_up(&self) {
        if let Some(old) = held(&self.channel).take() {
            let _ = old.shutdown(std::net::Shutdown::Both);
        }
    }

    async fn connect(&self) -> Result<Channel, MachineError> {
        if let MachineState::Stopped(reason) = self.status.state() {
            return Err(MachineError::Stopped(reason));
        }
        self.hang_up();
        let path = format!("/proc/self/fd/{}/{CHANNEL_SOCKET}", self.dir_fd.as_raw_fd());
        let error = |source| MachineError::Io {
            action: "connect to",
            path: self.dir.path(CHANNEL_SOCKET),
            source,
        };
        // The listener's queue takes the connection at once, whether QEMU is up or not.
        let stream = StdUnixStream::connect(path).map_err(error)?;
        stream.set_nonblocking(true).map_err(error)?;
        *held(&self.channel) = Some(stream.try_clone().map_err(error)?);
        Ok(Box::new(
            tokio::net::UnixStream::from_std(stream).map_err(error)?,
        ))
    }

    pub(crate) async fn attach(&self, slot: &DiskSlot) -> Result<(), MachineError> {
        if self.disks().iter().any(|disk| disk.slot.role == slot.role) {
            return Err(MachineError::Unsupported("two disks of one role"));
        }
        let mut sets = Sets::from(self.next_set.load(Ordering::Relaxed));
        let prepared = MachineDisk::prepare(self.dir.dir(), slot, None)
            .and_then(|disk| Ok((disk.open(&mut sets, self.disks_rated)?, disk)));
        let (nodes, disk) = prepared.map_err(attach_error)?;
        self.next_set.store(sets.next(), Ordering::Relaxed);
        self.disks().push(disk);
        for (fd, set) in &sets.fds {
            let arguments = json!({ "fdset-id": set });
            let answer =
                self.qmp
                    .call_with_fd("add-fd", arguments, Some(fd.as_fd()), CONTROL_DEADLINE);
            answer
                .await
                .map_err(|error| self.control_error("add-fd", error))?;
        }
        for node in argv::block_nodes(&nodes) {
            self.control("blockdev-add", node).await?;
        }
        self.control("device_add", argv::block_device(&nodes))
            .await?;
        match self.kept() {
            Some(kept) => self.keep_until(kept),
            None => Ok(()),
        }
    }

    fn keep_until(&self, kept: Kept) -> Result<(), MachineError> {
        if let MachineState::Stopped(reason) = self.status.state() {
            return Err(MachineError::Stopped(reason));
        }
        let keepable = self.keepable.as_ref();
        let keepable = keepable.ok_or(MachineError::Unsupported(NOT_KEEPABLE))?;
        let mut spec = keepable.spec.clone();
        spec.disks = self.disks().iter().map(|disk| disk.slot.clone()).collect();
        adopt::keep(&self.dir, kept, &spec, keepable.template.as_ref())
    }

    fn let_go(&self) -> Result<(), MachineError> {
        if let MachineState::Stopped(reason) = self.status.state() {
            return Err(MachineError::Stopped(reason));
        }
        let Some(keepable) = self.keepable.as_ref().filter(|_| self.kept().is_some()) else {
            return Err(MachineError::Unsupported(NOT_KEEPABLE));
        };
        self.status.release();
        self.hang_up();
        for connection in &keepable.connections {
            let _ = rustix::net::shutdown(connection, rustix::net::Shutdown::Both);
        }
        self.dir.abandon();
        Ok(())
    }

    async fn end(&self, reason: StopReason) -> MachineState {
        self.status.kill(reason);
        let ended = self.status.stopped_within(END_DEADLINE).await;
        ended.unwrap_or_else(|| self.status.state())
    }

    async fn remove(&self) -> LeakReport {
        self.hang_up();
        self.end(StopReason::Killed).await;
        let dir = Arc::clone(&self.dir);
        let removed = tokio::task::spawn_blocking(move || dir.remove()).await;
        removed.unwrap_or_else(|error| LeakReport {
            leaks: vec![error.to_string()],
        })
    }
}

/// A failed command of a machine that has not stopped.
pub(crate) fn control_failure(command: &'static str, error: QmpError) -> MachineError {
    match error {
        QmpError::Timeout(deadline) => MachineError::Timeout {
            what: command,
            deadline,
        },
        error => MachineError::Control {
            command: command.to_owned(),
            why: match &error {
                QmpError::Io(source) => format!("{error}: {source}"),
                _ => error.to_string(),
            },
        },
    }
}

fn attach_error(error: LaunchError) -> MachineError {
    match error {
        LaunchError::Io {
            action,
            path,
            source,
        } => MachineError::Io {
            action,
            path,
            source,
        },
        LaunchError::DiskFull(path) => MachineError::Io {
            action: "make",
            path,
            source: io::ErrorKind::StorageFull.into(),
        },
        other => MachineError::Control {
            command: "attach a disk".to_owned(),
            why: other.to_string(),
        },
    }
}

impl Machine for QemuMachine {
    fn name(&self) -> &MachineName {
        &self.name
    }

    fn state(&self) -> MachineState {
        self.status.state()
    }

    fn stopped(&self) -> BoxFuture<'_, MachineState> {
        Box::pin(self.status.stopped())
    }

    fn channel(&self) -> BoxFuture<'_, Result<Channel, MachineError>> {
        Box::pin(self.connect())
    }

    fn attach_disk<'a>(&'a self, disk: &'a DiskSlot) -> BoxFuture<'a, Result<(), MachineError>> {
        Box::pin(self.attach(disk))
    }

    fn stats(&self) -> BoxFuture<'_, Result<HostStats, MachineError>> {
        Box::pin(async {
            if let MachineState::Stopped(reason) = self.status.state() {
                return Err(MachineError::Stopped(reason));
            }
            let pid = self.body.pid;
            let stats = tokio::task::spawn_blocking(move || read_stats(pid)).await;
            stats
                .unwrap_or_else(|error| Err(io::Error::other(error)))
                .map_err(|source| {
                    let path = PathBuf::from(format!("/proc/{pid}"));
                    MachineError::Io {
                        action: "read",
                        path,
                        source,
                    }
                })
        })
    }

    fn console_tail(&self) -> String {
        self.console.text()
    }

    fn into_template<'a>(
        &'a self,
        target: &'a TemplateRef,
    ) -> BoxFuture<'a, Result<(), MachineError>> {
        Box::pin(save::save(self, target))
    }

    fn stop(&self, deadline: Duration) -> BoxFuture<'_, MachineState> {
        Box::pin(async move {
            match self.status.stopped_within(deadline).await {
                Some(state) => state,
                None => self.end(StopReason::Killed).await,
            }
        })
    }

    fn take_disk(&self, role: DiskRole) -> Result<PathBuf, MachineError> {
        match self.status.state() {
            MachineState::Stopped(StopReason::PoweredOff) => disks::overlay_of(&self.disks(), role)
                .map_err(|source| MachineError::Io {
                    action: "take",
                    path: self.dir.path(&disks::file_name(role)),
                    source,
                }),
            MachineState::Stopped(reason) => Err(MachineError::Stopped(reason)),
            _ => Err(MachineError::Unsupported(
                "taking a disk of a machine that runs",
            )),
        }
    }

    fn keep(&self, kept: Kept) -> Result<(), MachineError> {
        self.keep_until(kept)
    }

    fn kept(&self) -> Option<Kept> {
        self.dir.record().kept.map(|kept| kept.kept)
    }

    fn release(&self) -> Result<(), MachineError> {
        self.let_go()
    }

    fn destroy(&self) -> BoxFuture<'_, LeakReport> {
        Box::pin(self.remove())
    }
}

impl Drop for QemuMachine {
    fn drop(&mut self) {
        // The directory's own drop waits for the process and removes everything.
        self.status.kill(StopReason::Killed);
    }
}

/// Memory and CPU of a process: proc_pid_smaps_rollup(5), proc_pid_stat(5).
fn read_stats(pid: u32) -> io::Result<HostStats> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib_of = |text: &str, name: &str| -> u64 {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    let kib = |name: &str| kib_of(&rollup, name);
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields are counted from the last parenthesis: the name may hold anything. User and system time are fields 14 and 15.
    let fields = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace();
    let ticks: u64 = fields
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Ok(HostStats {
        rss: ByteSize(kib("Rss") << 10),
        rss_peak: ByteSize(kib_of(&status, "VmHWM") << 10),
        pss: ByteSize(kib("Pss") << 10),
        cpu_ms: ticks * 1000 / per_second,
    })
}
