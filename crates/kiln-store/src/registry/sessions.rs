//! The files of upload sessions, and the table of those that are open.
//!
//! ```text
//! uploads/<id>         the bytes so far: their count is where the session stands
//! uploads/<id>.json    repository and caller
//! ```
//!
//! Neither needs to survive a power loss, only the end of a process: nothing here is synced before the commit.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::durable::is_absent;
use super::error::StoreError;
use super::name::RepoName;
use super::store::Store;
use super::upload::{SESSION_IDLE_MAX, SESSIONS_MAX, Session};

/// Largest record of a session, bytes.
const RECORD_BYTES_MAX: u64 = 4096;
/// What a record's name ends with.
const RECORD_SUFFIX: &str = ".json";

/// Whose bytes these are.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    repo: RepoName,
    owner: String,
}

/// Where a session is.
#[derive(Debug)]
pub(super) enum Slot {
    /// Nobody writes to it.
    Idle {
        session: Box<Session>,
        since: Instant,
    },
    /// A request has it.
    Busy {
        repo: RepoName,
        owner: String,
        group: Option<String>,
    },
}

impl Slot {
    pub(super) fn belongs_to(&self, repo: &RepoName, owner: &str) -> bool {
        match self {
            Self::Idle { session, .. } => session.repo == *repo && session.owner == owner,
            Self::Busy {
                repo: r, owner: o, ..
            } => r == repo && o == owner,
        }
    }

    pub(super) fn owner(&self) -> &str {
        match self {
            Self::Idle { session, .. } => &session.owner,
            Self::Busy { owner, .. } => owner,
        }
    }

    pub(super) fn group(&self) -> Option<&str> {
        match self {
            Self::Idle { session, .. } => session.group.as_deref(),
            Self::Busy { group, .. } => group.as_deref(),
        }
    }
}

/// The open sessions.
#[derive(Debug)]
pub(super) struct Uploads {
    dir: PathBuf,
    slots: Mutex<HashMap<String, Slot>>,
}

/// A file that is made and removed, to see how files are dated.
const CLOCK: &str = "clock";

impl Uploads {
    /// Finds what earlier owners left; what is expired or incomplete is removed.
    pub(super) fn open(dir: PathBuf) -> Result<Self, StoreError> {
        let mut slots = HashMap::new();
        let now = now_of(&dir);
        for entry in fs::read_dir(&dir).map_err(StoreError::io("list", &dir))? {
            let path = entry.map_err(StoreError::io("list", &dir))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(id) = name.filter(|name| is_id(name)) else {
                // A record is removed with its bytes, or when it has none.
                let of = name.and_then(|name| name.strip_suffix(RECORD_SUFFIX));
                if of.is_none_or(|id| !is_id(id) || !dir.join(id).is_file()) {
                    let _best_effort = fs::remove_file(&path);
                }
                continue;
            };
            match found(&path, now).map_err(StoreError::io("examine", &path))? {
                Some((session, since)) if slots.len() < SESSIONS_MAX => {
                    let session = Box::new(session);
                    slots.insert(id.to_owned(), Slot::Idle { session, since });
                }
                _ => remove_files(&path),
            }
        }
        Ok(Self {
            dir,
            slots: Mutex::new(slots),
        })
    }

    /// The time by the clock that dates the store's files.
    pub(super) fn now(&self) -> SystemTime {
        now_of(&self.dir)
    }

    pub(super) fn data_path(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the sessions that nobody has at this moment and that are not wanted. Tells how many.
    fn drop_where(&self, unwanted: impl Fn(&Session, Instant) -> bool) -> u64 {
        let mut slots = self.lock();
        let gone: Vec<String> = slots
            .iter()
            .filter(|(_, slot)| match slot {
                Slot::Idle { session, since } => unwanted(session, *since),
                Slot::Busy { .. } => false,
            })
            .map(|(id, _)| id.clone())
            .collect();
        let dropped: Vec<_> = gone.iter().filter_map(|id| slots.remove(id)).collect();
        drop(slots);
        let mut count = 0;
        for slot in dropped {
            if let Slot::Idle { session, .. } = slot {
                session.discard();
                count += 1;
            }
        }
        count
    }

    /// Ends sessions that were idle for [`SESSION_IDLE_MAX`].
    pub(super) fn drop_expired(&self) -> u64 {
        let now = Instant::now();
        self.drop_where(|_, since| now.duration_since(since) >= SESSION_IDLE_MAX)
    }

    pub(super) fn drop_tree(&self, tree: &RepoName) {
        self.drop_where(|session, _| session.repo.is_under(tree.as_str()));
    }

    /// Sessions begun, or gone on with, while this process owned the store.
    pub(super) fn count(&self) -> usize {
        let in_use = |slot: &&Slot| match slot {
            Slot::Idle { session, .. } => session.is_open(),
            Slot::Busy { .. } => true,
        };
        self.lock().values().filter(in_use).count()
    }
}

impl Store {
    /// Writes the record of a session, whose bytes are in place.
    pub(super) fn note_session(&self, session: &Session) -> Result<(), StoreError> {
        let record = Record {
            repo: session.repo.clone(),
            owner: session.owner.clone(),
        };
        let path = record_path(&session.path);
        let text = serde_json::to_vec(&record)
            .map_err(|error| StoreError::io("write", &path)(error.into()))?;
        self.durable.write_unsynced(&path, &text)
    }
}

/// The 32 hex digits that name a session.
fn is_id(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

fn record_path(data: &Path) -> PathBuf {
    let mut name = data.as_os_str().to_owned();
    name.push(RECORD_SUFFIX);
    name.into()
}

/// Removes the files of a session. Best effort: what stays is removed when the store is opened.
pub(super) fn remove_files(data: &Path) {
    let _ = fs::remove_file(data);
    let _ = fs::remove_file(record_path(data));
}

/// The time by the clock that dates files here, which may be another machine's, or not what this process is told; its own where nothing can be written.
fn now_of(dir: &Path) -> SystemTime {
    let path = dir.join(CLOCK);
    let written = fs::write(&path, []).and_then(|()| fs::symlink_metadata(&path)?.modified());
    // One that stays is removed with what else is no session.
    let _best_effort = fs::remove_file(&path);
    written.unwrap_or_else(|_| SystemTime::now())
}

/// A session as its files tell it; `None` when they do not, or when it is expired.
fn found(data: &Path, now: SystemTime) -> io::Result<Option<(Session, Instant)>> {
    let meta = fs::symlink_metadata(data)?;
    // What is no file is nobody's session, and reading it could take for ever.
    let record = record_path(data);
    match fs::symlink_metadata(&record) {
        Ok(of_record) if of_record.is_file() && meta.is_file() => {}
        Ok(_) => return Ok(None),
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    let file = fs::File::open(record)?;
    let mut text = Vec::new();
    file.take(RECORD_BYTES_MAX).read_to_end(&mut text)?;
    let Ok(record) = serde_json::from_slice::<Record>(&text) else {
        return Ok(None);
    };
    // Written in the future: the clock jumped. It has its whole time again.
    let age = now
        .duration_since(meta.modified()?)
        .unwrap_or(Duration::ZERO);
    let Some(since) = Instant::now().checked_sub(age) else {
        return Ok(None);
    };
    if age >= SESSION_IDLE_MAX {
        return Ok(None);
    }
    let session = Session::at(record.repo, record.owner, data.to_owned(), meta.len());
    Ok(Some((session, since)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_told_by_the_clock_that_dates_files() {
        let dir = tempfile::tempdir().expect("dir");
        let uploads = Uploads::open(dir.path().to_owned()).expect("opens");
        let written = |name: &str| {
            let path = dir.path().join(name);
            fs::write(&path, b"x").expect("written");
            let meta = fs::metadata(&path).expect("there");
            meta.modified().expect("dated")
        };
        // This process's own clock is finer than that of most disks: it would be ahead of what is written next.
        for _ in 0..50 {
            let before = written("before");
            let now = uploads.now();
            let after = written("after");
            assert!(
                before <= now && now <= after,
                "{before:?} {now:?} {after:?}"
            );
        }
        assert!(!dir.path().join(CLOCK).exists());
    }

    #[test]
    fn what_is_no_file_is_no_session_and_holds_up_nobody() {
        let dir = tempfile::tempdir().expect("dir");
        let id = |digit: &str| dir.path().join(digit.repeat(32));
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        let pipe = |path: &Path| rustix::fs::mkfifoat(rustix::fs::CWD, path, mode).expect("pipe");
        fs::write(id("a"), b"bytes").expect("written");
        pipe(&record_path(&id("a")));
        pipe(&id("b"));
        fs::write(record_path(&id("b")), b"{}").expect("written");
        let uploads = Uploads::open(dir.path().to_owned()).expect("opens");
        assert!(uploads.lock().is_empty());
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
    }
}
