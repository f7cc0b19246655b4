//! Durable work, measured: claims in batches, and small transactions from many callers at once. For `kiln bench` and the example `durable`.
//!
//! It uses the public calls of this crate on a database that nobody else uses, and leaves its jobs finished there.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::time::{Duration, Instant};

use kiln_core::dispatch::{Room, WorkerFacts};
use kiln_core::job::{Limits, RunCommand, TrustClass};
use kiln_core::{
    Assignment, AttemptId, ByteSize, Dispatch, JobId, JobKind, JobRequest, Lease, NetworkPolicy,
    Outcome, PoolName, TenantName, Verdict, WorkerId,
};

use crate::{AttemptEnd, Database, NewJob, NewWorker, Placement};

/// Callers at once.
pub const CALLERS: usize = 64;
/// Workers that the jobs go to.
const WORKERS: usize = 50;
/// How long the lease of the pool is asked for: longer than any measurement.
const LEAD_MS: u64 = 3_600_000;

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[error("the database refused what is measured")]
pub struct MeasureError(#[source] Box<dyn Error + Send + Sync>);

fn failed(error: impl Into<Box<dyn Error + Send + Sync>>) -> MeasureError {
    MeasureError(error.into())
}

/// Calls of one kind.
#[derive(Clone, Debug)]
pub struct Calls {
    /// Jobs they were about.
    pub jobs: usize,
    /// From the first to the last.
    pub took: Duration,
    /// Each call's own time, in the order in which they ended.
    pub each: Vec<Duration>,
}

impl Calls {
    /// Jobs per second.
    #[must_use]
    pub fn per_second(&self) -> f64 {
        let jobs = u32::try_from(self.jobs).unwrap_or(u32::MAX);
        f64::from(jobs) / self.took.as_secs_f64()
    }
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Durable {
    /// Jobs submitted one by one from [`CALLERS`] callers.
    pub submit: Calls,
    /// Jobs claimed, a batch in each call, one call after another.
    pub claim: Calls,
    /// Jobs told to have started, one by one from as many callers.
    pub started: Calls,
    /// The same, finished.
    pub finish: Calls,
    /// Reading the queue with all jobs waiting.
    pub waiting: Duration,
    /// Reading it with all of them leased.
    pub held: Duration,
    /// One heartbeat of a worker with its share of them.
    pub heartbeat: Duration,
}

/// Measures with this many jobs, whose ids and workers begin with `prefix`, claimed in batches.
///
/// # Errors
/// When the database refuses, or somebody else schedules there.
pub async fn durable(
    db: &Database,
    prefix: &str,
    jobs: usize,
    batch: usize,
) -> Result<Durable, MeasureError> {
    let pool = PoolName::default_pool();
    let view_max = u32::try_from(jobs).unwrap_or(u32::MAX);
    let mut workers = Vec::new();
    for number in 0..WORKERS {
        workers.push(worker(db, &format!("{prefix}w{number}")).await?);
    }
    let ids: Vec<JobId> = (0..jobs)
        .map(|number| format!("{prefix}{number}").parse().map_err(failed))
        .collect::<Result<_, _>>()?;
    let submit = many(&ids, |id| {
        let db = db.clone();
        async move { db.submit(job(id)).await.map(drop).map_err(failed) }
    })
    .await?;
    let at = Instant::now();
    db.pool_view(&pool, view_max).await.map_err(failed)?;
    let waiting = at.elapsed();
    let (claim, leases) = claims(db, &ids, &workers, batch).await?;
    let started = many(&leases, |lease| {
        let db = db.clone();
        async move { db.started(&lease).await.map(drop).map_err(failed) }
    })
    .await?;
    let own = leases.iter().filter(|lease| lease.worker == workers[0]);
    let own: Vec<Lease> = own.cloned().collect();
    let at = Instant::now();
    let beat = db.heartbeat(&workers[0], &facts()?, &own).await;
    beat.map_err(failed)?;
    let heartbeat = at.elapsed();
    let at = Instant::now();
    db.pool_view(&pool, view_max).await.map_err(failed)?;
    let held = at.elapsed();
    let finish = many(&leases, |lease| {
        let db = db.clone();
        async move { db.finish(&lease, end()).await.map(drop).map_err(failed) }
    })
    .await?;
    Ok(Durable {
        submit,
        claim,
        started,
        finish,
        waiting,
        held,
        heartbeat,
    })
}

async fn claims(
    db: &Database,
    ids: &[JobId],
    workers: &[WorkerId],
    batch: usize,
) -> Result<(Calls, Vec<Lease>), MeasureError> {
    let lead = db.lead(&PoolName::default_pool(), "bench", LEAD_MS).await;
    let lead = lead
        .map_err(failed)?
        .ok_or_else(|| failed("somebody else schedules here"))?;
    let mut leases = Vec::with_capacity(ids.len());
    let mut each = Vec::new();
    let began = Instant::now();
    for part in ids.chunks(batch.max(1)) {
        let assignments = part
            .iter()
            .zip(workers.iter().cycle())
            .map(|(id, worker)| Assignment {
                attempt: AttemptId {
                    job: id.clone(),
                    number: 1,
                },
                worker: worker.clone(),
            });
        let at = Instant::now();
        let claimed = db.claim(&lead, assignments.collect()).await;
        each.push(at.elapsed());
        for one in claimed.map_err(failed)? {
            leases.push(one.map_err(failed)?);
        }
    }
    let calls = Calls {
        jobs: ids.len(),
        took: began.elapsed(),
        each,
    };
    Ok((calls, leases))
}

/// Calls for every item, [`CALLERS`] at a time.
async fn many<T, F>(items: &[T], call: impl Fn(T) -> F) -> Result<Calls, MeasureError>
where
    T: Clone,
    F: Future<Output = Result<(), MeasureError>> + Send + 'static,
{
    let began = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    let mut each = Vec::with_capacity(items.len());
    for item in items {
        while running.len() >= CALLERS {
            each.extend(ended(running.join_next().await)?);
        }
        let called = call(item.clone());
        running.spawn(async move {
            let at = Instant::now();
            called.await?;
            Ok::<_, MeasureError>(at.elapsed())
        });
    }
    while !running.is_empty() {
        each.extend(ended(running.join_next().await)?);
    }
    Ok(Calls {
        jobs: items.len(),
        took: began.elapsed(),
        each,
    })
}

type Joined = Option<Result<Result<Duration, MeasureError>, tokio::task::JoinError>>;

fn ended(joined: Joined) -> Result<Option<Duration>, MeasureError> {
    joined.map(|ended| ended.map_err(failed)?).transpose()
}

fn facts() -> Result<WorkerFacts, MeasureError> {
    Ok(WorkerFacts {
        arch: "amd64".parse().map_err(failed)?,
        runtimes: BTreeSet::new(),
        capacity: Room {
            cpus: 1_000_000,
            memory: ByteSize::gib(1_000_000),
            disk: ByteSize::gib(1_000_000),
            machines: 1_000_000,
        },
        whole_cpus: None,
        version: "0".to_owned(),
        generation: kiln_core::dispatch::POLICY_GENERATION,
        warm: BTreeSet::new(),
    })
}

async fn worker(db: &Database, name: &str) -> Result<WorkerId, MeasureError> {
    let worker = NewWorker {
        id: name.parse().map_err(failed)?,
        facts: facts()?,
        certificate: None,
    };
    let placement = Placement {
        pool: PoolName::default_pool(),
        labels: BTreeMap::new(),
        tenants: None,
    };
    let admitted = db.admit_worker(worker, placement).await;
    Ok(admitted.map_err(failed)?.id)
}

fn job(id: JobId) -> NewJob {
    let request = JobRequest {
        id,
        tenant: TenantName::local(),
        kind: JobKind::Run(Box::new(RunCommand {
            argv: vec!["npm".to_owned(), "test".to_owned()],
            env: [("CI".to_owned(), "true".to_owned())].into(),
            ..RunCommand::default()
        })),
        network: NetworkPolicy::Isolated,
        limits: Limits {
            cpus: 4,
            memory: ByteSize::gib(8),
            disk: ByteSize::gib(50),
            timeout_ms: 600_000,
        },
        trust: TrustClass::Untrusted,
        network_bits: None,
        dispatch: Dispatch::default(),
        traceparent: None,
        policy: None,
    };
    NewJob {
        request,
        idempotency: None,
        submitted_by: "user:bench".to_owned(),
        notify_url: None,
        labels: BTreeMap::new(),
    }
}

fn end() -> AttemptEnd {
    AttemptEnd {
        outcome: Outcome {
            verdict: Verdict::Passed,
            phases_ms: vec![("guest".to_owned(), 10)],
        },
        receipt: None,
        observed: None,
        jitter: 0,
    }
}
