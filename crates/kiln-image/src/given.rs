//! Files of whoever runs a command, of which its machine is made: a kernel, a root disk. Opened once and looked at; nothing starts here.
//!
//! Their bytes are anybody's. The host reads headers, bounded, and computes a digest; it mounts nothing and runs nothing of them. What they
//! hold is for QEMU and the machine's own kernel. Read next: [`kernel`] and [`root_disk`] (what is looked at), [`modules`] (what a kernel
//! needs besides).

pub mod kernel;
pub mod modules;
pub mod root_disk;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use kiln_core::job::GivenFile;
use rustix::fs::OFlags;

pub use kernel::Kernel;
pub use root_disk::RootDisk;

/// Longest name of a file that is told, characters.
const NAME_CHARS_MAX: usize = 255;

/// Why a file is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// One sentence.
    pub message: String,
    /// What to do.
    pub hint: String,
}

impl Refused {
    pub(crate) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: hint.into(),
        }
    }
}

/// What tells that a file is the one it was and holds what it held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// An open file and what it is called.
#[derive(Debug)]
struct Opened {
    file: File,
    stamp: Stamp,
    name: String,
}

/// Opens a regular file for reading. Nothing else is opened: a pipe would wait, and a device may act.
fn open(path: &Path, what: &str) -> Result<Opened, Refused> {
    let shown = shown(path);
    let unreadable = |error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => "name a file that is there",
            io::ErrorKind::PermissionDenied => "make it readable for yourself",
            _ => "see that the file can be read",
        };
        Refused::new(format!("the {what} {shown} cannot be read: {error}"), hint)
    };
    let irregular = || {
        let message = format!("the {what} {shown} is not a regular file");
        Refused::new(
            message,
            "name a file, not a folder, a device, a pipe or a socket",
        )
    };
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(irregular());
    }
    // It may be another one by now: a pipe must not hold us.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(unreadable)?;
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(irregular());
    }
    let stamp = Stamp::of(&file).map_err(unreadable)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.chars().map(|c| if c.is_control() { '?' } else { c });
    Ok(Opened {
        file,
        stamp,
        name: name.take(NAME_CHARS_MAX).collect(),
    })
}

/// A path as messages have it.
fn shown(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = text.chars().map(|c| if c.is_control() { '?' } else { c });
    plain.collect()
}

/// As a request names them.
#[must_use]
pub fn asked(kernel: Option<&Kernel>, root_disk: Option<&RootDisk>) -> [Option<GivenFile>; 2] {
    let kernel = kernel.map(|kernel| GivenFile {
        name: kernel.name.clone(),
        digest: kernel.digest,
    });
    let root_disk = root_disk.map(|disk| GivenFile {
        name: disk.name.clone(),
        digest: disk.digest,
    });
    [kernel, root_disk]
}

/// What the first bytes of a file say that it is, in words; `None` when they say nothing that is known here.
fn known(start: &[u8]) -> Option<&'static str> {
    const KNOWN: [(usize, &[u8], &str); 20] = [
        (0, b"QFI\xfb", "a qcow2 image"),
        (0, b"KDMV", "a VMDK image"),
        (0, b"# Disk DescriptorFile", "a VMDK image"),
        (0, b"vhdxfile", "a VHDX image"),
        (0, b"conectix", "a VHD image"),
        (0x40, b"\x7f\x10\xda\xbe", "a VDI image"),
        (0, b"\x1f\x8b", "compressed with gzip"),
        (0, b"\xfd7zXZ\0", "compressed with xz"),
        (0, b"\x28\xb5\x2f\xfd", "compressed with zstd"),
        (0, b"BZh", "compressed with bzip2"),
        (0, b"PK\x03\x04", "a zip archive"),
        (0, b"hsqs", "a squashfs image"),
        (0, b"XFSB", "an XFS file system"),
        (0, b"LUKS\xba\xbe", "encrypted with LUKS"),
        (0x10040, b"_BHRfS_M", "a btrfs file system"),
        (0x8001, b"CD001", "an ISO 9660 image"),
        (0x200, b"EFI PART", "a disk with partitions"),
        (0x101, b"ustar", "a tar archive"),
        (0x38, b"ARM\x64", "a kernel for arm64"),
        (0, b"\x7fELF", "a program"),
    ];
    let found = KNOWN
        .iter()
        .find(|(at, magic, _)| start.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    found.map(|(_, _, words)| *words)
}

/// A little-endian number of a header.
fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(bytes.try_into().ok()?))
}

/// As [`half`], of four bytes.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_nothing_waits() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = |name: &str| dir.path().join(name);
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, path("pipe"), mode).expect("a pipe");
        let socket = std::os::unix::net::UnixListener::bind(path("socket"));
        let _socket = socket.expect("a socket");
        let nothing = path("nothing");
        let refused = open(&nothing, "kernel").expect_err("not there");
        assert_eq!(refused.hint, "name a file that is there");
        for irregular in [
            dir.path(),
            &path("pipe"),
            &path("socket"),
            Path::new("/dev/null"),
        ] {
            let refused = open(irregular, "kernel").expect_err("no file");
            assert!(
                refused.message.ends_with("is not a regular file"),
                "{refused}"
            );
        }
        std::fs::write(path("a\x1bb"), "x").expect("write");
        let opened = open(&path("a\x1bb"), "kernel").expect("a file");
        assert_eq!(opened.name, "a?b");
    }

    #[test]
    fn a_file_that_changes_is_told_by_its_stamp() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("file");
        std::fs::write(&path, "one").expect("write");
        let opened = open(&path, "root disk").expect("a file");
        assert_eq!(Stamp::of(&opened.file).expect("stat"), opened.stamp);
        std::fs::write(&path, "other").expect("write");
        assert_ne!(Stamp::of(&opened.file).expect("stat"), opened.stamp);
    }
}
