//! A controller is replaced by a newer one while jobs run: newer schema, newer generation of the workers' protocol, and no way back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kiln_controller::server::StartError;
use kiln_core::AttemptId;
use kiln_db::{OpenError, OpenOptions, SCHEMA_VERSION};
use kiln_proto::fleet::GENERATION;
use kiln_testkit::wait_until;

use crate::fleet_server::{BEAT, Fleet, PATIENCE, newer, try_serve};
use crate::fleet_worker::{Ledger, Line, NoAnswer, SimWorker};

/// Jobs, each longer than a controller takes to be replaced.
const JOBS: usize = 24;

fn worker(fleet: &Fleet, name: &str, generation: u32, ledger: &Arc<Ledger>) -> SimWorker {
    let mut line = Line::new(&fleet.socket, name);
    line.generation = generation;
    SimWorker::start(line, 4, BEAT, ledger)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_controller_takes_over_while_jobs_run() {
    let folder = tempfile::tempdir().expect("folder");
    let ledger = Arc::new(Ledger::default());
    // The leases of real life: what runs has to outlive the time in which nobody serves.
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let old: Vec<_> = (0..2)
        .map(|n| worker(&fleet, &format!("old{n}"), GENERATION, &ledger))
        .collect();
    let mut jobs = Vec::new();
    for n in 0..JOBS {
        jobs.push(fleet.submit(&format!("j{n}"), 8, 100).await);
    }
    let begun = || ledger.began.lock().expect("lock").len();
    wait_until("jobs run", PATIENCE, || begun() >= 6).await;
    let ran: Vec<AttemptId> = {
        let began = ledger.began.lock().expect("lock");
        began.iter().map(|(lease, ..)| lease.clone()).collect()
    };
    fleet.stop().await;
    let fleet = Fleet::start(folder.path(), newer(OpenOptions::default())).await;
    let new: Vec<_> = (0..2)
        .map(|n| worker(&fleet, &format!("new{n}"), GENERATION + 1, &ledger))
        .collect();
    fleet.all_over(&jobs).await;
    let counts = fleet.count(&jobs).await;
    counts.check("replaced by a newer controller", JOBS);
    for attempt in ran {
        let all = fleet.db().attempts(&attempt.job).await.expect("reads");
        let last = all.last().map(|one| one.id.clone());
        assert_eq!(last, Some(attempt), "what ran went on in the same attempt");
    }
    assert_eq!(ledger.twice.load(Ordering::SeqCst), 0, "two at once");
    // Alone, so that it is theirs however fast the others were.
    for worker in &old {
        worker.kill();
    }
    let more = fleet.submit("more", 2, 10).await;
    fleet.all_over(std::slice::from_ref(&more)).await;
    for of in ["old", "new"] {
        let began = ledger.began.lock().expect("lock");
        let worked = began.iter().any(|(_, worker, _)| worker.starts_with(of));
        assert!(worked, "no worker of the {of} generation worked");
    }
    // Two generations apart nobody understands the other, and both are told.
    let mut stranger = Line::new(&fleet.socket, "old0");
    for generation in [GENERATION + 2, 0] {
        stranger.generation = generation;
        let refused = stranger.beat(Vec::new(), 1).await;
        let Err(NoAnswer::Refused(code)) = refused else {
            panic!("generation {generation}: {refused:?}");
        };
        assert_eq!(code, "generation");
    }
    drop((old, new));
    fleet.stop().await;

    // There is no way back: the older one says why, and changes nothing.
    let file = folder.path().join("controller/kiln.db");
    // The last connection takes the log into the file and removes it when it closes.
    let log = folder.path().join("controller/kiln.db-wal");
    wait_until("the database is closed", PATIENCE, || !log.exists()).await;
    let before = std::fs::read(&file).expect("reads");
    let refused = try_serve(folder.path(), OpenOptions::default()).await;
    let Err(StartError::Database(error @ OpenError::Newer { found, known, .. })) = &refused else {
        panic!("it started on a newer schema: {refused:?}");
    };
    assert_eq!((*found, *known), (SCHEMA_VERSION + 1, SCHEMA_VERSION));
    assert!(error.to_string().contains("use the newer kiln"), "{error}");
    assert!(
        std::fs::read(&file).expect("reads") == before,
        "it was written to"
    );
    let fleet = Fleet::start(folder.path(), newer(OpenOptions::default())).await;
    fleet.count(&jobs).await.check("the newer one again", JOBS);
    fleet.stop().await;
}
