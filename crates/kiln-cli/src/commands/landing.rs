//! Files that come from elsewhere, put below a folder of this host: nothing outside that folder is touched, no link is followed, and a file is there
//! whole or not at all.
//!
//! Names come from a server that had them from a worker that had them from a guest: they are legal artifact names, and each part is opened
//! name by name all the same.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use kiln_core::Digest;
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// How a folder is opened that somebody else may have put there.
const FOLDER: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A folder that files are put below.
#[derive(Debug)]
pub(crate) struct Landing {
    root: OwnedFd,
    shown: PathBuf,
}

/// A file that is not whole yet. What is there of it stays when this is dropped: the next try goes on from it.
#[derive(Debug)]
pub(crate) struct Partial {
    /// What there is.
    pub(crate) file: File,
    folder: OwnedFd,
    name: Vec<u8>,
    beside: String,
}

impl Landing {
    /// Opens a folder, made first when it is missing. The folder itself is the user's word: a link that they name is followed.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn open(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            root: rustix::fs::open(folder, flags, Mode::empty())?,
            shown: folder.to_owned(),
        })
    }

    /// Where a file will lie, for people.
    pub(crate) fn path(&self, inner: &Path) -> PathBuf {
        match self.shown == Path::new(".") {
            true => inner.to_owned(),
            false => self.shown.join(inner),
        }
    }

    /// Begins a file with this content at a relative path, or goes on with one that was begun.
    ///
    /// # Errors
    /// When a part of the path is a link or no folder, another command writes the same file just now, or what the file system says.
    pub(crate) fn begin(&self, inner: &Path, content: &Digest) -> io::Result<Partial> {
        let mut names = Vec::new();
        for part in inner.components() {
            match part {
                Component::Normal(name) => names.push(name),
                Component::CurDir => {}
                _ => return Err(io::Error::other("the name leads out of the folder")),
            }
        }
        let Some((name, folders)) = names.split_last() else {
            return Err(io::Error::other("the name is empty"));
        };
        let folder = self.folder(folders)?;
        let beside = format!(".kiln-{}.part", content.short(32));
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o666);
        let file = rustix::fs::openat(&folder, beside.as_str(), flags, mode)?;
        let stat = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_nlink != 1 {
            return Err(io::Error::other(format!("{beside} is in the way")));
        }
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(io::Error::other("another command writes it just now"));
        }
        Ok(Partial {
            file: File::from(file),
            folder,
            name: name.as_bytes().to_vec(),
            beside,
        })
    }

    fn folder(&self, names: &[&OsStr]) -> io::Result<OwnedFd> {
        let mut at = self.root.try_clone()?;
        for name in names {
            let mode = Mode::from_raw_mode(0o777);
            match rustix::fs::mkdirat(&at, *name, mode) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            at = match rustix::fs::openat(&at, *name, FOLDER, Mode::empty()) {
                Err(Errno::LOOP | Errno::NOTDIR) => {
                    let text = format!("{} is a link or no folder", name.to_string_lossy());
                    return Err(io::Error::other(text));
                }
                opened => opened?,
            };
        }
        Ok(at)
    }
}

impl Partial {
    /// Starts again with nothing.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn empty(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0)).map(drop)
    }

    /// The file is whole: it takes its name, also in place of a file or link that has it.
    ///
    /// # Errors
    /// When a folder has that name, or what the file system says.
    pub(crate) fn finish(self) -> io::Result<()> {
        let name = OsStr::from_bytes(&self.name);
        let (from, folder) = (self.beside.as_str(), &self.folder);
        match rustix::fs::renameat(folder, from, folder, name) {
            Err(Errno::ISDIR | Errno::NOTEMPTY | Errno::EXIST) => {
                self.discard()?;
                Err(io::Error::other("a folder has that name"))
            }
            done => Ok(done?),
        }
    }

    /// Leaves nothing.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn discard(self) -> io::Result<()> {
        let removed = rustix::fs::unlinkat(&self.folder, self.beside.as_str(), AtFlags::empty());
        Ok(removed?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::fs::symlink;

    fn put(landing: &Landing, inner: &str, content: &[u8]) -> io::Result<()> {
        let mut partial = landing.begin(Path::new(inner), &Digest::of(content))?;
        partial.file.write_all(content)?;
        partial.finish()
    }

    #[test]
    fn files_land_whole_below_the_folder() {
        let dir = tempfile::tempdir().expect("dir");
        let landing = Landing::open(&dir.path().join("new/out")).expect("made");
        put(&landing, "a/b/c.txt", b"one").expect("put");
        put(&landing, "a/b/c.txt", b"two").expect("in place of it");
        let at = dir.path().join("new/out/a/b");
        assert_eq!(std::fs::read(at.join("c.txt")).expect("reads"), b"two");
        assert_eq!(std::fs::read_dir(&at).expect("folder").count(), 1);
        let error = put(&landing, "a/b", b"x").expect_err("a folder");
        assert!(error.to_string().contains("a folder has that name"));
        let error = put(&landing, "a/b/c.txt/d", b"x").expect_err("a file");
        assert!(error.to_string().contains("c.txt is a link or no folder"));
        for bad in ["../x", "/etc/x", "a/../../x", "."] {
            assert!(put(&landing, bad, b"x").is_err(), "{bad}");
        }
    }

    #[test]
    fn no_link_is_followed() {
        let dir = tempfile::tempdir().expect("dir");
        let outside = dir.path().join("outside");
        std::fs::create_dir(&outside).expect("folder");
        std::fs::write(outside.join("file"), "mine").expect("write");
        let inside = dir.path().join("in");
        let landing = Landing::open(&inside).expect("made");
        symlink(&outside, inside.join("folder")).expect("link");
        symlink(outside.join("file"), inside.join("file")).expect("link");
        let error = put(&landing, "folder/x", b"x").expect_err("a link");
        assert!(error.to_string().contains("folder is a link"), "{error}");
        put(&landing, "file", b"new").expect("in place of the link");
        assert_eq!(std::fs::read(outside.join("file")).expect("reads"), b"mine");
        assert_eq!(std::fs::read(inside.join("file")).expect("reads"), b"new");
        assert_eq!(std::fs::read_dir(&outside).expect("folder").count(), 1);
        // Neither is one that lies where a part would be begun.
        let content = Digest::of(b"part");
        let part = inside.join(format!(".kiln-{}.part", content.short(32)));
        symlink(outside.join("file"), part).expect("link");
        assert!(put(&landing, "y", b"part").is_err());
        assert_eq!(std::fs::read(outside.join("file")).expect("reads"), b"mine");
    }

    #[test]
    fn what_was_begun_is_gone_on_with_by_one_at_a_time() {
        let dir = tempfile::tempdir().expect("dir");
        let landing = Landing::open(dir.path()).expect("opened");
        let content = Digest::of(b"whole");
        let mut first = landing.begin(Path::new("a"), &content).expect("begun");
        first.file.write_all(b"who").expect("write");
        assert!(landing.begin(Path::new("a"), &content).is_err());
        drop(first);
        let mut second = landing.begin(Path::new("a"), &content).expect("again");
        assert_eq!(second.file.metadata().expect("stat").len(), 3);
        second.empty().expect("emptied");
        second.discard().expect("gone");
        assert_eq!(std::fs::read_dir(dir.path()).expect("folder").count(), 0);
    }
}
