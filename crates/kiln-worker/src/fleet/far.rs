//! Publishing on a controller of another host: the verified image goes into this attempt's quarantine there, and the controller names it.

use std::time::Duration;

use kiln_core::{FailureClass, ImageRef, Lease};
use kiln_proto::fleet::{NOT_PUSHED, PublishImage, RegistryToken};
use kiln_store::image::Verify;
use kiln_store::registry::RepoName;
use kiln_store::remote::{Credential, RemoteConfig, RemoteRegistry, Target};
use tokio_util::sync::CancellationToken;

use super::client::{LinkError, REQUEST_TIMEOUT, job_path};
use super::job::Workshop;
use super::report::{To, answered};
use crate::build::{BuildReport, QUARANTINE_TAG};
use crate::failure::Failure;
use crate::publish;

/// How often an image is pushed when the worker came to another controller before it was named.
const PUSHES_MAX: u32 = 3;
/// Longest time the controller takes to read an image back and name it.
const NAME_TIMEOUT: Duration = Duration::from_secs(300);

/// Sends a built image to the controller's registry and has it named. False when worker and controller share one registry.
///
/// # Errors
/// When the controller refuses or cannot be reached: then the image has no name there.
pub(super) async fn publish_far(
    shop: &Workshop,
    to: &To,
    report: &BuildReport,
    tags: &[ImageRef],
    cancel: CancellationToken,
) -> Result<bool, Failure> {
    let lease = &to.lease;
    let mut pushes = 1;
    loop {
        let token = answered(&to.fenced, || token(shop, lease)).await;
        let token = token.map_err(|error| Failure::infrastructure(&error))?;
        let elsewhere = !token.registry.is_empty();
        if elsewhere {
            push(shop, lease, report, token, &cancel).await?;
        } else if !token.named_by_controller {
            return Ok(false);
        }
        match answered(&to.fenced, || name(shop, lease, report, tags)).await {
            Ok(()) => return Ok(elsewhere),
            Err(LinkError::Refused { code, .. }) if code == NOT_PUSHED && pushes < PUSHES_MAX => {
                pushes += 1;
            }
            Err(error) => {
                return Err(Failure::new(
                    FailureClass::Infrastructure,
                    format!(
                        "the controller did not name the image: {}",
                        crate::orders::chain(&error)
                    ),
                ));
            }
        }
    }
}

/// Where and with what to push.
async fn token(shop: &Workshop, lease: &Lease) -> Result<RegistryToken, LinkError> {
    let path = job_path(&lease.attempt.job, "registry-token");
    let nothing = serde_json::json!({});
    let asked = shop
        .client
        .call::<_, RegistryToken>(&path, Some(lease), &nothing, REQUEST_TIMEOUT);
    asked.await
}

async fn name(
    shop: &Workshop,
    lease: &Lease,
    report: &BuildReport,
    tags: &[ImageRef],
) -> Result<(), LinkError> {
    let message = PublishImage {
        manifest: report.digest,
        tags: tags.to_vec(),
    };
    let path = job_path(&lease.attempt.job, "image");
    let named =
        shop.client
            .call::<_, serde_json::Value>(&path, Some(lease), &message, NAME_TIMEOUT);
    named.await.map(drop)
}

/// Sends the image into this attempt's quarantine.
async fn push(
    shop: &Workshop,
    lease: &Lease,
    report: &BuildReport,
    token: RegistryToken,
    cancel: &CancellationToken,
) -> Result<(), Failure> {
    let infrastructure = |error: &dyn std::error::Error| Failure::infrastructure(error);
    let quarantine = RepoName::quarantine(&lease.attempt);
    let target = ImageRef {
        registry: Some(token.registry),
        repository: quarantine.as_str().to_owned(),
        tag: Some(QUARANTINE_TAG.to_owned()),
        digest: None,
    };
    let config = RemoteConfig {
        ca_bundle: shop.authority.clone(),
        proxy: None,
        offers: Some(kiln_proto::fleet::ALPN.to_vec()),
    };
    let target = Target::new(&target).map_err(|error| infrastructure(&error))?;
    let credential = Some(Credential::RegistryToken(token.token));
    let remote = RemoteRegistry::new(&config, target, credential);
    let remote = remote.map_err(|error| infrastructure(&error))?;
    let own: ImageRef = report
        .reference
        .parse()
        .map_err(|error| infrastructure(&error))?;
    let own: RepoName = own
        .repository
        .parse()
        .map_err(|error| infrastructure(&error))?;
    let asked = Verify {
        rehash: false,
        ..Verify::image(own.clone(), report.digest)
    };
    let image = publish::read_image(&shop.registry, &asked).await;
    let image = image.map_err(|error| infrastructure(&error))?;
    let pushed = tokio::select! {
        pushed = remote.push(&shop.registry.host, &own, &image, |_| ()) => pushed,
        () = cancel.cancelled() => return Err(Failure::cancelled()),
    };
    pushed.map(drop).map_err(|error| infrastructure(&error))
}
