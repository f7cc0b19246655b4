//! File operations that survive a kill or power loss at any moment: a unique temporary name, fsync
//! of the file, rename, fsync of the directory. What a kill leaves is in `tmp/` and reaped on open.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::StoreError;

/// Called by name between the steps of every write. Tests use it to kill the process or to fail a
/// step as a full disk would; nothing is set in production.
pub type FaultHook = Arc<dyn Fn(&'static str) -> io::Result<()> + Send + Sync>;

/// The directory of temporary files, and the steps' fault hook.
#[derive(Clone)]
pub(crate) struct Durable {
    tmp: PathBuf,
    fault: Option<FaultHook>,
}

impl fmt::Debug for Durable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Durable").field("tmp", &self.tmp).finish()
    }
}

impl Durable {
    pub(crate) fn new(tmp: PathBuf, fault: Option<FaultHook>) -> Self {
        Self { tmp, fault }
    }

    /// A step of a write is about to happen.
    pub(crate) fn step(&self, name: &'static str) -> Result<(), StoreError> {
        match &self.fault {
            Some(fault) => fault(name).map_err(StoreError::io(name, &self.tmp)),
            None => Ok(()),
        }
    }

    /// A path in `tmp/` that nobody has used.
    pub(crate) fn temp_path(&self) -> Result<PathBuf, StoreError> {
        Ok(self.tmp.join(random_hex()?))
    }

    /// A new, empty temporary file, private to this user.
    pub(crate) fn temp_file(&self) -> Result<(File, PathBuf), StoreError> {
        let path = self.temp_path()?;
        let file = create_new(&path)?;
        Ok((file, path))
    }

    /// A new, empty file at a place of its own.
    pub(crate) fn new_file(&self, path: &Path) -> Result<File, StoreError> {
        self.step("create")?;
        create_new(path)
    }

    /// Puts `bytes` at `dest` for a reader in this or a later process: whole, but not on the disk yet.
    pub(crate) fn write_unsynced(&self, dest: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        let (mut file, temp) = self.temp_file()?;
        let written = self.step("write unsynced").and_then(|()| {
            file.write_all(bytes)
                .and_then(|()| fs::rename(&temp, dest))
                .map_err(StoreError::io("write", dest))
        });
        if written.is_err() {
            // Best effort: what stays is reaped on the next open.
            let _ = fs::remove_file(&temp);
        }
        written
    }

    /// Puts `bytes` at `dest`, replacing what was there, so that a reader sees all or nothing.
    pub(crate) fn write(&self, dest: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        let (mut file, temp) = self.temp_file()?;
        let written = self
            .step("write")
            .and_then(|()| {
                file.write_all(bytes)
                    .and_then(|()| file.sync_all())
                    .map_err(StoreError::io("write", &temp))
            })
            .and_then(|()| self.move_into_place(&temp, dest));
        if written.is_err() {
            // Best effort: what stays is reaped on the next open.
            let _ = fs::remove_file(&temp);
        }
        written
    }

    /// Moves a finished, synced temporary file to its place.
    pub(crate) fn move_into_place(&self, temp: &Path, dest: &Path) -> Result<(), StoreError> {
        let parent = parent_of(dest);
        self.make_dirs(parent)?;
        self.step("rename")?;
        fs::rename(temp, dest).map_err(StoreError::io("put in place", dest))?;
        self.step("sync directory")?;
        sync_dir(parent)
    }

    /// An empty marker file. Existing already is fine.
    pub(crate) fn mark(&self, dest: &Path) -> Result<(), StoreError> {
        let parent = parent_of(dest);
        self.make_dirs(parent)?;
        self.step("mark")?;
        let opened = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(dest);
        match opened {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            Err(error) => return Err(StoreError::io("create", dest)(error)),
        }
        self.step("sync mark")?;
        sync_dir(parent)
    }

    /// Removes a file; its absence is fine. Tells whether it was there.
    pub(crate) fn remove(&self, path: &Path) -> Result<bool, StoreError> {
        self.step("remove")?;
        match fs::remove_file(path) {
            Ok(()) => sync_dir(parent_of(path)).map(|()| true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(StoreError::io("remove", path)(error)),
        }
    }

    /// Takes a whole directory away at once, then deletes it. Tells whether it was there.
    pub(crate) fn remove_tree(&self, path: &Path) -> Result<bool, StoreError> {
        self.step("remove tree")?;
        let aside = self.temp_path()?;
        match fs::rename(path, &aside) {
            Ok(()) => {}
            Err(error) if is_absent(&error) => return Ok(false),
            Err(error) => return Err(StoreError::io("remove", path)(error)),
        }
        sync_dir(parent_of(path))?;
        self.step("delete tree")?;
        fs::remove_dir_all(&aside).map_err(StoreError::io("delete", &aside))?;
        Ok(true)
    }

    /// `mkdir -p` whose new entries are on disk when it returns.
    pub(crate) fn make_dirs(&self, path: &Path) -> Result<(), StoreError> {
        if path.is_dir() {
            return Ok(());
        }
        let parent = parent_of(path);
        self.make_dirs(parent)?;
        self.step("make directory")?;
        match fs::create_dir(path) {
            Ok(()) => sync_dir(parent),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(StoreError::io("create", path)(error)),
        }
    }
}

fn create_new(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(StoreError::io("create", path))
}

/// Absent, or a component on the way is no directory: nothing of that name can be there.
pub(crate) fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

pub(crate) fn parent_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Makes the entries of a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(StoreError::io("sync", path))
}

/// 32 hex digits from the system's random source.
pub(crate) fn random_hex() -> Result<String, StoreError> {
    let mut bytes = [0_u8; 16];
    getrandom::fill(&mut bytes).map_err(|error| StoreError::Io {
        what: "read",
        path: "the system's random source".into(),
        source: io::Error::other(error.to_string()),
    })?;
    Ok(hex::encode(bytes))
}
