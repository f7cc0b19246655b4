//! PID 1 of a machine: mounts, commands, trees, forwards, DNS and egress.
//!
//! One static binary with four names: as PID 1 it boots the machine and serves its channel for ever; called as
//! [`oci_wrapper::NAME`] it stands between BuildKit and runc, as [`solve_client::NAME`] between the host and BuildKit's client,
//! as [`container_init::NAME`] it is PID 1 of a container. It decides nothing about policy: it asks the host.
//! Read next: `boot` (power-on to channel), `serve` (sessions and streams), `orders` (what the host can ask).

mod boot;
mod buildkit;
mod cgroup;
mod channel;
mod container;
mod container_init;
mod error;
mod exec;
mod fd;
mod freezer;
mod identity;
mod late_config;
mod log;
mod memory;
mod modules;
mod mounts;
mod net;
mod netlink;
mod oci_wrapper;
mod orders;
mod reaper;
mod serve;
mod solve_client;
mod state;
mod tool;
mod tree;
mod uevent;

use std::path::Path;
use std::process::ExitCode;

use rustix::process::Pid;

/// Exit code for a call that makes no sense.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    let called = Path::new(&name).file_name().unwrap_or_default();
    if called == oci_wrapper::NAME {
        return oci_wrapper::main(&arguments.collect::<Vec<_>>());
    }
    if called == solve_client::NAME {
        return solve_client::main(&arguments.collect::<Vec<_>>());
    }
    if called == container_init::NAME {
        return container_init::main(&arguments.collect::<Vec<_>>());
    }
    if rustix::process::getpid() != Pid::INIT {
        log::raw("kiln-guest: this program is PID 1 of a machine and does nothing elsewhere");
        return ExitCode::from(USAGE);
    }
    keep_memory();
    std::panic::set_hook(Box::new(|info| boot::die(&info.to_string())));
    match boot::boot().and_then(|()| serve::run()) {
        Ok(never) => match never {},
        Err(error) => boot::die(&error::chain(&error)),
    }
}

/// What this program once had from the kernel it keeps, so that a clone need not ask for it again: that would be code which its
/// processor has not run yet, a tenth of its start. Large blocks still go back.
#[expect(
    unsafe_code,
    reason = "the allocator's settings have no safe interface"
)]
fn keep_memory() {
    const LARGE: i32 = 4 * 1024 * 1024;
    const KEPT: i32 = 16 * 1024 * 1024;
    /// More than a session and a command take.
    const TOUCHED: usize = 1024 * 1024;
    // SAFETY: numbers only; called before any other thread runs.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
    // Each page is the kernel's to give on its first touch.
    std::hint::black_box(vec![1_u8; TOUCHED]);
}
