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
