//! Unpacks a tar stream below a directory.
//!
//! A *plain* tree holds directories, files, symlinks and hard links. A *layer* of an image (OCI image specification,
//! `layer.md`) also holds devices, owners, set-uid bits, extended attributes and whiteouts.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_proto::msg::{GuestError, GuestErrorCode};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod,
    fchown, fsetxattr, futimens, linkat, makedev, mkdirat, mknodat, openat, statat, symlinkat,
    utimensat,
};
use rustix::io::Errno;
use tar::EntryType;

use super::reader::{Entry, Reader};
use super::walk::{Links, TreePath, Walker, remove_all, remove_children, shown};
use crate::error::{Context, failure};

/// Prefix of a file that removes another one of a lower layer.
const WHITEOUT: &[u8] = b".wh.";
/// File that hides everything its directory had in lower layers.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// How extended attributes are named in PAX headers.
const XATTR: &str = "SCHILY.xattr.";
/// Time of last modification in PAX headers, with a fraction.
const MTIME: &str = "mtime";
/// How GNU tar marks a sparse file in PAX headers. Its content is a map and pieces, which no image tool writes.
const SPARSE: &str = "GNU.sparse.";
/// Most bytes of one extended attribute.
const XATTR_MAX: usize = 64 * 1024;
/// Bytes copied at once.
const COPY_BUFFER: usize = 128 * 1024;
/// Most bytes behind the end of the archive.
const TRAILER_MAX: u64 = 1024 * 1024;

/// What a tree may hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Content {
    /// Directories, files and links.
    Plain,
    /// All that a filesystem holds.
    Layer,
}

/// Bounds of one tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Rules {
    pub(super) content: Content,
    pub(super) bytes_max: u64,
    pub(super) entries_max: u64,
}

/// What was unpacked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Counts {
    pub(super) entries: u64,
    pub(super) bytes: u64,
}

struct Extractor {
    walker: Walker,
    rules: Rules,
    counts: Counts,
    /// Paths of this layer, for opaque directories.
    made: HashSet<Vec<u8>>,
    /// Directories whose times are set when nothing more is put into them.
    directories: Vec<(TreePath, Timestamps)>,
    buffer: Vec<u8>,
}

/// What a tar header says about a file.
struct Meta {
    mode: Mode,
    owner: Option<(Uid, Gid)>,
    times: Timestamps,
    xattrs: Vec<(String, Vec<u8>)>,
}

/// What only PAX headers say.
#[derive(Default)]
struct Extras {
    time: Option<Timespec>,
    xattrs: Vec<(String, Vec<u8>)>,
}

/// Seconds since 1970 with an optional fraction; `None` for anything else.
fn pax_time(value: &[u8]) -> Option<Timespec> {
    let text = std::str::from_utf8(value).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let whole: i64 = seconds.parse().ok()?;
    let nanos: i64 = format!("{:0<9.9}", fraction).parse().ok()?;
    let before_1970 = seconds.starts_with('-') && nanos > 0;
    Some(Timespec {
        tv_sec: if before_1970 {
            whole.checked_sub(1)?
        } else {
            whole
        },
        tv_nsec: if before_1970 {
            1_000_000_000 - nanos
        } else {
            nanos
        },
    })
}

/// Unpacks `source` below `root`.
pub(super) fn extract(
    mut source: impl Read,
    root: OwnedFd,
    rules: Rules,
) -> Result<Counts, GuestError> {
    let links = match rules.content {
        Content::Plain => Links::Refuse,
        Content::Layer => Links::InRoot,
    };
    let mut extractor = Extractor {
        walker: Walker::new(root, links),
        rules,
        counts: Counts::default(),
        made: HashSet::new(),
        directories: Vec::new(),
        buffer: vec![0; COPY_BUFFER],
    };
    let mut reader = Reader::new(&mut source);
    while let Some(entry) = reader.next().context(|| "read the archive".to_owned())? {
        extractor.entry(&entry, &mut reader)?;
    }
    extractor.finish()?;
    // Tar pads its end; the sender may still be writing that.
    let rest = io::copy(&mut source.take(TRAILER_MAX), &mut io::sink());
    rest.context(|| "read the end of the archive".to_owned())?;
    Ok(extractor.counts)
}

fn limit(message: String) -> GuestError {
    failure(GuestErrorCode::LimitExceeded, message)
}

fn system(error: impl Into<io::Error>, what: &str, path: &[u8]) -> GuestError {
    let failed: Result<(), io::Error> = Err(error.into());
    match failed.context(|| format!("{what} {}", shown(path))) {
        Err(error) => error.into(),
        Ok(()) => failure(GuestErrorCode::System, what),
    }
}

impl Extractor {
    fn is_layer(&self) -> bool {
        self.rules.content == Content::Layer
    }

    fn entry(&mut self, entry: &Entry, content: &mut dyn Read) -> Result<(), GuestError> {
        self.counts.entries += 1;
        if self.counts.entries > self.rules.entries_max {
            return Err(limit(format!(
                "more than {} entries",
                self.rules.entries_max
            )));
        }
        let raw = &entry.path[..];
        let path = TreePath::parse(raw, self.is_layer())?;
        let meta = self.meta(entry)?;
        let Some((parent, name)) = path.split() else {
            return self.root_entry(entry.kind, &meta, raw);
        };
        if self.is_layer() {
            if let Some(hidden) = name.strip_prefix(WHITEOUT) {
                return self.whiteout(parent, name, hidden, raw);
            }
            self.remember(&path);
        }
        match entry.kind {
            EntryType::Directory => self.directory(&path, meta, raw),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.file(entry, content, parent, name, &meta)
            }
            EntryType::Symlink => self.symlink(parent, name, &entry.link, &meta, raw),
            EntryType::Link => self.hard_link(parent, name, &entry.link, raw),
            EntryType::Char | EntryType::Block | EntryType::Fifo if self.is_layer() => {
                let major = entry.header.device_major().ok().flatten().unwrap_or(0);
                let minor = entry.header.device_minor().ok().flatten().unwrap_or(0);
                self.node(entry.kind, (major, minor), parent, name, &meta, raw)
            }
            other => {
                let message = format!("{}: entries of type {other:?} are refused", shown(raw));
                Err(failure(GuestErrorCode::Invalid, message))
            }
        }
    }

    fn meta(&self, entry: &Entry) -> Result<Meta, GuestError> {
        let extras = self.extras(entry)?;
        let id = |value: u64| u32::try_from(value).unwrap_or(u32::MAX - 1);
        let bits = entry.header.mode();
        let bits = bits.map_err(|e| system(e, "read the header of", &entry.path))?;
        let time = extras.time.unwrap_or_else(|| Timespec {
            tv_sec: i64::try_from(entry.header.mtime().unwrap_or(0)).unwrap_or(0),
            tv_nsec: 0,
        });
        let owner = self
            .is_layer()
            .then(|| (Uid::from_raw(id(entry.uid)), Gid::from_raw(id(entry.gid))));
        Ok(Meta {
            mode: Mode::from_raw_mode(bits & 0o7777),
            owner,
            times: Timestamps {
                last_access: time,
                last_modification: time,
            },
            xattrs: extras.xattrs,
        })
    }

    /// Reads the PAX headers of an entry as far as nobody else does.
    fn extras(&self, entry: &Entry) -> Result<Extras, GuestError> {
        let mut extras = Extras::default();
        for (key, value) in &entry.records {
            let Ok(key) = std::str::from_utf8(key) else {
                continue;
            };
            if key == MTIME {
                extras.time = pax_time(value);
            } else if key.starts_with(SPARSE) {
                let path = shown(&entry.path);
                let message = format!("{path}: sparse files in PAX form are refused");
                return Err(failure(GuestErrorCode::Invalid, message));
            } else if let Some(name) = key.strip_prefix(XATTR)
                && self.is_layer()
                && value.len() <= XATTR_MAX
                && !name.starts_with("trusted.overlay.")
            {
                extras.xattrs.push((name.to_owned(), value.clone()));
            }
        }
        Ok(extras)
    }

    fn root_entry(&mut self, kind: EntryType, meta: &Meta, raw: &[u8]) -> Result<(), GuestError> {
        if kind != EntryType::Directory {
            return Err(failure(
                GuestErrorCode::UnsafePath,
                format!("{}: not a file's name", shown(raw)),
            ));
        }
        if self.is_layer() {
            let fd = openat(self.walker.root(), c".", READ_DIR, Mode::empty());
            fd.and_then(|fd| apply(fd.as_fd(), meta))
                .map_err(|e| system(e, "set up", raw))?;
        }
        Ok(())
    }

    fn remember(&mut self, path: &TreePath) {
        let components = path.components();
        for len in (1..=components.len()).rev() {
            // Once a directory is known, all above it are.
            if !self.made.insert(components[..len].join(&b'/')) {
                break;
            }
        }
    }

    fn whiteout(
        &mut self,
        parent: &[Vec<u8>],
        name: &[u8],
        hidden: &[u8],
        raw: &[u8],
    ) -> Result<(), GuestError> {
        let prefix = parent.join(&b'/');
        let made = std::mem::take(&mut self.made);
        let at = self.walker.open(parent, true)?;
        let removed = if name == OPAQUE {
            let ours = |child: &[u8]| {
                let path = if prefix.is_empty() {
                    child.to_vec()
                } else {
                    [&prefix, child].join(&b'/')
                };
                made.contains(&path)
            };
            openat(at, c".", READ_DIR, Mode::empty())
                .map_err(io::Error::from)
                .and_then(|fd| remove_children(fd.as_fd(), &mut { ours }))
        } else if hidden.is_empty()
            || matches!(hidden, b"." | b"..")
            || hidden.starts_with(WHITEOUT)
        {
            Ok(())
        } else {
            remove_all(at, hidden)
        };
        self.made = made;
        self.walker.forget();
        removed.map_err(|e| system(e, "apply whiteout", raw))
    }

    fn directory(&mut self, path: &TreePath, meta: Meta, raw: &[u8]) -> Result<(), GuestError> {
        let Some((parent, name)) = path.split() else {
            return Ok(());
        };
        let layer = self.is_layer();
        let at = self.walker.open(parent, true)?;
        let mut replaced = false;
        match mkdirat(at, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let there = statat(at, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|e| system(e, "look at", raw))?;
                if FileType::from_raw_mode(there.st_mode) != FileType::Directory {
                    if !layer {
                        return Err(failure(
                            GuestErrorCode::UnsafePath,
                            format!("{} comes twice", shown(raw)),
                        ));
                    }
                    remove_all(at, name).map_err(|e| system(e, "replace", raw))?;
                    mkdirat(at, name, Mode::from_raw_mode(0o755))
                        .map_err(|e| system(e, "make", raw))?;
                    replaced = true;
                }
            }
            Err(error) => return Err(system(error, "make", raw)),
        }
        let fd = openat(at, name, READ_DIR | OFlags::NOFOLLOW, Mode::empty());
        fd.and_then(|fd| apply(fd.as_fd(), &meta))
            .map_err(|e| system(e, "set up", raw))?;
        if replaced {
            self.walker.forget();
        }
        self.directories.push((path.clone(), meta.times));
        Ok(())
    }

    fn file(
        &mut self,
        entry: &Entry,
        content: &mut dyn Read,
        parent: &[Vec<u8>],
        name: &[u8],
        meta: &Meta,
    ) -> Result<(), GuestError> {
        let raw = &entry.path[..];
        let at = self.walker.open(parent, true)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let create = || openat(at, name, flags, meta.mode & FIRST_MODE);
        let fd = match create() {
            Err(Errno::EXIST) => {
                clear_way(at, name, self.rules.content).map_err(|e| system(e, "replace", raw))?;
                create()
            }
            other => other,
        };
        let mut file = File::from(fd.map_err(|e| system(e, "make", raw))?);
        match &entry.sparse {
            None => self.copy(content, &mut file, raw)?,
            Some(sparse) => {
                for (offset, len) in &sparse.pieces {
                    let at = file.seek(SeekFrom::Start(*offset));
                    at.map_err(|e| system(e, "write", raw))?;
                    self.copy(&mut content.take(*len), &mut file, raw)?;
                }
                let whole = file.set_len(sparse.size);
                whole.map_err(|e| system(e, "write", raw))?;
            }
        }
        apply(file.as_fd(), meta).map_err(|e| system(e, "set up", raw))?;
        futimens(&file, &meta.times).map_err(|e| system(e, "set the times of", raw))
    }

    fn copy(&mut self, from: &mut dyn Read, to: &mut File, raw: &[u8]) -> Result<(), GuestError> {
        loop {
            let count = from
                .read(&mut self.buffer)
                .map_err(|e| system(e, "receive", raw))?;
            if count == 0 {
                return Ok(());
            }
            self.counts.bytes += count as u64;
            if self.counts.bytes > self.rules.bytes_max {
                return Err(limit(format!(
                    "more than {} bytes of files",
                    self.rules.bytes_max
                )));
            }
            to.write_all(&self.buffer[..count])
                .map_err(|e| system(e, "write", raw))?;
        }
    }

    fn symlink(
        &mut self,
        parent: &[Vec<u8>],
        name: &[u8],
        target: &[u8],
        meta: &Meta,
        raw: &[u8],
    ) -> Result<(), GuestError> {
        let at = self.walker.open(parent, true)?;
        let make = || symlinkat(target, at, name);
        let made = match make() {
            Err(Errno::EXIST) => {
                clear_way(at, name, self.rules.content).map_err(|e| system(e, "replace", raw))?;
                make()
            }
            other => other,
        };
        made.map_err(|e| system(e, "link", raw))?;
        own_and_date(at, name, meta).map_err(|e| system(e, "set up", raw))
    }

    fn hard_link(
        &mut self,
        parent: &[Vec<u8>],
        name: &[u8],
        target: &[u8],
        raw: &[u8],
    ) -> Result<(), GuestError> {
        let target = TreePath::parse(target, self.is_layer())?;
        let Some((target_parent, target_name)) = target.split() else {
            return Err(failure(
                GuestErrorCode::UnsafePath,
                format!("{} links to nothing", shown(raw)),
            ));
        };
        let from = self.walker.open(target_parent, false)?.try_clone_to_owned();
        let from = from.map_err(|e| system(e, "link", raw))?;
        let there = statat(&from, target_name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| system(e, "link", raw))?;
        let kind = FileType::from_raw_mode(there.st_mode);
        if kind == FileType::Directory || (kind != FileType::RegularFile && !self.is_layer()) {
            return Err(failure(
                GuestErrorCode::UnsafePath,
                format!("{} links to no file", shown(raw)),
            ));
        }
        let same = target.joined() == TreePath::parse(raw, true)?.joined();
        if same {
            return Ok(());
        }
        let at = self.walker.open(parent, true)?;
        let make = || linkat(&from, target_name, at, name, AtFlags::empty());
        let made = match make() {
            // The same file by another way (`bin/x` and `usr/bin/x`): making room would remove it.
            Err(Errno::EXIST)
                if statat(at, name, AtFlags::SYMLINK_NOFOLLOW)
                    .is_ok_and(|own| (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)) =>
            {
                Ok(())
            }
            Err(Errno::EXIST) => {
                clear_way(at, name, self.rules.content).map_err(|e| system(e, "replace", raw))?;
                make()
            }
            other => other,
        };
        made.map_err(|e| system(e, "link", raw))
    }

    fn node(
        &mut self,
        kind: EntryType,
        (major, minor): (u32, u32),
        parent: &[Vec<u8>],
        name: &[u8],
        meta: &Meta,
        raw: &[u8],
    ) -> Result<(), GuestError> {
        let kind = match kind {
            EntryType::Char => FileType::CharacterDevice,
            EntryType::Block => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        let at = self.walker.open(parent, true)?;
        clear_way(at, name, self.rules.content).map_err(|e| system(e, "replace", raw))?;
        mknodat(at, name, kind, meta.mode, makedev(major, minor))
            .map_err(|e| system(e, "make", raw))?;
        own_and_date(at, name, meta).map_err(|e| system(e, "set up", raw))?;
        rustix::fs::chmodat(at, name, meta.mode, AtFlags::empty())
            .map_err(|e| system(e, "set up", raw))
    }

    /// Directories last, deepest last put, so that their times stay.
    fn finish(&mut self) -> Result<(), GuestError> {
        for (path, times) in std::mem::take(&mut self.directories).into_iter().rev() {
            let Some((parent, name)) = path.split() else {
                continue;
            };
            // A later entry may have replaced it; then it has no times of its own.
            if let Ok(at) = self.walker.open(parent, false) {
                let _replaced = utimensat(at, name, &times, AtFlags::SYMLINK_NOFOLLOW);
            }
        }
        Ok(())
    }
}

/// Bits of a mode that a new file may have from the start.
const FIRST_MODE: Mode = Mode::from_raw_mode(0o755);
const READ_DIR: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// Makes room for an entry that comes again. Only a layer may replace a directory.
fn clear_way(at: BorrowedFd<'_>, name: &[u8], content: Content) -> io::Result<()> {
    match content {
        Content::Layer => remove_all(at, name),
        Content::Plain => match rustix::fs::unlinkat(at, name, AtFlags::empty()) {
            Err(Errno::NOENT) | Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        },
    }
}

/// Owner first: it clears set-uid bits and capabilities.
fn apply(fd: BorrowedFd<'_>, meta: &Meta) -> rustix::io::Result<()> {
    if let Some((uid, gid)) = meta.owner {
        fchown(fd, Some(uid), Some(gid))?;
    }
    set_mode(fd, meta)?;
    for (name, value) in &meta.xattrs {
        match fsetxattr(fd, name.as_str(), value, XattrFlags::empty()) {
            // What this filesystem cannot hold is lost, as it is for every other unpacker.
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A file of a usual mode was made with it: one change of its inode less.
fn set_mode(fd: BorrowedFd<'_>, meta: &Meta) -> rustix::io::Result<()> {
    let made_with = rustix::fs::fstat(fd)?.st_mode & 0o7777;
    if made_with == meta.mode.as_raw_mode() {
        Ok(())
    } else {
        fchmod(fd, meta.mode)
    }
}

fn own_and_date(at: BorrowedFd<'_>, name: &[u8], meta: &Meta) -> rustix::io::Result<()> {
    if let Some((uid, gid)) = meta.owner {
        chownat(at, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    utimensat(at, name, &meta.times, AtFlags::SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod tests;
