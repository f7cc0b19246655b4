//! `cancel` and `through`: real machines behind a controller of this home, with a worker beside it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_controller::api::{JobView, List, WorkerView};
use kiln_core::FailureClass;
use serde_json::json;

use super::Bench;
use super::child::{kiln, kiln_with};
use super::report::Report;
use super::series::{Promise, Unit};
use super::serving::{Serving, asks, pause};
use crate::error::{CliError, OrInfrastructure as _, Result};

/// Longest wait for a job to run, a template made first, or for a machine to be gone.
const STATE_MAX: Duration = Duration::from_secs(180);
/// Pause between two looks at a state.
const LOOK: Duration = Duration::from_millis(5);
/// Image that builds here are named.
const IMAGE: &str = "kiln-bench-through";

async fn serve(bench: &Bench<'_>) -> Result<Serving> {
    let home = &bench.operator.home.data;
    let serving = Serving::start(bench, home, &["--with-worker"]).await?;
    until(bench, "the worker beside the controller", async || {
        let listed: List<WorkerView> = serving.server.get("/v1/workers").await?;
        Ok(listed.items.iter().any(|worker| worker.state == "active"))
    })
    .await?;
    Ok(serving)
}

async fn until(
    bench: &Bench<'_>,
    what: &str,
    mut look: impl AsyncFnMut() -> Result<bool>,
) -> Result<()> {
    let end = Instant::now() + STATE_MAX;
    while !look().await? {
        if Instant::now() > end {
            let told = format!("waited too long for {what}");
            return Err(CliError::new(FailureClass::Infrastructure, told));
        }
        pause(bench, LOOK).await?;
    }
    Ok(())
}

/// `cancel`: from the request to the end of its machine, its folder and VMM gone.
pub(super) async fn cancel(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let serving = serve(bench).await?;
    let machines = bench.operator.home.data.join("machines");
    for _ in 0..bench.samples {
        let asked = json!({
            "argv": ["sleep", "600"], "cpus": 1, "memory": "512M", "disk": "1G",
        });
        let job: JobView = serving.server.post("/v1/runs", &asked).await?;
        let path = format!("/v1/jobs/{}", job.line.id);
        until(bench, "the job to run", async || {
            let seen: JobView = serving.server.get(&path).await?;
            Ok(seen.line.state == "running")
        })
        .await?;
        let began = Instant::now();
        let _told: serde_json::Value = serving.server.delete(&path).await?;
        until(bench, "the machine to be gone", async || {
            Ok(!has_machine(&machines, &job.line.id)?)
        })
        .await?;
        let promise = Some(Promise::EachAtMost(2_000.0));
        report.time("cancel to gone", promise, began.elapsed());
    }
    serving.stop().await;
    Ok(())
}

/// Whether a machine of the job has its folder still: it goes last, after its VMM.
fn has_machine(machines: &Path, job: &str) -> Result<bool> {
    let entries = fs::read_dir(machines).or_infrastructure()?;
    let mut names = entries.flatten().map(|entry| entry.file_name());
    Ok(names.any(|name| name.to_string_lossy().starts_with(job)))
}

/// `through`: a build that changes nothing, which starts no machine, through a server and without one.
pub(super) async fn through(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let app = bench.work.join("through");
    fs::create_dir_all(&app).or_infrastructure()?;
    let text = "FROM scratch\nCOPY Dockerfile /\n";
    fs::write(app.join("Dockerfile"), text).or_infrastructure()?;
    // Little room: a host may have less of it than the default of a server.
    let plain = ["--tag", IMAGE, "--cpus", "1", "--memory", "512M"];
    let mut words = vec!["build".as_ref(), app.as_os_str()];
    words.extend(plain.map(OsStr::new));
    kiln(bench, &words).await?;
    let mut without = Vec::new();
    for _ in 0..bench.samples {
        let took = kiln(bench, &words).await?;
        report.time("build, no server", None, took);
        without.push(took);
    }
    let serving = serve(bench).await?;
    let env = asks(&serving.socket);
    words.extend(["--disk", "1G"].map(OsStr::new));
    built(bench, &words, &env).await?;
    let mut with = Vec::new();
    for _ in 0..bench.samples {
        let took = built(bench, &words, &env).await?;
        report.time("build, server", None, took);
        with.push(took);
    }
    serving.stop().await;
    let more = middle(with) - middle(without);
    let promise = Some(Promise::MedianAtMost(100.0));
    report.add("  server costs", Unit::Milliseconds, promise, more);
    let name = format!("{IMAGE}:latest");
    kiln(
        bench,
        &["registry".as_ref(), "rm".as_ref(), OsStr::new(&name)],
    )
    .await?;
    Ok(())
}

/// A build through the server that is there: one that waits in its queue is no measurement.
async fn built(bench: &Bench<'_>, words: &[&OsStr], env: &[(&str, OsString)]) -> Result<Duration> {
    let building = kiln_with(bench, words, env);
    let built = tokio::time::timeout(STATE_MAX, building).await;
    built.unwrap_or_else(|_| {
        let told = "the build never began: `kiln job why` tells for what it waits";
        Err(CliError::new(FailureClass::Infrastructure, told))
    })
}

/// The median, milliseconds.
fn middle(mut times: Vec<Duration>) -> f64 {
    times.sort();
    let middle = times.get(times.len().saturating_sub(1) / 2);
    middle.copied().unwrap_or_default().as_secs_f64() * 1e3
}
