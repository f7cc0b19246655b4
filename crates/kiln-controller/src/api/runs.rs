//! `POST /v1/runs`: a command in a fresh machine.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::State;
use http::HeaderMap;
use kiln_core::Action;

use super::Api;
use super::ask::{self, RunAsk};
use super::builds::submit;
use super::caller::Caller;
use super::extract::{Answer, Body};
use super::problem::{Problem, ProblemBody};
use super::view::JobView;

/// Runs a command in a fresh machine.
#[utoipa::path(
    post, path = "/v1/runs", tag = "jobs",
    request_body = RunAsk,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same key with the same request gives the same job; 1 to 128 printable characters."), ("traceparent" = Option<String>, Header, description = "W3C trace context: the job is a span below it.")),
    responses(
        (status = 202, description = "Queued", body = JobView),
        (status = 200, description = "The same request came before", body = JobView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(api): State<Arc<Api>>,
    caller: Caller,
    headers: HeaderMap,
    Body(mut asked): Body<RunAsk>,
) -> Result<Answer<JobView>, Problem> {
    asked.common.traceparent = crate::traces::of_headers(&headers);
    let key = ask::idempotency_key(&headers)?;
    let named = asked.common.tenant()?;
    let tenant = caller
        .acting_for(&api, named.as_ref(), Action::JobSubmit, "run")
        .await?;
    let kind = asked.kind()?;
    submit(
        &api,
        &caller,
        &tenant,
        kind,
        &asked.common,
        key,
        HashMap::new(),
    )
    .await
}
