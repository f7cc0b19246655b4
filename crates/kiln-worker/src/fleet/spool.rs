//! A job's log on its way to the controller: kept in a file of the worker until the controller has acknowledged it.
//!
//! One writer, one sender. The file is bounded; past the bound one line says so and the rest is counted, not kept. What the disk does not
//! take is left out where it would have stood, a line there says how much, and what comes later is kept again.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_core::ByteSize;
use tokio::sync::watch;

/// Most bytes of one attempt's log, but for the line that says so.
pub const LOG_BYTES_MAX: u64 = 256 << 20;

/// A log file that grows. It has a name for a moment only: however its process ends, nothing of it stays.
#[derive(Debug)]
pub struct Spool {
    path: PathBuf,
    file: Box<dyn Bytes>,
    most: u64,
    state: Mutex<State>,
    written: watch::Sender<Progress>,
}

/// Where the bytes are.
trait Bytes: Debug + Send + Sync {
    /// Writes some of them; gives how many.
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<usize>;
    /// Reads so many.
    fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()>;
}

impl Bytes for File {
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        self.write_at(bytes, at)
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(bytes, at)
    }
}

#[derive(Debug, Default)]
struct State {
    at: u64,
    /// The bound was reached; nothing more is kept.
    full: bool,
    /// Bytes since the last one kept that the disk did not take, and no line says so yet.
    unsaid: u64,
    cut: Cut,
}

/// What of a log was not kept, bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cut {
    /// Beyond the bound.
    pub beyond: u64,
    /// That the disk did not take.
    pub unwritten: u64,
}

impl Cut {
    /// For people; none where everything was kept.
    #[must_use]
    pub fn told(&self, most: u64) -> Option<String> {
        let beyond = (self.beyond > 0).then(|| {
            format!(
                "{} beyond the {} that a log may have",
                ByteSize(self.beyond),
                ByteSize(most)
            )
        });
        let unwritten = (self.unwritten > 0).then(|| {
            format!(
                "{} that this worker's disk did not take",
                ByteSize(self.unwritten)
            )
        });
        let parts: Vec<String> = beyond.into_iter().chain(unwritten).collect();
        (!parts.is_empty()).then(|| format!("the log is cut: without {}", parts.join(" and ")))
    }
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
        Ok(Self::of(path, Box::new(file), LOG_BYTES_MAX))
    }

    fn of(path: &Path, file: Box<dyn Bytes>, most: u64) -> Self {
        Self {
            path: path.to_owned(),
            file,
            most,
            state: Mutex::default(),
            written: watch::Sender::new(Progress::default()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends. A disk that cannot take it costs log, never the job.
    pub fn append(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if state.full {
            state.cut.beyond = state.cut.beyond.saturating_add(bytes.len() as u64);
            return;
        }
        if !self.say_what_is_missing(&mut state) {
            return Self::miss(&mut state, bytes.len());
        }
        let room = usize::try_from(self.most.saturating_sub(state.at)).unwrap_or(usize::MAX);
        let (kept, beyond) = bytes.split_at(bytes.len().min(room));
        let left = self.write(&mut state, kept);
        Self::miss(&mut state, left);
        if beyond.is_empty() {
            return;
        }
        let mark = format!(
            "\n[kiln: the log is longer than {} bytes; the rest is cut]\n",
            self.most
        );
        let _told_at_the_end_too = self.write(&mut state, mark.as_bytes());
        state.full = true;
        state.cut.beyond = beyond.len() as u64;
    }

    /// Counts what the disk did not take.
    fn miss(state: &mut State, count: usize) {
        state.unsaid = state.unsaid.saturating_add(count as u64);
        state.cut.unwritten = state.cut.unwritten.saturating_add(count as u64);
    }

    /// Marks the place where something is missing, if something is. False: the disk does not take that either.
    fn say_what_is_missing(&self, state: &mut State) -> bool {
        if state.unsaid == 0 {
            return true;
        }
        let mark = format!(
            "\n[kiln: {} bytes of the log are cut here: the worker's disk did not take them]\n",
            state.unsaid
        );
        let at = state.at;
        if self.write(state, mark.as_bytes()) > 0 {
            // Half a mark says nothing: what comes next is written over it.
            state.at = at;
            return false;
        }
        state.unsaid = 0;
        true
    }

    /// Writes what the disk takes, and shows it when nothing is left to be marked; gives how many bytes it did not take.
    fn write(&self, state: &mut State, mut bytes: &[u8]) -> usize {
        while !bytes.is_empty() {
            match self.file.write(bytes, state.at) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(count) if count > 0 => {
                    state.at += count as u64;
                    bytes = bytes.get(count..).unwrap_or_default();
                }
                failed => {
                    if state.unsaid == 0 {
                        let error = failed.err().unwrap_or(io::ErrorKind::WriteZero.into());
                        tracing::warn!(path = %self.path.display(), %error, "a piece of log is lost");
                    }
                    break;
                }
            }
        }
        // Half of a mark is not shown: the rest of it is still to come.
        if bytes.is_empty() || state.unsaid == 0 {
            let at = state.at;
            self.written.send_modify(|progress| progress.bytes = at);
        }
        bytes.len()
    }

    /// No more will come.
    pub fn end(&self) {
        let _told_with_the_job = self.say_what_is_missing(&mut self.lock());
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
        self.file.read(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// What was not kept, for people; none where everything was.
    #[must_use]
    pub fn cut(&self) -> Option<String> {
        self.lock().cut.told(self.most)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

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
            (progress.bytes, progress.ended, spool.cut()),
            (8, true, None)
        );
        let names = std::fs::read_dir(dir.path().join("below")).expect("folder");
        assert_eq!(names.count(), 0, "a kill leaves nothing");
    }

    /// A file on a disk that has so much room; it can be given more.
    #[derive(Debug)]
    struct Small {
        file: File,
        room: Arc<AtomicUsize>,
    }

    impl Bytes for Small {
        fn write(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
            let room = self.room.load(Ordering::Relaxed);
            let count = self.file.write_at(&bytes[..bytes.len().min(room)], at)?;
            self.room.store(room - count, Ordering::Relaxed);
            match count {
                0 => Err(io::ErrorKind::StorageFull.into()),
                count => Ok(count),
            }
        }

        fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
            self.file.read_exact_at(bytes, at)
        }
    }

    fn small(room: usize, most: u64) -> (Spool, Arc<AtomicUsize>) {
        let room = Arc::new(AtomicUsize::new(room));
        let disk = Small {
            file: tempfile::tempfile().expect("file"),
            room: Arc::clone(&room),
        };
        (Spool::of(Path::new("a.log"), Box::new(disk), most), room)
    }

    fn text(spool: &Spool) -> String {
        String::from_utf8(spool.read(0, 10_000).expect("read")).expect("text")
    }

    #[test]
    fn a_disk_that_is_full_for_a_moment_costs_what_it_did_not_take_and_no_more() {
        let (spool, room) = small(6, 10_000);
        spool.append(b"one\n");
        spool.append(b"two\n");
        spool.append(b"three\n");
        assert_eq!(text(&spool), "one\ntw");
        // Room for half a line that says so: not for what follows it.
        room.store(10, Ordering::Relaxed);
        spool.append(b"four\n");
        assert_eq!(text(&spool), "one\ntw");
        room.store(1000, Ordering::Relaxed);
        spool.append(b"five\n");
        spool.append(b"six\n");
        spool.end();
        let lost = 2 + 6 + 5;
        assert_eq!(
            text(&spool),
            format!(
                "one\ntw\n[kiln: {lost} bytes of the log are cut here: the worker's disk did not take them]\nfive\nsix\n"
            )
        );
        let told = spool.cut().expect("cut");
        assert!(
            told.contains("did not take") && told.contains("13"),
            "{told}"
        );
    }

    #[test]
    fn what_the_disk_took_again_only_at_the_end_is_marked_there() {
        let (spool, room) = small(4, 10_000);
        spool.append(b"one\n");
        spool.append(b"two\n");
        room.store(1000, Ordering::Relaxed);
        spool.end();
        assert!(text(&spool).starts_with("one\n\n[kiln: 4 bytes"));
    }

    #[test]
    fn a_log_beyond_its_bound_says_so_once_and_takes_no_more() {
        let (spool, _) = small(1_000_000, 10);
        spool.append(b"12345678");
        for _ in 0..1000 {
            spool.append(b"abcd");
        }
        spool.end();
        let mark = "\n[kiln: the log is longer than 10 bytes; the rest is cut]\n";
        assert_eq!(text(&spool), format!("12345678ab{mark}"));
        let told = spool.cut().expect("cut");
        assert!(told.contains("beyond the 10"), "{told}");
        assert!(!told.contains("did not take"), "{told}");
        assert_eq!(spool.lock().cut.beyond, 3998);
    }
}
