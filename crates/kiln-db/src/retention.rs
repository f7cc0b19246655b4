//! How long finished jobs are kept, tier by tier. What is on hold stays.

use kiln_core::{JobId, TenantName};
use serde::{Deserialize, Serialize};

use crate::database::{Database, write_tx};
use crate::engine::{Tx, args, json};
use crate::error::DbError;
use crate::job::Tier;
use crate::tenant::NameError;

const DAY_MS: u64 = 24 * 3600 * 1000;
/// Jobs changed by one sweep.
const SWEEP_MAX: u32 = 500;

/// Ages at which a finished job leaves a tier, milliseconds since its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Retention {
    /// Everything is kept at hand.
    pub hot_ms: u64,
    /// Logs and artifacts are kept somewhere cheap.
    pub warm_ms: u64,
    /// The record is kept; then nothing is.
    pub cold_ms: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            hot_ms: 30 * DAY_MS,
            warm_ms: 365 * DAY_MS,
            cold_ms: 7 * 365 * DAY_MS,
        }
    }
}

/// A finished job that leaves its tier.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Aged {
    /// Which.
    pub job: JobId,
    /// Whose.
    pub tenant: TenantName,
    /// Where it goes; none: it is deleted.
    pub to: Option<Tier>,
}

/// What is kept for ever until somebody says otherwise.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Hold {
    /// Everything of a tenant.
    Tenant(TenantName),
    /// One finished job.
    Job(JobId),
}

impl Database {
    /// Jobs that leave their tier now, and with them old idempotency keys, dead letters and join tokens: their rows are changed unless this is a dry run. The caller moves or deletes logs and
    /// artifacts of those that are given back. Call again while the answer is full.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn retention_sweep(
        &self,
        default: Retention,
        dry_run: bool,
    ) -> Result<Vec<Aged>, DbError> {
        if dry_run {
            return self
                .read("look what is old", |tx| {
                    Box::pin(async move { aged(tx, default).await })
                })
                .await;
        }
        write_tx!(self, "age finished jobs", [], |tx| {
            let aged = aged(tx, default).await?;
            for job in &aged {
                age(tx, job).await?;
            }
            let day_ago = tx.now().await?.saturating_sub(DAY_MS);
            let sql = "delete from idempotency where created_ms < $1";
            tx.exec(sql, args![day_ago]).await?;
            let old = tx.now().await?.saturating_sub(default.hot_ms);
            let sql = "delete from outbox where dead_ms < $1";
            tx.exec(sql, args![old]).await?;
            let sql = "delete from join_tokens where expires_ms < $1";
            tx.exec(sql, args![old]).await?;
            crate::pipeline::forget(tx, old).await?;
            Ok(aged)
        })
    }

    /// Keeps a tenant's jobs in another way than everybody's; none: as everybody's.
    ///
    /// # Errors
    /// When there is no such tenant.
    pub async fn set_retention(
        &self,
        name: &TenantName,
        retention: Option<Retention>,
    ) -> Result<(), NameError> {
        let tenant = name.clone();
        let changed = write_tx!(self, "change a tenant's retention", [tenant], |tx| {
            let sql = "update tenants set retention = $2 where name = $1";
            tx.exec(sql, args![tenant.as_str(), retention.as_ref().map(json)])
                .await
        })?;
        if changed == 0 {
            return Err(NameError::Unknown {
                kind: "tenant",
                name: name.to_string(),
            });
        }
        Ok(())
    }

    /// Puts something on hold, or ends that. False when there is no such thing (a job must be over).
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn set_hold(&self, what: Hold, on: bool) -> Result<bool, DbError> {
        write_tx!(self, "change a hold", [what], |tx| {
            let (sql, name) = match &*what {
                Hold::Tenant(name) => (
                    "update tenants set hold = $2 where name = $1",
                    name.as_str(),
                ),
                Hold::Job(id) => ("update history set hold = $2 where id = $1", id.as_str()),
            };
            Ok(tx.exec(sql, args![name, on]).await? == 1)
        })
    }
}

async fn aged(tx: &mut Tx, default: Retention) -> Result<Vec<Aged>, DbError> {
    let now = tx.now().await?;
    let mut found = Vec::new();
    for tenant in crate::tenant::tenants(tx).await? {
        if tenant.hold {
            continue;
        }
        let rule = tenant.retention.unwrap_or(default);
        let tiers = [
            (Tier::Cold, rule.cold_ms, None),
            (Tier::Warm, rule.warm_ms, Some(Tier::Cold)),
            (Tier::Hot, rule.hot_ms, Some(Tier::Warm)),
        ];
        for (tier, age_ms, to) in tiers {
            let room = SWEEP_MAX.saturating_sub(u32::try_from(found.len()).unwrap_or(SWEEP_MAX));
            let sql = "select id from history where tenant = $1 and tier = $2 and finished_ms <= $3 and hold = 0
                order by finished_ms limit $4";
            let before = now.saturating_sub(age_ms);
            let values = args![tenant.name.as_str(), tier.name(), before, room];
            for row in tx.rows(sql, values).await? {
                found.push(Aged {
                    job: row.parse("id")?,
                    tenant: tenant.name.clone(),
                    to,
                });
            }
        }
    }
    Ok(found)
}

async fn age(tx: &mut Tx, aged: &Aged) -> Result<(), DbError> {
    let id = aged.job.as_str();
    if let Some(tier) = aged.to {
        let sql = "update history set tier = $2 where id = $1";
        tx.exec(sql, args![id, tier.name()]).await?;
        if tier == Tier::Cold {
            tx.exec("delete from events where job = $1", args![id])
                .await?;
        }
        return Ok(());
    }
    for sql in [
        "delete from events where job = $1",
        "delete from attempts where job = $1",
        "delete from artifacts where job = $1",
        "delete from outbox where job = $1",
        "delete from history where id = $1",
        "delete from requests where job = $1",
    ] {
        tx.exec(sql, args![id]).await?;
    }
    Ok(())
}
