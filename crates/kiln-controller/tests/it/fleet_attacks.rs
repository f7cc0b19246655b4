//! Attacks on a whole controller that one tenant, one worker or somebody without any proof could try on all the others.

use std::net::SocketAddr;

use kiln_core::JobKind;
use kiln_db::OpenOptions;
use kiln_proto::fleet::{
    BODY_MAX, GENERATION, GENERATION_HEADER, HeldLease, LEASE_HEADER, LeaseHeader, Poll,
    PollAnswer, WORKER_HEADER,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fleet_server::{Fleet, script};
use crate::fleet_worker::{Line, facts, send};
use crate::server::{Got, parse};

async fn stranger(to: SocketAddr, method: &str, path: &str, body: &str) -> Got {
    let mut line = TcpStream::connect(to).await.expect("connects");
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nkiln-generation: {GENERATION}\r\n\
         authorization: Bearer x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    line.write_all(request.as_bytes()).await.expect("writes");
    let mut answer = Vec::new();
    line.read_to_end(&mut answer).await.expect("reads");
    parse(&answer)
}

/// Rows of the audit trail by who they are about.
async fn rows(fleet: &Fleet, actor: &str, action: &str) -> usize {
    let (mut after, mut count) = (0, 0);
    loop {
        let rows = fleet.db().audit_rows(None, after, 500).await;
        let rows = rows.expect("reads");
        let Some(last) = rows.last() else {
            return count;
        };
        after = last.seq;
        let about = |row: &&kiln_db::AuditRow| {
            row.entry.actor.starts_with(actor) && row.entry.action == action
        };
        count += rows.iter().filter(about).count();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_noted_at_every_door_and_do_not_fill_the_database() {
    const EACH: usize = 160;
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let to = fleet.running.addresses[0];
    for (method, path, body, action) in [
        (
            "GET",
            "/peer/v1/logs/local/b1/1?offset=0&max=1&wait_ms=0",
            "",
            "peer",
        ),
        ("GET", "/v2/t/local/app/tags/list", "", "registry"),
        ("POST", "/worker/v1/release", "{}", "worker"),
    ] {
        let began = std::time::Instant::now();
        for _ in 0..EACH {
            let got = stranger(to, method, path, body).await;
            assert!(
                matches!(got.status, 401 | 403 | 429),
                "{path}: {}",
                got.status
            );
        }
        let noted = rows(&fleet, "stranger", action).await;
        let seconds = usize::try_from(began.elapsed().as_secs()).expect("few");
        let most = 101 + 5 * (seconds + 1);
        assert!((1..=most).contains(&noted), "{path}: {noted} of {EACH}");
    }
    fleet.stop().await;
}

/// What is asked of a controller by a tenant is what its workers read: however much that is, they can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_requests_reach_their_worker_in_as_many_answers_as_it_takes() {
    const JOBS: usize = 7;
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let line = Line::new(&fleet.socket, "w1");
    line.join(8).await.expect("joins");
    for number in 0..JOBS {
        let mut new = script(&format!("j{number}"), 1, 1);
        if let JobKind::Run(run) = &mut new.request.kind {
            run.env.insert("LARGE".to_owned(), "a".repeat(900_000));
        }
        fleet.db().submit(new).await.expect("submitted");
    }
    let mut held: Vec<HeldLease> = Vec::new();
    let mut answers = 0;
    while held.len() < JOBS {
        let poll = Poll { held: held.clone() };
        let body = serde_json::to_vec(&poll).expect("serialises");
        let got = line.raw("POST", "/worker/v1/poll", None, &body).await;
        let got = got.expect("answers");
        assert_eq!(got.status, 200, "{}", got.text());
        assert!(
            got.body.len() <= BODY_MAX,
            "no worker reads {}",
            got.body.len()
        );
        let answer: PollAnswer = serde_json::from_slice(&got.body).expect("an answer");
        held.extend(answer.leases.into_iter().map(|leased| HeldLease {
            attempt: leased.lease.attempt,
            epoch: leased.lease.epoch,
        }));
        answers += 1;
        assert!(answers <= 3 * JOBS, "they do not come");
    }
    let told = line.beat(held.clone(), 8).await.expect("answers");
    assert_eq!(told.leases.len(), JOBS);
    // And what a worker says of itself is read at every plan.
    let mut boasts = facts(8);
    boasts.version = "x".repeat(1 << 20);
    let beat = serde_json::json!({ "facts": boasts, "held": [] }).to_string();
    let got = line.raw("POST", "/worker/v1/heartbeat", None, beat.as_bytes());
    assert_eq!(got.await.expect("answers").status, 400);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_joined_is_in_the_audit_trail() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let to = fleet.running.addresses[0];
    let headers = [("content-type", "application/json")];
    let made = send(&fleet.socket, "POST", "/v1/tokens/join", &headers, b"{}").await;
    let token = made.expect("answers").value()["token"].clone();
    let key = rcgen::KeyPair::generate().expect("key");
    let csr = rcgen::CertificateParams::default()
        .serialize_request(&key)
        .and_then(|csr| csr.pem())
        .expect("csr");
    let join = |worker: &str| {
        serde_json::json!({ "worker": worker, "token": token, "csr": csr, "facts": facts(1) })
            .to_string()
    };
    // Raced: one of them is in, and there is one row of it.
    let (first, second) = (join("w1"), join("w2"));
    let (one, two) = tokio::join!(
        stranger(to, "POST", "/worker/v1/join", &first),
        stranger(to, "POST", "/worker/v1/join", &second),
    );
    let mut statuses = [one.status, two.status];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 403], "{} {}", one.text(), two.text());
    assert_eq!(rows(&fleet, "token:kjt-", "worker:join").await, 1);
    assert_eq!(rows(&fleet, "stranger", "worker:join").await, 1);
    fleet.stop().await;
}

/// Every door at which a worker says its generation; `JOB` is a job that it holds. (`own-asked` and `give-way` are the home's own user's.)
const DOORS: [(&str, &str); 16] = [
    ("POST", "join"),
    ("POST", "release"),
    ("POST", "heartbeat"),
    ("POST", "poll"),
    ("POST", "own"),
    ("GET", "jobs/JOB/source"),
    ("POST", "jobs/JOB/secrets"),
    ("POST", "jobs/JOB/event"),
    ("POST", "jobs/JOB/log?from=0"),
    ("POST", "jobs/JOB/registry-token"),
    ("POST", "jobs/JOB/image"),
    ("POST", "jobs/JOB/finish"),
    ("POST", "jobs/JOB/keep"),
    ("POST", "machines/gone"),
    ("POST", "machines/calls"),
    ("PUT", "jobs/JOB/artifacts/report"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_lies_about_its_generation_gets_through_no_door_and_changes_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let line = Line::new(&fleet.socket, "w1");
    line.join(2).await.expect("joins");
    let job = fleet.submit("held", 1, 1).await;
    let leased = line.poll(Vec::new()).await.expect("answers");
    let [leased] = leased.as_slice() else {
        panic!("one lease: {leased:?}")
    };
    let held = LeaseHeader::of(&leased.lease).to_string();
    let (later, long) = ((GENERATION + 1).to_string(), "2".repeat(5000));
    let none = [
        "",
        "0",
        "-1",
        "1.0",
        "2,1",
        "2;q=1",
        "0x2",
        "two",
        "\u{662}",
        "4294967298",
        "18446744073709551618",
        &later,
        &long,
    ];
    for (method, path) in DOORS {
        let path = format!("/worker/v1/{}", path.replace("JOB", job.as_str()));
        // One is not even said.
        for said in none.into_iter().map(Some).chain([None]) {
            let mut headers = vec![
                (WORKER_HEADER, "w1"),
                (LEASE_HEADER, held.as_str()),
                ("content-type", "application/json"),
            ];
            headers.extend(said.map(|said| (GENERATION_HEADER, said)));
            let got = send(&fleet.socket, method, &path, &headers, b"{}").await;
            let got = got.expect("answers");
            let shown = said.map(|said| &said[..said.len().min(20)]);
            let refused = matches!(
                (got.status, got.code().as_str()),
                (400, "bad_request") | (426, "generation")
            );
            assert!(refused, "{path}, {shown:?}: {} {}", got.status, got.text());
            assert!(
                got.body.len() < 1000,
                "what was said is not said back: {}",
                got.text()
            );
        }
    }
    // What it says in a body counts nowhere: its next heartbeat is of the generation that the request speaks.
    let mut lie = facts(2);
    lie.generation = u32::MAX;
    let held = serde_json::json!({ "attempt": leased.lease.attempt, "epoch": leased.lease.epoch });
    let beat = serde_json::json!({ "facts": lie, "held": [held] }).to_string();
    let got = line.raw("POST", "/worker/v1/heartbeat", None, beat.as_bytes());
    assert_eq!(got.await.expect("answers").status, 200);
    let id = "w1".parse().expect("a name");
    let known = fleet
        .db()
        .worker(&id)
        .await
        .expect("reads")
        .expect("is there");
    assert_eq!(
        (known.facts.generation, known.infra_failures),
        (GENERATION, 0)
    );
    let attempts = fleet.db().attempts(&job).await.expect("reads");
    assert_eq!(attempts.len(), 1, "{attempts:?}");
    assert_eq!(
        line.finish(&leased.lease).await.expect("answers"),
        "finished"
    );
    fleet.stop().await;
}
