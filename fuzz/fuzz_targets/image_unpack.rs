//! The tar archive of an uploaded source: nothing is written beside its folder, and no more than the limits say.
//! An odd first byte sets the checksums of the heads right, so that what is behind them is reached; the next one compresses or does not.
#![no_main]

use std::fs;
use std::path::Path;

use kiln_image::context::{self, Limits, Tree};
use libfuzzer_sys::fuzz_target;

const BLOCK: usize = 512;
const LIMITS: Limits = Limits {
    entries_max: 64,
    bytes_max: 1 << 20,
    path_bytes_max: 1024,
};

/// Makes every head's checksum the one that its bytes have, as far as sizes can be followed.
fn set_right(bytes: &mut [u8]) {
    let mut at = 0;
    while let Some(head) = bytes.get_mut(at..at + BLOCK) {
        head[148..156].fill(b' ');
        let sum: u32 = head.iter().map(|byte| u32::from(*byte)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let digits: String = head[124..136]
            .iter()
            .take_while(|byte| (b'0'..=b'7').contains(byte))
            .map(|byte| char::from(*byte))
            .collect();
        let size = usize::from_str_radix(&digits, 8).unwrap_or(0).min(bytes.len());
        at += BLOCK + size.div_ceil(BLOCK) * BLOCK;
    }
}

/// Bytes of the files below a folder; links are not followed.
fn content(dir: &Path) -> u64 {
    let mut all = 0;
    for entry in fs::read_dir(dir).expect("a folder").map(|entry| entry.expect("an entry")) {
        let meta = fs::symlink_metadata(entry.path()).expect("there");
        if meta.is_dir() {
            all += content(&entry.path());
        } else if meta.is_file() {
            all += meta.len();
        } else {
            assert!(meta.is_symlink(), "neither file, folder nor link");
        }
    }
    all
}

fuzz_target!(|input: &[u8]| {
    let [mend, pack, bytes @ ..] = input else {
        return;
    };
    let mut archive = bytes.to_vec();
    if mend % 2 == 1 {
        set_right(&mut archive);
    }
    let archive = match pack % 4 {
        1 => zstd::encode_all(&archive[..], 1).expect("compressed"),
        _ => archive,
    };
    let parent = tempfile::tempdir().expect("a folder");
    let inside = parent.path().join("in");
    fs::create_dir(&inside).expect("made");
    let done = context::unpack(&archive[..], &inside, LIMITS);
    assert_eq!(fs::read_dir(parent.path()).expect("read").count(), 1, "something lies beside");
    let lies = content(&inside);
    // A piece that goes beyond the limit is refused before it is written.
    assert!(lies <= LIMITS.bytes_max, "{lies} bytes");
    if let Ok(done) = done {
        assert!(done.entries <= LIMITS.entries_max);
        assert_eq!(done.bytes, lies);
        // What was taken can be read as a source, or is refused in words.
        if let Ok(tree) = Tree::open(&inside, None, &[], LIMITS) {
            let _either = context::digest(&tree);
        }
    }
});
