//! The host's own look at an image, before it is tagged, run or handed out: reads the manifest and
//! the configuration, and every byte of every layer. Nothing a guest reported is used.

use std::io;

use kiln_core::Digest;
use kiln_core::digest::Hasher;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;

use super::config::{CONFIG_BYTES_MAX, ConfigError, ImageConfig};
use crate::host::{HostError, HostRegistry};
use crate::registry::manifest::{Descriptor, Manifest, ManifestBody};
use crate::registry::{ErrorKind, Reference, RepoName, StoreError};

/// Most layers of an image; more cannot be mounted as one overlay by common tools.
pub const LAYERS_MAX: usize = 127;
/// Most bytes of all layers together: 64 GiB.
pub const IMAGE_BYTES_MAX: u64 = 64 << 30;
/// Buffer for hashing, bytes.
const HASH_BUFFER_BYTES: usize = 512 << 10;

/// Media types of configurations.
const CONFIG_TYPES: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];
/// Media types of layers. Foreign and non-distributable ones are not among them.
const LAYER_TYPES: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// What to do with an index.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Select {
    /// Refuse it: a build's result is one image.
    #[default]
    ImageOnly,
    /// Take its one entry for linux/amd64; none or several are refused.
    LinuxAmd64,
}

/// Lowest layers an image must have, because it was built on a known base.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ExpectedBase {
    /// Unpacked digests, compared with the configuration.
    pub diff_ids: Vec<Digest>,
    /// Digests as stored, compared with the manifest; empty: not compared (layers may have been compressed again).
    pub layers: Vec<Digest>,
}

/// What to verify, and against what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verify {
    /// The repository.
    pub repo: RepoName,
    /// The manifest.
    pub manifest: Digest,
    /// How to treat an index.
    pub select: Select,
    /// The base it must stand on.
    pub base: Option<ExpectedBase>,
    /// Read and hash every byte now (`true`), or rely on what DESIGN rule 8 keeps of earlier hashes.
    pub rehash: bool,
}

impl Verify {
    /// Verifies one image in full, with no expectation of a base.
    #[must_use]
    pub fn image(repo: RepoName, manifest: Digest) -> Self {
        Self {
            repo,
            manifest,
            select: Select::ImageOnly,
            base: None,
            rehash: true,
        }
    }
}

/// A layer as found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Layer {
    /// Digest as stored.
    pub digest: Digest,
    /// Bytes as stored.
    pub size: u64,
    /// Media type, one of the known ones.
    pub media_type: String,
    /// Digest of the unpacked tar stream, as the configuration says.
    pub diff_id: Digest,
}

/// An image the host has looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VerifiedImage {
    /// Its manifest (the image's, also when it was found through an index).
    pub manifest: Digest,
    /// Media type of the manifest.
    pub media_type: String,
    /// Bytes of the manifest.
    pub manifest_size: u64,
    /// Digest and bytes of the configuration.
    pub config_blob: (Digest, u64),
    /// Media type of the configuration.
    pub config_media_type: String,
    /// The configuration.
    pub config: ImageConfig,
    /// Layers, lowest first.
    pub layers: Vec<Layer>,
    /// Bytes of configuration and layers as stored.
    pub total_size: u64,
}

/// What a failure calls the manifest.
const MANIFEST: &str = "its manifest";

/// Why an image is refused, or could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The registry failed, or part of the image is missing or corrupt.
    #[error("image {manifest}: {part} cannot be read")]
    Read {
        /// The image.
        manifest: Digest,
        /// Which part.
        part: String,
        /// What failed.
        #[source]
        source: Box<HostError>,
    },
    /// A stream broke while it was hashed.
    #[error("image {manifest}: reading {digest} broke off")]
    Stream {
        /// The image.
        manifest: Digest,
        /// The content.
        digest: Digest,
        /// What the stream said.
        #[source]
        source: io::Error,
    },
    /// The manifest is malformed.
    #[error("image {manifest}: its manifest is malformed")]
    Manifest {
        /// The image.
        manifest: Digest,
        /// What is wrong.
        #[source]
        source: StoreError,
    },
    /// The configuration is malformed.
    #[error("image {manifest}: its configuration is refused")]
    Config {
        /// The image.
        manifest: Digest,
        /// What is wrong.
        #[source]
        source: ConfigError,
    },
    /// It is not what was asked for.
    #[error("image {manifest}: {why}")]
    Refused {
        /// The image.
        manifest: Digest,
        /// Why, in words for a person.
        why: String,
    },
}

impl VerifyError {
    /// Whether the image itself is at fault, rather than the host or the registry.
    #[must_use]
    pub fn is_images_fault(&self) -> bool {
        match self {
            Self::Manifest { .. } | Self::Config { .. } | Self::Refused { .. } => true,
            Self::Read { source, .. } => source.kind() == ErrorKind::NotFound,
            Self::Stream { .. } => false,
        }
    }

    /// Whether there is no such image at all, by the digest that was asked for.
    #[must_use]
    pub fn lacks_manifest(&self, asked: &Digest) -> bool {
        match self {
            Self::Read {
                manifest,
                part,
                source,
            } => manifest == asked && part == MANIFEST && source.is_not_found(),
            _ => false,
        }
    }
}

/// Looks at an image in full.
///
/// # Errors
/// See [`VerifyError`].
pub async fn verify(host: &HostRegistry, asked: &Verify) -> Result<VerifiedImage, VerifyError> {
    let (digest, media_type, size, manifest) = find_manifest(host, asked).await?;
    let reader = Reader {
        host,
        repo: &asked.repo,
        manifest: digest,
    };
    let ManifestBody::Image { config, layers } = manifest.body else {
        return Err(reader.refuse("an index within an index is not an image"));
    };
    check_descriptors(&reader, &config, &layers)?;
    let bytes = reader.read_config(&config).await?;
    let parsed = ImageConfig::parse(&bytes).map_err(|source| VerifyError::Config {
        manifest: digest,
        source,
    })?;
    check_config(&reader, &parsed, &layers, asked.base.as_ref())?;
    for layer in &layers {
        reader.check_layer(layer, asked.rehash).await?;
    }
    let total_size = config.size + layers.iter().map(|layer| layer.size).sum::<u64>();
    let diff_ids = parsed.diff_ids.clone();
    Ok(VerifiedImage {
        manifest: digest,
        media_type,
        manifest_size: size,
        config_blob: (config.digest, config.size),
        config_media_type: config.media_type,
        config: parsed,
        layers: layers
            .into_iter()
            .zip(diff_ids)
            .map(|(layer, diff_id)| Layer {
                digest: layer.digest,
                size: layer.size,
                media_type: layer.media_type,
                diff_id,
            })
            .collect(),
        total_size,
    })
}

/// The image's manifest, through an index where that is allowed.
async fn find_manifest(
    host: &HostRegistry,
    asked: &Verify,
) -> Result<(Digest, String, u64, Manifest), VerifyError> {
    let mut digest = asked.manifest;
    let mut through_index = false;
    loop {
        let reader = Reader {
            host,
            repo: &asked.repo,
            manifest: digest,
        };
        let stored = host
            .get_manifest(&asked.repo, &Reference::Digest(digest))
            .await
            .map_err(|source| reader.failed(MANIFEST, source))?;
        let manifest =
            Manifest::parse(&stored.bytes, Some(&stored.media_type)).map_err(|source| {
                VerifyError::Manifest {
                    manifest: digest,
                    source,
                }
            })?;
        if manifest.manifests().is_empty() && matches!(manifest.body, ManifestBody::Image { .. }) {
            let size = stored.bytes.len() as u64;
            return Ok((digest, stored.media_type, size, manifest));
        }
        if asked.select == Select::ImageOnly || through_index {
            return Err(reader.refuse("an index was found where one image was expected"));
        }
        digest = select_amd64(&reader, manifest.manifests())?;
        through_index = true;
    }
}

fn select_amd64(reader: &Reader<'_>, entries: &[Descriptor]) -> Result<Digest, VerifyError> {
    let fits = |entry: &&Descriptor| {
        entry
            .platform
            .as_ref()
            .is_some_and(|platform| platform.os == "linux" && platform.architecture == "amd64")
    };
    let mut found = entries.iter().filter(fits);
    match (found.next(), found.next()) {
        (Some(entry), None) => Ok(entry.digest),
        (None, _) => Err(reader.refuse("the index has no image for linux/amd64")),
        (Some(_), Some(_)) => {
            Err(reader.refuse("the index has several images for linux/amd64: name one by digest"))
        }
    }
}

fn check_descriptors(
    reader: &Reader<'_>,
    config: &Descriptor,
    layers: &[Descriptor],
) -> Result<(), VerifyError> {
    if !CONFIG_TYPES.contains(&config.media_type.as_str()) {
        let why = format!("{:?} is no image configuration", clip(&config.media_type));
        return Err(reader.refuse(why));
    }
    if config.size > CONFIG_BYTES_MAX {
        return Err(reader.refuse(format!(
            "its configuration is larger than {CONFIG_BYTES_MAX} bytes"
        )));
    }
    if layers.len() > LAYERS_MAX {
        let why = format!("{} layers, at most {LAYERS_MAX} are accepted", layers.len());
        return Err(reader.refuse(why));
    }
    if let Some(layer) = layers
        .iter()
        .find(|layer| !LAYER_TYPES.contains(&layer.media_type.as_str()))
    {
        let why = format!("{:?} is no layer kiln accepts", clip(&layer.media_type));
        return Err(reader.refuse(why));
    }
    let sum = layers
        .iter()
        .try_fold(config.size, |sum, layer| sum.checked_add(layer.size));
    if sum.is_none_or(|sum| sum > IMAGE_BYTES_MAX) {
        return Err(reader.refuse(format!("it is larger than {IMAGE_BYTES_MAX} bytes")));
    }
    Ok(())
}

fn check_config(
    reader: &Reader<'_>,
    config: &ImageConfig,
    layers: &[Descriptor],
    base: Option<&ExpectedBase>,
) -> Result<(), VerifyError> {
    if (config.os.as_str(), config.architecture.as_str()) != ("linux", "amd64") {
        return Err(reader.refuse(format!(
            "it is for {}/{}, not linux/amd64",
            clip(&config.os),
            clip(&config.architecture)
        )));
    }
    if config.diff_ids.len() != layers.len() {
        return Err(reader.refuse(format!(
            "{} layers, but its configuration speaks of {}",
            layers.len(),
            config.diff_ids.len()
        )));
    }
    let Some(base) = base else {
        return Ok(());
    };
    if !config.diff_ids.starts_with(&base.diff_ids) {
        return Err(reader.refuse("it does not begin with the layers of its base"));
    }
    let mut stored = layers.iter().map(|layer| &layer.digest);
    if !base.layers.iter().all(|layer| stored.next() == Some(layer)) {
        return Err(reader.refuse("its lowest layers are not those of its base"));
    }
    Ok(())
}

/// At most a hundred characters of a text from outside.
fn clip(text: &str) -> String {
    text.chars().take(100).collect()
}

/// Reads parts of one image.
struct Reader<'a> {
    host: &'a HostRegistry,
    repo: &'a RepoName,
    manifest: Digest,
}

impl Reader<'_> {
    fn refuse(&self, why: impl Into<String>) -> VerifyError {
        VerifyError::Refused {
            manifest: self.manifest,
            why: why.into(),
        }
    }

    fn failed(&self, part: impl Into<String>, source: HostError) -> VerifyError {
        VerifyError::Read {
            manifest: self.manifest,
            part: part.into(),
            source: Box::new(source),
        }
    }

    fn broken(&self, digest: Digest, source: io::Error) -> VerifyError {
        VerifyError::Stream {
            manifest: self.manifest,
            digest,
            source,
        }
    }

    async fn read_config(&self, config: &Descriptor) -> Result<Vec<u8>, VerifyError> {
        let blob = self
            .host
            .open_blob(self.repo, &config.digest)
            .await
            .map_err(|source| self.failed("its configuration", source))?;
        let mut bytes = Vec::new();
        blob.into_reader()
            .take(CONFIG_BYTES_MAX + 1)
            .read_to_end(&mut bytes)
            .await
            .map_err(|source| self.broken(config.digest, source))?;
        if bytes.len() as u64 != config.size || Digest::of(&bytes) != config.digest {
            return Err(self.refuse("its configuration is not what the manifest names"));
        }
        Ok(bytes)
    }

    async fn check_layer(&self, layer: &Descriptor, rehash: bool) -> Result<(), VerifyError> {
        let blob = self
            .host
            .open_blob(self.repo, &layer.digest)
            .await
            .map_err(|source| self.failed(format!("layer {}", layer.digest), source))?;
        if blob.size != layer.size {
            let why = format!(
                "layer {} has {} bytes, not {}",
                layer.digest, blob.size, layer.size
            );
            return Err(self.refuse(why));
        }
        if !rehash {
            return Ok(());
        }
        let mut reader = blob.into_reader();
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; HASH_BUFFER_BYTES];
        loop {
            let got = reader
                .read(&mut buffer)
                .await
                .map_err(|source| self.broken(layer.digest, source))?;
            if got == 0 {
                break;
            }
            hasher.update(&buffer[..got]);
        }
        let (digest, size) = hasher.finish();
        if digest != layer.digest || size != layer.size {
            return Err(self.refuse(format!("layer {} has other content", layer.digest)));
        }
        Ok(())
    }
}
