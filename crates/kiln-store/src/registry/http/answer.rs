//! Answers of the registry's HTTP interface, and errors in the spec's JSON form.

use std::fmt;

use axum::body::Body;
use axum::response::Response;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName, LOCATION, RETRY_AFTER};
use http::{HeaderValue, StatusCode};
use serde_json::json;

use super::route::RouteError;
use crate::registry::error::{ErrorKind, StoreError};

/// `Docker-Content-Digest`.
pub(crate) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
/// `OCI-Subject`.
pub(crate) const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
/// `OCI-Filters-Applied`.
pub(crate) const FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");
/// `Docker-Upload-UUID`.
pub(crate) const UPLOAD_ID: HeaderName = HeaderName::from_static("docker-upload-uuid");
/// Bytes an upload session has: `Range` cannot tell none from one.
pub(crate) const UPLOAD_BYTES: HeaderName = HeaderName::from_static("kiln-upload-bytes");
/// `Docker-Distribution-API-Version`, which older clients look for.
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
/// The broad kind of a failure, for kiln's own clients on the private socket.
pub(crate) const ERROR_KIND: HeaderName = HeaderName::from_static("kiln-error-kind");

/// Longest error message sent, bytes.
const MESSAGE_BYTES_MAX: usize = 2000;

/// An answer being made.
pub(crate) struct Answer(Response);

impl Answer {
    pub(crate) fn new(status: StatusCode) -> Self {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = status;
        let version = HeaderValue::from_static("registry/2.0");
        response.headers_mut().insert(API_VERSION, version);
        Self(response)
    }

    /// Sets a header. Values that are not legal in HTTP are left out; kiln's own always are.
    pub(crate) fn header(mut self, name: HeaderName, value: impl fmt::Display) -> Self {
        if let Ok(value) = HeaderValue::try_from(value.to_string()) {
            self.0.headers_mut().insert(name, value);
        }
        self
    }

    pub(crate) fn location(self, path: impl fmt::Display) -> Self {
        self.header(LOCATION, path)
    }

    /// A body of known length; left out for HEAD, whose length header stays.
    pub(crate) fn body(self, len: u64, head: bool, body: impl FnOnce() -> Body) -> Response {
        let mut response = self.header(CONTENT_LENGTH, len).0;
        if !head {
            *response.body_mut() = body();
        }
        response
    }

    pub(crate) fn json(self, value: &serde_json::Value) -> Response {
        self.json_as("application/json", value)
    }

    pub(crate) fn json_as(self, media_type: &str, value: &serde_json::Value) -> Response {
        let text = value.to_string();
        let len = text.len() as u64;
        self.header(CONTENT_TYPE, media_type)
            .body(len, false, || Body::from(text))
    }

    pub(crate) fn empty(self) -> Response {
        self.header(CONTENT_LENGTH, 0).0
    }
}

/// An error in the spec's form.
pub(crate) fn error(status: StatusCode, code: &str, message: &str) -> Response {
    let mut end = message.len().min(MESSAGE_BYTES_MAX);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let body = json!({"errors": [{"code": code, "message": &message[..end]}]});
    Answer::new(status).json(&body)
}

/// A failure of the store, told to the client; the host's own troubles are logged with their causes.
#[must_use]
pub fn store_error(failure: &StoreError) -> Response {
    let (status, code) = failure.status_and_code();
    let message = match failure {
        StoreError::Lease(why) => format!("{failure}: {why}"),
        StoreError::Io { source, .. }
            if source.kind() == std::io::ErrorKind::ReadOnlyFilesystem =>
        {
            "the registry's file system is read-only".to_owned()
        }
        StoreError::Io { what, .. } => format!("the registry's host failed to {what} a file"),
        _ => failure.to_string(),
    };
    if status.is_server_error() {
        let cause = std::error::Error::source(failure).map(ToString::to_string);
        tracing::error!(error = %failure, cause, "registry request failed");
    }
    let mut response = error(status, code, &message);
    let kind = HeaderValue::from_static(kind_word(failure.kind()));
    response.headers_mut().insert(ERROR_KIND, kind);
    if failure.kind() == ErrorKind::Unavailable {
        let seconds = HeaderValue::from_static("1");
        response.headers_mut().insert(RETRY_AFTER, seconds);
    }
    response
}

/// The word for a kind in [`ERROR_KIND`].
pub(crate) fn kind_word(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::NotFound => "not_found",
        ErrorKind::Invalid => "invalid",
        ErrorKind::Corrupt => "corrupt",
        ErrorKind::DiskFull => "disk_full",
        ErrorKind::Limit => "limit",
        ErrorKind::Denied => "denied",
        ErrorKind::Unavailable => "unavailable",
        ErrorKind::Internal => "internal",
    }
}

pub(crate) fn route_error(failure: RouteError) -> Response {
    match failure {
        RouteError::NotFound => error(
            StatusCode::NOT_FOUND,
            "NAME_UNKNOWN",
            "no such endpoint or repository",
        ),
        RouteError::Name => error(
            StatusCode::BAD_REQUEST,
            "NAME_INVALID",
            "the repository name is not legal",
        ),
        RouteError::Digest => digest_invalid(),
        RouteError::Tag => error(
            StatusCode::BAD_REQUEST,
            "MANIFEST_INVALID",
            "the tag is not legal",
        ),
    }
}

pub(crate) fn digest_invalid() -> Response {
    error(
        StatusCode::BAD_REQUEST,
        "DIGEST_INVALID",
        "a digest of the form sha256:<64 lower-case hex digits> is needed",
    )
}

pub(crate) fn unsupported(message: &str) -> Response {
    error(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", message)
}
