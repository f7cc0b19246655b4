//! Reading, writing and removing manifests and tags.

use axum::body::Body;
use http::StatusCode;
use http::header::CONTENT_TYPE;
use http_body_util::{BodyExt, Limited};

use super::answer::{Answer, CONTENT_DIGEST, SUBJECT};
use super::transfer::{BODY_IDLE_MAX, blocking};
use super::{Asked, Handled};
use crate::registry::authority::Action;
use crate::registry::error::StoreError;
use crate::registry::manifest::MANIFEST_BYTES_MAX;
use crate::registry::name::{Reference, RepoName};

pub(super) async fn get(asked: Asked, repo: RepoName, what: Reference) -> Handled {
    asked.authority.check(Action::Pull, &repo)?;
    let store = asked.store.clone();
    let stored = blocking(move || store.get_manifest(&repo, &what)).await?;
    let len = stored.bytes.len() as u64;
    Ok(Answer::new(StatusCode::OK)
        .header(CONTENT_TYPE, stored.media_type)
        .header(CONTENT_DIGEST, stored.digest)
        .body(len, asked.is_head(), || Body::from(stored.bytes)))
}

pub(super) async fn put(asked: Asked, repo: RepoName, what: Reference, body: Body) -> Handled {
    asked.authority.check(Action::Push, &repo)?;
    let bytes = small_body(body, MANIFEST_BYTES_MAX).await?;
    let content_type = asked
        .header(CONTENT_TYPE)
        .map(|text| text.split(';').next().unwrap_or(text).trim().to_owned());
    let (store, authority) = (asked.store, asked.authority);
    let location = format!("/v2/{repo}/manifests/");
    let put = blocking(move || {
        store.put_manifest(&authority, &repo, &what, content_type.as_deref(), &bytes)
    })
    .await?;
    let mut answer = Answer::new(StatusCode::CREATED)
        .location(format!("{location}{}", put.digest))
        .header(CONTENT_DIGEST, put.digest);
    if let Some(subject) = put.subject {
        answer = answer.header(SUBJECT, subject);
    }
    Ok(answer.empty())
}

/// Reads a body that must fit in memory, with one deadline for all of it.
pub(crate) async fn small_body(body: Body, max: u64) -> Result<bytes::Bytes, StoreError> {
    let limit = usize::try_from(max).unwrap_or(usize::MAX);
    let collected = tokio::time::timeout(BODY_IDLE_MAX, Limited::new(body, limit).collect());
    match collected.await {
        Err(_slow) => Err(StoreError::BodyBroken { source: None }),
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            Err(StoreError::TooLarge { what: "body", max })
        }
        Ok(Err(error)) => Err(StoreError::BodyBroken {
            source: Some(error),
        }),
    }
}

pub(super) async fn delete(asked: Asked, repo: RepoName, what: Reference) -> Handled {
    asked.authority.check(Action::Delete, &repo)?;
    let store = asked.store.clone();
    blocking(move || store.delete_manifest(&repo, &what)).await?;
    Ok(Answer::new(StatusCode::ACCEPTED).empty())
}
