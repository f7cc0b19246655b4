//! BuildKit in the machine: configured, started, known to answer, stopped.
//!
//! It runs as root, because the machine is the boundary, in `workload/buildkit`; its RUN steps run below
//! `workload/steps` with bounds of their own, so that BuildKit survives a step that does not.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_core::network::REGISTRY_HOST;
use kiln_proto::msg::{BuildkitConfig, GuestError, GuestErrorCode};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::cgroup::{Cgroup, Watch};
use crate::error::{Context, SysError, chain, failure, invalid};
use crate::oci_wrapper::{self, Settings};
use crate::reaper::Ended;
use crate::state::{Guest, WORKLOAD};
use crate::{exec, log, mounts, solve_client, tool, tree};

/// The daemon in the root disk.
pub(crate) const DAEMON: &str = "/usr/local/bin/buildkitd";
const CONFIG: &str = "/run/kiln/buildkitd.toml";
const SOCKET_DIR: &str = "/run/buildkit";
const SOCKET: &str = "/run/buildkit/buildkitd.sock";
/// How long it may take until it answers.
const READY_WAIT: Duration = Duration::from_secs(60);
/// Longest pause between two looks whether it answers, for the case that a notification was lost.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// How long it may take to stop when asked.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// Memory of the workload that RUN steps cannot have: BuildKit's own.
const MEMORY_RESERVE: u64 = 256 * 1024 * 1024;
/// That reserve is at most this part of the workload's memory.
const MEMORY_RESERVE_PART: u64 = 4;
/// Processes of all RUN steps unless the host says otherwise.
const STEP_PIDS_MAX: u64 = 8192;
/// Protects the daemon from the OOM killer.
const OOM_SCORE: &str = "-500";
/// Bytes of its last words that are kept.
const WORDS_MAX: usize = 4096;
/// Longest line of its log.
const LINE_MAX: u64 = 4096;
/// The start of HTTP/2 (RFC 9113 section 3.4) and an empty SETTINGS frame.
const HTTP2_HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// Type of a SETTINGS frame, at this offset of it.
const SETTINGS_TYPE: (usize, u8) = (3, 4);

/// A daemon that was started.
#[derive(Debug)]
pub(crate) struct Running {
    pid: i32,
    ended: watch::Receiver<Option<Ended>>,
}

type Words = Arc<Mutex<VecDeque<u8>>>;

/// The text of buildkitd.toml. Format: `cmd/buildkitd/config/config.go` of BuildKit 0.33.
fn config(bytes_max: u64, parallel: usize) -> String {
    format!(
        r#"root = "{root}"
insecure-entitlements = []

[log]
level = "warn"

[grpc]
address = ["unix://{SOCKET}"]

[history]
maxEntries = 20

[cdi]
disabled = true

[worker.containerd]
enabled = false

[worker.oci]
enabled = true
platforms = ["linux/amd64"]
snapshotter = "overlayfs"
networkMode = "host"
binary = "{wrapper}"
defaultCgroupParent = "/{WORKLOAD}/steps"
max-parallelism = {parallel}
gc = true

[[worker.oci.gcpolicy]]
keepDuration = "1440h"
maxUsedSpace = "{bytes_max}"

[[worker.oci.gcpolicy]]
maxUsedSpace = "{bytes_max}"

[[worker.oci.gcpolicy]]
all = true
maxUsedSpace = "{bytes_max}"

[frontend."gateway.v0"]
enabled = false

[registry."{REGISTRY_HOST}"]
http = true
"#,
        root = mounts::STATE,
        wrapper = oci_wrapper::PATH,
    )
}

fn steps(guest: &Guest) -> Cgroup {
    guest.workload.child("steps")
}

fn daemon_group(guest: &Guest) -> Cgroup {
    guest.workload.child("buildkit")
}

/// Memory for all RUN steps together.
fn step_memory(asked: u64, workload: u64) -> u64 {
    let most = workload - MEMORY_RESERVE.min(workload / MEMORY_RESERVE_PART);
    if asked == 0 { most } else { asked.min(most) }
}

fn set_up(guest: &Guest, order: &BuildkitConfig) -> Result<(), GuestError> {
    let steps = steps(guest);
    steps.create()?;
    steps.delegate()?;
    steps.limit_memory(step_memory(
        order.step_memory_max,
        guest.workload.number("memory.max"),
    ))?;
    steps.limit_pids(if order.step_pids_max == 0 {
        STEP_PIDS_MAX
    } else {
        order.step_pids_max
    })?;
    daemon_group(guest).create()?;
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let bytes_max = if order.cache_bytes_max == 0 {
        mounts::bytes_total(mounts::STATE)? / 4 * 3
    } else {
        order.cache_bytes_max
    };
    tree::write_file(
        Path::new(CONFIG),
        0o755,
        0o644,
        config(bytes_max, (2 * cpus).max(4)).as_bytes(),
    )?;
    if !Path::new(oci_wrapper::PATH).exists() {
        let what = || format!("put {} in place", oci_wrapper::PATH);
        fs::copy("/proc/self/exe", oci_wrapper::PATH).context(what)?;
        fs::set_permissions(oci_wrapper::PATH, fs::Permissions::from_mode(0o755)).context(what)?;
    }
    if !Path::new(solve_client::PATH).exists() {
        let what = || format!("put {} in place", solve_client::PATH);
        std::os::unix::fs::symlink(oci_wrapper::PATH, solve_client::PATH).context(what)?;
    }
    tree::ensure_ca_bundle()?;
    Settings::load()?.store()?;
    fs::create_dir_all(SOCKET_DIR).context(|| format!("make {SOCKET_DIR}"))?;
    let _none_before = fs::remove_file(SOCKET);
    Ok(())
}

/// Starts the daemon and waits until it answers.
pub(crate) async fn start(guest: &Arc<Guest>, order: BuildkitConfig) -> Result<(), GuestError> {
    guest.prepared().await;
    let mut running = guest.buildkit.lock().await;
    if running
        .as_ref()
        .is_some_and(|daemon| daemon.ended.borrow().is_none())
    {
        return Err(invalid("BuildKit runs already"));
    }
    if guest.is_frozen() {
        return Err(invalid("the workload is frozen"));
    }
    if !guest.mounts.lock().await.is_writable(mounts::STATE) {
        return Err(invalid(
            "BuildKit needs the state disk, mounted for writing",
        ));
    }
    set_up(guest, &order)?;
    let words = Words::default();
    let daemon = launch(guest, &words, order.step_log_bytes_max)?;
    let mut ended = daemon.ended.clone();
    *running = Some(daemon);
    let answer = tokio::select! {
        answer = answers() => answer,
        _changed = ended.wait_for(Option::is_some) => {
            Err(failure(GuestErrorCode::System, "BuildKit ended before it answered"))
        }
    };
    if let Err(error) = answer {
        end(guest, &mut running).await;
        let words = words
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .copied()
            .collect::<Vec<_>>();
        let words = String::from_utf8_lossy(&words).into_owned();
        let message = format!("{}; its last words: {words}", error.message);
        return Err(failure(error.code, message));
    }
    if Path::new(solve_client::PROGRAM).exists() {
        start_client(guest).await?;
    }
    Ok(())
}

/// Starts the client that stays, and waits until it listens. It ends with BuildKit's control group.
async fn start_client(guest: &Arc<Guest>) -> Result<(), GuestError> {
    let what = || "start the build client".to_owned();
    let _none_before = fs::remove_file(solve_client::SOCKET);
    let mut changes = Watch::directory(Path::new(SOCKET_DIR))?;
    let mut command = Command::new(solve_client::PROGRAM);
    command
        .arg(format!("unix://{SOCKET}"))
        .arg(solve_client::SOCKET)
        .env_clear()
        .env("HOME", "/root")
        .env("OTEL_SDK_DISABLED", "true")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let door = daemon_group(guest).door()?;
    exec::prepare(&mut command, &door, false, None);
    let child = guest.reaper.spawn(&mut command).context(what)?;
    drop(command);
    if let Err(error) = fs::write(format!("/proc/{}/oom_score_adj", child.pid), OOM_SCORE) {
        log::warn(&format!(
            "the build client is not protected from the OOM killer: {error}"
        ));
    }
    let mut ended = child.ended;
    let deadline = Instant::now() + READY_WAIT;
    loop {
        if UnixStream::connect(solve_client::SOCKET).await.is_ok() {
            break;
        }
        if Instant::now() >= deadline {
            let late = format!("the build client did not listen within {READY_WAIT:?}");
            return Err(failure(GuestErrorCode::Timeout, late));
        }
        tokio::select! {
            outcome = &mut ended => {
                let outcome = outcome.unwrap_or(Ended::Signal(0));
                let early = format!("the build client ended before it listened: {outcome:?}");
                return Err(failure(GuestErrorCode::System, early));
            }
            _changed = tokio::time::timeout(LOOK_AGAIN, changes.changed()) => {}
        }
    }
    tokio::spawn(async move {
        let outcome = ended.await.unwrap_or(Ended::Signal(0));
        log::info(&format!("the build client ended: {outcome:?}"));
    });
    Ok(())
}

/// How BuildKit is told the most bytes of a step's output it passes on.
fn log_size(bytes_max: u64) -> String {
    match bytes_max {
        0 => "-1".to_owned(),
        bytes => bytes.to_string(),
    }
}

fn launch(guest: &Arc<Guest>, words: &Words, log_bytes_max: u64) -> Result<Running, SysError> {
    let what = || "start BuildKit".to_owned();
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
    let mut command = Command::new(DAEMON);
    command
        .args(["--config", CONFIG])
        .env_clear()
        .current_dir("/");
    command
        .env("PATH", tool::PATH)
        .env("HOME", "/root")
        .env("SSL_CERT_FILE", tree::CA_BUNDLE);
    // The host bounds logs, and says where it cut: what it would cut anyway need not cross the channel.
    command
        .env("BUILDKIT_STEP_LOG_MAX_SIZE", log_size(log_bytes_max))
        .env("BUILDKIT_STEP_LOG_MAX_SPEED", "-1");
    command.env("OTEL_SDK_DISABLED", "true");
    command
        .stdin(Stdio::null())
        .stdout(write.try_clone().context(what)?)
        .stderr(write);
    let door = daemon_group(guest).door()?;
    exec::prepare(&mut command, &door, false, None);
    let child = guest.reaper.spawn(&mut command).context(what)?;
    drop(command);
    if let Err(error) = fs::write(format!("/proc/{}/oom_score_adj", child.pid), OOM_SCORE) {
        log::warn(&format!(
            "BuildKit is not protected from the OOM killer: {error}"
        ));
    }
    rustix::io::ioctl_fionbio(&read, true).context(what)?;
    tokio::spawn(listen(
        Receiver::from_owned_fd(read).context(what)?,
        Arc::clone(words),
    ));
    let (sender, ended) = watch::channel(None);
    tokio::spawn(async move {
        let outcome = child.ended.await.unwrap_or(Ended::Signal(0));
        log::info(&format!("BuildKit ended: {outcome:?}"));
        sender.send_replace(Some(outcome));
    });
    Ok(Running {
        pid: child.pid,
        ended,
    })
}

/// Keeps the daemon's last words and passes its log on.
async fn listen(pipe: Receiver, words: Words) {
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut reader)
            .take(LINE_MAX)
            .read_until(b'\n', &mut line)
            .await;
        if !read.is_ok_and(|count| count > 0) {
            return;
        }
        {
            let mut words = words.lock().unwrap_or_else(PoisonError::into_inner);
            words.extend(&line);
            let extra = words.len().saturating_sub(WORDS_MAX);
            words.drain(..extra);
        }
        log::debug(&format!(
            "buildkitd: {}",
            String::from_utf8_lossy(&line).trim_end()
        ));
    }
}

/// Waits until the daemon's server speaks. It listens early and speaks when all of it is ready.
async fn answers() -> Result<(), GuestError> {
    let mut changes = Watch::directory(Path::new(SOCKET_DIR))?;
    let deadline = Instant::now() + READY_WAIT;
    let late = || {
        failure(
            GuestErrorCode::Timeout,
            format!("BuildKit did not answer within {READY_WAIT:?}"),
        )
    };
    let mut stream = loop {
        if let Ok(stream) = UnixStream::connect(SOCKET).await {
            break stream;
        }
        let now = Instant::now();
        if now >= deadline {
            return Err(late());
        }
        let _looks_again =
            tokio::time::timeout_at(deadline.min(now + LOOK_AGAIN), changes.changed()).await;
    };
    let mut frame = [0; 9];
    let hello = async {
        stream.write_all(HTTP2_HELLO).await?;
        stream.read_exact(&mut frame).await
    };
    let spoke = tokio::time::timeout_at(deadline, hello)
        .await
        .map_err(|_| late())?;
    spoke.context(|| "talk to BuildKit".to_owned())?;
    let (at, kind) = SETTINGS_TYPE;
    if frame[at] == kind {
        Ok(())
    } else {
        Err(failure(GuestErrorCode::System, "BuildKit speaks no HTTP/2"))
    }
}

/// Stops the daemon and everything it started, and waits until all have gone.
pub(crate) async fn stop(guest: &Arc<Guest>) -> Result<(), GuestError> {
    let mut running = guest.buildkit.lock().await;
    if guest.is_frozen() {
        return Err(invalid("the workload is frozen"));
    }
    end(guest, &mut running).await;
    Ok(())
}

async fn end(guest: &Guest, running: &mut Option<Running>) {
    if let Some(mut daemon) = running.take() {
        if daemon.ended.borrow().is_none()
            && let Some(pid) = Pid::from_raw(daemon.pid)
        {
            let _gone = kill_process(pid, Signal::TERM);
        }
        let ended = daemon.ended.wait_for(Option::is_some);
        if tokio::time::timeout(STOP_GRACE, ended).await.is_err() {
            log::warn("BuildKit did not stop when asked and is killed");
        }
    }
    for group in [daemon_group(guest), steps(guest)] {
        if !group.path().exists() {
            continue;
        }
        let gone = match group.kill() {
            Ok(()) => group.emptied(exec::KILL_WAIT).await,
            Err(error) => Err(error),
        };
        if let Err(error) = gone.and_then(|()| group.remove()) {
            log::warn(&chain(&error));
        }
    }
    let _gone_already = fs::remove_file(SOCKET);
}

/// True if the daemon runs.
pub(crate) async fn is_running(guest: &Guest) -> bool {
    let running = guest.buildkit.lock().await;
    running
        .as_ref()
        .is_some_and(|daemon| daemon.ended.borrow().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_leave_memory_to_buildkit() {
        const MIB: u64 = 1024 * 1024;
        assert_eq!(step_memory(0, 2048 * MIB), 1792 * MIB);
        assert_eq!(step_memory(0, 512 * MIB), 384 * MIB);
        assert_eq!(step_memory(100 * MIB, 2048 * MIB), 100 * MIB);
        assert_eq!(step_memory(4096 * MIB, 2048 * MIB), 1792 * MIB);
    }

    #[test]
    fn the_configuration_names_the_wrapper_and_the_registry() {
        let text = config(1000, 4);
        assert!(text.contains("binary = \"/run/kiln/kiln-runc\""));
        assert!(text.contains("[registry.\"registry.kiln.internal\"]\nhttp = true"));
        assert!(text.contains("defaultCgroupParent = \"/workload/steps\""));
        assert_eq!(HTTP2_HELLO.len(), 24 + 9);
    }
}
