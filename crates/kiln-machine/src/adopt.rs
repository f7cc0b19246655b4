//! A new owner for a machine that outlived its own: who may take it, and how exactly one does.
//!
//! A machine is *kept* when its record says so: then its VMM was started without the request to die with its owner, and listens on its
//! sockets. When the owner is gone its lock is free; whoever takes that lock owns the machine. This module knows no VMM: a driver
//! connects to it afterwards, and [`crate::bring_up::adopt`] asks the guest who it is. Read next: [`crate::record`], [`crate::reap`].

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_core::{MachineName, MachineSpec};

use crate::driver::{AdoptError, KEEP_MAX, Kept, MachineError, SpecRefused, TemplateRef};
use crate::proc::ProcessIdentity;
use crate::reap;
use crate::record::{
    self, KeptRecord, MACHINES_DIR, MachineDir, MachineRecord, RecordError, RecordState,
};

/// A kept machine that was just taken. Dropping it lets go of the machine again.
#[derive(Debug)]
pub(crate) struct Taken {
    dir: Arc<MachineDir>,
    settled: bool,
    pub(crate) kept: KeptRecord,
    pub(crate) vmm: ProcessIdentity,
}

impl Taken {
    pub(crate) fn dir(&self) -> &MachineDir {
        &self.dir
    }

    /// The machine is this process's for good: from now on dropping its directory removes it.
    pub(crate) fn own(mut self) -> (Arc<MachineDir>, KeptRecord) {
        self.settled = true;
        (Arc::clone(&self.dir), self.kept.clone())
    }

    /// Removes a machine that turned out to be gone.
    pub(crate) async fn remove(self, why: String) -> AdoptError {
        let (dir, _) = self.own();
        let name = dir.name().clone();
        let removed = tokio::task::spawn_blocking(move || dir.remove()).await;
        report(&name, removed.ok().map(|report| report.leaks));
        AdoptError::Gone { name, why }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if !self.settled {
            self.dir.abandon();
        }
    }
}

/// Takes a kept machine whose owner is gone. Blocks for moments.
pub(crate) fn take(home: &Path, name: &MachineName, driver: &str) -> Result<Taken, AdoptError> {
    let dir = home.join(MACHINES_DIR).join(name.as_str());
    if !dir.is_dir() {
        return Err(AdoptError::Unknown(name.clone()));
    }
    let taken = reap::once_owner_is_gone(&dir, || try_take(home, &dir, name, driver).transpose());
    taken.unwrap_or_else(|| Err(AdoptError::Owned(name.clone())))
}

/// `None`: somebody holds the lock.
fn try_take(
    home: &Path,
    dir: &Path,
    name: &MachineName,
    driver: &str,
) -> Result<Option<Taken>, AdoptError> {
    let home_lock = record::lock_home(home).map_err(adopt_error)?;
    if !dir.is_dir() {
        return Err(AdoptError::Unknown(name.clone()));
    }
    let Some((lock, _token)) = record::try_take_lock(dir) else {
        return Ok(None);
    };
    match judge(dir, name, driver) {
        Ok(Judged { record, kept, vmm }) => {
            let owned = own(dir, record, &lock);
            owned.map(|record| {
                Some(Taken {
                    dir: Arc::new(MachineDir::adopted(dir.to_owned(), record, lock)),
                    settled: false,
                    kept,
                    vmm,
                })
            })
        }
        Err(error) => {
            let _ = lock.unlock();
            drop(home_lock);
            if matches!(error, AdoptError::Gone { .. }) {
                report(name, reap::claim(home, dir).map(reap::Claim::remove));
            }
            Err(error)
        }
    }
}

struct Judged {
    record: MachineRecord,
    kept: KeptRecord,
    vmm: ProcessIdentity,
}

/// Whether a machine whose lock is held may be adopted.
fn judge(dir: &Path, name: &MachineName, driver: &str) -> Result<Judged, AdoptError> {
    let Some(record) = record::read_record(dir) else {
        return Err(AdoptError::Unknown(name.clone()));
    };
    if record.driver != driver {
        return Err(AdoptError::OtherDriver {
            name: name.clone(),
            driver: record.driver,
        });
    }
    let (Some(kept), RecordState::Running { vmm }) = (record.kept.clone(), record.state.clone())
    else {
        return Err(AdoptError::NotKept(name.clone()));
    };
    if !vmm.runs_its_program() {
        return Err(AdoptError::Gone {
            name: name.clone(),
            why: "its VMM has ended".to_owned(),
        });
    }
    if record::boot_ms() >= kept.until_boot_ms {
        return Err(AdoptError::Expired(name.clone()));
    }
    Ok(Judged { record, kept, vmm })
}

/// Writes this process into the record. On an error the lock falls.
fn own(dir: &Path, mut record: MachineRecord, lock: &File) -> Result<MachineRecord, AdoptError> {
    record.owner = ProcessIdentity::of_self();
    record::write_record(dir, &record).map_err(|error| {
        let _ = lock.unlock();
        adopt_error(error)
    })?;
    Ok(record)
}

fn report(name: &MachineName, leaks: Option<Vec<String>>) {
    if let Some(leaks) = leaks.filter(|leaks| !leaks.is_empty()) {
        tracing::warn!(machine = %name, ?leaks, "a kept machine left something behind");
    }
}

fn adopt_error(error: RecordError) -> AdoptError {
    match error {
        RecordError::Io {
            action,
            path,
            source,
        } => AdoptError::Io {
            action,
            path,
            source,
        },
        other => AdoptError::Io {
            action: "keep a record of",
            path: "the machine".into(),
            source: std::io::Error::other(other),
        },
    }
}

/// Kept machines of a home that nobody owns now. Blocks for moments; a home without machines has none.
pub(crate) fn adoptable(home: &Path) -> Vec<MachineRecord> {
    let machines = home.join(MACHINES_DIR);
    let mut found = Vec::new();
    for entry in fs::read_dir(machines).into_iter().flatten().flatten() {
        let dir = entry.path();
        let kept = |record: &MachineRecord| record.is_kept_now();
        // Looked at without any lock first: most homes keep nothing.
        if record::read_record(&dir).as_ref().is_some_and(kept)
            && let Ok(_home_lock) = record::lock_home(home)
            && let Some((lock, _token)) = record::try_take_lock(&dir)
        {
            found.extend(record::read_record(&dir).filter(kept));
            let _ = lock.unlock();
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// The names of a driver's machines that can be adopted.
pub(crate) async fn adoptable_of(home: PathBuf, driver: &'static str) -> Vec<MachineName> {
    let found = tokio::task::spawn_blocking(move || adoptable(&home)).await;
    let records = found.unwrap_or_default().into_iter();
    records
        .filter(|record| record.driver == driver)
        .map(|record| record.name)
        .collect()
}

/// As [`take`], off the async threads. Dropping the future lets go of the machine.
pub(crate) async fn take_of(
    home: PathBuf,
    name: &MachineName,
    driver: &'static str,
) -> Result<Taken, AdoptError> {
    let wanted = name.clone();
    let taken = tokio::task::spawn_blocking(move || take(&home, &wanted, driver)).await;
    taken.unwrap_or_else(|error| {
        Err(AdoptError::Io {
            action: "take",
            path: name.as_str().into(),
            source: std::io::Error::other(error),
        })
    })
}

/// Refuses to launch what a driver cannot keep.
pub(crate) fn check_spec(spec: &MachineSpec, able: bool) -> Result<(), SpecRefused> {
    match spec.keepable && !able {
        true => Err(SpecRefused::Unsupported("keep machines beyond their owner")),
        false => Ok(()),
    }
}

/// Milliseconds from now to then, which has not passed and is not too far away.
fn left_of(until_unix_ms: u64) -> Result<u64, SpecRefused> {
    let now = record::unix_ms();
    let last = now.saturating_add(u64::try_from(KEEP_MAX.as_millis()).unwrap_or(u64::MAX));
    if (now + 1..=last).contains(&until_unix_ms) {
        return Ok(until_unix_ms - now);
    }
    Err(SpecRefused::OutOfRange {
        what: "the time until which the machine is kept",
        asked: until_unix_ms,
        range: format!("after {now} and at most {last}, milliseconds since 1970"),
    })
}

/// Writes into the record that the machine is kept.
pub(crate) fn keep(
    dir: &MachineDir,
    kept: Kept,
    spec: &MachineSpec,
    template: Option<&TemplateRef>,
) -> Result<(), MachineError> {
    let refused = |why: String| MachineError::Control {
        command: "keep".to_owned(),
        why,
    };
    let left = left_of(kept.until_unix_ms).map_err(|error| refused(error.to_string()))?;
    if !matches!(dir.record().state, RecordState::Running { .. }) {
        return Err(refused("its VMM does not run".to_owned()));
    }
    let record = KeptRecord {
        kept,
        until_boot_ms: record::boot_ms().saturating_add(left),
        spec: spec.clone(),
        template: template.cloned(),
    };
    let written = dir.update(|now| now.kept = Some(record));
    written.map_err(|error| record_failure(dir, error))
}

/// A record's failure as a machine's.
pub(crate) fn record_failure(dir: &MachineDir, error: RecordError) -> MachineError {
    match error {
        RecordError::Io {
            action,
            path,
            source,
        } => MachineError::Io {
            action,
            path,
            source,
        },
        other => MachineError::Io {
            action: "keep a record of",
            path: dir.dir().to_owned(),
            source: std::io::Error::other(other),
        },
    }
}
