//! A controller whose disk is full: it refuses what it cannot keep, says so, and goes on when there is room.
//!
//! The disk is a small memory file system in a mount namespace of a process of its own, so that nothing of it outlives the test.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kiln_core::JobId;

use crate::fleet_doors::uploads;
use crate::fleet_server::{BEAT, Fleet, SHORT, times};
use crate::fleet_worker::{Ledger, Line, SimWorker, send};
use crate::server::{FORM, Got, archive, multipart};

/// Size of the disk.
const DISK: &str = "24m";
/// Submissions until one is refused: what the database has reserved is used up by then.
const SUBMISSIONS_MAX: usize = 3_000;

async fn submit(fleet: &Fleet) -> Got {
    let body = br#"{"argv": ["sim", "2", "20"], "cpus": 1, "memory": "512M", "disk": "1G"}"#;
    let headers = [("content-type", "application/json")];
    let got = send(&fleet.socket, "POST", "/v1/runs", &headers, body).await;
    got.expect("answers")
}

fn id(got: &Got) -> JobId {
    let value = got.value();
    value["id"].as_str().expect("id").parse().expect("id")
}

/// Takes all the room there is.
fn fill(path: &Path) {
    let mut file = std::fs::File::create(path).expect("creates");
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![0; size]).is_ok() {}
    }
}

#[track_caller]
fn is_disk_full(got: &Got) {
    assert_eq!(
        (got.status, got.code().as_str()),
        (507, "disk_full"),
        "{}",
        got.text()
    );
    assert!(got.text().contains("nothing was changed"), "{}", got.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of the test below, which starts it"]
async fn full_disk_child() {
    let mut folder = String::new();
    std::io::stdin()
        .read_line(&mut folder)
        .expect("is told where");
    if folder.trim().is_empty() {
        return;
    }
    let folder = Path::new(folder.trim());
    let fleet = Fleet::start(folder, times(SHORT)).await;
    let ledger = Arc::new(Ledger::default());
    let workers =
        ["w1", "w2"].map(|name| SimWorker::start(Line::new(&fleet.socket, name), 4, BEAT, &ledger));
    let mut jobs = Vec::new();
    for _ in 0..10 {
        jobs.push(id(&submit(&fleet).await));
    }
    let filler = folder.join("filler");
    fill(&filler);
    let mut refused = None;
    for _ in 0..SUBMISSIONS_MAX {
        let got = submit(&fleet).await;
        match got.status {
            202 => jobs.push(id(&got)),
            _ => {
                refused = Some(got);
                break;
            }
        }
    }
    is_disk_full(&refused.expect("the disk was never full"));
    let mut source = archive();
    source.resize(1 << 20, 0);
    let body = multipart(&[("request", br#"{"name": "app"}"#), ("source", &source)]);
    let headers = [("content-type", FORM)];
    let got = send(&fleet.socket, "POST", "/v1/builds", &headers, &body).await;
    is_disk_full(&got.expect("answers"));
    assert!(uploads(folder).is_empty(), "{:?}", uploads(folder));
    // Whoever shares a commit with it hears the same.
    let together = futures_util::future::join_all((0..32).map(|_| submit(&fleet))).await;
    together.iter().for_each(is_disk_full);
    let got = send(&fleet.socket, "GET", "/private/backup", &[], b"").await;
    is_disk_full(&got.expect("answers"));
    std::fs::remove_file(&filler).expect("room again");
    jobs.push(id(&submit(&fleet).await));
    fleet.all_over(&jobs).await;
    fleet.count(&jobs).await.check("disk full", jobs.len());
    assert_eq!(ledger.twice.load(Ordering::SeqCst), 0, "two at once");
    fleet.db().check().await.expect("is whole");
    let all = kiln_db::JobFilter::default();
    let page = fleet.db().jobs(&all, None, 500).await.expect("lists");
    assert!(
        page.items.len() <= jobs.len(),
        "what was refused left something"
    );
    drop(workers);
    fleet.stop().await;
}

#[test]
fn submissions_are_refused_while_the_disk_is_full_and_nothing_is_lost() {
    let folder = tempfile::tempdir().expect("folder");
    let mount = format!("mount -t tmpfs -o size={DISK},mode=700 none \"$1\"");
    let script = format!(
        "{mount} || exit 77; exec \"$0\" --exact fleet_disk::full_disk_child --ignored --nocapture"
    );
    let mut child = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .arg(std::env::current_exe().expect("own path"))
        .arg(folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare starts");
    let mut stdin = child.stdin.take().expect("piped");
    writeln!(stdin, "{}", folder.path().display()).expect("is told");
    drop(stdin);
    let output = child.wait_with_output().expect("ends");
    if matches!(output.status.code(), Some(1 | 77)) && output.stdout.is_empty() {
        println!("SKIPPED: only root may mount a small disk in a namespace of its own");
        return;
    }
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(output.status.success(), "{}", output.status);
    assert!(said.contains("disk full: "), "it did not run: {said}");
}
