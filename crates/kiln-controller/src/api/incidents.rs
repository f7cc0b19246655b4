//! `/v1/jobs/{id}/incident`: a job is ended because of what it did.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use kiln_core::Action;
use kiln_core::access::Target;
use kiln_db::{CancelError, Incidented, NewIncident};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Api;
use super::caller::Caller;
use super::extract::{Answer, Body, Named};
use super::problem::{Problem, ProblemBody};
use super::workers::reason;

/// Why a job is ended.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NewIncidentAsk {
    /// In a few words.
    note: String,
}

/// A job that was ended as an incident.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct IncidentView {
    /// The job.
    pub id: String,
    /// When, milliseconds since the Unix epoch. With the id it names the folder in which its worker keeps what tells of it.
    pub at_unix_ms: u64,
    /// Who had it, and keeps console, network and record of its machine below `incidents/`; none when it still waited.
    pub worker: Option<String>,
    /// Its record and log are on hold: no age takes them. That needs the action `hold:control`.
    pub held: bool,
    /// Secrets it asked for. What it was given it may have passed on: make new values.
    pub secrets: Vec<String>,
}

/// Ends a job as an incident. Nobody is asked: its lease is over at once, and with it every token and secret that it could be given under that lease.
/// Its worker destroys the machine and keeps what tells of it.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/incident", tag = "jobs", params(("id" = String, Path)), request_body = NewIncidentAsk,
    responses(
        (status = 200, description = "It is over", body = IncidentView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn end(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
    Body(asked): Body<NewIncidentAsk>,
) -> Result<Answer<IncidentView>, Problem> {
    let job = caller.job(&api, &id, Action::JobCancel).await?;
    let note = reason(Some(asked.note).filter(|note| !note.is_empty()))?;
    let hold = caller.could(Action::HoldControl, Target::Installation);
    let incident = NewIncident {
        by: caller.subject().to_owned(),
        actor: caller.actor(),
        note: note.unwrap_or_default(),
        hold,
    };
    let ended = api.db().end_as_incident(&job.request.id, incident).await;
    let ended = ended.map_err(|error| match error {
        CancelError::UnknownJob(_) => Problem::not_found("job", &id),
        CancelError::Database(error) => error.into(),
    })?;
    match ended {
        Incidented::Ended(ended) => {
            let secrets = job.request.secret_names();
            let view = IncidentView {
                id,
                at_unix_ms: ended.at_unix_ms,
                worker: ended.worker.map(Into::into),
                held: ended.held,
                secrets: secrets.into_iter().map(str::to_owned).collect(),
            };
            Ok(Answer(StatusCode::OK, view))
        }
        Incidented::TooLate(_) => Err(Problem::conflict("finished", "the job is over already")
            .hint("`kiln job show` says how; `kiln hold set ID` keeps its record and log")),
    }
}
