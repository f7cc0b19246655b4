//! A job's log on its way to the controller: kept in a file of the worker until the controller has acknowledged it.
//!
//! One writer, one sender. The file is bounded; past the bound one line says so and the rest is counted, not kept.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

/// Most bytes of one attempt's log.
pub const LOG_BYTES_MAX: u64 = 256 << 20;

/// A log file that grows. It has a name for a moment only: however its process ends, nothing of it stays.
#[derive(Debug)]
pub struct Spool {
    path: PathBuf,
    file: File,
    state: Mutex<State>,
    written: watch::Sender<Progress>,
}

#[derive(Debug)]
struct State {
    at: u64,
    dropped: u64,
}

/// How far a log has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Bytes that can be read.
    pub bytes: u64,
    /// No more will come.
    pub ended: bool,
}

impl Spool {
    /// A new, empty log on the disk of `path`, readable by its owner alone. What has that name is of an attempt that never ended, and goes.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(path: &Path) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        std::fs::remove_file(path)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            state: Mutex::new(State { at: 0, dropped: 0 }),
            written: watch::Sender::new(Progress::default()),
        })
    }

    /// Appends. A disk that cannot take it costs log, never the job.
    pub fn append(&self, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let room = LOG_BYTES_MAX.saturating_sub(state.at);
        if state.dropped > 0 || bytes.len() as u64 > room {
            if state.dropped == 0 {
                let mark = format!(
                    "\n[kiln: the log is longer than {LOG_BYTES_MAX} bytes; the rest is cut]\n"
                );
                self.write(&mut state, mark.as_bytes());
            }
            state.dropped = state.dropped.saturating_add(bytes.len() as u64);
            return;
        }
        self.write(&mut state, bytes);
    }

    fn write(&self, state: &mut State, bytes: &[u8]) {
        match self.file.write_all_at(bytes, state.at) {
            Ok(()) => {
                state.at += bytes.len() as u64;
                let at = state.at;
                self.written.send_modify(|progress| progress.bytes = at);
            }
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "a piece of log is lost");
                state.dropped = state.dropped.saturating_add(bytes.len() as u64);
            }
        }
    }

    /// No more will come.
    pub fn end(&self) {
        self.written.send_modify(|progress| progress.ended = true);
    }

    /// How far it is; changes are seen by whoever waits on it.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.written.subscribe()
    }

    /// Reads at most `max` bytes from `offset`.
    ///
    /// # Errors
    /// What the file system says.
    pub fn read(&self, offset: u64, max: usize) -> io::Result<Vec<u8>> {
        let end = self.written.borrow().bytes;
        let length = usize::try_from(end.saturating_sub(offset)).unwrap_or(max);
        let mut bytes = vec![0; length.min(max)];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Bytes that were not kept.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_can_be_read_from_any_offset() {
        let dir = tempfile::tempdir().expect("temp dir");
        let spool = Spool::create(&dir.path().join("below/a.log")).expect("created");
        spool.append(b"one\n");
        spool.append(b"two\n");
        assert_eq!(spool.read(4, 100).expect("read"), b"two\n");
        assert_eq!(spool.read(0, 3).expect("read"), b"one");
        assert!(spool.read(8, 10).expect("read").is_empty());
        spool.end();
        let progress = *spool.progress().borrow();
        assert_eq!(
            (progress.bytes, progress.ended, spool.dropped()),
            (8, true, 0)
        );
        let names = std::fs::read_dir(dir.path().join("below")).expect("folder");
        assert_eq!(names.count(), 0, "a kill leaves nothing");
    }
}
