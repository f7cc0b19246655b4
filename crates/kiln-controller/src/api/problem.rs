//! Refusals and failures as RFC 9457 problem documents: a stable `code`, one sentence, and what to try.
//!
//! Nothing of the inside is shown: a database's or disk's own words go to the log under the same request id.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A refusal or failure on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// HTTP status.
    pub status: StatusCode,
    /// Stable short name.
    pub code: &'static str,
    /// What happened, in one sentence.
    pub detail: String,
    /// What to try.
    pub hint: Option<String>,
    /// The field it is about.
    pub field: Option<String>,
    /// Places of a file that it is about.
    pub faults: Box<[Fault]>,
    /// Seconds to wait before another try.
    pub retry_after: Option<u32>,
}

/// One thing that is wrong with a file of the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fault {
    /// The file's name, as it came.
    pub file: String,
    /// Line, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    /// Column in characters, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<u32>,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Body of every answer that is not a success; `application/problem+json`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody {
    /// `urn:kiln:problem:` and the code.
    #[serde(rename = "type")]
    pub kind: String,
    /// The code in words.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// Stable short name: programs decide by this.
    pub code: String,
    /// What happened, in one sentence.
    pub detail: String,
    /// What to try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The field it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What is wrong with a file of the request, by place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<Fault>,
}

impl Problem {
    /// A problem; `code` is lower-case words joined by underscores.
    #[must_use]
    pub fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            code,
            detail: detail.into(),
            hint: None,
            field: None,
            faults: Box::default(),
            retry_after: None,
        }
    }

    /// With the places of a file that it is about.
    #[must_use]
    pub fn faults(mut self, faults: Vec<Fault>) -> Self {
        self.faults = faults.into_boxed_slice();
        self
    }

    /// With what to try.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// With the field it is about.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    /// With the seconds to wait before another try.
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// The request cannot be understood.
    #[must_use]
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", detail)
    }

    /// A field of the request is understood and not acceptable.
    #[must_use]
    pub fn invalid(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", detail).field(field)
    }

    /// No such thing, or somebody else's.
    #[must_use]
    pub fn not_found(what: &str, name: &str) -> Self {
        let name: String = name
            .chars()
            .filter(|c| !kiln_policy::unseen(*c))
            .take(80)
            .collect();
        Self::new(
            StatusCode::NOT_FOUND,
            "not_found",
            format!("there is no {what} {name}"),
        )
    }

    /// No proof of identity, or one that is not good.
    #[must_use]
    pub fn unauthenticated(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthenticated", detail)
            .hint("send `Authorization: Bearer TOKEN` with a token made by `kiln token create`")
    }

    /// Who it is, is known; this is not theirs to do.
    #[must_use]
    pub fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", detail)
    }

    /// It contradicts what is.
    #[must_use]
    pub fn conflict(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, detail)
    }

    /// More bytes than are taken.
    #[must_use]
    pub fn too_large(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", detail)
    }

    /// Too often, or too much at once.
    #[must_use]
    pub fn too_many(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, code, detail).retry_after(1)
    }

    /// Something of ours does not work now; the cause goes to the log alone.
    #[must_use]
    pub fn unavailable(cause: &dyn std::error::Error) -> Self {
        let mut chain = cause.to_string();
        let mut next = cause.source();
        while let Some(error) = next {
            chain.push_str(": ");
            chain.push_str(&error.to_string());
            next = error.source();
        }
        tracing::error!(cause = %chain, "a request could not be served");
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "unavailable",
            "kiln cannot do this at the moment",
        )
        .hint("try again; the operator finds the cause in the server's log")
        .retry_after(2)
    }

    /// This server has no room to keep it; the cause goes to the log alone.
    #[must_use]
    pub fn disk_full(cause: &dyn std::error::Error) -> Self {
        let told = Self::unavailable(cause);
        Self {
            status: StatusCode::INSUFFICIENT_STORAGE,
            code: "disk_full",
            detail: "this server's disk is full or cannot be written: nothing was changed"
                .to_owned(),
            hint: Some("the operator makes room; the same request works then".to_owned()),
            retry_after: Some(30),
            ..told
        }
    }

    /// A file of ours could not be written or read.
    #[must_use]
    pub fn of_io(error: &std::io::Error) -> Self {
        match is_disk_full(error) {
            true => Self::disk_full(error),
            false => Self::unavailable(error),
        }
    }
}

/// Whether an error is, or was caused by, a disk without room.
pub(crate) fn is_disk_full(error: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind;
    let mut next = Some(error);
    while let Some(error) = next {
        let full = |error: &std::io::Error| {
            matches!(
                error.kind(),
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
            )
        };
        if error.downcast_ref::<std::io::Error>().is_some_and(full) {
            return true;
        }
        next = error.source();
    }
    false
}

impl From<kiln_db::DbError> for Problem {
    fn from(error: kiln_db::DbError) -> Self {
        match error {
            kiln_db::DbError::Disk { .. } => Self::disk_full(&error),
            error => Self::unavailable(&error),
        }
    }
}

impl From<Problem> for ProblemBody {
    fn from(problem: Problem) -> Self {
        Self {
            kind: format!("urn:kiln:problem:{}", problem.code),
            title: problem.code.replace('_', " "),
            status: problem.status.as_u16(),
            code: problem.code.to_owned(),
            detail: problem.detail,
            hint: problem.hint,
            field: problem.field,
            errors: problem.faults.into_vec(),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, retry_after) = (self.status, self.retry_after);
        let body = serde_json::to_vec(&ProblemBody::from(self)).unwrap_or_default();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"kiln\""),
            );
        }
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
