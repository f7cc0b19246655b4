//! A home of kiln that goes away with its test.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_core::machine::{BootSource, DiskAccess, DiskFormat};
use kiln_core::{ByteSize, Digest, DiskRole, DiskSlot, MachineSpec};

/// A temporary `KILN_HOME`, with a made-up machine image that is enough for the simulated driver.
#[derive(Debug)]
pub struct TempHome {
    dir: tempfile::TempDir,
}

impl Default for TempHome {
    fn default() -> Self {
        Self::new()
    }
}

impl TempHome {
    /// An empty home.
    ///
    /// # Panics
    /// When no temporary directory can be made.
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("kiln-test-")
            .tempdir()
            .expect("a temporary directory");
        Self { dir }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path in it.
    #[must_use]
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(path)
    }

    /// Writes a file in it, with the directories above; gives its path.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write(&self, path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(path);
        let parent = path.parent().expect("below the home");
        fs::create_dir_all(parent).expect("directories");
        fs::write(&path, content).expect("the file");
        path
    }

    /// A machine specification that the simulated driver accepts: one CPU, 256 MiB, and a root disk.
    ///
    /// # Panics
    /// When `name` is no machine name.
    #[must_use]
    pub fn machine_spec(&self, name: &str) -> MachineSpec {
        let part = |file: &str| self.write(Path::new("image").join(file), file);
        MachineSpec {
            name: name.parse().expect("a machine name"),
            cpus: 1,
            memory: ByteSize::mib(256),
            boot: BootSource {
                kernel: part("kernel"),
                initrd: part("initrd"),
                args: Vec::new(),
                image: Digest::of(b"a made-up machine image"),
            },
            disks: vec![DiskSlot {
                role: DiskRole::Root,
                backing: Some(part("root.img")),
                format: DiskFormat::Raw,
                access: DiskAccess::ReadOnly,
            }],
            boot_timeout_ms: 10_000,
            keepable: false,
            host_cpus: Vec::new(),
            disk_bytes_per_second: None,
        }
    }

    /// Names of everything below a directory of the home, sorted; for checks that nothing is left.
    #[must_use]
    pub fn list(&self, path: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.join(path))
            .into_iter()
            .flatten()
            .flatten();
        let mut names: Vec<_> = entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_away() {
        let home = TempHome::new();
        let path = home.path().to_owned();
        home.write("a/b", "c");
        assert_eq!(home.list("a"), ["b"]);
        assert!(home.machine_spec("m").boot.kernel.is_file());
        drop(home);
        assert!(!path.exists());
    }
}
