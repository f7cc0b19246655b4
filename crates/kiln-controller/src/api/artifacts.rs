//! `/v1/jobs/{id}/artifacts`: what a job left.

use std::ops::Range;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, StatusCode, header};
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

/// Fetches one artifact, or a range of its bytes. Always as bytes to keep, never as something a browser would show. A slash in its name is
/// written `%2F`.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/artifacts/{name}", tag = "jobs",
    params(
        ("id" = String, Path), ("name" = String, Path),
        ("Range" = Option<String>, Header, description = "One range: `bytes=FROM-TO`, `bytes=FROM-` or `bytes=-LAST`. What is no such range is not looked at."),
        ("If-Range" = Option<String>, Header, description = "The range only while the artifact has this `etag`."),
    ),
    responses(
        (status = 200, description = "Its bytes; `etag` is its digest", body = String, content_type = "application/octet-stream"),
        (status = 206, description = "The range, named in `content-range`", body = String, content_type = "application/octet-stream"),
        (status = "4XX", description = "Refused; 416 for a range beyond its end", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn fetch(
    State(api): State<Arc<Api>>,
    caller: Caller,
    path: Result<Path<(String, String)>, PathRejection>,
    asked: HeaderMap,
) -> Result<Response, Problem> {
    let Path((id, name)) = path.map_err(|_| Problem::not_found("thing", "of this name"))?;
    let job = caller.job(&api, &id, Action::ArtifactRead).await?;
    let all = api.db().artifacts(&job.request.id).await?;
    let found = all.into_iter().find(|artifact| artifact.name == name);
    let artifact = found.ok_or_else(|| Problem::not_found("artifact", &name))?;
    let tag = format!("\"{}\"", artifact.digest);
    let size = artifact.size;
    let same = asked
        .get(header::IF_RANGE)
        .is_none_or(|known| known == tag.as_str());
    let range = asked.get(header::RANGE).filter(|_| same);
    let range = match range.map(|range| wanted(range.to_str().unwrap_or_default(), size)) {
        Some(Wanted::Beyond) => return Ok(beyond(size)),
        Some(Wanted::Part(range)) => Some(range),
        Some(Wanted::All) | None => None,
    };
    let bytes = range.clone().unwrap_or(0..size);
    let length = bytes.end - bytes.start;
    let pieces = api.backend().open_artifact(&job, &artifact, bytes).await;
    let pieces = pieces.map_err(|error| match error.kind() {
        // Its job has grown old: the row is kept longer than the file.
        std::io::ErrorKind::NotFound => Problem::not_found("artifact", &name),
        _ => Problem::unavailable(&error),
    })?;
    let mut response = Body::from_stream(pieces).into_response();
    if let Some(range) = range {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let said = format!("bytes {}-{}/{size}", range.start, range.end - 1);
        set(&mut response, header::CONTENT_RANGE, &said);
    }
    for (name, value) in [
        (header::CONTENT_TYPE, "application/octet-stream"),
        (header::CONTENT_DISPOSITION, "attachment"),
        (header::ACCEPT_RANGES, "bytes"),
        (header::CONTENT_LENGTH, &length.to_string()),
        (header::ETAG, &tag),
    ] {
        set(&mut response, name, value);
    }
    Ok(response)
}

fn set(response: &mut Response, name: header::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::try_from(value) {
        response.headers_mut().insert(name, value);
    }
}

fn beyond(size: u64) -> Response {
    let problem = Problem::new(
        StatusCode::RANGE_NOT_SATISFIABLE,
        "range",
        format!("the artifact has {size} bytes"),
    );
    let mut response = problem.into_response();
    set(
        &mut response,
        header::CONTENT_RANGE,
        &format!("bytes */{size}"),
    );
    response
}

/// What a `Range` header asks of a file.
#[derive(PartialEq, Eq, Debug)]
enum Wanted {
    /// It is no range that is known here, or several: RFC 9110 §14.2 lets a server give the whole.
    All,
    Part(Range<u64>),
    /// No byte of it is there.
    Beyond,
}

fn wanted(text: &str, size: u64) -> Wanted {
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // A number that is too large is beyond any file.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let Some((first, last)) = text
        .strip_prefix("bytes=")
        .and_then(|range| range.trim().split_once('-'))
    else {
        return Wanted::All;
    };
    match (number(first), number(last)) {
        (None, Some(0)) if first.is_empty() => Wanted::Beyond,
        (None, Some(_)) if first.is_empty() && size == 0 => Wanted::Beyond,
        (None, Some(count)) if first.is_empty() => Wanted::Part(size.saturating_sub(count)..size),
        (Some(first), Some(last)) if first > last => Wanted::All,
        (Some(first), Some(_) | None)
            if first >= size && (last.is_empty() || number(last).is_some()) =>
        {
            Wanted::Beyond
        }
        (Some(first), Some(last)) => Wanted::Part(first..last.saturating_add(1).min(size)),
        (Some(first), None) if last.is_empty() => Wanted::Part(first..size),
        _ => Wanted::All,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_as_rfc_9110_has_them() {
        for (text, size, want) in [
            ("bytes=0-9", 100, Wanted::Part(0..10)),
            ("bytes=90-", 100, Wanted::Part(90..100)),
            ("bytes=-10", 100, Wanted::Part(90..100)),
            ("bytes=-1000", 100, Wanted::Part(0..100)),
            ("bytes=95-1000", 100, Wanted::Part(95..100)),
            ("bytes=0-99999999999999999999", 100, Wanted::Part(0..100)),
            ("bytes=100-", 100, Wanted::Beyond),
            ("bytes=99999999999999999999-", 100, Wanted::Beyond),
            ("bytes=-0", 100, Wanted::Beyond),
            ("bytes=0-0", 0, Wanted::Beyond),
            ("bytes=-5", 0, Wanted::Beyond),
            ("bytes=5-4", 100, Wanted::All),
            ("bytes=0-1,5-6", 100, Wanted::All),
            ("bytes=200-x", 100, Wanted::All),
            ("bytes=-", 100, Wanted::All),
            ("bytes=+1-2", 100, Wanted::All),
            ("lines=0-1", 100, Wanted::All),
            ("", 100, Wanted::All),
        ] {
            assert_eq!(wanted(text, size), want, "{text} of {size}");
        }
    }
}
