//! Reading and unlinking blobs.

use http::header::{ACCEPT_RANGES, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use http::{HeaderName, StatusCode};
use kiln_core::Digest;

use super::answer::{Answer, CONTENT_DIGEST};
use super::range::{Wanted, wanted};
use super::transfer::{blocking, send};
use super::{Asked, Handled};
use crate::registry::authority::{Action, Authority};
use crate::registry::error::StoreError;
use crate::registry::name::RepoName;

/// What content is, which is not for browsers to guess.
const NO_SNIFF: HeaderName = HeaderName::from_static("x-content-type-options");

pub(super) async fn get(asked: Asked, repo: RepoName, digest: Digest) -> Handled {
    asked.authority.check(Action::Pull, &repo)?;
    if asked.is_head() {
        mount_known(&asked, &repo, digest).await?;
    }
    let store = asked.store.clone();
    let opened = store.clone();
    let blob = blocking(move || opened.open_blob(&repo, &digest)).await?;
    let size = blob.size;
    let answer = |status| {
        Answer::new(status)
            .header(CONTENT_DIGEST, digest)
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(NO_SNIFF, "nosniff")
            .header(ACCEPT_RANGES, "bytes")
    };
    Ok(match wanted(asked.header(RANGE), size) {
        Wanted::All => {
            answer(StatusCode::OK).body(size, asked.is_head(), || send(&store, blob, 0, size))
        }
        Wanted::Part { start, len } => answer(StatusCode::PARTIAL_CONTENT)
            .header(
                CONTENT_RANGE,
                format!("bytes {start}-{}/{size}", start + len - 1),
            )
            .body(len, asked.is_head(), || send(&store, blob, start, len)),
        Wanted::Unsatisfiable => answer(StatusCode::RANGE_NOT_SATISFIABLE)
            .header(CONTENT_RANGE, format!("bytes */{size}"))
            .empty(),
    })
}

/// A guest asks before it pushes. A blob of the attempt's sources is mounted into its quarantine now, because a client that does not know
/// where else a blob lies would send it again. The guest could read those repositories anyway.
async fn mount_known(asked: &Asked, repo: &RepoName, digest: Digest) -> Result<(), StoreError> {
    let Authority::Attempt(attempt) = &asked.authority else {
        return Ok(());
    };
    let authority = asked.authority.clone();
    if attempt.sources().is_empty() || !authority.allows(Action::Push, repo) {
        return Ok(());
    }
    let (store, to) = (asked.store.clone(), repo.clone());
    let sources = attempt.sources().to_vec();
    blocking(move || {
        if store.open_blob(&to, &digest).is_ok() {
            return Ok(());
        }
        let readable = sources
            .iter()
            .filter(|from| authority.allows(Action::Pull, from));
        for from in readable {
            match store.mount_charged(&authority, from, &to, &digest) {
                Ok(_) => return Ok(()),
                Err(StoreError::BlobUnknown { .. } | StoreError::Corrupt { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    })
    .await
}

pub(super) async fn delete(asked: Asked, repo: RepoName, digest: Digest) -> Handled {
    asked.authority.check(Action::Delete, &repo)?;
    let store = asked.store.clone();
    blocking(move || store.unlink_blob(&repo, &digest)).await?;
    Ok(Answer::new(StatusCode::ACCEPTED).empty())
}
