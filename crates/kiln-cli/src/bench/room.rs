//! Benchmarks of the clean room, each as a user's own commands do it: a folder on its way in, the machine's end, many runs at once, and the
//! way of a key to a console and back.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use kiln_core::FailureClass;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::task::JoinSet;

use super::child::{self, THIS_PROGRAM};
use super::report::Report;
use super::series::{Promise, Unit};
use super::{Bench, cancelled};
use crate::error::{CliError, OrInfrastructure as _, Result};

/// The tree of a copy: files, and bytes of each.
const FILES: usize = 5_000;
const FILE_BYTES: usize = 10_000;
const FOLDERS: usize = 50;
/// Runs at once.
const AT_ONCE: usize = 16;
/// Keys of one sample.
const KEYS: usize = 50;
/// Longest time for one key.
const KEY_MAX: Duration = Duration::from_secs(20);
/// What leaves a console when it comes twice in a row.
const LEAVE: u8 = 0x1d;

/// `room`.
pub(super) async fn room(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let tree = tree(bench.work).or_infrastructure()?;
    for _ in 0..bench.samples {
        let [run, source, rest, command] = ["run", "--source", "--", "true"].map(OsStr::new);
        let words = [run, source, tree.as_os_str(), rest, command];
        child::kiln(bench, &words).await?;
        let record = said(bench, &["job", "show", "--json"]).await?;
        let record: Value = serde_json::from_str(&record).or_infrastructure()?;
        for (key, name, promise) in [
            (
                "source_ms",
                "copy-in of 50 MB in 5,000 files",
                Some(3_000.0),
            ),
            (
                "teardown_ms",
                "end of a machine to nothing left",
                Some(200.0),
            ),
            ("clone_ms", "  of such a run: clone", None),
            ("disk_ms", "  of such a run: disk", None),
        ] {
            let ms = record["record"][key].as_f64();
            let ms = ms.ok_or_else(|| unexpected(&format!("the job's record has no {key}")))?;
            report.add(
                name,
                Unit::Milliseconds,
                promise.map(Promise::MedianAtMost),
                ms,
            );
        }
    }
    at_once(bench, report).await?;
    console(bench, report).await
}

/// kiln's own commands said something else than they do.
fn unexpected(what: &str) -> CliError {
    CliError::new(FailureClass::Infrastructure, what)
}

fn tree(work: &Path) -> std::io::Result<std::path::PathBuf> {
    let root = work.join("tree");
    let bytes: Vec<u8> = (0..FILE_BYTES)
        .map(|at| u8::try_from(at * 7 % 251).unwrap_or(0))
        .collect();
    for number in 0..FILES {
        let folder = root.join(format!("folder-{}", number % FOLDERS));
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(format!("file-{number}")), &bytes)?;
    }
    Ok(root)
}

/// What a kiln command says on standard output.
async fn said(bench: &Bench<'_>, words: &[&str]) -> Result<String> {
    let mut command = Command::new(THIS_PROGRAM);
    command
        .args(words)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::select! {
        output = command.output() => output.or_infrastructure()?,
        () = bench.cancel.cancelled() => return Err(cancelled()),
    };
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// One run by itself, then many at once: none fails, and none waits out of proportion.
async fn at_once(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    const RUN: [&str; 4] = ["run", "--no-source", "--", "true"];
    let mut alone = Vec::new();
    for _ in 0..bench.samples.max(3) {
        alone.push(child::kiln(bench, &RUN.map(OsStr::new)).await?);
    }
    alone.sort_unstable();
    let single = alone[alone.len() / 2];
    let mut running = JoinSet::new();
    let began = Instant::now();
    for _ in 0..AT_ONCE {
        let mut command = Command::new(THIS_PROGRAM);
        command
            .args(RUN)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        running.spawn(async move { (command.status().await, began.elapsed()) });
    }
    let mut failed = 0;
    loop {
        let next = tokio::select! {
            next = running.join_next() => next,
            () = bench.cancel.cancelled() => return Err(cancelled()),
        };
        let Some(ended) = next else { break };
        let (status, took) = ended.or_infrastructure()?;
        failed += u32::from(!status.or_infrastructure()?.success());
        report.time("16 runs at once: each", None, took);
        let ratio = took.as_secs_f64() / single.as_secs_f64();
        report.add(
            "16 runs at once / one alone",
            Unit::Ratio,
            Some(Promise::P99AtMost(20.0)),
            ratio,
        );
    }
    report.add(
        "16 runs at once: failed",
        Unit::Count,
        Some(Promise::EachAtMost(0.0)),
        f64::from(failed),
    );
    Ok(())
}

/// Keys to a console in a machine that is kept for it.
async fn console(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    const KEEP: [&str; 5] = ["run", "--no-source", "--keep=10m", "--", "true"];
    let before = said(bench, &["machine", "list", "--json"]).await?;
    child::kiln(bench, &KEEP.map(OsStr::new)).await?;
    let after = said(bench, &["machine", "list", "--json"]).await?;
    let new = after.lines().find(|line| !before.contains(line));
    let id = new
        .and_then(|line| serde_json::from_str::<Value>(line).ok())
        .and_then(|machine| machine["id"].as_str().map(str::to_owned))
        .ok_or_else(|| unexpected("the kept machine is not listed"))?;
    let measured = round_trips(bench, &id, report).await;
    let _gone = said(bench, &["machine", "rm", &id]).await?;
    measured
}

/// Keys to a shell's terminal in a kept machine, through `kiln console` on a terminal of this host: from the key to its echo.
async fn round_trips(bench: &Bench<'_>, id: &str, report: &mut Report) -> Result<()> {
    let (mut keys, screen) = terminal().or_infrastructure()?;
    let mut console = Command::new(THIS_PROGRAM)
        .args(["console", id, "--", "sh", "-c", "echo ready; exec cat"])
        .stdin(screen.try_clone().or_infrastructure()?)
        .stdout(screen)
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .or_infrastructure()?;
    // From here on this host's terminal echoes nothing itself.
    let mut said = Vec::new();
    while !said.ends_with(b"ready\r\n") {
        said.push(key(bench, &mut keys, None).await?);
    }
    for _ in 0..bench.samples {
        for _ in 0..KEYS {
            let began = Instant::now();
            key(bench, &mut keys, Some(b'x')).await?;
            let promise = Some(Promise::MedianAtMost(10.0));
            report.time("a key to a console and its echo", promise, began.elapsed());
        }
        // The end of a line, and the line once more, from `cat`.
        key(bench, &mut keys, Some(b'\n')).await?;
        for _ in 0..KEYS + 3 {
            key(bench, &mut keys, None).await?;
        }
    }
    for _ in 0..2 {
        keys.write_all(&[LEAVE]).await.or_infrastructure()?;
    }
    keys.flush().await.or_infrastructure()?;
    let _ended = console.wait().await.or_infrastructure()?;
    Ok(())
}

/// Types a key, if there is one; gives the next byte on the screen.
async fn key(bench: &Bench<'_>, keys: &mut tokio::fs::File, typed: Option<u8>) -> Result<u8> {
    let mut shown = [0];
    let trip = async {
        if let Some(key) = typed {
            keys.write_all(&[key]).await?;
            keys.flush().await?;
        }
        keys.read_exact(&mut shown).await
    };
    let trip = tokio::select! {
        trip = tokio::time::timeout(KEY_MAX, trip) => trip,
        () = bench.cancel.cancelled() => return Err(cancelled()),
    };
    trip.or_infrastructure()?.or_infrastructure()?;
    Ok(shown[0])
}

/// A terminal: what its user holds, and what a program is given.
fn terminal() -> std::io::Result<(tokio::fs::File, std::os::fd::OwnedFd)> {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let user = openpt(flags)?;
    grantpt(&user)?;
    unlockpt(&user)?;
    let program = ioctl_tiocgptpeer(&user, flags)?;
    let user = tokio::fs::File::from_std(fs::File::from(user));
    Ok((user, program))
}
