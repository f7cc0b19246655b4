//! What nothing is made of any more: rows first, then their objects, then objects that never had a row.

use std::time::Duration;

use kiln_db::Database;
use kiln_store::registry::GRACE_DEFAULT;
use tokio_util::sync::CancellationToken;

use super::{FOLDER, Images, ImagesError};
use crate::state::Controller;

/// Time between two collections.
const EVERY: Duration = Duration::from_secs(3600);
/// How long a content that nothing is made of stays: publishing an image touches what it finds, first and last.
const GRACE: Duration = Duration::from_secs(24 * 3600);
/// How long an object without a row stays: whoever writes one notes it at once.
const UNKNOWN_GRACE: Duration = Duration::from_secs(24 * 3600);
/// Objects whose rows are looked for at once.
const LOOK: usize = 500;

/// Folders of the bucket that kiln writes large objects to.
const FOLDERS: [&str; 4] = [FOLDER, "sources", "artifacts", "logs"];
/// How long an upload in parts may take; one that is older was left by a kill.
const UPLOAD_AGE: Duration = Duration::from_secs(24 * 3600);

/// What a collection did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Collected {
    /// Contents that nothing was made of.
    pub contents: u64,
    /// Objects that nobody had noted: their writers were killed.
    pub unknown: u64,
}

impl Images {
    /// Removes what nothing is made of for longer than `grace`, and objects that nobody has noted for longer than `unknown_grace`.
    ///
    /// # Errors
    /// When database or bucket do not answer; a later collection goes on.
    pub async fn collect(
        &self,
        db: &Database,
        grace: Duration,
        unknown_grace: Duration,
    ) -> Result<Collected, ImagesError> {
        let mut collected = Collected::default();
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        loop {
            let garbage = db.image_garbage(grace_ms).await?;
            if garbage.is_empty() {
                break;
            }
            for content in garbage {
                // Its key is used once: what another controller stores now has another.
                self.bucket.remove(&content.key).await?;
                collected.contents += 1;
            }
        }
        let old = self.bucket.older_than(FOLDER, unknown_grace).await?;
        for part in old.chunks(LOOK) {
            let keys: Vec<String> = part.iter().map(|found| found.key.clone()).collect();
            let known = db.image_keys(&keys).await?;
            for key in keys.iter().filter(|key| !known.contains(key)) {
                self.bucket.remove(key).await?;
                collected.unknown += 1;
            }
        }
        Ok(collected)
    }
}

impl Images {
    /// Ends uploads in parts that began longer ago than `age`: those that wrote them were killed.
    ///
    /// # Errors
    /// When the bucket does not answer; a later sweep goes on.
    pub async fn end_uploads(&self, age: Duration) -> Result<u64, ImagesError> {
        let mut ended = 0;
        for folder in FOLDERS {
            ended += self.bucket.end_unfinished(folder, age).await?;
        }
        Ok(ended)
    }
}

/// Collects now and then, until `stop`: in the bucket, and what this host's registry has copies of and nobody names there.
pub(crate) async fn run(controller: Controller, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = controller.registry.gc(GRACE_DEFAULT).await {
            // A command of this home may be at it.
            tracing::debug!(
                error = &error as &dyn std::error::Error,
                "the registry was not collected"
            );
        }
        let Some(images) = &controller.images else {
            continue;
        };
        match images.collect(&controller.db, GRACE, UNKNOWN_GRACE).await {
            Ok(collected) if collected == Collected::default() => {}
            Ok(collected) => {
                tracing::info!(?collected, "contents of images that nothing needs are gone")
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "contents of images were not collected"
            ),
        }
        match images.end_uploads(UPLOAD_AGE).await {
            Ok(0) => {}
            Ok(ended) => {
                tracing::info!(ended, "uploads to the bucket that nobody finished are gone")
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "unfinished uploads stay in the bucket for now"
            ),
        }
    }
}
