//! Container images unpacked onto disks for runs: `<manifest hex>/{disk, meta.json}`. They can always be made again from the
//! registry, so they go first: those that no tag names, then the least recently used.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_core::Digest;
use kiln_machine::proc::partial_name;
use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;

use super::super::disk_use;

/// What was used this recently may be about to be attached, and stays.
const RECENT: Duration = Duration::from_secs(600);
/// Digits of a digest that name a lock file.
const LOCK_DIGITS: usize = 32;

/// One unpacked image.
#[derive(Clone, Debug)]
pub(in crate::commands) struct Unpacked {
    /// Digest of its manifest, in hex.
    pub(in crate::commands) manifest: String,
    /// Its directory.
    pub(in crate::commands) dir: PathBuf,
    /// Bytes on disk.
    pub(in crate::commands) bytes: u64,
    /// Last use, as far as file times tell.
    pub(in crate::commands) used: SystemTime,
}

/// What its record says that is checked here.
#[derive(Deserialize)]
struct Meta {
    disk: Digest,
    bytes: u64,
}

/// All of them, least recently used first.
pub(in crate::commands) fn list(root: &Path) -> io::Result<Vec<Unpacked>> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_digest = name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
        if is_digest && entry.path().is_dir() {
            let dir = entry.path();
            all.push(Unpacked {
                manifest: name,
                bytes: disk_use::of(&dir),
                used: used(&dir),
                dir,
            });
        }
    }
    all.sort_by_key(|one| one.used);
    Ok(all)
}

fn used(dir: &Path) -> SystemTime {
    let times = ["disk", "meta.json"].into_iter().filter_map(|name| {
        let meta = fs::metadata(dir.join(name)).ok()?;
        Some(meta.accessed().ok()?.max(meta.modified().ok()?))
    });
    times.max().unwrap_or(UNIX_EPOCH)
}

impl Unpacked {
    fn is_recent(&self) -> bool {
        self.used.elapsed().is_ok_and(|age| age < RECENT)
    }

    /// Removes it, unless some process makes it right now. Machines that run on it keep their open disk.
    pub(in crate::commands) fn remove(&self) -> io::Result<bool> {
        let root = self.dir.parent().unwrap_or(Path::new("."));
        let lock_path = root.join(format!("{}.lock", &self.manifest[..LOCK_DIGITS]));
        let lock = File::create(&lock_path)?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(false);
        }
        // Out of sight in one step; what a crash leaves of it is swept by its name.
        let away = root.join(partial_name(&self.manifest));
        match fs::rename(&self.dir, &away) {
            Ok(()) => fs::remove_dir_all(&away)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        remove_unfinished(root, &self.manifest[..LOCK_DIGITS])?;
        Ok(true)
    }

    /// Reads the disk again; the reason when it is not what its record says.
    pub(in crate::commands) fn verify(&self) -> Result<(), String> {
        let text =
            fs::read(self.dir.join("meta.json")).map_err(|error| format!("meta.json: {error}"))?;
        let meta: Meta =
            serde_json::from_slice(&text).map_err(|error| format!("meta.json: {error}"))?;
        let disk = File::open(self.dir.join("disk")).map_err(|error| format!("disk: {error}"))?;
        let (digest, bytes) = Digest::of_reader(disk).map_err(|error| format!("disk: {error}"))?;
        match (digest, bytes) == (meta.disk, meta.bytes) {
            true => Ok(()),
            false => Err(format!(
                "its disk is {digest}, the record says {}",
                meta.disk
            )),
        }
    }
}

/// Disks that were being made when their maker died; the caller holds the lock of these digits.
fn remove_unfinished(root: &Path, digits: &str) -> io::Result<()> {
    let prefix = format!("{digits}.disk-");
    for entry in fs::read_dir(root)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Removes those whose manifest nobody names; gives how many, and their bytes.
pub(super) fn prune_unreferenced(root: &Path, named: &HashSet<String>) -> io::Result<(usize, u64)> {
    let idle = list(root)?
        .into_iter()
        .filter(|one| !named.contains(&one.manifest) && !one.is_recent());
    remove_all(idle, u64::MAX)
}

/// Removes the least recently used until this many bytes are free; gives how many, and their bytes.
pub(super) fn prune_oldest(root: &Path, wanted: u64) -> io::Result<(usize, u64)> {
    remove_all(
        list(root)?.into_iter().filter(|one| !one.is_recent()),
        wanted,
    )
}

fn remove_all(all: impl Iterator<Item = Unpacked>, wanted: u64) -> io::Result<(usize, u64)> {
    let (mut count, mut bytes) = (0, 0);
    for one in all {
        if bytes >= wanted {
            break;
        }
        if one.remove()? {
            count += 1;
            bytes += one.bytes;
        }
    }
    Ok((count, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn unpack(root: &Path, seed: &str, age: Duration) -> String {
        let hex = Digest::of(seed.as_bytes()).hex();
        let dir = root.join(&hex);
        fs::create_dir_all(&dir).expect("make");
        let disk = vec![7_u8; 256 << 10];
        fs::write(dir.join("disk"), &disk).expect("write");
        let meta = json!({"schema": 1, "manifest": format!("sha256:{hex}"), "disk": Digest::of(&disk), "bytes": disk.len()});
        fs::write(dir.join("meta.json"), meta.to_string()).expect("write");
        let then = SystemTime::now() - age;
        for name in ["disk", "meta.json"] {
            let file = File::options()
                .write(true)
                .open(dir.join(name))
                .expect("open");
            let times = fs::FileTimes::new().set_accessed(then).set_modified(then);
            file.sync_all()
                .and_then(|()| file.set_times(times))
                .expect("set");
        }
        hex
    }

    #[test]
    fn the_unnamed_go_then_the_oldest_and_the_recent_stay() {
        let dir = tempfile::tempdir().expect("temp dir");
        let root = dir.path();
        let hour = Duration::from_secs(3600);
        let (old, older, orphan, fresh) = (
            unpack(root, "a", hour),
            unpack(root, "b", 2 * hour),
            unpack(root, "c", hour),
            unpack(root, "d", Duration::ZERO),
        );
        let order: Vec<String> = list(root)
            .expect("lists")
            .into_iter()
            .map(|one| one.manifest)
            .collect();
        assert_eq!((order.first(), order.last()), (Some(&older), Some(&fresh)));
        let named: HashSet<String> = [old.clone(), older.clone()].into();
        assert_eq!(prune_unreferenced(root, &named).expect("prunes").0, 1);
        assert!(!root.join(&orphan).exists() && root.join(&fresh).exists());
        let (count, bytes) = prune_oldest(root, 1).expect("prunes");
        assert!(count == 1 && bytes >= 256 << 10);
        assert!(!root.join(&older).exists() && root.join(&old).exists());
    }

    #[test]
    fn one_that_is_being_made_is_left_alone() {
        let dir = tempfile::tempdir().expect("temp dir");
        let hex = unpack(dir.path(), "a", Duration::from_secs(7200));
        fs::write(dir.path().join(format!("{}.disk-1", &hex[..32])), "half").expect("write");
        let lock = File::create(dir.path().join(format!("{}.lock", &hex[..32]))).expect("create");
        flock(&lock, FlockOperation::LockExclusive).expect("lock");
        assert_eq!(prune_oldest(dir.path(), 1).expect("nothing").0, 0);
        drop(lock);
        assert_eq!(prune_oldest(dir.path(), 1).expect("removes").0, 1);
        assert_eq!(
            fs::read_dir(dir.path()).expect("list").count(),
            1,
            "the lock file alone"
        );
    }

    #[test]
    fn a_flipped_byte_is_found() {
        let dir = tempfile::tempdir().expect("temp dir");
        let hex = unpack(dir.path(), "a", Duration::ZERO);
        let one = list(dir.path()).expect("lists").remove(0);
        one.verify().expect("sound");
        let mut bytes = fs::read(dir.path().join(&hex).join("disk")).expect("read");
        bytes[1000] ^= 1;
        fs::write(dir.path().join(&hex).join("disk"), bytes).expect("write");
        assert!(
            one.verify()
                .expect_err("damaged")
                .contains("the record says")
        );
    }
}
