//! `decision` and `claims`: the scheduler's pure function, and the database under it.

use std::time::Instant;

use kiln_db::{Database, DatabaseUrl, OpenOptions, measure};
use kiln_scheduler::{plan, sample};

use super::Bench;
use super::postgres::Postgres;
use super::report::Report;
use super::series::{Promise, Unit};
use crate::error::{CliError, OrInfrastructure as _, Result};

/// Jobs that wait for a decision.
const PENDING: usize = 10_000;
/// Jobs of one round of claims, and of one claim.
const CLAIMED: usize = 2_000;
const BATCH: usize = 100;

/// Its name, hosts, classes, every which host has a free place, the most time, the least placements per second.
type Pool = (&'static str, usize, usize, usize, Option<f64>, Option<f64>);

/// What is decided.
const POOLS: [Pool; 6] = [
    ("500 full", 500, 200, 0, Some(20.0), None),
    ("500 empty", 500, 200, 1, Some(20.0), None),
    ("500 full, worst", 500, PENDING, 0, None, None),
    ("500 empty, worst", 500, PENDING, 1, None, None),
    ("5,000 empty", 5_000, 200, 1, None, Some(1_000.0)),
    ("5,000, 1,000 free", 5_000, 200, 5, None, Some(1_000.0)),
];

/// `decision`: 10,000 waiting jobs, pools of several kinds.
pub(super) fn decision(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    for (name, hosts, classes, free_every, at_most, at_least) in POOLS {
        let view = sample::pool(PENDING, hosts, classes, free_every)
            .ok_or_else(|| CliError::usage("a name of the sample is no name"))?;
        for _ in 0..bench.samples {
            if bench.cancel.is_cancelled() {
                return Err(super::cancelled());
            }
            let begun = Instant::now();
            let decided = plan(std::hint::black_box(&view));
            let took = begun.elapsed();
            let promise = at_most.map(Promise::MedianAtMost);
            report.time(&format!("plan {name}"), promise, took);
            let Some(least) = at_least else { continue };
            let placed = f64::from(u32::try_from(decided.assignments.len()).unwrap_or(u32::MAX));
            let promise = Some(Promise::MedianAtLeast(least));
            let rate = placed / took.as_secs_f64();
            report.add(&format!("  place {name}"), Unit::PerSecond, promise, rate);
        }
    }
    Ok(())
}

/// `claims`: durable claims on both databases.
pub(super) async fn claims(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let file = bench.work.join("claims.db");
    rounds(bench, &DatabaseUrl::Sqlite(file), "sqlite", 2_000.0, report).await?;
    let Some(postgres) = Postgres::start()? else {
        bench
            .screen
            .note("PostgreSQL is not installed: its rows are left out");
        return Ok(());
    };
    let url = postgres.database()?.parse().or_infrastructure()?;
    rounds(bench, &url, "postgres", 5_000.0, report).await
}

async fn rounds(
    bench: &Bench<'_>,
    url: &DatabaseUrl,
    name: &str,
    least: f64,
    report: &mut Report,
) -> Result<()> {
    let db = Database::open(url, OpenOptions::default()).await;
    let db = db.or_infrastructure()?;
    for round in 0..bench.samples {
        let prefix = format!("r{round}-");
        let measuring = async {
            let seen = measure::durable(&db, &prefix, CLAIMED, BATCH).await;
            seen.or_infrastructure()
        };
        let seen = bench.unless_cancelled(measuring).await?;
        let promise = Some(Promise::MedianAtLeast(least));
        let rate = seen.claim.per_second();
        report.add(&format!("claims, {name}"), Unit::PerSecond, promise, rate);
        for batch in seen.claim.each {
            report.time(&format!("  {BATCH} each, {name}"), None, batch);
        }
        let rate = seen.submit.per_second();
        report.add(&format!("  submits, {name}"), Unit::PerSecond, None, rate);
        let rate = seen.finish.per_second();
        report.add(&format!("  finishes, {name}"), Unit::PerSecond, None, rate);
    }
    db.close().await;
    Ok(())
}
