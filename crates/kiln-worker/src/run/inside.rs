//! Inside the machine of a run: what it is given, its command, and the files that it leaves.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_core::job::RunCommand;
use kiln_core::machine::{DiskAccess, DiskFormat};
use kiln_core::{ArtifactPath, DiskRole, DiskSlot, FailureClass, Lease};
use kiln_proto::msg::{
    ContainerSpec, ExecRequest, Exit, Order, OrderReply, Place, TtySize, feature,
};
use tokio_util::sync::CancellationToken;

use super::command::{ExecParts, Room, run_exec};
use super::forward::forward;
use super::{Limit, RunInput, Told};
use crate::attempt::Attempt;
use crate::collect;
use crate::event::Events;
use crate::failure::Failure;
use crate::kept::Handover;
use crate::orders;
use crate::run_secrets::RunSecrets;
use crate::unpack::Unpacked;

/// The environment every command starts from.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where a command begins that works on no files.
const HOME: &str = "/root";
/// Longest time for the files of a command that was stopped: somebody waits for its end.
pub const STOPPED_COLLECT_TIMEOUT: Duration = Duration::from_secs(20);

/// A command that can be started, and how its files are found.
struct Prepared {
    exec: ExecRequest,
    /// Root of its files in the machine, and its working directory below that.
    place: (String, String),
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
    let prepared = limit
        .unless_stopped(cancel, prepare(attempt, &mut input, &command, lease, told))
        .await?;
    if let Some(handover) = handover {
        handover.cwd = Some(prepared.place.1.clone());
        if input.image.is_some() {
            handover.runc = prepared.exec.argv.first().cloned();
        }
    }
    let forwards: Vec<_> = std::mem::take(&mut input.listeners)
        .into_iter()
        .map(|(listener, port)| tokio::spawn(forward(attempt.session.clone(), listener, port)))
        .collect();
    told.phases.begin("run").await;
    let most = input
        .request
        .policy
        .and_then(|policy| policy.output_bytes_max);
    let mut room = Room::of(most);
    let parts = ExecParts {
        stdin: input.stdin.take(),
        output: input.output.clone(),
        room: &mut room,
        control: &mut input.control,
        log: Arc::clone(&input.log),
    };
    let result = tokio::select! {
        result = run_exec(&attempt.session, &prepared.exec, parts, cancel) => result,
        // Dropped, the command is ended; its machine may stay.
        () = limit.passed() => Err(limit.over()),
    };
    for task in forwards {
        task.abort();
    }
    if let Some(dir) = &input.artifacts {
        let paths = &command.artifacts;
        kept_files(
            attempt,
            paths,
            (&prepared, dir),
            &result,
            (cancel, events, told),
        )
        .await;
    }
    of_its_own(result?)
}

/// Reads the files that are kept, also of a command that failed: its report says why. One that was stopped has less time for it.
async fn kept_files(
    attempt: &Attempt,
    paths: &[ArtifactPath],
    (prepared, dir): (&Prepared, &Path),
    result: &Result<Exit, Failure>,
    (cancel, events, told): (&CancellationToken, &Events, &mut Told),
) {
    let stopped = match result {
        Ok(_) => false,
        Err(failure) if was_stopped(failure) => true,
        Err(_) => return,
    };
    if paths.is_empty() {
        return;
    }
    told.phases.begin("collect").await;
    let place = (prepared.place.0.as_str(), prepared.place.1.as_str());
    let never = CancellationToken::new();
    let (within, cancel) = match stopped {
        false => (collect::COLLECT_TIMEOUT, cancel),
        // It was asked to stop already: whoever asks again ends the process.
        true => (STOPPED_COLLECT_TIMEOUT, &never),
    };
    let found = collect::collect(&attempt.session, paths, place, dir, (within, cancel)).await;
    for text in found.left_out {
        events.warn(text).await;
    }
    told.artifacts = found.files;
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

/// Gives the machine what the command needs.
async fn prepare(
    attempt: &Attempt,
    input: &mut RunInput,
    command: &RunCommand,
    lease: &Lease,
    told: &mut Told,
) -> Result<Prepared, Failure> {
    if let Some(bundle) = &input.ca_bundle {
        let what = "take the CA bundle";
        orders::put_file(&attempt.session, what, Place::CaBundle, bundle).await?;
    }
    put_secrets(attempt, &input.secrets).await?;
    if input.files.is_some() || command.disk {
        scratch(attempt, input.request.limits.disk).await?;
    }
    let mut cwd = None;
    if let Some(files) = &input.files {
        if !attempt.hello.has(feature::WORK) {
            return Err(too_old("work on a folder's files"));
        }
        told.phases.begin("source").await;
        told.source = Some(files.send(&attempt.session).await?);
        cwd = Some(files.cwd());
    }
    let (tty, stdin) = (input.tty, input.stdin.is_some());
    match input.image.clone() {
        None => {
            let env = input.secrets.joined(&command.env);
            let cwd = cwd.unwrap_or_else(|| HOME.to_owned());
            let exec = plain_exec(&command.argv, env, &cwd, (tty, stdin));
            let place = (String::new(), cwd);
            Ok(Prepared { exec, place })
        }
        Some((unpacked, spec)) => {
            let spec = ContainerSpec {
                secrets: input.secrets.files(),
                work: cwd.is_some(),
                cwd: cwd.unwrap_or(spec.cwd),
                ..spec
            };
            let place = (collect::CONTAINER_ROOT.to_owned(), spec.cwd.clone());
            let exec = container_exec(attempt, &unpacked, spec, (tty, stdin), lease).await?;
            Ok(Prepared { exec, place })
        }
    }
}

/// Room for what the command writes: a disk of its own, that the host bounds.
async fn scratch(attempt: &Attempt, size: kiln_core::ByteSize) -> Result<(), Failure> {
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
        return Err(too_old("give a command secrets as files"));
    }
    secrets.put(&attempt.session).await
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

async fn container_exec(
    attempt: &Attempt,
    unpacked: &Unpacked,
    spec: ContainerSpec,
    (tty, stdin): (Option<TtySize>, bool),
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
