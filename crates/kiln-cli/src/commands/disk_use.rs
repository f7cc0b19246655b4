//! How much disk a directory of kiln really takes: allocated blocks, each file once however many names it has.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Bytes of a block as `st_blocks` counts them (stat(2)).
const BLOCK: u64 = 512;

/// Allocated bytes of a file or of everything below a directory. What cannot be read counts nothing; links are not followed.
pub(crate) fn of(path: &Path) -> u64 {
    let mut bytes = 0;
    let mut seen = HashSet::new();
    let mut open = vec![path.to_owned()];
    while let Some(path) = open.pop() {
        let Ok(meta) = fs::symlink_metadata(&path) else {
            continue;
        };
        if seen.insert((meta.dev(), meta.ino())) {
            bytes += meta.blocks() * BLOCK;
        }
        if meta.is_dir() {
            open.extend(
                fs::read_dir(&path)
                    .into_iter()
                    .flatten()
                    .flatten()
                    .map(|entry| entry.path()),
            );
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_second_names_count_nothing() {
        let dir = tempfile::tempdir().expect("temp dir");
        let sparse = fs::File::create(dir.path().join("sparse")).expect("create");
        sparse.set_len(1 << 30).expect("a hole");
        let data = dir.path().join("data");
        fs::write(&data, vec![1; 1 << 20]).expect("write");
        fs::File::open(&data)
            .and_then(|file| file.sync_all())
            .expect("flush");
        let one = of(dir.path());
        assert!((1 << 20..4 << 20).contains(&one), "{one}");
        fs::hard_link(&data, dir.path().join("again")).expect("link");
        assert!(of(dir.path()) < one + (1 << 19));
        assert_eq!(of(&dir.path().join("missing")), 0);
    }
}
