//! `/v1/jobs/{id}/artifacts`: what a job left.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use kiln_core::Action;

use super::Api;
use super::caller::Caller;
use super::extract::{Answer, Named};
use super::problem::{Problem, ProblemBody};
use super::view::{ArtifactView, List};

/// Lists a job's artifacts.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/artifacts", tag = "jobs", params(("id" = String, Path)),
    responses(
        (status = 200, description = "All of them", body = List<ArtifactView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
) -> Result<Answer<List<ArtifactView>>, Problem> {
    let job = caller.job(&api, &id, Action::ArtifactRead).await?;
    let items = api.db().artifacts(&job.request.id).await?;
    let items = items.into_iter().map(|artifact| ArtifactView {
        name: artifact.name,
        digest: artifact.digest.to_string(),
        size: artifact.size,
        media_type: artifact.media_type,
    });
    let list = List {
        items: items.collect(),
        next: None,
    };
    Ok(Answer(StatusCode::OK, list))
}

/// Fetches one artifact. Always as bytes to keep, never as something a browser would show.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/artifacts/{name}", tag = "jobs",
    params(("id" = String, Path), ("name" = String, Path)),
    responses(
        (status = 200, description = "Its bytes; `etag` is its digest", body = String, content_type = "application/octet-stream"),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn fetch(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Path((id, name)): Path<(String, String)>,
) -> Result<Response, Problem> {
    let job = caller.job(&api, &id, Action::ArtifactRead).await?;
    let all = api.db().artifacts(&job.request.id).await?;
    let found = all.into_iter().find(|artifact| artifact.name == name);
    let artifact = found.ok_or_else(|| Problem::not_found("artifact", &name))?;
    let pieces = api.backend().open_artifact(&job, &artifact).await;
    let pieces = pieces.map_err(|error| Problem::unavailable(&error))?;
    let mut response = Body::from_stream(pieces).into_response();
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(
        header::CONTENT_DISPOSITION,
        HeaderValue::from_static("attachment"),
    );
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(artifact.size));
    if let Ok(tag) = HeaderValue::try_from(format!("\"{}\"", artifact.digest)) {
        headers.insert(header::ETAG, tag);
    }
    Ok(response)
}
