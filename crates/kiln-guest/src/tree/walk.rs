//! Opens directories below a root so that no path leads out of it.
//!
//! Two ways, for two kinds of trees. In a *plain* tree no directory on the way may be a symlink: each component is
//! opened from the one before, without following. In an image *layer* symlinks are part of the filesystem
//! (`/bin -> usr/bin`, `/var/run -> /run`) and are followed as the finished root would, also to a directory that is yet to
//! be made. The kernel never follows one here: each is read, and its target walked from the root like any other path.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_proto::msg::{GuestError, GuestErrorCode};
use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, openat, readlinkat, unlinkat};
use rustix::io::Errno;

use crate::error::{Context, failure};

/// Longest name of one file.
const COMPONENT_MAX: usize = 255;
/// Most components of one path.
const DEPTH_MAX: usize = 2048;
/// Most symlinks followed on one path, as in the kernel.
const LINKS_MAX: usize = 40;

/// How directories on the way are opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Links {
    /// Refused.
    Refuse,
    /// Followed as if the tree were `/`.
    InRoot,
}

/// A path in a tree, checked: no `..`, no zero byte, nothing too long. `.` and doubled slashes are gone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct TreePath {
    components: Vec<Vec<u8>>,
}

/// A path as a message can show it.
pub(super) fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    format!("{:?}", text.chars().take(200).collect::<String>())
}

fn unsafe_path(bytes: &[u8], why: &str) -> GuestError {
    failure(
        GuestErrorCode::UnsafePath,
        format!("{}: {why}", shown(bytes)),
    )
}

impl TreePath {
    /// Checks a path; an absolute one is taken as relative to the root when `absolute` is true.
    pub(super) fn parse(bytes: &[u8], absolute: bool) -> Result<Self, GuestError> {
        if bytes.starts_with(b"/") && !absolute {
            return Err(unsafe_path(bytes, "an absolute path"));
        }
        let mut components = Vec::new();
        for part in bytes.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(unsafe_path(bytes, "a path with ..")),
                part if part.len() > COMPONENT_MAX || part.contains(&0) => {
                    return Err(unsafe_path(bytes, "a name that no filesystem takes"));
                }
                part => components.push(part.to_vec()),
            }
            if components.len() > DEPTH_MAX {
                return Err(unsafe_path(bytes, "too deep"));
            }
        }
        Ok(Self { components })
    }

    /// The last component and the path before it; `None` for the root itself.
    pub(super) fn split(&self) -> Option<(&[Vec<u8>], &[u8])> {
        let (name, parent) = self.components.split_last()?;
        Some((parent, name))
    }

    /// Its components.
    pub(super) fn components(&self) -> &[Vec<u8>] {
        &self.components
    }

    /// The path with slashes.
    pub(super) fn joined(&self) -> Vec<u8> {
        self.components.join(&b'/')
    }
}

/// Opens directories below one root, keeping those of the last path open.
#[derive(Debug)]
pub(super) struct Walker {
    root: OwnedFd,
    links: Links,
    /// Components of the last path and the directories they led to.
    stack: Vec<(Vec<u8>, OwnedFd)>,
}

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Walker {
    /// Walks below `root`.
    pub(super) fn new(root: OwnedFd, links: Links) -> Self {
        Self {
            root,
            links,
            stack: Vec::new(),
        }
    }

    /// The root itself.
    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Forgets open directories: something on the way was replaced.
    pub(super) fn forget(&mut self) {
        self.stack.clear();
    }

    /// The directory with these components. Missing ones are made when `create` is true.
    pub(super) fn open(
        &mut self,
        path: &[Vec<u8>],
        create: bool,
    ) -> Result<BorrowedFd<'_>, GuestError> {
        let kept = self
            .stack
            .iter()
            .zip(path)
            .take_while(|((have, _), want)| have == *want)
            .count();
        self.stack.truncate(kept);
        for depth in kept..path.len() {
            let opened = self.step(path, depth, create);
            let opened = opened.map_err(|error| refused(path, error))?;
            self.stack.push((path[depth].clone(), opened));
        }
        Ok(self
            .stack
            .last()
            .map_or(self.root.as_fd(), |(_, fd)| fd.as_fd()))
    }

    fn step(&self, path: &[Vec<u8>], depth: usize, create: bool) -> Result<OwnedFd, Errno> {
        let at = self
            .stack
            .last()
            .map_or(self.root.as_fd(), |(_, fd)| fd.as_fd());
        match enter(at, &path[depth], create) {
            Err(Errno::NOTDIR | Errno::LOOP) if self.links == Links::InRoot => {
                self.follow(&path[..=depth], create)
            }
            other => other,
        }
    }

    /// Opens a directory whose way leads over symlinks, as if the tree were `/`. `..` goes back to the directory that
    /// the last step came from, so nothing leads above the root.
    fn follow(&self, path: &[Vec<u8>], create: bool) -> Result<OwnedFd, Errno> {
        let mut left: Vec<Vec<u8>> = path.iter().rev().cloned().collect();
        let mut way: Vec<OwnedFd> = Vec::new();
        let mut links = 0;
        while let Some(name) = left.pop() {
            if name == b".." {
                way.pop();
                continue;
            }
            let here = way.last().map_or(self.root.as_fd(), |fd| fd.as_fd());
            match enter(here, &name, create) {
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    links += 1;
                    let target = match readlinkat(here, &name[..], Vec::new()) {
                        Ok(_) if links > LINKS_MAX => return Err(Errno::LOOP),
                        Ok(target) => target.into_bytes(),
                        Err(Errno::INVAL) => return Err(Errno::NOTDIR),
                        Err(error) => return Err(error),
                    };
                    if target.starts_with(b"/") {
                        way.clear();
                    }
                    let parts = target.split(|byte| *byte == b'/').rev();
                    left.extend(
                        parts
                            .filter(|part| !matches!(*part, b"" | b"."))
                            .map(<[u8]>::to_vec),
                    );
                }
                opened => way.push(opened?),
            }
            if left.len() + way.len() > 2 * DEPTH_MAX {
                return Err(Errno::NAMETOOLONG);
            }
        }
        match way.pop() {
            Some(fd) => Ok(fd),
            None => rustix::io::fcntl_dupfd_cloexec(&self.root, 0),
        }
    }
}

/// Opens a directory in another one, without following; a missing one is made when `create` is true.
fn enter(at: BorrowedFd<'_>, name: &[u8], create: bool) -> Result<OwnedFd, Errno> {
    let open = || openat(at, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty());
    match open() {
        Err(Errno::NOENT) if create => {
            mkdirat(at, name, Mode::from_raw_mode(0o755))?;
            open()
        }
        other => other,
    }
}

fn refused(path: &[Vec<u8>], error: Errno) -> GuestError {
    let path = path.join(&b'/');
    match error {
        Errno::NOTDIR | Errno::LOOP => {
            unsafe_path(&path, "a file or link stands where a directory must be")
        }
        error => {
            let failed: Result<(), Errno> = Err(error);
            match failed.context(|| format!("open {}", shown(&path))) {
                Err(error) => error.into(),
                Ok(()) => unsafe_path(&path, "cannot be opened"),
            }
        }
    }
}

/// Removes a file, or a directory with all that is in it. Follows nothing. No error when it is not there.
pub(super) fn remove_all(at: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    match unlinkat(at, name, AtFlags::empty()) {
        Err(Errno::NOENT) | Ok(()) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inner = openat(at, name, flags, Mode::empty())?;
    remove_children(inner.as_fd(), &mut |_| false)?;
    unlinkat(at, name, AtFlags::REMOVEDIR)?;
    Ok(())
}

/// Removes what is in a directory, except names that `keep` wants.
pub(super) fn remove_children(
    directory: BorrowedFd<'_>,
    keep: &mut dyn FnMut(&[u8]) -> bool,
) -> io::Result<()> {
    for entry in names(directory)? {
        if !keep(&entry) {
            remove_all(directory, &entry)?;
        }
    }
    Ok(())
}

/// Names in a directory, sorted.
pub(super) fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_are_checked() {
        let parse = |text: &str| TreePath::parse(text.as_bytes(), false);
        assert_eq!(
            parse("./a//b/.").unwrap().components(),
            [b"a".to_vec(), b"b".to_vec()]
        );
        assert_eq!(parse("./").unwrap().split(), None);
        let long = format!("a/{}", "x".repeat(256));
        for bad in ["/a", "..", "a/../b", "a/..", "a\0b", &long] {
            assert_eq!(
                parse(bad).unwrap_err().code,
                GuestErrorCode::UnsafePath,
                "{bad}"
            );
        }
        assert!(TreePath::parse(b"/a", true).is_ok());
        assert!(parse("a\nb/c").is_ok());
    }

    proptest! {
        #[test]
        fn no_checked_path_holds_a_way_out(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(path) = TreePath::parse(&bytes, true) {
                for part in path.components() {
                    prop_assert!(!part.is_empty() && part != b".." && part != b"." && !part.contains(&b'/'));
                }
            }
        }
    }
}
