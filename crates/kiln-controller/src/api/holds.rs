//! `/v1/holds`: what stays whatever its age, until somebody lets it go.

use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use http::StatusCode;
use kiln_core::Action;
use kiln_core::access::Target;
use kiln_db::{Hold, HoldError, Holding};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Api;
use super::caller::Caller;
use super::extract::{Answer, Body};
use super::problem::{Problem, ProblemBody};
use super::view::List;
use super::workers::reason;

/// Something on hold.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct HoldView {
    /// `tenant` or `job`.
    pub kind: String,
    /// Name of the tenant, or id of the job.
    pub name: String,
    /// Whose it is.
    pub tenant: String,
    /// Why.
    pub reason: String,
    /// Who said so.
    pub by: String,
    /// When, milliseconds since the Unix epoch.
    pub since_unix_ms: u64,
}

impl HoldView {
    fn of(held: Holding) -> Self {
        Self {
            kind: held.what.kind().to_owned(),
            name: held.what.name().to_owned(),
            tenant: held.tenant.into(),
            reason: held.reason,
            by: held.by,
            since_unix_ms: held.since_unix_ms,
        }
    }
}

/// The two pieces of the path.
type Pieces = Result<Path<(String, String)>, PathRejection>;

fn pieces(path: Pieces) -> Result<(String, String), Problem> {
    let path = path.map_err(|_| Problem::not_found("thing", "of this name"))?;
    Ok(path.0)
}

fn what(kind: &str, name: &str) -> Result<Hold, Problem> {
    let found = match kind {
        "tenant" => name.parse().ok().map(Hold::Tenant),
        "job" => name.parse().ok().map(Hold::Job),
        _ => return Err(Problem::not_found("kind of hold", kind).hint("there are tenant and job")),
    };
    found.ok_or_else(|| Problem::not_found(kind, name))
}

/// Lists what is on hold.
#[utoipa::path(
    get, path = "/v1/holds", tag = "operators",
    responses(
        (status = 200, description = "All of it", body = List<HoldView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    caller: Caller,
) -> Result<Answer<List<HoldView>>, Problem> {
    caller
        .may(&api, Action::HoldControl, Target::Installation, "holds")
        .await?;
    let holds = api.db().holds().await?;
    let items = holds.into_iter().map(HoldView::of).collect();
    Ok(Answer(StatusCode::OK, List { items, next: None }))
}

/// Why something is put on hold.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewHold {
    /// For whoever asks later; 1 to 500 bytes.
    reason: String,
}

/// Puts a tenant's jobs, or one job, on hold: no sweep takes them, whatever their age. What is on hold already stays as it was put there.
#[utoipa::path(
    put, path = "/v1/holds/{kind}/{name}", tag = "operators",
    params(("kind" = String, Path, description = "`tenant` or `job`"), ("name" = String, Path, description = "Name of the tenant, or id of the job")),
    request_body = NewHold,
    responses(
        (status = 200, description = "The hold", body = HoldView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn set(
    State(api): State<Arc<Api>>,
    caller: Caller,
    path: Pieces,
    Body(asked): Body<NewHold>,
) -> Result<Answer<HoldView>, Problem> {
    let (kind, name) = pieces(path)?;
    let target = format!("hold {kind} {name}");
    caller
        .may(&api, Action::HoldControl, Target::Installation, &target)
        .await?;
    let what = what(&kind, &name)?;
    let why = reason(Some(asked.reason))?.unwrap_or_default();
    if why.trim().is_empty() {
        return Err(Problem::invalid("reason", "say why it is kept"));
    }
    let held = api.db().hold(what, caller.subject(), &why).await;
    let held = held.map_err(|error| match error {
        HoldError::Unknown(what) => Problem::not_found(what.kind(), what.name()),
        HoldError::TooMany => Problem::conflict("too_many", error.to_string()),
        HoldError::Database(error) => error.into(),
    })?;
    Ok(Answer(StatusCode::OK, HoldView::of(held)))
}

/// Ends a hold: from the next sweep on, age takes what it kept.
#[utoipa::path(
    delete, path = "/v1/holds/{kind}/{name}", tag = "operators",
    params(("kind" = String, Path, description = "`tenant` or `job`"), ("name" = String, Path, description = "Name of the tenant, or id of the job")),
    responses(
        (status = 204, description = "It is over"),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn clear(
    State(api): State<Arc<Api>>,
    caller: Caller,
    path: Pieces,
) -> Result<StatusCode, Problem> {
    let (kind, name) = pieces(path)?;
    let target = format!("release {kind} {name}");
    caller
        .may(&api, Action::HoldControl, Target::Installation, &target)
        .await?;
    match api.db().release(what(&kind, &name)?).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Problem::not_found("hold of", &name)),
    }
}
