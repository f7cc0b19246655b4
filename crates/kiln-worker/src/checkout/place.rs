//! Folders of checkouts: each belongs to a live process, and what a killed one left is removed by the next checkout.
//!
//! Beside `NAME/` lies `NAME.lock`, locked as long as the folder is in use. The lock file goes last, so a folder without
//! one is never in use.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// A checkout's folder. Removed when dropped.
#[derive(Debug)]
pub struct CheckoutDir {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl CheckoutDir {
    /// A new empty folder below `parent`.
    pub(super) fn new(parent: &Path, name: &str) -> io::Result<Self> {
        fs::create_dir_all(parent)?;
        let lock_path = parent.join(format!("{name}.lock"));
        let lock = loop {
            let file = File::create(&lock_path)?;
            // Names are of one job each: only a sweep can hold it, and not for long.
            flock(&file, FlockOperation::LockExclusive)?;
            // The sweep may have removed it between the two.
            let ours = file.metadata()?;
            if fs::metadata(&lock_path).is_ok_and(|there| there.ino() == ours.ino()) {
                break file;
            }
        };
        let path = parent.join(name);
        fs::create_dir(&path)?;
        Ok(Self {
            path,
            lock_path,
            _lock: lock,
        })
    }

    /// As [`CheckoutDir::new`], after removing what killed processes left below `parent`.
    pub(crate) fn fresh(parent: &Path, name: &str) -> io::Result<Self> {
        sweep(parent)?;
        Self::new(parent, name)
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for CheckoutDir {
    fn drop(&mut self) {
        // What cannot be removed now is found by the next checkout.
        if remove(&self.path).is_ok() {
            let _next_time = fs::remove_file(&self.lock_path);
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Removes what killed processes left below `parent`.
pub(super) fn sweep(parent: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let lock_path = match path.extension() {
            Some(extension) if extension == "lock" => path.clone(),
            _ => path.with_extension("lock"),
        };
        // A folder whose lock file is gone gets one again, so that there is one way to tell.
        let Ok(lock) = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
        else {
            continue;
        };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        remove(&lock_path.with_extension(""))?;
        let _other_sweep = fs::remove_file(&lock_path);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_takes_what_nobody_holds() {
        let home = tempfile::tempdir().expect("temp dir");
        let parent = home.path().join("checkouts");
        sweep(&parent).expect("nothing there");
        let held = CheckoutDir::new(&parent, "held-1").expect("made");
        fs::write(held.path().join("file"), "x").expect("write");
        // As a killed process leaves them: with and without the lock file.
        fs::create_dir(parent.join("dead-1")).expect("dir");
        fs::write(parent.join("dead-1").join("file"), "x").expect("write");
        fs::write(parent.join("dead-1.lock"), "").expect("write");
        fs::create_dir(parent.join("dead-2")).expect("dir");
        sweep(&parent).expect("swept");
        let mut left: Vec<_> = fs::read_dir(&parent)
            .expect("dir")
            .map(|entry| entry.expect("entry").file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["held-1", "held-1.lock"]);
        drop(held);
        assert_eq!(fs::read_dir(&parent).expect("dir").count(), 0);
    }
}
