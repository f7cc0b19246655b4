//! `/v1/tenants`: quotas, weights, usage.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use kiln_core::access::{Target, sees_every_tenant};
use kiln_core::{Action, TenantName};
use kiln_db::{Quota, Tenant};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::ask::parsed;
use super::caller::Caller;
use super::extract::{Answer, Asked, Body, Named};
use super::problem::{Problem, ProblemBody};
use super::queues::{named, refused, weight};
use super::view::{List, TenantView, UsageView};

/// Usage is of the last 30 days unless asked otherwise.
const USAGE_MS: u64 = 30 * 86_400_000;

/// Lists tenants: all for operators, else the caller's own.
#[utoipa::path(
    get, path = "/v1/tenants", tag = "operators",
    responses(
        (status = 200, description = "All that the caller may see", body = List<TenantView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    caller: Caller,
) -> Result<Answer<List<TenantView>>, Problem> {
    let own = caller
        .acting_for(&api, None, Action::TenantRead, "tenants")
        .await?;
    let all = sees_every_tenant(&caller.principal, Action::TenantRead);
    let tenants = api.db().tenants().await?;
    let seen = tenants.iter().filter(|tenant| all || tenant.name == own);
    let items = seen.map(TenantView::of).collect();
    Ok(Answer(StatusCode::OK, List { items, next: None }))
}

/// A new tenant.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewTenant {
    /// Its name.
    name: String,
    /// Most jobs of it that have a worker.
    #[serde(default)]
    running_max: Option<u32>,
    /// How many more may run when what they use would otherwise be idle.
    #[serde(default)]
    burst: u32,
    /// Running jobs it is sure of.
    #[serde(default)]
    reserved: u32,
    /// Most jobs of it that wait: 10,000 unless named; null for no bound.
    #[serde(
        default,
        deserialize_with = "named",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u32>)]
    pending_max: Option<Option<u32>>,
    /// Most bytes of its uploads and of its jobs' requests: 20 GiB unless named; null for no bound.
    #[serde(
        default,
        deserialize_with = "named",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u64>)]
    stored_max: Option<Option<u64>>,
}

/// Makes a tenant.
#[utoipa::path(
    post, path = "/v1/tenants", tag = "operators", request_body = NewTenant,
    responses(
        (status = 201, description = "The tenant", body = TenantView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Body(asked): Body<NewTenant>,
) -> Result<Answer<TenantView>, Problem> {
    caller
        .may(
            &api,
            Action::TenantControl,
            Target::Installation,
            &asked.name,
        )
        .await?;
    let name: TenantName = parsed("name", &asked.name)?;
    let usual = Quota::usual();
    let quota = Quota {
        running_max: asked.running_max,
        burst: asked.burst,
        reserved: asked.reserved,
        pending_max: asked.pending_max.unwrap_or(usual.pending_max),
        stored_max: asked.stored_max.unwrap_or(usual.stored_max),
    };
    sensible(&api, &name, quota).await?;
    api.db()
        .create_tenant(&name, quota)
        .await
        .map_err(refused)?;
    Ok(Answer(StatusCode::CREATED, one(&api, &name).await?))
}

/// A tenant that is there.
pub(crate) async fn known(api: &Api, text: &str) -> Result<Tenant, Problem> {
    let all = api.db().tenants().await?;
    let found = all.into_iter().find(|tenant| tenant.name.as_str() == text);
    found.ok_or_else(|| Problem::not_found("tenant", text))
}

async fn one(api: &Api, name: &TenantName) -> Result<TenantView, Problem> {
    known(api, name.as_str())
        .await
        .map(|tenant| TenantView::of(&tenant))
}

/// Whether a quota can be kept as it says.
async fn sensible(api: &Api, name: &TenantName, quota: Quota) -> Result<(), Problem> {
    if quota.burst > 0 && quota.running_max.is_none() {
        let text = "it is how many more than `running_max` may run: name that, too";
        return Err(Problem::invalid("burst", text));
    }
    let most = quota
        .running_max
        .map(|most| most.saturating_add(quota.burst));
    if most.is_some_and(|most| quota.reserved > most) {
        let text = "it is sure of more running jobs than it may have";
        return Err(Problem::invalid("reserved", text));
    }
    let mut tenants = api.db().tenants().await?;
    tenants.retain(|tenant| tenant.name != *name);
    let others = reserved(&tenants);
    let all = others.saturating_add(quota.reserved.into());
    match api.db().global_limits().await?.running_max {
        Some(most) if quota.reserved > 0 && all > most.into() => Err(Problem::invalid(
            "reserved",
            format!("other tenants are sure of {others} running jobs, and at most {most} run"),
        )
        .hint("raise the limit of the installation: `kiln scheduler set --running N`")),
        _ => Ok(()),
    }
}

/// Running jobs that tenants are sure of, together.
pub(crate) fn reserved(tenants: &[Tenant]) -> u64 {
    let each = tenants
        .iter()
        .map(|tenant| u64::from(tenant.quota.reserved));
    each.sum()
}

/// What changes; what is left out stays.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct TenantChange {
    /// Share against others, 1 to 10,000.
    weight: Option<u32>,
    /// Most jobs of it that have a worker; null for no bound.
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u32>)]
    running_max: Option<Option<u32>>,
    /// How many more may run when what they use would otherwise be idle.
    burst: Option<u32>,
    /// Running jobs it is sure of.
    reserved: Option<u32>,
    /// Most jobs of it that wait; null for no bound.
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u32>)]
    pending_max: Option<Option<u32>>,
    /// Most bytes of its uploads and of its jobs' requests; null for no bound.
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    stored_max: Option<Option<u64>>,
}

/// Changes a tenant's quota or weight; from the next decision on.
#[utoipa::path(
    post, path = "/v1/tenants/{name}", tag = "operators", params(("name" = String, Path)),
    request_body = TenantChange,
    responses(
        (status = 200, description = "The tenant", body = TenantView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn change(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
    Body(asked): Body<TenantChange>,
) -> Result<Answer<TenantView>, Problem> {
    caller
        .may(&api, Action::TenantControl, Target::Installation, &text)
        .await?;
    let name: TenantName = text
        .parse()
        .map_err(|_| Problem::not_found("tenant", &text))?;
    let before = known(&api, name.as_str()).await?.quota;
    weight(asked.weight)?;
    let quota = Quota {
        running_max: asked.running_max.unwrap_or(before.running_max),
        burst: asked.burst.unwrap_or(before.burst),
        reserved: asked.reserved.unwrap_or(before.reserved),
        pending_max: asked.pending_max.unwrap_or(before.pending_max),
        stored_max: asked.stored_max.unwrap_or(before.stored_max),
    };
    if quota != before {
        sensible(&api, &name, quota).await?;
        api.db().set_quota(&name, quota).await.map_err(refused)?;
    }
    if let Some(weight) = asked.weight {
        let set = api.db().set_tenant_weight(&name, weight);
        set.await.map_err(refused)?;
    }
    Ok(Answer(StatusCode::OK, one(&api, &name).await?))
}

/// Which time.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct UsageAsked {
    /// From, milliseconds since the Unix epoch; 30 days ago unless named.
    from_unix_ms: Option<u64>,
    /// Until; now unless named.
    until_unix_ms: Option<u64>,
}

/// What a tenant used.
#[utoipa::path(
    get, path = "/v1/tenants/{name}/usage", tag = "operators",
    params(("name" = String, Path), UsageAsked),
    responses(
        (status = 200, description = "Sums", body = UsageView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn usage(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
    Asked(asked): Asked<UsageAsked>,
) -> Result<Answer<UsageView>, Problem> {
    let name: TenantName = text
        .parse()
        .map_err(|_| Problem::not_found("tenant", &text))?;
    caller
        .acting_for(&api, Some(&name), Action::TenantRead, "usage")
        .await?;
    one(&api, &name).await?;
    let until = asked.until_unix_ms.unwrap_or(api.now_ms());
    let from = asked.from_unix_ms.unwrap_or(until.saturating_sub(USAGE_MS));
    if until > i64::MAX as u64 || from > until {
        return Err(Problem::invalid(
            "from_unix_ms",
            "the time begins after it ends",
        ));
    }
    let usage = api.db().usage(&name, from, until).await?;
    Ok(Answer(StatusCode::OK, UsageView::of(&usage)))
}
