//! A configuration that comes later: a named pipe in place of the file. The program that opens it has started, and waits there.
//!
//! The start of a large program is most of its cost without hardware virtualisation; a template holds it as far as it goes without a disk.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use rustix::io::Errno;
use tokio::time::Instant;

use crate::error::{Context, SysError};

/// Pause between two looks whether the program has come to it: there is no notification for that.
const PAUSE: Duration = Duration::from_millis(5);
/// Longest text: what a pipe takes at once (pipe(7)), so that giving it never waits.
const BYTES_MAX: usize = 16 * 4096;

/// The end that is written to. Dropped without a word it would be an empty file.
#[derive(Debug)]
pub(crate) struct LateConfig(File);

/// Makes the pipe, in place of whatever was there.
pub(crate) fn make(path: &Path) -> Result<(), SysError> {
    let what = || format!("make {}", path.display());
    let _none_before = fs::remove_file(path);
    mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR).context(what)
}

impl LateConfig {
    /// Waits until a program opens the pipe; `None` when none did in time.
    pub(crate) async fn opened(path: &Path, within: Duration) -> Result<Option<Self>, SysError> {
        let deadline = Instant::now() + within;
        loop {
            let open = File::options()
                .write(true)
                .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
                .open(path);
            match open {
                Ok(file) => return Ok(Some(Self(file))),
                Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {}
                Err(error) => {
                    let failed: Result<(), _> = Err(error);
                    failed.context(|| format!("open {}", path.display()))?;
                }
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Gives the text and its end.
    pub(crate) fn give(mut self, text: &str) -> Result<(), SysError> {
        let what = || "give a configuration".to_owned();
        if text.len() > BYTES_MAX {
            let too_long: Result<(), _> = Err(Errno::FBIG);
            return too_long.context(what);
        }
        self.0.write_all(text.as_bytes()).context(what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reader_waits_until_the_text_is_given() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("config");
        make(&path).expect("a pipe");
        make(&path).expect("in place of an older one");
        let nobody = LateConfig::opened(&path, Duration::ZERO).await;
        assert!(nobody.expect("looked").is_none());
        let reader = std::thread::spawn({
            let path = path.clone();
            move || fs::read_to_string(path)
        });
        let late = LateConfig::opened(&path, Duration::from_secs(30)).await;
        let late = late.expect("opened").expect("in time");
        assert!(!reader.is_finished());
        late.give("root = \"/x\"\n").expect("given");
        let text = reader.join().expect("the reader").expect("text");
        assert_eq!(text, "root = \"/x\"\n");
    }

    #[tokio::test]
    async fn a_text_that_would_wait_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("config");
        make(&path).expect("a pipe");
        let reader = std::thread::spawn({
            let path = path.clone();
            move || fs::read_to_string(path)
        });
        let late = LateConfig::opened(&path, Duration::from_secs(30)).await;
        let late = late.expect("opened").expect("in time");
        late.give(&"x".repeat(BYTES_MAX + 1)).expect_err("refused");
        assert_eq!(reader.join().expect("the reader").expect("text"), "");
    }
}
