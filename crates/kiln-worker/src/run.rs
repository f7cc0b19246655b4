//! A command in a fresh machine: in the machine image itself, or in a container image under runc.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_core::machine::{DiskAccess, DiskFormat};
use kiln_core::network::RangeException;
use kiln_core::{ByteSize, DiskRole, DiskSlot, FailureClass, JobRequest, Lease, MachineName};
use kiln_network::gateway::proxy::ProxyConfig;
use kiln_network::gateway::{Gateway, GatewayConfig, Services as KilnNames};
use kiln_network::record::{EgressLog, EgressSummary};
use kiln_proto::msg::{
    ConnectReply, ContainerSpec, ExecRequest, Exit, Forward, Order, OrderReply, Place, TtySize,
    feature, kind,
};
use kiln_proto::{Session, codec};
use tokio::io::AsyncRead;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::attempt::{Attempt, Wanted};
use crate::collect::{self, Collected};
use crate::event::Events;
use crate::failure::Failure;
use crate::host::Host;
use crate::joblog::JobLog;
use crate::kept::{self, Handover, Keep};
use crate::measured::{Measured, add};
use crate::orders::{self, Control, ExecIo};
use crate::phases::Phases;
use crate::run_secrets::RunSecrets;
use crate::templates::Purpose;
use crate::unpack::Unpacked;

/// Connections one forwarded port serves at once.
pub const FORWARDS_MAX: usize = 128;
/// How long a command may take to end after it was interrupted.
pub const INTERRUPT_GRACE: Duration = Duration::from_secs(2);
/// How long everything but the command may take where the machine stays.
const KEEP_GRACE: Duration = Duration::from_secs(30);
/// The environment every command starts from.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

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
    /// The log that is kept.
    pub log: Arc<JobLog>,
    /// An empty folder for the files that the request wants kept; without one none is.
    pub artifacts: Option<PathBuf>,
    /// That the machine stays when the command is over.
    pub keep: Option<Keep>,
    /// Secrets of the command.
    pub secrets: RunSecrets,
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
    /// Files that were kept.
    pub artifacts: Vec<Collected>,
    /// What the host measured.
    pub measured: Measured,
    /// The machine, when it stays; see [`Attempt::let_go`].
    pub kept: Option<Handover>,
}

/// What there is to tell of a run beside its result, as far as it came.
struct Told {
    phases: Phases,
    artifacts: Vec<Collected>,
    measured: Measured,
    /// The machine, when it stays.
    kept: Option<Handover>,
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
    };
    let egress = Arc::new(EgressLog::new());
    let limit = Duration::from_millis(input.request.limits.timeout_ms);
    let limit = Limit {
        whole: limit,
        // None: longer than any clock counts.
        end: tokio::time::Instant::now().checked_add(limit),
    };
    // A machine that stays outlives a command whose time was up.
    let grace = input.keep.map_or(Duration::ZERO, |_| KEEP_GRACE);
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
    let egress = kiln_network::record::summary(&egress.snapshot().events);
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
        artifacts: told.artifacts,
        measured,
        kept: told.kept,
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
    input: RunInput,
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
    let name = lease
        .attempt
        .machine_name("run")
        .map_err(|error| Failure::infrastructure(&error))?;
    let wanted = Wanted {
        name,
        cpus: limits.cpus,
        memory: limits.memory,
        purpose: Purpose::Run,
        make_template: true,
        may_stay: input.keep.is_some(),
    };
    let stays = input.keep;
    let mut handover = stays.and_then(|keep| handover(&input.request, keep, wanted.name.clone()));
    let since = Instant::now();
    let mut config = GatewayConfig::new(input.request.network.clone(), egress as _);
    config.exceptions.clone_from(&input.exceptions);
    config.proxy = input.proxy.clone();
    let [bytes_out, bytes_in] = input.request.bytes_out_and_in_per_second();
    config.limits.bytes_out_per_second = bytes_out;
    config.limits.bytes_in_per_second = bytes_in;
    let policy = input.request.policy;
    if let Some(most) = policy.and_then(|policy| policy.connections_max) {
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        config.limits.connections_max = config.limits.connections_max.min(most);
    }
    config.services = KilnNames::default();
    let gateway = Gateway::new(config);
    add(&mut told.measured.policy_ms, since);
    let attempt = tokio::select! {
        attempt = Attempt::start(host, wanted, ticket, gateway, events) => attempt?,
        () = cancel.cancelled() => return Err(Failure::cancelled()),
    };
    let ran = (events, &mut *told, &mut handover);
    let result = in_machine(&attempt, input, lease, (cancel, limit), ran).await;
    let result = match result {
        Err(failure) => Err(attempt.explain(failure).await),
        ok => ok,
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
    result
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

fn handover(request: &JobRequest, keep: Keep, machine: MachineName) -> Option<Handover> {
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
        connections_max: request.policy.and_then(|policy| policy.connections_max),
        runc: None,
        stays_ms: u64::try_from(keep.stays.as_millis()).unwrap_or(u64::MAX),
    })
}

async fn in_machine(
    attempt: &Attempt,
    input: RunInput,
    lease: &Lease,
    (cancel, limit): (&CancellationToken, Limit),
    (events, told, handover): (&Events, &mut Told, &mut Option<Handover>),
) -> Result<Exit, Failure> {
    let RunInput {
        request,
        image,
        stdin,
        tty,
        output,
        control,
        listeners,
        ca_bundle,
        log,
        artifacts,
        secrets,
        ..
    } = input;
    let kiln_core::JobKind::Run(command) = request.kind else {
        return Err(Failure::new(FailureClass::Usage, "this job is not a run"));
    };
    if let Some(bundle) = &ca_bundle {
        orders::put_file(
            &attempt.session,
            "take the CA bundle",
            Place::CaBundle,
            bundle,
        )
        .await?;
    }
    put_secrets(attempt, &secrets).await?;
    let (exec, place) = match image {
        None => {
            let env = secrets.joined(&command.env);
            let exec = plain_exec(&command, env, tty, stdin.is_some());
            let cwd = exec.cwd.clone();
            (exec, (String::new(), cwd))
        }
        Some((unpacked, spec)) => {
            let spec = ContainerSpec {
                secrets: secrets.files(),
                ..spec
            };
            let place = (collect::CONTAINER_ROOT.to_owned(), spec.cwd.clone());
            let exec = container_exec(attempt, &unpacked, spec, tty, stdin.is_some(), lease);
            let exec = exec.await?;
            if let Some(handover) = handover {
                handover.runc = exec.argv.first().cloned();
            }
            (exec, place)
        }
    };
    let forwards: Vec<_> = listeners
        .into_iter()
        .map(|(listener, port)| tokio::spawn(forward(attempt.session.clone(), listener, port)))
        .collect();
    told.phases.begin("run").await;
    let parts = ExecParts {
        stdin,
        output,
        output_max: request.policy.and_then(|policy| policy.output_bytes_max),
        control,
        log,
    };
    let result = tokio::select! {
        result = run_exec(&attempt.session, &exec, parts, cancel) => result,
        // Dropped, the command is ended; its machine may stay.
        () = limit.passed() => Err(limit.over()),
    };
    for task in forwards {
        task.abort();
    }
    let exit = result?;
    if let Some(dir) = artifacts.filter(|_| !command.artifacts.is_empty()) {
        told.phases.begin("collect").await;
        // Also of a command that failed: its report says why.
        let place = (place.0.as_str(), place.1.as_str());
        let paths = &command.artifacts;
        let found = collect::collect(&attempt.session, paths, place, &dir, cancel).await;
        for text in found.left_out {
            events.warn(text).await;
        }
        told.artifacts = found.files;
    }
    of_its_own(exit)
}

/// An end of the command's own making.
fn of_its_own(exit: Exit) -> Result<Exit, Failure> {
    if !exit.oom {
        return Ok(exit);
    }
    Err(Failure {
        // As a shell has it: 128 and the signal's number.
        command_code: exit.code.or(exit.signal.map(|signal| 128 + signal)),
        ..Failure::new(FailureClass::OutOfMemory, "the command ran out of memory")
            .hint("give it more with --memory")
    })
}

async fn put_secrets(attempt: &Attempt, secrets: &RunSecrets) -> Result<(), Failure> {
    if !secrets.files().is_empty() && !attempt.hello.has(feature::SECRET_FILES) {
        let message = "the machine image is too old to give a command secrets as files";
        let failure = Failure::new(FailureClass::Infrastructure, message);
        return Err(failure.hint("`kiln setup` makes a new one"));
    }
    secrets.put(&attempt.session).await
}

fn plain_exec(
    command: &kiln_core::job::RunCommand,
    all: BTreeMap<String, String>,
    tty: Option<TtySize>,
    stdin: bool,
) -> ExecRequest {
    let mut env = vec![
        ("PATH".to_owned(), PATH.to_owned()),
        ("HOME".to_owned(), "/root".to_owned()),
    ];
    if tty.is_some() && !all.contains_key("TERM") {
        env.push(("TERM".to_owned(), "xterm-256color".to_owned()));
    }
    env.extend(all);
    ExecRequest {
        argv: command.argv.clone(),
        env,
        cwd: "/root".to_owned(),
        tty,
        stdin,
        ..ExecRequest::default()
    }
}

async fn container_exec(
    attempt: &Attempt,
    unpacked: &Unpacked,
    spec: ContainerSpec,
    tty: Option<TtySize>,
    stdin: bool,
    lease: &Lease,
) -> Result<ExecRequest, Failure> {
    let disk = DiskSlot {
        role: DiskRole::Image,
        backing: Some(unpacked.disk.clone()),
        format: DiskFormat::Qcow2,
        access: DiskAccess::ReadOnly,
    };
    attempt.attach(&disk).await?;
    attempt.mount(DiskRole::Image, true, false).await?;
    let spec = ContainerSpec {
        hostname: lease.attempt.job.to_string(),
        tty: tty.is_some(),
        ..spec
    };
    let what = "prepare the container";
    let reply = orders::call(
        &attempt.session,
        what,
        &Order::PrepareContainer(Box::new(spec)),
        orders::ORDER_TIMEOUT,
    )
    .await?;
    let OrderReply::Prepared { argv } = reply else {
        return Err(Failure::new(
            FailureClass::GuestFault,
            format!("asked to {what}, the guest answered {reply:?}"),
        ));
    };
    let env = vec![("PATH".to_owned(), PATH.to_owned())];
    Ok(ExecRequest {
        argv,
        env,
        cwd: "/".to_owned(),
        tty,
        stdin,
        ..ExecRequest::default()
    })
}

struct ExecParts {
    stdin: Option<Box<dyn AsyncRead + Send + Unpin>>,
    output: mpsc::Sender<(u8, Vec<u8>)>,
    /// Bytes of output, both streams together.
    output_max: Option<u64>,
    control: mpsc::Receiver<Control>,
    log: Arc<JobLog>,
}

/// Runs the command; a cancel is an interrupt to it first, and the machine's end soon after.
async fn run_exec(
    session: &Session,
    exec: &ExecRequest,
    parts: ExecParts,
    cancel: &CancellationToken,
) -> Result<Exit, Failure> {
    let ExecParts {
        stdin,
        output,
        output_max,
        mut control,
        log,
    } = parts;
    let (sender, mut chunks) = mpsc::channel::<(u8, Vec<u8>)>(64);
    let (orders_in, orders_out) = mpsc::channel(16);
    let relay = async {
        let mut left = output_max.unwrap_or(u64::MAX);
        while let Some((stream, mut bytes)) = chunks.recv().await {
            let kept = usize::try_from(left).unwrap_or(usize::MAX);
            let over = bytes.len() > kept;
            bytes.truncate(kept);
            left = left.saturating_sub(bytes.len() as u64);
            log.raw(&bytes);
            let _reader_gone = output.send((stream, bytes)).await;
            if over {
                return Err(output_limit(output_max.unwrap_or_default()));
            }
        }
        Ok(())
    };
    let pass_on = async {
        loop {
            tokio::select! {
                order = control.recv() => match order {
                    Some(order) => drop(orders_in.send(order).await),
                    None => std::future::pending().await,
                },
                () = cancel.cancelled() => break,
            }
        }
        let _ended = orders_in.send(Control::Signal(2)).await;
        tokio::time::sleep(INTERRUPT_GRACE / 2).await;
        let _ended = orders_in.send(Control::Signal(15)).await;
        tokio::time::sleep(INTERRUPT_GRACE / 2).await;
    };
    let io = ExecIo {
        stdin: stdin.map(|reader| reader as _),
        output: sender,
        control: orders_out,
    };
    let run = async {
        let exec = orders::exec(session, "run the command", exec, io);
        tokio::try_join!(async { exec.await.map_err(start_failure) }, relay)
    };
    tokio::select! {
        exit = run => {
            let (exit, ()) = exit?;
            if cancel.is_cancelled() { Err(Failure::cancelled()) } else { Ok(exit) }
        }
        () = pass_on => Err(Failure::cancelled()),
    }
}

/// The command wrote more than its policy allows. Its machine is destroyed next, and the command with it.
fn output_limit(most: u64) -> Failure {
    let message = format!(
        "output_limit: the command wrote more than {}",
        ByteSize(most)
    );
    Failure::new(FailureClass::User, message)
        .hint("write less, or raise limits.output of the policy")
}

/// A command that does not exist is the user's error, as in any shell: 127, and 126 where it cannot be run.
#[must_use]
pub fn start_failure(error: orders::CallError) -> Failure {
    match error {
        orders::CallError::Refused { error, .. } => {
            let not_found = error.code == kiln_proto::msg::GuestErrorCode::NotFound;
            let failure = Failure::new(FailureClass::User, error.message);
            if !not_found {
                return Failure {
                    command_code: Some(126),
                    ..failure
                };
            }
            Failure {
                command_code: Some(127),
                ..failure.hint("there is no such program in the machine; `--image NAME` runs an image that has it")
            }
        }
        other => Failure::from(other),
    }
}

/// Serves one forwarded port until it is aborted.
async fn forward(session: Session, listener: TcpListener, port: u16) {
    let slots = Arc::new(tokio::sync::Semaphore::new(FORWARDS_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let Ok((client, _)) = listener.accept().await else {
            continue;
        };
        let session = session.clone();
        tokio::spawn(async move {
            let _slot = slot;
            // A client's broken connection is the client's to see.
            let _ended = forward_one(&session, client, port).await;
        });
    }
}

async fn forward_one(session: &Session, mut client: TcpStream, port: u16) -> std::io::Result<()> {
    let payload = serde_json::to_vec(&Forward { port })?;
    let mut stream = session
        .open(kind::FORWARD, &payload)
        .await
        .map_err(std::io::Error::other)?;
    let reply: ConnectReply = codec::read_msg(&mut stream, orders::REPLY_BYTES_MAX)
        .await
        .map_err(std::io::Error::other)?;
    if reply == ConnectReply::Connected {
        client.set_nodelay(true)?;
        kiln_proto::relay::relay(&mut stream, &mut client).await?;
    }
    Ok(())
}
