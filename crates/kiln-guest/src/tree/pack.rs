//! Sends a file or a directory as a tar stream.
//!
//! The tree belongs to a tenant and may change while it is read: every file is opened without following links, sent
//! with the size it had, and padded with zeros when it shrank.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use kiln_proto::msg::{GetTree, GuestError, GuestErrorCode};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat, statat};
use tar::{Builder, EntryType, Header};

use super::walk::{names, shown};
use crate::error::{Context, SysError, failure, invalid};

/// How deep a tree may be.
const DEPTH_MAX: usize = 1024;

struct Packer<W: Write> {
    builder: Builder<W>,
    bytes_left: u64,
    entries_left: u64,
    /// Path of the directory being read, relative to the tree.
    path: Vec<u8>,
}

/// Writes what lies at the path as a tar stream.
pub(super) fn pack(order: &GetTree, sink: impl Write) -> Result<(), GuestError> {
    if !order.path.starts_with('/') || order.path.contains('\0') {
        return Err(invalid("the path of a tree is absolute"));
    }
    let path = Path::new(&order.path);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags, Mode::empty());
    let fd: OwnedFd = fd.context(|| format!("open {}", order.path))?;
    let stat = fstat(&fd).context(|| format!("look at {}", order.path))?;
    let mut packer = Packer {
        builder: Builder::new(sink),
        bytes_left: order.bytes_max,
        entries_left: order.entries_max,
        path: Vec::new(),
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => packer.directory(fd.as_fd(), 0)?,
        FileType::RegularFile => {
            let name = path.file_name().unwrap_or_else(|| OsStr::new("file"));
            packer.path = name.as_bytes().to_vec();
            packer.count(&stat)?;
            packer.file(File::from(fd), &stat)?;
        }
        _ => {
            return Err(invalid(format!(
                "{} is neither a directory nor a file",
                order.path
            )));
        }
    }
    let finished = packer
        .builder
        .into_inner()
        .and_then(|mut sink| sink.flush());
    finished.context(|| "send the tree".to_owned())?;
    Ok(())
}

impl<W: Write> Packer<W> {
    fn count(&mut self, stat: &Stat) -> Result<(), GuestError> {
        let limit = |what: &str| {
            failure(
                GuestErrorCode::LimitExceeded,
                format!("the tree has too many {what}"),
            )
        };
        self.entries_left = self
            .entries_left
            .checked_sub(1)
            .ok_or_else(|| limit("entries"))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            let size = u64::try_from(stat.st_size).unwrap_or(0);
            self.bytes_left = self
                .bytes_left
                .checked_sub(size)
                .ok_or_else(|| limit("bytes"))?;
        }
        Ok(())
    }

    fn directory(&mut self, directory: BorrowedFd<'_>, depth: usize) -> Result<(), GuestError> {
        if depth > DEPTH_MAX {
            return Err(failure(
                GuestErrorCode::LimitExceeded,
                "the tree is too deep",
            ));
        }
        let parent = self.path.len();
        for name in names(directory).context(|| format!("read {}", shown(&self.path)))? {
            if parent > 0 {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(&name);
            self.child(directory, &name, depth)?;
            self.path.truncate(parent);
        }
        Ok(())
    }

    fn child(&mut self, at: BorrowedFd<'_>, name: &[u8], depth: usize) -> Result<(), GuestError> {
        let what = || format!("read {}", shown(&self.path));
        let Ok(stat) = statat(at, name, AtFlags::SYMLINK_NOFOLLOW) else {
            // Gone since the directory was read.
            return Ok(());
        };
        let flags =
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let fd =
                    openat(at, name, flags | OFlags::DIRECTORY, Mode::empty()).context(what)?;
                self.count(&stat)?;
                self.append(header(&stat, EntryType::Directory, 0), io::empty())?;
                self.directory(fd.as_fd(), depth + 1)
            }
            FileType::RegularFile => {
                let file = File::from(openat(at, name, flags, Mode::empty()).context(what)?);
                let stat = fstat(&file).context(what)?;
                self.count(&stat)?;
                self.file(file, &stat)
            }
            FileType::Symlink => {
                let target = readlinkat(at, name, Vec::new()).context(what)?;
                self.count(&stat)?;
                let mut header = header(&stat, EntryType::Symlink, 0);
                let target = Path::new(OsStr::from_bytes(target.as_bytes())).to_owned();
                let path = Path::new(OsStr::from_bytes(&self.path)).to_owned();
                let sent = self.builder.append_link(&mut header, path, target);
                Ok(sent.context(|| format!("send {}", shown(&self.path)))?)
            }
            // Sockets, pipes and devices are no content.
            _ => Ok(()),
        }
    }

    fn file(&mut self, file: File, stat: &Stat) -> Result<(), GuestError> {
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        // Exactly the announced size, whatever happens to the file meanwhile.
        let content = file.chain(io::repeat(0)).take(size);
        Ok(self.append(header(stat, EntryType::Regular, size), content)?)
    }

    fn append(&mut self, mut header: Header, content: impl Read) -> Result<(), SysError> {
        let path = Path::new(OsStr::from_bytes(&self.path)).to_owned();
        let sent = self.builder.append_data(&mut header, path, content);
        sent.context(|| format!("send {}", shown(&self.path)))
    }
}

fn header(stat: &Stat, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(u64::from(stat.st_uid));
    header.set_gid(u64::from(stat.st_gid));
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header
}
