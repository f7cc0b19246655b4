//! The private unix socket in the registry's directory: made, found and guarded.
//!
//! Paths of unix sockets are at most 108 bytes, those of directories are not: the socket is reached
//! through a descriptor of its directory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use tokio::net::{UnixListener, UnixStream};

/// Name of the socket in the registry's directory.
const SOCKET_NAME: &str = "host.sock";

/// A path to the socket that is short whatever the directory is called. Valid while the file is open.
fn short_path(dir: &Path) -> io::Result<(File, PathBuf)> {
    let flags = (OFlags::DIRECTORY | OFlags::PATH).bits();
    let dir = OpenOptions::new()
        .read(true)
        .custom_flags(flags.cast_signed())
        .open(dir)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(SOCKET_NAME);
    Ok((dir, path))
}

/// Makes the socket. Only the owner of the store calls this: whatever is there is a dead owner's.
pub(super) fn listen(dir: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(dir.join(SOCKET_NAME)) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let (_open, path) = short_path(dir)?;
    let listener = UnixListener::bind(&path)?;
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(dir.join(SOCKET_NAME), private)?;
    Ok(listener)
}

/// Connects to the owner.
pub(super) async fn connect(dir: &Path) -> io::Result<UnixStream> {
    let (_open, path) = short_path(dir)?;
    UnixStream::connect(&path).await
}

/// The user on the other side, as the kernel says.
pub(super) fn peer_uid(stream: &UnixStream) -> io::Result<u32> {
    Ok(stream.peer_cred()?.uid())
}

/// The user this process acts as.
pub(super) fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}
