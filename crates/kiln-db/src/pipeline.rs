//! Pipelines whose builds fail again and again. A pipeline is a tenant's builds of one name in one queue.
//!
//! Counted in the transaction that ends a build, so that neither a restart nor another controller loses count. Those that pass have no row.

use kiln_core::{FailureClass, Outcome, Verdict};

use crate::database::Database;
use crate::engine::{Tx, args};
use crate::error::DbError;
use crate::job::Live;

/// Pipelines of one tenant that are remembered because their last build failed; a tenant that makes up names loses its own count alone.
const PIPELINES_MAX: u32 = 1_000;

impl Database {
    /// How many pipelines have failed at least `failures` times in a row.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn pipelines_failing(&self, failures: u32) -> Result<u64, DbError> {
        self.read("count failing pipelines", |tx| {
            Box::pin(async move {
                let sql = "select count(*) as n from pipelines where failures >= $1";
                let row = tx.row(sql, args![failures]).await?;
                row.ok_or(DbError::missing("n"))?.u64("n")
            })
        })
        .await
    }
}

/// Counts the end of a job for or against its pipeline, if it is a build; gives how many failed in a row now. What failed for other
/// reasons than the build's own says nothing about its pipeline.
pub(crate) async fn judge(tx: &mut Tx, live: &Live, outcome: &Outcome) -> Result<u32, DbError> {
    let now = tx.now().await?;
    match &outcome.verdict {
        Verdict::Failed {
            class: FailureClass::Infrastructure | FailureClass::Lost | FailureClass::Cancelled,
            ..
        } => return Ok(0),
        Verdict::Passed => {
            let sql = "delete from pipelines where (tenant, queue, name) in
                (select tenant, queue, name from history where id = $1 and kind = 'source_build')";
            tx.exec(sql, args![live.id.as_str()]).await?;
            return Ok(0);
        }
        Verdict::Failed { .. } => {}
    }
    let sql = "insert into pipelines (tenant, queue, name, failures, updated_ms)
        select h.tenant, h.queue, h.name, 1, $2 from history h where h.id = $1 and h.kind = 'source_build'
            and ((select count(*) from pipelines p where p.tenant = h.tenant) < $3
                or exists (select 1 from pipelines p where p.tenant = h.tenant and p.queue = h.queue and p.name = h.name))
        on conflict (tenant, queue, name) do update
            set failures = pipelines.failures + 1, updated_ms = excluded.updated_ms";
    tx.exec(sql, args![live.id.as_str(), now, PIPELINES_MAX])
        .await?;
    let sql = "select p.failures from pipelines p join history h
            on h.tenant = p.tenant and h.queue = p.queue and h.name = p.name
        where h.id = $1 and h.kind = 'source_build'";
    let row = tx.row(sql, args![live.id.as_str()]).await?;
    row.map_or(Ok(0), |row| row.u32("failures"))
}

/// Forgets pipelines that nobody has built since `before_ms`.
pub(crate) async fn forget(tx: &mut Tx, before_ms: u64) -> Result<(), DbError> {
    let sql = "delete from pipelines where updated_ms < $1";
    tx.exec(sql, args![before_ms]).await.map(drop)
}
