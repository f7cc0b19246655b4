//! A command in a fresh machine: in the machine image itself, or under runc in a container image, which the base of a runtime is, too.

mod command;
mod forward;
mod inside;
mod overrun;
mod serve;
mod shown;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_core::job::RunPhase;
use kiln_core::network::{NetworkPolicy, RangeException};
use kiln_core::{Digest, FailureClass, JobRequest, Lease, MachineName};
use kiln_network::gateway::proxy::ProxyConfig;
use kiln_network::gateway::{Gateway, Services as KilnNames};
use kiln_network::record::{EgressLog, EgressSummary};
use kiln_network::{GitUpstreams, Learned};
use kiln_proto::msg::{ContainerSpec, Exit, TtySize};
use tokio::io::AsyncRead;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::attempt::{Attempt, Wanted};
use crate::attend::door::Attend;
use crate::collect::Collected;
use crate::connections::Bounds;
use crate::event::Events;
use crate::failure::Failure;
use crate::fleet::mask::Mask;
use crate::given::Given;
use crate::host::Host;
use crate::joblog::JobLog;
use crate::kept::{self, Handover, Keep};
use crate::measured::Measured;
use crate::orders::{self, Control};
use crate::phases::Phases;
use crate::run_files::RunFiles;
use crate::run_secrets::RunSecrets;
use crate::templates::Purpose;
use crate::unpack::Unpacked;

pub use command::{INTERRUPT_GRACE, Place, start_failure};
pub use forward::FORWARDS_MAX;
pub(crate) use forward::connect;
pub use inside::STOPPED_COLLECT_TIMEOUT;
pub use serve::ServiceInput;

/// How long everything but the command may take where the machine stays, or files of it are kept.
const AFTER_GRACE: Duration = Duration::from_secs(30);

/// Everything a run needs beyond its request.
pub struct RunInput {
    /// The request.
    pub request: JobRequest,
    /// The unpacked image and how to start it; `None` runs in the machine image.
    pub image: Option<(Unpacked, ContainerSpec)>,
    /// Standard input, if connected.
    pub stdin: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Size of the terminal, if the command gets one.
    pub tty: Option<TtySize>,
    /// Gets output in order: stream (1 or 2) and bytes.
    pub output: mpsc::Sender<(u8, Vec<u8>)>,
    /// Signals and window sizes for the command.
    pub control: mpsc::Receiver<Control>,
    /// Ports already bound on the host, each with its guest port.
    pub listeners: Vec<(TcpListener, u16)>,
    /// The operator's CA bundle.
    pub ca_bundle: Option<Vec<u8>>,
    /// The operator's exceptions.
    pub exceptions: Vec<RangeException>,
    /// The host's HTTP proxy.
    pub proxy: ProxyConfig,
    /// What its git gateway has of the host; none: it has no git gateway.
    pub git: Option<Arc<GitUpstreams>>,
    /// The log that is kept.
    pub log: Arc<JobLog>,
    /// Secrets that neither the log nor `output` gets.
    pub mask: Mask,
    /// An empty folder for the files that the request wants kept; without one none is.
    pub artifacts: Option<PathBuf>,
    /// That the machine stays when the command is over.
    pub keep: Option<Keep>,
    /// Secrets of the command.
    pub secrets: RunSecrets,
    /// What it works on.
    pub files: Option<RunFiles>,
    /// What is done before the command, each with its secrets.
    pub phases: Vec<(RunPhase, RunSecrets)>,
    /// What runs beside it.
    pub services: Vec<ServiceInput>,
    /// Files of which its machine is made.
    pub given: Given,
    /// Somebody attends it, who brings standard input, terminal and what else is its own above.
    pub attend: Option<Attend>,
}

impl std::fmt::Debug for RunInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunInput")
            .field("request", &self.request)
            .finish_non_exhaustive()
    }
}

/// How a run ended.
#[derive(Debug)]
pub struct RunEnd {
    /// How the command ended, or why it did not run.
    pub result: Result<Exit, Failure>,
    /// Milliseconds of each phase.
    pub phases_ms: Vec<(String, u64)>,
    /// What the gateway decided.
    pub egress: EgressSummary,
    /// What it reached, as an allowlist says it, where its policy is open.
    pub learned: Vec<Learned>,
    /// Files that were kept.
    pub artifacts: Vec<Collected>,
    /// What the host measured.
    pub measured: Measured,
    /// The machine, when it stays; see [`Attempt::let_go`].
    pub kept: Option<Handover>,
    /// Digest of the files that were sent.
    pub source: Option<Digest>,
}

/// What there is to tell of a run beside its result, as far as it came.
struct Told {
    phases: Phases,
    artifacts: Vec<Collected>,
    measured: Measured,
    /// The machine, when it stays.
    kept: Option<Handover>,
    /// Digest of the files that were sent.
    source: Option<Digest>,
}

/// As a shell has it: 128 and the signal's number.
#[must_use]
pub fn exit_code(exit: &Exit) -> i32 {
    match (exit.code, exit.signal) {
        (Some(code), _) => code & 0xff,
        (None, Some(signal)) => 128 + (signal & 0x7f),
        (None, None) => 1,
    }
}

/// How a command ended, for a person.
#[must_use]
pub fn ending(exit: &Exit) -> String {
    match (exit.code, exit.signal) {
        (Some(code), _) => format!("the command ended with exit code {code}"),
        (None, Some(signal)) => format!("the command was ended by signal {signal}"),
        (None, None) => "the command ended".to_owned(),
    }
}

/// Runs one command. The lease must be live; it is ended here.
pub async fn run(
    host: &Host,
    input: RunInput,
    lease: Lease,
    events: &Events,
    cancel: &CancellationToken,
) -> RunEnd {
    let mut told = Told {
        phases: Phases::new(events.clone()),
        artifacts: Vec::new(),
        measured: Measured::default(),
        kept: None,
        source: None,
    };
    let egress = Arc::new(EgressLog::new());
    let limit = Duration::from_millis(input.request.limits.timeout_ms);
    let limit = Limit {
        whole: limit,
        // None: longer than any clock counts.
        end: tokio::time::Instant::now().checked_add(limit),
    };
    let open = input.request.network == NetworkPolicy::Open;
    // A machine that stays outlives a command whose time was up; files are read after it.
    let goes_on = input.keep.is_some() || input.artifacts.is_some();
    let grace = if goes_on { AFTER_GRACE } else { Duration::ZERO };
    let work = work(
        host,
        input,
        &lease,
        (Arc::clone(&egress), limit),
        events,
        cancel,
        &mut told,
    );
    let result = match tokio::time::timeout(limit.whole.saturating_add(grace), work).await {
        Ok(result) => result,
        Err(_) => Err(limit.over()),
    };
    host.leases.end(&lease.attempt);
    let record = egress.snapshot();
    let learned = match open {
        true => kiln_network::flows::learned(&record.events),
        false => Vec::new(),
    };
    let egress = record.summary();
    let phases_ms = told.phases.finish();
    let mut measured = told.measured;
    measured.finish(&phases_ms, &egress);
    if let Ok(exit) = &result {
        measured.command_memory_peak = Some(exit.memory_peak).filter(|peak| *peak > 0);
    }
    RunEnd {
        result,
        phases_ms,
        egress,
        learned,
        artifacts: told.artifacts,
        measured,
        kept: told.kept,
        source: told.source,
    }
}

/// How long a command may take.
#[derive(Clone, Copy, Debug)]
struct Limit {
    whole: Duration,
    end: Option<tokio::time::Instant>,
}

impl Limit {
    fn over(self) -> Failure {
        let message = format!("the command took longer than {:?}", self.whole);
        Failure::new(FailureClass::Timeout, message).hint("give it more with --timeout")
    }

    /// Does something for as long as there is time and nobody asked for the end.
    async fn unless_stopped<T>(
        self,
        cancel: &CancellationToken,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        tokio::select! {
            done = work => done,
            () = cancel.cancelled() => Err(Failure::cancelled()),
            () = self.passed() => Err(self.over()),
        }
    }

    /// Completes when it is over.
    async fn passed(self) {
        match self.end {
            Some(end) => tokio::time::sleep_until(end).await,
            None => std::future::pending().await,
        }
    }
}

async fn work(
    host: &Host,
    mut input: RunInput,
    lease: &Lease,
    (egress, limit): (Arc<EgressLog>, Limit),
    events: &Events,
    cancel: &CancellationToken,
    told: &mut Told,
) -> Result<Exit, Failure> {
    told.phases.begin("queue").await;
    let limits = input.request.limits;
    let memory = crate::templates::size_class(limits.memory);
    let ticket = tokio::select! {
        ticket = host.admit_for(&input.request, memory, events) => ticket?,
        () = cancel.cancelled() => return Err(Failure::cancelled()),
    };
    told.phases.begin("machine").await;
    let given = Arc::new(std::mem::take(&mut input.given));
    let boot = given.boot(host, events).await?;
    let name = lease
        .attempt
        .machine_name("run")
        .map_err(|error| Failure::infrastructure(&error))?;
    let wanted = Wanted {
        name,
        cpus: limits.cpus,
        memory: limits.memory,
        purpose: boot.as_ref().map_or(Purpose::Run, Purpose::Given),
        make_template: true,
        may_stay: input.keep.is_some(),
        disk_bytes_per_second: input.request.disk_bytes_per_second(),
    };
    let stays = input.keep;
    let mut handover = stays.and_then(|keep| handover(&input, keep, wanted.name.clone()));
    let secret_files = input.all_secrets().flat_map(RunSecrets::files).collect();
    let since = Instant::now();
    // Each phase, the command's own as well, is entered when it begins.
    let (witness, seen) = (input.log.witness().clone(), Arc::clone(&egress));
    let bounds = Bounds::of(&input.request);
    let mut config = bounds.gateway(NetworkPolicy::Isolated, &egress);
    config.exceptions.clone_from(&input.exceptions);
    config.proxy = input.proxy.clone();
    config.git.clone_from(&input.git);
    config.services = KilnNames::default();
    let gateway = Gateway::new(config);
    told.measured.policy(input.request.policy.as_ref(), since);
    let attempt = tokio::select! {
        attempt = Attempt::start(host, wanted, ticket, gateway, events) => attempt?,
        () = cancel.cancelled() => return Err(Failure::cancelled()),
    };
    bounds.allow(&attempt.session, events).await;
    witness.has(&attempt.machine, &seen);
    let ran = (events, &mut *told, &mut handover);
    let result = inside::in_machine(&attempt, input, lease, (cancel, limit), ran).await;
    let result = match result {
        Err(failure) => Err(attempt.explain(failure).await),
        // Else nobody knows what the command saw.
        ended => given.unchanged().and(ended),
    };
    let stays = stays.filter(|keep| remains(*keep, &result));
    let Some(mut handover) = handover.filter(|_| stays.is_some()) else {
        attempt.destroy_measured(events, &mut told.measured).await;
        return result;
    };
    told.phases.begin("handover").await;
    handover.ended = match &result {
        Ok(exit) => ending(exit),
        Err(failure) => failure.message.clone(),
    };
    handover.exit_code = match &result {
        Ok(exit) => Some(exit_code(exit)),
        Err(failure) => failure.command_code,
    };
    let_go(attempt, handover, secret_files, events, told).await;
    result
}

/// Lets a machine stay, without what its commands were given.
async fn let_go(
    attempt: Attempt,
    mut handover: Handover,
    secret_files: Vec<String>,
    events: &Events,
    told: &mut Told,
) {
    // Whoever keeps the machine has a gateway of its own: what a secret narrowed stays so.
    handover.network = attempt.services.gateway().at_most(&handover.network);
    let gone = inside::take_out(&attempt, secret_files, &handover).await;
    if let Err(Failure { message, .. }) = gone {
        let text = format!("the machine does not stay: its secrets stayed in it: {message}");
        events.warn(text).await;
        attempt.destroy_measured(events, &mut told.measured).await;
        return;
    }
    attempt.measure(&mut told.measured).await;
    match attempt.let_go() {
        Ok(()) => told.kept = Some(handover),
        Err(error) => {
            let why = orders::chain(&error);
            events
                .warn(format!("the machine does not stay: {why}"))
                .await;
        }
    }
}

impl RunInput {
    /// Those of its phases and of its command.
    fn all_secrets(&self) -> impl Iterator<Item = &RunSecrets> {
        let phases = self.phases.iter().map(|(_, secrets)| secrets);
        phases.chain([&self.secrets])
    }
}

/// Whether a machine stays after this. One that does not work, and one whose user wants an end, do not.
fn remains(keep: Keep, result: &Result<Exit, Failure>) -> bool {
    match result {
        Ok(exit) => !keep.on_failure_only || exit.code != Some(0),
        Err(failure) => matches!(
            failure.class,
            FailureClass::User | FailureClass::Timeout | FailureClass::OutOfMemory
        ),
    }
}

fn handover(input: &RunInput, keep: Keep, machine: MachineName) -> Option<Handover> {
    let request = &input.request;
    let names = input
        .all_secrets()
        .flat_map(|one| one.env().keys().cloned());
    let kiln_core::JobKind::Run(command) = &request.kind else {
        return None;
    };
    Some(Handover {
        schema: kept::SCHEMA,
        machine,
        job: request.id.clone(),
        tenant: request.tenant.clone(),
        image: command.image.clone(),
        command: command.argv.clone(),
        ended: String::new(),
        exit_code: None,
        cpus: request.limits.cpus,
        memory: crate::templates::size_class(request.limits.memory),
        network: request.network.clone(),
        bytes_out_and_in_per_second: request.bytes_out_and_in_per_second(),
        connections_max: request
            .policy
            .as_ref()
            .and_then(|policy| policy.connections_max),
        runc: None,
        cwd: None,
        secret_env: names.collect(),
        had_secrets: input.all_secrets().any(|one| !one.is_empty()),
        stays_ms: u64::try_from(keep.stays.as_millis()).unwrap_or(u64::MAX),
        worker: None,
    })
}
