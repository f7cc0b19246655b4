//! Every door of `/worker/v1` against workers that lie, that say things twice, late or with pieces missing; and requests that are cut.

use std::sync::Arc;
use std::time::Duration;

use kiln_core::{FailureClass, JobId, JobState, Lease, Verdict, WorkerId};
use kiln_db::{LeaseTimes, OpenOptions};
use kiln_proto::fleet::{Heartbeat, HeartbeatAnswer, HeldLease, LeaseAnswer, LeaseHeader, Leased};
use kiln_testkit::wait_until;
use tokio::io::AsyncWriteExt as _;

use crate::fleet_server::{Fleet, PATIENCE, times};
use crate::fleet_worker::{Line, NoAnswer, facts, send};
use crate::server::{FORM, Got, archive, multipart};

/// Every request about a job: method, what, and a body that makes sense there.
const DOORS: [(&str, &str, &str); 10] = [
    ("GET", "source", ""),
    ("POST", "secrets", r#"{"names": []}"#),
    ("POST", "policy", r#"{"files": {}}"#),
    ("POST", "event", r#"{"from": 0, "events": []}"#),
    ("POST", "log", "hello\n"),
    ("POST", "registry-token", "{}"),
    ("PUT", "artifacts/{name}", "content"),
    (
        "POST",
        "image",
        r#"{"manifest": "sha256:0000000000000000000000000000000000000000000000000000000000000000",
            "tags": []}"#,
    ),
    ("POST", "keep", r#"{"facts": {}}"#),
    (
        "POST",
        "finish",
        r#"{"outcome": {"verdict": "passed", "phases_ms": []}, "details": {}}"#,
    ),
];

fn path(job: &JobId, what: &str) -> String {
    let query = if what == "log" { "?from=0" } else { "" };
    let what = what.replace("{name}", "a.txt");
    format!("/worker/v1/jobs/{job}/{what}{query}")
}

/// Joins and holds leases without working for them.
async fn joined(fleet: &Fleet, name: &str, machines: u32) -> Line {
    let line = Line::new(&fleet.socket, name);
    line.join(machines).await.expect("joins");
    line
}

async fn leased(line: &Line, held: &[HeldLease]) -> Vec<Leased> {
    let leases = line.poll(held.to_vec()).await.expect("answers");
    assert!(!leases.is_empty(), "no lease came");
    leases
}

fn held(lease: &Lease) -> HeldLease {
    HeldLease {
        attempt: lease.attempt.clone(),
        epoch: lease.epoch,
    }
}

/// Refused audit rows of a worker.
async fn refusals(fleet: &Fleet, worker: &str) -> usize {
    let (mut after, mut count) = (0, 0);
    loop {
        let rows = fleet.db().audit_rows(None, after, 500).await;
        let rows = rows.expect("reads");
        let Some(last) = rows.last() else {
            return count;
        };
        after = last.seq;
        let actor = format!("worker:{worker}");
        let refused = rows.iter().filter(|row| {
            row.entry.actor == actor && !row.entry.allowed && row.entry.reason.is_some()
        });
        count += refused.count();
    }
}

/// The table above is the whole table: a new door has to be in it.
#[test]
fn every_door_is_known_here() {
    let source = include_str!("../../src/fleet/doors.rs");
    let routes = source.split(".route(").skip(1).filter_map(|route| {
        let path = route.split('"').nth(1)?;
        path.strip_prefix("/worker/v1/jobs/{job}/")
    });
    let mut routes: Vec<_> = routes.collect();
    routes.sort_unstable();
    let mut known: Vec<_> = DOORS.iter().map(|(_, what, _)| *what).collect();
    known.sort_unstable();
    assert_eq!(routes, known);
}

async fn lie(fleet: &Fleet, line: &Line, job: &JobId, header: &str, what: &str) -> usize {
    for (method, door, body) in DOORS {
        let before = refusals(fleet, &line.worker).await;
        let path = path(job, door);
        let got = line.raw(method, &path, Some(header), body.as_bytes());
        let got = got.await.expect("answers");
        let text = got.text();
        assert_eq!(
            (got.status, got.code().as_str()),
            (409, "lease_refused"),
            "{what} at {door}: {text}"
        );
        let after = refusals(fleet, &line.worker).await;
        assert_eq!(after, before + 1, "{what} at {door}: one audit row");
    }
    DOORS.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_lies_is_refused_at_every_door() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let honest = joined(&fleet, "honest", 1).await;
    let job = fleet.submit("j1", 1, 1).await;
    let lease = leased(&honest, &[]).await.remove(0).lease;
    let liar = joined(&fleet, "liar", 0).await;
    let live = LeaseHeader::of(&lease);
    let with = |change: &dyn Fn(&mut LeaseHeader)| {
        let mut header = live.clone();
        change(&mut header);
        header.to_string()
    };
    let name: WorkerId = "liar".parse().expect("name");
    let mut lies = 0;
    for (what, line, header) in [
        ("an older epoch", &honest, with(&|h| h.epoch.count -= 1)),
        ("a later epoch", &honest, with(&|h| h.epoch.count += 1)),
        (
            "another life of the database",
            &honest,
            with(&|h| h.epoch.incarnation += 1),
        ),
        ("another attempt", &honest, with(&|h| h.attempt += 1)),
        ("another's lease, as it is", &liar, with(&|_| {})),
        (
            "another's lease under its own name",
            &liar,
            with(&|h| h.worker = name.clone()),
        ),
    ] {
        lies += lie(&fleet, line, &job, &header, what).await;
    }
    let nowhere: JobId = "j2".parse().expect("id");
    lies += lie(
        &fleet,
        &honest,
        &nowhere,
        &with(&|_| {}),
        "a job that is not",
    )
    .await;
    // Heartbeats tell a liar that its leases are gone.
    let told = liar.beat(vec![held(&lease)], 0).await.expect("answers");
    assert!(matches!(told.leases[0], LeaseAnswer::Gone { .. }));
    // They also say what machines are to keep off: where workers and controllers are.
    assert!(
        told.own.iter().any(|place| place == "127.0.0.1"),
        "{:?}",
        told.own
    );
    // None of it had an effect, and the honest one goes on.
    let events = fleet.db().events_after(&job, 0, 100).await.expect("reads");
    let kinds: Vec<_> = events.iter().map(|event| event.kind.as_str()).collect();
    assert_eq!(kinds, ["queued", "leased"]);
    honest.log(&lease, 0, b"hello\n").await.expect("taken");
    assert_eq!(honest.finish(&lease).await.expect("taken"), "finished");
    // The same finish again, because its answer was lost, is answered alike; everything else is over.
    assert_eq!(honest.finish(&lease).await.expect("taken"), "finished");
    for (method, door, body) in DOORS.iter().filter(|(_, door, _)| *door != "finish") {
        let (header, path) = (live.to_string(), path(&job, door));
        let got = honest.raw(method, &path, Some(&header), body.as_bytes());
        let got = got.await.expect("answers");
        assert_eq!(
            (got.status, got.code().as_str()),
            (409, "lease_refused"),
            "{door}"
        );
    }
    println!(
        "{lies} lies at {} doors: all refused, all in the audit log",
        DOORS.len()
    );
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orphans_that_a_worker_found_are_counted() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let line = joined(&fleet, "w1", 1).await;
    for orphans in [0, 2, 1] {
        let beat = Heartbeat {
            addresses: Vec::new(),
            kept: Vec::new(),
            facts: facts(1),
            held: Vec::new(),
            draining: false,
            orphans,
        };
        let told: Result<HeartbeatAnswer, _> = line
            .call("/worker/v1/heartbeat", None, &beat, PATIENCE)
            .await;
        told.expect("answers");
    }
    let shown = fleet.running.controller.metrics.render();
    let line = "kiln_machine_orphans_total 3";
    assert!(shown.lines().any(|shown| shown == line), "{shown}");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_finish_counts_once_and_never_after_the_lease() {
    let folder = tempfile::tempdir().expect("folder");
    let lease = LeaseTimes {
        ttl_ms: 1_500,
        grace_ms: 500,
    };
    let fleet = Fleet::start(folder.path(), times(lease)).await;
    let line = joined(&fleet, "w1", 1).await;
    // Ten at once: one of them ends the job, all are answered alike.
    let job = fleet.submit("j1", 1, 1).await;
    let lease = leased(&line, &[]).await.remove(0).lease;
    let all: Vec<_> = (0..10)
        .map(|_| {
            let (line, lease) = (line.clone(), lease.clone());
            tokio::spawn(async move { line.finish(&lease).await })
        })
        .collect();
    for one in all {
        assert_eq!(one.await.expect("ends").expect("taken"), "finished");
    }
    let events = fleet.db().events_after(&job, 0, 100).await.expect("reads");
    let ends = events.iter().filter(|event| event.kind == "finished");
    assert_eq!(ends.count(), 1);
    // After the lease: refused, before and after it was given away.
    let job = fleet.submit("j2", 1, 1).await;
    let lease = leased(&line, &[]).await.remove(0).lease;
    let mut refused = 0;
    let expired = async {
        loop {
            let over = fleet
                .db()
                .job(&job)
                .await
                .expect("reads")
                .expect("is there");
            let dead = over.lease.is_none();
            if dead {
                let late = line.finish(&lease).await;
                let Err(NoAnswer::Refused(code)) = late else {
                    panic!("{late:?}");
                };
                assert_eq!(code, "lease_refused");
                refused += 1;
                // Read after the lease was seen gone: a state from before it may still be the leased one.
                return fleet.state(&job).await;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let state = tokio::time::timeout(PATIENCE, expired).await;
    assert_eq!(state.expect("expires"), JobState::Queued { attempts: 1 });
    assert_eq!(refused, 1);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_with_gaps_and_repeats_is_kept_once_and_in_order() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let line = joined(&fleet, "w1", 1).await;
    let job = fleet.submit("j1", 1, 1).await;
    let lease = leased(&line, &[]).await.remove(0).lease;
    let said = |from, bytes: &'static [u8]| {
        let (line, lease) = (&line, &lease);
        async move { line.log(lease, from, bytes).await.expect("answers").next }
    };
    assert_eq!(said(0, b"one\n").await, 4);
    assert_eq!(said(0, b"one\n").await, 4, "a repeat");
    assert_eq!(said(9, b"three\n").await, 4, "a gap: what is wanted");
    assert_eq!(said(2, b"e\ntwo\n").await, 8, "half a repeat");
    assert_eq!(said(8, b"three\n").await, 14);
    assert_eq!(
        said(0, b"LIES\nLIES\n").await,
        14,
        "nothing is written over"
    );
    assert_eq!(said(14, b"").await, 14, "nothing to say");
    let log = send(
        &fleet.socket,
        "GET",
        &format!("/v1/jobs/{job}/logs"),
        &[],
        b"",
    )
    .await;
    assert!(log.expect("answers").text().contains("one\ntwo\nthree\n"));
    assert_eq!(line.finish(&lease).await.expect("taken"), "finished");
    let name = kiln_store::logs::LogName {
        tenant: lease.tenant.clone(),
        attempt: lease.attempt.clone(),
    };
    let kept = fleet.running.controller.logs.read(&name, 0, 1_000).await;
    assert_eq!(kept.expect("reads"), "one\ntwo\nthree\n");
    fleet.stop().await;
}

/// A job that ends as an incident asks nobody: its lease is over before its worker knows, with all that it could be given by it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_incident_takes_the_lease_at_once() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let line = joined(&fleet, "w1", 1).await;
    let job = fleet.submit("j1", 1, 1).await;
    let lease = leased(&line, &[]).await.remove(0).lease;
    line.log(&lease, 0, b"evidence\n").await.expect("taken");
    let path = format!("/v1/jobs/{job}/incident");
    let json = [("content-type", "application/json")];
    let note = br#"{"note": "it mined"}"#;
    let end = || send(&fleet.socket, "POST", &path, &json, note);
    let got = end().await.expect("answers");
    let told: serde_json::Value = serde_json::from_str(&got.text()).expect("JSON");
    assert_eq!(
        (got.status, &told["worker"], &told["held"]),
        (200, &"w1".into(), &true.into()),
        "{told}"
    );
    let header = LeaseHeader::of(&lease).to_string();
    for (method, door, body) in DOORS.iter().filter(|(_, door, _)| *door != "finish") {
        let path = self::path(&job, door);
        let got = line.raw(method, &path, Some(&header), body.as_bytes());
        let got = got.await.expect("answers");
        let code = got.code();
        assert_eq!(
            (got.status, code.as_str()),
            (409, "lease_refused"),
            "{door}"
        );
    }
    // Its worker's last word comes too late: it is answered as a repeat is, and changes nothing of what is asked for below.
    assert_eq!(line.finish(&lease).await.expect("taken"), "finished");
    let answer = line.beat(vec![held(&lease)], 1).await.expect("answers");
    let LeaseAnswer::Gone {
        incident: Some(incident),
        ..
    } = &answer.leases[0]
    else {
        panic!("{answer:?}");
    };
    assert_eq!(incident.note, "it mined");
    assert_eq!(told["at_unix_ms"], incident.at_unix_ms);
    let JobState::Finished { outcome } = fleet.state(&job).await else {
        panic!("{job} is not over");
    };
    let Verdict::Failed { class, message, .. } = outcome.verdict else {
        panic!("it passed");
    };
    assert_eq!(class, FailureClass::Cancelled);
    assert!(message.contains("incident") && message.contains("it mined"));
    let holds = fleet.db().holds().await.expect("reads");
    assert_eq!(holds.len(), 1);
    let rows = fleet.db().audit_rows(None, 0, 500).await.expect("reads");
    let rows = rows
        .iter()
        .filter(|row| row.entry.action == kiln_db::INCIDENT);
    assert_eq!(rows.count(), 1);
    // What it printed until then is still read.
    let log = format!("/v1/jobs/{job}/logs");
    let log = send(&fleet.socket, "GET", &log, &[], b"").await;
    assert!(log.expect("answers").text().contains("evidence"));
    assert_eq!(end().await.expect("answers").status, 409, "once");
    fleet.stop().await;
}

/// A thousand cancels race a thousand finishes: each job is over once, as both sides were told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancels_race_finishes() {
    const ROUNDS: usize = 5;
    const EACH: usize = 200;
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(
        folder.path(),
        times(LeaseTimes {
            ttl_ms: 60_000,
            grace_ms: 5_000,
        }),
    )
    .await;
    let line = joined(&fleet, "w1", 250).await;
    let (mut passed, mut cancelled) = (0, 0);
    for round in 0..ROUNDS {
        for n in 0..EACH {
            fleet.submit(&format!("j{round}-{n}"), 1, 1).await;
        }
        let mut leases: Vec<Lease> = Vec::new();
        while leases.len() < EACH {
            let known: Vec<_> = leases.iter().map(held).collect();
            let new = leased(&line, &known).await;
            leases.extend(new.into_iter().map(|leased| leased.lease));
        }
        let races: Vec<_> = leases
            .into_iter()
            .enumerate()
            .map(|(order, lease)| {
                let (line, socket) = (line.clone(), fleet.socket.clone());
                tokio::spawn(async move {
                    let path = format!("/v1/jobs/{}", lease.attempt.job);
                    let cancel = send(&socket, "DELETE", &path, &[], b"");
                    let finish = line.finish(&lease);
                    // Which of them comes first differs; of each round two are sure, so that both ends are seen on any host.
                    let (cancel, finish) = match order {
                        0 => (cancel.await, finish.await),
                        1 => {
                            let finish = finish.await;
                            (cancel.await, finish)
                        }
                        _ if order % 2 == 0 => tokio::join!(cancel, finish),
                        _ => {
                            let later = Duration::from_millis(order as u64 % 16);
                            let cancel = async {
                                tokio::time::sleep(later).await;
                                cancel.await
                            };
                            let (finish, cancel) = tokio::join!(finish, cancel);
                            (cancel, finish)
                        }
                    };
                    assert_eq!(finish.expect("taken"), "finished");
                    (lease, cancel.expect("answers").status)
                })
            })
            .collect();
        for race in races {
            let (lease, status) = race.await.expect("ends");
            let job = &lease.attempt.job;
            let JobState::Finished { outcome } = fleet.state(job).await else {
                panic!("{job} is not over");
            };
            let stopped = matches!(
                outcome.verdict,
                Verdict::Failed {
                    class: FailureClass::Cancelled,
                    ..
                }
            );
            // 409: it had passed already. Anything else: it is cancelled, or about to be.
            assert_eq!(stopped, status != 409, "{job}: {status}, {outcome:?}");
            passed += usize::from(!stopped);
            cancelled += usize::from(stopped);
            let events = fleet.db().events_after(job, 0, 100).await.expect("reads");
            let ends = events.iter().filter(|event| event.kind == "finished");
            assert_eq!(ends.count(), 1, "{job}");
        }
    }
    println!("cancel against finish: {passed} passed, {cancelled} cancelled, over twice 0");
    assert_eq!(passed + cancelled, ROUNDS * EACH);
    assert!(passed > 0 && cancelled > 0, "no race at all");
    fleet.stop().await;
}

/// Everything below the folder of uploads.
pub(crate) fn uploads(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.join("controller/sources")];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).into_iter().flatten().flatten() {
            match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                true => folders.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_is_cut_leaves_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let mut source = archive();
    source.resize(300_000, 0);
    let body = multipart(&[("request", br#"{"name": "app"}"#), ("source", &source)]);
    for cut in [150, 1_000, 70_000, 200_000] {
        let mut line = tokio::net::UnixStream::connect(&fleet.socket)
            .await
            .expect("connects");
        let head = format!(
            "POST /v1/builds HTTP/1.1\r\nhost: localhost\r\ncontent-type: {FORM}\r\nidempotency-key: cut\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        line.write_all(head.as_bytes()).await.expect("writes");
        line.write_all(&body[..cut]).await.expect("writes");
        if cut >= 70_000 {
            let what = "the upload lies on disk while it comes";
            wait_until(what, PATIENCE, || !uploads(folder.path()).is_empty()).await;
        }
        drop(line);
        let what = "a cut upload is removed";
        wait_until(what, PATIENCE, || uploads(folder.path()).is_empty()).await;
    }
    let all = kiln_db::JobFilter::default();
    let jobs = fleet.db().jobs(&all, None, 10).await.expect("lists");
    assert!(jobs.items.is_empty(), "no job came of it");
    // The key is free: the whole upload, four times at once, is one job and one source.
    let body = multipart(&[("request", br#"{"name": "app"}"#), ("source", &archive())]);
    let body = Arc::new(body);
    let whole: Vec<_> = (0..4)
        .map(|_| {
            let (socket, body) = (fleet.socket.clone(), Arc::clone(&body));
            tokio::spawn(async move {
                let headers = [("content-type", FORM), ("idempotency-key", "cut")];
                send(&socket, "POST", "/v1/builds", &headers, &body).await
            })
        })
        .collect();
    let mut got: Vec<Got> = Vec::new();
    for one in whole {
        got.push(one.await.expect("ends").expect("answers"));
    }
    let mut made: Vec<_> = got.iter().map(|got| got.status).collect();
    made.sort_unstable();
    assert_eq!(made, [200, 200, 200, 202]);
    let first = got[0].value()["id"].clone();
    assert!(got.iter().all(|one| one.value()["id"] == first), "one job");
    assert_eq!(uploads(folder.path()).len(), 1);
    fleet.stop().await;
}
