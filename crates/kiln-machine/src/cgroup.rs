//! A cgroup of its own for each VMM: limits on CPU, memory and processes that hold on the host, whatever the guest does.
//!
//! Version 2 is used where a group may be made with the controllers in it (a delegated subtree, or root), else the separate
//! hierarchies of version 1, else none; a process that is alone in a delegated group makes itself a leaf there first, because
//! a group with processes of its own cannot hand out memory. which of them holds is a fact for `kiln doctor`, never a silent difference. The VMM enters its
//! groups before it executes anything: the files are opened by the parent and the child writes `0` ([`enter`]).
//! Sources: the kernel's `admin-guide/cgroup-v2.rst` and `admin-guide/cgroup-v1/{memory,pids}.rst`, `scheduler/sched-bwc.rst`.
//! Read next: [`crate::reap`] (removal after a crash).

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_core::ByteSize;

use crate::driver::{Check, CheckLevel};
use crate::proc::ProcessIdentity;

mod find;

use find::{Parent, v1_parent, v2_parent};

/// Period of the CPU quota, microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// Memory of a VMM beyond its guest's: device buffers, page tables, and without KVM the translated code, whose buffer the
/// QEMU driver bounds well below this.
pub const VMM_MEMORY_OVERHEAD: ByteSize = ByteSize::mib(512);

/// Threads of a VMM: one per virtual CPU, one per iothread and worker. A VMM that needs more is broken or taken over.
pub const VMM_PIDS_MAX: u64 = 256;

/// How often a group that should become empty is looked at.
const EMPTY_POLL: Duration = Duration::from_millis(5);

/// Group that a process makes for itself below the one it is alone in.
const LEAF: &str = "self.kiln";

/// Limits of one machine's VMM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Thousandths of a CPU; 0 means no limit.
    pub cpu_milli: u64,
    /// Bytes of memory, page cache included; 0 means no limit.
    pub memory_max: ByteSize,
    /// Processes and threads; 0 means no limit.
    pub pids_max: u64,
}

impl Limits {
    /// The limits of a VMM with a guest of this size.
    #[must_use]
    pub fn of_guest(cpus: u32, memory: ByteSize) -> Self {
        Self {
            // One more than the guest has: device emulation runs beside the virtual CPUs.
            cpu_milli: (u64::from(cpus) + 1) * 1000,
            memory_max: ByteSize(memory.0.saturating_add(VMM_MEMORY_OVERHEAD.0)),
            pids_max: VMM_PIDS_MAX,
        }
    }
}

/// Why a group cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host has none that may be used.
    #[error("no cgroup may be made on this host: {0}")]
    Unavailable(String),
    /// A file operation failed.
    #[error("could not {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// A resource that can be limited.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Controller {
    /// CPU time.
    Cpu,
    /// Memory.
    Memory,
    /// Processes and threads.
    Pids,
}

impl Controller {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Memory, Self::Pids];

    /// The kernel's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }
}

/// Which generation of the interface a group uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    /// One hierarchy for all controllers.
    V2,
    /// A hierarchy per controller.
    V1,
}

/// Where groups can be made on this host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CgroupHost {
    version: Option<Version>,
    /// The directory below which groups are made, per controller that works.
    parents: Vec<(Controller, PathBuf)>,
    /// The group that this process has to leave for a leaf of it, before others can be made there.
    leave: Option<PathBuf>,
    /// Why there is none, or why controllers are missing.
    why: String,
}

impl CgroupHost {
    /// Looks at this host. Makes nothing.
    #[must_use]
    pub fn detect() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::detect_from(&mounts, &own)
    }

    /// As [`Self::detect`], from the text of `/proc/self/mountinfo` and `/proc/self/cgroup`.
    #[must_use]
    pub fn detect_from(mounts: &str, own: &str) -> Self {
        let v2 = v2_parent(mounts, own);
        if let Ok(parent) = &v2
            && parent.controllers.contains(&Controller::Memory)
        {
            return Self::of_v2(parent);
        }
        let v1: Vec<_> = Controller::ALL
            .into_iter()
            .filter_map(|controller| Some((controller, v1_parent(mounts, own, controller)?)))
            .collect();
        if !v1.is_empty() {
            return Self::new(Version::V1, v1);
        }
        match v2 {
            Ok(parent) => Self::of_v2(&parent),
            Err(why) => Self {
                version: None,
                parents: Vec::new(),
                leave: None,
                why,
            },
        }
    }

    fn of_v2(parent: &Parent) -> Self {
        let all = parent.controllers.iter();
        let parents = all.map(|c| (*c, parent.dir.clone())).collect();
        Self {
            leave: parent.leave.then(|| parent.dir.clone()),
            ..Self::new(Version::V2, parents)
        }
    }

    fn new(version: Version, parents: Vec<(Controller, PathBuf)>) -> Self {
        Self {
            version: (!parents.is_empty()).then_some(version),
            parents,
            leave: None,
            why: "the controller is not there or may not be used".to_owned(),
        }
    }

    /// The generation in use; `None` when no group can be made.
    #[must_use]
    pub fn version(&self) -> Option<Version> {
        self.version
    }

    /// Whether this resource can be limited.
    #[must_use]
    pub fn limits(&self, controller: Controller) -> bool {
        self.parents.iter().any(|(has, _)| *has == controller)
    }

    /// One line per resource for `kiln doctor`.
    #[must_use]
    pub fn checks(&self) -> Vec<Check> {
        Controller::ALL
            .into_iter()
            .map(|controller| {
                let parent = self.parents.iter().find(|(has, _)| *has == controller);
                let version = match self.version {
                    Some(Version::V2) => "v2",
                    _ => "v1",
                };
                let (level, found, hint) = match parent {
                    Some((_, path)) => (
                        CheckLevel::Pass,
                        format!("cgroup {version} at {}", path.display()),
                        None,
                    ),
                    None => (
                        CheckLevel::Warn,
                        format!("no limit on the VMM: {}", self.why),
                        Some(
                            "run kiln as root, or in a delegated scope: systemd-run --user --scope -p Delegate=yes kiln ..."
                                .to_owned(),
                        ),
                    ),
                };
                Check {
                    name: format!("cgroup-{}", controller.name()),
                    level,
                    found,
                    hint,
                }
            })
            .chain([self.swap_check(&fs::read_to_string("/proc/swaps").unwrap_or_default())])
            .collect()
    }

    fn swap_check(&self, swaps: &str) -> Check {
        let areas = disk_swaps(swaps).join(", ");
        let held = self
            .parents
            .iter()
            .any(|(has, _)| *has == Controller::Memory);
        let (level, found, hint) = match (areas.is_empty(), held) {
            (true, _) => (CheckLevel::Pass, "none on a disk".to_owned(), None),
            (false, true) => {
                let found = format!("{areas}, and machines are kept out of it");
                (CheckLevel::Pass, found, None)
            }
            (false, false) => (
                CheckLevel::Warn,
                format!("{areas}: a machine's memory, its secrets too, may be written there"),
                Some("encrypt it, turn it off (swapoff -a), or run kiln where it may limit memory: see cgroup-memory".to_owned()),
            ),
        };
        Check {
            name: "swap".to_owned(),
            level,
            found,
            hint,
        }
    }

    /// The directories that [`Self::create`] would make, to be written to the machine's record *before* they are made.
    #[must_use]
    pub fn paths_of(&self, name: &str) -> Vec<PathBuf> {
        let mut paths: Vec<_> = self.parents.iter().map(|(_, dir)| dir.join(name)).collect();
        paths.sort();
        paths.dedup();
        paths
    }

    /// All machines' groups that are there now, of live and dead machines.
    #[must_use]
    pub fn groups(&self) -> Vec<PathBuf> {
        let mut found: Vec<_> = self
            .parents
            .iter()
            .filter_map(|(_, dir)| fs::read_dir(dir).ok())
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("kiln-"))
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect();
        found.sort();
        found.dedup();
        found
    }

    /// Groups whose name ends with a machine's token: for a machine whose record cannot be read.
    #[must_use]
    pub fn find_by_token(&self, token: &str) -> Vec<PathBuf> {
        let mut groups = self.groups();
        groups.retain(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            !token.is_empty() && name.ends_with(token)
        });
        groups
    }

    /// Makes a group of this name with these limits.
    ///
    /// # Errors
    /// When the host has none, or a group or limit is refused; nothing is left then.
    pub fn create(&self, name: &str, limits: &Limits) -> Result<Cgroup, CgroupError> {
        let Some(version) = self.version else {
            return Err(CgroupError::Unavailable(self.why.clone()));
        };
        if let Some(dir) = &self.leave {
            self.leave_for_leaf(dir)?;
        }
        let group = Cgroup {
            dirs: self.paths_of(name),
            version,
        };
        match self.fill(&group, name, version, limits) {
            Ok(()) => Ok(group),
            Err(error) => {
                // Nobody is in it yet.
                for dir in &group.dirs {
                    let _ = fs::remove_dir(dir);
                }
                Err(error)
            }
        }
    }

    /// Moves this process into a leaf of its group, which then can hand out what it has. Does nothing the second time.
    fn leave_for_leaf(&self, dir: &Path) -> Result<(), CgroupError> {
        let leaf = dir.join(LEAF);
        make_dir(&leaf)?;
        write_file(&leaf.join("cgroup.procs"), &std::process::id().to_string())?;
        for (controller, _) in &self.parents {
            let word = format!("+{}", controller.name());
            write_file(&dir.join("cgroup.subtree_control"), &word)?;
        }
        Ok(())
    }

    fn fill(
        &self,
        group: &Cgroup,
        name: &str,
        version: Version,
        limits: &Limits,
    ) -> Result<(), CgroupError> {
        for dir in &group.dirs {
            make_dir(dir)?;
        }
        for (controller, parent) in &self.parents {
            let dir = parent.join(name);
            for (file, value) in settings(version, *controller, limits) {
                write_file(&dir.join(file), &value)?;
            }
            if *controller == Controller::Memory {
                keep_from_swap(version, &dir)?;
            }
        }
        Ok(())
    }
}

/// Keeps a machine's memory, and with it every secret in it, out of the host's swap. A kernel without swap has no such file.
fn keep_from_swap(version: Version, dir: &Path) -> Result<(), CgroupError> {
    let file = dir.join(match version {
        Version::V2 => "memory.swap.max",
        Version::V1 => "memory.swappiness",
    });
    match file.exists() {
        true => write_file(&file, "0"),
        false => Ok(()),
    }
}

/// Swap areas of `/proc/swaps` that lie on a disk: compressed memory is none.
fn disk_swaps(swaps: &str) -> Vec<&str> {
    let areas = swaps.lines().skip(1);
    let names = areas.filter_map(|line| line.split_whitespace().next());
    names
        .filter(|name| !name.starts_with("/dev/zram"))
        .collect()
}

/// What to write where, in this order.
fn settings(
    version: Version,
    controller: Controller,
    limits: &Limits,
) -> Vec<(&'static str, String)> {
    let quota_us = limits.cpu_milli * CPU_PERIOD_US / 1000;
    let (memory, pids) = (limits.memory_max.0, limits.pids_max);
    match (version, controller) {
        (_, Controller::Cpu) if quota_us == 0 => Vec::new(),
        (_, Controller::Memory) if memory == 0 => Vec::new(),
        (_, Controller::Pids) if pids == 0 => Vec::new(),
        (Version::V2, Controller::Cpu) => vec![("cpu.max", format!("{quota_us} {CPU_PERIOD_US}"))],
        (Version::V1, Controller::Cpu) => vec![
            ("cpu.cfs_period_us", CPU_PERIOD_US.to_string()),
            ("cpu.cfs_quota_us", quota_us.to_string()),
        ],
        (Version::V2, Controller::Memory) => vec![
            // A killed VMM is one dead machine; a half-killed one is a riddle.
            ("memory.oom.group", "1".to_owned()),
            ("memory.max", memory.to_string()),
        ],
        (Version::V1, Controller::Memory) => vec![("memory.limit_in_bytes", memory.to_string())],
        (_, Controller::Pids) => vec![("pids.max", pids.to_string())],
    }
}

/// One machine's groups. Dropping it removes nothing: that is [`Cgroup::remove`]'s, or the reaper's by the record.
#[derive(Debug)]
pub struct Cgroup {
    dirs: Vec<PathBuf>,
    version: Version,
}

impl Cgroup {
    /// Its directories, for the machine's record.
    #[must_use]
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Opens the files through which a process enters. Pass them to [`enter`] in the child. Close-on-exec.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open_procs(&self) -> Result<Vec<OwnedFd>, CgroupError> {
        self.dirs
            .iter()
            .map(|dir| {
                let path = dir.join("cgroup.procs");
                OpenOptions::new()
                    .write(true)
                    .open(&path)
                    .map(OwnedFd::from)
                    .map_err(|source| CgroupError::Io {
                        action: "open",
                        path,
                        source,
                    })
            })
            .collect()
    }

    /// Processes of the group that the kernel killed because its memory was used up.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let file = match self.version {
            Version::V2 => "memory.events",
            Version::V1 => "memory.oom_control",
        };
        self.dirs
            .iter()
            .filter_map(|dir| fs::read_to_string(dir.join(file)).ok())
            .flat_map(|text| {
                text.lines()
                    .filter_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
                    .collect::<Vec<u64>>()
            })
            .sum()
    }

    /// Kills what is left in the group and removes it. Blocks for at most `deadline`. Idempotent.
    ///
    /// # Errors
    /// When something is still in it at the deadline.
    pub fn remove(&self, deadline: Duration) -> Result<(), CgroupError> {
        for dir in &self.dirs {
            remove_dir(dir, deadline).map_err(|source| CgroupError::Io {
                action: "remove",
                path: dir.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

/// Enters groups: writes `0`, which means the writing process, to each `cgroup.procs`. Makes only system calls and allocates
/// nothing unless it fails: for use between fork and exec.
///
/// # Errors
/// What the kernel says.
pub fn enter(procs: &[OwnedFd]) -> io::Result<()> {
    for file in procs {
        write_all(file.as_fd(), b"0")?;
    }
    Ok(())
}

fn write_all(file: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    let written = rustix::io::write(file, bytes)?;
    if written == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Kills what is left in a group and removes its directory. A missing directory is no error. Blocks for at most `deadline`.
///
/// # Errors
/// `TimedOut` when something is still in it, or the kernel's word.
pub fn remove_dir(dir: &Path, deadline: Duration) -> io::Result<()> {
    let end = Instant::now() + deadline;
    loop {
        kill_all(dir, end);
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::ResourceBusy => return Err(error),
            Err(_) if Instant::now() >= end => return Err(io::ErrorKind::TimedOut.into()),
            // Version 1 has no event for "empty": the state is looked at again.
            Err(_) => std::thread::sleep(EMPTY_POLL),
        }
    }
}

fn kill_all(dir: &Path, end: Instant) {
    // Version 2 since Linux 5.14 kills all at once, also what forks meanwhile.
    let _ = write_file(&dir.join("cgroup.kill"), "1");
    let own = std::process::id();
    let pids = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    for pid in pids.lines().filter_map(|line| line.parse::<u32>().ok()) {
        if pid == own {
            continue;
        }
        if let Some(process) = ProcessIdentity::of(pid) {
            let _ = process.kill_and_wait(end.saturating_duration_since(Instant::now()));
        }
    }
}

fn make_dir(dir: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(dir) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(CgroupError::Io {
            action: "make",
            path: dir.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

fn write_file(path: &Path, value: &str) -> Result<(), CgroupError> {
    // Never created: a missing control file must be an error, on cgroupfs as in a test's directory.
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|source| CgroupError::Io {
            action: "write",
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests;
