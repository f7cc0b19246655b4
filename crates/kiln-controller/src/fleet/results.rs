//! What an attempt leaves: an image that is named after it was read back, and the artifacts of a command.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::{Extension, Json};
use futures_util::StreamExt as _;
use http::{HeaderMap, StatusCode, header};
use kiln_core::ArtifactName;
use kiln_core::Lease;
use kiln_core::artifact::{ARTIFACT_BYTES_MAX, ARTIFACTS_BYTES_MAX, ARTIFACTS_MAX};
use kiln_db::{Artifact, DoorKind};
use kiln_proto::fleet::{PublishImage, RegistryToken};
use kiln_store::artifacts::ArtifactError;
use kiln_store::host::Publish;
use kiln_store::image::{Verify, verify};
use kiln_store::registry::RepoName;

use super::doors::{Answered, open_door};
use super::refusal::Refused;
use super::registry_door;
use super::who::{Live, now_unix_ms};
use crate::access::{Peer, RegistryAction, RepositoryGrant};
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
    let others = controller.db.artifacts(job).await?;
    let others = others.iter().filter(|other| other.name != name.as_str());
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
    // A lease that ended meanwhile leaves a file without a row: it goes with its job.
    controller.db.artifact(lease, &artifact).await?;
    Ok(Json(serde_json::json!({
        "name": artifact.name, "digest": artifact.digest, "size": artifact.size,
    })))
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
    held: Live,
    Json(publish): Json<PublishImage>,
) -> Answered<serde_json::Value> {
    let lease = &held.lease;
    let own = format!("t/{}/", lease.tenant);
    let foreign = |tag: &&kiln_core::ImageRef| {
        tag.registry.is_some() || tag.digest.is_some() || !tag.repository.starts_with(&own)
    };
    if publish.tags.is_empty() || publish.tags.len() > TAGS_MAX {
        return Err(Refused::bad(format!("an image gets 1 to {TAGS_MAX} names")));
    }
    if let Some(tag) = publish.tags.iter().find(foreign) {
        return Err(Refused::bad(format!("{tag} is not a name of this tenant")));
    }
    let names: Vec<String> = publish.tags.iter().map(ToString::to_string).collect();
    open_door(&controller, lease, DoorKind::Tag, names.join(" ")).await?;
    let from = RepoName::quarantine(&lease.attempt);
    let asked = Verify::image(from.clone(), publish.manifest);
    verify(&controller.registry, &asked)
        .await
        .map_err(|error| {
            Refused::new(
                http::StatusCode::UNPROCESSABLE_ENTITY,
                "image_refused",
                format!("what was pushed is not that image: {error}"),
            )
        })?;
    let authority = registry_door::authority(&controller, lease.clone()).await;
    for tag in publish.tags {
        let to = tag.repository.parse();
        let publish = Publish {
            from: from.clone(),
            manifest: publish.manifest,
            to: to.map_err(|_| Refused::bad(format!("{tag} is not a name")))?,
            tags: vec![tag.tag.clone().unwrap_or_else(|| "latest".to_owned())],
        };
        let named = controller
            .registry
            .publish(&publish, Some(&authority))
            .await;
        named.map_err(|error| Refused::unavailable(error.to_string()))?;
    }
    if let Err(error) = controller.registry.delete_tree(&from).await
        && !error.is_not_found()
    {
        tracing::warn!(%error, "a quarantine was not removed");
    }
    Ok(Json(serde_json::json!({})))
}
