//! An uploaded source archive, written into an empty folder of this host. The archive is hostile until it has been read to its end.
//!
//! Formats: tar (ustar, GNU, PAX), plain or compressed with gzip or zstd, told by its first bytes. Nothing is ever written through a
//! symbolic link: links are made last, and every path is opened name by name beneath the folder. Where a link leads is judged
//! when the folder is read as a source ([`super::Tree`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, Mode, OFlags, Timespec, Timestamps, chmodat, fchmod, futimens, mkdirat, openat,
    symlinkat,
};
use rustix::io::Errno;

use super::gauge::Gauged;
use super::read::open_beneath;
use super::walk::Limits;

/// Buffer for copies of a file, bytes.
const COPY_BUFFER_BYTES: usize = 256 * 1024;
/// Longest name of one file or folder that Linux takes, bytes.
const NAME_BYTES_MAX: usize = 255;
/// Compressed archives whose content is larger than this many times their own size are refused, beyond [`RATIO_FREE_BYTES`].
const RATIO_MAX: u64 = 200;
/// Content that is taken at any ratio, bytes.
const RATIO_FREE_BYTES: u64 = 64 << 20;

/// What was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Unpacked {
    /// Files, folders and links.
    pub entries: u64,
    /// Bytes of file content.
    pub bytes: u64,
}

/// Why an archive is not taken.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// It is no tar archive, is cut short, or its compression is broken.
    #[error("the source is not a whole tar archive (plain, gzip or zstd)")]
    Archive(#[source] io::Error),
    /// An entry that no source may have.
    #[error("{path:?} in the source archive: {why}")]
    Entry {
        /// Its name, shortened.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Too many entries.
    #[error("the source archive has more than {max} entries")]
    TooManyEntries {
        /// The limit.
        max: u64,
    },
    /// Too many bytes.
    #[error("the source archive holds more than {max} bytes")]
    TooLarge {
        /// The limit.
        max: u64,
    },
    /// A small archive that unpacks to very much.
    #[error("the source archive unpacks to more than {RATIO_MAX} times its own size")]
    Bomb,
    /// This host could not write it.
    #[error("write {path:?} of the source")]
    Write {
        /// Path inside the folder.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl UnpackError {
    /// Whose fault: decides the exit code.
    #[must_use]
    pub fn class(&self) -> kiln_core::FailureClass {
        match self {
            Self::Write { .. } => kiln_core::FailureClass::Infrastructure,
            _ => kiln_core::FailureClass::Usage,
        }
    }
}

/// Counts compressed bytes as they are read, so that a bomb is noticed while it goes off.
struct Counted<R> {
    inner: R,
    read: std::rc::Rc<std::cell::Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.read.set(self.read.get().saturating_add(got as u64));
        Ok(got)
    }
}

/// Writes an archive into the empty folder `dir`.
///
/// # Errors
/// See [`UnpackError`]; what was written until then stays for the caller to remove.
pub fn unpack(archive: impl Read, dir: &Path, limits: Limits) -> Result<Unpacked, UnpackError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(dir, flags, Mode::empty()).map_err(|error| UnpackError::Write {
        path: dir.display().to_string(),
        source: error.into(),
    })?;
    write(archive, root, limits, false)
}

/// Writes an archive that is no source into an empty folder that is held open: names may be any bytes, since nobody plans with them.
///
/// # Errors
/// As [`unpack`].
pub fn unpack_copy(
    archive: impl Read,
    root: OwnedFd,
    limits: Limits,
) -> Result<Unpacked, UnpackError> {
    write(archive, root, limits, true)
}

fn write(
    archive: impl Read,
    root: OwnedFd,
    limits: Limits,
    any_names: bool,
) -> Result<Unpacked, UnpackError> {
    let read = std::rc::Rc::new(std::cell::Cell::new(0));
    let counted = Counted {
        inner: archive,
        read: std::rc::Rc::clone(&read),
    };
    let mut source = BufReader::with_capacity(COPY_BUFFER_BYTES, counted);
    let first = io::BufRead::fill_buf(&mut source).map_err(UnpackError::Archive)?;
    let mut writer = Writer {
        root,
        last: None,
        limits,
        any_names,
        done: Unpacked::default(),
        links: BTreeMap::new(),
        compressed: None,
    };
    match first {
        [0x1f, 0x8b, ..] => {
            writer.compressed = Some(read);
            writer.archive(flate2::read::MultiGzDecoder::new(source))?;
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            writer.compressed = Some(read);
            let decoder =
                zstd::stream::read::Decoder::with_buffer(source).map_err(UnpackError::Archive)?;
            writer.archive(decoder)?;
        }
        _ => writer.archive(source)?,
    }
    writer.make_links()?;
    Ok(writer.done)
}

struct Writer {
    root: OwnedFd,
    last: Option<(Box<[u8]>, OwnedFd)>,
    limits: Limits,
    /// Also those that are not UTF-8.
    any_names: bool,
    done: Unpacked,
    links: BTreeMap<Vec<u8>, Vec<u8>>,
    compressed: Option<std::rc::Rc<std::cell::Cell<u64>>>,
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).chars().take(120).collect()
}

fn refuse(path: &[u8], why: &'static str) -> UnpackError {
    UnpackError::Entry {
        path: shown(path),
        why,
    }
}

/// The path without `./` and trailing slashes; empty for the folder itself.
fn cleaned(path: &[u8], limits: Limits) -> Result<Vec<u8>, UnpackError> {
    if path.first() == Some(&b'/') {
        return Err(refuse(path, "an absolute path"));
    }
    let mut names = Vec::new();
    for name in path.split(|&b| b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(refuse(path, "a path with ..")),
            name if name.contains(&0) => return Err(refuse(path, "a name with a zero byte")),
            name if name.len() > NAME_BYTES_MAX => {
                return Err(refuse(path, "a name that is too long"));
            }
            name => names.push(name),
        }
    }
    let joined = names.join(&b'/');
    if joined.len() > limits.path_bytes_max {
        return Err(refuse(path, "a path that is too long"));
    }
    Ok(joined)
}

impl Writer {
    fn archive(&mut self, source: impl Read) -> Result<(), UnpackError> {
        let (source, gauge) = Gauged::new(source);
        let mut archive = tar::Archive::new(source);
        let mut entries = archive.entries().map_err(UnpackError::Archive)?;
        let mut any = false;
        loop {
            gauge.head();
            let Some(entry) = entries.next() else { break };
            let entry = entry.map_err(UnpackError::Archive)?;
            any = true;
            // What is read of it is counted as it grows; what is not is part of the next head.
            gauge.content();
            self.entry(entry)?;
        }
        // An empty stream reads as an archive without entries: an upload that was cut at its start.
        match any {
            true => Ok(()),
            false => Err(UnpackError::Archive(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    fn entry(&mut self, mut entry: tar::Entry<'_, impl Read>) -> Result<(), UnpackError> {
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            return self.count(b"");
        }
        let path = cleaned(&entry.path_bytes(), self.limits)?;
        self.count(&path)?;
        let mode = entry.header().mode().map_err(UnpackError::Archive)? & 0o777;
        let mtime = entry.header().mtime().map_err(UnpackError::Archive)?;
        match kind {
            tar::EntryType::Directory => self.folder(&path, mode),
            _ if path.is_empty() => Err(refuse(b".", "the folder itself is no folder")),
            tar::EntryType::Regular | tar::EntryType::Continuous => {
                self.file(&path, mode, mtime, &mut entry)
            }
            tar::EntryType::Symlink => {
                let target = entry.link_name_bytes().map(|t| t.into_owned());
                let target = target.filter(|t| !t.is_empty() && !t.contains(&0));
                let target = target.ok_or_else(|| refuse(&path, "a link to nothing"))?;
                if target.len() > self.limits.path_bytes_max {
                    return Err(refuse(&path, "a link to a path that is too long"));
                }
                self.parents(&path)?;
                match self.links.insert(path.clone(), target) {
                    None => Ok(()),
                    Some(_) => Err(refuse(&path, "named twice")),
                }
            }
            tar::EntryType::Link => {
                let from = entry.link_name_bytes().map(|t| t.into_owned());
                let from = cleaned(&from.unwrap_or_default(), self.limits)?;
                self.hard_link(&from, &path, mode, mtime)
            }
            _ => Err(refuse(&path, "neither a file, a folder nor a link")),
        }
    }

    fn count(&mut self, path: &[u8]) -> Result<(), UnpackError> {
        self.done.entries += 1;
        if self.done.entries > self.limits.entries_max {
            return Err(UnpackError::TooManyEntries {
                max: self.limits.entries_max,
            });
        }
        match self.any_names || std::str::from_utf8(path).is_ok() {
            true => Ok(()),
            false => Err(refuse(path, "the name is not UTF-8")),
        }
    }

    fn grow(&mut self, bytes: u64) -> Result<(), UnpackError> {
        self.done.bytes = self.done.bytes.saturating_add(bytes);
        if self.done.bytes > self.limits.bytes_max {
            return Err(UnpackError::TooLarge {
                max: self.limits.bytes_max,
            });
        }
        if let Some(read) = &self.compressed
            && self.done.bytes > RATIO_FREE_BYTES
            && self.done.bytes / RATIO_MAX > read.get()
        {
            return Err(UnpackError::Bomb);
        }
        Ok(())
    }

    /// Runs `work` with the parent folder of `path` and its last name; missing parents are made.
    fn at<T>(
        &mut self,
        path: &[u8],
        work: impl FnOnce(&OwnedFd, &[u8]) -> rustix::io::Result<T>,
    ) -> Result<T, UnpackError> {
        let (folder, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&path[..0], path),
        };
        let opened = match self.last.take() {
            Some((last, fd)) if *last == *folder => fd,
            _ => match open_beneath(self.root.as_fd(), folder, true) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.parents(path)?;
                    open_beneath(self.root.as_fd(), folder, true)
                }
                opened => opened,
            }
            .map_err(|error| write_error(path, error))?,
        };
        let done = work(&opened, name).map_err(|error| write_error(path, error.into()));
        self.last = Some((folder.into(), opened));
        done
    }

    fn parents(&mut self, path: &[u8]) -> Result<(), UnpackError> {
        for (at, _) in path.iter().enumerate().filter(|(_, b)| **b == b'/') {
            self.folder(&path[..at], 0o755)?;
        }
        Ok(())
    }

    fn folder(&mut self, path: &[u8], mode: u32) -> Result<(), UnpackError> {
        if path.is_empty() {
            return Ok(());
        }
        if self.links.contains_key(path) {
            return Err(refuse(path, "below a link, or named twice"));
        }
        // A folder that its owner cannot enter could not be read back here.
        let mode = Mode::from_raw_mode(mode | 0o700);
        self.at(path, |parent, name| {
            match mkdirat(parent, name, mode) {
                Err(Errno::EXIST) => openat(
                    parent,
                    name,
                    OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )
                .map(drop)?,
                made => made?,
            }
            chmodat(parent, name, mode, AtFlags::empty())
        })
    }

    fn file(
        &mut self,
        path: &[u8],
        mode: u32,
        mtime: u64,
        content: &mut dyn Read,
    ) -> Result<(), UnpackError> {
        let mut file = self.new_file(path, mode)?;
        let mut buffer = vec![0; COPY_BUFFER_BYTES];
        loop {
            let got = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(UnpackError::Archive(error)),
            };
            self.grow(got as u64)?;
            file.write_all(&buffer[..got])
                .map_err(|error| write_error(path, error))?;
        }
        set_time(&file, path, mtime)
    }

    fn new_file(&mut self, path: &[u8], mode: u32) -> Result<File, UnpackError> {
        if self.links.contains_key(path) {
            return Err(refuse(path, "named twice"));
        }
        let mode = Mode::from_raw_mode(mode | 0o400);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = self.at(path, |parent, name| {
            let file = openat(parent, name, flags, mode)?;
            fchmod(&file, mode)?;
            Ok(File::from(file))
        });
        match made {
            Err(UnpackError::Write { source, .. })
                if source.kind() == io::ErrorKind::AlreadyExists =>
            {
                Err(refuse(path, "named twice"))
            }
            made => made,
        }
    }

    fn hard_link(
        &mut self,
        from: &[u8],
        path: &[u8],
        mode: u32,
        mtime: u64,
    ) -> Result<(), UnpackError> {
        let opened = open_beneath(self.root.as_fd(), from, false).map_err(|_| {
            refuse(
                path,
                "a link to a file that is not in the archive before it",
            )
        })?;
        let mut source = File::from(opened);
        if !source.metadata().is_ok_and(|meta| meta.is_file()) {
            return Err(refuse(path, "a hard link to something that is no file"));
        }
        self.file(path, mode, mtime, &mut source)
    }

    fn make_links(&mut self) -> Result<(), UnpackError> {
        for (path, target) in std::mem::take(&mut self.links) {
            let made = self.at(&path, |parent, name| symlinkat(&*target, parent, name));
            match made {
                Err(UnpackError::Write { source, .. })
                    if source.kind() == io::ErrorKind::AlreadyExists =>
                {
                    return Err(refuse(&path, "named twice"));
                }
                made => made?,
            }
        }
        Ok(())
    }
}

fn set_time(file: &File, path: &[u8], mtime: u64) -> Result<(), UnpackError> {
    let time = Timespec {
        tv_sec: i64::try_from(mtime).unwrap_or(i64::MAX / 2),
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    match futimens(file, &times) {
        // A time the file system cannot hold is no reason to refuse a file.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(error) => Err(write_error(path, error.into())),
    }
}

fn write_error(path: &[u8], source: io::Error) -> UnpackError {
    match source.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::LOOP | Errno::NOTDIR | Errno::XDEV) => {
            refuse(path, "below something that is no folder")
        }
        _ => UnpackError::Write {
            path: shown(path),
            source,
        },
    }
}

#[cfg(test)]
mod tests;
