//! Inside the machine of a run: what it is given, its command, and the files that it leaves.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_core::job::{AppliedPolicy, RunCommand, RunPhase, RunPhaseName};
use kiln_core::machine::{DiskAccess, DiskFormat};
use kiln_core::{
    ByteSize, DiskRole, DiskSlot, FailureClass, GitAccess, JobRequest, Lease, NetworkPolicy,
};
use kiln_proto::msg::{
    ContainerSpec, ExecRequest, Exit, Order, OrderReply, Place, TtySize, feature,
};
use tokio_util::sync::CancellationToken;

use super::command::{ExecParts, Room, run_exec};
use super::forward::forward;
use super::overrun;
use super::serve::{self, ServiceInput, Serving};
use super::{Limit, RunInput, Told, ending, exit_code};
use crate::attempt::Attempt;
use crate::attend::door::HANGUP;
use crate::collect;
use crate::event::Events;
use crate::failure::Failure;
use crate::kept::{CONTAINER_CONFIG, Handover};
use crate::orders;
use crate::run_git;
use crate::run_secrets::RunSecrets;
use crate::unpack::Unpacked;

/// The environment every command starts from.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where a container's user has copies of its secrets, and that of each service (`SECRETS` of the guest's `container`).
const CONTAINER_SECRETS: &str = "/run/kiln/container-secrets";
/// Where a command begins that works on no files.
const HOME: &str = "/root";
/// Size of a terminal whose attender did not say.
const TTY_USUAL: TtySize = TtySize { rows: 24, cols: 80 };
/// Longest wait for the guest to say what it uses.
const STATS_TIMEOUT: Duration = Duration::from_secs(10);
/// Most of a command line that a failure shows, characters.
const LINE_SHOWN_MAX: usize = 200;
/// Longest time for the files of a command that was stopped: somebody waits for its end.
pub const STOPPED_COLLECT_TIMEOUT: Duration = Duration::from_secs(20);

/// The machine of a run: what its commands have in common.
struct Inside<'a> {
    attempt: &'a Attempt,
    command: &'a RunCommand,
    /// How its container is started; none: it runs in the machine itself.
    container: Option<ContainerSpec>,
    /// Where commands begin.
    cwd: String,
    /// A container was there already: the next one goes on with its files.
    begun: bool,
    room: Room,
}

pub(super) async fn in_machine(
    attempt: &Attempt,
    mut input: RunInput,
    lease: &Lease,
    (cancel, limit): (&CancellationToken, Limit),
    (events, told, handover): (&Events, &mut Told, &mut Option<Handover>),
) -> Result<Exit, Failure> {
    let kiln_core::JobKind::Run(command) = input.request.kind.clone() else {
        return Err(Failure::new(FailureClass::Usage, "this job is not a run"));
    };
    let prepared = prepare(attempt, &input, &command, lease, told);
    let mut inside = limit.unless_stopped(cancel, prepared).await?;
    let Some(attend) = input.attend.take() else {
        let told = (events, told, handover);
        return inside.commands(input, (cancel, cancel, limit), told).await;
    };
    told.phases.begin("attend").await;
    // An attender who goes ends it as a cancel does.
    let stopped = cancel.child_token();
    let waits = attend.wait(&attempt.session, command.stdin, stopped.clone());
    let (attended, streams) = limit.unless_stopped(cancel, waits).await?;
    input.stdin = command.stdin.then_some(streams.stdin);
    input.tty = command.tty.then_some(streams.tty.unwrap_or(TTY_USUAL));
    (input.output, input.control) = (streams.output, streams.control);
    let told = (events, told, handover);
    let ended = inside.commands(input, (cancel, &stopped, limit), told);
    let ended = ended.await;
    match (attended.end().await, &ended) {
        (Some(gone), Err(failure)) if failure.class == FailureClass::Cancelled => Err(gone),
        // The hangup was quicker than the cancel that follows it.
        (Some(gone), Ok(exit)) if hung_up(exit) => Err(gone),
        _ => ended,
    }
}

/// Whether a command was ended by the signal of a terminal that hangs up, or says so as a shell has it.
fn hung_up(exit: &Exit) -> bool {
    exit.signal == Some(HANGUP) || exit.code == Some(128 + HANGUP)
}

impl Inside<'_> {
    /// Everything before the command, the command, and the files that it leaves. A cancel is asked for; whoever attends the command may stop it too.
    async fn commands(
        &mut self,
        mut input: RunInput,
        (cancel, stopped, limit): (&CancellationToken, &CancellationToken, Limit),
        (events, told, handover): (&Events, &mut Told, &mut Option<Handover>),
    ) -> Result<Exit, Failure> {
        let command = self.command;
        // Ends what runs beside the command when this is over.
        let mut serving = Vec::new();
        for phase in std::mem::take(&mut input.phases) {
            let begun = self.phase(&mut input, &phase, &mut serving, (stopped, events, told));
            limit.unless_stopped(stopped, begun).await?;
        }
        let (secrets, tty, stdin) = (&input.secrets, input.tty, input.stdin.is_some());
        let (network, services) = (&input.request.network, &input.services);
        let started = async {
            self.enter("run", (network, &command.git), services).await?;
            put_secrets(self.attempt, secrets).await?;
            self.exec(None, secrets, (tty, stdin)).await
        };
        let exec = limit.unless_stopped(stopped, started).await?;
        if let Some(handover) = handover {
            handover.cwd = Some(self.cwd.clone());
            if self.container.is_some() {
                handover.runc = exec.argv.first().cloned();
            }
        }
        let forwards: Vec<_> = std::mem::take(&mut input.listeners)
            .into_iter()
            .map(|(listener, port)| {
                tokio::spawn(forward(self.attempt.session.clone(), listener, port))
            })
            .collect();
        told.phases.begin("run").await;
        let parts = ExecParts {
            stdin: input.stdin.take(),
            output: input.output.clone(),
            room: &mut self.room,
            control: &mut input.control,
            log: Arc::clone(&input.log),
            mask: &input.mask,
        };
        let result = tokio::select! {
            result = run_exec(&self.attempt.session, &exec, parts, stopped) => result,
            // Dropped, the command is ended; its machine may stay.
            () = limit.passed() => Err(limit.over()),
        };
        for task in forwards {
            task.abort();
        }
        let result = match result {
            Ok(exit) => self.of_its_own(exit, &input.request).await,
            Err(failure) => Err(on_its_root(self.command, failure)),
        };
        if let Some(dir) = &input.artifacts {
            self.kept_files(dir, &result, (cancel, events, told)).await;
        }
        drop(serving);
        result
    }

    /// From now on a phase's network holds, and nothing of the one before.
    async fn enter(
        &self,
        name: &str,
        (network, git): (&NetworkPolicy, &[GitAccess]),
        services: &[ServiceInput],
    ) -> Result<(), Failure> {
        let gateway = self.attempt.services.gateway();
        gateway.enter_with_git(name, network.clone(), run_git::named(git));
        match self.command.phases.is_empty() {
            true => Ok(()),
            // The guest remembers for a while which names there are.
            false => serve::name(self.attempt, services).await,
        }
    }

    /// Runs a phase before the command. Nothing of its network, variables and secrets is the next one's.
    async fn phase(
        &mut self,
        input: &mut RunInput,
        (phase, secrets): &(RunPhase, RunSecrets),
        serving: &mut Vec<Serving>,
        (cancel, events, told): (&CancellationToken, &Events, &mut Told),
    ) -> Result<(), Failure> {
        let name = phase.name.as_str();
        told.phases.begin(name).await;
        self.enter(name, (&phase.network, &phase.git), &input.services)
            .await?;
        put_secrets(self.attempt, secrets).await?;
        if phase.name == RunPhaseName::Services {
            for service in &input.services {
                events
                    .note(format!("service {} begins", service.wanted.name))
                    .await;
                serving.push(serve::start(self.attempt, service, &input.log).await?);
            }
        }
        for argv in &phase.commands {
            let exec = self.exec(Some(argv), secrets, (None, false)).await?;
            let parts = ExecParts {
                stdin: None,
                output: input.output.clone(),
                room: &mut self.room,
                control: &mut input.control,
                log: Arc::clone(&input.log),
                mask: &input.mask,
            };
            let ended = run_exec(&self.attempt.session, &exec, parts, cancel).await;
            let ended = match ended {
                Ok(exit) => self.of_its_own(exit, &input.request).await,
                failed => failed,
            };
            let failed = match ended {
                Ok(exit) if exit.code == Some(0) => continue,
                Ok(exit) => Failure {
                    command_code: Some(exit_code(&exit)),
                    ..Failure::new(FailureClass::User, ending(&exit))
                },
                Err(failure) => failure,
            };
            return Err(in_phase(name, argv, failed));
        }
        take_back(self.attempt, secrets).await
    }

    /// What starts a command; without words the job's own.
    async fn exec(
        &mut self,
        argv: Option<&[String]>,
        secrets: &RunSecrets,
        (tty, stdin): (Option<TtySize>, bool),
    ) -> Result<ExecRequest, Failure> {
        let Some(spec) = &self.container else {
            let env = secrets.joined(&self.command.env);
            let argv = argv.unwrap_or(&self.command.argv);
            return Ok(plain_exec(argv, env, &self.cwd, (tty, stdin)));
        };
        let mut spec = ContainerSpec {
            secrets: secrets.files(),
            tty: tty.is_some(),
            again: self.begun,
            ..spec.clone()
        };
        if let Some(argv) = argv {
            spec.argv = argv.to_vec();
        }
        let pairs = secrets.env().iter();
        spec.env.retain(|pair| {
            let key = pair.split_once('=').map(|(key, _)| key);
            !key.is_some_and(|key| secrets.env().contains_key(key))
        });
        spec.env
            .extend(pairs.map(|(key, value)| format!("{key}={value}")));
        let argv = prepare_container(self.attempt, spec).await?;
        self.begun = true;
        Ok(ExecRequest {
            argv,
            env: vec![("PATH".to_owned(), PATH.to_owned())],
            cwd: "/".to_owned(),
            tty,
            stdin,
            ..ExecRequest::default()
        })
    }

    /// An end of the command's own making; one that came of a bound is told by the bound's name.
    async fn of_its_own(&self, exit: Exit, request: &JobRequest) -> Result<Exit, Failure> {
        let told = |class, message: String, hint: &str| Failure {
            // As a shell has it: 128 and the signal's number.
            command_code: exit.code.or(exit.signal.map(|signal| 128 + signal)),
            ..Failure::new(class, message).hint(hint)
        };
        if exit.oom {
            let message = "the command ran out of memory".to_owned();
            let hint = "give it more with --memory";
            return Err(told(FailureClass::OutOfMemory, message, hint));
        }
        if exit.code == Some(0) || !self.attempt.hello.has(feature::WORK) {
            return Ok(exit);
        }
        let order = Order::Stats;
        let what = "say what it uses";
        let asked = orders::call(&self.attempt.session, what, &order, STATS_TIMEOUT).await;
        let Ok(OrderReply::Stats(stats)) = asked else {
            // How the command ended is known, and says enough.
            return Ok(exit);
        };
        let policy = request.policy.as_ref();
        let processes = policy.and_then(|policy| policy.processes_max);
        if let Some(over) = overrun::of(&stats, request.limits.disk, processes) {
            let (reason, word) = over.reason;
            let message = format!("{word}: {}, {}", ending(&exit), over.what);
            return Err(told(FailureClass::User, message, over.hint).because(reason));
        }
        Ok(exit)
    }

    /// Reads the files that are kept, also of a command that failed: its report says why. One that was stopped has less time for it.
    async fn kept_files(
        &self,
        dir: &Path,
        result: &Result<Exit, Failure>,
        (cancel, events, told): (&CancellationToken, &Events, &mut Told),
    ) {
        let paths = &self.command.artifacts;
        let stopped = match result {
            Ok(_) => false,
            Err(failure) if was_stopped(failure) => true,
            // It ran, and a bound ended it.
            Err(failure) if failure.command_code.is_some() => false,
            Err(_) => return,
        };
        if paths.is_empty() {
            return;
        }
        told.phases.begin("collect").await;
        let root = match self.container {
            Some(_) => collect::CONTAINER_ROOT,
            None => "",
        };
        let never = CancellationToken::new();
        let (within, cancel) = match stopped {
            false => (collect::COLLECT_TIMEOUT, cancel),
            // It was asked to stop already: whoever asks again ends the process.
            true => (STOPPED_COLLECT_TIMEOUT, &never),
        };
        let place = (root, self.cwd.as_str());
        let session = &self.attempt.session;
        let found = collect::collect(session, paths, place, dir, (within, cancel)).await;
        for text in found.left_out {
            events.warn(text).await;
        }
        told.artifacts = found.files;
    }
}

/// What to do about a program that a given root disk does not have: an image is no way then.
fn on_its_root(command: &RunCommand, failure: Failure) -> Failure {
    let named = failure
        .hint
        .as_ref()
        .is_some_and(|hint| hint.contains("--image"));
    match &command.root_disk {
        Some(disk) if named => {
            let hint = format!("there is no such program on {}", disk.name);
            failure.hint(hint)
        }
        _ => failure,
    }
}

/// Names the phase and its command in what went wrong.
fn in_phase(name: &str, argv: &[String], failure: Failure) -> Failure {
    // What a shell is given is what somebody wrote.
    let line = match argv {
        [shell, flag, line] if shell == "/bin/sh" && flag == "-ec" => line.clone(),
        words => words.join(" "),
    };
    let shown = line.chars().map(|c| if c.is_control() { ' ' } else { c });
    let line: String = shown.take(LINE_SHOWN_MAX).collect();
    let message = match failure.class {
        FailureClass::User | FailureClass::OutOfMemory => {
            format!("the phase {name} failed: `{line}`: {}", failure.message)
        }
        _ => return failure,
    };
    Failure { message, ..failure }
}

/// Whether what a command writes lies on a disk. A root disk that was given need not have what makes a file system: there only where it is
/// asked for.
fn has_disk(command: &RunCommand) -> bool {
    command.disk || (command.source.is_some() && command.root_disk.is_none())
}

/// Whether a command ran and was ended from outside.
pub(super) fn was_stopped(failure: &Failure) -> bool {
    match failure.class {
        FailureClass::Timeout | FailureClass::Cancelled => true,
        // It did not start where it has a code.
        FailureClass::User => failure.command_code.is_none(),
        _ => false,
    }
}

/// Gives the machine what all commands need.
async fn prepare<'a>(
    attempt: &'a Attempt,
    input: &RunInput,
    command: &'a RunCommand,
    lease: &Lease,
    told: &mut Told,
) -> Result<Inside<'a>, Failure> {
    if let Some(bundle) = &input.ca_bundle {
        let what = "take the CA bundle";
        orders::put_file(&attempt.session, what, Place::CaBundle, bundle).await?;
    }
    let policy = input.request.policy.as_ref();
    let is_new = !command.phases.is_empty() || has_disk(command);
    if is_new && !attempt.hello.has(feature::WORK) {
        return Err(too_old("work on files and in phases"));
    }
    bound(attempt, policy).await?;
    if has_disk(command) {
        let made = scratch(attempt, input.request.limits.disk).await;
        made.map_err(|failure| match (&command.root_disk, failure.class) {
            (Some(_), FailureClass::User) => {
                failure.hint("--disk needs mkfs.ext4 on the root disk; without it what the command writes lies in memory")
            }
            _ => failure,
        })?;
    }
    let mut cwd = None;
    if let Some(files) = &input.files {
        told.phases.begin("source").await;
        told.source = Some(files.send(&attempt.session).await?);
        cwd = Some(files.cwd());
    }
    let mut container = None;
    if let Some((unpacked, spec)) = input.image.clone() {
        attach_image(attempt, &unpacked, DiskRole::Image).await?;
        container = Some(ContainerSpec {
            hostname: lease.attempt.job.to_string(),
            work: cwd.is_some(),
            cwd: cwd.clone().unwrap_or(spec.cwd),
            ..spec
        });
    }
    let cwd = match &container {
        Some(spec) => spec.cwd.clone(),
        None => cwd.unwrap_or_else(|| HOME.to_owned()),
    };
    Ok(Inside {
        attempt,
        command,
        container,
        cwd,
        begun: false,
        room: Room::of(policy.and_then(|policy| policy.output_bytes_max)),
    })
}

/// Bounds the processes of everything that is not the guest itself, and what each may open.
async fn bound(attempt: &Attempt, policy: Option<&AppliedPolicy>) -> Result<(), Failure> {
    let processes = policy.and_then(|policy| policy.processes_max);
    let files = policy.and_then(|policy| policy.open_files_max);
    if files.is_some() && !attempt.hello.has(feature::BOUNDS) {
        return Err(too_old("bound open files"));
    }
    if processes.is_none() && files.is_none() {
        return Ok(());
    }
    let order = Order::SetLimits {
        memory_max: 0,
        pids_max: u64::from(processes.unwrap_or(0)),
        disk_bytes_max: 0,
        open_files_max: u64::from(files.unwrap_or(0)),
    };
    let (what, within) = ("bound its processes and files", orders::ORDER_TIMEOUT);
    Ok(orders::call_done(&attempt.session, what, &order, within).await?)
}

/// Room for what the command writes: a disk of its own, that the host bounds.
async fn scratch(attempt: &Attempt, size: ByteSize) -> Result<(), Failure> {
    let disk = DiskSlot {
        role: DiskRole::Scratch,
        backing: None,
        format: DiskFormat::Qcow2,
        access: DiskAccess::New { size },
    };
    attempt.attach(&disk).await?;
    attempt.mount(DiskRole::Scratch, false, true).await
}

fn too_old(what: &str) -> Failure {
    let message = format!("the machine image is too old to {what}");
    Failure::new(FailureClass::Infrastructure, message).hint("`kiln setup` makes a new one")
}

/// Gives a phase its secrets. From then on the machine reaches only less.
async fn put_secrets(attempt: &Attempt, secrets: &RunSecrets) -> Result<(), Failure> {
    if secrets.is_empty() {
        return Ok(());
    }
    if !secrets.files().is_empty() && !attempt.hello.has(feature::SECRET_FILES) {
        return Err(too_old("give a command secrets as files"));
    }
    attempt.services.gateway().only_narrow();
    secrets.put(&attempt.session).await
}

/// Empties the files of a phase's secrets: they are no other phase's.
async fn take_back(attempt: &Attempt, secrets: &RunSecrets) -> Result<(), Failure> {
    empty(attempt, secrets.files()).await
}

/// Takes every secret out of a machine that stays: the files, their copies for a container's user, and the variables that the configuration of
/// its last container holds. Where the command itself began, its keeper reads that configuration and takes them out of it; otherwise nobody
/// needs it.
pub(super) async fn take_out(
    attempt: &Attempt,
    files: Vec<String>,
    handover: &Handover,
) -> Result<(), Failure> {
    empty(attempt, files).await?;
    if !handover.had_secrets {
        return Ok(());
    }
    let config = match handover.runc {
        Some(_) => "",
        None => CONTAINER_CONFIG,
    };
    let script = "rm -f \"$0\"*/* && { [ -z \"$1\" ] || rm -f \"$1\"; }";
    let words = ["/bin/sh", "-c", script, CONTAINER_SECRETS, config];
    let removed = orders::exec_quiet(&attempt.session, "take secrets out of it", &words, None);
    match removed.await?.code {
        Some(0) => Ok(()),
        _ => Err(Failure::new(
            FailureClass::GuestFault,
            "the machine did not remove them",
        )),
    }
}

/// Empties files of secrets.
async fn empty(attempt: &Attempt, files: Vec<String>) -> Result<(), Failure> {
    for id in files {
        let place = Place::Secret { id };
        orders::put_file(&attempt.session, "take a secret back", place, &[]).await?;
    }
    Ok(())
}

fn plain_exec(
    argv: &[String],
    all: BTreeMap<String, String>,
    cwd: &str,
    (tty, stdin): (Option<TtySize>, bool),
) -> ExecRequest {
    let mut env = vec![
        ("PATH".to_owned(), PATH.to_owned()),
        ("HOME".to_owned(), HOME.to_owned()),
    ];
    if tty.is_some() && !all.contains_key("TERM") {
        env.push(("TERM".to_owned(), "xterm-256color".to_owned()));
    }
    env.extend(all);
    ExecRequest {
        argv: argv.to_vec(),
        env,
        cwd: cwd.to_owned(),
        tty,
        stdin,
        ..ExecRequest::default()
    }
}

/// Attaches the disk of an image, read-only, and mounts it.
pub(super) async fn attach_image(
    attempt: &Attempt,
    unpacked: &Unpacked,
    role: DiskRole,
) -> Result<(), Failure> {
    let disk = DiskSlot {
        role,
        backing: Some(unpacked.disk.clone()),
        format: DiskFormat::Qcow2,
        access: DiskAccess::ReadOnly,
    };
    attempt.attach(&disk).await?;
    attempt.mount(role, true, false).await
}

/// Puts a container together; gives what starts it.
pub(super) async fn prepare_container(
    attempt: &Attempt,
    spec: ContainerSpec,
) -> Result<Vec<String>, Failure> {
    let what = "prepare the container";
    let order = Order::PrepareContainer(Box::new(spec));
    let reply = orders::call(&attempt.session, what, &order, orders::ORDER_TIMEOUT).await?;
    match reply {
        OrderReply::Prepared { argv } => Ok(argv),
        other => Err(Failure::new(
            FailureClass::GuestFault,
            format!("asked to {what}, the guest answered {other:?}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_its_phase_and_what_was_written() {
        let failed = |class| Failure {
            command_code: Some(3),
            ..Failure::new(class, "the command ended with exit code 3")
        };
        let shell = ["/bin/sh", "-ec", "npm ci"].map(str::to_owned);
        let named = in_phase("dependencies", &shell, failed(FailureClass::User));
        assert_eq!(
            named.message,
            "the phase dependencies failed: `npm ci`: the command ended with exit code 3"
        );
        assert_eq!(named.command_code, Some(3));
        let other = in_phase("dependencies", &shell, failed(FailureClass::Infrastructure));
        assert!(!other.message.contains("phase"), "not the phase's fault");
    }
}
