//! Audit rows: who asked for what, and what kiln said. Written with the change they tell of, or alone.

use kiln_core::TenantName;
use serde_json::Value;

use crate::database::{Database, write_tx};
use crate::engine::{Row, Tx, args, json};
use crate::error::DbError;
use crate::list::PAGE_MAX;

/// Longest text of one field.
const TEXT_MAX: usize = 1_000;

/// Something that was asked for.
#[derive(Clone, PartialEq, Debug)]
pub struct NewAudit {
    /// Who: `user:NAME`, `token:ID`, `worker:ID`, `kiln`.
    pub actor: String,
    /// For which tenant.
    pub tenant: Option<TenantName>,
    /// What: `job.cancel`, `door.tag`.
    pub action: String,
    /// To what.
    pub target: String,
    /// What kiln said.
    pub allowed: bool,
    /// Why not.
    pub reason: Option<String>,
    /// More, as data. Never a secret.
    pub detail: Option<Value>,
}

/// A row of the audit log.
#[derive(Clone, PartialEq, Debug)]
pub struct AuditRow {
    /// Its number; later rows have larger ones.
    pub seq: u64,
    /// When, milliseconds since the Unix epoch, by the database's clock.
    pub at_unix_ms: u64,
    /// What was asked for.
    pub entry: NewAudit,
}

impl Database {
    /// Writes an audit row.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn audit(&self, entry: NewAudit) -> Result<(), DbError> {
        write_tx!(self, "write an audit row", [entry], |tx| {
            write_audit(tx, &entry).await
        })
    }

    /// Audit rows after `after`, oldest first, of one tenant or of all.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn audit_rows(
        &self,
        tenant: Option<&TenantName>,
        after: u64,
        limit: u32,
    ) -> Result<Vec<AuditRow>, DbError> {
        let tenant = tenant.cloned();
        self.read("read audit rows", |tx| {
            Box::pin(async move {
                let sql = if tenant.is_some() {
                    "select * from audit where tenant = $1 and seq > $2 order by seq limit $3"
                } else {
                    "select * from audit where $1 = '' and seq > $2 order by seq limit $3"
                };
                let name = tenant.as_ref().map_or("", TenantName::as_str);
                let rows = tx
                    .rows(sql, args![name, after, limit.min(PAGE_MAX)])
                    .await?;
                rows.iter().map(audit_row).collect()
            })
        })
        .await
    }
}

/// Rows of the trail that one page looks at: what a filter passes over costs no more than this.
const SCAN_MAX: u64 = 50_000;

/// Which rows of the audit trail.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AuditFilter {
    /// Of this tenant.
    pub tenant: Option<TenantName>,
    /// Of actors whose name has this in it.
    pub actor: Option<String>,
    /// Of this action.
    pub action: Option<String>,
    /// What was allowed, or what was refused.
    pub allowed: Option<bool>,
    /// From then on, milliseconds since the Unix epoch.
    pub from_unix_ms: Option<u64>,
    /// Until then.
    pub until_unix_ms: Option<u64>,
}

/// Where a page of the audit trail begins, and which way it goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AuditFrom {
    /// Oldest first, after the row of this number.
    After(u64),
    /// Newest first, before the row of this number.
    Before(u64),
}

/// A page of the audit trail.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct AuditPage {
    /// Its rows; there may be none although more follow.
    pub rows: Vec<AuditRow>,
    /// Where the next page begins; none: there is none.
    pub next: Option<u64>,
}

impl Database {
    /// A page of the audit trail. Looks at a bounded part of it: a page that is not full, or empty, may have a next one.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn audit_page(
        &self,
        filter: AuditFilter,
        from: AuditFrom,
        limit: u32,
    ) -> Result<AuditPage, DbError> {
        self.snapshot("read the audit trail", |tx| {
            Box::pin(async move { page(tx, &filter, from, limit.clamp(1, PAGE_MAX)).await })
        })
        .await
    }
}

/// Rows between two numbers that a filter takes.
macro_rules! chosen {
    ($rest:literal) => {
        concat!(
            "select * from audit where seq >= $1 and seq <= $2 and ($3 = '' or tenant = $3)
                and ($4 = '' or lower(actor) like lower($4) escape '!') and ($5 = '' or action = $5)
                and ($6 < 0 or allowed = $6) and at_ms >= $7 and at_ms <= $8 ",
            $rest
        )
    };
}
async fn page(
    tx: &mut Tx,
    filter: &AuditFilter,
    from: AuditFrom,
    limit: u32,
) -> Result<AuditPage, DbError> {
    // The part of the trail that the filter's times leave; rows of one time are beside each other.
    let Some((first, last)) = span(tx, filter).await? else {
        return Ok(AuditPage::default());
    };
    let (low, high) = match from {
        AuditFrom::After(seq) => {
            let low = seq.saturating_add(1).max(first);
            (low, low.saturating_add(SCAN_MAX - 1).min(last))
        }
        AuditFrom::Before(seq) => {
            let high = seq.saturating_sub(1).min(last);
            (high.saturating_sub(SCAN_MAX - 1).max(first), high)
        }
    };
    let sql = match from {
        AuditFrom::After(_) => chosen!("order by seq limit $9"),
        AuditFrom::Before(_) => chosen!("order by seq desc limit $9"),
    };
    let values = args![
        low,
        high,
        filter.tenant.as_ref().map_or("", TenantName::as_str),
        filter.actor.as_deref().map(containing).unwrap_or_default(),
        filter.action.as_deref().unwrap_or_default(),
        filter.allowed.map_or(-1, i64::from),
        filter.from_unix_ms.unwrap_or(0),
        filter.until_unix_ms.unwrap_or(u64::MAX),
        limit,
    ];
    let rows = tx.rows(sql, values).await?;
    let rows: Vec<AuditRow> = rows.iter().map(audit_row).collect::<Result<_, _>>()?;
    let full = rows.len() >= limit as usize;
    let next = match (from, full) {
        (_, true) => rows.last().map(|row| row.seq),
        (AuditFrom::After(_), false) => Some(high).filter(|high| *high < last && low <= *high),
        (AuditFrom::Before(_), false) => Some(low).filter(|low| *low > first && *low <= high),
    };
    Ok(AuditPage { rows, next })
}

/// The first and the last row of the filter's time.
async fn span(tx: &mut Tx, filter: &AuditFilter) -> Result<Option<(u64, u64)>, DbError> {
    let first = match filter.from_unix_ms {
        Some(at) => {
            let sql = "select seq from audit where at_ms >= $1 order by at_ms, seq limit 1";
            tx.row(sql, args![at]).await?
        }
        None => {
            let sql = "select seq from audit order by seq limit 1";
            tx.row(sql, args![]).await?
        }
    };
    let last = match filter.until_unix_ms {
        Some(at) => {
            let sql =
                "select seq from audit where at_ms <= $1 order by at_ms desc, seq desc limit 1";
            tx.row(sql, args![at]).await?
        }
        None => {
            let sql = "select seq from audit order by seq desc limit 1";
            tx.row(sql, args![]).await?
        }
    };
    match (first, last) {
        (Some(first), Some(last)) => Ok(Some((first.u64("seq")?, last.u64("seq")?))),
        _ => Ok(None),
    }
}

/// A pattern of texts that have this in them.
fn containing(text: &str) -> String {
    let mut pattern = String::from("%");
    for c in text.chars() {
        if matches!(c, '%' | '_' | '!') {
            pattern.push('!');
        }
        pattern.push(c);
    }
    pattern.push('%');
    pattern
}

pub(crate) fn audit_row(row: &Row) -> Result<AuditRow, DbError> {
    Ok(AuditRow {
        seq: row.u64("seq")?,
        at_unix_ms: row.u64("at_ms")?,
        entry: NewAudit {
            actor: row.text("actor")?,
            tenant: row.opt_parse("tenant")?,
            action: row.text("action")?,
            target: row.text("target")?,
            allowed: row.flag("allowed")?,
            reason: row.opt_text("reason")?,
            detail: row.opt_json("detail")?,
        },
    })
}

/// Writes an audit row in a transaction.
pub(crate) async fn write_audit(tx: &mut Tx, row: &NewAudit) -> Result<(), DbError> {
    let now = tx.now().await?;
    let sql = "insert into audit (at_ms, actor, tenant, action, target, allowed, reason, detail)
        values ($1, $2, $3, $4, $5, $6, $7, $8)";
    let values = args![
        now,
        short(&row.actor),
        row.tenant.as_ref().map(TenantName::as_str),
        short(&row.action),
        short(&row.target),
        row.allowed,
        row.reason.as_deref().map(short),
        row.detail.as_ref().map(json),
    ];
    tx.exec(sql, values).await.map(drop)
}

fn short(text: &str) -> String {
    text.chars().take(TEXT_MAX).collect()
}
