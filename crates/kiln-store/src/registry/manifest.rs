//! Reads manifests and indexes, bounded, from bytes nobody trusts.
//!
//! Formats: OCI image-spec v1.1.1 (manifest.md, image-index.md, descriptor.md) and Docker's
//! "Image Manifest V 2, Schema 2". Whether an *image* is sound is the concern of [`crate::verify`].

use std::collections::BTreeMap;

use kiln_core::Digest;
use serde::{Deserialize, Serialize};

use super::error::StoreError;

/// Largest manifest accepted, bytes. The spec asks registries to take at least 4 MiB.
pub const MANIFEST_BYTES_MAX: u64 = 4 << 20;
/// Most descriptors (layers or manifests) in one manifest.
pub const DESCRIPTORS_MAX: usize = 2048;

/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Docker image manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// A pointer to content. Unknown fields are kept out: kiln never re-writes a manifest it received.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type of the content.
    pub media_type: String,
    /// Digest of the content.
    pub digest: Digest,
    /// Bytes of the content.
    pub size: u64,
    /// Type of the artifact, in lists of referrers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Platform, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Free text pairs.
    #[serde(
        default,
        deserialize_with = "null_is_empty",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// Compares the size it states with the content's own.
    ///
    /// # Errors
    /// [`StoreError::SizeMismatch`] when they differ.
    pub fn check_size(&self, actual: u64) -> Result<(), StoreError> {
        if self.size == actual {
            return Ok(());
        }
        Err(StoreError::SizeMismatch {
            digest: self.digest,
            stated: self.size,
            actual,
        })
    }
}

/// Some writers say `null` where they mean "none".
fn null_is_empty<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Platform of an index entry.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Platform {
    /// CPU architecture, in Go's words (`amd64`).
    pub architecture: String,
    /// Operating system, in Go's words (`linux`).
    pub os: String,
    /// Variant of the CPU, such as `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// What a manifest says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    /// Its media type, one of the four known.
    pub media_type: String,
    /// Image or index.
    pub body: ManifestBody,
    /// What it is about, when it is a referrer.
    pub subject: Option<Descriptor>,
    /// Type of artifact, explicit or from the config.
    pub artifact_type: Option<String>,
    /// Free text pairs.
    pub annotations: BTreeMap<String, String>,
}

/// The two shapes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ManifestBody {
    /// One image or artifact.
    Image {
        /// Its configuration.
        config: Descriptor,
        /// Its layers, lowest first.
        layers: Vec<Descriptor>,
    },
    /// A list of manifests.
    Index {
        /// The entries.
        manifests: Vec<Descriptor>,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    subject: Option<Descriptor>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

impl Manifest {
    /// Reads a manifest. `content_type` is what the sender called it, without parameters.
    ///
    /// # Errors
    /// [`StoreError::ManifestInvalid`] or [`StoreError::TooLarge`].
    pub fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Self, StoreError> {
        if bytes.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(StoreError::TooLarge {
                what: "manifest",
                max: MANIFEST_BYTES_MAX,
            });
        }
        let raw: Raw = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        if raw.schema_version != 2 {
            return Err(invalid(format!(
                "schemaVersion is {}, only 2 is known",
                raw.schema_version
            )));
        }
        let media_type = media_type(&raw, content_type)?;
        let index = matches!(media_type.as_str(), OCI_INDEX | DOCKER_LIST);
        let body = body(index, raw.config, raw.layers, raw.manifests)?;
        let from_config = match &body {
            ManifestBody::Image { config, .. } => Some(config.media_type.clone()),
            ManifestBody::Index { .. } => None,
        };
        Ok(Self {
            media_type,
            body,
            subject: raw.subject,
            artifact_type: raw.artifact_type.or(from_config),
            annotations: raw.annotations.unwrap_or_default(),
        })
    }

    /// Blobs it refers to that must be in the repository: config and layers. Layers that may by
    /// definition live elsewhere (foreign, non-distributable) are left out.
    pub fn blobs(&self) -> impl Iterator<Item = &Descriptor> {
        let (config, layers) = match &self.body {
            ManifestBody::Image { config, layers } => (Some(config), layers.as_slice()),
            ManifestBody::Index { .. } => (None, &[][..]),
        };
        let here = |layer: &&Descriptor| !is_foreign(&layer.media_type);
        config.into_iter().chain(layers.iter().filter(here))
    }

    /// Manifests it refers to, when it is an index.
    #[must_use]
    pub fn manifests(&self) -> &[Descriptor] {
        match &self.body {
            ManifestBody::Index { manifests } => manifests,
            ManifestBody::Image { .. } => &[],
        }
    }
}

fn is_foreign(media_type: &str) -> bool {
    media_type.contains(".nondistributable.") || media_type.contains(".foreign.")
}

fn invalid(why: impl Into<String>) -> StoreError {
    StoreError::ManifestInvalid { why: why.into() }
}

/// The field and the header must agree where both are there; without either, the shape decides.
fn media_type(raw: &Raw, content_type: Option<&str>) -> Result<String, StoreError> {
    let known = |text: &str| {
        matches!(
            text,
            OCI_MANIFEST | OCI_INDEX | DOCKER_MANIFEST | DOCKER_LIST
        )
    };
    let content_type = content_type.filter(|text| *text != "application/json");
    let text = match (raw.media_type.as_deref(), content_type) {
        (Some(field), Some(header)) if field != header => {
            return Err(invalid(format!(
                "Content-Type {header:?} and mediaType {field:?} differ"
            )));
        }
        (Some(text), _) | (None, Some(text)) => text,
        (None, None) if raw.manifests.is_some() => OCI_INDEX,
        (None, None) => OCI_MANIFEST,
    };
    if known(text) {
        Ok(text.to_owned())
    } else {
        Err(invalid(format!("media type {text:?} is not supported")))
    }
}

fn body(
    index: bool,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
) -> Result<ManifestBody, StoreError> {
    let count = layers
        .as_ref()
        .map_or(0, Vec::len)
        .max(manifests.as_ref().map_or(0, Vec::len));
    if count > DESCRIPTORS_MAX {
        return Err(StoreError::TooMany {
            what: "descriptors in one manifest",
            max: DESCRIPTORS_MAX as u64,
        });
    }
    match (index, config, layers, manifests) {
        (true, None, None, Some(manifests)) => Ok(ManifestBody::Index { manifests }),
        (false, Some(config), layers, None) => Ok(ManifestBody::Image {
            config,
            layers: layers.unwrap_or_default(),
        }),
        (true, ..) => Err(invalid("an index has manifests, and no config or layers")),
        (false, ..) => Err(invalid("a manifest has a config, and no manifests")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image(media_type: &str) -> String {
        let digest = Digest::of(b"x");
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{media_type}","config":{{"mediaType":"c","digest":"{digest}","size":1}},
            "layers":[{{"mediaType":"l","digest":"{digest}","size":1}}]}}"#
        )
    }

    #[test]
    fn header_and_field_must_agree_and_be_known() {
        let ok = image(OCI_MANIFEST);
        assert!(Manifest::parse(ok.as_bytes(), Some(OCI_MANIFEST)).is_ok());
        assert!(Manifest::parse(ok.as_bytes(), None).is_ok());
        assert!(Manifest::parse(ok.as_bytes(), Some(DOCKER_MANIFEST)).is_err());
        assert!(Manifest::parse(image("text/plain").as_bytes(), None).is_err());
        assert!(Manifest::parse(image(OCI_INDEX).as_bytes(), None).is_err());
    }

    #[test]
    fn doubled_fields_and_other_algorithms_are_refused() {
        let digest = Digest::of(b"x");
        let twice = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"c","digest":"{digest}","size":1}},
            "config":{{"mediaType":"c","digest":"{digest}","size":2}}}}"#
        );
        assert!(Manifest::parse(twice.as_bytes(), None).is_err());
        let sha512 = image(OCI_MANIFEST).replace("sha256:", "sha512:");
        assert!(Manifest::parse(sha512.as_bytes(), None).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = Manifest::parse(&bytes, None);
        }
    }
}
