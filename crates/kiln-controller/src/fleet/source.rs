//! Uploaded sources: streamed to disk, named by their digest, removed when no job needs them.
//!
//! A source is one archive as it came (tar, plain or compressed). It is written under a name of its own and renamed when it is whole,
//! so a kill leaves only files that the next start removes. Where several controllers share a bucket it goes there once it is whole:
//! `sources/TENANT/DIGEST`.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt as _};
use kiln_core::digest::Hasher;
use kiln_core::{Digest, TenantName};
use kiln_store::{Bucket, BucketError};
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;

/// Suffix of an upload that is not whole yet.
const PART: &str = "part";
/// Folder of the bucket.
const FOLDER: &str = "sources";

/// Why a source was not stored.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It is larger than the operator allows.
    #[error("the source has more than {max} bytes")]
    TooLarge {
        /// The limit.
        max: u64,
    },
    /// With it, all sources of the tenant have more bytes than the operator allows.
    #[error("the sources of the tenant have more than {max} bytes together")]
    Full {
        /// The limit.
        max: u64,
    },
    /// The upload broke.
    #[error("the upload ended before it was whole")]
    Cut(#[source] io::Error),
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
    /// The bucket could not write or read it.
    #[error("use the object store")]
    Bucket(#[from] BucketError),
}

impl SourceError {
    /// Whether there is no such source, as opposed to one that cannot be read now.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::Bucket(error) => matches!(error, BucketError::NotFound(_)),
            Self::TooLarge { .. } | Self::Full { .. } | Self::Cut(_) => false,
        }
    }
}

/// A stored source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stored {
    /// Digest of its bytes.
    pub digest: Digest,
    /// How many there are.
    pub size: u64,
}

/// Sources below one folder, one folder a tenant: a digest of another tenant opens nothing.
#[derive(Debug)]
pub struct SourceStore {
    dir: PathBuf,
    bucket: Option<Bucket>,
    max: u64,
    counter: AtomicU64,
    /// Bytes of each tenant's uploads that are not whole yet.
    arriving: Mutex<BTreeMap<TenantName, u64>>,
}

/// What of a tenant's upload has come; counted until it is stored or given up.
struct Arriving<'a> {
    of: &'a Mutex<BTreeMap<TenantName, u64>>,
    tenant: &'a TenantName,
    bytes: u64,
}

impl Arriving<'_> {
    /// Counts more; gives what of the tenant's arrives altogether.
    fn add(&mut self, bytes: u64) -> u64 {
        self.bytes += bytes;
        let mut all = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        let of = all.entry(self.tenant.clone()).or_default();
        *of += bytes;
        *of
    }
}

impl Drop for Arriving<'_> {
    fn drop(&mut self) {
        let mut all = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of) = all.get_mut(self.tenant) {
            *of -= self.bytes;
            if *of == 0 {
                all.remove(self.tenant);
            }
        }
    }
}

fn key(tenant: &TenantName, digest: &Digest) -> String {
    format!("{FOLDER}/{tenant}/{}", digest.hex())
}

fn failed<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SourceError + 'a {
    move |source| SourceError::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}

impl SourceStore {
    /// Opens the store; sources have at most `max` bytes and end in `bucket`, if there is one. Uploads that a kill left are removed.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub fn open(dir: &Path, max: u64, bucket: Option<Bucket>) -> Result<Self, SourceError> {
        std::fs::create_dir_all(dir).map_err(failed("make", dir))?;
        for tenant in std::fs::read_dir(dir).map_err(failed("read", dir))? {
            let tenant = tenant.map_err(failed("read", dir))?.path();
            let Ok(files) = std::fs::read_dir(&tenant) else {
                continue;
            };
            for file in files.flatten() {
                if file.path().extension().is_some_and(|end| end == PART) {
                    let _gone = std::fs::remove_file(file.path());
                }
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            bucket,
            max,
            counter: AtomicU64::new(0),
            arriving: Mutex::default(),
        })
    }

    /// Most bytes of one source.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    fn path(&self, tenant: &TenantName, digest: &Digest) -> PathBuf {
        self.dir.join(tenant.as_str()).join(digest.hex())
    }

    /// Bytes of a tenant's sources.
    ///
    /// # Errors
    /// When they cannot be listed.
    async fn bytes_of(&self, tenant: &TenantName) -> Result<u64, SourceError> {
        if let Some(bucket) = &self.bucket {
            return Ok(bucket.bytes_below(&format!("{FOLDER}/{tenant}")).await?);
        }
        let folder = self.dir.join(tenant.as_str());
        let listed = std::fs::read_dir(&folder).map_err(failed("read", &folder))?;
        let whole = listed
            .flatten()
            .filter(|file| file.path().extension().is_none());
        let sizes = whole.filter_map(|file| Some(file.metadata().ok()?.len()));
        Ok(sizes.fold(0, u64::saturating_add))
    }

    /// Streams a source to disk; with `kept_max`, only if all sources of the tenant have at most so many bytes then. Memory does not grow
    /// with its size; a stream that is dropped leaves nothing.
    ///
    /// # Errors
    /// See [`SourceError`].
    pub async fn put<S, E>(
        &self,
        tenant: &TenantName,
        kept_max: Option<u64>,
        stream: S,
    ) -> Result<Stored, SourceError>
    where
        S: Stream<Item = Result<Bytes, E>>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let folder = self.dir.join(tenant.as_str());
        tokio::fs::create_dir_all(&folder)
            .await
            .map_err(failed("make", &folder))?;
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let part = Part(folder.join(format!("{}-{number}.{PART}", std::process::id())));
        let mut file = File::create(&part.0)
            .await
            .map_err(failed("make", &part.0))?;
        let kept = match kept_max {
            Some(_) => self.bytes_of(tenant).await?,
            None => 0,
        };
        let mut arriving = Arriving {
            of: &self.arriving,
            tenant,
            bytes: 0,
        };
        let mut hasher = Hasher::default();
        let mut size: u64 = 0;
        let mut stream = std::pin::pin!(stream);
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|error| SourceError::Cut(io::Error::other(error)))?;
            size = size.saturating_add(piece.len() as u64);
            if size > self.max {
                return Err(SourceError::TooLarge { max: self.max });
            }
            let all = kept.saturating_add(arriving.add(piece.len() as u64));
            if let Some(max) = kept_max.filter(|max| all > *max) {
                return Err(SourceError::Full { max });
            }
            hasher.update(&piece);
            file.write_all(&piece)
                .await
                .map_err(failed("write", &part.0))?;
        }
        file.sync_all().await.map_err(failed("write", &part.0))?;
        let (digest, size) = hasher.finish();
        if let Some(bucket) = &self.bucket {
            bucket.put_file(&key(tenant, &digest), &part.0).await?;
            return Ok(Stored { digest, size });
        }
        let path = self.path(tenant, &digest);
        tokio::fs::rename(&part.0, &path)
            .await
            .map_err(failed("name", &path))?;
        Ok(Stored { digest, size })
    }

    /// Opens a stored source, with its size.
    ///
    /// # Errors
    /// When it is not there or cannot be read.
    pub async fn open_source(
        &self,
        tenant: &TenantName,
        digest: &Digest,
    ) -> Result<(BoxStream<'static, io::Result<Bytes>>, u64), SourceError> {
        if let Some(bucket) = &self.bucket {
            return Ok(bucket.get(&key(tenant, digest)).await?);
        }
        let path = self.path(tenant, digest);
        let file = File::open(&path).await.map_err(failed("open", &path))?;
        let meta = file.metadata().await.map_err(failed("read", &path))?;
        Ok((tokio_util::io::ReaderStream::new(file).boxed(), meta.len()))
    }

    /// Sources that nobody has uploaded or read the name of for `age`. Upload and repeated upload make a source young again.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub async fn older_than(
        &self,
        age: Duration,
    ) -> Result<Vec<(TenantName, Digest)>, SourceError> {
        if let Some(bucket) = &self.bucket {
            let old = bucket.older_than(FOLDER, age).await?;
            return Ok(old.iter().filter_map(|found| named(&found.key)).collect());
        }
        self.older_files(age)
    }

    fn older_files(&self, age: Duration) -> Result<Vec<(TenantName, Digest)>, SourceError> {
        let mut old = Vec::new();
        for tenant in std::fs::read_dir(&self.dir).map_err(failed("read", &self.dir))? {
            let folder = tenant.map_err(failed("read", &self.dir))?.path();
            let name = folder
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok());
            let Some(name) = name else { continue };
            for file in std::fs::read_dir(&folder).map_err(failed("read", &folder))? {
                let file = file.map_err(failed("read", &folder))?;
                let digest = file.file_name().to_str().map(|hex| format!("sha256:{hex}"));
                let digest = digest.and_then(|digest| digest.parse().ok());
                let since = file.metadata().and_then(|meta| meta.modified()).ok();
                let is_old = since
                    .and_then(|since| since.elapsed().ok())
                    .is_some_and(|is| is >= age);
                if let (Some(digest), true) = (digest, is_old) {
                    old.push((TenantName::clone(&name), digest));
                }
            }
        }
        Ok(old)
    }

    /// Keeps a source for another while, as if it had just come. False when it is gone.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub async fn keep(&self, tenant: &TenantName, digest: &Digest) -> Result<bool, SourceError> {
        if let Some(bucket) = &self.bucket {
            // Its time cannot be set. The sweep looks for jobs that need a source after it has looked for old ones.
            return match bucket.get(&key(tenant, digest)).await {
                Ok(_) => Ok(true),
                Err(BucketError::NotFound(_)) => Ok(false),
                Err(error) => Err(error.into()),
            };
        }
        let path = self.path(tenant, digest);
        match std::fs::File::open(&path).and_then(|file| file.set_modified(SystemTime::now())) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed("keep", &path)(error)),
        }
    }

    /// Removes a source, unless it has become young again. One that is not there is fine.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn remove_old(
        &self,
        tenant: &TenantName,
        digest: &Digest,
        age: Duration,
    ) -> Result<(), SourceError> {
        if self.bucket.is_none() {
            let meta = std::fs::metadata(self.path(tenant, digest));
            let since = meta.and_then(|meta| meta.modified()).ok();
            let is_old = since.and_then(|since| since.elapsed().ok());
            if is_old.is_none_or(|is| is < age) {
                return Ok(());
            }
        }
        self.remove(tenant, digest).await
    }

    /// Removes a source. One that is not there is fine.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn remove(&self, tenant: &TenantName, digest: &Digest) -> Result<(), SourceError> {
        if let Some(bucket) = &self.bucket {
            return Ok(bucket.remove(&key(tenant, digest)).await?);
        }
        let path = self.path(tenant, digest);
        match tokio::fs::remove_file(&path).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done.map_err(failed("remove", &path)),
        }
    }
}

/// The source that an object is.
fn named(key: &str) -> Option<(TenantName, Digest)> {
    let (tenant, hex) = key
        .strip_prefix(FOLDER)?
        .strip_prefix('/')?
        .split_once('/')?;
    Some((tenant.parse().ok()?, format!("sha256:{hex}").parse().ok()?))
}

/// An upload that is removed unless it was renamed.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        let _renamed = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(texts: &[&'static str]) -> impl Stream<Item = Result<Bytes, io::Error>> + use<> {
        let texts: Vec<_> = texts.iter().map(|text| Ok(Bytes::from(*text))).collect();
        futures_util::stream::iter(texts)
    }

    #[tokio::test]
    async fn a_source_is_its_tenants_alone_and_bounded() {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = SourceStore::open(dir.path(), 10, None).expect("open");
        let (own, other): (TenantName, TenantName) = (
            "acme".parse().expect("name"),
            "rival".parse().expect("name"),
        );
        let stored = store
            .put(&own, None, pieces(&["hello ", "you"]))
            .await
            .expect("stored");
        assert_eq!((stored.digest, stored.size), (Digest::of(b"hello you"), 9));
        assert!(store.open_source(&own, &stored.digest).await.is_ok());
        assert!(store.open_source(&other, &stored.digest).await.is_err());
        let large = store.put(&own, None, pieces(&["hello ", "world"])).await;
        assert!(matches!(large, Err(SourceError::TooLarge { max: 10 })));
        // Another nine bytes are two too many, and leave room for no less than before.
        for text in ["ten bytes", "seven b"] {
            let full = store.put(&own, Some(17), pieces(&[text])).await;
            assert_eq!(full.is_ok(), text.len() == 7, "{full:?}");
        }
        let few = store.put(&other, Some(17), pieces(&["ten bytes"])).await;
        let few = few.expect("nobody else's").digest;
        store.remove(&other, &few).await.expect("removed");
        store
            .remove(&own, &Digest::of(b"seven b"))
            .await
            .expect("removed");
        let broken = futures_util::stream::iter([
            Ok(Bytes::from("abc")),
            Err(io::Error::from(io::ErrorKind::ConnectionReset)),
        ]);
        assert!(matches!(
            store.put(&own, None, broken).await,
            Err(SourceError::Cut(_))
        ));
        let left = std::fs::read_dir(dir.path().join("acme"))
            .expect("dir")
            .count();
        assert_eq!(left, 1);
        assert!(
            store
                .older_than(Duration::from_secs(60))
                .await
                .expect("read")
                .is_empty()
        );
        let old = store.older_than(Duration::ZERO).await.expect("read");
        assert_eq!(old, [(own.clone(), stored.digest)]);
        let day = Duration::from_secs(86_400);
        let path = store.path(&own, &stored.digest);
        let past = SystemTime::now() - 2 * day;
        let file = std::fs::File::open(&path).expect("open");
        file.set_modified(past).expect("aged");
        assert_eq!(store.older_than(day).await.expect("read").len(), 1);
        assert!(store.keep(&own, &stored.digest).await.expect("kept"));
        assert!(!store.keep(&other, &stored.digest).await.expect("looked"));
        let kept = store.remove_old(&own, &stored.digest, day).await;
        kept.expect("nothing to do");
        assert!(path.exists(), "it is young again");
        std::fs::write(dir.path().join("acme/9-9.part"), "x").expect("write");
        let store = SourceStore::open(dir.path(), 10, None).expect("open");
        store.remove(&own, &stored.digest).await.expect("removed");
        store.remove(&own, &stored.digest).await.expect("again");
        assert_eq!(
            std::fs::read_dir(dir.path().join("acme"))
                .expect("dir")
                .count(),
            0
        );
    }
}
