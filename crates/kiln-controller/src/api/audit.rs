//! `GET /v1/audit`: who asked for what, and what kiln said.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use kiln_core::Action;
use kiln_core::access::sees_every_tenant;
use kiln_db::AuditRow;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::caller::Caller;
use super::extract::{Answer, Asked};
use super::problem::{Problem, ProblemBody};
use super::view::List;

/// Rows of a page.
const PAGE: u32 = 100;

/// Which rows.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct AuditAsked {
    /// After the row of this number.
    after: u64,
}

/// A row of the audit trail.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct AuditView {
    /// Its number.
    seq: u64,
    /// When, milliseconds since the Unix epoch.
    at_unix_ms: u64,
    /// Who.
    actor: String,
    /// For which tenant.
    tenant: Option<String>,
    /// What.
    action: String,
    /// To what.
    target: String,
    /// What kiln said.
    allowed: bool,
    /// Why not.
    reason: Option<String>,
    /// More, as data.
    detail: Option<Value>,
}

impl AuditView {
    /// Of a row.
    pub(crate) fn of(row: AuditRow) -> Self {
        Self {
            seq: row.seq,
            at_unix_ms: row.at_unix_ms,
            actor: row.entry.actor,
            tenant: row.entry.tenant.map(String::from),
            action: row.entry.action,
            target: row.entry.target,
            allowed: row.entry.allowed,
            reason: row.entry.reason,
            detail: row.entry.detail,
        }
    }
}

/// Reads the audit trail, oldest first; `next` is the `after` of the next page.
#[utoipa::path(
    get, path = "/v1/audit", tag = "operators", params(AuditAsked),
    responses(
        (status = 200, description = "A page", body = List<AuditView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Asked(asked): Asked<AuditAsked>,
) -> Result<Answer<List<AuditView>>, Problem> {
    if asked.after > i64::MAX as u64 {
        return Err(Problem::invalid("after", "there is no row of this number"));
    }
    let own = caller
        .acting_for(&api, None, Action::AuditRead, "audit trail")
        .await?;
    let all = sees_every_tenant(&caller.principal, Action::AuditRead);
    let tenant = Some(&own).filter(|_| !all);
    let rows = api.db().audit_rows(tenant, asked.after, PAGE).await?;
    let full = rows.len() >= PAGE as usize;
    let next = rows.last().filter(|_| full).map(|row| row.seq.to_string());
    let items = rows.into_iter().map(AuditView::of).collect();
    Ok(Answer(StatusCode::OK, List { items, next }))
}
