//! Leases that ended without a word: their jobs go back into the queue, or are over; their workers are lost.

use kiln_core::job::JobEvent;
use kiln_core::{FailureClass, JobState, Lease, Outcome, Verdict, WorkerId};

use crate::close::{self, Ending};
use crate::database::{Database, LeaseTimes, write_tx};
use crate::engine::{Tx, args};
use crate::error::DbError;
use crate::job::Live;
use crate::own::OWN_LEASE_MS;
use crate::wake::Wake;

/// Leases given up in one transaction.
const EXPIRE_MAX: u32 = 200;

/// How one sweep decides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sweep {
    /// Nothing expires before this time of the database's clock: one TTL after a controller's start, workers have had the chance
    /// to report. See [`Database::sweep_from`].
    pub not_before_unix_ms: u64,
    /// A lease is given away this long after its end.
    pub grace_ms: u64,
    /// A random number, for the backoff.
    pub jitter: u64,
}

/// A lease that was given up.
#[derive(Clone, PartialEq, Debug)]
pub struct Expired {
    /// The lease.
    pub lease: Lease,
    /// Where its job stands now.
    pub state: JobState,
}

/// What a sweep did.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Swept {
    /// Leases given up. Call again when there are many: one sweep takes a bounded number.
    pub expired: Vec<Expired>,
    /// Workers that are lost since this sweep.
    pub lost: Vec<WorkerId>,
}

impl Database {
    /// The earliest time anything may expire for a controller that starts now.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn sweep_from(&self) -> Result<u64, DbError> {
        Ok(self.now().await? + self.inner.lease.ttl_ms)
    }

    /// Gives up leases whose end plus grace has passed. Their attempts failed as lost: another follows, elsewhere first, while
    /// attempts are left; the backoff counts from the end of the lease. A job that should stop is over as cancelled.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn expire(&self, sweep: Sweep) -> Result<Swept, DbError> {
        let silence_ms = self.inner.lease.ttl_ms + sweep.grace_ms;
        write_tx!(self, "expire leases", [], |tx| {
            let now = tx.now().await?;
            if now < sweep.not_before_unix_ms {
                return Ok(Swept::default());
            }
            let lost = lose_workers(tx, now.saturating_sub(silence_ms)).await?;
            let expired = expire(tx, now.saturating_sub(sweep.grace_ms), sweep.jitter).await?;
            Ok(Swept { expired, lost })
        })
    }
}

async fn expire(tx: &mut Tx, ended_before: u64, jitter: u64) -> Result<Vec<Expired>, DbError> {
    let sql = "select j.* from jobs j where j.worker is not null and j.until_ms <= $1 order by j.id limit $2
        /*lock j skip*/";
    let rows = tx.rows(sql, args![ended_before, EXPIRE_MAX]).await?;
    let mut expired = Vec::with_capacity(rows.len());
    for row in rows {
        let live = Live::from_row(&row)?;
        let Some(lease) = live.lease() else { continue };
        let state = give_up(tx, &live, &lease, jitter).await?;
        expired.push(Expired { lease, state });
    }
    Ok(expired)
}

/// Ends an attempt whose worker is not heard of any more.
pub(crate) async fn give_up(
    tx: &mut Tx,
    live: &Live,
    lease: &Lease,
    jitter: u64,
) -> Result<JobState, DbError> {
    let lost = Outcome {
        verdict: Verdict::Failed {
            class: FailureClass::Lost,
            message: format!("worker {} was not heard of any more", lease.worker),
            hint: None,
            command_code: None,
            reason: None,
        },
        phases_ms: Vec::new(),
    };
    let event = match &live.cancel {
        Some(mark) => JobEvent::Ended {
            outcome: close::cancelled(mark, Vec::new()),
        },
        None => JobEvent::AttemptFailed {
            outcome: lost.clone(),
            attempts_max: live.attempts_max,
        },
    };
    let backoff = close::backoff_ms(lease.attempt.number, jitter, live.id.as_str());
    let ending = Ending {
        ready_ms: lease.deadline_unix_ms + backoff,
        attempt: Some(&lost),
        ..Ending::default()
    };
    close::end(tx, live, event, &ending).await
}

async fn lose_workers(tx: &mut Tx, seen_before: u64) -> Result<Vec<WorkerId>, DbError> {
    let sql = "select id, pool from workers where lost = 0 and removed_ms is null and seen_ms <= $1 order by id
        /*lock workers skip*/";
    let mut lost = Vec::new();
    for row in tx.rows(sql, args![seen_before]).await? {
        let worker: WorkerId = row.parse("id")?;
        let sql = "update workers set lost = 1 where id = $1";
        tx.exec(sql, args![worker.as_str()]).await?;
        tx.wake(Wake::Queue(row.parse("pool")?));
        lost.push(worker);
    }
    Ok(lost)
}

/// When a file is opened its leases live for one TTL more: the clock may have been set while nobody looked, and workers have had
/// nobody to report to.
pub(crate) async fn settle(tx: &mut Tx, times: LeaseTimes) -> Result<(), DbError> {
    let now = tx.now().await?;
    let sql =
        "update jobs set until_ms = case when requires like '%\"kiln/own\":%' then $2 else $1 end
        where worker is not null";
    tx.exec(sql, args![now + times.ttl_ms, now + OWN_LEASE_MS])
        .await?;
    crate::kept::settle(tx, now + times.ttl_ms).await?;
    let sql = "update workers set seen_ms = $1 where lost = 0";
    tx.exec(sql, args![now]).await?;
    let sql = "update jobs set ready_ms = $1 where ready_ms > $1 + 300000";
    tx.exec(sql, args![now]).await?;
    let sql = "update leaders set until_ms = 0";
    tx.exec(sql, args![]).await.map(drop)
}
