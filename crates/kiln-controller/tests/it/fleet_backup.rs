//! A backup is taken while jobs come and run, the controller dies later, and the backup is put back.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kiln_controller::backup::{PutBackError, put_back};
use kiln_controller::server::StartError;
use kiln_core::{JobId, Lease};
use kiln_proto::fleet::HeldLease;
use kiln_testkit::wait_until;

use crate::fleet_server::{BEAT, Fleet, PATIENCE, SHORT, Served, socket, times};
use crate::fleet_worker::{Ledger, Line, NoAnswer, SimWorker, send};

/// Jobs in all.
const JOBS: usize = 120;

/// Submits one job with the key of its number until it is acknowledged.
async fn submit(socket: &Path, number: usize) -> JobId {
    let key = format!("key-{number}");
    let headers = [
        ("content-type", "application/json"),
        ("idempotency-key", key.as_str()),
    ];
    let body = br#"{"argv": ["sim", "4", "60"], "cpus": 1, "memory": "512M", "disk": "1G"}"#;
    loop {
        match send(socket, "POST", "/v1/runs", &headers, body).await {
            Ok(got) if got.status < 300 => {
                let id = got.value()["id"].as_str().map(str::to_owned);
                return id.expect("id").parse().expect("id");
            }
            Ok(got) => {
                // A server that cannot now, or took too long, is asked again.
                assert!(matches!(got.status, 408 | 429 | 500..), "{}", got.text());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// A worker that holds one lease, keeps it alive, and never finishes.
async fn holder(socket: &Path) -> (Line, Lease, tokio::task::JoinHandle<()>) {
    let line = Line::new(socket, "holder");
    line.join(1).await.expect("joins");
    submit(socket, 0).await;
    let lease = line
        .poll(Vec::new())
        .await
        .expect("answers")
        .remove(0)
        .lease;
    let held = HeldLease {
        attempt: lease.attempt.clone(),
        epoch: lease.epoch,
    };
    let beating = line.clone();
    let beats = tokio::spawn(async move {
        loop {
            let _kept = beating.beat(vec![held.clone()], 1).await;
            tokio::time::sleep(BEAT).await;
        }
    });
    (line, lease, beats)
}

async fn backup(socket: &Path, to: &Path) {
    let got = send(socket, "GET", "/private/backup", &[], b"").await;
    let got = got.expect("answers");
    assert_eq!(got.status, 200, "{}", got.text());
    assert_eq!(got.headers["content-length"], got.body.len().to_string());
    std::fs::write(to, &got.body).expect("writes");
}

/// Nothing is left of the copy that was made for it.
fn copies(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("reads").flatten();
    let paths = entries.map(|entry| entry.path());
    let is_copy = |path: &PathBuf| path.to_string_lossy().contains("/backup-");
    paths.filter(is_copy).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_taken_under_load_is_put_back_and_old_leases_are_dead() {
    let folder = tempfile::tempdir().expect("folder");
    let own = folder.path().join("controller");
    let (socket, ledger) = (socket(folder.path()), Arc::new(Ledger::default()));
    let served = Served::start(folder.path());
    let (line, lease, beats) = holder(&socket).await;
    let workers: Vec<_> = (0..4)
        .map(|n| SimWorker::start(Line::new(&socket, &format!("w{n}")), 4, BEAT, &ledger))
        .collect();
    let count = Arc::new(AtomicUsize::new(1));
    let submitting = {
        let (socket, count) = (socket.clone(), Arc::clone(&count));
        tokio::spawn(async move {
            for number in 1..JOBS {
                submit(&socket, number).await;
                count.store(number + 1, Ordering::SeqCst);
            }
        })
    };
    let submitted = |many: usize| {
        let count = Arc::clone(&count);
        move || count.load(Ordering::SeqCst) >= many
    };
    wait_until("jobs", PATIENCE, submitted(JOBS / 3)).await;
    let file = folder.path().join("saved.db");
    backup(&socket, &file).await;
    let at_backup = count.load(Ordering::SeqCst);
    assert!(copies(&own).is_empty(), "{:?}", copies(&own));
    // Some of what came before the backup is over, and some came after it.
    wait_until("more jobs", PATIENCE, submitted(JOBS)).await;
    submitting.await.expect("submits");
    wait_until("some are over", PATIENCE, || {
        ledger.finished.lock().expect("lock").len() > JOBS / 4
    })
    .await;
    let refused = put_back(&own, &file, true).await;
    assert!(
        matches!(refused, Err(PutBackError::Folder(StartError::Taken(_)))),
        "{refused:?}"
    );
    served.kill();
    beats.abort();
    let refused = put_back(&own, &file, false).await;
    assert!(
        matches!(refused, Err(PutBackError::Exists(_))),
        "{refused:?}"
    );
    let back = put_back(&own, &file, true).await.expect("puts back");
    assert_eq!(back.restored.incarnation, 2);
    assert!(back.restored.leases_ended >= 1, "{back:?}");
    assert!(back.replaced.is_some_and(|path| path.exists()));

    // What a controller that was killed in the middle of a backup leaves.
    std::fs::write(own.join("backup-00000000000000aa.db.part"), "half a copy").expect("writes");
    let fleet = Fleet::start(folder.path(), times(SHORT)).await;
    assert!(copies(&own).is_empty(), "{:?}", copies(&own));
    let late = line.finish(&lease).await;
    let Err(NoAnswer::Refused(code)) = late else {
        panic!("a lease of the former life: {late:?}");
    };
    assert_eq!(code, "lease_refused");
    let kept = kiln_db::JobFilter::default();
    let page = fleet.db().jobs(&kept, None, 500).await.expect("lists");
    let in_backup = page.items.len();
    assert!((JOBS / 3..=JOBS).contains(&in_backup) && in_backup <= at_backup + 1);
    // Whoever was told of a job that the backup does not know says it again, under its key.
    let mut jobs = Vec::new();
    for number in 0..JOBS {
        jobs.push(submit(&socket, number).await);
    }
    fleet.all_over(&jobs).await;
    let counts = fleet.count(&jobs).await;
    println!(
        "{in_backup} jobs were in the backup, {} leases ended",
        back.restored.leases_ended
    );
    counts.check("backup put back", JOBS);
    let page = fleet.db().jobs(&kept, None, 500).await.expect("lists");
    assert_eq!(page.items.len(), JOBS, "one job for each key");
    assert_eq!(ledger.twice.load(Ordering::SeqCst), 0, "two at once");
    fleet.db().check().await.expect("is whole");
    drop(workers);
    fleet.stop().await;
}
