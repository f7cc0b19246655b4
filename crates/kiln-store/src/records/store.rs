//! The directory of all records: begin, list, show, open, prune.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use kiln_core::{JobId, Observed};

use super::files::{read, replace, sync_dir};
use super::process::ProcessMark;
use super::record::{
    JobRecord, NewRecord, RECORD_SCHEMA, RecordError, RecordState, Written, WrittenState,
};
use super::writer::JobWriter;

/// Records kept when nothing else is configured.
pub const KEEP_DEFAULT: usize = 500;
/// Most entries of the directory that are looked at.
const ENTRIES_MAX: usize = 100_000;
/// Directories being made or removed begin so, and carry the mark of the process at work.
const WORK_PREFIX: &str = ".work-";

/// All records under one directory. Several processes may use it at once.
#[derive(Clone, Debug)]
pub struct Records {
    root: PathBuf,
}

/// A part of the list.
#[derive(Debug, Default)]
pub struct Listing {
    /// Newest first.
    pub records: Vec<JobRecord>,
    /// Records that are there but cannot be read.
    pub unreadable: Vec<Unreadable>,
    /// Whether older ones follow.
    pub more: bool,
}

/// A record that cannot be read.
#[derive(Debug)]
pub struct Unreadable {
    /// The job.
    pub id: JobId,
    /// Why.
    pub error: RecordError,
}

/// What a pruning did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pruned {
    /// Records removed.
    pub removed: usize,
    /// Records kept, those of running jobs among them.
    pub kept: usize,
}

impl Records {
    /// Uses `root`, made when it is not there.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub fn open(root: &Path) -> Result<Self, RecordError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(RecordError::io("create", root))?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Directory of one job's files.
    #[must_use]
    pub fn dir_of(&self, id: &JobId) -> PathBuf {
        self.root.join(id.as_str())
    }

    /// Writes the record of a job that starts now, in this process. It appears as a whole or not at all.
    ///
    /// # Errors
    /// [`RecordError::Exists`], or a file error.
    pub fn begin(&self, new: NewRecord) -> Result<JobWriter, RecordError> {
        let process = ProcessMark::own();
        let work = self.work_dir(&process, &new.id);
        let id = new.id.clone();
        let written = Written {
            schema: RECORD_SCHEMA,
            id: new.id,
            tenant: new.tenant,
            kind: new.kind,
            title: new.title,
            started_unix_ms: new.started_unix_ms,
            process,
            state: WrittenState::Running,
            receipt: None,
            details: serde_json::Value::Null,
            log_bytes: 0,
            log_cut_bytes: 0,
        };
        let dir = self.dir_of(&id);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&work)
            .map_err(RecordError::io("create", &work))?;
        let made = replace(&work.join("record.json"), &written)
            .and_then(|()| JobWriter::open(&work, &dir, written))
            .and_then(|writer| match fs::rename(&work, &dir) {
                Ok(()) => Ok(writer),
                Err(error) => {
                    writer.abandon();
                    match error.kind() {
                        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
                            Err(RecordError::Exists { id })
                        }
                        _ => Err(RecordError::io("put in place", &dir)(error)),
                    }
                }
            });
        match made {
            Ok(writer) => sync_dir(&self.root).map(|()| writer),
            Err(error) => {
                let _ = fs::remove_dir_all(&work);
                Err(error)
            }
        }
    }

    fn work_dir(&self, process: &ProcessMark, id: &JobId) -> PathBuf {
        let name = format!(
            "{WORK_PREFIX}{}-{}-{id}",
            process.pid, process.started_ticks
        );
        self.root.join(name)
    }

    /// Reads one record.
    ///
    /// # Errors
    /// [`RecordError::Unknown`], newer, damaged, or a file error.
    pub fn show(&self, id: &JobId) -> Result<JobRecord, RecordError> {
        let written: Written = read(&self.dir_of(id).join("record.json")).map_err(absent(id))?;
        Ok(written.into())
    }

    /// The newest records, at most `max`, skipping `skip`. Job ids begin with their time, so their
    /// order is the order of the list.
    ///
    /// # Errors
    /// The directory cannot be read; single bad records are told in the list.
    pub fn list(&self, skip: usize, max: usize) -> Result<Listing, RecordError> {
        let ids = self.ids_newest_first()?;
        let mut listing = Listing {
            more: ids.len() > skip.saturating_add(max),
            ..Listing::default()
        };
        for id in ids.into_iter().skip(skip).take(max) {
            match self.show(&id) {
                Ok(record) => listing.records.push(record),
                // Pruned in the meantime.
                Err(RecordError::Unknown { .. }) => {}
                Err(error) => listing.unreadable.push(Unreadable { id, error }),
            }
        }
        Ok(listing)
    }

    /// Opens a job's log for reading. While the job runs it grows.
    ///
    /// # Errors
    /// [`RecordError::Unknown`] or a file error.
    pub fn open_log(&self, id: &JobId) -> Result<File, RecordError> {
        self.open_file(id, "log")
    }

    /// Opens a job's events: one JSON object a line.
    ///
    /// # Errors
    /// [`RecordError::Unknown`] or a file error.
    pub fn open_events(&self, id: &JobId) -> Result<File, RecordError> {
        self.open_file(id, "events.jsonl")
    }

    fn open_file(&self, id: &JobId, name: &str) -> Result<File, RecordError> {
        let path = self.dir_of(id).join(name);
        File::open(&path)
            .map_err(RecordError::io("open", path))
            .map_err(absent(id))
    }

    /// What the host observed, when the job came that far.
    ///
    /// # Errors
    /// Newer, damaged, or a file error.
    pub fn observed(&self, id: &JobId) -> Result<Option<Observed>, RecordError> {
        match read(&self.dir_of(id).join("observed.json")).map_err(absent(id)) {
            Ok(observed) => Ok(Some(observed)),
            Err(RecordError::Unknown { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes all but the newest `keep` records, never that of a running job, and what killed
    /// processes left half-made.
    ///
    /// # Errors
    /// File errors.
    pub fn prune(&self, keep: usize) -> Result<Pruned, RecordError> {
        self.reap()?;
        let mut pruned = Pruned::default();
        for (index, id) in self.ids_newest_first()?.into_iter().enumerate() {
            let running = || {
                let state = self.show(&id).map(|record| record.state);
                matches!(state, Ok(RecordState::Running))
            };
            if index < keep || running() {
                pruned.kept += 1;
            } else {
                self.remove(&id)?;
                pruned.removed += 1;
            }
        }
        Ok(pruned)
    }

    /// Moves a record out of sight first, so that nobody sees half of it.
    fn remove(&self, id: &JobId) -> Result<(), RecordError> {
        let dir = self.dir_of(id);
        let work = self.work_dir(&ProcessMark::own(), id);
        match fs::rename(&dir, &work) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(RecordError::io("remove", &dir)(error)),
        }
        fs::remove_dir_all(&work).map_err(RecordError::io("remove", &work))
    }

    /// Removes what processes that are gone left half-made.
    fn reap(&self) -> Result<(), RecordError> {
        let own = ProcessMark::own();
        for name in self.names()? {
            let Some(rest) = name.strip_prefix(WORK_PREFIX) else {
                continue;
            };
            let mut words = rest.splitn(3, '-');
            let pid = words.next().and_then(|word| word.parse().ok());
            let ticks = words.next().and_then(|word| word.parse().ok());
            let at_work = match (pid, ticks) {
                (Some(pid), Some(started_ticks)) => ProcessMark {
                    pid,
                    started_ticks,
                    boot_id: own.boot_id.clone(),
                }
                .is_alive(),
                _ => false,
            };
            if !at_work {
                let path = self.root.join(&name);
                match fs::remove_dir_all(&path) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(RecordError::io("reap", path)(error)),
                }
            }
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>, RecordError> {
        let failed = || RecordError::io("list", &self.root);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.root)
            .map_err(failed())?
            .take(ENTRIES_MAX)
        {
            if let Ok(name) = entry.map_err(failed())?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn ids_newest_first(&self) -> Result<Vec<JobId>, RecordError> {
        let names = self.names()?;
        let mut ids: Vec<JobId> = names.iter().filter_map(|name| name.parse().ok()).collect();
        // The first letter is the kind of job; time follows.
        ids.sort_unstable_by(|a, b| b.as_str()[1..].cmp(&a.as_str()[1..]));
        Ok(ids)
    }
}

/// Absent files mean that the job is unknown.
fn absent(id: &JobId) -> impl FnOnce(RecordError) -> RecordError {
    let id = id.clone();
    move |error| match error {
        RecordError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            RecordError::Unknown { id }
        }
        other => other,
    }
}
