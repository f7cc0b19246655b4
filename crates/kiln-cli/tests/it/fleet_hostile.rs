//! Uploads that no source may be, through the whole of intake and worker: each build fails for its user's reason, once, and the host that met
//! them is as good as before. A tenant must not be able to get hosts quarantined.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_core::dispatch::WorkerState;
use kiln_core::{FailureClass, JobId, JobState, Verdict};
use kiln_worker::fleet::client::Client;
use kiln_worker::fleet::http::Target;
use tokio_util::sync::CancellationToken;

use crate::fleet_sim::{
    self, ANSWER, LEASE, Ledgered, Pace, all_over, count, job, machines, work_near,
};

/// One entry of a tar archive (POSIX ustar): header and content, padded.
fn entry(name: &str, kind: u8, link: &str, content: &[u8]) -> Vec<u8> {
    let mut head = vec![0_u8; 512];
    let mut put =
        |at: usize, text: &str| head[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000644");
    put(124, &format!("{:011o}", content.len()));
    put(136, "00000000000");
    put(157, link);
    put(257, "ustar");
    put(263, "00");
    put(148, "        ");
    head[156] = kind;
    let sum: u32 = head.iter().map(|byte| u32::from(*byte)).sum();
    head[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    head.extend_from_slice(content);
    head.resize(head.len().next_multiple_of(512), 0);
    head
}

fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut all = entries.concat();
    all.resize(all.len() + 1024, 0);
    all
}

fn hostile() -> Vec<(&'static str, Vec<u8>)> {
    let file = |name: &str| entry(name, b'0', "", b"x");
    let whole = archive(&[file("Dockerfile"), entry("big", b'0', "", &[b'y'; 4096])]);
    let mut wrong_sum = archive(&[file("Dockerfile")]);
    wrong_sum[150] ^= 1;
    vec![
        ("a name that climbs", archive(&[file("../escape")])),
        (
            "a name that climbs later",
            archive(&[file("a/../../escape")]),
        ),
        ("an absolute name", archive(&[file("/escape")])),
        (
            "a link out, and a file through it",
            archive(&[entry("l", b'2', "/", b""), file("l/escape")]),
        ),
        (
            "a hard link out",
            archive(&[entry("l", b'1', "/etc/passwd", b"")]),
        ),
        ("a device", archive(&[entry("d", b'3', "", b"")])),
        ("a pipe", archive(&[entry("p", b'6', "", b"")])),
        (
            "a file, and one below it",
            archive(&[file("a"), file("a/b")]),
        ),
        (
            "a folder, and a file of its name",
            archive(&[file("a/b"), file("a")]),
        ),
        ("a file twice", archive(&[file("a"), file("a")])),
        ("a name of nothing", archive(&[file("")])),
        ("a name of dots", archive(&[file("a/./..")])),
        ("cut in the middle of a file", whole[..2048].to_vec()),
        ("a wrong sum", wrong_sum),
        ("no Dockerfile and no app", archive(&[file("readme")])),
        (
            "a Dockerfile that is none",
            archive(&[entry("Dockerfile", b'0', "", b"FROM \x1b[2J")]),
        ),
        (
            "gzip of nothing",
            vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0xff, 0xff],
        ),
        (
            "zstd of nothing",
            vec![0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff, 0xff],
        ),
    ]
}

async fn submit(client: &Client, archive: &[u8]) -> JobId {
    let mut body = b"--XX\r\ncontent-disposition: form-data; name=\"request\"\r\n\r\n".to_vec();
    body.extend_from_slice(br#"{"name": "app", "cpus": 1, "memory": "512M", "disk": "1G"}"#);
    body.extend_from_slice(b"\r\n--XX\r\ncontent-disposition: form-data; name=\"source\"\r\n\r\n");
    body.extend_from_slice(archive);
    body.extend_from_slice(b"\r\n--XX--\r\n");
    let kind = "multipart/form-data; boundary=XX";
    let sent = client.post::<serde_json::Value>("/v1/builds", None, body.into(), kind, ANSWER);
    let made = sent.await.expect("queued");
    made["id"].as_str().expect("id").parse().expect("id")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_uploads_are_their_users_failure_and_cost_no_host() {
    let (folder, home) = (
        tempfile::tempdir().expect("folder"),
        tempfile::tempdir().expect("folder"),
    );
    let running = fleet_sim::controller(folder.path(), Vec::new(), Vec::new(), LEASE).await;
    let ledger = Arc::new(Ledgered::default());
    let pace: Pace = Arc::new(Mutex::new(Duration::from_millis(50)));
    let target = Target::Socket(running.socket.clone());
    let shop = fleet_sim::workshop(home.path(), "w1", target.clone(), &ledger, &pace).await;
    let stop = CancellationToken::new();
    work_near(shop, "w1", 4, stop.clone()).await;
    let client = Client::new(target, "test".parse().expect("name"));
    let db = &running.controller.db;
    let mut jobs = Vec::new();
    for (what, archive) in hostile() {
        jobs.push((what, submit(&client, &archive).await));
    }
    let ids: Vec<JobId> = jobs.iter().map(|(_, id)| id.clone()).collect();
    all_over(&running, &ids).await;
    for (what, id) in &jobs {
        let job = db.job(id).await.expect("reads").expect("is there");
        let JobState::Finished { outcome } = &job.state else {
            panic!("{what} is not over");
        };
        let Verdict::Failed { class, message, .. } = &outcome.verdict else {
            panic!("{what} passed");
        };
        assert_eq!(*class, FailureClass::Usage, "{what}: {message}");
        assert!(
            !message.chars().any(char::is_control),
            "{what}: {message:?}"
        );
        let attempts = db.attempts(id).await.expect("reads").len();
        assert_eq!(attempts, 1, "{what} was tried again: {message}");
    }
    let worker = db
        .worker(&"w1".parse().expect("name"))
        .await
        .expect("reads")
        .expect("is there");
    assert_eq!(
        (worker.state, worker.infra_failures),
        (WorkerState::Active, 0)
    );
    for place in [
        folder.path(),
        home.path(),
        &home.path().join("cache/checkouts"),
    ] {
        assert!(
            !place.join("escape").exists(),
            "something escaped to {}",
            place.display()
        );
    }
    assert!(!std::path::Path::new("/escape").exists());
    // The host goes on as before.
    let good = db
        .submit(job("good"))
        .await
        .expect("submits")
        .job
        .request
        .id;
    all_over(&running, std::slice::from_ref(&good)).await;
    let [lost, twice, held] = count(&running, &[good]).await;
    stop.cancel();
    let left = machines(home.path()).len();
    println!(
        "{} hostile uploads, each failed once: jobs lost {lost}, finished twice {twice}, leases left {held}",
        jobs.len()
    );
    assert_eq!([lost, twice, held, left], [0; 4]);
    running.stop().await;
}
