//! Whether a template's files are what its record says (DESIGN, rule 8): digests in full when it is made and at the first use in each
//! boot of the host, afterwards device, inode, size and times.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use kiln_core::Digest;
use kiln_core::digest::Hasher;
use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};

/// Bytes hashed at once; a chunk of zeros only counts by its absence.
const CHUNK: u64 = 1 << 20;
/// Most files of one template.
pub(super) const FILES_MAX: usize = 32;

/// One file as it was made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct FileRecord {
    pub(super) name: String,
    pub(super) size: u64,
    /// See [`sparse_digest`].
    pub(super) digest: Digest,
}

/// What a file looked like when its digest was computed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Seen {
    name: String,
    device: u64,
    inode: u64,
    size: u64,
    mtime_ns: i128,
    ctime_ns: i128,
}

impl Seen {
    fn of(dir: &Path, name: &str) -> io::Result<Self> {
        let meta = fs::symlink_metadata(dir.join(name))?;
        if !meta.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not a regular file",
            ));
        }
        let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        Ok(Self {
            name: name.to_owned(),
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            mtime_ns: ns(meta.mtime(), meta.mtime_nsec()),
            ctime_ns: ns(meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// Digest of a file's length and of each megabyte that is not all zeros, with its position: holes are not read.
pub(super) fn sparse_digest(path: &Path) -> io::Result<(Digest, u64)> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut hasher = Hasher::default();
    hasher.update(&len.to_le_bytes());
    let mut buffer = vec![0; CHUNK as usize];
    let mut at = 0;
    while at < len {
        at = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data - data % CHUNK,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let part = &mut buffer[..(len - at).min(CHUNK) as usize];
        file.read_exact_at(part, at)?;
        if part.iter().any(|byte| *byte != 0) {
            hasher.update(&at.to_le_bytes());
            hasher.update(part);
        }
        at += CHUNK;
    }
    Ok((hasher.finish().0, len))
}

/// Records of some files of a directory.
pub(super) fn record_files(dir: &Path, names: &[String]) -> io::Result<Vec<FileRecord>> {
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        let (digest, size) = sparse_digest(&dir.join(name))?;
        files.push(FileRecord {
            name: name.clone(),
            size,
            digest,
        });
    }
    Ok(files)
}

/// What the files look like now.
pub(super) fn look(dir: &Path, files: &[FileRecord]) -> io::Result<Vec<Seen>> {
    files.iter().map(|file| Seen::of(dir, &file.name)).collect()
}

/// Compares every digest; the difference in words.
pub(super) fn compare(dir: &Path, files: &[FileRecord]) -> Result<(), String> {
    for file in files {
        let (digest, size) = sparse_digest(&dir.join(&file.name))
            .map_err(|error| format!("{}: {error}", file.name))?;
        if (digest, size) != (file.digest, file.size) {
            return Err(format!("{} has changed since it was made", file.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeros_are_the_same_and_any_byte_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let sparse = File::create(path("a")).unwrap();
        sparse.set_len(5 << 20).unwrap();
        sparse.write_all_at(b"x", 3 << 20).unwrap();
        let mut bytes = vec![0; 5 << 20];
        bytes[3 << 20] = b'x';
        fs::write(path("b"), &bytes).unwrap();
        let digest = |name| sparse_digest(&path(name)).unwrap().0;
        assert_eq!(digest("a"), digest("b"));
        bytes[(5 << 20) - 1] = 1;
        fs::write(path("c"), &bytes).unwrap();
        fs::write(path("d"), &bytes[..5 << 19]).unwrap();
        assert_ne!(digest("b"), digest("c"));
        assert_ne!(digest("a"), digest("d"));
    }
}
