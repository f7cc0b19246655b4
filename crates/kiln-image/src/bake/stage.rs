//! The cache of finished stages: `<cache>/<stage>-<16 hex of the hash of its inputs>/`, and the lock around it.
//!
//! A stage writes into a temporary directory that is renamed when it is done; a directory with a final name is
//! therefore complete. Only one bake works in a cache at a time.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use kiln_core::digest::Hasher;
use kiln_core::{ByteSize, Digest};

use super::orphan;
use super::process::{Program, RunContext, RunError};
use super::progress::{BakeEvent, BakeProgress, Cancel};

/// Prefix of directories of stages that have not finished.
const UNFINISHED: &str = ".unfinished-";
/// File of a finished stage with the digest of every other file.
const DIGESTS: &str = "digests";
/// How often a taken lock is tried again.
const LOCK_POLL: Duration = Duration::from_millis(200);
/// Removing a tree takes at most this long.
const REMOVE_DEADLINE: Duration = Duration::from_secs(120);

/// Why the cache of stages cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StageError {
    /// A file operation in the cache failed.
    #[error("cannot {what} {}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The caller cancelled while waiting for the lock.
    #[error("cancelled")]
    Cancelled,
    /// Remains of an earlier bake could not be removed.
    #[error("cannot remove {}", .path.display())]
    Remove {
        /// What remains.
        path: PathBuf,
        /// Why.
        #[source]
        source: RunError,
    },
}

impl StageError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}

/// Hash of the inputs of a stage: each is a name and some bytes, lengths included, so no two lists collide.
#[derive(Clone, Debug, Default)]
pub struct StageKey(Hasher);

impl StageKey {
    /// A key for a stage with this generation number: raise it when the code of the stage changes what it makes.
    #[must_use]
    pub fn new(generation: u32) -> Self {
        Self::default().with("generation", &generation.to_le_bytes())
    }

    /// Adds an input.
    #[must_use]
    pub fn with(mut self, name: &str, value: &[u8]) -> Self {
        for part in [name.as_bytes(), value] {
            self.0.update(&(part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// The digest over everything added.
    #[must_use]
    pub fn digest(self) -> Digest {
        self.0.finish().0
    }
}

/// An opened and locked cache of stages.
pub struct StageCache<'a> {
    directory: PathBuf,
    lock: File,
    progress: &'a dyn BakeProgress,
    cancel: &'a Cancel,
}

impl std::fmt::Debug for StageCache<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StageCache")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl<'a> StageCache<'a> {
    /// Opens `directory`, waits for its lock, removes what an interrupted bake left.
    ///
    /// # Errors
    /// When the directory cannot be made or locked, remains cannot be removed, or the caller cancels.
    pub fn open(
        directory: &Path,
        progress: &'a dyn BakeProgress,
        cancel: &'a Cancel,
    ) -> Result<Self, StageError> {
        fs::create_dir_all(directory).map_err(StageError::io("make", directory))?;
        let path = directory.join("lock");
        let open = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .read(true)
            .open(&path);
        let lock = open.map_err(StageError::io("open", &path))?;
        let mut told = false;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(source)) => {
                    return Err(StageError::io("lock", &path)(source));
                }
                Err(TryLockError::WouldBlock) if cancel.is_cancelled() => {
                    return Err(StageError::Cancelled);
                }
                Err(TryLockError::WouldBlock) => {
                    orphan::kill_left_over(&lock);
                    if !told {
                        progress.event(&BakeEvent::Waiting);
                        told = true;
                    }
                    thread::sleep(LOCK_POLL);
                }
            }
        }
        orphan::record(&lock, None).map_err(StageError::io("write", &path))?;
        let directory = directory.to_owned();
        let cache = Self {
            directory,
            lock,
            progress,
            cancel,
        };
        cache.remove_unfinished()?;
        Ok(cache)
    }

    /// Directory of the cache.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What programs of a stage of this name run with.
    #[must_use]
    pub fn context<'b>(&'b self, stage: &'b str) -> RunContext<'b> {
        RunContext {
            stage,
            progress: self.progress,
            cancel: self.cancel,
            lock: &self.lock,
        }
    }

    /// Where a finished stage is or would be.
    #[must_use]
    pub fn path(&self, stage: &str, key: &Digest) -> PathBuf {
        self.directory.join(format!("{stage}-{}", key.short(16)))
    }

    /// Returns the directory of a finished stage, making it with `body` when there is none. `body` gets the
    /// directory to write into; nothing it leaves there is kept when it fails.
    ///
    /// # Errors
    /// What `body` returns, or a failure of the cache itself.
    pub fn stage<E: From<StageError>>(
        &self,
        stage: &str,
        key: &Digest,
        body: impl FnOnce(&Path, &RunContext<'_>) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        let done = self.path(stage, key);
        if done.is_dir() && !self.intact(&done) {
            // Damaged by the disk or by somebody: made again, never used.
            self.remove(&done)?;
        }
        if done.is_dir() {
            // A use counts as new, so that pruning by age drops what nothing uses any more.
            let touch = File::open(&done).and_then(|dir| dir.set_modified(SystemTime::now()));
            touch.map_err(StageError::io("touch", &done))?;
            self.progress.event(&BakeEvent::Reused { stage });
            return Ok(done);
        }
        if self.cancel.is_cancelled() {
            return Err(StageError::Cancelled.into());
        }
        self.progress.event(&BakeEvent::Started { stage });
        let started = Instant::now();
        let name = format!("{UNFINISHED}{stage}-{}", key.short(16));
        let work = self.directory.join(name);
        fs::create_dir(&work).map_err(StageError::io("make", &work))?;
        let context = self.context(stage);
        if let Err(error) = body(&work, &context) {
            self.remove(&work)?;
            return Err(error);
        }
        let bytes = tree_bytes(&work).map_err(StageError::io("measure", &work))?;
        let digests = tree_digests(&work).map_err(StageError::io("read", &work))?;
        let list = work.join(DIGESTS);
        fs::write(&list, digests).map_err(StageError::io("write", &list))?;
        sync_tree(&work).map_err(StageError::io("flush", &work))?;
        fs::rename(&work, &done).map_err(StageError::io("rename", &work))?;
        let took = started.elapsed();
        self.progress
            .event(&BakeEvent::Finished { stage, took, bytes });
        Ok(done)
    }

    /// Removes finished stages that were last used before `keep` of their kind were, per stage name.
    ///
    /// # Errors
    /// When the directory cannot be read or a stage cannot be removed.
    pub fn prune(&self, keep: usize) -> Result<ByteSize, StageError> {
        let mut kinds: std::collections::BTreeMap<String, Vec<(SystemTime, PathBuf)>> =
            std::collections::BTreeMap::new();
        for entry in self.entries()? {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some((kind, hash)) = name.rsplit_once('-') else {
                continue;
            };
            let is_stage = hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit());
            if let (true, Ok(meta)) = (is_stage && !name.starts_with('.'), entry.metadata()) {
                let used = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                kinds
                    .entry(kind.to_owned())
                    .or_default()
                    .push((used, entry.path()));
            }
        }
        let mut freed = 0;
        for (_, mut stages) in kinds {
            stages.sort();
            stages.reverse();
            for (_, path) in stages.into_iter().skip(keep) {
                freed += tree_bytes(&path).unwrap_or(0);
                self.remove(&path)?;
            }
        }
        Ok(ByteSize(freed))
    }

    /// Whether a finished stage still has the bytes it was finished with.
    fn intact(&self, done: &Path) -> bool {
        let then = fs::read_to_string(done.join(DIGESTS)).ok();
        then.is_some() && then == tree_digests(done).ok()
    }

    fn entries(&self) -> Result<Vec<fs::DirEntry>, StageError> {
        let read = || -> io::Result<Vec<_>> { fs::read_dir(&self.directory)?.collect() };
        read().map_err(StageError::io("list", &self.directory))
    }

    fn remove_unfinished(&self) -> Result<(), StageError> {
        for entry in self.entries()? {
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                self.remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes a tree, also one with files of other ids of our user namespace.
    fn remove(&self, path: &Path) -> Result<(), StageError> {
        remove_tree(path, &self.lock).map_err(|source| StageError::Remove {
            path: path.to_owned(),
            source,
        })
    }
}

/// Removes a tree; as an ordinary user through a user namespace when some of it belongs to subordinate ids.
///
/// # Errors
/// When both ways fail.
pub fn remove_tree(path: &Path, lock: &File) -> Result<(), RunError> {
    match fs::remove_dir_all(path) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(_) => {}
    }
    // Removing must work after a cancellation too.
    let (progress, cancel) = (|_: &BakeEvent<'_>| {}, Cancel::new());
    let context = RunContext {
        stage: "remove",
        progress: &progress,
        cancel: &cancel,
        lock,
    };
    as_root("rm", REMOVE_DEADLINE)
        .args(["-rf", "--one-file-system", "--"])
        .arg(path)
        .run(&context)
}

/// A program that sees itself as root: directly when we are, else in a user namespace with subordinate ids.
#[must_use]
pub fn as_root(program: &str, deadline: Duration) -> Program {
    if rustix::process::geteuid().is_root() {
        return Program::new(program, deadline);
    }
    Program::new("unshare", deadline).args(["--map-auto", "--map-root-user", "--", program])
}

fn tree_bytes(path: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        bytes += if meta.is_dir() {
            tree_bytes(&entry.path())?
        } else {
            meta.len()
        };
    }
    Ok(bytes)
}

/// One line per file below a directory: digest and path, sorted.
fn tree_digests(path: &Path) -> io::Result<String> {
    let mut lines = Vec::new();
    let mut open = vec![path.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let file = entry.path();
            if entry.file_type()?.is_dir() {
                open.push(file);
            } else if let Ok(name) = file.strip_prefix(path)
                && name != Path::new(DIGESTS)
            {
                let (digest, _) = Digest::of_reader(File::open(&file)?)?;
                lines.push(format!("{digest} {}\n", name.display()));
            }
        }
    }
    lines.sort();
    Ok(lines.concat())
}

/// Digest over the names and contents of a finished stage's files.
///
/// # Errors
/// When the stage has no list of them.
pub fn stage_digest(done: &Path) -> Result<Digest, StageError> {
    let path = done.join(DIGESTS);
    let list = fs::read(&path).map_err(StageError::io("read", &path))?;
    Ok(Digest::of(&list))
}

/// Flushes the files and directories of a small tree of large files.
pub(super) fn sync_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod resume;
#[cfg(test)]
mod tests {
    use super::*;

    fn quiet(_: &BakeEvent<'_>) {}

    #[test]
    fn a_stage_runs_once_and_a_failed_one_leaves_nothing() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cancel = Cancel::new();
        let cache = StageCache::open(dir.path(), &quiet, &cancel).expect("it opens");
        let key = StageKey::new(1).with("a", b"b").digest();
        let failed = cache.stage("root", &key, |work, _| {
            fs::write(work.join("half"), b"x").expect("writable");
            Err(StageError::Cancelled)
        });
        assert!(failed.is_err());
        let names: Vec<_> = fs::read_dir(dir.path())
            .expect("listable")
            .map(|entry| entry.expect("readable").file_name())
            .collect();
        assert_eq!(names, ["lock"]);
        let mut runs = 0;
        for _ in 0..2 {
            let made = cache.stage("root", &key, |work, _| {
                runs += 1;
                fs::write(work.join("whole"), b"x").expect("writable");
                Ok::<_, StageError>(())
            });
            assert!(made.expect("it works").join("whole").exists());
        }
        assert_eq!(runs, 1);
    }

    #[test]
    fn a_damaged_stage_is_made_again() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cancel = Cancel::new();
        let cache = StageCache::open(dir.path(), &quiet, &cancel).expect("it opens");
        let key = StageKey::new(1).digest();
        let make = || {
            let made = cache.stage("root", &key, |work, _| {
                fs::write(work.join("file"), b"good").expect("writable");
                Ok::<_, StageError>(())
            });
            made.expect("it works").join("file")
        };
        fs::write(make(), b"evil").expect("writable");
        assert_eq!(fs::read(make()).expect("readable"), b"good");
    }

    #[test]
    fn remains_of_a_killed_bake_go_when_the_next_one_opens() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let left = dir.path().join(".unfinished-root-0011223344556677");
        fs::create_dir(&left).expect("writable");
        fs::write(left.join("file"), b"x").expect("writable");
        let cancel = Cancel::new();
        StageCache::open(dir.path(), &quiet, &cancel).expect("it opens");
        assert!(!left.exists());
    }

    #[test]
    fn a_second_bake_waits_for_the_first() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cancel = Cancel::new();
        let first = StageCache::open(dir.path(), &quiet, &cancel).expect("it opens");
        let stop = Cancel::new();
        let waits = |event: &BakeEvent<'_>| {
            if *event == BakeEvent::Waiting {
                stop.cancel();
            }
        };
        let second = StageCache::open(dir.path(), &waits, &stop);
        assert!(matches!(second, Err(StageError::Cancelled)));
        drop(first);
        assert!(StageCache::open(dir.path(), &quiet, &cancel).is_ok());
    }

    #[test]
    fn keys_do_not_run_together() {
        let one = StageKey::new(1).with("ab", b"c").digest();
        let two = StageKey::new(1).with("a", b"bc").digest();
        assert_ne!(one, two);
    }

    #[test]
    fn pruning_keeps_the_newest_of_each_kind() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cancel = Cancel::new();
        let cache = StageCache::open(dir.path(), &quiet, &cancel).expect("it opens");
        for (age, name) in [
            "disk-0000000000000001",
            "disk-0000000000000002",
            "root-0000000000000003",
        ]
        .iter()
        .enumerate()
        {
            let path = dir.path().join(name);
            fs::create_dir(&path).expect("writable");
            let when = SystemTime::UNIX_EPOCH + Duration::from_secs(age as u64 + 1);
            File::open(&path)
                .and_then(|dir| dir.set_modified(when))
                .expect("settable");
        }
        cache.prune(1).expect("it prunes");
        assert!(!dir.path().join("disk-0000000000000001").exists());
        assert!(dir.path().join("disk-0000000000000002").exists());
        assert!(dir.path().join("root-0000000000000003").exists());
    }
}
