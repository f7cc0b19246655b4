//! What is kept of a machine's network when its worker tells the end: all parts, whatever their guest did, and the counts of the metrics.

use kiln_core::{AttemptId, JobId, Lease, Outcome, Verdict};
use kiln_db::{Event, HandedIn, OpenOptions};
use kiln_proto::fleet::{EGRESS_PARTS_MAX, EVENT_DATA_MAX, Finish, MachineRecord};
use serde_json::{Value, json};

use crate::fleet_line::{ANSWER, Line};
use crate::fleet_server::Fleet;

/// A fleet of one worker, and its lease of one job.
async fn leased(folder: &std::path::Path) -> (Fleet, Line, Lease) {
    let fleet = Fleet::start(folder, OpenOptions::default()).await;
    let line = Line::new(&fleet.socket, "w1");
    line.join(1).await.expect("joins");
    fleet.submit("j1", 1, 1).await;
    let lease = line
        .poll(Vec::new())
        .await
        .expect("answers")
        .remove(0)
        .lease;
    (fleet, line, lease)
}

async fn finish(line: &Line, lease: &Lease, details: Value, egress: Vec<Value>) {
    let finish = Finish {
        outcome: Outcome {
            verdict: Verdict::Passed,
            phases_ms: Vec::new(),
        },
        receipt: None,
        observed: None,
        runtime: None,
        details,
        egress,
    };
    let path = format!("/worker/v1/jobs/{}/finish", lease.attempt.job);
    let told = line
        .call::<Value>(&path, Some(lease), &finish, ANSWER)
        .await;
    told.expect("taken");
}

/// The record of a job: kinds and data of its events, from the first part on.
async fn record(fleet: &Fleet, job: &JobId) -> Vec<Event> {
    let events = fleet.db().events_after(job, 0, 1_000).await.expect("reads");
    let record = |event: &Event| matches!(event.kind.as_str(), "egress" | "report");
    events.into_iter().filter(record).collect()
}

fn measured() -> Value {
    json!({"egress": {
        "reached": 3, "refused": 9, "connections": 5, "bytes_out": 700, "bytes_in": 9_000,
        "decisions": {"allowed": 5, "narrowed": 2, "host": 3, "port": 1, "address": 1, "name": 4, "git": 6, "unreachable": 7},
    }})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_part_is_kept_before_the_report_and_decisions_are_counted_once() {
    let folder = tempfile::tempdir().expect("folder");
    let (fleet, line, lease) = leased(folder.path()).await;
    let part = |at: usize| json!({"reached": [{"host": format!("n{at}.example.org")}]});
    let parts: Vec<Value> = (0..30).map(part).collect();
    let details = json!({"measured": measured()});
    finish(&line, &lease, details.clone(), parts.clone()).await;
    // The answer was lost: it is said again.
    finish(&line, &lease, details, parts.clone()).await;
    let events = record(&fleet, &lease.attempt.job).await;
    let (report, told) = events.split_last().expect("events");
    assert_eq!(
        (report.kind.as_str(), &report.data["egress_parts"]),
        ("report", &json!(30))
    );
    assert!(told.iter().map(|event| &event.data).eq(&parts), "in order");
    assert!(report.data.get("left_out").is_none(), "{}", report.data);
    let shown = fleet.running.controller.metrics.render();
    for line in [
        "kiln_egress_decisions_total{verdict=\"allowed\",reason=\"rule\"} 3",
        "kiln_egress_decisions_total{verdict=\"allowed\",reason=\"narrowed\"} 2",
        "kiln_egress_decisions_total{verdict=\"refused\",reason=\"host\"} 3",
        "kiln_egress_decisions_total{verdict=\"refused\",reason=\"port\"} 1",
        "kiln_egress_decisions_total{verdict=\"refused\",reason=\"address\"} 1",
        "kiln_egress_decisions_total{verdict=\"refused\",reason=\"name\"} 4",
        "kiln_egress_decisions_total{verdict=\"refused\",reason=\"git\"} 6",
        "kiln_egress_decisions_total{verdict=\"failed\",reason=\"unreachable\"} 7",
        "kiln_egress_bytes_total{direction=\"out\"} 700",
        "kiln_egress_bytes_total{direction=\"in\"} 9000",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line}\n{shown}");
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_does_not_fit_is_cut_and_says_so_and_what_was_measured_stays() {
    let folder = tempfile::tempdir().expect("folder");
    let (fleet, line, lease) = leased(folder.path()).await;
    let big = json!({"refused": ["x".repeat(EVENT_DATA_MAX)]});
    let small = json!({"refused": []});
    let mut parts = vec![big.clone()];
    parts.extend(std::iter::repeat_n(small, EGRESS_PARTS_MAX + 3));
    let details = json!({"measured": measured(), "egress": big});
    finish(&line, &lease, details, parts).await;
    let events = record(&fleet, &lease.attempt.job).await;
    let (report, told) = events.split_last().expect("events");
    assert_eq!(report.data["measured"], measured());
    assert_eq!(report.data["left_out"]["egress_parts"], 5);
    assert!(report.data["left_out"]["report_bytes"].as_u64() > Some(EVENT_DATA_MAX as u64));
    assert_eq!(told.len(), EGRESS_PARTS_MAX - 1);
    let shown = fleet.running.controller.metrics.render();
    assert!(
        shown.contains("kiln_egress_bytes_total{direction=\"in\"} 9000"),
        "{shown}"
    );
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_machine_that_stayed_reached_is_told_once_when_its_job_is_over() {
    let folder = tempfile::tempdir().expect("folder");
    let (fleet, line, lease) = leased(folder.path()).await;
    let (attempt, part) = (lease.attempt.clone(), json!({"refused": []}));
    let told = MachineRecord {
        attempt: attempt.clone(),
        report: json!({"measured": measured(), "over": true}),
        egress: vec![part.clone(), part],
    };
    let path = "/worker/v1/machines/record";
    let hand_in = || line.call::<Value>(path, None, &told, ANSWER);
    assert!(hand_in().await.is_err(), "the job is not over");
    finish(&line, &lease, json!({}), Vec::new()).await;
    let last = || async {
        let mark = fleet.db().event_mark(&attempt.job).await.expect("reads");
        mark.expect("a job").last
    };
    let before = last().await;
    for _ in 0..2 {
        hand_in().await.expect("taken, or known");
    }
    assert_eq!(last().await, before + 3, "once");
    let events = fleet.db().events_after(&attempt.job, before, 10).await;
    let events = events.expect("reads");
    let kinds: Vec<_> = events.iter().map(|event| event.kind.as_str()).collect();
    assert_eq!(kinds, ["egress", "egress", "machine_report"]);
    assert_eq!(events[2].data["attempt"], 1);
    let shown = fleet.running.controller.metrics.render();
    let counted = "kiln_egress_decisions_total{verdict=\"refused\",reason=\"git\"} 6";
    assert!(shown.lines().any(|line| line == counted), "{shown}");
    // Another worker's word about it is none, nor one about what never ran.
    let other = "w2".parse().expect("an id");
    let db = fleet.db();
    let handed = db.hand_in(&attempt, Some(&other), Vec::new()).await;
    assert_eq!(handed.expect("answers"), HandedIn::Unknown);
    let never = AttemptId {
        number: 7,
        ..attempt.clone()
    };
    let handed = db.hand_in(&never, None, Vec::new()).await;
    assert_eq!(handed.expect("answers"), HandedIn::Unknown);
    fleet.stop().await;
}
