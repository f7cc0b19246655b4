//! The computer: QEMU, accelerator, isolation, limits, memory, disk, user namespaces, programs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use kiln_core::ByteSize;
use kiln_image::bake::MachineImages;
use kiln_machine::cgroup::CgroupHost;
use kiln_machine::driver::{Check, Driver as _, LaunchError};
use kiln_machine::qemu::{QemuConfig, QemuDriver};
use kiln_worker::home::Home;
use kiln_worker::host::Host;
use kiln_worker::image::CurrentImage;
use kiln_worker::kept::Facts;

use super::{fail, pass, warn};
use crate::environment;
use crate::error::chain;

/// Free disk below which builds are likely to fail.
const DISK_LOW: ByteSize = ByteSize::gib(10);
/// Free disk below which nothing works.
const DISK_MIN: ByteSize = ByteSize::gib(2);
/// Memory for machines below which only small runs fit.
const MEMORY_LOW: ByteSize = ByteSize::gib(2);
/// Longest time a program may take to try a user namespace.
const TRY_TIMEOUT: Duration = Duration::from_secs(10);
/// Subordinate ids that a bake maps.
const SUB_IDS_MIN: u64 = 65_536;

/// QEMU and what it may do here. Boots a tiny guest the first time in each boot of the host.
pub(super) async fn machines(home: &Home) -> Vec<Check> {
    let boot = match MachineImages::new(home.images()).current() {
        // Verified first: a damaged kernel must not decide about KVM.
        Ok(_) => {
            let home = home.clone();
            let opened = tokio::task::spawn_blocking(move || {
                CurrentImage::open(&home).ok().map(|image| image.boot)
            });
            opened.await.ok().flatten()
        }
        Err(_) => None,
    };
    let config = QemuConfig {
        probe_boot: boot,
        ..QemuConfig::new(&home.data)
    };
    match QemuDriver::new(config) {
        Ok(driver) => driver.probe().await.checks,
        Err(error) => {
            let hint = match &error {
                LaunchError::Vmm { .. } => {
                    "install QEMU 8.2 or newer: apt-get install qemu-system-x86 qemu-utils"
                }
                _ => "see above",
            };
            let mut checks = vec![fail("qemu", chain(&error), hint)];
            checks.extend(CgroupHost::detect().checks());
            checks.push(kiln_machine::pins::check());
            checks
        }
    }
}

/// Memory, disk, user namespaces.
pub(super) async fn computer(home: &Home) -> Vec<Check> {
    let mut checks = vec![memory(home), disk(&home.data)];
    if rustix::process::geteuid().is_root() {
        checks.push(pass("user-namespaces", "not needed: kiln runs as root"));
    } else {
        checks.push(user_namespaces().await);
    }
    checks.extend(running(home).await);
    checks.extend(kept(home));
    checks
}

/// Machines that were kept, and those whose keeper died. None when there is neither.
fn kept(home: &Home) -> Option<Check> {
    let all = kiln_worker::kept::list(&home.data);
    let dead = |facts: &&Facts| {
        rustix::process::Pid::from_raw(facts.pid.cast_signed())
            .is_none_or(|pid| rustix::process::test_kill_process(pid).is_err())
    };
    let ids = |facts: Vec<&Facts>| -> String {
        let ids: Vec<&str> = facts.into_iter().take(6).map(Facts::id).collect();
        ids.join(", ")
    };
    let (dead, kept): (Vec<_>, Vec<_>) = all.iter().partition(|facts| dead(facts));
    match (kept.len(), dead.len()) {
        (0, 0) => None,
        (count, 0) => Some(pass("kept-machines", format!("{count} ({})", ids(kept)))),
        (_, count) => Some(warn(
            "kept-machines",
            format!("the keeper of {count} died ({})", ids(dead)),
            "`kiln machine list` removes what is left of them",
        )),
    }
}

fn memory(home: &Home) -> Check {
    let cpus = super::super::host_cpus();
    let total = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim()
            .strip_suffix("kB")?
            .trim()
            .parse::<u64>()
            .ok()
            .map(|kib| ByteSize(kib << 10))
    });
    let Some(total) = total else {
        return fail("memory", "/proc/meminfo cannot be read", "mount /proc");
    };
    let room = ByteSize(total.0.saturating_sub(kiln_worker::host::MEMORY_RESERVE.0));
    let found = format!("{room} of {total} for machines, {cpus} CPUs");
    match (Host::open_ledger(home), room >= MEMORY_LOW) {
        (Err(error), _) => fail("memory", error.to_string(), "mount /proc"),
        (Ok(_), true) => pass("memory", found),
        (Ok(_), false) => warn(
            "memory",
            found,
            "builds ask for 2 GiB by default: set limits.build_memory in kiln.toml lower",
        ),
    }
}

/// The nearest directory that exists: the home itself may not be made yet.
fn existing(path: &Path) -> &Path {
    path.ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"))
}

fn disk(data: &Path) -> Check {
    let at = existing(data);
    match rustix::fs::statvfs(at) {
        Ok(stat) => disk_verdict(ByteSize(stat.f_bavail.saturating_mul(stat.f_frsize)), at),
        Err(error) => fail(
            "disk",
            format!("{}: {error}", at.display()),
            "set KILN_HOME to a directory on a disk",
        ),
    }
}

fn disk_verdict(free: ByteSize, at: &Path) -> Check {
    let found = format!("{free} free at {}", at.display());
    let hint =
        "free some space (`kiln cache prune`), or set KILN_HOME to a directory on a larger disk";
    if free < DISK_MIN {
        fail("disk", found, hint)
    } else if free < DISK_LOW {
        warn("disk", found, hint)
    } else {
        pass("disk", found)
    }
}

/// Kernel switches that keep ordinary users from user namespaces; `None` where this kernel has no such switch.
#[derive(Debug, Default)]
struct Switches {
    /// `kernel.unprivileged_userns_clone` (Debian): 0 is off.
    clone: Option<u64>,
    /// `user.max_user_namespaces`: 0 is off.
    max: Option<u64>,
    /// `kernel.apparmor_restrict_unprivileged_userns`: 1 is off for programs without a profile.
    apparmor: Option<u64>,
}

impl Switches {
    /// From sysctl(8)'s directory, `/proc/sys` but in tests.
    fn read(sysctl: &Path) -> Self {
        let value = |name: &str| {
            let text = fs::read_to_string(sysctl.join(name)).ok()?;
            text.trim().parse().ok()
        };
        Self {
            clone: value("kernel/unprivileged_userns_clone"),
            max: value("user/max_user_namespaces"),
            apparmor: value("kernel/apparmor_restrict_unprivileged_userns"),
        }
    }

    /// The setting that would turn them on.
    fn missing(&self) -> Option<&'static str> {
        if self.clone == Some(0) {
            Some("kernel.unprivileged_userns_clone=1")
        } else if self.max == Some(0) {
            Some("user.max_user_namespaces=10000")
        } else if self.apparmor == Some(1) {
            Some("kernel.apparmor_restrict_unprivileged_userns=0")
        } else {
            None
        }
    }
}

/// Whether an ordinary user can bake: a user namespace with subordinate ids, tried for real.
async fn user_namespaces() -> Check {
    let switches = Switches::read(Path::new("/proc/sys"));
    namespaces_verdict(&switches, sub_ids(), try_namespace().await)
}

/// Whether a program ran as root of its own user namespace; else why not.
async fn try_namespace() -> Result<(), String> {
    let mut command = tokio::process::Command::new("unshare");
    command.args(["--map-auto", "--map-root-user", "--", "true"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    match tokio::time::timeout(TRY_TIMEOUT, command.output()).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let first = said.lines().next().unwrap_or("unshare failed");
            Err(first.chars().take(200).collect())
        }
        Ok(Err(error)) => Err(format!("unshare: {error}")),
        Err(_elapsed) => Err(format!("unshare did not end within {TRY_TIMEOUT:?}")),
    }
}

fn namespaces_verdict(
    switches: &Switches,
    sub_ids: Result<(), String>,
    tried: Result<(), String>,
) -> Check {
    let name = "user-namespaces";
    let as_root = "only bakes need them: run `kiln setup` as root";
    if let (Err(said), Some(setting)) = (&tried, switches.missing()) {
        return warn(
            name,
            format!("this host does not let users make them: {said}"),
            format!("{as_root}, or have root allow them: sysctl -w {setting}"),
        );
    }
    match (sub_ids, tried) {
        (Err(why), _) => warn(
            name,
            why,
            format!(
                "{as_root}, or have root give you subordinate ids (package uidmap): \
                 kiln setup host --user {} --apply",
                user_name(&rustix::process::geteuid().as_raw().to_string())
                    .unwrap_or_else(|| "USER".to_owned())
            ),
        ),
        (Ok(()), Ok(())) => pass(name, "work, with subordinate ids"),
        (Ok(()), Err(said)) => warn(
            name,
            format!("this host does not let users make them: {said}"),
            format!("{as_root}, or install util-linux and uidmap and allow them"),
        ),
    }
}

fn sub_ids() -> Result<(), String> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let user = user_name(&uid).unwrap_or_else(|| uid.clone());
    for file in ["/etc/subuid", "/etc/subgid"] {
        let text = fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
        if !has_range(&text, &user, &uid) {
            return Err(format!("{file} gives {user} no range of {SUB_IDS_MIN} ids"));
        }
    }
    Ok(())
}

fn user_name(uid: &str) -> Option<String> {
    let text = fs::read_to_string("/etc/passwd").ok()?;
    let line = text
        .lines()
        .find(|line| line.split(':').nth(2) == Some(uid))?;
    line.split(':').next().map(str::to_owned)
}

/// subuid(5): `name-or-number:first:count`.
fn has_range(text: &str, user: &str, uid: &str) -> bool {
    text.lines().any(|line| {
        let parts: Vec<&str> = line.trim().split(':').collect();
        let [owner, _, count] = parts[..] else {
            return false;
        };
        (owner == user || owner == uid)
            && count.parse::<u64>().is_ok_and(|count| count >= SUB_IDS_MIN)
    })
}

/// Who holds room on this host now.
async fn running(home: &Home) -> Option<Check> {
    let ledger = Host::open_ledger(home).ok()?;
    let holders = ledger.list().await.ok()?;
    let (hold, wait): (Vec<_>, Vec<_>) = holders.into_iter().partition(|holder| holder.holds);
    let who: Vec<&str> = hold
        .iter()
        .take(6)
        .map(|holder| holder.who.as_str())
        .collect();
    Some(match (hold.len(), wait.len()) {
        (0, 0) => pass("machines", "none running"),
        (held, waiting) => pass(
            "machines",
            format!("{held} running ({}), {waiting} waiting", who.join(", ")),
        ),
    })
}

/// A program, the Debian package that has it, and who needs it.
const TOOLS: [(&str, &str, bool); 8] = [
    ("qemu-img", "qemu-utils", true),
    ("mkfs.ext4", "e2fsprogs", false),
    ("mmdebstrap", "mmdebstrap", false),
    ("go", "golang-go", false),
    ("xz", "xz-utils", false),
    ("unshare", "util-linux", false),
    ("tar", "tar", false),
    ("git", "git", false),
];

/// Programs that kiln starts.
pub(super) fn tools() -> Vec<Check> {
    let path = environment::var("PATH").unwrap_or_default();
    let missing = |needed: bool| -> Vec<(&str, &str)> {
        let tools = TOOLS
            .iter()
            .filter(|tool| tool.2 == needed && find(&path, tool.0).is_none());
        tools.map(|tool| (tool.0, tool.1)).collect()
    };
    let (always, bake) = (missing(true), missing(false));
    let words = |tools: &[(&str, &str)]| {
        tools
            .iter()
            .map(|tool| tool.0)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let install = |tools: &[(&str, &str)]| {
        format!(
            "apt-get install {}",
            tools
                .iter()
                .map(|tool| tool.1)
                .collect::<Vec<_>>()
                .join(" ")
        )
    };
    vec![
        match always.is_empty() {
            true => pass("programs", "all that builds and runs need"),
            false => fail(
                "programs",
                format!("missing: {}", words(&always)),
                install(&always),
            ),
        },
        match bake.is_empty() {
            true => pass("bake-programs", "all that bakes need"),
            false => warn(
                "bake-programs",
                format!("missing: {}", words(&bake)),
                format!("only bakes need them: {}", install(&bake)),
            ),
        },
    ]
}

/// In `PATH`, and where administrators' programs are, which ordinary users often lack in theirs.
fn find(path: &str, program: &str) -> Option<PathBuf> {
    let dirs = path.split(':').filter(|dir| !dir.is_empty()).chain([
        "/usr/sbin",
        "/sbin",
        "/usr/local/go/bin",
    ]);
    dirs.map(|dir| Path::new(dir).join(program))
        .find(|file| is_program(file).unwrap_or(false))
}

fn is_program(file: &Path) -> io::Result<bool> {
    use std::os::unix::fs::PermissionsExt as _;
    let meta = fs::metadata(file)?;
    Ok(meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_machine::driver::CheckLevel;

    #[test]
    fn little_disk_warns_and_less_fails() {
        let level = |gib| disk_verdict(ByteSize::gib(gib), Path::new("/")).level;
        assert_eq!(
            (level(1), level(5), level(50)),
            (CheckLevel::Fail, CheckLevel::Warn, CheckLevel::Pass)
        );
        assert_eq!(
            existing(Path::new("/proc/no/such/place")),
            Path::new("/proc")
        );
    }

    #[test]
    fn ranges_of_subordinate_ids() {
        assert!(has_range("a:1:5\nme:100000:65536\n", "me", "1000"));
        assert!(has_range("1000:100000:65536", "me", "1000"));
        for bad in ["", "me:100000:100", "you:100000:65536", "me:1"] {
            assert!(!has_range(bad, "me", "1000"), "{bad}");
        }
    }

    #[test]
    fn user_namespaces_that_are_off_name_the_switch() {
        let dir = tempfile::tempdir().expect("temp dir");
        fs::create_dir(dir.path().join("kernel")).expect("make");
        fs::create_dir(dir.path().join("user")).expect("make");
        let switch =
            |name: &str, value: &str| fs::write(dir.path().join(name), value).expect("write");
        let refused = || Err("unshare failed: Operation not permitted".to_owned());
        let hint = |sub_ids, tried| {
            let check = namespaces_verdict(&Switches::read(dir.path()), sub_ids, tried);
            assert_eq!(check.level, CheckLevel::Warn, "{check:?}");
            check.hint.expect("a hint")
        };
        assert!(hint(Ok(()), refused()).contains("uidmap"));
        let none = || Err("/etc/subuid gives me no range of 65536 ids".to_owned());
        assert!(hint(none(), refused()).contains("kiln setup host"));
        switch("kernel/apparmor_restrict_unprivileged_userns", "1\n");
        assert!(hint(Ok(()), refused()).contains("apparmor_restrict_unprivileged_userns=0"));
        switch("user/max_user_namespaces", "0\n");
        assert!(hint(none(), refused()).contains("user.max_user_namespaces="));
        switch("kernel/unprivileged_userns_clone", "0\n");
        assert!(hint(Ok(()), refused()).contains("unprivileged_userns_clone=1"));
        // What was tried counts, not what a switch seems to say.
        let works = namespaces_verdict(&Switches::read(dir.path()), Ok(()), Ok(()));
        assert_eq!(works.level, CheckLevel::Pass);
    }

    #[test]
    fn programs_are_files_that_can_be_run() {
        let dir = tempfile::tempdir().expect("temp dir");
        let tool = dir.path().join("kiln-test-tool");
        let path = dir.path().to_str().expect("utf-8");
        fs::write(&tool, "").expect("write");
        assert_eq!(find(path, "kiln-test-tool"), None);
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).expect("chmod");
        assert_eq!(find(path, "kiln-test-tool"), Some(tool));
    }
}
