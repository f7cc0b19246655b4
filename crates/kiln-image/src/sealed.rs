//! Files that never change once they are made: whether one still is what its record says (DESIGN, rule 8).
//!
//! Every byte is read at the first use after the host booted; after that device, inode, size and times must be what they were
//! then. What was seen lies in a note beside the file; a note that is missing or wrong only costs another read.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use kiln_core::Digest;
use serde::{Deserialize, Serialize};

/// Largest note that is read, bytes.
const NOTE_BYTES_MAX: u64 = 4096;

/// Why a sealed file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unsound {
    /// It could not be read.
    #[error("it cannot be read")]
    Io(#[source] io::Error),
    /// Its bytes are not those that were sealed.
    #[error("its digest is {found}, not {expected}")]
    Changed {
        /// As it was sealed.
        expected: Digest,
        /// As it is.
        found: Digest,
    },
}

#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    boot_id: String,
    digest: Digest,
    device: u64,
    inode: u64,
    bytes: u64,
    modified_ns: i128,
    changed_ns: i128,
}

impl Note {
    fn of(meta: &Metadata, digest: Digest) -> io::Result<Self> {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        Ok(Self {
            boot_id: boot_id.trim().to_owned(),
            digest,
            device: meta.dev(),
            inode: meta.ino(),
            bytes: meta.len(),
            modified_ns: ns(meta.mtime(), meta.mtime_nsec()),
            changed_ns: ns(meta.ctime(), meta.ctime_nsec()),
        })
    }

    fn read(path: &Path) -> Option<Self> {
        let bytes = fs::metadata(path).ok()?.len();
        let text = (bytes <= NOTE_BYTES_MAX).then(|| fs::read(path).ok())??;
        serde_json::from_slice(&text).ok()
    }

    /// A failure only costs another read of the file.
    fn write(&self, path: &Path) {
        let temp = path.with_extension(format!("tmp-{}", std::process::id()));
        let text = serde_json::to_vec(self).unwrap_or_default();
        if fs::write(&temp, text)
            .and_then(|()| fs::rename(&temp, path))
            .is_err()
        {
            let _litter = fs::remove_file(&temp);
        }
    }
}

/// Checks a sealed file against the digest it was sealed with.
///
/// # Errors
/// See [`Unsound`].
pub fn check(file: &Path, expected: Digest, note: &Path) -> Result<(), Unsound> {
    let open = File::open(file).map_err(Unsound::Io)?;
    // The identity from before the read: a change during it shows at the next use.
    let before = open.metadata().map_err(Unsound::Io)?;
    let now = Note::of(&before, expected).map_err(Unsound::Io)?;
    if Note::read(note).is_some_and(|seen| seen == now) {
        return Ok(());
    }
    let (found, _) = Digest::of_reader(open).map_err(Unsound::Io)?;
    if found != expected {
        return Err(Unsound::Changed { expected, found });
    }
    now.write(note);
    Ok(())
}

/// Remembers a file whose digest was just computed, after the last change of its name and mode.
pub fn remember(file: &Path, digest: Digest, note: &Path) {
    let seen = fs::metadata(file).and_then(|meta| Note::of(&meta, digest));
    if let Ok(seen) = seen {
        seen.write(note);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_change_are_found_and_those_that_do_not_are_read_once() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (file, note) = (dir.path().join("disk"), dir.path().join("seen.json"));
        fs::write(&file, "sealed").expect("write");
        let digest = Digest::of(b"sealed");
        check(&file, digest, &note).expect("sound");
        let first = fs::metadata(&note).expect("note").ino();
        check(&file, digest, &note).expect("sound");
        assert_eq!(
            fs::metadata(&note).expect("note").ino(),
            first,
            "not read again"
        );
        let before = fs::metadata(&file)
            .and_then(|meta| meta.modified())
            .expect("time");
        fs::write(&file, "seaLed").expect("write");
        File::options()
            .write(true)
            .open(&file)
            .and_then(|file| file.set_modified(before))
            .expect("set");
        let changed = check(&file, digest, &note).expect_err("changed");
        assert!(matches!(changed, Unsound::Changed { .. }), "{changed}");
        fs::remove_file(&file).expect("remove");
        assert!(matches!(check(&file, digest, &note), Err(Unsound::Io(_))));
    }

    #[test]
    fn a_note_of_another_boot_or_of_nonsense_is_not_believed() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (file, note) = (dir.path().join("disk"), dir.path().join("seen.json"));
        fs::write(&file, "other").expect("write");
        let digest = Digest::of(b"sealed");
        remember(&file, digest, &note);
        check(&file, digest, &note).expect("believed within a boot");
        let text = fs::read_to_string(&note).expect("note");
        let mut seen: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        seen["boot_id"] = "another".into();
        fs::write(&note, seen.to_string()).expect("write");
        check(&file, digest, &note).expect_err("read again");
        fs::write(&note, "{").expect("write");
        check(&file, digest, &note).expect_err("read again");
    }
}
