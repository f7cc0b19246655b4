//! Images that this host took before it shared a bucket: once, at the first start with one, all that have a name go there.
//!
//! A name that is in the database already stays where it points. Killed in between, it goes on at the next start; when all is done a file of
//! the controller's folder says so. What this home's own commands name later is theirs alone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_core::TenantName;
use kiln_db::{ImageTag, NewImages};
use kiln_store::registry::{ErrorKind, Reference, RepoName};
use tokio_util::sync::CancellationToken;

use super::names::tags;
use super::publish::{collect, row};
use super::{Images, ImagesError, TREE};
use crate::state::Controller;

/// File that says that all of it is done.
const DONE: &str = "images-shared";
/// Time between two tries.
const AGAIN: Duration = Duration::from_secs(60);

/// What went up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct MovedUp {
    /// Names that the database did not have.
    names: u64,
    /// Images that are damaged here: they stay, and the doctor names them.
    damaged: u64,
}

/// Moves them up, until that is done or `stop`.
pub(crate) async fn run(controller: Controller, folder: PathBuf, stop: CancellationToken) {
    loop {
        match once(&controller, &folder).await {
            Ok(moved) => {
                if moved != MovedUp::default() {
                    tracing::info!(?moved, "images of this host went to the bucket");
                }
                return;
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "images of this host did not all go to the bucket yet"
            ),
        }
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Forgets that it was done: another bucket has none of them.
pub(crate) fn forget(folder: &Path) {
    let _never_done = std::fs::remove_file(folder.join(DONE));
}

/// Moves up what was not moved before.
///
/// # Errors
/// When registry, bucket or database do not answer; what went up is there.
async fn once(controller: &Controller, folder: &Path) -> Result<MovedUp, ImagesError> {
    let (mut moved, done) = (MovedUp::default(), folder.join(DONE));
    let Some(images) = controller.images.as_ref().filter(|_| !done.exists()) else {
        return Ok(moved);
    };
    let registry = &controller.registry;
    // A name of kiln's own: it is one.
    let Ok(tree) = TREE.parse::<RepoName>() else {
        return Ok(moved);
    };
    for repo in registry.list_repositories(Some(&tree)).await? {
        for tag in tags(registry, &repo).await? {
            match images.move_up(controller, &repo, &tag).await {
                Ok(new) => moved.names += u64::from(new),
                Err(ImagesError::Registry(error)) if error.kind() == ErrorKind::Corrupt => {
                    tracing::warn!(%repo, tag, "an image of this host is damaged and stays here: `kiln doctor --scrub`");
                    moved.damaged += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }
    if let Err(error) = std::fs::write(&done, b"") {
        tracing::warn!(%error, "that images are shared was not noted: it is looked at again at the next start");
    }
    Ok(moved)
}

impl Images {
    /// Moves one image up; false when its name was there, or it went away.
    async fn move_up(
        &self,
        controller: &Controller,
        repo: &RepoName,
        tag: &str,
    ) -> Result<bool, ImagesError> {
        let (db, registry) = (&controller.db, &controller.registry);
        let name = Reference::Tag(tag.to_owned());
        let digest = match registry.resolve(repo, &name).await {
            Ok(digest) => digest,
            Err(error) if error.is_not_found() => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let is_new = db.image_tagged(repo.as_str(), tag).await?.is_none();
        let mut parts = Vec::new();
        collect(registry, repo, &digest, 0, &mut parts).await?;
        let images = NewImages {
            manifests: parts.iter().map(|part| row(repo, part)).collect(),
            tags: vec![ImageTag {
                repo: repo.as_str().to_owned(),
                tag: tag.to_owned(),
                digest,
            }],
            keeps_names: true,
        };
        self.store_and_name(db, registry, repo, &parts, images, None)
            .await?;
        // By its name it is the database's from now on, which may move or end it; commands of this home look for theirs here.
        if !repo.is_under(RepoName::tenant_tree(&TenantName::local()).as_str()) {
            match registry.delete(repo, &name).await {
                Err(error) if !error.is_not_found() => return Err(error.into()),
                _ => {}
            }
        }
        Ok(is_new)
    }
}
