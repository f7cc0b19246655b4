//! `serve`, `lease`, `dead` and `soak`: a controller with stand-ins for workers, on both databases.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kiln_controller::api::{JobView, List};
use kiln_core::{FailureClass, JobId, PoolName};
use kiln_db::{Database, DatabaseUrl, OpenOptions};
use serde_json::json;
use tokio::sync::mpsc;

use super::Bench;
use super::postgres::Postgres;
use super::report::Report;
use super::series::{Promise, Unit};
use super::serving::{Serving, pause};
use super::stand_in::{Arrived, StandIn, Way};
use crate::error::{CliError, OrInfrastructure as _, Result};

/// Samples of a lease for each that is asked for: they are short, and a 99th percentile needs many.
const LEASES_EACH: usize = 20;
/// Jobs that a worker takes with it when it dies.
const DYING: usize = 8;
/// Longest wait for a lease.
const ARRIVAL_MAX: Duration = Duration::from_secs(120);
/// How long a controller is left alone before its memory is read.
const IDLE: Duration = Duration::from_secs(3);
/// Workers of the soak.
const SOAK_WORKERS: usize = 1_000;
/// 500,000 jobs a day.
const SOAK_PER_SECOND: f64 = 500_000.0 / 86_400.0;
/// How long each of its jobs takes.
const SOAK_WORKS: Duration = Duration::from_secs(5);
/// How much more memory the controller may take at its end than when it was warm: what a log of this many finished jobs may cost.
const SOAK_GROWTH_MAX: f64 = 32e6;
/// Longest wait for the last jobs of the soak.
const SOAK_END_MAX: Duration = Duration::from_secs(60);

/// A database that a controller is given.
struct Place {
    name: &'static str,
    /// What `kiln serve` is told.
    words: Vec<String>,
    url: DatabaseUrl,
    home: PathBuf,
}

/// An empty home with SQLite, and one with PostgreSQL where that is installed.
fn places(bench: &Bench<'_>, what: &str, postgres: Option<&Postgres>) -> Result<Vec<Place>> {
    let home = |name: &str| bench.work.join(format!("{what}-{name}"));
    let own = home("sqlite");
    let mut places = vec![Place {
        name: "sqlite",
        words: Vec::new(),
        url: DatabaseUrl::Sqlite(own.join("controller/kiln.db")),
        home: own,
    }];
    if let Some(postgres) = postgres {
        let url = postgres.database()?;
        places.push(Place {
            name: "postgres",
            words: vec!["--database".to_owned(), url.clone()],
            url: url.parse().or_infrastructure()?,
            home: home("postgres"),
        });
    }
    Ok(places)
}

impl Place {
    async fn serve(&self, bench: &Bench<'_>) -> Result<Serving> {
        std::fs::create_dir_all(&self.home).or_infrastructure()?;
        let words: Vec<&str> = self.words.iter().map(String::as_str).collect();
        Serving::start(bench, &self.home, &words).await
    }
}

fn postgres(bench: &Bench<'_>) -> Result<Option<Postgres>> {
    let started = Postgres::start()?;
    if started.is_none() {
        let note = "PostgreSQL is not installed: its rows are left out";
        bench.screen.note(note);
    }
    Ok(started)
}

/// Submits a job that a stand-in can do; gives its id.
async fn submit(serving: &Serving) -> Result<JobId> {
    let asked = json!({ "argv": ["true"], "cpus": 1, "memory": "512M", "disk": "1G" });
    let answer: JobView = serving.server.post("/v1/runs", &asked).await?;
    answer.line.id.parse().or_infrastructure()
}

async fn next(
    bench: &Bench<'_>,
    arrivals: &mut mpsc::UnboundedReceiver<Arrived>,
) -> Result<Arrived> {
    let arriving = async {
        let arrived = tokio::time::timeout(ARRIVAL_MAX, arrivals.recv()).await;
        arrived.ok().flatten().ok_or_else(|| {
            CliError::new(FailureClass::Infrastructure, "no worker was given the job")
        })
    };
    bench.unless_cancelled(arriving).await
}

/// `serve`: from the start of the process to its first answer, and its memory when nothing happens.
pub(super) async fn serve(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let postgres = postgres(bench)?;
    for place in places(bench, "serve", postgres.as_ref())? {
        for number in 0..bench.samples {
            let serving = place.serve(bench).await?;
            // The first one also makes authority, keys and tables.
            let name = match number {
                0 => format!("start new, {}", place.name),
                _ => format!("start, {}", place.name),
            };
            let promise = (number > 0).then_some(Promise::MedianAtMost(200.0));
            report.time(&name, promise, serving.ready);
            if number == 0 {
                pause(bench, IDLE).await?;
                let name = format!("idle, {}", place.name);
                let promise = Some(Promise::EachAtMost(60e6));
                report.add(&name, Unit::Bytes, promise, serving.memory()?);
            }
            serving.stop().await;
        }
    }
    Ok(())
}

/// `lease`: from before a job is submitted to its lease's arrival at a worker that has nothing to do.
pub(super) async fn lease(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let postgres = postgres(bench)?;
    for place in places(bench, "lease", postgres.as_ref())? {
        let serving = place.serve(bench).await?;
        let (arrived, mut arrivals) = mpsc::unbounded_channel();
        let way = Way {
            machines: 64,
            works: Duration::from_millis(1),
            arrived,
        };
        let _worker = StandIn::join(&serving.socket, "idle", way).await?;
        // One that does not count: the first poll is on its way.
        submit(&serving).await?;
        next(bench, &mut arrivals).await?;
        for _ in 0..bench.samples * LEASES_EACH {
            let began = Instant::now();
            let job = submit(&serving).await?;
            let arrived = next(bench, &mut arrivals).await?;
            if arrived.job != job {
                let told = "a lease of another job arrived";
                return Err(CliError::new(FailureClass::Infrastructure, told));
            }
            let took = arrived.at - began;
            let name = format!("lease, {}", place.name);
            report.time(&name, Some(Promise::MedianAtMost(50.0)), took);
            let name = format!("  99 %, {}", place.name);
            report.time(&name, Some(Promise::P99AtMost(300.0)), took);
            // The worker is idle again.
            pause(bench, Duration::from_millis(20)).await?;
        }
        serving.stop().await;
    }
    Ok(())
}

/// `dead`: a worker dies with jobs; each arrives at another worker.
pub(super) async fn dead(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let postgres = postgres(bench)?;
    for place in places(bench, "dead", postgres.as_ref())? {
        let serving = place.serve(bench).await?;
        let (arrived, mut arrivals) = mpsc::unbounded_channel();
        let way = Way {
            machines: 16,
            works: Duration::from_secs(600),
            arrived,
        };
        let dying = StandIn::join(&serving.socket, "dying", way.clone()).await?;
        let mut held = BTreeMap::new();
        for _ in 0..DYING {
            submit(&serving).await?;
            let arrived = next(bench, &mut arrivals).await?;
            held.insert(arrived.job, arrived.worker);
        }
        let other = StandIn::join(&serving.socket, "other", way).await?;
        let died = Instant::now();
        drop(dying);
        while !held.is_empty() {
            let arrived = next(bench, &mut arrivals).await?;
            if arrived.worker == other.name && held.remove(&arrived.job).is_some() {
                let name = format!("dead, {}", place.name);
                let promise = Some(Promise::EachAtMost(25_000.0));
                report.time(&name, promise, arrived.at - died);
            }
        }
        serving.stop().await;
    }
    Ok(())
}

/// `soak`: a thousand workers, jobs at the rate of 500,000 a day.
pub(super) async fn soak(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let postgres = postgres(bench)?;
    for place in places(bench, "soak", postgres.as_ref())? {
        soak_on(bench, &place, report).await?;
    }
    Ok(())
}

async fn soak_on(bench: &Bench<'_>, place: &Place, report: &mut Report) -> Result<()> {
    let serving = place.serve(bench).await?;
    let (arrived, mut arrivals) = mpsc::unbounded_channel();
    let way = Way {
        machines: 4,
        works: SOAK_WORKS,
        arrived,
    };
    let mut workers = Vec::with_capacity(SOAK_WORKERS);
    for number in 0..SOAK_WORKERS {
        let name = format!("s{number}");
        let joining = StandIn::join(&serving.socket, &name, way.clone());
        workers.push(bench.unless_cancelled(joining).await?);
    }
    let began = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_secs_f64(1.0 / SOAK_PER_SECOND));
    let (mut jobs, mut waits, mut memory) = (0_usize, BTreeMap::new(), Vec::new());
    let mut looked = began;
    while began.elapsed() < bench.soak {
        bench
            .unless_cancelled(async {
                tick.tick().await;
                Ok(())
            })
            .await?;
        let at = Instant::now();
        waits.insert(submit(&serving).await?, at);
        jobs += 1;
        while let Ok(arrived) = arrivals.try_recv() {
            lease_took(place, report, &mut waits, &arrived);
        }
        if looked.elapsed() >= Duration::from_secs(1) {
            looked = Instant::now();
            memory.push(serving.memory()?);
        }
    }
    all_over(bench, &serving).await?;
    while let Ok(arrived) = arrivals.try_recv() {
        lease_took(place, report, &mut waits, &arrived);
    }
    let name = |what: &str| format!("soak {what}, {}", place.name);
    let count = f64::from(u32::try_from(jobs).unwrap_or(u32::MAX));
    report.add(&name("jobs"), Unit::Count, None, count);
    for bytes in &memory {
        report.add(&name("memory"), Unit::Bytes, None, *bytes);
    }
    let growth = growth(&memory);
    let promise = Some(Promise::EachAtMost(SOAK_GROWTH_MAX));
    report.add(&name("grew"), Unit::Bytes, promise, growth);
    drop(workers);
    serving.stop().await;
    let leaked = leaked(place).await?;
    let promise = Some(Promise::EachAtMost(0.0));
    report.add(&name("leaks"), Unit::Count, promise, leaked);
    Ok(())
}

fn lease_took(
    place: &Place,
    report: &mut Report,
    waits: &mut BTreeMap<JobId, Instant>,
    arrived: &Arrived,
) {
    if let Some(since) = waits.remove(&arrived.job) {
        let name = format!("soak lease, {}", place.name);
        report.time(&name, None, arrived.at.saturating_duration_since(since));
    }
}

/// From the second fifth of the time, when everything is warm, to the last.
fn growth(memory: &[f64]) -> f64 {
    let fifth = (memory.len() / 5).max(1);
    let middle = |part: &[f64]| {
        let mut sorted = part.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or_default()
    };
    let early = memory.get(fifth..fifth * 2).unwrap_or(memory);
    let late = memory
        .get(memory.len().saturating_sub(fifth)..)
        .unwrap_or(memory);
    middle(late) - middle(early)
}

/// Waits until no job is waiting or running.
async fn all_over(bench: &Bench<'_>, serving: &Serving) -> Result<()> {
    let end = Instant::now() + SOAK_END_MAX;
    loop {
        let path = "/v1/jobs?state=queued,leased,running&limit=1";
        let listed: List<serde_json::Value> = serving.server.get(path).await?;
        if listed.items.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            let told = "jobs of the soak never ended";
            return Err(CliError::new(FailureClass::Infrastructure, told));
        }
        pause(bench, Duration::from_millis(200)).await?;
    }
}

/// Leases that are held though nobody works, and workers with less room than they have.
async fn leaked(place: &Place) -> Result<f64> {
    let db = Database::open(&place.url, OpenOptions::default()).await;
    let db = db.or_infrastructure()?;
    let rows = db.pool_view(&PoolName::default_pool(), 1).await;
    let rows = rows.or_infrastructure()?;
    db.close().await;
    let taken = rows
        .workers
        .iter()
        .filter(|(worker, free)| worker.facts.capacity != *free);
    let leaked = rows.held.len() + taken.count();
    Ok(f64::from(u32::try_from(leaked).unwrap_or(u32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_counted_from_when_it_is_warm() {
        let flat: Vec<f64> = [10.0, 40.0].into_iter().chain([50.0; 18]).collect();
        assert!(growth(&flat).abs() < 1.0);
        let grows: Vec<f64> = (0..20).map(f64::from).collect();
        assert!((growth(&grows) - 12.0).abs() < 1.0);
        assert!(growth(&[5.0]).abs() < 1.0);
    }
}
