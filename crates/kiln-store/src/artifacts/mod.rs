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

mod reading;

use std::io;
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
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use self::reading::{Reading, Source};
use crate::logs::seal::{NotOpened, PREAMBLE, Sealer};
use crate::logs::{LogError, LogKeys, ObjectTarget};

/// Bytes of a piece, unsealed.
const PIECE: usize = 64 * 1024;
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

/// A file that is removed unless it was renamed.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        let _renamed = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests;
