//! Waits for block devices by serial number, told by the kernel's uevents.

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::{Context, SysError};
use crate::netlink;

/// Longest serial number the kernel gives for a virtio disk, bytes.
const SERIAL_MAX: usize = 64;
/// Longest pause between two looks, for the case that a uevent was lost.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// A disk that is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Disk {
    /// Kernel name, for example `vda`.
    pub(crate) name: String,
    /// Device node.
    pub(crate) node: PathBuf,
}

/// The disk with this serial below `sys_block` (`/sys/block`).
pub(crate) fn find(sys_block: &Path, serial: &str) -> Option<Disk> {
    for entry in fs::read_dir(sys_block).ok()?.flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let Ok(text) = fs::read(entry.path().join("serial")) else {
            continue;
        };
        let text = &text[..text.len().min(SERIAL_MAX)];
        if text.trim_ascii() == serial.as_bytes() {
            let node = Path::new("/dev").join(&name);
            return Some(Disk { name, node });
        }
    }
    None
}

/// Waits until the disk is there, or the deadline has passed. Blocks the thread.
///
/// # Errors
/// When it did not come in time, or the kernel gives no uevents.
pub(crate) fn wait_for(serial: &str, within: Duration) -> Result<Disk, SysError> {
    // The node is there a moment before the disk behind it: until then it cannot be opened (ENXIO).
    let is_live = |disk: &Disk| fs::File::open(&disk.node).is_ok();
    let look = || find(Path::new("/sys/block"), serial).filter(is_live);
    wait_until(&format!("disk {serial}"), within, look)
}

/// Waits until `look` finds something, told by the kernel's uevents. Blocks the thread.
///
/// # Errors
/// When nothing was found in time, or the kernel gives no uevents.
pub(crate) fn wait_until<T>(
    what: &str,
    within: Duration,
    mut look: impl FnMut() -> Option<T>,
) -> Result<T, SysError> {
    if let Some(found) = look() {
        return Ok(found);
    }
    let deadline = Instant::now() + within;
    let socket = listen()?;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(SysError::timeout(format!("wait for {what}")));
        }
        let pause = left.min(LOOK_AGAIN);
        let pause = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(pause.subsec_nanos()),
        };
        let mut fds = [PollFd::new(&socket, PollFlags::IN)];
        let _interrupted_or_late = poll(&mut fds, Some(&pause));
        let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
        while rustix::io::read(&socket, &mut buffer[..]).is_ok_and(|(got, _)| !got.is_empty()) {}
    }
}

/// The multicast group of the kernel's own uevents.
const KERNEL_GROUP: u32 = 1;

fn listen() -> Result<OwnedFd, SysError> {
    netlink::socket(libc::NETLINK_KOBJECT_UEVENT, KERNEL_GROUP, false)
        .context(|| "listen for uevents".to_owned())
}

/// True if a virtio disk is attached at all.
pub(crate) fn any_disk(sys_block: &Path) -> bool {
    fs::read_dir(sys_block)
        .is_ok_and(|mut entries| entries.any(|e| e.is_ok_and(|e| e.path().join("serial").exists())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_serial() {
        let dir = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "kiln-root"), ("vdb", "kiln-state\n"), ("loop0", "")] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("serial"), serial).unwrap();
        }
        let disk = find(dir.path(), "kiln-state").unwrap();
        assert_eq!(
            (disk.name.as_str(), disk.node.to_str().unwrap()),
            ("vdb", "/dev/vdb")
        );
        assert_eq!(find(dir.path(), "kiln-s"), None);
        assert!(any_disk(dir.path()));
    }
}
