//! `/v1/scheduler`: what holds for the whole installation, whichever controller schedules.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use kiln_core::Action;
use kiln_core::access::Target;
use kiln_db::Filling;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Api;
use super::caller::Caller;
use super::extract::{Answer, Body};
use super::problem::{Problem, ProblemBody};
use super::queues::named;
use super::tenants::reserved;

/// What holds for the whole installation.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SchedulerView {
    /// Most jobs that have a worker, of all tenants and queues.
    pub running_max: Option<u32>,
    /// Jobs that have a worker now.
    pub running: u32,
    /// Running jobs that tenants are sure of, together.
    pub reserved: u64,
    /// `spread`: the emptiest host first. `pack`: the fullest, so that hosts become empty.
    pub filling: String,
}

async fn view(api: &Api) -> Result<SchedulerView, Problem> {
    let limits = api.db().global_limits().await?;
    let depths = api.db().depths().await?;
    Ok(SchedulerView {
        running_max: limits.running_max,
        running: depths.iter().map(|depth| depth.running).sum(),
        reserved: reserved(&api.db().tenants().await?),
        filling: match limits.filling {
            Filling::Spread => "spread".to_owned(),
            Filling::Pack => "pack".to_owned(),
        },
    })
}

/// Shows what holds for the whole installation.
#[utoipa::path(
    get, path = "/v1/scheduler", tag = "operators",
    responses(
        (status = 200, description = "Limits and ways", body = SchedulerView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn show(
    State(api): State<Arc<Api>>,
    caller: Caller,
) -> Result<Answer<SchedulerView>, Problem> {
    caller
        .may(&api, Action::QueueRead, Target::Installation, "scheduler")
        .await?;
    Ok(Answer(StatusCode::OK, view(&api).await?))
}

/// What changes; what is left out stays.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct SchedulerChange {
    /// Most jobs that have a worker, of all tenants and queues; null for no bound.
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u32>)]
    running_max: Option<Option<u32>>,
    /// `spread` or `pack`.
    filling: Option<String>,
}

/// Changes what holds for the whole installation, from the next decision on, whichever controller makes it.
#[utoipa::path(
    post, path = "/v1/scheduler", tag = "operators", request_body = SchedulerChange,
    responses(
        (status = 200, description = "Limits and ways", body = SchedulerView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn set(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Body(asked): Body<SchedulerChange>,
) -> Result<Answer<SchedulerView>, Problem> {
    caller
        .may(
            &api,
            Action::QueueControl,
            Target::Installation,
            "scheduler",
        )
        .await?;
    let mut limits = api.db().global_limits().await?;
    match asked.filling.as_deref() {
        None => {}
        Some("spread") => limits.filling = Filling::Spread,
        Some("pack") => limits.filling = Filling::Pack,
        Some(_) => return Err(Problem::invalid("filling", "it is `spread` or `pack`")),
    }
    if let Some(most) = asked.running_max {
        let sure = reserved(&api.db().tenants().await?);
        if let Some(most) = most.filter(|most| u64::from(*most) < sure) {
            let text =
                format!("tenants are sure of {sure} running jobs together, more than {most}");
            return Err(Problem::invalid("running_max", text)
                .hint("lower what they are sure of: `kiln tenant quota TENANT --reserved N`"));
        }
        limits.running_max = most;
    }
    api.db().set_global_limits(limits).await?;
    Ok(Answer(StatusCode::OK, view(&api).await?))
}
