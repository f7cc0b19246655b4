//! Opening files inside a folder that somebody else may be changing: never through a symbolic link, never outside.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

/// Longest path given to the kernel in one call, bytes (its limit is 4096 with the closing zero).
const STEP_BYTES_MAX: usize = 3000;

/// Opens `path` (relative) below `root` for reading. No part of it may be a symbolic link. Paths longer than
/// the kernel takes in one call are walked in steps.
///
/// # Errors
/// What the kernel says; `ELOOP` for a symbolic link.
pub fn open_beneath(root: BorrowedFd<'_>, path: &[u8], folder: bool) -> io::Result<OwnedFd> {
    let mut held: Option<OwnedFd> = None;
    let mut rest = path;
    while rest.len() > STEP_BYTES_MAX {
        let cut = rest[..STEP_BYTES_MAX]
            .iter()
            .rposition(|&b| b == b'/')
            .ok_or(Errno::NAMETOOLONG)?;
        let at = held.as_ref().map_or(root, AsFd::as_fd);
        let next = one_step(at, &rest[..cut], OFlags::PATH | OFlags::DIRECTORY)?;
        held = Some(next);
        rest = &rest[cut + 1..];
    }
    let at = held.as_ref().map_or(root, AsFd::as_fd);
    let flags = match folder {
        true => OFlags::RDONLY | OFlags::DIRECTORY,
        // Without NONBLOCK a file that has become a fifo would hold us for ever.
        false => OFlags::RDONLY | OFlags::NONBLOCK,
    };
    let rest: &[u8] = if rest.is_empty() { b"." } else { rest };
    one_step(at, rest, flags)
}

/// Opens the file `path` (relative) below `root`, also through symbolic links as long as they stay below it.
///
/// # Errors
/// What the kernel says; `EXDEV` for a link that leads out.
pub(crate) fn open_inside(root: BorrowedFd<'_>, path: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    loop {
        return match openat2(root, path, flags, Mode::empty(), resolve) {
            Err(Errno::INTR | Errno::AGAIN) => continue,
            result => Ok(result?),
        };
    }
}

fn one_step(at: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    loop {
        return match openat2(at, path, flags, Mode::empty(), resolve) {
            Err(Errno::INTR | Errno::AGAIN) => continue,
            // Kernels before 5.6 and some sandboxes: name by name.
            Err(Errno::NOSYS | Errno::PERM) => name_by_name(at, path, flags),
            result => Ok(result?),
        };
    }
}

fn name_by_name(at: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let mut held: Option<OwnedFd> = None;
    let mut names = path.split(|&b| b == b'/').peekable();
    while let Some(name) = names.next() {
        let at = held.as_ref().map_or(at, AsFd::as_fd);
        if name == b".." {
            return Err(Errno::XDEV.into());
        }
        let flags = match names.peek() {
            Some(_) => OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            None => flags,
        };
        held = Some(openat(at, name, flags, Mode::empty())?);
    }
    held.ok_or_else(|| Errno::NOENT.into())
}

/// The whole file, or `None` when it has more than `max` bytes.
pub(crate) fn read_small(file: OwnedFd, max: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    File::from(file).take(max + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= max).then_some(bytes))
}
