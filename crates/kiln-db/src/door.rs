//! Doors: side effects of an attempt. Each takes the lease and checks worker and live epoch in the transaction of its effect.

use kiln_core::artifact::{ARTIFACTS_BYTES_MAX, ARTIFACTS_MAX};
use kiln_core::job::JobEvent;
use kiln_core::lease::LeaseRefused;
use kiln_core::{FailureClass, JobId, JobState, Lease, Outcome, Receipt, Verdict};
use serde_json::{Value, json as object};

use crate::announce::{Change, announce};
use crate::audit::{NewAudit, write_audit};
use crate::close::{self, Ending};
use crate::database::{Database, write_tx};
use crate::engine::{Tx, args, json};
use crate::error::{Cause, DbError};
use crate::job::Live;
use crate::lease::{Lock, admit, find_live};
use crate::list::{Artifact, attempt};
use crate::wake::Wake;

/// Longest kind of an event or name of a phase, in bytes.
pub const EVENT_KIND_MAX: usize = 60;
/// Largest data of one event, in bytes of JSON.
pub const EVENT_BYTES_MAX: usize = 64 * 1024;
/// Most events of one job, but for its record.
pub const EVENTS_MAX: u64 = 100_000;
/// Most events of a record: what is told of an attempt at its end has room, however much was told while it ran.
pub const RECORD_EVENTS_MAX: usize = 64;
/// Most records that find room beyond [`EVENTS_MAX`].
const RECORDS_MAX: u64 = 64;

/// Why a door stayed closed.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// The lease is not the live one.
    #[error(transparent)]
    Lease(#[from] LeaseRefused),
    /// Somebody asked to stop the job: nothing may be published any more.
    #[error("the job is being cancelled")]
    Cancelled,
    /// A bound of this door is reached.
    #[error("{0}")]
    TooMuch(String),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DbError),
}

/// Doors whose effect is elsewhere: the marker is written here, then the caller acts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DoorKind {
    /// The source is handed out.
    Source,
    /// A secret is handed out.
    Secret,
    /// The policy in the commit of a build is judged.
    Policy,
    /// A registry token is made.
    RegistryToken,
    /// A registry upload or manifest of this attempt.
    RegistryPush,
    /// The verified image gets its names.
    Tag,
    /// A cache head is committed.
    HeadCommit,
    /// A statement is signed.
    Statement,
    /// A command runs in the machine beside the job's own.
    Exec,
}

impl DoorKind {
    /// Stable short name, for audit rows and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Secret => "secret",
            Self::Policy => "policy",
            Self::RegistryToken => "registry_token",
            Self::RegistryPush => "registry_push",
            Self::Tag => "tag",
            Self::HeadCommit => "head_commit",
            Self::Statement => "statement",
            Self::Exec => "exec",
        }
    }

    /// Whether the door closes as soon as somebody asked to stop the job.
    #[must_use]
    pub fn closes_on_cancel(self) -> bool {
        !matches!(self, Self::Source | Self::RegistryPush | Self::Exec)
    }
}

/// An effect that is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Door {
    /// Which door.
    pub kind: DoorKind,
    /// What exactly, for the audit row: the secret's name, the references.
    pub detail: String,
}

/// How an attempt ended, as its worker reports it.
#[derive(Clone, PartialEq, Debug)]
pub struct AttemptEnd {
    /// What came of it.
    pub outcome: Outcome,
    /// What was stored.
    pub receipt: Option<Receipt>,
    /// What the host saw.
    pub observed: Option<Value>,
    /// A random number, for the backoff.
    pub jitter: u64,
}

/// What became of a job whose attempt ended.
#[derive(Clone, PartialEq, Debug)]
pub struct Finish {
    /// Where the job stands now: over, or queued again.
    pub state: JobState,
    /// The report came before; nothing was changed now.
    pub repeated: bool,
    /// Why the worker gets no more jobs, if this was the failure that did it.
    pub quarantined: Option<String>,
    /// Builds of the job's pipeline that failed in a row, this one included; 0 when it passed or says nothing about its pipeline.
    pub failed_in_a_row: u32,
}

/// Where a log goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogMark {
    /// The next offset that is wanted.
    pub next: u64,
    /// Whether the piece was taken; else it came before, or a piece before it is missing.
    pub taken: bool,
}

type Admitted<T> = Result<T, DoorError>;

impl Database {
    /// Whether a lease is the live one, for doors whose effect is not in the database. A refusal is an audit row.
    ///
    /// # Errors
    /// The reason for refusing.
    pub async fn check_lease(&self, lease: &Lease) -> Result<(), DoorError> {
        let asked = lease.clone();
        let checked = self.read("check a lease", |tx| {
            Box::pin(async move {
                let row = find_live(tx, &asked.attempt.job, Lock::No).await?;
                let now = tx.now().await?;
                Ok(asked.check(row.and_then(|row| row.lease()).as_ref(), now))
            })
        });
        let Err(refused) = checked.await? else {
            return Ok(());
        };
        let (asked, reason) = (lease.clone(), refused.to_string());
        write_tx!(self, "note a refused lease", [asked, reason], |tx| {
            audit(tx, &asked, "lease", None, Some(&reason)).await
        })?;
        Err(refused.into())
    }

    /// The machine is ready. Saying it twice is no error.
    ///
    /// # Errors
    /// When the lease is not the live one.
    pub async fn started(&self, lease: &Lease) -> Result<(), DoorError> {
        let lease = lease.clone();
        write_tx!(self, "start an attempt", [lease], |tx| {
            match enter(tx, &lease, "started").await? {
                Ok(live) => started(tx, &live).await.map(Ok),
                Err(refused) => Ok(Err(refused)),
            }
        })?
    }

    /// A phase began.
    ///
    /// # Errors
    /// When the lease is not the live one, or the name is too long.
    pub async fn phase(&self, lease: &Lease, name: &str) -> Result<u64, DoorError> {
        self.event(
            lease,
            "phase",
            object!({ "phase": name }),
            Some(name.to_owned()),
        )
        .await
    }

    /// Appends an event to the job; gives its number.
    ///
    /// # Errors
    /// When the lease is not the live one, or a bound is reached.
    pub async fn append_event(
        &self,
        lease: &Lease,
        kind: &str,
        data: Value,
    ) -> Result<u64, DoorError> {
        self.event(lease, kind, data, None).await
    }

    /// Appends the record of an attempt that ends, its events one after the other; gives the number of the last.
    ///
    /// # Errors
    /// When the lease is not the live one, or a bound is reached.
    pub async fn append_record(
        &self,
        lease: &Lease,
        events: Vec<(&'static str, Value)>,
    ) -> Result<u64, DoorError> {
        let events = written(events)?;
        let lease = lease.clone();
        write_tx!(self, "append a record", [lease, events], |tx| {
            let live = match enter(tx, &lease, "record").await? {
                Ok(live) => live,
                Err(refused) => return Ok(Err(refused)),
            };
            if let Err(refused) = has_room(live.event_seq) {
                return Ok(Err(refused));
            }
            let sql = "update jobs set event_seq = $2 where id = $1";
            let last = live.event_seq + events.len() as u64;
            tx.exec(sql, args![live.id.as_str(), last]).await?;
            insert_record(tx, &live.id, live.event_seq, &events).await?;
            Ok(Ok(last))
        })?
    }

    async fn event(
        &self,
        lease: &Lease,
        kind: &str,
        data: Value,
        phase: Option<String>,
    ) -> Result<u64, DoorError> {
        let name = phase.as_deref().unwrap_or(kind);
        let data = json(&data);
        if kind.len() > EVENT_KIND_MAX
            || name.len() > EVENT_KIND_MAX
            || data.len() > EVENT_BYTES_MAX
        {
            return Err(DoorError::TooMuch("the event is too large".to_owned()));
        }
        let (lease, kind) = (lease.clone(), kind.to_owned());
        write_tx!(self, "append an event", [lease, kind, data, phase], |tx| {
            let live = match enter(tx, &lease, "event").await? {
                Ok(live) => live,
                Err(refused) => return Ok(Err(refused)),
            };
            if live.event_seq >= EVENTS_MAX {
                let text = format!("the job has {EVENTS_MAX} events");
                return Ok(Err(DoorError::TooMuch(text)));
            }
            append(tx, &live, &kind, &data, phase.as_deref())
                .await
                .map(Ok)
        })?
    }

    /// Notes a stored artifact. The same name again replaces the one of an earlier attempt.
    ///
    /// # Errors
    /// When the lease is not the live one, or there are too many.
    pub async fn artifact(&self, lease: &Lease, artifact: &Artifact) -> Result<(), DoorError> {
        let (lease, artifact) = (lease.clone(), artifact.clone());
        write_tx!(self, "note an artifact", [lease, artifact], |tx| {
            let live = match enter(tx, &lease, "artifact").await? {
                Ok(live) => live,
                Err(refused) => return Ok(Err(refused)),
            };
            note_artifact(tx, &live, &artifact).await
        })?
    }

    /// Takes note that the log from `from` to `from + length` is stored by the controller `home`, if it continues what is there. From
    /// then on the log of this attempt is that controller's: it alone ends it.
    ///
    /// # Errors
    /// When the lease is not the live one.
    pub async fn log_mark(
        &self,
        lease: &Lease,
        home: &str,
        from: u64,
        length: u64,
    ) -> Result<LogMark, DoorError> {
        let (lease, home) = (lease.clone(), home.to_owned());
        write_tx!(self, "mark the log", [lease, home], |tx| {
            let live = match enter(tx, &lease, "log").await? {
                Ok(live) => live,
                Err(refused) => return Ok(Err(refused)),
            };
            if live.log_home != *home {
                move_log(tx, &live, &home).await?;
            }
            let next = from.saturating_add(length);
            if from > live.log_next || next <= live.log_next {
                let next = live.log_next;
                return Ok(Ok(LogMark { next, taken: false }));
            }
            let sql = "update jobs set log_next = $2 where id = $1";
            tx.exec(sql, args![live.id.as_str(), next]).await?;
            Ok(Ok(LogMark { next, taken: true }))
        })?
    }

    /// Opens a door for an effect elsewhere: checks the lease and writes the audit row, allowed or refused.
    ///
    /// # Errors
    /// When the lease is not the live one, or the job is being cancelled and the door closes then.
    pub async fn with_lease(&self, lease: &Lease, door: Door) -> Result<(), DoorError> {
        let lease = lease.clone();
        write_tx!(self, "open a door", [lease, door], |tx| {
            let live = match enter(tx, &lease, door.kind.name()).await? {
                Ok(live) => live,
                Err(refused) => return Ok(Err(refused)),
            };
            let detail = Some(door.detail.as_str());
            if live.cancel.is_some() && door.kind.closes_on_cancel() {
                let reason = "the job is being cancelled";
                audit(tx, &lease, door.kind.name(), detail, Some(reason)).await?;
                return Ok(Err(DoorError::Cancelled));
            }
            audit(tx, &lease, door.kind.name(), detail, None).await?;
            Ok(Ok(()))
        })?
    }

    /// The end of an attempt: the job is over, or waits for its next attempt. The same report again gives the same answer.
    ///
    /// A cancel that was asked for before wins: then the job is over as cancelled, whatever the worker says.
    ///
    /// # Errors
    /// When the lease is not the live one.
    pub async fn finish(&self, lease: &Lease, end: AttemptEnd) -> Result<Finish, DoorError> {
        let lease = lease.clone();
        write_tx!(self, "finish an attempt", [lease, end], |tx| {
            let refused = match admit(tx, &lease).await? {
                Ok(live) => return finish(tx, &live, &end).await.map(Ok),
                Err(refused) => refused,
            };
            if let Some(known) = reported(tx, &lease).await? {
                return Ok(Ok(known));
            }
            audit(tx, &lease, "finish", None, Some(&refused.to_string())).await?;
            Ok(Err(refused.into()))
        })?
    }
}

/// Checks a lease; a refusal is an audit row of the same transaction.
pub(crate) async fn enter(
    tx: &mut Tx,
    lease: &Lease,
    door: &str,
) -> Result<Admitted<Live>, DbError> {
    match admit(tx, lease).await? {
        Ok(live) => Ok(Ok(live)),
        Err(refused) => {
            audit(tx, lease, door, None, Some(&refused.to_string())).await?;
            Ok(Err(refused.into()))
        }
    }
}

async fn audit(
    tx: &mut Tx,
    lease: &Lease,
    door: &str,
    detail: Option<&str>,
    refused: Option<&str>,
) -> Result<(), DbError> {
    let row = NewAudit {
        actor: format!("worker:{}", lease.worker),
        tenant: Some(lease.tenant.clone()),
        action: format!("door.{door}"),
        target: format!("{}@{}", lease.attempt, lease.epoch),
        allowed: refused.is_none(),
        reason: refused.map(str::to_owned),
        detail: detail.map(|text| Value::String(text.to_owned())),
    };
    write_audit(tx, &row).await
}

async fn started(tx: &mut Tx, live: &Live) -> Result<(), DbError> {
    if matches!(live.state, JobState::Running { .. }) {
        return Ok(());
    }
    let state = live.state.apply(JobEvent::Started);
    let state = state.map_err(|error| DbError::Failed {
        doing: "start an attempt",
        cause: Cause::other(error),
    })?;
    let now = tx.now().await?;
    let sql = "update jobs set state = $3, started_ms = $4, event_seq = event_seq + 1 where id = $1 and epoch = $2";
    let values = args![live.id.as_str(), live.epoch.count, state.name(), now];
    tx.exec(sql, values).await?;
    let number = live.attempt().number;
    let sql = "update attempts set started_ms = $3 where job = $1 and number = $2";
    tx.exec(sql, args![live.id.as_str(), number, now]).await?;
    let change = Change {
        job: live.id.clone(),
        tenant: live.tenant.clone(),
        seq: live.event_seq + 1,
        kind: state.name(),
        data: object!({ "attempt": number, "worker": live.worker }),
        notify_url: live.notify_url.clone(),
    };
    announce(tx, &[change]).await
}

async fn append(
    tx: &mut Tx,
    live: &Live,
    kind: &str,
    data: &str,
    phase: Option<&str>,
) -> Result<u64, DbError> {
    let (seq, now) = (live.event_seq + 1, tx.now().await?);
    let sql = "update jobs set event_seq = $2, phase = coalesce($3, phase) where id = $1";
    tx.exec(sql, args![live.id.as_str(), seq, phase]).await?;
    let sql = "insert into events (job, seq, at_ms, kind, data) values ($1, $2, $3, $4, $5)";
    tx.exec(sql, args![live.id.as_str(), seq, now, kind, data])
        .await?;
    tx.wake(Wake::Job(live.id.clone()));
    Ok(seq)
}

/// The events of a record as they are stored.
pub(crate) fn written(
    events: Vec<(&'static str, Value)>,
) -> Result<Vec<(&'static str, String)>, DoorError> {
    if events.len() > RECORD_EVENTS_MAX {
        let text = format!("a record has at most {RECORD_EVENTS_MAX} events");
        return Err(DoorError::TooMuch(text));
    }
    let events = events.into_iter().map(|(kind, data)| (kind, json(&data)));
    let events: Vec<_> = events.collect();
    match events.iter().all(|(_, data)| data.len() <= EVENT_BYTES_MAX) {
        true => Ok(events),
        false => Err(DoorError::TooMuch("the event is too large".to_owned())),
    }
}

/// Whether a job with so many events has room for a record.
pub(crate) fn has_room(events: u64) -> Result<(), DoorError> {
    if events >= EVENTS_MAX + RECORDS_MAX * RECORD_EVENTS_MAX as u64 {
        let text = format!("the job has {EVENTS_MAX} events, and too many records");
        return Err(DoorError::TooMuch(text));
    }
    Ok(())
}

/// Writes the events of a record behind number `after`.
pub(crate) async fn insert_record(
    tx: &mut Tx,
    job: &JobId,
    after: u64,
    events: &[(&'static str, String)],
) -> Result<(), DbError> {
    let now = tx.now().await?;
    let sql = "insert into events (job, seq, at_ms, kind, data) values ($1, $2, $3, $4, $5)";
    for (seq, (kind, data)) in (after + 1..).zip(events) {
        let values = args![job.as_str(), seq, now, *kind, data.as_str()];
        tx.exec(sql, values).await?;
    }
    tx.wake(Wake::Job(job.clone()));
    Ok(())
}

async fn move_log(tx: &mut Tx, live: &Live, home: &str) -> Result<(), DbError> {
    let sql = "update jobs set log_home = $2 where id = $1";
    tx.exec(sql, args![live.id.as_str(), home]).await?;
    let sql = "update attempts set log_home = $3 where job = $1 and number = $2";
    let number = live.attempt().number;
    tx.exec(sql, args![live.id.as_str(), number, home]).await?;
    // Who follows it elsewhere looks where it is now.
    tx.wake(Wake::Job(live.id.clone()));
    Ok(())
}

async fn note_artifact(
    tx: &mut Tx,
    live: &Live,
    artifact: &Artifact,
) -> Result<Admitted<()>, DbError> {
    let sql = "select count(*) as n, cast(coalesce(sum(size), 0) as bigint) as bytes from artifacts where job = $1 and name <> $2";
    let values = args![live.id.as_str(), artifact.name.as_str()];
    let row = tx.row(sql, values).await?.ok_or(DbError::missing("n"))?;
    if row.u32("n")? >= ARTIFACTS_MAX {
        let text = format!("the job has {ARTIFACTS_MAX} artifacts");
        return Ok(Err(DoorError::TooMuch(text)));
    }
    if row.u64("bytes")?.saturating_add(artifact.size) > ARTIFACTS_BYTES_MAX {
        let text = format!("the artifacts of a job have at most {ARTIFACTS_BYTES_MAX} bytes");
        return Ok(Err(DoorError::TooMuch(text)));
    }
    let now = tx.now().await?;
    let sql = "insert into artifacts (job, name, attempt, digest, size, media_type, at_ms)
        values ($1, $2, $3, $4, $5, $6, $7)
        on conflict (job, name) do update set attempt = excluded.attempt, digest = excluded.digest,
            size = excluded.size, media_type = excluded.media_type, at_ms = excluded.at_ms";
    let values = args![
        live.id.as_str(),
        artifact.name.as_str(),
        live.attempt().number,
        artifact.digest.to_string(),
        artifact.size,
        artifact.media_type.as_str(),
        now,
    ];
    tx.exec(sql, values).await?;
    Ok(Ok(()))
}

/// The answer that an earlier report with this very lease got.
async fn reported(tx: &mut Tx, lease: &Lease) -> Result<Option<Finish>, DbError> {
    let sql = "select job, number, worker, life, epoch, leased_ms, started_ms, ended_ms, outcome
        from attempts where job = $1 and number = $2 and ended_ms is not null";
    let values = args![lease.attempt.job.as_str(), lease.attempt.number];
    let Some(row) = tx.row(sql, values).await? else {
        return Ok(None);
    };
    let known = attempt(&row)?;
    let lost = known.outcome.as_ref().is_none_or(|outcome| {
        matches!(
            &outcome.verdict,
            Verdict::Failed {
                class: FailureClass::Lost,
                ..
            }
        )
    });
    // An attempt that was given up as lost has no report of its worker.
    if known.worker != lease.worker || known.epoch != lease.epoch || lost {
        return Ok(None);
    }
    let Some(job) = crate::list::find(tx, &lease.attempt.job).await? else {
        return Ok(None);
    };
    Ok(Some(Finish {
        state: job.state,
        repeated: true,
        quarantined: None,
        failed_in_a_row: 0,
    }))
}

async fn finish(tx: &mut Tx, live: &Live, end: &AttemptEnd) -> Result<Finish, DbError> {
    let now = tx.now().await?;
    let event = match (&live.cancel, &end.outcome.verdict) {
        (Some(mark), _) => JobEvent::Ended {
            outcome: close::cancelled(mark, end.outcome.phases_ms.clone()),
        },
        (None, Verdict::Failed { class, .. }) if class.is_retried() => JobEvent::AttemptFailed {
            outcome: end.outcome.clone(),
            attempts_max: live.attempts_max,
        },
        (None, _) => JobEvent::Ended {
            outcome: end.outcome.clone(),
        },
    };
    let backoff = close::backoff_ms(live.attempt().number, end.jitter, live.id.as_str());
    let ending = Ending {
        receipt: end.receipt.as_ref(),
        observed: end.observed.as_ref(),
        ready_ms: now + backoff,
        attempt: None,
    };
    let state = close::end(tx, live, event, &ending).await?;
    let quarantined = match &live.worker {
        Some(worker) => close::judge(tx, worker, &end.outcome).await?,
        None => None,
    };
    let failed_in_a_row = match &state {
        JobState::Finished { outcome } => crate::pipeline::judge(tx, live, outcome).await?,
        _ => 0,
    };
    Ok(Finish {
        state,
        repeated: false,
        quarantined,
        failed_in_a_row,
    })
}
