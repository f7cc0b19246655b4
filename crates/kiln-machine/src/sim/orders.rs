//! Answers of the simulated guest to the host's orders.

use std::sync::Arc;

use kiln_proto::msg::{
    CallResult, GuestError, GuestErrorCode, Identity, MachineStats, Mount, Mounted, Order,
    OrderReply, Place, Quiesced, Reidentified,
};
use kiln_proto::{Inbound, write_msg};
use tokio::io::AsyncWriteExt as _;

use super::disk::{Files, read_disk};
use super::fault::{Lie, Step};
use super::guest::Guest;
use super::memory::mount_path;
use crate::driver::StopReason;

/// Size that every simulated filesystem claims.
const DISK_BYTES: u64 = 1 << 30;

/// How late the clock of a guest that lies about it is: a day.
const CLOCK_LIE_NS: u64 = 86_400 * 1_000_000_000;

/// First argument of the command that [`Order::PrepareContainer`] answers with.
pub(super) const CONTAINER_COMMAND: &str = "kiln-sim-container";

pub(super) async fn serve(guest: &Arc<Guest>, inbound: Inbound) {
    let mut stream = inbound.stream;
    let order: Order = match serde_json::from_slice(&inbound.payload) {
        Ok(order) => order,
        Err(error) => {
            let refusal: CallResult = Err(invalid(&error.to_string()));
            let _ = write_msg(&mut stream, &refusal).await;
            let _ = stream.shutdown().await;
            return;
        }
    };
    let reply: CallResult = match guest.meet(Step::of(&order), stream.id()).await {
        Ok(()) => answer(guest, &order),
        Err(refusal) => Err(refusal),
    };
    let done = reply.is_ok();
    let _ = write_msg(&mut stream, &reply).await;
    let _ = stream.shutdown().await;
    if done && order == Order::Shutdown {
        flush_all(guest);
        guest.power_off(StopReason::PoweredOff);
    }
}

fn answer(guest: &Guest, order: &Order) -> CallResult {
    Ok(match order {
        Order::Quiesce => OrderReply::Quiesced(quiesce(guest)),
        Order::Reidentify(identity) => OrderReply::Reidentified(reidentify(guest, identity)?),
        Order::Thaw => {
            guest.memory().frozen = false;
            OrderReply::Done
        }
        Order::Mount(wanted) => OrderReply::Mounted(mount(guest, wanted)?),
        Order::Unmount { serial } => {
            unmount(guest, serial)?;
            OrderReply::Done
        }
        Order::SetLimits { memory_max, .. } => {
            guest.memory().memory_max = *memory_max;
            OrderReply::Done
        }
        Order::SetConnections { .. } => OrderReply::Done,
        Order::SetStepEnv { env } => {
            guest.memory().step_env.clone_from(env);
            OrderReply::Done
        }
        Order::StartBuildkit(_) => {
            start_buildkit(guest)?;
            OrderReply::Done
        }
        Order::StopBuildkit => {
            guest.memory().buildkit = false;
            OrderReply::Done
        }
        Order::PrepareContainer(container) => {
            let mut argv = vec![CONTAINER_COMMAND.to_owned()];
            argv.extend(container.argv.iter().cloned());
            OrderReply::Prepared { argv }
        }
        Order::NameServices { .. } => OrderReply::Done,
        Order::RemoveTree { place } => {
            let below = format!("{}/", place_path(place));
            guest
                .memory()
                .files
                .retain(|path, _| !path.starts_with(&below));
            OrderReply::Done
        }
        Order::Stats => OrderReply::Stats(stats(guest)),
        Order::Shutdown => OrderReply::Done,
    })
}

fn quiesce(guest: &Guest) -> Quiesced {
    let frozen = !guest.lies(Lie::NotFrozen);
    guest.memory().frozen = frozen;
    let _ = flush_all(guest);
    let memory = guest.memory();
    Quiesced {
        frozen,
        open_streams: guest.other_streams(),
        secret_issued: memory.secret_issued || guest.lies(Lie::SecretIssued),
        job_ran: memory.job_ran,
    }
}

fn reidentify(guest: &Guest, wanted: &Identity) -> Result<Reidentified, GuestError> {
    let seed = hex::decode(&wanted.seed)
        .ok()
        .filter(|seed| seed.len() == 32)
        .ok_or_else(|| invalid("the seed is not 64 hex digits"))?;
    let mut memory = guest.memory();
    let entropy_added = !guest.lies(Lie::NoEntropy);
    let reseeded = !guest.lies(Lie::NoReseed);
    if entropy_added && reseeded && !guest.lies(Lie::RepeatedRandom) {
        memory.reseed(&seed);
    }
    let late = if guest.lies(Lie::Clock) {
        CLOCK_LIE_NS
    } else {
        0
    };
    memory.set_wall_ns(wanted.wall_unix_ns.saturating_sub(late));
    if !guest.lies(Lie::BootId) {
        memory.boot_id.clone_from(&wanted.boot_id);
    }
    if !guest.lies(Lie::MachineId) {
        memory.machine_id.clone_from(&wanted.machine_id);
    }
    if !guest.lies(Lie::Hostname) {
        memory.hostname.clone_from(&wanted.hostname);
    }
    let sample = hex::encode(&memory.draw()[..16]);
    Ok(Reidentified {
        entropy_added,
        reseeded,
        sample,
        wall_unix_ns: memory.wall_ns(),
        boot_id: memory.boot_id.clone(),
        machine_id: memory.machine_id.clone(),
        hostname: memory.hostname.clone(),
        workload_ran: memory.workload_ran + u64::from(guest.lies(Lie::WorkloadRan)),
    })
}

fn mount(guest: &Guest, wanted: &Mount) -> Result<Mounted, GuestError> {
    let mut memory = guest.memory();
    let disk = memory
        .disks
        .get_mut(&wanted.serial)
        .ok_or_else(|| GuestError {
            code: GuestErrorCode::NotFound,
            message: format!("no disk {} appeared", wanted.serial),
        })?;
    if !disk.writable && !wanted.read_only {
        return Err(invalid("the disk is read-only"));
    }
    if disk.mounted.is_none() {
        let found = read_disk(&disk.file).map_err(|error| GuestError {
            code: GuestErrorCode::System,
            message: error.to_string(),
        })?;
        disk.mounted = Some(match found {
            Some(files) => files,
            None if wanted.format_blank => Files::new(),
            None => return Err(invalid("the disk is blank")),
        });
    }
    Ok(Mounted {
        path: mount_path(disk.role),
        bytes_total: DISK_BYTES,
        bytes_free: DISK_BYTES / 2,
    })
}

fn unmount(guest: &Guest, serial: &str) -> Result<(), GuestError> {
    let mut memory = guest.memory();
    if memory.buildkit && serial == kiln_core::DiskRole::State.serial() {
        return Err(invalid("BuildKit runs on this disk"));
    }
    let disk = memory
        .disks
        .get_mut(serial)
        .filter(|disk| disk.mounted.is_some())
        .ok_or_else(|| invalid("no such disk is mounted"))?;
    let flushed = disk.flush();
    disk.mounted = None;
    flushed.map_err(|error| GuestError {
        code: GuestErrorCode::System,
        message: error.to_string(),
    })
}

fn start_buildkit(guest: &Guest) -> Result<(), GuestError> {
    let mut memory = guest.memory();
    let state = memory.disks.get(kiln_core::DiskRole::State.serial());
    if state.is_none_or(|disk| disk.mounted.is_none()) {
        return Err(invalid("the state disk is not mounted"));
    }
    memory.buildkit = true;
    Ok(())
}

fn stats(guest: &Guest) -> MachineStats {
    let memory = guest.memory();
    MachineStats {
        memory_bytes: memory.bytes(),
        memory_peak: memory.bytes(),
        cpu_ms: 1,
        oom_kills: memory.oom_kills,
        state_bytes_free: DISK_BYTES / 2,
        scratch_bytes_free: None,
        processes_refused: 0,
        processes_max: 0,
        full_memory: None,
    }
}

/// Writes mounted disks to their files. What fails stays unwritten, as on a real disk.
pub(super) fn flush_all(guest: &Guest) -> bool {
    guest
        .memory()
        .disks
        .values()
        .all(|disk| disk.flush().is_ok())
}

/// Where a place lies in the guest.
pub(super) fn place_path(place: &Place) -> String {
    match place {
        Place::Context { name } => format!("/kiln/context/{name}"),
        Place::Dockerfile { name } => format!("/kiln/dockerfile/{name}"),
        Place::Work => "/work".to_owned(),
        Place::ImageLayer { index } => format!("/kiln/layers/{index}"),
        Place::Secret { id } => format!("/run/kiln/secrets/{id}"),
        Place::CaBundle => "/run/kiln/ca.pem".to_owned(),
    }
}

pub(super) fn invalid(message: &str) -> GuestError {
    GuestError {
        code: GuestErrorCode::Invalid,
        message: message.to_owned(),
    }
}
