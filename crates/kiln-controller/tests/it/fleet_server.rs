//! A whole controller on SQLite with short leases, in this process or in a child that can be killed, and counts at the end.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kiln_controller::api::{ApiConfig, ListenConfig};
use kiln_controller::server::{
    Running, ServeConfig, Sharing, StartError, Tls, socket_path, start_with,
};
use kiln_controller::webhooks::ReceiverPolicy;
use kiln_core::job::{Limits, RunCommand, TrustClass};
use kiln_core::{
    ByteSize, Dispatch, JobId, JobKind, JobRequest, JobState, NetworkPolicy, PoolName, TenantName,
    Verdict,
};
use kiln_db::{LeaseTimes, NewJob, OpenOptions, Retention};
use kiln_proto::fleet::GENERATION;
use kiln_store::HostRegistry;
use kiln_store::host::HostConfig;
use kiln_store::logs::LogName;
use kiln_telemetry::metrics::Prefix;

/// Longest wait for everything to be over.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Leases that end soon, so that tests are quick.
pub(crate) const SHORT: LeaseTimes = LeaseTimes {
    ttl_ms: 2_500,
    grace_ms: 800,
};

/// Time between two heartbeats of a worker with [`SHORT`] leases.
pub(crate) const BEAT: Duration = Duration::from_millis(500);

pub(crate) fn times(lease: LeaseTimes) -> OpenOptions {
    OpenOptions {
        lease,
        ..OpenOptions::default()
    }
}

/// A controller.
pub(crate) struct Fleet {
    pub(crate) running: Running,
    pub(crate) socket: PathBuf,
}

/// What a newer kiln adds to the database.
const LATER: &str =
    "create table later (id integer primary key); alter table workers add column later text";

/// As a newer kiln would start: with one more step of the schema, and the next generation of the workers' protocol.
pub(crate) fn newer(options: OpenOptions) -> OpenOptions {
    OpenOptions {
        later: Some(LATER),
        ..options
    }
}

pub(crate) async fn serve(folder: &Path, options: OpenOptions) -> Running {
    try_serve(folder, options).await.expect("starts")
}

pub(crate) async fn try_serve(folder: &Path, options: OpenOptions) -> Result<Running, StartError> {
    let mut config = config(folder).await;
    config.generation += u32::from(options.later.is_some());
    start_with(config, options).await
}

/// A controller of a folder, on SQLite.
pub(crate) async fn config(folder: &Path) -> ServeConfig {
    let registry = folder.join("registry");
    std::fs::create_dir_all(&registry).expect("folder");
    let registry = HostRegistry::open_or_attach(&registry, HostConfig::default()).await;
    let api = ApiConfig {
        requests_per_s: 100_000,
        requests_burst: 100_000,
        followers_per_tenant: 10_000,
        ..ApiConfig::default()
    };
    ServeConfig {
        folder: folder.join("controller"),
        database: None,
        sharing: Sharing::default(),
        listen: vec!["127.0.0.1:0".parse().expect("an address")],
        tls: Tls::Plain,
        sockets: ListenConfig::default(),
        api,
        issuer: "kiln".to_owned(),
        trusted: Vec::new(),
        registry: registry.expect("registry"),
        registry_address: None,
        pool: PoolName::default_pool(),
        metrics: None,
        prefix: Prefix::default(),
        otlp: None,
        encrypt_logs: false,
        receivers: ReceiverPolicy::default(),
        retention: Retention::default(),
        generation: GENERATION,
    }
}

/// Where the private socket of a controller in `folder` is.
pub(crate) fn socket(folder: &Path) -> PathBuf {
    socket_path(&folder.join("controller"))
}

impl Fleet {
    pub(crate) async fn start(folder: &Path, options: OpenOptions) -> Self {
        Self::of(serve(folder, options).await)
    }

    pub(crate) fn of(running: Running) -> Self {
        let socket = running.socket.clone();
        Self { running, socket }
    }

    pub(crate) fn db(&self) -> &kiln_db::Database {
        &self.running.controller.db
    }

    pub(crate) async fn submit(&self, id: &str, lines: u64, pause_ms: u64) -> JobId {
        let new = script(id, lines, pause_ms);
        self.db().submit(new).await.expect("submits").job.request.id
    }

    pub(crate) async fn state(&self, job: &JobId) -> JobState {
        let job = self.db().job(job).await.expect("reads");
        job.expect("is there").state
    }

    /// Waits until all jobs are over.
    pub(crate) async fn all_over(&self, jobs: &[JobId]) {
        let all = async {
            for job in jobs {
                while !self.state(job).await.is_terminal() {
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
            }
        };
        if tokio::time::timeout(PATIENCE, all).await.is_err() {
            let depths = self.db().depths().await;
            panic!("not all jobs were over: {depths:?}");
        }
    }

    /// Counts what must be 0, and looks at every job: over once, with the whole log of the attempt that passed.
    pub(crate) async fn count(&self, jobs: &[JobId]) -> Counts {
        let mut counts = Counts::default();
        for id in jobs {
            let Some(job) = self.db().job(id).await.expect("reads") else {
                counts.lost += 1;
                continue;
            };
            let JobState::Finished { outcome } = &job.state else {
                counts.lost += 1;
                continue;
            };
            let events = self.db().events_after(id, 0, 500).await.expect("reads");
            let ends = events.iter().filter(|event| event.kind == "finished");
            counts.finished_twice += usize::from(ends.count() != 1);
            let attempts = self.db().attempts(id).await.expect("reads");
            let passed = attempts.iter().filter(|attempt| {
                let outcome = attempt.outcome.as_ref();
                outcome.is_some_and(|outcome| outcome.verdict == Verdict::Passed)
            });
            let passed: Vec<_> = passed.collect();
            counts.attempts += attempts.len();
            counts.finished_twice += passed.len().saturating_sub(1);
            if outcome.verdict != Verdict::Passed {
                counts.failed += 1;
                continue;
            }
            counts.passed += 1;
            counts.leaked += usize::from(job.lease.is_some());
            if let (Some(attempt), JobKind::Run(run)) = (passed.first(), &job.request.kind) {
                let name = LogName {
                    tenant: job.request.tenant.clone(),
                    attempt: attempt.id.clone(),
                };
                let logs = &self.running.controller.logs;
                let kept = logs.read(&name, 0, 1 << 20).await.unwrap_or_default();
                let lines: u64 = run.argv[1].parse().expect("a script");
                let wanted: String = (0..lines)
                    .map(|line| crate::fleet_worker::text(&attempt.id, line))
                    .collect();
                counts.wrong_logs += usize::from(kept != wanted.as_bytes());
            }
        }
        let rows = self.db().pool_view(&PoolName::default_pool(), 100).await;
        let rows = rows.expect("reads");
        counts.leaked += rows.held.len();
        let full = |(worker, free): &(kiln_db::Worker, _)| worker.facts.capacity == *free;
        counts.leaked += rows.workers.iter().filter(|one| !full(one)).count();
        counts
    }

    pub(crate) async fn stop(self) {
        self.running.stop().await;
    }
}

/// What is left when everything is over.
#[derive(Default, PartialEq, Eq, Debug)]
pub(crate) struct Counts {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) attempts: usize,
    pub(crate) lost: usize,
    pub(crate) finished_twice: usize,
    /// Leases and room that nobody uses.
    pub(crate) leaked: usize,
    pub(crate) wrong_logs: usize,
}

impl Counts {
    #[expect(clippy::print_stdout, reason = "the counts are the result")]
    pub(crate) fn check(&self, what: &str, passed: usize) {
        println!(
            "{what}: {} passed, {} failed, {} attempts; jobs lost {}, finished twice {}, leaked {}, wrong logs {}",
            self.passed,
            self.failed,
            self.attempts,
            self.lost,
            self.finished_twice,
            self.leaked,
            self.wrong_logs
        );
        let wrong = self.lost + self.finished_twice + self.leaked + self.wrong_logs;
        assert_eq!((wrong, self.passed), (0, passed), "{what}: {self:?}");
    }
}

/// A job for a sim worker.
pub(crate) fn script(id: &str, lines: u64, pause_ms: u64) -> NewJob {
    let dispatch = Dispatch {
        attempts_max: 20,
        ..Dispatch::default()
    };
    let run = RunCommand {
        argv: vec!["sim".to_owned(), lines.to_string(), pause_ms.to_string()],
        ..RunCommand::default()
    };
    NewJob {
        request: JobRequest {
            id: id.parse().expect("job id"),
            tenant: TenantName::local(),
            kind: JobKind::Run(Box::new(run)),
            network: NetworkPolicy::Isolated,
            limits: Limits {
                cpus: 1,
                memory: ByteSize::mib(512),
                disk: ByteSize::gib(1),
                timeout_ms: 60_000,
            },
            trust: TrustClass::Untrusted,
            network_bits: None,
            dispatch,
            traceparent: None,
            policy: None,
        },
        idempotency: None,
        submitted_by: "user:tester".to_owned(),
        notify_url: None,
        labels: BTreeMap::new(),
    }
}

/// A controller in a process of its own: this very program, told by its standard input where to serve.
pub(crate) struct Served {
    child: Child,
}

impl Served {
    /// Starts it, and waits until it says that it is ready.
    pub(crate) fn start(folder: &Path) -> Self {
        Self::start_with(folder, SHORT)
    }

    /// With other times of leases.
    pub(crate) fn start_with(folder: &Path, lease: LeaseTimes) -> Self {
        let (ttl, grace) = (lease.ttl_ms, lease.grace_ms);
        let line = format!("{ttl} {grace} {}", folder.display());
        Self::spawn("fleet_server::controller_child", &line)
    }

    /// Starts a test that is one, which is told this line.
    pub(crate) fn spawn(test: &str, line: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", test])
            .args(["--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("starts");
        let stdin = child.stdin.as_mut().expect("piped");
        writeln!(stdin, "{line}").expect("is told");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let ready = lines.any(|line| line.is_ok_and(|line| line.contains("serves")));
        assert!(ready, "the controller did not start");
        // The test program tells after a minute that it still runs, and ends when nobody listens.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child }
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("is killed");
        self.child.wait().expect("is gone");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of other tests, which start it"]
async fn controller_child() {
    let mut told = String::new();
    std::io::stdin()
        .read_line(&mut told)
        .expect("is told where");
    let mut words = told.trim().splitn(3, ' ');
    let (Some(ttl), Some(grace), Some(folder)) = (words.next(), words.next(), words.next()) else {
        return;
    };
    let lease = LeaseTimes {
        ttl_ms: ttl.parse().expect("a number"),
        grace_ms: grace.parse().expect("a number"),
    };
    until_killed(serve(Path::new(folder), times(lease)).await).await;
}

/// Says that it serves, until it is killed, or nobody is there any more who could.
#[expect(clippy::print_stdout, reason = "whoever started it reads it")]
pub(crate) async fn until_killed(running: Running) {
    println!("serves {}", running.socket.display());
    let mut end = String::new();
    let ended = tokio::task::spawn_blocking(move || std::io::stdin().read_line(&mut end));
    let _gone = ended.await;
}
