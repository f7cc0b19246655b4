//! Copies what an image consists of from one repository to another, without copying bytes: how an
//! image leaves quarantine (DESIGN rule 6). For the host only, after it has looked at the image itself.

use kiln_core::Digest;
use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::manifest::Manifest;
use super::name::{Reference, RepoName};
use super::store::Store;

/// Deepest nesting of indexes followed.
const DEPTH_MAX: u32 = 3;
/// Most manifests taken over in one call.
const MANIFESTS_MAX: u32 = 64;

/// What was taken over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Adopted {
    /// Manifests, the named one included.
    pub manifests: u32,
    /// Bytes of the manifests, configs and layers.
    pub bytes: u64,
}

impl Store {
    /// Makes a manifest of `from`, and everything it names, readable in `to`. Each content is checked
    /// (DESIGN rule 8) on the way. Stopped half-way it leaves links that the next collection removes.
    ///
    /// # Errors
    /// Something it names is missing in `from`, corrupt, or of another size than stated.
    pub fn adopt(
        &self,
        from: &RepoName,
        to: &RepoName,
        manifest: &Digest,
    ) -> Result<Adopted, StoreError> {
        let mut adopted = Adopted::default();
        self.check_room()?;
        self.adopt_at_depth(from, to, manifest, 0, &mut adopted)?;
        Ok(adopted)
    }

    fn adopt_at_depth(
        &self,
        from: &RepoName,
        to: &RepoName,
        digest: &Digest,
        depth: u32,
        adopted: &mut Adopted,
    ) -> Result<(), StoreError> {
        if depth > DEPTH_MAX || adopted.manifests >= MANIFESTS_MAX {
            return Err(StoreError::TooMany {
                what: "manifests under one index",
                max: MANIFESTS_MAX.into(),
            });
        }
        let stored = self.get_manifest(from, &Reference::Digest(*digest))?;
        let manifest = Manifest::parse(&stored.bytes, Some(&stored.media_type))?;
        for blob in manifest.blobs() {
            adopted.bytes += self.mount_blob(from, to, &blob.digest)?;
        }
        for entry in manifest.manifests() {
            self.adopt_at_depth(from, to, &entry.digest, depth + 1, adopted)?;
        }
        self.mount_manifest(from, to, digest)?;
        adopted.manifests += 1;
        adopted.bytes += stored.bytes.len() as u64;
        Ok(())
    }
}
