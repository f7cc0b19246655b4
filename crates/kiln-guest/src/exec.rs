//! Commands: started in a cgroup of their own, bounded, watched, and gone without a trace.
//!
//! The process and everything it starts live in `workload/exec-N` (its processes in `main` below, so that runc can
//! make cgroups beside it). Whatever happens, the end is the same: the whole cgroup is killed and removed.
//! Read next: `exec/pump.rs` (input and output).

mod pump;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiln_proto::codec;
use kiln_proto::msg::{ExecRequest, Exit, GuestError, GuestErrorCode, TtySize, chunk};
use kiln_proto::stream::Stream;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::AsyncWriteExt;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};

use crate::cgroup::Cgroup;
use crate::error::{Context, SysError, failure, invalid};
use crate::log;
use crate::reaper::{Child, Ended};
use crate::state::Guest;

/// How long a command may go on after it was told to end because its time was up.
pub(crate) const TERM_GRACE: Duration = Duration::from_secs(2);
/// How long the kernel may take to end what was killed.
pub(crate) const KILL_WAIT: Duration = Duration::from_secs(10);
/// Path for commands whose environment has none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Highest signal number.
const SIGNAL_MAX: i32 = 64;

/// A command that runs.
#[derive(Debug)]
struct Started {
    child: Child,
    io: pump::Io,
}

/// Kills the cgroup of a command when it is dropped.
#[derive(Debug)]
struct Leash(Cgroup);

impl Drop for Leash {
    fn drop(&mut self) {
        let group = self.0.clone();
        if !group.path().exists() {
            return;
        }
        if let Err(error) = group.kill() {
            log::warn(&crate::error::chain(&error));
        }
        tokio::spawn(async move { clear(&group).await });
    }
}

/// Waits for the end of what was killed and removes the cgroup. What is to be known of it must have been read.
async fn clear(group: &Cgroup) {
    let emptied = group.emptied(KILL_WAIT).await;
    if let Err(error) = emptied.and_then(|()| group.remove()) {
        log::warn(&crate::error::chain(&error));
    }
}

/// Serves one exec stream from the request to the exit.
pub(crate) async fn serve(guest: Arc<Guest>, request: ExecRequest, stream: Stream) {
    let (reader, mut writer) = tokio::io::split(stream);
    let group = guest.workload.child(&format!("exec-{}", guest.next_exec()));
    let leash = Leash(group.clone());
    let kills_before = guest.memory.kills(&guest.workload);
    let started = match start(&guest, &request, &group) {
        Ok(started) => started,
        Err(error) => {
            let body = serde_json::to_vec(&error).unwrap_or_default();
            let _host_gone = codec::write_chunk(&mut writer, chunk::FAILED, &body).await;
            let _host_gone = writer.shutdown().await;
            return;
        }
    };
    if !request.trusted {
        guest.job_ran.store(true, Ordering::Relaxed);
    }
    let Started { child, io } = started;
    let handle = Handle {
        pid: child.pid,
        alive: Arc::new(AtomicBool::new(true)),
    };
    let (over, is_over) = watch::channel(false);
    let life = async {
        let outcome = supervise(child.ended, &group, &handle, request.timeout_ms).await;
        over.send_replace(true);
        outcome
    };
    let (input, output) = io.split();
    let output = pump::output(output, &mut writer, request.output_bytes_max, is_over);
    let until_host_is_gone = pump::input(input, reader, &handle);
    let ((ended, timed_out), dropped) = tokio::select! {
        both = async { tokio::join!(life, output) } => both,
        () = until_host_is_gone => return,
    };
    let Ok(dropped) = dropped else { return };
    // Told from here, so that the host knows of a kill before it knows of the end, and before the group goes.
    guest.memory.tell(&guest.workload);
    let short = guest.memory.was_short(&group)
        || (request.trusted && guest.memory.kills(&guest.workload) > kills_before);
    guest.memory.forget(&group);
    let exit = exit(ended, (timed_out, short), dropped, &group);
    let body = serde_json::to_vec(&exit).unwrap_or_default();
    let _host_gone = codec::write_chunk(&mut writer, chunk::EXIT, &body).await;
    let _host_gone = writer.shutdown().await;
    clear(&group).await;
    drop(leash);
}

fn exit(ended: Ended, (timed_out, oom): (bool, bool), output_dropped: u64, group: &Cgroup) -> Exit {
    let (code, signal) = match ended {
        Ended::Code(code) => (Some(code), None),
        Ended::Signal(signal) => (None, Some(signal)),
    };
    Exit {
        code,
        signal,
        oom,
        timed_out,
        user_ms: group.value("cpu.stat", "user_usec") / 1000,
        system_ms: group.value("cpu.stat", "system_usec") / 1000,
        memory_peak: group.number("memory.peak"),
        output_dropped,
    }
}

/// A running command's process group.
#[derive(Debug)]
struct Handle {
    pid: i32,
    alive: Arc<AtomicBool>,
}

impl Handle {
    /// Sends a signal to the process group, unless its leader was reaped.
    #[expect(
        unsafe_code,
        reason = "rustix refuses real-time signals, which programs use"
    )]
    fn signal(&self, number: i32) {
        if (1..=SIGNAL_MAX).contains(&number) && self.alive.load(Ordering::Relaxed) {
            // SAFETY: plain system call without pointers.
            let _gone = unsafe { libc::kill(-self.pid, number) };
        }
    }
}

/// Waits for the command's end, enforces its deadline, and ends everything it left behind.
async fn supervise(
    mut ended: oneshot::Receiver<Ended>,
    group: &Cgroup,
    handle: &Handle,
    timeout_ms: u64,
) -> (Ended, bool) {
    let lost = Ended::Signal(libc::SIGKILL);
    let mut timed_out = false;
    let outcome = if timeout_ms == 0 {
        (&mut ended).await.unwrap_or(lost)
    } else {
        match tokio::time::timeout(Duration::from_millis(timeout_ms), &mut ended).await {
            Ok(outcome) => outcome.unwrap_or(lost),
            Err(_late) => {
                timed_out = true;
                handle.signal(libc::SIGTERM);
                match tokio::time::timeout(TERM_GRACE, &mut ended).await {
                    Ok(outcome) => outcome.unwrap_or(lost),
                    Err(_late) => {
                        kill(group);
                        (&mut ended).await.unwrap_or(lost)
                    }
                }
            }
        }
    };
    handle.alive.store(false, Ordering::Relaxed);
    kill(group);
    if let Err(error) = group.emptied(KILL_WAIT).await {
        log::warn(&crate::error::chain(&error));
    }
    (outcome, timed_out)
}

fn kill(group: &Cgroup) {
    if let Err(error) = group.kill() {
        log::warn(&crate::error::chain(&error));
    }
}

/// Checks what only the guest can check.
fn check(guest: &Guest, request: &ExecRequest) -> Result<(), GuestError> {
    if request.argv.first().is_none_or(String::is_empty) {
        return Err(invalid("there is no command"));
    }
    let env = request.env.iter().flat_map(|(key, value)| [key, value]);
    if request
        .argv
        .iter()
        .chain(env)
        .chain([&request.cwd])
        .any(|text| text.contains('\0'))
    {
        return Err(invalid(
            "a zero byte in the command, its environment or its directory",
        ));
    }
    if request
        .env
        .iter()
        .any(|(key, _)| key.is_empty() || key.contains('='))
    {
        return Err(invalid("a variable without a proper name"));
    }
    if !request.cwd.is_empty() && !Path::new(&request.cwd).is_dir() {
        let message = format!("the working directory {:?} does not exist", request.cwd);
        return Err(failure(GuestErrorCode::NotFound, message));
    }
    if guest.is_frozen() {
        return Err(invalid("the workload is frozen"));
    }
    Ok(())
}

fn bound(request: &ExecRequest, group: &Cgroup) -> Result<File, SysError> {
    group.create()?;
    group.delegate()?;
    if request.memory_max > 0 {
        group.limit_memory(request.memory_max)?;
    }
    if request.pids_max > 0 {
        group.limit_pids(request.pids_max)?;
    }
    // A command that lost one process to the OOM killer is of no use half alive.
    group.write("memory.oom.group", "1")?;
    let main = group.child("main");
    main.create()?;
    main.door()
}

fn start(guest: &Guest, request: &ExecRequest, group: &Cgroup) -> Result<Started, GuestError> {
    check(guest, request)?;
    crate::container::check(&request.argv)?;
    let door = bound(request, group)?;
    let mut command = Command::new(&request.argv[0]);
    command.args(&request.argv[1..]).env_clear();
    if !request.env.iter().any(|(key, _)| key == "PATH") {
        command.env("PATH", PATH);
    }
    command.envs(request.env.iter().map(|(key, value)| (key, value)));
    command.current_dir(if request.cwd.is_empty() {
        "/"
    } else {
        &request.cwd
    });
    let user = request.user.as_ref().map(|user| (user.uid, user.gid));
    let io = match request.tty {
        Some(size) => terminal(&mut command, size, user)?,
        None => pipes(&mut command, request.stdin)?,
    };
    prepare(&mut command, &door, request.tty.is_some(), user);
    if !request.trusted {
        bound_open_files(&mut command, guest.open_files());
    }
    let child = guest.reaper.spawn(&mut command).map_err(|error| {
        let error = SysError {
            what: format!("run {:?}", request.argv[0]),
            source: error,
        };
        GuestError::from(error)
    })?;
    Ok(Started { child, io })
}

/// Sets what happens in the child between fork and exec.
#[expect(unsafe_code, reason = "code between fork and exec")]
pub(crate) fn prepare(command: &mut Command, door: &File, tty: bool, user: Option<(u32, u32)>) {
    let door: RawFd = door.as_raw_fd();
    // SAFETY: `enter` makes system calls only, on values that were copied before the fork.
    unsafe { command.pre_exec(move || enter(door, tty, user)) };
}

/// Bounds the open files of the child and of everything it starts. One that is root in the machine can raise it again.
#[expect(unsafe_code, reason = "code between fork and exec")]
fn bound_open_files(command: &mut Command, most: u64) {
    let bound = libc::rlimit {
        rlim_cur: most,
        rlim_max: most,
    };
    let set = move || {
        // SAFETY: a system call on a value that was copied before the fork.
        match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const bound) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: `set` makes one system call.
    unsafe { command.pre_exec(set) };
}

#[expect(unsafe_code, reason = "system calls between fork and exec")]
fn enter(door: RawFd, tty: bool, user: Option<(u32, u32)>) -> io::Result<()> {
    let done = |result: libc::c_int| {
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    // SAFETY: system calls with no pointers, or with pointers to constants and locals.
    unsafe {
        if libc::write(door, c"0".as_ptr().cast(), 1) != 1 {
            return Err(io::Error::last_os_error());
        }
        done(libc::setsid())?;
        libc::umask(0o022);
        if tty {
            done(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
        }
        if let Some((uid, gid)) = user {
            done(libc::setgroups(1, &raw const gid))?;
            done(libc::setgid(gid))?;
            done(libc::setuid(uid))?;
        }
    }
    Ok(())
}

fn pipes(command: &mut Command, stdin: bool) -> Result<pump::Io, SysError> {
    let what = || "make pipes for a command".to_owned();
    let input = if stdin {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
        command.stdin(read);
        Some(ours(write)?)
    } else {
        command.stdin(Stdio::null());
        None
    };
    let (out, out_child) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
    let (err, err_child) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
    command.stdout(out_child).stderr(err_child);
    Ok(pump::Io {
        input,
        out: Some(ours(out)?),
        err: Some(ours(err)?),
        terminal: None,
    })
}

fn terminal(
    command: &mut Command,
    size: TtySize,
    user: Option<(u32, u32)>,
) -> Result<pump::Io, SysError> {
    let what = || "make a terminal".to_owned();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).context(what)?;
    grantpt(&master).context(what)?;
    unlockpt(&master).context(what)?;
    let slave = ioctl_tiocgptpeer(&master, flags).context(what)?;
    if let Some((uid, _)) = user {
        let uid = rustix::fs::Uid::from_raw(uid);
        rustix::fs::fchown(&slave, Some(uid), None).context(what)?;
    }
    tcsetwinsize(&master, winsize(size)).context(what)?;
    let copy = |fd: &OwnedFd| fd.try_clone().context(what);
    command
        .stdin(copy(&slave)?)
        .stdout(copy(&slave)?)
        .stderr(slave);
    let input = ours(copy(&master)?)?;
    let control = copy(&master)?;
    Ok(pump::Io {
        input: Some(input),
        out: Some(ours(master)?),
        err: None,
        terminal: Some(control),
    })
}

fn winsize(size: TtySize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Our end of a pipe or terminal, for the runtime.
fn ours(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, SysError> {
    let what = || "watch a pipe".to_owned();
    rustix::io::ioctl_fionbio(fd.as_fd(), true).context(what)?;
    crate::fd::watched(fd).context(what)
}
