//! Stage 4: assignments become leases, many in one transaction. Everything the plan assumed is checked again here.

use std::collections::{BTreeMap, BTreeSet};

use kiln_core::dispatch::{QuotaScope, Room, WorkerFacts, WorkerState};
use kiln_core::job::JobEvent;
use kiln_core::{
    Assignment, Epoch, JobId, Label, Lease, PoolName, QueueName, TenantName, WorkerId,
};
use serde_json::json as object;

use crate::announce::{Change, announce};
use crate::database::{Database, write_tx};
use crate::engine::{Tx, args, json};
use crate::error::DbError;
use crate::job::Live;
use crate::leader::{Leadership, leads};
use crate::own::OWN_LEASE_MS;
use crate::wake::Wake;
use crate::worker::state_of;

/// Most assignments of one claim.
pub const CLAIM_MAX: usize = 1000;

/// Why nothing was claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another controller schedules this pool now, or the right has ended.
    #[error("this controller no longer schedules pool {0}")]
    NotLeader(PoolName),
    /// More assignments than one claim takes.
    #[error("{0} assignments at once, at most {CLAIM_MAX}")]
    TooMany(usize),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DbError),
}

/// Why one assignment became no lease. The job stays as it was.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClaimRefused {
    /// It is not in the queue: over, or never there.
    #[error("the job is not in the queue")]
    Gone,
    /// A worker has it, or another attempt is the next one.
    #[error("the job is {state}, its next attempt is {attempt}")]
    NotQueued {
        /// Where it stands.
        state: &'static str,
        /// The attempt that is or would be next.
        attempt: u32,
    },
    /// Somebody asked to stop it.
    #[error("the job is being cancelled")]
    Cancelled,
    /// Its queue is paused.
    #[error("queue {0} is paused")]
    Paused(QueueName),
    /// It waits after a failed attempt.
    #[error("the job may not run before {until_unix_ms}")]
    Backoff {
        /// When it may run.
        until_unix_ms: u64,
    },
    /// A limit on running jobs is reached.
    #[error("{running} jobs run, the {scope:?} limit is {limit}")]
    Quota {
        /// Whose limit.
        scope: QuotaScope,
        /// Running now.
        running: u32,
        /// Most.
        limit: u32,
    },
    /// Another job of its concurrency group runs.
    #[error("job {holder} of the same concurrency group runs")]
    GroupBusy {
        /// Which.
        holder: JobId,
    },
    /// Job or worker belong to another pool than the one that is scheduled.
    #[error("job or worker belong to another pool")]
    OtherPool,
    /// No such worker.
    #[error("there is no worker {0}")]
    UnknownWorker(WorkerId),
    /// The worker takes no jobs.
    #[error("worker {worker} is {state:?}")]
    WorkerUnavailable {
        /// Which.
        worker: WorkerId,
        /// Its state.
        state: WorkerState,
    },
    /// The worker may not run jobs of this tenant.
    #[error("worker {worker} runs no jobs of tenant {tenant}")]
    TenantNotAllowed {
        /// Which.
        worker: WorkerId,
        /// Whose job.
        tenant: TenantName,
    },
    /// The worker has too little room left.
    #[error("worker {worker} has too little room left")]
    NoRoom {
        /// Which.
        worker: WorkerId,
    },
}

/// For each assignment, its lease or why there is none.
pub type Claimed = Vec<Result<Lease, ClaimRefused>>;

impl Database {
    /// Turns assignments into leases in one transaction. The answers are in the order of the assignments.
    ///
    /// # Errors
    /// When this controller does not schedule the pool any more: then nothing was claimed.
    pub async fn claim(
        &self,
        leadership: &Leadership,
        assignments: Vec<Assignment>,
    ) -> Result<Claimed, ClaimError> {
        if assignments.len() > CLAIM_MAX {
            return Err(ClaimError::TooMany(assignments.len()));
        }
        if assignments.is_empty() {
            return Ok(Vec::new());
        }
        let ttl_ms = self.inner.lease.ttl_ms;
        let own = leadership.clone();
        let claimed = write_tx!(self, "claim jobs", [own, assignments], |tx| {
            if !leads(tx, &own).await? {
                return Ok(None);
            }
            claim(tx, &own.pool, &assignments, ttl_ms).await.map(Some)
        })?;
        claimed.ok_or_else(|| ClaimError::NotLeader(leadership.pool.clone()))
    }
}

/// What a claim is checked against; kept true while the batch is gone through.
struct Ledger {
    jobs: BTreeMap<JobId, Candidate>,
    workers: BTreeMap<WorkerId, Host>,
    tenants: BTreeMap<TenantName, u32>,
    queues: BTreeMap<QueueName, u32>,
    running: u32,
    limit: Option<u32>,
    groups: BTreeMap<(TenantName, Label), JobId>,
    now: u64,
}

struct Candidate {
    live: Live,
    paused: bool,
    tenant_max: Option<u32>,
    queue_max: Option<u32>,
}

struct Host {
    pool: PoolName,
    state: WorkerState,
    tenants: Option<BTreeSet<TenantName>>,
    free: Room,
}

async fn claim(
    tx: &mut Tx,
    pool: &PoolName,
    assignments: &[Assignment],
    ttl_ms: u64,
) -> Result<Claimed, DbError> {
    let mut ledger = ledger(tx, assignments).await?;
    let incarnation = crate::open::incarnation(tx).await?;
    let until = ledger.now + ttl_ms;
    let mut rows = Vec::new();
    let mut changes = Vec::new();
    let mut claimed = Vec::with_capacity(assignments.len());
    for assignment in assignments {
        let lease = ledger.take(pool, assignment).map(|live| {
            let epoch = Epoch {
                incarnation,
                count: live.epoch.count + 1,
            };
            rows.push(object!([live.id, assignment.worker, assignment.attempt.number, epoch.count]));
            changes.push(Change {
                job: live.id.clone(),
                tenant: live.tenant.clone(),
                seq: live.event_seq + 1,
                kind: live.state.name(),
                data: object!({ "attempt": assignment.attempt.number, "worker": assignment.worker }),
                notify_url: live.notify_url.clone(),
            });
            Lease {
                attempt: assignment.attempt.clone(),
                tenant: live.tenant.clone(),
                worker: assignment.worker.clone(),
                epoch,
                deadline_unix_ms: until,
            }
        });
        claimed.push(lease);
    }
    if !rows.is_empty() {
        write(tx, &json(&rows), incarnation, until).await?;
        announce(tx, &changes).await?;
        let workers: BTreeSet<_> = claimed.iter().flatten().map(|l| l.worker.clone()).collect();
        for worker in workers {
            tx.wake(Wake::Worker(worker));
        }
    }
    Ok(claimed)
}

async fn write(tx: &mut Tx, rows: &str, incarnation: u64, until: u64) -> Result<(), DbError> {
    let now = tx.now().await?;
    let sql = "update jobs set state = 'leased', worker = e.value ->> 1, life = $2,
            epoch = cast(e.value ->> 3 as bigint), leased_ms = $3, started_ms = null, phase = null,
            until_ms = case when jobs.requires like '%\"kiln/own\":%' then $5 else $4 end,
            estimate = null, event_seq = event_seq + 1, log_next = 0, log_home = ''
        from json_each($1) e where jobs.id = (e.value ->> 0)";
    tx.exec(
        sql,
        args![rows, incarnation, now, until, now + OWN_LEASE_MS],
    )
    .await?;
    let sql = "insert into attempts (job, number, worker, life, epoch, leased_ms)
        select e.value ->> 0, cast(e.value ->> 2 as bigint), e.value ->> 1, $2, cast(e.value ->> 3 as bigint), $3
        from json_each($1) e";
    tx.exec(sql, args![rows, incarnation, now]).await?;
    Ok(())
}

impl Ledger {
    /// Takes one job for one worker, if everything allows it.
    fn take(&mut self, pool: &PoolName, assignment: &Assignment) -> Result<Live, ClaimRefused> {
        let job = self.jobs.get(&assignment.attempt.job);
        let Candidate {
            live,
            paused,
            tenant_max,
            queue_max,
        } = job.ok_or(ClaimRefused::Gone)?;
        let refuse_state = ClaimRefused::NotQueued {
            state: live.state.name(),
            attempt: live.attempt().number,
        };
        if live.attempt() != assignment.attempt {
            return Err(refuse_state);
        }
        let Ok(state) = live.state.apply(JobEvent::Leased) else {
            return Err(refuse_state);
        };
        if live.cancel.is_some() {
            return Err(ClaimRefused::Cancelled);
        }
        if *paused {
            return Err(ClaimRefused::Paused(live.queue.clone()));
        }
        if live.ready_ms > self.now {
            return Err(ClaimRefused::Backoff {
                until_unix_ms: live.ready_ms,
            });
        }
        let tenant = self.tenants.entry(live.tenant.clone()).or_default();
        below(QuotaScope::Tenant, *tenant, *tenant_max)?;
        let queue = self.queues.entry(live.queue.clone()).or_default();
        below(QuotaScope::Queue, *queue, *queue_max)?;
        below(QuotaScope::Global, self.running, self.limit)?;
        let group = live.group.clone().map(|group| (live.tenant.clone(), group));
        if let Some(holder) = group.as_ref().and_then(|group| self.groups.get(group)) {
            return Err(ClaimRefused::GroupBusy {
                holder: holder.clone(),
            });
        }
        let host = self.workers.get_mut(&assignment.worker);
        let host = host.ok_or_else(|| ClaimRefused::UnknownWorker(assignment.worker.clone()))?;
        host.admits(pool, live, &assignment.worker)?;
        host.free = minus(host.free, live.need);
        *tenant += 1;
        *queue += 1;
        self.running += 1;
        if let Some(group) = group {
            self.groups.insert(group, live.id.clone());
        }
        let mut taken = live.clone();
        taken.state = state;
        if let Some(job) = self.jobs.get_mut(&assignment.attempt.job) {
            // A second assignment of the same job finds it taken.
            job.live.state = taken.state.clone();
        }
        Ok(taken)
    }
}

impl Host {
    fn admits(&self, pool: &PoolName, live: &Live, worker: &WorkerId) -> Result<(), ClaimRefused> {
        if live.pool != *pool || self.pool != *pool {
            return Err(ClaimRefused::OtherPool);
        }
        if !self.state.takes_jobs() {
            return Err(ClaimRefused::WorkerUnavailable {
                worker: worker.clone(),
                state: self.state,
            });
        }
        if self
            .tenants
            .as_ref()
            .is_some_and(|all| !all.contains(&live.tenant))
        {
            return Err(ClaimRefused::TenantNotAllowed {
                worker: worker.clone(),
                tenant: live.tenant.clone(),
            });
        }
        if !self.free.holds(&live.need) {
            return Err(ClaimRefused::NoRoom {
                worker: worker.clone(),
            });
        }
        Ok(())
    }
}

fn below(scope: QuotaScope, running: u32, limit: Option<u32>) -> Result<(), ClaimRefused> {
    match limit {
        Some(limit) if running >= limit => Err(ClaimRefused::Quota {
            scope,
            running,
            limit,
        }),
        _ => Ok(()),
    }
}

/// What is left of a room; never below nothing.
pub(crate) fn minus(room: Room, taken: Room) -> Room {
    let bytes = |a: kiln_core::ByteSize, b: kiln_core::ByteSize| {
        kiln_core::ByteSize(a.0.saturating_sub(b.0))
    };
    Room {
        cpus: room.cpus.saturating_sub(taken.cpus),
        memory: bytes(room.memory, taken.memory),
        disk: bytes(room.disk, taken.disk),
        machines: room.machines.saturating_sub(taken.machines),
    }
}

/// Reads and locks what the assignments are checked against.
async fn ledger(tx: &mut Tx, assignments: &[Assignment]) -> Result<Ledger, DbError> {
    // Claims of all pools are one after another here, so that limits across pools hold exactly.
    let limits = crate::tenant::limits(tx, true).await?;
    let (mut tenants, queues, running) = running(tx).await?;
    let mut workers = hosts(tx, assignments).await?;
    for (worker, tenant, room) in crate::kept::rooms(tx).await? {
        if let Some(host) = workers.get_mut(&worker) {
            host.free = minus(host.free, room);
        }
        *tenants.entry(tenant).or_default() += 1;
    }
    let now = tx.now().await?;
    Ok(Ledger {
        jobs: candidates(tx, assignments).await?,
        workers,
        tenants,
        queues,
        running,
        limit: limits.running_max,
        groups: groups(tx).await?,
        now,
    })
}

type Running = (BTreeMap<TenantName, u32>, BTreeMap<QueueName, u32>, u32);

/// Jobs that have a worker, by tenant and queue.
async fn running(tx: &mut Tx) -> Result<Running, DbError> {
    let sql = "select tenant, queue, count(*) as n from jobs where worker is not null group by tenant, queue";
    let (mut tenants, mut queues, mut all) = (BTreeMap::new(), BTreeMap::new(), 0);
    for row in tx.rows(sql, args![]).await? {
        let count = row.u32("n")?;
        *tenants.entry(row.parse("tenant")?).or_default() += count;
        *queues.entry(row.parse("queue")?).or_default() += count;
        all += count;
    }
    Ok((tenants, queues, all))
}

async fn candidates(
    tx: &mut Tx,
    assignments: &[Assignment],
) -> Result<BTreeMap<JobId, Candidate>, DbError> {
    let ids: BTreeSet<_> = assignments.iter().map(|a| &a.attempt.job).collect();
    let ids: Vec<_> = ids.into_iter().map(|id| [id]).collect();
    // What a tenant may have beyond its quota while it would be idle is the plan's to say, never more than this.
    let sql =
        "select j.*, t.running_max + t.burst as tenant_max, q.running_max as queue_max, q.paused_ms
        from json_each($1) e join jobs j on j.id = (e.value ->> 0)
            join tenants t on t.name = j.tenant join queues q on q.name = j.queue
        order by j.id /*lock j*/";
    let mut found = BTreeMap::new();
    for row in tx.rows(sql, args![json(&ids)]).await? {
        let live = Live::from_row(&row)?;
        let candidate = Candidate {
            paused: row.opt_int("paused_ms")?.is_some(),
            tenant_max: row.opt_u32("tenant_max")?,
            queue_max: row.opt_u32("queue_max")?,
            live,
        };
        found.insert(candidate.live.id.clone(), candidate);
    }
    Ok(found)
}

async fn hosts(
    tx: &mut Tx,
    assignments: &[Assignment],
) -> Result<BTreeMap<WorkerId, Host>, DbError> {
    let ids: BTreeSet<_> = assignments.iter().map(|a| &a.worker).collect();
    let ids: Vec<_> = ids.into_iter().map(|id| [id]).collect();
    let ids = json(&ids);
    let sql = "select w.* from json_each($1) e join workers w on w.id = (e.value ->> 0)
        where w.removed_ms is null order by w.id /*lock w*/";
    let mut found = BTreeMap::new();
    for row in tx.rows(sql, args![ids.as_str()]).await? {
        let facts: WorkerFacts = row.json("facts")?;
        let host = Host {
            pool: row.parse("pool")?,
            state: state_of(&row)?,
            tenants: row.opt_json("tenants")?,
            free: facts.capacity,
        };
        found.insert(row.parse("id")?, host);
    }
    for (worker, held) in held(tx, &ids).await? {
        if let Some(host) = found.get_mut(&worker) {
            host.free = minus(host.free, held);
        }
    }
    Ok(found)
}

/// Room that workers have given to jobs.
async fn held(tx: &mut Tx, ids: &str) -> Result<Vec<(WorkerId, Room)>, DbError> {
    let sql =
        "select worker, cast(sum(cpus) as bigint) as cpus, cast(sum(memory) as bigint) as memory,
            cast(sum(disk) as bigint) as disk, count(*) as n
        from jobs where worker in (select e.value ->> 0 from json_each($1) e) group by worker";
    let rows = tx.rows(sql, args![ids]).await?;
    rows.iter()
        .map(|row| {
            let mut room = crate::job::need(row)?;
            room.machines = row.u32("n")?;
            Ok((row.parse("worker")?, room))
        })
        .collect()
}

/// Who holds which concurrency group.
async fn groups(tx: &mut Tx) -> Result<BTreeMap<(TenantName, Label), JobId>, DbError> {
    let sql = "select tenant, grp, id from jobs where worker is not null and grp is not null";
    let rows = tx.rows(sql, args![]).await?;
    rows.iter()
        .map(|row| Ok(((row.parse("tenant")?, row.parse("grp")?), row.parse("id")?)))
        .collect()
}
