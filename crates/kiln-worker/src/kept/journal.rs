//! What was done through a keeper: one JSON line each, bounded, in its machine's directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use crate::host::now_unix_ms;

/// Most bytes of a journal; what comes later is not noted.
const BYTES_MAX: u64 = 1024 * 1024;
/// Most characters of one text in it.
const TEXT_CHARS_MAX: usize = 400;

/// The journal of one keeper. A line that cannot be written costs nothing but itself.
#[derive(Debug)]
pub(super) struct Journal(Mutex<(File, u64)>);

impl Journal {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)?;
        let length = file.metadata()?.len();
        Ok(Self(Mutex::new((file, length))))
    }

    /// Notes what happened. Texts may be a guest's.
    pub(super) fn note(&self, what: &str, detail: &str) {
        let detail: String = detail.chars().take(TEXT_CHARS_MAX).collect();
        let line: Value = json!({ "unix_ms": now_unix_ms(), "what": what, "detail": detail });
        let line = format!("{line}\n");
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, length) = &mut *inner;
        *length = length.saturating_add(line.len() as u64);
        if *length <= BYTES_MAX {
            let _disk_full = file.write_all(line.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_bounded_and_a_line_stays_one() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("log");
        let journal = Journal::open(&path).expect("opens");
        journal.note("guest", "two\nlines");
        for _ in 0..4000 {
            journal.note("guest", &"x".repeat(1000));
        }
        let text = std::fs::read_to_string(&path).expect("reads");
        assert!(text.len() as u64 <= BYTES_MAX, "{}", text.len());
        let first: Value =
            serde_json::from_str(text.lines().next().expect("a line")).expect("JSON");
        assert_eq!(first["detail"], "two\nlines");
        assert!(text.lines().all(|line| line.len() < 600));
    }
}
