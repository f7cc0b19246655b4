//! `/v1/tenants/{name}/retention`: how long a tenant's finished jobs are kept, and what would go if it were otherwise.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use kiln_core::Action;
use kiln_core::access::Target;
use kiln_db::{Retention, RetentionPlan, Tenant, Tier};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::caller::Caller;
use super::extract::{Answer, Asked, Body, Named};
use super::problem::{Problem, ProblemBody};
use super::queues::refused;
use super::tenants::known;

/// Longest time that anything is kept without a hold: a hundred years.
const KEPT_MAX_MS: u64 = 36_500 * 86_400_000;

/// How long a tenant's finished jobs are kept, counted from their end.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RetentionView {
    /// Whose.
    pub tenant: String,
    /// It has a rule of its own; otherwise this is the installation's.
    pub own: bool,
    /// Milliseconds at hand.
    pub hot_ms: u64,
    /// Milliseconds until log, artifacts and events go.
    pub warm_ms: u64,
    /// Milliseconds until nothing of a job stays.
    pub cold_ms: u64,
    /// Everything of the tenant is on hold: nothing goes, whatever its age.
    pub hold: bool,
}

impl RetentionView {
    fn of(tenant: &Tenant, usual: Retention) -> Self {
        let rule = tenant.retention.unwrap_or(usual);
        Self {
            tenant: tenant.name.to_string(),
            own: tenant.retention.is_some(),
            hot_ms: rule.hot_ms,
            warm_ms: rule.warm_ms,
            cold_ms: rule.cold_ms,
            hold: tenant.hold,
        }
    }
}

/// Another rule; what is left out stays as it is.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct RetentionAsked {
    /// As everybody's again; the times are left out then.
    usual: bool,
    /// Milliseconds at hand, from a job's end.
    hot_ms: Option<u64>,
    /// Milliseconds until log, artifacts and events go, from a job's end.
    warm_ms: Option<u64>,
    /// Milliseconds until nothing of a job stays, from its end.
    cold_ms: Option<u64>,
}

impl RetentionAsked {
    /// The rule that a tenant would have; none: everybody's.
    fn rule(&self, tenant: &Tenant, usual: Retention) -> Result<Option<Retention>, Problem> {
        let asked = [self.hot_ms, self.warm_ms, self.cold_ms];
        let named = asked.iter().flatten().count();
        if self.usual {
            return match named {
                0 => Ok(None),
                _ => Err(Problem::invalid(
                    "usual",
                    "it is everybody's rule, or times",
                )),
            };
        }
        if named == 0 {
            return Ok(tenant.retention);
        }
        let before = tenant.retention.unwrap_or(usual);
        let rule = Retention {
            hot_ms: self.hot_ms.unwrap_or(before.hot_ms),
            warm_ms: self.warm_ms.unwrap_or(before.warm_ms),
            cold_ms: self.cold_ms.unwrap_or(before.cold_ms),
        };
        let times = [
            ("hot_ms", 0, rule.hot_ms),
            ("warm_ms", rule.hot_ms, rule.warm_ms),
            ("cold_ms", rule.warm_ms, rule.cold_ms),
        ];
        for (field, least, asked) in times {
            if asked < least || asked > KEPT_MAX_MS {
                let text =
                    "hot ends before warm, warm before cold, and cold within a hundred years";
                return Err(Problem::invalid(field, text));
            }
        }
        Ok(Some(rule))
    }
}

/// A tenant that the caller may look at.
async fn seen(api: &Api, caller: &Caller, text: &str) -> Result<Tenant, Problem> {
    let name = text
        .parse()
        .map_err(|_| Problem::not_found("tenant", text))?;
    caller
        .acting_for(api, Some(&name), Action::TenantRead, "retention")
        .await?;
    known(api, text).await
}

/// Shows how long a tenant's finished jobs are kept.
#[utoipa::path(
    get, path = "/v1/tenants/{name}/retention", tag = "operators", params(("name" = String, Path)),
    responses(
        (status = 200, description = "The rule", body = RetentionView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn show(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
) -> Result<Answer<RetentionView>, Problem> {
    let tenant = seen(&api, &caller, &text).await?;
    let view = RetentionView::of(&tenant, api.config.retention);
    Ok(Answer(StatusCode::OK, view))
}

/// Keeps a tenant's finished jobs in another way than everybody's, from the next sweep on (within the hour).
#[utoipa::path(
    post, path = "/v1/tenants/{name}/retention", tag = "operators", params(("name" = String, Path)),
    request_body = RetentionAsked,
    responses(
        (status = 200, description = "The rule", body = RetentionView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn set(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
    Body(asked): Body<RetentionAsked>,
) -> Result<Answer<RetentionView>, Problem> {
    let target = format!("{text} retention");
    caller
        .may(&api, Action::TenantControl, Target::Installation, &target)
        .await?;
    let tenant = known(&api, &text).await?;
    let rule = asked.rule(&tenant, api.config.retention)?;
    let set = api.db().set_retention(&tenant.name, rule);
    set.await.map_err(refused)?;
    let tenant = known(&api, &text).await?;
    let view = RetentionView::of(&tenant, api.config.retention);
    Ok(Answer(StatusCode::OK, view))
}

/// A finished job whose time in its tier is over.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AgingView {
    /// Its id.
    pub job: String,
    /// Its title.
    pub name: String,
    /// `hot`, `warm` or `cold`.
    pub from: String,
    /// `warm`, `cold` (log, artifacts and events go), or `gone`: nothing stays.
    pub to: String,
    /// When it ended, milliseconds since the Unix epoch.
    pub finished_unix_ms: u64,
    /// A hold keeps it where it is.
    pub held: bool,
}

/// What would leave its tier with the next sweep.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RetentionPlanView {
    /// Under this rule.
    pub rule: RetentionView,
    /// Jobs that become warm.
    pub to_warm: u64,
    /// Jobs whose log, artifacts and events go.
    pub to_cold: u64,
    /// Jobs of which nothing stays.
    pub gone: u64,
    /// Jobs whose time is over as well, but a hold keeps them.
    pub held: u64,
    /// The first of all these, at most 500, oldest end first.
    pub jobs: Vec<AgingView>,
}

impl RetentionPlanView {
    fn of(rule: RetentionView, plan: RetentionPlan) -> Self {
        let jobs = plan.jobs.into_iter().map(|job| AgingView {
            job: job.job.into(),
            name: job.name,
            from: job.from.name().to_owned(),
            to: job.to.map_or("gone", Tier::name).to_owned(),
            finished_unix_ms: job.finished_unix_ms,
            held: job.held,
        });
        Self {
            rule,
            to_warm: plan.to_warm,
            to_cold: plan.to_cold,
            gone: plan.deleted,
            held: plan.held,
            jobs: jobs.collect(),
        }
    }
}

/// A dry run: what of a tenant's jobs the next sweep would take, with its rule or with the one that is asked. Nothing changes.
#[utoipa::path(
    get, path = "/v1/tenants/{name}/retention/plan", tag = "operators",
    params(("name" = String, Path), RetentionAsked),
    responses(
        (status = 200, description = "What would go", body = RetentionPlanView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn plan(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
    Asked(asked): Asked<RetentionAsked>,
) -> Result<Answer<RetentionPlanView>, Problem> {
    let mut tenant = seen(&api, &caller, &text).await?;
    let usual = api.config.retention;
    tenant.retention = asked.rule(&tenant, usual)?;
    let rule = tenant.retention.unwrap_or(usual);
    let plan = api.db().retention_plan(&tenant.name, rule).await?;
    let plan = plan.ok_or_else(|| Problem::not_found("tenant", &text))?;
    let rule = RetentionView::of(&tenant, usual);
    Ok(Answer(StatusCode::OK, RetentionPlanView::of(rule, plan)))
}
