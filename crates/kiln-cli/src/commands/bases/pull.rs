//! Images of other registries: a name becomes a digest when it is added, and the bake pulls what is named into `shared/from`
//! of kiln's own registry, because machines pull from nowhere else.

use kiln_core::network::REGISTRY_HOST;
use kiln_core::{ByteSize, Digest, FailureClass, ImageRef};
use kiln_image::bases::{Bases, Pulled, PulledImage};
use kiln_store::host::HostRegistry;
use kiln_store::registry::{Reference, RepoName};
use kiln_store::remote::{PullEvent, Target};
use kiln_worker::event::{Event, Events};
use kiln_worker::setup::{generated_bases, operator_bases};
use kiln_worker::warm::PULLED_TREE;
use tokio_util::sync::CancellationToken;

use crate::commands::operator::Operator;
use crate::commands::push::{remote, shown};
use crate::error::{CliError, OrInfrastructure as _, Result, chain};

/// A reference with the digest it means now, in full. One with a digest is taken at its word; the bake finds out.
///
/// # Errors
/// When there is no digest and the registry does not tell.
pub(super) async fn pinned(operator: &Operator, wanted: &ImageRef) -> Result<ImageRef> {
    let own = wanted.registry.as_deref() == Some(REGISTRY_HOST);
    match wanted.digest {
        Some(_) if own => Ok(wanted.clone()),
        None if own => {
            let host = operator.registry().await?.host;
            let repo: RepoName = wanted.repository.parse().or_infrastructure()?;
            let tag = wanted.tag.clone().unwrap_or_else(|| "latest".to_owned());
            let digest = host.resolve(&repo, &Reference::Tag(tag)).await;
            let digest = digest.map_err(|error| match error.is_not_found() {
                true => CliError::usage(format!("there is no image {wanted} here"))
                    .hint("`kiln registry list --all` shows what there is"),
                false => CliError::infrastructure(&error),
            })?;
            Ok(ImageRef {
                digest: Some(digest),
                ..wanted.clone()
            })
        }
        Some(digest) => Ok(Target::source(wanted).pinned(digest)),
        None => {
            let target = Target::source(wanted);
            let registry = remote(operator, &target).await?;
            let digest = registry.resolve().await.map_err(|error| shown(&error))?;
            Ok(target.pinned(digest))
        }
    }
}

/// Pulls what `bases.toml` names and is not here yet, and forgets what it no longer names.
///
/// # Errors
/// When one cannot be pulled; those before it stay.
pub(super) async fn all(
    operator: &Operator,
    own: &Bases,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<()> {
    let wanted = own.foreign();
    let path = Pulled::path(&generated_bases(&operator.home));
    let mut pulled = Pulled::load(&path).map_err(|error| CliError::usage(chain(&error)))?;
    if wanted.is_empty() && pulled.images.is_empty() {
        return Ok(());
    }
    let host = operator.registry().await?.host;
    for image in &wanted {
        let Some(digest) = image.digest else { continue };
        if is_here(&host, pulled.image(&digest)).await {
            continue;
        }
        let one = tokio::select! {
            one = pull(operator, &host, image, events) => one?,
            () = cancel.cancelled() => {
                return Err(CliError::new(FailureClass::Cancelled, "cancelled; run it again to go on"));
            }
        };
        pulled.images.retain(|old| old.from.digest != Some(digest));
        pulled.images.push(one);
        pulled.save(&path).or_infrastructure()?;
    }
    let named = |one: &PulledImage| wanted.iter().any(|image| image.digest == one.from.digest);
    pulled.images.retain(named);
    pulled.save(&path).or_infrastructure()?;
    forget(&host, &pulled).await
}

/// What `bases.toml` says, alone.
pub(super) fn own(operator: &Operator) -> Result<Bases> {
    let path = operator_bases(&operator.home);
    match super::read(&path)? {
        Some(text) => {
            Bases::parse_toml(&text, &path).map_err(|error| CliError::usage(chain(&error)))
        }
        None => Ok(Bases::default()),
    }
}

/// Whether all of an image that was pulled is still there.
async fn is_here(host: &HostRegistry, image: Option<&ImageRef>) -> bool {
    let Some((image, digest)) = image.and_then(|image| Some((image, image.digest?))) else {
        return false;
    };
    let Ok(repo) = image.repository.parse::<RepoName>() else {
        return false;
    };
    let asked = kiln_store::image::Verify {
        rehash: false,
        ..kiln_store::image::Verify::image(repo, digest)
    };
    kiln_store::image::verify(host, &asked).await.is_ok()
}

/// Its repository in kiln's own registry.
fn repository(target: &Target) -> String {
    let legal = |c: char| match c {
        'a'..='z' | '0'..='9' | '.' | '-' => c,
        _ => '-',
    };
    let registry: String = target.registry().chars().map(legal).collect();
    let registry = registry.trim_matches(['-', '.']);
    format!("{PULLED_TREE}{registry}/{}", target.repository())
}

fn tag(digest: &Digest) -> String {
    format!("pinned-{}", digest.short(16))
}

async fn pull(
    operator: &Operator,
    host: &HostRegistry,
    image: &ImageRef,
    events: &Events,
) -> Result<PulledImage> {
    let target = Target::source(image);
    events.note(format!("pulling {target}")).await;
    let remote = remote(operator, &target).await?;
    let repo: RepoName = repository(&target).parse().map_err(|_| {
        CliError::usage(format!("{image} has no name that kiln's registry can keep"))
    })?;
    let told = events.clone();
    let tell = move |event: PullEvent| told.tell_now(event_of(&event));
    let done = remote
        .pull(host, &repo, tag, tell)
        .await
        .map_err(|error| shown(&error))?;
    events
        .note(format!(
            "pulled {target}: {} fetched, {} there already",
            ByteSize(done.fetched),
            ByteSize(done.present)
        ))
        .await;
    Ok(PulledImage {
        from: image.clone(),
        image: ImageRef {
            registry: Some(REGISTRY_HOST.to_owned()),
            repository: repo.to_string(),
            tag: None,
            digest: Some(done.image.manifest),
        },
        bytes: done.image.total_size,
    })
}

fn event_of(event: &PullEvent) -> Event {
    match event {
        PullEvent::Again { why } => Event::Warning {
            text: format!("trying again: {why}"),
        },
        PullEvent::Fetching { digest, size } | PullEvent::Present { digest, size } => {
            Event::Progress {
                what: "pull".to_owned(),
                detail: format!("{} {}", digest.short(12), ByteSize(*size)),
            }
        }
        _ => Event::Progress {
            what: "pull".to_owned(),
            detail: String::new(),
        },
    }
}

/// Removes images that were pulled for a name that is gone; the next collection frees their bytes.
async fn forget(host: &HostRegistry, pulled: &Pulled) -> Result<()> {
    let tree: RepoName = PULLED_TREE
        .trim_end_matches('/')
        .parse()
        .or_infrastructure()?;
    let kept = |digest: &Digest| {
        let mut all = pulled.images.iter();
        all.any(|one| one.image.digest.as_ref() == Some(digest))
    };
    for repo in host
        .list_repositories(Some(&tree))
        .await
        .or_infrastructure()?
    {
        let Ok(tags) = host.list_tags(&repo).await else {
            continue;
        };
        for tag in tags {
            let Ok(digest) = host.resolve(&repo, &Reference::Tag(tag)).await else {
                continue;
            };
            if !kept(&digest) {
                // Somebody else may have removed it in the meantime.
                let _gone = host.delete(&repo, &Reference::Digest(digest)).await;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_legal_and_tell_the_registry() {
        for (reference, expected) in [
            ("alpine:3.20", "shared/from/docker.io/library/alpine"),
            (
                "127.0.0.1:5000/team/app",
                "shared/from/127.0.0.1-5000/team/app",
            ),
            ("[::1]:5000/app", "shared/from/1--5000/app"),
        ] {
            let target = Target::source(&reference.parse().expect("legal"));
            let repository = repository(&target);
            assert_eq!(repository, expected);
            assert!(repository.parse::<RepoName>().is_ok(), "{repository}");
        }
    }
}
