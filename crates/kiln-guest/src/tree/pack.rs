//! Sends a file or a directory as a tar stream.
//!
//! The tree belongs to a tenant and may change while it is read: every file is opened without following links, sent
//! with the size it had, and padded with zeros when it shrank. One without a size is read first: files of /proc are made when they are read.

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
/// Most bytes of a file that says it has none.
const SIZELESS_MAX: u64 = 1 << 20;
/// What GNU tar calls a record of a long name.
const LONG: &[u8] = b"././@LongLink";

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
        let left = self.entries_left.checked_sub(1);
        self.entries_left = left.ok_or_else(|| too_many("entries"))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => self.count_bytes(u64::try_from(stat.st_size).unwrap_or(0)),
            _ => Ok(()),
        }
    }

    fn count_bytes(&mut self, bytes: u64) -> Result<(), GuestError> {
        let left = self.bytes_left.checked_sub(bytes);
        self.bytes_left = left.ok_or_else(|| too_many("bytes"))?;
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
                let field = &mut header.as_old_mut().linkname;
                let target = target.as_bytes();
                put_name(&mut self.builder, field, EntryType::GNULongLink, target)
                    .context(|| format!("send {}", shown(&self.path)))?;
                Ok(self.append(header, io::empty())?)
            }
            // Sockets, pipes and devices are no content.
            _ => Ok(()),
        }
    }

    fn file(&mut self, file: File, stat: &Stat) -> Result<(), GuestError> {
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if size == 0 {
            let content = self.sizeless(&file)?;
            let header = header(stat, EntryType::Regular, content.len() as u64);
            return Ok(self.append(header, &content[..])?);
        }
        // Exactly the announced size, whatever happens to the file meanwhile.
        let content = file.chain(io::repeat(0)).take(size);
        Ok(self.append(header(stat, EntryType::Regular, size), content)?)
    }

    /// What is in a file without a size. One that grows meanwhile is cut, one that has more and still no size is refused.
    fn sizeless(&mut self, file: &File) -> Result<Vec<u8>, GuestError> {
        let what = || format!("read {}", shown(&self.path));
        let mut content = Vec::new();
        let mut bounded = file.take(SIZELESS_MAX + 1);
        if bounded.read_to_end(&mut content).is_err() {
            // Some of them are read only at some times, or never: such a one is what its size says.
            content.clear();
        }
        if content.len() as u64 > SIZELESS_MAX {
            if fstat(file).context(what)?.st_size == 0 {
                let message = format!(
                    "{} has no size and more than {SIZELESS_MAX} bytes",
                    shown(&self.path)
                );
                return Err(failure(GuestErrorCode::LimitExceeded, message));
            }
            content.pop();
        }
        self.count_bytes(content.len() as u64)?;
        Ok(content)
    }

    fn append(&mut self, mut header: Header, content: impl Read) -> Result<(), SysError> {
        let field = &mut header.as_old_mut().name;
        let named = put_name(&mut self.builder, field, EntryType::GNULongName, &self.path);
        let sent = named.and_then(|()| {
            header.set_cksum();
            self.builder.append(&header, content)
        });
        sent.context(|| format!("send {}", shown(&self.path)))
    }
}

fn too_many(what: &str) -> GuestError {
    failure(
        GuestErrorCode::LimitExceeded,
        format!("the tree has too many {what}"),
    )
}

/// Writes a name into its field of a header; one that is too long there, as a record before it. Names are bytes: the builder's own way cuts long
/// ones as text, and fails where no text is left.
fn put_name(
    builder: &mut Builder<impl Write>,
    field: &mut [u8],
    long: EntryType,
    name: &[u8],
) -> io::Result<()> {
    let fits = name.len().min(field.len());
    field[..fits].copy_from_slice(&name[..fits]);
    if fits == name.len() {
        return Ok(());
    }
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..LONG.len()].copy_from_slice(LONG);
    header.set_entry_type(long);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    // It ends with a zero.
    header.set_size(name.len() as u64 + 1);
    header.set_cksum();
    builder.append(&header, name.chain(&[0_u8][..]))
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use tar::Archive;

    fn order(path: &Path) -> GetTree {
        GetTree {
            path: path.to_str().unwrap().to_owned(),
            bytes_max: 1 << 20,
            entries_max: 100,
        }
    }

    /// Names, link targets and contents of what is sent.
    fn sent(path: &Path) -> Vec<(Vec<u8>, Vec<u8>, Vec<u8>)> {
        let mut bytes = Vec::new();
        pack(&order(path), &mut bytes).unwrap();
        let mut found = Vec::new();
        for entry in Archive::new(&bytes[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path_bytes().into_owned();
            let link = entry.link_name_bytes().map(std::borrow::Cow::into_owned);
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            found.push((name, link.unwrap_or_default(), content));
        }
        found
    }

    #[test]
    fn names_are_bytes_of_any_length() {
        let dir = tempfile::tempdir().unwrap();
        // A name that is no text from its first byte, around the length that a header holds.
        for len in [1, 99, 100, 101, 200] {
            let (name, target) = (vec![0xff; len], vec![0xfe; len]);
            let file = dir.path().join(OsStr::from_bytes(&name));
            fs::write(&file, "x").unwrap();
            let link = dir.path().join("link");
            std::os::unix::fs::symlink(OsStr::from_bytes(&target), &link).unwrap();
            let want = [
                (b"link".to_vec(), target, Vec::new()),
                (name, Vec::new(), b"x".to_vec()),
            ];
            assert_eq!(sent(dir.path()), want, "{len}");
            fs::remove_file(file).unwrap();
            fs::remove_file(link).unwrap();
        }
    }

    #[test]
    fn files_without_a_size_are_read_first() {
        let version = Path::new("/proc/version");
        assert_eq!(fs::metadata(version).unwrap().len(), 0);
        let content = fs::read(version).unwrap();
        assert!(!content.is_empty());
        let want = [(b"version".to_vec(), Vec::new(), content)];
        assert_eq!(sent(version), want);
        let few = GetTree {
            bytes_max: 3,
            ..order(version)
        };
        let error = pack(&few, io::sink()).unwrap_err();
        assert_eq!(error.code, GuestErrorCode::LimitExceeded);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("empty"), "").unwrap();
        let want = [(b"empty".to_vec(), Vec::new(), Vec::new())];
        assert_eq!(sent(dir.path()), want);
    }
}
