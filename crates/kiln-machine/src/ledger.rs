//! Admission: kiln processes on one host share a ledger of CPU and memory, so that machines together fit.
//!
//! ```text
//! <home>/ledger/lock                       held for moments: looking and changing
//! <home>/ledger/next                       the next order number
//! <home>/ledger/wait-<order>-<hex>.json    somebody waits; locked by the process that waits
//! <home>/ledger/lease-<order>-<hex>.json   somebody holds; the same file renamed, locked by the process that holds
//! ```
//!
//! An entry counts while its file lock is held: the kernel drops the lock with its process, however that died, and the next who
//! looks removes the file. Order numbers make the queue; a small need may pass a large one that does not fit yet, but only
//! [`PASSES_MAX`] times, so that nobody starves. Waiting is on inotify with a level-triggered recheck.
//! A kept machine that nobody owns counts too, by its record: its owner's entry went with the owner.
//! It reserves nothing in the kernel: limits are [`crate::cgroup`]'s. Whole CPUs are given out here too, by number, and freed like all else;
//! the machines are moved by [`crate::pins`] under this lock:
//!
//! ```text
//! <home>/ledger/pinned                     somebody has CPUs of his own, or had and nobody looked since
//! ```

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_core::ByteSize;
use rustix::fs::inotify;
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

mod book;
#[cfg(test)]
mod tests;

use crate::pins;

use book::{Book, Entry, Verdict};

/// How often a later need may pass an earlier one that does not fit yet.
pub const PASSES_MAX: u32 = 8;

/// Entries of one ledger; more means that something is broken.
pub const ENTRIES_MAX: usize = 4096;

/// How long at most until a waiter looks again without any event: an event may come a moment before a dead holder's lock falls.
const RECHECK: Duration = Duration::from_millis(200);

/// What a machine takes of the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Need {
    /// Thousandths of a CPU.
    pub cpu_milli: u64,
    /// Memory of the guest and of its VMM.
    pub memory: ByteSize,
    /// Whole CPUs of the host for this machine alone.
    #[serde(default)]
    pub whole_cpus: u32,
}

impl Need {
    /// The need of a machine of this size; see [`crate::cgroup::VMM_MEMORY_OVERHEAD`] for what may come on top.
    #[must_use]
    pub fn of(cpus: u32, memory: ByteSize) -> Self {
        Self {
            cpu_milli: u64::from(cpus) * 1000,
            memory,
            whole_cpus: 0,
        }
    }

    /// The need of a machine of this size with CPUs of its own.
    #[must_use]
    pub fn pinned(cpus: u32, memory: ByteSize) -> Self {
        Self {
            whole_cpus: cpus,
            ..Self::of(cpus, memory)
        }
    }

    /// What it takes of a host with this many CPUs: a whole one is worth as much of the capacity as there is for each.
    fn charged(self, capacity: Self, cpus: usize) -> Self {
        let each = capacity.cpu_milli / u64::try_from(cpus.max(1)).unwrap_or(u64::MAX);
        let whole = u64::from(self.whole_cpus).saturating_mul(each);
        Self {
            cpu_milli: self.cpu_milli.max(whole),
            ..self
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_add(other.cpu_milli),
            memory: ByteSize(self.memory.0.saturating_add(other.memory.0)),
            whole_cpus: self.whole_cpus.saturating_add(other.whole_cpus),
        }
    }

    /// The first resource of which `capacity` has less than this.
    fn exceeds(self, capacity: Self) -> Option<Resource> {
        if self.memory > capacity.memory {
            Some(Resource::Memory)
        } else if self.cpu_milli > capacity.cpu_milli {
            Some(Resource::Cpus)
        } else {
            None
        }
    }
}

/// What the host gives to machines in all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity(pub Need);

impl Capacity {
    /// The capacity of this host: its CPUs times `overcommit_percent` / 100, its memory less `reserve`.
    ///
    /// # Errors
    /// When the host's memory cannot be read.
    pub fn of_host(overcommit_percent: u32, reserve: ByteSize) -> io::Result<Self> {
        let cpus = std::thread::available_parallelism()?.get() as u64;
        let info = std::fs::read_to_string("/proc/meminfo")?;
        let total_kib: u64 = info
            .lines()
            .find_map(|line| {
                let rest = line.strip_prefix("MemTotal:")?;
                rest.trim().strip_suffix("kB")?.trim().parse().ok()
            })
            .ok_or_else(|| io::Error::other("/proc/meminfo names no MemTotal"))?;
        Ok(Self(Need {
            cpu_milli: cpus * 10 * u64::from(overcommit_percent),
            memory: ByteSize((total_kib << 10).saturating_sub(reserve.0)),
            whole_cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        }))
    }
}

/// A resource that machines share.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// CPU time.
    Cpus,
    /// CPUs that nobody else uses.
    WholeCpus,
    /// Memory.
    Memory,
    /// A place in the queue: it would fit, but somebody else waits longer.
    Turn,
}

/// For what a need waits.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WaitReason {
    /// What is short.
    pub resource: Resource,
    /// What is asked.
    pub need: Need,
    /// What is held now.
    pub held: Need,
    /// By how many machines.
    pub holders: usize,
    /// How many wait longer.
    pub ahead: usize,
    /// What there is in all.
    pub capacity: Need,
}

impl fmt::Display for WaitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machines = match self.holders {
            1 => "1 machine holds".to_owned(),
            n => format!("{n} machines hold"),
        };
        let cpus = |milli: u64| format!("{}.{}", milli / 1000, milli % 1000 / 100);
        match self.resource {
            Resource::Memory => write!(
                f,
                "{} of memory: {machines} {} of {}",
                self.need.memory, self.held.memory, self.capacity.memory
            ),
            Resource::Cpus => write!(
                f,
                "{} CPUs: {machines} {} of {}",
                cpus(self.need.cpu_milli),
                cpus(self.held.cpu_milli),
                cpus(self.capacity.cpu_milli)
            ),
            Resource::WholeCpus => write!(
                f,
                "{} whole CPUs: {} of {} are given to single machines",
                self.need.whole_cpus, self.held.whole_cpus, self.capacity.whole_cpus
            ),
            Resource::Turn => write!(f, "its turn: {} waited longer", self.ahead),
        }
    }
}

/// Why nothing was admitted.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// It would never fit, however long it waits.
    #[error("{} and {} CPUs can never be given: this host has {} and {} CPUs for machines",
        need.memory, need.cpu_milli.div_ceil(1000), capacity.memory, capacity.cpu_milli / 1000)]
    NeverFits {
        /// What was asked.
        need: Need,
        /// What there is.
        capacity: Need,
    },
    /// It did not fit in time.
    #[error("no room within {deadline:?}; it waits for {reason}")]
    Deadline {
        /// How long was waited.
        deadline: Duration,
        /// For what.
        reason: WaitReason,
    },
    /// The ledger is full of entries.
    #[error("the ledger {0:?} has more than {ENTRIES_MAX} entries")]
    Full(PathBuf),
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

/// The ledger of one home.
#[derive(Clone, Debug)]
pub struct Ledger {
    dir: PathBuf,
    capacity: Capacity,
    /// CPUs of the host, by the kernel's numbers.
    cpus: BTreeSet<u32>,
}

/// Room for one machine. Dropping it gives the room back.
#[derive(Debug)]
pub struct Ticket {
    need: Need,
    book: Book,
    entry: Option<Entry>,
}

impl Ticket {
    /// What is held.
    #[must_use]
    pub fn need(&self) -> Need {
        self.need
    }

    /// CPUs of the host that are this machine's alone, by the kernel's numbers.
    #[must_use]
    pub fn cpus(&self) -> &[u32] {
        self.entry.as_ref().map_or(&[], Entry::cpus)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let pinned = !self.cpus().is_empty();
        drop(self.entry.take());
        // A process that is killed never gets here: whoever looks next does it.
        if pinned {
            self.book.settle();
        }
    }
}

/// Who holds or waits, for `kiln machine list` and error messages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    /// As given to [`Ledger::acquire`].
    pub who: String,
    /// How much.
    pub need: Need,
    /// It holds; else it waits.
    pub holds: bool,
}

impl Ledger {
    /// The ledger of a home. Makes nothing yet.
    #[must_use]
    pub fn new(home: &Path, capacity: Capacity) -> Self {
        Self {
            dir: home.join("ledger"),
            capacity,
            cpus: pins::usable().unwrap_or_default(),
        }
    }

    /// With these CPUs of the host instead of those that this process may use.
    #[must_use]
    pub fn with_cpus(mut self, cpus: BTreeSet<u32>) -> Self {
        self.cpus = cpus;
        self
    }

    fn book(&self) -> Book {
        Book::new(self.dir.clone(), self.capacity.0, self.cpus.clone())
    }

    /// Waits until there is room. `who` is shown to others; `on_wait` is told each time the reason to wait changes.
    /// Dropping the future gives up the place in the queue.
    ///
    /// # Errors
    /// At once when it can never fit; at the deadline; on the file system's word.
    pub async fn acquire(
        &self,
        need: Need,
        who: &str,
        deadline: Duration,
        mut on_wait: impl FnMut(&WaitReason) + Send,
    ) -> Result<Ticket, LedgerError> {
        let capacity = self.capacity.0;
        let need = need.charged(capacity, self.cpus.len());
        if need.exceeds(capacity).is_some() {
            return Err(LedgerError::NeverFits { need, capacity });
        }
        let end = tokio::time::Instant::now() + deadline;
        let book = self.book();
        let who = who.to_owned();
        let mut entry = blocking({
            let book = book.clone();
            move || book.enqueue(need, &who)
        })
        .await?;
        // Watch first, look then: nothing that changes in between is missed.
        let watch = Watch::new(&self.dir)?;
        let mut told: Option<WaitReason> = None;
        loop {
            let verdict = blocking({
                let book = book.clone();
                move || book.look(entry)
            })
            .await?;
            let reason = match verdict {
                Verdict::Admitted(entry) => {
                    return Ok(Ticket {
                        need,
                        book,
                        entry: Some(entry),
                    });
                }
                Verdict::Wait(waiting, reason) => {
                    entry = waiting;
                    reason
                }
            };
            if told.as_ref() != Some(&reason) {
                on_wait(&reason);
                told = Some(reason.clone());
            }
            if tokio::time::Instant::now() >= end {
                return Err(LedgerError::Deadline { deadline, reason });
            }
            watch.changed(RECHECK, end).await?;
        }
    }

    /// Who holds and who waits, in order.
    ///
    /// # Errors
    /// On the file system's word. A ledger that was never used is empty.
    pub async fn list(&self) -> Result<Vec<Holder>, LedgerError> {
        let book = self.book();
        blocking(move || book.list()).await
    }
}

/// Puts a machine that was just started where it belongs, and with it every other one of the home. Does nothing on a home where nobody has
/// CPUs of his own. Blocks for moments.
///
/// # Errors
/// When this machine could not be moved to CPUs of its own.
pub(crate) fn settle_started(home: &Path, pid: u32, own: &[u32]) -> io::Result<()> {
    let dir = home.join("ledger");
    if own.is_empty() && !book::somebody_pins(&dir) {
        return Ok(());
    }
    let all = pins::usable()?;
    let none = Capacity(Need::default());
    Book::new(dir, none.0, all).settle();
    match own.is_empty() {
        true => Ok(()),
        false => pins::place(pid, &own.iter().copied().collect()),
    }
}

/// Runs file work off the async threads. What it owns is dropped there when the caller has gone.
fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LedgerError> + Send + 'static,
) -> impl Future<Output = Result<T, LedgerError>> {
    let task = tokio::task::spawn_blocking(work);
    async move {
        match task.await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => Err(LedgerError::Io {
                    action: "look into the ledger",
                    path: PathBuf::new(),
                    source: io::Error::other(error),
                }),
            },
        }
    }
}

/// Events in the ledger's directory.
struct Watch {
    fd: AsyncFd<OwnedFd>,
    dir: PathBuf,
}

impl Watch {
    fn new(dir: &Path) -> Result<Self, LedgerError> {
        let error = |source: io::Error| LedgerError::Io {
            action: "watch",
            path: dir.to_owned(),
            source,
        };
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let fd = inotify::init(flags).map_err(|errno| error(errno.into()))?;
        // A holder that dies closes the file that it had opened for writing.
        let events = inotify::WatchFlags::DELETE
            | inotify::WatchFlags::CLOSE_WRITE
            | inotify::WatchFlags::MOVED_FROM
            | inotify::WatchFlags::MOVED_TO;
        inotify::add_watch(&fd, dir, events).map_err(|errno| error(errno.into()))?;
        #[expect(unsafe_code, reason = "registering a descriptor with the runtime")]
        // SAFETY: the OwnedFd keeps one open descriptor, the same for its whole life, and the AsyncFd owns it.
        let fd = unsafe { AsyncFd::register(fd) }.map_err(|refused| error(refused.into()))?;
        Ok(Self {
            fd,
            dir: dir.to_owned(),
        })
    }

    /// Waits for an event, the time to look again, or the end.
    async fn changed(
        &self,
        recheck: Duration,
        end: tokio::time::Instant,
    ) -> Result<(), LedgerError> {
        let until = end.min(tokio::time::Instant::now() + recheck);
        let error = |source: io::Error| LedgerError::Io {
            action: "watch",
            path: self.dir.clone(),
            source,
        };
        match tokio::time::timeout_at(until, self.fd.readable()).await {
            Err(_elapsed) => Ok(()),
            Ok(Err(source)) => Err(error(source)),
            Ok(Ok(mut ready)) => {
                let mut buffer = [0_u8; 4096];
                loop {
                    match rustix::io::read(self.fd.get_ref(), &mut buffer) {
                        Ok(0) | Err(rustix::io::Errno::AGAIN) => break,
                        Ok(_) | Err(rustix::io::Errno::INTR) => {}
                        Err(errno) => return Err(error(errno.into())),
                    }
                }
                ready.clear_ready();
                Ok(())
            }
        }
    }
}
