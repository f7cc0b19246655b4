//! The source folder as a plan reads it: few files, by name, bounded, never through a symbolic link.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Dir, FileType, Mode, OFlags, open};

use super::PlanError;
use crate::context::{open_beneath, open_inside, read_small};

/// Largest manifest, script or source file that is looked into, bytes.
const MANIFEST_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Largest lockfile, bytes.
pub(super) const LOCKFILE_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Most names of one folder that are looked at.
const NAMES_MAX: usize = 10_000;

/// A source folder.
#[derive(Debug)]
pub(super) struct Folder {
    root: OwnedFd,
    /// For messages.
    name: String,
}

/// A name in a folder.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Name {
    pub(super) text: String,
    pub(super) is_folder: bool,
}

impl Folder {
    pub(super) fn open(dir: &Path) -> Result<Self, PlanError> {
        let name = dir.display().to_string();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match open(dir, flags, Mode::empty()) {
            Ok(root) => Ok(Self { root, name }),
            Err(e) => Err(PlanError::Read {
                path: name,
                source: e.into(),
            }),
        }
    }

    /// The folder `path` in this one, as a root of its own.
    pub(super) fn sub(&self, path: &str) -> Result<Self, PlanError> {
        let root = open_beneath(self.root.as_fd(), path.as_bytes(), true);
        let root = root.map_err(|source| PlanError::Read {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            root,
            name: format!("{}/{path}", self.name),
        })
    }

    pub(super) fn display(&self) -> &str {
        &self.name
    }

    /// Text of a file, if there is one.
    pub(super) fn read(&self, path: &str) -> Result<Option<String>, PlanError> {
        let Some(bytes) = self.bytes(path, MANIFEST_BYTES_MAX)? else {
            return Ok(None);
        };
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(text)),
            Err(e) => {
                let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
                let line = good.iter().filter(|&&b| b == b'\n').count() + 1;
                Err(PlanError::Broken {
                    file: path.to_owned(),
                    line: Some(line as u32),
                    what: "the file is not UTF-8 text".to_owned(),
                })
            }
        }
    }

    /// Bytes of a file, if there is one.
    pub(super) fn bytes(&self, path: &str, max: u64) -> Result<Option<Vec<u8>>, PlanError> {
        let error = |source| PlanError::Read {
            path: path.to_owned(),
            source,
        };
        let file = match open_beneath(self.root.as_fd(), path.as_bytes(), false) {
            Ok(file) => file,
            Err(e) if is_missing(&e) => return Ok(None),
            Err(e) if is_link(&e) => {
                return Err(PlanError::Link {
                    path: path.to_owned(),
                    what: "kiln reads no such file through one",
                });
            }
            Err(e) => return Err(error(e)),
        };
        self.small(path, file, max)
    }

    /// As [`Self::bytes`], also through a symbolic link whose target is in the folder.
    pub(super) fn linked_bytes(&self, path: &str, max: u64) -> Result<Option<Vec<u8>>, PlanError> {
        match self.bytes(path, max) {
            Err(PlanError::Link { .. }) => {}
            other => return other,
        }
        let file =
            open_inside(self.root.as_fd(), path.as_bytes()).map_err(|e| PlanError::Link {
                path: path.to_owned(),
                what: match e.kind() {
                    io::ErrorKind::NotFound => "its target is not there",
                    _ => "its target is not in the folder",
                },
            })?;
        match self.small(path, file, max)? {
            Some(bytes) => Ok(Some(bytes)),
            None => Err(PlanError::Link {
                path: path.to_owned(),
                what: "its target is not a file",
            }),
        }
    }

    fn small(&self, path: &str, file: OwnedFd, max: u64) -> Result<Option<Vec<u8>>, PlanError> {
        let error = |source| PlanError::Read {
            path: path.to_owned(),
            source,
        };
        let stat = rustix::fs::fstat(&file).map_err(|e| error(e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Ok(None);
        }
        match read_small(file, max).map_err(error)? {
            Some(bytes) => Ok(Some(bytes)),
            None => Err(PlanError::TooLarge {
                file: path.to_owned(),
                max,
            }),
        }
    }

    /// Whether there is a regular file of that name.
    pub(super) fn has(&self, path: &str) -> bool {
        let file = open_beneath(self.root.as_fd(), path.as_bytes(), false);
        file.ok()
            .and_then(|file| rustix::fs::fstat(&file).ok())
            .is_some_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile)
    }

    /// Whether there is a folder of that name.
    pub(super) fn has_folder(&self, path: &str) -> bool {
        open_beneath(self.root.as_fd(), path.as_bytes(), true).is_ok()
    }

    /// The UTF-8 names in a folder (`""` for the root), sorted; empty when there is no such folder.
    pub(super) fn names(&self, path: &str) -> Result<Vec<Name>, PlanError> {
        let error = |source: io::Error| PlanError::Read {
            path: match path {
                "" => self.name.clone(),
                path => path.to_owned(),
            },
            source,
        };
        let folder = match open_beneath(self.root.as_fd(), path.as_bytes(), true) {
            Ok(folder) => folder,
            Err(e) if is_missing(&e) && !path.is_empty() => return Ok(Vec::new()),
            Err(e) => return Err(error(e)),
        };
        let mut names = Vec::new();
        for entry in Dir::read_from(&folder).map_err(|e| error(e.into()))? {
            let entry = entry.map_err(|e| error(e.into()))?;
            let Some(text) = OsStr::from_bytes(entry.file_name().to_bytes()).to_str() else {
                continue;
            };
            if matches!(text, "." | "..") || names.len() >= NAMES_MAX {
                continue;
            }
            names.push(Name {
                text: text.to_owned(),
                is_folder: entry.file_type() == FileType::Directory,
            });
        }
        names.sort();
        Ok(names)
    }
}

fn is_link(e: &io::Error) -> bool {
    e.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

fn is_missing(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}
