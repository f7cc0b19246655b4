//! Files between a kept machine and this host. What comes out of a machine is hostile: it is written into a fresh folder beside its place and
//! renamed there once it is whole.
//!
//! Refused: absolute names, `..`, devices, sockets, hard links to anything outside, names twice, more than [`BYTES_MAX`] or [`ENTRIES_MAX`]
//! (`kiln_image::context::unpack`). Left out: symbolic links that lead out of the copy, or nowhere in it. Set-user-id bits and owners do not come along.
//! Nothing is written through a link of this host, and nothing that is there is merged with: a file is replaced, a folder stays as it is.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use kiln_image::context::{self, Limits, UnpackError};
use rustix::fs::{CWD, Mode, OFlags, RenameFlags, ResolveFlags, openat2, renameat_with};
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

/// A fresh folder beside a copy's place, gone with what is left in it.
struct Beside(PathBuf);

impl Beside {
    fn new(parent: &Path) -> Result<Self, CopyError> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| {
            io_error("name a folder in", parent)(io::Error::other(error.to_string()))
        })?;
        let path = parent.join(format!(".kiln-copy-{}", hex::encode(random)));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(io_error("make", &path))?;
        Ok(Self(path))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _shown_to_nobody = fs::remove_dir_all(&self.0);
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
pub fn take_out(tar: impl Read, target: &Path, file: Option<&str>) -> Result<Copied, CopyError> {
    let beside = Beside::new(parent_of(target))?;
    let tree = beside.0.join("tree");
    DirBuilder::new()
        .mode(0o755)
        .create(&tree)
        .map_err(io_error("make", &tree))?;
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
    let unpacked = context::unpack(&mut tar, &tree, limits);
    if let Some(why) = tar.broke {
        return Err(CopyError::Machine(why));
    }
    let done = match unpacked {
        Ok(done) => done,
        // A folder without anything in it is an archive without anything in it.
        Err(UnpackError::Archive(_))
            if file.is_none() && is_empty(&tree) && tar.bytes <= EMPTY_MAX =>
        {
            context::Unpacked::default()
        }
        Err(error) => return Err(CopyError::Refused(error)),
    };
    let links_left_out = drop_links_that_lead_out(&tree)?;
    match file {
        None => put(&tree, target, RenameFlags::NOREPLACE)?,
        Some(name) => {
            let only = tree.join(name);
            let is_file = fs::symlink_metadata(&only).is_ok_and(|meta| meta.is_file());
            if done.entries != 1 || !is_file {
                return Err(CopyError::Machine("it is no plain file".to_owned()));
            }
            if target.is_dir() && !target.is_symlink() {
                return Err(CopyError::Place {
                    path: target.to_owned(),
                    why: "a folder is there",
                });
            }
            put(&only, target, RenameFlags::empty())?;
        }
    }
    Ok(Copied {
        path: target.to_owned(),
        entries: done.entries,
        bytes: done.bytes,
        links_left_out,
    })
}

/// Two blocks of zeros and what pads them.
const EMPTY_MAX: u64 = 10 * 1024;

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}

fn put(from: &Path, target: &Path, flags: RenameFlags) -> Result<(), CopyError> {
    match renameat_with(CWD, from, CWD, target, flags) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(CopyError::Place {
            path: target.to_owned(),
            why: "something is there: a folder is not merged with another",
        }),
        Err(error) => Err(io_error("make", target)(error.into())),
    }
}

/// Removes symbolic links whose way leaves the tree, or ends nowhere in it; gives how many.
fn drop_links_that_lead_out(tree: &Path) -> Result<u64, CopyError> {
    let root = File::open(tree).map_err(io_error("open", tree))?;
    let mut links = Vec::new();
    find_links(tree, Path::new(""), 0, &mut links)?;
    let leads_out = |link: &PathBuf| {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        loop {
            match openat2(root.as_fd(), link, flags, Mode::empty(), resolve) {
                Err(Errno::INTR | Errno::AGAIN) => {}
                opened => return opened.is_err(),
            }
        }
    };
    // All are judged before one is removed: a way through one that goes would be judged otherwise then.
    let bad: Vec<PathBuf> = links.into_iter().filter(leads_out).collect();
    for link in &bad {
        let path = tree.join(link);
        fs::remove_file(&path).map_err(io_error("remove", &path))?;
    }
    Ok(bad.len() as u64)
}

/// The tree is this process's own: nobody else writes into it.
fn find_links(
    tree: &Path,
    below: &Path,
    depth: usize,
    links: &mut Vec<PathBuf>,
) -> Result<(), CopyError> {
    let dir = tree.join(below);
    if depth > DEPTH_MAX {
        return Err(CopyError::Machine("its folders are too deep".to_owned()));
    }
    for entry in fs::read_dir(&dir).map_err(io_error("read", &dir))? {
        let entry = entry.map_err(io_error("read", &dir))?;
        let kind = entry.file_type().map_err(io_error("read", &dir))?;
        let path = below.join(entry.file_name());
        if kind.is_symlink() {
            links.push(path);
        } else if kind.is_dir() {
            find_links(tree, &path, depth + 1, links)?;
        }
    }
    Ok(())
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
