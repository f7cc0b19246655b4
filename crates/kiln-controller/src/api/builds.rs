//! `POST /v1/builds`: source to image.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{Request, State};
use http::{HeaderMap, StatusCode, header};
use kiln_core::secret::SecretRefused;
use kiln_core::{Action, Digest, JobId, JobKind, SecretName, TenantName};
use kiln_db::{Opened, SubmitError, Submitted};
use serde::de::DeserializeOwned;
use utoipa::ToSchema;

use super::Api;
use super::ask::{self, BuildAsk, Common};
use super::caller::Caller;
use super::extract::{Answer, JSON_MAX, from_slice};
use super::policy::Rule;
use super::ports::SecretsUnheld;
use super::problem::{Problem, ProblemBody};
use super::trust::{Ready, Untrusted};
use super::upload::{self, Form};
use super::view::JobView;
use crate::access::Door;

/// What a part with a secret's value is named: this and the secret's name.
const SECRET_PART: &str = "secret.";

/// The parts of an upload.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it only describes the form")]
pub(crate) struct BuildForm {
    /// What is asked, as JSON; send it before `source`.
    request: BuildAsk,
    /// The source tree: tar, plain or compressed with gzip or zstd.
    #[schema(value_type = String, format = Binary)]
    source: Vec<u8>,
    /// Values of secrets, one part each, named `secret.NAME`.
    #[schema(rename = "secret.NAME")]
    secret: String,
}

/// Everything of a request that may bring a source.
pub(crate) struct Collected<A> {
    pub(crate) ask: A,
    pub(crate) tenant: TenantName,
    pub(crate) source: Option<(Digest, u64)>,
    pub(crate) secrets: HashMap<String, Vec<u8>>,
}

/// What a request with a source asks for.
pub(crate) trait Ask: DeserializeOwned + Default {
    /// What is refused to whoever may not.
    const WORD: &'static str;
    /// Values of secrets may come with it.
    const SECRETS: bool;

    /// What every submission says.
    fn common(&mut self) -> &mut Common;
}

impl Ask for BuildAsk {
    const WORD: &'static str = "build";
    const SECRETS: bool = true;

    fn common(&mut self) -> &mut Common {
        &mut self.common
    }
}

/// Builds an image from an uploaded source tree or a git repository.
///
/// As `multipart/form-data`: `request` (JSON), then `source` (an archive), and values of secrets. As `application/json`: a git URL.
#[utoipa::path(
    post, path = "/v1/builds", tag = "jobs",
    request_body(content(
        (BuildForm = "multipart/form-data"),
        (BuildAsk = "application/json"),
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
    let collected = read::<BuildAsk>(&api, &caller, request).await?;
    let (mut asked, tenant) = (collected.ask, collected.tenant);
    for name in collected.secrets.keys() {
        if !asked.secrets.contains(name) {
            asked.secrets.push(name.clone());
        }
    }
    asked.secrets.sort();
    asked.secrets.dedup();
    let given: Vec<&str> = collected.secrets.keys().map(String::as_str).collect();
    let mut kind = asked.kind(collected.source, &given)?;
    let rule = asked.rule(&mut kind, &api.grants().await?, &tenant)?;
    submit(
        &api,
        &caller,
        &tenant,
        (kind, rule),
        &asked.common,
        key,
        collected.secrets,
    )
    .await
}

/// Reads a request that is JSON alone, or a form with JSON and a source.
pub(crate) async fn read<A: Ask>(
    api: &Api,
    caller: &Caller,
    request: Request,
) -> Result<Collected<A>, Problem> {
    let (parts, body) = request.into_parts();
    let kind = parts.headers.get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let mut got = match kind.trim_start().starts_with("application/json") {
        true => Parts {
            ask: Some(json(body).await?),
            ..Parts::default()
        },
        false => collect(api, caller, &parts.headers, body).await?,
    };
    let mut asked: A = got.ask.take().unwrap_or_default();
    let tenant = match got.tenant {
        Some(tenant) => tenant,
        None => authorise(api, caller, &mut asked).await?,
    };
    if asked
        .common()
        .tenant()?
        .is_some_and(|named| named != tenant)
    {
        return Err(Problem::invalid("tenant", "it came after the source")
            .hint("send the part `request` before the part `source`"));
    }
    asked.common().traceparent = crate::traces::of_headers(&parts.headers);
    Ok(Collected {
        ask: asked,
        tenant,
        source: got.source,
        secrets: got.secrets,
    })
}

async fn json<A: Ask>(body: axum::body::Body) -> Result<A, Problem> {
    let bytes = axum::body::to_bytes(body, JSON_MAX).await;
    let bytes = bytes.map_err(|error| {
        if upload::is_stalled(&error) {
            upload::stalled()
        } else {
            Problem::too_large(format!("a request has at most {JSON_MAX} bytes"))
        }
    })?;
    from_slice(&bytes)
}

async fn authorise<A: Ask>(
    api: &Api,
    caller: &Caller,
    asked: &mut A,
) -> Result<TenantName, Problem> {
    let named = asked.common().tenant()?;
    caller
        .acting_for(api, named.as_ref(), Action::JobSubmit, A::WORD)
        .await
}

/// Parts of a form, as far as they came.
struct Parts<A> {
    ask: Option<A>,
    tenant: Option<TenantName>,
    source: Option<(Digest, u64)>,
    secrets: HashMap<String, Vec<u8>>,
}

impl<A> Default for Parts<A> {
    fn default() -> Self {
        Self {
            ask: None,
            tenant: None,
            source: None,
            secrets: HashMap::new(),
        }
    }
}

async fn collect<A: Ask>(
    api: &Api,
    caller: &Caller,
    headers: &HeaderMap,
    body: axum::body::Body,
) -> Result<Parts<A>, Problem> {
    let mut form = Form::new(api, caller.tenant(), headers, body)?;
    let mut got = Parts::<A>::default();
    let twice = |name: &str| Problem::invalid(name, "there are two parts of this name");
    while let Some((name, field)) = form.next(api).await? {
        match name.as_str() {
            "request" if got.ask.is_some() => return Err(twice("request")),
            "request" => {
                let mut asked: A = from_slice(&form.small(api, field).await?)?;
                if got.source.is_none() {
                    got.tenant = Some(authorise(api, caller, &mut asked).await?);
                }
                got.ask = Some(asked);
            }
            "source" if got.source.is_some() => return Err(twice("source")),
            "source" => {
                let tenant = match &got.tenant {
                    Some(tenant) => tenant.clone(),
                    None => authorise(api, caller, &mut A::default()).await?,
                };
                got.source = Some(upload::source(api, &tenant, field).await?);
                got.tenant = Some(tenant);
            }
            other => {
                let secret = other.strip_prefix(SECRET_PART).filter(|_| A::SECRETS);
                let Some(secret) = secret else {
                    let parts = match A::SECRETS {
                        true => "the parts are request, source and secret.NAME",
                        false => "the parts are request and source",
                    };
                    return Err(upload::no_such_part(other).hint(parts));
                };
                let value = form.small(api, field).await?;
                if got.secrets.insert(secret.to_owned(), value).is_some() {
                    return Err(twice(other));
                }
            }
        }
    }
    Ok(got)
}

/// A new id: `b` for builds, `r` for runs, `j` else.
pub(crate) fn new_id(api: &Api, kind: &JobKind) -> JobId {
    let prefix = match kind {
        JobKind::SourceBuild(_) | JobKind::ImageBuild(_) => 'b',
        JobKind::Run(_) => 'r',
    };
    let mut random = [0; 5];
    // Ids need to differ, not to be secret: the time alone is enough for that if randomness fails.
    let _filled = getrandom::fill(&mut random);
    JobId::new(prefix, api.now_ms(), random)
}

/// Queues a job; its secrets are held before anybody can lease it.
pub(crate) async fn submit(
    api: &Api,
    caller: &Caller,
    tenant: &TenantName,
    (kind, mut rule): (JobKind, Rule),
    common: &Common,
    key: Option<String>,
    secrets: HashMap<String, Vec<u8>>,
) -> Result<Answer<JobView>, Problem> {
    let id = new_id(api, &kind);
    let mut notes = std::mem::take(&mut rule.notes);
    let ready = ask::new_job(&api.config, caller, tenant, (kind, rule), common, key, id)?;
    notes.extend(ready.untrusted.as_ref().and_then(Untrusted::note));
    let mut answer = submit_ready(api, ready, secrets).await?;
    answer.1.notes = notes;
    Ok(answer)
}

/// Queues what is already a request.
pub(crate) async fn submit_ready(
    api: &Api,
    ready: Ready,
    secrets: HashMap<String, Vec<u8>>,
) -> Result<Answer<JobView>, Problem> {
    let new = &ready.new;
    let id = new.request.id.clone();
    let held = !secrets.is_empty();
    if held {
        api.backend()
            .hold_secrets(&new.request.tenant, &id, secrets)
            .map_err(|why| match why {
                SecretsUnheld::TooLarge(why) => Problem::too_large(why).field("secrets"),
                SecretsUnheld::Full(why) => Problem::too_many("secrets", why),
            })?;
    }
    let submitted = queue(api, ready).await;
    if held && !matches!(&submitted, Ok(submitted) if !submitted.repeated) {
        api.backend().forget_secrets(&id);
    }
    let submitted = submitted?;
    let attempts = api.db().attempts(&submitted.job.request.id).await?;
    let status = if submitted.repeated {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    Ok(Answer(status, JobView::of(&submitted.job, &attempts)))
}

/// A job that names a secret it cannot have is not queued; that it was asked for is an audit row.
async fn secret_refused(
    api: &Api,
    Ready { new, untrusted }: &Ready,
    name: &SecretName,
    opened: &Opened,
) -> Result<Problem, Problem> {
    let code = opened.refused();
    api.backend().count(Door::User, "secret:use", code);
    let row = crate::stored::refusal(new, name, opened);
    api.db().audit(row).await?;
    let refused = |why: &str| {
        let detail = format!("this job may not have the secret {name}: {why}");
        Problem::new(StatusCode::FORBIDDEN, "secret_refused", detail)
    };
    Ok(match (opened, untrusted) {
        (Opened::Refused(why @ SecretRefused::Untrusted), Some(untrusted)) => {
            refused(&format!("{why}, and {untrusted}")).hint(untrusted.hint())
        }
        (Opened::Refused(why), _) => {
            refused(&why.to_string()).hint("`kiln secret list` shows who may have it")
        }
        _ => Problem::invalid("secrets", format!("there is no secret {name}")).hint(
            "`kiln secret set NAME` keeps one; a build may also bring the value with its request",
        ),
    })
}

/// Queues a build for a caller that is already authorised.
pub(crate) async fn submit_asked(
    api: &Api,
    caller: &Caller,
    tenant: &TenantName,
    asked: &BuildAsk,
    source: Option<(Digest, u64)>,
) -> Result<kiln_db::Job, Problem> {
    let mut kind = asked.kind(source, &[])?;
    let rule = asked.rule(&mut kind, &api.grants().await?, tenant)?;
    let id = new_id(api, &kind);
    let work = (kind, rule);
    let ready = ask::new_job(&api.config, caller, tenant, work, &asked.common, None, id)?;
    Ok(queue(api, ready).await?.job)
}

async fn queue(api: &Api, ready: Ready) -> Result<Submitted, Problem> {
    if let Some((name, opened)) = api.db().refused_secret(&ready.new.request).await? {
        return Err(secret_refused(api, &ready, &name, &opened).await?);
    }
    api.db().submit(ready.new).await.map_err(|error| {
        let refused = |code: &'static str| {
            api.backend()
                .count(Door::User, Action::JobSubmit.name(), Some(code));
        };
        match error {
            SubmitError::KeyConflict { .. } => {
                refused("key_conflict");
                Problem::new(
                    StatusCode::UNPROCESSABLE_ENTITY,
                    "idempotency_conflict",
                    "this Idempotency-Key was used for another request",
                )
                .hint("use a new key for a new request")
            }
            SubmitError::Exists(_) => Problem::conflict("exists", "there is a job of this id"),
            SubmitError::UnknownTenant(name) => {
                Problem::invalid("tenant", format!("there is no tenant {name}"))
                    .hint("an admin makes one with `kiln tenant create`")
            }
            SubmitError::UnknownQueue(name) => {
                Problem::invalid("queue", format!("there is no queue {name}"))
                    .hint("`kiln queue list` shows the queues; an operator makes one with `kiln queue create`")
            }
            SubmitError::TooManyPending { pending, limit, .. } => {
                refused("pending_quota");
                Problem::too_many(
                    "pending_quota",
                    format!("{pending} jobs of this tenant wait already, at most {limit} may"),
                )
                .hint("wait until some of them began, or have an operator raise it with `kiln tenant quota TENANT --pending N`")
                .retry_after(10)
            }
            SubmitError::TooMuchStored { .. } => upload::full(api),
            SubmitError::Database(error) => error.into(),
        }
    })
}
