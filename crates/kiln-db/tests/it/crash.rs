//! kill -9 of a process in the middle of writing: what was acknowledged is there, whole, and the file opens.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use kiln_db::{Database, DbError, JobFilter, OpenOptions};

use crate::support::{file_url, id, job};

/// The process that is killed: this very program, told by its standard input where to write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of the test below, which starts it"]
async fn writer_child() {
    let mut path = String::new();
    std::io::stdin()
        .read_line(&mut path)
        .expect("is told where");
    if path.trim().is_empty() {
        return;
    }
    let url = file_url(std::path::Path::new(path.trim()));
    let db = Database::open(&url, OpenOptions::default())
        .await
        .expect("opens");
    let (acknowledged, mut lines) = tokio::sync::mpsc::channel(64);
    for writer in 0..8 {
        let (db, acknowledged) = (db.clone(), acknowledged.clone());
        tokio::spawn(async move {
            for n in 0.. {
                let name = format!("b{writer}-{n}");
                db.submit(job(&name)).await.expect("submits");
                acknowledged.send(name).await.expect("is read");
            }
        });
    }
    let mut out = std::io::stdout();
    while let Some(name) = lines.recv().await {
        writeln!(out, "wrote {name}").expect("is read");
        out.flush().expect("is read");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_writer_loses_nothing_it_acknowledged() {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("kiln.db");
    let mut acknowledged = BTreeSet::new();
    for round in 1..=3 {
        let mut child = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", "crash::writer_child", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut stdin = child.stdin.take().expect("piped");
        writeln!(stdin, "{}", file.display()).expect("is told");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut wrote = 0;
        while wrote < 40 * round {
            let line = lines.next().expect("goes on").expect("reads");
            if let Some(name) = line.split("wrote ").nth(1) {
                acknowledged.insert(name.to_owned());
                wrote += 1;
            }
        }
        child.kill().expect("is killed");
        child.wait().expect("is gone");
        for line in lines.map_while(Result::ok) {
            // A last line may be cut short.
            if let Some(name) = line.split("wrote ").nth(1)
                && name.split('-').nth(1).is_some_and(|n| !n.is_empty())
            {
                acknowledged.insert(name.to_owned());
            }
        }
        let db = Database::open(&file_url(&file), OpenOptions::default()).await;
        let db = db.expect("the file opens after a kill");
        assert_eq!(db.incarnation(), 1);
        for name in &acknowledged {
            let found = db.job(&id(name)).await.expect("reads");
            assert!(found.is_some(), "{name} was acknowledged and is lost");
        }
        let depth = db.depths().await.expect("counts");
        let kept = depth.iter().map(|depth| depth.pending).sum::<u32>();
        assert!(kept as usize >= acknowledged.len());
        let page = db
            .jobs(&JobFilter::default(), None, 500)
            .await
            .expect("lists");
        for item in page.items {
            let events = db.events_after(&item.id, 0, 10).await.expect("reads");
            assert_eq!(events.len(), 1, "{} is there in parts", item.id);
        }
        db.close().await;
        // Each round writes other names.
        let rest = folder.path().join(format!("round-{round}.db"));
        std::fs::rename(&file, &rest).expect("moves");
        acknowledged.clear();
    }
}

/// A process that may write files of a few megabytes only: told by its standard input where to write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of the test below, which starts it"]
async fn full_disk_child() {
    let mut path = String::new();
    std::io::stdin()
        .read_line(&mut path)
        .expect("is told where");
    if path.trim().is_empty() {
        return;
    }
    let url = file_url(std::path::Path::new(path.trim()));
    let db = Database::open(&url, OpenOptions::default())
        .await
        .expect("opens");
    let mut refused = 0;
    for n in 0..4_000 {
        let name = format!("b{n}");
        let mut big = job(&name);
        big.submitted_by = "x".repeat(20_000);
        match db.submit(big).await {
            Ok(_) => println!("wrote {name}"),
            Err(kiln_db::SubmitError::Database(error)) => {
                println!("refused {error:?}");
                assert!(matches!(error, DbError::Disk { .. }), "{error:?}");
                refused += 1;
            }
            Err(other) => panic!("{other:?}"),
        }
        if refused == 5 {
            // Reading goes on.
            assert!(db.job(&id("b0")).await.expect("reads").is_some());
            println!("full");
            return;
        }
    }
    panic!("the disk was never full");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_and_loses_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("kiln.db");
    let mut child = Command::new("/bin/sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 6000; exec \"$0\" --exact crash::full_disk_child --ignored --nocapture"])
        .arg(std::env::current_exe().expect("own path"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut stdin = child.stdin.take().expect("piped");
    writeln!(stdin, "{}", file.display()).expect("is told");
    let lines: Vec<_> = BufReader::new(child.stdout.take().expect("piped"))
        .lines()
        .map_while(Result::ok)
        .collect();
    child.wait().expect("ends");
    assert!(lines.iter().any(|line| line == "full"), "{lines:?}");
    let db = Database::open(&file_url(&file), OpenOptions::default()).await;
    let db = db.expect("opens where there is room again");
    let mut found = 0;
    for line in &lines {
        if let Some(name) = line.split("wrote ").nth(1) {
            assert!(
                db.job(&id(name)).await.expect("reads").is_some(),
                "{name} is lost"
            );
            found += 1;
        }
    }
    let kept = db
        .depths()
        .await
        .expect("counts")
        .iter()
        .map(|depth| depth.pending)
        .sum::<u32>();
    assert!(found > 10);
    assert_eq!(kept, found, "what was refused left nothing");
    db.submit(job("later")).await.expect("goes on");
}
