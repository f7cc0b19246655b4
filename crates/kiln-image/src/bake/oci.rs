//! Writes OCI images: layers from trees, configurations, manifests, and a layout directory or any other place.
//!
//! Source: OCI image-spec v1.1.1. Everything is deterministic: same trees, same digests.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use kiln_core::Digest;
use kiln_core::digest::Hasher;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::tree::{Tree, TreeError};

/// Media type of manifests.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of configurations.
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of layers that are pushed: small.
pub const LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Media type of layers that only ever are unpacked in a slow machine: not compressed.
pub const LAYER_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
/// Made once, pulled often: the smallest gzip gives.
const GZIP_LEVEL: u32 = 9;
/// Time in configurations; the same moment as [`super::tree::MTIME`].
const CREATED: &str = "2025-01-01T00:00:00Z";

/// Why an image was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OciError {
    /// A layer's tree.
    #[error("cannot write the layer {name}")]
    Layer {
        /// Name of the layer.
        name: String,
        /// Why.
        #[source]
        source: TreeError,
    },
    /// A file operation failed.
    #[error("cannot {what} {}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The place images are put into refused one.
    #[error("cannot put {what} into {repository}")]
    Sink {
        /// Blob or manifest.
        what: String,
        /// Where to.
        repository: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// How a layer is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// Not at all.
    None,
}

/// A blob and what it is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerBlob {
    /// What the layer has, such as `common`.
    pub name: String,
    /// Media type.
    pub media_type: String,
    /// Digest of the blob.
    pub digest: Digest,
    /// Bytes of the blob.
    pub bytes: u64,
    /// Digest of the tar inside.
    pub diff_id: Digest,
    /// Bytes of the tar inside.
    pub tar_bytes: u64,
}

/// One image: its blobs' digests and the bytes of its configuration and manifest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OciImage {
    /// Tag, such as `20-run`.
    pub tag: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// The manifest.
    pub manifest: String,
    /// The configuration.
    pub config: String,
    /// Layers, from the bottom.
    pub layers: Vec<LayerBlob>,
}

/// What an image starts with.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ImageSettings {
    /// Environment, `NAME=value`.
    pub env: Vec<String>,
    /// `uid:gid`; empty means root.
    pub user: String,
    /// Working directory.
    pub directory: String,
    /// Annotations of the manifest.
    pub annotations: Vec<(String, String)>,
}

/// A place that takes images: a registry, a layout directory.
pub trait BlobSink {
    /// Whether the repository has a blob already.
    ///
    /// # Errors
    /// When the place cannot tell.
    fn has_blob(&mut self, repository: &str, digest: &Digest) -> io::Result<bool>;

    /// Takes a blob. `content` gives exactly `bytes` bytes with this digest; the place checks both.
    ///
    /// # Errors
    /// When it cannot be stored.
    fn put_blob(
        &mut self,
        repository: &str,
        digest: &Digest,
        bytes: u64,
        content: &mut dyn Read,
    ) -> io::Result<()>;

    /// Takes a manifest, whose blobs were put before, under a tag.
    ///
    /// # Errors
    /// When it cannot be stored.
    fn put_manifest(
        &mut self,
        repository: &str,
        tag: &str,
        media_type: &str,
        manifest: &[u8],
    ) -> io::Result<()>;
}

/// Counts and digests what is written through it.
struct Digesting<W> {
    out: W,
    hasher: Hasher,
}

impl<W: Write> Write for Digesting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes a tree as the layer `<directory>/<name>`.
///
/// # Errors
/// When a content cannot be read or the file cannot be written.
pub fn write_layer(
    name: &str,
    tree: &Tree,
    compression: Compression,
    directory: &Path,
) -> Result<LayerBlob, OciError> {
    let path = directory.join(name);
    let io_error = |what| {
        let path = path.clone();
        move |source| OciError::Io { what, path, source }
    };
    let file = File::create(&path).map_err(io_error("create"))?;
    let blob = Digesting {
        out: BufWriter::with_capacity(1 << 20, file),
        hasher: Hasher::default(),
    };
    let write = |out: &mut dyn Write| {
        let mut tar = Digesting {
            out,
            hasher: Hasher::default(),
        };
        // Entry headers are small writes; gzip and SHA-256 like large ones.
        let buffered = BufWriter::with_capacity(1 << 18, &mut tar);
        let layer = tree.write_tar(buffered);
        layer.map_err(|source| OciError::Layer {
            name: name.to_owned(),
            source,
        })?;
        Ok::<_, OciError>(tar.hasher.finish())
    };
    let ((diff_id, tar_bytes), mut blob, media_type) = match compression {
        Compression::None => {
            let mut blob = blob;
            (write(&mut blob)?, blob, LAYER_TAR)
        }
        Compression::Gzip => {
            let level = flate2::Compression::new(GZIP_LEVEL);
            let mut gzip = flate2::GzBuilder::new().mtime(0).write(blob, level);
            let tar = write(&mut gzip)?;
            (tar, gzip.finish().map_err(io_error("write"))?, LAYER_GZIP)
        }
    };
    blob.flush().map_err(io_error("write"))?;
    let (digest, bytes) = blob.hasher.finish();
    Ok(LayerBlob {
        name: name.to_owned(),
        media_type: media_type.to_owned(),
        digest,
        bytes,
        diff_id,
        tar_bytes,
    })
}

/// Makes configuration and manifest over layers.
#[must_use]
pub fn make_image(tag: &str, layers: Vec<LayerBlob>, settings: &ImageSettings) -> OciImage {
    let mut start =
        json!({ "Env": settings.env, "WorkingDir": format!("/{}", settings.directory) });
    if !settings.user.is_empty() {
        start["User"] = json!(settings.user);
    }
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id).collect();
    let history = |layer: &LayerBlob| json!({ "created": CREATED, "created_by": format!("kiln base layer {}", layer.name) });
    let config = json!({
        "created": CREATED,
        "architecture": "amd64",
        "os": "linux",
        "config": start,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": layers.iter().map(history).collect::<Vec<_>>(),
    })
    .to_string();
    let blob = |layer: &LayerBlob| json!({ "mediaType": layer.media_type, "digest": layer.digest, "size": layer.bytes });
    let annotations: serde_json::Map<_, _> = settings
        .annotations
        .iter()
        .map(|(name, value)| (name.clone(), json!(value)))
        .collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": { "mediaType": CONFIG, "digest": Digest::of(config.as_bytes()), "size": config.len() },
        "layers": layers.iter().map(blob).collect::<Vec<_>>(),
        "annotations": annotations,
    })
    .to_string();
    let digest = Digest::of(manifest.as_bytes());
    OciImage {
        tag: tag.to_owned(),
        digest,
        manifest,
        config,
        layers,
    }
}

/// Puts an image whose layers are files of `directory` (by name) into a place.
///
/// # Errors
/// When a layer cannot be read or the place refuses something.
pub fn put_image(
    image: &OciImage,
    directory: &Path,
    repository: &str,
    sink: &mut dyn BlobSink,
) -> Result<(), OciError> {
    let refused = |what: String| {
        let repository = repository.to_owned();
        move |source| OciError::Sink {
            what,
            repository,
            source,
        }
    };
    for layer in &image.layers {
        if sink
            .has_blob(repository, &layer.digest)
            .map_err(refused(layer.name.clone()))?
        {
            continue;
        }
        let path = directory.join(&layer.name);
        let open = File::open(&path);
        let mut file = open.map_err(|source| OciError::Io {
            what: "read",
            path,
            source,
        })?;
        let put = sink.put_blob(repository, &layer.digest, layer.bytes, &mut file);
        put.map_err(refused(layer.name.clone()))?;
    }
    let config = Digest::of(image.config.as_bytes());
    let bytes = image.config.len() as u64;
    let put = sink.put_blob(repository, &config, bytes, &mut image.config.as_bytes());
    put.map_err(refused("configuration".to_owned()))?;
    let put = sink.put_manifest(repository, &image.tag, MANIFEST, image.manifest.as_bytes());
    put.map_err(refused(image.tag.clone()))
}

/// An OCI image layout: a directory that skopeo and other tools read as `oci:DIR:NAME`.
#[derive(Debug)]
pub struct OciLayout {
    directory: PathBuf,
    manifests: Vec<Value>,
    written: BTreeSet<Digest>,
}

impl OciLayout {
    /// Starts a layout in an empty or missing directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create(directory: &Path) -> Result<Self, OciError> {
        let blobs = directory.join("blobs/sha256");
        let fail = |source| OciError::Io {
            what: "make",
            path: directory.to_owned(),
            source,
        };
        fs::create_dir_all(&blobs).map_err(fail)?;
        let version = json!({ "imageLayoutVersion": "1.0.0" }).to_string();
        fs::write(directory.join("oci-layout"), version).map_err(fail)?;
        Ok(Self {
            directory: directory.to_owned(),
            manifests: Vec::new(),
            written: BTreeSet::new(),
        })
    }

    /// Writes the index; without it the layout is not one.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(self) -> Result<(), OciError> {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": self.manifests,
        });
        let path = self.directory.join("index.json");
        fs::write(&path, index.to_string()).map_err(|source| OciError::Io {
            what: "write",
            path,
            source,
        })
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.directory.join("blobs/sha256").join(digest.hex())
    }
}

impl BlobSink for OciLayout {
    fn has_blob(&mut self, _repository: &str, digest: &Digest) -> io::Result<bool> {
        Ok(self.written.contains(digest))
    }

    fn put_blob(
        &mut self,
        _repository: &str,
        digest: &Digest,
        bytes: u64,
        content: &mut dyn Read,
    ) -> io::Result<()> {
        let mut out = Digesting {
            out: File::create(self.blob(digest))?,
            hasher: Hasher::default(),
        };
        io::copy(content, &mut out)?;
        if out.hasher.finish() != (*digest, bytes) {
            return Err(io::Error::other("the content is not what its digest says"));
        }
        self.written.insert(*digest);
        Ok(())
    }

    fn put_manifest(
        &mut self,
        repository: &str,
        tag: &str,
        media_type: &str,
        manifest: &[u8],
    ) -> io::Result<()> {
        let digest = Digest::of(manifest);
        fs::write(self.blob(&digest), manifest)?;
        self.manifests.push(json!({
            "mediaType": media_type,
            "digest": digest,
            "size": manifest.len(),
            "annotations": { "org.opencontainers.image.ref.name": format!("{repository}:{tag}") },
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tree::Node;
    use super::*;

    fn tree(text: &str) -> Tree {
        let mut tree = Tree::default();
        tree.insert("etc/file", Node::text(text));
        tree
    }

    #[test]
    fn a_layer_is_the_same_however_often_it_is_written() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let layer = |name: &str, compression| {
            write_layer(name, &tree("x"), compression, dir.path()).expect("it is written")
        };
        let (one, two) = (layer("a", Compression::Gzip), layer("b", Compression::Gzip));
        let plain = layer("c", Compression::None);
        assert_eq!((one.digest, one.diff_id), (two.digest, two.diff_id));
        assert_eq!((plain.digest, plain.bytes), (one.diff_id, one.tar_bytes));
        let mut packed =
            flate2::read::GzDecoder::new(File::open(dir.path().join("a")).expect("there"));
        let mut bytes = Vec::new();
        packed.read_to_end(&mut bytes).expect("gzip");
        assert_eq!(Digest::of(&bytes), one.diff_id);
    }

    #[test]
    fn an_image_is_put_with_everything_its_manifest_names() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let layer =
            write_layer("common", &tree("x"), Compression::Gzip, dir.path()).expect("written");
        let settings = ImageSettings {
            user: "10001:10001".to_owned(),
            ..ImageSettings::default()
        };
        let image = make_image("1-run", vec![layer], &settings);
        let to = dir.path().join("layout");
        let mut layout = OciLayout::create(&to).expect("made");
        put_image(&image, dir.path(), "shared/x", &mut layout).expect("put");
        layout.finish().expect("written");
        let index: Value =
            serde_json::from_slice(&fs::read(to.join("index.json")).expect("there")).expect("JSON");
        let blob = |digest: &Value| {
            let hex = digest
                .as_str()
                .expect("a digest")
                .trim_start_matches("sha256:")
                .to_owned();
            fs::read(to.join("blobs/sha256").join(hex)).expect("the blob is there")
        };
        let manifest: Value =
            serde_json::from_slice(&blob(&index["manifests"][0]["digest"])).expect("JSON");
        let config: Value =
            serde_json::from_slice(&blob(&manifest["config"]["digest"])).expect("JSON");
        assert_eq!(config["config"]["User"], "10001:10001");
        let bytes = blob(&manifest["layers"][0]["digest"]);
        assert_eq!(manifest["layers"][0]["size"], bytes.len());
    }

    #[test]
    fn a_layer_that_changed_on_disk_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let layer =
            write_layer("common", &tree("x"), Compression::None, dir.path()).expect("written");
        let image = make_image("1-run", vec![layer], &ImageSettings::default());
        fs::write(dir.path().join("common"), "other").expect("writable");
        let mut layout = OciLayout::create(&dir.path().join("layout")).expect("made");
        let result = put_image(&image, dir.path(), "shared/x", &mut layout);
        assert!(matches!(result, Err(OciError::Sink { .. })), "{result:?}");
    }
}
