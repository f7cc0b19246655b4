//! Writes the record of one running job.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use kiln_core::{FailureClass, JobId, Observed, Outcome, Receipt, Verdict};
use serde::Serialize;

use super::files::{create, replace};
use super::record::{RecordError, Written, WrittenState};

/// Bytes of output kept from the start of a job: 64 MiB.
pub const LOG_BYTES_MAX: u64 = 64 << 20;
/// Bytes of output kept from its end, once the start is full: 1 MiB.
pub const LOG_TAIL_BYTES: usize = 1 << 20;
/// Bytes of events kept: 32 MiB.
pub const EVENTS_BYTES_MAX: u64 = 32 << 20;
/// Longest single event, bytes.
const EVENT_BYTES_MAX: usize = 256 << 10;

/// The running job's record. Dropped unfinished, it says that the job ended without a result.
#[derive(Debug)]
pub struct JobWriter {
    dir: PathBuf,
    written: Written,
    log: BoundedLog,
    events: BoundedEvents,
    finished: bool,
}

impl JobWriter {
    /// Makes the files in `work`, which will be renamed to `dir`.
    pub(super) fn open(work: &Path, dir: &Path, written: Written) -> Result<Self, RecordError> {
        let log = create(&work.join("log"))?;
        let events = create(&work.join("events.jsonl"))?;
        Ok(Self {
            dir: dir.to_owned(),
            written,
            log: BoundedLog::new(log, LOG_BYTES_MAX, LOG_TAIL_BYTES),
            events: BoundedEvents {
                file: events,
                left: EVENTS_BYTES_MAX,
            },
            finished: false,
        })
    }

    /// Says nothing any more: the record never appeared.
    pub(super) fn abandon(mut self) {
        self.finished = true;
    }

    /// The job.
    #[must_use]
    pub fn id(&self) -> &JobId {
        &self.written.id
    }

    /// Where the files are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Appends raw output.
    ///
    /// # Errors
    /// The file cannot be written, on a full disk for instance; the job itself need not care.
    pub fn log(&mut self, bytes: &[u8]) -> Result<(), RecordError> {
        let path = self.dir.join("log");
        self.log
            .write(bytes)
            .map_err(RecordError::io("write", path))
    }

    /// Appends an event. What is beyond the bounds is replaced by a mark.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn event(&mut self, event: &impl Serialize) -> Result<(), RecordError> {
        let path = self.dir.join("events.jsonl");
        let line = serde_json::to_vec(event).map_err(|source| RecordError::Damaged {
            path: path.clone(),
            source,
        })?;
        self.events
            .write(line)
            .map_err(RecordError::io("write", path))
    }

    /// Writes what the host observed.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn observed(&mut self, observed: &Observed) -> Result<(), RecordError> {
        replace(&self.dir.join("observed.json"), observed)
    }

    /// Keeps whatever else this kind of job wants to show later (JSON), from now on.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn details(&mut self, details: serde_json::Value) -> Result<(), RecordError> {
        self.written.details = details;
        self.save()
    }

    fn save(&self) -> Result<(), RecordError> {
        replace(&self.dir.join("record.json"), &self.written)
    }

    /// Ends the job. The log is closed with what was kept of its end.
    ///
    /// # Errors
    /// The record cannot be written; it then says, once this process is gone, that the job was lost.
    pub fn finish(
        mut self,
        outcome: Outcome,
        receipt: Option<Receipt>,
        ended_unix_ms: u64,
    ) -> Result<(), RecordError> {
        self.finished = true;
        self.end(outcome, receipt, ended_unix_ms)
    }

    fn end(
        &mut self,
        outcome: Outcome,
        receipt: Option<Receipt>,
        ended_unix_ms: u64,
    ) -> Result<(), RecordError> {
        let log = self.log.close();
        self.written.log_bytes = self.log.seen;
        self.written.log_cut_bytes = self.log.cut;
        self.written.receipt = receipt;
        self.written.state = WrittenState::Finished {
            outcome,
            ended_unix_ms,
        };
        self.save()?;
        log.map_err(RecordError::io("write", self.dir.join("log")))
    }
}

impl Drop for JobWriter {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let verdict = Verdict::Failed {
            class: FailureClass::Infrastructure,
            message: "the job ended without a result".to_owned(),
            hint: None,
            command_code: None,
        };
        let outcome = Outcome {
            verdict,
            phases_ms: Vec::new(),
        };
        let now = std::time::SystemTime::now()
            .duration_since(std::time::SystemTime::UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(0));
        if let Err(error) = self.end(outcome, None, now) {
            tracing::warn!(job = %self.written.id, %error, "a job's record could not be ended");
        }
    }
}

/// Keeps the start of a stream and its last bytes, and says what is missing between.
#[derive(Debug)]
struct BoundedLog<W: Write = File> {
    file: W,
    head_left: u64,
    head_max: u64,
    tail: VecDeque<u8>,
    tail_max: usize,
    seen: u64,
    cut: u64,
    ends_in_newline: bool,
}

impl<W: Write> BoundedLog<W> {
    fn new(file: W, head_max: u64, tail_max: usize) -> Self {
        Self {
            file,
            head_left: head_max,
            head_max,
            tail: VecDeque::new(),
            tail_max,
            seen: 0,
            cut: 0,
            ends_in_newline: true,
        }
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let fits = usize::try_from(self.head_left).map_or(bytes.len(), |n| n.min(bytes.len()));
        let (head, rest) = bytes.split_at(fits);
        self.seen += bytes.len() as u64;
        if let Some(last) = head.last() {
            self.head_left -= head.len() as u64;
            self.ends_in_newline = *last == b'\n';
            self.file.write_all(head)?;
        }
        if rest.is_empty() {
            return Ok(());
        }
        if self.cut == 0 && self.tail.is_empty() {
            // Said at once, so that it holds even when this process is killed.
            let newline = if self.ends_in_newline { "" } else { "\n" };
            let max = self.head_max;
            let mark = format!(
                "{newline}[kiln: the log's limit of {max} bytes is reached; from here on only its end is kept]\n"
            );
            self.file.write_all(mark.as_bytes())?;
        }
        let keep = &rest[rest.len().saturating_sub(self.tail_max)..];
        let over = (self.tail.len() + keep.len()).saturating_sub(self.tail_max);
        self.tail.drain(..over);
        self.tail.extend(keep);
        self.cut += (over + rest.len() - keep.len()) as u64;
        Ok(())
    }

    fn close(&mut self) -> std::io::Result<()> {
        if self.cut > 0 {
            let mark = format!("[kiln: {} bytes were cut here]\n", self.cut);
            self.file.write_all(mark.as_bytes())?;
        }
        let (first, second) = self.tail.as_slices();
        self.file.write_all(first)?;
        self.file.write_all(second)?;
        self.tail.clear();
        self.file.flush()
    }
}

/// Events up to a number of bytes, then one mark.
#[derive(Debug)]
struct BoundedEvents<W: Write = File> {
    file: W,
    left: u64,
}

impl<W: Write> BoundedEvents<W> {
    fn write(&mut self, mut line: Vec<u8>) -> std::io::Result<()> {
        if self.left == 0 {
            return Ok(());
        }
        if line.len() > EVENT_BYTES_MAX {
            line = format!("{{\"event\":\"omitted\",\"bytes\":{}}}", line.len()).into_bytes();
        }
        line.push(b'\n');
        if line.len() as u64 > self.left {
            self.left = 0;
            line = b"{\"event\":\"cut\",\"why\":\"the limit of recorded events is reached\"}\n"
                .to_vec();
        }
        self.left = self.left.saturating_sub(line.len() as u64);
        // One write per line: a reader who follows never sees half of one for long.
        self.file.write_all(&line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(pieces: &[Vec<u8>], head: u64, tail: usize) -> (Vec<u8>, u64, u64) {
        let mut log = BoundedLog::new(Vec::new(), head, tail);
        for piece in pieces {
            log.write(piece).expect("memory");
        }
        log.close().expect("memory");
        (log.file, log.seen, log.cut)
    }

    #[test]
    fn what_is_cut_is_said() {
        let (text, seen, cut) = run(&[b"abc\ndefghij".to_vec(), b"klm".to_vec()], 5, 4);
        let text = String::from_utf8(text).expect("text");
        assert_eq!((seen, cut), (14, 5));
        assert!(
            text.starts_with("abc\nd\n[kiln: the log's limit of 5 bytes"),
            "{text}"
        );
        assert!(
            text.ends_with("[kiln: 5 bytes were cut here]\njklm"),
            "{text}"
        );
    }

    #[test]
    fn events_end_with_a_mark() {
        let mut events = BoundedEvents {
            file: Vec::new(),
            left: 30,
        };
        for _ in 0..5 {
            events.write(b"{\"n\":1}".to_vec()).expect("memory");
        }
        let text = String::from_utf8(events.file).expect("text");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[3].contains("\"cut\""), "{text}");
    }

    proptest! {
        #[test]
        fn start_and_end_are_always_there(
            pieces in prop::collection::vec(prop::collection::vec(b'a'..=b'z', 0..40), 0..12),
            head in 0..60_u64, tail in 0..30_usize,
        ) {
            let whole: Vec<u8> = pieces.concat();
            let (text, seen, cut) = run(&pieces, head, tail);
            prop_assert_eq!(seen, whole.len() as u64);
            let head = usize::try_from(head).expect("small");
            let kept_head = &whole[..head.min(whole.len())];
            prop_assert!(text.starts_with(kept_head));
            let beyond = whole.len().saturating_sub(head);
            prop_assert!(text.ends_with(&whole[whole.len() - beyond.min(tail)..]));
            prop_assert_eq!(cut as usize, beyond.saturating_sub(tail));
            if whole.len() <= head {
                prop_assert_eq!(text, whole);
            }
        }
    }
}
