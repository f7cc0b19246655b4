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

    /// Finds machines whose owner died, in this driver's home, and removes every trace of them. Kept ones ([`Machine::keep`]) stay until
    /// their time is over or their VMM is gone.
    fn reap(&self) -> BoxFuture<'_, ReapReport>;

    /// Kept machines of this driver's home that nobody owns now: what [`Self::adopt`] can take.
    fn adoptable(&self) -> BoxFuture<'_, Vec<MachineName>>;

    /// Becomes the owner of a kept machine whose owner died or let go of it. Of several who try at once one succeeds. The handle can what
    /// the first owner's could, except make a template. Which guest answers is for [`crate::bring_up::adopt`] to find out.
    ///
    /// # Errors
    /// [`AdoptError`]. The machine stays as it was, kept until its time is over, but for [`AdoptError::Gone`]: then it is removed.
    fn adopt<'a>(
        &'a self,
        name: &'a MachineName,
    ) -> BoxFuture<'a, Result<Arc<dyn Machine>, AdoptError>>;
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

/// One running machine. Dropping the last handle kills it and removes its files, also when it is kept: [`Machine::release`] lets it live.
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

    /// From now on the machine outlives its owner's death until the given time, to be adopted. Needs a machine that was launched with
    /// [`MachineSpec::keepable`] or adopted; until this call a reaper takes it for an ordinary one. A later call sets another time.
    ///
    /// # Errors
    /// When it was not launched for that, does not run, or the time is not within the next [`KEEP_MAX`].
    fn keep(&self, kept: Kept) -> Result<(), MachineError>;

    /// Until when it is kept, and as whom.
    fn kept(&self) -> Option<Kept>;

    /// Lets go of a kept machine, as the owner's death would: it runs on, without an owner. This handle's state is
    /// [`StopReason::Released`] from then on.
    ///
    /// # Errors
    /// When it is not kept or has stopped.
    fn release(&self) -> Result<(), MachineError>;

    /// Kills the machine if it still runs and removes every trace. Idempotent.
    fn destroy(&self) -> BoxFuture<'_, LeakReport>;
}

/// Longest time from now for which a machine may be kept: a mistaken deadline is no leak. It can be set anew any time.
pub const KEEP_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Until when a machine outlives its owner, and who its guest is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kept {
    /// Milliseconds since the Unix epoch. What counts is the time that is left when it is set: a wall clock that jumps afterwards ends
    /// nothing and prolongs nothing.
    pub until_unix_ms: u64,
    /// The identity that the guest has proved to have: an adopter compares.
    pub identity: PublicIdentity,
}

/// The parts of a guest's identity that are no secret.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PublicIdentity {
    /// Boot id.
    pub boot_id: String,
    /// Machine id.
    pub machine_id: String,
    /// Host name.
    pub hostname: String,
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
    /// Its owner let go of it: it runs on, for another one to adopt.
    Released,
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
    /// Machines can outlive their owner and be adopted by another.
    pub adopt: bool,
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
    /// The most bytes that were ever resident.
    pub rss_peak: ByteSize,
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

/// Why a machine could not be adopted.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// There is none of this name, or its record cannot be read.
    #[error("there is no machine {0}")]
    Unknown(MachineName),
    /// It belongs to another driver.
    #[error("machine {name} was made by driver {driver:?}")]
    OtherDriver {
        /// Which.
        name: MachineName,
        /// By whom.
        driver: String,
    },
    /// It ends with its owner.
    #[error("machine {0} is not kept")]
    NotKept(MachineName),
    /// Its owner lives, or another adopter was first.
    #[error("machine {0} has an owner")]
    Owned(MachineName),
    /// Its time is over: it is the reaper's now.
    #[error("machine {0} was kept until a time that has passed")]
    Expired(MachineName),
    /// It ended while nobody owned it. It was removed.
    #[error("machine {name} is gone: {why}")]
    Gone {
        /// Which.
        name: MachineName,
        /// How that shows.
        why: String,
    },
    /// Its VMM does not answer.
    #[error("the VMM of machine {name} cannot be controlled")]
    Control {
        /// Which.
        name: MachineName,
        /// Why.
        #[source]
        source: MachineError,
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
