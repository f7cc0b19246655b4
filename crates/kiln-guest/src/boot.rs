//! From power-on to a root filesystem: the part that runs before anything can be waited for.
//!
//! We start as `/init` of the initial RAM disk. With a root disk attached, the machine's root becomes an overlay:
//! the shared read-only disk below, a tmpfs above. Without one we stay where we are and serve all the same
//! (the accelerator probe does that). No udev, no shell, nothing that is not needed.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiln_core::DiskRole;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{chdir, chroot};
use rustix::system::{RebootCommand, reboot};

use crate::error::{Context, SysError};
use crate::{identity, log, modules, uevent};

/// How long the root disk may take to appear when any disk is attached.
const ROOT_WAIT: Duration = Duration::from_secs(5);
/// Host name until the host gives one.
const HOSTNAME: &str = "kiln";
/// Most of the memory that the writable layer of the root may take.
const UPPER_SIZE: &str = "size=50%,mode=755";
/// Open files: soft and hard bound for everything started here.
pub(crate) const OPEN_FILES_MAX: u64 = 1_048_576;
/// Most CPUs brought up.
const CPUS_MAX: u32 = 256;

/// Set once the root disk is the root.
static ROOT_DISK: AtomicBool = AtomicBool::new(false);

const PLAIN: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// Mounts, loads modules, and switches to the root disk if there is one.
///
/// # Errors
/// What stands in the way of a working machine.
pub(crate) fn boot() -> Result<(), SysError> {
    rustix::process::umask(rustix::fs::Mode::WGRP | rustix::fs::Mode::WOTH);
    mount_at(
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MountFlags::NOSUID,
        Some(c"mode=0755"),
    )?;
    console();
    mount_at("proc", "/proc", "proc", PLAIN, None)?;
    mount_at("sysfs", "/sys", "sysfs", PLAIN, None)?;
    parameters(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    log::debug("early mounts done");
    modules::load_all(Path::new(modules::DIR));
    log::debug("modules loaded");
    if let Some(disk) = find_root() {
        switch_root(&disk)?;
        ROOT_DISK.store(true, Ordering::Relaxed);
        log::debug("root switched");
    }
    rest_of_mounts()?;
    for directory in [
        "/work", "/scratch", "/source", "/image", "/var/tmp", "/root",
    ] {
        directory_at(directory)?;
    }
    identity::prepare(HOSTNAME)?;
    reboot(RebootCommand::CadOff).context(|| "switch off ctrl-alt-del".to_owned())?;
    limits();
    settings();
    Ok(())
}

/// Whether the machine's root is a disk. A kernel that shows none leaves us in the initial RAM disk.
pub(crate) fn has_root_disk() -> bool {
    ROOT_DISK.load(Ordering::Relaxed)
}

/// Says why on the console and powers off. Never returns: PID 1 may not end.
pub(crate) fn die(why: &str) -> ! {
    log::raw(&format!("kiln-guest: fatal: {why}"));
    rustix::fs::sync();
    let _no_power_off = reboot(RebootCommand::PowerOff);
    loop {
        rustix::thread::sched_yield();
    }
}

fn directory_at(path: &str) -> Result<(), SysError> {
    fs::create_dir_all(path).context(|| format!("make directory {path}"))
}

fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    data: Option<&std::ffi::CStr>,
) -> Result<(), SysError> {
    directory_at(target)?;
    mount(source, target, kind, flags, data).context(|| format!("mount {kind} on {target}"))
}

/// The kernel found no console in an empty `/dev`: take it now. Without one, say nothing.
fn console() {
    let console = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/console");
    let Ok(console) =
        console.or_else(|_| OpenOptions::new().read(true).write(true).open("/dev/null"))
    else {
        return;
    };
    let _in = rustix::stdio::dup2_stdin(&console);
    let _out = rustix::stdio::dup2_stdout(&console);
    let _err = rustix::stdio::dup2_stderr(&console);
}

/// kiln's own kernel parameters; all others are the kernel's.
fn parameters(cmdline: &str) {
    for word in cmdline.split_ascii_whitespace() {
        if let Some(level) = word.strip_prefix("kiln.log=").and_then(log::Level::parse) {
            log::set_level(level);
        }
    }
}

fn find_root() -> Option<uevent::Disk> {
    let sys_block = Path::new("/sys/block");
    if !uevent::any_disk(sys_block) {
        log::debug("no disk is attached");
        return None;
    }
    match uevent::wait_for(DiskRole::Root.serial(), ROOT_WAIT) {
        Ok(disk) => Some(disk),
        Err(error) => {
            log::warn(&format!("no root disk: {error}"));
            None
        }
    }
}

fn switch_root(disk: &uevent::Disk) -> Result<(), SysError> {
    let lower = "/kiln-root/lower";
    let upper = "/kiln-root/upper";
    let merged = "/kiln-root/merged";
    for directory in [lower, upper, merged] {
        directory_at(directory)?;
    }
    let read_only = MountFlags::RDONLY | MountFlags::NOATIME;
    mount(&disk.node, lower, "ext4", read_only, None)
        .context(|| format!("mount the root disk {}", disk.node.display()))?;
    let size = std::ffi::CString::new(UPPER_SIZE).unwrap_or_default();
    mount(
        "tmpfs",
        upper,
        "tmpfs",
        MountFlags::empty(),
        size.as_c_str(),
    )
    .context(|| "mount the writable layer".to_owned())?;
    directory_at("/kiln-root/upper/data")?;
    directory_at("/kiln-root/upper/work")?;
    let layers =
        c"lowerdir=/kiln-root/lower,upperdir=/kiln-root/upper/data,workdir=/kiln-root/upper/work";
    mount("overlay", merged, "overlay", MountFlags::NOATIME, layers)
        .context(|| "mount the root overlay".to_owned())?;
    for inner in ["dev", "proc", "sys"] {
        let target = format!("{merged}/{inner}");
        directory_at(&target)?;
        mount_move(format!("/{inner}"), &target).context(|| format!("move /{inner}"))?;
    }
    // The initial RAM disk lives in memory for ever: free what it held.
    let _not_there = fs::remove_dir_all(modules::DIR);
    let _not_there = fs::remove_file("/init");
    chdir(merged).context(|| "enter the new root".to_owned())?;
    mount_move(".", "/").context(|| "move the new root to /".to_owned())?;
    chroot(".").context(|| "change root".to_owned())?;
    chdir("/").context(|| "enter /".to_owned())
}

fn rest_of_mounts() -> Result<(), SysError> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    let pts = c"gid=5,mode=620,ptmxmode=666";
    mount_at(
        "devpts",
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        Some(pts),
    )?;
    mount_at("tmpfs", "/dev/shm", "tmpfs", safe, Some(c"mode=1777"))?;
    mount_at("tmpfs", "/run", "tmpfs", safe, Some(c"mode=755"))?;
    mount_at("tmpfs", "/tmp", "tmpfs", safe, Some(c"mode=1777"))?;
    mount_at(
        "cgroup2",
        "/sys/fs/cgroup",
        "cgroup2",
        PLAIN,
        Some(c"favordynmods"),
    )?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        let _exists = symlink(target, link);
    }
    directory_at("/run/kiln")?;
    directory_at("/run/lock")
}

fn limits() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let files = Rlimit {
        current: Some(OPEN_FILES_MAX),
        maximum: Some(OPEN_FILES_MAX),
    };
    if let Err(error) = setrlimit(Resource::Nofile, files) {
        log::warn(&format!("the bound on open files stays: {error}"));
    }
}

/// Kernel settings of a machine. None is vital; each failure is told.
fn settings() {
    for (path, value) in [
        // Nothing but IPv4 on loopback exists here.
        ("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1"),
        ("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"),
        // Images whose user is not root may serve port 80, as under Docker.
        ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
        ("/proc/sys/fs/inotify/max_user_instances", "1024"),
        // A program that crashes leaves no image of its memory, which may hold a secret, on a disk (core(5), "Piping core dumps to a program").
        ("/proc/sys/kernel/core_pattern", "|/bin/false"),
        // Its thread would wake up twice a second, in every clone for the first time.
        ("/proc/sys/vm/compaction_proactiveness", "0"),
        // Statistics that nobody reads need not be gathered every second.
        ("/proc/sys/vm/stat_interval", "600"),
    ] {
        match fs::write(path, value) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                log::warn(&format!("{path} was not set: {error}"));
            }
            _ => {}
        }
    }
}

/// Brings up CPUs that the kernel was told to leave for later (`maxcpus=1` boots faster). Blocks.
pub(crate) fn start_cpus() {
    for cpu in 1..CPUS_MAX {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        let Ok(state) = fs::read_to_string(&path) else {
            return;
        };
        if state.trim() == "0"
            && let Err(error) = fs::write(&path, "1")
        {
            log::warn(&format!("CPU {cpu} stays down: {error}"));
        }
    }
}
