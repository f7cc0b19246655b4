//! Upload sessions: bytes arrive in order, are hashed as they are written, and become a blob of one
//! repository when their digest is what the client promised.
//!
//! Sessions live in memory, their bytes in `tmp/`: when the owning process ends they are gone, and a
//! client is told so (`BLOB_UPLOAD_UNKNOWN`). A request that breaks off keeps what was written.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_core::Digest;
use kiln_core::digest::Hasher;

use super::authority::{Action, Authority};
use super::durable::random_hex;
use super::error::StoreError;
use super::name::RepoName;
use super::quota::{Account, NAME_CHARGE};
use super::store::Store;

/// Sessions open at once in the whole store.
pub const SESSIONS_MAX: usize = 512;
/// Sessions open at once for one caller.
pub const SESSIONS_PER_CALLER_MAX: usize = 64;
/// A session nobody wrote to for this long is dropped.
pub const SESSION_IDLE_MAX: Duration = Duration::from_secs(3600);
/// Bytes after which the disk is asked to begin writing, so that the last fsync is short.
const WRITE_BACK_BYTES: u64 = 16 << 20;
/// Bytes between two looks at the free space.
const ROOM_CHECK_BYTES: u64 = 32 << 20;

/// One upload.
#[derive(Debug)]
struct Session {
    repo: RepoName,
    owner: String,
    file: File,
    path: PathBuf,
    hasher: Hasher,
    size: u64,
    written_back: u64,
    writing_back: Arc<AtomicBool>,
    room_checked: u64,
    account: Option<Arc<Account>>,
    /// False once its file has become a blob.
    pending: bool,
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.pending {
            let _ = fs::remove_file(&self.path);
            if let Some(account) = &self.account {
                account.refund(self.size);
            }
        }
    }
}

#[derive(Debug)]
enum Slot {
    Idle {
        session: Box<Session>,
        since: Instant,
    },
    Busy {
        repo: RepoName,
        owner: String,
    },
}

impl Slot {
    fn belongs_to(&self, repo: &RepoName, owner: &str) -> bool {
        match self {
            Self::Idle { session, .. } => session.repo == *repo && session.owner == owner,
            Self::Busy { repo: r, owner: o } => r == repo && o == owner,
        }
    }

    fn owner(&self) -> &str {
        match self {
            Self::Idle { session, .. } => &session.owner,
            Self::Busy { owner, .. } => owner,
        }
    }
}

/// The open sessions.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    slots: Mutex<HashMap<String, Slot>>,
}

impl Uploads {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops sessions that have been idle too long, or all of a tree.
    fn drop_where(&self, unwanted: impl Fn(&Session, Instant) -> bool) {
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
        drop(dropped);
    }

    pub(super) fn drop_tree(&self, tree: &RepoName) {
        self.drop_where(|session, _| session.repo.is_under(tree.as_str()));
    }

    pub(super) fn count(&self) -> usize {
        self.lock().len()
    }
}

/// A session in the hands of one request. Dropping it leaves the session as far as it came.
#[derive(Debug)]
pub struct Upload {
    store: Arc<Store>,
    id: String,
    session: Option<Box<Session>>,
}

impl Drop for Upload {
    fn drop(&mut self) {
        let mut slots = self.store.uploads.lock();
        match self.session.take() {
            Some(session) => {
                let since = Instant::now();
                slots.insert(self.id.clone(), Slot::Idle { session, since });
            }
            None => drop(slots.remove(&self.id)),
        }
    }
}

impl Store {
    /// Begins an upload to a repository.
    ///
    /// # Errors
    /// No right, no room, or too many sessions.
    pub fn begin_upload(
        self: &Arc<Self>,
        authority: &Authority,
        repo: &RepoName,
    ) -> Result<Upload, StoreError> {
        authority.check(Action::Push, repo)?;
        self.check_room()?;
        let account = self.account_of(authority)?;
        if let Some(account) = &account {
            account.charge(0)?;
        }
        let now = Instant::now();
        self.uploads
            .drop_where(|_, since| now.duration_since(since) >= SESSION_IDLE_MAX);
        let owner = authority.session_owner();
        let id = random_hex()?;
        self.reserve_slot(&id, repo, &owner)?;
        let mut upload = Upload {
            store: self.clone(),
            id,
            session: None,
        };
        let (file, path) = self.durable.temp_file()?;
        upload.session = Some(Box::new(Session {
            repo: repo.clone(),
            owner,
            file,
            path,
            hasher: Hasher::default(),
            size: 0,
            written_back: 0,
            writing_back: Arc::default(),
            room_checked: 0,
            account,
            pending: true,
        }));
        Ok(upload)
    }

    /// Drops a session of host code, if it is still there.
    pub(crate) fn cancel_upload(&self, id: &str) {
        let dropped = self.uploads.lock().remove(id);
        drop(dropped);
    }

    fn reserve_slot(&self, id: &str, repo: &RepoName, owner: &str) -> Result<(), StoreError> {
        let mut slots = self.uploads.lock();
        let mine = slots.values().filter(|slot| slot.owner() == owner).count();
        let what = "unfinished uploads";
        for (count, max) in [(mine, SESSIONS_PER_CALLER_MAX), (slots.len(), SESSIONS_MAX)] {
            if count >= max {
                return Err(StoreError::TooMany {
                    what,
                    max: max as u64,
                });
            }
        }
        let (repo, owner) = (repo.clone(), owner.to_owned());
        slots.insert(id.to_owned(), Slot::Busy { repo, owner });
        Ok(())
    }

    /// Takes up a session begun by the same caller for the same repository.
    ///
    /// # Errors
    /// [`StoreError::UploadUnknown`], [`StoreError::UploadBusy`], or no right any more.
    pub fn resume_upload(
        self: &Arc<Self>,
        authority: &Authority,
        repo: &RepoName,
        id: &str,
    ) -> Result<Upload, StoreError> {
        authority.check(Action::Push, repo)?;
        let owner = authority.session_owner();
        let mut slots = self.uploads.lock();
        let slot = slots.get_mut(id).ok_or(StoreError::UploadUnknown)?;
        if !slot.belongs_to(repo, &owner) {
            return Err(StoreError::UploadUnknown);
        }
        let repo = repo.clone();
        match std::mem::replace(slot, Slot::Busy { repo, owner }) {
            Slot::Idle { session, .. } => Ok(Upload {
                store: self.clone(),
                id: id.to_owned(),
                session: Some(session),
            }),
            Slot::Busy { .. } => Err(StoreError::UploadBusy),
        }
    }
}

impl Upload {
    /// Names the session in later requests.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// Bytes received so far.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.session.as_ref().map_or(0, |session| session.size)
    }

    fn session(&mut self) -> Result<&mut Session, StoreError> {
        self.session.as_deref_mut().ok_or(StoreError::UploadUnknown)
    }

    /// Appends bytes. After an error the session stands where it stood before.
    ///
    /// # Errors
    /// Quota, a full disk, or another file error.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let store = self.store.clone();
        let session = self.session()?;
        let count = bytes.len() as u64;
        if session.size.saturating_add(count) - session.room_checked >= ROOM_CHECK_BYTES {
            store.check_room()?;
            session.room_checked = session.size;
        }
        if let Some(account) = &session.account {
            account.charge(count)?;
        }
        let written = store.durable.step("write blob").and_then(|()| {
            session
                .file
                .write_all(bytes)
                .map_err(StoreError::io("write", &session.path))
        });
        if let Err(error) = written {
            if let Some(account) = &session.account {
                account.refund(count);
            }
            session.rewind_to_size()?;
            return Err(error);
        }
        session.hasher.update(bytes);
        session.size += count;
        session.begin_write_back();
        Ok(())
    }

    /// Gives the session up and removes its bytes.
    pub fn cancel(mut self) {
        self.session = None;
    }

    /// Makes the bytes a blob of the repository. The authority is asked once more, immediately before
    /// the blob can be seen; a wrong digest ends the session.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], a lease that is over, or a file error.
    pub fn commit(
        mut self,
        authority: &Authority,
        expected: &Digest,
    ) -> Result<(Digest, u64), StoreError> {
        let store = self.store.clone();
        let mut session = self.session.take().ok_or(StoreError::UploadUnknown)?;
        let (actual, size) = session.hasher.clone().finish();
        if actual != *expected {
            return Err(StoreError::DigestMismatch {
                expected: *expected,
                actual,
            });
        }
        store.durable.step("sync blob")?;
        session
            .file
            .sync_all()
            .map_err(StoreError::io("sync", &session.path))?;
        authority.check(Action::Push, &session.repo)?;
        let _names = store.linking();
        store.note_linked(expected);
        store.put_content(expected, &session.file, &session.path)?;
        session.pending = false;
        let link = store.blob_link(&session.repo, expected);
        let linked_before = super::store::is_there(&link)?;
        store.durable.mark(&link)?;
        if let Some(account) = &session.account {
            if linked_before {
                account.refund(size);
            } else {
                // One name over the bound is let through: the bytes were charged already.
                let _ = account.charge(NAME_CHARGE);
            }
        }
        Ok((*expected, size))
    }

    /// As [`Self::commit`] with whatever digest the bytes have: for host code that has no promise to check.
    ///
    /// # Errors
    /// A lease that is over, or a file error.
    pub fn commit_any(self, authority: &Authority) -> Result<(Digest, u64), StoreError> {
        let session = self.session.as_ref().ok_or(StoreError::UploadUnknown)?;
        let (digest, _) = session.hasher.clone().finish();
        self.commit(authority, &digest)
    }
}

impl Session {
    /// After a failed write: the file ends again where the hash stands.
    fn rewind_to_size(&mut self) -> Result<(), StoreError> {
        use std::io::{Seek, SeekFrom};
        self.file
            .set_len(self.size)
            .and_then(|()| self.file.seek(SeekFrom::Start(self.size)))
            .map(drop)
            .map_err(StoreError::io("cut back", &self.path))
    }

    /// Has the disk write what came so far while more comes in. At most one such thread per session.
    fn begin_write_back(&mut self) {
        if self.size - self.written_back < WRITE_BACK_BYTES
            || self.writing_back.swap(true, Ordering::AcqRel)
        {
            return;
        }
        self.written_back = self.size;
        let running = self.writing_back.clone();
        let Ok(file) = self.file.try_clone() else {
            running.store(false, Ordering::Release);
            return;
        };
        let work = move || {
            // A failure here is met again, and reported, by the fsync of the commit.
            let _ = file.sync_data();
            running.store(false, Ordering::Release);
        };
        let spawned = std::thread::Builder::new()
            .name("kiln-write-back".to_owned())
            .spawn(work);
        if spawned.is_err() {
            self.writing_back.store(false, Ordering::Release);
        }
    }
}
