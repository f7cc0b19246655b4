//! What a machine leaves on disk while it lives: a directory, a record and a lock.
//!
//! ```text
//! <home>/machines/.lock            held for moments: making, claiming, choosing a user slot
//! <home>/machines/<name>/lock      held by the owner for the machine's life; holds the machine's token
//! <home>/machines/<name>/record.json
//! <home>/machines/<name>/uid-slot-<n>
//! <home>/machines/<name>/...       the driver's own files: overlays, sockets, console
//! ```
//!
//! The lock says whether the owner lives: the kernel drops it with the owner, however it died. It is close-on-exec: a VMM never
//! holds it, but a child between fork and exec does, so that nobody takes a machine for dead whose VMM is about to appear.
//! The record says what has to be removed then. It holds no secret. Read next: [`crate::reap`].

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use kiln_core::{MachineName, MachineSpec};
use serde::{Deserialize, Serialize};

use crate::driver::{Kept, LeakReport, TemplateRef};
use crate::own_file;
use crate::proc::{ExeIdentity, ProcessIdentity};
use crate::reap;

/// Version of `record.json`. A record of a newer version is not read: its machine is removed by its token alone.
pub const RECORD_SCHEMA: u32 = 2;
/// Oldest version that is read. It knew no kept machines.
const RECORD_SCHEMA_MIN: u32 = 1;

/// Bytes of a record file that are read.
const RECORD_BYTES_MAX: u64 = 256 * 1024;

/// Paths outside the machine's directory that one record may name.
const PATHS_MAX: usize = 64;

/// Most user slots of one home, so that as many machines have a user of their own at once.
pub const UID_SLOTS_MAX: u32 = 4096;

/// Directory below a home that holds the machines.
pub(crate) const MACHINES_DIR: &str = "machines";
/// Prefix of a directory that a reaper has claimed.
pub(crate) const REAPING_PREFIX: &str = ".reaping-";
pub(crate) const LOCK_FILE: &str = "lock";
pub(crate) const RECORD_FILE: &str = "record.json";
const HOME_LOCK_FILE: &str = ".lock";
const UID_SLOT_PREFIX: &str = "uid-slot-";

/// What is known of a machine after its owner died.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineRecord {
    /// [`RECORD_SCHEMA`].
    pub schema: u32,
    /// The machine's name.
    pub name: MachineName,
    /// The driver that made it.
    pub driver: String,
    /// 32 hex digits that no other machine ever had.
    pub token: String,
    /// How far it got.
    pub state: RecordState,
    /// Files and directories outside the machine's directory. Each has the token in its last component.
    pub paths: Vec<PathBuf>,
    /// Cgroup directories of this machine. Each has the token in its last component.
    pub cgroups: Vec<PathBuf>,
    /// The kiln process that owns it.
    pub owner: ProcessIdentity,
    /// When it was made, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// What an adopter has to know of a machine that outlives its owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<KeptRecord>,
    /// CPUs of the host that are this machine's alone; none means that it shares the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_cpus: Vec<u32>,
}

/// What an adopter has to know of a kept machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptRecord {
    /// Until when and as whom, in its owner's words.
    pub kept: Kept,
    /// Until when, milliseconds of the host's clock since its boot (`CLOCK_BOOTTIME`), which never jumps: this decides.
    pub until_boot_ms: u64,
    /// What the machine is made of, with the disks that were added since.
    pub spec: MachineSpec,
    /// The template whose memory it maps.
    pub template: Option<TemplateRef>,
}

impl MachineRecord {
    /// Whether the machine lives on without its owner now: kept, in time, and its very VMM runs.
    #[must_use]
    pub fn is_kept_now(&self) -> bool {
        let in_time = |kept: &KeptRecord| boot_ms() < kept.until_boot_ms;
        matches!(&self.state, RecordState::Running { vmm } if vmm.runs_its_program())
            && self.kept.as_ref().is_some_and(in_time)
    }
}

/// How far a machine got.
///
/// ```text
/// Preparing -> Launching -> Running
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum RecordState {
    /// Files are being made; there is no process.
    Preparing,
    /// From just before the VMM is started until its number is known: it has to be looked for.
    Launching {
        /// The program.
        program: Option<ExeIdentity>,
    },
    /// The VMM runs.
    Running {
        /// Which process.
        vmm: ProcessIdentity,
    },
}

/// Why a machine directory cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A live process owns a machine of this name, or it is kept.
    #[error("a machine named {0} exists: its owner lives, or it is kept")]
    Exists(MachineName),
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
    /// A path outside the directory does not carry the machine's token.
    #[error("{0:?} does not carry the machine's token in its last component")]
    ForeignPath(PathBuf),
    /// One of the named bounds was passed.
    #[error("a machine may have at most {max} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        max: usize,
    },
    /// The machine was removed before.
    #[error("machine {0} was already removed")]
    Removed(MachineName),
}

fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> RecordError + 'a {
    move |source| RecordError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// A live machine's directory. Dropping it removes the machine with everything that its record names.
#[derive(Debug)]
pub struct MachineDir {
    dir: PathBuf,
    name: MachineName,
    token: String,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    record: MachineRecord,
    /// `None` once removed or abandoned.
    lock: Option<File>,
}

impl MachineDir {
    /// Makes `<home>/machines/<name>/` with its lock and record. What is left of a dead machine of this name is removed first.
    ///
    /// # Errors
    /// [`RecordError::Exists`] when such a machine has a live owner; else what the file system says.
    pub fn create(home: &Path, name: &MachineName, driver: &str) -> Result<Self, RecordError> {
        let machines = machines_dir(home)?;
        let dir = machines.join(name.as_str());
        remove_dead(home, name, &dir);
        let token = hex::encode(random_bytes());
        let record = MachineRecord {
            schema: RECORD_SCHEMA,
            name: name.clone(),
            driver: driver.to_owned(),
            token: token.clone(),
            state: RecordState::Preparing,
            paths: Vec::new(),
            cgroups: Vec::new(),
            owner: ProcessIdentity::of_self(),
            created_unix_ms: unix_ms(),
            kept: None,
            host_cpus: Vec::new(),
        };
        let home_lock = lock_home(home)?;
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(RecordError::Exists(name.clone()));
            }
            Err(error) => return Err(io_error("make", &dir)(error)),
        }
        let made = open_lock(&dir, &token).and_then(|lock| {
            write_record(&dir, &record)?;
            Ok(lock)
        });
        let lock = match made {
            Ok(lock) => lock,
            Err(error) => {
                // Nothing but our own two files can be in it yet.
                let _ = fs::remove_dir_all(&dir);
                return Err(error);
            }
        };
        drop(home_lock);
        Ok(Self {
            dir,
            name: name.clone(),
            token,
            inner: Mutex::new(Inner {
                record,
                lock: Some(lock),
            }),
        })
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file of the machine.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// The machine's name.
    #[must_use]
    pub fn name(&self) -> &MachineName {
        &self.name
    }

    /// 32 hex digits that no other machine ever had. Every resource outside the directory has it in its name, and the VMM in an argument.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// A name for the VMM process and for resources outside the directory: `kiln-<name>-<token>`.
    #[must_use]
    pub fn process_name(&self) -> String {
        format!("kiln-{}-{}", self.name, self.token)
    }

    /// What the record says now.
    #[must_use]
    pub fn record(&self) -> MachineRecord {
        self.lock_inner().record.clone()
    }

    /// Changes the record on disk, atomically. On an error the old record stays.
    ///
    /// # Errors
    /// When the change breaks a rule of the record, or the file cannot be written.
    pub fn update(&self, change: impl FnOnce(&mut MachineRecord)) -> Result<(), RecordError> {
        let mut inner = self.lock_inner();
        if inner.lock.is_none() {
            return Err(RecordError::Removed(self.name.clone()));
        }
        let mut next = inner.record.clone();
        change(&mut next);
        check_paths(&next)?;
        write_record(&self.dir, &next)?;
        inner.record = next;
        Ok(())
    }

    /// The VMM is about to be started, in cgroups that are about to be made: from now on a reaper looks for it and them.
    ///
    /// # Errors
    /// As [`Self::update`].
    pub fn set_launching(&self, program: &Path, cgroups: &[PathBuf]) -> Result<(), RecordError> {
        let program = ExeIdentity::of_file(program).ok();
        self.update(|record| {
            record.cgroups = cgroups.to_vec();
            record.state = RecordState::Launching { program };
        })
    }

    /// These CPUs of the host are the machine's alone.
    ///
    /// # Errors
    /// As [`Self::update`].
    pub fn set_host_cpus(&self, cpus: &[u32]) -> Result<(), RecordError> {
        match cpus.is_empty() {
            true => Ok(()),
            false => self.update(|record| record.host_cpus = cpus.to_vec()),
        }
    }

    /// The VMM runs with this number.
    ///
    /// # Errors
    /// As [`Self::update`]. A process that has already ended leaves the record as it is.
    pub fn set_running(&self, pid: u32) -> Result<(), RecordError> {
        match ProcessIdentity::of(pid) {
            Some(vmm) => self.update(|record| record.state = RecordState::Running { vmm }),
            None => Ok(()),
        }
    }

    /// The lowest number that no machine of this home has, dead ones included. It is this machine's until its directory is gone.
    ///
    /// # Errors
    /// When all [`UID_SLOTS_MAX`] are taken, or on the file system's word.
    pub fn take_uid_slot(&self, home: &Path) -> Result<u32, RecordError> {
        let machines = machines_dir(home)?;
        let _home_lock = lock_home(home)?;
        let mut taken = std::collections::BTreeSet::new();
        for entry in fs::read_dir(&machines).map_err(io_error("list", &machines))? {
            let entry = entry.map_err(io_error("list", &machines))?;
            taken.extend(slots_of(&entry.path()));
        }
        let slot = (0..UID_SLOTS_MAX)
            .find(|slot| !taken.contains(slot))
            .ok_or(RecordError::TooMany {
                what: "user slots",
                max: UID_SLOTS_MAX as usize,
            })?;
        let marker = self.path(&format!("{UID_SLOT_PREFIX}{slot}"));
        File::create_new(&marker).map_err(io_error("make", &marker))?;
        Ok(slot)
    }

    /// Kills the VMM if it lives and removes everything that the record names, and the directory. Blocks for at most a few seconds.
    /// Idempotent: a second call says that nothing is left.
    pub fn remove(&self) -> LeakReport {
        let mut inner = self.lock_inner();
        let Some(lock) = inner.lock.take() else {
            return LeakReport::default();
        };
        let leaks = reap::remove_machine(
            &self.dir,
            &self.token,
            Some(&inner.record),
            reap::Scan::WhenLaunching,
        );
        drop(lock);
        LeakReport { leaks }
    }

    /// A machine that was somebody else's, with its lock held.
    pub(crate) fn adopted(dir: PathBuf, record: MachineRecord, lock: File) -> Self {
        Self {
            dir,
            name: record.name.clone(),
            token: record.token.clone(),
            inner: Mutex::new(Inner {
                record,
                lock: Some(lock),
            }),
        }
    }

    /// Lets go of the machine as if this process had been killed: the lock falls, everything else stays for an adopter of a kept machine,
    /// or for a reaper.
    pub fn abandon(&self) {
        if let Some(lock) = self.lock_inner().lock.take() {
            // Not only closed: a child of another thread, between fork and exec, may hold it a moment longer.
            let _ = lock.unlock();
        }
    }

    fn lock_inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MachineDir {
    fn drop(&mut self) {
        let report = self.remove();
        if !report.leaks.is_empty() {
            tracing::warn!(machine = %self.name, leaks = ?report.leaks, "a machine left something behind");
        }
    }
}

/// Removes what a dead machine of this name left.
fn remove_dead(home: &Path, name: &MachineName, dir: &Path) {
    if !dir.exists() {
        return;
    }
    let leaks = reap::claim(home, dir).map(reap::Claim::remove);
    if let Some(leaks) = leaks.filter(|leaks| !leaks.is_empty()) {
        tracing::warn!(machine = %name, ?leaks, "a dead machine left something behind");
    }
}

/// The directory of all machines of a home, made when missing, for its owner alone.
pub(crate) fn machines_dir(home: &Path) -> Result<PathBuf, RecordError> {
    let machines = home.join(MACHINES_DIR);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&machines)
        .map_err(io_error("make", &machines))?;
    Ok(machines)
}

/// The home's lock. It is only ever held for moments, so waiting for it needs no deadline.
pub(crate) fn lock_home(home: &Path) -> Result<File, RecordError> {
    let path = home.join(MACHINES_DIR).join(HOME_LOCK_FILE);
    let mut options = OpenOptions::new();
    let options = options.create(true).append(true).mode(0o600);
    let file = own_file::open(&path, options).map_err(io_error("open", &path))?;
    file.lock().map_err(io_error("lock", &path))?;
    Ok(file)
}

/// Opens and takes the lock of a machine whose directory was just made.
fn open_lock(dir: &Path, token: &str) -> Result<File, RecordError> {
    let path = dir.join(LOCK_FILE);
    let mut file = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(io_error("make", &path))?;
    file.try_lock()
        .map_err(|error| io_error("lock", &path)(error.into()))?;
    file.write_all(token.as_bytes())
        .map_err(io_error("write", &path))?;
    Ok(file)
}

/// Takes the lock of an existing machine directory; `None` while its owner lives or when it has just been removed.
/// Call with the home's lock held.
pub(crate) fn try_take_lock(dir: &Path) -> Option<(File, String)> {
    let path = dir.join(LOCK_FILE);
    let mut options = OpenOptions::new();
    let options = options.create(true).truncate(false).read(true).write(true);
    let options = options.mode(0o600);
    // Without a lock file the directory is one whose making or removal was cut short. What is no file is as good as none.
    let mut file = match own_file::open(&path, options) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            fs::remove_file(&path).ok()?;
            own_file::open(&path, options).ok()?
        }
        opened => opened.ok()?,
    };
    file.try_lock().ok()?;
    let here = fs::metadata(&path).ok()?;
    let held = file.metadata().ok()?;
    if (here.dev(), here.ino()) != (held.dev(), held.ino()) {
        return None;
    }
    let mut token = String::new();
    let _ = (&mut file).take(64).read_to_string(&mut token);
    if !is_token(&token) {
        token.clear();
    }
    Some((file, token))
}

/// Reads the record of a machine directory; `None` when it is missing, damaged or of another version.
pub(crate) fn read_record(dir: &Path) -> Option<MachineRecord> {
    let mut text = String::new();
    own_file::open_to_read(&dir.join(RECORD_FILE))
        .and_then(|file| file.take(RECORD_BYTES_MAX).read_to_string(&mut text))
        .ok()?;
    let record: MachineRecord = serde_json::from_str(&text).ok()?;
    ((RECORD_SCHEMA_MIN..=RECORD_SCHEMA).contains(&record.schema)
        && is_token(&record.token)
        && check_paths(&record).is_ok())
    .then_some(record)
}

pub(crate) fn write_record(dir: &Path, record: &MachineRecord) -> Result<(), RecordError> {
    let path = dir.join(RECORD_FILE);
    let temp = dir.join("record.json.new");
    let write = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        let options = options.create(true).truncate(true).write(true);
        let mut file = own_file::open(&temp, options.mode(0o600))?;
        // In one piece: a start writes three records, and a formatter left to itself makes a system call of every word.
        file.write_all(&serde_json::to_vec_pretty(record).map_err(io::Error::from)?)?;
        // Not synced: a record has to outlive its owner, not the host. After a power failure no VMM runs, and a machine
        // without a readable record is removed by its token. A sync costs each of a start's updates 1 to 10 ms.
        fs::rename(&temp, &path)
    };
    write().map_err(io_error("write", &path))
}

/// A record may only name what is certainly its own: a damaged or forged one must not remove anything else.
fn check_paths(record: &MachineRecord) -> Result<(), RecordError> {
    for (what, paths) in [("paths", &record.paths), ("cgroups", &record.cgroups)] {
        if paths.len() > PATHS_MAX {
            return Err(RecordError::TooMany {
                what,
                max: PATHS_MAX,
            });
        }
        for path in paths {
            let named = path
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.contains(&record.token));
            let plain = path.is_absolute()
                && !path
                    .components()
                    .any(|part| matches!(part, std::path::Component::ParentDir));
            if !(named && plain && is_token(&record.token)) {
                return Err(RecordError::ForeignPath(path.clone()));
            }
        }
    }
    Ok(())
}

fn is_token(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn slots_of(dir: &Path) -> Vec<u32> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_prefix(UID_SLOT_PREFIX)?
                .parse()
                .ok()
        })
        .collect()
}

fn random_bytes() -> [u8; 16] {
    let mut bytes = [0; 16];
    // The kernel's generator cannot fail on Linux once the system is up.
    #[expect(
        clippy::expect_used,
        reason = "without randomness no machine may be made"
    )]
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

/// Milliseconds since the host's boot, sleep included. It never jumps.
pub(crate) fn boot_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanos) = (
        u64::try_from(now.tv_sec).unwrap_or(0),
        u64::try_from(now.tv_nsec).unwrap_or(0),
    );
    seconds * 1000 + nanos / 1_000_000
}

/// Milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
