//! Events of a job, in order, for those who follow it.

use kiln_core::JobId;
use serde_json::Value;

use crate::database::Database;
use crate::engine::args;
use crate::error::DbError;
use crate::list::PAGE_MAX;

/// Something that happened to a job.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    /// Its number within the job: from 1, without gaps.
    pub seq: u64,
    /// When, milliseconds since the Unix epoch, by the database's clock.
    pub at_unix_ms: u64,
    /// `queued`, `leased`, `running`, `finished`, `cancelling`, `phase`, or what the worker called it.
    pub kind: String,
    /// More, as data.
    pub data: Value,
}

/// How far a job's events have come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EventMark {
    /// Number of the last one.
    pub last: u64,
    /// The job is over: no more will come, but for the record of a machine that stayed.
    pub over: bool,
}

impl Database {
    /// How far a job's events have come, for many who look often; none without such a job.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn event_mark(&self, job: &JobId) -> Result<Option<EventMark>, DbError> {
        let job = job.clone();
        self.read("see whether a job has news", |tx| {
            Box::pin(async move {
                let sql = "select event_seq, cast(0 as bigint) as ended from jobs where id = $1
                    union all select event_seq, cast(1 as bigint) as ended from history where id = $1";
                let row = tx.row(sql, args![job.as_str()]).await?;
                row.map(|row| {
                    Ok(EventMark {
                        last: row.u64("event_seq")?,
                        over: row.int("ended")? == 1,
                    })
                })
                .transpose()
            })
        })
        .await
    }

    /// Events of a job after the one numbered `after`, at most `limit` (and [`PAGE_MAX`]).
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn events_after(
        &self,
        job: &JobId,
        after: u64,
        limit: u32,
    ) -> Result<Vec<Event>, DbError> {
        let job = job.clone();
        self.read("read a job's events", |tx| {
            Box::pin(async move {
                let sql = "select seq, at_ms, kind, data from events where job = $1 and seq > $2 order by seq limit $3";
                let rows = tx.rows(sql, args![job.as_str(), after, limit.min(PAGE_MAX)]);
                rows.await?
                    .iter()
                    .map(|row| {
                        Ok(Event {
                            seq: row.u64("seq")?,
                            at_unix_ms: row.u64("at_ms")?,
                            kind: row.text("kind")?,
                            data: row.json("data")?,
                        })
                    })
                    .collect()
            })
        })
        .await
    }
}
