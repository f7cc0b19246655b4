//! Reading jobs: one, its attempts, its artifacts, and lists page by page.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use kiln_core::{
    AttemptId, Digest, Epoch, JobId, JobState, Label, PendingReason, Priority, QueueName,
    TenantName, WorkerId,
};

use crate::database::Database;
use crate::engine::{Row, Tx, args, json};
use crate::error::DbError;
use crate::job::{Attempt, Job, finished_job, live_job};

/// Most rows of one page.
pub const PAGE_MAX: u32 = 500;

/// Which jobs a list holds. Empty fields do not filter.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct JobFilter {
    /// Of this tenant alone.
    pub tenant: Option<TenantName>,
    /// In this queue.
    pub queue: Option<QueueName>,
    /// In one of these states: `queued`, `leased`, `running`, `finished`.
    pub states: BTreeSet<String>,
    /// Finished with this verdict: `passed`, or a failure class.
    pub verdict: Option<String>,
    /// With this tag.
    pub tag: Option<Label>,
    /// With this label and value.
    pub label: Option<(Label, Label)>,
    /// Asked for by.
    pub submitted_by: Option<String>,
    /// On this worker, now or last.
    pub worker: Option<WorkerId>,
}

/// Where a page ends: opaque for callers, kept in their links.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cursor {
    created_ms: u64,
    id: JobId,
}

/// Why a text is not a cursor.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("this is not a cursor of kiln: use the one from the page before")]
pub struct ParseCursorError;

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.created_ms, self.id)
    }
}

impl FromStr for Cursor {
    type Err = ParseCursorError;

    fn from_str(text: &str) -> Result<Self, ParseCursorError> {
        let (created, id) = text.split_once('.').ok_or(ParseCursorError)?;
        if created.is_empty() || !created.bytes().all(|b| b.is_ascii_digit()) {
            return Err(ParseCursorError);
        }
        Ok(Self {
            created_ms: created.parse().map_err(|_| ParseCursorError)?,
            id: id.parse().map_err(|_| ParseCursorError)?,
        })
    }
}

/// One page, newest first.
#[derive(Clone, PartialEq, Debug)]
pub struct Page<T> {
    /// The rows.
    pub items: Vec<T>,
    /// Where the next page begins; none after the last one.
    pub next: Option<Cursor>,
}

/// A line of a list.
#[derive(Clone, PartialEq, Debug)]
pub struct JobSummary {
    /// Id.
    pub id: JobId,
    /// Whose.
    pub tenant: TenantName,
    /// Its queue.
    pub queue: QueueName,
    /// `source_build`, `image_build` or `run`.
    pub kind: String,
    /// What is built or run, in a few words.
    pub name: String,
    /// Its order.
    pub priority: Priority,
    /// Where it stands.
    pub state: JobState,
    /// Whether somebody asked to stop it.
    pub cancel_asked: bool,
    /// Why it waits, while it is queued.
    pub reason: Option<PendingReason>,
    /// When it came.
    pub created_unix_ms: u64,
    /// When its machine was ready.
    pub started_unix_ms: Option<u64>,
    /// When it was over.
    pub finished_unix_ms: Option<u64>,
    /// The worker that has or had it.
    pub worker: Option<WorkerId>,
    /// Who asked.
    pub submitted_by: String,
    /// Tags.
    pub tags: BTreeSet<Label>,
}

/// A stored artifact of a job.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Artifact {
    /// Its name within the job.
    pub name: String,
    /// Digest of its content.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub media_type: String,
}

impl Database {
    /// A job with everything that is kept of it.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn job(&self, id: &JobId) -> Result<Option<Job>, DbError> {
        let id = id.clone();
        self.read("read a job", |tx| {
            Box::pin(async move { find(tx, &id).await })
        })
        .await
    }

    /// The attempts of a job, first first.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn attempts(&self, id: &JobId) -> Result<Vec<Attempt>, DbError> {
        let id = id.clone();
        let sql =
            "select job, number, worker, life, epoch, leased_ms, started_ms, ended_ms, outcome
            from attempts where job = $1 order by number";
        self.read("read a job's attempts", |tx| {
            Box::pin(async move {
                let rows = tx.rows(sql, args![id.as_str()]).await?;
                rows.iter().map(attempt).collect()
            })
        })
        .await
    }

    /// The artifacts of a job, by name.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn artifacts(&self, id: &JobId) -> Result<Vec<Artifact>, DbError> {
        let id = id.clone();
        let sql =
            "select name, digest, size, media_type from artifacts where job = $1 order by name";
        self.read("read a job's artifacts", |tx| {
            Box::pin(async move {
                let rows = tx.rows(sql, args![id.as_str()]).await?;
                rows.iter()
                    .map(|row| {
                        Ok(Artifact {
                            name: row.text("name")?,
                            digest: row.parse("digest")?,
                            size: row.u64("size")?,
                            media_type: row.text("media_type")?,
                        })
                    })
                    .collect()
            })
        })
        .await
    }

    /// Jobs, newest first, at most `limit` (and [`PAGE_MAX`]) of them, after `after`.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn jobs(
        &self,
        filter: &JobFilter,
        after: Option<&Cursor>,
        limit: u32,
    ) -> Result<Page<JobSummary>, DbError> {
        let (filter, after) = (filter.clone(), after.cloned());
        let limit = limit.clamp(1, PAGE_MAX);
        self.read("list jobs", |tx| {
            Box::pin(async move { page(tx, &filter, after.as_ref(), limit).await })
        })
        .await
    }
}

/// A job, wherever it is.
pub(crate) async fn find(tx: &mut Tx, id: &JobId) -> Result<Option<Job>, DbError> {
    let live = "select j.*, r.body from jobs j join requests r on r.job = j.id where j.id = $1";
    let over = "select h.*, r.body from history h join requests r on r.job = h.id where h.id = $1";
    // It may move from one table to the other between two reads, but only in this direction.
    if let Some(row) = tx.row(live, args![id.as_str()]).await? {
        return live_job(&row).map(Some);
    }
    let row = tx.row(over, args![id.as_str()]).await?;
    row.as_ref().map(finished_job).transpose()
}

pub(crate) fn attempt(row: &Row) -> Result<Attempt, DbError> {
    Ok(Attempt {
        id: AttemptId {
            job: row.parse("job")?,
            number: row.u32("number")?,
        },
        worker: row.parse("worker")?,
        epoch: Epoch {
            incarnation: row.u64("life")?,
            count: row.u64("epoch")?,
        },
        leased_unix_ms: row.u64("leased_ms")?,
        started_unix_ms: row.opt_u64("started_ms")?,
        ended_unix_ms: row.opt_u64("ended_ms")?,
        outcome: row.opt_json("outcome")?,
    })
}

/// The list, of one tenant (which its index serves) or of all.
macro_rules! list_sql {
    ($tenant:literal) => {
        concat!(
            "select * from (select id, tenant, queue, kind, name, priority, state, attempts, cancel_ms, reason,
                created_ms, started_ms, cast(null as bigint) as finished_ms, worker, submitted_by, tags,
                cast(null as text) as outcome
            from jobs where ", $tenant, "
                and (created_ms < $2 or (created_ms = $2 and id < $3))
                and ($4 = '' or queue = $4)
                and ($5 = '[]' or replace($5, '\"' || state || '\"', '') <> $5)
                and ($6 = '')
                and ($7 = '' or replace(tags, $7, '') <> tags)
                and ($8 = '' or replace(labels, $8, '') <> labels)
                and ($9 = '' or submitted_by = $9)
                and ($10 = '' or worker = $10)
            order by created_ms desc, id desc limit $11) a
            union all
            select * from (select id, tenant, queue, kind, name, priority, 'finished' as state, attempts, cancel_ms,
                cast(null as text) as reason, created_ms, started_ms, finished_ms, worker, submitted_by, tags, outcome
            from history where ", $tenant, "
                and (created_ms < $2 or (created_ms = $2 and id < $3))
                and ($4 = '' or queue = $4)
                and ($5 = '[]' or replace($5, '\"finished\"', '') <> $5)
                and ($6 = '' or verdict = $6)
                and ($7 = '' or replace(tags, $7, '') <> tags)
                and ($8 = '' or replace(labels, $8, '') <> labels)
                and ($9 = '' or submitted_by = $9)
                and ($10 = '' or worker = $10)
            order by created_ms desc, id desc limit $11) b
            order by created_ms desc, id desc limit $11"
        )
    };
}

async fn page(
    tx: &mut Tx,
    filter: &JobFilter,
    after: Option<&Cursor>,
    limit: u32,
) -> Result<Page<JobSummary>, DbError> {
    let sql = if filter.tenant.is_some() {
        list_sql!("tenant = $1")
    } else {
        list_sql!("$1 = ''")
    };
    let quoted = |label: &Label| format!("\"{label}\"");
    let label = filter.label.as_ref();
    let values = args![
        filter.tenant.as_ref().map_or("", TenantName::as_str),
        after.map_or(i64::MAX as u64, |cursor| cursor.created_ms),
        after.map_or("", |cursor| cursor.id.as_str()),
        filter.queue.as_ref().map_or("", QueueName::as_str),
        json(&filter.states),
        filter.verdict.as_deref().unwrap_or_default(),
        filter.tag.as_ref().map(quoted).unwrap_or_default(),
        label
            .map(|(name, value)| format!("\"{name}\":\"{value}\""))
            .unwrap_or_default(),
        filter.submitted_by.as_deref().unwrap_or_default(),
        filter.worker.as_ref().map_or("", WorkerId::as_str),
        limit + 1,
    ];
    let rows = tx.rows(sql, values).await?;
    let mut items = rows.iter().map(summary).collect::<Result<Vec<_>, _>>()?;
    let more = items.len() > limit as usize;
    items.truncate(limit as usize);
    let next = items.last().filter(|_| more).map(|last| Cursor {
        created_ms: last.created_unix_ms,
        id: last.id.clone(),
    });
    Ok(Page { items, next })
}

fn summary(row: &Row) -> Result<JobSummary, DbError> {
    let state = match row.opt_json("outcome")? {
        Some(outcome) => JobState::Finished { outcome },
        None => crate::job::live_state(row)?,
    };
    let queued = matches!(state, JobState::Queued { .. });
    let priority = i16::try_from(row.int("priority")?).unwrap_or_default();
    Ok(JobSummary {
        id: row.parse("id")?,
        tenant: row.parse("tenant")?,
        queue: row.parse("queue")?,
        kind: row.text("kind")?,
        name: row.text("name")?,
        priority: Priority::try_from(priority)
            .map_err(|error| DbError::unreadable("priority", error))?,
        state,
        cancel_asked: row.opt_int("cancel_ms")?.is_some(),
        reason: if queued {
            row.opt_json("reason")?
        } else {
            None
        },
        created_unix_ms: row.u64("created_ms")?,
        started_unix_ms: row.opt_u64("started_ms")?,
        finished_unix_ms: row.opt_u64("finished_ms")?,
        worker: row.opt_parse("worker")?,
        submitted_by: row.text("submitted_by")?,
        tags: row.json("tags")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_survives_its_text_and_nothing_else_is_one() {
        let cursor: Cursor = "1767225600000.b01".parse().expect("reads");
        assert_eq!(cursor.to_string(), "1767225600000.b01");
        for bad in [
            "",
            ".",
            "1",
            "1.",
            "-1.b",
            "1.B",
            "1.b'--",
            "99999999999999999999.b",
            "+1.b",
        ] {
            assert!(bad.parse::<Cursor>().is_err(), "{bad}");
        }
    }
}
