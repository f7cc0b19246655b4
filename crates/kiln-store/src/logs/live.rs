//! One log that is still written: its files, what readers may see of it, and the bell that wakes its followers.
//!
//! Everything here that touches a file blocks; [`super::LogStore`] calls it on a thread for that. Followers never wait for a
//! writer: they look at [`View`], which is locked only while a few numbers change.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;

use super::seal::LogKeys;
use super::segment::{self, Kind, Mark, Segment, Writing};
use super::{Appended, Durability, LogError, LogName, LogStatus, PIECE_MAX, TAIL_BYTES};

/// A file is followed by another when it is this long.
const SEGMENT_BYTES: u64 = 8 << 20;
/// Ending of a log file's name.
const SUFFIX: &str = "seg";

/// What a log may cost and how it is kept.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    pub(super) keys: LogKeys,
    pub(super) bytes_max: u64,
    pub(super) durability: Durability,
}

/// What readers may see.
#[derive(Debug, Default)]
struct View {
    /// Next byte that is wanted of the writer.
    accepted: u64,
    /// Bytes that can be read, the line about a cut included.
    end: u64,
    /// Bytes of the writer that were kept.
    kept: u64,
    cut: bool,
    ended: bool,
    segments: Vec<Segment>,
    tail: VecDeque<(u64, Bytes)>,
    tail_bytes: usize,
}

#[derive(Debug, Default)]
struct Writer {
    loaded: bool,
    current: Option<Writing>,
    next_file: u32,
}

/// One log that is still written.
#[derive(Debug)]
pub(super) struct Live {
    name: LogName,
    dir: PathBuf,
    writer: Mutex<Writer>,
    view: Mutex<View>,
    loaded: AtomicBool,
    moved: AtomicBool,
    /// Held by whoever moves it to where ended logs are.
    pub(super) moving: tokio::sync::Mutex<()>,
    bell: watch::Sender<()>,
    touched: Mutex<Instant>,
}

/// What a reader finds at an offset.
#[derive(Debug)]
pub(super) enum Found {
    /// These bytes.
    Bytes(Bytes),
    /// They are in these files: read them with [`read_files`].
    InFiles { segments: Vec<Segment>, end: u64 },
    /// Nothing yet.
    Nothing,
    /// Nothing, and nothing will come.
    Ended,
    /// The log is where ended logs are.
    Moved,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Live {
    pub(super) fn new(name: LogName, dir: PathBuf) -> Self {
        Self {
            name,
            dir,
            writer: Mutex::default(),
            view: Mutex::default(),
            loaded: AtomicBool::new(false),
            moved: AtomicBool::new(false),
            moving: tokio::sync::Mutex::default(),
            bell: watch::Sender::new(()),
            touched: Mutex::new(Instant::now()),
        }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn is_loaded(&self) -> bool {
        self.loaded.load(Ordering::Acquire)
    }

    pub(super) fn has_moved(&self) -> bool {
        self.moved.load(Ordering::Acquire)
    }

    pub(super) fn touch(&self) {
        *lock(&self.touched) = Instant::now();
    }

    pub(super) fn idle(&self) -> Duration {
        lock(&self.touched).elapsed()
    }

    /// Wakes its holder whenever there is more, or the end.
    pub(super) fn listen(&self) -> watch::Receiver<()> {
        self.bell.subscribe()
    }

    /// Wakes every follower.
    pub(super) fn ring(&self) {
        self.bell.send_replace(());
    }

    pub(super) fn status(&self) -> LogStatus {
        let view = lock(&self.view);
        LogStatus {
            next: view.accepted,
            bytes: view.end,
            dropped: view.accepted.saturating_sub(view.kept),
            truncated: view.cut,
            ended: view.ended,
            archived: false,
        }
    }

    /// Reads what an earlier life left. Blocks.
    pub(super) fn load(&self, terms: &Terms) -> Result<(), LogError> {
        self.load_with(&mut lock(&self.writer), terms)
    }

    fn load_with(&self, writer: &mut Writer, terms: &Terms) -> Result<(), LogError> {
        if writer.loaded {
            return Ok(());
        }
        let mut view = View::default();
        let files = files_of(&self.dir)?;
        let count = files.len();
        for (index, (number, path)) in files.into_iter().enumerate() {
            let last = index + 1 == count;
            writer.next_file = number + 1;
            match segment::recover(&path, &terms.keys, &self.name, view.end, last)? {
                Some(found) => {
                    view.end = found.end;
                    view.accepted = view.accepted.max(found.accepted);
                    view.kept = view.accepted;
                    view.cut |= found.cut;
                    view.ended |= found.ended;
                    view.segments.push(found.segment);
                }
                None => fs::remove_file(&path).map_err(LogError::io("remove", &path))?,
            }
        }
        *lock(&self.view) = view;
        writer.loaded = true;
        self.loaded.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes bytes that start at `offset`. Blocks.
    pub(super) fn append(
        &self,
        offset: u64,
        bytes: &Bytes,
        terms: &Terms,
    ) -> Result<Appended, LogError> {
        if bytes.len() > PIECE_MAX {
            return Err(LogError::PieceTooLong {
                len: bytes.len(),
                max: PIECE_MAX,
            });
        }
        let mut writer = lock(&self.writer);
        self.load_with(&mut writer, terms)?;
        let (accepted, cut, ended) = {
            let view = lock(&self.view);
            (view.accepted, view.cut, view.ended)
        };
        let stop = offset.saturating_add(bytes.len() as u64);
        if cut {
            let mut view = lock(&self.view);
            view.accepted = view.accepted.max(stop);
            return Ok(Appended {
                next: view.accepted,
                full: true,
            });
        }
        if offset > accepted {
            return Err(LogError::Gap {
                wanted: accepted,
                given: offset,
            });
        }
        if stop <= accepted {
            return Ok(Appended {
                next: accepted,
                full: false,
            });
        }
        if ended {
            return Err(LogError::Ended {
                name: self.name.clone(),
                end: accepted,
            });
        }
        let repeated = usize::try_from(accepted - offset).unwrap_or(bytes.len());
        let fresh = bytes.slice(repeated..);
        self.take(&mut writer, accepted, &fresh, terms)
    }

    /// Writes bytes that nobody has yet, up to the limit.
    fn take(
        &self,
        writer: &mut Writer,
        accepted: u64,
        fresh: &Bytes,
        terms: &Terms,
    ) -> Result<Appended, LogError> {
        let room = usize::try_from(terms.bytes_max.saturating_sub(accepted)).unwrap_or(usize::MAX);
        let stop = accepted + fresh.len() as u64;
        if fresh.len() <= room {
            self.frame(writer, Kind::Data, accepted, fresh.clone(), terms)?;
            self.show(|view| (view.accepted, view.kept) = (stop, stop));
            return Ok(Appended {
                next: stop,
                full: false,
            });
        }
        let kept = fresh.slice(..whole_characters(fresh, room));
        let mut end = accepted;
        if !kept.is_empty() {
            end += kept.len() as u64;
            self.frame(writer, Kind::Data, accepted, kept.clone(), terms)?;
            // Should the next write fail, what comes again starts here.
            self.show(|view| (view.accepted, view.kept) = (end, end));
        }
        let line = cut_line(kept.last() != Some(&b'\n'), terms.bytes_max);
        self.frame(writer, Kind::Cut, end, line.into(), terms)?;
        self.show(|view| {
            view.cut = true;
            view.accepted = stop;
        });
        Ok(Appended {
            next: stop,
            full: true,
        })
    }

    /// Changes what readers see, and wakes them.
    fn show(&self, change: impl FnOnce(&mut View)) {
        change(&mut lock(&self.view));
        self.ring();
    }

    /// Writes one frame and lets readers have it.
    fn frame(
        &self,
        writer: &mut Writer,
        kind: Kind,
        offset: u64,
        piece: Bytes,
        terms: &Terms,
    ) -> Result<(), LogError> {
        let full = |writing: &Writing| writing.len >= SEGMENT_BYTES;
        if writer.current.as_ref().is_none_or(full) {
            self.next_file(writer, terms)?;
        }
        let Some(writing) = writer.current.as_mut() else {
            return Err(LogError::Stopping);
        };
        let sync = terms.durability == Durability::PowerCut;
        match writing.push(&self.name, kind, offset, &piece, sync) {
            Ok(mark) => {
                self.publish(mark, offset, piece);
                Ok(())
            }
            Err(error) => {
                writer.current = None;
                Err(error)
            }
        }
    }

    fn next_file(&self, writer: &mut Writer, terms: &Terms) -> Result<(), LogError> {
        if writer.next_file == 0 {
            make_dirs(&self.dir)?;
        }
        if writer.current.take().is_some() {
            let last = lock(&self.view).segments.last().cloned();
            if let Some(last) = last {
                last.sync()?;
            }
        }
        let path = self.dir.join(format!("{:08}.{SUFFIX}", writer.next_file));
        writer.next_file += 1;
        let (writing, segment) = Writing::create(&path, &terms.keys)?;
        if terms.durability == Durability::PowerCut {
            sync_dir(&self.dir)?;
        }
        writer.current = Some(writing);
        lock(&self.view).segments.push(segment);
        Ok(())
    }

    fn publish(&self, mark: Option<Mark>, offset: u64, piece: Bytes) {
        let followed = self.bell.receiver_count() > 0;
        let mut view = lock(&self.view);
        if let (Some(mark), Some(segment)) = (mark, view.segments.last_mut()) {
            segment.marks.push(mark);
        }
        view.end = offset + piece.len() as u64;
        if !followed {
            view.tail.clear();
            view.tail_bytes = 0;
        } else if !piece.is_empty() {
            view.tail_bytes += piece.len();
            view.tail.push_back((offset, piece));
            while view.tail_bytes > TAIL_BYTES && view.tail.len() > 1 {
                let gone = view.tail.pop_front();
                view.tail_bytes -= gone.map_or(0, |(_, piece)| piece.len());
            }
        }
    }

    /// What there is at `offset`.
    pub(super) fn find(&self, offset: u64, max: usize) -> Found {
        if self.moved.load(Ordering::Acquire) {
            return Found::Moved;
        }
        let view = lock(&self.view);
        if offset >= view.end {
            return if view.ended {
                Found::Ended
            } else {
                Found::Nothing
            };
        }
        let first = view.tail.front().map_or(u64::MAX, |(at, _)| *at);
        if offset >= first {
            let index = view.tail.partition_point(|(at, _)| *at <= offset) - 1;
            let (at, piece) = &view.tail[index];
            let skip = usize::try_from(offset - at).unwrap_or(usize::MAX);
            if skip < piece.len() {
                return Found::Bytes(piece.slice(skip..piece.len().min(skip.saturating_add(max))));
            }
        }
        // The file that holds the offset and those after it.
        let index = view
            .segments
            .partition_point(|s| s.marks.first().is_some_and(|m| m.offset <= offset));
        Found::InFiles {
            segments: view.segments[index.saturating_sub(1)..].to_vec(),
            end: view.end,
        }
    }

    /// Ends the log and makes what was written durable. Ending it twice is fine. Blocks.
    pub(super) fn end(&self, terms: &Terms) -> Result<(), LogError> {
        let mut writer = lock(&self.writer);
        self.load_with(&mut writer, terms)?;
        let (end, ended, empty) = {
            let view = lock(&self.view);
            (view.end, view.ended, view.segments.is_empty())
        };
        if ended {
            return Ok(());
        }
        if !empty {
            self.frame(&mut writer, Kind::End, end, Bytes::new(), terms)?;
            let segments = lock(&self.view).segments.clone();
            for segment in &segments {
                segment.sync()?;
            }
        }
        self.show(|view| view.ended = true);
        Ok(())
    }

    /// Its files were moved away: readers look elsewhere.
    pub(super) fn leave(&self) {
        self.moved.store(true, Ordering::Release);
        self.show(|view| {
            view.segments.clear();
            view.tail.clear();
            view.tail_bytes = 0;
        });
    }
}

/// Reads from files that [`Live::find`] named. Blocks.
pub(super) fn read_files(
    segments: &[Segment],
    name: &LogName,
    from: u64,
    end: u64,
    max: usize,
) -> Result<Bytes, LogError> {
    let mut out = Vec::new();
    for segment in segments {
        let at = from + out.len() as u64;
        if at >= end || out.len() >= max {
            break;
        }
        for piece in segment.read(name, at, end, max - out.len())? {
            out.extend_from_slice(&piece);
        }
    }
    if out.is_empty() {
        return Err(LogError::Damaged {
            name: name.clone(),
            what: "bytes that were there are gone",
        });
    }
    Ok(out.into())
}

/// The line readers see where a log was cut.
pub(super) fn cut_line(break_first: bool, limit: u64) -> String {
    let start = if break_first { "\n" } else { "" };
    format!(
        "{start}[kiln: the log was truncated here: its limit is {limit} bytes, later output was not kept]\n"
    )
}

/// The most bytes, up to `room`, that do not cut a UTF-8 character in two.
fn whole_characters(bytes: &[u8], room: usize) -> usize {
    let room = room.min(bytes.len());
    let continues = |at: usize| bytes.get(at).is_some_and(|byte| byte & 0xC0 == 0x80);
    (room.saturating_sub(3)..=room)
        .rev()
        .find(|at| !continues(*at))
        .unwrap_or(room)
}

/// The numbered files of a log, in order.
fn files_of(dir: &Path) -> Result<Vec<(u32, PathBuf)>, LogError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(LogError::io("list", dir)(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(LogError::io("list", dir))?.path();
        let number = path
            .extension()
            .is_some_and(|ending| ending == SUFFIX)
            .then(|| path.file_stem()?.to_str()?.parse().ok())
            .flatten();
        if let Some(number) = number {
            files.push((number, path));
        }
    }
    files.sort_unstable();
    Ok(files)
}

fn make_dirs(dir: &Path) -> Result<(), LogError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let make = || {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
    };
    // An empty parent may be tidied away between two steps of this.
    make()
        .or_else(|_| make())
        .map_err(LogError::io("create", dir))
}

/// Removes the files of a log, and what is empty above. Their absence is fine.
pub(super) fn remove_files(dir: &Path) -> Result<(), LogError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(LogError::io("remove", dir)(error));
        }
        _ => {}
    }
    for parent in dir.ancestors().skip(1).take(2) {
        // Another attempt of the job, another job of the tenant: then it stays.
        if fs::remove_dir(parent).is_err() {
            break;
        }
    }
    Ok(())
}

fn sync_dir(dir: &Path) -> Result<(), LogError> {
    fs::File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(LogError::io("sync", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_stay_whole() {
        let text = "aé€😀".as_bytes();
        let cuts: Vec<usize> = (0..=text.len())
            .map(|n| whole_characters(text, n))
            .collect();
        assert_eq!(cuts, [0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10]);
        assert_eq!(whole_characters(&[0x80; 9], 8), 8);
        assert_eq!(whole_characters(b"ab", 99), 2);
    }
}
