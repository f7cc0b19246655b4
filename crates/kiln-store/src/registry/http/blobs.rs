//! Reading and unlinking blobs.

use http::header::{ACCEPT_RANGES, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use http::{HeaderName, StatusCode};
use kiln_core::Digest;

use super::answer::{Answer, CONTENT_DIGEST};
use super::range::{Wanted, wanted};
use super::transfer::{blocking, send};
use super::{Asked, Handled};
use crate::registry::authority::Action;
use crate::registry::name::RepoName;

/// What content is, which is not for browsers to guess.
const NO_SNIFF: HeaderName = HeaderName::from_static("x-content-type-options");

pub(super) async fn get(asked: Asked, repo: RepoName, digest: Digest) -> Handled {
    asked.authority.check(Action::Pull, &repo)?;
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

pub(super) async fn delete(asked: Asked, repo: RepoName, digest: Digest) -> Handled {
    asked.authority.check(Action::Delete, &repo)?;
    let store = asked.store.clone();
    blocking(move || store.unlink_blob(&repo, &digest)).await?;
    Ok(Answer::new(StatusCode::ACCEPTED).empty())
}
