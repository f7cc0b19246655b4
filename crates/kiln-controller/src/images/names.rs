//! Names of a tenant's images, wherever they are kept: which there are, and how one is taken away.
//!
//! A name goes at once, and the image with its last name. The bytes go with the next collection, here or in the bucket.

use kiln_core::TenantName;
use kiln_db::NamedImage;
use kiln_store::HostRegistry;
use kiln_store::host::HostError;
use kiln_store::registry::manifest::Manifest;
use kiln_store::registry::{ErrorKind, Reference, RepoName};

use super::{Images, ImagesError};
use crate::state::Controller;

/// A repository and a tag.
type Place = (String, String);

/// Names of a tenant's images, by name, after the one that is given.
///
/// # Errors
/// When they cannot be read now.
pub(crate) async fn list(
    controller: &Controller,
    tenant: &TenantName,
    after: &Place,
    limit: u32,
) -> Result<Vec<NamedImage>, ImagesError> {
    let tree = RepoName::tenant_tree(tenant);
    if controller.images.is_some() {
        let after = (after.0.as_str(), after.1.as_str());
        let names = controller.db.image_names(tree.as_str(), after, limit);
        return Ok(names.await?);
    }
    let registry = &controller.registry;
    let mut named = Vec::new();
    for repo in registry.list_repositories(Some(&tree)).await? {
        if repo.as_str() < after.0.as_str() {
            continue;
        }
        for tag in tags(registry, &repo).await? {
            if repo.as_str() == after.0 && tag <= after.1 {
                continue;
            }
            named.extend(here(registry, &repo, tag).await?);
            if named.len() >= limit as usize {
                return Ok(named);
            }
        }
    }
    Ok(named)
}

/// Tags of a repository of this host; none when it was removed meanwhile.
pub(super) async fn tags(
    registry: &HostRegistry,
    repo: &RepoName,
) -> Result<Vec<String>, HostError> {
    match registry.list_tags(repo).await {
        Err(error) if error.is_not_found() => Ok(Vec::new()),
        tags => tags,
    }
}

/// An image of this host's registry; none when it was removed meanwhile, or is damaged: the doctor says which.
async fn here(
    registry: &HostRegistry,
    repo: &RepoName,
    tag: String,
) -> Result<Option<NamedImage>, ImagesError> {
    let stored = match registry
        .get_manifest(repo, &Reference::Tag(tag.clone()))
        .await
    {
        Ok(stored) => stored,
        Err(error) if error.is_not_found() || error.kind() == ErrorKind::Corrupt => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let parts = Manifest::parse(&stored.bytes, Some(&stored.media_type));
    let parts = parts.map_or(0, |manifest| {
        let sizes = manifest.blobs().map(|blob| blob.size);
        sizes.fold(0, u64::saturating_add)
    });
    Ok(Some(NamedImage {
        repo: repo.as_str().to_owned(),
        tag,
        digest: stored.digest,
        bytes: parts.saturating_add(stored.bytes.len() as u64),
        named_unix_ms: None,
    }))
}

/// Takes a name away; false when there is none.
///
/// # Errors
/// When it cannot be done now.
pub(crate) async fn withdraw(
    controller: &Controller,
    repo: &RepoName,
    tag: &str,
) -> Result<bool, ImagesError> {
    let shared = match &controller.images {
        Some(images) => withdraw_shared(controller, images, repo, tag).await?,
        None => false,
    };
    // What is here from before images were shared would be found by the name again.
    let here = withdraw_here(&controller.registry, repo, tag).await?;
    Ok(shared || here)
}

async fn withdraw_shared(
    controller: &Controller,
    images: &Images,
    repo: &RepoName,
    tag: &str,
) -> Result<bool, ImagesError> {
    let (db, registry) = (&controller.db, &controller.registry);
    let Some(found) = db.image_tagged(repo.as_str(), tag).await? else {
        return Ok(false);
    };
    let mut children = Vec::new();
    if found.media_type.contains("index") || found.media_type.contains("list") {
        let bytes = images.manifest_bytes(registry, repo, &found).await?;
        let index = Manifest::parse(&bytes, Some(&found.media_type))?;
        children.extend(index.manifests().iter().map(|child| child.digest));
    }
    Ok(db.unname_image(repo.as_str(), tag, children).await?)
}

async fn withdraw_here(
    registry: &HostRegistry,
    repo: &RepoName,
    tag: &str,
) -> Result<bool, ImagesError> {
    let name = Reference::Tag(tag.to_owned());
    let digest = match registry.resolve(repo, &name).await {
        Ok(digest) => digest,
        Err(error) if error.is_not_found() => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let mut others = false;
    for other in tags(registry, repo).await? {
        let other = Reference::Tag(other);
        others |= other != name && registry.resolve(repo, &other).await.ok() == Some(digest);
    }
    let gone = if others {
        name
    } else {
        Reference::Digest(digest)
    };
    match registry.delete(repo, &gone).await {
        Ok(()) => Ok(true),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(error.into()),
    }
}
