//! Key files: outside the database, readable by their owner alone, created whole or not at all.
//!
//! Several processes may open the same home at once: whoever creates a file first wins, the others read what it wrote.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// Largest key file.
const FILE_MAX: u64 = 64 * 1024;

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SealedError {
    /// The file system refused.
    #[error("cannot use the key file {}", path.display())]
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others could read or replace it.
    #[error(
        "the key file {} is open to others (mode {mode:o}, owner {owner}): it must belong to you and be readable by you alone (chmod 600)",
        path.display()
    )]
    Open {
        /// Which file or folder.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Its owner.
        owner: u32,
    },
    /// Its content is no key of its kind.
    #[error("{} is not a key of its kind: restore it from a backup, or remove it to have a new one made", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
    },
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> SealedError {
    let path = path.to_owned();
    move |source| SealedError::Io { path, source }
}

/// A folder of key files.
#[derive(Clone, Debug)]
pub(crate) struct Vault {
    root: PathBuf,
}

impl Vault {
    /// Opens or makes the folder.
    pub(crate) fn open(root: &Path) -> Result<Self, SealedError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(io_error(root))?;
        let vault = Self {
            root: root.to_owned(),
        };
        check(root, &fs::symlink_metadata(root).map_err(io_error(root))?)?;
        Ok(vault)
    }

    /// A vault inside this one.
    pub(crate) fn inner(&self, name: &str) -> Result<Self, SealedError> {
        Self::open(&self.root.join(name))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Names of the key files, sorted; half-written ones are not among them.
    pub(crate) fn names(&self) -> Result<Vec<String>, SealedError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(io_error(&self.root))? {
            let entry = entry.map_err(io_error(&self.root))?;
            if let Ok(name) = entry.file_name().into_string()
                && name.ends_with(".key")
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Reads a file, if there is one.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, SealedError> {
        let path = self.path(name);
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error(&path)(error)),
        };
        let metadata = file.metadata().map_err(io_error(&path))?;
        check(&path, &metadata)?;
        if !metadata.is_file() {
            return Err(SealedError::Damaged { path });
        }
        let mut bytes = Vec::new();
        let got = file.take(FILE_MAX + 1).read_to_end(&mut bytes);
        got.map_err(io_error(&path))?;
        if bytes.len() as u64 > FILE_MAX {
            return Err(SealedError::Damaged { path });
        }
        Ok(Some(bytes))
    }

    /// The file's content; made by `make` if there is none. Never seen half written, never replaced.
    pub(crate) fn read_or_create(
        &self,
        name: &str,
        make: impl FnOnce() -> Vec<u8>,
    ) -> Result<Vec<u8>, SealedError> {
        if let Some(bytes) = self.read(name)? {
            return Ok(bytes);
        }
        let path = self.path(name);
        let part = self.path(&format!("{name}.{}.part", hex::encode(random::<8>())));
        let made = (|| {
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&part)?;
            file.write_all(&make())?;
            file.sync_all()?;
            match fs::hard_link(&part, &path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                other => other,
            }
        })();
        let removed = fs::remove_file(&part);
        made.and(removed).map_err(io_error(&path))?;
        let synced = File::open(&self.root).and_then(|folder| folder.sync_all());
        synced.map_err(io_error(&self.root))?;
        self.read(name)?.ok_or(SealedError::Damaged { path })
    }

    /// Removes a file, if it is there.
    pub(crate) fn remove(&self, name: &str) -> Result<(), SealedError> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(&path)(error)),
            _ => Ok(()),
        }
    }
}

/// Random bytes of the operating system.
///
/// # Panics
/// When the system has no randomness: nothing safe can be done then.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    bytes
}

fn check(path: &Path, metadata: &fs::Metadata) -> Result<(), SealedError> {
    let mode = metadata.mode() & 0o777;
    let owner = metadata.uid();
    if mode & 0o077 != 0 || owner != rustix::process::geteuid().as_raw() {
        return Err(SealedError::Open {
            path: path.to_owned(),
            mode,
            owner,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_is_the_owners_alone() {
        let dir = tempfile::tempdir().expect("dir");
        let vault = Vault::open(&dir.path().join("keys")).expect("vault");
        let threads: Vec<_> = (0..8_u8)
            .map(|i| {
                let vault = vault.clone();
                std::thread::spawn(move || vault.read_or_create("a.key", || vec![i; 9]))
            })
            .collect();
        let seen: Vec<_> = threads
            .into_iter()
            .map(|thread| thread.join().expect("thread").expect("key"))
            .collect();
        assert!(seen.iter().all(|one| *one == seen[0]), "{seen:?}");
        assert_eq!(vault.names().expect("names"), ["a.key"]);
        let left = fs::read_dir(dir.path().join("keys")).expect("list").count();
        assert_eq!(left, 1, "no half-written file stays");
        let mode = fs::metadata(vault.path("a.key")).expect("stat").mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::set_permissions(vault.path("a.key"), fs::Permissions::from_mode(0o640)).expect("chmod");
        assert!(matches!(vault.read("a.key"), Err(SealedError::Open { .. })));
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().expect("dir");
        let vault = Vault::open(&dir.path().join("keys")).expect("vault");
        fs::write(dir.path().join("other"), b"x").expect("write");
        std::os::unix::fs::symlink(dir.path().join("other"), vault.path("a.key")).expect("link");
        assert!(matches!(vault.read("a.key"), Err(SealedError::Io { .. })));
    }

    #[test]
    fn a_pipe_or_a_folder_in_a_keys_place_is_told_at_once() {
        let dir = tempfile::tempdir().expect("dir");
        let vault = Vault::open(&dir.path().join("keys")).expect("vault");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, vault.path("p.key"), mode).expect("pipe");
        DirBuilder::new()
            .mode(0o700)
            .create(vault.path("d.key"))
            .expect("folder");
        for name in ["p.key", "d.key"] {
            let made = vault.read_or_create(name, || b"new".to_vec());
            assert!(
                matches!(made, Err(SealedError::Damaged { .. })),
                "{name}: {made:?}"
            );
        }
    }
}
