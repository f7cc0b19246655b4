//! A kiln command as a person would start it: a process of its own, timed from before its start to after its end.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use kiln_core::FailureClass;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use super::{Bench, cancelled};
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::interrupt::CANCEL_DEADLINE;

/// This very program, also when its file was replaced since (Linux: proc(5), `/proc/pid/exe`).
pub(super) const THIS_PROGRAM: &str = "/proc/self/exe";
/// Bytes of a failed command's words that are shown.
const WORDS_MAX: u64 = 2048;

/// Runs `kiln WORDS...` to its end; gives its wall time.
///
/// # Errors
/// When it fails, with its last words.
pub(super) async fn kiln(bench: &Bench<'_>, words: &[&OsStr]) -> Result<Duration> {
    kiln_with(bench, words, &[]).await
}

/// As [`kiln`], with these variables in its environment.
///
/// # Errors
/// As [`kiln`].
pub(super) async fn kiln_with(
    bench: &Bench<'_>,
    words: &[&OsStr],
    env: &[(&str, OsString)],
) -> Result<Duration> {
    let path = bench.work.join("stderr");
    let stderr = fs::File::create(&path).or_infrastructure()?;
    let began = Instant::now();
    let mut child = Command::new(THIS_PROGRAM)
        .args(words)
        .envs(env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .kill_on_drop(true)
        .spawn()
        .or_infrastructure()?;
    let status = tokio::select! {
        status = child.wait() => status.or_infrastructure()?,
        () = bench.cancel.cancelled() => {
            end(&mut child).await;
            return Err(cancelled());
        }
    };
    let took = began.elapsed();
    if bench.cancel.is_cancelled() {
        return Err(cancelled());
    }
    if status.success() {
        return Ok(took);
    }
    let line: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    Err(CliError::new(
        FailureClass::Infrastructure,
        format!(
            "`kiln {}` ended with {status}:\n{}",
            line.join(" "),
            tail(&path).or_infrastructure()?
        ),
    ))
}

/// Asks a child to end, waits, and kills it when it does not.
pub(super) async fn end(child: &mut Child) {
    let pid = child
        .id()
        .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    if let Some(pid) = pid {
        let _gone_already = kill_process(pid, Signal::TERM);
    }
    if tokio::time::timeout(CANCEL_DEADLINE, child.wait())
        .await
        .is_err()
    {
        let _gone_already = child.kill().await;
    }
}

fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(WORDS_MAX)))?;
    let mut bytes = Vec::new();
    file.take(WORDS_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}
