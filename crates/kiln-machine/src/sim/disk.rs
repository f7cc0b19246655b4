//! Simulated disks: a file that is a list of files.
//!
//! The first line is [`MAGIC`], then JSON: path to content in hex. An empty or all-zero file is a blank disk. Any other file is a disk whose
//! content this driver cannot read: it has no files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use kiln_core::DiskRole;
use kiln_core::machine::{DiskAccess, DiskSlot};
use serde::{Deserialize, Serialize};

const MAGIC: &str = "kiln-sim-disk 1\n";

/// Bytes of a simulated disk's file that are read.
const DISK_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Files of a disk: path to content.
pub(super) type Files = BTreeMap<String, Vec<u8>>;

/// A disk as the guest has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SimDisk {
    pub(super) role: DiskRole,
    /// The file that is read, and written where that is allowed.
    pub(super) file: PathBuf,
    pub(super) writable: bool,
    /// Content while mounted.
    pub(super) mounted: Option<Files>,
}

impl SimDisk {
    /// Makes the machine's own file for a slot, if it has one.
    pub(super) fn make(slot: &DiskSlot, dir: &Path) -> io::Result<Self> {
        let own = dir.join(file_name(slot.role));
        let (file, writable) = match (&slot.access, &slot.backing) {
            (DiskAccess::ReadOnly, Some(backing)) => (backing.clone(), false),
            (DiskAccess::Fork, Some(backing)) => {
                match read_disk(backing)? {
                    Some(files) => write_disk(&own, &files)?,
                    None => File::create(&own).map(drop)?,
                }
                (own, true)
            }
            (DiskAccess::New { size }, _) => {
                File::create(&own)?.set_len(size.0)?;
                (own, true)
            }
            (_, None) => return Err(io::Error::other("the disk has no file behind it")),
        };
        Ok(Self {
            role: slot.role,
            file,
            writable,
            mounted: None,
        })
    }

    /// Writes what is mounted back to the file.
    pub(super) fn flush(&self) -> io::Result<()> {
        match &self.mounted {
            Some(files) if self.writable => write_disk(&self.file, files),
            _ => Ok(()),
        }
    }
}

/// The file with a machine's own writes for a role, in its directory.
pub(super) fn file_name(role: DiskRole) -> String {
    format!("{}.disk", role.serial())
}

/// Reads the files of a simulated disk; `None` when it is blank.
///
/// # Errors
/// What the file system says. A file that is no simulated disk is one without files.
pub fn read_disk(path: &Path) -> io::Result<Option<Files>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(DISK_BYTES_MAX)
        .read_to_end(&mut bytes)?;
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let Some(json) = bytes.strip_prefix(MAGIC.as_bytes()) else {
        return Ok(Some(Files::new()));
    };
    let hex: BTreeMap<String, String> = serde_json::from_slice(json)?;
    let files = hex
        .into_iter()
        .map(|(path, text)| Ok((path, hex::decode(text).map_err(io::Error::other)?)))
        .collect::<io::Result<Files>>()?;
    Ok(Some(files))
}

/// Writes a simulated disk.
///
/// # Errors
/// What the file system says.
pub fn write_disk(path: &Path, files: &Files) -> io::Result<()> {
    let hex: BTreeMap<&String, String> = files
        .iter()
        .map(|(path, content)| (path, hex::encode(content)))
        .collect();
    let mut bytes = MAGIC.as_bytes().to_vec();
    serde_json::to_writer(&mut bytes, &hex)?;
    fs::write(path, bytes)
}
