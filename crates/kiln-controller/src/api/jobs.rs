//! `/v1/jobs`: lists, one job, cancel, retry.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use axum::extract::State;
use http::{HeaderMap, StatusCode};
use kiln_core::Digest;
use kiln_core::access::sees_every_tenant;
use kiln_core::job::{Source, TrustClass};
use kiln_core::{Action, JobRequest, JobState, TenantName};
use kiln_db::{CancelError, Cancelled, Cursor, Idempotency, JobFilter, NewJob};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::ask::{self, KeepAsk};
use super::builds::new_id;
use super::caller::Caller;
use super::cursor;
use super::extract::{Answer, Asked, Body, Named};
use super::problem::{Problem, ProblemBody};
use super::trust::{Ready, may_learn, settle, trust_of};
use super::view::{JobLine, JobView, List};

/// Rows of a page unless asked otherwise.
const PAGE: u32 = 50;
/// Longest reason for a cancel.
const REASON_MAX: usize = 500;

/// Which jobs.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListAsked {
    /// Of this tenant; an operator sees all when it names none.
    tenant: Option<String>,
    /// In this queue.
    queue: Option<String>,
    /// In one of these states, separated by commas: `queued`, `leased`, `running`, `finished`.
    state: Option<String>,
    /// Finished so: `passed`, or a failure class.
    verdict: Option<String>,
    /// With this tag.
    tag: Option<String>,
    /// With this label, `name=value`.
    label: Option<String>,
    /// Asked for by.
    submitted_by: Option<String>,
    /// On this worker, now or last.
    worker: Option<String>,
    /// Most rows, 1 to 500.
    #[param(minimum = 1, maximum = 500)]
    limit: Option<u32>,
    /// `next` of the page before.
    cursor: Option<String>,
}

fn field<T: std::str::FromStr>(name: &str, text: Option<&String>) -> Result<Option<T>, Problem>
where
    T::Err: std::fmt::Display,
{
    text.map(|text| text.parse())
        .transpose()
        .map_err(|error: T::Err| Problem::invalid(name, error.to_string()))
}

impl ListAsked {
    fn filter(&self, tenant: Option<TenantName>) -> Result<JobFilter, Problem> {
        let states: BTreeSet<String> = self
            .state
            .iter()
            .flat_map(|text| text.split(','))
            .map(|word| word.trim().to_owned())
            .filter(|word| !word.is_empty())
            .collect();
        let known = ["queued", "leased", "running", "finished"];
        if states.iter().any(|state| !known.contains(&state.as_str())) {
            return Err(Problem::invalid(
                "state",
                "states are queued, leased, running, finished",
            ));
        }
        let word = |b: u8| b.is_ascii_lowercase() || b == b'_';
        if self
            .verdict
            .as_ref()
            .is_some_and(|v| v.len() > 40 || !v.bytes().all(word))
        {
            return Err(Problem::invalid(
                "verdict",
                "it is `passed` or a failure class",
            ));
        }
        let by = self.submitted_by.as_ref();
        if by.is_some_and(|by| by.len() > 400 || by.contains('\0')) {
            return Err(Problem::invalid("submitted_by", "it is too long"));
        }
        let label = match self.label.as_deref().map(|text| text.split_once('=')) {
            None => None,
            Some(None) => return Err(Problem::invalid("label", "write name=value")),
            Some(Some((name, value))) => {
                let wrong = |error: kiln_core::dispatch::ParseLabelError| {
                    Problem::invalid("label", error.to_string())
                };
                Some((name.parse().map_err(wrong)?, value.parse().map_err(wrong)?))
            }
        };
        Ok(JobFilter {
            tenant,
            queue: field("queue", self.queue.as_ref())?,
            states,
            verdict: self.verdict.clone(),
            tag: field("tag", self.tag.as_ref())?,
            label,
            submitted_by: by.cloned(),
            worker: field("worker", self.worker.as_ref())?,
        })
    }
}

/// Lists jobs, newest first.
#[utoipa::path(
    get, path = "/v1/jobs", tag = "jobs", params(ListAsked),
    responses(
        (status = 200, description = "A page", body = List<JobLine>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Asked(asked): Asked<ListAsked>,
) -> Result<Answer<List<JobLine>>, Problem> {
    let named = field::<TenantName>("tenant", asked.tenant.as_ref())?;
    let tenant = if named.is_none() && sees_every_tenant(&caller.principal, Action::JobRead) {
        caller
            .acting_for(&api, None, Action::JobRead, "jobs of every tenant")
            .await?;
        None
    } else {
        Some(
            caller
                .acting_for(&api, named.as_ref(), Action::JobRead, "jobs")
                .await?,
        )
    };
    let filter = asked.filter(tenant)?;
    let limit = asked.limit.unwrap_or(PAGE);
    if !(1..=kiln_db::PAGE_MAX).contains(&limit) {
        return Err(Problem::invalid(
            "limit",
            format!("it is 1 to {}", kiln_db::PAGE_MAX),
        ));
    }
    // A cursor belongs to its list: the same filter, for the same tenant's eyes.
    let place = format!("jobs {} {filter:?}", caller.tenant());
    let key = api.access().cursor_key();
    let after: Option<Cursor> = match &asked.cursor {
        None => None,
        Some(text) => Some(
            cursor::open(key, &place, text)?
                .parse()
                .map_err(|_| Problem::invalid("cursor", "this is not a cursor of this list"))?,
        ),
    };
    let page = api.db().jobs(&filter, after.as_ref(), limit).await?;
    Ok(Answer(
        StatusCode::OK,
        List {
            items: page.items.iter().map(JobLine::of).collect(),
            next: page
                .next
                .map(|next| cursor::seal(key, &place, &next.to_string())),
        },
    ))
}

/// Shows one job.
#[utoipa::path(
    get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = String, Path)),
    responses(
        (status = 200, description = "The job", body = JobView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn show(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
) -> Result<Answer<JobView>, Problem> {
    let job = caller.job(&api, &id, Action::JobRead).await?;
    let attempts = api.db().attempts(&job.request.id).await?;
    Ok(Answer(StatusCode::OK, JobView::of(&job, &attempts)))
}

/// Why a job is cancelled.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct CancelAsked {
    /// In a few words.
    reason: Option<String>,
}

/// What came of a cancel.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct CancelAnswer {
    /// The job.
    id: String,
    /// `cancelled`: it waited and is over. `cancelling`: its worker is told.
    result: String,
}

/// Cancels a job. Again is no error; a job that ended otherwise is a conflict.
#[utoipa::path(
    delete, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = String, Path), CancelAsked),
    responses(
        (status = 200, description = "It is over", body = CancelAnswer),
        (status = 202, description = "Its worker is told", body = CancelAnswer),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn cancel(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
    Asked(asked): Asked<CancelAsked>,
) -> Result<Answer<CancelAnswer>, Problem> {
    let (status, result) = cancelled(&api, &caller, &id, asked.reason.as_deref()).await?;
    let answer = CancelAnswer {
        id,
        result: result.to_owned(),
    };
    Ok(Answer(status, answer))
}

pub(crate) async fn cancelled(
    api: &Api,
    caller: &Caller,
    id: &str,
    reason: Option<&str>,
) -> Result<(StatusCode, &'static str), Problem> {
    use kiln_core::{FailureClass, Verdict};
    let job = caller.job(api, id, Action::JobCancel).await?;
    let reason: Option<String> = reason.map(|reason| {
        reason
            .chars()
            .filter(|c| !kiln_policy::unseen(*c))
            .take(REASON_MAX)
            .collect()
    });
    let done = api
        .db()
        .cancel(&job.request.id, caller.subject(), reason.as_deref())
        .await
        .map_err(|error| match error {
            CancelError::UnknownJob(_) => Problem::not_found("job", id),
            CancelError::Database(error) => error.into(),
        })?;
    match done {
        Cancelled::Ended => Ok((StatusCode::OK, "cancelled")),
        Cancelled::Asked => Ok((StatusCode::ACCEPTED, "cancelling")),
        Cancelled::TooLate(outcome) => match &outcome.verdict {
            Verdict::Failed { class, .. } if *class == FailureClass::Cancelled => {
                Ok((StatusCode::OK, "cancelled"))
            }
            Verdict::Passed => Err(Problem::conflict("finished", "the job has passed already")),
            Verdict::Failed { .. } => {
                Err(Problem::conflict("finished", "the job has failed already"))
            }
        },
    }
}

/// What is different when a job is queued again.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RetryAsk {
    /// Of a run: its machine stays when it is over. None: as the job had it.
    keep: Option<KeepAsk>,
}

/// Queues a finished job again, as a new one. Not one that a command ran itself (`own`): only such a command can run it again.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/retry", tag = "jobs", request_body = RetryAsk,
    params(
        ("id" = String, Path),
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 128 printable characters."),
    ),
    responses(
        (status = 202, description = "Queued", body = JobView),
        (status = 200, description = "The same request came before", body = JobView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn retry(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
    headers: HeaderMap,
    Body(wish): Body<RetryAsk>,
) -> Result<Answer<JobView>, Problem> {
    let job = caller.job(&api, &id, Action::JobSubmit).await?;
    if !matches!(job.state, JobState::Finished { .. }) {
        return Err(Problem::conflict("unfinished", "the job is not over yet"));
    }
    let key = ask::idempotency_key(&headers)?;
    can_be_retried(&api, &job.request).await?;
    let mut request = job.request.clone();
    request.id = new_id(&api, &request.kind);
    if let Some(keep) = &wish.keep {
        let kiln_core::JobKind::Run(run) = &mut request.kind else {
            return Err(Problem::invalid("keep", "only a run's machine stays"));
        };
        run.keep = Some(keep.keep(api.config.kept)?);
    }
    // Today's token, grant and limits decide, not those of then.
    let grants = api.grants().await?;
    let source = kiln_policy::trusted_source(&request.kind, &grants, &request.tenant);
    let then = (request.trust == TrustClass::Untrusted).then_some("untrusted");
    let trust = trust_of(&caller, then, source)?;
    let policy_ref = kiln_policy::policy_ref(&request.kind, &grants, &request.tenant);
    let (trust, untrusted) = settle(&mut request.kind, trust, policy_ref);
    request.trust = trust;
    let (max, applied) = super::policy::still_stands(&request, &grants)?;
    request.policy = applied;
    may_learn(&request, untrusted.as_ref())?;
    let phases = match &request.kind {
        kiln_core::JobKind::Run(run) => &run.phases[..],
        _ => &[],
    };
    let most = &api.config.ceiling.limits;
    let asked = kiln_core::access::Asked {
        phases: phases.iter().map(|phase| phase.network.clone()).collect(),
        cpus: Some(request.limits.cpus.min(most.cpus)),
        memory: Some(request.limits.memory.min(most.memory)),
        disk: Some(request.limits.disk.min(most.disk)),
        timeout_ms: Some(request.limits.timeout_ms.min(most.timeout_ms)),
        network_bits: request
            .network_bits
            .map(|bits| bits.min(api.config.ceiling.network_bits)),
        network: request.network.clone(),
        priority: request.dispatch.priority.min(caller.principal.priority_max),
    };
    let granted = api
        .config
        .ceiling
        .narrow(
            &asked,
            &api.config.defaults(&request.kind),
            caller.principal.priority_max,
        )
        .map_err(|outside| Problem::invalid(outside.field, outside.bounds()))?;
    request.limits = granted.limits;
    kiln_policy::below(&mut request.limits, &max);
    request.needs_its_generation();
    request.network_bits = Some(granted.network_bits);
    request.dispatch.priority = granted.priority;
    let new = NewJob {
        idempotency: key.map(|key| Idempotency {
            key,
            body: Digest::of(format!("retry {id}{}", kept_words(&wish)).as_bytes()),
        }),
        submitted_by: caller.subject().to_owned(),
        notify_url: job.notify_url.clone(),
        labels: job.labels.clone(),
        request,
    };
    super::builds::submit_ready(&api, Ready { new, untrusted }, HashMap::new()).await
}

/// Tells one wish from another, for keys that come twice; nothing where there is none.
fn kept_words(asked: &RetryAsk) -> String {
    match &asked.keep {
        None => String::new(),
        Some(keep) => format!(" {:?} {}", keep.seconds, keep.on_failure_only),
    }
}

/// What a job needs that is not in its row. One without it would fail on every host, as the host's fault.
async fn can_be_retried(api: &Api, request: &JobRequest) -> Result<(), Problem> {
    if request.dispatch.requires.own().is_some() {
        // No worker would ever take it.
        let why = "this job belonged to a command that ran it itself, and that command is over";
        let line = super::command_line(request);
        return Err(Problem::conflict("own", why).hint(format!("type it again: {line}")));
    }
    if request.attend().is_some() {
        let why = "whoever submitted this job held its command's streams, and what came on them is not kept";
        let line = super::command_line(request);
        return Err(Problem::conflict("attended", why).hint(format!("type it again: {line}")));
    }
    let Some(Source::Tree { digest, .. }) = request.kind.source() else {
        return Ok(());
    };
    let kept = api.backend().keep_source(&request.tenant, digest).await;
    match kept.map_err(|error| Problem::unavailable(&error))? {
        true => Ok(()),
        false => Err(
            Problem::conflict("source_gone", "the job's source is not kept any more")
                .hint("send the request again, with its source"),
        ),
    }
}
