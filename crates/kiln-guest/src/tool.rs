//! Programs of the root disk that the guest itself needs.

use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::unix::AsyncFd;

use crate::error::{Context, SysError};
use crate::fd::watched;
use crate::reaper::Ended;
use crate::state::Guest;

/// Bytes of a tool's last words that are kept.
const WORDS_MAX: usize = 1024;
/// Where tools are.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs a tool to its end.
///
/// # Errors
/// When it cannot be started, fails, or takes too long; with its last words.
pub(crate) async fn run(guest: &Guest, argv: &[&str], within: Duration) -> Result<(), SysError> {
    let what = || format!("run {}", argv.join(" "));
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).context(what)?;
    let mut command = Command::new(argv[0]);
    command
        .args(&argv[1..])
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(write);
    let child = guest.reaper.spawn(&mut command).context(what)?;
    // The command holds the writing end; the tool's copy must be the only one.
    drop(command);
    let words = last_words(watched(read).context(what)?);
    let done = async { tokio::join!(child.ended, words) };
    let Ok((ended, words)) = tokio::time::timeout(within, done).await else {
        if let Some(pid) = rustix::process::Pid::from_raw(child.pid) {
            let _gone = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        return Err(SysError::timeout(what()));
    };
    match ended {
        Ok(Ended::Code(0)) => Ok(()),
        ended => Err(SysError::other(what(), &format!("{ended:?}: {words}"))),
    }
}

async fn last_words(pipe: AsyncFd<OwnedFd>) -> String {
    let mut words = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(mut ready) = pipe.readable().await {
        match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer)?)) {
            Ok(Ok(0) | Err(_)) => break,
            Ok(Ok(count)) => {
                words.extend_from_slice(&buffer[..count]);
                let extra = words.len().saturating_sub(WORDS_MAX);
                words.drain(..extra);
            }
            Err(_would_block) => {}
        }
    }
    String::from_utf8_lossy(&words).trim().to_owned()
}
