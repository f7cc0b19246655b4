//! Measures durable work: claims in batches, and small transactions from many callers at once.
//!
//! `cargo run --release -p kiln-db --example durable -- sqlite:/tmp/bench.db [jobs] [batch]`, or a `postgres://` address with an
//! empty database. Prints one JSON object; every sample is the wall time of one call in microseconds.

#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use anyhow::{Context as _, Result};
use kiln_core::dispatch::{Room, WorkerFacts};
use kiln_core::job::{Limits, RunCommand, TrustClass};
use kiln_core::{
    Assignment, AttemptId, ByteSize, Dispatch, JobId, JobKind, JobRequest, Lease, NetworkPolicy,
    Outcome, PoolName, TenantName, Verdict, WorkerId,
};
use kiln_db::{AttemptEnd, Database, DatabaseUrl, NewJob, NewWorker, OpenOptions, Placement};

/// Callers at once.
const CALLERS: usize = 64;
/// Workers that the jobs go to.
const WORKERS: usize = 50;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let url: DatabaseUrl = args.next().context("where is the database?")?.parse()?;
    let jobs: usize = args.next().map_or(Ok(5_000), |text| text.parse())?;
    let batch: usize = args.next().map_or(Ok(100), |text| text.parse())?;
    let db = Database::open(&url, OpenOptions::default()).await?;
    let mut workers = Vec::new();
    for n in 0..WORKERS {
        workers.push(worker(&db, n).await?);
    }
    let ids: Vec<JobId> = (0..jobs)
        .map(|n| format!("b{n}").parse())
        .collect::<Result<_, _>>()?;

    let submit = many(&ids, |id| {
        let db = db.clone();
        async move { db.submit(job(id)).await.map(drop).map_err(Into::into) }
    })
    .await?;

    let at = Instant::now();
    let rows = db.pool_view(&PoolName::default_pool(), 10_000).await?;
    let waiting =
        serde_json::json!({ "pending": rows.pending.len(), "us": at.elapsed().as_micros() });
    let lead = db
        .lead(&PoolName::default_pool(), "bench", 3_600_000)
        .await?;
    let lead = lead.context("somebody else schedules here")?;
    let mut leases: Vec<Lease> = Vec::with_capacity(jobs);
    let mut samples = Vec::new();
    let began = Instant::now();
    for part in ids.chunks(batch) {
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
        let claimed = db.claim(&lead, assignments.collect()).await?;
        samples.push(at.elapsed().as_micros());
        for one in claimed {
            leases.push(one?);
        }
    }
    let claim = report(jobs, began, samples);

    let started = many(&leases, |lease| {
        let db = db.clone();
        async move { db.started(&lease).await.map_err(Into::into) }
    })
    .await?;
    let own: Vec<Lease> = leases
        .iter()
        .filter(|lease| lease.worker == workers[0])
        .cloned()
        .collect();
    let beat = Instant::now();
    let answer = db.heartbeat(&workers[0], &facts(), &own).await?;
    let heartbeat =
        serde_json::json!({ "leases": answer.leases.len(), "us": beat.elapsed().as_micros() });
    let view = Instant::now();
    let rows = db.pool_view(&PoolName::default_pool(), 10_000).await?;
    let view = serde_json::json!({ "held": rows.held.len(), "us": view.elapsed().as_micros() });
    let finish = many(&leases, |lease| {
        let db = db.clone();
        async move { db.finish(&lease, end()).await.map(drop).map_err(Into::into) }
    })
    .await?;
    db.close().await;
    let all = serde_json::json!({
        "database": url.to_string(), "jobs": jobs, "batch": batch, "callers": CALLERS,
        "claim": claim, "submit": submit, "started": started, "finish": finish, "heartbeat": heartbeat, "view": view, "waiting": waiting,
    });
    println!("{all}");
    Ok(())
}

/// Calls for every item, [`CALLERS`] at a time.
async fn many<T, F>(items: &[T], call: impl Fn(T) -> F) -> Result<serde_json::Value>
where
    T: Clone,
    F: Future<Output = Result<()>> + Send + 'static,
{
    let began = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    let mut samples = Vec::with_capacity(items.len());
    for item in items {
        while running.len() >= CALLERS {
            let done: Result<u128> = running.join_next().await.context("running")??;
            samples.push(done?);
        }
        let called = call(item.clone());
        running.spawn(async move {
            let at = Instant::now();
            called.await?;
            Ok(at.elapsed().as_micros())
        });
    }
    while let Some(done) = running.join_next().await {
        samples.push(done??);
    }
    Ok(report(items.len(), began, samples))
}

fn report(count: usize, began: Instant, mut samples: Vec<u128>) -> serde_json::Value {
    let seconds = began.elapsed().as_secs_f64();
    samples.sort_unstable();
    let at = |of_hundred: usize| samples.get(samples.len() * of_hundred / 100).copied();
    serde_json::json!({
        "per_second": (count as f64 / seconds).round(), "calls": samples.len(),
        "p50_us": at(50), "p99_us": at(99),
    })
}

fn facts() -> WorkerFacts {
    WorkerFacts {
        arch: "amd64".parse().expect("label"),
        runtimes: BTreeSet::new(),
        capacity: Room {
            cpus: 1_000_000,
            memory: ByteSize::gib(1_000_000),
            disk: ByteSize::gib(1_000_000),
            machines: 1_000_000,
        },
        whole_cpus: None,
        version: "0".to_owned(),
        warm: BTreeSet::new(),
    }
}

async fn worker(db: &Database, n: usize) -> Result<WorkerId> {
    let worker = NewWorker {
        id: format!("w{n}").parse()?,
        facts: facts(),
        certificate: None,
    };
    let placement = Placement {
        pool: PoolName::default_pool(),
        labels: BTreeMap::new(),
        tenants: None,
    };
    Ok(db.admit_worker(worker, placement).await?.id)
}

fn job(id: JobId) -> NewJob {
    let request = JobRequest {
        id,
        tenant: TenantName::local(),
        kind: JobKind::Run(RunCommand {
            image: None,
            argv: vec!["npm".to_owned(), "test".to_owned()],
            env: [("CI".to_owned(), "true".to_owned())].into(),
            ports: Vec::new(),
            tty: false,
            stdin: false,
            artifacts: Vec::new(),
        }),
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
