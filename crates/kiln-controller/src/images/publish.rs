//! Into the bucket and the database: contents first, then every name of an image at once.

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use kiln_core::{Digest, Lease};
use kiln_db::{Database, ImageContent, ImageTag, NameImagesError, NewImages, NewManifest};
use kiln_store::HostRegistry;
use kiln_store::registry::manifest::{Descriptor, Manifest};
use kiln_store::registry::{Reference, RepoName, StoreError};

use super::{Images, ImagesError, new_key};

/// Contents that are sent to the bucket at a time, for one image.
const SENT_MAX: usize = 3;
/// How often an image is stored again when a content was collected before it was named.
const TRIES_MAX: u32 = 3;
/// Deepest nesting of indexes, as in the registry.
const DEPTH_MAX: u32 = 3;
/// Most manifests of one image, as in the registry.
const MANIFESTS_MAX: usize = 64;

/// Where an image goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Named {
    /// The repository.
    pub(crate) repo: RepoName,
    /// Its tag there.
    pub(crate) tag: String,
}

/// A manifest whose blobs are in a repository of this host.
pub(super) struct Part {
    pub(super) digest: Digest,
    pub(super) bytes: Vec<u8>,
    pub(super) manifest: Manifest,
}

impl Images {
    /// Publishes an image that a repository of this host has, under all its names or none; with a lease, if it is live in that moment.
    ///
    /// # Errors
    /// See [`ImagesError`]: nothing has been named then.
    pub(crate) async fn publish(
        &self,
        db: &Database,
        registry: &HostRegistry,
        lease: &Lease,
        from: &RepoName,
        manifest: &Digest,
        names: &[Named],
    ) -> Result<(), ImagesError> {
        let mut parts = Vec::new();
        collect(registry, from, manifest, 0, &mut parts).await?;
        let mut images = NewImages::default();
        for named in names {
            let new = parts.iter().map(|part| row(&named.repo, part));
            images.manifests.extend(new);
            images.tags.push(ImageTag {
                repo: named.repo.as_str().to_owned(),
                tag: named.tag.clone(),
                digest: *manifest,
            });
        }
        self.store_and_name(db, registry, from, &parts, images, Some(lease))
            .await
    }

    /// Stores what is missing in the bucket, then names everything; once more when something was collected in between.
    pub(super) async fn store_and_name(
        &self,
        db: &Database,
        registry: &HostRegistry,
        from: &RepoName,
        parts: &[Part],
        images: NewImages,
        lease: Option<&Lease>,
    ) -> Result<(), ImagesError> {
        let mut tries = 1;
        loop {
            self.store(db, registry, from, parts).await?;
            match db.name_images(lease, images.clone()).await {
                Err(NameImagesError::Gone(_)) if tries < TRIES_MAX => tries += 1,
                named => return Ok(named?),
            }
        }
    }

    /// Has every content of some manifests in the bucket.
    async fn store(
        &self,
        db: &Database,
        registry: &HostRegistry,
        from: &RepoName,
        parts: &[Part],
    ) -> Result<(), ImagesError> {
        let mut wanted: Vec<(Digest, Option<&[u8]>)> = Vec::new();
        for part in parts {
            let blobs = part.manifest.blobs().map(|blob| (blob.digest, None));
            wanted.extend(blobs);
            wanted.push((part.digest, Some(&part.bytes)));
        }
        wanted.sort_unstable_by_key(|(digest, _)| *digest);
        wanted.dedup_by_key(|(digest, _)| *digest);
        let digests: Vec<Digest> = wanted.iter().map(|(digest, _)| *digest).collect();
        let known = db.image_contents(&digests).await?;
        let mut sent: Vec<BoxFuture<'_, _>> = Vec::new();
        for (digest, bytes) in wanted {
            let known = known.iter().find(|known| known.digest == digest);
            let stored = self.store_one(db, registry, from, digest, bytes, known);
            sent.push(stored.boxed());
        }
        futures_util::stream::iter(sent)
            .buffer_unordered(SENT_MAX)
            .try_collect()
            .await
    }

    async fn store_one(
        &self,
        db: &Database,
        registry: &HostRegistry,
        from: &RepoName,
        digest: Digest,
        bytes: Option<&[u8]>,
        known: Option<&ImageContent>,
    ) -> Result<(), ImagesError> {
        if let Some(known) = known {
            // A bucket that lost it, or a database that was put back, is not believed.
            if self.bucket.size(&known.key).await? == Some(known.size) {
                return Ok(());
            }
            tracing::warn!(%digest, key = known.key, "a content of images is gone from the object store: it is stored again");
        }
        let key = new_key(&digest);
        let size = match bytes {
            Some(bytes) => {
                self.bucket.put(&key, bytes, Some(&digest)).await?;
                bytes.len() as u64
            }
            None => {
                let blob = registry.open_blob(from, &digest).await?;
                let size = blob.size;
                let reader = blob.into_reader();
                self.bucket.put(&key, reader, Some(&digest)).await?;
                size
            }
        };
        let content = ImageContent { digest, key, size };
        let instead = known.map(|known| known.key.clone());
        let noted = db.image_stored(content.clone(), instead).await?;
        if noted.key != content.key {
            // Somebody else stored it at the same time, and theirs was noted first.
            self.bucket.remove(&content.key).await?;
        }
        Ok(())
    }
}

/// A manifest as a row of a repository.
pub(super) fn row(repo: &RepoName, part: &Part) -> NewManifest {
    let Part {
        digest,
        bytes,
        manifest,
    } = part;
    let descriptor = Descriptor {
        media_type: manifest.media_type.clone(),
        digest: *digest,
        size: bytes.len() as u64,
        artifact_type: manifest.artifact_type.clone(),
        platform: None,
        annotations: manifest.annotations.clone(),
    };
    NewManifest {
        repo: repo.as_str().to_owned(),
        digest: *digest,
        media_type: manifest.media_type.clone(),
        size: bytes.len() as u64,
        subject: manifest.subject.as_ref().map(|subject| subject.digest),
        artifact_type: manifest.artifact_type.clone(),
        // A descriptor has string keys and no failing serializer: this cannot fail.
        descriptor: serde_json::to_string(&descriptor).unwrap_or_default(),
        blobs: manifest.blobs().map(|blob| blob.digest).collect(),
    }
}

/// A manifest and those that it lists, innermost first.
pub(super) async fn collect(
    registry: &HostRegistry,
    from: &RepoName,
    digest: &Digest,
    depth: u32,
    parts: &mut Vec<Part>,
) -> Result<(), ImagesError> {
    if depth > DEPTH_MAX || parts.len() >= MANIFESTS_MAX {
        return Err(ImagesError::Refused(StoreError::TooMany {
            what: "manifests under one index",
            max: MANIFESTS_MAX as u64,
        }));
    }
    let stored = registry
        .get_manifest(from, &Reference::Digest(*digest))
        .await?;
    let manifest = Manifest::parse(&stored.bytes, Some(&stored.media_type))?;
    for entry in manifest.manifests() {
        Box::pin(collect(registry, from, &entry.digest, depth + 1, parts)).await?;
    }
    parts.push(Part {
        digest: *digest,
        bytes: stored.bytes,
        manifest,
    });
    Ok(())
}
