//! The sockets between a machine's owner and its VMM: pairs that end with the owner, or names in the machine's directory that the next
//! owner can reach.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};

use super::{CONSOLE_SOCKET, CONTROL_SOCKET};

/// This side's ends of the sockets.
pub(super) struct Near {
    pub(super) control: UnixStream,
    pub(super) console: UnixStream,
    pub(super) output: OwnedFd,
}

/// The VMM's ends.
pub(super) struct Far {
    pub(super) control: OwnedFd,
    pub(super) console: OwnedFd,
    pub(super) output: OwnedFd,
}

/// Sockets that nobody else can reach: they end with this owner.
pub(super) fn connected() -> io::Result<(Near, Far)> {
    let (control, far_control) = UnixStream::pair()?;
    let (console, far_console) = UnixStream::pair()?;
    ends((control, far_control.into()), (console, far_console.into()))
}

/// Sockets in the machine's directory that the next owner can reach. Their queues take this owner's connections at once.
pub(super) fn listening(dir_fd: &OwnedFd) -> io::Result<(Near, Far)> {
    let make = |name: &str| -> io::Result<(UnixStream, OwnedFd)> {
        let listener = listen(dir_fd, name)?;
        let near = UnixStream::connect(socket_path(dir_fd, name))?;
        Ok((near, listener.into()))
    };
    ends(make(CONTROL_SOCKET)?, make(CONSOLE_SOCKET)?)
}

fn ends(
    (control, far_control): (UnixStream, OwnedFd),
    (console, far_console): (UnixStream, OwnedFd),
) -> io::Result<(Near, Far)> {
    control.set_nonblocking(true)?;
    console.set_nonblocking(true)?;
    let (output, far_output) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let near = Near {
        control,
        console,
        output,
    };
    let far = Far {
        control: far_control,
        console: far_console,
        output: far_output,
    };
    Ok((near, far))
}

/// A socket of the machine's directory, by a path that is never too long.
pub(super) fn socket_path(dir_fd: &OwnedFd, name: &str) -> String {
    format!("/proc/self/fd/{}/{name}", dir_fd.as_raw_fd())
}

/// For this user alone, as its directory: a VMM of another user has the listening descriptor and no way to the path.
pub(super) fn listen(dir_fd: &OwnedFd, name: &str) -> io::Result<UnixListener> {
    let path = socket_path(dir_fd, name);
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
