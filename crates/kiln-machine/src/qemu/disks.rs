//! A machine's disks: which files make each, which are made for it, and which descriptors QEMU gets.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use kiln_core::machine::{DiskAccess, DiskFormat};
use kiln_core::{DiskRole, DiskSlot};

use super::argv::{self, DiskNodes};
use super::launch_error;
use super::qcow2::{self, Link};
use crate::driver::LaunchError;

/// One disk of a machine.
#[derive(Clone, Debug)]
pub(crate) struct MachineDisk {
    /// As it was asked for.
    pub(crate) slot: DiskSlot,
    /// Its files, top first.
    pub(crate) links: Vec<Link>,
}

/// Name of the file in a machine's or template's directory that takes a disk's writes.
pub(crate) fn file_name(role: DiskRole) -> String {
    format!("{}.qcow2", argv::device_id(role))
}

impl MachineDisk {
    /// Makes what the disk needs in the machine's directory. `frozen` is the template's own overlay of it.
    pub(crate) fn prepare(
        dir: &Path,
        slot: &DiskSlot,
        frozen: Option<&Path>,
    ) -> Result<Self, LaunchError> {
        let overlay = dir.join(file_name(slot.role));
        let (below, size) = match (frozen, &slot.backing) {
            (Some(frozen), _) => chain(frozen, DiskFormat::Qcow2)?,
            (None, Some(backing)) => {
                let real = match is_descriptor(backing) && slot.access == DiskAccess::ReadOnly {
                    // The very file that is open, whatever its name leads to by now.
                    true => backing.clone(),
                    // By its real path: what is written above it names it, and links come and go.
                    false => {
                        std::fs::canonicalize(backing).map_err(launch_error("find", backing))?
                    }
                };
                chain(&real, slot.format)?
            }
            (None, None) => (Vec::new(), 0),
        };
        let links = match &slot.access {
            DiskAccess::ReadOnly => below,
            DiskAccess::Fork | DiskAccess::New { .. } => {
                let size = match (&slot.access, below.is_empty()) {
                    (DiskAccess::New { size }, true) => size.0,
                    _ => size,
                };
                qcow2::create(&overlay, size, below.first())
                    .map_err(launch_error("make", &overlay))?;
                let top = Link {
                    path: overlay,
                    format: DiskFormat::Qcow2,
                };
                std::iter::once(top).chain(below).collect()
            }
        };
        Ok(Self {
            slot: slot.clone(),
            links,
        })
    }

    /// A disk that an earlier owner prepared; only the file that takes its writes is known.
    pub(crate) fn adopted(dir: &Path, slot: &DiskSlot) -> Self {
        let disk = Self {
            slot: slot.clone(),
            links: Vec::new(),
        };
        let top = Link {
            path: dir.join(file_name(slot.role)),
            format: DiskFormat::Qcow2,
        };
        Self {
            links: disk.is_writable().then_some(top).into_iter().collect(),
            ..disk
        }
    }

    /// Whether the guest may write.
    pub(crate) fn is_writable(&self) -> bool {
        self.slot.access != DiskAccess::ReadOnly
    }

    /// The file that takes its writes.
    pub(crate) fn overlay(&self) -> Option<&Path> {
        self.is_writable().then(|| self.links[0].path.as_path())
    }

    /// Opens its files: nodes for QEMU, and each descriptor with the number of its set. `rated`: the machine's disks have a rate, and this
    /// one a part of it if the guest may write.
    pub(crate) fn open(&self, sets: &mut Sets, rated: bool) -> Result<DiskNodes, LaunchError> {
        let mut files = Vec::with_capacity(self.links.len());
        for (depth, link) in self.links.iter().enumerate() {
            let writable = depth == 0 && self.is_writable();
            let file = OpenOptions::new()
                .read(true)
                .write(writable)
                .open(&link.path)
                .map_err(launch_error("open", &link.path))?;
            files.push((link.format, sets.add(file)));
        }
        Ok(DiskNodes {
            role: self.slot.role,
            files,
            writable: self.is_writable(),
            rated: rated && self.is_writable(),
        })
    }
}

fn chain(path: &Path, format: DiskFormat) -> Result<(Vec<Link>, u64), LaunchError> {
    qcow2::chain(path, format).map_err(launch_error("read", path))
}

/// Descriptors that QEMU gets as numbered sets, so that it opens `/dev/fdset/N` and no path.
#[derive(Debug)]
pub(crate) struct Sets {
    next: u32,
    /// Descriptor and number of its set.
    pub(crate) fds: Vec<(OwnedFd, u32)>,
}

impl Sets {
    /// Sets with numbers from `next` on.
    pub(crate) fn from(next: u32) -> Self {
        Self {
            next,
            fds: Vec::new(),
        }
    }

    /// Adds a file; gives the number of its set.
    pub(crate) fn add(&mut self, file: File) -> u32 {
        let set = self.next;
        self.next += 1;
        self.fds.push((file.into(), set));
        set
    }

    /// The next number.
    pub(crate) fn next(&self) -> u32 {
        self.next
    }

    /// Numbers of descriptors and sets, for the arguments.
    pub(crate) fn numbers(&self) -> Vec<(RawFd, u32)> {
        self.fds
            .iter()
            .map(|(fd, set)| (fd.as_raw_fd(), *set))
            .collect()
    }
}

/// Whether a path is that of an open descriptor of this process.
fn is_descriptor(path: &Path) -> bool {
    path.starts_with("/proc/self/fd")
}

/// Whether a file is there and regular.
pub(crate) fn is_regular(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file())
}

/// The path if it can be moved away: the overlay of a disk that stopped cleanly.
pub(crate) fn overlay_of(disks: &[MachineDisk], role: DiskRole) -> Result<PathBuf, io::Error> {
    let disk = disks.iter().find(|disk| disk.slot.role == role);
    let path = disk
        .and_then(MachineDisk::overlay)
        .filter(|path| is_regular(path));
    path.map(Path::to_owned)
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}
