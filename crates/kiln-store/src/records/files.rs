//! Reading and replacing the small files of a record.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::record::{RECORD_SCHEMA, RecordError};

/// Largest `record.json` or `observed.json`, bytes.
pub(super) const RECORD_BYTES_MAX: u64 = 16 << 20;

/// A new, private file for appending.
pub(super) fn create(path: &Path) -> Result<File, RecordError> {
    OpenOptions::new()
        .append(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(RecordError::io("create", path))
}

/// Replaces a file as a whole: written aside, synced, renamed. One writer per directory.
pub(super) fn replace(path: &Path, value: &impl Serialize) -> Result<(), RecordError> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|source| RecordError::Damaged {
        path: path.to_owned(),
        source,
    })?;
    bytes.push(b'\n');
    if bytes.len() as u64 > RECORD_BYTES_MAX {
        return Err(RecordError::TooLarge {
            path: path.to_owned(),
            max: RECORD_BYTES_MAX,
        });
    }
    let aside = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&aside)
        .map_err(RecordError::io("create", &aside))?;
    file.write_all(&bytes)
        .and_then(|()| file.sync_all())
        .map_err(RecordError::io("write", &aside))?;
    fs::rename(&aside, path).map_err(RecordError::io("replace", path))?;
    sync_dir(path.parent().unwrap_or(path))
}

pub(super) fn sync_dir(dir: &Path) -> Result<(), RecordError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(RecordError::io("sync", dir))
}

/// Reads a bounded JSON file with a `schema` of at most ours. The schema is looked at before anything else.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, RecordError> {
    let file = File::open(path).map_err(RecordError::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(RECORD_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(RecordError::io("read", path))?;
    if bytes.len() as u64 > RECORD_BYTES_MAX {
        return Err(RecordError::TooLarge {
            path: path.to_owned(),
            max: RECORD_BYTES_MAX,
        });
    }
    let damaged = |source| RecordError::Damaged {
        path: path.to_owned(),
        source,
    };
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(damaged)?;
    match value["schema"].as_u64() {
        Some(found) if found > u64::from(RECORD_SCHEMA) => Err(RecordError::Newer {
            path: path.to_owned(),
            found,
        }),
        _ => serde_json::from_value(value).map_err(damaged),
    }
}
