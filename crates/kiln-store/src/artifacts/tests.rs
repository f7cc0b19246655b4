//! Stored and read back: whole, in ranges, damaged, foreign.

use super::*;
use crate::logs::LogKey;

fn names() -> (TenantName, JobId) {
    ("acme".parse().expect("name"), "b1".parse().expect("id"))
}

fn store(dir: &Path, keys: LogKeys) -> ArtifactStore {
    let target = ObjectTarget::Folder(dir.join("kept"));
    ArtifactStore::open(dir.join("parts"), &target, keys).expect("opens")
}

fn pieces(content: &[u8]) -> impl Stream<Item = Result<Bytes, io::Error>> + use<> {
    let pieces: Vec<_> = content
        .chunks(10_000)
        .map(|piece| Ok(Bytes::copy_from_slice(piece)))
        .collect();
    stream::iter(pieces)
}

async fn read(
    store: &ArtifactStore,
    stored: Stored,
    range: Range<u64>,
) -> Result<Vec<u8>, ArtifactError> {
    let (tenant, job) = names();
    let pieces = store.read(&tenant, &job, stored, range).await?;
    let all: Vec<Bytes> = pieces.try_collect().await?;
    Ok(all.concat())
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).expect("reads").flatten() {
            match entry.path().is_dir() {
                true => folders.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    found
}

#[tokio::test]
async fn every_range_reads_back_sealed_or_not() {
    let content: Vec<u8> = (0..1_300_000_u32).map(|n| (n % 251) as u8).collect();
    for keys in [LogKeys::default(), LogKeys::new(LogKey::new([7; 32]), [])] {
        let dir = tempfile::tempdir().expect("dir");
        let store = store(dir.path(), keys);
        let (tenant, job) = names();
        for length in [0, 1, PIECE - 1, PIECE, PIECE + 1, content.len()] {
            let part = &content[..length];
            let stored = store.put(&tenant, &job, pieces(part), u64::MAX).await;
            let stored = stored.expect("stored");
            assert_eq!(
                (stored.digest, stored.size),
                (Digest::of(part), length as u64)
            );
            let end = length as u64;
            for range in [
                0..end,
                0..0,
                0..1.min(end),
                end / 2..end,
                end.saturating_sub(1)..end,
                65_535..65_537,
                5..u64::MAX,
            ] {
                let from = range.start.min(end) as usize;
                let to = (range.end.min(end) as usize).max(from);
                let got = read(&store, stored, range.clone()).await.expect("reads");
                assert_eq!(got, content[from..to], "{range:?} of {length}");
            }
        }
        let before = files(dir.path()).len();
        store
            .put(&tenant, &job, pieces(b"a"), 1)
            .await
            .expect("stored");
        store
            .put(&tenant, &job, pieces(b"a"), 1)
            .await
            .expect("the same again");
        assert_eq!(files(dir.path()).len(), before + 1);
        store.remove_job(&tenant, &job).await.expect("removed");
        store.remove_job(&tenant, &job).await.expect("again");
        assert!(files(dir.path()).is_empty());
    }
}

#[tokio::test]
async fn what_breaks_off_or_is_too_large_leaves_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let store = store(dir.path(), LogKeys::default());
    let (tenant, job) = names();
    let large = store.put(&tenant, &job, pieces(&[0; 11]), 10).await;
    assert!(matches!(large, Err(ArtifactError::TooLarge { max: 10 })));
    let broken = stream::iter([
        Ok(Bytes::from("abc")),
        Err(io::Error::from(io::ErrorKind::ConnectionReset)),
    ]);
    let cut = store.put(&tenant, &job, broken, 10).await;
    assert!(matches!(cut, Err(ArtifactError::Cut(_))));
    assert!(files(dir.path()).is_empty());
    std::fs::write(dir.path().join("parts/9-9.part"), "x").expect("written");
    let _opened_again = self::store(dir.path(), LogKeys::default());
    assert!(files(dir.path()).is_empty());
}

#[tokio::test]
async fn another_key_another_job_or_a_changed_bit_opens_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let sealed = store(dir.path(), LogKeys::new(LogKey::new([7; 32]), []));
    let (tenant, job) = names();
    let stored = sealed
        .put(&tenant, &job, pieces(b"secret words"), 100)
        .await;
    let stored = stored.expect("stored");
    let file = files(dir.path()).remove(0);
    let bytes = std::fs::read(&file).expect("reads");
    assert!(!bytes.windows(6).any(|window| window == b"secret"));
    let other = store(dir.path(), LogKeys::default());
    let refused = read(&other, stored, 0..12).await;
    assert!(matches!(refused, Err(ArtifactError::Key(_))));
    let moved = dir.path().join("kept/artifacts/acme/b2");
    std::fs::create_dir_all(&moved).expect("folder");
    std::fs::copy(&file, moved.join(stored.digest.hex())).expect("copied");
    let b2: JobId = "b2".parse().expect("id");
    let pieces = sealed
        .read(&tenant, &b2, stored, 0..12)
        .await
        .expect("there");
    let got: Result<Vec<Bytes>, _> = pieces.try_collect().await;
    assert!(matches!(got, Err(ArtifactError::Damaged(_))));
    for at in [PREAMBLE, bytes.len() - 1] {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        std::fs::write(&file, changed).expect("written");
        assert!(matches!(
            read(&sealed, stored, 0..12).await,
            Err(ArtifactError::Damaged(_))
        ));
    }
    std::fs::write(&file, &bytes[..bytes.len() - 20]).expect("written");
    assert!(matches!(
        read(&sealed, stored, 0..12).await,
        Err(ArtifactError::Damaged(_))
    ));
}
