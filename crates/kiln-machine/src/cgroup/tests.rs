//! Detection on made-up hosts, and real groups where this host and user have them.

use super::*;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

const NAME: &str = "kiln-test-0123456789abcdef";

fn group(dir: &Path, controllers: &str, subtree: &str) {
    fs::create_dir_all(dir).expect("dir");
    for (file, text) in [
        ("cgroup.controllers", controllers),
        ("cgroup.subtree_control", subtree),
        ("cgroup.procs", ""),
    ] {
        fs::write(dir.join(file), text).expect("write");
    }
}

#[test]
fn version_2_is_used_where_a_parent_has_the_controllers_on() {
    let root = tempfile::tempdir().expect("temp");
    let mount = root.path().join("cg");
    group(&mount, "cpu memory pids", "cpu memory pids");
    group(
        &mount.join("user.slice"),
        "cpu memory pids",
        "cpu memory pids",
    );
    let scope = mount.join("user.slice/me.scope");
    group(&scope, "cpu memory pids", "");
    fs::write(scope.join("cgroup.type"), "domain\n").expect("write");
    let other = format!("{}\n1\n", std::process::id());
    fs::write(scope.join("cgroup.procs"), other).expect("write");
    let mounts = format!("31 23 0:28 / {} rw - cgroup2 cgroup2 rw", mount.display());
    let host = CgroupHost::detect_from(&mounts, "0::/user.slice/me.scope\n");
    assert_eq!(host.version(), Some(Version::V2));
    // The own group has other processes: it could hand out CPU and process numbers, but no memory.
    assert_eq!(host.paths_of(NAME), [mount.join("user.slice").join(NAME)]);
    let untouched = fs::read_to_string(scope.join("cgroup.subtree_control"));
    assert_eq!(untouched.expect("read"), "");
    assert!(
        host.checks()
            .iter()
            .all(|check| check.level == CheckLevel::Pass)
    );
}

#[test]
fn alone_in_a_delegated_group_a_process_makes_itself_a_leaf() {
    let root = tempfile::tempdir().expect("temp");
    let mount = root.path().join("cg");
    group(&mount, "cpu memory pids", "cpu memory pids");
    let scope = mount.join("me.scope");
    group(&scope, "memory pids", "");
    fs::write(scope.join("cgroup.type"), "domain\n").expect("write");
    let own = std::process::id().to_string();
    fs::write(scope.join("cgroup.procs"), format!("{own}\n")).expect("write");
    let mounts = format!("31 23 0:28 / {} rw - cgroup2 cgroup2 rw", mount.display());
    let host = CgroupHost::detect_from(&mounts, "0::/me.scope\n");
    assert_eq!(host.paths_of(NAME), [scope.join(NAME)]);
    assert!(host.limits(Controller::Memory) && !host.limits(Controller::Cpu));
    assert!(!scope.join(LEAF).exists(), "looking makes nothing");
    // Made-up directories have no control files: the leaf's is put there first.
    fs::create_dir(scope.join(LEAF)).expect("dir");
    fs::write(scope.join(LEAF).join("cgroup.procs"), "").expect("write");
    let limits = Limits::of_guest(1, ByteSize::gib(1));
    assert!(host.create(NAME, &limits).is_err(), "no control files");
    let moved = fs::read_to_string(scope.join(LEAF).join("cgroup.procs"));
    assert_eq!(moved.expect("read"), own);
    let on = fs::read_to_string(scope.join("cgroup.subtree_control"));
    // A plain file keeps the tail of a longer word.
    assert!(
        on.expect("read").starts_with("+pids"),
        "the last one turned on"
    );
    // From the leaf the same group is found again.
    fs::write(scope.join("cgroup.procs"), "").expect("write");
    fs::write(scope.join("cgroup.subtree_control"), "memory pids").expect("write");
    let again = CgroupHost::detect_from(&mounts, &format!("0::/me.scope/{LEAF}\n"));
    assert_eq!(again.paths_of(NAME), [scope.join(NAME)]);
}

#[test]
fn a_version_2_without_controllers_gives_way_to_version_1() {
    let root = tempfile::tempdir().expect("temp");
    let at = |name: &str| root.path().join(name);
    group(&at("unified"), "", "");
    for dir in ["memory/a", "pids", "cpu"] {
        fs::create_dir_all(at(dir)).expect("dir");
    }
    let mounts = format!(
        "41 31 0:38 / {} rw - cgroup2 cgroup2 rw\n\
         35 31 0:32 / {} rw,relatime - cgroup cgroup rw,memory\n\
         39 31 0:36 / {} rw - cgroup cgroup rw,pids\n\
         39 31 0:36 / {} rw - cgroup cgroup rw,cpu,cpuacct\n",
        at("unified").display(),
        at("memory").display(),
        at("pids").display(),
        at("cpu").display(),
    );
    let own = "8:pids:/\n4:memory:/a\n1:cpu,cpuacct:/gone\n0::/\n";
    let host = CgroupHost::detect_from(&mounts, own);
    assert_eq!(host.version(), Some(Version::V1));
    assert!(host.limits(Controller::Memory) && host.limits(Controller::Pids));
    assert!(!host.limits(Controller::Cpu), "its directory is not there");
    let checks = host.checks();
    assert_eq!(checks[0].level, CheckLevel::Warn);
    assert!(checks[0].hint.is_some());
    // A control file that does not appear is an error, and no limit is taken for granted.
    let limits = Limits::of_guest(2, ByteSize::gib(1));
    let refused = host.create(NAME, &limits);
    assert!(matches!(
        refused,
        Err(CgroupError::Io {
            action: "write",
            ..
        })
    ));
    assert!(!at("memory/a").join(NAME).exists(), "nothing is left");
}

#[test]
fn a_host_without_cgroups_says_so() {
    let host = CgroupHost::detect_from("", "");
    assert_eq!(host.version(), None);
    let limits = Limits::of_guest(1, ByteSize::gib(1));
    assert!(matches!(
        host.create(NAME, &limits),
        Err(CgroupError::Unavailable(_))
    ));
    let checks = host.checks();
    let mut groups = checks.iter().filter(|check| check.name != "swap");
    assert!(groups.all(|check| check.level == CheckLevel::Warn));
}

#[test]
fn memory_with_secrets_is_kept_out_of_swap_or_it_is_told() {
    let text = "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0 partition 4 0 100\n/swap\\040file file 8 0 -2\n";
    assert_eq!(disk_swaps(text), ["/swap\\040file"]);
    assert!(disk_swaps("Filename\n").is_empty() && disk_swaps("").is_empty());
    let without = CgroupHost::detect_from("", "");
    assert_eq!(without.swap_check(text).level, CheckLevel::Warn);
    assert_eq!(without.swap_check("").level, CheckLevel::Pass);
    let mut with = without;
    with.parents.push((Controller::Memory, PathBuf::new()));
    assert_eq!(with.swap_check(text).level, CheckLevel::Pass);

    let dir = tempfile::tempdir().expect("temp");
    for (version, name) in [
        (Version::V2, "memory.swap.max"),
        (Version::V1, "memory.swappiness"),
    ] {
        keep_from_swap(version, dir.path()).expect("a kernel without swap");
        let file = dir.path().join(name);
        assert!(!file.exists());
        fs::write(&file, "").expect("write");
        keep_from_swap(version, dir.path()).expect("written");
        assert_eq!(fs::read_to_string(&file).expect("read"), "0");
    }
}

#[test]
fn limits_are_written_as_each_version_spells_them() {
    let limits = Limits {
        cpu_milli: 2500,
        memory_max: ByteSize::mib(1),
        pids_max: 7,
    };
    let all = |version| -> Vec<String> {
        Controller::ALL
            .iter()
            .flat_map(|controller| settings(version, *controller, &limits))
            .map(|(file, value)| format!("{file}={value}"))
            .collect()
    };
    assert_eq!(
        all(Version::V2),
        [
            "cpu.max=250000 100000",
            "memory.oom.group=1",
            "memory.max=1048576",
            "pids.max=7"
        ]
    );
    assert_eq!(
        all(Version::V1),
        [
            "cpu.cfs_period_us=100000",
            "cpu.cfs_quota_us=250000",
            "memory.limit_in_bytes=1048576",
            "pids.max=7"
        ]
    );
    let none = Limits {
        cpu_milli: 0,
        memory_max: ByteSize(0),
        pids_max: 0,
    };
    assert!(
        Controller::ALL
            .iter()
            .all(|c| settings(Version::V2, *c, &none).is_empty())
    );
}

/// Real groups: only where this user may make them. The host's own word decides, so a host that loses the power fails here no test
/// but shows a warning in `kiln doctor`.
#[test]
fn a_real_group_holds_its_process_and_is_removed_with_it() {
    let host = CgroupHost::detect();
    if host.version().is_none() {
        return;
    }
    let name = format!("kiln-test-{}", hex::encode(rand()));
    let limits = Limits::of_guest(1, ByteSize::mib(64));
    let group = host.create(&name, &limits).expect("made");
    let procs = group.open_procs().expect("open");
    let mut command = Command::new("sh");
    command.args(["-c", "echo in; read _"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    #[expect(unsafe_code, reason = "entering a group between fork and exec")]
    // SAFETY: `enter` only makes write(2) calls on files that are open in the child too.
    unsafe {
        command.pre_exec(move || enter(&procs));
    }
    let mut child = command.spawn().expect("sh");
    for dir in group.dirs() {
        let inside = fs::read_to_string(dir.join("cgroup.procs")).expect("read");
        assert_eq!(inside.trim(), child.id().to_string(), "{}", dir.display());
    }
    assert_eq!(group.oom_kills(), 0);
    assert_eq!(host.find_by_token(&name[10..]), group.dirs());
    group.remove(Duration::from_secs(5)).expect("removed");
    group.remove(Duration::from_secs(5)).expect("idempotent");
    assert!(group.dirs().iter().all(|dir| !dir.exists()));
    assert!(!child.wait().expect("wait").success(), "it was killed");
}

fn rand() -> [u8; 8] {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).expect("random");
    bytes
}
