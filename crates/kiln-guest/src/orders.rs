//! What the host can ask of the machine, one function each.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kiln_core::DiskRole;
use kiln_proto::msg::{CallResult, GuestError, MachineStats, Order, OrderReply, Quiesced};
use rustix::system::{RebootCommand, reboot, sysinfo};

use crate::error::{SysError, chain, invalid};
use crate::state::Guest;
use crate::{buildkit, container, exec, identity, log, mounts, oci_wrapper, tree};

/// Memory that stays outside the workload: the kernel, the guest, its buffers.
const MEMORY_RESERVE: u64 = 64 * 1024 * 1024;
/// The reserve is at most this part of all memory.
const MEMORY_RESERVE_PART: u64 = 8;
/// Processes and threads of the workload unless the host says otherwise.
const PIDS_MAX: u64 = 16_384;
/// How long processes may take to end at power-off before they are killed.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// Carries out one order.
pub(crate) async fn carry_out(guest: Arc<Guest>, order: Order) -> CallResult {
    match order {
        Order::Quiesce => quiesce(&guest).await.map(OrderReply::Quiesced),
        Order::Reidentify(identity) => {
            guest.freezer.freeze().await?;
            identity::take(&guest, &identity).map(OrderReply::Reidentified)
        }
        Order::Thaw => {
            guest.freezer.thaw().await?;
            Ok(OrderReply::Done)
        }
        Order::SetLimits {
            memory_max,
            pids_max,
            disk_bytes_max,
            open_files_max,
        } => {
            bound_workload(&guest, memory_max, pids_max)?;
            guest.bound_open_files(open_files_max);
            if disk_bytes_max > 0 {
                mounts::bound_state(&guest, disk_bytes_max).await?;
            }
            Ok(OrderReply::Done)
        }
        Order::Mount(mount) => mounts::mount_disk(&guest, mount)
            .await
            .map(OrderReply::Mounted),
        Order::Unmount { serial } => {
            if serial == DiskRole::State.serial() && buildkit::is_running(&guest).await {
                return Err(invalid("BuildKit runs on the state disk"));
            }
            mounts::unmount_disk(&guest, &serial).await?;
            Ok(OrderReply::Done)
        }
        Order::RemoveTree { place } => {
            tree::remove_tree(&guest, &place).await?;
            Ok(OrderReply::Done)
        }
        Order::Stats => Ok(OrderReply::Stats(stats(&guest).await)),
        Order::Shutdown => shut_down(&guest).await,
        Order::SetConnections { most } => {
            guest.net.allow_connections(most);
            Ok(OrderReply::Done)
        }
        Order::SetStepEnv { env } => {
            oci_wrapper::Settings { env }.store()?;
            Ok(OrderReply::Done)
        }
        Order::StartBuildkit(config) => {
            buildkit::start(&guest, config).await?;
            Ok(OrderReply::Done)
        }
        Order::StopBuildkit => {
            buildkit::stop(&guest).await?;
            Ok(OrderReply::Done)
        }
        Order::PrepareContainer(spec) => {
            let argv = container::prepare(&guest, *spec).await?;
            Ok(OrderReply::Prepared { argv })
        }
        Order::NameServices { names } => {
            identity::name_services(&guest, names)?;
            guest.net.forget_names();
            Ok(OrderReply::Done)
        }
    }
}

/// Memory in this machine, bytes.
fn memory_total() -> u64 {
    let info = sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit))
}

/// The workload's bound: what was asked, at most what the machine has less a reserve.
fn workload_memory(asked: u64, total: u64) -> u64 {
    let most = total - MEMORY_RESERVE.min(total / MEMORY_RESERVE_PART);
    if asked == 0 { most } else { asked.min(most) }
}

/// Bounds the workload as a whole; 0 means what is usual.
pub(crate) fn bound_workload(guest: &Guest, memory: u64, pids: u64) -> Result<(), SysError> {
    guest
        .workload
        .limit_memory(workload_memory(memory, memory_total()))?;
    guest
        .workload
        .limit_pids(if pids == 0 { PIDS_MAX } else { pids })
}

async fn quiesce(guest: &Arc<Guest>) -> Result<Quiesced, GuestError> {
    guest.prepared().await;
    guest.freezer.freeze().await?;
    let synced = tokio::task::spawn_blocking(rustix::fs::sync).await;
    synced.map_err(|error| invalid(error.to_string()))?;
    Ok(Quiesced {
        frozen: guest.freezer.kernel_says_frozen(),
        open_streams: guest.open_streams().saturating_sub(1),
        secret_issued: guest.secret_issued.load(Ordering::Relaxed),
        job_ran: guest.job_ran.load(Ordering::Relaxed),
    })
}

async fn stats(guest: &Guest) -> MachineStats {
    let workload = &guest.workload;
    MachineStats {
        memory_bytes: workload.number("memory.current"),
        memory_peak: workload.number("memory.peak"),
        cpu_ms: guest.freezer.used() / 1000,
        oom_kills: guest.memory.kills(workload),
        state_bytes_free: mounts::bytes_free(guest, mounts::STATE).await.unwrap_or(0),
        scratch_bytes_free: mounts::bytes_free(guest, mounts::SCRATCH).await,
        processes_refused: workload.value("pids.events", "max"),
        processes_max: workload.number("pids.max"),
        full_memory: mounts::full_memory(guest).await,
    }
}

async fn shut_down(guest: &Arc<Guest>) -> CallResult {
    let _already = guest.freezer.thaw().await;
    if let Err(error) = buildkit::stop(guest).await {
        log::warn(&error.message);
    }
    stop_all(guest).await;
    mounts::unmount_all(guest).await;
    rustix::fs::sync();
    Ok(OrderReply::Done)
}

/// Switches the machine off. Returns only when that fails.
pub(crate) fn power_off() {
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        log::error(&format!("the machine does not power off: {error}"));
    }
}

/// Ends every process of the workload: asked first, then killed.
#[expect(unsafe_code, reason = "a signal to all processes")]
async fn stop_all(guest: &Guest) {
    // SAFETY: plain system call without pointers; PID 1 itself is never meant by -1.
    let _none_left = unsafe { libc::kill(-1, libc::SIGTERM) };
    if guest.workload.emptied(STOP_GRACE).await.is_err() {
        let _gone = guest.workload.kill();
        if let Err(error) = guest.workload.emptied(exec::KILL_WAIT).await {
            log::warn(&chain(&error));
        }
    }
    // SAFETY: as above.
    let _none_left = unsafe { libc::kill(-1, libc::SIGKILL) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workload_leaves_a_reserve() {
        const MIB: u64 = 1024 * 1024;
        assert_eq!(workload_memory(0, 2048 * MIB), 1984 * MIB);
        assert_eq!(workload_memory(0, 128 * MIB), 112 * MIB);
        assert_eq!(workload_memory(100 * MIB, 2048 * MIB), 100 * MIB);
        assert_eq!(workload_memory(9999 * MIB, 2048 * MIB), 1984 * MIB);
    }
}
