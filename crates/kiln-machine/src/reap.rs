//! Removal of machines: of one's own at its end, and of those whose owner died.
//!
//! The order is always the same, and each step may have been done before: kill the VMM, remove its cgroups, its files elsewhere,
//! its directory; the lock file goes last. Several reapers may run at once, and beside live machines: a reaper first takes the dead
//! machine's lock and renames its directory, both under the home's lock.
//! Read next: [`crate::record`] (what is on disk), [`crate::proc`] (who is killed), [`crate::cgroup`].

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_core::MachineName;

use crate::cgroup::{self, CgroupHost};
use crate::driver::{LeakReport, ReapReport};
use crate::proc::{self, KillError, ProcessIdentity, Wanted};
use crate::record::{self, LOCK_FILE, MachineRecord, REAPING_PREFIX, RECORD_FILE, RecordState};

/// How long a killed VMM may take to end. The kernel frees its memory in this time: a large guest on a busy host is slow.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// How long a child may take from fork to exec.
const EXEC_DEADLINE: Duration = Duration::from_secs(2);
/// How often its lock is tried meanwhile.
const EXEC_POLL: Duration = Duration::from_millis(1);

/// When to look through all processes of the host for the VMM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scan {
    /// Only when the record does not name it.
    WhenLaunching,
    /// In any case: the record may be older than the truth.
    Always,
}

/// A dead machine that this process alone may remove.
#[derive(Debug)]
pub(crate) struct Claim {
    dir: PathBuf,
    /// Keeps the machine claimed; released when the directory has gone.
    _lock: File,
    token: String,
    record: Option<MachineRecord>,
}

impl Claim {
    /// The machine's name, as far as it is known.
    fn label(&self) -> String {
        if let Some(record) = &self.record {
            return record.name.to_string();
        }
        let name = self.dir.file_name().unwrap_or_default().to_string_lossy();
        let name = name.strip_prefix(REAPING_PREFIX).unwrap_or(&name);
        let name = name.strip_suffix(&self.token).unwrap_or(name);
        name.trim_end_matches('-').to_owned()
    }

    /// Removes the machine; gives what could not be removed.
    pub(crate) fn remove(self) -> Vec<String> {
        remove_machine(&self.dir, &self.token, self.record.as_ref(), Scan::Always)
    }
}

/// Takes a machine directory whose owner is gone. `None`: it lives, or another reaper has it.
///
/// A child that its owner was starting when it was killed holds the lock until it executes the VMM, a moment later: then
/// the recorded owner is dead and the lock is still taken. That moment is waited for.
pub(crate) fn claim(home: &Path, dir: &Path) -> Option<Claim> {
    let claimed = once_owner_is_gone(dir, || match try_claim(home, dir) {
        Found::Dead(claim) => Some(Some(*claim)),
        Found::Kept => Some(None),
        Found::Locked => None,
    });
    claimed.flatten()
}

/// Tries until `attempt` finds the lock free. `None`: the owner lives, or it took too long.
pub(crate) fn once_owner_is_gone<T>(
    dir: &Path,
    mut attempt: impl FnMut() -> Option<T>,
) -> Option<T> {
    let end = Instant::now() + EXEC_DEADLINE;
    loop {
        if let Some(found) = attempt() {
            return Some(found);
        }
        let owner_lives = record::read_record(dir).is_none_or(|record| record.owner.is_alive());
        if owner_lives || Instant::now() >= end {
            return None;
        }
        // The lock of a child that is about to execute has no event: the state is looked at again.
        std::thread::sleep(EXEC_POLL);
    }
}

/// What a reaper finds of one machine.
enum Found {
    /// Its owner is gone, and it is this reaper's now.
    Dead(Box<Claim>),
    /// Its owner is gone, and it lives on until it is adopted or its time is over.
    Kept,
    /// Its owner lives, or somebody else takes it.
    Locked,
}

fn try_claim(home: &Path, dir: &Path) -> Found {
    let Ok(_home_lock) = record::lock_home(home) else {
        return Found::Locked;
    };
    let Some((lock, lock_token)) = record::try_take_lock(dir) else {
        return Found::Locked;
    };
    let record = record::read_record(dir);
    if record.as_ref().is_some_and(MachineRecord::is_kept_now) {
        // Before the home's lock falls: an adopter must not take this look for an owner.
        let _ = lock.unlock();
        return Found::Kept;
    }
    let token = record
        .as_ref()
        .map_or(lock_token, |record| record.token.clone());
    let dir = set_aside(dir, &token);
    Found::Dead(Box::new(Claim {
        dir,
        _lock: lock,
        token,
        record,
    }))
}

/// Renames a claimed directory, so that its name is free for a new machine at once.
fn set_aside(dir: &Path, token: &str) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    if name.starts_with(REAPING_PREFIX) {
        return dir.to_owned();
    }
    let aside = dir.with_file_name(format!("{REAPING_PREFIX}{name}-{token}"));
    match fs::rename(dir, &aside) {
        Ok(()) => aside,
        Err(_) => dir.to_owned(),
    }
}

/// Removes every machine of a home whose owner is gone. Idempotent; safe beside live machines and other reapers. Blocks.
#[must_use]
pub fn reap_home(home: &Path) -> ReapReport {
    let mut report = ReapReport::default();
    let machines = home.join(record::MACHINES_DIR);
    let entries = match fs::read_dir(&machines) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return report,
        Err(error) => {
            report
                .leaks
                .push(format!("{}: {error}", machines.display()));
            return report;
        }
    };
    for entry in entries.flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let Some(claim) = claim(home, &entry.path()) else {
            continue;
        };
        let label = claim.label();
        let leaks = claim.remove();
        report
            .leaks
            .extend(leaks.into_iter().map(|leak| format!("{label}: {leak}")));
        report.reaped.push(label);
    }
    report.reaped.sort();
    report
}

/// Machines of a home that this very process owns, by their records; not those that are kept.
#[must_use]
pub fn own_machines(home: &Path) -> Vec<MachineName> {
    let own = ProcessIdentity::of_self();
    let entries = fs::read_dir(home.join(record::MACHINES_DIR));
    let records = entries
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| record::read_record(&entry.path()));
    let mut names: Vec<_> = records
        .filter(|record| record.kept.is_none() && record.owner == own)
        .map(|record| record.name)
        .collect();
    names.sort();
    names
}

/// Kills and removes a machine that this very process owns, whoever holds its handle: for one that nobody answers for any more. Its handle, if
/// there still is one, finds it stopped. Blocks.
#[must_use]
pub fn end_own(home: &Path, name: &MachineName) -> LeakReport {
    let dir = home.join(record::MACHINES_DIR).join(name.as_str());
    let own = ProcessIdentity::of_self();
    let record = record::read_record(&dir).filter(|record| record.owner == own);
    let leaks = match &record {
        Some(found) => remove_machine(&dir, &found.token, Some(found), Scan::Always),
        None => Vec::new(),
    };
    LeakReport { leaks }
}

/// Kills the process that owns a machine, when that is not this one: the machine is the next reaper's then, unless it is kept without an owner.
/// A machine that is gone, or whose owner is, is no error. Blocks.
///
/// # Errors
/// When the process may not be signalled, or is still there after a while.
pub fn kill_owner(home: &Path, name: &MachineName) -> Result<(), KillError> {
    let dir = home.join(record::MACHINES_DIR).join(name.as_str());
    let owner = record::read_record(&dir).map(|record| record.owner);
    match owner.filter(|owner| *owner != ProcessIdentity::of_self()) {
        Some(owner) => owner.kill_and_wait(KILL_DEADLINE).map(drop),
        None => Ok(()),
    }
}

/// Removes files and directories directly in `dirs` that a dead process was writing: see [`proc::partial_name`]. Gives what was removed
/// in `reaped` and what could not be in `leaks`. A missing directory is no error.
#[must_use]
pub fn sweep_partial(dirs: &[PathBuf]) -> ReapReport {
    let mut report = ReapReport::default();
    for entry in dirs
        .iter()
        .filter_map(|dir| fs::read_dir(dir).ok())
        .flatten()
        .flatten()
    {
        if proc::partial_is_stale(&entry.file_name()) != Some(true) {
            continue;
        }
        let path = entry.path();
        match remove_path(&path) {
            Ok(()) => report.reaped.push(path.display().to_string()),
            Err(error) => report.leaks.push(format!("{}: {error}", path.display())),
        }
    }
    report
}

/// Kills and removes one machine whose lock the caller holds. Gives what is still there, in words.
pub(crate) fn remove_machine(
    dir: &Path,
    token: &str,
    record: Option<&MachineRecord>,
    scan: Scan,
) -> Vec<String> {
    let mut leaks = Vec::new();
    kill_vmm(dir, token, record, scan, &mut leaks);
    let groups = record.map_or_else(
        || CgroupHost::detect().find_by_token(token),
        |record| record.cgroups.clone(),
    );
    for group in &groups {
        if let Err(error) = cgroup::remove_dir(group, KILL_DEADLINE) {
            leaks.push(format!("cgroup {}: {error}", group.display()));
        }
    }
    for path in record.iter().flat_map(|record| &record.paths) {
        if let Err(error) = remove_path(path) {
            leaks.push(format!("{}: {error}", path.display()));
        }
    }
    if leaks.is_empty() {
        remove_dir(dir, &mut leaks);
    }
    // With a leak the record stays, so that the next reaper tries again.
    leaks
}

fn kill_vmm(
    dir: &Path,
    token: &str,
    record: Option<&MachineRecord>,
    scan: Scan,
    leaks: &mut Vec<String>,
) {
    let mut doomed: Vec<ProcessIdentity> = Vec::new();
    let mut program = None;
    let mut look = scan == Scan::Always;
    match record.map(|record| &record.state) {
        Some(RecordState::Running { vmm }) => {
            program = vmm.exe.as_ref();
            doomed.push(vmm.clone());
        }
        Some(RecordState::Launching { program: started }) => {
            program = started.as_ref();
            look = true;
        }
        Some(RecordState::Preparing) | None => {}
    }
    if look && !token.is_empty() {
        doomed.extend(proc::find(&Wanted {
            token,
            program,
            dir,
        }));
    }
    for process in doomed {
        if let Err(error) = process.kill_and_wait(KILL_DEADLINE) {
            leaks.push(error.to_string());
        }
    }
}

fn remove_path(path: &Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes a machine's directory; the lock file goes last, so that a cut-short removal is still somebody's.
fn remove_dir(dir: &Path, leaks: &mut Vec<String>) {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => {
            leaks.push(format!("{}: {error}", dir.display()));
            return;
        }
    };
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    names.retain(|name| name != LOCK_FILE);
    // Everything else first, then the record, then the lock.
    names.sort_by_key(|name| name == RECORD_FILE);
    for name in names {
        if let Err(error) = remove_path(&dir.join(&name)) {
            leaks.push(format!("{}: {error}", dir.join(&name).display()));
            return;
        }
    }
    let last = remove_path(&dir.join(LOCK_FILE)).and_then(|()| fs::remove_dir(dir));
    if let Err(error) = last
        && error.kind() != io::ErrorKind::NotFound
    {
        leaks.push(format!("{}: {error}", dir.display()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::MachineDir;
    use std::process::{Child, Command, Stdio};

    fn machine(home: &Path, name: &str) -> MachineDir {
        MachineDir::create(home, &name.parse().expect("name"), "sim").expect("made")
    }

    /// A stand-in for a VMM: a process that has the machine's token in an argument.
    fn vmm(token: &str) -> Child {
        Command::new("sh")
            .args(["-c", "echo ready; read _", token])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh")
    }

    fn wait_ready(child: &mut Child) {
        use std::io::{BufRead as _, BufReader};
        let mut line = String::new();
        let stdout = child.stdout.as_mut().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("ready");
    }

    fn is_empty(home: &Path) -> bool {
        fs::read_dir(home.join("machines"))
            .expect("list")
            .flatten()
            .all(|entry| entry.file_name() == ".lock")
    }

    #[test]
    fn the_dead_are_reaped_and_the_living_left() {
        let home = tempfile::tempdir().expect("temp");
        let live = machine(home.path(), "live");
        let dead = machine(home.path(), "dead");
        let outside = home.path().join(format!("vm-{}.sock", dead.token()));
        fs::create_dir(&outside).expect("dir");
        fs::write(outside.join("x"), "x").expect("write");
        fs::write(dead.path("overlay"), "x").expect("write");
        dead.update(|record| record.paths.push(outside.clone()))
            .expect("update");
        dead.abandon();
        let report = reap_home(home.path());
        assert_eq!(report.reaped, ["dead"]);
        assert_eq!(report.leaks, [""; 0]);
        assert!(!outside.exists() && live.dir().exists() && !dead.dir().exists());
        assert_eq!(reap_home(home.path()), ReapReport::default());
        drop(live);
        assert!(is_empty(home.path()));
    }

    #[test]
    fn a_vmm_is_killed_in_every_state_of_the_record() {
        let home = tempfile::tempdir().expect("temp");
        for state in ["preparing", "launching", "running", "damaged"] {
            let dir = machine(home.path(), state);
            let mut child = vmm(&dir.process_name());
            wait_ready(&mut child);
            match state {
                "launching" => dir
                    .set_launching(Path::new("/bin/sh"), &[])
                    .expect("update"),
                "running" => dir.set_running(child.id()).expect("update"),
                "damaged" => fs::write(dir.path("record.json"), "{").expect("write"),
                _ => {}
            }
            dir.abandon();
            let report = reap_home(home.path());
            assert_eq!(report.reaped, [state], "{state}");
            assert!(report.leaks.is_empty(), "{report:?}");
            assert!(!child.wait().expect("wait").success());
        }
        assert!(is_empty(home.path()));
    }

    #[test]
    fn the_lock_of_a_child_before_its_exec_is_waited_for() {
        let home = tempfile::tempdir().expect("temp");
        let dir = machine(home.path(), "m");
        let child = fs::File::open(dir.path(LOCK_FILE)).expect("open");
        // The owner is killed; the child it was starting has the lock for a moment longer.
        let dead = ProcessIdentity {
            start_ticks: 1,
            ..ProcessIdentity::of_self()
        };
        dir.update(|record| record.owner = dead).expect("update");
        dir.abandon();
        child.try_lock().expect("as a child's");
        let late = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            drop(child);
        });
        assert_eq!(reap_home(home.path()).reaped, ["m"]);
        late.join().expect("join");
    }

    #[test]
    fn a_removal_cut_short_is_finished_by_the_next() {
        let home = tempfile::tempdir().expect("temp");
        let dir = machine(home.path(), "m");
        dir.abandon();
        fs::remove_file(dir.path("record.json")).expect("rm");
        fs::remove_file(dir.path("lock")).expect("rm");
        fs::create_dir(home.path().join("machines/.reaping-x-")).expect("dir");
        let report = reap_home(home.path());
        assert_eq!(report.reaped, ["m", "x"]);
        assert!(is_empty(home.path()));
    }

    #[test]
    fn many_reapers_beside_makers_do_no_harm() {
        let home = tempfile::tempdir().expect("temp");
        let path = home.path();
        std::thread::scope(|scope| {
            for maker in 0..4 {
                scope.spawn(move || {
                    for round in 0..20 {
                        let dir = machine(path, &format!("m{maker}"));
                        if round % 2 == 0 {
                            dir.abandon();
                        } else {
                            assert!(dir.path("record.json").exists(), "reaped while alive");
                            assert!(dir.remove().leaks.is_empty());
                        }
                    }
                });
            }
            for _ in 0..3 {
                scope.spawn(move || {
                    for _ in 0..40 {
                        let report = reap_home(path);
                        assert!(report.leaks.is_empty(), "{report:?}");
                    }
                });
            }
        });
        let _ = reap_home(path);
        assert!(is_empty(path));
    }

    #[test]
    fn stale_partial_files_go_and_fresh_ones_stay() {
        let dir = tempfile::tempdir().expect("temp");
        let fresh = dir.path().join(proc::partial_name("a"));
        let stale = dir
            .path()
            .join(format!("a.partial-{}-1", std::process::id()));
        let other = dir.path().join("a");
        for path in [&fresh, &other] {
            fs::write(path, "x").expect("write");
        }
        fs::create_dir(&stale).expect("dir");
        let report = sweep_partial(&[dir.path().to_owned(), PathBuf::from("/nonexistent")]);
        assert_eq!(report.reaped, [stale.display().to_string()]);
        assert!(fresh.exists() && other.exists() && !stale.exists());
    }
}
