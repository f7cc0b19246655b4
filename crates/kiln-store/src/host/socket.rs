//! The private unix socket in the registry's directory: made, found and guarded.

use std::io;
use std::path::Path;

use tokio::net::{UnixListener, UnixStream};

use crate::private_socket;

/// Name of the socket in the registry's directory.
const SOCKET_NAME: &str = "host.sock";

/// Makes the socket. Only the owner of the store calls this: whatever is there is a dead owner's.
pub(super) fn listen(dir: &Path) -> io::Result<UnixListener> {
    private_socket::listen(&dir.join(SOCKET_NAME))
}

/// Connects to the owner.
pub(super) async fn connect(dir: &Path) -> io::Result<UnixStream> {
    private_socket::connect(&dir.join(SOCKET_NAME)).await
}

/// The user on the other side, as the kernel says.
pub(super) fn peer_uid(stream: &UnixStream) -> io::Result<u32> {
    Ok(stream.peer_cred()?.uid())
}

/// The user this process acts as.
pub(super) fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}
