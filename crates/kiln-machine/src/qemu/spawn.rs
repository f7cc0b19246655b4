//! Starts the VMM process: descriptors, user, limits, and its death together with its owner's.
//!
//! The child gets exactly the descriptors it is given, under their own numbers; files are handed to QEMU that way, so that it
//! needs no right to any path. As root it becomes a user of its own, without groups and for good (`no_new_privs`).
//! It dies with the thread that started it: that is one thread which lives as long as kiln. A reaper covers what remains, and
//! machines that are kept beyond their owner.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{OnceLock, mpsc};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::sync::oneshot;

/// A VMM to start.
#[derive(Debug)]
pub(crate) struct Vmm {
    /// The program.
    pub(crate) program: PathBuf,
    /// Its arguments.
    pub(crate) args: Vec<OsString>,
    /// Descriptors it inherits under the same numbers.
    pub(crate) inherit: Vec<OwnedFd>,
    /// Where its standard output and error go.
    pub(crate) output: OwnedFd,
    /// `cgroup.procs` files it is put into, while it starts: the kernel may take 10 ms for the first.
    pub(crate) procs: Vec<OwnedFd>,
    /// User and group it becomes.
    pub(crate) user: Option<u32>,
    /// It outlives its owner.
    pub(crate) kept: bool,
}

/// A started VMM.
#[derive(Debug)]
pub(crate) struct Started {
    /// To be waited for.
    pub(crate) child: Child,
    /// Stays with this very process.
    pub(crate) pidfd: OwnedFd,
    /// Completes when it is in its groups.
    pub(crate) limited: oneshot::Receiver<io::Result<()>>,
}

type Job = Box<dyn FnOnce() + Send>;

/// Starts it. The descriptors are closed here afterwards.
pub(crate) async fn spawn(vmm: Vmm) -> io::Result<Started> {
    let (sender, receiver) = oneshot::channel();
    let job: Job = Box::new(move || {
        let (entered, limited) = oneshot::channel();
        let (vmm, procs) = vmm.without_procs();
        let started = spawn_here(vmm, limited);
        let pid = started.as_ref().ok().map(|started| started.child.id());
        // The caller may be gone: then nobody owns the process.
        if let Err(Ok(mut orphan)) = sender.send(started) {
            let _ = orphan.child.kill();
            let _ = orphan.child.wait();
        } else if let Some(pid) = pid {
            let _ = entered.send(put_into(&procs, pid));
        }
    });
    spawner()?.send(job).map_err(|_| gone())?;
    receiver.await.map_err(|_| gone())?
}

fn gone() -> io::Error {
    io::Error::other("the thread that starts machines is gone")
}

/// The one thread that forks. It never ends before kiln does.
fn spawner() -> io::Result<mpsc::Sender<Job>> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    if let Some(sender) = SPAWNER.get() {
        return Ok(sender.clone());
    }
    let (sender, jobs) = mpsc::channel::<Job>();
    std::thread::Builder::new()
        .name("kiln-spawner".to_owned())
        .spawn(move || {
            for job in jobs {
                job();
            }
        })?;
    Ok(SPAWNER.get_or_init(|| sender).clone())
}

/// Puts a process into groups. Should it have ended and its number be another's: the groups die with their machine.
fn put_into(procs: &[OwnedFd], pid: u32) -> io::Result<()> {
    for file in procs {
        rustix::io::write(file, pid.to_string().as_bytes())?;
    }
    Ok(())
}

impl Vmm {
    fn without_procs(mut self) -> (Self, Vec<OwnedFd>) {
        let procs = std::mem::take(&mut self.procs);
        (self, procs)
    }
}

fn spawn_here(vmm: Vmm, limited: oneshot::Receiver<io::Result<()>>) -> io::Result<Started> {
    let Vmm {
        program,
        args,
        inherit,
        output,
        user,
        kept,
        ..
    } = vmm;
    let mut command = Command::new(program);
    command
        .args(args)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null());
    command.stdout(output.try_clone()?).stderr(output);
    let fds: Vec<RawFd> = inherit.iter().map(OwnedFd::as_raw_fd).collect();
    let owner = std::process::id();
    let prepare = move || {
        become_user(user)?;
        confine(owner, kept)?;
        keep_only(&fds)
    };
    #[expect(unsafe_code, reason = "work between fork and exec")]
    // SAFETY: `prepare` makes only system calls and allocates nothing on its way to success.
    unsafe {
        command.pre_exec(prepare);
    }
    let mut child = command.spawn()?;
    let pid = Pid::from_child(&child);
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => Ok(Started {
            child,
            pidfd,
            limited,
        }),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error.into())
        }
    }
}

/// Capabilities are numbers below this one (capabilities(7): two words of 32).
const CAPABILITIES: libc::c_ulong = 64;

/// Gives up root for good. Raw system calls: libc's own would synchronise threads that this child does not have.
fn become_user(user: Option<u32>) -> io::Result<()> {
    let Some(id) = user else { return Ok(()) };
    // Nothing that it may ever execute can give it one back. A number that this kernel does not know is none.
    for capability in 0..CAPABILITIES {
        #[expect(unsafe_code, reason = "bounding set of this child")]
        // SAFETY: plain numbers.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        let error = io::Error::last_os_error();
        if dropped != 0 && error.raw_os_error() == Some(libc::EPERM) {
            return Err(error);
        }
    }
    #[expect(unsafe_code, reason = "credentials of this single-threaded child")]
    // SAFETY: plain numbers and a null pointer with length 0.
    let failed = unsafe {
        libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) != 0
            || libc::syscall(libc::SYS_setresgid, id, id, id) != 0
            || libc::syscall(libc::SYS_setresuid, id, id, id) != 0
    };
    if failed {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A session of its own (no Ctrl-C from the terminal), no new rights, no core file, death with the owner unless it is kept.
fn confine(owner: u32, kept: bool) -> io::Result<()> {
    let no_core = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    #[expect(unsafe_code, reason = "process attributes of this child")]
    // SAFETY: plain numbers, and a pointer to a local that outlives the call.
    let (failed, parent) = unsafe {
        libc::umask(0o077);
        let failed = libc::setsid() < 0
            || libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core) != 0
            || libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || (!kept && libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) != 0);
        (failed, libc::getppid())
    };
    if failed {
        return Err(io::Error::last_os_error());
    }
    // The owner may have died before the request was in force. A kept machine's has not made it adoptable yet.
    if u32::try_from(parent) == Ok(owner) {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ESRCH))
    }
}

/// Closes everything on exec but the standard three and `fds`.
fn keep_only(fds: &[RawFd]) -> io::Result<()> {
    #[expect(unsafe_code, reason = "descriptor flags of this child")]
    // SAFETY: plain numbers.
    unsafe {
        // Kernels before 5.11 lack it; kiln opens everything close-on-exec anyway.
        libc::syscall(
            libc::SYS_close_range,
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
    }
    for fd in fds {
        #[expect(unsafe_code, reason = "descriptor flags of this child")]
        // SAFETY: plain numbers.
        let failed = unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) != 0 };
        if failed {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    async fn run(script: &str, inherit: Vec<OwnedFd>, user: Option<u32>) -> String {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let vmm = Vmm {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            inherit,
            output: writer,
            procs: Vec::new(),
            user,
            kept: false,
        };
        let mut started = spawn(vmm).await.unwrap();
        let mut text = String::new();
        std::fs::File::from(reader)
            .read_to_string(&mut text)
            .unwrap();
        started.child.wait().unwrap();
        text
    }

    #[tokio::test]
    async fn the_child_has_only_what_it_was_given() {
        let leaked = std::fs::File::open("/proc/self/status").unwrap();
        rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
        let given: OwnedFd = std::fs::File::open("/proc/version").unwrap().into();
        let number = given.as_raw_fd();
        let text = run(
            "for fd in /proc/self/fd/*; do echo ${fd##*/}; done; env",
            vec![given],
            None,
        )
        .await;
        assert!(
            text.lines().any(|line| line == number.to_string()),
            "{text}"
        );
        assert!(
            !text
                .lines()
                .any(|line| line == leaked.as_raw_fd().to_string()),
            "{text}"
        );
        assert!(!text.contains("HOME="), "{text}");
        let text = run(
            "grep -E 'NoNewPrivs|^Uid' /proc/self/status; ulimit -c",
            vec![],
            None,
        )
        .await;
        assert!(
            text.contains("NoNewPrivs:\t1") && text.lines().any(|line| line == "0"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn as_root_it_becomes_a_user_without_groups() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let text = run("id -u; id -g; id -G", vec![], Some(1_879_050_000)).await;
        assert!(text.lines().all(|line| line == "1879050000"), "{text}");
    }
}
