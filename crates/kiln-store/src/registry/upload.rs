//! Upload sessions: bytes arrive in order, are hashed as they are written, and become a blob of one
//! repository when their digest is what the client promised.
//!
//! A session is two files in `uploads/`: the bytes so far, and a record of whose they are. It outlives the
//! process that owned the store: the next owner takes it up where the bytes end and hashes them again when it
//! must. A request that breaks off keeps what was written; what nobody goes on with is removed after
//! [`SESSION_IDLE_MAX`]. Read next: [`super::sessions`] (the files, and what an owner finds of its predecessor).

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kiln_core::Digest;
use kiln_core::digest::Hasher;

use super::authority::{Action, Authority};
use super::durable::random_hex;
use super::error::StoreError;
use super::name::RepoName;
use super::quota::{Account, NAME_CHARGE};
use super::sessions::{Slot, remove_files};
use super::store::Store;

/// Sessions open at once in the whole store.
pub const SESSIONS_MAX: usize = 1024;
/// Sessions open at once for one tenant, whoever they are: its people have as many tokens as they like, its guests as many attempts.
pub const SESSIONS_PER_TENANT_MAX: usize = 128;
/// Sessions open at once for one caller.
pub const SESSIONS_PER_CALLER_MAX: usize = 64;
/// A session nobody wrote to for this long is dropped.
pub const SESSION_IDLE_MAX: Duration = Duration::from_secs(3600);
/// Bytes after which the disk is asked to begin writing, so that the last fsync is short.
const WRITE_BACK_BYTES: u64 = 16 << 20;
/// Bytes between two looks at the free space.
const ROOM_CHECK_BYTES: u64 = 32 << 20;

/// Buffer for hashing what an earlier owner wrote, bytes.
const HASH_BUFFER_BYTES: usize = 512 << 10;

/// One upload.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) repo: RepoName,
    pub(super) owner: String,
    /// See [`Authority::session_group`]; unknown until this process hears of what an earlier one left.
    pub(super) group: Option<String>,
    pub(super) path: PathBuf,
    pub(super) size: u64,
    /// `None` until this process touches what an earlier one wrote.
    content: Option<Content>,
    written_back: u64,
    writing_back: Arc<AtomicBool>,
    room_checked: u64,
    account: Option<Arc<Account>>,
}

/// The open file, at its end, and the hash of all of it.
#[derive(Debug)]
struct Content {
    file: File,
    hasher: Hasher,
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
        self.uploads.drop_expired();
        let (owner, group) = (authority.session_owner(), authority.session_group(repo));
        let id = random_hex()?;
        self.reserve_slot(&id, repo, &owner, group.as_deref())?;
        let mut upload = Upload {
            store: self.clone(),
            id,
            session: None,
        };
        let path = self.uploads.data_path(&upload.id);
        let file = self.durable.new_file(&path)?;
        let mut session = Box::new(Session::at(repo.clone(), owner, path, 0));
        session.account = account;
        session.group = group;
        session.content = Some(Content {
            file,
            hasher: Hasher::default(),
        });
        if let Err(error) = self.note_session(&session) {
            session.discard();
            return Err(error);
        }
        upload.session = Some(session);
        Ok(upload)
    }

    /// Drops a session of host code, if it is still there.
    pub(crate) fn cancel_upload(&self, id: &str) {
        let dropped = self.uploads.lock().remove(id);
        if let Some(Slot::Idle { session, .. }) = dropped {
            session.discard();
        }
    }

    fn reserve_slot(
        &self,
        id: &str,
        repo: &RepoName,
        owner: &str,
        group: Option<&str>,
    ) -> Result<(), StoreError> {
        let mut slots = self.uploads.lock();
        let mine = slots.values().filter(|slot| slot.owner() == owner).count();
        let of_group = |slot: &&Slot| group.is_some() && slot.group() == group;
        let tenants = slots.values().filter(of_group).count();
        let what = "unfinished uploads";
        for (count, max) in [
            (mine, SESSIONS_PER_CALLER_MAX),
            (tenants, SESSIONS_PER_TENANT_MAX),
            (slots.len(), SESSIONS_MAX),
        ] {
            if count >= max {
                return Err(StoreError::TooMany {
                    what,
                    max: max as u64,
                });
            }
        }
        let slot = Slot::Busy {
            repo: repo.clone(),
            owner: owner.to_owned(),
            group: group.map(str::to_owned),
        };
        slots.insert(id.to_owned(), slot);
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
        self.uploads.drop_expired();
        let owner = authority.session_owner();
        let mut slots = self.uploads.lock();
        let slot = slots.get_mut(id).ok_or(StoreError::UploadUnknown)?;
        if !slot.belongs_to(repo, &owner) {
            return Err(StoreError::UploadUnknown);
        }
        let repo = repo.clone();
        let group = authority.session_group(&repo);
        let busy = Slot::Busy {
            repo,
            owner,
            group: group.clone(),
        };
        let taken = std::mem::replace(slot, busy);
        drop(slots);
        let Slot::Idle { session, .. } = taken else {
            return Err(StoreError::UploadBusy);
        };
        let mut upload = Upload {
            store: self.clone(),
            id: id.to_owned(),
            session: Some(session),
        };
        let session = upload.session()?;
        session.group = group;
        if session.content.is_none() && session.account.is_none() {
            // What an earlier owner took counts against the same bound.
            if let Some(account) = self.account_of(authority)? {
                account.charge(session.size)?;
                session.account = Some(account);
            }
        }
        Ok(upload)
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
        let path = session.path.clone();
        let written = session.content().and_then(|content| {
            store.durable.step("write blob")?;
            content
                .file
                .write_all(bytes)
                .map_err(StoreError::io("write", &path))
        });
        if let Err(error) = written {
            if let Some(account) = &session.account {
                account.refund(count);
            }
            session.rewind_to_size()?;
            return Err(error);
        }
        session.content()?.hasher.update(bytes);
        session.size += count;
        session.begin_write_back();
        Ok(())
    }

    /// Gives the session up and removes its bytes.
    pub fn cancel(mut self) {
        if let Some(session) = self.session.take() {
            session.discard();
        }
    }

    /// Makes the bytes a blob of the repository. The authority is asked once more, immediately before
    /// the blob can be seen. A wrong digest or a lease that is over ends the session; after a file error it
    /// can be tried again.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], a lease that is over, or a file error.
    pub fn commit(
        mut self,
        authority: &Authority,
        expected: &Digest,
    ) -> Result<(Digest, u64), StoreError> {
        let store = self.store.clone();
        let session = self.session()?;
        let (actual, size) = session.digest()?;
        if actual != *expected {
            self.cancel();
            return Err(StoreError::DigestMismatch {
                expected: *expected,
                actual,
            });
        }
        let path = session.path.clone();
        let content = session.content()?;
        store.durable.step("sync blob")?;
        content
            .file
            .sync_all()
            .map_err(StoreError::io("sync", &path))?;
        if let Err(error) = authority.check(Action::Push, &session.repo) {
            self.cancel();
            return Err(error);
        }
        let linked_before = self.put_in_place(expected)?;
        let Some(session) = self.session.take() else {
            return Ok((*expected, size));
        };
        store.durable.step("end upload")?;
        remove_files(&session.path);
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

    /// First the link, then the content: killed in between, the session is whole and can be committed again.
    /// Tells whether the link was there before.
    fn put_in_place(&mut self, digest: &Digest) -> Result<bool, StoreError> {
        let store = self.store.clone();
        let session = self.session()?;
        let path = session.path.clone();
        let link = store.blob_link(&session.repo, digest);
        let content = session.content()?;
        let _names = store.linking();
        store.note_linked(digest);
        let linked_before = super::store::is_there(&link)?;
        store.durable.mark(&link)?;
        let put = store.put_content(digest, &content.file, &path);
        if put.is_err() && !super::store::is_there(&path)? {
            self.session = None;
        }
        put.map(|()| linked_before)
    }

    /// As [`Self::commit`] with whatever digest the bytes have: for host code that has no promise to check.
    ///
    /// # Errors
    /// A lease that is over, or a file error.
    pub fn commit_any(mut self, authority: &Authority) -> Result<(Digest, u64), StoreError> {
        let (digest, _) = self.session()?.digest()?;
        self.commit(authority, &digest)
    }
}

impl Session {
    /// A session whose bytes, if any, were written by an earlier owner.
    pub(super) fn at(repo: RepoName, owner: String, path: PathBuf, size: u64) -> Self {
        Self {
            repo,
            owner,
            group: None,
            path,
            size,
            content: None,
            written_back: size,
            writing_back: Arc::default(),
            room_checked: size,
            account: None,
        }
    }

    /// Whether this process has touched its bytes.
    pub(super) fn is_open(&self) -> bool {
        self.content.is_some()
    }

    /// Ends the session: its files go, and what it took of the quota comes back.
    pub(super) fn discard(&self) {
        remove_files(&self.path);
        if let Some(account) = &self.account {
            account.refund(self.size);
        }
    }

    /// The open file; what an earlier owner wrote is hashed first.
    fn content(&mut self) -> Result<&mut Content, StoreError> {
        let opened = match self.content.take() {
            Some(content) => content,
            None => {
                let (content, size) =
                    Content::of_file(&self.path).map_err(StoreError::io("take up", &self.path))?;
                self.size = size;
                content
            }
        };
        Ok(self.content.insert(opened))
    }

    fn digest(&mut self) -> Result<(Digest, u64), StoreError> {
        Ok(self.content()?.hasher.clone().finish())
    }

    /// After a failed write: the file ends again where the hash stands.
    fn rewind_to_size(&mut self) -> Result<(), StoreError> {
        let size = self.size;
        let Some(content) = &mut self.content else {
            return Ok(());
        };
        content
            .file
            .set_len(size)
            .and_then(|()| content.file.seek(SeekFrom::Start(size)))
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
        let Some(Ok(file)) = self.content.as_ref().map(|it| it.file.try_clone()) else {
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

impl Content {
    /// Opens and hashes the bytes of an earlier owner; also gives how many there are.
    fn of_file(path: &std::path::Path) -> std::io::Result<(Self, u64)> {
        let mut file = fs::OpenOptions::new().read(true).write(true).open(path)?;
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; HASH_BUFFER_BYTES];
        let mut size = 0;
        loop {
            let got = std::io::Read::read(&mut file, &mut buffer)?;
            if got == 0 {
                return Ok((Self { file, hasher }, size));
            }
            hasher.update(&buffer[..got]);
            size += got as u64;
        }
    }
}
