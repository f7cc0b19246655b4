//! Stopping a job: a mark on its row, set once. It wins over a finish only when it came first.

use kiln_core::job::JobEvent;
use kiln_core::{JobId, JobState, Outcome};

use crate::announce::{Change, announce};
use crate::close::{self, Ending};
use crate::database::{Database, write_tx};
use crate::engine::{Tx, args};
use crate::error::DbError;
use crate::job::CancelMark;
use crate::lease::{Lock, find_live};
use crate::wake::Wake;

/// What came of asking to stop a job.
#[derive(Clone, PartialEq, Debug)]
pub enum Cancelled {
    /// It waited, and is over now.
    Ended,
    /// A worker has it and will be told with its next heartbeat; asked before or now.
    Asked,
    /// It was over already.
    TooLate(Outcome),
}

/// Why nothing was cancelled.
#[derive(Debug, thiserror::Error)]
pub enum CancelError {
    /// No such job.
    #[error("there is no job {0}")]
    UnknownJob(JobId),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DbError),
}

impl Database {
    /// Asks to stop a job. Asking again changes nothing: the first one's name and reason stay.
    ///
    /// # Errors
    /// When there is no such job.
    pub async fn cancel(
        &self,
        job: &JobId,
        by: &str,
        reason: Option<&str>,
    ) -> Result<Cancelled, CancelError> {
        let (id, by, reason) = (job.clone(), by.to_owned(), reason.map(str::to_owned));
        let answer = write_tx!(self, "cancel a job", [id, by, reason], |tx| {
            cancel(tx, &id, &by, reason.as_deref()).await
        })?;
        answer.ok_or_else(|| CancelError::UnknownJob(job.clone()))
    }
}

async fn cancel(
    tx: &mut Tx,
    id: &JobId,
    by: &str,
    reason: Option<&str>,
) -> Result<Option<Cancelled>, DbError> {
    let Some(mut live) = find_live(tx, id, Lock::Yes).await? else {
        let job = crate::list::find(tx, id).await?;
        return Ok(job.and_then(|job| match job.state {
            JobState::Finished { outcome } => Some(Cancelled::TooLate(outcome)),
            _ => None,
        }));
    };
    if live.cancel.is_some() {
        return Ok(Some(Cancelled::Asked));
    }
    let mark = CancelMark {
        at_unix_ms: tx.now().await?,
        by: by.to_owned(),
        reason: reason.map(str::to_owned),
    };
    let sql = "update jobs set cancel_ms = $2, cancel_by = $3, cancel_reason = $4, event_seq = event_seq + 1
        where id = $1";
    tx.exec(sql, args![id.as_str(), mark.at_unix_ms, by, reason])
        .await?;
    live.event_seq += 1;
    let change = Change {
        job: id.clone(),
        tenant: live.tenant.clone(),
        seq: live.event_seq,
        kind: "cancelling",
        data: serde_json::json!({ "by": by, "reason": reason }),
        notify_url: None,
    };
    announce(tx, &[change]).await?;
    if let Some(worker) = &live.worker {
        tx.wake(Wake::Worker(worker.clone()));
        return Ok(Some(Cancelled::Asked));
    }
    let event = JobEvent::Ended {
        outcome: close::cancelled(&mark, Vec::new()),
    };
    close::end(tx, &live, event, &Ending::default()).await?;
    Ok(Some(Cancelled::Ended))
}
