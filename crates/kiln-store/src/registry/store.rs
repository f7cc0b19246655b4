//! The registry's files: who owns the directory, where things lie, blobs and their links.
//!
//! ```text
//! VERSION                           layout version
//! lock                              held by the process that owns the store
//! blobs/sha256/ab/<hex>             content of blobs and manifests, named by its digest
//! repos/<name>/_blobs/<hex>         this repository may read this blob
//! repos/<name>/_manifests/<hex>     ... this manifest; holds media type and size
//! repos/<name>/_tags/<tag>          digest of a manifest
//! repos/<name>/_referrers/<subject hex>/<hex>   descriptor of a manifest about a subject
//! verified/<boot id>                which content was hashed since boot
//! corrupt/                          content found bad, kept for a person to look at
//! uploads/                          upload sessions, which outlive their owner: see [`super::sessions`]
//! tmp/                              unfinished writes; emptied on open
//! ```
//!
//! All functions block; the doors ([`super::http`]) call them off the async threads. Manifests, tags
//! and referrers are in [`super::repo`], uploads in [`super::upload`], collection in [`super::gc`].

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use kiln_core::Digest;
use tokio::sync::Semaphore;

use super::durable::{Durable, FaultHook, is_absent, sync_dir};
use super::error::StoreError;
use super::http::transfer::FAST_TRANSFERS;
use super::name::RepoName;
use super::quota::Quotas;
use super::sessions::Uploads;
use super::verified::{Verified, boot_id};

/// Layout version this code writes and reads.
pub const LAYOUT_VERSION: u32 = 1;
/// Free bytes below which nothing more is accepted, unless configured otherwise: 256 MiB.
pub const FREE_BYTES_MIN: u64 = 256 << 20;

/// Limits of a store.
#[derive(Clone)]
pub struct StoreConfig {
    /// Writes are refused while the file system has fewer free bytes than this.
    pub free_bytes_min: u64,
    /// For tests: called between the steps of every write.
    pub fault: Option<FaultHook>,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            free_bytes_min: FREE_BYTES_MIN,
            fault: None,
        }
    }
}

impl fmt::Debug for StoreConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreConfig")
            .field("free_bytes_min", &self.free_bytes_min)
            .finish_non_exhaustive()
    }
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process owns it: attach to that one instead.
    #[error("the registry in {} is owned by another kiln process", dir.display())]
    Owned {
        /// The store.
        dir: PathBuf,
    },
    /// A newer kiln wrote it, or it is no registry.
    #[error(
        "{} says {found:?}, and this kiln knows \"kiln-registry {LAYOUT_VERSION}\": {}",
        dir.join("VERSION").display(),
        other_layout(found)
    )]
    Version {
        /// The store.
        dir: PathBuf,
        /// What its version file says.
        found: String,
    },
    /// A file operation failed.
    #[error("the registry in {} cannot be opened", dir.display())]
    Files {
        /// The store.
        dir: PathBuf,
        /// What failed.
        #[source]
        source: Box<StoreError>,
    },
}

/// What to do about another layout: a newer one is said as ours is, anything else is damage.
fn other_layout(found: &str) -> &'static str {
    let number = found.strip_prefix("kiln-registry ").map(str::parse::<u32>);
    match number {
        Some(Ok(number)) if number > LAYOUT_VERSION => "use a newer kiln",
        Some(Ok(number)) if number < LAYOUT_VERSION => "use the kiln that wrote it",
        _ => {
            "the file is damaged; if nothing else there is, write those words into it, or move the directory away and run `kiln setup`"
        }
    }
}

/// The owned store. One per directory and host, by a file lock.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    pub(super) durable: Durable,
    pub(super) uploads: Uploads,
    pub(super) quotas: Quotas,
    verified: Verified,
    names: RwLock<()>,
    linked_meanwhile: Mutex<Option<HashSet<Digest>>>,
    config: StoreConfig,
    /// Permits to move bytes in large batches: see [`super::http::transfer`].
    pub(super) fast_transfers: Arc<Semaphore>,
    _lock: File,
}

/// An open blob whose content is known to be good.
#[derive(Debug)]
pub struct BlobFile {
    /// Open at no particular position: use positioned reads.
    pub file: File,
    /// Bytes.
    pub size: u64,
}

impl Store {
    /// Opens or creates the store in `dir` and becomes its owner until dropped.
    ///
    /// # Errors
    /// [`OpenError::Owned`] while another process owns it.
    pub fn open(dir: &Path, config: StoreConfig) -> Result<Self, OpenError> {
        let files = |source| OpenError::Files {
            dir: dir.to_owned(),
            source: Box::new(source),
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(StoreError::io("create", dir))
            .map_err(files)?;
        let lock = lock_dir(dir)?;
        check_version(dir, &config)?;
        Self::open_locked(dir, config, lock).map_err(files)
    }

    fn open_locked(dir: &Path, config: StoreConfig, lock: File) -> Result<Self, StoreError> {
        let tmp = dir.join("tmp");
        for name in [
            "blobs/sha256",
            "repos",
            "verified",
            "corrupt",
            "uploads",
            "tmp",
        ] {
            let path = dir.join(name);
            fs::create_dir_all(&path).map_err(StoreError::io("create", &path))?;
        }
        reap(&tmp)?;
        prune_left(&dir.join("repos").join(super::gc::QUARANTINE));
        sync_dir(dir)?;
        let verified = Verified::open(&dir.join("verified"), &boot_id()?)?;
        Ok(Self {
            root: dir.to_owned(),
            durable: Durable::new(tmp, config.fault.clone()),
            uploads: Uploads::open(dir.join("uploads"))?,
            quotas: Quotas::default(),
            verified,
            names: RwLock::default(),
            linked_meanwhile: Mutex::default(),
            config,
            fast_transfers: Arc::new(Semaphore::new(FAST_TRANSFERS)),
            _lock: lock,
        })
    }

    /// The directory of the store.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.root
    }

    /// Where a repository's directories are.
    pub(super) fn repo_dir(&self, repo: &RepoName) -> PathBuf {
        self.root.join("repos").join(repo.as_str())
    }

    pub(super) fn repos_dir(&self) -> PathBuf {
        self.root.join("repos")
    }

    pub(super) fn corrupt_dir(&self) -> PathBuf {
        self.root.join("corrupt")
    }

    pub(super) fn content_dir(&self) -> PathBuf {
        self.root.join("blobs").join("sha256")
    }

    /// Where content of this digest is.
    pub(super) fn content_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.content_dir().join(&hex[..2]).join(hex)
    }

    pub(super) fn blob_link(&self, repo: &RepoName, digest: &Digest) -> PathBuf {
        self.repo_dir(repo).join("_blobs").join(digest.hex())
    }

    /// Held while something is linked, so that collection and removal of names cannot come between.
    pub(super) fn linking(&self) -> RwLockReadGuard<'_, ()> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while names or content are removed.
    pub(super) fn removing(&self) -> RwLockWriteGuard<'_, ()> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was linked since a collection began; `None` when none is running.
    pub(super) fn linked_meanwhile(&self) -> MutexGuard<'_, Option<HashSet<Digest>>> {
        self.linked_meanwhile
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells a running collection that this content is wanted. Call under [`Self::linking`], before the link is made.
    pub(super) fn note_linked(&self, digest: &Digest) {
        if let Some(fresh) = self.linked_meanwhile().as_mut() {
            fresh.insert(*digest);
        }
    }

    /// Refuses when the file system is nearly full.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`].
    pub fn check_room(&self) -> Result<(), StoreError> {
        let stat = rustix::fs::statvfs(&self.root)
            .map_err(|errno| StoreError::io("examine", &self.root)(errno.into()))?;
        if stat.f_bavail.saturating_mul(stat.f_frsize) < self.config.free_bytes_min {
            return Err(StoreError::DiskFull {
                path: self.root.clone(),
                source: None,
            });
        }
        Ok(())
    }

    /// Opens content by digest alone. Whoever calls this has looked for a link first.
    ///
    /// `Ok(None)` when it is not there; [`StoreError::Corrupt`] when it was bad and has been set aside.
    pub(super) fn open_content(&self, digest: &Digest) -> Result<Option<BlobFile>, StoreError> {
        let path = self.content_path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(StoreError::io("open", &path)(error)),
        };
        let good = self
            .verified
            .check(digest, &file)
            .map_err(StoreError::io("read", &path))?;
        if !good {
            self.set_aside(digest)?;
            return Err(StoreError::Corrupt { digest: *digest });
        }
        let size = file
            .metadata()
            .map_err(StoreError::io("examine", &path))?
            .len();
        Ok(Some(BlobFile { file, size }))
    }

    /// Hashes stored content again in full, whatever is known of it; bad content is set aside.
    pub(super) fn scrub_content(&self, digest: &Digest) -> Result<bool, StoreError> {
        let path = self.content_path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if is_absent(&error) => return Ok(true),
            Err(error) => return Err(StoreError::io("open", &path)(error)),
        };
        let good = self.verified.check_in_full(digest, &file);
        if good.map_err(StoreError::io("read", &path))? {
            return Ok(true);
        }
        self.set_aside(digest)?;
        Ok(false)
    }

    /// Moves bad content to `corrupt/`, where no reader finds it and the next push heals it.
    fn set_aside(&self, digest: &Digest) -> Result<(), StoreError> {
        let path = self.content_path(digest);
        let name = format!("{}-{}", digest.hex(), super::durable::random_hex()?);
        let aside = self.corrupt_dir().join(name);
        self.verified.forget(digest);
        match fs::rename(&path, &aside) {
            Ok(()) => {}
            Err(error) if is_absent(&error) => return Ok(()),
            Err(error) => return Err(StoreError::io("set aside", &path)(error)),
        }
        // A good copy may have been pushed since the bad one was opened: then it goes back.
        let file = File::open(&aside).map_err(StoreError::io("open", &aside))?;
        if self
            .verified
            .check_in_full(digest, &file)
            .map_err(StoreError::io("read", &aside))?
        {
            return self.put_content(digest, &file, &aside);
        }
        tracing::error!(%digest, kept = %aside.display(), "stored content is corrupt: set aside");
        Ok(())
    }

    /// Removes content that nothing links to. Call under [`Self::removing`].
    pub(super) fn remove_content(&self, digest: &Digest) -> Result<(), StoreError> {
        self.verified.forget(digest);
        self.durable.remove(&self.content_path(digest)).map(drop)
    }

    /// Puts a finished, hashed temporary file where content of its digest belongs. Call under [`Self::linking`].
    pub(super) fn put_content(
        &self,
        digest: &Digest,
        file: &File,
        temp: &Path,
    ) -> Result<(), StoreError> {
        self.durable
            .move_into_place(temp, &self.content_path(digest))?;
        self.verified.record(digest, file)
    }

    /// Whether the repository may read this blob and the blob is there and good.
    ///
    /// # Errors
    /// File errors, or [`StoreError::Corrupt`].
    pub fn has_blob(&self, repo: &RepoName, digest: &Digest) -> Result<bool, StoreError> {
        match self.open_blob(repo, digest) {
            Ok(_) => Ok(true),
            Err(StoreError::BlobUnknown { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Opens a blob that was pushed or mounted to this repository.
    ///
    /// # Errors
    /// [`StoreError::BlobUnknown`] whenever this repository has no link, whatever others have.
    pub fn open_blob(&self, repo: &RepoName, digest: &Digest) -> Result<BlobFile, StoreError> {
        let unknown = || StoreError::BlobUnknown {
            repo: repo.clone(),
            digest: *digest,
        };
        if !is_there(&self.blob_link(repo, digest))? {
            return Err(unknown());
        }
        self.open_content(digest)?.ok_or_else(unknown)
    }

    /// Lets `to` read a blob that `from` can read. Rights on both are the caller's to check.
    ///
    /// # Errors
    /// [`StoreError::BlobUnknown`] when `from` does not have it.
    pub fn mount_blob(
        &self,
        from: &RepoName,
        to: &RepoName,
        digest: &Digest,
    ) -> Result<u64, StoreError> {
        let _names = self.linking();
        self.note_linked(digest);
        let blob = self.open_blob(from, digest)?;
        self.durable.mark(&self.blob_link(to, digest))?;
        Ok(blob.size)
    }

    /// As [`Self::mount_blob`], with the target's right and quota checked.
    pub(super) fn mount_charged(
        &self,
        authority: &super::authority::Authority,
        from: &RepoName,
        to: &RepoName,
        digest: &Digest,
    ) -> Result<u64, StoreError> {
        authority.check(super::authority::Action::Push, to)?;
        if !is_there(&self.blob_link(to, digest))?
            && let Some(account) = self.account_of(authority)?
        {
            account.charge(super::quota::NAME_CHARGE)?;
        }
        self.mount_blob(from, to, digest)
    }

    /// Takes a repository's right to a blob away. The bytes go at the next collection.
    ///
    /// # Errors
    /// [`StoreError::BlobUnknown`] when it has none.
    pub fn unlink_blob(&self, repo: &RepoName, digest: &Digest) -> Result<(), StoreError> {
        let _alone = self.removing();
        if self.durable.remove(&self.blob_link(repo, digest))? {
            self.prune_empty(repo);
            return Ok(());
        }
        Err(StoreError::BlobUnknown {
            repo: repo.clone(),
            digest: *digest,
        })
    }

    /// Removes directories of a repository that hold nothing any more. Call under [`Self::removing`].
    pub(super) fn prune_empty(&self, repo: &RepoName) {
        let dir = self.repo_dir(repo);
        for name in ["_tags", "_referrers", "_manifests", "_blobs"] {
            let _ = fs::remove_dir(dir.join(name));
        }
        let top = self.repos_dir();
        let mut dir = dir.as_path();
        while dir != top {
            match fs::remove_dir(dir) {
                Err(error) if !is_absent(&error) => return,
                _ => dir = super::durable::parent_of(dir),
            }
        }
    }
}

/// Whether a path exists, with errors other than absence reported.
pub(super) fn is_there(path: &Path) -> Result<bool, StoreError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(StoreError::io("examine", path)(error)),
    }
}

fn lock_dir(dir: &Path) -> Result<File, OpenError> {
    use rustix::fs::{FlockOperation, flock};
    let path = dir.join("lock");
    let files = |source: io::Error| OpenError::Files {
        dir: dir.to_owned(),
        source: Box::new(StoreError::io("lock", &path)(source)),
    };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(files)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::Owned {
            dir: dir.to_owned(),
        }),
        Err(errno) => Err(files(errno.into())),
    }
}

/// Reads the version file, or writes it into an empty store.
fn check_version(dir: &Path, config: &StoreConfig) -> Result<(), OpenError> {
    let path = dir.join("VERSION");
    let expected = format!("kiln-registry {LAYOUT_VERSION}\n");
    let files = |source| OpenError::Files {
        dir: dir.to_owned(),
        source: Box::new(source),
    };
    match fs::read(&path) {
        Ok(found) if found == expected.as_bytes() => Ok(()),
        Ok(found) => Err(OpenError::Version {
            dir: dir.to_owned(),
            found: String::from_utf8_lossy(&found[..found.len().min(80)])
                .trim()
                .to_owned(),
        }),
        Err(error) if is_absent(&error) => {
            if !is_new(dir).map_err(files)? {
                return Err(OpenError::Version {
                    dir: dir.to_owned(),
                    found: String::new(),
                });
            }
            let tmp = dir.join("tmp");
            fs::create_dir_all(&tmp)
                .map_err(StoreError::io("create", &tmp))
                .map_err(files)?;
            let durable = Durable::new(tmp, config.fault.clone());
            durable.write(&path, expected.as_bytes()).map_err(files)
        }
        Err(error) => Err(files(StoreError::io("read", &path)(error))),
    }
}

/// Whether a directory holds nothing but what opening a store makes first.
fn is_new(dir: &Path) -> Result<bool, StoreError> {
    for entry in fs::read_dir(dir).map_err(StoreError::io("list", dir))? {
        let name = entry.map_err(StoreError::io("list", dir))?.file_name();
        if name != "lock" && name != "tmp" {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes directories in quarantine with nothing in them: their repository was taken away and its remover killed, or it was being made. Nobody
/// else makes any while we hold the lock.
fn prune_left(quarantine: &Path) {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
    for job in entries(quarantine) {
        for attempt in entries(&job.path()) {
            let _not_empty = fs::remove_dir(attempt.path());
        }
        let _not_empty = fs::remove_dir(job.path());
    }
}

/// Empties `tmp/`: nobody else writes there while we hold the lock.
fn reap(tmp: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(tmp).map_err(StoreError::io("list", tmp))? {
        let path = entry.map_err(StoreError::io("list", tmp))?.path();
        let gone = match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => fs::remove_dir_all(&path),
            _ => fs::remove_file(&path),
        };
        gone.map_err(StoreError::io("reap", &path))?;
    }
    Ok(())
}
