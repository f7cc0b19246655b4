//! Files that never change once they are made: whether one still is what its record says (DESIGN, rule 8).
//!
//! Every byte is read at the first use after the host booted; after that device, inode, size and times must be what they were
//! then. What was seen lies in a note beside the file; a note that is missing or wrong only costs another read.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_core::Digest;
use serde::{Deserialize, Serialize};

/// Most notes of files that are not kiln's.
const NOTES_MAX: usize = 64;
/// How long ago such a file must have changed, for its times to tell the next change.
const SETTLED: Duration = Duration::from_secs(2);
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

/// Digest of a file that is not kiln's and may change: read once per boot of the host for as long as its identity stays. Notes lie in a
/// folder, at most [`NOTES_MAX`] of them.
///
/// # Errors
/// When the file cannot be read.
pub fn digest_of(file: &File, notes: &Path) -> io::Result<Digest> {
    digest_settled(file, notes, SETTLED)
}

fn digest_settled(file: &File, notes: &Path, settled: Duration) -> io::Result<Digest> {
    let meta = file.metadata()?;
    let note = notes.join(format!("{:x}-{:x}.json", meta.dev(), meta.ino()));
    if let Some(seen) = Note::read(&note)
        && seen == Note::of(&meta, seen.digest)?
    {
        return Ok(seen.digest);
    }
    let (digest, _) = Digest::of_reader(file)?;
    // Two changes within one tick of the file system's clock have the same time.
    let changed = UNIX_EPOCH + Duration::from_secs(u64::try_from(meta.ctime()).unwrap_or(0));
    let since = SystemTime::now().duration_since(changed);
    if since.is_ok_and(|since| since > settled) && make_room(notes).is_ok() {
        Note::of(&meta, digest)?.write(&note);
    }
    Ok(digest)
}

/// Makes the folder, and room in it for one more note: the oldest go.
fn make_room(notes: &Path) -> io::Result<()> {
    fs::create_dir_all(notes)?;
    let mut found = Vec::new();
    for entry in fs::read_dir(notes)? {
        let entry = entry?;
        // One that another process removed just now takes no room.
        if let Ok(modified) = entry.metadata().and_then(|meta| meta.modified()) {
            found.push((modified, entry.path()));
        }
    }
    found.sort();
    for (_, path) in found
        .iter()
        .take((found.len() + 1).saturating_sub(NOTES_MAX))
    {
        let _gone_already = fs::remove_file(path);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_ours_is_read_again_when_it_changed() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (file, notes) = (dir.path().join("disk"), dir.path().join("notes"));
        let after = |settled: Duration| {
            let file = File::open(&file).expect("open");
            digest_settled(&file, &notes, settled).expect("readable")
        };
        let digest = || after(Duration::ZERO);
        let count = || fs::read_dir(&notes).map_or(0, Iterator::count);
        fs::write(&file, "one").expect("write");
        assert_eq!(after(Duration::from_secs(600)), Digest::of(b"one"));
        assert_eq!(count(), 0, "its times tell nothing yet");
        assert_eq!(digest(), Digest::of(b"one"));
        assert_eq!(count(), 1);
        // What a note says is believed as long as the identity is the same.
        let note = fs::read_dir(&notes).expect("notes").flatten().next();
        let note = note.expect("a note").path();
        let text = fs::read_to_string(&note).expect("note");
        let other = Digest::of(b"other");
        fs::write(&note, text.replace(&Digest::of(b"one").hex(), &other.hex())).expect("write");
        assert_eq!(digest(), other);
        // Of another size: a file system's clock may not have ticked.
        fs::write(&file, "twofold").expect("write");
        assert_eq!(digest(), Digest::of(b"twofold"));
        for number in 0..NOTES_MAX * 2 {
            fs::write(notes.join(format!("{number}.json")), "{}").expect("write");
        }
        make_room(&notes).expect("room");
        assert_eq!(count(), NOTES_MAX - 1);
    }

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
