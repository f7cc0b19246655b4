//! Descriptors the runtime watches.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Lets the runtime watch a descriptor.
///
/// # Errors
/// When the runtime's epoll refuses it.
#[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
pub(crate) fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open for as long as it lives, always has the same number, and the result owns it.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}
