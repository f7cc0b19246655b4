//! Tenants, their quotas and use; queues; limits of the whole installation.

use kiln_core::{PoolName, QueueName, TenantName};
use serde::{Deserialize, Serialize};

use crate::database::{Database, write_tx};
use crate::engine::{Row, Tx, args, json};
use crate::error::DbError;
use crate::wake::Wake;

/// Weight of a tenant or queue unless it has another.
pub const WEIGHT_DEFAULT: u32 = 100;

/// Jobs that a tenant may have waiting unless an operator says otherwise: as many as one plan looks at.
pub const PENDING_MAX_USUAL: u32 = 10_000;
/// Bytes that are kept for a tenant unless an operator says otherwise: its jobs' requests and its uploads.
pub const STORED_MAX_USUAL: u64 = 20 << 30;

/// What a tenant may have; none means no bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Quota {
    /// Jobs that have a worker.
    pub running_max: Option<u32>,
    /// How many more than that may run when what they use would otherwise be idle.
    pub burst: u32,
    /// Running jobs it is sure of: below this it comes first, and others leave as much of the installation's limit.
    pub reserved: u32,
    /// Jobs that wait.
    pub pending_max: Option<u32>,
    /// Bytes of its jobs' requests, kept as long as their records.
    pub stored_max: Option<u64>,
}

impl Quota {
    /// Of a tenant that nobody said anything about.
    #[must_use]
    pub fn usual() -> Self {
        Self {
            pending_max: Some(PENDING_MAX_USUAL),
            stored_max: Some(STORED_MAX_USUAL),
            ..Self::default()
        }
    }
}

/// How hosts are filled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filling {
    /// The emptiest host first: the fastest jobs.
    #[default]
    Spread,
    /// The fullest host first: hosts become empty and can be switched off.
    Pack,
}

/// Limits of the whole installation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GlobalLimits {
    /// Jobs that have a worker.
    pub running_max: Option<u32>,
    /// How hosts are filled.
    pub filling: Filling,
}

/// A tenant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tenant {
    /// Its name.
    pub name: TenantName,
    /// Its share against others of the same moment, 1 to 10,000.
    pub weight: u32,
    /// Its quota.
    pub quota: Quota,
    /// Bytes of its jobs' requests.
    pub stored: u64,
    /// Nothing of it is deleted.
    pub hold: bool,
    /// How long its jobs are kept, if not as everybody's.
    pub retention: Option<crate::retention::Retention>,
    /// When it was made.
    pub created_unix_ms: u64,
}

/// What a tenant used in a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Jobs that came to an end.
    pub jobs: u64,
    /// Of these, passed.
    pub passed: u64,
    /// CPUs times milliseconds of their last attempts.
    pub cpu_ms: u64,
    /// Mebibytes times seconds of their last attempts.
    pub memory_mib_s: u64,
    /// Milliseconds they waited for a worker, together.
    pub wait_ms: u64,
    /// Jobs that wait now.
    pub pending: u32,
    /// Jobs that have a worker now.
    pub running: u32,
}

/// A queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Queue {
    /// Its name.
    pub name: QueueName,
    /// The workers its jobs may use.
    pub pool: PoolName,
    /// Its share against other queues of the same tenant.
    pub weight: u32,
    /// Most jobs of it that have a worker.
    pub running_max: Option<u32>,
    /// Set while nothing of it begins.
    pub paused: Option<Paused>,
}

/// Who paused a queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Paused {
    /// When, milliseconds since the Unix epoch.
    pub since_unix_ms: u64,
    /// Who.
    pub by: String,
    /// Why.
    pub reason: Option<String>,
}

/// Numbers of a queue and tenant now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Depth {
    /// Which queue.
    pub queue: QueueName,
    /// Whose jobs.
    pub tenant: TenantName,
    /// Jobs that wait.
    pub pending: u32,
    /// Jobs that have a worker.
    pub running: u32,
    /// When the oldest waiting one came.
    pub oldest_unix_ms: Option<u64>,
}

/// A name that is not there, or is already.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// No such tenant or queue.
    #[error("there is no {kind} {name}")]
    Unknown {
        /// `tenant` or `queue`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// There is one already.
    #[error("there is a {kind} {name} already")]
    Exists {
        /// `tenant` or `queue`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DbError),
}

impl Database {
    /// Makes a tenant.
    ///
    /// # Errors
    /// When there is one of this name.
    pub async fn create_tenant(&self, name: &TenantName, quota: Quota) -> Result<(), NameError> {
        let tenant = name.clone();
        let made = write_tx!(self, "make a tenant", [tenant], |tx| {
            let now = tx.now().await?;
            let sql =
                "insert into tenants (name, weight, running_max, burst, reserved, pending_max, stored_max, hold, created_ms)
                values ($1, $2, $3, $4, $5, $6, $7, 0, $8) on conflict (name) do nothing";
            let values = args![
                tenant.as_str(),
                WEIGHT_DEFAULT,
                quota.running_max,
                quota.burst,
                quota.reserved,
                quota.pending_max,
                quota.stored_max,
                now,
            ];
            tx.exec(sql, values).await
        })?;
        if made == 0 {
            return Err(NameError::Exists {
                kind: "tenant",
                name: name.to_string(),
            });
        }
        Ok(())
    }

    /// All tenants, by name.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn tenants(&self) -> Result<Vec<Tenant>, DbError> {
        self.read("list tenants", |tx| Box::pin(tenants(tx))).await
    }

    /// Changes a tenant's quota; from the next claim on.
    ///
    /// # Errors
    /// When there is no such tenant.
    pub async fn set_quota(&self, name: &TenantName, quota: Quota) -> Result<(), NameError> {
        let tenant = name.clone();
        let changed = write_tx!(self, "change a quota", [tenant], |tx| {
            let sql =
                "update tenants set running_max = $2, burst = $3, reserved = $4, pending_max = $5,
                    stored_max = $6
                where name = $1";
            let values = args![
                tenant.as_str(),
                quota.running_max,
                quota.burst,
                quota.reserved,
                quota.pending_max,
                quota.stored_max,
            ];
            changed_for_all(tx, sql, values).await
        })?;
        existing(changed, "tenant", name.as_str())
    }

    /// Changes a tenant's weight (1 to 10,000).
    ///
    /// # Errors
    /// When there is no such tenant.
    pub async fn set_tenant_weight(&self, name: &TenantName, weight: u32) -> Result<(), NameError> {
        let tenant = name.clone();
        let changed = write_tx!(self, "change a weight", [tenant], |tx| {
            let sql = "update tenants set weight = $2 where name = $1";
            let values = args![tenant.as_str(), weight.clamp(1, 10_000)];
            changed_for_all(tx, sql, values).await
        })?;
        existing(changed, "tenant", name.as_str())
    }

    /// What a tenant used between two times, milliseconds since the Unix epoch.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn usage(
        &self,
        tenant: &TenantName,
        from_unix_ms: u64,
        to_unix_ms: u64,
    ) -> Result<Usage, DbError> {
        let tenant = tenant.clone();
        self.snapshot("add up what a tenant used", |tx| {
            Box::pin(async move { usage(tx, &tenant, from_unix_ms, to_unix_ms).await })
        })
        .await
    }

    /// Makes a queue.
    ///
    /// # Errors
    /// When there is one of this name.
    pub async fn create_queue(&self, name: &QueueName, pool: &PoolName) -> Result<(), NameError> {
        let (queue, pool) = (name.clone(), pool.clone());
        let made = write_tx!(self, "make a queue", [queue, pool], |tx| {
            let now = tx.now().await?;
            let sql = "insert into queues (name, pool, weight, created_ms) values ($1, $2, $3, $4)
                on conflict (name) do nothing";
            let values = args![queue.as_str(), pool.as_str(), WEIGHT_DEFAULT, now];
            tx.exec(sql, values).await
        })?;
        if made == 0 {
            return Err(NameError::Exists {
                kind: "queue",
                name: name.to_string(),
            });
        }
        Ok(())
    }

    /// All queues, by name.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn queues(&self) -> Result<Vec<Queue>, DbError> {
        self.read("list queues", |tx| Box::pin(queues(tx))).await
    }

    /// Changes a queue's weight and its most running jobs.
    ///
    /// # Errors
    /// When there is no such queue.
    pub async fn set_queue_limits(
        &self,
        name: &QueueName,
        weight: u32,
        running_max: Option<u32>,
    ) -> Result<(), NameError> {
        let queue = name.clone();
        let changed = write_tx!(self, "change a queue", [queue], |tx| {
            let sql = "update queues set weight = $2, running_max = $3 where name = $1";
            let values = args![queue.as_str(), weight.clamp(1, 10_000), running_max];
            changed_for_all(tx, sql, values).await
        })?;
        existing(changed, "queue", name.as_str())
    }

    /// Pauses a queue: what runs goes on, nothing begins. Pausing again changes nothing.
    ///
    /// # Errors
    /// When there is no such queue.
    pub async fn pause_queue(
        &self,
        name: &QueueName,
        by: &str,
        reason: Option<&str>,
    ) -> Result<(), NameError> {
        let (queue, by, reason) = (name.clone(), by.to_owned(), reason.map(str::to_owned));
        let changed = write_tx!(self, "pause a queue", [queue, by, reason], |tx| {
            let now = tx.now().await?;
            let sql = "update queues set paused_by = case when paused_ms is null then $3 else paused_by end,
                    paused_reason = case when paused_ms is null then $4 else paused_reason end,
                    paused_ms = coalesce(paused_ms, $2)
                where name = $1";
            let values = args![queue.as_str(), now, by.as_str(), reason.as_deref()];
            changed_for_all(tx, sql, values).await
        })?;
        existing(changed, "queue", name.as_str())
    }

    /// Lets a queue go on.
    ///
    /// # Errors
    /// When there is no such queue.
    pub async fn resume_queue(&self, name: &QueueName) -> Result<(), NameError> {
        let queue = name.clone();
        let changed = write_tx!(self, "resume a queue", [queue], |tx| {
            let sql = "update queues set paused_ms = null, paused_by = null, paused_reason = null where name = $1";
            changed_for_all(tx, sql, args![queue.as_str()]).await
        })?;
        existing(changed, "queue", name.as_str())
    }

    /// Limits of the whole installation.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn global_limits(&self) -> Result<GlobalLimits, DbError> {
        self.read("read the limits", |tx| Box::pin(limits(tx, false)))
            .await
    }

    /// Changes the limits of the whole installation; from the next claim on.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn set_global_limits(&self, limits: GlobalLimits) -> Result<(), DbError> {
        write_tx!(self, "change the limits", [], |tx| {
            let sql = "update meta set value = $1 where key = 'limits'";
            changed_for_all(tx, sql, args![json(&limits)])
                .await
                .map(drop)
        })
    }

    /// How many jobs wait and run, by queue and tenant, and since when.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn depths(&self) -> Result<Vec<Depth>, DbError> {
        self.read("count what waits", |tx| Box::pin(depths(tx)))
            .await
    }
}

fn existing(changed: u64, kind: &'static str, name: &str) -> Result<(), NameError> {
    if changed == 0 {
        return Err(NameError::Unknown {
            kind,
            name: name.to_owned(),
        });
    }
    Ok(())
}

/// A change that may let jobs begin, in any pool.
async fn changed_for_all(
    tx: &mut Tx,
    sql: &'static str,
    values: Vec<crate::engine::Value>,
) -> Result<u64, DbError> {
    let changed = tx.exec(sql, values).await?;
    tx.wake(Wake::Everything);
    Ok(changed)
}

/// Reads the limits; locked, claims of all pools take turns.
pub(crate) async fn limits(tx: &mut Tx, lock: bool) -> Result<GlobalLimits, DbError> {
    let sql = if lock {
        "select value from meta where key = 'limits' /*lock meta*/"
    } else {
        "select value from meta where key = 'limits'"
    };
    let row = tx.row(sql, args![]).await?;
    row.ok_or(DbError::missing("limits"))?.json("value")
}

pub(crate) async fn tenants(tx: &mut Tx) -> Result<Vec<Tenant>, DbError> {
    let rows = tx.rows("select * from tenants order by name", args![]);
    let tenant = |row: &Row| {
        Ok(Tenant {
            name: row.parse("name")?,
            weight: row.u32("weight")?,
            quota: Quota {
                running_max: row.opt_u32("running_max")?,
                burst: row.u32("burst")?,
                reserved: row.u32("reserved")?,
                pending_max: row.opt_u32("pending_max")?,
                stored_max: row.opt_u64("stored_max")?,
            },
            stored: row.u64("stored")?,
            hold: row.flag("hold")?,
            retention: row.opt_json("retention")?,
            created_unix_ms: row.u64("created_ms")?,
        })
    };
    rows.await?.iter().map(tenant).collect()
}

pub(crate) async fn queues(tx: &mut Tx) -> Result<Vec<Queue>, DbError> {
    let rows = tx.rows("select * from queues order by name", args![]);
    let queue = |row: &Row| {
        let paused = match row.opt_u64("paused_ms")? {
            Some(since_unix_ms) => Some(Paused {
                since_unix_ms,
                by: row.opt_text("paused_by")?.unwrap_or_default(),
                reason: row.opt_text("paused_reason")?,
            }),
            None => None,
        };
        Ok(Queue {
            name: row.parse("name")?,
            pool: row.parse("pool")?,
            weight: row.u32("weight")?,
            running_max: row.opt_u32("running_max")?,
            paused,
        })
    };
    rows.await?.iter().map(queue).collect()
}

async fn usage(tx: &mut Tx, tenant: &TenantName, from: u64, to: u64) -> Result<Usage, DbError> {
    let sql = "select count(*) as jobs, coalesce(cast(sum(case when verdict = 'passed' then 1 else 0 end) as bigint), 0) as passed,
            coalesce(cast(sum(cpus * (finished_ms - coalesce(leased_ms, finished_ms))) as bigint), 0) as cpu_ms,
            coalesce(cast(sum((memory / 1048576) * ((finished_ms - coalesce(leased_ms, finished_ms)) / 1000)) as bigint), 0) as memory_s,
            coalesce(cast(sum(coalesce(leased_ms, finished_ms) - created_ms) as bigint), 0) as wait_ms
        from history where tenant = $1 and finished_ms >= $2 and finished_ms < $3";
    let row = tx.row(sql, args![tenant.as_str(), from, to]).await?;
    let row = row.ok_or(DbError::missing("jobs"))?;
    let mut usage = Usage {
        jobs: row.u64("jobs")?,
        passed: row.u64("passed")?,
        cpu_ms: row.u64("cpu_ms")?,
        memory_mib_s: row.u64("memory_s")?,
        wait_ms: row.u64("wait_ms")?,
        ..Usage::default()
    };
    for depth in depths(tx).await? {
        if depth.tenant == *tenant {
            usage.pending += depth.pending;
            usage.running += depth.running;
        }
    }
    Ok(usage)
}

async fn depths(tx: &mut Tx) -> Result<Vec<Depth>, DbError> {
    let sql = "select queue, tenant, cast(sum(case when worker is null then 1 else 0 end) as bigint) as pending,
            cast(sum(case when worker is null then 0 else 1 end) as bigint) as running,
            min(case when worker is null then created_ms end) as oldest
        from jobs group by queue, tenant order by queue, tenant";
    let rows = tx.rows(sql, args![]).await?;
    rows.iter()
        .map(|row| {
            Ok(Depth {
                queue: row.parse("queue")?,
                tenant: row.parse("tenant")?,
                pending: row.u32("pending")?,
                running: row.u32("running")?,
                oldest_unix_ms: row.opt_u64("oldest")?,
            })
        })
        .collect()
}
