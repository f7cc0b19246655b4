//! Stage 2: a request becomes a job of the queue.

use kiln_core::{JobId, JobState, PendingReason, PoolName, QueueName, TenantName};

use crate::announce::{Change, announce};
use crate::database::{Database, write_tx};
use crate::engine::{Tx, args, json};
use crate::error::DbError;
use crate::job::{Job, NewJob, kind_name, title};
use crate::wake::Wake;

/// What came of a submission.
#[derive(Clone, PartialEq, Debug)]
pub struct Submitted {
    /// The job.
    pub job: Job,
    /// It was there already: the same key with the same body came before.
    pub repeated: bool,
}

/// Why a job was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The key came before, with another body.
    #[error("the idempotency key {key:?} was used for another request, job {job}")]
    KeyConflict {
        /// The key.
        key: String,
        /// What it named first.
        job: JobId,
    },
    /// There is a job with this id.
    #[error("there is a job {0} already")]
    Exists(JobId),
    /// No such tenant.
    #[error("there is no tenant {0}")]
    UnknownTenant(TenantName),
    /// No such queue.
    #[error("there is no queue {0}")]
    UnknownQueue(QueueName),
    /// The tenant has as many waiting jobs as it may.
    #[error("tenant {tenant} has {pending} jobs waiting, at most {limit} are allowed")]
    TooManyPending {
        /// Whose.
        tenant: TenantName,
        /// Waiting now.
        pending: u32,
        /// Most.
        limit: u32,
    },
    /// As many bytes are kept for the tenant as may be.
    #[error("{stored} bytes are kept for tenant {tenant}, at most {limit} are allowed")]
    TooMuchStored {
        /// Whose.
        tenant: TenantName,
        /// Bytes of the requests of its jobs.
        stored: u64,
        /// Most.
        limit: u64,
    },
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DbError),
}

impl Database {
    /// Puts a job into its queue, once for each idempotency key.
    ///
    /// # Errors
    /// When the key came with another body, tenant or queue do not exist, or too much waits already.
    pub async fn submit(&self, new: NewJob) -> Result<Submitted, SubmitError> {
        let id = new.request.id.clone();
        let placed = write_tx!(self, "submit a job", [new], |tx| place(tx, &new).await)?;
        let (id, repeated) = match placed? {
            Placed::New => (id, false),
            Placed::Known(id) => (id, true),
        };
        let job = self.job(&id).await?;
        let job = job.ok_or_else(|| DbError::unreadable("id", "the job has gone already"))?;
        Ok(Submitted { job, repeated })
    }
}

enum Placed {
    New,
    Known(JobId),
}

async fn place(tx: &mut Tx, new: &NewJob) -> Result<Result<Placed, SubmitError>, DbError> {
    let now = tx.now().await?;
    match take_key(tx, new, now).await? {
        Ok(None) => {}
        Ok(Some(known)) => return Ok(Ok(Placed::Known(known))),
        Err(refused) => return Ok(Err(refused)),
    }
    let body = json(&new.request);
    let refused = match admit(tx, new, body.len() as u64).await? {
        Ok(pool) => {
            if insert(tx, new, &pool, body, now).await? {
                return Ok(Ok(Placed::New));
            }
            SubmitError::Exists(new.request.id.clone())
        }
        Err(refused) => refused,
    };
    if let Some(key) = &new.idempotency {
        // A refused request leaves its key free.
        let sql = "delete from idempotency where tenant = $1 and key = $2";
        tx.exec(sql, args![new.request.tenant.as_str(), key.key.as_str()])
            .await?;
    }
    Ok(Err(refused))
}

/// Takes the idempotency key; gives the job that has it already.
async fn take_key(
    tx: &mut Tx,
    new: &NewJob,
    now: u64,
) -> Result<Result<Option<JobId>, SubmitError>, DbError> {
    let Some(key) = &new.idempotency else {
        return Ok(Ok(None));
    };
    let (tenant, id) = (new.request.tenant.as_str(), new.request.id.as_str());
    let sql =
        "insert into idempotency (tenant, key, body, job, created_ms) values ($1, $2, $3, $4, $5)
        on conflict (tenant, key) do nothing";
    let body = key.body.to_string();
    let values = args![tenant, key.key.as_str(), body.as_str(), id, now];
    if tx.exec(sql, values).await? == 1 {
        return Ok(Ok(None));
    }
    let sql = "select body, job from idempotency where tenant = $1 and key = $2";
    let row = tx.row(sql, args![tenant, key.key.as_str()]).await?;
    let row = row.ok_or(DbError::missing("key"))?;
    let job: JobId = row.parse("job")?;
    if row.text("body")? == body {
        return Ok(Ok(Some(job)));
    }
    Ok(Err(SubmitError::KeyConflict {
        key: key.key.clone(),
        job,
    }))
}

/// Whether tenant and queue take a job whose request has so many bytes; gives the queue's pool.
async fn admit(
    tx: &mut Tx,
    new: &NewJob,
    body: u64,
) -> Result<Result<PoolName, SubmitError>, DbError> {
    let (tenant, queue) = (&new.request.tenant, &new.request.dispatch.queue);
    let sql = "select t.pending_max, t.stored_max, t.stored, q.pool
        from tenants t left join queues q on q.name = $2 where t.name = $1";
    let Some(row) = tx.row(sql, args![tenant.as_str(), queue.as_str()]).await? else {
        return Ok(Err(SubmitError::UnknownTenant(tenant.clone())));
    };
    let Some(pool) = row.opt_parse("pool")? else {
        return Ok(Err(SubmitError::UnknownQueue(queue.clone())));
    };
    if let Some(limit) = row.opt_u32("pending_max")? {
        let sql = "select count(*) as n from jobs where tenant = $1 and state = 'queued'";
        let row = tx.row(sql, args![tenant.as_str()]).await?;
        let pending = row.ok_or(DbError::missing("n"))?.u32("n")?;
        if pending >= limit {
            return Ok(Err(SubmitError::TooManyPending {
                tenant: tenant.clone(),
                pending,
                limit,
            }));
        }
    }
    let (stored, limit) = (row.u64("stored")?, row.opt_u64("stored_max")?);
    if let Some(limit) = limit.filter(|limit| stored.saturating_add(body) > *limit) {
        return Ok(Err(SubmitError::TooMuchStored {
            tenant: tenant.clone(),
            stored,
            limit,
        }));
    }
    Ok(Ok(pool))
}

/// Writes the rows; false when there is such a job already.
async fn insert(
    tx: &mut Tx,
    new: &NewJob,
    pool: &PoolName,
    body: String,
    now: u64,
) -> Result<bool, DbError> {
    let request = &new.request;
    let bytes = body.len() as u64;
    let sql = "insert into requests (job, body) values ($1, $2) on conflict (job) do nothing";
    if tx.exec(sql, args![request.id.as_str(), body]).await? == 0 {
        return Ok(false);
    }
    let sql = "update tenants set stored = stored + $2 where name = $1";
    tx.exec(sql, args![request.tenant.as_str(), bytes]).await?;
    let (limits, dispatch) = (&request.limits, &request.dispatch);
    let sql = "insert into jobs (id, tenant, pool, queue, kind, name, priority, cpus, memory, disk, timeout_ms,
            requires, grp, tags, labels, submitted_by, notify_url, created_ms, state, attempts, attempts_max,
            ready_ms, avoid, reason, life, epoch, event_seq, log_next)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, 'queued', 0, $19,
            $18, '[]', $20, 0, 0, 1, 0)";
    let values = args![
        request.id.as_str(),
        request.tenant.as_str(),
        pool.as_str(),
        dispatch.queue.as_str(),
        kind_name(&request.kind),
        title(&request.kind),
        i64::from(dispatch.priority.get()),
        limits.cpus,
        limits.memory.0,
        limits.disk.0,
        limits.timeout_ms,
        json(&dispatch.requires),
        dispatch
            .concurrency_group
            .as_ref()
            .map(|group| group.as_str()),
        json(&dispatch.tags),
        json(&new.labels),
        new.submitted_by.as_str(),
        new.notify_url.as_deref(),
        now,
        dispatch.attempts_max.max(1),
        json(&PendingReason::New),
    ];
    tx.exec(sql, values).await?;
    let change = Change {
        job: request.id.clone(),
        tenant: request.tenant.clone(),
        seq: 1,
        kind: JobState::new().name(),
        data: serde_json::json!({ "queue": dispatch.queue, "attempts": 0 }),
        notify_url: new.notify_url.clone(),
    };
    announce(tx, &[change]).await?;
    tx.wake(Wake::Queue(pool.clone()));
    Ok(true)
}
