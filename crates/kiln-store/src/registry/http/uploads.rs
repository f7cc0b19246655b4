//! Uploads: one request, a whole body after POST, or chunks; mounting; status and cancel.

use axum::body::Body;
use axum::response::Response;
use http::StatusCode;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use kiln_core::Digest;

use super::answer::{self, Answer, CONTENT_DIGEST, UPLOAD_BYTES, UPLOAD_ID};
use super::range::chunk;
use super::transfer::{blocking, receive};
use super::{Asked, Handled};
use crate::registry::authority::Action;
use crate::registry::error::StoreError;
use crate::registry::name::RepoName;
use crate::registry::upload::Upload;

/// `POST /v2/<name>/blobs/uploads/`, with `mount`+`from`, `digest`, or neither.
pub(super) async fn post(asked: Asked, repo: RepoName, body: Body) -> Handled {
    asked.authority.check(Action::Push, &repo)?;
    if asked
        .query("digest-algorithm")
        .is_some_and(|name| name != "sha256")
    {
        return Ok(answer::error(
            StatusCode::BAD_REQUEST,
            "UNSUPPORTED",
            "only sha256 is supported",
        ));
    }
    if let Some(text) = asked.query("mount") {
        let Ok(digest) = text.parse() else {
            return Ok(answer::digest_invalid());
        };
        if let Some(answer) = mount(&asked, &repo, digest).await? {
            return Ok(answer);
        }
    } else if let Some(text) = asked.query("digest") {
        let Ok(digest) = text.parse() else {
            return Ok(answer::digest_invalid());
        };
        let upload = begin(&asked, &repo).await?;
        let id = upload.id().to_owned();
        let done = finish(&asked, &repo, upload, digest, body).await;
        if done.is_err() {
            // The client does not know this session: nothing could continue it.
            forget(&asked, &repo, id).await;
        }
        return done;
    }
    let upload = begin(&asked, &repo).await?;
    Ok(progress(StatusCode::ACCEPTED, &repo, &upload))
}

async fn begin(asked: &Asked, repo: &RepoName) -> Result<Upload, StoreError> {
    let (store, authority, repo) = (asked.store.clone(), asked.authority.clone(), repo.clone());
    blocking(move || store.begin_upload(&authority, &repo)).await
}

/// Takes up a session of this caller; off the async threads because dropping one removes a file.
async fn resume(asked: &Asked, repo: &RepoName, id: String) -> Result<Upload, StoreError> {
    let (store, authority, repo) = (asked.store.clone(), asked.authority.clone(), repo.clone());
    blocking(move || store.resume_upload(&authority, &repo, &id)).await
}

async fn forget(asked: &Asked, repo: &RepoName, id: String) {
    if let Ok(upload) = resume(asked, repo, id).await {
        let _ = blocking(move || {
            upload.cancel();
            Ok(())
        })
        .await;
    }
}

/// Links a blob the caller may read elsewhere. `None`: it may not, or it is not there, and an upload
/// is begun instead, so that nothing is learned of other repositories.
async fn mount(
    asked: &Asked,
    repo: &RepoName,
    digest: Digest,
) -> Result<Option<Response>, StoreError> {
    let Some(from) = asked.query("from").and_then(|text| text.parse().ok()) else {
        return Ok(None);
    };
    if !asked.authority.allows(Action::Pull, &from) {
        return Ok(None);
    }
    let (store, authority, to) = (asked.store.clone(), asked.authority.clone(), repo.clone());
    let mounted = blocking(move || store.mount_charged(&authority, &from, &to, &digest)).await;
    match mounted {
        Ok(_) => Ok(Some(created(repo, &digest))),
        Err(StoreError::BlobUnknown { .. } | StoreError::Corrupt { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) async fn status(asked: Asked, repo: RepoName, id: String) -> Handled {
    let upload = resume(&asked, &repo, id).await?;
    Ok(progress(StatusCode::NO_CONTENT, &repo, &upload))
}

pub(super) async fn cancel(asked: Asked, repo: RepoName, id: String) -> Handled {
    let upload = resume(&asked, &repo, id).await?;
    blocking(move || {
        upload.cancel();
        Ok(())
    })
    .await?;
    Ok(Answer::new(StatusCode::NO_CONTENT).empty())
}

pub(super) async fn patch(asked: Asked, repo: RepoName, id: String, body: Body) -> Handled {
    let upload = resume(&asked, &repo, id).await?;
    let promised = match promised(&asked, &upload) {
        Ok(promised) => promised,
        Err(error) => return Ok(refuse_chunk(&error, &repo, &upload)),
    };
    let upload = receive(body, upload, promised).await?;
    Ok(progress(StatusCode::ACCEPTED, &repo, &upload))
}

pub(super) async fn put(asked: Asked, repo: RepoName, id: String, body: Body) -> Handled {
    let Some(digest) = asked.query("digest").and_then(|text| text.parse().ok()) else {
        return Ok(answer::digest_invalid());
    };
    let upload = resume(&asked, &repo, id).await?;
    if let Err(error) = promised(&asked, &upload) {
        return Ok(refuse_chunk(&error, &repo, &upload));
    }
    finish(&asked, &repo, upload, digest, body).await
}

async fn finish(
    asked: &Asked,
    repo: &RepoName,
    upload: Upload,
    digest: Digest,
    body: Body,
) -> Handled {
    let promised = promised(asked, &upload)?;
    let upload = receive(body, upload, promised).await?;
    let authority = asked.authority.clone();
    let (digest, _) = blocking(move || upload.commit(&authority, &digest)).await?;
    Ok(created(repo, &digest))
}

/// How many bytes the body must have; the chunk must begin where the session stands.
fn promised(asked: &Asked, upload: &Upload) -> Result<Option<u64>, StoreError> {
    let length = asked
        .header(CONTENT_LENGTH)
        .and_then(|text| text.parse::<u64>().ok());
    let Some(text) = asked.header(CONTENT_RANGE) else {
        return Ok(length);
    };
    let expected = upload.size();
    let (start, end) = chunk(text).ok_or(StoreError::UploadOffset { expected })?;
    if start != expected {
        return Err(StoreError::UploadOffset { expected });
    }
    let got = (end - start).saturating_add(1);
    match length {
        Some(promised) if promised != got => Err(StoreError::UploadLength { promised, got }),
        _ => Ok(Some(got)),
    }
}

fn refuse_chunk(error: &StoreError, repo: &RepoName, upload: &Upload) -> Response {
    let mut refusal = answer::store_error(error);
    let state = progress(StatusCode::ACCEPTED, repo, upload);
    for name in [RANGE, http::header::LOCATION, UPLOAD_ID] {
        if let Some(value) = state.headers().get(&name) {
            refusal.headers_mut().insert(name, value.clone());
        }
    }
    refusal
}

/// Where the upload stands. `Range` ends at the last byte received; `0-0` also stands for nothing yet.
fn progress(status: StatusCode, repo: &RepoName, upload: &Upload) -> Response {
    let last = upload.size().saturating_sub(1);
    Answer::new(status)
        .location(format!("/v2/{repo}/blobs/uploads/{}", upload.id()))
        .header(RANGE, format!("0-{last}"))
        .header(UPLOAD_ID, upload.id())
        .header(UPLOAD_BYTES, upload.size())
        .empty()
}

pub(crate) fn created(repo: &RepoName, digest: &Digest) -> Response {
    Answer::new(StatusCode::CREATED)
        .location(format!("/v2/{repo}/blobs/{digest}"))
        .header(CONTENT_DIGEST, digest)
        .empty()
}
