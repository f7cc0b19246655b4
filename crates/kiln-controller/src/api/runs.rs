//! `POST /v1/runs`: a command in a fresh machine.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{Request, State};
use kiln_core::Action;
use kiln_core::access::Target;
use utoipa::ToSchema;

use super::Api;
use super::ask::{self, Common, RunAsk};
use super::builds::{Ask, read, submit};
use super::caller::Caller;
use super::extract::Answer;
use super::problem::{Problem, ProblemBody};
use super::view::JobView;

/// The parts of an upload.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it only describes the form")]
pub(crate) struct RunForm {
    /// What is asked, as JSON; send it before `source`.
    request: RunAsk,
    /// The files that the command works on: tar, plain or compressed with gzip or zstd.
    #[schema(value_type = String, format = Binary)]
    source: Vec<u8>,
}

impl Ask for RunAsk {
    const WORD: &'static str = "run";
    const SECRETS: bool = false;

    fn common(&mut self) -> &mut Common {
        &mut self.common
    }
}

/// Runs a command in a fresh machine.
///
/// As `multipart/form-data`: `request` (JSON), then `source` (an archive of the files that it works on). As `application/json`: without files.
#[utoipa::path(
    post, path = "/v1/runs", tag = "jobs",
    request_body(content(
        (RunForm = "multipart/form-data"),
        (RunAsk = "application/json"),
    )),
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
    request: Request,
) -> Result<Answer<JobView>, Problem> {
    let key = ask::idempotency_key(request.headers())?;
    let got = read::<RunAsk>(&api, &caller, request).await?;
    let mut kind = got.ask.kind(got.source, api.config.kept)?;
    let (tenant, common) = (&got.tenant, &got.ask.common);
    if got.ask.attend.is_some() && !caller.could(Action::MachineUse, Target::Tenant(tenant)) {
        let why = "whoever submits a command that is attended has to be allowed `machine:use` in its tenant";
        return Err(Problem::forbidden(why)
            .hint("ask an admin for a token with the role and scopes for this"));
    }
    let rule = got.ask.rule(&mut kind, &api.grants().await?, tenant)?;
    let work = (kind, rule);
    submit(&api, &caller, tenant, work, common, key, HashMap::new()).await
}
