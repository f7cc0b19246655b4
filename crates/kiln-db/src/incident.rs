//! Jobs that are ended because of what they did: at once, with everything they could act by, and remembered.

use kiln_core::job::JobEvent;
use kiln_core::{FailureClass, JobId, JobState, Outcome, Verdict, WorkerId};
use serde::{Deserialize, Serialize};

use crate::announce::{Change, announce};
use crate::audit::{NewAudit, write_audit};
use crate::cancel::CancelError;
use crate::close::{self, Ending};
use crate::database::{Database, write_tx};
use crate::engine::{Tx, args};
use crate::error::DbError;
use crate::hold::{Hold, hold};
use crate::lease::{Lock, find_live};

/// What audit rows of an incident call it.
pub const INCIDENT: &str = "job.incident";
/// What the event of an incident is called.
const EVENT: &str = "incident";

/// Who ends a job, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewIncident {
    /// Who, for people who look at the job.
    pub by: String,
    /// Who, for the audit trail.
    pub actor: String,
    /// In a few words; may be empty.
    pub note: String,
    /// That the job's record and log are put on hold: no sweep takes them.
    pub hold: bool,
}

/// A job that was ended as an incident.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EndedIncident {
    /// Who ended it.
    pub by: String,
    /// Why.
    pub note: String,
    /// When, milliseconds since the Unix epoch, by the database's clock.
    pub at_unix_ms: u64,
    /// Who had it.
    pub worker: Option<WorkerId>,
    /// Its record and log are on hold.
    pub held: bool,
}

/// What came of ending a job as an incident.
#[derive(Clone, PartialEq, Debug)]
pub enum Incidented {
    /// It is over, and so is its lease: no door takes anything under that any more.
    Ended(EndedIncident),
    /// It was over already.
    TooLate(Outcome),
}

impl Database {
    /// Ends a job at once. Unlike a cancel it asks nobody: the lease is over with this transaction, and its worker finds out.
    ///
    /// # Errors
    /// When there is no such job.
    pub async fn end_as_incident(
        &self,
        job: &JobId,
        incident: NewIncident,
    ) -> Result<Incidented, CancelError> {
        let id = job.clone();
        let answer = write_tx!(self, "end a job as an incident", [id, incident], |tx| {
            end(tx, &id, &incident).await
        })?;
        answer.ok_or_else(|| CancelError::UnknownJob(job.clone()))
    }

    /// The incident by which a job ended, if it did.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn incident_of(&self, job: &JobId) -> Result<Option<EndedIncident>, DbError> {
        let job = job.clone();
        self.read("look for an incident", |tx| {
            Box::pin(async move {
                let sql =
                    "select data from events where job = $1 and kind = $2 order by seq limit 1";
                let row = tx.row(sql, args![job.as_str(), EVENT]).await?;
                row.map(|row| row.json("data")).transpose()
            })
        })
        .await
    }
}

async fn end(
    tx: &mut Tx,
    id: &JobId,
    incident: &NewIncident,
) -> Result<Option<Incidented>, DbError> {
    let Some(mut live) = find_live(tx, id, Lock::Yes).await? else {
        let job = crate::list::find(tx, id).await?;
        return Ok(job.and_then(|job| match job.state {
            JobState::Finished { outcome } => Some(Incidented::TooLate(outcome)),
            _ => None,
        }));
    };
    let (by, note) = (&incident.by, &incident.note);
    let message = match note.is_empty() {
        true => format!("ended as an incident by {by}"),
        false => format!("ended as an incident by {by}: {note}"),
    };
    // Before its end: that is marked as it stands then.
    let held = incident.hold
        && hold(tx, &Hold::Job(id.clone()), by, &message)
            .await?
            .is_ok();
    let ended = EndedIncident {
        by: by.clone(),
        note: note.clone(),
        at_unix_ms: tx.now().await?,
        worker: live.worker.clone(),
        held,
    };
    let sql = "update jobs set event_seq = event_seq + 1 where id = $1";
    tx.exec(sql, args![id.as_str()]).await?;
    live.event_seq += 1;
    let change = Change {
        job: id.clone(),
        tenant: live.tenant.clone(),
        seq: live.event_seq,
        kind: EVENT,
        data: serde_json::json!(ended),
        notify_url: None,
    };
    announce(tx, &[change]).await?;
    let row = NewAudit {
        actor: incident.actor.clone(),
        tenant: Some(live.tenant.clone()),
        action: INCIDENT.to_owned(),
        target: id.to_string(),
        allowed: true,
        reason: None,
        detail: Some(serde_json::json!({ "incident": ended, "lease": live.lease() })),
    };
    write_audit(tx, &row).await?;
    let event = JobEvent::Ended {
        outcome: Outcome {
            verdict: Verdict::Failed {
                class: FailureClass::Cancelled,
                message,
                hint: None,
                command_code: None,
                reason: None,
            },
            phases_ms: Vec::new(),
        },
    };
    close::end(tx, &live, event, &Ending::default()).await?;
    Ok(Some(Incidented::Ended(ended)))
}
