//! Leases while they live: heartbeats that extend them, and the check at every door.

use std::collections::BTreeMap;

use kiln_core::dispatch::{WorkerFacts, WorkerState};
use kiln_core::lease::LeaseRefused;
use kiln_core::{AttemptId, JobId, Lease, WorkerId};

use crate::database::{Database, write_tx};
use crate::engine::{Tx, args, json};
use crate::error::DbError;
use crate::job::Live;
use crate::own::OWN_LEASE_MS;
use crate::wake::Wake;
use crate::worker::state_of;

/// Why a heartbeat was not taken.
#[derive(Debug, thiserror::Error)]
pub enum HeartbeatError {
    /// No such worker, or it was removed: it destroys what it runs.
    #[error("there is no worker {0}, or it was removed")]
    UnknownWorker(WorkerId),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DbError),
}

/// The answer to a heartbeat.
#[derive(Clone, PartialEq, Debug)]
pub struct Heartbeat {
    /// What the operator or kiln made of the worker.
    pub state: WorkerState,
    /// One answer for each lease it said it holds, in its order.
    pub leases: Vec<(AttemptId, LeaseAnswer)>,
    /// Leases of the worker that it did not name: on their way to it, or lost by it.
    pub unnamed: Vec<UnnamedLease>,
}

/// What became of one lease.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LeaseAnswer {
    /// It lives on.
    Live {
        /// Until when, by the database's clock.
        until_unix_ms: u64,
        /// Somebody asked to stop the job.
        cancel: bool,
    },
    /// It is dead: its machines go.
    Refused(LeaseRefused),
}

/// A lease that the worker did not name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnnamedLease {
    /// The lease.
    pub lease: Lease,
    /// How long ago it was given.
    pub age_ms: u64,
}

impl Database {
    /// Takes a worker's heartbeat: its facts, and all leases it holds, which live on for another TTL.
    ///
    /// # Errors
    /// When the worker is not one of ours.
    pub async fn heartbeat(
        &self,
        worker: &WorkerId,
        facts: &WorkerFacts,
        held: &[Lease],
    ) -> Result<Heartbeat, HeartbeatError> {
        let ttl_ms = self.inner.lease.ttl_ms;
        let (id, facts, held) = (worker.clone(), facts.clone(), held.to_vec());
        let answer = write_tx!(self, "take a heartbeat", [id, facts, held], |tx| {
            beat(tx, &id, &facts, &held, ttl_ms).await
        })?;
        answer.ok_or_else(|| HeartbeatError::UnknownWorker(worker.clone()))
    }
}

async fn beat(
    tx: &mut Tx,
    worker: &WorkerId,
    facts: &WorkerFacts,
    held: &[Lease],
    ttl_ms: u64,
) -> Result<Option<Heartbeat>, DbError> {
    // Jobs before workers, here and everywhere: transactions that lock both never wait for each other.
    let mut live = of_worker(tx, worker).await?;
    let sql = "select * from workers where id = $1 and removed_ms is null /*lock workers*/";
    let Some(row) = tx.row(sql, args![worker.as_str()]).await? else {
        return Ok(None);
    };
    let now = tx.now().await?;
    let returned = row.flag("lost")?;
    let facts_text = json(facts);
    if returned || row.text("facts")? != facts_text {
        tx.wake(Wake::Queue(row.parse("pool")?));
    }
    let sql = "update workers set facts = $2, seen_ms = $3, lost = 0 where id = $1";
    tx.exec(sql, args![worker.as_str(), facts_text, now])
        .await?;
    let state = if returned {
        crate::worker::admin_state(&row)?
    } else {
        state_of(&row)?
    };
    let until_unix_ms = now + ttl_ms;
    let (mut leases, mut extended) = (Vec::with_capacity(held.len()), Vec::new());
    for lease in held {
        let row = live.remove(&lease.attempt.job);
        let answer = match check_row(tx, lease, row.as_ref(), now).await? {
            Ok(()) => {
                extended.push([&lease.attempt.job]);
                LeaseAnswer::Live {
                    until_unix_ms,
                    cancel: row.as_ref().is_some_and(|row| row.cancel.is_some()),
                }
            }
            Err(refused) => LeaseAnswer::Refused(refused),
        };
        leases.push((lease.attempt.clone(), answer));
    }
    if !extended.is_empty() {
        let sql = "update jobs set until_ms = case when requires like '%\"kiln/own\":%' then $4 else $2 end
            where worker = $3 and id in (select e.value ->> 0 from json_each($1) e)";
        let values = args![
            json(&extended),
            until_unix_ms,
            worker.as_str(),
            now + OWN_LEASE_MS
        ];
        tx.exec(sql, values).await?;
    }
    let unnamed = live.into_values().filter_map(|row| {
        let age_ms = now.saturating_sub(row.leased_ms?);
        let lease = row.lease()?;
        Some(UnnamedLease { lease, age_ms })
    });
    let unnamed = unnamed.collect();
    Ok(Some(Heartbeat {
        state,
        leases,
        unnamed,
    }))
}

/// All jobs that a worker holds.
async fn of_worker(tx: &mut Tx, worker: &WorkerId) -> Result<BTreeMap<JobId, Live>, DbError> {
    let sql = "select j.* from jobs j where j.worker = $1 order by j.id /*lock j*/";
    let mut found = BTreeMap::new();
    for row in tx.rows(sql, args![worker.as_str()]).await? {
        let live = Live::from_row(&row)?;
        found.insert(live.id.clone(), live);
    }
    Ok(found)
}

/// Checks a presented lease against a row that this worker holds; when it holds none, looks who does.
async fn check_row(
    tx: &mut Tx,
    lease: &Lease,
    own: Option<&Live>,
    now: u64,
) -> Result<Result<(), LeaseRefused>, DbError> {
    if let Some(row) = own {
        return Ok(lease.check(row.lease().as_ref(), now));
    }
    let other = find_live(tx, &lease.attempt.job, Lock::No).await?;
    Ok(lease.check(other.and_then(|row| row.lease()).as_ref(), now))
}

/// Whether a row is locked until the transaction ends.
#[derive(Clone, Copy)]
pub(crate) enum Lock {
    Yes,
    No,
}

/// The queue's row of a job.
pub(crate) async fn find_live(
    tx: &mut Tx,
    job: &JobId,
    lock: Lock,
) -> Result<Option<Live>, DbError> {
    let sql = match lock {
        Lock::Yes => "select j.* from jobs j where j.id = $1 /*lock j*/",
        Lock::No => "select j.* from jobs j where j.id = $1",
    };
    let row = tx.row(sql, args![job.as_str()]).await?;
    row.as_ref().map(Live::from_row).transpose()
}

/// The check of every door: locks the row and compares worker, epoch and deadline with the live lease.
pub(crate) async fn admit(
    tx: &mut Tx,
    lease: &Lease,
) -> Result<Result<Live, LeaseRefused>, DbError> {
    let row = find_live(tx, &lease.attempt.job, Lock::Yes).await?;
    let now = tx.now().await?;
    let live = row.as_ref().and_then(Live::lease);
    match (lease.check(live.as_ref(), now), row) {
        (Ok(()), Some(row)) => Ok(Ok(row)),
        (Err(refused), _) => Ok(Err(refused)),
        (Ok(()), None) => Ok(Err(LeaseRefused::Ended {
            attempt: lease.attempt.clone(),
        })),
    }
}
