//! Commands that print as fast as memory can be copied, on simulated machines: no emulated channel holds them back. Real leases and logs, through
//! a controller.

use std::time::{Duration, Instant};

use http::StatusCode;
use kiln_worker::fleet::spool::LOG_BYTES_MAX;
use serde_json::{Value, json};

use crate::fleet_kill::asked;
use crate::fleet_sim::PATIENCE;
use crate::kept_server::Fleet;

/// Most that one flood may add to the memory of this process, where worker, controller and guest are one: it is a part of what comes.
const MEMORY_KIB_MAX: u64 = 200 << 10;
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// Bytes of a flood: more than a log may have; with `KILN_TEST_LONG` four gigabytes.
fn flood() -> u64 {
    match asked("KILN_TEST_LONG") {
        Some(_) => 4 << 30,
        None => LOG_BYTES_MAX + LOG_BYTES_MAX / 4,
    }
}

fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = text.lines().find(|line| line.starts_with("VmRSS:"));
    let number = line.and_then(|line| line.split_ascii_whitespace().nth(1));
    number.and_then(|text| text.parse().ok()).expect("a number")
}

async fn queue(fleet: &Fleet, argv: &[&str], more: &Value) -> String {
    let mut asked = json!({"argv": argv, "cpus": 1, "memory": "512M"});
    for (key, value) in more.as_object().expect("an object") {
        asked[key] = value.clone();
    }
    let (status, job) = fleet.owner.post("/v1/runs", &asked).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{job}");
    job["id"].as_str().expect("an id").to_owned()
}

/// Waits for the end; gives the job, and the most memory seen meanwhile.
async fn over(fleet: &Fleet, id: &str) -> (Value, u64) {
    let deadline = Instant::now() + PATIENCE * 4;
    let mut most = 0;
    loop {
        most = most.max(resident());
        let (_, job) = fleet.owner.get(&format!("/v1/jobs/{id}")).await;
        if job["state"] == "finished" {
            return (job, most);
        }
        assert!(Instant::now() < deadline, "{job}");
        tokio::time::sleep(PAUSE).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_as_fast_as_memory_is_kept_to_its_bound_and_holds_up_nobody() {
    let fleet = Fleet::open().await;
    // The first run makes the template: it is none of the flood's.
    let first = queue(&fleet, &["true"], &json!({})).await;
    let (_, before) = over(&fleet, &first).await;
    let bytes = flood();
    let started = Instant::now();
    let loud = queue(
        &fleet,
        &["head", "-c", &bytes.to_string(), "/dev/zero"],
        &json!({}),
    )
    .await;
    let beside = queue(&fleet, &["echo", "beside"], &json!({})).await;
    let (beside, _) = over(&fleet, &beside).await;
    assert_eq!(beside["outcome"]["verdict"], "passed", "{beside}");
    let (job, most) = over(&fleet, &loud).await;
    let took = started.elapsed();
    assert_eq!(job["outcome"]["verdict"], "passed", "{job}");
    let added = most.saturating_sub(before);
    let rate = u128::from(bytes >> 20) * 1000 / took.as_millis().max(1);
    assert!(added < MEMORY_KIB_MAX, "{added} KiB at {rate} MiB/s");
    let id = loud.parse().expect("an id");
    let events = fleet.running.controller.db.events_after(&id, 0, 1000).await;
    let events = events.expect("reads");
    let told = events.iter().map(|event| event.data.to_string());
    let cut = told.filter(|text| text.contains("the log is cut: without"));
    assert_eq!(cut.count(), 1, "{events:?}");
    fleet.no_machines().await;
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_without_end_is_ended_by_the_policys_bound() {
    let fleet = Fleet::open().await;
    let policy =
        json!({"policy": {"file": "kiln.yaml", "text": "version: 1\nlimits: {output: 1M}\n"}});
    let endless = u64::MAX.to_string();
    let loud = queue(&fleet, &["head", "-c", &endless, "/dev/zero"], &policy).await;
    let (job, _) = over(&fleet, &loud).await;
    assert_eq!(job["outcome"]["reason"], "output_limit", "{job}");
    fleet.no_machines().await;
    fleet.close().await;
}
