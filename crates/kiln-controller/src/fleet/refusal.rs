//! How `/worker/v1` says no.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use kiln_db::{DbError, DoorError, HeartbeatError};
use kiln_proto::fleet::Refusal;

/// A refusal: status, stable short name, one sentence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl Refused {
    /// The request makes no sense.
    #[must_use]
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", message)
    }

    /// What is asked for is not there.
    #[must_use]
    pub fn missing(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// The caller is no worker of this controller.
    #[must_use]
    pub fn unknown_worker(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "unknown_worker", message)
    }

    /// The lease is not the live one.
    #[must_use]
    pub fn lease(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "lease_refused", message)
    }

    /// This controller cannot now.
    #[must_use]
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message)
    }

    /// Whether it says that the caller is nobody known here.
    pub(crate) fn is_forbidden(&self) -> bool {
        self.status == StatusCode::FORBIDDEN
    }

    /// Its one sentence.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// With any status and code.
    #[must_use]
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
        }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let refusal = Refusal {
            code: self.code.to_owned(),
            message: self.message,
        };
        (self.status, Json(refusal)).into_response()
    }
}

impl From<DbError> for Refused {
    fn from(error: DbError) -> Self {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "the database failed a worker"
        );
        Self::unavailable("the database does not answer")
    }
}

impl From<DoorError> for Refused {
    fn from(error: DoorError) -> Self {
        match error {
            DoorError::Lease(refused) => Self::lease(refused.to_string()),
            DoorError::Cancelled => Self::new(
                StatusCode::CONFLICT,
                "cancelled",
                "the job is being cancelled",
            ),
            DoorError::TooMuch(what) => Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_much", what),
            DoorError::Database(error) => error.into(),
        }
    }
}

impl From<HeartbeatError> for Refused {
    fn from(error: HeartbeatError) -> Self {
        match error {
            HeartbeatError::UnknownWorker(worker) => {
                Self::unknown_worker(format!("there is no worker {worker}, or it was removed"))
            }
            HeartbeatError::Database(error) => error.into(),
        }
    }
}
