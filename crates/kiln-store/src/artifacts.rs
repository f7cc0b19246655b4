//! Artifacts: files that jobs left, kept below their job and named by the digest of their content.
//!
//! A file is sealed piece by piece as it arrives ([`crate::logs::LogKeys`]: by a checksum, or by a key), in a file of this host; when it is whole
//! it is renamed into its folder or sent to a bucket. So a kill leaves at most a half file that the next start removes, and the same content
//! twice is one file. Ranges are read without what is before them.
//!
//! ```text
//! artifacts/TENANT/JOB/SHA256: preamble 64 bytes, then pieces of 64 KiB (the last one shorter), each with its checksum or tag
//! ```
//! What this room does not know: names of artifacts, who may write or read, how many there may be.

use std::io::{self, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use kiln_core::digest::Hasher;
use kiln_core::{Digest, JobId, TenantName};
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt as _};
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

use crate::logs::seal::{NotOpened, PREAMBLE, Sealer};
use crate::logs::{LogError, LogKeys, ObjectTarget};

/// Bytes of a piece, unsealed.
const PIECE: usize = 64 * 1024;
/// Pieces that one request to a bucket reads.
const PIECES_AT_ONCE: u64 = 16;
/// Bytes of one part of an upload to a bucket; smaller files go in one request.
const UPLOAD_PART: usize = 8 << 20;
/// First bytes of a file.
const MAGIC: &[u8; 8] = b"kilnart1";
/// Suffix of a file that is not whole yet.
const PART: &str = "part";

/// Why an artifact was not stored or read.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// It is larger than it may be.
    #[error("it has more than {max} bytes")]
    TooLarge {
        /// The limit.
        max: u64,
    },
    /// It broke off on its way here.
    #[error("it ended before it was whole")]
    Cut(#[source] io::Error),
    /// There is none.
    #[error("there is no such artifact in the store")]
    NotFound,
    /// What is stored is not what was written.
    #[error("the stored artifact is damaged: {0}")]
    Damaged(&'static str),
    /// It was sealed with a key this store was not given.
    #[error("the artifact is sealed with the key {0}, which is not among the keys given")]
    Key(String),
    /// This host could not write or read it.
    #[error("{doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The bucket refused or could not be reached.
    #[error("{doing} an artifact in the bucket")]
    Objects {
        /// What was being done.
        doing: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The bucket cannot be used, or a file cannot be sealed.
    #[error(transparent)]
    Target(#[from] LogError),
}

/// A stored artifact.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stored {
    /// Digest of its content.
    pub digest: Digest,
    /// Bytes of its content.
    pub size: u64,
}

/// Files of jobs.
#[derive(Debug)]
pub struct ArtifactStore {
    parts: PathBuf,
    kept: Kept,
    keys: LogKeys,
    counter: AtomicU64,
}

#[derive(Debug)]
enum Kept {
    Folder(PathBuf),
    Bucket(Arc<dyn ObjectStore>),
}

fn failed<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> ArtifactError + 'a {
    move |source| match source.kind() {
        io::ErrorKind::NotFound if doing == "open" => ArtifactError::NotFound,
        _ => ArtifactError::Io {
            doing,
            path: path.to_owned(),
            source,
        },
    }
}

fn objects(doing: &'static str) -> impl FnOnce(object_store::Error) -> ArtifactError {
    move |source| match source {
        object_store::Error::NotFound { .. } => ArtifactError::NotFound,
        source => ArtifactError::Objects {
            doing,
            source: source.into(),
        },
    }
}

impl From<NotOpened> for ArtifactError {
    fn from(why: NotOpened) -> Self {
        match why {
            NotOpened::Damaged(what) => Self::Damaged(what),
            NotOpened::Key(key) => Self::Key(key),
        }
    }
}

/// Bound to every piece: a file moved to another job does not open.
fn about(tenant: &TenantName, job: &JobId) -> Vec<u8> {
    format!("artifact {tenant}/{job}").into_bytes()
}

fn name(tenant: &TenantName, job: &JobId) -> String {
    format!("artifacts/{tenant}/{job}")
}

impl ArtifactStore {
    /// Opens the store: files arrive in `parts`, a folder of this process alone, and are kept in `target` (a folder must be on the same file
    /// system). What a killed process left in `parts` is removed.
    ///
    /// # Errors
    /// When a folder cannot be made or the bucket not be set up.
    pub fn open(
        parts: PathBuf,
        target: &ObjectTarget,
        keys: LogKeys,
    ) -> Result<Self, ArtifactError> {
        std::fs::create_dir_all(&parts).map_err(failed("make", &parts))?;
        for file in std::fs::read_dir(&parts)
            .map_err(failed("read", &parts))?
            .flatten()
        {
            if file.path().extension().is_some_and(|end| end == PART) {
                let _gone = std::fs::remove_file(file.path());
            }
        }
        let kept = match target {
            ObjectTarget::Folder(dir) => {
                std::fs::create_dir_all(dir).map_err(failed("make", dir))?;
                Kept::Folder(dir.clone())
            }
            s3 @ ObjectTarget::S3(_) => Kept::Bucket(crate::logs::objects::open(s3)?),
        };
        Ok(Self {
            parts,
            kept,
            keys,
            counter: AtomicU64::new(0),
        })
    }

    /// Streams a file of at most `max` bytes to the store. Memory does not grow with its size; a stream that breaks leaves nothing.
    ///
    /// # Errors
    /// See [`ArtifactError`].
    pub async fn put<S, E>(
        &self,
        tenant: &TenantName,
        job: &JobId,
        stream: S,
        max: u64,
    ) -> Result<Stored, ArtifactError>
    where
        S: Stream<Item = Result<Bytes, E>>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let file = format!("{}-{number}.{PART}", std::process::id());
        let part = Part(self.parts.join(file));
        let stored = self
            .receive(&part.0, &about(tenant, job), stream, max)
            .await?;
        let name = name(tenant, job);
        match &self.kept {
            Kept::Folder(dir) => {
                let folder = dir.join(&name);
                tokio::fs::create_dir_all(&folder)
                    .await
                    .map_err(failed("make", &folder))?;
                let path = folder.join(stored.digest.hex());
                tokio::fs::rename(&part.0, &path)
                    .await
                    .map_err(failed("name", &path))?;
                let synced = async { File::open(&folder).await?.sync_all().await };
                synced.await.map_err(failed("write", &folder))?;
            }
            Kept::Bucket(store) => {
                let key = Key::from(format!("{name}/{}", stored.digest.hex()));
                if store.head(&key).await.is_err() {
                    upload(&**store, &key, &part.0).await?;
                }
            }
        }
        Ok(stored)
    }

    async fn receive<S, E>(
        &self,
        path: &Path,
        about: &[u8],
        stream: S,
        max: u64,
    ) -> Result<Stored, ArtifactError>
    where
        S: Stream<Item = Result<Bytes, E>>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut options = File::options();
        let options = options.write(true).create_new(true).mode(0o600);
        let mut file = options.open(path).await.map_err(failed("make", path))?;
        let (sealer, preamble) = Sealer::create(&self.keys, MAGIC)?;
        file.write_all(&preamble)
            .await
            .map_err(failed("write", path))?;
        let (mut hasher, mut size, mut number) = (Hasher::default(), 0_u64, 0_u64);
        let mut piece = Vec::with_capacity(PIECE);
        let mut stream = std::pin::pin!(stream);
        while let Some(bytes) = stream.next().await {
            let bytes = bytes.map_err(|error| ArtifactError::Cut(io::Error::other(error)))?;
            size = size.saturating_add(bytes.len() as u64);
            if size > max {
                return Err(ArtifactError::TooLarge { max });
            }
            hasher.update(&bytes);
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(PIECE - piece.len()));
                piece.extend_from_slice(now);
                rest = later;
                if piece.len() == PIECE {
                    let full = std::mem::replace(&mut piece, Vec::with_capacity(PIECE));
                    let sealed = seal(&sealer, number, about, full)?;
                    number += 1;
                    file.write_all(&sealed)
                        .await
                        .map_err(failed("write", path))?;
                }
            }
        }
        if !piece.is_empty() {
            let sealed = seal(&sealer, number, about, piece)?;
            file.write_all(&sealed)
                .await
                .map_err(failed("write", path))?;
        }
        file.sync_all().await.map_err(failed("write", path))?;
        let (digest, size) = hasher.finish();
        Ok(Stored { digest, size })
    }

    /// The bytes of a range of an artifact, piece by piece. Read as a whole it is compared with its digest: the last piece of another
    /// content is an error.
    ///
    /// # Errors
    /// When it is not there or its key is missing; later ones come with the stream.
    pub async fn read(
        &self,
        tenant: &TenantName,
        job: &JobId,
        stored: Stored,
        range: Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, ArtifactError>>, ArtifactError> {
        let name = format!("{}/{}", name(tenant, job), stored.digest.hex());
        let mut source = match &self.kept {
            Kept::Folder(dir) => {
                let path = dir.join(name);
                let file = File::open(&path).await.map_err(failed("open", &path))?;
                Source::File(path, file)
            }
            Kept::Bucket(store) => Source::Object(Arc::clone(store), Key::from(name)),
        };
        let first = source.read(0..PREAMBLE as u64).await?;
        let preamble = first
            .first_chunk::<PREAMBLE>()
            .ok_or(ArtifactError::Damaged("it is cut short"))?;
        let sealer = Sealer::open_file(&self.keys, MAGIC, preamble)?;
        let end = range.end.min(stored.size);
        let reading = Reading {
            source,
            sealer,
            about: about(tenant, job),
            size: stored.size,
            at: range.start.min(end),
            end,
            whole: (range.start == 0 && end == stored.size)
                .then(|| (Hasher::default(), stored.digest)),
        };
        let pieces = stream::try_unfold(reading, |mut reading| async move {
            let next = reading.next().await?;
            Ok::<_, ArtifactError>(next.map(|bytes| (bytes, reading)))
        });
        Ok(pieces.boxed())
    }

    /// Removes one file of a job. Nothing there is fine.
    ///
    /// # Errors
    /// When it stays.
    pub async fn remove(
        &self,
        tenant: &TenantName,
        job: &JobId,
        digest: &Digest,
    ) -> Result<(), ArtifactError> {
        let name = format!("{}/{}", name(tenant, job), digest.hex());
        match &self.kept {
            Kept::Folder(dir) => {
                let path = dir.join(name);
                match tokio::fs::remove_file(&path).await {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                    done => done.map_err(failed("remove", &path)),
                }
            }
            Kept::Bucket(store) => match store.delete(&Key::from(name)).await {
                Err(object_store::Error::NotFound { .. }) => Ok(()),
                done => done.map_err(objects("delete")),
            },
        }
    }

    /// Removes everything of a job. Nothing there is fine.
    ///
    /// # Errors
    /// When something stays.
    pub async fn remove_job(&self, tenant: &TenantName, job: &JobId) -> Result<(), ArtifactError> {
        let name = name(tenant, job);
        match &self.kept {
            Kept::Folder(dir) => {
                let folder = dir.join(name);
                match tokio::fs::remove_dir_all(&folder).await {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                    done => done.map_err(failed("remove", &folder)),
                }
            }
            Kept::Bucket(store) => {
                let found = store.list(Some(&Key::from(name)));
                let found: Vec<_> = found.try_collect().await.map_err(objects("list"))?;
                for object in found {
                    match store.delete(&object.location).await {
                        Err(object_store::Error::NotFound { .. }) => {}
                        done => done.map_err(objects("delete"))?,
                    }
                }
                Ok(())
            }
        }
    }
}

fn seal(
    sealer: &Sealer,
    number: u64,
    about: &[u8],
    piece: Vec<u8>,
) -> Result<Vec<u8>, ArtifactError> {
    let sealed = sealer.seal(number, about, piece);
    sealed.ok_or(ArtifactError::Damaged("a piece cannot be sealed"))
}

/// Sends a file to a bucket: in one request, or in parts. An upload that fails is called off; what a kill leaves, the bucket's own rule for
/// incomplete uploads removes.
async fn upload(store: &dyn ObjectStore, key: &Key, path: &Path) -> Result<(), ArtifactError> {
    let mut file = File::open(path).await.map_err(failed("read", path))?;
    let length = file.metadata().await.map_err(failed("read", path))?.len();
    if length <= UPLOAD_PART as u64 {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .await
            .map_err(failed("read", path))?;
        store
            .put(key, bytes.into())
            .await
            .map_err(objects("write"))?;
        return Ok(());
    }
    let mut upload = store.put_multipart(key).await.map_err(objects("begin"))?;
    let sent = async {
        loop {
            let mut bytes = Vec::with_capacity(UPLOAD_PART);
            let mut part = (&mut file).take(UPLOAD_PART as u64);
            part.read_to_end(&mut bytes)
                .await
                .map_err(failed("read", path))?;
            if bytes.is_empty() {
                break;
            }
            upload
                .put_part(bytes.into())
                .await
                .map_err(objects("write"))?;
        }
        upload.complete().await.map_err(objects("end")).map(drop)
    };
    let sent = sent.await;
    if sent.is_err() {
        let _called_off = upload.abort().await;
    }
    sent
}

enum Source {
    File(PathBuf, File),
    Object(Arc<dyn ObjectStore>, Key),
}

impl Source {
    /// The bytes of a range, fewer only where the file ends.
    async fn read(&mut self, range: Range<u64>) -> Result<Bytes, ArtifactError> {
        match self {
            Self::File(path, file) => {
                let io = |source| ArtifactError::Io {
                    doing: "read",
                    path: path.clone(),
                    source,
                };
                file.seek(SeekFrom::Start(range.start)).await.map_err(io)?;
                let mut bytes = Vec::new();
                let mut part = file.take(range.end - range.start);
                part.read_to_end(&mut bytes).await.map_err(io)?;
                Ok(bytes.into())
            }
            Self::Object(store, key) => store.get_range(key, range).await.map_err(objects("read")),
        }
    }
}

struct Reading {
    source: Source,
    sealer: Sealer,
    about: Vec<u8>,
    size: u64,
    at: u64,
    end: u64,
    whole: Option<(Hasher, Digest)>,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>, ArtifactError> {
        if self.at >= self.end {
            // Nothing to give is nothing to check: an empty file has the digest of nothing.
            return Ok(None);
        }
        let piece = PIECE as u64;
        let sealed_piece = piece + u64::from(self.sealer.overhead());
        let first = self.at / piece;
        let until = (first + PIECES_AT_ONCE).min(self.end.div_ceil(piece));
        let start = PREAMBLE as u64 + first * sealed_piece;
        let end = PREAMBLE as u64 + until * sealed_piece;
        // The last piece is shorter than the others.
        let pieces = self.size.div_ceil(piece);
        let stored = PREAMBLE as u64 + self.size + pieces * u64::from(self.sealer.overhead());
        let bytes = self.source.read(start..end.min(stored)).await?;
        let mut plain = Vec::with_capacity(bytes.len());
        let length = usize::try_from(sealed_piece).unwrap_or(usize::MAX);
        for (number, sealed) in (first..until).zip(bytes.chunks(length)) {
            let opened = self.sealer.open(number, &self.about, sealed.to_vec());
            plain.extend(opened.ok_or(ArtifactError::Damaged("a piece does not open"))?);
        }
        let have = first * piece + plain.len() as u64;
        if have < self.end.min(until * piece) {
            return Err(ArtifactError::Damaged("it is cut short"));
        }
        let skip = usize::try_from(self.at - first * piece).unwrap_or(usize::MAX);
        let take = usize::try_from(have.min(self.end) - self.at).unwrap_or(usize::MAX);
        let given = Bytes::from(plain).slice(skip..skip + take);
        self.at += given.len() as u64;
        if let Some((hasher, _)) = &mut self.whole {
            hasher.update(&given);
        }
        if self.at >= self.end
            && let Some((hasher, digest)) = self.whole.take()
            && hasher.finish().0 != digest
        {
            return Err(ArtifactError::Damaged("its content has another digest"));
        }
        Ok(Some(given))
    }
}

/// A file that is removed unless it was renamed.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        let _renamed = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
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
}
