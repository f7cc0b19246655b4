//! One file of a log that is still written: a preamble, then frames. Read next: [`super::live`].
//!
//! ```text
//! frame  = sealed length u32, kind u8, 0 0 0, offset u64, raw length u32 (little endian), sealed bytes
//! ```
//! The offset is that of the frame's first byte in the log. A frame that is cut short or does not open ends the file.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::seal::{LogKeys, PREAMBLE, SEAL_MAX, Sealer};
use super::{LogError, LogName, PIECE_MAX};

pub(super) const MAGIC: &[u8; 8] = b"KLNLOG1\n";
const HEADER: usize = 20;
/// Bytes of log between two marks of the index in memory.
const MARK_EVERY: u64 = 64 * 1024;
/// Most bytes of what follows a bad frame that are looked at.
const REST_MAX: u64 = 64 * 1024;

/// What a frame says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Bytes of the log.
    Data,
    /// The line that says that the log was cut: read, but not counted by the writer.
    Cut,
    /// The log has ended.
    End,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Data => 0,
            Self::Cut => 1,
            Self::End => 2,
        }
    }

    fn of(code: u8) -> Option<Self> {
        [Self::Data, Self::Cut, Self::End]
            .into_iter()
            .find(|kind| kind.code() == code)
    }
}

#[derive(Clone, Copy, Debug)]
struct Header {
    sealed: u32,
    kind: Kind,
    offset: u64,
    raw: u32,
}

impl Header {
    fn bytes(&self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        out[..4].copy_from_slice(&self.sealed.to_le_bytes());
        out[4] = self.kind.code();
        out[8..16].copy_from_slice(&self.offset.to_le_bytes());
        out[16..].copy_from_slice(&self.raw.to_le_bytes());
        out
    }

    fn parse(bytes: [u8; HEADER]) -> Option<Self> {
        let four = |at: usize| -> [u8; 4] { std::array::from_fn(|i| bytes[at + i]) };
        let header = Self {
            sealed: u32::from_le_bytes(four(0)),
            kind: Kind::of(bytes[4])?,
            offset: u64::from_le_bytes(std::array::from_fn(|i| bytes[8 + i])),
            raw: u32::from_le_bytes(four(16)),
        };
        let longest = u32::try_from(PIECE_MAX + SEAL_MAX).unwrap_or(u32::MAX);
        (header.sealed <= longest && header.raw <= header.sealed && bytes[5..8] == [0; 3])
            .then_some(header)
    }
}

/// Where a frame lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    pub(super) offset: u64,
    at: u64,
    number: u64,
}

/// A file whose frames can be read.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) path: PathBuf,
    sealer: Arc<Sealer>,
    pub(super) marks: Vec<Mark>,
}

impl Segment {
    /// The last mark at or before this offset.
    fn mark_for(&self, offset: u64) -> Option<Mark> {
        let after = self.marks.partition_point(|mark| mark.offset <= offset);
        self.marks.get(after.checked_sub(1)?).copied()
    }

    /// Bytes from `from` up to `end`, at most `max`; fewer at the end of the file.
    pub(super) fn read(
        &self,
        name: &LogName,
        from: u64,
        end: u64,
        max: usize,
    ) -> Result<Vec<Bytes>, LogError> {
        let io = |what| LogError::io(what, &self.path);
        let Some(mark) = self.mark_for(from) else {
            return Ok(Vec::new());
        };
        let mut file = File::open(&self.path).map_err(io("open"))?;
        file.seek(SeekFrom::Start(mark.at)).map_err(io("read"))?;
        let mut frames = Frames::new(io::BufReader::new(file), Arc::clone(&self.sealer), name);
        frames.number = mark.number;
        let (mut out, mut have, mut at) = (Vec::new(), 0, from);
        while at < end && have < max {
            match frames.next().map_err(io("read"))? {
                Next::Frame {
                    kind,
                    offset,
                    piece,
                } => {
                    let stop = offset + piece.len() as u64;
                    if kind == Kind::End || stop <= at {
                        continue;
                    }
                    let skip = usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX);
                    let upto = stop.min(end).min(at + (max - have) as u64);
                    let take = usize::try_from(upto.saturating_sub(offset)).unwrap_or(0);
                    let piece = Bytes::from(piece).slice(skip.min(take)..take);
                    at += piece.len() as u64;
                    have += piece.len();
                    out.push(piece);
                }
                Next::Done => break,
                Next::Bad => {
                    return Err(LogError::Damaged {
                        name: name.clone(),
                        what: "a frame does not open",
                    });
                }
            }
        }
        Ok(out)
    }

    pub(super) fn sync(&self) -> Result<(), LogError> {
        File::open(&self.path)
            .and_then(|file| file.sync_data())
            .map_err(LogError::io("sync", &self.path))
    }
}

enum Next {
    Frame {
        kind: Kind,
        offset: u64,
        piece: Vec<u8>,
    },
    Done,
    Bad,
}

struct Frames<R> {
    from: R,
    sealer: Arc<Sealer>,
    about: String,
    number: u64,
    /// Bytes of whole frames that were read.
    read: u64,
}

impl<R: Read> Frames<R> {
    fn new(from: R, sealer: Arc<Sealer>, name: &LogName) -> Self {
        Self {
            from,
            sealer,
            about: name.to_string(),
            number: 0,
            read: 0,
        }
    }

    fn next(&mut self) -> io::Result<Next> {
        let mut header = [0; HEADER];
        match read_full(&mut self.from, &mut header)? {
            0 => return Ok(Next::Done),
            HEADER => {}
            _ => return Ok(Next::Bad),
        }
        let Some(parsed) = Header::parse(header) else {
            return Ok(Next::Bad);
        };
        let mut sealed = vec![0; parsed.sealed as usize];
        if read_full(&mut self.from, &mut sealed)? != sealed.len() {
            return Ok(Next::Bad);
        }
        let about = about(&self.about, &header);
        let Some(piece) = self.sealer.open(self.number, &about, sealed) else {
            return Ok(Next::Bad);
        };
        if piece.len() != parsed.raw as usize {
            return Ok(Next::Bad);
        }
        self.number += 1;
        self.read += HEADER as u64 + u64::from(parsed.sealed);
        Ok(Next::Frame {
            kind: parsed.kind,
            offset: parsed.offset,
            piece,
        })
    }
}

fn read_full(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match from.read(&mut buffer[have..]) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}

fn about(name: &str, header: &[u8; HEADER]) -> Vec<u8> {
    [name.as_bytes(), b"\0", header].concat()
}

/// The file that is written now. It is opened anew for each frame, so that thousands of logs hold no descriptors.
#[derive(Debug)]
pub(super) struct Writing {
    sealer: Arc<Sealer>,
    path: PathBuf,
    number: u64,
    /// Bytes of the file that are whole.
    pub(super) len: u64,
    marked: Option<u64>,
}

impl Writing {
    /// A new file at `path`.
    pub(super) fn create(path: &Path, keys: &LogKeys) -> Result<(Self, Segment), LogError> {
        let (sealer, preamble) = Sealer::create(keys, MAGIC)?;
        let sealer = Arc::new(sealer);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(LogError::io("create", path))?;
        file.write_all(&preamble)
            .map_err(LogError::io("write", path))?;
        let segment = Segment {
            path: path.to_owned(),
            sealer: Arc::clone(&sealer),
            marks: Vec::new(),
        };
        let writing = Self {
            sealer,
            path: path.to_owned(),
            number: 0,
            len: PREAMBLE as u64,
            marked: None,
        };
        Ok((writing, segment))
    }

    /// Appends one frame; gives its mark when the index wants one. After an error the caller starts another file: this
    /// one is cut back to its whole frames, and its next number may have been used.
    pub(super) fn push(
        &mut self,
        name: &LogName,
        kind: Kind,
        offset: u64,
        piece: &[u8],
        sync: bool,
    ) -> Result<Option<Mark>, LogError> {
        let raw = u32::try_from(piece.len()).unwrap_or(u32::MAX);
        let header = Header {
            sealed: raw.saturating_add(self.sealer.overhead()),
            kind,
            offset,
            raw,
        }
        .bytes();
        let sealed = self
            .sealer
            .seal(
                self.number,
                &about(&name.to_string(), &header),
                piece.to_vec(),
            )
            .ok_or_else(|| LogError::Damaged {
                name: name.clone(),
                what: "a piece cannot be sealed",
            })?;
        let frame = [&header[..], &sealed].concat();
        let mut file = OpenOptions::new()
            .append(true)
            .open(&self.path)
            .map_err(LogError::io("open", &self.path))?;
        let written = file
            .write_all(&frame)
            .and_then(|()| if sync { file.sync_data() } else { Ok(()) });
        if let Err(error) = written {
            // Best effort: what stays of the frame does not open, and ends the file when it is read again.
            let _ = file.set_len(self.len);
            return Err(LogError::io("append to", &self.path)(error));
        }
        let mark = Mark {
            offset,
            at: self.len,
            number: self.number,
        };
        self.number += 1;
        self.len += frame.len() as u64;
        let due = self.marked.is_none_or(|last| offset >= last + MARK_EVERY);
        if due {
            self.marked = Some(offset);
        }
        Ok(due.then_some(mark))
    }
}

/// What a file of an earlier life holds.
#[derive(Debug)]
pub(super) struct Recovered {
    pub(super) segment: Segment,
    /// First byte after it that the writer counts.
    pub(super) accepted: u64,
    /// First byte after it that readers see.
    pub(super) end: u64,
    pub(super) cut: bool,
    pub(super) ended: bool,
}

/// Reads a file of an earlier life. In the last file of a log, a torn tail is cut off; whole frames are never thrown away
/// unseen: when more than a tail goes, a copy stays beside it.
///
/// # Errors
/// `Ok(None)` when not even the preamble was written; the key is missing, the file is damaged, or cannot be read.
pub(super) fn recover(
    path: &Path,
    keys: &LogKeys,
    name: &LogName,
    start: u64,
    last: bool,
) -> Result<Option<Recovered>, LogError> {
    let io = |what| LogError::io(what, path);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(io("open"))?;
    let size = file.metadata().map_err(io("read"))?.len();
    let mut preamble = [0; PREAMBLE];
    let have = read_full(&mut file, &mut preamble).map_err(io("read"))?;
    if last && (have < PREAMBLE || preamble == [0; PREAMBLE]) {
        return Ok(None);
    }
    let sealer = Sealer::open_file(keys, MAGIC, &preamble).map_err(|why| why.of_log(name))?;
    let sealer = Arc::new(sealer);
    let mut found = Recovered {
        segment: Segment {
            path: path.to_owned(),
            sealer: Arc::clone(&sealer),
            marks: Vec::new(),
        },
        accepted: start,
        end: start,
        cut: false,
        ended: false,
    };
    let mut frames = Frames::new(io::BufReader::new(&file), sealer, name);
    let torn = loop {
        let (at, number) = (PREAMBLE as u64 + frames.read, frames.number);
        match frames.next().map_err(io("read"))? {
            Next::Frame {
                kind,
                offset,
                piece,
            } => {
                if offset != found.end {
                    break true;
                }
                let marks = &mut found.segment.marks;
                if marks
                    .last()
                    .is_none_or(|mark| offset >= mark.offset + MARK_EVERY)
                {
                    marks.push(Mark { offset, at, number });
                }
                found.end += piece.len() as u64;
                match kind {
                    Kind::Data => found.accepted = found.end,
                    Kind::Cut => found.cut = true,
                    Kind::End => found.ended = true,
                }
            }
            Next::Done => break false,
            Next::Bad => break true,
        }
    };
    let whole = PREAMBLE as u64 + frames.read;
    drop(frames);
    if torn && !last {
        return Err(LogError::Damaged {
            name: name.clone(),
            what: "a frame in the middle does not open",
        });
    }
    if torn {
        trim(&mut file, path, whole, size)?;
    }
    Ok(Some(found))
}

/// Cuts the file back to its whole frames. A write that was cut short leaves less than a frame, or zeroes; anything else is kept aside.
fn trim(file: &mut File, path: &Path, whole: u64, size: u64) -> Result<(), LogError> {
    let io = |what| LogError::io(what, path);
    let mut rest = Vec::new();
    file.seek(SeekFrom::Start(whole)).map_err(io("read"))?;
    Read::by_ref(file)
        .take(REST_MAX)
        .read_to_end(&mut rest)
        .map_err(io("read"))?;
    let short = rest.len() < HEADER
        || rest
            .first_chunk()
            .and_then(|header| Header::parse(*header))
            .is_some_and(|header| whole + (HEADER as u64) + u64::from(header.sealed) >= size);
    if !short && rest.iter().any(|byte| *byte != 0) {
        let aside = path.with_extension("damaged");
        std::fs::copy(path, &aside).map_err(LogError::io("copy", &aside))?;
        tracing::error!(copy = %aside.display(), kept = whole, of = size, "a log file is damaged: what follows its last whole frame is not shown");
    }
    file.set_len(whole)
        .and_then(|()| file.sync_data())
        .map_err(io("trim"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::seal::LogKey;
    use super::*;

    fn name() -> LogName {
        LogName::new("local".parse().unwrap(), "b1".parse().unwrap(), 1)
    }

    /// A file of a few frames, as bytes.
    fn file(dir: &Path, keys: &LogKeys, pieces: &[Vec<u8>]) -> Vec<u8> {
        let path = dir.join("whole");
        let (mut writing, _) = Writing::create(&path, keys).unwrap();
        let mut offset = 0;
        for piece in pieces {
            writing
                .push(&name(), Kind::Data, offset, piece, false)
                .unwrap();
            offset += piece.len() as u64;
        }
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

        /// Whatever lies there, what comes back is a part of what was written, and reading it works.
        #[test]
        fn a_file_with_anything_in_it_is_read_or_refused(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..6),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            tail in prop::collection::vec(any::<u8>(), 0..80),
            sealed: bool,
            last: bool,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let keys = if sealed { LogKeys::new(LogKey::new([1; 32]), []) } else { LogKeys::default() };
            let mut bytes = file(dir.path(), &keys, &pieces);
            for (index, byte) in changes {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.extend_from_slice(&tail);
            let path = dir.path().join("00000000.seg");
            std::fs::write(&path, &bytes).unwrap();
            if let Ok(Some(found)) = recover(&path, &keys, &name(), 0, last) {
                let text = pieces.concat();
                let end = usize::try_from(found.end).unwrap();
                prop_assert!(end <= text.len());
                let read = found.segment.read(&name(), 0, found.end, usize::MAX).unwrap();
                prop_assert_eq!(read.concat(), &text[..end]);
                prop_assert!(!found.cut && !found.ended);
            }
        }

        #[test]
        fn any_header_is_a_header_or_not(bytes: [u8; HEADER]) {
            if let Some(header) = Header::parse(bytes) {
                prop_assert_eq!(header.bytes(), bytes);
            }
        }
    }
}
