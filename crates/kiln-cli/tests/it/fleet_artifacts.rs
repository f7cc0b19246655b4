//! What a run leaves in its machine, from the worker's real code to the controller's store: kept also when the command fails, each file
//! under its lease, spans of every phase beside it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_core::{Digest, JobKind};
use kiln_machine::driver::BoxFuture;
use kiln_machine::sim::{ExecCall, ExecEnd, Script, SimConfig, SimDriver};
use kiln_telemetry::otlp::Tracer;
use kiln_worker::fleet::http::Target;
use tokio_util::sync::CancellationToken;

use crate::fleet_sim::{self, LEASE, Ledgered, Pace, all_over, job, machines_of, until, work_near};

/// A command that leaves files and fails.
fn leaves(call: &mut ExecCall) -> BoxFuture<'_, ExecEnd> {
    Box::pin(async move {
        let guest = call.guest();
        let written = guest.write("/root/out/report.xml", b"<failed/>".to_vec())
            && guest.write("/root/out/sub/a.bin", vec![7; 300_000]);
        assert!(written, "the machine's own disk");
        ExecEnd::Code(3)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_failed_run_leaves_is_kept() {
    let (folder, home) = (
        tempfile::tempdir().expect("folder"),
        tempfile::tempdir().expect("folder"),
    );
    let running = fleet_sim::controller(folder.path(), Vec::new(), Vec::new(), LEASE).await;
    let ledger = Arc::new(Ledgered::default());
    let pace: Pace = Arc::new(Mutex::new(Duration::from_millis(50)));
    let target = Target::Socket(running.socket.clone());
    let mut shop = fleet_sim::workshop(home.path(), "w1", target, &ledger, &pace).await;
    let config = SimConfig {
        script: Script::default().on(&["work"], leaves),
        ..machines_of("w1", &ledger, &pace)
    };
    shop.host.driver = Arc::new(SimDriver::new(&shop.host.home.data, config));
    let (tracer, spans) = Tracer::to_queue(Arc::new(|_| {}));
    shop.tracer = tracer;
    let cache = shop.host.home.cache.clone();
    let stop = CancellationToken::new();
    work_near(shop, "w1", 1, stop.clone()).await;
    let mut new = job("j1");
    if let JobKind::Run(run) = &mut new.request.kind {
        let paths = ["out/*.xml", "out/sub", "missing"];
        run.artifacts = paths.map(|path| path.parse().expect("a path")).into();
    }
    let db = &running.controller.db;
    let id = db.submit(new).await.expect("submits").job.request.id;
    all_over(&running, std::slice::from_ref(&id)).await;
    let kept = db.artifacts(&id).await.expect("reads");
    let kept: Vec<_> = kept
        .iter()
        .map(|one| (one.name.as_str(), one.size, one.digest))
        .collect();
    let want = [
        ("out/report.xml", 9, Digest::of(b"<failed/>")),
        ("out/sub/a.bin", 300_000, Digest::of(&[7; 300_000])),
    ];
    assert_eq!(kept, want);
    let events = db.events_after(&id, 0, 500).await.expect("reads");
    let warned = events.iter().any(|event| {
        event.kind == "warning" && event.data.to_string().contains("missing is not kept")
    });
    assert!(warned, "{events:?}");
    until("the worker's copies to go", || {
        let left = std::fs::read_dir(cache.join("checkouts"));
        let names = left.into_iter().flatten().flatten();
        !names.map(|entry| entry.path()).any(|path| path.is_dir())
    })
    .await;
    stop.cancel();
    let all: Vec<_> = spans.try_iter().collect();
    let names: BTreeSet<_> = all.iter().map(|span| span.name.as_str()).collect();
    for phase in ["machine", "run", "collect", "artifacts", "attempt"] {
        assert!(names.contains(phase), "{phase} is not in {names:?}");
    }
    let attempt = all.iter().find(|span| span.name == "attempt").expect("one");
    assert!(!attempt.ok && attempt.parent.is_some());
    let traces: BTreeSet<_> = all.iter().map(|span| span.context.trace_id()).collect();
    assert_eq!(traces.len(), 1, "one trace");
    running.stop().await;
}
