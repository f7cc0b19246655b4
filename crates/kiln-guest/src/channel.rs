//! The machine's one channel to its host: a virtio-serial port, read and written without blocking.
//!
//! While no host is connected such a port reads 0 and polls HUP, for good as far as epoll's readiness is
//! concerned. So the port sits in an edge-triggered epoll of its own, and tokio watches that epoll: every change of
//! the port wakes us once, and nothing spins. [`Port::connected`] waits until a host is there.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Cx, Poll, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, epoll, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::error::{Context, SysError};

/// Name of the port, given by the driver.
pub(crate) const NAME: &str = "kiln.channel";
/// Longest pause between two looks for a host, for the case that a wake-up was lost.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The device node of the named port below `class` (`/sys/class/virtio-ports`).
pub(crate) fn find(class: &Path) -> Option<PathBuf> {
    for entry in fs::read_dir(class).ok()?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == NAME {
            return Some(Path::new("/dev").join(entry.file_name()));
        }
    }
    None
}

/// The open port.
#[derive(Debug)]
pub(crate) struct Port {
    port: OwnedFd,
    /// An epoll with the port in it.
    changes: AsyncFd<OwnedFd>,
}

impl Port {
    /// Opens the port.
    ///
    /// # Errors
    /// When it cannot be opened or watched.
    pub(crate) fn open(node: &Path) -> Result<Self, SysError> {
        let what = || format!("open the channel {}", node.display());
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let port = rustix::fs::open(node, flags, Mode::empty()).context(what)?;
        let own = epoll::create(epoll::CreateFlags::CLOEXEC).context(what)?;
        let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&own, &port, epoll::EventData::new_u64(0), interest).context(what)?;
        Ok(Self {
            port,
            changes: crate::fd::watched(own).context(what)?,
        })
    }

    fn host_is_there(&self) -> bool {
        let mut fds = [PollFd::new(&self.port, PollFlags::IN | PollFlags::OUT)];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().contains(PollFlags::HUP)
    }

    /// Waits until a host is connected.
    pub(crate) async fn connected(&self) {
        while !self.host_is_there() {
            let change = std::future::poll_fn(|cx| self.poll_change(cx));
            // A change that is no hang-up is a host: nothing more is asked.
            if let Ok(Ok(flags)) = tokio::time::timeout(LOOK_AGAIN, change).await
                && !flags.contains(epoll::EventFlags::HUP)
            {
                return;
            }
        }
    }

    /// Ready when the port changed since the last call that was not ready; with what it is now.
    fn poll_change(&self, cx: &mut Cx<'_>) -> Poll<io::Result<epoll::EventFlags>> {
        loop {
            let mut ready = ready!(self.changes.poll_read_ready(cx))?;
            let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 1];
            let now = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let (seen, _) = epoll::wait(ready.get_inner(), &mut events, Some(&now))?;
            if let Some(event) = seen.first() {
                return Poll::Ready(Ok(event.flags));
            }
            ready.clear_ready();
        }
    }
}

/// A handle of the port for one session. Reads and writes share one task, so one waker is enough.
#[derive(Clone, Debug)]
pub(crate) struct PortIo(pub(crate) Arc<Port>);

impl AsyncRead for PortIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Cx<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match rustix::io::read(&self.0.port, buf.initialize_unfilled()) {
                Ok(count) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::AGAIN) => drop(ready!(self.0.poll_change(cx))?),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for PortIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Cx<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match rustix::io::write(&self.0.port, bytes) {
                Err(Errno::AGAIN) => drop(ready!(self.0.poll_change(cx))?),
                Err(Errno::INTR) => {}
                other => return Poll::Ready(other.map_err(io::Error::from)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Cx<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Cx<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_found_by_its_name() {
        let class = tempfile::tempdir().unwrap();
        for (port, name) in [("vport0p1", "org.other\n"), ("vport1p2", "kiln.channel\n")] {
            fs::create_dir(class.path().join(port)).unwrap();
            fs::write(class.path().join(port).join("name"), name).unwrap();
        }
        assert_eq!(find(class.path()), Some(PathBuf::from("/dev/vport1p2")));
    }
}
