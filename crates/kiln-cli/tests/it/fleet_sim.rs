//! A controller and workers of the real code in this process: real leases, real TLS, simulated machines. No baked home is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_controller::api::{ApiConfig, ListenConfig};
use kiln_controller::server::{Running, ServeConfig, Tls, start_with};
use kiln_controller::webhooks::ReceiverPolicy;
use kiln_core::dispatch::{Room, WorkerFacts};
use kiln_core::job::{Limits, RunCommand, TrustClass};
use kiln_core::machine::BootSource;
use kiln_core::network::SpecialRange;
use kiln_core::{
    ByteSize, Digest, Dispatch, JobId, JobKind, JobRequest, JobState, NetworkPolicy, PoolName,
    TenantName, Verdict, WorkerId,
};
use kiln_db::{LeaseTimes, NewJob, OpenOptions, Retention};
use kiln_image::heads::HeadStore;
use kiln_machine::driver::BoxFuture;
use kiln_machine::ledger::{Capacity, Ledger};
use kiln_machine::sim::{ExecCall, ExecEnd, Script, SimConfig, SimDriver};
use kiln_machine::template::TemplateStore;
use kiln_network::gateway::HostFloor;
use kiln_proto::fleet::{GENERATION, Heartbeat, HeartbeatAnswer, Join, Joined};
use kiln_store::HostRegistry;
use kiln_store::host::HostConfig;
use kiln_store::registry::LeaseTable;
use kiln_telemetry::metrics::Prefix;
use kiln_worker::fleet::client::Client;
use kiln_worker::fleet::daemon::{self, Offer};
use kiln_worker::fleet::http::Target;
use kiln_worker::fleet::job::Workshop;
use kiln_worker::fleet::local::LocalJobs;
use kiln_worker::home::Home;
use kiln_worker::host::{Host, steady_unix_ms};
use kiln_worker::image::CurrentImage;
use kiln_worker::registry::RegistryAccess;
use kiln_worker::site::Site;
use tokio_util::sync::CancellationToken;

/// Longest wait for anything here.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// Longest wait for a short answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(10);
/// Short leases; a heartbeat comes every 5 s.
pub(crate) const LEASE: LeaseTimes = LeaseTimes {
    ttl_ms: 8_000,
    grace_ms: 2_000,
};

/// One command that ran in some machine.
#[derive(Clone, Debug)]
pub(crate) struct Ran {
    pub(crate) job: String,
    pub(crate) worker: String,
    pub(crate) began: Instant,
    /// When it ended, or its machine was destroyed.
    pub(crate) ended: Option<Instant>,
}

/// Everything that ran, on all workers of a test.
#[derive(Default, Debug)]
pub(crate) struct Ledgered(Mutex<Vec<Ran>>);

impl Ledgered {
    pub(crate) fn all(&self) -> Vec<Ran> {
        self.0.lock().expect("lock").clone()
    }

    /// Pairs of commands of one job that ran at the same time.
    pub(crate) fn twice(&self) -> usize {
        let all = self.all();
        let overlap = |one: &Ran, other: &Ran| {
            one.job == other.job
                && one.began <= other.began
                && one.ended.is_none_or(|ended| ended > other.began)
        };
        let pairs = all.iter().enumerate().flat_map(|(n, one)| {
            let others = all.iter().skip(n + 1);
            others.map(move |other| (one, other))
        });
        pairs
            .filter(|(one, other)| overlap(one, other) || overlap(other, one))
            .count()
    }
}

/// Notes the end of a command, also when its machine is destroyed under it.
struct Ends(Arc<Ledgered>, usize);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.0.lock().expect("lock")[self.1].ended = Some(Instant::now());
    }
}

/// How long `work JOB` takes on a worker; may change while it works.
pub(crate) type Pace = Arc<Mutex<Duration>>;

fn script(worker: &str, ledger: &Arc<Ledgered>, pace: &Pace) -> Script {
    let (worker, ledger, pace) = (worker.to_owned(), Arc::clone(ledger), Arc::clone(pace));
    let script = Script::default().on(&["ask"], crate::policy_cases::ask);
    script.on(
        &["work"],
        move |call: &mut ExecCall| -> BoxFuture<'_, ExecEnd> {
            let ran = Ran {
                job: call.request.argv[1].clone(),
                worker: worker.clone(),
                began: Instant::now(),
                ended: None,
            };
            let (ledger, pace) = (Arc::clone(&ledger), *pace.lock().expect("lock"));
            Box::pin(async move {
                let number = {
                    let mut all = ledger.0.lock().expect("lock");
                    all.push(ran);
                    all.len() - 1
                };
                let _ends = Ends(ledger, number);
                tokio::time::sleep(pace).await;
                ExecEnd::Code(0)
            })
        },
    )
}

/// A controller below `folder`.
pub(crate) async fn controller(
    folder: &Path,
    listen: Vec<SocketAddr>,
    names: Vec<String>,
    lease: LeaseTimes,
) -> Running {
    controller_with(folder, listen, names, lease, ApiConfig::default()).await
}

/// As [`controller`], with these bounds.
pub(crate) async fn controller_with(
    folder: &Path,
    listen: Vec<SocketAddr>,
    names: Vec<String>,
    lease: LeaseTimes,
    api: ApiConfig,
) -> Running {
    let registry = folder.join("registry");
    std::fs::create_dir_all(&registry).expect("folder");
    let registry = HostRegistry::open_or_attach(&registry, HostConfig::default()).await;
    let config = ServeConfig {
        folder: folder.join("controller"),
        database: None,
        sharing: kiln_controller::server::Sharing::default(),
        listen,
        tls: Tls::Own(names),
        sockets: ListenConfig::default(),
        api,
        issuer: "kiln".to_owned(),
        trusted: Vec::new(),
        registry: registry.expect("registry"),
        registry_address: None,
        pool: PoolName::default_pool(),
        metrics: None,
        otlp: None,
        encrypt_logs: false,
        prefix: Prefix::default(),
        receivers: ReceiverPolicy::default(),
        retention: Retention::default(),
        generation: GENERATION,
    };
    let options = OpenOptions {
        lease,
        ..OpenOptions::default()
    };
    start_with(config, options).await.expect("starts")
}

/// How machines of a worker behave.
pub(crate) fn machines_of(name: &str, ledger: &Arc<Ledgered>, pace: &Pace) -> SimConfig {
    let mut config = SimConfig {
        script: script(name, ledger, pace),
        stand_in: true,
        ..SimConfig::default()
    };
    config.capabilities.templates = false;
    config
}

/// A host below `folder`, with simulated machines.
pub(crate) async fn workshop(
    folder: &Path,
    name: &str,
    target: Target,
    ledger: &Arc<Ledgered>,
    pace: &Pace,
) -> Workshop {
    let worker: WorkerId = name.parse().expect("a name");
    let home = Home::below(folder);
    home.prepare().expect("home");
    for file in ["kernel", "initrd", "root.img"] {
        std::fs::write(folder.join(file), "a disk with nothing on it").expect("write");
    }
    let config = machines_of(name, ledger, pace);
    let registry = HostRegistry::open_or_attach(&home.registry(), HostConfig::default()).await;
    let spool: PathBuf = home.cache.join("spool");
    std::fs::create_dir_all(&spool).expect("folder");
    let host = Host {
        driver: Arc::new(SimDriver::new(&home.data, config)),
        image: CurrentImage {
            name: "ci-0000000000000000".to_owned(),
            dir: folder.to_owned(),
            boot: BootSource {
                kernel: folder.join("kernel"),
                initrd: folder.join("initrd"),
                args: Vec::new(),
                image: Digest::of(b"image"),
            },
            root: folder.join("root.img"),
            kernel_release: "6.0".to_owned(),
            buildkit: "v0".to_owned(),
        },
        templates: TemplateStore::open(&home.data.join("templates")).expect("templates"),
        heads: HeadStore::open(&home.heads()).expect("heads"),
        ledger: Ledger::new(
            &home.data,
            Capacity::of_host(10_000, ByteSize(0)).expect("host"),
        ),
        leases: Arc::new(LeaseTable::new(steady_unix_ms)),
        worker: "local".parse().expect("a name"),
        home,
    };
    Workshop {
        host,
        registry: RegistryAccess {
            host: registry.expect("a registry"),
        },
        site: Site {
            bases: kiln_image::bases::Bases::default(),
            registries: None,
            proxy: kiln_network::gateway::proxy::ProxyConfig::default(),
            ca_bundle: None,
        },
        client: Client::new(target, worker),
        local: LocalJobs::default(),
        spool,
        tracer: kiln_telemetry::otlp::Tracer::off(),
        authority: None,
        // A simulated machine ends with its process.
        watch: |_| Ok(Box::new(())),
    }
}

/// What a worker with room for so many machines says of itself.
pub(crate) fn facts(machines: u32) -> WorkerFacts {
    WorkerFacts {
        arch: "amd64".parse().expect("label"),
        runtimes: BTreeSet::new(),
        capacity: Room {
            cpus: machines,
            memory: ByteSize::gib(u64::from(machines)),
            disk: ByteSize::gib(20 * u64::from(machines)),
            machines,
        },
        version: "1".to_owned(),
        generation: kiln_core::dispatch::POLICY_GENERATION,
        warm: BTreeSet::new(),
        whole_cpus: None,
    }
}

/// A job that runs `work ID`.
pub(crate) fn job(id: &str) -> NewJob {
    let id: JobId = id.parse().expect("an id");
    let run = RunCommand {
        argv: vec!["work".to_owned(), id.to_string()],
        ..RunCommand::default()
    };
    NewJob {
        request: JobRequest {
            id,
            tenant: TenantName::local(),
            kind: JobKind::Run(Box::new(run)),
            network: NetworkPolicy::Isolated,
            limits: Limits {
                cpus: 1,
                memory: ByteSize::mib(512),
                disk: ByteSize::gib(1),
                timeout_ms: 300_000,
            },
            trust: TrustClass::Untrusted,
            network_bits: None,
            dispatch: Dispatch {
                attempts_max: 10,
                ..Dispatch::default()
            },
            traceparent: None,
            policy: None,
        },
        idempotency: None,
        submitted_by: "user:tester".to_owned(),
        notify_url: None,
        labels: BTreeMap::new(),
    }
}

/// Machines that lie in a home.
pub(crate) fn machines(home: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(home.join("machines"));
    let names = entries.into_iter().flatten().flatten();
    names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name != ".lock")
        .collect()
}

/// Joins and works beside the controller, over its private socket, until `stop`.
pub(crate) async fn work_near(shop: Workshop, name: &str, machines: u32, stop: CancellationToken) {
    let join = Join {
        worker: name.parse().expect("a name"),
        token: String::new(),
        csr: String::new(),
        labels: BTreeMap::new(),
        facts: facts(machines),
    };
    let joined = shop
        .client
        .call::<_, Joined>("/worker/v1/join", None, &join, ANSWER);
    joined.await.expect("joins");
    let offer = Offer {
        facts: facts(machines),
        takes_jobs: true,
        own: false,
    };
    tokio::spawn(daemon::serve(Arc::new(shop), offer, stop));
}

/// What one worker tells of its interfaces reaches the floor under every gateway of another one's process.
#[tokio::test(flavor = "multi_thread")]
async fn a_workers_addresses_are_below_the_floor_of_every_other_worker() {
    let (folder, home) = (
        tempfile::tempdir().expect("folder"),
        tempfile::tempdir().expect("folder"),
    );
    let running = controller(folder.path(), Vec::new(), Vec::new(), LEASE).await;
    let target = || Target::Socket(running.socket.clone());
    let place = "9.9.9.11".parse().expect("an address");
    let floor = HostFloor::new(Vec::new());
    let found = async || floor.check("a.example.org", &[place], ANSWER).await[0].1;
    assert_eq!(found().await, Ok(()), "public, and nobody's yet");

    let told = Client::new(target(), "w2".parse().expect("a name"));
    let join = Join {
        worker: "w2".parse().expect("a name"),
        token: String::new(),
        csr: String::new(),
        labels: BTreeMap::new(),
        facts: facts(1),
    };
    let joined = told.call::<_, Joined>("/worker/v1/join", None, &join, ANSWER);
    joined.await.expect("joins");
    let beat = Heartbeat {
        facts: facts(1),
        held: Vec::new(),
        draining: false,
        orphans: 0,
        kept: Vec::new(),
        addresses: vec![place],
    };
    let answer = told.call::<_, HeartbeatAnswer>("/worker/v1/heartbeat", None, &beat, ANSWER);
    let own = answer.await.expect("answers").own;
    assert!(own.contains(&place.to_string()), "{own:?}");

    let (ledger, pace, stop) = (Arc::default(), Pace::default(), CancellationToken::new());
    let shop = workshop(home.path(), "w1", target(), &ledger, &pace).await;
    work_near(shop, "w1", 1, stop.clone()).await;
    let deadline = Instant::now() + PATIENCE;
    while found().await != Err(SpecialRange::Own) {
        assert!(
            Instant::now() < deadline,
            "the heartbeat's answer reaches the floor"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    stop.cancel();
    running.stop().await;
}

/// Waits for a state that nobody announces.
pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until all jobs are over.
pub(crate) async fn all_over(running: &Running, jobs: &[JobId]) {
    let deadline = Instant::now() + PATIENCE;
    for id in jobs {
        loop {
            let job = running
                .controller
                .db
                .job(id)
                .await
                .expect("reads")
                .expect("is there");
            if job.state.is_terminal() {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "{id} is not over: {:?}",
                job.reason
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Jobs lost, jobs that ended other than once, leases and rooms that nobody uses.
pub(crate) async fn count(running: &Running, jobs: &[JobId]) -> [usize; 3] {
    let db = &running.controller.db;
    let (mut lost, mut twice) = (0, 0);
    for id in jobs {
        let job = db.job(id).await.expect("reads").expect("is there");
        let passed = matches!(&job.state, JobState::Finished { outcome } if outcome.verdict == Verdict::Passed);
        lost += usize::from(!passed);
        let events = db.events_after(id, 0, 500).await.expect("reads");
        let ends = events
            .iter()
            .filter(|event| event.kind == "finished")
            .count();
        twice += usize::from(ends != 1);
    }
    let pool = kiln_core::PoolName::default_pool();
    let rows = db.pool_view(&pool, 100).await.expect("reads");
    [lost, twice, rows.held.len()]
}
