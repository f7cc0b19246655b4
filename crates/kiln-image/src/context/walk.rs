//! Walking a source folder: order, limits, refusals.
//!
//! Order: the entries of a folder by the bytes of their names; a folder stands right before what is in it.
//! The walk never follows a symbolic link and keeps one open folder at a time.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use ::ignore::gitignore::Gitignore;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, open, readlinkat, statat};

use super::ContextError;
use super::error::{REFUSED_NAMED_MAX, Refused};
use super::ignore::{Ignores, Verdict, join};
use super::read::open_beneath;
use super::tree_digest::EntryKind;

/// Limits of a source tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Most files, folders and links.
    pub entries_max: u64,
    /// Most bytes of file content.
    pub bytes_max: u64,
    /// Longest path inside the folder, bytes.
    pub path_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries_max: 500_000,
            bytes_max: 8 * 1024 * 1024 * 1024,
            path_bytes_max: 4096,
        }
    }
}

/// One entry of a source tree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Path inside the folder, `/` between names.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
    /// The 12 permission bits.
    pub mode: u32,
    /// Time of last change, seconds since the Unix epoch.
    pub mtime_unix_s: u64,
}

fn folder(dir: &Path) -> Result<OwnedFd, ContextError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(dir, flags, Mode::empty()).map_err(|e| ContextError::Root {
        path: dir.to_owned(),
        source: e.into(),
    })
}

/// A source folder and the rules for it.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
    ignores: Ignores,
    limits: Limits,
}

impl Tree {
    /// Opens a folder and finds its ignore rules (see [`Ignores::of_folder`]).
    ///
    /// # Errors
    /// [`ContextError::Root`] when it is no readable folder, and the errors of the ignore files.
    pub fn open(
        dir: &Path,
        dockerfile: Option<&str>,
        extra_ignores: &[&str],
        limits: Limits,
    ) -> Result<Self, ContextError> {
        let root = folder(dir)?;
        let ignores = Ignores::of_folder(root.as_fd(), dockerfile, extra_ignores)?;
        Ok(Self {
            root,
            ignores,
            limits,
        })
    }

    /// Opens a folder that a command works on (see [`Ignores::of_run`]).
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_for_run(dir: &Path, limits: Limits) -> Result<Self, ContextError> {
        let root = folder(dir)?;
        let ignores = Ignores::of_run(root.as_fd())?;
        Ok(Self {
            root,
            ignores,
            limits,
        })
    }

    /// Opens a folder of which nothing stays behind: whoever made it left that out already. Version control data excepted.
    ///
    /// # Errors
    /// [`ContextError::Root`] when it is no readable folder.
    pub fn open_whole(dir: &Path, limits: Limits) -> Result<Self, ContextError> {
        Ok(Self {
            root: folder(dir)?,
            ignores: Ignores::nothing(),
            limits,
        })
    }

    /// Also sends these files (paths inside the folder), whatever the rules say: what a plan is made from must be where it is made.
    #[must_use]
    pub fn keeping(mut self, paths: impl IntoIterator<Item = String>) -> Self {
        self.ignores.keep(paths);
        self
    }

    /// The rules in force.
    #[must_use]
    pub fn ignores(&self) -> &Ignores {
        &self.ignores
    }

    pub(super) fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// Calls `each` for every entry that is sent, in order. `refuse` hears of those that cannot be.
    pub(super) fn walk(
        &self,
        each: &mut dyn FnMut(&Entry) -> Result<(), ContextError>,
        refuse: &mut dyn FnMut(Refused),
    ) -> Result<(), ContextError> {
        let mut count = Count::new(self.limits);
        let mut stack = vec![self.frame(String::new(), None)?];
        while let Some(frame) = stack.last_mut() {
            let Some(found) = frame.entries.next() else {
                stack.pop();
                continue;
            };
            let Some(name) = found.name.to_str().ok() else {
                let shown = join(&frame.path, &found.name.to_string_lossy());
                if self.verdict(&shown, found.is_folder(), &stack) != Verdict::Skip {
                    refuse(Refused::NotUtf8(shown));
                }
                continue;
            };
            let path = join(&frame.path, name);
            let verdict = self.verdict(&path, found.is_folder(), &stack);
            if verdict == Verdict::Skip {
                continue;
            }
            if path.len() > self.limits.path_bytes_max {
                refuse(Refused::TooLong(path.chars().take(100).collect()));
                continue;
            }
            let entry = match found.entry(path) {
                Ok(entry) => entry,
                Err(refused) => {
                    refuse(refused);
                    continue;
                }
            };
            let is_folder = found.is_folder();
            let path = entry.path.clone();
            let mut pending = Some(entry);
            if verdict == Verdict::Send {
                for entry in stack.iter_mut().filter_map(|frame| frame.pending.take()) {
                    count.one(&entry)?;
                    each(&entry)?;
                }
                if let Some(entry) = pending.take() {
                    count.one(&entry)?;
                    each(&entry)?;
                }
            }
            if is_folder {
                stack.push(self.frame(path, pending)?);
            }
        }
        Ok(())
    }

    fn verdict(&self, path: &str, is_folder: bool, stack: &[Frame]) -> Verdict {
        let git: Vec<_> = stack.iter().filter_map(|f| f.git.as_ref()).collect();
        self.ignores.verdict(path, is_folder, &git)
    }

    /// Lists one folder.
    fn frame(&self, path: String, pending: Option<Entry>) -> Result<Frame, ContextError> {
        let error = |source: std::io::Error| ContextError::Read {
            path: path.clone(),
            source,
        };
        let folder = open_beneath(self.root.as_fd(), path.as_bytes(), true).map_err(error)?;
        let mut entries = Vec::new();
        for entry in Dir::read_from(&folder).map_err(|e| error(e.into()))? {
            let entry = entry.map_err(|e| error(e.into()))?;
            let name = entry.file_name().to_owned();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            // One folder may hold more entries than the whole tree is allowed: stop before memory does.
            if entries.len() as u64 >= self.limits.entries_max.saturating_mul(2) {
                let max = self.limits.entries_max;
                return Err(ContextError::TooManyEntries { max });
            }
            entries.push(Found::read(&folder, name).map_err(|e| error(e.into()))?);
        }
        entries.sort_by(|a, b| a.name.to_bytes().cmp(b.name.to_bytes()));
        let git = self.ignores.of_subfolder(self.root.as_fd(), &path)?;
        Ok(Frame {
            path,
            entries: entries.into_iter(),
            git,
            pending,
        })
    }
}

/// Reads the whole folder's names once: how many entries and bytes it has, and that none is refused.
///
/// # Errors
/// [`ContextError::Refused`] with the first refused entries, limits, and read errors.
pub fn scan(tree: &Tree) -> Result<(u64, u64), ContextError> {
    let mut first = Vec::new();
    let mut total = 0_usize;
    let (mut entries, mut bytes) = (0, 0);
    tree.walk(
        &mut |entry| {
            entries += 1;
            if let EntryKind::File(size) = entry.kind {
                bytes += size;
            }
            Ok(())
        },
        &mut |refused| {
            total += 1;
            if first.len() < REFUSED_NAMED_MAX {
                first.push(refused);
            }
        },
    )?;
    match total {
        0 => Ok((entries, bytes)),
        total => Err(ContextError::Refused { first, total }),
    }
}

struct Count {
    limits: Limits,
    entries: u64,
    bytes: u64,
}

impl Count {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            entries: 0,
            bytes: 0,
        }
    }

    fn one(&mut self, entry: &Entry) -> Result<(), ContextError> {
        self.entries += 1;
        if let EntryKind::File(size) = entry.kind {
            self.bytes = self.bytes.saturating_add(size);
        }
        if self.entries > self.limits.entries_max {
            let max = self.limits.entries_max;
            return Err(ContextError::TooManyEntries { max });
        }
        if self.bytes > self.limits.bytes_max {
            let max = self.limits.bytes_max;
            return Err(ContextError::TooLarge { max });
        }
        Ok(())
    }
}

struct Frame {
    path: String,
    entries: std::vec::IntoIter<Found>,
    git: Option<Gitignore>,
    /// The folder itself, while it is ignored and nothing in it was sent.
    pending: Option<Entry>,
}

/// A directory entry as the kernel described it.
struct Found {
    name: std::ffi::CString,
    file_type: FileType,
    mode: u32,
    size: u64,
    mtime_unix_s: u64,
    target: Option<std::ffi::CString>,
}

impl Found {
    fn read(folder: &OwnedFd, name: std::ffi::CString) -> rustix::io::Result<Self> {
        let stat = statat(folder, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let target = match file_type {
            FileType::Symlink => Some(readlinkat(folder, &name, Vec::new())?),
            _ => None,
        };
        Ok(Self {
            name,
            file_type,
            mode: stat.st_mode & 0o7777,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mtime_unix_s: u64::try_from(stat.st_mtime).unwrap_or(0),
            target,
        })
    }

    fn is_folder(&self) -> bool {
        self.file_type == FileType::Directory
    }

    fn entry(&self, path: String) -> Result<Entry, Refused> {
        let special = |path: String, what| Err(Refused::Special(path, what));
        let kind = match self.file_type {
            FileType::Directory => EntryKind::Folder,
            FileType::RegularFile => EntryKind::File(self.size),
            FileType::Symlink => {
                let target = self.target.as_deref().unwrap_or_default();
                let Ok(target) = target.to_str() else {
                    return Err(Refused::NotUtf8(path));
                };
                if leads_out(&path, target) {
                    return Err(Refused::Escapes(path, target.to_owned()));
                }
                EntryKind::Link(target.to_owned())
            }
            FileType::Fifo => return special(path, "fifo"),
            FileType::Socket => return special(path, "socket"),
            FileType::CharacterDevice | FileType::BlockDevice => return special(path, "device"),
            _ => return special(path, "special file"),
        };
        Ok(Entry {
            path,
            kind,
            mode: self.mode,
            mtime_unix_s: self.mtime_unix_s,
        })
    }
}

/// Whether a link at `path` leads out of the tree, going by the names alone.
fn leads_out(path: &str, target: &str) -> bool {
    if target.starts_with('/') {
        return true;
    }
    let mut depth = path.matches('/').count();
    for name in target.split('/') {
        match name {
            "" | "." => {}
            ".." if depth == 0 => return true,
            ".." => depth -= 1,
            _ => depth += 1,
        }
    }
    false
}
