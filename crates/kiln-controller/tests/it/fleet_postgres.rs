//! Faults of a PostgreSQL under two whole controllers: restarted, slow, away, not there yet. Each with what is left counted at the end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kiln_controller::server::{StartError, start_with};
use kiln_db::{LeaseTimes, OpenError, OpenOptions};
use kiln_testkit::postgres;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use crate::fleet_server::{Fleet, config, times};
use crate::fleet_shared::{Common, folder, put_away, running, worker};
use crate::fleet_worker::Ledger;

/// Name of PostgreSQL's socket in its folder.
const SOCKET: &str = ".s.PGSQL.5432";
/// The server is killed and started this often.
const RESTARTS: usize = 3;

/// Stands between controllers and PostgreSQL: holds every piece up for a while, or lets nothing through.
struct Proxy {
    folder: tempfile::TempDir,
    shut: Arc<AtomicBool>,
    cut: Arc<std::sync::Mutex<CancellationToken>>,
}

impl Proxy {
    fn start(server: &postgres::Postgres, delay: Duration, shut: bool) -> Self {
        let proxy = Self {
            folder: folder(),
            shut: Arc::new(AtomicBool::new(shut)),
            cut: Arc::default(),
        };
        let listener = UnixListener::bind(proxy.folder.path().join(SOCKET)).expect("listens");
        let to = server.folder().join(SOCKET);
        let (shut, cut) = (Arc::clone(&proxy.shut), Arc::clone(&proxy.cut));
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                if !shut.load(Ordering::SeqCst) {
                    let cut = cut.lock().expect("lock").clone();
                    tokio::spawn(between(near, to.clone(), delay, cut));
                }
            }
        });
        proxy
    }

    /// The place of a database, through here.
    fn url(&self, database: &str) -> String {
        let (name, _) = database.split_once('?').expect("a URL");
        let (_, name) = name.rsplit_once('/').expect("a URL");
        let host = self.folder.path().display();
        format!("postgres://kiln@localhost/{name}?host={host}")
    }

    /// Cuts what is open, and lets nobody in until it is opened.
    fn shut(&self, shut: bool) {
        self.shut.store(shut, Ordering::SeqCst);
        if shut {
            std::mem::take(&mut *self.cut.lock().expect("lock")).cancel();
        }
    }
}

async fn between(near: UnixStream, to: PathBuf, delay: Duration, cut: CancellationToken) {
    let Ok(far) = UnixStream::connect(to).await else {
        return;
    };
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    tokio::select! {
        () = carry(near_in, far_out, delay) => {}
        () = carry(far_in, near_out, delay) => {}
        () = cut.cancelled() => {}
    }
}

async fn carry(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, delay: Duration) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        tokio::time::sleep(delay).await;
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

async fn two(common: &Common, a: &Path, b: &Path) -> ([Fleet; 2], Arc<Ledger>) {
    (common.two(a, b).await, Arc::new(Ledger::default()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_is_restarted_under_load() {
    let server = tokio::task::block_in_place(|| postgres::start(None));
    let Some(common) = Common::on(&server) else {
        return;
    };
    let (a, b) = (folder(), folder());
    let ([first, second], ledger) = two(&common, a.path(), b.path()).await;
    let workers = [
        worker(&first, &[&second], "w0", &ledger),
        worker(&first, &[&second], "w1", &ledger),
        worker(&second, &[&first], "w2", &ledger),
    ];
    let mut jobs = Vec::new();
    for n in 0..100 {
        let fleet = if n % 2 == 0 { &first } else { &second };
        jobs.push(fleet.submit(&format!("j{n}"), 6, 60).await);
    }
    for _ in 0..RESTARTS {
        tokio::time::sleep(Duration::from_millis(700)).await;
        // As by kill -9: connections break in the middle of what they do.
        tokio::task::block_in_place(|| server.restart());
    }
    first.all_over(&jobs).await;
    put_away(&first, &jobs).await;
    let counts = first.count(&jobs).await;
    counts.check("PostgreSQL restarted 3 times", jobs.len());
    assert_eq!(ledger.twice.load(Ordering::SeqCst), 0, "two at once");
    drop(workers);
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_postgresql_delays_and_loses_nothing_and_one_that_is_away_is_waited_for() {
    let server = postgres::server();
    let Some(mut common) = Common::new() else {
        return;
    };
    let proxy = Proxy::start(server, Duration::from_millis(4), false);
    common.database = proxy.url(&common.database);
    let (a, b) = (folder(), folder());
    let ([first, second], ledger) = two(&common, a.path(), b.path()).await;
    let workers = [
        worker(&first, &[], "w0", &ledger),
        worker(&second, &[], "w1", &ledger),
    ];
    let mut jobs = Vec::new();
    for n in 0..30 {
        let fleet = if n % 2 == 0 { &first } else { &second };
        jobs.push(fleet.submit(&format!("j{n}"), 4, 40).await);
    }
    // And for a while nothing gets through.
    proxy.shut(true);
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    proxy.shut(false);
    first.all_over(&jobs).await;
    put_away(&second, &jobs).await;
    let counts = second.count(&jobs).await;
    counts.check("slow, then away", jobs.len());
    assert_eq!(ledger.twice.load(Ordering::SeqCst), 0, "two at once");
    drop(workers);
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_not_there_is_said_and_one_that_comes_is_waited_for() {
    let own = folder();
    let options = |patience| OpenOptions {
        patience,
        lease: LeaseTimes::default(),
        ..OpenOptions::default()
    };
    let at = |url: &str| {
        let (url, folder) = (url.to_owned(), own.path().to_owned());
        async move {
            let mut config = config(&folder).await;
            config.database = Some(url.parse().expect("a URL"));
            config
        }
    };
    let nowhere = format!(
        "postgres://kiln:hidden@localhost/kiln?host={}",
        own.path().display()
    );
    let began = Instant::now();
    let refused = start_with(at(&nowhere).await, options(Duration::from_millis(300))).await;
    let refused = refused.map(drop).expect_err("nobody is there");
    assert!(
        matches!(
            &refused,
            StartError::Database(OpenError::Unreachable { .. })
        ),
        "{refused:?}"
    );
    let told = refused.to_string();
    assert!(
        told.contains("could not be reached") && !told.contains("hidden"),
        "{told}"
    );
    assert!(
        began.elapsed() < Duration::from_secs(60),
        "{:?}",
        began.elapsed()
    );
    // The folder is free again, and the server comes up a moment after the controller.
    let server = postgres::server();
    let proxy = Arc::new(Proxy::start(server, Duration::ZERO, true));
    let url = proxy.url(&server.url(&server.database()));
    let opening = Arc::clone(&proxy);
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(700)).await;
        opening.shut(false);
    });
    let started = start_with(at(&url).await, options(Duration::from_secs(60))).await;
    started.expect("it waited").stop().await;
}

/// Somebody else holds the right to schedule: whoever had it claims nothing from then on, and goes on when it is free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_loses_its_row_stops_at_once() {
    let server = postgres::server();
    let name = server.database();
    let own = folder();
    let mut config = config(own.path()).await;
    config.database = Some(server.url(&name).parse().expect("a URL"));
    let options = times(crate::fleet_server::SHORT);
    let fleet = Fleet::of(start_with(config, options).await.expect("starts"));
    let ledger = Arc::new(Ledger::default());
    let beside = worker(&fleet, &[], "w0", &ledger);
    let warm = fleet.submit("warm", 1, 1).await;
    fleet.all_over(std::slice::from_ref(&warm)).await;
    server.sql(
        &name,
        "update leaders set holder = 'somebody', epoch = epoch + 1, until_ms = kiln_now() + 3000",
    );
    let lost = Instant::now();
    let job = fleet.submit("j1", 2, 10).await;
    running(&fleet, &job).await;
    let waited = lost.elapsed();
    assert!(waited >= Duration::from_millis(2_500), "{waited:?}");
    let jobs = [warm, job];
    fleet.all_over(&jobs).await;
    fleet.count(&jobs).await.check("lost the lead", 2);
    drop(beside);
    fleet.stop().await;
}
