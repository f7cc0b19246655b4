//! Unix sockets of this user's processes, in directories with names of any length.
//!
//! Paths of unix sockets are at most 108 bytes (unix(7)), those of directories are not: a socket is reached through a descriptor of its
//! directory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use tokio::net::{UnixListener, UnixStream};

/// A path to the socket that is short whatever its directory is called. Valid while the file is open.
fn short(path: &Path) -> io::Result<(File, PathBuf)> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let flags = (OFlags::DIRECTORY | OFlags::PATH).bits();
    let dir = OpenOptions::new()
        .read(true)
        .custom_flags(flags.cast_signed())
        .open(dir)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    Ok((dir, path))
}

/// Makes a socket that only this user reaches. Whatever is there is a dead owner's: the caller made sure that there is no other.
///
/// # Errors
/// What the file system says.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (_open, short) = short(path)?;
    let listener = UnixListener::bind(&short)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Connects to whoever listens.
///
/// # Errors
/// When nobody does.
pub async fn connect(path: &Path) -> io::Result<UnixStream> {
    let (_open, short) = short(path)?;
    UnixStream::connect(&short).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_long_directory_is_no_obstacle() {
        let dir = tempfile::tempdir().expect("temp dir");
        let deep = dir.path().join("d".repeat(120));
        fs::create_dir(&deep).expect("made");
        let path = deep.join("socket");
        assert!(connect(&path).await.is_err());
        let first = listen(&path).expect("listens");
        drop(first);
        let _second = listen(&path).expect("in place of the first");
        connect(&path).await.expect("connects");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
