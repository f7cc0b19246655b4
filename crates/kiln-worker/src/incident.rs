//! What tells of a machine that was ended as an incident: kept below `<home>/incidents` until somebody removes it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Folder of incidents below a home.
const INCIDENTS_DIR: &str = "incidents";
/// Most bytes of one file that is taken over.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Where the incident of a job, or of its machine, is kept.
#[must_use]
pub fn dir_of(home: &Path, job: &str, asked_unix_ms: u64) -> PathBuf {
    home.join(INCIDENTS_DIR)
        .join(format!("{job}-{asked_unix_ms}"))
}

/// A file that may not be there, as far as it is taken over.
pub(crate) fn bytes_of(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(path) {
        let _cut_short = file.take(FILE_BYTES_MAX).read_to_end(&mut bytes);
    }
    bytes
}

/// Puts files into a folder that appears whole, and survives a crash of the host from then on.
pub(crate) fn preserve(
    home: &Path,
    job: &str,
    asked_unix_ms: u64,
    files: &[(&str, &[u8])],
) -> io::Result<PathBuf> {
    let parent = home.join(INCIDENTS_DIR);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&parent)?;
    let dir = dir_of(home, job, asked_unix_ms);
    let hidden = parent.join(format!(".{job}-{asked_unix_ms}"));
    DirBuilder::new().mode(0o700).create(&hidden)?;
    for (name, bytes) in files {
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(hidden.join(name))?;
        file.write_all(bytes)?;
        file.sync_all()?;
    }
    fs::rename(&hidden, &dir)?;
    File::open(&dir)?.sync_all()?;
    File::open(&parent)?.sync_all()?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn everything_is_there_for_its_owner_alone() {
        let home = tempfile::tempdir().expect("dir");
        let files: [(&str, &[u8]); 2] = [("incident.json", b"it mined"), ("console.log", b"panic")];
        let dir = preserve(home.path(), "ra1", 77, &files).expect("kept");
        assert_eq!(dir, home.path().join("incidents/ra1-77"));
        assert_eq!(dir, dir_of(home.path(), "ra1", 77));
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        for (name, bytes) in files {
            assert_eq!(bytes_of(&dir.join(name)), bytes);
            assert_eq!(mode(&dir.join(name)), 0o600, "{name}");
        }
        let parent = home.path().join("incidents");
        assert_eq!(fs::read_dir(parent).expect("list").count(), 1);
        assert!(preserve(home.path(), "ra1", 77, &files).is_err(), "once");
    }
}
