//! The end of an attempt: back into the queue, or over for good. The only code that takes a row out of the queue.

use kiln_core::job::JobEvent;
use kiln_core::{FailureClass, JobState, Outcome, Receipt, Verdict, WorkerId};

use crate::announce::{Change, announce};
use crate::engine::{Tx, args, json};
use crate::error::{Cause, DbError};
use crate::job::{CancelMark, Live, verdict_name};
use crate::wake::Wake;

/// First wait before an attempt of ours is tried again.
const BACKOFF_FIRST_MS: u64 = 5_000;
/// Longest wait.
const BACKOFF_MAX_MS: u64 = 300_000;

/// What comes with the end of an attempt.
#[derive(Default)]
pub(crate) struct Ending<'a> {
    pub(crate) receipt: Option<&'a Receipt>,
    pub(crate) observed: Option<&'a serde_json::Value>,
    /// Earliest begin of the next attempt, if there is one.
    pub(crate) ready_ms: u64,
    /// How the attempt ended, if not as the event says: a lost one of a job that should stop.
    pub(crate) attempt: Option<&'a Outcome>,
}

/// Wait before the next attempt: 5 s doubled with each failed one, at most 5 min, and up to half as much again by `jitter`.
pub(crate) fn backoff_ms(failed: u32, jitter: u64, job: &str) -> u64 {
    let doubled = BACKOFF_FIRST_MS.saturating_mul(1 << failed.saturating_sub(1).min(16));
    let base = doubled.min(BACKOFF_MAX_MS);
    // Jobs that failed together do not come back together.
    let mixed = job
        .bytes()
        .fold(jitter ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    (base + base * (mixed % 1000) / 2000).min(BACKOFF_MAX_MS)
}

/// The outcome of a job that was stopped because somebody asked.
pub(crate) fn cancelled(mark: &CancelMark, phases_ms: Vec<(String, u64)>) -> Outcome {
    let message = match &mark.reason {
        Some(reason) => format!("cancelled by {}: {reason}", mark.by),
        None => format!("cancelled by {}", mark.by),
    };
    Outcome {
        verdict: Verdict::Failed {
            class: FailureClass::Cancelled,
            message,
            hint: None,
            command_code: None,
            reason: None,
        },
        phases_ms,
    }
}

/// Applies an event that ends an attempt, or a job that waits. The row must be locked by this transaction.
pub(crate) async fn end(
    tx: &mut Tx,
    live: &Live,
    event: JobEvent,
    ending: &Ending<'_>,
) -> Result<JobState, DbError> {
    let ended = match &event {
        JobEvent::AttemptFailed { outcome, .. } | JobEvent::Ended { outcome } => outcome.clone(),
        JobEvent::Leased | JobEvent::Started => return Err(misused()),
    };
    let next = live.state.apply(event).map_err(|error| DbError::Failed {
        doing: "end an attempt",
        cause: Cause::other(error),
    })?;
    let now = tx.now().await?;
    if live.worker.is_some() {
        let sql = "update attempts set ended_ms = $3, verdict = $4, outcome = $5 where job = $1 and number = $2";
        let attempt = ending.attempt.unwrap_or(&ended);
        let values = args![
            live.id.as_str(),
            live.attempt().number,
            now,
            verdict_name(attempt),
            json(attempt),
        ];
        tx.exec(sql, values).await?;
    }
    let changed = match &next {
        JobState::Finished { outcome } => finish(tx, live, outcome, ending, now).await?,
        JobState::Queued { attempts } => requeue(tx, live, *attempts, ending.ready_ms).await?,
        JobState::Leased { .. } | JobState::Running { .. } => return Err(misused()),
    };
    if changed != 1 {
        return Err(DbError::Busy {
            doing: "end an attempt",
            cause: Cause::other("the job changed meanwhile"),
        });
    }
    let mut data = serde_json::json!({
        "verdict": verdict_name(&ended),
        "outcome": ended,
        "attempt": live.worker.as_ref().map(|_| live.attempt().number),
        "worker": live.worker,
    });
    if matches!(next, JobState::Queued { .. }) {
        data["ready_unix_ms"] = ending.ready_ms.into();
    }
    let change = Change {
        job: live.id.clone(),
        tenant: live.tenant.clone(),
        seq: live.event_seq + 1,
        kind: next.name(),
        data,
        notify_url: live.notify_url.clone(),
    };
    announce(tx, &[change]).await?;
    tx.wake(Wake::Queue(live.pool.clone()));
    if let Some(worker) = &live.worker {
        tx.wake(Wake::Worker(worker.clone()));
    }
    Ok(next)
}

fn misused() -> DbError {
    DbError::Failed {
        doing: "end an attempt",
        cause: Cause::other("this event ends nothing"),
    }
}

async fn requeue(tx: &mut Tx, live: &Live, attempts: u32, ready_ms: u64) -> Result<u64, DbError> {
    let mut avoid = live.avoid.clone();
    avoid.extend(live.worker.clone());
    let reason = kiln_core::PendingReason::Backoff {
        until_unix_ms: ready_ms,
    };
    let sql = "update jobs set state = 'queued', attempts = $3, ready_ms = $4, avoid = $5, reason = $6,
            estimate = null, phase = null, worker = null, leased_ms = null, until_ms = null, started_ms = null,
            event_seq = event_seq + 1
        where id = $1 and epoch = $2 and worker is not null";
    let values = args![
        live.id.as_str(),
        live.epoch.count,
        attempts,
        ready_ms,
        json(&avoid),
        json(&reason),
    ];
    tx.exec(sql, values).await
}

async fn finish(
    tx: &mut Tx,
    live: &Live,
    outcome: &Outcome,
    ending: &Ending<'_>,
    now: u64,
) -> Result<u64, DbError> {
    // The row goes first: whoever takes it out is the one who ends the job.
    let attempts = match &live.state {
        JobState::Queued { attempts } => *attempts,
        JobState::Leased { attempt } | JobState::Running { attempt } => *attempt,
        JobState::Finished { .. } => return Err(misused()),
    };
    let sql = "insert into history (id, tenant, pool, queue, kind, name, priority, cpus, memory, tags, labels,
            submitted_by, notify_url, created_ms, attempts, worker, leased_ms, started_ms, finished_ms, verdict,
            outcome, receipt, observed, cancel_ms, cancel_by, cancel_reason, event_seq, log_next, tier, hold)
        select id, tenant, pool, queue, kind, name, priority, cpus, memory, tags, labels, submitted_by, notify_url,
            created_ms, $3, worker, leased_ms, started_ms, $4, $5, $6, $7, $8, cancel_ms, cancel_by,
            cancel_reason, event_seq + 1, log_next, 'hot',
            (select count(*) from holds where holds.kind = 'job' and holds.name = jobs.id)
        from jobs where id = $1 and epoch = $2 and state = $9";
    let values = args![
        live.id.as_str(),
        live.epoch.count,
        attempts,
        now,
        verdict_name(outcome),
        json(outcome),
        ending.receipt.map(json),
        ending.observed.map(json),
        live.state.name(),
    ];
    let written = tx.exec(sql, values).await?;
    let sql = "delete from jobs where id = $1 and epoch = $2 and state = $3";
    let values = args![live.id.as_str(), live.epoch.count, live.state.name()];
    let deleted = tx.exec(sql, values).await?;
    Ok(written.min(deleted))
}

/// Failures in a row after which a worker gets no more jobs.
pub(crate) const FAILURES_MAX: u32 = 3;

/// Counts an end for or against a worker; gives the reason when this quarantined it.
pub(crate) async fn judge(
    tx: &mut Tx,
    worker: &WorkerId,
    outcome: &Outcome,
) -> Result<Option<String>, DbError> {
    match &outcome.verdict {
        Verdict::Failed {
            class: FailureClass::Infrastructure,
            message,
            ..
        } => {
            let sql = "update workers set infra_failures = infra_failures + 1 where id = $1";
            tx.exec(sql, args![worker.as_str()]).await?;
            let reason: String = format!(
                "{FAILURES_MAX} jobs in a row failed for reasons of this worker; last: {message}"
            )
            .chars()
            .take(500)
            .collect();
            let sql =
                "update workers set state = 'quarantined', state_by = 'kiln', state_reason = $3
                where id = $1 and infra_failures >= $2 and state in ('active', 'draining')";
            let values = args![worker.as_str(), FAILURES_MAX, reason.as_str()];
            let quarantined = tx.exec(sql, values).await? == 1;
            Ok(quarantined.then_some(reason))
        }
        // A guest that broke the protocol says nothing about its host, nor does a cancel.
        Verdict::Failed {
            class: FailureClass::GuestFault | FailureClass::Lost | FailureClass::Cancelled,
            ..
        } => Ok(None),
        _ => {
            let sql = "update workers set infra_failures = 0 where id = $1 and infra_failures <> 0";
            tx.exec(sql, args![worker.as_str()]).await.map(|_| None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_within_its_bounds() {
        for jitter in 0..200 {
            let first = backoff_ms(1, jitter, "b1");
            assert!((5_000..=7_500).contains(&first), "{first}");
            let third = backoff_ms(3, jitter, "b1");
            assert!((20_000..=30_000).contains(&third), "{third}");
            assert_eq!(backoff_ms(60, jitter, "b1"), BACKOFF_MAX_MS);
        }
        let spread: std::collections::BTreeSet<u64> = (0..50)
            .map(|job| backoff_ms(1, 7, &format!("b{job}")))
            .collect();
        assert!(spread.len() > 25, "{spread:?}");
    }
}
