//! Processes of this host by identity, so that a recycled process number is never killed.
//!
//! A process number alone names nothing: the kernel hands it out again. A number *and* the start time of
//! `/proc/PID/stat` (field 22, clock ticks since boot) *and* the boot id name one process for good. Signals go
//! through a pidfd that is opened first and compared afterwards.
//! It is not a supervisor: it knows nothing of machines beyond the token it is given to look for.
//! Read next: [`crate::record`] (where identities are kept), [`crate::reap`] (who kills).

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// Bytes of a foreign process's command line that are looked at.
const CMDLINE_BYTES_MAX: u64 = 256 * 1024;

/// Open files of a foreign process that are looked at.
const FDS_SCANNED_MAX: usize = 4096;

/// One process of this host, for good: the number is only valid together with the other fields.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process number.
    pub pid: u32,
    /// Start time in clock ticks since boot: field 22 of `/proc/PID/stat` (proc_pid_stat(5)).
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id` when it was taken.
    pub boot_id: String,
    /// The program, when it may be read.
    pub exe: Option<ExeIdentity>,
}

/// A program file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExeIdentity {
    /// Where it was.
    pub path: PathBuf,
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub inode: u64,
}

/// Why a process is still there.
#[derive(Debug, thiserror::Error)]
pub enum KillError {
    /// The signal could not be sent.
    #[error("process {pid} could not be signalled")]
    Signal {
        /// Process number.
        pid: u32,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It took the signal and still runs.
    #[error("process {pid} still runs {waited:?} after it was killed")]
    StillRuns {
        /// Process number.
        pid: u32,
        /// How long was waited.
        waited: Duration,
    },
}

/// What became of a process that should end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KillOutcome {
    /// It had already ended; nothing was signalled.
    WasGone,
    /// It was killed and has ended.
    Killed,
}

impl ExeIdentity {
    /// Identity of a program file.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            dev: meta.dev(),
            inode: meta.ino(),
        })
    }

    /// Whether both are the same file, wherever it lies now.
    #[must_use]
    pub fn is_same_file(&self, other: &Self) -> bool {
        self.dev == other.dev && self.inode == other.inode
    }
}

impl ProcessIdentity {
    /// The identity of a running process; `None` when there is none with this number, or only a zombie.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = Stat::read(pid)?;
        if stat.is_dead() {
            return None;
        }
        Some(Self {
            pid,
            start_ticks: stat.start_ticks,
            boot_id: boot_id(),
            exe: exe_of(pid),
        })
    }

    /// The identity of this process.
    #[must_use]
    pub fn of_self() -> Self {
        Self::of(std::process::id()).unwrap_or_else(|| Self {
            pid: std::process::id(),
            start_ticks: 0,
            boot_id: boot_id(),
            exe: None,
        })
    }

    /// Whether this very process runs. A zombie does not.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.boot_id == boot_id()
            && Stat::read(self.pid)
                .is_some_and(|now| now.start_ticks == self.start_ticks && !now.is_dead())
    }

    /// Whether this very process runs, and still the program that it ran when this identity was taken.
    #[must_use]
    pub fn runs_its_program(&self) -> bool {
        let same = |exe: &ExeIdentity| exe_of(self.pid).is_some_and(|now| now.is_same_file(exe));
        // Alive is asked last: what was looked at belonged to this process then.
        self.exe.as_ref().is_none_or(same) && self.is_alive()
    }

    /// Kills this very process and waits until it has ended. Blocks for at most `deadline`.
    ///
    /// # Errors
    /// When it may not be signalled, or is still there at the deadline.
    pub fn kill_and_wait(&self, deadline: Duration) -> Result<KillOutcome, KillError> {
        let failed = |source: io::Error| KillError::Signal {
            pid: self.pid,
            source,
        };
        let Some(handle) = self.open().map_err(failed)? else {
            return Ok(KillOutcome::WasGone);
        };
        match pidfd_send_signal(&handle, Signal::KILL) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => return Ok(KillOutcome::WasGone),
            Err(errno) => return Err(failed(errno.into())),
        }
        if wait_for_end(&handle, deadline).map_err(failed)? {
            Ok(KillOutcome::Killed)
        } else {
            Err(KillError::StillRuns {
                pid: self.pid,
                waited: deadline,
            })
        }
    }

    /// A handle that stays with this very process; `None` when it has ended.
    pub(crate) fn open(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        match pidfd_open(pid, PidfdFlags::empty()) {
            // The number may have been handed out again before the handle was opened: compare afterwards.
            Ok(handle) => Ok(self.is_alive().then_some(handle)),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Waits until the process behind a pidfd has ended; false at the deadline.
fn wait_for_end(handle: &OwnedFd, deadline: Duration) -> io::Result<bool> {
    let end = Instant::now() + deadline;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec {
            tv_sec: 3600,
            tv_nsec: 0,
        });
        match poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// This boot of the host; empty when the kernel does not say.
#[must_use]
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

/// What to look for among all processes.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// A text that only the wanted processes have in an argument. Must be long enough to be unique.
    pub token: &'a str,
    /// A process that runs this program and has a file open below `dir` is wanted too.
    pub program: Option<&'a ExeIdentity>,
    /// See `program`.
    pub dir: &'a Path,
}

/// Processes of this host that name a token in an argument, or run a program with a file of `dir` open. Never this process.
#[must_use]
pub fn find(wanted: &Wanted<'_>) -> Vec<ProcessIdentity> {
    let own = std::process::id();
    processes()
        .filter(|pid| *pid != own)
        .filter(|pid| names_token(*pid, wanted.token) || holds_dir(*pid, wanted))
        .filter_map(ProcessIdentity::of)
        .collect()
}

/// Numbers of all processes that can be seen.
fn processes() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn names_token(pid: u32, token: &str) -> bool {
    use io::Read as _;
    let mut cmdline = Vec::new();
    let read = fs::File::open(format!("/proc/{pid}/cmdline"))
        .and_then(|file| file.take(CMDLINE_BYTES_MAX).read_to_end(&mut cmdline));
    !token.is_empty()
        && read.is_ok()
        && cmdline
            .windows(token.len())
            .any(|window| window == token.as_bytes())
}

fn holds_dir(pid: u32, wanted: &Wanted<'_>) -> bool {
    let Some(program) = wanted.program else {
        return false;
    };
    if !exe_of(pid).is_some_and(|exe| exe.is_same_file(program)) {
        return false;
    }
    fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
        .take(FDS_SCANNED_MAX)
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|target| target.starts_with(wanted.dir))
}

fn exe_of(pid: u32) -> Option<ExeIdentity> {
    let link = PathBuf::from(format!("/proc/{pid}/exe"));
    let meta = fs::metadata(&link).ok()?;
    Some(ExeIdentity {
        path: fs::read_link(&link).ok()?,
        dev: meta.dev(),
        inode: meta.ino(),
    })
}

/// The fields of `/proc/PID/stat` that matter.
struct Stat {
    state: u8,
    start_ticks: u64,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        Self::parse(&fs::read(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The second field is the program's name in parentheses and may hold anything, parentheses included:
    /// fields are counted from the last one. State is field 3, start time field 22.
    fn parse(text: &[u8]) -> Option<Self> {
        let name_end = text.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(text.get(name_end + 1..)?).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        let state = *fields.next()?.as_bytes().first()?;
        let start_ticks = fields.nth(18)?.parse().ok()?;
        Some(Self { state, start_ticks })
    }

    fn is_dead(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }
}

/// A name for a file that is being written: `<name>.partial-<pid>-<start ticks>`. [`crate::reap::sweep_partial`] removes it once its
/// writer has gone.
#[must_use]
pub fn partial_name(name: &str) -> String {
    let own = ProcessIdentity::of_self();
    format!("{name}.partial-{}-{}", own.pid, own.start_ticks)
}

/// Whether a file name says that it is being written by a process that has gone. `None`: not such a name.
#[must_use]
pub fn partial_is_stale(name: &std::ffi::OsStr) -> Option<bool> {
    let bytes = name.as_bytes();
    let mark = b".partial-";
    let at = bytes.windows(mark.len()).rposition(|w| w == mark)?;
    let tail = std::str::from_utf8(bytes.get(at + mark.len()..)?).ok()?;
    let mut parts = tail.split(['-', '.']);
    let pid: u32 = parts.next()?.parse().ok()?;
    let ticks: Option<u64> = parts.next().and_then(|text| text.parse().ok());
    let now = Stat::read(pid).filter(|stat| !stat.is_dead());
    Some(match (now, ticks) {
        (None, _) => true,
        (Some(stat), Some(ticks)) => stat.start_ticks != ticks,
        (Some(_), None) => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sleeper(token: &str) -> std::process::Child {
        Command::new("sh")
            .args(["-c", "read _", token])
            .stdin(Stdio::piped())
            .spawn()
            .expect("sh")
    }

    #[test]
    fn names_with_parentheses_do_not_shift_fields() {
        let stat = b"7 (a) R 1 (b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 9 9";
        let parsed = Stat::parse(stat).expect("parses");
        assert_eq!((parsed.state, parsed.start_ticks), (b'S', 4711));
        for bad in [&b""[..], b"7 (a", b"7 (a)", b"7 (a) S 1 2", b"7 (a) S \xff"] {
            assert!(Stat::parse(bad).is_none());
        }
    }

    #[test]
    fn a_found_process_is_killed_and_waited_for() {
        let token = format!("kiln-test-token-{}-a", std::process::id());
        let mut child = sleeper(&token);
        let wanted = Wanted {
            token: &token,
            program: None,
            dir: Path::new("/nonexistent"),
        };
        let mut found = find(&wanted);
        // Between fork and exec the child has this test's own command line.
        let end = Instant::now() + Duration::from_secs(5);
        while found.is_empty() && Instant::now() < end {
            std::thread::yield_now();
            found = find(&wanted);
        }
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].pid, child.id());
        let outcome = found[0].kill_and_wait(Duration::from_secs(5));
        assert_eq!(outcome.expect("killed"), KillOutcome::Killed);
        assert!(!found[0].is_alive(), "a zombie is not alive");
        child.wait().expect("reaped");
        let again = found[0].kill_and_wait(Duration::from_secs(5));
        assert_eq!(again.expect("gone"), KillOutcome::WasGone);
    }

    #[test]
    fn a_recycled_number_is_never_killed() {
        let mut child = sleeper("x");
        let real = ProcessIdentity::of(child.id()).expect("alive");
        let older = ProcessIdentity {
            start_ticks: real.start_ticks - 1,
            ..real.clone()
        };
        let other_boot = ProcessIdentity {
            boot_id: "0".into(),
            ..real.clone()
        };
        for wrong in [older, other_boot] {
            let outcome = wrong.kill_and_wait(Duration::from_secs(1));
            assert_eq!(outcome.expect("not signalled"), KillOutcome::WasGone);
            assert!(real.is_alive());
        }
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    #[test]
    fn partial_files_belong_to_their_writer() {
        let own = partial_name("root.img");
        assert_eq!(partial_is_stale(own.as_ref()), Some(false));
        let pid = std::process::id();
        let recycled = format!("root.img.partial-{pid}-1");
        assert_eq!(partial_is_stale(recycled.as_ref()), Some(true));
        let dead = format!("x.partial-{}", u32::MAX - 7);
        assert_eq!(partial_is_stale(dead.as_ref()), Some(true));
        assert_eq!(partial_is_stale("root.img".as_ref()), None);
        assert_eq!(partial_is_stale("x.partial-abc".as_ref()), None);
    }
}
