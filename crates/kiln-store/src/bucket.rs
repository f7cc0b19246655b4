//! Files in an object store, by a key: what several controllers share and what is too large for a row. Uploaded sources lie here.
//!
//! An object is seen whole or not at all; writing one again replaces it. Who may read which key is the caller's to know.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, WriteMultipart};
use tokio::io::AsyncReadExt as _;

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

impl Bucket {
    /// Sets it up; asks it nothing yet.
    ///
    /// # Errors
    /// When the target cannot be used as written.
    pub fn open(target: &ObjectTarget) -> Result<Self, BucketError> {
        let objects = open_objects(target).map_err(BucketError::Target)?;
        Ok(Self { objects })
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
        let mut file = tokio::fs::File::open(path).await.map_err(unread)?;
        let upload = self.objects.put_multipart(&Key::from(key)).await;
        let upload = upload.map_err(failed("begin to write", key))?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = match file.read(&mut buffer).await {
                Ok(read) => read,
                Err(error) => {
                    let _parts_expire = upload.abort().await;
                    return Err(unread(error));
                }
            };
            if read == 0 {
                break;
            }
            upload
                .wait_for_capacity(PARTS_MAX)
                .await
                .map_err(failed("write", key))?;
            upload.write(&buffer[..read]);
        }
        upload
            .finish()
            .await
            .map(drop)
            .map_err(failed("write", key))
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
        bucket.remove("sources/acme/one").await.unwrap();
        bucket.remove("sources/acme/one").await.unwrap();
        let gone = bucket.get("sources/acme/one").await.map(|(_, size)| size);
        assert!(matches!(gone, Err(BucketError::NotFound(_))), "{gone:?}");
        let missing = bucket.put_file("x", &dir.path().join("none")).await;
        assert!(matches!(missing, Err(BucketError::File { .. })));
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
