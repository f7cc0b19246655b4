//! Which QEMU this host has, and whether it is new enough.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln_core::Digest;
use serde::{Deserialize, Serialize};

use crate::driver::LaunchError;

/// `file:` migration came with this version, and read-only memory files for clones.
pub const VERSION_MIN: (u32, u32) = (8, 2);
/// The program's name.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// Where it is looked for when the operator names none.
const SEARCH: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/bin"];

/// A QEMU program that was found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Program {
    /// Where it is.
    pub path: PathBuf,
    /// As `--version` says it.
    pub version: String,
    /// Major and minor number.
    pub number: (u32, u32),
    /// Changes whenever the file changes: device, inode, size and times, hashed.
    pub identity: String,
}

impl Program {
    /// Finds the program and asks it for its version.
    ///
    /// # Errors
    /// [`LaunchError::Vmm`] when it is missing, does not start or is too old.
    pub fn find(named: Option<&Path>) -> Result<Self, LaunchError> {
        let path = locate(named)?;
        let identity = identity(&path).map_err(|error| unusable(&path, &error.to_string()))?;
        let output = Command::new(&path)
            .arg("--version")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .map_err(|error| unusable(&path, &error.to_string()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let (version, number) =
            parse_version(&text).ok_or_else(|| unusable(&path, "it does not say its version"))?;
        let program = Self {
            path,
            version,
            number,
            identity,
        };
        program.check_version()?;
        Ok(program)
    }

    /// As [`Self::find`], but believes a remembered answer as long as the file has not changed.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub fn find_or_remember(
        named: Option<&Path>,
        remembered: Option<&Self>,
    ) -> Result<Self, LaunchError> {
        let path = locate(named)?;
        match remembered {
            Some(old) if old.path == path && identity(&path).is_ok_and(|id| id == old.identity) => {
                old.check_version()?;
                Ok(old.clone())
            }
            _ => Self::find(named),
        }
    }

    fn check_version(&self) -> Result<(), LaunchError> {
        if self.number >= VERSION_MIN {
            return Ok(());
        }
        let (major, minor) = VERSION_MIN;
        let why = format!(
            "version {} is too old, {major}.{minor} or newer is needed (Debian 12 has it in bookworm-backports)",
            self.version
        );
        Err(unusable(&self.path, &why))
    }
}

fn unusable(path: &Path, why: &str) -> LaunchError {
    LaunchError::Vmm {
        program: path.display().to_string(),
        why: why.to_owned(),
    }
}

fn locate(named: Option<&Path>) -> Result<PathBuf, LaunchError> {
    let found = match named {
        Some(path) => path.is_file().then(|| path.to_owned()),
        None => SEARCH
            .iter()
            .map(|dir| Path::new(dir).join(PROGRAM))
            .find(|p| p.is_file()),
    };
    let found = found.and_then(|path| std::fs::canonicalize(path).ok());
    found.ok_or_else(|| {
        let wanted = named.unwrap_or(Path::new(PROGRAM));
        unusable(
            wanted,
            "it is not installed (Debian: package qemu-system-x86)",
        )
    })
}

fn identity(path: &Path) -> io::Result<String> {
    let meta = std::fs::metadata(path)?;
    let text = format!(
        "{} {} {} {} {}",
        meta.dev(),
        meta.ino(),
        meta.size(),
        meta.mtime_nsec() as i128 + i128::from(meta.mtime()) * 1_000_000_000,
        meta.ctime()
    );
    Ok(Digest::of(text.as_bytes()).short(32))
}

/// `QEMU emulator version 10.0.2 (Debian ...)`.
fn parse_version(text: &str) -> Option<(String, (u32, u32))> {
    let version = text.split("version ").nth(1)?.split_whitespace().next()?;
    let mut numbers = version.split('.').map(|part| {
        let digits = part.bytes().take_while(u8::is_ascii_digit).count();
        part[..digits].parse().ok()
    });
    let number = (numbers.next()??, numbers.next()??);
    Some((version.chars().take(40).collect(), number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared() {
        let parse = |text| parse_version(text).map(|(_, number)| number);
        assert_eq!(
            parse("QEMU emulator version 10.0.2 (Debian 1:10.0.2)"),
            Some((10, 0))
        );
        assert_eq!(parse("QEMU emulator version 8.2rc1"), Some((8, 2)));
        assert_eq!(parse("version "), None);
        assert_eq!(parse("nonsense"), None);
        let old = Program {
            path: "/usr/bin/q".into(),
            version: "7.2.1".into(),
            number: (7, 2),
            identity: String::new(),
        };
        assert!(
            matches!(old.check_version(), Err(LaunchError::Vmm { why, .. }) if why.contains("8.2"))
        );
    }

    #[test]
    fn a_missing_program_names_its_package() {
        let error = Program::find(Some(Path::new("/nonexistent/qemu"))).unwrap_err();
        assert!(error.to_string().contains("qemu-system-x86"), "{error}");
    }
}
