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
use crate::late_config::LateConfig;
use crate::oci_wrapper::{self, Settings};
use crate::reaper::Ended;
use crate::state::{Guest, WORKLOAD};
use crate::{exec, late_config, log, mounts, solve_client, tool, tree};

/// The daemon in the root disk.
pub(crate) const DAEMON: &str = "/usr/local/bin/buildkitd";
const CONFIG: &str = "/run/kiln/buildkitd.toml";
/// Where a daemon that was started before its disk waits for its configuration.
const LATE_CONFIG: &str = "/run/kiln/buildkitd-late.toml";
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
    words: Words,
    /// What it was told of step logs at its start.
    log_bytes_max: u64,
    /// It waits for its configuration, and has touched nothing yet.
    waits: Option<LateConfig>,
}

impl Running {
    fn is_alive(&self) -> bool {
        self.ended.borrow().is_none()
    }

    fn last_words(&self) -> String {
        let words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        let words: Vec<u8> = words.iter().copied().collect();
        String::from_utf8_lossy(&words).into_owned()
    }
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
maxEntries = 0

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

/// Makes everything ready for the daemon; gives the text of its configuration.
fn set_up(guest: &Guest, order: &BuildkitConfig) -> Result<String, GuestError> {
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
    Ok(config(bytes_max, (2 * cpus).max(4)))
}

/// Starts the daemon and waits until it answers; without a disk, until it waits for one.
pub(crate) async fn start(guest: &Arc<Guest>, order: BuildkitConfig) -> Result<(), GuestError> {
    guest.prepared().await;
    let mut running = guest.buildkit.lock().await;
    let alive = running.as_ref().filter(|daemon| daemon.is_alive());
    if alive.is_some_and(|daemon| daemon.waits.is_none() || order.wait_for_disk) {
        return Err(invalid("BuildKit runs already"));
    }
    if guest.is_frozen() {
        return Err(invalid("the workload is frozen"));
    }
    if !order.wait_for_disk && !guest.mounts.lock().await.is_writable(mounts::STATE) {
        return Err(invalid(
            "BuildKit needs the state disk, mounted for writing",
        ));
    }
    let ready = match order.wait_for_disk {
        true => wait_for_disk(guest, &mut running, &order).await,
        false => begin(guest, &mut running, &order).await,
    };
    let Err(error) = ready else {
        return Ok(());
    };
    let words = running.as_ref().map(Running::last_words);
    end(guest, &mut running).await;
    let words = words.unwrap_or_default();
    let message = format!("{}; its last words: {words}", error.message);
    Err(failure(error.code, message))
}

/// Starts the daemon as far as it goes without a disk: up to its configuration.
async fn wait_for_disk(
    guest: &Arc<Guest>,
    running: &mut Option<Running>,
    order: &BuildkitConfig,
) -> Result<(), GuestError> {
    end(guest, running).await;
    daemon_group(guest).create()?;
    let path = Path::new(LATE_CONFIG);
    late_config::make(path)?;
    let daemon = launch(guest, LATE_CONFIG, order.step_log_bytes_max)?;
    let mut ended = daemon.ended.clone();
    let daemon = running.insert(daemon);
    tokio::select! {
        opened = LateConfig::opened(path, READY_WAIT) => {
            daemon.waits = Some(opened?.ok_or_else(late)?);
            Ok(())
        }
        _changed = ended.wait_for(Option::is_some) => Err(ended_early()),
    }
}

/// Starts the daemon on the state disk, or gives the one that waits its configuration, and its client.
async fn begin(
    guest: &Arc<Guest>,
    running: &mut Option<Running>,
    order: &BuildkitConfig,
) -> Result<(), GuestError> {
    let fits =
        |daemon: &Running| daemon.is_alive() && daemon.log_bytes_max == order.step_log_bytes_max;
    if !running.as_ref().is_some_and(fits) {
        end(guest, running).await;
    }
    let text = set_up(guest, order)?;
    let mut ended = match running {
        Some(daemon) => {
            let waits = daemon.waits.take();
            waits.map_or(Ok(()), |waits| waits.give(&text))?;
            daemon.ended.clone()
        }
        None => {
            tree::write_file(Path::new(CONFIG), 0o755, 0o644, text.as_bytes())?;
            let daemon = launch(guest, CONFIG, order.step_log_bytes_max)?;
            running.insert(daemon).ended.clone()
        }
    };
    // It listens long before it speaks. A client that connected earlier than that would be refused, and try again after a second.
    let both = async {
        let stream = listens().await?;
        tokio::try_join!(speaks(stream), client(guest)).map(|_| ())
    };
    tokio::select! {
        answer = both => answer,
        _changed = ended.wait_for(Option::is_some) => Err(ended_early()),
    }
}

fn ended_early() -> GuestError {
    failure(GuestErrorCode::System, "BuildKit ended before it was ready")
}

/// Starts the client that stays, and waits until it listens. It ends with BuildKit's control group. An older root disk has none.
async fn client(guest: &Arc<Guest>) -> Result<(), GuestError> {
    match Path::new(solve_client::PROGRAM).exists() {
        true => start_client(guest).await,
        false => Ok(()),
    }
}

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

fn launch(guest: &Arc<Guest>, config: &str, log_bytes_max: u64) -> Result<Running, SysError> {
    let what = || "start BuildKit".to_owned();
    let words = Words::default();
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
    let mut command = Command::new(DAEMON);
    command
        .args(["--config", config])
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
        Arc::clone(&words),
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
        words,
        log_bytes_max,
        waits: None,
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

/// Waits until the daemon listens; gives a connection that waits in its queue.
async fn listens() -> Result<UnixStream, GuestError> {
    let mut changes = Watch::directory(Path::new(SOCKET_DIR))?;
    let deadline = Instant::now() + READY_WAIT;
    loop {
        if let Ok(stream) = UnixStream::connect(SOCKET).await {
            return Ok(stream);
        }
        let now = Instant::now();
        if now >= deadline {
            return Err(late());
        }
        let _looks_again =
            tokio::time::timeout_at(deadline.min(now + LOOK_AGAIN), changes.changed()).await;
    }
}

/// Waits until the daemon's server speaks: then all of it is ready.
async fn speaks(mut stream: UnixStream) -> Result<(), GuestError> {
    let mut frame = [0; 9];
    let hello = async {
        stream.write_all(HTTP2_HELLO).await?;
        stream.read_exact(&mut frame).await
    };
    let spoke = tokio::time::timeout(READY_WAIT, hello)
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

fn late() -> GuestError {
    failure(
        GuestErrorCode::Timeout,
        format!("BuildKit did not answer within {READY_WAIT:?}"),
    )
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
        // One that waits has nothing to finish, and must not go on without its configuration.
        let signal = match daemon.waits {
            Some(_) => Signal::KILL,
            None => Signal::TERM,
        };
        if daemon.is_alive()
            && let Some(pid) = Pid::from_raw(daemon.pid)
        {
            let _gone = kill_process(pid, signal);
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

/// True if the daemon runs on the state disk.
pub(crate) async fn is_running(guest: &Guest) -> bool {
    let running = guest.buildkit.lock().await;
    running
        .as_ref()
        .is_some_and(|daemon| daemon.is_alive() && daemon.waits.is_none())
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
    fn the_configuration_names_the_wrapper_and_the_registry_and_keeps_no_history() {
        let text = config(1000, 4);
        // A record of a build costs a quarter of a second of it, and nobody reads it.
        assert!(text.contains("[history]\nmaxEntries = 0\n"));
        assert!(text.contains("binary = \"/run/kiln/kiln-runc\""));
        assert!(text.contains("[registry.\"registry.kiln.internal\"]\nhttp = true"));
        assert!(text.contains("defaultCgroupParent = \"/workload/steps\""));
        assert_eq!(HTTP2_HELLO.len(), 24 + 9);
    }
}
