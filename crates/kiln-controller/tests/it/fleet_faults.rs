//! Faults of workers, of the line, of clocks and of the controller itself, each with what is left counted at the end.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kiln_core::JobId;
use kiln_core::dispatch::WorkerState;
use kiln_testkit::wait_until;

use crate::fleet_lease_sim::{Rng, asked};
use crate::fleet_server::{BEAT, Fleet, PATIENCE, SHORT, Served, socket, times};
use crate::fleet_worker::{Ledger, Line, SimWorker, send};

/// Jobs of the tests with kills.
const JOBS: usize = 200;
/// With short leases, most of it is the wait before a second attempt (5 to 7.5 s); the rest is for hosts that are busy.
const ELSEWHERE: Duration = Duration::from_secs(25);

fn worker(socket: &Path, name: &str, ledger: &Arc<Ledger>) -> SimWorker {
    SimWorker::start(Line::new(socket, name), 4, BEAT, ledger)
}

/// When the kills come follows from it; `KILN_FAULT_SEED` is another.
#[expect(clippy::print_stdout, reason = "a failed run is repeated by its seed")]
fn seed(own: u64) -> u64 {
    let seed = asked("KILN_FAULT_SEED").unwrap_or(own);
    println!("KILN_FAULT_SEED={seed}");
    seed
}

/// Workers are killed at random moments, half of them come back under their name, half under a new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_are_killed_during_two_hundred_jobs() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), times(SHORT)).await;
    let (mut rng, ledger) = (Rng::new(seed(11)), Arc::new(Ledger::default()));
    let mut workers: Vec<_> = (0..6)
        .map(|n| worker(&fleet.socket, &format!("w{n}"), &ledger))
        .collect();
    let started = Instant::now();
    let mut jobs = Vec::new();
    for n in 0..JOBS {
        let (lines, pause) = (rng.between(2, 8), rng.between(20, 120));
        jobs.push(fleet.submit(&format!("j{n}"), lines, pause).await);
    }
    for kill in 0..12 {
        tokio::time::sleep(Duration::from_millis(rng.between(50, 600))).await;
        let at = usize::try_from(rng.below(6)).expect("small");
        let name = match kill % 2 {
            0 => workers[at].line.worker.clone(),
            _ => format!("x{kill}"),
        };
        workers[at].kill();
        workers[at] = worker(&fleet.socket, &name, &ledger);
    }
    fleet.all_over(&jobs).await;
    let counts = fleet.count(&jobs).await;
    counts.check("12 workers killed", JOBS);
    assert!(counts.attempts > JOBS, "no kill met a job");
    assert_eq!(ledger.twice.load(Ordering::SeqCst), 0, "two at once");
    println!("{:?}", started.elapsed());
    drop(workers);
    fleet.stop().await;
}

/// The controller is killed by signal 9 at random moments and started again, with and without a worker that dies beside it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_controller_is_killed_during_two_hundred_jobs() {
    let folder = tempfile::tempdir().expect("folder");
    let (mut rng, ledger) = (Rng::new(seed(7)), Arc::new(Ledger::default()));
    let mut served = Served::start(folder.path());
    let socket = socket(folder.path());
    let mut workers: Vec<_> = (0..4)
        .map(|n| worker(&socket, &format!("w{n}"), &ledger))
        .collect();
    let started = Instant::now();
    let submitting = tokio::spawn(submit_all(socket.clone()));
    for (kill, beside) in workers.iter_mut().enumerate() {
        tokio::time::sleep(Duration::from_millis(rng.between(300, 1_500))).await;
        served.kill();
        if kill % 2 == 1 {
            beside.kill();
            *beside = worker(&socket, &format!("w{kill}"), &ledger);
        }
        served = tokio::task::block_in_place(|| Served::start(folder.path()));
    }
    let submitted = tokio::time::timeout(PATIENCE * 2, submitting).await;
    let jobs: Vec<JobId> = submitted.expect("in time").expect("submits");
    // The last look is the database's own, in this process.
    served.kill();
    let fleet = Fleet::start(folder.path(), times(SHORT)).await;
    fleet.all_over(&jobs).await;
    fleet
        .count(&jobs)
        .await
        .check("controller killed 5 times", JOBS);
    let all = kiln_db::JobFilter::default();
    let page = fleet.db().jobs(&all, None, 500).await;
    let kept = page.expect("lists").items.len();
    assert_eq!(kept, JOBS, "one job for each key");
    assert_eq!(ledger.twice.load(Ordering::SeqCst), 0, "two at once");
    println!("{:?}", started.elapsed());
    drop(workers);
    fleet.stop().await;
}

/// Submits until each is acknowledged, with a key each: what was taken before a kill is not taken twice.
async fn submit_all(socket: std::path::PathBuf) -> Vec<JobId> {
    let mut jobs = Vec::new();
    for n in 0..JOBS {
        let key = format!("key-{n}");
        let headers = [
            ("content-type", "application/json"),
            ("idempotency-key", key.as_str()),
        ];
        let body = br#"{"argv": ["sim", "4", "60"], "cpus": 1, "memory": "512M", "disk": "1G"}"#;
        loop {
            match send(&socket, "POST", "/v1/runs", &headers, body).await {
                Ok(got) if got.status < 300 => {
                    let id = got.value()["id"].as_str().map(str::to_owned);
                    jobs.push(id.expect("id").parse().expect("id"));
                    break;
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
    jobs
}

/// When each attempt of the one job began, and where.
fn begun(ledger: &Ledger) -> BTreeMap<u32, (String, Instant)> {
    let began = ledger.began.lock().expect("lock");
    let all = began.iter();
    all.map(|(attempt, worker, at)| (attempt.number, (worker.clone(), *at)))
        .collect()
}

/// The first attempt from this one on that begins: on a host that is busy one may end before it does.
async fn attempt_begun(ledger: &Ledger, number: u32) -> (String, Instant, u32) {
    let first = || {
        begun(ledger)
            .range(number..)
            .next()
            .map(|(n, it)| (*n, it.clone()))
    };
    wait_until("the attempt begins", PATIENCE, || first().is_some()).await;
    let (number, (worker, at)) = first().expect("it is there");
    (worker, at, number)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_job_of_a_dead_worker_goes_on_elsewhere() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), times(SHORT)).await;
    let ledger = Arc::new(Ledger::default());
    let workers = ["w1", "w2"].map(|name| worker(&fleet.socket, name, &ledger));
    let job = fleet.submit("j1", 20, 100).await;
    let (first, _, number) = attempt_begun(&ledger, 1).await;
    let holder = workers.iter().find(|w| w.line.worker == first);
    let killed = Instant::now();
    holder.expect("one of them").kill();
    let (second, at, _) = attempt_begun(&ledger, number + 1).await;
    let took = at - killed;
    println!("dead worker -> elsewhere in {took:?}");
    assert_ne!(first, second, "another worker first");
    assert!(took < ELSEWHERE, "{took:?}");
    fleet.all_over(std::slice::from_ref(&job)).await;
    fleet.count(&[job]).await.check("dead worker", 1);
    drop(workers);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_cut_off_ends_its_job_before_it_is_given_away() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), times(SHORT)).await;
    let ledger = Arc::new(Ledger::default());
    let workers = ["w1", "w2"].map(|name| worker(&fleet.socket, name, &ledger));
    let job = fleet.submit("j1", 40, 100).await;
    let (first, _, number) = attempt_begun(&ledger, 1).await;
    let holder = workers.iter().find(|w| w.line.worker == first);
    let holder = holder.expect("one of them");
    holder.line.cut.store(true, Ordering::SeqCst);
    let (second, ..) = attempt_begun(&ledger, number + 1).await;
    assert_ne!(first, second);
    assert_ne!(ledger.fenced.load(Ordering::SeqCst), 0, "it fenced itself");
    // The line is there again: it takes work again.
    holder.line.cut.store(false, Ordering::SeqCst);
    fleet.all_over(std::slice::from_ref(&job)).await;
    let id = first.parse().expect("name");
    let state = || async { fleet.db().worker(&id).await.expect("reads") };
    while state().await.expect("is there").state != WorkerState::Active {
        tokio::time::sleep(BEAT).await;
    }
    let more: Vec<JobId> = {
        let mut more = vec![job];
        // More than fit on the other one.
        for n in 2..10 {
            more.push(fleet.submit(&format!("j{n}"), 15, 100).await);
        }
        more
    };
    fleet.all_over(&more).await;
    fleet.count(&more).await.check("cut off", more.len());
    assert_eq!(ledger.twice.load(Ordering::SeqCst), 0, "two at once");
    let again = {
        let began = ledger.began.lock().expect("lock");
        let own = began.iter().filter(|(_, worker, _)| *worker == first);
        own.count()
    };
    assert!(again > 1, "the worker that was cut off works again");
    drop(workers);
    fleet.stop().await;
}

/// A clock that is wrong does no harm; one that jumps ends what ran, at once, and nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clocks_of_workers_are_wrong_by_an_hour() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), times(SHORT)).await;
    let ledger = Arc::new(Ledger::default());
    let workers = ["w1", "w2"].map(|name| worker(&fleet.socket, name, &ledger));
    let hour = 3_600_000;
    workers[0].skew_ms.store(hour, Ordering::SeqCst);
    workers[1].skew_ms.store(-hour, Ordering::SeqCst);
    let mut jobs = Vec::new();
    for n in 0..24 {
        jobs.push(fleet.submit(&format!("j{n}"), 4, 60).await);
    }
    fleet.all_over(&jobs).await;
    let counts = fleet.count(&jobs).await;
    counts.check("clocks an hour wrong", jobs.len());
    // A host that slept for an hour: its leases are over before it does anything else.
    let last = fleet.submit("last", 60, 100).await;
    wait_until("it begins", PATIENCE, || {
        let began = ledger.began.lock().expect("lock");
        began.iter().any(|(attempt, ..)| attempt.job == last)
    })
    .await;
    let fenced = ledger.fenced.load(Ordering::SeqCst);
    for worker in &workers {
        worker.skew_ms.fetch_add(hour, Ordering::SeqCst);
    }
    wait_until("it is fenced", PATIENCE, || {
        ledger.fenced.load(Ordering::SeqCst) > fenced
    })
    .await;
    fleet.all_over(std::slice::from_ref(&last)).await;
    fleet.count(&[last]).await.check("clock jumped", 1);
    assert_eq!(ledger.twice.load(Ordering::SeqCst), 0, "two at once");
    drop(workers);
    fleet.stop().await;
}

/// A database that takes its time: the clock that every transaction reads on SQLite holds the writer up.
#[derive(Debug, Default)]
struct Slow(kiln_db::SystemClock);

impl kiln_db::Clock for Slow {
    fn now_unix_ms(&self) -> u64 {
        std::thread::sleep(Duration::from_millis(15));
        self.0.now_unix_ms()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_database_delays_and_loses_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let mut options = times(kiln_db::LeaseTimes {
        ttl_ms: 6_000,
        grace_ms: 1_000,
    });
    options.clock = Arc::new(Slow::default());
    let fleet = Fleet::start(folder.path(), options).await;
    let ledger = Arc::new(Ledger::default());
    let workers = ["w1", "w2"].map(|name| worker(&fleet.socket, name, &ledger));
    let mut jobs = Vec::new();
    for n in 0..30 {
        jobs.push(fleet.submit(&format!("j{n}"), 3, 20).await);
    }
    fleet.all_over(&jobs).await;
    fleet.count(&jobs).await.check("slow database", jobs.len());
    assert_eq!(ledger.twice.load(Ordering::SeqCst), 0, "two at once");
    drop(workers);
    fleet.stop().await;
}
