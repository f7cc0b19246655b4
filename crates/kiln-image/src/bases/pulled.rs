//! Which images of other registries lie in kiln's own: `bases-pulled.json`, written by `kiln bases bake`. Machines pull from
//! kiln's own registry alone, so an image that is not there yet cannot be built on.

use std::path::{Path, PathBuf};

use kiln_core::network::REGISTRY_HOST;
use kiln_core::{Digest, ImageRef};
use serde::{Deserialize, Serialize};

use super::config::{Bases, SHARED_PREFIX};
use super::file::{BasesError, read, save_json};

/// Name of the file, beside the generated one.
const FILE_NAME: &str = "bases-pulled.json";

/// One image that was pulled.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PulledImage {
    /// The image of another registry, by the digest that the operator pinned; it may be an index.
    pub from: ImageRef,
    /// The image for linux/amd64 in kiln's own registry.
    pub image: ImageRef,
    /// Compressed bytes.
    pub bytes: u64,
}

/// All of them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pulled {
    /// Version of the file format.
    pub schema: u32,
    /// The images.
    pub images: Vec<PulledImage>,
}

impl Default for Pulled {
    fn default() -> Self {
        Self {
            schema: Self::SCHEMA,
            images: Vec::new(),
        }
    }
}

impl Pulled {
    /// The file format this version writes.
    pub const SCHEMA: u32 = 1;

    /// Where the file is, from where the generated one is.
    #[must_use]
    pub fn path(generated: &Path) -> PathBuf {
        generated.with_file_name(FILE_NAME)
    }

    /// Reads the file; a missing one is an empty one.
    ///
    /// # Errors
    /// When it exists and cannot be read or is wrong.
    pub fn load(path: &Path) -> Result<Self, BasesError> {
        let Some(text) = read(path)? else {
            return Ok(Self::default());
        };
        let invalid = |line, what| BasesError::Invalid {
            path: path.to_owned(),
            line,
            what,
        };
        let pulled: Self = serde_json::from_str(&text)
            .map_err(|e| invalid(e.line(), format!("not what kiln writes there ({e})")))?;
        if pulled.schema != Self::SCHEMA {
            let (found, known) = (pulled.schema, Self::SCHEMA);
            let what = format!("schema {found} is not known to this kiln (it knows {known})");
            return Err(invalid(1, what));
        }
        let legal = |one: &PulledImage| is_own(&one.image) && one.from.digest.is_some();
        if !pulled.images.iter().all(legal) {
            let what = "an image that was pulled is in kiln's own registry, by digest".to_owned();
            return Err(invalid(1, what));
        }
        Ok(pulled)
    }

    /// Writes the file: whole or not at all.
    ///
    /// # Errors
    /// [`BasesError::Io`]; the old file is then still there.
    pub fn save(&self, path: &Path) -> Result<(), BasesError> {
        save_json(self, path)
    }

    /// The image in kiln's own registry for an image of another: the digest is the content, wherever it came from.
    #[must_use]
    pub fn image(&self, from: &Digest) -> Option<&ImageRef> {
        let mut same = self.images.iter();
        let found = same.find(|one| one.from.digest.as_ref() == Some(from))?;
        Some(&found.image)
    }
}

/// Whether an image lies in kiln's own registry, by digest.
#[must_use]
pub fn is_own(image: &ImageRef) -> bool {
    image.registry.as_deref() == Some(REGISTRY_HOST) && image.digest.is_some()
}

impl Bases {
    /// Replaces images of other registries by what was pulled of them.
    pub(super) fn use_pulled(&mut self, pulled: &Pulled) {
        let own = |image: &ImageRef| {
            let found = pulled.image(image.digest.as_ref()?)?;
            (!is_own(image)).then(|| found.clone())
        };
        for base in &mut self.bases {
            for image in [&mut base.build, &mut base.run] {
                if let Some(found) = own(image) {
                    *image = found;
                }
            }
        }
        for image in &mut self.images {
            image.pulled = own(&image.reference);
        }
    }

    /// Images of other registries that are named here: those that are to be pulled.
    #[must_use]
    pub fn foreign(&self) -> Vec<ImageRef> {
        let bases = self.bases.iter().flat_map(|base| [&base.build, &base.run]);
        let all = bases.chain(self.images.iter().map(|image| &image.reference));
        let mut found: Vec<ImageRef> = Vec::new();
        for image in all {
            if image.digest.is_some() && !is_own(image) && !found.contains(image) {
                found.push(image.clone());
            }
        }
        found
    }

    /// Images that lie below `shared/` in kiln's own registry, each once: what the shared head has unpacked.
    #[must_use]
    pub fn shared_images(&self) -> Vec<ImageRef> {
        let bases = self.bases.iter().flat_map(|base| [&base.build, &base.run]);
        let all = bases.chain(self.images.iter().map(|image| image.image()));
        let mut found: Vec<ImageRef> = Vec::new();
        for image in all {
            let named = ImageRef {
                digest: None,
                ..image.clone()
            };
            let shared = named.to_string().starts_with(&format!("{SHARED_PREFIX}/"));
            let known = found.iter().any(|one| one.digest == image.digest);
            if is_own(image) && shared && !known {
                found.push(image.clone());
            }
        }
        found
    }
}
