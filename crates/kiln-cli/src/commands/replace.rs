//! Replaces a small file the user or operator owns: old or new content, never half of either.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Writes beside the file, flushes, renames. A link is followed, so that a linked file stays one.
///
/// # Errors
/// What the file system says; the old file is then still there.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let dir = folder(&path);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let beside = dir.join(name);
    // A left-over of a killed process with the same number may have another mode.
    let _absent = fs::remove_file(&beside);
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&beside)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&beside, &path)?;
        fs::File::open(dir)?.sync_all()
    };
    let done = write();
    if done.is_err() {
        let _litter = fs::remove_file(&beside);
    }
    done
}

/// Where a file lies. The parent of a bare name is an empty path, which no system call takes.
fn folder(path: &Path) -> &Path {
    let parent = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_bare_name_lies_in_the_current_folder() {
        assert_eq!(folder(Path::new("kiln.yaml")), Path::new("."));
        assert_eq!(folder(Path::new("a/kiln.yaml")), Path::new("a"));
        assert_eq!(folder(Path::new("/kiln.yaml")), Path::new("/"));
    }

    #[test]
    fn links_stay_links_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        fs::write(&real, "old").expect("write");
        std::os::unix::fs::symlink(&real, &link).expect("link");
        replace(&link, b"new", 0o600).expect("replaces");
        assert_eq!(fs::read(&real).expect("read"), b"new");
        assert!(fs::symlink_metadata(&link).expect("there").is_symlink());
        assert_eq!(
            fs::metadata(&real).expect("there").permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 2);
        assert!(replace(&dir.path().join("no/such"), b"", 0o600).is_err());
    }
}
