//! Files and servers: newer schemas, damaged files, raw copies, backups, restores, databases that are not there.

use std::time::{Duration, Instant};

use kiln_core::JobState;
use kiln_db::{
    BackupError, Database, DatabaseUrl, OpenError, OpenOptions, RestoreError, SCHEMA_VERSION,
};
use kiln_testkit::postgres::server;

use crate::support::{World, end, file_url, id, job, passed};

async fn open(url: &DatabaseUrl) -> Result<Database, OpenError> {
    let options = OpenOptions {
        patience: Duration::from_millis(300),
        ..OpenOptions::default()
    };
    Database::open(url, options).await
}

/// Runs a statement on a file the way a person could.
fn by_hand(file: &std::path::Path, sql: &str) {
    let url = file.display().to_string();
    let done = std::process::Command::new("python3")
        .args(["-c", "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute(sys.argv[2]); c.commit(); c.close()"])
        .args([&url, sql])
        .status();
    assert!(done.expect("python3 runs").success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_schema_is_refused_on_both() {
    let w = World::sqlite().await;
    w.db.close().await;
    let newer = format!(
        "update meta set value = '{}' where key = 'schema'",
        SCHEMA_VERSION + 1
    );
    by_hand(&w.file(), &newer);
    let refused = open(&w.url).await;
    assert!(matches!(refused, Err(OpenError::Newer { found, .. }) if found == SCHEMA_VERSION + 1));

    let w = World::postgres().await;
    server().sql(w.database(), &newer);
    let refused = open(&w.url).await;
    assert!(matches!(refused, Err(OpenError::Newer { found, .. }) if found == SCHEMA_VERSION + 1));
    let words = refused
        .err()
        .map(|error| error.to_string())
        .unwrap_or_default();
    assert!(words.contains("use the newer kiln"), "{words}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_raw_copy_of_a_file_in_use_is_refused() {
    let w = World::sqlite().await;
    for n in 0..50 {
        w.submit(&format!("b{n}")).await;
    }
    let folder = tempfile::tempdir().expect("folder");
    let alone = folder.path().join("alone.db");
    std::fs::copy(w.file(), &alone).expect("copies");
    assert!(matches!(
        open(&file_url(&alone)).await,
        Err(OpenError::RawCopy { .. })
    ));
    let whole = folder.path().join("whole.db");
    std::fs::copy(w.file(), &whole).expect("copies");
    let wal = |path: &std::path::Path| format!("{}-wal", path.display());
    std::fs::copy(wal(&w.file()), wal(&whole)).expect("copies");
    let refused = open(&file_url(&whole)).await;
    assert!(
        matches!(refused, Err(OpenError::RawCopy { .. })),
        "{refused:?}"
    );
    let to = folder.path().join("restored.db");
    let refused = Database::restore(&alone, &to).await;
    assert!(matches!(
        refused,
        Err(RestoreError::NotGood(OpenError::RawCopy { .. }))
    ));
    assert!(!to.exists());

    // Closed, it may be copied; what opens is another life.
    let worker = w.worker("w1").await;
    let lease = w.claim("b1", 1, &worker).await;
    w.db.close().await;
    let closed = folder.path().join("closed.db");
    std::fs::copy(w.file(), &closed).expect("copies");
    let copy = open(&file_url(&closed)).await.expect("opens");
    assert_eq!(copy.incarnation(), 2);
    assert!(copy.check_lease(&lease).await.is_err());
    // And the file itself goes on as it was.
    let same = open(&w.url).await.expect("opens");
    assert_eq!(same.incarnation(), 1);
    same.check_lease(&lease).await.expect("lives");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_file_is_refused() {
    let w = World::sqlite().await;
    for n in 0..400 {
        w.submit(&format!("b{n}")).await;
    }
    w.db.close().await;
    let good = std::fs::read(w.file()).expect("reads");
    assert!(good.len() > 40 * 4096);
    // A page that was never written, and one from elsewhere.
    for page in [9, good.len() / 4096 / 2] {
        let mut bad = good.clone();
        bad[page * 4096..(page + 1) * 4096].fill(0xa5);
        std::fs::write(w.file(), &bad).expect("writes");
        let refused = open(&w.url).await;
        assert!(
            matches!(refused, Err(OpenError::Damaged { .. })),
            "page {page}: {refused:?}"
        );
    }
    std::fs::write(w.file(), &good[..good.len() / 2]).expect("writes");
    assert!(
        matches!(open(&w.url).await, Err(OpenError::Damaged { .. })),
        "half a file"
    );
    std::fs::write(w.file(), vec![b'x'; 8192]).expect("writes");
    assert!(
        matches!(open(&w.url).await, Err(OpenError::Damaged { .. })),
        "no database at all"
    );
    std::fs::write(w.file(), &good).expect("writes");
    open(&w.url).await.expect("opens again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_under_load_restores_whole() {
    let w = World::sqlite().await;
    let worker = w.worker("w1").await;
    let lease = w.leased("before", &worker).await;
    let load = {
        let db = w.db.clone();
        tokio::spawn(async move {
            for n in 0..300 {
                db.submit(job(&format!("b{n}"))).await.expect("submits");
            }
        })
    };
    let folder = tempfile::tempdir().expect("folder");
    let (backup, to) = (
        folder.path().join("backup.db"),
        folder.path().join("new.db"),
    );
    w.db.backup(&backup).await.expect("backs up");
    assert!(matches!(
        w.db.backup(&backup).await,
        Err(BackupError::Exists(_))
    ));
    w.db.check().await.expect("is whole while it is written");
    load.await.expect("runs");
    let restored = Database::restore(&backup, &to).await.expect("restores");
    assert_eq!((restored.incarnation, restored.leases_ended), (2, 1));
    assert!(matches!(
        Database::restore(&backup, &to).await,
        Err(RestoreError::Exists(_))
    ));
    let db = open(&file_url(&to)).await.expect("opens");
    assert_eq!(db.incarnation(), 2);
    let found = db
        .job(&id("before"))
        .await
        .expect("reads")
        .expect("is there");
    assert_eq!(found.state, JobState::Queued { attempts: 1 });
    assert!(db.check_lease(&lease).await.is_err());
    assert!(db.finish(&lease, end(passed())).await.is_err());
    // What it holds is a whole prefix: every job with its events.
    let page = db
        .jobs(&kiln_db::JobFilter::default(), None, 500)
        .await
        .expect("lists");
    for item in page.items.iter().filter(|item| item.id != id("before")) {
        assert_eq!(
            db.events_after(&item.id, 0, 10).await.expect("reads").len(),
            1
        );
    }
    // The live database never noticed.
    w.db.finish(&lease, end(passed())).await.expect("finishes");
    // A backup that was cut short is none.
    let bytes = std::fs::read(&backup).expect("reads");
    std::fs::write(&backup, &bytes[..bytes.len() - 4096 * 3]).expect("writes");
    let refused = Database::restore(&backup, &folder.path().join("other.db")).await;
    assert!(
        matches!(
            refused,
            Err(RestoreError::NotGood(OpenError::Damaged { .. }))
        ),
        "{refused:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_on_another_server_is_another_life() {
    let w = World::postgres().await;
    let worker = w.worker("w1").await;
    let lease = w.leased("b1", &worker).await;
    assert!(matches!(
        w.db.backup(std::path::Path::new("/nowhere")).await,
        Err(BackupError::OwnTools)
    ));
    let same = w.second().await;
    assert_eq!(same.incarnation(), 1);
    // What a dump read into another server looks like.
    server().sql(
        w.database(),
        "update meta set value = '1/1' where key = 'server'",
    );
    let moved = w.second().await;
    assert_eq!(moved.incarnation(), 2);
    assert!(moved.check_lease(&lease).await.is_err());
    let found = moved
        .job(&id("b1"))
        .await
        .expect("reads")
        .expect("is there");
    assert_eq!(found.state, JobState::Queued { attempts: 1 });
    assert_eq!(w.second().await.incarnation(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_not_there_is_waited_for_and_named() {
    let began = Instant::now();
    let url: DatabaseUrl = "postgres://kiln:hidden@127.0.0.1:1/queue"
        .parse()
        .expect("url");
    let refused = open(&url).await;
    let Err(OpenError::Unreachable { url, .. }) = &refused else {
        panic!("{refused:?}");
    };
    assert_eq!(url, "postgres://kiln@127.0.0.1:1/queue");
    assert!(!format!("{refused:?}").contains("hidden"));
    assert!(began.elapsed() < Duration::from_secs(60));
    let missing = server().url("no_such_database").parse().expect("url");
    let refused = open(&missing).await;
    assert!(
        matches!(refused, Err(OpenError::Failed { .. })),
        "not worth waiting for: {refused:?}"
    );
    let nowhere = file_url(std::path::Path::new("/proc/no/such/folder/kiln.db"));
    assert!(open(&nowhere).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_controllers_start_at_once_on_an_empty_server() {
    let url: DatabaseUrl = server().url(&server().database()).parse().expect("url");
    let starts: Vec<_> = (0..4)
        .map(|_| {
            let url = url.clone();
            tokio::spawn(async move { Database::open(&url, OpenOptions::default()).await })
        })
        .collect();
    for start in starts {
        let db = start.await.expect("runs").expect("opens");
        assert_eq!(db.incarnation(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn controllers_wake_each_other() {
    let w = World::postgres().await;
    let second = w.second().await;
    let mut wakes = second.subscribe();
    // The listener connects in the background; until then a wake-up may be lost, which sweeps make up for.
    let deadline = Instant::now() + Duration::from_secs(20);
    for n in 0.. {
        w.submit(&format!("b{n}")).await;
        let woken = tokio::time::timeout(Duration::from_millis(500), async {
            loop {
                if let Ok(kiln_db::Wake::Job(_)) = wakes.recv().await {
                    return;
                }
            }
        });
        if woken.await.is_ok() {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "the other controller never heard of it"
        );
    }
}

/// Nothing that was acknowledged is lost, and work goes on by itself when the server is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_restarts_under_load() {
    let own = kiln_testkit::postgres::start(None);
    let url: DatabaseUrl = own.url(&own.database()).parse().expect("url");
    let db = open(&url).await.expect("opens");
    let (acknowledged, mut names) = tokio::sync::mpsc::unbounded_channel();
    for writer in 0..4 {
        let (db, acknowledged) = (db.clone(), acknowledged.clone());
        tokio::spawn(async move {
            for n in 0.. {
                let name = format!("b{writer}-{n}");
                // What failed may be there or not; the next one is another job.
                let Ok(_) = db.submit(job(&name)).await else {
                    continue;
                };
                if acknowledged.send(name).is_err() {
                    return;
                }
            }
        });
    }
    drop(acknowledged);
    let mut kept = Vec::new();
    for round in 0..3 {
        for _ in 0..60 {
            kept.push(names.recv().await.expect("goes on"));
        }
        if round < 2 {
            tokio::task::block_in_place(|| own.restart());
        }
    }
    drop(names);
    for name in kept {
        assert!(
            db.job(&id(&name)).await.expect("reads").is_some(),
            "{name} is lost"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_to_postgres_is_verified() {
    let port = kiln_testkit::free_port();
    let own = kiln_testkit::postgres::start(Some(port));
    let root = own.folder().join("root.crt");
    let try_open = async |host: &str, options: &str| {
        let url = format!("postgres://kiln@{host}:{port}/postgres?{options}");
        open(&url.parse().expect("url")).await
    };
    let trusted = format!("sslmode=verify-full&sslrootcert={}", root.display());
    try_open("localhost", &trusted)
        .await
        .expect("a certificate of the named root opens");
    let other = try_open("127.0.0.1", &trusted).await;
    assert!(
        matches!(other, Err(OpenError::Failed { .. })),
        "the certificate names another host: {other:?}"
    );
    for mode in ["verify-full", "require", "verify-ca"] {
        let refused = try_open("localhost", &format!("sslmode={mode}")).await;
        assert!(
            refused.is_err(),
            "{mode}: nobody vouches for this certificate"
        );
    }
    let plain = try_open("localhost", "sslmode=disable").await;
    assert!(plain.is_err(), "the server takes TLS alone");
}

/// Transactions that wait for a slow disk share its next sync.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_small_transactions_share_one_sync() {
    const COUNT: u32 = 100;
    let folder = tempfile::tempdir().expect("folder");
    let delay = Duration::from_millis(200);
    let options = OpenOptions {
        delay,
        ..OpenOptions::default()
    };
    let db = Database::open(&file_url(&folder.path().join("kiln.db")), options).await;
    let db = db.expect("opens");
    let began = Instant::now();
    let submits: Vec<_> = (0..COUNT)
        .map(|n| {
            let db = db.clone();
            tokio::spawn(async move { db.submit(job(&format!("b{n}"))).await })
        })
        .collect();
    for submit in submits {
        submit.await.expect("runs").expect("submits");
    }
    assert!(began.elapsed() >= delay);
    let alone = delay * COUNT;
    assert!(
        began.elapsed() < alone / 2,
        "{:?}, one by one {alone:?}",
        began.elapsed()
    );
}
