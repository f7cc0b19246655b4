//! From a specification to a running QEMU: files, sockets, user, group, process, and the first commands.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_core::{ByteSize, MachineSpec};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::argv::{self, Accel, Wake};
use super::console::Ring;
use super::disks::{MachineDisk, Sets};
use super::machine::{Body, CONTROL_DEADLINE, END_DEADLINE, Keepable, OwnMemory, QemuMachine, Ram};
use super::program::Program;
use super::qmp::{Event, Qmp, QmpError};
use super::save::{self, SavedMachine};
use super::sockets::{Near, connected, listen, listening};
use super::status::{self, Migration, Status};
use super::users::OwnUsers;
use super::{CHANNEL_SOCKET, launch_error, probe, spawn};
use crate::cgroup::{CgroupHost, Limits};
use crate::driver::{CONSOLE_BYTES_MAX, LaunchError, MachineState, Start, StopReason};
use crate::ledger;
use crate::record::{MachineDir, RecordError};

/// The VMM's own words that are kept.
pub(super) const STDERR_BYTES_MAX: usize = 8 * 1024;
/// Longest wait for a template's device state.
const INCOMING_DEADLINE: Duration = Duration::from_secs(60);
/// How long after a failed start its last words are awaited.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What the driver knows of the host, as far as a launch needs it.
#[derive(Debug)]
pub(crate) struct Host<'a> {
    pub(crate) home: &'a Path,
    pub(crate) program: &'a Program,
    /// The KVM device, where KVM boots guests.
    pub(crate) kvm: Option<&'a Path>,
    pub(crate) users: Option<OwnUsers>,
    pub(crate) cgroups: &'a CgroupHost,
}

/// Everything a process needs, made before it starts.
struct Prepared {
    dir: Arc<MachineDir>,
    dir_fd: OwnedFd,
    disks: Vec<MachineDisk>,
    /// Disks that the template does not have.
    later: Vec<kiln_core::DiskSlot>,
    vmm: spawn::Vmm,
    near: Near,
    ram: Ram,
    template: Option<File>,
    next_set: u32,
    incoming: Option<u32>,
}

/// Completes when the process has entered its groups.
type Limited = tokio::sync::oneshot::Receiver<io::Result<()>>;

/// Starts a machine. Whatever was made is removed when this fails or is dropped.
pub(crate) async fn launch(
    host: &Host<'_>,
    spec: &MachineSpec,
    start: &Start,
) -> Result<Arc<QemuMachine>, LaunchError> {
    // File operations of a millisecond or two: not worth a trip to another thread.
    let prepared = prepare(host, spec, start)?;
    let incoming = prepared.incoming;
    let later = prepared.later.clone();
    let stderr = Ring::new(STDERR_BYTES_MAX);
    let (machine, limited) = run(host, spec, start, prepared, &stderr).await?;
    let machine = Arc::new(machine);
    match wake(&machine, incoming, limited).await {
        Ok(()) => {}
        Err(error) => return Err(explain(&machine, start, error, &stderr).await),
    }
    for slot in &later {
        machine
            .attach(slot)
            .await
            .map_err(|error| LaunchError::Vmm {
                program: host.program.path.display().to_string(),
                why: format!("disk {:?} could not be added: {error}", slot.role),
            })?;
    }
    machine.status.advance(MachineState::Running);
    Ok(machine)
}

fn prepare(host: &Host<'_>, spec: &MachineSpec, start: &Start) -> Result<Prepared, LaunchError> {
    let saved = match start {
        Start::Cold => None,
        Start::Template(template) => Some(save::open(template)?),
    };
    let dir = MachineDir::create(host.home, &spec.name, "qemu").map_err(record_error)?;
    dir.set_host_cpus(&spec.host_cpus).map_err(record_error)?;
    let user = own_user(host, &dir)?;
    let dir_fd: OwnedFd = File::open(dir.dir())
        .map_err(launch_error("open", dir.dir()))?
        .into();
    let mut sets = Sets::from(1);
    let accel = match host.kvm {
        Some(device) => Accel::Kvm {
            set: kvm_set(host.program, device, &mut sets),
        },
        None => Accel::Tcg,
    };
    if let Some(saved) = &saved {
        saved.check(spec, accel, host.program)?;
    }
    let (disks, later) = make_disks(&dir, spec, saved.as_ref())?;
    let nodes = open_disks(&disks, spec, &mut sets);
    let mut inherit = Vec::new();
    let (ram_file, own) = ram_of(spec.memory, saved.as_ref())?;
    let ram = own.map_or(Ram::Clone, |file| {
        Ram::Own(OwnMemory {
            file,
            cpus: spec.cpus,
            size: spec.memory,
            accel,
            vmm: host.program.identity.clone(),
        })
    });
    let incoming = match &saved {
        Some(saved) => Some(sets.add(saved.open_state()?)),
        None => None,
    };
    let wake = match incoming {
        Some(_) => Wake::Incoming,
        None => boot(spec, accel, user.is_some(), &mut inherit)?,
    };
    let kept = spec.keepable;
    let sockets = || {
        if kept {
            listening(&dir_fd)
        } else {
            connected()
        }
    };
    let (near, far) = sockets().map_err(launch_error("make sockets in", dir.dir()))?;
    let listener =
        listen(&dir_fd, CHANNEL_SOCKET).map_err(launch_error("make", &dir.path(CHANNEL_SOCKET)))?;
    let arguments = argv::arguments(&argv::Machine {
        name: dir.process_name(),
        accel,
        cpus: spec.cpus,
        memory: spec.memory,
        ram: ram_file.as_raw_fd(),
        ram_shared: saved.is_none(),
        control: far.control.as_raw_fd(),
        channel: listener.as_raw_fd(),
        console: far.console.as_raw_fd(),
        kept,
        disk_rate: spec.disk_bytes_per_second,
        disks: nodes?,
        sets: sets.numbers(),
        wake,
    });
    let next_set = sets.next();
    inherit.extend([ram_file, far.control, far.console, listener.into()]);
    inherit.extend(sets.fds.into_iter().map(|(fd, _)| fd));
    let groups = host.cgroups.paths_of(&dir.process_name());
    dir.set_launching(&host.program.path, &groups)
        .map_err(record_error)?;
    let procs = enter_group(host.cgroups, &dir, spec);
    let vmm = spawn::Vmm {
        program: host.program.path.clone(),
        args: arguments,
        inherit,
        output: far.output,
        procs,
        user,
        kept,
    };
    Ok(Prepared {
        dir: Arc::new(dir),
        dir_fd,
        disks,
        later,
        vmm,
        near,
        ram,
        template: saved.map(SavedMachine::into_lock),
        next_set,
        incoming,
    })
}

/// Opens their files.
fn open_disks(
    disks: &[MachineDisk],
    spec: &MachineSpec,
    sets: &mut Sets,
) -> Result<Vec<argv::DiskNodes>, LaunchError> {
    let rated = spec.disk_bytes_per_second.is_some();
    disks.iter().map(|disk| disk.open(sets, rated)).collect()
}

type Split = (Vec<MachineDisk>, Vec<kiln_core::DiskSlot>);

/// Makes the disks that are there from the start; gives those that are added later, too.
fn make_disks(
    dir: &MachineDir,
    spec: &MachineSpec,
    saved: Option<&SavedMachine>,
) -> Result<Split, LaunchError> {
    let mut disks = Vec::new();
    let mut later = Vec::new();
    for slot in &spec.disks {
        let frozen = match saved {
            None => None,
            Some(saved) => match saved.frozen(slot.role) {
                Some(frozen) => frozen,
                None => {
                    later.push(slot.clone());
                    continue;
                }
            },
        };
        disks.push(MachineDisk::prepare(dir.dir(), slot, frozen.as_deref())?);
    }
    Ok((disks, later))
}

/// Memory for the VMM, and a copy of the descriptor where it is a machine's own.
fn ram_of(
    memory: ByteSize,
    saved: Option<&SavedMachine>,
) -> Result<(OwnedFd, Option<OwnedFd>), LaunchError> {
    if let Some(saved) = saved {
        return Ok((saved.open_ram()?.into(), None));
    }
    let path = Path::new("guest memory");
    let make = || -> io::Result<(OwnedFd, OwnedFd)> {
        let fd = memfd_create("kiln-ram", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, memory.0)?;
        Ok((fd.try_clone()?, fd))
    };
    let (theirs, ours) = make().map_err(launch_error("make", path))?;
    Ok((theirs, Some(ours)))
}

fn boot(
    spec: &MachineSpec,
    accel: Accel,
    other_user: bool,
    inherit: &mut Vec<OwnedFd>,
) -> Result<Wake, LaunchError> {
    let mut open = |path: &Path| -> Result<i32, LaunchError> {
        let file = readable(path, other_user).map_err(launch_error("open", path))?;
        let number = file.as_raw_fd();
        inherit.push(file);
        Ok(number)
    };
    Ok(Wake::Boot {
        kernel: open(&spec.boot.kernel)?,
        initrd: open(&spec.boot.initrd)?,
        args: spec
            .boot
            .args
            .iter()
            .map(String::as_str)
            .chain(probe::clock_args(accel).iter().copied())
            .map(str::to_owned)
            .collect(),
    })
}

/// A file that the VMM's user may open again through its descriptor: a copy in memory where the file's mode says no.
fn readable(path: &Path, other_user: bool) -> io::Result<OwnedFd> {
    let mut file = File::open(path)?;
    if !other_user || file.metadata()?.permissions().mode() & 0o004 != 0 {
        return Ok(file.into());
    }
    let mut copy = File::from(memfd_create("kiln-boot", MemfdFlags::CLOEXEC)?);
    io::copy(&mut file.by_ref(), &mut copy)?;
    copy.rewind()?;
    Ok(copy.into())
}

/// The KVM device by descriptor: QEMU takes it from 9.0 on. Older ones open it themselves, with their own user's rights.
fn kvm_set(program: &Program, device: &Path, sets: &mut Sets) -> Option<u32> {
    if program.number < (9, 0) {
        return None;
    }
    let file = File::options().read(true).write(true).open(device).ok()?;
    Some(sets.add(file))
}

fn own_user(host: &Host<'_>, dir: &MachineDir) -> Result<Option<u32>, LaunchError> {
    let old_kvm = host.kvm.is_some() && host.program.number < (9, 0);
    match &host.users {
        Some(users) if !old_kvm => {
            let slot = dir.take_uid_slot(host.home).map_err(record_error)?;
            Ok(Some(users.id_of(slot)))
        }
        _ => Ok(None),
    }
}

/// Makes the machine's group and opens its doors. A host without groups runs machines without limits: `kiln doctor` says so.
fn enter_group(host: &CgroupHost, dir: &MachineDir, spec: &MachineSpec) -> Vec<OwnedFd> {
    if host.version().is_none() {
        return Vec::new();
    }
    let limits = Limits::of_guest(spec.cpus, spec.memory);
    let group = host.create(&dir.process_name(), &limits);
    let procs = group.and_then(|group| group.open_procs());
    procs.unwrap_or_else(|error| {
        let why = error.to_string();
        tracing::warn!(machine = %dir.name(), why, "the machine runs without limits on the host");
        Vec::new()
    })
}

async fn run(
    host: &Host<'_>,
    spec: &MachineSpec,
    start: &Start,
    prepared: Prepared,
    stderr: &Ring,
) -> Result<(QemuMachine, Limited), LaunchError> {
    let Prepared {
        dir,
        dir_fd,
        disks,
        vmm,
        near,
        ram,
        template,
        next_set,
        ..
    } = prepared;
    let program = host.program;
    let started = spawn::spawn(vmm).await.map_err(|error| LaunchError::Vmm {
        program: program.path.display().to_string(),
        why: error.to_string(),
    })?;
    let pid = started.child.id();
    let status = Status::new(started.pidfd);
    let opened = open_sockets(spec, start, near);
    let (control, console, output, keepable) = match opened {
        Ok(sockets) => sockets,
        Err(error) => {
            status.kill(StopReason::Killed);
            return Err(launch_error("use sockets in", dir.dir())(error));
        }
    };
    tokio::spawn(stderr.clone().drain(output));
    let body = Body {
        ram,
        pid,
        _template: template,
    };
    let machine = assemble(Parts {
        disks_rated: spec.disk_bytes_per_second.is_some(),
        dir,
        dir_fd,
        body,
        disks,
        status,
        child: Some(started.child),
        control: Qmp::new(control),
        console,
        words: stderr.clone(),
        next_set,
        keepable,
    });
    machine.dir.set_running(pid).map_err(record_error)?;
    // After the record: whoever takes CPUs for himself from now on finds this VMM, and who did before is found here.
    match ledger::settle_started(host.home, pid, &spec.host_cpus) {
        Ok(()) => {}
        Err(error) if spec.host_cpus.is_empty() => {
            tracing::warn!(machine = %machine.name, %error, "the machine runs on any CPU");
        }
        Err(error) => {
            machine.status.kill(StopReason::Killed);
            return Err(launch_error("give CPUs of its own to", machine.dir.dir())(
                error,
            ));
        }
    }
    Ok((machine, started.limited))
}

type Opened = (
    UnixStream,
    UnixStream,
    tokio::net::unix::pipe::Receiver,
    Option<Keepable>,
);

/// This side's ends for the runtime, and copies of those that a release has to end.
fn open_sockets(spec: &MachineSpec, start: &Start, near: Near) -> io::Result<Opened> {
    let copy = |stream: &StdUnixStream| stream.try_clone().map(OwnedFd::from);
    let keepable = match spec.keepable {
        false => None,
        true => Some(Keepable {
            spec: spec.clone(),
            template: match start {
                Start::Cold => None,
                Start::Template(template) => Some(template.clone()),
            },
            connections: [copy(&near.control)?, copy(&near.console)?],
        }),
    };
    Ok((
        UnixStream::from_std(near.control)?,
        UnixStream::from_std(near.console)?,
        tokio::net::unix::pipe::Receiver::from_owned_fd(near.output)?,
        keepable,
    ))
}

/// What makes a [`QemuMachine`] of a process, a new one or an adopted one.
pub(super) struct Parts {
    pub(super) dir: Arc<MachineDir>,
    pub(super) dir_fd: OwnedFd,
    pub(super) body: Body,
    pub(super) disks: Vec<MachineDisk>,
    /// Its disks have a rate: those that are added get their part of it.
    pub(super) disks_rated: bool,
    pub(super) status: Arc<Status>,
    /// To be waited for, when it is this process's.
    pub(super) child: Option<std::process::Child>,
    pub(super) control: (Qmp, tokio::sync::mpsc::Receiver<Event>),
    pub(super) console: UnixStream,
    /// What the VMM itself said.
    pub(super) words: Ring,
    pub(super) next_set: u32,
    pub(super) keepable: Option<Keepable>,
}

/// Takes the sockets into use and watches the process.
pub(super) fn assemble(parts: Parts) -> QemuMachine {
    let (qmp, events) = parts.control;
    let qmp = Arc::new(qmp);
    let console = Ring::new(CONSOLE_BYTES_MAX);
    let reader = tokio::spawn(console.clone().drain(parts.console));
    tokio::spawn(status::monitor(
        Arc::clone(&parts.status),
        parts.child,
        events,
        Arc::clone(&qmp),
        status::Console {
            ring: console.clone(),
            reader,
            words: parts.words,
        },
    ));
    QemuMachine {
        name: parts.dir.name().clone(),
        dir: parts.dir,
        dir_fd: parts.dir_fd,
        body: parts.body,
        disks: Mutex::new(parts.disks),
        disks_rated: parts.disks_rated,
        qmp,
        status: parts.status,
        console,
        channel: Mutex::new(None),
        next_set: AtomicU32::new(parts.next_set),
        keepable: parts.keepable,
    }
}

/// The first commands: all sent at once, answered in order.
async fn wake(
    machine: &QemuMachine,
    incoming: Option<u32>,
    limited: Limited,
) -> Result<(), QmpError> {
    let qmp = &machine.qmp;
    let hello = qmp.send("qmp_capabilities", Value::Null, None).await?;
    let Some(set) = incoming else {
        within(CONTROL_DEADLINE, hello).await?;
        wait_for_limits(machine, limited).await;
        return Ok(());
    };
    let features = save::migration_features();
    let features = qmp.send("migrate-set-capabilities", features, None).await?;
    let source = json!({ "uri": format!("file:/dev/fdset/{set}") });
    let source = qmp.send("migrate-incoming", source, None).await?;
    for answer in [hello, features, source] {
        within(CONTROL_DEADLINE, answer).await?;
    }
    let done = tokio::time::timeout(INCOMING_DEADLINE, machine.status.migrated()).await;
    match done {
        Ok(Migration::Completed) => {}
        Ok(_) => {
            return Err(QmpError::Refused(
                "the saved device state was not accepted".into(),
            ));
        }
        Err(_) => return Err(QmpError::Timeout(INCOMING_DEADLINE)),
    }
    wait_for_limits(machine, limited).await;
    qmp.call("cont", Value::Null, CONTROL_DEADLINE)
        .await
        .map(drop)
}

/// No clone's guest runs a step outside its group; a cold guest has not left its firmware by then.
async fn wait_for_limits(machine: &QemuMachine, limited: Limited) {
    let result = limited
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()));
    if let Err(error) = result {
        tracing::warn!(machine = %machine.name, %error, "the machine runs without limits on the host");
    }
}

async fn within(
    deadline: Duration,
    answer: tokio::sync::oneshot::Receiver<Result<Value, QmpError>>,
) -> Result<(), QmpError> {
    match tokio::time::timeout(deadline, answer).await {
        Ok(Ok(answer)) => answer.map(drop),
        Ok(Err(_)) => Err(QmpError::Ended),
        Err(_) => Err(QmpError::Timeout(deadline)),
    }
}

/// Turns a failed start into words, with QEMU's own if it had any.
async fn explain(
    machine: &QemuMachine,
    start: &Start,
    error: QmpError,
    stderr: &Ring,
) -> LaunchError {
    let ended = machine.status.stopped_within(LAST_WORDS).await.is_some();
    if !ended {
        machine.status.kill(StopReason::Killed);
        machine.status.stopped_within(END_DEADLINE).await;
    }
    let words = stderr.text().trim().to_owned();
    let why = if words.is_empty() {
        error.to_string()
    } else {
        format!("{error}: {words}")
    };
    match (start, error) {
        (Start::Template(template), QmpError::Refused(_)) => LaunchError::Template {
            key: template.key.clone(),
            why,
        },
        (_, QmpError::Timeout(deadline)) => LaunchError::Timeout(deadline),
        _ => LaunchError::VmmDied { stderr: why },
    }
}

fn record_error(error: RecordError) -> LaunchError {
    match error {
        RecordError::Io {
            action,
            path,
            source,
        } => launch_error(action, &path)(source),
        other => LaunchError::Io {
            action: "keep a record of",
            path: "the machine".into(),
            source: io::Error::other(other),
        },
    }
}
