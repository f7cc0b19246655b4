//! Whole CPUs of the host for single machines: which a process may use, and keeping every VMM on its own.
//!
//! Who holds which CPUs is in the [`crate::ledger`]; here the kernel is told, by the affinity of a VMM's threads, which holds on every
//! host and needs no group. A VMM's threads start with their parent's, and its sandbox refuses them to change it. It moves no process
//! that is no machine of this home. Source: `sched_setaffinity(2)`, `proc_pid_task(5)`.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::driver::{Check, CheckLevel};
use crate::record::{self, MACHINES_DIR, RecordState};

/// How often a VMM's threads are listed again because new ones appeared meanwhile.
const ROUNDS_MAX: usize = 16;

/// CPUs that this process may run on, by the kernel's numbers.
///
/// # Errors
/// What the kernel says.
pub fn usable() -> io::Result<BTreeSet<u32>> {
    let set = sched_getaffinity(None)?;
    let numbers = (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
    Ok(numbers.filter_map(|cpu| u32::try_from(cpu).ok()).collect())
}

/// Whether CPUs can be given to single machines here, for `kiln doctor`.
#[must_use]
pub fn check() -> Check {
    let tried = usable().and_then(|cpus| {
        sched_setaffinity(None, &set_of(&cpus))?;
        Ok(cpus.len())
    });
    let (level, found, hint) = match tried {
        Ok(count) => (
            CheckLevel::Pass,
            format!("{count} CPUs, of which a machine may get whole ones"),
            None,
        ),
        Err(error) => (
            CheckLevel::Warn,
            format!("jobs that ask for whole CPUs fail here: {error}"),
            Some(
                "the system call sched_setaffinity is refused to kiln: look at its seccomp profile"
                    .to_owned(),
            ),
        ),
    };
    Check {
        name: "cpu-pinning".to_owned(),
        level,
        found,
        hint,
    }
}

fn set_of(cpus: &BTreeSet<u32>) -> CpuSet {
    let mut set = CpuSet::new();
    let known = cpus.iter().filter_map(|cpu| usize::try_from(*cpu).ok());
    for cpu in known.filter(|cpu| *cpu < CpuSet::MAX_CPU) {
        set.set(cpu);
    }
    set
}

/// Puts every thread of a process on these CPUs. One that has ended is no error.
///
/// # Errors
/// What the kernel says; with threads that appear faster than they can be moved, `TimedOut`.
pub(crate) fn place(pid: u32, cpus: &BTreeSet<u32>) -> io::Result<()> {
    let set = set_of(cpus);
    let mut moved = BTreeSet::new();
    for _ in 0..ROUNDS_MAX {
        let mut new = false;
        for thread in threads(pid)? {
            if !moved.insert(thread) {
                continue;
            }
            new = true;
            match sched_setaffinity(Pid::from_raw(thread), &set) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // A thread that a moved one starts is there already.
        if !new {
            return Ok(());
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn threads(pid: u32) -> io::Result<Vec<i32>> {
    let listed = match fs::read_dir(format!("/proc/{pid}/task")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    let names = listed.flatten().map(|entry| entry.file_name());
    let numbers = names.filter_map(|name| name.to_str()?.parse().ok());
    Ok(numbers.filter(|number| *number > 0).collect())
}

/// Puts every running machine of a home where it belongs: on its own CPUs, or on those that are nobody's. Gives what could not be moved.
/// Blocks for moments.
pub(crate) fn settle(home: &Path, all: &BTreeSet<u32>, pinned: &BTreeSet<u32>) -> Vec<String> {
    let shared = shared(all, pinned);
    let mut failed = Vec::new();
    let dirs = fs::read_dir(home.join(MACHINES_DIR)).into_iter().flatten();
    for entry in dirs.flatten() {
        let Some(record) = record::read_record(&entry.path()) else {
            continue;
        };
        let RecordState::Running { vmm } = &record.state else {
            continue;
        };
        if !vmm.runs_its_program() {
            continue;
        }
        let cpus = match record.host_cpus.is_empty() {
            true => shared.clone(),
            false => record.host_cpus.iter().copied().collect(),
        };
        if let Err(error) = place(vmm.pid, &cpus) {
            failed.push(format!("machine {}: {error}", record.name));
        }
    }
    failed
}

/// What is left for machines without CPUs of their own. When all are given away the ledger admits none of those; what runs without a
/// place in it, such as the maker of a template, may run anywhere.
pub(crate) fn shared(all: &BTreeSet<u32>, pinned: &BTreeSet<u32>) -> BTreeSet<u32> {
    let left: BTreeSet<u32> = all.difference(pinned).copied().collect();
    match left.is_empty() {
        true => all.clone(),
        false => left,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_and_its_threads_are_moved_and_one_that_ended_is_no_error() {
        let all = usable().expect("affinity");
        let one: BTreeSet<u32> = all.iter().copied().take(1).collect();
        let mut child = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .spawn()
            .expect("starts");
        place(child.id(), &one).expect("moved");
        let id = i32::try_from(child.id()).expect("a number");
        let now = sched_getaffinity(Pid::from_raw(id)).expect("affinity");
        assert_eq!(now, set_of(&one));
        child.kill().expect("killed");
        child.wait().expect("ended");
        place(child.id(), &one).expect("nothing to move");
        assert_eq!(check().level, CheckLevel::Pass, "{:?}", check());
    }

    #[test]
    fn what_nobody_holds_is_shared() {
        let set = |cpus: &[u32]| cpus.iter().copied().collect::<BTreeSet<u32>>();
        assert_eq!(shared(&set(&[0, 1, 2]), &set(&[1, 7])), set(&[0, 2]));
        assert_eq!(shared(&set(&[0, 1]), &set(&[0, 1])), set(&[0, 1]));
    }
}
