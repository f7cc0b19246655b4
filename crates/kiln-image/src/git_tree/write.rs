//! Makes the paths of a layout below one folder. No path ever leads through a symbolic link, and links are made last.

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, chmodat, fchmod, mkdirat, openat, symlinkat};

use super::error::GitTreeError;
use super::layout::shown;
use crate::context::open_beneath;

/// Buffer for copies of a file, bytes.
const COPY_BUFFER_BYTES: usize = 256 * 1024;

/// A folder being filled.
#[derive(Debug)]
pub(super) struct Folder {
    root: OwnedFd,
    /// The folder used last, by path: files of one folder come together.
    last: Option<(Box<[u8]>, OwnedFd)>,
}

impl Folder {
    /// Opens an empty folder.
    pub(super) fn open(dir: &Path) -> Result<Self, GitTreeError> {
        let failed = |source: io::Error| GitTreeError::Write {
            path: dir.display().to_string(),
            source,
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root =
            rustix::fs::open(dir, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        let mut entries = std::fs::read_dir(dir).map_err(failed)?;
        if entries.next().is_some() {
            return Err(failed(io::ErrorKind::DirectoryNotEmpty.into()));
        }
        Ok(Self { root, last: None })
    }

    /// Runs `work` with the parent folder of `path` and its last name.
    fn at<T>(
        &mut self,
        path: &[u8],
        work: impl FnOnce(&OwnedFd, &[u8]) -> rustix::io::Result<T>,
    ) -> Result<T, GitTreeError> {
        let failed = |source: io::Error| GitTreeError::Write {
            path: shown(path),
            source,
        };
        let (folder, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&path[..0], path),
        };
        let opened = match self.last.take() {
            Some((last, fd)) if *last == *folder => fd,
            _ => open_beneath(self.root.as_fd(), folder, true).map_err(failed)?,
        };
        let done = work(&opened, name).map_err(|error| failed(error.into()));
        self.last = Some((folder.into(), opened));
        done
    }

    pub(super) fn folder(&mut self, path: &[u8]) -> Result<(), GitTreeError> {
        let mode = Mode::from_raw_mode(0o755);
        self.at(path, |parent, name| {
            mkdirat(parent, name, mode)?;
            // Whatever the umask of this process is: modes are part of the source's digest.
            chmodat(parent, name, mode, AtFlags::empty())
        })
    }

    pub(super) fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), GitTreeError> {
        self.at(path, |parent, name| symlinkat(target, parent, name))
    }

    /// A new file, for writing.
    pub(super) fn file(&mut self, path: &[u8], executable: bool) -> Result<File, GitTreeError> {
        let mode = Mode::from_raw_mode(if executable { 0o755 } else { 0o644 });
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.at(path, |parent, name| {
            let file = openat(parent, name, flags, mode)?;
            fchmod(&file, mode)?;
            Ok(File::from(file))
        })
    }

    /// A second file of the same bytes.
    pub(super) fn copy(
        &mut self,
        from: &[u8],
        path: &[u8],
        executable: bool,
    ) -> Result<(), GitTreeError> {
        let mut to = self.file(path, executable)?;
        let failed = |source: io::Error| GitTreeError::Write {
            path: shown(path),
            source,
        };
        let mut source = File::from(open_beneath(self.root.as_fd(), from, false).map_err(failed)?);
        let mut buffer = vec![0; COPY_BUFFER_BYTES];
        loop {
            match source.read(&mut buffer).map_err(failed)? {
                0 => return Ok(()),
                got => to.write_all(&buffer[..got]).map_err(failed)?,
            }
        }
    }
}
