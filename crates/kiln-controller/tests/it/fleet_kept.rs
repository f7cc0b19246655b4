//! Kept machines, attended commands and two controllers: whoever is asked leads to the machine, through the one that its worker speaks to.

use std::path::Path;

use kiln_controller::fleet::machines::NoWay;
use kiln_core::job::{RunAttend, RunKeep};
use kiln_core::{JobKind, Lease};
use kiln_proto::fleet::{Calls, GENERATION, GENERATION_HEADER, MACHINE_UPGRADE, WORKER_HEADER};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::fleet_line::Line;
use crate::fleet_server::{PATIENCE, script};
use crate::fleet_shared::Common;

/// As a worker tells of it; nobody here looks at it.
fn facts(lease: &Lease) -> Value {
    json!({ "facts": {
        "schema": 1, "machine": "j1-1-run", "job": lease.attempt.job, "tenant": "local", "image": null, "command": ["true"],
        "ended": "", "exit_code": 0, "cpus": 1, "memory": 1 << 29, "network": kiln_core::NetworkPolicy::Isolated,
        "bytes_out_and_in_per_second": [null, null], "connections_max": null, "runc": null, "stays_ms": 600_000,
    }})
}

/// Opens the way that somebody waits for, and says back what comes.
async fn echoes(socket: &Path, worker: &str, way: &str) {
    let mut line = UnixStream::connect(socket).await.expect("connects");
    let head = format!(
        "GET /worker/v1/machines/ways/{way} HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: {MACHINE_UPGRADE}\r\n\
         {GENERATION_HEADER}: {GENERATION}\r\n{WORKER_HEADER}: {worker}\r\n\r\n"
    );
    line.write_all(head.as_bytes()).await.expect("asks");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(line.read_u8().await.expect("answers"));
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    let (mut from, mut to) = line.split();
    let _ended = tokio::io::copy(&mut from, &mut to).await;
    let _gone = to.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_leads_through_the_controller_that_has_the_worker() {
    let Some(common) = Common::new() else { return };
    let (a, b) = (
        tempfile::tempdir().expect("folder"),
        tempfile::tempdir().expect("folder"),
    );
    let [first, second] = common.two(a.path(), b.path()).await;
    let line = Line::new(&second.socket, "w-b");
    line.join(1).await.expect("joins");
    let mut new = script("j1", 1, 1);
    if let JobKind::Run(run) = &mut new.request.kind {
        run.keep = Some(RunKeep {
            stays_ms: 600_000,
            on_failure_only: false,
        });
    }
    first.db().submit(new).await.expect("submits");
    let lease = line
        .poll(Vec::new())
        .await
        .expect("answers")
        .remove(0)
        .lease;
    let path = "/worker/v1/jobs/j1/keep";
    let facts = facts(&lease);
    let may = line.call::<Value>(path, Some(&lease), &facts, PATIENCE);
    let may = may.await.expect("may stay");
    assert_eq!(may["stays_ms"], 600_000);
    line.finish(&lease).await.expect("finishes");
    let kept = first
        .db()
        .kept(&lease.attempt.job)
        .await
        .expect("reads")
        .expect("kept");
    assert_eq!(kept.home, second.running.controller.peers.id());
    let (socket, asking) = (second.socket.clone(), line.clone());
    let answering = tokio::spawn(async move {
        let path = "/worker/v1/machines/calls";
        let nothing = json!({});
        let told = asking.call::<Calls>(path, None, &nothing, PATIENCE);
        let told = told.await.expect("answers");
        echoes(&socket, &asking.worker, &told.calls[0].way).await;
    });
    let way = first.running.controller.way_to(&kept);
    let mut way = tokio::time::timeout(PATIENCE, way)
        .await
        .expect("in time")
        .expect("a way");
    way.write_all(b"hello").await.expect("says");
    way.shutdown().await.expect("half-closes");
    let mut back = String::new();
    let read = tokio::time::timeout(PATIENCE, way.read_to_string(&mut back)).await;
    read.expect("in time").expect("reads");
    assert_eq!(back, "hello");
    answering.await.expect("ends");
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_to_a_command_leads_through_the_controller_that_hears_its_worker() {
    let Some(common) = Common::new() else { return };
    let (a, b) = (
        tempfile::tempdir().expect("folder"),
        tempfile::tempdir().expect("folder"),
    );
    let [first, second] = common.two(a.path(), b.path()).await;
    let line = Line::new(&second.socket, "w-b");
    line.join(1).await.expect("joins");
    let mut new = script("j1", 1, 1);
    if let JobKind::Run(run) = &mut new.request.kind {
        run.attend = Some(RunAttend::default());
    }
    first.db().submit(new).await.expect("submits");
    let leased = line.poll(Vec::new()).await.expect("answers").remove(0);
    let (socket, asking) = (second.socket.clone(), line.clone());
    let answering = tokio::spawn(async move {
        let path = "/worker/v1/machines/calls";
        let nothing = json!({});
        let told = asking.call::<Calls>(path, None, &nothing, PATIENCE);
        let told = told.await.expect("answers");
        echoes(&socket, &asking.worker, &told.calls[0].way).await;
    });
    let way = first.running.controller.way_to_attempt(&leased.lease);
    let way = tokio::time::timeout(PATIENCE, way).await.expect("in time");
    let mut way = way.expect("a way");
    way.write_all(b"hello").await.expect("says");
    way.shutdown().await.expect("half-closes");
    let mut back = String::new();
    let read = tokio::time::timeout(PATIENCE, way.read_to_string(&mut back)).await;
    read.expect("in time").expect("reads");
    assert_eq!(back, "hello");
    answering.await.expect("ends");
    // Nobody hears it any more: that is told, and soon.
    let way = first.running.controller.way_to_attempt(&leased.lease);
    let none = tokio::time::timeout(PATIENCE, way).await.expect("in time");
    assert!(matches!(none, Err(NoWay::Silent)), "{none:?}");
    first.stop().await;
    second.stop().await;
}
