//! Stage 7 and 9 of an image build: what the guest pushed into quarantine is read back by the host, every digest recomputed, the base
//! checked, and only then is the image given its name.

use kiln_core::job::ImageBuild;
use kiln_core::{AttemptId, Digest, FailureClass, ImageRef, Lease};
use kiln_store::host::Publish;
use kiln_store::image::{VerifiedImage, Verify, VerifyError, verify};
use kiln_store::registry::{AttemptAuthority, Reference, RepoName};

use crate::build::QUARANTINE_TAG;
use crate::failure::Failure;
use crate::registry::RegistryAccess;

/// What was published.
#[derive(Clone, Debug)]
pub struct Published {
    /// The image manifest.
    pub manifest: Digest,
    /// Names it has now.
    pub tags: Vec<ImageRef>,
    /// Layers: digest and compressed bytes.
    pub layers: Vec<(Digest, u64)>,
    /// Config and layers: digest and bytes.
    pub blobs: Vec<(Digest, u64)>,
    /// Compressed bytes of config and layers.
    pub size: u64,
}

/// The repository an attempt's guest may push to.
#[must_use]
pub fn quarantine(attempt: &AttemptId) -> RepoName {
    RepoName::quarantine(attempt)
}

/// Verifies what lies in quarantine and tags it.
///
/// # Errors
/// [`FailureClass::GuestFault`] when the guest's claim and the host's reading differ.
pub async fn verify_and_tag(
    registry: &RegistryAccess,
    leases: &std::sync::Arc<kiln_store::registry::LeaseTable>,
    lease: &Lease,
    build: &ImageBuild,
    claimed: Option<&str>,
) -> Result<Published, Failure> {
    let repo = quarantine(&lease.attempt);
    let fault = |what: String| Failure::new(FailureClass::GuestFault, what);
    let tag: Reference = QUARANTINE_TAG
        .parse()
        .map_err(|error| Failure::infrastructure(&error))?;
    let manifest = match registry.host.resolve(&repo, &tag).await {
        Ok(manifest) => manifest,
        Err(error) if error.is_not_found() => {
            return Err(fault(
                "the guest says it pushed an image, and there is none in its quarantine".to_owned(),
            ));
        }
        Err(error) => return Err(Failure::infrastructure(&error)),
    };
    if claimed.is_none_or(|claimed| claimed != manifest.to_string()) {
        let claimed = claimed.unwrap_or("no image at all");
        return Err(fault(format!(
            "the guest says it pushed {claimed}, and the registry holds {manifest}"
        )));
    }
    let asked = Verify::image(repo.clone(), manifest);
    let image = read_image(registry, &asked)
        .await
        .map_err(|error| verify_failure(&error))?;
    check_base(registry, build, &image).await?;
    name_it(
        registry,
        &registry.authority(lease, leases),
        &repo,
        manifest,
        &build.tags,
    )
    .await?;
    Ok(published(manifest, &image, build))
}

/// Gives the image of an earlier attempt the names this build asks for, when it is still there and every digest is right.
///
/// # Errors
/// The registry failed. An image that is gone or damaged is `None`: it has to be built.
pub async fn name_again(
    registry: &RegistryAccess,
    leases: &std::sync::Arc<kiln_store::registry::LeaseTable>,
    lease: &Lease,
    build: &ImageBuild,
    (from, manifest): (&RepoName, Digest),
) -> Result<Option<Published>, Failure> {
    let asked = Verify::image(from.clone(), manifest);
    let Ok(image) = read_image(registry, &asked).await else {
        return Ok(None);
    };
    name_it(
        registry,
        &registry.authority(lease, leases),
        from,
        manifest,
        &build.tags,
    )
    .await?;
    Ok(Some(published(manifest, &image, build)))
}

async fn name_it(
    registry: &RegistryAccess,
    authority: &AttemptAuthority,
    from: &RepoName,
    manifest: Digest,
    names: &[ImageRef],
) -> Result<(), Failure> {
    for name in names {
        let to: RepoName = name
            .repository
            .parse()
            .map_err(|error| Failure::infrastructure(&error))?;
        let publish = Publish {
            from: from.clone(),
            manifest,
            to,
            tags: vec![name.tag.clone().unwrap_or_else(|| "latest".to_owned())],
        };
        registry
            .host
            .publish(&publish, Some(authority))
            .await
            .map_err(|error| Failure::infrastructure(&error))?;
    }
    Ok(())
}

fn published(manifest: Digest, image: &VerifiedImage, build: &ImageBuild) -> Published {
    let layers: Vec<_> = image
        .layers
        .iter()
        .map(|layer| (layer.digest, layer.size))
        .collect();
    let mut blobs = vec![image.config_blob];
    blobs.extend(layers.iter().copied());
    Published {
        manifest,
        tags: build.tags.clone(),
        layers,
        blobs,
        size: image.total_size,
    }
}

/// Reads an image in full, whichever process owns the registry meanwhile.
///
/// # Errors
/// See [`VerifyError`].
pub async fn read_image(
    registry: &RegistryAccess,
    asked: &Verify,
) -> Result<VerifiedImage, VerifyError> {
    verify(&registry.host, asked).await
}

/// The image must stand on one of the bases the host resolved, unless its Dockerfile starts from nothing.
async fn check_base(
    registry: &RegistryAccess,
    build: &ImageBuild,
    image: &VerifiedImage,
) -> Result<(), Failure> {
    if build.bases.is_empty() || starts_from_scratch(&build.dockerfile) {
        return Ok(());
    }
    for (_, base) in &build.bases {
        let Some(digest) = base.digest else { continue };
        let repo: RepoName = base
            .repository
            .parse()
            .map_err(|error| Failure::infrastructure(&error))?;
        let asked = Verify {
            rehash: false,
            ..Verify::image(repo, digest)
        };
        let base = read_image(registry, &asked)
            .await
            .map_err(|error| Failure::infrastructure(&error))?;
        // The config's ids are the guest's words; the layers below them were hashed by the host.
        let same_layers = image.layers.len() >= base.layers.len()
            && image
                .layers
                .iter()
                .zip(&base.layers)
                .all(|(ours, its)| ours.digest == its.digest);
        if same_layers && image.config.diff_ids.starts_with(&base.config.diff_ids) {
            return Ok(());
        }
    }
    Err(Failure::new(
        FailureClass::GuestFault,
        "the image does not stand on any of the bases it was given",
    ))
}

/// Whether any stage starts from the empty image.
fn starts_from_scratch(dockerfile: &str) -> bool {
    dockerfile.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        words
            .next()
            .is_some_and(|word| word.eq_ignore_ascii_case("from"))
            && words.find(|word| !word.starts_with("--")) == Some("scratch")
    })
}

fn verify_failure(error: &VerifyError) -> Failure {
    let failure = Failure::infrastructure(error);
    if error.is_images_fault() {
        Failure {
            class: FailureClass::GuestFault,
            ..failure
        }
    } else {
        failure
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_stages_are_seen() {
        assert!(starts_from_scratch(
            "FROM --platform=linux/amd64 scratch AS x\n"
        ));
        assert!(!starts_from_scratch("FROM node\nRUN echo from scratch\n"));
    }
}
