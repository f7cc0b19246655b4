//! Opens the small files of a home: locks, records, leases. What else has such a name (a fifo, a link, a device) is not taken for one, and nobody
//! waits for it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Opens a file that is one.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] when something else has its name; else what the file system says.
pub(crate) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let options = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    match options.open(path) {
        Ok(file) if file.metadata()?.is_file() => Ok(file),
        Ok(_) => Err(no_file()),
        // A link; a socket, or a fifo that nobody reads.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENXIO)) => {
            Err(no_file())
        }
        Err(error) => Err(error),
    }
}

/// As [`open`], to read it.
pub(crate) fn open_to_read(path: &Path) -> io::Result<File> {
    open(path, OpenOptions::new().read(true))
}

/// All that is in a file that is one.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_to_read(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn no_file() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is no plain file")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, mkfifoat};
    use std::time::Duration;

    pub(crate) fn fifo(path: &Path) {
        mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR).expect("fifo");
    }

    /// Work that would wait for ever ends its test instead.
    pub(crate) fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = std::sync::mpsc::channel();
        let _left_behind = std::thread::spawn(move || done.send(work()));
        let result = result.recv_timeout(Duration::from_secs(20));
        result.expect("nobody waits for a fifo")
    }

    #[test]
    fn only_plain_files_are_opened_and_nobody_waits_for_others() {
        let dir = tempfile::tempdir().expect("dir");
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "text").expect("write");
        std::fs::create_dir(at("folder")).expect("folder");
        std::os::unix::fs::symlink("file", at("link")).expect("link");
        let _bound = std::os::unix::net::UnixListener::bind(at("socket")).expect("socket");
        fifo(&at("fifo"));
        assert_eq!(read(&at("file")).expect("reads"), b"text");
        for name in ["folder", "link", "socket", "fifo"] {
            let path = at(name);
            let error = in_time(move || open_to_read(&path)).expect_err(name);
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{name}");
        }
        for name in ["link", "socket", "fifo"] {
            let path = at(name);
            let mut options = OpenOptions::new();
            options.create(true).append(true);
            let opened = in_time(move || open(&path, &mut options));
            let error = opened.expect_err(name);
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{name}");
        }
        let none = read(&at("none")).expect_err("none");
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
    }
}
