//! Machines that stay on their workers when their jobs are over: whose, until when, and the lease that their workers' heartbeats renew.
//!
//! A row is written under the live lease of the attempt, before that ends, and has the attempt's epoch. It goes when its worker says that the
//! machine is gone, when the worker is not heard of, when its time is over, or when somebody ends it; a worker that names a machine without a row
//! is told to destroy it. So neither side's death leaves one for good.

use kiln_core::dispatch::Room;
use kiln_core::{AttemptId, Epoch, JobId, Lease, TenantName, WorkerId};

use crate::database::{Database, write_tx};
use crate::door::DoorError;
use crate::engine::{Row, Tx, args, json};
use crate::error::DbError;
use crate::lease::admit;
use crate::wake::Wake;

/// Most rows that one list gives.
pub const KEPT_LISTED_MAX: u32 = 1_000;
/// Rows that one sweep takes away.
const SWEPT_MAX: u32 = 200;

/// A machine that is to stay.
#[derive(Clone, PartialEq, Debug)]
pub struct NewKept {
    /// For how long, milliseconds.
    pub stays_ms: u64,
    /// What people are shown of it.
    pub facts: serde_json::Value,
    /// Most machines that its tenant may keep.
    pub tenant_max: u32,
    /// The controller that its worker speaks to, by the URL others reach it by; empty: there is one.
    pub home: String,
}

/// A machine that a worker keeps.
#[derive(Clone, PartialEq, Debug)]
pub struct Kept {
    /// The attempt it was made for.
    pub attempt: AttemptId,
    /// Whose it is.
    pub tenant: TenantName,
    /// Who asked for the job.
    pub owner: String,
    /// Who keeps it.
    pub worker: WorkerId,
    /// Under which claim.
    pub epoch: Epoch,
    /// What it takes of its worker.
    pub need: Room,
    /// What people are shown of it: a worker's claim.
    pub facts: serde_json::Value,
    /// Since when, milliseconds since the Unix epoch, as are the following.
    pub since_unix_ms: u64,
    /// Until when.
    pub until_unix_ms: u64,
    /// When it is given up unless its worker is heard of.
    pub live_until_unix_ms: u64,
    /// See [`NewKept::home`].
    pub home: String,
}

/// Why a machine does not stay.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The lease is not the live one, or the database failed.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// Its tenant keeps as many as it may.
    #[error("tenant {tenant} keeps {most} machines already, and may keep no more")]
    TooMany {
        /// Whose.
        tenant: TenantName,
        /// How many.
        most: u32,
    },
}

impl From<DbError> for KeepError {
    fn from(error: DbError) -> Self {
        Self::Door(error.into())
    }
}

impl Database {
    /// Notes, under the live lease of an attempt, that its machine stays. Again is no error.
    ///
    /// # Errors
    /// See [`KeepError`].
    pub async fn keep_machine(&self, lease: &Lease, new: NewKept) -> Result<Kept, KeepError> {
        let (lease, ttl_ms) = (lease.clone(), self.inner.lease.ttl_ms);
        write_tx!(self, "keep a machine", [lease, new], |tx| {
            let live = match admit(tx, &lease).await? {
                Ok(live) => live,
                Err(refused) => return Ok(Err(KeepError::Door(refused.into()))),
            };
            let known = find(tx, &lease.attempt.job).await?;
            if let Some(known) = known.filter(|known| known.is_of(&lease)) {
                return Ok(Ok(known));
            }
            let sql = "select count(*) as n from kept where tenant = $1";
            let row = tx.row(sql, args![live.tenant.as_str()]).await?;
            if row.ok_or(DbError::missing("n"))?.u32("n")? >= new.tenant_max {
                return Ok(Err(KeepError::TooMany {
                    tenant: live.tenant.clone(),
                    most: new.tenant_max,
                }));
            }
            let now = tx.now().await?;
            let id = lease.attempt.job.as_str();
            // One of an earlier attempt has lost its row, and so its worker ends it.
            tx.exec("delete from kept where job = $1", args![id])
                .await?;
            let sql = "insert into kept (job, tenant, owner, pool, worker, attempt, life, epoch, cpus, memory, disk, facts,
                    since_ms, until_ms, live_ms, home)
                select id, tenant, submitted_by, pool, worker, $2, life, epoch, cpus, memory, disk, $3, $4, $5, $6, $7
                from jobs where id = $1";
            let values = args![
                id,
                lease.attempt.number,
                json(&new.facts),
                now,
                now.saturating_add(new.stays_ms),
                now + ttl_ms,
                new.home.as_str(),
            ];
            tx.exec(sql, values).await?;
            let kept = find(tx, &lease.attempt.job).await?;
            Ok(kept
                .ok_or(DbError::missing("kept"))
                .map_err(KeepError::from))
        })?
    }

    /// The machine that is kept of a job.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn kept(&self, job: &JobId) -> Result<Option<Kept>, DbError> {
        let job = job.clone();
        self.read("read a kept machine", |tx| {
            Box::pin(async move { find(tx, &job).await })
        })
        .await
    }

    /// Kept machines of a tenant or of all, oldest job first, at most [`KEPT_LISTED_MAX`].
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn kept_machines(&self, tenant: Option<&TenantName>) -> Result<Vec<Kept>, DbError> {
        let tenant = tenant.cloned();
        self.read("list kept machines", |tx| {
            Box::pin(async move {
                let sql = "select * from kept where $1 = '' or tenant = $1 order by job limit $2";
                let name = tenant.as_ref().map_or("", TenantName::as_str);
                let rows = tx.rows(sql, args![name, KEPT_LISTED_MAX]).await?;
                rows.iter().map(kept_row).collect()
            })
        })
        .await
    }

    /// Takes a worker's word that it keeps these machines: for each whether it may go on.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn renew_kept(
        &self,
        worker: &WorkerId,
        held: &[(AttemptId, Epoch)],
    ) -> Result<Vec<bool>, DbError> {
        if held.is_empty() {
            return Ok(Vec::new());
        }
        let (worker, held, ttl_ms) = (worker.clone(), held.to_vec(), self.inner.lease.ttl_ms);
        write_tx!(self, "renew kept machines", [worker, held], |tx| {
            let now = tx.now().await?;
            let sql = "select * from kept where worker = $1 order by job /*lock kept*/";
            let rows = tx.rows(sql, args![worker.as_str()]).await?;
            let rows: Vec<Kept> = rows.iter().map(kept_row).collect::<Result<_, _>>()?;
            let (mut answers, mut extended) = (Vec::with_capacity(held.len()), Vec::new());
            for (attempt, epoch) in held.iter() {
                let row = rows
                    .iter()
                    .find(|row| row.attempt == *attempt && row.epoch == *epoch);
                let lives =
                    row.is_some_and(|row| now < row.live_until_unix_ms && now < row.until_unix_ms);
                if lives {
                    extended.push([&attempt.job]);
                }
                answers.push(lives);
            }
            if !extended.is_empty() {
                let sql = "update kept set live_ms = $2 where worker = $3 and live_ms < $2
                    and job in (select e.value ->> 0 from json_each($1) e)";
                let values = args![json(&extended), now + ttl_ms, worker.as_str()];
                tx.exec(sql, values).await?;
            }
            Ok(answers)
        })
    }

    /// Forgets kept machines: their worker says that they are gone, or whoever may wants them to go. False for those that had no row.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn forget_kept(
        &self,
        worker: &WorkerId,
        attempt: &AttemptId,
        epoch: Epoch,
    ) -> Result<bool, DbError> {
        let (worker, attempt) = (worker.clone(), attempt.clone());
        write_tx!(self, "forget a kept machine", [worker, attempt], |tx| {
            let sql = "select * from kept where job = $1 /*lock kept*/";
            let Some(row) = tx.row(sql, args![attempt.job.as_str()]).await? else {
                return Ok(false);
            };
            let kept = kept_row(&row)?;
            if kept.worker != *worker || kept.attempt != *attempt || kept.epoch != epoch {
                return Ok(false);
            }
            forget(tx, &[row]).await.map(|gone| gone == 1)
        })
    }

    /// Forgets everything that a worker kept: its process has just started, or ends.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn forget_kept_of(&self, worker: &WorkerId) -> Result<u32, DbError> {
        let worker = worker.clone();
        write_tx!(self, "forget a worker's kept machines", [worker], |tx| {
            let sql = "select * from kept where worker = $1 order by job /*lock kept*/";
            let rows = tx.rows(sql, args![worker.as_str()]).await?;
            forget(tx, &rows).await
        })
    }

    /// Gives up machines whose workers were not heard of, or whose time is over: `grace_ms` after that, so that their workers were first. Nothing
    /// before `not_before_unix_ms`. Gives what was given up.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn expire_kept(
        &self,
        not_before_unix_ms: u64,
        grace_ms: u64,
    ) -> Result<Vec<Kept>, DbError> {
        write_tx!(self, "give up kept machines", [], |tx| {
            let now = tx.now().await?;
            if now < not_before_unix_ms {
                return Ok(Vec::new());
            }
            let before = now.saturating_sub(grace_ms);
            let sql =
                "select * from kept where live_ms <= $1 or until_ms <= $1 order by job limit $2
                /*lock kept skip*/";
            let rows = tx.rows(sql, args![before, SWEPT_MAX]).await?;
            forget(tx, &rows).await?;
            rows.iter().map(kept_row).collect()
        })
    }

    /// Notes to which controller a worker speaks: others reach its machines by it.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn kept_home(&self, worker: &WorkerId, home: &str) -> Result<(), DbError> {
        let (worker, home) = (worker.clone(), home.to_owned());
        write_tx!(self, "note where a worker is", [worker, home], |tx| {
            let sql = "update kept set home = $2 where worker = $1 and home <> $2";
            tx.exec(sql, args![worker.as_str(), home.as_str()])
                .await
                .map(drop)
        })
    }
}

impl Kept {
    fn is_of(&self, lease: &Lease) -> bool {
        (&self.attempt, &self.worker, self.epoch) == (&lease.attempt, &lease.worker, lease.epoch)
    }
}

async fn find(tx: &mut Tx, job: &JobId) -> Result<Option<Kept>, DbError> {
    let row = tx.row("select * from kept where job = $1", args![job.as_str()]);
    row.await?.as_ref().map(kept_row).transpose()
}

/// Room is free again: whoever waits for it is looked at.
async fn forget(tx: &mut Tx, rows: &[Row]) -> Result<u32, DbError> {
    let mut gone = 0;
    for row in rows {
        let sql = "delete from kept where job = $1";
        let deleted = tx.exec(sql, args![row.text("job")?]).await?;
        gone += u32::try_from(deleted).unwrap_or(u32::MAX);
        tx.wake(Wake::Queue(row.parse("pool")?));
    }
    Ok(gone)
}

/// What kept machines take, by worker. One whose job still holds its lease is counted there.
pub(crate) async fn rooms(tx: &mut Tx) -> Result<Vec<(WorkerId, TenantName, Room)>, DbError> {
    let sql = "select k.worker, k.tenant, k.cpus, k.memory, k.disk from kept k
        where not exists (select 1 from jobs j where j.id = k.job and j.worker is not null)";
    let rows = tx.rows(sql, args![]).await?;
    rows.iter()
        .map(|row| {
            let room = crate::job::need(row)?;
            Ok((row.parse("worker")?, row.parse("tenant")?, room))
        })
        .collect()
}

/// As leases do, kept machines live for one TTL more when a file is opened.
pub(crate) async fn settle(tx: &mut Tx, live_ms: u64) -> Result<(), DbError> {
    let sql = "update kept set live_ms = $1";
    tx.exec(sql, args![live_ms]).await.map(drop)
}

fn kept_row(row: &Row) -> Result<Kept, DbError> {
    Ok(Kept {
        attempt: AttemptId {
            job: row.parse("job")?,
            number: row.u32("attempt")?,
        },
        tenant: row.parse("tenant")?,
        owner: row.text("owner")?,
        worker: row.parse("worker")?,
        epoch: Epoch {
            incarnation: row.u64("life")?,
            count: row.u64("epoch")?,
        },
        need: crate::job::need(row)?,
        facts: row.json("facts")?,
        since_unix_ms: row.u64("since_ms")?,
        until_unix_ms: row.u64("until_ms")?,
        live_until_unix_ms: row.u64("live_ms")?,
        home: row.text("home")?,
    })
}
