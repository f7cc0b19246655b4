//! Who watches a keeper: a process that does nothing until the keeper is gone, however it went, and then removes its machine. The keeper is a process
//! of its own, or a worker that keeps machines of a server's jobs: that one has a watcher for each, from the job's start on.
//!
//! A kept machine was started without the request to die with its owner, because owners change. The kernel cannot be asked for it later. So each keeper
//! has a watcher: it holds the read end of a pipe whose other end the keeper alone has, and sees its end at once. A watcher that dies is replaced by
//! its keeper; only where both are killed at the same moment the machine waits for the next command that touches machines.

use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use kiln_core::MachineName;
use kiln_machine::reap::{kill_owner, reap_home};
use kiln_worker::fleet::clock::boot_ms;
use kiln_worker::fleet::job;
use kiln_worker::kept::{HANDOVER_MAX, Handover, STAYS_MAX};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::home;
use super::keeper::PROGRAM;
use crate::error::{OrInfrastructure as _, Result, chain};

/// How long a keeper may take to end its machine once its time is over; then it hangs, and is ended itself.
const END_GRACE: Duration = Duration::from_secs(30);
/// Pause before a watcher that ended is replaced.
const AGAIN: Duration = Duration::from_secs(1);
/// How often the deadline is looked at: a timer would not run while the host sleeps.
const TICK: Duration = Duration::from_secs(1);
/// How often a machine that is not gone yet is tried again.
const REAP_AGAIN: Duration = Duration::from_millis(250);
/// How long: a machine that was let go of is nobody's to remove for that time.
const REAP_MAX: Duration = Duration::from_secs(HANDOVER_MAX.as_secs() + 30);

/// That somebody watches; dropped, as by the end of this process, the watcher sees it.
#[derive(Debug)]
pub(in crate::commands) struct Watched(JoinHandle<()>);

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Has this process watched on behalf of the machine that it keeps.
///
/// # Errors
/// When no watcher can be started.
pub(super) fn begin(handover: &Handover) -> io::Result<Watched> {
    let stays = Duration::from_millis(handover.stays_ms).min(STAYS_MAX);
    let until = boot_ms().saturating_add(ms(stays + END_GRACE));
    follow(&handover.machine, Some(until))
}

/// Has a machine of a worker watched. The worker bounds its time itself, and is not ended for one of its machines.
///
/// # Errors
/// When no watcher can be started.
pub(in crate::commands) fn of_worker(machine: &MachineName) -> io::Result<job::Watched> {
    Ok(Box::new(follow(machine, None)?))
}

fn follow(machine: &MachineName, until: Option<u64>) -> io::Result<Watched> {
    let machine = machine.clone();
    let first = start(&machine, until)?;
    Ok(Watched(tokio::spawn(async move {
        let mut watcher = Some(first);
        loop {
            match watcher.take() {
                Some((mut child, _held)) => {
                    let ended = child.wait().await;
                    tracing::warn!(%machine, ?ended, "the watcher of this machine ended: there is another");
                }
                None => tokio::time::sleep(AGAIN).await,
            }
            match start(&machine, until) {
                Ok(started) => watcher = Some(started),
                Err(error) => tracing::warn!(%machine, %error, "nobody watches this machine"),
            }
        }
    })))
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The watcher, and what tells it that this process lives: waiting for the child would close it.
fn start(
    machine: &MachineName,
    until_boot_ms: Option<u64>,
) -> io::Result<(Child, Option<ChildStdin>)> {
    let mut command = Command::new(PROGRAM);
    command
        .arg0("kiln")
        .args(["keep-machine", "--watch", machine.as_str()]);
    if let Some(until) = until_boot_ms {
        let left = until.saturating_sub(boot_ms());
        command.args(["--for-ms", &left.to_string()]);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        // Ctrl-C in the terminal of a worker is not for it.
        .process_group(0)
        .spawn()?;
    let held = child.stdin.take();
    Ok((child, held))
}

/// `kiln keep-machine --watch`: waits for the keeper's end, then removes what is left of its machine.
pub(in crate::commands) async fn run(
    machine: &MachineName,
    for_ms: Option<u64>,
    cancel: CancellationToken,
) -> Result<u8> {
    let home = home()?.data;
    let stdin = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .or_infrastructure()?;
    let keeper = pipe::Receiver::from_owned_fd(stdin).or_infrastructure()?;
    let until = for_ms.map(|left| boot_ms().saturating_add(left));
    tokio::select! {
        () = is_gone(keeper) => {}
        () = passed(until) => {
            tracing::warn!(%machine, "its time is over and its keeper did not end it");
            let (home, machine) = (home.clone(), machine.clone());
            let killed = tokio::task::spawn_blocking(move || kill_owner(&home, &machine)).await;
            if let Err(error) = killed.or_infrastructure()? {
                tracing::warn!(error = chain(&error), "its keeper cannot be ended");
            }
        }
        () = cancel.cancelled() => return Ok(0),
    }
    tokio::time::timeout(REAP_MAX, removed(&home, machine))
        .await
        .or_infrastructure()?;
    Ok(0)
}

/// Completes when nobody holds the other end.
async fn is_gone(mut keeper: pipe::Receiver) {
    let mut buffer = [0; 64];
    while keeper.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
}

/// Completes at this time, if there is one, of the clock that runs while the host sleeps.
async fn passed(until_boot_ms: Option<u64>) {
    let Some(until_boot_ms) = until_boot_ms else {
        return std::future::pending().await;
    };
    while boot_ms() < until_boot_ms {
        let left = Duration::from_millis(until_boot_ms.saturating_sub(boot_ms()));
        tokio::time::sleep(left.min(TICK)).await;
    }
}

/// Completes when there is no such machine. Its keeper may have removed it itself, or it may be nobody's for a moment longer.
async fn removed(home: &Path, machine: &MachineName) {
    let dir = home.join("machines").join(machine.as_str());
    while dir.exists() {
        let all = home.to_owned();
        let reaped = tokio::task::spawn_blocking(move || reap_home(&all)).await;
        for leak in reaped.map(|report| report.leaks).unwrap_or_default() {
            tracing::warn!(leak, "could not be reaped");
        }
        if dir.exists() {
            tokio::time::sleep(REAP_AGAIN).await;
        }
    }
}
