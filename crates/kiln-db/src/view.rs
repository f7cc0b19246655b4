//! What a scheduler looks at, in one snapshot, and the reasons and estimates it gives back.

use std::collections::BTreeMap;
use std::sync::Mutex;

use kiln_core::dispatch::{Requirements, Room};
use kiln_core::{
    AttemptId, Epoch, JobId, Lease, PendingReason, PoolName, Priority, QueueName, TenantName,
    WorkerId,
};

use crate::claim::minus;
use crate::database::{Database, write_tx};
use crate::engine::{Row, Tx, args, json};
use crate::error::DbError;
use crate::job::{Estimate, HeldJob, PendingJob, need};
use crate::tenant::{GlobalLimits, Queue, Tenant};
use crate::worker::Worker;

/// Finished jobs that waits and times are learnt from.
const LEARN_MAX: u32 = 5_000;
/// For how long what was learnt is used before it is learnt again.
const LEARN_AGAIN_MS: u64 = 30_000;
/// Most reasons written in one transaction.
const REASONS_MAX: usize = 2_000;

/// Rows of one pool, as they were at one moment.
#[derive(Clone, Debug)]
pub struct PoolRows {
    /// When, by the database's clock.
    pub now_unix_ms: u64,
    /// Which pool.
    pub pool: PoolName,
    /// Jobs that wait, at most as many as asked for: of each tenant the first ones by priority and age.
    pub pending: Vec<PendingJob>,
    /// How many wait altogether.
    pub pending_total: u32,
    /// Jobs that have a worker.
    pub held: Vec<HeldJob>,
    /// Workers, with the room that is left of what they have.
    pub workers: Vec<(Worker, Room)>,
    /// All queues.
    pub queues: Vec<Queue>,
    /// All tenants.
    pub tenants: Vec<Tenant>,
    /// Limits of the whole installation.
    pub limits: GlobalLimits,
    /// Jobs that have a worker and machines that are kept, in all pools, by tenant.
    pub running: BTreeMap<TenantName, u32>,
    /// What finished jobs taught.
    pub history: Vec<Learnt>,
}

/// Medians of finished jobs of one kind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Learnt {
    /// Whose.
    pub tenant: TenantName,
    /// In which queue.
    pub queue: QueueName,
    /// `source_build`, `image_build` or `run`.
    pub kind: String,
    /// Half of them took at most this long on their worker.
    pub run_p50_ms: u64,
    /// Half of them waited at most this long for it.
    pub wait_p50_ms: u64,
    /// 95 of 100 waited at most this long.
    pub wait_p95_ms: u64,
    /// How many there were.
    pub samples: u32,
}

/// What was learnt last, and when.
#[derive(Default)]
pub(crate) struct HistoryCache(Mutex<Option<(u64, Vec<Learnt>)>>);

impl Database {
    /// Everything a plan for one pool needs, from one moment.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn pool_view(&self, pool: &PoolName, pending_max: u32) -> Result<PoolRows, DbError> {
        let pool = pool.clone();
        let mut view = self
            .snapshot("look at a pool", |tx| {
                Box::pin(async move { view(tx, &pool, pending_max).await })
            })
            .await?;
        view.history = self.learnt().await?;
        Ok(view)
    }

    /// Medians of finished jobs by tenant, queue and kind; learnt anew every half minute.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn learnt(&self) -> Result<Vec<Learnt>, DbError> {
        let now = self.inner.clock.now_unix_ms();
        let cache = &self.inner.history.0;
        if let Ok(known) = cache.lock()
            && let Some((at, learnt)) = known.as_ref()
            && now.abs_diff(*at) < LEARN_AGAIN_MS
        {
            return Ok(learnt.clone());
        }
        let learnt = self.read("learn from finished jobs", |tx| Box::pin(learn(tx)));
        let learnt = learnt.await?;
        if let Ok(mut known) = cache.lock() {
            *known = Some((now, learnt.clone()));
        }
        Ok(learnt)
    }

    /// Keeps why jobs wait, and for how long they are expected to. Rows that say so already are not written.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn store_reasons(
        &self,
        reasons: Vec<(JobId, PendingReason, Option<Estimate>)>,
    ) -> Result<u64, DbError> {
        let mut written = 0;
        for part in reasons.chunks(REASONS_MAX) {
            let rows: Vec<_> = part
                .iter()
                .map(|(job, reason, estimate)| {
                    [
                        Some(job.to_string()),
                        Some(json(reason)),
                        estimate.as_ref().map(json),
                    ]
                })
                .collect();
            let rows = json(&rows);
            written += write_tx!(self, "keep why jobs wait", [rows], |tx| {
                let sql = "update jobs set reason = e.value ->> 1, estimate = e.value ->> 2 from json_each($1) e
                    where jobs.id = (e.value ->> 0) and jobs.state = 'queued'
                        and (jobs.reason <> (e.value ->> 1)
                            or coalesce(jobs.estimate, '') <> coalesce(e.value ->> 2, ''))";
                tx.exec(sql, args![rows.as_str()]).await
            })?;
        }
        Ok(written)
    }
}

async fn view(tx: &mut Tx, pool: &PoolName, pending_max: u32) -> Result<PoolRows, DbError> {
    let now_unix_ms = tx.now().await?;
    let held = held(tx, pool).await?;
    let mut taken: BTreeMap<WorkerId, Vec<Room>> = BTreeMap::new();
    for job in &held {
        taken
            .entry(job.lease.worker.clone())
            .or_default()
            .push(job.need);
    }
    let mut running = running(tx).await?;
    for (worker, tenant, room) in crate::kept::rooms(tx).await? {
        taken.entry(worker).or_default().push(room);
        *running.entry(tenant).or_default() += 1;
    }
    let workers = crate::worker::list(tx, Some(pool)).await?;
    let workers = workers.into_iter().map(|worker| {
        let rooms = taken.get(&worker.id).map_or(&[][..], Vec::as_slice);
        let free = rooms
            .iter()
            .fold(worker.facts.capacity, |free, room| minus(free, *room));
        (worker, free)
    });
    Ok(PoolRows {
        now_unix_ms,
        pool: pool.clone(),
        pending: pending(tx, pool, pending_max).await?,
        pending_total: pending_total(tx, pool).await?,
        workers: workers.collect(),
        held,
        queues: crate::tenant::queues(tx).await?,
        tenants: crate::tenant::tenants(tx).await?,
        limits: crate::tenant::limits(tx, false).await?,
        running,
        history: Vec::new(),
    })
}

async fn pending_total(tx: &mut Tx, pool: &PoolName) -> Result<u32, DbError> {
    let sql = "select count(*) as n from jobs where pool = $1 and state = 'queued'";
    let row = tx.row(sql, args![pool.as_str()]).await?;
    row.ok_or(DbError::missing("n"))?.u32("n")
}

async fn pending(tx: &mut Tx, pool: &PoolName, max: u32) -> Result<Vec<PendingJob>, DbError> {
    // When not all fit, each tenant's first ones come before anybody's later ones: no flood hides another tenant's job.
    let sql = "select * from (
            select id, tenant, queue, priority, kind, cpus, memory, disk, requires, grp, created_ms, ready_ms, avoid,
                timeout_ms, reason, attempts,
                row_number() over (partition by tenant order by priority desc, created_ms, id) as place
            from jobs where pool = $1 and state = 'queued' and cancel_ms is null) p
        order by place, tenant limit $2";
    let all = "select id, tenant, queue, priority, kind, cpus, memory, disk, requires, grp, created_ms, ready_ms, avoid,
            timeout_ms, reason, attempts
        from jobs where pool = $1 and state = 'queued' and cancel_ms is null limit $2";
    let fits = pending_total(tx, pool).await? <= max;
    let rows = tx
        .rows(if fits { all } else { sql }, args![pool.as_str(), max])
        .await?;
    rows.iter().map(pending_job).collect()
}

fn pending_job(row: &Row) -> Result<PendingJob, DbError> {
    let priority = i16::try_from(row.int("priority")?).unwrap_or_default();
    Ok(PendingJob {
        attempt: AttemptId {
            job: row.parse("id")?,
            number: row.u32("attempts")? + 1,
        },
        tenant: row.parse("tenant")?,
        queue: row.parse("queue")?,
        priority: Priority::try_from(priority)
            .map_err(|error| DbError::unreadable("priority", error))?,
        kind: row.text("kind")?,
        need: need(row)?,
        requires: row.json("requires")?,
        group: row.opt_parse("grp")?,
        created_unix_ms: row.u64("created_ms")?,
        ready_unix_ms: row.u64("ready_ms")?,
        avoid: row.json("avoid")?,
        timeout_ms: row.u64("timeout_ms")?,
        reason: row.json("reason")?,
    })
}

async fn held(tx: &mut Tx, pool: &PoolName) -> Result<Vec<HeldJob>, DbError> {
    let sql = "select id, tenant, queue, kind, cpus, memory, disk, requires, grp, attempts, worker, life, epoch, until_ms,
            leased_ms, started_ms, cancel_ms
        from jobs where worker is not null and pool = $1 order by id";
    let rows = tx.rows(sql, args![pool.as_str()]).await?;
    rows.iter().map(held_job).collect()
}

fn held_job(row: &Row) -> Result<HeldJob, DbError> {
    let requires: Requirements = row.json("requires")?;
    Ok(HeldJob {
        lease: Lease {
            attempt: AttemptId {
                job: row.parse("id")?,
                number: row.u32("attempts")? + 1,
            },
            tenant: row.parse("tenant")?,
            worker: row.parse("worker")?,
            epoch: Epoch {
                incarnation: row.u64("life")?,
                count: row.u64("epoch")?,
            },
            deadline_unix_ms: row.u64("until_ms")?,
        },
        queue: row.parse("queue")?,
        kind: row.text("kind")?,
        need: need(row)?,
        group: row.opt_parse("grp")?,
        pinned_cpus: requires.pinned_cpus,
        leased_unix_ms: row.u64("leased_ms")?,
        started_unix_ms: row.opt_u64("started_ms")?,
        cancelled: row.opt_int("cancel_ms")?.is_some(),
    })
}

async fn running(tx: &mut Tx) -> Result<BTreeMap<TenantName, u32>, DbError> {
    let sql = "select tenant, count(*) as n from jobs where worker is not null group by tenant";
    let rows = tx.rows(sql, args![]).await?;
    rows.iter()
        .map(|row| Ok((row.parse("tenant")?, row.u32("n")?)))
        .collect()
}

async fn learn(tx: &mut Tx) -> Result<Vec<Learnt>, DbError> {
    let sql =
        "select tenant, queue, kind, finished_ms - leased_ms as run, leased_ms - created_ms as wait
        from history where tier = 'hot' and leased_ms is not null and verdict in ('passed', 'user')
        order by finished_ms desc limit $1";
    type Times = (Vec<u64>, Vec<u64>);
    let mut groups: BTreeMap<(TenantName, QueueName, String), Times> = BTreeMap::new();
    for row in tx.rows(sql, args![LEARN_MAX]).await? {
        let key = (row.parse("tenant")?, row.parse("queue")?, row.text("kind")?);
        let (runs, waits) = groups.entry(key).or_default();
        runs.push(row.u64("run").unwrap_or_default());
        waits.push(row.u64("wait").unwrap_or_default());
    }
    let learnt = groups
        .into_iter()
        .map(|((tenant, queue, kind), (mut runs, mut waits))| {
            runs.sort_unstable();
            waits.sort_unstable();
            let at = |sorted: &[u64], of_hundred: usize| {
                let place = (sorted.len() * of_hundred).div_ceil(100).saturating_sub(1);
                sorted.get(place).copied().unwrap_or_default()
            };
            Learnt {
                tenant,
                queue,
                kind,
                run_p50_ms: at(&runs, 50),
                wait_p50_ms: at(&waits, 50),
                wait_p95_ms: at(&waits, 95),
                samples: u32::try_from(runs.len()).unwrap_or(u32::MAX),
            }
        });
    Ok(learnt.collect())
}
