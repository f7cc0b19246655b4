//! From a kept machine's record to a [`QemuMachine`] of this process: the VMM's own sockets, its state, its descriptor sets.
//!
//! QEMU serves one connection per socket and takes the next from its queue when that one ends, as the dead owner's has. It forgets what
//! its control socket had agreed on, so the new owner begins as the first one did. What QEMU told while nobody listened is lost; its
//! present state says what matters.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::net::UnixStream;

use super::console::Ring;
use super::disks::MachineDisk;
use super::launch::{Parts, STDERR_BYTES_MAX, assemble};
use super::machine::{Body, CONTROL_DEADLINE, Keepable, QemuMachine, Ram, control_failure};
use super::qmp::Qmp;
use super::sockets::socket_path;
use super::status::Status;
use super::{CONSOLE_SOCKET, CONTROL_SOCKET};
use crate::adopt::Taken;
use crate::driver::{AdoptError, MachineError, MachineState};
use crate::template;

/// Connects to the VMM of a machine that was taken. On an error, and when this is dropped, the machine is let go of; one that is gone
/// is removed.
pub(super) async fn adopt(taken: Taken) -> Result<QemuMachine, AdoptError> {
    let failed = |action: &'static str| {
        let path = taken.dir().dir().to_owned();
        move |source: io::Error| AdoptError::Io {
            action,
            path,
            source,
        }
    };
    let pidfd = taken.vmm.open().map_err(failed("watch the VMM of"))?;
    let Some(pidfd) = pidfd else {
        return Err(taken.remove(ENDED.to_owned()).await);
    };
    let sockets = connect(&taken).await;
    let sockets = sockets.map_err(failed("connect to the sockets in"))?;
    let control = Qmp::new(sockets.control);
    let next_set = match ask(&control.0).await {
        Ok(Found::Runs { next_set }) => next_set,
        Ok(Found::Stands(state)) => {
            let why = format!("its guest does not run any more (QEMU says {state:?})");
            return Err(taken.remove(why).await);
        }
        Err(_) if !taken.vmm.is_alive() => return Err(taken.remove(ENDED.to_owned()).await),
        Err(source) => {
            let name = taken.dir().name().clone();
            return Err(AdoptError::Control { name, source });
        }
    };
    let pid = taken.vmm.pid;
    let status = Status::new(pidfd);
    // Before the events that came since are heeded.
    status.advance(MachineState::Running);
    let (dir, kept) = taken.own();
    // A template that was removed meanwhile lives on as long as its memory is mapped.
    let lock = kept.template.as_ref().map(template::lock_for_use);
    let disks = kept.spec.disks.iter();
    Ok(assemble(Parts {
        disks_rated: kept.spec.disk_bytes_per_second.is_some(),
        disks: disks
            .map(|slot| MachineDisk::adopted(dir.dir(), slot))
            .collect(),
        dir,
        dir_fd: sockets.dir_fd,
        body: Body {
            ram: Ram::Adopted,
            pid,
            _template: lock.and_then(Result::ok),
        },
        status,
        child: None,
        control,
        console: sockets.console,
        words: Ring::new(STDERR_BYTES_MAX),
        next_set,
        keepable: Some(Keepable {
            spec: kept.spec,
            template: kept.template,
            connections: sockets.copies,
        }),
    }))
}

/// Longest wait for room in the queue of a socket of QEMU's.
const ROOM_WAIT_MAX: Duration = Duration::from_secs(5);
/// Between two tries: nothing tells of room.
const ROOM_POLL: Duration = Duration::from_millis(10);
/// Why a machine without a process is gone.
const ENDED: &str = "its VMM has ended";

struct Sockets {
    dir_fd: OwnedFd,
    control: UnixStream,
    console: UnixStream,
    copies: [OwnedFd; 2],
}

/// Connects when there is room: QEMU's sockets let one connection wait, and the one of an owner that gave up may still do so.
async fn connect_to(path: &str) -> io::Result<UnixStream> {
    let end = Instant::now() + ROOM_WAIT_MAX;
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                tokio::time::sleep(ROOM_POLL).await;
            }
            connected => return connected,
        }
    }
}

async fn connect(taken: &Taken) -> io::Result<Sockets> {
    let dir_fd: OwnedFd = File::open(taken.dir().dir())?.into();
    let control = connect_to(&socket_path(&dir_fd, CONTROL_SOCKET)).await?;
    let console = connect_to(&socket_path(&dir_fd, CONSOLE_SOCKET)).await?;
    let copies = [
        control.as_fd().try_clone_to_owned()?,
        console.as_fd().try_clone_to_owned()?,
    ];
    Ok(Sockets {
        dir_fd,
        control,
        console,
        copies,
    })
}

/// How QEMU stands.
enum Found {
    /// The guest runs; the first number that no descriptor set has.
    Runs { next_set: u32 },
    /// It will not run again: powered off, reset, or stopped by an error.
    Stands(String),
}

async fn ask(qmp: &Qmp) -> Result<Found, MachineError> {
    let call = async |command| {
        let answer = qmp.call(command, Value::Null, CONTROL_DEADLINE).await;
        answer.map_err(|error| control_failure(command, error))
    };
    call("qmp_capabilities").await?;
    let state = call("query-status").await?;
    if state["running"].as_bool() != Some(true) {
        let word = state["status"].as_str().unwrap_or("nothing");
        return Ok(Found::Stands(word.chars().take(STATE_CHARS_MAX).collect()));
    }
    let sets = call("query-fdsets").await?;
    let numbers = sets.as_array().into_iter().flatten();
    let highest = numbers.filter_map(|set| set["fdset-id"].as_u64()).max();
    let next_set = highest.unwrap_or(0).saturating_add(1);
    Ok(Found::Runs {
        next_set: u32::try_from(next_set).unwrap_or(u32::MAX),
    })
}

/// Characters of QEMU's state that are shown.
const STATE_CHARS_MAX: usize = 64;
