//! Which cache head a build forks: one whose files are what they were when they were sealed.

use kiln_core::{FailureClass, TenantName};
use kiln_image::heads::{Head, SHARED};

use crate::event::Events;
use crate::failure::Failure;
use crate::host::Host;
use crate::orders;

/// The head to fork, its whole chain sound; without the cache the shared one, which holds only bases. A tenant's own head that is
/// damaged is left behind, and told.
///
/// # Errors
/// When there is no head, or the shared one is damaged.
pub async fn head(
    host: &Host,
    tenant: &TenantName,
    no_cache: bool,
    events: &Events,
) -> Result<Head, Failure> {
    let scope = if no_cache {
        SHARED.to_owned()
    } else {
        tenant.to_string()
    };
    let (heads, buildkit) = (host.heads.clone(), host.image.buildkit.clone());
    // The first use after the host booted reads every byte.
    let fork = tokio::task::spawn_blocking(move || heads.sound_to_fork(&scope, &buildkit))
        .await
        .map_err(|error| Failure::infrastructure(&error))?;
    let fork = fork.map_err(|error| {
        let failure = Failure::infrastructure(&error);
        if !error.is_damage() {
            return failure;
        }
        failure.hint("it is not used again: `kiln bases bake` makes the shared cache head anew")
    })?;
    if let Some(error) = fork.forgotten {
        let why = orders::chain(&error);
        events
            .warn(format!(
                "the build cache was damaged and is left behind: {why}"
            ))
            .await;
    }
    fork.head.ok_or_else(|| {
        Failure::new(
            FailureClass::Infrastructure,
            "there are no runtime bases yet",
        )
        .hint("run `kiln setup` once")
    })
}
