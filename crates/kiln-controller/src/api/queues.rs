//! `/v1/queues`: what waits where; operators pause, resume and bound.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use kiln_core::access::{Target, sees_every_tenant};
use kiln_core::{Action, PoolName, QueueName};
use kiln_db::NameError;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Api;
use super::ask::parsed;
use super::caller::Caller;
use super::extract::{Answer, Body, Named};
use super::problem::{Problem, ProblemBody};
use super::view::{List, QueueView};
use super::workers::reason;

/// Least and most weight.
const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=10_000;

/// Checks a share against others.
pub(crate) fn weight(asked: Option<u32>) -> Result<(), Problem> {
    match asked {
        Some(weight) if !WEIGHTS.contains(&weight) => {
            Err(Problem::invalid("weight", "it is 1 to 10000"))
        }
        _ => Ok(()),
    }
}

/// A limit that was not named stays; null takes it away.
#[expect(
    clippy::option_option,
    reason = "absent and null mean different things"
)]
pub(crate) fn named<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(
    from: D,
) -> Result<Option<Option<T>>, D::Error> {
    Option::<T>::deserialize(from).map(Some)
}

pub(crate) fn refused(error: NameError) -> Problem {
    match error {
        NameError::Unknown { kind, name } => Problem::not_found(kind, &name),
        NameError::Exists { .. } => Problem::conflict("exists", error.to_string()),
        NameError::Database(error) => error.into(),
    }
}

async fn views(api: &Api, caller: &Caller) -> Result<Vec<QueueView>, Problem> {
    let queues = api.db().queues().await?;
    let mut depths = api.db().depths().await?;
    // How much others wait is theirs to know.
    if !sees_every_tenant(&caller.principal, Action::QueueRead) {
        depths.retain(|depth| depth.tenant == *caller.tenant());
    }
    Ok(queues
        .iter()
        .map(|queue| QueueView::of(queue, depths.iter()))
        .collect())
}

/// Lists queues, with how much waits and runs.
#[utoipa::path(
    get, path = "/v1/queues", tag = "operators",
    responses(
        (status = 200, description = "All of them", body = List<QueueView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    caller: Caller,
) -> Result<Answer<List<QueueView>>, Problem> {
    caller
        .acting_for(&api, None, Action::QueueRead, "queues")
        .await?;
    let items = views(&api, &caller).await?;
    Ok(Answer(StatusCode::OK, List { items, next: None }))
}

/// A new queue.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewQueue {
    /// Its name.
    name: String,
    /// The workers its jobs may use; `default` unless named.
    #[serde(default)]
    pool: Option<String>,
}

/// Makes a queue.
#[utoipa::path(
    post, path = "/v1/queues", tag = "operators", request_body = NewQueue,
    responses(
        (status = 201, description = "The queue", body = QueueView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Body(asked): Body<NewQueue>,
) -> Result<Answer<QueueView>, Problem> {
    caller
        .may(
            &api,
            Action::QueueControl,
            Target::Installation,
            &asked.name,
        )
        .await?;
    let name: QueueName = parsed("name", &asked.name)?;
    let pool = match &asked.pool {
        Some(pool) => parsed("pool", pool)?,
        None => PoolName::default_pool(),
    };
    api.db().create_queue(&name, &pool).await.map_err(refused)?;
    let view = one(&api, &caller, &name).await?;
    Ok(Answer(StatusCode::CREATED, view))
}

async fn one(api: &Api, caller: &Caller, name: &QueueName) -> Result<QueueView, Problem> {
    let found = views(api, caller)
        .await?
        .into_iter()
        .find(|view| view.name == name.as_str());
    found.ok_or_else(|| Problem::not_found("queue", name.as_str()))
}

/// What changes; what is left out stays.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct QueueChange {
    /// True: nothing of it begins. False: it goes on.
    paused: Option<bool>,
    /// Why.
    reason: Option<String>,
    /// Share against other queues of a tenant, 1 to 10,000.
    weight: Option<u32>,
    /// Most jobs of it that have a worker; null for no bound.
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u32>)]
    running_max: Option<Option<u32>>,
}

/// Pauses, resumes or bounds a queue.
#[utoipa::path(
    post, path = "/v1/queues/{name}", tag = "operators", params(("name" = String, Path)),
    request_body = QueueChange,
    responses(
        (status = 200, description = "The queue", body = QueueView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn change(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
    Body(asked): Body<QueueChange>,
) -> Result<Answer<QueueView>, Problem> {
    caller
        .may(&api, Action::QueueControl, Target::Installation, &text)
        .await?;
    let nothing = || Problem::not_found("queue", &text);
    let name: QueueName = text.parse().map_err(|_| nothing())?;
    let before = one(&api, &caller, &name).await?;
    let reason = reason(asked.reason)?;
    weight(asked.weight)?;
    if asked.weight.is_some() || asked.running_max.is_some() {
        let weight = asked.weight.unwrap_or(before.weight);
        let most = asked.running_max.unwrap_or(before.running_max);
        let set = api.db().set_queue_limits(&name, weight, most);
        set.await.map_err(refused)?;
    }
    match asked.paused {
        Some(true) => {
            let pause = api
                .db()
                .pause_queue(&name, caller.subject(), reason.as_deref());
            pause.await.map_err(refused)?;
        }
        Some(false) => api.db().resume_queue(&name).await.map_err(refused)?,
        None => {}
    }
    let view = one(&api, &caller, &name).await?;
    Ok(Answer(StatusCode::OK, view))
}
