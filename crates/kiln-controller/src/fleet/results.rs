//! What an attempt leaves: an image that is named after it was read back, and the artifacts of a command.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::{Extension, Json};
use futures_util::StreamExt as _;
use http::{HeaderMap, StatusCode, header};
use kiln_core::artifact::{ARTIFACT_BYTES_MAX, ARTIFACTS_BYTES_MAX, ARTIFACTS_MAX};
use kiln_core::job::SourceBuild;
use kiln_core::{ArtifactName, Digest, ImageRef, JobKind, Lease};
use kiln_db::{Artifact, DoorKind, NameImagesError};
use kiln_proto::fleet::{NOT_PUSHED, PublishImage, RegistryToken};
use kiln_store::artifacts::ArtifactError;
use kiln_store::host::Publish;
use kiln_store::image::{Verify, verify};
use kiln_store::registry::{Reference, RepoName};

use super::doors::{Answered, open_door};
use super::refusal::Refused;
use super::registry_door;
use super::who::{Live, now_unix_ms};
use crate::access::{Peer, RegistryAction, RepositoryGrant};
use crate::images::{ImagesError, Named};
use crate::state::Controller;

/// Most names of one image.
const TAGS_MAX: usize = 16;
/// What an artifact is: its maker is not believed.
const MEDIA_TYPE: &str = "application/octet-stream";

/// Keeps a file that the attempt left. Its digest is computed here, as it arrives; the same again is kept once.
pub(super) async fn artifact(
    State(controller): State<Controller>,
    held: Live,
    Path((_job, name)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Answered<serde_json::Value> {
    let lease = &held.lease;
    let (tenant, job) = (&lease.tenant, &lease.attempt.job);
    let name: ArtifactName =
        name.parse()
            .map_err(|error: kiln_core::artifact::ParseArtifactError| {
                Refused::bad(error.to_string())
            })?;
    // What cannot be noted in the end is not taken; the transaction that notes it counts again.
    let known = controller.db.artifacts(job).await?;
    let before = known.iter().find(|other| other.name == name.as_str());
    let before = before.map(|before| before.digest);
    let others = known.iter().filter(|other| other.name != name.as_str());
    let (count, bytes) = others.fold((0, 0_u64), |(count, bytes), other| {
        (count + 1, bytes.saturating_add(other.size))
    });
    if count >= ARTIFACTS_MAX {
        return Err(too_much(format!("the job has {ARTIFACTS_MAX} artifacts")));
    }
    let most = ARTIFACT_BYTES_MAX.min(ARTIFACTS_BYTES_MAX.saturating_sub(bytes));
    let said = headers.get(header::CONTENT_LENGTH);
    let said = said.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if said.is_some_and(|said| said > most) {
        return Err(too_large(most));
    }
    let pieces = body.into_data_stream().boxed();
    let stored = controller.artifacts.put(tenant, job, pieces, most).await;
    let stored = stored.map_err(|error| match error {
        ArtifactError::TooLarge { max } => too_large(max),
        ArtifactError::Cut(_) => Refused::bad("the artifact ended before it was whole"),
        error => {
            tracing::warn!(%job, error = &error as &dyn std::error::Error, "an artifact was not kept");
            Refused::unavailable("the artifact could not be stored")
        }
    })?;
    let artifact = Artifact {
        name: name.as_str().to_owned(),
        digest: stored.digest,
        size: stored.size,
        media_type: MEDIA_TYPE.to_owned(),
    };
    let noted = controller.db.artifact(lease, &artifact).await;
    // A file that no row names any more, or none ever did: bounds count rows.
    let nameless = match &noted {
        Ok(()) => before.filter(|before| *before != artifact.digest),
        Err(_) => Some(artifact.digest),
    };
    if let Some(digest) = nameless {
        drop_nameless(&controller, lease, &digest).await;
    }
    noted?;
    Ok(Json(serde_json::json!({
        "name": artifact.name, "digest": artifact.digest, "size": artifact.size,
    })))
}

/// Removes a file of a job that no row names. One that stays goes with its job.
async fn drop_nameless(controller: &Controller, lease: &Lease, digest: &Digest) {
    let (tenant, job) = (&lease.tenant, &lease.attempt.job);
    let Ok(rows) = controller.db.artifacts(job).await else {
        return;
    };
    if rows.iter().any(|row| row.digest == *digest) {
        return;
    }
    if let Err(error) = controller.artifacts.remove(tenant, job, digest).await {
        tracing::warn!(%job, error = &error as &dyn std::error::Error, "an artifact without a name stays for now");
    }
}

fn too_much(message: String) -> Refused {
    Refused::new(StatusCode::PAYLOAD_TOO_LARGE, "too_much", message)
}

fn too_large(max: u64) -> Refused {
    too_much(format!(
        "the artifact has more than the {max} bytes that are left for it"
    ))
}

pub(super) async fn registry_token(
    State(controller): State<Controller>,
    peer: Option<Extension<Peer>>,
    held: Live,
) -> Answered<RegistryToken> {
    let lease = &held.lease;
    open_door(
        &controller,
        lease,
        DoorKind::RegistryToken,
        "quarantine".to_owned(),
    )
    .await?;
    // A worker on the private socket works in this home: its registry is this one.
    let here = peer.is_some_and(|peer| peer.is_owner());
    let Some(registry) = controller.registry_address().filter(|_| !here) else {
        return Ok(Json(RegistryToken {
            registry: String::new(),
            token: String::new(),
            expires_unix_ms: 0,
            named_by_controller: here && controller.images.is_some(),
        }));
    };
    let issued = controller
        .access
        .issue_for_attempt(lease, quarantine_alone(lease), now_unix_ms())
        .map_err(|error| Refused::unavailable(error.to_string()))?;
    Ok(Json(RegistryToken {
        registry,
        token: issued.text,
        expires_unix_ms: issued.expires_unix_ms,
        named_by_controller: true,
    }))
}

/// An attempt may push to its own quarantine and nowhere else.
fn quarantine_alone(lease: &Lease) -> Vec<RepositoryGrant> {
    let attempt = &lease.attempt;
    vec![RepositoryGrant {
        name: format!("quarantine/{}/{}", attempt.job, attempt.number),
        actions: vec![RegistryAction::Pull, RegistryAction::Push],
    }]
}

/// Names what the attempt pushed into its quarantine, after every digest of it was read back here.
pub(super) async fn image(
    State(controller): State<Controller>,
    peer: Option<Extension<Peer>>,
    held: Live,
    Json(publish): Json<PublishImage>,
) -> Answered<serde_json::Value> {
    let lease = &held.lease;
    let own = format!("t/{}/", lease.tenant);
    let foreign = |tag: &&ImageRef| {
        tag.registry.is_some() || tag.digest.is_some() || !tag.repository.starts_with(&own)
    };
    if publish.tags.is_empty() || publish.tags.len() > TAGS_MAX {
        return Err(Refused::bad(format!("an image gets 1 to {TAGS_MAX} names")));
    }
    if let Some(tag) = publish.tags.iter().find(foreign) {
        return Err(Refused::bad(format!("{tag} is not a name of this tenant")));
    }
    let job = controller.db.job(&lease.attempt.job).await?;
    let Some(JobKind::SourceBuild(build)) = job.map(|job| job.request.kind) else {
        return Err(Refused::bad("this job makes no image"));
    };
    if let Some(tag) = publish
        .tags
        .iter()
        .find(|tag| !is_asked_for(&build, &own, tag))
    {
        return Err(Refused::bad(format!("nobody asked this job for {tag}")));
    }
    let names: Vec<String> = publish.tags.iter().map(ToString::to_string).collect();
    open_door(&controller, lease, DoorKind::Tag, names.join(" ")).await?;
    let names = publish.tags.iter().map(|tag| {
        let repo = tag.repository.parse();
        Ok(Named {
            repo: repo.map_err(|_| Refused::bad(format!("{tag} is not a name")))?,
            tag: tag.tag.clone().unwrap_or_else(|| "latest".to_owned()),
        })
    });
    let names = names.collect::<Result<Vec<_>, Refused>>()?;
    let here = peer.is_some_and(|peer| peer.is_owner());
    let manifest = publish.manifest;
    let from = match pushed(&controller, lease, manifest, &names, here).await? {
        Some(from) => from,
        // Said again, because the answer was lost.
        None => return Ok(Json(serde_json::json!({}))),
    };
    let asked = Verify::image(from.clone(), manifest);
    verify(&controller.registry, &asked)
        .await
        .map_err(|error| {
            Refused::new(
                http::StatusCode::UNPROCESSABLE_ENTITY,
                "image_refused",
                format!("what was pushed is not that image: {error}"),
            )
        })?;
    name(&controller, lease, &from, manifest, &names).await?;
    if from == RepoName::quarantine(&lease.attempt)
        && let Err(error) = controller.registry.delete_tree(&from).await
        && !error.is_not_found()
    {
        tracing::warn!(%error, "a quarantine was not removed");
    }
    Ok(Json(serde_json::json!({})))
}

/// Where the image is that is to be named; none when it has all these names already. A worker `here` has named it in the registry that it
/// shares with this controller.
async fn pushed(
    controller: &Controller,
    lease: &Lease,
    manifest: Digest,
    names: &[Named],
    here: bool,
) -> Result<Option<RepoName>, Refused> {
    let own = RepoName::quarantine(&lease.attempt);
    let shared = names.first().filter(|_| here).map(|named| &named.repo);
    let reference = Reference::Digest(manifest);
    for repo in [Some(&own), shared].into_iter().flatten() {
        match controller.registry.resolve(repo, &reference).await {
            Ok(_) => return Ok(Some(repo.clone())),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(Refused::unavailable(error.to_string())),
        }
    }
    for named in names {
        if points_at(controller, named).await? != Some(manifest) {
            let text = "this controller has no such image of this attempt: push it here first";
            return Err(Refused::new(StatusCode::CONFLICT, NOT_PUSHED, text));
        }
    }
    Ok(None)
}

/// The manifest that a name points at.
async fn points_at(controller: &Controller, named: &Named) -> Result<Option<Digest>, Refused> {
    let (repo, tag) = (&named.repo, &named.tag);
    if controller.images.is_some() {
        let found = controller.db.image_tagged(repo.as_str(), tag).await?;
        return Ok(found.map(|found| found.content.digest));
    }
    let reference = Reference::Tag(tag.clone());
    match controller.registry.resolve(repo, &reference).await {
        Ok(digest) => Ok(Some(digest)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(Refused::unavailable(error.to_string())),
    }
}

/// Gives a verified image its names: in the bucket and the database where images are shared, else in the registry of this host.
async fn name(
    controller: &Controller,
    lease: &Lease,
    from: &RepoName,
    manifest: Digest,
    names: &[Named],
) -> Result<(), Refused> {
    let registry = &controller.registry;
    if let Some(images) = &controller.images {
        let published = images.publish(&controller.db, registry, lease, from, &manifest, names);
        return published.await.map_err(|error| match error {
            ImagesError::Names(NameImagesError::Door(refused)) => refused.into(),
            error => {
                tracing::warn!(job = %lease.attempt.job, error = &error as &dyn std::error::Error, "an image was not published");
                Refused::unavailable("the image could not be stored for all controllers")
            }
        });
    }
    let authority = registry_door::authority(controller, lease.clone()).await;
    for named in names {
        let publish = Publish {
            from: from.clone(),
            manifest,
            to: named.repo.clone(),
            tags: vec![named.tag.clone()],
        };
        let named = registry.publish(&publish, Some(&authority)).await;
        named.map_err(|error| Refused::unavailable(error.to_string()))?;
    }
    Ok(())
}

/// Whether a build was asked for this name below `own`: one of the request's, else the one that its short name becomes.
fn is_asked_for(build: &SourceBuild, own: &str, tag: &ImageRef) -> bool {
    let Some(inner) = tag.repository.strip_prefix(own) else {
        return false;
    };
    let word = |tag: &ImageRef| tag.tag.clone().unwrap_or_else(|| "latest".to_owned());
    if build.tags.is_empty() {
        // The worker makes a legal name of it, of its letters and digits.
        let plain = |text: &str| -> String {
            let kept = text.chars().filter(char::is_ascii_alphanumeric);
            kept.map(|c| c.to_ascii_lowercase()).collect()
        };
        let short = match plain(&build.name) {
            none if none.is_empty() => "app".to_owned(),
            some => some,
        };
        return word(tag) == "latest" && !inner.contains('/') && plain(inner) == short;
    }
    build.tags.iter().any(|asked| {
        let repository = &asked.repository;
        word(asked) == word(tag) && repository.strip_prefix(own).unwrap_or(repository) == inner
    })
}

#[cfg(test)]
mod tests {
    use kiln_core::job::Source;

    use super::*;

    #[test]
    fn a_worker_names_what_was_asked_for_and_nothing_else_of_its_tenant() {
        let build = |name: &str, tags: &[&str]| SourceBuild {
            source: Source::Git {
                url: "https://git.example/a.git".to_owned(),
                reference: "HEAD".to_owned(),
            },
            name: name.to_owned(),
            dockerfile: None,
            dockerfile_text: None,
            target: None,
            build_args: std::collections::BTreeMap::new(),
            secrets: Vec::new(),
            stored_secrets: Vec::new(),
            tags: tags
                .iter()
                .map(|tag| tag.parse().expect("a name"))
                .collect(),
            no_cache: false,
            only_network: false,
            repository_policy: false,
            policy_ref: None,
        };
        let may = |build: &SourceBuild, tag: &str| {
            is_asked_for(build, "t/acme/", &tag.parse().expect("a name"))
        };
        let named = build("x", &["shop:1.4", "t/acme/web/shop"]);
        for good in [
            "t/acme/shop:1.4",
            "t/acme/web/shop:latest",
            "t/acme/web/shop",
        ] {
            assert!(may(&named, good), "{good}");
        }
        for bad in [
            "t/acme/shop:latest",
            "t/acme/prod:1.4",
            "t/acme/x",
            "t/rival/shop:1.4",
        ] {
            assert!(!may(&named, bad), "{bad}");
        }
        let short = build("web_shop.2", &[]);
        assert!(may(&short, "t/acme/web-shop-2:latest"));
        for bad in ["t/acme/web-shop-2:v1", "t/acme/web/shop-2", "t/acme/app"] {
            assert!(!may(&short, bad), "{bad}");
        }
        assert!(may(&build("__", &[]), "t/acme/app:latest"));
    }
}
