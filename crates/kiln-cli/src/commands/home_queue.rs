//! The queue of this home: the controller that serves it, wherever it runs, and this command as a worker of its own.
//!
//! The first command of a home starts the controller in its own process; others use it over the private socket. When the process that has it
//! ends, however it ends, one of the others starts it again: everything that matters is in the home's database. A `kiln serve` of this home is
//! just a controller that stays.

mod alive;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_controller::api::{ApiConfig, JobView, ListenConfig, OutcomeView};
use kiln_controller::secret_stores::SecretStores;
use kiln_controller::server::{
    self, FolderLock, Running, ServeConfig, Sharing, StartError, Tls, socket_path,
};
use kiln_core::{FailureClass, JobId, JobRequest, Label, PoolName};
use kiln_db::Retention;
use kiln_proto::fleet::{AskOwn, Own};
use kiln_store::{HostRegistry, private_socket};
use kiln_telemetry::metrics::Prefix;
use kiln_telemetry::otlp::Tracer;
use kiln_worker::event::{Event, Events};
use kiln_worker::failure::Failure;
use kiln_worker::fleet::client::{Client, LinkError};
use kiln_worker::fleet::http::Target;
use kiln_worker::fleet::job::{JobEnd, Workshop};
use kiln_worker::fleet::local::LocalJob;
use kiln_worker::fleet::own::{OwnWorker, Waiting};
use kiln_worker::home::Home;
use kiln_worker::host::now_unix_ms;
use kiln_worker::registry::RegistryAccess;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Signal, getpid, kill_process};
use serde_json::Value;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;
use tokio::signal::unix::SignalKind;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::alive::Alive;
pub(super) use self::alive::bury;
use super::operator::{self, Operator};
use super::{serve, worker};
use crate::args::ServerArgs;
use crate::config::{Config, ControllerConfig};
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::server::{self as far, Server, words};

/// Longest wait for the controller of another process to answer, or to be gone.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(15);
/// Wait before it is tried again.
const ATTACH_AGAIN: Duration = Duration::from_millis(20);
/// A controller that has refused to make room for this long is one that stays.
const STAYS_AFTER: Duration = Duration::from_secs(1);
/// How long requests of others may take to end when this process does.
const STOP_PATIENCE: Duration = Duration::from_millis(200);
/// Longest wait for a collector that takes the last spans.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);
/// How long room that was made stays free for whom it was made.
const ROOM_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a process may still run after it was told to stop. The first process of a container does not stop at all.
const STOPS_WITHIN: Duration = Duration::from_secs(1);
/// How often a job that waits is asked why.
const WHY_EVERY: Duration = Duration::from_secs(2);

/// This home's controller, here or in another process.
#[derive(Debug)]
pub(crate) struct HomeQueue {
    registry: RegistryAccess,
    data: PathBuf,
    socket: PathBuf,
    stop: CancellationToken,
    keeper: JoinHandle<Option<Running>>,
}

impl HomeQueue {
    /// Uses the home's controller, or starts it.
    ///
    /// # Errors
    /// When there is none and none can be started.
    pub(crate) async fn open(home: &Home) -> Result<Self> {
        let registry = operator::registry(home).await?;
        let folder = home.controller();
        let socket = socket_path(&folder);
        let settings = Config::load(&home.config.join("kiln.toml"))?.controller;
        let keeper = Keeper {
            retention: settings.retention()?,
            secret_stores: settings.secret_stores()?,
            settings,
            folder,
            grants: home.config.join(kiln_policy::GRANT_FILE),
            registry: registry.host.clone(),
        };
        let first = keeper.attach().await?;
        let stop = CancellationToken::new();
        Ok(Self {
            registry,
            data: home.data.clone(),
            socket,
            keeper: tokio::spawn(keeper.keep(first, stop.clone())),
            stop,
        })
    }

    /// The home's registry.
    pub(crate) fn registry(&self) -> &RegistryAccess {
        &self.registry
    }

    /// The way to ask it.
    pub(crate) fn server(&self) -> Server {
        Server::of_home(self.socket.clone())
    }

    /// What a finished job of some command of this home was asked for.
    ///
    /// # Errors
    /// When there is no such job, or it is not over.
    pub(crate) async fn asked(&self, job: &JobId) -> Result<Own> {
        let nobody = "none".parse().or_infrastructure()?;
        let client = Client::new(Target::Socket(self.socket.clone()), nobody);
        let ask = AskOwn { job: job.clone() };
        let answer = client.call("/worker/v1/own-asked", None, &ask, ATTACH_TIMEOUT);
        answer.await.map_err(|error| worker::link(&error))
    }

    /// Hands in what machines of this home's own commands reached that stayed and are gone.
    pub(crate) async fn hand_in(&self) {
        hand_in(&self.data, self.socket.clone()).await;
    }

    /// Runs a job of this command's own to its end.
    ///
    /// # Errors
    /// When the controller refuses it.
    pub(crate) async fn run(
        &self,
        operator: &Operator,
        request: JobRequest,
        labels: BTreeMap<Label, Label>,
        local: LocalJob,
        events: &Events,
        cancel: &CancellationToken,
    ) -> Result<JobEnd> {
        let alive = Alive::new(&operator.home.controller())?;
        let name = alive.worker.clone();
        let target = Target::Socket(self.socket.clone());
        let registry = self.registry.clone();
        let shop = Arc::new(Workshop {
            tracer: worker::tracer(operator.config.controller.otlp())?,
            ..worker::workshop(operator, registry, target, name).await?
        });
        let tracer = shop.tracer.clone();
        let own = OwnWorker::join(shop, alive.worker.clone()).await;
        let own = own.map_err(|error| worker::link(&error))?;
        let local = LocalJob {
            cancel: Some(cancel.clone()),
            ..local
        };
        let ended = match own.submit(request, labels, local).await {
            Ok(waiting) => self.wait(waiting, events, cancel).await,
            Err(error) => Err(worker::own(&error)),
        };
        own.leave().await;
        flush(tracer).await;
        alive.over();
        ended
    }

    async fn wait(
        &self,
        mut waiting: Waiting,
        events: &Events,
        cancel: &CancellationToken,
    ) -> Result<JobEnd> {
        let server = self.server();
        let path = format!("/v1/jobs/{}", waiting.job());
        let mut asked = false;
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + WHY_EVERY, WHY_EVERY);
        loop {
            tokio::select! {
                ended = waiting.ended() => return Ok(ended.unwrap_or_else(JobEnd::failed)),
                () = cancel.cancelled(), if !asked => {
                    asked = true;
                    let reason = format!("{path}?reason=interrupted");
                    // A job that runs hears of it anyway: the queue is told so that its record says who asked.
                    let _said = server.delete::<Value>(&reason).await;
                }
                _ = look.tick(), if waiting.is_queued() => {}
            }
            if !waiting.is_queued() {
                continue;
            }
            let Ok(job) = server.get::<JobView>(&path).await else {
                continue;
            };
            match (
                job.line.state.as_str(),
                &job.line.outcome,
                &job.line.pending,
            ) {
                ("finished", Some(outcome), _) if waiting.is_queued() => {
                    return Ok(never_ran(outcome));
                }
                ("queued", _, Some(pending)) => {
                    let what = format!("waits: {}", words::waits(pending, now_unix_ms()));
                    let detail = String::new();
                    events.tell(Event::Progress { what, detail }).await;
                }
                _ => {}
            }
        }
    }

    /// Lets go of it. When it runs here, others of this home start it again.
    pub(crate) async fn close(self) {
        self.stop.cancel();
        if let Ok(Some(running)) = self.keeper.await {
            let tracer = running.controller.tracer.clone();
            running.stop_within(STOP_PATIENCE).await;
            flush(tracer).await;
        }
    }
}

/// The same where a controller of this home runs; none is started for it.
pub(super) async fn hand_in_if_there(home: &Home) {
    let socket = socket_path(&home.controller());
    if private_socket::connect(&socket).await.is_ok() {
        hand_in(&home.data, socket).await;
    }
}

async fn hand_in(data: &Path, socket: PathBuf) {
    let Ok(nobody) = "none".parse() else { return };
    let client = Client::new(Target::Socket(socket), nobody);
    let left = kiln_worker::kept::egress::hand_in(data, &client, None).await;
    if left > 0 {
        tracing::debug!(left, "records of machines are handed in later");
    }
}

/// Sends what a process has to say of its jobs before it ends.
async fn flush(tracer: Tracer) {
    if tracer.is_on() {
        let flushed = tokio::task::spawn_blocking(move || tracer.flush(FLUSH_TIMEOUT));
        let _is_dropped_then = flushed.await;
    }
}

/// Whom a verb about jobs, queues, tenants, tokens or workers asks.
#[derive(Debug)]
pub(crate) struct Asked {
    /// Who answers.
    pub(crate) server: Server,
    queue: Option<HomeQueue>,
}

impl Asked {
    /// This home's queue, when no server was named.
    pub(crate) fn of_home(&self) -> Option<&HomeQueue> {
        self.queue.as_ref()
    }

    /// To be called when nothing more is asked.
    pub(crate) async fn done(self) {
        if let Some(queue) = self.queue {
            queue.close().await;
        }
    }
}

/// The server that somebody named, else this home's controller, started for as long as this command runs when it runs nowhere.
///
/// # Errors
/// When what they named cannot be used, or no controller can be started.
pub(crate) async fn ask(said: &ServerArgs) -> Result<Asked> {
    if let Some(server) = far::configured(said)? {
        return Ok(Asked {
            server,
            queue: None,
        });
    }
    let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
    let queue = HomeQueue::open(&home).await?;
    Ok(Asked {
        server: queue.server(),
        queue: Some(queue),
    })
}

/// File that is locked while a controller that stays waits for its folder.
const WANTED: &str = "controller.wanted";

/// Whether a controller that stays waits for the folder: no command begins one then.
fn is_wanted(folder: &Path) -> bool {
    File::open(folder.join(WANTED))
        .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_err())
}

/// Takes a home's controller folder for a controller that stays: a command that has it makes room, and no other takes it meanwhile.
///
/// # Errors
/// When another controller that stays has it.
pub(super) async fn make_room(folder: &Path) -> Result<FolderLock> {
    if let Ok(locked) = server::lock(folder) {
        return Ok(locked);
    }
    let wanted = File::create(folder.join(WANTED)).or_infrastructure()?;
    // Two that wait at once: both see that the folder is taken in the end.
    let _wanted = flock(&wanted, FlockOperation::NonBlockingLockExclusive);
    let end = tokio::time::Instant::now() + ATTACH_TIMEOUT;
    let mut refused_until = None;
    let nobody = "none".parse().or_infrastructure()?;
    let holder = Client::new(Target::Socket(socket_path(folder)), nobody);
    loop {
        let taken = match server::lock(folder) {
            Err(taken @ StartError::Taken(_)) => taken,
            locked => return locked.map_err(|error| serve::refused(&error)),
        };
        let way = "/worker/v1/give-way";
        let asked = holder.call::<_, Value>(way, None, &Value::Null, ATTACH_TIMEOUT);
        if let Err(LinkError::Refused { .. }) = asked.await {
            // That of a command listens a moment before it is ready to make room.
            let until = tokio::time::Instant::now() + STAYS_AFTER;
            if tokio::time::Instant::now() >= *refused_until.get_or_insert(until) {
                return Err(serve::refused(&taken));
            }
        }
        // It makes room, or it ends or starts just now.
        if tokio::time::Instant::now() > end {
            return Err(serve::refused(&taken));
        }
        tokio::time::sleep(ATTACH_AGAIN).await;
    }
}

/// Whether this home ever had a queue.
///
/// # Errors
/// When there is no home to ask for.
pub(crate) fn is_untouched() -> Result<bool> {
    let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
    Ok(!home.controller().is_dir())
}

/// The end of a job that was over before it began.
fn never_ran(outcome: &OutcomeView) -> JobEnd {
    let class = outcome.class.clone().map(Value::String);
    let class = class.and_then(|class| serde_json::from_value(class).ok());
    let message = outcome.message.clone();
    let failure = Failure::new(
        class.unwrap_or(FailureClass::Infrastructure),
        message.unwrap_or_else(|| "the job ended elsewhere".to_owned()),
    );
    JobEnd::failed(match outcome.hint.clone() {
        Some(hint) => failure.hint(hint),
        None => failure,
    })
}

/// A signal that a shell sends to its jobs.
struct JobSignal(Option<tokio::signal::unix::Signal>);

impl JobSignal {
    /// The user's wish to suspend this command (Ctrl-Z). The controller is let go before: a suspended one would answer nobody.
    fn suspend() -> Self {
        Self::listen(Signal::TSTP)
    }

    /// Somebody let a suspended command go on.
    fn go_on() -> Self {
        Self::listen(Signal::CONT)
    }

    fn listen(signal: Signal) -> Self {
        let kind = SignalKind::from_raw(signal.as_raw());
        // Without it the system suspends as it always did.
        Self(tokio::signal::unix::signal(kind).ok())
    }

    async fn came(&mut self) {
        match &mut self.0 {
            Some(signal) => {
                signal.recv().await;
            }
            None => std::future::pending().await,
        }
    }
}

/// Sees to it that the home has a controller as long as this process lives.
#[derive(Debug)]
struct Keeper {
    folder: PathBuf,
    settings: ControllerConfig,
    retention: Retention,
    secret_stores: SecretStores,
    /// The operator's.
    grants: PathBuf,
    registry: HostRegistry,
}

/// Whose controller it is.
enum Which {
    Ours(Box<Running>),
    /// Another process's; the connection ends with it.
    Theirs(UnixStream),
}

impl Keeper {
    /// One controller that answers.
    async fn attach(&self) -> Result<Which> {
        let socket = socket_path(&self.folder);
        let end = tokio::time::Instant::now() + ATTACH_TIMEOUT;
        loop {
            if let Ok(stream) = private_socket::connect(&socket).await {
                return Ok(Which::Theirs(stream));
            }
            if is_wanted(&self.folder) {
                // A controller that stays is about to come.
                tokio::time::sleep(ATTACH_AGAIN).await;
                continue;
            }
            match server::start(self.config()).await {
                Ok(running) => {
                    alive::bury_once(&self.folder, &running.controller.db).await;
                    return Ok(Which::Ours(Box::new(running)));
                }
                // It starts just now, or it stops.
                Err(StartError::Taken(_)) if tokio::time::Instant::now() < end => {
                    tokio::time::sleep(ATTACH_AGAIN).await;
                }
                Err(error) => return Err(serve::refused(&error)),
            }
        }
    }

    async fn keep(self, mut which: Which, stop: CancellationToken) -> Option<Running> {
        let mut wish = JobSignal::suspend();
        loop {
            match which {
                Which::Ours(running) => {
                    let asked = running.controller.give_way();
                    let db = running.controller.db.clone();
                    let suspended = tokio::select! {
                        () = stop.cancelled() => return Some(*running),
                        never = bury(&self.folder, &db) => match never {},
                        () = asked.cancelled() => false,
                        () = wish.came() => true,
                    };
                    running.stop_within(STOP_PATIENCE).await;
                    match suspended {
                        true => self.suspend().await,
                        false => self.let_in(&stop).await,
                    }
                }
                Which::Theirs(mut stream) => {
                    let mut nothing = [0; 1];
                    tokio::select! {
                        // It says nothing unless asked: whatever comes is the connection's end.
                        _ended = stream.read(&mut nothing) => {}
                        () = wish.came() => self.suspend().await,
                        () = stop.cancelled() => return None,
                    }
                }
            }
            which = loop {
                tokio::select! {
                    attached = self.attach() => match attached {
                        Ok(next) => break next,
                        Err(error) => tracing::warn!(%error, "this home has no controller now"),
                    },
                    () = stop.cancelled() => return None,
                }
                tokio::time::sleep(ATTACH_AGAIN).await;
            };
        }
    }

    /// Suspends this process until somebody lets it go on. Nobody waits meanwhile for what it owned.
    async fn suspend(&self) {
        self.registry.step_down().await;
        let mut goes_on = JobSignal::go_on();
        let _cannot = kill_process(getpid(), Signal::STOP);
        // The kernel tells another thread to stop all of them: this one may run for a moment, and must take nothing then.
        let _first_process_of_a_container =
            tokio::time::timeout(STOPS_WITHIN, goes_on.came()).await;
    }

    /// Waits for the one that room was made for.
    async fn let_in(&self, stop: &CancellationToken) {
        let socket = socket_path(&self.folder);
        let comes = async {
            while private_socket::connect(&socket).await.is_err() {
                tokio::time::sleep(ATTACH_AGAIN).await;
            }
        };
        tokio::select! {
            _came = tokio::time::timeout(ROOM_TIMEOUT, comes) => {}
            () = stop.cancelled() => {}
        }
    }

    fn config(&self) -> ServeConfig {
        ServeConfig {
            folder: self.folder.clone(),
            database: None,
            sharing: Sharing::default(),
            listen: Vec::new(),
            tls: Tls::Plain,
            sockets: ListenConfig::default(),
            api: ApiConfig {
                secret_stores: self.secret_stores.clone(),
                grants: Some(self.grants.clone()),
                ..ApiConfig::default()
            },
            issuer: "kiln".to_owned(),
            trusted: Vec::new(),
            registry: self.registry.clone(),
            registry_address: None,
            pool: PoolName::default_pool(),
            metrics: None,
            otlp: self.settings.otlp().map(str::to_owned),
            encrypt_logs: self.settings.encrypt_logs,
            prefix: Prefix::default(),
            receivers: self.settings.receivers(),
            retention: self.retention,
            generation: kiln_proto::fleet::GENERATION,
        }
    }
}
