//! What is told of a job when it is over: the record of a machine that stayed.

use kiln_core::{AttemptId, WorkerId};
use serde_json::Value;

use crate::database::{Database, write_tx};
use crate::door::{DoorError, has_room, insert_record, written};
use crate::engine::args;
use crate::error::DbError;

/// What became of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HandedIn {
    /// It is an event of its job now.
    Kept,
    /// The attempt has one.
    Before,
    /// The job is not over: it may be handed in later.
    NotOver,
    /// There is no such attempt, it was not that worker's, or its job was forgotten.
    Unknown,
}

impl Database {
    /// Appends the record of a machine that stayed to its job, which is over. The last event is the report and says `attempt`: there is one for each. With
    /// `worker` the attempt must have been that one's.
    ///
    /// # Errors
    /// When a bound is reached, or the database does not answer.
    pub async fn hand_in(
        &self,
        attempt: &AttemptId,
        worker: Option<&WorkerId>,
        events: Vec<(&'static str, Value)>,
    ) -> Result<HandedIn, DoorError> {
        let events = written(events)?;
        let (attempt, worker) = (attempt.clone(), worker.cloned());
        write_tx!(
            self,
            "keep a machine's record",
            [attempt, worker, events],
            |tx| {
                let job = attempt.job.as_str();
                let sql = "select worker from attempts where job = $1 and number = $2";
                let row = tx.row(sql, args![job, attempt.number]).await?;
                let Some(row) = row else {
                    return Ok(Ok(HandedIn::Unknown));
                };
                let ran = row.text("worker")?;
                if let Some(worker) = &*worker
                    && worker.as_str() != ran
                {
                    return Ok(Ok(HandedIn::Unknown));
                }
                // First: whoever else hands one in waits.
                let more = events.len() as u64;
                let sql = "update history set event_seq = event_seq + $2 where id = $1";
                if tx.exec(sql, args![job, more]).await? == 0 {
                    let sql = "select 1 as one from jobs where id = $1";
                    let runs = tx.row(sql, args![job]).await?.is_some();
                    return Ok(Ok(match runs {
                        true => HandedIn::NotOver,
                        false => HandedIn::Unknown,
                    }));
                }
                let sql = "select event_seq from history where id = $1";
                let row = tx.row(sql, args![job]).await?;
                let last = row.ok_or(DbError::missing("event_seq"))?.u64("event_seq")?;
                let before = last - more;
                let kind = events.last().map_or("", |(kind, _)| *kind);
                let sql = "select data from events where job = $1 and kind = $2";
                let known = tx.rows(sql, args![job, kind]).await?;
                for row in &known {
                    if row.json::<Value>("data")?["attempt"] == attempt.number {
                        let sql = "update history set event_seq = $2 where id = $1";
                        tx.exec(sql, args![job, before]).await?;
                        return Ok(Ok(HandedIn::Before));
                    }
                }
                if let Err(refused) = has_room(before) {
                    let sql = "update history set event_seq = $2 where id = $1";
                    tx.exec(sql, args![job, before]).await?;
                    return Ok(Err(refused));
                }
                insert_record(tx, &attempt.job, before, &events).await?;
                Ok(Ok(HandedIn::Kept))
            }
        )?
    }
}
