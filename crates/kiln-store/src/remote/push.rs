//! The push of one image: blobs first, each only if it is not there, then the manifest by its tag.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiln_core::Digest;
use tokio::runtime::Handle;
use tokio_util::io::SyncIoBridge;
use ureq::http::header::{CONTENT_LENGTH, LOCATION};
use ureq::http::{HeaderMap, Method, StatusCode, Uri};

use super::client::{Client, Purpose};
use super::credentials::Credential;
use super::error::RemoteError;
use super::http::{Answer, Http, RemoteConfig, Sent, content_type, located};
use super::target::Target;
use crate::host::HostRegistry;
use crate::image::VerifiedImage;
use crate::registry::{Reference, RepoName};

/// How often one step is tried when the network fails. Every step may be done twice with the effect of once.
const TRIES_MAX: u32 = 3;
/// Pause before the second try, when the registry names none; four times as long before the third.
const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// Media type of blobs on their way.
const BLOB_TYPE: &str = "application/octet-stream";

/// How a push goes on.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum PushEvent {
    /// A blob is being sent.
    Sending {
        /// Its digest.
        digest: Digest,
        /// Its bytes.
        size: u64,
    },
    /// A blob is there already.
    Present {
        /// Its digest.
        digest: Digest,
        /// Its bytes.
        size: u64,
    },
    /// A step failed and is tried again.
    Again {
        /// Why.
        why: String,
    },
}

/// What a push did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pushed {
    /// The manifest, which the target's tag names now.
    pub manifest: Digest,
    /// Bytes of blobs sent.
    pub sent: u64,
    /// Bytes of blobs that were there.
    pub present: u64,
}

/// A registry that is not kiln's own, and a place in it.
#[derive(Debug)]
pub struct RemoteRegistry {
    pub(super) http: Http,
    pub(super) target: Target,
    pub(super) credential: Option<Credential>,
}

impl RemoteRegistry {
    /// The way to a target, with the login that is kept for it. Contacts nobody yet.
    ///
    /// # Errors
    /// [`RemoteError::Ca`].
    pub fn new(
        config: &RemoteConfig,
        target: Target,
        credential: Option<Credential>,
    ) -> Result<Self, RemoteError> {
        Ok(Self {
            http: Http::new(config, target.registry())?,
            target,
            credential,
        })
    }

    /// Pushes a verified image of kiln's own registry. Dropping the future stops it at the next read of the image.
    ///
    /// # Errors
    /// See [`RemoteError`]; then the target's tag is as it was.
    pub async fn push(
        &self,
        host: &HostRegistry,
        repo: &RepoName,
        image: &VerifiedImage,
        tell: impl Fn(PushEvent) + Send + 'static,
    ) -> Result<Pushed, RemoteError> {
        let manifest = Reference::Digest(image.manifest);
        let stored =
            host.get_manifest(repo, &manifest)
                .await
                .map_err(|source| RemoteError::Read {
                    digest: image.manifest,
                    source: Box::new(source),
                })?;
        let mut blobs: Vec<(Digest, u64)> = Vec::new();
        for blob in image
            .layers
            .iter()
            .map(|layer| (layer.digest, layer.size))
            .chain([image.config_blob])
        {
            if !blobs.contains(&blob) {
                blobs.push(blob);
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        let _stopped_when_dropped = StopOnDrop(Arc::clone(&stop));
        let source = BlobSource {
            host: host.clone(),
            repo: repo.clone(),
            runtime: Handle::current(),
            stop,
        };
        let (http, target, credential) = (
            self.http.clone(),
            self.target.clone(),
            self.credential.clone(),
        );
        let work = move || {
            let client = retrying(&source.stop, &|why| tell(PushEvent::Again { why }), || {
                Client::open(&http, &target, credential.as_ref(), Purpose::Push)
            })?;
            let mut job = Job {
                client,
                source,
                tell: Box::new(tell),
                sent: 0,
                present: 0,
            };
            for (digest, size) in blobs {
                job.blob(digest, size)?;
            }
            job.manifest(&stored.media_type, &stored.bytes, stored.digest)?;
            Ok(Pushed {
                manifest: stored.digest,
                sent: job.sent,
                present: job.present,
            })
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(RemoteError::Task)?
    }
}

pub(super) struct StopOnDrop(pub(super) Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Opens blobs of kiln's own registry for a blocking reader.
struct BlobSource {
    host: HostRegistry,
    repo: RepoName,
    runtime: Handle,
    stop: Arc<AtomicBool>,
}

impl BlobSource {
    fn open(&self, digest: Digest, size: u64) -> Result<BlobReader<'_>, RemoteError> {
        let opened = self
            .runtime
            .block_on(self.host.open_blob(&self.repo, &digest));
        let blob = opened.map_err(|source| RemoteError::Read {
            digest,
            source: Box::new(source),
        })?;
        if blob.size != size {
            let source = io::Error::other("its size has changed");
            return Err(RemoteError::Stream { digest, source });
        }
        let inner =
            SyncIoBridge::new_with_handle(Box::new(blob.into_reader()) as _, self.runtime.clone());
        Ok(BlobReader {
            inner,
            stop: &self.stop,
            failed: None,
        })
    }
}

/// A blob's bytes. Remembers its own failure: the HTTP client would show it as the network's.
struct BlobReader<'a> {
    inner: SyncIoBridge<Box<dyn tokio::io::AsyncRead + Send + Unpin>>,
    stop: &'a AtomicBool,
    failed: Option<io::Error>,
}

impl Read for BlobReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("cancelled"));
        }
        self.inner.read(buffer).map_err(|error| {
            let told = io::Error::other("the image cannot be read");
            self.failed = Some(error);
            told
        })
    }
}

type Tell = Box<dyn Fn(PushEvent) + Send>;

struct Job {
    client: Client,
    source: BlobSource,
    tell: Tell,
    sent: u64,
    present: u64,
}

/// Repeats a step while the network fails, a bounded number of times.
pub(super) fn retrying<T>(
    stop: &AtomicBool,
    again: &dyn Fn(String),
    mut step: impl FnMut() -> Result<T, RemoteError>,
) -> Result<T, RemoteError> {
    let mut pause = RETRY_PAUSE;
    let mut tries = 1;
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(RemoteError::Cancelled);
        }
        match step() {
            Err(error)
                if error.is_transient() && tries < TRIES_MAX && !stop.load(Ordering::Relaxed) =>
            {
                let source = std::error::Error::source(&error)
                    .map(|source| format!(": {source}"))
                    .unwrap_or_default();
                again(format!("{error}{source}"));
                std::thread::sleep(error.retry_after().unwrap_or(pause));
                pause *= 4;
                tries += 1;
            }
            done => return done,
        }
    }
}

impl Job {
    /// Sends a blob unless it is there.
    fn blob(&mut self, digest: Digest, size: u64) -> Result<(), RemoteError> {
        let Self {
            client,
            source,
            tell,
            ..
        } = self;
        let sent = retrying(&source.stop, &|why| tell(PushEvent::Again { why }), || {
            if is_there(client, digest, size)? {
                tell(PushEvent::Present { digest, size });
                return Ok(false);
            }
            tell(PushEvent::Sending { digest, size });
            upload(client, source, digest, size)?;
            Ok(true)
        })?;
        if sent {
            self.sent += size;
        } else {
            self.present += size;
        }
        Ok(())
    }

    /// Puts the manifest under the target's tag.
    fn manifest(
        &mut self,
        media_type: &str,
        bytes: &[u8],
        digest: Digest,
    ) -> Result<(), RemoteError> {
        let Self {
            client,
            source,
            tell,
            ..
        } = self;
        let uri = client.uri(&format!("manifests/{}", client.target().tag()))?;
        let headers = content_type(media_type);
        let what = "put the manifest";
        let answer = retrying(&source.stop, &|why| tell(PushEvent::Again { why }), || {
            let answer = client.send(what, &Method::PUT, &uri, &headers, &mut |exchange| {
                exchange(Sent::Bytes(bytes))
            })?;
            if answer.status.is_success() {
                Ok(answer)
            } else {
                Err(client.refusal(what, &answer))
            }
        })?;
        let named = answer
            .headers
            .get("docker-content-digest")
            .and_then(|value| value.to_str().ok());
        match named {
            Some(other) if other != digest.to_string() => {
                Err(client.protocol(format!("it stored the manifest {digest} as another one")))
            }
            _ => Ok(()),
        }
    }
}

/// Whether the target's repository has the blob. When in doubt it has not.
fn is_there(client: &mut Client, digest: Digest, size: u64) -> Result<bool, RemoteError> {
    let uri = client.uri(&format!("blobs/{digest}"))?;
    let what = "look for a blob";
    let answer = client.send(
        what,
        &Method::HEAD,
        &uri,
        &HeaderMap::new(),
        &mut |exchange| exchange(Sent::Nothing),
    )?;
    match answer.status {
        StatusCode::OK => {
            let length = answer
                .headers
                .get(CONTENT_LENGTH)
                .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
            Ok(length.is_none_or(|length| length == size))
        }
        // What the right to push allows is seen when pushing; storage behind a redirect may refuse a HEAD.
        StatusCode::NOT_FOUND | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Ok(false),
        status if status.is_client_error() => Ok(false),
        _ => Err(client.refusal(what, &answer)),
    }
}

/// Begins an upload and sends the blob in one piece.
fn upload(
    client: &mut Client,
    source: &BlobSource,
    digest: Digest,
    size: u64,
) -> Result<(), RemoteError> {
    let begin = client.uri("blobs/uploads/")?;
    let what = "begin an upload";
    let answer = client.send(
        what,
        &Method::POST,
        &begin,
        &HeaderMap::new(),
        &mut |exchange| exchange(Sent::Bytes(b"")),
    )?;
    if answer.status != StatusCode::ACCEPTED {
        return Err(client.refusal(what, &answer));
    }
    let session = session_of(client, &begin, &answer)?;
    let uri = with_digest(&session, digest)
        .ok_or_else(|| client.protocol("its upload has no legal URL"))?;
    let headers = content_type(BLOB_TYPE);
    let what = "send a blob";
    let answer = client.send(what, &Method::PUT, &uri, &headers, &mut |exchange| {
        let mut reader = source.open(digest, size)?;
        let answer = exchange(Sent::Stream {
            size,
            reader: &mut reader,
        });
        if source.stop.load(Ordering::Relaxed) {
            return Err(RemoteError::Cancelled);
        }
        match reader.failed.take() {
            Some(source) => Err(RemoteError::Stream { digest, source }),
            None => answer,
        }
    })?;
    match answer.status {
        status if status.is_success() => Ok(()),
        _ => Err(client.refusal(what, &answer)),
    }
}

fn session_of(client: &Client, from: &Uri, answer: &Answer) -> Result<Uri, RemoteError> {
    let location = answer
        .headers
        .get(LOCATION)
        .and_then(|value| value.to_str().ok());
    let location =
        location.ok_or_else(|| client.protocol("it began an upload and did not say where"))?;
    located(from, location).ok_or_else(|| client.protocol("its upload has no URL that may be used"))
}

/// The upload's URI with `digest=` added to what it says already.
fn with_digest(session: &Uri, digest: Digest) -> Option<Uri> {
    let text = session.to_string();
    let joint = if session.query().is_some() { '&' } else { '?' };
    format!("{text}{joint}digest=sha256%3A{}", digest.hex())
        .parse()
        .ok()
}
