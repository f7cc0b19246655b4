//! Images of controllers that share a bucket: what is pushed to one is everybody's, and outlives it.
//!
//! The bucket has the content, by keys that are used once; the database has the names, and which key is which digest. An image is named in
//! one transaction, after all of it is in the bucket ([`publish`]): whoever is killed before leaves objects that nothing names, which go
//! after a grace ([`collect`]). The registry of this host keeps quarantines, uploads, and copies of what was asked for here, checked by
//! their digests ([`serve`]); copies go when nobody has fetched them for a while.
//!
//! What was named here before there was a bucket goes up once ([`move_up`]). [`names`] lists and ends names, with a bucket or without.
//!
//! Without a bucket images are in the registry of this host, and nothing else here is used.

mod collect;
pub(crate) mod move_up;
pub(crate) mod names;
mod publish;
mod serve;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_core::Digest;
use kiln_db::{DbError, ImageContent, ImageManifest, NameImagesError};
use kiln_store::host::HostError;
use kiln_store::registry::manifest::MANIFEST_BYTES_MAX;
use kiln_store::registry::{ErrorKind, RepoName, StoreError};
use kiln_store::{Bucket, BucketError, HostRegistry};
use tokio::io::AsyncReadExt as _;
use tokio::sync::Semaphore;
use tokio_util::io::StreamReader;

pub use collect::Collected;
pub(crate) use collect::run as collect_now_and_then;
pub(crate) use publish::Named;
pub(crate) use serve::answer;

/// Folder of the bucket.
const FOLDER: &str = "images";
/// Repositories that are shared: those of tenants.
const TREE: &str = "t";
/// Contents that are fetched from the bucket at a time.
const FETCHES_MAX: usize = 8;

/// Why an image was not published or read.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// The bucket.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The registry of this host.
    #[error(transparent)]
    Registry(#[from] HostError),
    /// What was pushed is no manifest, or names what is not there.
    #[error(transparent)]
    Refused(#[from] StoreError),
    /// The names.
    #[error(transparent)]
    Names(#[from] NameImagesError),
    /// The database.
    #[error(transparent)]
    Database(#[from] DbError),
}

/// The images of a bucket.
#[derive(Debug)]
pub struct Images {
    bucket: Bucket,
    /// Who fetches a content: others that want it wait, and find it.
    fetching: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
    fetches: Semaphore,
}

impl Images {
    /// Of a bucket; asks it nothing yet.
    #[must_use]
    pub fn new(bucket: Bucket) -> Self {
        Self {
            bucket,
            fetching: Mutex::default(),
            fetches: Semaphore::new(FETCHES_MAX),
        }
    }

    /// Has a content in a repository of this host's registry: fetched from the bucket and checked, unless it is there.
    async fn bring(
        &self,
        registry: &HostRegistry,
        repo: &RepoName,
        content: &ImageContent,
    ) -> Result<(), ImagesError> {
        let turn = self.turn(&content.digest);
        let _turn = turn.lock().await;
        let brought = match registry.has_blob(repo, &content.digest).await {
            Ok(true) => Ok(()),
            // What is here is damaged and was set aside: a good copy takes its place.
            Ok(false) => self.fetch(registry, repo, content).await,
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                self.fetch(registry, repo, content).await
            }
            Err(error) => Err(error.into()),
        };
        let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        // This one and the table: nobody else waits.
        if Arc::strong_count(&turn) <= 2 {
            fetching.remove(&content.digest);
        }
        brought
    }

    /// The bytes of a manifest, which have its digest.
    async fn manifest_bytes(
        &self,
        registry: &HostRegistry,
        repo: &RepoName,
        found: &ImageManifest,
    ) -> Result<Vec<u8>, ImagesError> {
        let digest = &found.content.digest;
        self.bring(registry, repo, &found.content).await?;
        let blob = registry.open_blob(repo, digest).await?;
        let mut bytes = Vec::new();
        let read = blob
            .into_reader()
            .take(MANIFEST_BYTES_MAX + 1)
            .read_to_end(&mut bytes)
            .await;
        match read {
            Ok(_) if Digest::of(&bytes) == *digest => Ok(bytes),
            _ => Err(StoreError::Corrupt { digest: *digest }.into()),
        }
    }

    fn turn(&self, digest: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(fetching.entry(*digest).or_default())
    }

    async fn fetch(
        &self,
        registry: &HostRegistry,
        repo: &RepoName,
        content: &ImageContent,
    ) -> Result<(), ImagesError> {
        // Never closed.
        let _slot = self.fetches.acquire().await;
        let (stream, _) = self.bucket.get(&content.key).await?;
        let reader = StreamReader::new(stream);
        let put = registry.put_blob(repo, reader, Some(content.digest));
        put.await?;
        Ok(())
    }
}

/// A key for a content that nobody has used and nobody will.
fn new_key(digest: &Digest) -> String {
    let hex = digest.hex();
    let own = hex::encode(crate::access::random::<16>());
    format!("{FOLDER}/{}/{hex}.{own}", &hex[..2])
}
