//! Files between a kept machine and this host. What comes out of a machine is hostile: it is written into a fresh folder beside its place and
//! renamed there once it is whole.
//!
//! Everything happens below folders that are held open, by names in them: who may write the folder of the target can spoil the copy, and lead it
//! nowhere else.
//!
//! Refused: absolute names, `..`, devices, sockets, hard links to anything outside, names twice, more than [`BYTES_MAX`] or [`ENTRIES_MAX`]
//! (`kiln_image::context::unpack_copy`). Left out: symbolic links that lead out of the copy, or nowhere in it. Set-user-id bits and owners do not come along.
//! Nothing is written through a link of this host, and nothing that is there is merged with: a file is replaced, a folder stays as it is.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use kiln_image::context::{self, Limits, UnpackError, open_beneath};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags, mkdirat, openat, openat2,
    renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

/// Most bytes of files in one copy out of a machine.
pub const BYTES_MAX: u64 = 32 << 30;
/// Most files, folders and links in one copy out of a machine.
pub const ENTRIES_MAX: u64 = 500_000;
/// Deepest folder that is looked at for links.
const DEPTH_MAX: usize = 1100;
/// Name under which what goes into a machine travels.
pub const PARCEL: &str = "x";

/// Takes a parcel at its place in a machine: root of the files, path, name to give it below a folder. Runs in the machine's own shell.
pub const TAKE_IN: &str = r#"set -eu
dst=$1/${2#/}
if [ -d "$dst" ]; then dst=${dst%/}/$3
else case $dst in */) mkdir -p -- "$dst"; dst=$dst$3;; esac; fi
dir=$(dirname -- "$dst")
[ -d "$dir" ] || { echo "there is no folder ${dir#"$1"} in the machine" >&2; exit 1; }
tmp=$(mktemp -d "$dir/.kiln-cp-XXXXXX")
trap 'rm -rf -- "$tmp"' EXIT
tar -xf - --no-same-owner -C "$tmp"
mv -fT -- "$tmp/x" "$dst"
"#;

/// Why a copy failed.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// It cannot be put there.
    #[error("{path:?}: {why}")]
    Place {
        /// Where.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// The machine does not give it, or stopped giving it.
    #[error("the machine does not give it: {0}")]
    Machine(String),
    /// What came is refused.
    #[error("what the machine sent is refused")]
    Refused(#[source] UnpackError),
    /// A file of this host could not be read or written.
    #[error("could not {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CopyError + 'a {
    move |source| CopyError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Where a copy goes: a name in a folder that is held open, so that nobody puts another folder in its place meanwhile.
#[derive(Debug)]
pub struct Target {
    /// The folder.
    pub folder: OwnedFd,
    /// The whole path, for people; its last part is the name in the folder.
    pub path: PathBuf,
}

impl Target {
    fn name(&self) -> Result<&OsStr, CopyError> {
        self.path.file_name().ok_or_else(|| CopyError::Place {
            path: self.path.clone(),
            why: "name the copy",
        })
    }
}

/// What was copied out of a machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Copied {
    /// Where it is.
    pub path: PathBuf,
    /// Files, folders and links.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Links that were left out.
    pub links_left_out: u64,
}

/// Where a copy called `name` goes that was asked to `dest`: below it when it is a folder.
///
/// # Errors
/// When there is no such place, or a folder of that name is there.
pub fn place(dest: &Path, name: &str) -> Result<PathBuf, CopyError> {
    let refused = |path: &Path, why| CopyError::Place {
        path: path.to_owned(),
        why,
    };
    let target = match dest.is_dir() {
        true if matches!(name, "" | "." | "..") || name.contains('/') => {
            return Err(refused(dest, "name the copy: it has no name of its own"));
        }
        true => dest.join(name),
        false if dest.as_os_str().as_encoded_bytes().ends_with(b"/") => {
            return Err(refused(dest, "there is no such folder"));
        }
        false => dest.to_owned(),
    };
    if target.file_name().is_none() {
        return Err(refused(&target, "name the copy"));
    }
    match parent_of(&target).is_dir() {
        true => Ok(target),
        false => Err(refused(&target, "the folder for it does not exist")),
    }
}

fn parent_of(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Opens a folder in another one, through no link.
fn open_folder(at: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(at, name, flags, Mode::empty())?)
}

/// A fresh folder beside a copy's place, gone with what is left in it.
struct Beside<'a> {
    parent: BorrowedFd<'a>,
    name: String,
}

impl<'a> Beside<'a> {
    fn new(target: &'a Target) -> io::Result<Self> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
        let name = format!(".kiln-copy-{}", hex::encode(random));
        let parent = target.folder.as_fd();
        mkdirat(parent, name.as_str(), Mode::RWXU)?;
        Ok(Self { parent, name })
    }

    /// Makes the copy's own folder in it; gives both.
    fn tree(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        let folder = open_folder(self.parent, &self.name)?;
        mkdirat(&folder, TREE, Mode::from_raw_mode(0o755))?;
        let tree = open_folder(folder.as_fd(), TREE)?;
        Ok((folder, tree))
    }
}

impl Drop for Beside<'_> {
    fn drop(&mut self) {
        // Through the folder that is open, whatever its path leads to by now.
        let parent = PathBuf::from(format!("/proc/self/fd/{}", self.parent.as_raw_fd()));
        let _shown_to_nobody = fs::remove_dir_all(parent.join(&self.name));
    }
}

/// Notes that the machine broke off, so that this is not taken for a broken archive.
struct Watched<R> {
    inner: R,
    broke: Option<String>,
    bytes: u64,
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buffer) {
            Ok(count) => {
                self.bytes = self.bytes.saturating_add(count as u64);
                Ok(count)
            }
            Err(error) => {
                self.broke = Some(error.to_string());
                Err(error)
            }
        }
    }
}

/// Writes a tar stream of a machine to its place: a folder, or the one file `file`.
///
/// # Errors
/// [`CopyError`]; then nothing is left of it.
pub fn take_out(tar: impl Read, target: &Target, file: Option<&str>) -> Result<Copied, CopyError> {
    let name = target.name()?;
    let beside = Beside::new(target).map_err(io_error("make a folder for", &target.path))?;
    let made = beside
        .tree()
        .and_then(|(folder, tree)| Ok((folder, tree.try_clone()?, tree)));
    let (folder, root, tree) = made.map_err(io_error("make a folder for", &target.path))?;
    let mut tar = Watched {
        inner: tar,
        broke: None,
        bytes: 0,
    };
    let limits = Limits {
        bytes_max: BYTES_MAX,
        entries_max: ENTRIES_MAX,
        ..Limits::default()
    };
    let unpacked = context::unpack_copy(&mut tar, root, limits);
    if let Some(why) = tar.broke {
        return Err(CopyError::Machine(why));
    }
    let done = match unpacked {
        Ok(done) => done,
        // A folder without anything in it is an archive without anything in it.
        Err(UnpackError::Archive(_))
            if file.is_none() && is_empty(tree.as_fd()) && tar.bytes <= EMPTY_MAX =>
        {
            context::Unpacked::default()
        }
        Err(error) => return Err(CopyError::Refused(error)),
    };
    let links_left_out = drop_links_that_lead_out(tree.as_fd())?;
    match file {
        None => put((&folder, TREE), (target, name), RenameFlags::NOREPLACE)?,
        Some(only) => {
            let is_file = kind_of(tree.as_fd(), only.as_ref()) == Some(FileType::RegularFile);
            if done.entries != 1 || !is_file {
                return Err(CopyError::Machine("it is no plain file".to_owned()));
            }
            gives_way(target, name)?;
            put((&tree, only), (target, name), RenameFlags::empty())?;
        }
    }
    Ok(Copied {
        path: target.path.clone(),
        entries: done.entries,
        bytes: done.bytes,
        links_left_out,
    })
}

/// Name of a copy's own folder while it grows.
const TREE: &str = "tree";
/// Two blocks of zeros and what pads them.
const EMPTY_MAX: u64 = 10 * 1024;

fn is_empty(tree: BorrowedFd<'_>) -> bool {
    list(tree, Path::new("")).is_ok_and(|found| found.is_empty())
}

/// What a name in a folder is; `None` when there is nothing.
fn kind_of(folder: BorrowedFd<'_>, name: &OsStr) -> Option<FileType> {
    let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    Some(FileType::from_raw_mode(stat.st_mode))
}

/// Looks whether what has the target's name may be replaced by a file: a file, or a link itself.
fn gives_way(target: &Target, name: &OsStr) -> Result<(), CopyError> {
    let why = match kind_of(target.folder.as_fd(), name) {
        None | Some(FileType::RegularFile | FileType::Symlink) => return Ok(()),
        Some(FileType::Directory) => "a folder is there",
        Some(_) => "a device, fifo or socket is there",
    };
    Err(CopyError::Place {
        path: target.path.clone(),
        why,
    })
}

fn put(
    (from, what): (&OwnedFd, &str),
    (target, name): (&Target, &OsStr),
    flags: RenameFlags,
) -> Result<(), CopyError> {
    match renameat_with(from, what, &target.folder, name, flags) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(CopyError::Place {
            path: target.path.clone(),
            why: "something is there: a folder is not merged with another",
        }),
        Err(error) => Err(io_error("make", &target.path)(error.into())),
    }
}

/// Removes symbolic links whose way leaves the tree, or ends nowhere in it; gives how many.
fn drop_links_that_lead_out(root: BorrowedFd<'_>) -> Result<u64, CopyError> {
    let mut links = Vec::new();
    find_links(root, Path::new(""), 0, &mut links)?;
    let leads_out = |link: &PathBuf| {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        loop {
            match openat2(root, link, flags, Mode::empty(), resolve) {
                Err(Errno::INTR | Errno::AGAIN) => {}
                opened => return opened.is_err(),
            }
        }
    };
    // All are judged before one is removed: a way through one that goes would be judged otherwise then.
    let bad: Vec<PathBuf> = links.into_iter().filter(leads_out).collect();
    for link in &bad {
        let (Some(below), Some(name)) = (link.parent(), link.file_name()) else {
            continue;
        };
        let folder = open_beneath(root, below.as_os_str().as_bytes(), true);
        folder
            .and_then(|folder| Ok(unlinkat(&folder, name, AtFlags::empty())?))
            .map_err(io_error("remove", link))?;
    }
    Ok(bad.len() as u64)
}

fn find_links(
    root: BorrowedFd<'_>,
    below: &Path,
    depth: usize,
    links: &mut Vec<PathBuf>,
) -> Result<(), CopyError> {
    if depth > DEPTH_MAX {
        return Err(CopyError::Machine("its folders are too deep".to_owned()));
    }
    for (name, kind) in list(root, below).map_err(io_error("read", below))? {
        match kind {
            FileType::Symlink => links.push(below.join(name)),
            FileType::Directory => find_links(root, &below.join(name), depth + 1, links)?,
            _ => {}
        }
    }
    Ok(())
}

/// Names in a folder of the tree, and what they are.
fn list(root: BorrowedFd<'_>, below: &Path) -> io::Result<Vec<(OsString, FileType)>> {
    let folder = open_beneath(root, below.as_os_str().as_bytes(), true)?;
    let mut found = Vec::new();
    for entry in Dir::read_from(&folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        let name = OsStr::from_bytes(name);
        // Not every file system says it here.
        let kind = match entry.file_type() {
            FileType::Unknown => kind_of(folder.as_fd(), name).unwrap_or(FileType::Unknown),
            kind => kind,
        };
        found.push((name.to_owned(), kind));
    }
    Ok(found)
}

/// Writes a file or folder of this host as a tar stream under the name [`PARCEL`]. Links are sent as links, but for the source itself.
///
/// # Errors
/// What cannot be read, or nobody takes.
pub fn give(source: &Path, out: impl Write) -> Result<(), CopyError> {
    let mut builder = tar::Builder::new(out);
    builder.follow_symlinks(false);
    let meta = fs::metadata(source).map_err(io_error("read", source))?;
    let given = if meta.is_dir() {
        builder.append_dir_all(PARCEL, source)
    } else if meta.is_file() {
        File::open(source).and_then(|mut file| builder.append_file(PARCEL, &mut file))
    } else {
        return Err(CopyError::Place {
            path: source.to_owned(),
            why: "it is neither a file nor a folder",
        });
    };
    let given = given
        .and_then(|()| builder.into_inner())
        .and_then(|mut out| out.flush());
    given.map_err(io_error("send", source))
}

#[cfg(test)]
mod tests;
