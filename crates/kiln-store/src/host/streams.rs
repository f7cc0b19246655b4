//! The host's operations that move bytes: manifests and blobs, in and out.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use futures_util::TryStreamExt;
use http::Method;
use http::header::CONTENT_TYPE;
use kiln_core::Digest;
use kiln_core::digest::Hasher;
use tokio::io::AsyncRead;
use tokio_util::io::{ReaderStream, StreamReader};

use super::ask::{Ask, part_of};
use super::error::HostError;
use super::relay::{Relay, Stopped};
use super::remote::refusal;
use super::{HostRegistry, Role};
use crate::registry::http::header;
use crate::registry::http::transfer::{FAST_BATCH_BYTES, blocking, receive, send};
use crate::registry::manifest::MANIFEST_BYTES_MAX;
use crate::registry::{Authority, ErrorKind, Reference, RepoName, Store, StoredManifest};

/// Most bytes of an answer that only says yes.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// A blob being read.
#[derive(Debug)]
pub struct BlobStream {
    /// Bytes.
    pub size: u64,
    body: Body,
}

impl BlobStream {
    /// The bytes. A blob that ends early is a read error, never a short blob.
    pub fn into_reader(self) -> impl AsyncRead + Send + Unpin + 'static {
        let stream = self.body.into_data_stream().map_err(io::Error::other);
        StreamReader::new(stream)
    }
}

impl HostRegistry {
    /// The store, when this process owns it.
    async fn own_store(&self) -> Option<Arc<Store>> {
        match self.role().await {
            Role::Owner(owner) => Some(owner.store.clone()),
            Role::Attached(_) => None,
        }
    }

    /// Reads a manifest; its bytes have the digest given back, checked in this process.
    ///
    /// # Errors
    /// Not found, corrupt, or the host failed.
    pub async fn get_manifest(
        &self,
        repo: &RepoName,
        reference: &Reference,
    ) -> Result<StoredManifest, HostError> {
        if let Some(store) = self.own_store().await {
            let (repo, reference) = (repo.clone(), reference.clone());
            return Ok(blocking(move || store.get_manifest(&repo, &reference)).await?);
        }
        let ask = Ask::new(Method::GET, format!("/v2/{repo}/manifests/{reference}"));
        let max = usize::try_from(MANIFEST_BYTES_MAX).unwrap_or(usize::MAX);
        let (headers, bytes) = self.operate(&ask, max).await?;
        let media_type = header(&headers, CONTENT_TYPE).unwrap_or_default();
        let (media_type, bytes) = (media_type.to_owned(), bytes.to_vec());
        let digest = Digest::of(&bytes);
        match reference {
            Reference::Digest(expected) if *expected != digest => Err(HostError::Protocol {
                what: format!("manifest {digest} instead of {expected}"),
            }),
            _ => Ok(StoredManifest {
                digest,
                media_type,
                bytes,
            }),
        }
    }

    /// Stores a manifest whose blobs are in the repository already.
    ///
    /// # Errors
    /// Something it names is missing, or it is malformed.
    pub async fn put_manifest(
        &self,
        repo: &RepoName,
        reference: &Reference,
        media_type: &str,
        bytes: Vec<u8>,
    ) -> Result<Digest, HostError> {
        let digest = Digest::of(&bytes);
        if let Some(store) = self.own_store().await {
            let (repo, reference) = (repo.clone(), reference.clone());
            let media_type = media_type.to_owned();
            let put = blocking(move || {
                let operator = Authority::Operator;
                store.put_manifest(&operator, &repo, &reference, Some(&media_type), &bytes)
            });
            return Ok(put.await?.digest);
        }
        let ask = Ask::new(Method::PUT, format!("/v2/{repo}/manifests/{reference}"))
            .with(CONTENT_TYPE, media_type)
            .body(bytes);
        self.operate(&ask, ANSWER_BYTES_MAX).await?;
        Ok(digest)
    }

    /// Whether a repository has a blob, good and readable.
    ///
    /// # Errors
    /// Corrupt, or the host failed.
    pub async fn has_blob(&self, repo: &RepoName, digest: &Digest) -> Result<bool, HostError> {
        if let Some(store) = self.own_store().await {
            let (repo, digest) = (repo.clone(), *digest);
            return Ok(blocking(move || store.has_blob(&repo, &digest)).await?);
        }
        let ask = Ask::new(Method::HEAD, format!("/v2/{repo}/blobs/{digest}"));
        match self.operate(&ask, ANSWER_BYTES_MAX).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Opens a blob for reading.
    ///
    /// # Errors
    /// Not in this repository, corrupt, or the host failed.
    pub async fn open_blob(
        &self,
        repo: &RepoName,
        digest: &Digest,
    ) -> Result<BlobStream, HostError> {
        if let Some(store) = self.own_store().await {
            let (repo, digest) = (repo.clone(), *digest);
            let opened = store.clone();
            let blob = blocking(move || opened.open_blob(&repo, &digest)).await?;
            let size = blob.size;
            return Ok(BlobStream {
                size,
                body: send(&store, blob, 0, size),
            });
        }
        let path = format!("/v2/{repo}/blobs/{digest}");
        let ask = Ask::new(Method::GET, &path);
        let answer = self.ask(&Authority::Operator, &ask).await?;
        if !answer.status().is_success() {
            return Err(refusal(answer).await);
        }
        let (_, size) = part_of(&answer).ok_or_else(|| HostError::Protocol {
            what: "a blob without length".to_owned(),
        })?;
        let body = answer.into_body();
        Ok(BlobStream {
            size,
            body: self.read_on(Authority::Operator, path, 0, size, body),
        })
    }

    /// Stores a blob from a stream, hashing it on the way; with `expected`, only if it has that digest.
    /// Gives its digest and bytes.
    ///
    /// # Errors
    /// The stream failed, the digest differs, the disk is full, or no owner can be found any more.
    pub async fn put_blob(
        &self,
        repo: &RepoName,
        content: impl AsyncRead + Send + 'static,
        expected: Option<Digest>,
    ) -> Result<(Digest, u64), HostError> {
        let stream = ReaderStream::with_capacity(content, FAST_BATCH_BYTES);
        if let Some(store) = self.own_store().await {
            return put_here(store, repo, Body::from_stream(stream), expected).await;
        }
        let counted = Arc::new(Mutex::new(Hasher::default()));
        let hasher = counted.clone();
        let stream = stream.inspect_ok(move |bytes| {
            let mut hasher = hasher.lock().unwrap_or_else(PoisonError::into_inner);
            hasher.update(bytes);
        });
        let relay = Relay::begin(self, &Authority::Operator, repo).await;
        let mut relay = told(relay).await?;
        let path = relay.path();
        let done = match relay.append(Body::from_stream(stream), None).await {
            Ok(()) => {
                let all = counted
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone();
                let (digest, size) = all.finish();
                let promised = expected.unwrap_or(digest);
                relay.commit(&promised).await.map(|_| (promised, size))
            }
            Err(stopped) => Err(stopped),
        };
        if done.is_err() {
            Relay::cancel(self, &Authority::Operator, &path).await;
        }
        told(done).await
    }
}

/// A failure in the words of host code.
async fn told<T>(done: Result<T, Stopped>) -> Result<T, HostError> {
    match done {
        Ok(done) => Ok(done),
        Err(Stopped::Answer(answer)) => Err(refusal(*answer).await),
        Err(Stopped::Store(error)) => Err(error.into()),
        Err(Stopped::Host(error)) => Err(error),
    }
}

async fn put_here(
    store: Arc<Store>,
    repo: &RepoName,
    body: Body,
    expected: Option<Digest>,
) -> Result<(Digest, u64), HostError> {
    let (begun, repo) = (store.clone(), repo.clone());
    let upload = blocking(move || begun.begin_upload(&Authority::Operator, &repo)).await?;
    let id = upload.id().to_owned();
    let upload = match receive(body, upload, None).await {
        Ok(upload) => upload,
        Err(error) => {
            blocking(move || {
                store.cancel_upload(&id);
                Ok(())
            })
            .await?;
            return Err(error.into());
        }
    };
    let commit = blocking(move || match expected {
        Some(expected) => upload.commit(&Authority::Operator, &expected),
        None => upload.commit_any(&Authority::Operator),
    });
    Ok(commit.await?)
}
