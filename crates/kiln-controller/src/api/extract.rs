//! Bodies and queries of requests, with problems instead of plain texts when they are wrong.

use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::problem::Problem;

/// Largest JSON body.
pub(crate) const JSON_MAX: usize = 1 << 20;
/// Longest part of a parser's words that is shown.
const WORDS_MAX: usize = 300;

/// A JSON body; an empty one is an empty object.
#[derive(Debug)]
pub(crate) struct Body<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        let kind = parts.headers.get(header::CONTENT_TYPE);
        let kind = kind
            .and_then(|kind| kind.to_str().ok())
            .unwrap_or("application/json");
        let essence = kind.split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            return Err(Problem::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "media_type",
                "the body must be application/json",
            ));
        }
        let bytes = axum::body::to_bytes(body, JSON_MAX)
            .await
            .map_err(|error| {
                if super::upload::is_stalled(&error) {
                    super::upload::stalled()
                } else {
                    Problem::too_large(format!(
                        "the body is broken, or has more than {JSON_MAX} bytes"
                    ))
                }
            })?;
        from_slice(&bytes).map(Self)
    }
}

/// Reads JSON; nothing is an empty object.
pub(crate) fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let bytes = if bytes.is_empty() { b"{}" } else { bytes };
    serde_json::from_slice(bytes).map_err(|error| {
        let words: String = error.to_string().chars().take(WORDS_MAX).collect();
        match error.classify() {
            serde_json::error::Category::Data => {
                Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", words)
            }
            _ => Problem::bad_request(format!("the body is not JSON: {words}")),
        }
    })
}

/// The query of a request.
#[derive(Debug)]
pub(crate) struct Asked<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        Query::from_request_parts(parts, state)
            .await
            .map(|Query(value)| Self(value))
            .map_err(|error| {
                let words: String = error.body_text().chars().take(WORDS_MAX).collect();
                Problem::bad_request(words)
            })
    }
}

/// One piece of the path, as it was sent; every text is one.
#[derive(Debug)]
pub(crate) struct Named(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        axum::extract::Path::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Path(name)| Self(name))
            .map_err(|_| Problem::not_found("thing", "of this name"))
    }
}

/// The answer to whoever took something away.
pub(crate) fn removed(was_there: bool, kind: &str, name: &str) -> Result<StatusCode, Problem> {
    match was_there {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Problem::not_found(kind, name)),
    }
}

/// An answer in JSON.
#[derive(Debug)]
pub(crate) struct Answer<T>(pub(crate) StatusCode, pub(crate) T);

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.1) {
            Ok(body) => {
                let kind = HeaderValue::from_static("application/json");
                (self.0, [(header::CONTENT_TYPE, kind)], body).into_response()
            }
            Err(error) => Problem::unavailable(&error).into_response(),
        }
    }
}
