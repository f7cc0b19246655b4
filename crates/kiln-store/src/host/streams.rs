//! The host's operations that move bytes: manifests and blobs, in and out.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use futures_util::TryStreamExt;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use http::{HeaderValue, Method, StatusCode};
use kiln_core::Digest;
use kiln_core::digest::Hasher;
use tokio::io::AsyncRead;
use tokio_util::io::{ReaderStream, StreamReader};

use super::error::HostError;
use super::remote::{ConnectError, Connection, collect, request};
use super::{HostRegistry, OWNERS_MAX, Role};
use crate::registry::http::header;
use crate::registry::http::transfer::{FAST_BATCH_BYTES, blocking, receive, send};
use crate::registry::manifest::MANIFEST_BYTES_MAX;
use crate::registry::{Authority, ErrorKind, Reference, RepoName, Store, StoredManifest};

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
    /// A connection to the owner, or the owner itself when that is us.
    async fn door(&self) -> Result<Door, HostError> {
        let mut role = self.role().await;
        for _ in 0..OWNERS_MAX {
            let remote = match role {
                Role::Owner(owner) => return Ok(Door::Here(owner.store.clone())),
                Role::Attached(remote) => remote,
            };
            match remote.connect().await {
                Ok(connection) => return Ok(Door::There(connection)),
                Err(ConnectError::Absent(_)) => role = self.next_owner().await?,
                Err(ConnectError::Refused(error)) => return Err(error),
            }
        }
        Err(HostError::OwnerGone { source: None })
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
        let connection = match self.door().await? {
            Door::Here(store) => {
                let (repo, reference) = (repo.clone(), reference.clone());
                return Ok(blocking(move || store.get_manifest(&repo, &reference)).await?);
            }
            Door::There(connection) => connection,
        };
        let path = format!("/v2/{repo}/manifests/{reference}");
        let answer = connection
            .operate(request(Method::GET, &path, Body::empty())?)
            .await?;
        let media_type = header(answer.headers(), CONTENT_TYPE).unwrap_or_default();
        let media_type = media_type.to_owned();
        let max = usize::try_from(MANIFEST_BYTES_MAX).unwrap_or(usize::MAX);
        let bytes = collect(answer.into_body(), max).await?.to_vec();
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
        let connection = match self.door().await? {
            Door::Here(store) => {
                let (repo, reference) = (repo.clone(), reference.clone());
                let media_type = media_type.to_owned();
                let put = blocking(move || {
                    let operator = Authority::Operator;
                    store.put_manifest(&operator, &repo, &reference, Some(&media_type), &bytes)
                });
                return Ok(put.await?.digest);
            }
            Door::There(connection) => connection,
        };
        let path = format!("/v2/{repo}/manifests/{reference}");
        let mut put = request(Method::PUT, &path, Body::from(bytes))?;
        let value = HeaderValue::try_from(media_type).map_err(|error| HostError::Protocol {
            what: error.to_string(),
        })?;
        put.headers_mut().insert(CONTENT_TYPE, value);
        connection.operate(put).await?;
        Ok(digest)
    }

    /// Whether a repository has a blob, good and readable.
    ///
    /// # Errors
    /// Corrupt, or the host failed.
    pub async fn has_blob(&self, repo: &RepoName, digest: &Digest) -> Result<bool, HostError> {
        match self.door().await? {
            Door::Here(store) => {
                let (repo, digest) = (repo.clone(), *digest);
                Ok(blocking(move || store.has_blob(&repo, &digest)).await?)
            }
            Door::There(connection) => {
                let path = format!("/v2/{repo}/blobs/{digest}");
                let head = request(Method::HEAD, &path, Body::empty())?;
                match connection.operate(head).await {
                    Ok(_) => Ok(true),
                    Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
                    Err(error) => Err(error),
                }
            }
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
        let connection = match self.door().await? {
            Door::Here(store) => {
                let (repo, digest) = (repo.clone(), *digest);
                let opened = store.clone();
                let blob = blocking(move || opened.open_blob(&repo, &digest)).await?;
                let size = blob.size;
                return Ok(BlobStream {
                    size,
                    body: send(&store, blob, 0, size),
                });
            }
            Door::There(connection) => connection,
        };
        let path = format!("/v2/{repo}/blobs/{digest}");
        let answer = connection
            .operate(request(Method::GET, &path, Body::empty())?)
            .await?;
        let size = header(answer.headers(), CONTENT_LENGTH)
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| HostError::Protocol {
                what: "a blob without length".to_owned(),
            })?;
        Ok(BlobStream {
            size,
            body: Body::new(answer.into_body()),
        })
    }

    /// Stores a blob from a stream, hashing it on the way; with `expected`, only if it has that digest.
    /// Gives its digest and bytes. The stream cannot be read twice: when the owner goes away
    /// meanwhile, the caller begins again.
    ///
    /// # Errors
    /// The stream failed, the digest differs, the disk is full, or the owner went away.
    pub async fn put_blob(
        &self,
        repo: &RepoName,
        content: impl AsyncRead + Send + 'static,
        expected: Option<Digest>,
    ) -> Result<(Digest, u64), HostError> {
        let counted = Arc::new(Mutex::new(Hasher::default()));
        let hasher = counted.clone();
        let stream = ReaderStream::with_capacity(content, FAST_BATCH_BYTES);
        match self.door().await? {
            Door::Here(store) => put_here(store, repo, Body::from_stream(stream), expected).await,
            Door::There(connection) => {
                let stream = stream.inspect_ok(move |bytes| {
                    let mut hasher = hasher.lock().unwrap_or_else(PoisonError::into_inner);
                    hasher.update(bytes);
                });
                let session = self.begin_there(connection, repo).await?;
                let patch = request(Method::PATCH, &session, Body::from_stream(stream))?;
                self.connection().await?.operate(patch).await?;
                let finished = counted
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone();
                let (digest, size) = finished.finish();
                let promised = expected.unwrap_or(digest);
                let path = format!("{session}?digest={promised}");
                let put = request(Method::PUT, &path, Body::empty())?;
                self.connection().await?.operate(put).await?;
                Ok((promised, size))
            }
        }
    }

    async fn begin_there(
        &self,
        connection: Connection,
        repo: &RepoName,
    ) -> Result<String, HostError> {
        let path = format!("/v2/{repo}/blobs/uploads/");
        let answer = connection
            .operate(request(Method::POST, &path, Body::empty())?)
            .await?;
        match (answer.status(), header(answer.headers(), LOCATION)) {
            (StatusCode::ACCEPTED, Some(location)) => Ok(location.to_owned()),
            (status, _) => Err(HostError::Protocol {
                what: format!("{status} without a session"),
            }),
        }
    }

    /// A further connection within one upload: the session lives and dies with the owner we began with.
    async fn connection(&self) -> Result<Connection, HostError> {
        match self.role().await {
            Role::Attached(remote) => match remote.connect().await {
                Ok(connection) => Ok(connection),
                Err(ConnectError::Absent(why)) => Err(HostError::gone(why.0)),
                Err(ConnectError::Refused(error)) => Err(error),
            },
            Role::Owner(_) => Err(HostError::OwnerGone { source: None }),
        }
    }
}

/// The way to the store.
enum Door {
    Here(Arc<Store>),
    There(Connection),
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
