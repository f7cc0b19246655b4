//! One policy, the same questions of a machine that is held to it and the same verdicts: on a simulated machine through a controller, and on a real one.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use http::StatusCode;
use kiln_machine::driver::BoxFuture;
use kiln_machine::sim::{ExecCall, ExecEnd};
use serde_json::{Value, json};

use crate::fleet_sim::{self, PATIENCE};
use crate::kept_server::Fleet;
use crate::support::{app, kiln, said};

/// Two phases that reach other places. `ASK` stands for whatever asks, and gets `HOST:PORT`.
/// `.invalid` (RFC 6761) exists nowhere: what is allowed ends as unreachable on every host.
const POLICY: &str = r#"
version: 1
phases:
  dependencies:
    network: {allow: ["deps.kiln.invalid:5432"]}
    commands: [[ASK, "deps.kiln.invalid:5432", "run.kiln.invalid:5432"]]
  run:
    network:
      allow: ["run.kiln.invalid:5432", "*.wild.kiln.invalid:5432"]
"#;

/// What the run's own command asks for.
const ASKED: [&str; 6] = [
    "run.kiln.invalid:5432",
    "run.kiln.invalid:5433",
    "other.kiln.invalid:5432",
    "a.wild.kiln.invalid:5432",
    "wild.kiln.invalid:5432",
    "deps.kiln.invalid:5432",
];

/// Phase, name, port (0 where the name alone was asked for) and verdict of every decision.
const VERDICTS: [(&str, &str, u64, &str); 8] = [
    ("dependencies", "deps.kiln.invalid", 5432, "unreachable"),
    ("dependencies", "run.kiln.invalid", 0, "host"),
    ("run", "a.wild.kiln.invalid", 5432, "unreachable"),
    ("run", "deps.kiln.invalid", 0, "host"),
    ("run", "other.kiln.invalid", 0, "host"),
    ("run", "run.kiln.invalid", 5432, "unreachable"),
    ("run", "run.kiln.invalid", 5433, "port"),
    // The apex is not below the wildcard.
    ("run", "wild.kiln.invalid", 0, "host"),
];

/// Asks for each of its arguments, on a simulated machine.
pub(crate) fn ask(call: &mut ExecCall) -> BoxFuture<'_, ExecEnd> {
    let asked = call.request.argv[1..].to_vec();
    let guest = call.guest().clone();
    Box::pin(async move {
        for place in asked {
            let (host, port) = place.split_once(':').expect("a port");
            if guest.resolve(host).await.expect("an answer") {
                let port = port.parse().expect("a port");
                let _refused = guest.connect(host, port).await;
            }
        }
        ExecEnd::Code(0)
    })
}

/// The same for a shell of a real machine.
const ASK: &str = r#"for place in "$@"; do
  timeout 20 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "${place%:*}" "${place#*:}" 2>/dev/null
done; true"#;

fn policy(ask: &[&str]) -> String {
    let words: Vec<String> = ask.iter().map(|word| json!(word).to_string()).collect();
    POLICY.replace("ASK", &words.join(", "))
}

/// The verdicts in a record's flows.
fn verdicts(flows: &Value) -> BTreeSet<(String, String, u64, String)> {
    let text = |flow: &Value, key: &str| flow[key].as_str().unwrap_or_default().to_owned();
    let flows = flows.as_array().into_iter().flatten();
    flows
        .map(|flow| {
            (
                text(flow, "phase"),
                text(flow, "host"),
                flow["port"].as_u64().unwrap_or(u64::MAX),
                text(flow, "verdict"),
            )
        })
        .collect()
}

fn expected() -> BTreeSet<(String, String, u64, String)> {
    let owned = |(phase, host, port, verdict): (&str, &str, u64, &str)| {
        (phase.to_owned(), host.to_owned(), port, verdict.to_owned())
    };
    VERDICTS.into_iter().map(owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_simulated_machine_is_held_to_it() {
    let fleet = Fleet::open().await;
    let argv = [&["ask"], &ASKED[..]].concat();
    let asked = json!({
        "argv": argv, "cpus": 1, "memory": "512M",
        "policy": { "file": "kiln.yaml", "text": policy(&["ask"]) },
    });
    let (status, job) = fleet.owner.post("/v1/runs", &asked).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{job}");
    let id = job["id"].as_str().expect("an id").to_owned();
    let deadline = Instant::now() + PATIENCE;
    let job = loop {
        let (_, job) = fleet.owner.get(&format!("/v1/jobs/{id}")).await;
        if job["state"] == "finished" {
            break job;
        }
        assert!(Instant::now() < deadline, "{job}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(job["outcome"]["verdict"], "passed", "{job}");
    let id = id.parse().expect("an id");
    let events = fleet.running.controller.db.events_after(&id, 0, 1000).await;
    let events = events.expect("reads");
    let flows: Vec<Value> = events
        .iter()
        .filter(|event| event.kind == "egress")
        .flat_map(|event| event.data["flows"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(verdicts(&json!(flows)), expected());
    what_deciding_took_is_measured(&fleet).await;
    fleet.close().await;
}

/// Wherever it was decided what holds of a job: the time it took is a part of what its worker reports.
async fn what_deciding_took_is_measured(fleet: &Fleet) {
    let hash = kiln_core::Digest::of(b"policy");
    let applied = json!({"file": hash, "hash": hash, "decided_us": 3_600_000_000_u64});
    let mut new = fleet_sim::job("j1");
    new.request.policy = Some(serde_json::from_value(applied).expect("a policy"));
    let id = new.request.id.clone();
    let db = &fleet.running.controller.db;
    db.submit(new).await.expect("submits");
    fleet_sim::all_over(&fleet.running, std::slice::from_ref(&id)).await;
    let events = db.events_after(&id, 0, 1000).await.expect("reads");
    let report = events.iter().rfind(|event| event.kind == "report");
    let measured = &report.expect("a report").data["measured"];
    let told = measured["policy_ms"].as_u64().expect("it was measured");
    // An hour, and what came on top of it, which was no minute.
    assert!((3_600_000..3_660_000).contains(&told), "{measured}");
}

#[test]
fn a_real_machine_is_held_to_it() {
    let Some(kiln) = kiln() else { return };
    let dir = app(&[("kiln.yaml", &policy(&["bash", "-c", ASK, "ask"]))]);
    let script = [&["run", "--", "bash", "-c", ASK, "ask"], &ASKED[..]].concat();
    let mut command = kiln.command(&script);
    command.current_dir(dir.path());
    said(command).exits(0);
    let mut command = kiln.command(&["--json", "job", "egress"]);
    command.current_dir(dir.path());
    let told = said(command).exits(0);
    let lines = told.out.lines();
    let events = lines.map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let flows: Vec<Value> = events
        .filter(|event| event["event"] == "decision")
        .map(|event| event["decision"].clone())
        .collect();
    assert_eq!(verdicts(&json!(flows)), expected());
}
