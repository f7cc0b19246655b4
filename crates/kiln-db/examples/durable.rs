//! Measures durable work: claims in batches, and small transactions from many callers at once.
//!
//! `cargo run --release -p kiln-db --example durable -- sqlite:/tmp/bench.db [jobs] [batch]`, or a `postgres://` address with an
//! empty database. Prints one JSON object; times of single calls are in microseconds.

#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use anyhow::{Context as _, Result};
use kiln_db::measure::{self, Calls};
use kiln_db::{Database, DatabaseUrl, OpenOptions};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let url: DatabaseUrl = args.next().context("where is the database?")?.parse()?;
    let jobs: usize = args.next().map_or(Ok(5_000), |text| text.parse())?;
    let batch: usize = args.next().map_or(Ok(100), |text| text.parse())?;
    let db = Database::open(&url, OpenOptions::default()).await?;
    let seen = measure::durable(&db, "b", jobs, batch).await?;
    db.close().await;
    let all = serde_json::json!({
        "database": url.to_string(), "jobs": jobs, "batch": batch, "callers": measure::CALLERS,
        "claim": shown(&seen.claim), "submit": shown(&seen.submit), "started": shown(&seen.started),
        "finish": shown(&seen.finish), "heartbeat_us": seen.heartbeat.as_micros(),
        "view_held_us": seen.held.as_micros(), "view_waiting_us": seen.waiting.as_micros(),
    });
    println!("{all}");
    Ok(())
}

fn shown(calls: &Calls) -> serde_json::Value {
    let mut samples: Vec<u128> = calls
        .each
        .iter()
        .map(std::time::Duration::as_micros)
        .collect();
    samples.sort_unstable();
    let at = |of_hundred: usize| samples.get(samples.len() * of_hundred / 100).copied();
    serde_json::json!({
        "per_second": calls.per_second().round(), "calls": samples.len(),
        "p50_us": at(50), "p99_us": at(99),
    })
}
