//! Jobs over HTTP: submitted once, followed to the end, cancelled, told of honestly.

use std::io::{Read, Write};
use std::sync::Arc;

use kiln_core::{FailureClass, Outcome, Verdict};
use serde_json::json;

use crate::policies::Granting;
use crate::server::{Server, archive};

#[test]
fn a_build_is_streamed_in_and_queued_with_what_the_token_allows() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    let source = archive();
    let ask = json!({
        "name": "app", "cpus": 1, "memory": "512M", "timeout_seconds": 60, "build_args": {"A": "b"},
        "images": ["app:v1"], "tags": ["nightly"], "labels": {"team": "a"}, "allow": ["a.example:443"],
        "runtime": "node", "concurrency_group": "deploy",
    });
    let got = acme.form(
        "/v1/builds",
        &[
            ("request", ask.to_string().as_bytes()),
            ("source", &source),
            ("secret.npm", b"s3cret"),
        ],
    );
    assert_eq!(got.status, 202, "{}", got.text());
    let job = got.value();
    let digest = kiln_core::Digest::of(&source).to_string();
    assert_eq!(
        job["source"]["digest"],
        digest.as_str(),
        "computed as it arrived"
    );
    assert_eq!(job["source"]["size"], source.len());
    assert_eq!(
        (&job["state"], &job["tenant"]),
        (&json!("queued"), &json!("acme"))
    );
    assert_eq!(
        job["trust"], "untrusted",
        "uploads are untrusted on a server"
    );
    assert_eq!(job["limits"]["cpus"], 1);
    assert_eq!(job["pending"]["reason"], "new");
    assert!(!got.text().contains("s3cret"));
    let id: kiln_core::JobId = job["id"].as_str().expect("id").parse().expect("id");
    let held = server
        .parts
        .secrets
        .lock()
        .expect("lock")
        .get(&id)
        .cloned()
        .expect("held");
    assert_eq!(held["npm"], b"s3cret");
    let listed = acme
        .get("/v1/jobs?tag=nightly&label=team=a&state=queued")
        .value();
    assert_eq!(listed["items"][0]["id"], job["id"]);
    assert_eq!(acme.get("/v1/jobs?tag=other").value()["items"], json!([]));
    let git = json!({"git_url": "https://git.example/a.git", "git_ref": "main"});
    let got = acme.json("POST", "/v1/builds", &git);
    assert_eq!(got.status, 202, "{}", got.text());
    assert_eq!(got.value()["source"]["from"], "git");
}

#[test]
fn one_key_is_one_job_also_when_it_comes_twice_at_once() {
    let server = Arc::new(Server::start());
    let acme = server.member("acme", "developer");
    let headers = [
        ("content-type", "application/json"),
        ("idempotency-key", "once"),
    ];
    let body = br#"{"argv": ["true"]}"#;
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let acme = acme.clone();
            std::thread::spawn(move || acme.send("POST", "/v1/runs", &headers, body))
        })
        .collect();
    let got: Vec<_> = threads
        .into_iter()
        .map(|t| t.join().expect("thread"))
        .collect();
    let first = got[0].value()["id"].clone();
    assert!(got.iter().all(|one| one.value()["id"] == first), "one job");
    assert_eq!(
        got.iter().filter(|one| one.status == 202).count(),
        1,
        "made once"
    );
    assert_eq!(
        got.iter().filter(|one| one.status == 200).count(),
        7,
        "found by the others"
    );
    let other = acme.send("POST", "/v1/runs", &headers, br#"{"argv": ["false"]}"#);
    assert_eq!(
        (other.status, other.code().as_str()),
        (422, "idempotency_conflict")
    );
    for key in ["", "a b", &"k".repeat(129)] {
        let headers = [
            ("content-type", "application/json"),
            ("idempotency-key", key),
        ];
        assert_eq!(
            acme.send("POST", "/v1/runs", &headers, body).status,
            422,
            "{key:?}"
        );
    }
}

#[test]
fn a_retry_without_its_source_is_refused_before_a_host_tries() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    let made = acme.form("/v1/builds", &[("source", &archive())]).value();
    let id = made["id"].as_str().expect("id").to_owned();
    let retry = || acme.send("POST", &format!("/v1/jobs/{id}/retry"), &[], b"");
    assert_eq!(retry().code(), "unfinished");
    let lease = server.lease(&id);
    server.finish(&lease, Server::passed());
    let again = retry();
    assert_eq!(again.status, 202, "{}", again.text());
    server.lose_sources();
    let refused = retry();
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (409, "source_gone")
    );
    assert!(
        refused.value()["hint"]
            .as_str()
            .is_some_and(|hint| hint.contains("source"))
    );
    let jobs = acme.get("/v1/jobs").value();
    assert_eq!(jobs["items"].as_array().map(Vec::len), Some(2));
}

#[test]
fn a_cancel_is_final_and_idempotent_and_too_late_is_said() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    let path = |id: &str| format!("/v1/jobs/{id}");
    let waiting = acme.run();
    assert_eq!(acme.delete(&path(&waiting)).status, 200);
    assert_eq!(acme.delete(&path(&waiting)).status, 200, "again");
    let job = acme.get(&path(&waiting)).value();
    assert_eq!(
        (&job["state"], &job["outcome"]["class"]),
        (&json!("finished"), &json!("cancelled"))
    );
    let running = acme.run();
    let lease = server.lease(&running);
    assert_eq!(acme.delete(&path(&running)).status, 202);
    assert_eq!(acme.delete(&path(&running)).status, 202, "again");
    let done = acme.run();
    let lease_done = server.lease(&done);
    server.finish(&lease_done, Server::passed());
    let late = acme.delete(&path(&done));
    assert_eq!((late.status, late.code().as_str()), (409, "finished"));
    assert_eq!(
        acme.delete(&format!("/builds/{done}")).status,
        404,
        "a run is no build"
    );
    let again = acme.json("POST", &format!("{}/retry", path(&done)), &json!({}));
    assert_eq!(again.status, 202, "{}", again.text());
    assert_ne!(again.value()["id"], json!(done));
    assert_eq!(
        acme.json("POST", &format!("{}/retry", path(&running)), &json!({}))
            .status,
        409
    );
    let cancelled = Outcome {
        verdict: Verdict::Failed {
            class: FailureClass::Cancelled,
            message: "stopped".to_owned(),
            hint: None,
            command_code: None,
            reason: None,
        },
        phases_ms: Vec::new(),
    };
    server.finish(&lease, cancelled);
}

/// Values of a field of server-sent events.
fn fields(text: &str, name: &str) -> Vec<String> {
    let prefix = format!("{name}: ");
    text.lines()
        .filter_map(|line| line.strip_prefix(&prefix))
        .map(str::to_owned)
        .collect()
}

#[test]
fn followers_see_every_event_in_order_and_resume_where_they_were_cut() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    let job = acme.run();
    let path = format!("/v1/jobs/{job}/events");
    let follower = {
        let (acme, path) = (acme.clone(), path.clone());
        std::thread::spawn(move || acme.get(&path))
    };
    let lease = server.lease(&job);
    server.finish(&lease, Server::passed());
    let got = follower.join().expect("thread");
    assert_eq!(got.headers["content-type"], "text/event-stream");
    let (kinds, ids) = (fields(&got.text(), "event"), fields(&got.text(), "id"));
    assert_eq!(
        kinds.first().map(String::as_str),
        Some("queued"),
        "{kinds:?}"
    );
    assert_eq!(kinds.last().map(String::as_str), Some("end"), "{kinds:?}");
    assert!(kinds.contains(&"leased".to_owned()) && kinds.contains(&"finished".to_owned()));
    let numbers: Vec<u64> = ids.iter().map(|id| id.parse().expect("number")).collect();
    assert_eq!(
        numbers,
        (1..=numbers.len() as u64).collect::<Vec<_>>(),
        "no gap"
    );
    let rest = acme.send("GET", &path, &[("last-event-id", "1")], b"");
    assert_eq!(fields(&rest.text(), "id"), ids[1..], "resumed");
    let all = acme.send("GET", &path, &[("last-event-id", "999")], b"");
    assert_eq!(
        fields(&all.text(), "event"),
        ["end"],
        "never hangs on a job that is over"
    );
    for bad in ["-1", "x", "99999999999999999999", "+1"] {
        let got = acme.send("GET", &path, &[("last-event-id", bad)], b"");
        assert_eq!(got.status, 400, "{bad}");
    }
}

#[test]
fn a_follower_is_kept_awake_and_dropped_when_its_token_is_revoked() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    let job = acme.run();
    let mut line = acme.line();
    let head = acme.head("GET", &format!("/v1/jobs/{job}/events"), &[]);
    line.write_all(format!("{head}\r\n").as_bytes())
        .expect("writes");
    let mut seen = String::new();
    let mut piece = [0; 4096];
    while !seen.contains("\n: \n") {
        let got = line.read(&mut piece).expect("reads");
        assert!(got > 0, "closed early: {seen}");
        seen += &String::from_utf8_lossy(&piece[..got]);
    }
    let tokens = server.owner().get("/v1/tokens").value();
    let id = tokens["items"][0]["id"].as_str().expect("id").to_owned();
    assert_eq!(
        server.owner().delete(&format!("/v1/tokens/{id}")).status,
        204
    );
    line.read_to_string(&mut seen).expect("reads to the end");
    assert!(seen.contains("event: unauthenticated"), "{seen}");
}

#[test]
fn a_tenant_follows_no_more_than_it_may_and_leaves_room_when_it_goes() {
    let server = Server::with(
        |c| c.followers_per_tenant = 1,
        kiln_controller::api::ListenConfig::default(),
    );
    let (acme, rival) = (
        server.member("acme", "developer"),
        server.member("rival", "developer"),
    );
    let (job, other) = (acme.run(), rival.run());
    let open = |client: &crate::server::Client, job: &str| {
        let mut line = client.line();
        let head = client.head("GET", &format!("/v1/jobs/{job}/events"), &[]);
        line.write_all(format!("{head}\r\n").as_bytes())
            .expect("writes");
        let mut piece = [0; 4096];
        let got = line.read(&mut piece).expect("reads");
        (line, String::from_utf8_lossy(&piece[..got]).into_owned())
    };
    let (first, head) = open(&acme, &job);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let (_, head) = open(&acme, &job);
    assert!(head.starts_with("HTTP/1.1 429"), "{head}");
    let (_rival, head) = open(&rival, &other);
    assert!(
        head.starts_with("HTTP/1.1 200"),
        "another tenant has its own: {head}"
    );
    drop(first);
    let end = std::time::Instant::now() + crate::server::PATIENCE;
    while open(&acme, &job).1.starts_with("HTTP/1.1 429") {
        assert!(std::time::Instant::now() < end, "the slot never came back");
    }
}

#[test]
fn logs_are_read_from_any_offset_and_followed_to_the_end() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    let job = acme.run();
    let lease = server.lease(&job);
    server.log(&job, b"one\n");
    let path = format!("/v1/jobs/{job}/logs");
    let got = acme.get(&path);
    assert_eq!(
        (got.text().as_str(), got.headers["kiln-log-size"].as_str()),
        ("one\n", "4")
    );
    assert_eq!(got.headers["x-content-type-options"], "nosniff");
    let follower = {
        let (acme, path) = (acme.clone(), format!("{path}?follow=true&offset=2"));
        std::thread::spawn(move || acme.get(&path))
    };
    server.log(&job, b"two\n");
    server.finish(&lease, Server::passed());
    assert_eq!(follower.join().expect("thread").text(), "e\ntwo\n");
    assert_eq!(acme.get(&format!("{path}?offset=100")).text(), "");
    for bad in [
        "offset=-1",
        "offset=x",
        "offset=18446744073709551616",
        "nosuch=1",
    ] {
        assert_eq!(acme.get(&format!("{path}?{bad}")).status, 400, "{bad}");
    }
}

#[test]
fn hypemans_clients_find_their_routes() {
    let here = Granting::start();
    here.grant("[tenant.acme]\ntrusted_uploads = true\n");
    let server = &here.server;
    let keeper = server.member("acme", "admin");
    let acme = server.token(&json!({"tenant": "acme", "role": "developer", "trusted": true}));
    let kept = keeper.json("PUT", "/v1/secrets/npm", &json!({"value": "s3cret"}));
    assert_eq!(kept.status, 201, "{}", kept.text());
    let made = acme.form(
        "/builds",
        &[
            ("source", &archive()),
            ("cache_scope", b"acme"),
            ("timeout_seconds", b"90"),
            ("secrets", br#"[{"id": "npm", "env_var": "NPM"}]"#),
        ],
    );
    assert_eq!(made.status, 202, "{}", made.text());
    let made = made.value();
    assert_eq!(made["status"], "queued");
    let id = made["id"].as_str().expect("id").to_owned();
    assert_eq!(acme.get("/builds").value()[0]["id"], made["id"]);
    let lease = server.lease(&id);
    assert_eq!(
        acme.get(&format!("/builds/{id}")).value()["status"],
        "building"
    );
    let follower = {
        let (acme, path) = (acme.clone(), format!("/builds/{id}/events?follow=true"));
        std::thread::spawn(move || acme.get(&path))
    };
    server.log(&id, b"step 1\n");
    server.finish(&lease, Server::passed());
    let text = follower.join().expect("thread").text();
    let events: Vec<serde_json::Value> = fields(&text, "data")
        .iter()
        .map(|data| serde_json::from_str(data).expect("JSON"))
        .collect();
    assert!(
        events
            .iter()
            .any(|e| e["type"] == "log" && e["content"] == "step 1\n"),
        "{text}"
    );
    let last = events.last().expect("events");
    assert_eq!(
        (&last["type"], &last["status"]),
        (&json!("status"), &json!("ready")),
        "{text}"
    );
    let late = acme.delete(&format!("/builds/{id}"));
    assert_eq!((late.status, late.code().as_str()), (409, "conflict"));
    let refused = [
        ("cache_scope", &b"rival"[..], 403),
        ("timeout_seconds", b"soon", 422),
        ("timeout_seconds", b"999999999", 422),
        ("secrets", b"{", 422),
        ("dockerfile", b"\xff", 422),
        ("base_image_digest", b"sha256:00", 422),
        ("nosuch", b"", 422),
    ];
    for (name, value, status) in refused {
        let got = acme.form("/builds", &[(name, value), ("source", &archive())]);
        assert_eq!(got.status, status, "{name}: {}", got.text());
        assert!(got.value()["message"].is_string(), "hypeman's shape");
    }
    assert_eq!(
        acme.form("/builds", &[("cache_scope", b"acme")]).status,
        422,
        "no source"
    );
}
