//! Files that an attempt leaves: taken under its live lease alone, kept once, bounded, read by their tenant and nobody else.

use kiln_core::{Digest, JobId, Lease};
use kiln_db::OpenOptions;
use kiln_proto::fleet::LeaseHeader;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::fleet_server::{Fleet, PATIENCE};
use crate::fleet_worker::{Line, send};
use crate::server::Got;

/// A controller, a worker with a lease, and the job it is for.
async fn leased(folder: &std::path::Path) -> (Fleet, Line, JobId, Lease) {
    let fleet = Fleet::start(folder, OpenOptions::default()).await;
    let line = Line::new(&fleet.socket, "w1");
    line.join(1).await.expect("joins");
    let job = fleet.submit("j1", 1, 1).await;
    let lease = line
        .poll(Vec::new())
        .await
        .expect("answers")
        .remove(0)
        .lease;
    (fleet, line, job, lease)
}

async fn put(line: &Line, lease: &Lease, name: &str, content: &[u8]) -> Got {
    let path = format!("/worker/v1/jobs/{}/artifacts/{name}", lease.attempt.job);
    let header = LeaseHeader::of(lease).to_string();
    let got = line.raw("PUT", &path, Some(&header), content).await;
    got.expect("answers")
}

/// Asks with a token, or as the owner.
async fn get(fleet: &Fleet, token: Option<&str>, path: &str, headers: &[(&str, &str)]) -> Got {
    let bearer = token.map(|token| format!("Bearer {token}"));
    let mut all = headers.to_vec();
    all.extend(bearer.as_deref().map(|bearer| ("authorization", bearer)));
    send(&fleet.socket, "GET", path, &all, b"")
        .await
        .expect("answers")
}

async fn token(fleet: &Fleet, asked: &Value) -> String {
    let kind = [("content-type", "application/json")];
    let tenant = json!({ "name": asked["tenant"] }).to_string();
    let _exists = send(
        &fleet.socket,
        "POST",
        "/v1/tenants",
        &kind,
        tenant.as_bytes(),
    )
    .await;
    let body = asked.to_string();
    let made = send(&fleet.socket, "POST", "/v1/tokens", &kind, body.as_bytes()).await;
    let made = made.expect("answers").value();
    made["token"].as_str().expect("a token").to_owned()
}

/// Files below the store of artifacts, half ones included.
fn stored(folder: &std::path::Path) -> usize {
    let mut folders = vec![
        folder.join("controller/artifacts"),
        folder.join("controller/arriving"),
    ];
    let mut count = 0;
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).into_iter().flatten().flatten() {
            match entry.path().is_dir() {
                true => folders.push(entry.path()),
                false => count += 1,
            }
        }
    }
    count
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_attempt_leaves_is_listed_and_read_in_ranges() {
    let folder = tempfile::tempdir().expect("folder");
    let (fleet, line, job, lease) = leased(folder.path()).await;
    let content: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    let got = put(&line, &lease, "dist%2Fapp.tar", &content).await;
    assert_eq!(got.status, 200, "{}", got.text());
    assert_eq!(got.value()["digest"], Digest::of(&content).to_string());
    // Said twice, because its answer was lost: kept once. The same content under another name is one file.
    assert_eq!(
        put(&line, &lease, "dist%2Fapp.tar", &content).await.status,
        200
    );
    assert_eq!(put(&line, &lease, "copy.tar", &content).await.status, 200);
    assert_eq!(put(&line, &lease, "empty", b"").await.status, 200);
    assert_eq!(stored(folder.path()), 2);
    for bad in [
        "..",
        "a%2F..%2Fb",
        "%2Fetc",
        "a%0Ab",
        "a%20b",
        "%F0%9F%92%A3",
        "a%2F%2Fb",
        &"x".repeat(251),
    ] {
        let got = put(&line, &lease, bad, b"x").await;
        assert_eq!(got.status, 400, "{bad}: {}", got.text());
    }
    assert_eq!(line.finish(&lease).await.expect("taken"), "finished");
    let late = put(&line, &lease, "late", b"x").await;
    assert_eq!((late.status, late.code().as_str()), (409, "lease_refused"));
    assert_eq!(stored(folder.path()), 2);

    let list = get(&fleet, None, &format!("/v1/jobs/{job}/artifacts"), &[]).await;
    let list = list.value();
    let names: Vec<_> = list["items"]
        .as_array()
        .expect("items")
        .iter()
        .map(|item| item["name"].clone())
        .collect();
    assert_eq!(names, ["copy.tar", "dist/app.tar", "empty"]);
    let path = format!("/v1/jobs/{job}/artifacts/dist%2Fapp.tar");
    let whole = get(&fleet, None, &path, &[]).await;
    assert_eq!((whole.status, whole.body.len()), (200, content.len()));
    assert_eq!(whole.body, content);
    assert_eq!(whole.headers["content-disposition"], "attachment");
    let tag = whole.headers["etag"].clone();
    for (range, want) in [
        ("bytes=0-0", &content[..1]),
        ("bytes=65530-65545", &content[65_530..65_546]),
        ("bytes=199990-", &content[199_990..]),
        ("bytes=-7", &content[199_993..]),
    ] {
        let part = get(&fleet, None, &path, &[("range", range), ("if-range", &tag)]).await;
        assert_eq!((part.status, part.body.as_slice()), (206, want), "{range}");
        assert!(
            part.headers["content-range"].ends_with("/200000"),
            "{range}"
        );
    }
    let other = [("range", "bytes=0-0"), ("if-range", "\"sha256:0\"")];
    assert_eq!(get(&fleet, None, &path, &other).await.status, 200);
    let beyond = get(&fleet, None, &path, &[("range", "bytes=200000-")]).await;
    assert_eq!((beyond.status, beyond.code().as_str()), (416, "range"));
    assert_eq!(beyond.headers["content-range"], "bytes */200000");
    let empty = get(
        &fleet,
        None,
        &format!("/v1/jobs/{job}/artifacts/empty"),
        &[],
    )
    .await;
    assert_eq!((empty.status, empty.body.len()), (200, 0));
    fleet.stop().await;
}

/// Bounds count what has a name: what loses it must not stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_name_said_again_and_again_is_one_file() {
    let folder = tempfile::tempdir().expect("folder");
    let (fleet, line, job, lease) = leased(folder.path()).await;
    assert_eq!(put(&line, &lease, "twin", b"content 0").await.status, 200);
    for round in 0..5 {
        let content = format!("content {round}");
        let got = put(&line, &lease, "a.txt", content.as_bytes()).await;
        assert_eq!(got.status, 200, "{}", got.text());
    }
    // The last one, and the first one, which has another name.
    assert_eq!(stored(folder.path()), 2);
    for (name, content) in [("a.txt", "content 4"), ("twin", "content 0")] {
        let path = format!("/v1/jobs/{job}/artifacts/{name}");
        assert_eq!(get(&fleet, None, &path, &[]).await.text(), content);
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn artifacts_of_another_tenant_are_not_there() {
    let folder = tempfile::tempdir().expect("folder");
    let (fleet, line, job, lease) = leased(folder.path()).await;
    assert_eq!(put(&line, &lease, "a.txt", b"ours").await.status, 200);
    let own = token(&fleet, &json!({"tenant": "local", "role": "developer"})).await;
    let looks = token(&fleet, &json!({"tenant": "local", "role": "read-only"})).await;
    let rival = token(&fleet, &json!({"tenant": "rival", "role": "admin"})).await;
    for what in ["artifacts", "artifacts/a.txt"] {
        let path = format!("/v1/jobs/{job}/{what}");
        assert_eq!(
            get(&fleet, Some(&own), &path, &[]).await.status,
            200,
            "{what}"
        );
        assert_eq!(
            get(&fleet, Some(&looks), &path, &[]).await.status,
            403,
            "{what}"
        );
        let foreign = get(&fleet, Some(&rival), &path, &[]).await;
        assert_eq!(foreign.status, 404, "{what}");
        let nowhere = get(&fleet, Some(&rival), &path.replace(job.as_str(), "j2"), &[]).await;
        let words = |got: &Got| got.text().replace(job.as_str(), "j2");
        assert_eq!(words(&foreign), words(&nowhere), "{what}");
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_artifact_that_is_cut_or_too_large_leaves_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let (fleet, line, job, lease) = leased(folder.path()).await;
    let head = |length: u64| {
        format!(
            "PUT /worker/v1/jobs/{job}/artifacts/a HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
             kiln-generation: 2\r\nkiln-worker: w1\r\nkiln-lease: {}\r\ncontent-length: {length}\r\n\r\n",
            LeaseHeader::of(&lease)
        )
    };
    // Ten gigabytes are refused by what they say of themselves.
    let mut large = tokio::net::UnixStream::connect(&fleet.socket)
        .await
        .expect("connects");
    large
        .write_all(head(10 << 30).as_bytes())
        .await
        .expect("writes");
    let mut answer = String::new();
    large.read_to_string(&mut answer).await.expect("reads");
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let mut cut = tokio::net::UnixStream::connect(&fleet.socket)
        .await
        .expect("connects");
    cut.write_all(head(1 << 20).as_bytes())
        .await
        .expect("writes");
    cut.write_all(&[0; 300_000]).await.expect("writes");
    let arrives = || stored(folder.path()) == 1;
    kiln_testkit::wait_until("it arrives", PATIENCE, arrives).await;
    drop(cut);
    let gone = || stored(folder.path()) == 0;
    kiln_testkit::wait_until("a cut one is removed", PATIENCE, gone).await;
    let rows = fleet.db().artifacts(&job).await.expect("reads");
    assert!(rows.is_empty(), "{rows:?}");
    assert_eq!(put(&line, &lease, "a", b"whole").await.status, 200);
    fleet.stop().await;
}
