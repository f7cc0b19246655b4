//! Who holds the lock of a bake cache, written into the lock file itself, so that the children of a killed bake
//! are ended by the next one instead of being waited for.
//!
//! Two lines: the bake process, and the process group of the program it runs; each a pid and its start
//! time (field 22 of proc(5)'s stat), so that a pid that was given to somebody else is never taken for it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::process::{Pid, Signal, getpgid, kill_process_group};

/// Longest content of a lock file.
const RECORD_BYTES_MAX: usize = 256;

/// A process that cannot be mistaken for a later one of the same number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Identity {
    pid: u32,
    started: u64,
}

impl Identity {
    fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is a name in parentheses that may hold anything.
        let (_, rest) = stat.rsplit_once(") ")?;
        let mut fields = rest.split_whitespace();
        let state = fields.next()?;
        let started = fields.nth(18)?.parse().ok()?;
        (state != "Z").then_some(Self { pid, started })
    }

    fn parse(line: &str) -> Option<Self> {
        let (pid, started) = line.split_once(' ')?;
        Some(Self {
            pid: pid.parse().ok()?,
            started: started.parse().ok()?,
        })
    }

    fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// Writes down this process, and the group of the program it runs now.
///
/// # Errors
/// When the lock file cannot be written.
pub(super) fn record(lock: &File, group: Option<u32>) -> io::Result<()> {
    let pids = [Some(std::process::id()), group];
    let known = pids.into_iter().flatten().filter_map(Identity::of);
    let lines: String = known
        .map(|one| format!("{} {}\n", one.pid, one.started))
        .collect();
    lock.set_len(0)?;
    lock.write_all_at(lines.as_bytes(), 0)
}

/// Kills the program that a dead bake left running, if there is one.
pub(super) fn kill_left_over(lock: &File) {
    let mut bytes = [0_u8; RECORD_BYTES_MAX];
    let Ok(length) = lock.read_at(&mut bytes, 0) else {
        return;
    };
    let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
    let mut lines = text.lines().map(Identity::parse);
    let (Some(Some(owner)), group) = (lines.next(), lines.next().flatten()) else {
        return;
    };
    if owner.is_alive() {
        return;
    }
    let group = group.filter(|group| group.is_alive());
    let recorded = group.and_then(|group| Pid::from_raw(i32::try_from(group.pid).ok()?));
    for group in recorded.into_iter().chain(unrecorded(lock)) {
        // It may end by itself in between.
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// Groups of programs whose standard input is the lock, as that of every program of a bake: one that was killed between a start and its record
/// left a program that nobody wrote down.
fn unrecorded(lock: &File) -> Vec<Pid> {
    let Ok(own) = lock.metadata() else {
        return Vec::new();
    };
    let holds = |entry: &fs::DirEntry| {
        fs::metadata(entry.path().join("fd/0"))
            .is_ok_and(|input| (input.dev(), input.ino()) == (own.dev(), own.ino()))
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let holding = processes.filter(holds).filter_map(|entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        getpgid(Some(pid)).ok()
    });
    // Never this bake's own.
    let this = getpgid(None).ok();
    holding.filter(|group| Some(*group) != this).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    fn sleeper() -> std::process::Child {
        let mut command = Command::new("sleep");
        command
            .arg("60")
            .process_group(0)
            .spawn()
            .expect("sleep starts")
    }

    #[test]
    fn a_program_of_a_dead_bake_is_killed_and_one_of_a_living_bake_is_not() {
        let lock = tempfile::tempfile().expect("a temporary file");
        let mut child = sleeper();
        record(&lock, Some(child.id())).expect("writable");
        kill_left_over(&lock);
        assert!(
            child.try_wait().expect("waitable").is_none(),
            "its owner, this test, is alive"
        );
        let group = Identity::of(child.id()).expect("alive");
        let dead = format!(
            "{} 1\n{} {}\n",
            std::process::id(),
            group.pid,
            group.started
        );
        lock.set_len(0)
            .and_then(|()| lock.write_all_at(dead.as_bytes(), 0))
            .expect("writable");
        kill_left_over(&lock);
        let status = child.wait().expect("waitable");
        assert!(!status.success());
    }

    #[test]
    fn a_program_that_its_bake_had_no_time_to_write_down_is_killed() {
        let lock = tempfile::tempfile().expect("a temporary file");
        let mut command = Command::new("sleep");
        let input = lock.try_clone().expect("a descriptor");
        let mut child = command
            .arg("60")
            .process_group(0)
            .stdin(std::process::Stdio::from(input))
            .spawn()
            .expect("sleep starts");
        let dead = format!("{} 1\n", std::process::id());
        lock.write_all_at(dead.as_bytes(), 0).expect("writable");
        kill_left_over(&lock);
        assert!(!child.wait().expect("waitable").success());
    }

    #[test]
    fn a_number_given_to_another_process_is_left_alone() {
        let lock = tempfile::tempfile().expect("a temporary file");
        let mut child = sleeper();
        let lines = format!("1 1\n{} 1\n", child.id());
        lock.write_all_at(lines.as_bytes(), 0).expect("writable");
        kill_left_over(&lock);
        assert!(child.try_wait().expect("waitable").is_none());
        child.kill().and_then(|()| child.wait()).expect("it ends");
    }
}
