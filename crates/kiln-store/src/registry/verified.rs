//! Which stored files had their digest computed in full since this host booted (DESIGN rule 8).
//!
//! After a file was hashed once, device, inode, size and change time stand for its content until
//! the next boot. The table is an append-only text file per boot, so that later kiln processes need
//! not hash again; losing it, or a torn last line, only costs one more hash.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_core::Digest;

use super::error::StoreError;

/// Longest line read from the table, bytes.
const LINE_BYTES_MAX: usize = 256;
/// A longer table is begun anew, bytes: a quarter of a million contents.
const TABLE_BYTES_MAX: u64 = 32 << 20;
/// Locks under which files are hashed: as many hashes run at once at most, and none twice.
const HASHING_MAX: usize = 16;

/// What stands for a file's content within one boot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed_s: i64,
    changed_ns: i64,
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            changed_s: meta.ctime(),
            changed_ns: meta.ctime_nsec(),
        })
    }

    fn parse(line: &str) -> Option<(Digest, Self)> {
        let mut words = line.strip_suffix('\n')?.split(' ');
        let digest = words.next()?.parse().ok()?;
        let stamp = Self {
            device: words.next()?.parse().ok()?,
            inode: words.next()?.parse().ok()?,
            size: words.next()?.parse().ok()?,
            changed_s: words.next()?.parse().ok()?,
            changed_ns: words.next()?.parse().ok()?,
        };
        words.next().is_none().then_some((digest, stamp))
    }
}

#[derive(Debug)]
struct Table {
    stamps: HashMap<Digest, Stamp>,
    file: File,
}

/// The table of this boot.
#[derive(Debug)]
pub(crate) struct Verified {
    path: PathBuf,
    table: Mutex<Table>,
    hashing: [Mutex<()>; HASHING_MAX],
}

impl Verified {
    /// Reads this boot's table in `dir` and removes those of earlier boots.
    pub(crate) fn open(dir: &Path, boot_id: &str) -> Result<Self, StoreError> {
        let path = dir.join(boot_id);
        let entries = fs::read_dir(dir).map_err(StoreError::io("list", dir))?;
        for entry in entries {
            let entry = entry.map_err(StoreError::io("list", dir))?.path();
            if entry != path {
                fs::remove_file(&entry).map_err(StoreError::io("remove", &entry))?;
            }
        }
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(StoreError::io("open", &path))?;
        let length = file.metadata().map_err(StoreError::io("examine", &path))?;
        if length.len() > TABLE_BYTES_MAX {
            file.set_len(0).map_err(StoreError::io("cut", &path))?;
        }
        let stamps = read_table(&file).map_err(StoreError::io("read", &path))?;
        let table = Mutex::new(Table { stamps, file });
        let hashing = std::array::from_fn(|_| Mutex::default());
        Ok(Self {
            path,
            table,
            hashing,
        })
    }

    /// The content of this file is known to have this digest: it was hashed while it was written,
    /// or just now.
    pub(crate) fn record(&self, digest: &Digest, file: &File) -> Result<(), StoreError> {
        let stamp = Stamp::of(file).map_err(StoreError::io("examine", &self.path))?;
        let line = format!(
            "{digest} {} {} {} {} {}\n",
            stamp.device, stamp.inode, stamp.size, stamp.changed_s, stamp.changed_ns
        );
        let mut table = self.lock();
        table.stamps.insert(*digest, stamp);
        if let Err(error) = table.file.write_all(line.as_bytes()) {
            // Only a later process pays, by hashing again.
            tracing::debug!(path = %self.path.display(), %error, "cannot note a verified blob");
        }
        Ok(())
    }

    /// Forgets what was known of this digest.
    pub(crate) fn forget(&self, digest: &Digest) {
        self.lock().stamps.remove(digest);
    }

    /// Whether the open file has the content its digest says: from the table, else by hashing all of it.
    /// Leaves the file's position anywhere.
    pub(crate) fn check(&self, digest: &Digest, file: &File) -> io::Result<bool> {
        if self.knows(digest, file)? {
            return Ok(true);
        }
        let slot = usize::from(digest.bytes()[0]) % HASHING_MAX;
        let _one_at_a_time = self.hashing[slot]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.knows(digest, file)? {
            return Ok(true);
        }
        self.check_in_full(digest, file)
    }

    /// Hashes all of the file, whatever the table says.
    pub(crate) fn check_in_full(&self, digest: &Digest, file: &File) -> io::Result<bool> {
        io::Seek::rewind(&mut &*file)?;
        let before = Stamp::of(file)?;
        let (actual, size) = Digest::of_reader(file)?;
        if actual != *digest || size != before.size || Stamp::of(file)? != before {
            self.forget(digest);
            return Ok(false);
        }
        self.record(digest, file)
            .map(|()| true)
            .map_err(io::Error::other)
    }

    fn knows(&self, digest: &Digest, file: &File) -> io::Result<bool> {
        let stamp = Stamp::of(file)?;
        Ok(self.lock().stamps.get(digest) == Some(&stamp))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read_table(file: &File) -> io::Result<HashMap<Digest, Stamp>> {
    let mut stamps = HashMap::new();
    let mut reader = BufReader::new(file);
    let mut line = String::new();
    loop {
        line.clear();
        let mut bounded = io::Read::take(&mut reader, LINE_BYTES_MAX as u64);
        match bounded.read_line(&mut line) {
            Ok(0) => return Ok(stamps),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(stamps),
            Err(error) => return Err(error),
        }
        if let Some((digest, stamp)) = Stamp::parse(&line) {
            stamps.insert(digest, stamp);
        }
    }
}

/// Changes with every boot of the host; unknown (a random text) where the system does not tell.
pub(crate) fn boot_id() -> Result<String, StoreError> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let text = text.trim();
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') {
        Ok(text.to_owned())
    } else {
        super::durable::random_hex()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_parse_back_and_torn_ones_do_not() {
        let digest = Digest::of(b"x");
        let line = format!("{digest} 1 2 3 -4 5\n");
        let (parsed, stamp) = Stamp::parse(&line).expect("a full line");
        assert_eq!((parsed, stamp.changed_s), (digest, -4));
        for cut in 0..line.len() {
            assert!(Stamp::parse(&line[..cut]).is_none(), "{cut}");
        }
    }

    #[test]
    fn a_changed_file_is_hashed_again_and_found_out() {
        let dir = tempfile::tempdir().expect("temp dir");
        let tables = dir.path().join("verified");
        fs::create_dir(&tables).expect("mkdir");
        let path = dir.path().join("blob");
        fs::write(&path, b"good").expect("write");
        let digest = Digest::of(b"good");
        let verified = Verified::open(&tables, "boot-1").expect("opens");
        let check = |verified: &Verified| {
            let file = File::open(&path).expect("open");
            verified.check(&digest, &file).expect("readable")
        };
        assert!(check(&verified));
        drop(verified);
        let verified = Verified::open(&tables, "boot-1").expect("opens");
        let file = File::open(&path).expect("open");
        assert!(
            verified.knows(&digest, &file).expect("stat"),
            "the table persists"
        );
        // The kernel's file times are coarse: write until this write can be told from the first.
        let before = Stamp::of(&file).expect("stat");
        while Stamp::of(&file).expect("stat") == before {
            fs::write(&path, b"evil").expect("write");
        }
        assert!(!check(&verified));
        fs::write(&path, b"good").expect("write");
        assert!(check(&verified));
        let next_boot = Verified::open(&tables, "boot-2").expect("opens");
        assert!(!next_boot.knows(&digest, &file).expect("stat"));
        assert!(!tables.join("boot-1").exists());
    }
}
