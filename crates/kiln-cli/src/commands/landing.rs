//! Files that come from elsewhere, put below a folder of this host: nothing outside that folder is touched, no link is followed, nothing but files
//! and links is replaced, and a file is there whole or not at all.
//!
//! Names come from a server that had them from a worker that had them from a guest: they are legal artifact names, and each part is opened
//! name by name all the same.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Component, Path, PathBuf};

use kiln_core::Digest;
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::error::CliError;
use crate::show::ShownPath as _;

/// How a folder is opened that the user vouches for. It need not be readable for files to land below it.
const NAMED: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// How a folder is opened that somebody else may have put there.
const FOLDER: OFlags = NAMED.union(OFlags::NOFOLLOW);

/// Why no file lands somewhere.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LandingError {
    /// A part of the way to it may lead elsewhere.
    #[error("{0} is a link or no folder")]
    Leads(String),
    /// Something has its name that no file may replace.
    #[error("{name} is {what}, not a file")]
    InTheWay {
        /// The name.
        name: String,
        /// What has it.
        what: &'static str,
    },
    /// The file system said no.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<LandingError> for io::Error {
    fn from(error: LandingError) -> Self {
        match error {
            LandingError::Io(error) => error,
            told => Self::other(told),
        }
    }
}

impl LandingError {
    /// As a person is told it who named `dest`.
    pub(crate) fn told(&self, dest: &Path) -> CliError {
        let error = CliError::usage(format!("could not write {}: {self}", dest.shown()));
        match self {
            Self::Leads(_) => error.hint("name the real folder: nothing is written through a link"),
            Self::InTheWay { .. } => error.hint("name a file, or a name that is still free"),
            Self::Io(_) => error,
        }
    }
}

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

/// A file that is written anew, beside its place and under a name that nobody can guess. Unless it is finished, nothing of it stays.
#[derive(Debug)]
pub(crate) struct Fresh {
    /// What is written so far.
    pub(crate) file: File,
    folder: OwnedFd,
    name: OsString,
    beside: String,
}

impl Landing {
    /// Opens a folder, made first when it is missing; how much of its path may be links, `split` says.
    ///
    /// # Errors
    /// When it is a link or no folder, or what the file system says.
    pub(crate) fn open(folder: &Path) -> Result<Self, LandingError> {
        let (named, names) = split(folder);
        std::fs::create_dir_all(&named)?;
        Ok(Self {
            root: walk(opened(&named)?, &names, true)?,
            shown: folder.to_owned(),
        })
    }

    /// Looks whether files could land in a folder, and makes nothing. What is not there, or cannot be looked at, hinders nobody yet.
    ///
    /// # Errors
    /// When it is a link or no folder.
    pub(crate) fn look(folder: &Path) -> Result<(), LandingError> {
        match enter(folder) {
            Ok(_) | Err(LandingError::Io(_)) => Ok(()),
            Err(error) => Err(error),
        }
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
    /// When a part of the path is a link or no folder, something has its name that is no file, another command writes the same file just now,
    /// or what the file system says.
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
        let folder = walk(self.root.try_clone()?, folders, true)?;
        gives_way(&folder, name)?;
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
    /// When something else has that name, or what the file system says.
    pub(crate) fn finish(self) -> io::Result<()> {
        let name = OsStr::from_bytes(&self.name);
        match take_name(&self.folder, &self.beside, name) {
            Err(LandingError::Io(error)) => Err(error),
            Err(error) => {
                self.discard()?;
                Err(error.into())
            }
            Ok(()) => Ok(()),
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

impl Fresh {
    /// Begins a file. The folder is not made.
    ///
    /// # Errors
    /// When the folder is a link or none, something has the file's name that is none, or what the file system says.
    pub(crate) fn begin(path: &Path) -> Result<Self, LandingError> {
        let Some(name) = path.file_name() else {
            return Err(io::Error::other("the name is empty").into());
        };
        let folder = enter(folder_of(path))?;
        gives_way(&folder, name)?;
        let beside = format!(
            ".kiln-{:016x}{:016x}.new",
            RandomState::new().hash_one(1),
            RandomState::new().hash_one(2)
        );
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o666);
        let file = rustix::fs::openat(&folder, beside.as_str(), flags, mode);
        Ok(Self {
            file: File::from(file.map_err(io::Error::from)?),
            folder,
            name: name.to_owned(),
            beside,
        })
    }

    /// The file is whole: it takes its name, also in place of a file or link that has it.
    ///
    /// # Errors
    /// When something else has that name, or what the file system says.
    pub(crate) fn finish(self) -> Result<(), LandingError> {
        take_name(&self.folder, &self.beside, &self.name)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // One that took its name has this one no more.
        let _finished = rustix::fs::unlinkat(&self.folder, self.beside.as_str(), AtFlags::empty());
    }
}

/// Opens a folder that is there, to put things into it by name; how much of its path may be links, `split` says.
///
/// # Errors
/// When it is a link or no folder, or what the file system says.
pub(crate) fn enter(folder: &Path) -> Result<OwnedFd, LandingError> {
    let (named, names) = split(folder);
    walk(opened(&named)?, &names, false)
}

/// The folder that a path lies in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    let parent = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

/// Looks whether a path is free for a file. What becomes of a folder that is there is not said here.
///
/// # Errors
/// When a device, fifo or socket is there.
pub(crate) fn look_at(path: &Path) -> Result<(), LandingError> {
    let Ok(meta) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    let kind = meta.file_type();
    let what = match kind {
        _ if kind.is_fifo() => "a fifo",
        _ if kind.is_socket() => "a socket",
        _ if kind.is_char_device() || kind.is_block_device() => "a device",
        _ => return Ok(()),
    };
    Err(LandingError::InTheWay {
        name: path.shown(),
        what,
    })
}

/// A folder's path as the part of it that its user vouches for, links and all, and the names below that, of which none may be a link.
///
/// Of a path below the current folder nothing is vouched for: whoever wrote the project may have laid links there. Of another one everything
/// but its last name.
fn split(folder: &Path) -> (PathBuf, Vec<&OsStr>) {
    let here = std::env::current_dir().ok();
    let here = here.filter(|here| here.parent().is_some());
    let below = here.and_then(|here| folder.strip_prefix(here).ok());
    let parts = below.unwrap_or(folder).components();
    let mut parts: Vec<Component<'_>> = parts.filter(|part| *part != Component::CurDir).collect();
    let is_below = matches!(parts.first(), None | Some(Component::Normal(_)));
    if is_below {
        let names = parts.into_iter().map(Component::as_os_str);
        return (PathBuf::from("."), names.collect());
    }
    let mut names = Vec::new();
    if let Some(Component::Normal(name)) = parts.last() {
        names.push(*name);
        parts.pop();
    }
    (parts.into_iter().collect(), names)
}

/// Opens a folder that the user vouches for.
fn opened(folder: &Path) -> Result<OwnedFd, LandingError> {
    let opened = rustix::fs::open(folder, NAMED, Mode::empty());
    Ok(opened.map_err(io::Error::from)?)
}

/// Goes down name by name, through no link. Folders that are missing are made where that is wanted.
fn walk(from: OwnedFd, names: &[&OsStr], make: bool) -> Result<OwnedFd, LandingError> {
    let mut at = from;
    for name in names {
        if make {
            match rustix::fs::mkdirat(&at, *name, Mode::from_raw_mode(0o777)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        at = match rustix::fs::openat(&at, *name, FOLDER, Mode::empty()) {
            Err(Errno::LOOP | Errno::NOTDIR) => {
                return Err(LandingError::Leads(name.to_string_lossy().into_owned()));
            }
            opened => opened.map_err(io::Error::from)?,
        };
    }
    Ok(at)
}

/// Whether a name is free for a file, or what has it may be replaced by one: a file, or a link itself.
fn gives_way(folder: &OwnedFd, name: &OsStr) -> Result<(), LandingError> {
    let stat = match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        stat => stat.map_err(io::Error::from)?,
    };
    let what = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::Symlink => return Ok(()),
        FileType::Directory => "a folder",
        FileType::Fifo => "a fifo",
        FileType::Socket => "a socket",
        _ => "a device",
    };
    Err(LandingError::InTheWay {
        name: name.to_string_lossy().into_owned(),
        what,
    })
}

/// A whole file takes its name in its folder. What has it is looked at once more: it may be another than when the file was begun.
fn take_name(folder: &OwnedFd, from: &str, name: &OsStr) -> Result<(), LandingError> {
    gives_way(folder, name)?;
    let renamed = rustix::fs::renameat(folder, from, folder, name);
    Ok(renamed.map_err(io::Error::from)?)
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
        assert!(error.to_string().contains("b is a folder, not a file"));
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
    fn a_folder_that_is_a_link_takes_nothing() {
        let dir = tempfile::tempdir().expect("dir");
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("real")).expect("folder");
        symlink("real", at("link")).expect("link");
        symlink("nowhere", at("dangling")).expect("link");
        std::fs::write(at("file"), "").expect("write");
        for bad in ["link", "link/", "link/.", "dangling", "file"] {
            let error = Landing::open(&at(bad)).expect_err(bad);
            assert!(matches!(error, LandingError::Leads(_)), "{bad}: {error}");
            let error = Landing::look(&at(bad)).expect_err(bad).told(&at(bad));
            assert_eq!((error.exit_code(), error.hints.len()), (2, 1), "{error}");
        }
        assert_eq!(std::fs::read_dir(at("real")).expect("folder").count(), 0);
        assert!(!at("nowhere").exists());
        // A link before the last name is one that the user named.
        Landing::look(&at("link/new")).expect("free");
        assert!(!at("real/new").exists(), "looking makes nothing");
        Landing::open(&at("link/new")).expect("made");
        assert!(at("real/new").is_dir());
    }

    #[test]
    fn below_the_current_folder_no_part_may_be_a_link() {
        let here = std::env::current_dir().expect("here");
        let inside = here.join("a/b");
        let names = |folder: &str| {
            let (named, names) = split(Path::new(folder));
            let names = names.iter().map(|name| name.to_string_lossy());
            (
                named.display().to_string(),
                names.collect::<Vec<_>>().join(" "),
            )
        };
        for (folder, named, below) in [
            (".", ".", ""),
            ("./a//b/", ".", "a b"),
            ("a/../b", ".", "a .. b"),
            (inside.to_str().expect("text"), ".", "a b"),
            (here.to_str().expect("text"), ".", ""),
            ("../x/a", "../x", "a"),
            ("..", "..", ""),
            ("/", "/", ""),
            ("/no/such/a", "/no/such", "a"),
            ("/no/such/..", "/no/such/..", ""),
        ] {
            assert_eq!(
                names(folder),
                (named.to_owned(), below.to_owned()),
                "{folder}"
            );
        }
    }

    #[test]
    fn nothing_but_a_file_or_a_link_is_replaced() {
        let dir = tempfile::tempdir().expect("dir");
        let at = |name: &str| dir.path().join(name);
        let landing = Landing::open(dir.path()).expect("opened");
        let late = landing.begin(Path::new("late"), &Digest::of(b"late"));
        let late = late.expect("begun");
        let fresh = Fresh::begin(&at("late")).expect("begun");
        for name in ["fifo", "late"] {
            let mode = Mode::from_raw_mode(0o600);
            let made = rustix::fs::mknodat(rustix::fs::CWD, at(name), FileType::Fifo, mode, 0);
            made.expect("fifo");
        }
        let _bound = std::os::unix::net::UnixListener::bind(at("socket")).expect("socket");
        for (name, told) in [
            ("fifo", "fifo is a fifo, not a file"),
            ("socket", "socket is a socket, not a file"),
        ] {
            let error = put(&landing, name, b"x").expect_err(name);
            assert_eq!(error.to_string(), told);
            let error = Fresh::begin(&at(name)).expect_err(name);
            assert_eq!(error.to_string(), told);
            assert!(look_at(&at(name)).is_err(), "{name}");
        }
        // One that came while the file did.
        let error = late.finish().expect_err("a fifo");
        assert!(error.to_string().contains("late is a fifo"), "{error}");
        assert!(fresh.finish().is_err());
        let error = look_at(Path::new("/dev/null")).expect_err("a device");
        assert_eq!(error.to_string(), "/dev/null is a device, not a file");
        assert!(Fresh::begin(Path::new("/dev/null")).is_err());
        for free in [at("new"), dir.path().to_owned()] {
            look_at(&free).expect("not said here");
        }
        let left = std::fs::read_dir(dir.path()).expect("folder").count();
        assert_eq!(left, 3, "the fifos and the socket");
    }

    #[test]
    fn a_fresh_file_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().expect("dir");
        let at = |name: &str| dir.path().join(name);
        let count = || std::fs::read_dir(dir.path()).expect("folder").count();
        std::fs::write(at("other"), "mine").expect("write");
        symlink("other", at("link")).expect("link");
        let mut fresh = Fresh::begin(&at("link")).expect("begun");
        fresh.file.write_all(b"half").expect("write");
        assert_eq!(count(), 3);
        drop(fresh);
        assert_eq!(count(), 2);
        let mut fresh = Fresh::begin(&at("link")).expect("begun");
        fresh.file.write_all(b"whole").expect("write");
        fresh.finish().expect("finished");
        let read = |name: &str| std::fs::read_to_string(at(name)).expect("reads");
        assert_eq!(
            (read("link"), read("other")),
            ("whole".into(), "mine".into())
        );
        assert_eq!(count(), 2);
        let error = Fresh::begin(dir.path()).expect_err("a folder");
        assert!(error.to_string().contains("is a folder, not a file"));
        assert!(Fresh::begin(&at("no/such")).is_err());
        std::fs::create_dir(at("real")).expect("folder");
        symlink("real", at("way")).expect("link");
        let error = Fresh::begin(&at("way/new")).expect_err("a link");
        assert!(error.to_string().contains("way is a link"), "{error}");
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
