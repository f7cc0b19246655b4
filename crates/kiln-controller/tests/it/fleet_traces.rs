//! Spans from a caller to its job, and what lies encrypted.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::sync::mpsc::Receiver;

use kiln_controller::server::start_with;
use kiln_db::OpenOptions;
use kiln_proto::fleet::LeaseHeader;
use serde_json::{Value, json};

use crate::fleet_server::{Fleet, PATIENCE, config};
use crate::fleet_worker::{Line, send};

/// A fake collector: takes everything, and gives the spans it got.
fn fake_collector() -> (u16, Receiver<Value>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    let port = listener.local_addr().expect("address").port();
    let (sender, spans) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for mut line in listener.incoming().flatten() {
            let mut reader = BufReader::new(line.try_clone().expect("clones"));
            let mut length = 0;
            loop {
                let mut text = String::new();
                if reader.read_line(&mut text).unwrap_or(0) == 0 || text == "\r\n" {
                    break;
                }
                let text = text.to_ascii_lowercase();
                if let Some(said) = text.strip_prefix("content-length: ") {
                    length = said.trim().parse().expect("a length");
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).expect("the body");
            let body: Value = serde_json::from_slice(&body).expect("JSON");
            let all = body["resourceSpans"][0]["scopeSpans"][0]["spans"].clone();
            for span in all.as_array().expect("spans") {
                let _nobody_reads = sender.send(span.clone());
            }
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
            let _gone = line.write_all(answer);
        }
    });
    (port, spans)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_is_a_span_below_its_caller() {
    let (port, spans) = fake_collector();
    let folder = tempfile::tempdir().expect("folder");
    let mut config = config(folder.path()).await;
    config.otlp = Some(format!("http://127.0.0.1:{port}"));
    let fleet = Fleet::of(
        start_with(config, OpenOptions::default())
            .await
            .expect("starts"),
    );
    let line = Line::new(&fleet.socket, "w1");
    line.join(1).await.expect("joins");
    let (trace, caller) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let parent = format!("00-{trace}-{caller}-01");
    let headers = [
        ("content-type", "application/json"),
        ("traceparent", &parent),
    ];
    let body = json!({"argv": ["true"], "artifacts": ["out"]}).to_string();
    let made = send(&fleet.socket, "POST", "/v1/runs", &headers, body.as_bytes()).await;
    let made = made.expect("answers");
    assert_eq!(made.status, 202, "{}", made.text());
    let leased = line.poll(Vec::new()).await.expect("answers").remove(0);
    assert_eq!(leased.request.traceparent.as_deref(), Some(parent.as_str()));
    let given = leased.traceparent.expect("a context");
    let place: Vec<&str> = given.split('-').collect();
    assert_eq!((place[1], place[3]), (trace, "01"));
    assert_ne!(place[2], caller, "the job has a span of its own");
    assert_eq!(line.finish(&leased.lease).await.expect("taken"), "finished");
    let (wait, job) = (spans.recv_timeout(PATIENCE), spans.recv_timeout(PATIENCE));
    let (wait, job) = (wait.expect("a span"), job.expect("a span"));
    assert_eq!(
        (&wait["name"], &job["name"]),
        (&json!("wait"), &json!("run"))
    );
    assert_eq!(
        (&wait["traceId"], &job["traceId"]),
        (&json!(trace), &json!(trace))
    );
    assert_eq!(
        (&job["spanId"], &job["parentSpanId"]),
        (&json!(place[2]), &json!(caller))
    );
    assert_eq!(wait["parentSpanId"], job["spanId"]);
    assert_eq!(job["status"]["code"], 1);
    fleet.stop().await;
}

/// Whether some file below a folder holds these bytes.
fn holds(folder: &Path, wanted: &[u8]) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.iter().any(|path| match path.is_dir() {
        true => holds(path, wanted),
        false => {
            let bytes = std::fs::read(path).unwrap_or_default();
            bytes.windows(wanted.len()).any(|window| window == wanted)
        }
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_encrypted_lies_nowhere_in_words_and_is_read_later() {
    let folder = tempfile::tempdir().expect("folder");
    let words = b"words that nobody else may read\n";
    for (round, encrypt) in [("j1", true), ("j2", false)] {
        let mut config = config(folder.path()).await;
        config.encrypt_logs = encrypt;
        let fleet = Fleet::of(
            start_with(config, OpenOptions::default())
                .await
                .expect("starts"),
        );
        let line = Line::new(&fleet.socket, "w1");
        line.join(1).await.expect("joins");
        let job = fleet.submit(round, 1, 1).await;
        let lease = line
            .poll(Vec::new())
            .await
            .expect("answers")
            .remove(0)
            .lease;
        line.log(&lease, 0, words).await.expect("taken");
        let path = format!("/worker/v1/jobs/{job}/artifacts/report");
        let header = LeaseHeader::of(&lease).to_string();
        let put = line.raw("PUT", &path, Some(&header), words).await;
        assert_eq!(put.expect("answers").status, 200);
        let clear = |what: &str| holds(&folder.path().join("controller").join(what), words);
        assert_eq!((clear("logs"), clear("artifacts")), (!encrypt, !encrypt));
        assert_eq!(line.finish(&lease).await.expect("taken"), "finished");
        assert!(!encrypt || !clear("logs"), "put away, and in words");
        // What an earlier start sealed is read by one that seals nothing.
        for job in ["j1", round] {
            let path = format!("/v1/jobs/{job}/artifacts/report");
            let file = send(&fleet.socket, "GET", &path, &[], b"").await;
            assert_eq!(file.expect("answers").body, words);
            let path = format!("/v1/jobs/{job}/logs");
            let log = send(&fleet.socket, "GET", &path, &[], b"").await;
            assert!(log.expect("answers").text().contains("nobody else"));
        }
        fleet.stop().await;
    }
}
