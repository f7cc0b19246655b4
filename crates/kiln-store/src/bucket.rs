//! Files in an object store, by a key: what several controllers share and what is too large for a row. Uploaded sources lie here.
//!
//! An object is seen whole or not at all; writing one again replaces it. Who may read which key is the caller's to know.

mod unfinished;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use kiln_core::Digest;
use kiln_core::digest::Hasher;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, WriteMultipart};
use tokio::io::{AsyncRead, AsyncReadExt as _};

use self::unfinished::Unfinished;
use crate::logs::{LogError, ObjectTarget, open_objects};

/// Bytes of one part of a large object; the least a bucket takes is 5 MiB.
const PART_BYTES: usize = 8 << 20;
/// Parts on their way at once: with [`PART_BYTES`] the most memory of one upload.
const PARTS_MAX: usize = 2;
/// Longest small object.
const SMALL_MAX: u64 = 64 * 1024;

/// Why an object was not written or read.
#[derive(Debug, thiserror::Error)]
pub enum BucketError {
    /// The object store's settings are not usable, or it cannot be set up.
    #[error("the object store cannot be used")]
    Target(#[source] LogError),
    /// There is no such object.
    #[error("there is no object {0}")]
    NotFound(String),
    /// It refused or could not be reached.
    #[error("cannot {what} {key} in the object store")]
    Objects {
        /// The operation.
        what: &'static str,
        /// On what.
        key: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What was to be written could not be read, or is not what it should be.
    #[error("what was to be {key} in the object store cannot be read")]
    Content {
        /// On what.
        key: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The local file could not be read.
    #[error("cannot read {}", path.display())]
    File {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// An object that was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// Its key.
    pub key: String,
    /// Its bytes.
    pub size: u64,
    /// When it was written, by the store's clock.
    pub written: SystemTime,
}

/// A bucket, or a folder that stands for one. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Bucket {
    objects: Arc<dyn ObjectStore>,
    /// None for a folder, which has no uploads in parts.
    unfinished: Option<Arc<Unfinished>>,
}

fn failed(what: &'static str, key: &str) -> impl FnOnce(object_store::Error) -> BucketError {
    let key = key.to_owned();
    move |source| match source {
        object_store::Error::NotFound { .. } => BucketError::NotFound(key),
        source => BucketError::Objects {
            what,
            key,
            source: Box::new(source),
        },
    }
}

/// Reads until the buffer is full or the content ends; gives how much that was.
async fn fill(
    content: &mut (impl AsyncRead + Unpin),
    buffer: &mut [u8],
    key: &str,
) -> Result<usize, BucketError> {
    let mut filled = 0;
    while filled < buffer.len() {
        let read = content.read(&mut buffer[filled..]).await;
        match read.map_err(unread(key))? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

fn unread(key: &str) -> impl FnOnce(std::io::Error) -> BucketError {
    let key = key.to_owned();
    move |source| BucketError::Content { key, source }
}

fn is_expected(hasher: Hasher, expected: Option<&Digest>, key: &str) -> Result<(), BucketError> {
    let (actual, _) = hasher.finish();
    match expected {
        Some(expected) if actual != *expected => {
            let text = format!("it has the digest {actual}, not {expected}");
            Err(unread(key)(std::io::Error::other(text)))
        }
        _ => Ok(()),
    }
}

impl Bucket {
    /// Sets it up; asks it nothing yet.
    ///
    /// # Errors
    /// When the target cannot be used as written.
    pub fn open(target: &ObjectTarget) -> Result<Self, BucketError> {
        let objects = open_objects(target).map_err(BucketError::Target)?;
        let unfinished = match target {
            ObjectTarget::Folder(_) => None,
            ObjectTarget::S3(s3) => {
                let unfinished = Unfinished::new(s3).map_err(BucketError::Target)?;
                Some(Arc::new(unfinished))
            }
        };
        Ok(Self {
            objects,
            unfinished,
        })
    }

    /// Uploads a file. Memory does not grow with its size; an upload that is cut leaves no object.
    ///
    /// # Errors
    /// See [`BucketError`].
    pub async fn put_file(&self, key: &str, path: &Path) -> Result<(), BucketError> {
        let unread = |source| BucketError::File {
            path: path.to_owned(),
            source,
        };
        let file = tokio::fs::File::open(path).await.map_err(unread)?;
        self.put(key, file, None)
            .await
            .map_err(|error| match error {
                BucketError::Content { source, .. } => unread(source),
                error => error,
            })
    }

    /// Uploads what a reader gives; with a digest expected, only if that is its digest. Memory does not grow with its size; an upload that
    /// is cut leaves no object.
    ///
    /// # Errors
    /// See [`BucketError`].
    pub async fn put(
        &self,
        key: &str,
        mut content: impl AsyncRead + Unpin,
        expected: Option<&Digest>,
    ) -> Result<(), BucketError> {
        let mut hasher = Hasher::default();
        let mut part = vec![0; PART_BYTES];
        let first = fill(&mut content, &mut part, key).await?;
        if first < part.len() {
            // What fits into one part is one request, and never a part of an upload that nobody ends.
            part.truncate(first);
            hasher.update(&part);
            is_expected(hasher, expected, key)?;
            let put = self.objects.put(&Key::from(key), part.into()).await;
            return put.map(drop).map_err(failed("write", key));
        }
        let upload = self.objects.put_multipart(&Key::from(key)).await;
        let upload = upload.map_err(failed("begin to write", key))?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        let mut filled = first;
        let sent = async {
            while filled > 0 {
                hasher.update(&part[..filled]);
                upload
                    .wait_for_capacity(PARTS_MAX)
                    .await
                    .map_err(failed("write", key))?;
                upload.write(&part[..filled]);
                filled = fill(&mut content, &mut part, key).await?;
            }
            is_expected(hasher, expected, key)
        };
        if let Err(error) = sent.await {
            // Parts that stay all the same go with [`Bucket::end_unfinished`].
            let _aborted = upload.abort().await;
            return Err(error);
        }
        upload
            .finish()
            .await
            .map(drop)
            .map_err(failed("write", key))
    }

    /// Bytes of an object; none when it is not there.
    ///
    /// # Errors
    /// When the store cannot be asked.
    pub async fn size(&self, key: &str) -> Result<Option<u64>, BucketError> {
        match self.objects.head(&Key::from(key)).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(failed("look for", key)(error)),
        }
    }

    /// Streams an object, with its size.
    ///
    /// # Errors
    /// [`BucketError::NotFound`], or when it cannot be read.
    pub async fn get(
        &self,
        key: &str,
    ) -> Result<(BoxStream<'static, std::io::Result<Bytes>>, u64), BucketError> {
        let got = self.objects.get(&Key::from(key)).await;
        let got = got.map_err(failed("read", key))?;
        let size = got.meta.size;
        Ok((
            got.into_stream().map_err(std::io::Error::other).boxed(),
            size,
        ))
    }

    /// The content of a small object; made by `make` when there is none. Of two that make it at once, where the store keeps the
    /// condition, one wins and both get the same.
    ///
    /// # Errors
    /// See [`BucketError`].
    pub async fn small_or_create(
        &self,
        key: &str,
        make: impl FnOnce() -> Vec<u8>,
    ) -> Result<Bytes, BucketError> {
        match self.small(key).await {
            Err(BucketError::NotFound(_)) => {}
            other => return other,
        }
        let put = self
            .objects
            .put_opts(
                &Key::from(key),
                make().into(),
                PutOptions::from(PutMode::Create),
            )
            .await;
        match put {
            Ok(_)
            | Err(
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. },
            ) => self.small(key).await,
            Err(error) => Err(failed("write", key)(error)),
        }
    }

    async fn small(&self, key: &str) -> Result<Bytes, BucketError> {
        let got = self.objects.get(&Key::from(key)).await;
        let got = got.map_err(failed("read", key))?;
        if got.meta.size > SMALL_MAX {
            return Err(BucketError::Objects {
                what: "read",
                key: key.to_owned(),
                source: "it is larger than what kiln wrote".into(),
            });
        }
        got.bytes().await.map_err(failed("read", key))
    }

    /// Objects below a folder that were written longer ago than `age`.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn older_than(&self, folder: &str, age: Duration) -> Result<Vec<Found>, BucketError> {
        let mut listed = self.objects.list(Some(&Key::from(folder)));
        let mut old = Vec::new();
        while let Some(meta) = listed.next().await {
            let meta = meta.map_err(failed("list", folder))?;
            let written = SystemTime::from(meta.last_modified);
            if written.elapsed().is_ok_and(|is| is >= age) {
                old.push(Found {
                    key: meta.location.to_string(),
                    size: meta.size,
                    written,
                });
            }
        }
        Ok(old)
    }

    /// Ends uploads in parts below a folder that began longer ago than `age` and that nobody finished, since a kill left them; gives how many.
    ///
    /// # Errors
    /// When they cannot be listed or ended; what went before is gone.
    pub async fn end_unfinished(&self, folder: &str, age: Duration) -> Result<u64, BucketError> {
        match &self.unfinished {
            Some(unfinished) => unfinished.end(folder, age).await,
            None => Ok(0),
        }
    }

    /// Bytes of all objects below a folder.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn bytes_below(&self, folder: &str) -> Result<u64, BucketError> {
        let mut listed = self.objects.list(Some(&Key::from(folder)));
        let mut bytes: u64 = 0;
        while let Some(meta) = listed.next().await {
            bytes = bytes.saturating_add(meta.map_err(failed("list", folder))?.size);
        }
        Ok(bytes)
    }

    /// Removes an object. One that is not there is fine.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn remove(&self, key: &str) -> Result<(), BucketError> {
        match self.objects.delete(&Key::from(key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed("delete", key)(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn objects_are_whole_and_go_when_told() {
        let dir = tempfile::tempdir().unwrap();
        let bucket = Bucket::open(&ObjectTarget::Folder(dir.path().join("objects"))).unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, vec![7; (PART_BYTES * 5) / 2]).unwrap();
        bucket.put_file("sources/acme/one", &file).await.unwrap();
        let (stream, size) = bucket.get("sources/acme/one").await.unwrap();
        let all: Vec<Bytes> = stream.try_collect().await.unwrap();
        let read: usize = all.iter().map(Bytes::len).sum();
        assert_eq!((read as u64, read), (size, (PART_BYTES * 5) / 2));
        assert!(all.iter().all(|piece| piece.iter().all(|byte| *byte == 7)));
        let old = bucket.older_than("sources", Duration::ZERO).await.unwrap();
        assert_eq!(old[0].key, "sources/acme/one");
        let young = bucket.older_than("sources", Duration::from_secs(60)).await;
        assert!(young.unwrap().is_empty());
        let bytes = bucket.bytes_below("sources/acme").await.unwrap();
        assert_eq!(bytes, size);
        assert_eq!(bucket.bytes_below("sources/ac").await.unwrap(), 0);
        bucket.remove("sources/acme/one").await.unwrap();
        bucket.remove("sources/acme/one").await.unwrap();
        let gone = bucket.get("sources/acme/one").await.map(|(_, size)| size);
        assert!(matches!(gone, Err(BucketError::NotFound(_))), "{gone:?}");
        let missing = bucket.put_file("x", &dir.path().join("none")).await;
        assert!(matches!(missing, Err(BucketError::File { .. })));
    }

    #[tokio::test]
    async fn content_of_another_digest_is_no_object() {
        let dir = tempfile::tempdir().unwrap();
        let bucket = Bucket::open(&ObjectTarget::Folder(dir.path().to_owned())).unwrap();
        for size in [0, 10, PART_BYTES, PART_BYTES + 1, PART_BYTES * 3] {
            let content = vec![3; size];
            let digest = Digest::of(&content);
            let put = bucket.put("good", &content[..], Some(&digest)).await;
            put.unwrap();
            assert_eq!(bucket.size("good").await.unwrap(), Some(size as u64));
            let put = bucket
                .put("bad", &content[..], Some(&Digest::of(b"?")))
                .await;
            assert!(matches!(put, Err(BucketError::Content { .. })), "{put:?}");
            assert_eq!(bucket.size("bad").await.unwrap(), None);
        }
    }

    #[tokio::test]
    async fn a_small_object_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let bucket = Bucket::open(&ObjectTarget::Folder(dir.path().to_owned())).unwrap();
        let make = |text: &str| text.as_bytes().to_vec();
        let (one, two) = tokio::join!(
            bucket.small_or_create("id", || make("a")),
            bucket.small_or_create("id", || make("b")),
        );
        assert_eq!(one.unwrap(), two.unwrap());
    }
}
