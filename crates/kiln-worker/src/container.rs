//! The container image of a run: found, verified, unpacked once, and joined with the command line as `docker run` joins them.

use std::collections::BTreeMap;

use kiln_core::{FailureClass, ImageRef, JobId, TenantName};
use kiln_proto::msg::ContainerSpec;
use kiln_store::image::{Select, VerifiedImage, Verify};
use kiln_store::registry::{Reference, RepoName};

use crate::event::Events;
use crate::failure::Failure;
use crate::host::Host;
use crate::publish;
use crate::registry::RegistryAccess;
use crate::unpack::{self, Unpacked};

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a run adds to its image.
#[derive(Clone, Copy, Debug)]
pub struct Command<'a> {
    /// Command line; empty means the image's own.
    pub argv: &'a [String],
    /// Environment beyond the image's own.
    pub env: &'a BTreeMap<String, String>,
}

/// Finds and verifies an image, unpacks it once, and says how it is started.
///
/// # Errors
/// Usage when there is no such image in what the tenant may read.
pub async fn prepare(
    host: &Host,
    registry: &RegistryAccess,
    (tenant, image): (&TenantName, &ImageRef),
    command: Command<'_>,
    job: &JobId,
    events: &Events,
) -> Result<(Unpacked, ContainerSpec), Failure> {
    let full = existing(tenant, image)?;
    let (repo, image) = find(registry, &full).await?;
    let unpacked = unpack::ensure(host, registry, &repo, &image, job, events).await?;
    Ok((unpacked, container(&image, command)?))
}

/// Where an image lies that a person named: below the tenant, unless it is one of the shared bases.
///
/// # Errors
/// Usage for names of other registries and other tenants.
pub fn existing(tenant: &TenantName, image: &ImageRef) -> Result<ImageRef, Failure> {
    let usage = |text: String| Failure::new(FailureClass::Usage, text);
    if image.registry.is_some() {
        return Err(usage(format!(
            "{image}: only images in kiln's own registry can be used here"
        ))
        .hint("`kiln registry list` shows them"));
    }
    let own = format!("t/{tenant}/");
    let full = image.repository.starts_with(&own) || image.repository.starts_with("shared/");
    if !full && image.repository.starts_with("t/") {
        return Err(usage(format!("there is no image {image}")));
    }
    let repository = match full {
        true => image.repository.clone(),
        false => format!("{own}{}", image.repository),
    };
    let tag = match (&image.tag, &image.digest) {
        (None, None) => Some("latest".to_owned()),
        (tag, _) => tag.clone(),
    };
    Ok(ImageRef {
        registry: None,
        repository,
        tag,
        digest: image.digest,
    })
}

async fn find(
    registry: &RegistryAccess,
    full: &ImageRef,
) -> Result<(RepoName, VerifiedImage), Failure> {
    let broken = |error: &dyn std::error::Error| Failure::infrastructure(error);
    let repo: RepoName = full
        .repository
        .parse()
        .map_err(|error| Failure::new(FailureClass::Usage, format!("{full}: {error}")))?;
    let missing = || {
        Failure::new(FailureClass::Usage, format!("there is no image {full} here"))
            .hint(match full.digest {
                Some(_) => "`kiln registry list --json` shows what there is, with whole digests",
                None => "`kiln registry list` shows what there is; `kiln build` makes one; images of other registries are not fetched",
            })
    };
    let digest = match (full.digest, &full.tag) {
        (Some(digest), _) => digest,
        (None, tag) => {
            let tag: Reference = tag
                .as_deref()
                .unwrap_or("latest")
                .parse()
                .map_err(|error| Failure::new(FailureClass::Usage, format!("{full}: {error}")))?;
            match registry.host.resolve(&repo, &tag).await {
                Ok(digest) => digest,
                Err(error) if error.is_not_found() => return Err(missing()),
                Err(error) => return Err(broken(&error)),
            }
        }
    };
    let asked = Verify {
        rehash: false,
        select: Select::LinuxAmd64,
        ..Verify::image(repo.clone(), digest)
    };
    match publish::read_image(registry, &asked).await {
        Ok(image) => Ok((repo, image)),
        Err(error) if error.lacks_manifest(&digest) => Err(missing()),
        Err(error) => Err(broken(&error)),
    }
}

/// Entrypoint, command, environment and user as `docker run` joins them.
fn container(image: &VerifiedImage, command: Command<'_>) -> Result<ContainerSpec, Failure> {
    let config = &image.config;
    let mut argv = config.entrypoint.clone();
    argv.extend_from_slice(match command.argv.is_empty() {
        true => &config.cmd,
        false => command.argv,
    });
    if argv.is_empty() {
        let message = "the image names no command";
        return Err(Failure::new(FailureClass::Usage, message).hint("give one after --"));
    }
    let replaced = |pair: &&String| {
        let key = pair.split_once('=').map(|(key, _)| key);
        key.is_some_and(|key| command.env.contains_key(key))
    };
    let own = config.env.iter().filter(|pair| !replaced(pair));
    let mut env: Vec<String> = own.cloned().collect();
    if !env.iter().any(|pair| pair.starts_with("PATH=")) {
        env.push(PATH.to_owned());
    }
    env.extend(
        command
            .env
            .iter()
            .map(|(key, value)| format!("{key}={value}")),
    );
    let cwd = match config.workdir.is_empty() {
        true => "/".to_owned(),
        false => config.workdir.clone(),
    };
    Ok(ContainerSpec {
        argv,
        env,
        cwd,
        user: config.user.clone(),
        ..ContainerSpec::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_sees_its_own_images_and_the_shared_ones() {
        let tenant = "acme".parse().expect("name");
        let named = |text: &str| existing(&tenant, &text.parse().expect("reference"));
        assert_eq!(
            named("shop").expect("own").to_string(),
            "t/acme/shop:latest"
        );
        assert_eq!(
            named("t/acme/shop:1").expect("own").to_string(),
            "t/acme/shop:1"
        );
        assert!(named("shared/node:20").is_ok());
        for bad in ["t/other/shop", "registry.example.org/x:1"] {
            assert!(named(bad).is_err(), "{bad}");
        }
    }
}
