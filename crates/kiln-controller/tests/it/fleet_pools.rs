//! Queues that use a pool of their own: a controller schedules each, and says why their jobs wait.

use kiln_core::{PoolName, QueueName};
use kiln_db::{NewWorker, OpenOptions, Placement};
use kiln_testkit::wait_until;
use serde_json::Value;

use crate::fleet_server::{Fleet, PATIENCE, script};
use crate::fleet_worker::{Line, facts, send};

async fn shown(fleet: &Fleet, job: &str) -> Value {
    let path = format!("/v1/jobs/{job}");
    let got = send(&fleet.socket, "GET", &path, &[], b"").await;
    got.expect("answers").value()
}

/// Waits until a job's reason to wait is this.
async fn waits(fleet: &Fleet, job: &str, reason: &str) {
    let end = std::time::Instant::now() + PATIENCE;
    loop {
        let pending = shown(fleet, job).await["pending"].clone();
        if pending["reason"] == reason {
            return;
        }
        assert!(std::time::Instant::now() < end, "{job} waits: {pending}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

fn metric(fleet: &Fleet, name: &str) -> String {
    let text = fleet.running.controller.metrics.render();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in\n{text}"))
        .to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_pool_is_scheduled() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let usual = Line::new(&fleet.socket, "w1");
    usual.join(1).await.expect("joins");
    let queue: QueueName = "gpu".parse().expect("a name");
    let pool: PoolName = "gpu".parse().expect("a name");
    let made = fleet.db().create_queue(&queue, &pool).await;
    made.expect("is made");
    for id in ["j1", "j2"] {
        let mut new = script(id, 1, 1);
        new.request.dispatch.queue = queue.clone();
        fleet.db().submit(new).await.expect("submits");
    }
    // The usual pool's worker is none of theirs, and they are told so.
    waits(&fleet, "j1", "no_workers").await;
    waits(&fleet, "j2", "no_workers").await;
    // Each pool is looked at in its own time; what is shown is their sum.
    wait_until("both pools are seen", PATIENCE, || {
        metric(&fleet, "kiln_jobs_pending{reason=\"no_workers\"}") == "2"
            && metric(&fleet, "kiln_workers{state=\"active\"}") == "1"
    })
    .await;

    let worker = NewWorker {
        id: "w2".parse().expect("a name"),
        facts: facts(1),
        certificate: None,
    };
    let placement = Placement {
        pool,
        labels: std::collections::BTreeMap::new(),
        tenants: None,
    };
    let joined = fleet.db().admit_worker(worker, placement).await;
    joined.expect("joins");
    let line = Line::new(&fleet.socket, "w2");
    let leases = line.poll(Vec::new()).await.expect("answers");
    assert_eq!(leases[0].lease.attempt.job.as_str(), "j1");
    waits(&fleet, "j2", "capacity").await;
    // It had waited for a worker: that is no pick-up. A job that finds one is.
    assert_eq!(metric(&fleet, "kiln_pickup_seconds_count"), "0");
    fleet.submit("j3", 1, 1).await;
    let leases = usual.poll(Vec::new()).await.expect("answers");
    assert_eq!(leases[0].lease.attempt.job.as_str(), "j3");
    // It is counted after the lease is on its way.
    wait_until("a pick-up", PATIENCE, || {
        metric(&fleet, "kiln_pickup_seconds_count") == "1"
    })
    .await;
    fleet.stop().await;
}
