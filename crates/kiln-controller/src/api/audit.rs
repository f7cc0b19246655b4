//! `GET /v1/audit`: who asked for what, and what kiln said.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use kiln_core::access::sees_every_tenant;
use kiln_core::{Action, TenantName};
use kiln_db::{AuditFilter, AuditFrom, AuditRow, PAGE_MAX};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::ask::parsed;
use super::caller::Caller;
use super::extract::{Answer, Asked};
use super::problem::{Problem, ProblemBody};
use super::view::List;

/// Rows of a page.
const PAGE: u32 = 100;
/// Longest part of a name that is looked for.
const NAME_MAX: usize = 200;

/// Which rows.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct AuditAsked {
    /// Oldest first, after the row of this number.
    after: Option<u64>,
    /// Newest first, before the row of this number.
    before: Option<u64>,
    /// Newest first, from the newest on.
    newest: bool,
    /// Of this tenant; of all that the caller may see without.
    tenant: Option<String>,
    /// Of actors whose name has this in it: at most 200 bytes.
    actor: Option<String>,
    /// Of this action.
    action: Option<String>,
    /// `allowed` or `refused`; both without.
    verdict: Option<String>,
    /// From then on, milliseconds since the Unix epoch.
    from_unix_ms: Option<u64>,
    /// Until then.
    until_unix_ms: Option<u64>,
    /// Rows of a page: 100 unless named, at most 500.
    limit: Option<u32>,
}

impl AuditAsked {
    /// Where the page begins, and which way it goes.
    fn start(&self) -> Result<AuditFrom, Problem> {
        let most = i64::MAX as u64;
        let legal = |field: &str, seq: u64| match seq > most {
            true => Err(Problem::invalid(field, "there is no row of this number")),
            false => Ok(seq),
        };
        match (self.after, self.before, self.newest) {
            (Some(after), None, false) => legal("after", after).map(AuditFrom::After),
            (None, Some(before), _) => legal("before", before).map(AuditFrom::Before),
            (None, None, true) => Ok(AuditFrom::Before(most)),
            (None, None, false) => Ok(AuditFrom::After(0)),
            _ => Err(Problem::invalid("after", "it is oldest first, or newest")),
        }
    }

    fn filter(&self) -> Result<AuditFilter, Problem> {
        for (field, text) in [("actor", &self.actor), ("action", &self.action)] {
            if text.as_ref().is_some_and(|text| text.len() > NAME_MAX) {
                let text = format!("it has at most {NAME_MAX} bytes");
                return Err(Problem::invalid(field, text));
            }
        }
        let allowed = match self.verdict.as_deref() {
            None => None,
            Some("allowed") => Some(true),
            Some("refused") => Some(false),
            Some(_) => return Err(Problem::invalid("verdict", "it is `allowed` or `refused`")),
        };
        Ok(AuditFilter {
            tenant: None,
            actor: self.actor.clone(),
            action: self.action.clone(),
            allowed,
            from_unix_ms: self.from_unix_ms,
            until_unix_ms: self.until_unix_ms,
        })
    }
}

/// A row of the audit trail.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct AuditView {
    /// Its number.
    pub seq: u64,
    /// When, milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// Who.
    pub actor: String,
    /// For which tenant.
    pub tenant: Option<String>,
    /// What.
    pub action: String,
    /// To what.
    pub target: String,
    /// What kiln said.
    pub allowed: bool,
    /// Why not.
    pub reason: Option<String>,
    /// More, as data.
    pub detail: Option<Value>,
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

/// Reads the audit trail; `next` is the `after` of the next page, or its `before` when the newest come first. A page may be short, or empty, and
/// have a next one: each looks at a bounded part of the trail.
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
    let (start, mut filter) = (asked.start()?, asked.filter()?);
    let limit = asked.limit.unwrap_or(PAGE);
    if !(1..=PAGE_MAX).contains(&limit) {
        let text = format!("it is 1 to {PAGE_MAX}");
        return Err(Problem::invalid("limit", text));
    }
    let named: Option<TenantName> = match &asked.tenant {
        Some(name) => Some(parsed("tenant", name)?),
        None => None,
    };
    let own = caller.acting_for(&api, named.as_ref(), Action::AuditRead, "audit trail");
    let own = own.await?;
    let all = named.is_none() && sees_every_tenant(&caller.principal, Action::AuditRead);
    filter.tenant = Some(own).filter(|_| !all);
    let page = api.db().audit_page(filter, start, limit).await?;
    let next = page.next.map(|seq| seq.to_string());
    let items = page.rows.into_iter().map(AuditView::of).collect();
    Ok(Answer(StatusCode::OK, List { items, next }))
}
