//! The tree as a tar stream, and its digest, in one pass over the files.
//!
//! Format: POSIX ustar with GNU long names. Owner 0, group 0, permission bits and seconds of the last change as they
//! are on disk: BuildKit's cache looks at content and mode, and web servers in the finished image look at times.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use kiln_core::Digest;
use kiln_core::digest::Hasher;
use rustix::io::Errno;

use super::ContextError;
use super::read::open_beneath;
use super::tree_digest::{EntryKind, TreeDigest};
use super::walk::{Entry, Tree, scan};

/// Read buffer, bytes.
const BUFFER_BYTES: usize = 128 * 1024;

/// What was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packed {
    /// Digest of the tree (see [`TreeDigest`]).
    pub digest: Digest,
    /// Files, folders and links.
    pub entries: u64,
    /// Bytes of file content.
    pub bytes: u64,
}

/// Writes the tree as a tar stream and computes its digest. Memory does not grow with the tree's size, only with its
/// largest folder.
///
/// # Errors
/// Refused entries are found before the first byte is written; a file that changes while it is read ends the
/// stream with [`ContextError::Changed`].
pub fn pack(tree: &Tree, out: &mut dyn Write) -> Result<Packed, ContextError> {
    let mut builder = tar::Builder::new(Gate { out, open: true });
    let result = read_all(tree, &mut |entry, mut content| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(entry.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(entry.mtime_unix_s);
        header.set_size(0);
        match &entry.kind {
            EntryKind::Folder => {
                header.set_entry_type(tar::EntryType::Directory);
                builder.append_data(&mut header, format!("{}/", entry.path), io::empty())
            }
            EntryKind::File(size) => {
                header.set_entry_type(tar::EntryType::Regular);
                header.set_size(*size);
                builder.append_data(&mut header, &entry.path, &mut content)
            }
            EntryKind::Link(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                builder.append_link(&mut header, &entry.path, target)
            }
        }
    });
    if result.is_err() {
        builder.get_mut().open = false;
    }
    let packed = result?;
    builder.finish().map_err(ContextError::Write)?;
    Ok(packed)
}

/// The builder writes the archive's end when it is dropped: a broken archive must not look whole.
struct Gate<'a> {
    out: &'a mut dyn Write,
    open: bool,
}

impl Write for Gate<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.open {
            true => self.out.write(bytes),
            false => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Computes the digest alone.
///
/// # Errors
/// As [`pack`], writing excepted.
pub fn digest(tree: &Tree) -> Result<Packed, ContextError> {
    read_all(tree, &mut |_, content| {
        io::copy(content, &mut io::sink()).map(|_| ())
    })
}

/// Gives every entry with its content (empty but for files) to `each`, in order.
fn read_all(
    tree: &Tree,
    each: &mut dyn FnMut(&Entry, &mut Content) -> io::Result<()>,
) -> Result<Packed, ContextError> {
    scan(tree)?;
    let mut digest = TreeDigest::default();
    let (mut entries, mut bytes) = (0, 0);
    let mut late = None;
    tree.walk(
        &mut |entry| {
            entries += 1;
            let mut content = Content::open(tree, entry)?;
            let written = each(entry, &mut content);
            if let Some(failure) = content.failure.take() {
                return Err(failure.of(&entry.path));
            }
            written.map_err(ContextError::Write)?;
            match &entry.kind {
                EntryKind::Folder => digest.folder(&entry.path, entry.mode),
                EntryKind::Link(target) => digest.link(&entry.path, target),
                EntryKind::File(size) => {
                    bytes += size;
                    let content = content.finish(entry)?;
                    digest.file(&entry.path, entry.mode, *size, &content);
                }
            }
            Ok(())
        },
        // Entries were all legal a moment ago.
        &mut |refused| late = Some(refused),
    )?;
    if let Some(refused) = late {
        return Err(ContextError::Refused {
            first: vec![refused],
            total: 1,
        });
    }
    Ok(Packed {
        digest: digest.finish(),
        entries,
        bytes,
    })
}

enum Failure {
    Changed,
    Read(io::Error),
}

impl Failure {
    fn of(self, path: &str) -> ContextError {
        let path = path.to_owned();
        match self {
            Self::Changed => ContextError::Changed { path },
            Self::Read(source) => ContextError::Read { path, source },
        }
    }
}

/// A file's content: exactly as many bytes as the listing said, or a failure.
struct Content {
    file: Option<io::BufReader<File>>,
    left: u64,
    hasher: Hasher,
    failure: Option<Failure>,
}

impl Content {
    fn open(tree: &Tree, entry: &Entry) -> Result<Self, ContextError> {
        let mut content = Self {
            file: None,
            left: 0,
            hasher: Hasher::default(),
            failure: None,
        };
        let EntryKind::File(size) = entry.kind else {
            return Ok(content);
        };
        let opened = open_beneath(tree.root().as_fd(), entry.path.as_bytes(), false);
        let opened = opened.map_err(|source| match Errno::from_io_error(&source) {
            Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO) => {
                Failure::Changed.of(&entry.path)
            }
            _ => Failure::Read(source).of(&entry.path),
        })?;
        let file = File::from(opened);
        content.left = size;
        if !is_as_listed(&file, entry).map_err(|e| Failure::Read(e).of(&entry.path))? {
            return Err(Failure::Changed.of(&entry.path));
        }
        content.file = Some(io::BufReader::with_capacity(BUFFER_BYTES, file));
        Ok(content)
    }

    /// After the last byte: nothing more may follow and the file may not have been touched.
    fn finish(mut self, entry: &Entry) -> Result<Digest, ContextError> {
        let error = |e| Failure::Read(e).of(&entry.path);
        if let Some(reader) = &mut self.file {
            let more = reader.read(&mut [0]).map_err(error)?;
            if self.left > 0 || more > 0 || !is_as_listed(reader.get_ref(), entry).map_err(error)? {
                return Err(Failure::Changed.of(&entry.path));
            }
        }
        Ok(self.hasher.finish().0)
    }
}

fn is_as_listed(file: &File, entry: &Entry) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let meta = file.metadata()?;
    let mtime = u64::try_from(meta.mtime()).unwrap_or(0);
    let size = EntryKind::File(meta.len());
    Ok(meta.is_file() && entry.kind == size && mtime == entry.mtime_unix_s)
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(reader) = &mut self.file else {
            return Ok(0);
        };
        let want = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let got = match reader.read(&mut buffer[..want]) {
            Ok(got) => got,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Err(e),
            Err(e) => {
                self.failure = Some(Failure::Read(e));
                return Err(io::ErrorKind::Other.into());
            }
        };
        if got == 0 {
            self.failure = Some(Failure::Changed);
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= got as u64;
        self.hasher.update(&buffer[..got]);
        Ok(got)
    }
}

#[cfg(test)]
mod tests;
