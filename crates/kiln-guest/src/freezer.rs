//! Freezes and thaws the workload, and knows how much it ran.
//!
//! A clone waits for this on a processor that has not run any code yet, so its files are opened at boot, and a state that is
//! already known is not asked for.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::cgroup::{Cgroup, keyed};
use crate::error::{Context, SysError};

/// How long freezing and thawing may take.
const WAIT: Duration = Duration::from_secs(10);
/// Most bytes of a file of the group that are read.
const TEXT_MAX: usize = 1024;

/// The workload's freezer.
#[derive(Debug)]
pub(crate) struct Freezer {
    group: Cgroup,
    freeze: File,
    events: File,
    cpu: File,
    frozen: AtomicBool,
    /// CPU time of the workload when it was last frozen, microseconds.
    used_then: AtomicU64,
}

impl Freezer {
    /// The freezer of a group that exists and runs.
    pub(crate) fn open(group: &Cgroup) -> Result<Self, SysError> {
        let open = |name: &str, write: bool| {
            let path = group.path().join(name);
            let file = OpenOptions::new().read(true).write(write).open(&path);
            file.context(|| format!("open {}", path.display()))
        };
        Ok(Self {
            group: group.clone(),
            freeze: open("cgroup.freeze", true)?,
            events: open("cgroup.events", false)?,
            cpu: open("cpu.stat", false)?,
            frozen: AtomicBool::new(false),
            used_then: AtomicU64::new(0),
        })
    }

    /// True from the moment the workload is frozen until it was thawed.
    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Relaxed)
    }

    /// CPU time of the workload, microseconds.
    pub(crate) fn used(&self) -> u64 {
        value(&self.cpu, "usage_usec").unwrap_or(0)
    }

    /// CPU time the workload had since it was frozen, microseconds.
    pub(crate) fn used_since(&self) -> u64 {
        self.used()
            .saturating_sub(self.used_then.load(Ordering::Relaxed))
    }

    /// True if the kernel says that everything in the workload is frozen.
    pub(crate) fn kernel_says_frozen(&self) -> bool {
        value(&self.events, "frozen") == Some(1)
    }

    /// Freezes the workload; nothing happens when it is frozen.
    pub(crate) async fn freeze(&self) -> Result<(), SysError> {
        if self.is_frozen() {
            return Ok(());
        }
        self.set(true).await?;
        self.used_then.store(self.used(), Ordering::Relaxed);
        Ok(())
    }

    /// Lets the workload run.
    pub(crate) async fn thaw(&self) -> Result<(), SysError> {
        self.set(false).await
    }

    async fn set(&self, frozen: bool) -> Result<(), SysError> {
        let text: &[u8] = if frozen { b"1" } else { b"0" };
        let written = self.freeze.write_all_at(text, 0);
        written.context(|| format!("freeze or thaw {}", self.group.path().display()))?;
        // From here on it counts as frozen until the kernel says that it is not.
        self.frozen.store(true, Ordering::Relaxed);
        if self.kernel_says_frozen() != frozen {
            self.group.frozen(frozen, WAIT).await?;
        }
        self.frozen.store(frozen, Ordering::Relaxed);
        Ok(())
    }
}

/// A line `key value` of an open file.
fn value(file: &File, key: &str) -> Option<u64> {
    let mut text = [0; TEXT_MAX];
    let len = file.read_at(&mut text, 0).ok()?;
    keyed(std::str::from_utf8(&text[..len]).ok()?, key)
}
