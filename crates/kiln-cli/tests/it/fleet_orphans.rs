//! What a worker loses sight of: a job whose thread panics, and a machine whose process is gone. Neither keeps anything.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_core::{ByteSize, JobId, MachineName};
use kiln_machine::driver::{Driver as _, Start};
use kiln_machine::sim::{Phase, SimConfig, SimDriver};
use kiln_worker::attempt;
use kiln_worker::fleet::http::Target;
use tokio_util::sync::CancellationToken;

use crate::fleet_sim::{
    self, LEASE, Ledgered, Pace, all_over, count, job, machines, machines_of, until, work_near,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_in_a_job_and_a_machine_of_a_dead_process_keep_nothing() {
    let (folder, home) = (
        tempfile::tempdir().expect("folder"),
        tempfile::tempdir().expect("folder"),
    );
    let running = fleet_sim::controller(folder.path(), Vec::new(), Vec::new(), LEASE).await;
    let ledger = Arc::new(Ledgered::default());
    let pace: Pace = Arc::new(Mutex::new(Duration::from_millis(50)));
    let target = Target::Socket(running.socket.clone());
    let mut shop = fleet_sim::workshop(home.path(), "w1", target, &ledger, &pace).await;
    let panics = Arc::new(AtomicBool::new(true));
    let config = SimConfig {
        on_phase: Some({
            let panics = Arc::clone(&panics);
            Arc::new(move |phase| {
                let now = phase == Phase::Running && panics.swap(false, Ordering::SeqCst);
                assert!(!now, "the thread of a job is gone");
            })
        }),
        ..machines_of("w1", &ledger, &pace)
    };
    let driver = Arc::new(SimDriver::new(&shop.host.home.data, config));
    // What a killed process left: by another driver, so that no hook of this one meets it.
    let dead = SimDriver::new(&shop.host.home.data, machines_of("dead", &ledger, &pace));
    let name: MachineName = "gone-1-run".parse().expect("a name");
    let spec = attempt::spec(&shop.host, name.clone(), 1, ByteSize::mib(512), Vec::new());
    let machine = dead.launch(&spec, Start::Cold).await.expect("starts");
    dead.machine(&name).expect("lives").abandon();
    shop.host.driver = driver;
    let stop = CancellationToken::new();
    work_near(shop, "w1", 1, stop.clone()).await;
    let db = &running.controller.db;
    let mut jobs: Vec<JobId> = Vec::new();
    for n in 0..2 {
        let submitted = db.submit(job(&format!("j{n}"))).await.expect("submits");
        jobs.push(submitted.job.request.id);
    }
    all_over(&running, &jobs).await;
    assert!(!panics.load(Ordering::SeqCst), "nothing panicked");
    let mut attempts = 0;
    for id in &jobs {
        attempts += db.attempts(id).await.expect("reads").len();
    }
    let metrics = &running.controller.metrics;
    let told = || {
        metrics
            .render()
            .contains("\nkiln_machine_orphans_total 1\n")
    };
    until("the orphan is told", told).await;
    let [lost, twice, held] = count(&running, &jobs).await;
    stop.cancel();
    until("no machine", || machines(home.path()).is_empty()).await;
    drop(machine);
    println!(
        "one panic, one orphan: {attempts} attempts; jobs lost {lost}, finished twice {twice}, two at once {}, leases left {held}, \
         machines left 0",
        ledger.twice()
    );
    assert_eq!((attempts, [lost, twice, held, ledger.twice()]), (3, [0; 4]));
    running.stop().await;
}
