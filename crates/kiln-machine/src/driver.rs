//! The one door to every VMM: [`Driver`] starts machines, [`Machine`] is one of them.
//!
//! A driver knows how a virtual machine is started, copied and destroyed. It knows nothing of jobs, tenants,
//! policies or what rides on the channel. Optional powers are declared in [`Capabilities`], never guessed.
//! Read next: `bring_up` (hello, identity, thaw), `qemu` and `sim` (the drivers), `record` and `reap` (crashes).

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use kiln_core::{ByteSize, DiskRole, MachineName, MachineSpec};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};

/// A future that can cross threads; the trait is used as `dyn`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Both directions of a byte stream.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// The machine's one channel.
pub type Channel = Box<dyn Duplex>;

/// A kind of virtual machine monitor.
pub trait Driver: Send + Sync + fmt::Debug {
    /// `qemu`, `sim`.
    fn name(&self) -> &'static str;

    /// What this host offers. May boot a tiny guest once and remember the verdict.
    fn probe(&self) -> BoxFuture<'_, HostProbe>;

    /// What this driver can do on this host.
    fn capabilities(&self) -> Capabilities;

    /// Refuses a specification this driver cannot start, before any side effect. A template that does not fit it (any more) is
    /// [`SpecRefused::Stale`]: remove it and make it again.
    ///
    /// # Errors
    /// The first thing that does not fit.
    fn validate(&self, spec: &MachineSpec, start: &Start) -> Result<(), SpecRefused>;

    /// Starts a machine. When the future is dropped or fails, nothing is left behind.
    fn launch<'a>(
        &'a self,
        spec: &'a MachineSpec,
        start: Start,
    ) -> BoxFuture<'a, Result<Arc<dyn Machine>, LaunchError>>;

    /// What a template of this driver depends on beyond the specification: VMM, accelerator, CPU. Part of a template's key.
    fn template_facts(&self) -> BoxFuture<'_, Vec<(String, String)>> {
        Box::pin(async { Vec::new() })
    }

    /// Finds machines whose owner died, in this driver's home, and removes every trace of them.
    fn reap(&self) -> BoxFuture<'_, ReapReport>;
}

/// How a machine starts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Start {
    /// Boot from nothing.
    Cold,
    /// Map a template's memory copy-on-write. The machine wakes with its workload frozen and the template's identity.
    Template(TemplateRef),
}

/// A finished template of some driver. Opaque outside it: a directory and the key it was made for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TemplateRef {
    /// Everything the template depends on, hashed: see `template::TemplateKey`.
    pub key: String,
    /// Where the driver keeps it.
    pub dir: PathBuf,
}

/// One running machine. Dropping the last handle kills it and removes its files.
pub trait Machine: Send + Sync + fmt::Debug {
    /// Its name.
    fn name(&self) -> &MachineName;

    /// Where it stands now.
    fn state(&self) -> MachineState;

    /// Completes when the machine has stopped, for whatever reason; gives the final state.
    fn stopped(&self) -> BoxFuture<'_, MachineState>;

    /// Connects to the channel. A later call replaces an earlier connection.
    fn channel(&self) -> BoxFuture<'_, Result<Channel, MachineError>>;

    /// Adds a disk while the machine runs. Needs [`Capabilities::hotplug_disk`].
    fn attach_disk<'a>(
        &'a self,
        disk: &'a kiln_core::DiskSlot,
    ) -> BoxFuture<'a, Result<(), MachineError>>;

    /// What the host measures.
    fn stats(&self) -> BoxFuture<'_, Result<HostStats, MachineError>>;

    /// The last bytes of the console, at most [`CONSOLE_BYTES_MAX`].
    fn console_tail(&self) -> String;

    /// Stops the machine, saves memory and device state, and makes a template of it. The machine is gone afterwards.
    /// `target.dir` is an empty directory that the driver fills; [`crate::template`] makes it appear whole.
    #[expect(
        clippy::wrong_self_convention,
        reason = "others may hold the handle too; it is dead for all of them"
    )]
    fn into_template<'a>(
        &'a self,
        target: &'a TemplateRef,
    ) -> BoxFuture<'a, Result<(), MachineError>>;

    /// Waits for the guest to power off by itself, at most this long, then kills it.
    fn stop(&self, deadline: Duration) -> BoxFuture<'_, MachineState>;

    /// The file with a forked or new disk's writes, after the machine has stopped. The caller moves it away before `destroy`.
    fn take_disk(&self, role: DiskRole) -> Result<PathBuf, MachineError>;

    /// Kills the machine if it still runs and removes every trace. Idempotent.
    fn destroy(&self) -> BoxFuture<'_, LeakReport>;
}

/// Bytes of console output that are kept.
pub const CONSOLE_BYTES_MAX: usize = 64 * 1024;

/// Where a machine stands.
///
/// ```text
/// Preparing -> Starting -> Running -> Stopped(..)   any -> Stopped(Killed)
///                             `-> Saving -> Stopped(Saved)
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// Disks, sockets and limits are being made.
    Preparing,
    /// The VMM starts; the guest does not run yet.
    Starting,
    /// The guest runs.
    Running,
    /// Memory and device state are being written.
    Saving,
    /// Nothing runs any more. Final.
    Stopped(StopReason),
}

/// Why a machine stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The guest powered off.
    PoweredOff,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest reset itself.
    Reset,
    /// kiln killed it.
    Killed,
    /// It became a template.
    Saved,
    /// The VMM ended by itself or was killed by somebody else.
    VmmDied,
    /// The host ran out of space or its disk failed under the machine.
    HostIo,
}

/// What a driver can do. A closed set: a new power is a new field.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Capabilities {
    /// Machines can be made from templates.
    pub templates: bool,
    /// Disks can be added while a machine runs.
    pub hotplug_disk: bool,
    /// The guest kernel is told that it was cloned.
    pub vmgenid: bool,
    /// The VMM runs as a user of its own.
    pub own_user: bool,
    /// CPU, memory and process limits hold on the VMM process.
    pub cgroup: bool,
    /// Most machines at once; 0 means no limit of the driver's own.
    pub machines_max: u32,
}

/// How fast the host can run a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// KVM boots guests.
    Kvm,
    /// `/dev/kvm` opens but does not boot a guest: emulation is used.
    KvmBroken,
    /// No usable `/dev/kvm`: emulation is used.
    Emulation,
    /// No hardware: the simulated driver.
    Simulated,
}

/// What a driver found on this host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostProbe {
    /// The driver.
    pub driver: String,
    /// The accelerator, by a guest that was really booted.
    pub accelerator: Accelerator,
    /// Version of the VMM.
    pub vmm_version: String,
    /// Time of the probe's boot, milliseconds, if one was made.
    pub boot_probe_ms: Option<u64>,
    /// Each fact with a hint where something is missing.
    pub checks: Vec<Check>,
}

/// One line of `kiln doctor`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Check {
    /// Short stable name.
    pub name: String,
    /// How it stands.
    pub level: CheckLevel,
    /// What was found.
    pub found: String,
    /// How to mend it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// How a check stands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckLevel {
    /// Holds.
    Pass,
    /// Works without it, with less speed or isolation.
    Warn,
    /// Does not work without it.
    Fail,
}

/// What the host measures of a machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HostStats {
    /// Resident bytes of the VMM process.
    pub rss: ByteSize,
    /// Proportional bytes: shared pages counted by share.
    pub pss: ByteSize,
    /// CPU time, milliseconds.
    pub cpu_ms: u64,
}

/// What `destroy` could not remove. Empty is the only good answer.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LeakReport {
    /// Paths, process ids or cgroups that are still there, in words.
    pub leaks: Vec<String>,
}

/// What a reaper did.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ReapReport {
    /// Machines whose owner was gone, and that were removed.
    pub reaped: Vec<String>,
    /// What could not be removed.
    pub leaks: Vec<String>,
}

/// Why a specification is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecRefused {
    /// Two disks have the same role.
    #[error("two disks have the role {0:?}")]
    DuplicateRole(DiskRole),
    /// A file is missing.
    #[error("{what} {path:?} does not exist or is not a regular file")]
    MissingFile {
        /// Kernel, initrd or a disk's role.
        what: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The template was made of something else.
    #[error("the template does not fit this machine: {0}")]
    Stale(String),
    /// The driver lacks a power.
    #[error("this driver cannot: {0}")]
    Unsupported(&'static str),
    /// A number is out of range.
    #[error("{what} is {asked}, but must be {range}")]
    OutOfRange {
        /// Which number.
        what: &'static str,
        /// What was asked.
        asked: u64,
        /// What is possible.
        range: String,
    },
}

/// Why a machine did not start.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Refused before any side effect.
    #[error("the machine's specification was refused")]
    Refused(#[from] SpecRefused),
    /// The VMM program is missing or too old.
    #[error("{program} is missing or unusable: {why}")]
    Vmm {
        /// Program.
        program: String,
        /// What is wrong.
        why: String,
    },
    /// A file, directory or socket could not be made.
    #[error("could not {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The host's disk is full.
    #[error("no space left on the host at {0:?}")]
    DiskFull(PathBuf),
    /// The VMM ended before the guest ran.
    #[error("the VMM ended while starting: {stderr}")]
    VmmDied {
        /// Its last words, bounded.
        stderr: String,
    },
    /// A template is damaged or of another version. It should be removed and made again.
    #[error("template {key} cannot be used: {why}")]
    Template {
        /// Which.
        key: String,
        /// Why.
        why: String,
    },
    /// It took too long.
    #[error("the machine did not start within {0:?}")]
    Timeout(Duration),
}

/// What can go wrong with a running machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// It has stopped.
    #[error("the machine has stopped: {0:?}")]
    Stopped(StopReason),
    /// The driver lacks a power.
    #[error("this driver cannot: {0}")]
    Unsupported(&'static str),
    /// The control socket failed.
    #[error("{command} failed: {why}")]
    Control {
        /// The command sent.
        command: String,
        /// The answer.
        why: String,
    },
    /// A file or socket operation failed.
    #[error("could not {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// It took too long.
    #[error("{what} did not finish within {deadline:?}")]
    Timeout {
        /// What.
        what: &'static str,
        /// How long was waited.
        deadline: Duration,
    },
}

impl MachineState {
    /// Whether nothing can change any more.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Stopped(_))
    }
}
