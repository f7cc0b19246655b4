//! `/v1/workers`: operators see and steer the fleet.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use kiln_core::access::Target;
use kiln_core::dispatch::WorkerState;
use kiln_core::{Action, PoolName, WorkerId};
use kiln_db::{Worker, WorkerError};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::caller::Caller;
use super::extract::{Answer, Asked, Body, Named};
use super::problem::{Problem, ProblemBody};
use super::view::{List, WorkerView};

/// Longest reason.
pub(crate) const REASON_MAX: usize = 500;

/// Which workers.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct WorkersAsked {
    /// Of this pool.
    pool: Option<String>,
}

/// Lists workers, removed ones aside.
#[utoipa::path(
    get, path = "/v1/workers", tag = "operators", params(WorkersAsked),
    responses(
        (status = 200, description = "All of them", body = List<WorkerView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Asked(asked): Asked<WorkersAsked>,
) -> Result<Answer<List<WorkerView>>, Problem> {
    caller
        .may(&api, Action::WorkerRead, Target::Installation, "workers")
        .await?;
    let pool: Option<PoolName> = asked.pool.map(|pool| pool.parse()).transpose().map_err(
        |error: kiln_core::id::ParseIdError| Problem::invalid("pool", error.to_string()),
    )?;
    let workers = api.db().workers(pool.as_ref()).await?;
    let list = List {
        items: workers.iter().map(WorkerView::of).collect(),
        next: None,
    };
    Ok(Answer(StatusCode::OK, list))
}

async fn find(api: &Api, caller: &Caller, name: &str, action: Action) -> Result<Worker, Problem> {
    caller.may(api, action, Target::Installation, name).await?;
    let nothing = || Problem::not_found("worker", name);
    let id: WorkerId = name.parse().map_err(|_| nothing())?;
    let found = api.db().worker(&id).await?;
    found
        .filter(|worker| worker.removed_unix_ms.is_none())
        .ok_or_else(nothing)
}

/// Shows one worker.
#[utoipa::path(
    get, path = "/v1/workers/{id}", tag = "operators", params(("id" = String, Path)),
    responses(
        (status = 200, description = "The worker", body = WorkerView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn show(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(name): Named,
) -> Result<Answer<WorkerView>, Problem> {
    let worker = find(&api, &caller, &name, Action::WorkerRead).await?;
    Ok(Answer(StatusCode::OK, WorkerView::of(&worker)))
}

/// What a worker is to be.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct WorkerChange {
    /// `active` (resume), `draining`, `cordoned` or `quarantined`.
    state: String,
    /// Why.
    #[serde(default)]
    reason: Option<String>,
}

pub(crate) fn reason(text: Option<String>) -> Result<Option<String>, Problem> {
    if text
        .as_ref()
        .is_some_and(|text| text.len() > REASON_MAX || text.contains('\0'))
    {
        return Err(Problem::invalid(
            "reason",
            format!("it has at most {REASON_MAX} bytes"),
        ));
    }
    Ok(text.map(|text| text.chars().filter(|c| !kiln_policy::unseen(*c)).collect()))
}

fn refused(error: WorkerError, name: &str) -> Problem {
    match error {
        WorkerError::Unknown(_) => Problem::not_found("worker", name),
        WorkerError::NotAnOrder => Problem::invalid("state", error.to_string()),
        WorkerError::Database(error) => error.into(),
    }
}

/// Drains, cordons, quarantines or resumes a worker.
#[utoipa::path(
    post, path = "/v1/workers/{id}/state", tag = "operators", params(("id" = String, Path)),
    request_body = WorkerChange,
    responses(
        (status = 200, description = "The worker", body = WorkerView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn change(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(name): Named,
    Body(asked): Body<WorkerChange>,
) -> Result<Answer<WorkerView>, Problem> {
    let worker = find(&api, &caller, &name, Action::WorkerControl).await?;
    let state = match asked.state.as_str() {
        "active" => WorkerState::Active,
        "draining" => WorkerState::Draining,
        "cordoned" => WorkerState::Cordoned,
        "quarantined" => WorkerState::Quarantined,
        _ => {
            return Err(Problem::invalid(
                "state",
                "it is active, draining, cordoned or quarantined",
            ));
        }
    };
    let reason = reason(asked.reason)?;
    let by = caller.subject();
    let set = api
        .db()
        .set_worker_state(&worker.id, state, by, reason.as_deref());
    set.await.map_err(|error| refused(error, &name))?;
    let worker = api.db().worker(&worker.id).await?;
    let worker = worker.ok_or_else(|| Problem::not_found("worker", &name))?;
    Ok(Answer(StatusCode::OK, WorkerView::of(&worker)))
}

/// Removes a worker: its leases are refused and its key opens nothing from now on.
#[utoipa::path(
    delete, path = "/v1/workers/{id}", tag = "operators", params(("id" = String, Path)),
    responses(
        (status = 204, description = "Removed"),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn remove(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(name): Named,
) -> Result<StatusCode, Problem> {
    let worker = find(&api, &caller, &name, Action::WorkerEnrol).await?;
    let removed = api.db().remove_worker(&worker.id).await;
    removed.map_err(|error| refused(error, &name))?;
    Ok(StatusCode::NO_CONTENT)
}
