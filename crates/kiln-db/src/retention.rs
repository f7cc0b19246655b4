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

/// A finished job whose time in its tier is over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Aging {
    /// Which.
    pub job: JobId,
    /// Its title, for people.
    pub name: String,
    /// Where it is.
    pub from: Tier,
    /// Where it goes; none: it is deleted.
    pub to: Option<Tier>,
    /// When it ended, milliseconds since the Unix epoch.
    pub finished_unix_ms: u64,
    /// A hold keeps it where it is.
    pub held: bool,
}

/// What of a tenant's jobs would leave its tier now. Nothing changed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RetentionPlan {
    /// Jobs that become warm.
    pub to_warm: u64,
    /// Jobs whose logs, artifacts and events go.
    pub to_cold: u64,
    /// Jobs of which nothing stays.
    pub deleted: u64,
    /// Jobs whose time is over as well, but a hold keeps them.
    pub held: u64,
    /// The first of all these, oldest end first.
    pub jobs: Vec<Aging>,
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

    /// What would leave its tier now if a tenant's jobs were kept so, however many sweeps that takes. None when there is no such tenant.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn retention_plan(
        &self,
        name: &TenantName,
        rule: Retention,
    ) -> Result<Option<RetentionPlan>, DbError> {
        let name = name.clone();
        self.snapshot("look what is old", |tx| {
            Box::pin(async move {
                let tenants = crate::tenant::tenants(tx).await?;
                let Some(tenant) = tenants.into_iter().find(|tenant| tenant.name == name) else {
                    return Ok(None);
                };
                plan(tx, &name, rule, tenant.hold).await.map(Some)
            })
        })
        .await
    }
}

/// Finished jobs of `$1` whose time ends before `$2` (hot), `$3` (warm) and `$4` (cold), with where they go.
macro_rules! leaving {
    ($what:literal, $rest:literal) => {
        concat!(
            "select ",
            $what,
            " from (select id, name, tier, hold, finished_ms,
                case when finished_ms <= $4 then 'gone' when finished_ms <= $3 then 'cold' else 'warm' end as goes
            from history where tenant = $1 and (finished_ms <= $4 or (tier <> 'cold' and finished_ms <= $3)
                or (tier = 'hot' and finished_ms <= $2))) aging ",
            $rest
        )
    };
}

async fn plan(
    tx: &mut Tx,
    tenant: &TenantName,
    rule: Retention,
    all_held: bool,
) -> Result<RetentionPlan, DbError> {
    let now = tx.now().await?;
    let before = |age_ms: u64| now.saturating_sub(age_ms);
    let (hot, warm, cold) = (
        before(rule.hot_ms),
        before(rule.warm_ms),
        before(rule.cold_ms),
    );
    let mut plan = RetentionPlan::default();
    let sql = leaving!("goes, hold, count(*) as n", "group by goes, hold");
    let values = args![tenant.as_str(), hot, warm, cold];
    for row in tx.rows(sql, values).await? {
        let count = row.u64("n")?;
        let goes = row.text("goes")?;
        let sum = match goes.as_str() {
            _ if all_held || row.flag("hold")? => &mut plan.held,
            "warm" => &mut plan.to_warm,
            "cold" => &mut plan.to_cold,
            _ => &mut plan.deleted,
        };
        *sum += count;
    }
    let sql = leaving!("*", "order by finished_ms, id limit $5");
    let values = args![tenant.as_str(), hot, warm, cold, SWEEP_MAX];
    for row in tx.rows(sql, values).await? {
        plan.jobs.push(Aging {
            job: row.parse("id")?,
            name: row.text("name")?,
            from: Tier::parse(&row.text("tier")?)?,
            to: Tier::parse(&row.text("goes")?).ok(),
            finished_unix_ms: row.u64("finished_ms")?,
            held: all_held || row.flag("hold")?,
        });
    }
    Ok(plan)
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
    let sql = "update tenants set stored = stored - coalesce((select octet_length(body) from requests where job = $1), 0)
        where name = $2";
    tx.exec(sql, args![id, aged.tenant.as_str()]).await?;
    for sql in [
        "delete from holds where kind = 'job' and name = $1",
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
