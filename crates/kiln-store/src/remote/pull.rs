//! The pull of one image into kiln's own registry: manifest, through an index where there is one, then each blob that
//! is not there yet. Every byte is hashed while it comes, and nothing is tagged before all of it is there and sound.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use kiln_core::{ByteSize, Digest};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::io::StreamReader;
use ureq::http::HeaderMap;
use ureq::http::header::{ACCEPT, CONTENT_TYPE, HeaderValue};

use super::client::{Client, Purpose};
use super::error::RemoteError;
use super::push::{RemoteRegistry, StopOnDrop, retrying};
use crate::host::HostRegistry;
use crate::image::{LAYERS_MAX, VerifiedImage, Verify, verify};
use crate::registry::manifest::{
    DOCKER_LIST, DOCKER_MANIFEST, Descriptor, MANIFEST_BYTES_MAX, Manifest, ManifestBody,
    OCI_INDEX, OCI_MANIFEST,
};
use crate::registry::{ErrorKind, Reference, RepoName};

/// Most bytes of one image, compressed: 20 GiB.
pub const PULL_BYTES_MAX: u64 = 20 << 30;
/// Bytes on their way between the network and the store: [`PIECES_MAX`] pieces of this.
const PIECE_BYTES: usize = 256 << 10;
/// Pieces that wait for the store.
const PIECES_MAX: usize = 4;

/// How a pull goes on.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum PullEvent {
    /// A blob is being fetched.
    Fetching {
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

/// What a pull did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pulled {
    /// What the reference means: an index, or the image itself.
    pub named: Digest,
    /// The image for linux/amd64, as it lies in kiln's own registry now.
    pub image: VerifiedImage,
    /// Bytes of blobs fetched.
    pub fetched: u64,
    /// Bytes of blobs that were there.
    pub present: u64,
}

/// A manifest as it came, with the digest it truly has.
struct Came {
    digest: Digest,
    media_type: String,
    bytes: Vec<u8>,
    manifest: Manifest,
}

impl RemoteRegistry {
    /// The digest that the reference means now.
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub async fn resolve(&self) -> Result<Digest, RemoteError> {
        let (http, target, credential) = (
            self.http.clone(),
            self.target.clone(),
            self.credential.clone(),
        );
        let work = move || {
            let stop = AtomicBool::new(false);
            retrying(&stop, &|_| {}, || {
                let mut client = Client::open(&http, &target, credential.as_ref(), Purpose::Pull)?;
                Ok(get_named(&mut client)?.digest)
            })
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(RemoteError::Task)?
    }

    /// Pulls the image into a repository of kiln's own registry and tags it there. Dropping the future stops it at the
    /// next piece of a blob; blobs that are complete are not fetched again.
    ///
    /// # Errors
    /// See [`RemoteError`]; then the tag is as it was.
    pub async fn pull(
        &self,
        host: &HostRegistry,
        repo: &RepoName,
        tag: impl Fn(&Digest) -> String,
        tell: impl Fn(PullEvent) + Send + 'static,
    ) -> Result<Pulled, RemoteError> {
        let stop = Arc::new(AtomicBool::new(false));
        let _stopped_when_dropped = StopOnDrop(Arc::clone(&stop));
        let (http, target, credential) = (
            self.http.clone(),
            self.target.clone(),
            self.credential.clone(),
        );
        let sink = Sink {
            host: host.clone(),
            repo: repo.clone(),
            runtime: Handle::current(),
            stop,
        };
        let work = move || {
            let again = |why| tell(PullEvent::Again { why });
            let (client, named, image) = retrying(&sink.stop, &again, || {
                let mut client = Client::open(&http, &target, credential.as_ref(), Purpose::Pull)?;
                let (named, image) = get_image(&mut client)?;
                Ok((client, named, image))
            })?;
            let mut job = Job {
                client,
                sink,
                tell: Box::new(tell),
                fetched: 0,
                present: 0,
            };
            for blob in blobs_of(&job.client, &image)? {
                job.blob(&blob)?;
            }
            Ok::<_, RemoteError>((named, image, job.fetched, job.present))
        };
        let (named, came, fetched, present) = tokio::task::spawn_blocking(work)
            .await
            .map_err(RemoteError::Task)??;
        let write = |source| RemoteError::Write {
            digest: came.digest,
            source: Box::new(source),
        };
        let by_digest = Reference::Digest(came.digest);
        host.put_manifest(repo, &by_digest, &came.media_type, came.bytes)
            .await
            .map_err(write)?;
        // Hashed while they came; the store knows.
        let asked = Verify {
            rehash: false,
            ..Verify::image(repo.clone(), came.digest)
        };
        let image = match verify(host, &asked).await {
            Ok(image) => image,
            Err(error) => {
                let _unnamed = host.delete(repo, &by_digest).await;
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                return Err(RemoteError::Unusable {
                    image: self.target.to_string(),
                    why: format!("{error}{}", cause.unwrap_or_default()),
                });
            }
        };
        host.tag(repo, &tag(&image.manifest), &image.manifest)
            .await
            .map_err(write)?;
        Ok(Pulled {
            named,
            image,
            fetched,
            present,
        })
    }
}

/// The manifest that the target names.
fn get_named(client: &mut Client) -> Result<Came, RemoteError> {
    let digest = client.target().digest();
    let name = digest.map_or_else(
        || client.target().tag().to_owned(),
        |digest| digest.to_string(),
    );
    get_manifest(client, &name, digest)
}

fn get_manifest(
    client: &mut Client,
    name: &str,
    expected: Option<Digest>,
) -> Result<Came, RemoteError> {
    let uri = client.uri(&format!("manifests/{name}"))?;
    let mut headers = HeaderMap::new();
    for media_type in [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST] {
        headers.append(ACCEPT, HeaderValue::from_static(media_type));
    }
    let fetched = client.fetch("get the manifest", &uri, &headers)?;
    let media_type = fetched
        .headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .map(|text| text.split(';').next().unwrap_or_default().trim().to_owned());
    let mut bytes = Vec::new();
    let read = fetched
        .body
        .take(MANIFEST_BYTES_MAX + 1)
        .read_to_end(&mut bytes);
    read.map_err(|error| broken(client, "get the manifest", error))?;
    let digest = Digest::of(&bytes);
    if let Some(expected) = expected.filter(|expected| *expected != digest) {
        return Err(RemoteError::Content {
            registry: client.target().registry().to_owned(),
            expected,
            why: format!("a manifest with the digest {digest}"),
        });
    }
    let manifest = Manifest::parse(&bytes, media_type.as_deref())
        .map_err(|error| unusable(client, error.to_string()))?;
    Ok(Came {
        digest,
        media_type: manifest.media_type.clone(),
        bytes,
        manifest,
    })
}

/// The image for linux/amd64, and the digest of what the target names.
fn get_image(client: &mut Client) -> Result<(Digest, Came), RemoteError> {
    let named = get_named(client)?;
    if matches!(named.manifest.body, ManifestBody::Image { .. }) {
        return Ok((named.digest, named));
    }
    let Some(entry) = for_amd64(named.manifest.manifests()) else {
        return Err(unusable(client, "it has no image for linux/amd64"));
    };
    let image = get_manifest(client, &entry.digest.to_string(), Some(entry.digest))?;
    if !matches!(image.manifest.body, ManifestBody::Image { .. }) {
        return Err(unusable(client, "an index within an index is not an image"));
    }
    Ok((named.digest, image))
}

/// The entry for linux/amd64; the one that names no variant of it before others.
fn for_amd64(entries: &[Descriptor]) -> Option<&Descriptor> {
    let variant = |entry: &&Descriptor| {
        let platform = entry.platform.as_ref()?;
        let fits = platform.os == "linux" && platform.architecture == "amd64";
        fits.then(|| platform.variant.clone().unwrap_or_default())
    };
    entries
        .iter()
        .filter_map(|entry| Some((variant(&entry)?, entry)))
        .min_by(|(one, _), (other, _)| one.cmp(other))
        .map(|(_, entry)| entry)
}

/// Configuration and layers, each once, within the bounds.
fn blobs_of(client: &Client, image: &Came) -> Result<Vec<Descriptor>, RemoteError> {
    let ManifestBody::Image { config, layers } = &image.manifest.body else {
        return Err(unusable(client, "it is no image"));
    };
    if layers.len() > LAYERS_MAX {
        let why = format!("{} layers, at most {LAYERS_MAX} are accepted", layers.len());
        return Err(unusable(client, why));
    }
    let mut blobs: Vec<Descriptor> = Vec::new();
    let mut sum: u64 = 0;
    for blob in [config].into_iter().chain(layers) {
        if blobs.iter().any(|one| one.digest == blob.digest) {
            continue;
        }
        sum = sum.saturating_add(blob.size);
        blobs.push(blob.clone());
    }
    if sum > PULL_BYTES_MAX {
        let why = format!("it is larger than {}", ByteSize(PULL_BYTES_MAX));
        return Err(unusable(client, why));
    }
    Ok(blobs)
}

fn unusable(client: &Client, why: impl Into<String>) -> RemoteError {
    RemoteError::Unusable {
        image: client.target().to_string(),
        why: why.into(),
    }
}

fn broken(client: &Client, what: &'static str, error: std::io::Error) -> RemoteError {
    RemoteError::Network {
        registry: client.target().registry().to_owned(),
        what,
        source: Box::new(ureq::Error::Io(error)),
    }
}

/// Where blobs go.
struct Sink {
    host: HostRegistry,
    repo: RepoName,
    runtime: Handle,
    stop: Arc<AtomicBool>,
}

struct Job {
    client: Client,
    sink: Sink,
    tell: Box<dyn Fn(PullEvent) + Send>,
    fetched: u64,
    present: u64,
}

impl Job {
    /// Fetches a blob unless it is there.
    fn blob(&mut self, blob: &Descriptor) -> Result<(), RemoteError> {
        let Self {
            client, sink, tell, ..
        } = self;
        let (digest, size) = (blob.digest, blob.size);
        let write = |source| RemoteError::Write {
            digest,
            source: Box::new(source),
        };
        let there = sink
            .runtime
            .block_on(sink.host.has_blob(&sink.repo, &digest));
        // A damaged copy is healed by a new one.
        let there = match there {
            Err(error) if error.kind() == ErrorKind::Corrupt => false,
            there => there.map_err(write)?,
        };
        if there {
            tell(PullEvent::Present { digest, size });
            self.present += size;
            return Ok(());
        }
        tell(PullEvent::Fetching { digest, size });
        let uri = client.uri(&format!("blobs/{digest}"))?;
        retrying(&sink.stop, &|why| tell(PullEvent::Again { why }), || {
            let fetched = client.fetch("get a blob", &uri, &HeaderMap::new())?;
            sink.store(client, fetched.body, digest, size)
        })?;
        self.fetched += size;
        Ok(())
    }
}

impl Sink {
    /// Streams a body into the store, which hashes it; one byte more or less than promised is refused.
    fn store(
        &self,
        client: &Client,
        mut body: Box<dyn Read + Send>,
        digest: Digest,
        size: u64,
    ) -> Result<(), RemoteError> {
        let lie = |why| RemoteError::Content {
            registry: client.target().registry().to_owned(),
            expected: digest,
            why,
        };
        let (sender, receiver) = mpsc::channel::<std::io::Result<Bytes>>(PIECES_MAX);
        let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
            Some((receiver.recv().await?, receiver))
        });
        let (host, repo) = (self.host.clone(), self.repo.clone());
        let storing = self.runtime.spawn(async move {
            let content = StreamReader::new(Box::pin(stream));
            host.put_blob(&repo, content, Some(digest)).await
        });
        let mut got: u64 = 0;
        let mut read = || -> Result<(), RemoteError> {
            loop {
                if self.stop.load(Ordering::Relaxed) {
                    return Err(RemoteError::Cancelled);
                }
                let mut piece = vec![0; PIECE_BYTES];
                let count = body
                    .read(&mut piece)
                    .map_err(|error| broken(client, "get a blob", error))?;
                if count == 0 {
                    break;
                }
                got += count as u64;
                if got > size {
                    return Err(lie(format!("more than its {size} bytes")));
                }
                piece.truncate(count);
                if sender.blocking_send(Ok(Bytes::from(piece))).is_err() {
                    // The store gave up: its answer says why.
                    return Ok(());
                }
            }
            match got == size {
                true => Ok(()),
                false => Err(broken(
                    client,
                    "get a blob",
                    std::io::ErrorKind::UnexpectedEof.into(),
                )),
            }
        };
        let read = read();
        if read.is_err() {
            // A stream that ends in an error is never a blob.
            let _gone = sender.blocking_send(Err(std::io::ErrorKind::UnexpectedEof.into()));
        }
        drop(sender);
        let stored = self.runtime.block_on(storing);
        read?;
        match stored.map_err(RemoteError::Task)? {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::Invalid => {
                Err(lie("bytes with another digest".to_owned()))
            }
            Err(source) => Err(RemoteError::Write {
                digest,
                source: Box::new(source),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::manifest::Platform;

    #[test]
    fn the_plain_amd64_entry_is_chosen() {
        let entry = |os: &str, architecture: &str, variant: Option<&str>| Descriptor {
            media_type: OCI_MANIFEST.to_owned(),
            digest: Digest::of(format!("{os}{architecture}{variant:?}").as_bytes()),
            size: 1,
            artifact_type: None,
            platform: Some(Platform {
                architecture: architecture.to_owned(),
                os: os.to_owned(),
                variant: variant.map(str::to_owned),
            }),
            annotations: Default::default(),
        };
        let plain = entry("linux", "amd64", None);
        let entries = [
            entry("unknown", "unknown", None),
            entry("linux", "arm64", Some("v8")),
            entry("linux", "amd64", Some("v3")),
            plain.clone(),
        ];
        assert_eq!(for_amd64(&entries), Some(&plain));
        assert_eq!(for_amd64(&entries[..3]), Some(&entries[2]));
        assert_eq!(for_amd64(&entries[..2]), None);
    }
}
