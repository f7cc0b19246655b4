//! Cgroups of version 2: the guest's own, the workload's, and one for each command.
//!
//! ```text
//! /sys/fs/cgroup
//! |- kiln             PID 1
//! `- workload         frozen and bounded as a whole
//!    |- exec-N        one command: limits, `main` holds its processes
//!    |- buildkit      buildkitd
//!    `- steps         RUN steps, bounded together
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use crate::error::{Context, SysError};

/// Where cgroups are mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";
/// Controllers handed down.
const CONTROLLERS: &str = "+cpu +memory +pids";
/// Longest pause between two looks at a state, for the case that a notification was lost.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// How deep cgroups are removed and searched.
const DEPTH_MAX: usize = 8;

/// One cgroup.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// A cgroup by its path below the root; it need not exist yet.
    pub(crate) fn at(path: impl AsRef<Path>) -> Self {
        Self {
            path: Path::new(ROOT).join(path),
        }
    }

    /// A cgroup inside this one.
    pub(crate) fn child(&self, name: &str) -> Self {
        Self {
            path: self.path.join(name),
        }
    }

    /// Its directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it; no error when it is there.
    pub(crate) fn create(&self) -> Result<(), SysError> {
        match fs::create_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.context(|| format!("create cgroup {}", self.path.display())),
        }
    }

    /// Hands the controllers to its children.
    pub(crate) fn delegate(&self) -> Result<(), SysError> {
        self.write("cgroup.subtree_control", CONTROLLERS)
    }

    /// Writes one of its files.
    pub(crate) fn write(&self, file: &str, value: &str) -> Result<(), SysError> {
        let path = self.path.join(file);
        let written = OpenOptions::new().write(true).open(&path);
        written
            .and_then(|mut file| file.write_all(value.as_bytes()))
            .context(|| format!("write {value:?} to {}", path.display()))
    }

    /// Reads one of its files.
    pub(crate) fn read(&self, file: &str) -> Result<String, SysError> {
        let path = self.path.join(file);
        fs::read_to_string(&path).context(|| format!("read {}", path.display()))
    }

    /// A line `key value` of one of its files; 0 when it is not there.
    pub(crate) fn value(&self, file: &str, key: &str) -> u64 {
        self.read(file)
            .map_or(0, |text| keyed(&text, key).unwrap_or(0))
    }

    /// A file that holds one number; 0 when it does not.
    pub(crate) fn number(&self, file: &str) -> u64 {
        self.read(file)
            .map_or(0, |text| text.trim().parse().unwrap_or(0))
    }

    /// Bounds its memory; 0 removes the bound.
    pub(crate) fn limit_memory(&self, bytes: u64) -> Result<(), SysError> {
        self.write("memory.max", &max_or(bytes))
    }

    /// Bounds its processes; 0 removes the bound.
    pub(crate) fn limit_pids(&self, count: u64) -> Result<(), SysError> {
        self.write("pids.max", &max_or(count))
    }

    /// The file through which a process enters it.
    pub(crate) fn door(&self) -> Result<File, SysError> {
        let path = self.path.join("cgroup.procs");
        OpenOptions::new()
            .write(true)
            .open(&path)
            .context(|| format!("open {}", path.display()))
    }

    /// Kills everything in it and below.
    pub(crate) fn kill(&self) -> Result<(), SysError> {
        self.write("cgroup.kill", "1")
    }

    /// Waits until nothing lives in it and below.
    pub(crate) async fn emptied(&self, within: Duration) -> Result<(), SysError> {
        self.wait("cgroup.events", "populated", 0, within).await
    }

    /// Waits until the kernel says that everything in it is frozen, or that it is not.
    pub(crate) async fn frozen(&self, frozen: bool, within: Duration) -> Result<(), SysError> {
        let wanted = u64::from(frozen);
        self.wait("cgroup.events", "frozen", wanted, within).await
    }

    /// Waits until a line `key value` has the wanted value.
    async fn wait(
        &self,
        file: &str,
        key: &str,
        wanted: u64,
        within: Duration,
    ) -> Result<(), SysError> {
        let path = self.path.join(file);
        let deadline = Instant::now() + within;
        let mut watch = None;
        loop {
            let text = match fs::read_to_string(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && wanted == 0 => {
                    return Ok(());
                }
                other => other.context(|| format!("read {}", path.display()))?,
            };
            if keyed(&text, key) == Some(wanted) {
                return Ok(());
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(SysError::timeout(format!(
                    "wait for {key} {wanted} in {}",
                    path.display()
                )));
            }
            let Some(watch) = &mut watch else {
                // Often the first look is enough; now the next one must not miss a change.
                watch = Some(Watch::new(&path)?);
                continue;
            };
            let look_again = deadline.min(now + LOOK_AGAIN);
            let _looks_again = tokio::time::timeout_at(look_again, watch.changed()).await;
        }
    }

    /// Removes it and everything below. The processes must have gone.
    pub(crate) fn remove(&self) -> Result<(), SysError> {
        remove_below(&self.path, 0)
    }

    /// The cgroups in it.
    pub(crate) fn children(&self) -> Vec<Self> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| Self { path: entry.path() })
            .collect()
    }

    /// OOM kills inside it and below, by the path of the cgroup where they happened, relative to this one.
    pub(crate) fn oom_kills(&self) -> Vec<(String, u64)> {
        let mut found = Vec::new();
        collect_oom(&self.path, &self.path, 0, &mut found);
        found
    }
}

fn max_or(value: u64) -> String {
    if value == 0 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

fn remove_below(path: &Path, depth: usize) -> Result<(), SysError> {
    if depth < DEPTH_MAX {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove_below(&entry.path(), depth + 1)?;
            }
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.context(|| format!("remove cgroup {}", path.display())),
    }
}

fn collect_oom(root: &Path, path: &Path, depth: usize, found: &mut Vec<(String, u64)>) {
    let kills = fs::read_to_string(path.join("memory.events.local"))
        .ok()
        .and_then(|text| keyed(&text, "oom_kill"))
        .unwrap_or(0);
    if kills > 0 {
        let relative = path.strip_prefix(root).unwrap_or(path);
        found.push((relative.display().to_string(), kills));
    }
    if depth >= DEPTH_MAX {
        return;
    }
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_oom(root, &entry.path(), depth + 1, found);
        }
    }
}

/// The value of `key` in a file of lines `key value`.
pub(crate) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}

/// Tells when a file or directory changes.
#[derive(Debug)]
pub(crate) struct Watch {
    notifications: AsyncFd<std::os::fd::OwnedFd>,
}

impl Watch {
    /// Watches a file from now on.
    pub(crate) fn new(path: &Path) -> Result<Self, SysError> {
        Self::of(path, inotify::WatchFlags::MODIFY)
    }

    /// Watches what appears in a directory from now on.
    pub(crate) fn directory(path: &Path) -> Result<Self, SysError> {
        Self::of(
            path,
            inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO,
        )
    }

    fn of(path: &Path, events: inotify::WatchFlags) -> Result<Self, SysError> {
        let what = || format!("watch {}", path.display());
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let fd = inotify::init(flags).context(what)?;
        inotify::add_watch(&fd, path, events).context(what)?;
        Ok(Self {
            notifications: crate::fd::watched(fd).context(what)?,
        })
    }

    /// Waits for a change since the last call. Safe to cancel.
    pub(crate) async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.notifications.readable().await?;
            let mut buffer = [0_u8; 4096];
            let read = ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer)?));
            match read {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }
}

/// Mounts the hierarchy and makes the guest's and the workload's cgroups. PID 1 enters its own.
pub(crate) fn set_up(workload: &Cgroup) -> Result<(), SysError> {
    let root = Cgroup::at("");
    root.delegate()?;
    let own = Cgroup::at("kiln");
    own.create()?;
    own.write("cgroup.procs", "1")?;
    workload.create()?;
    workload.delegate()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_lines_are_found_whole() {
        let text = "low 0\noom 3\noom_kill 2\nbroken\nbad x\n";
        assert_eq!(keyed(text, "oom"), Some(3));
        assert_eq!(keyed(text, "oom_kill"), Some(2));
        assert_eq!(keyed(text, "bad"), None);
        assert_eq!(keyed(text, "none"), None);
    }

    #[test]
    fn oom_kills_name_the_cgroup_they_happened_in() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("steps/a")).unwrap();
        fs::write(dir.path().join("memory.events.local"), "oom_kill 0\n").unwrap();
        fs::write(
            dir.path().join("steps/a/memory.events.local"),
            "oom 1\noom_kill 4\n",
        )
        .unwrap();
        let group = Cgroup {
            path: dir.path().to_owned(),
        };
        assert_eq!(group.oom_kills(), [("steps/a".to_owned(), 4)]);
    }

    #[tokio::test]
    async fn a_wait_sees_a_change_and_has_a_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cgroup.events");
        fs::write(&file, "populated 1\nfrozen 0\n").unwrap();
        let group = Cgroup {
            path: dir.path().to_owned(),
        };
        let late = group.emptied(Duration::from_millis(5)).await;
        assert!(late.is_err());
        let change = tokio::task::spawn_blocking(move || fs::write(file, "populated 0\n"));
        group.emptied(Duration::from_secs(20)).await.unwrap();
        change.await.unwrap().unwrap();
    }
}
