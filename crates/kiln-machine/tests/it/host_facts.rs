//! What depends on the host below the driver: its disk full under a real VMM, and cgroup version 2, which is tested inside a machine
//! of our own because few hosts have both versions.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kiln_core::{ByteSize, DiskRole};
use kiln_machine::cgroup::{self, CgroupHost, Controller, Limits, Version};
use kiln_machine::driver::{LaunchError, MachineState, Start, StopReason, TemplateRef};
use kiln_proto::msg::{Place, PutTree, kind};

use crate::child::{ROLE, Role, say};
use crate::conformance::under_test::UnderTest;
use crate::host::{Failed, request};
use crate::life::put;

/// Bytes of the disk that becomes full.
const FULL: ByteSize = ByteSize::mib(24);
/// For what a few processes do, emulated on a busy host.
const SOON: Duration = Duration::from_secs(120);

/// The child's part: a home on a disk of [`FULL`] bytes that it alone sees.
pub(crate) fn play_full_disk(home: &Path) {
    let test = UnderTest::qemu_at(home);
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    runtime.block_on(async {
        no_room_at_launch(&test).await;
        full_while_the_guest_writes(&test).await;
        no_room_for_a_template(&test).await;
    });
    say("held");
}

async fn no_room_at_launch(test: &UnderTest) {
    let filler = test.home.join("filler");
    let full = fs::write(&filler, vec![1; usize::try_from(FULL.0 + 1).expect("fits")]);
    assert!(full.is_err(), "the disk is larger than it should be");
    let mut spec = test.spec("no-room");
    spec.disks.push(UnderTest::new_disk(DiskRole::Scratch));
    let launched = test.driver.launch(&spec, Start::Cold).await;
    let error = launched.expect_err("no room");
    assert!(matches!(error, LaunchError::DiskFull(_)), "{error:?}");
    assert_eq!(test.leftovers(spec.name.as_str()), [""; 0]);
    fs::remove_file(filler).expect("removed");
}

async fn full_while_the_guest_writes(test: &UnderTest) {
    let mut spec = test.spec("full");
    spec.disks.push(UnderTest::new_disk(DiskRole::Scratch));
    let (machine, host) = test.boot_spec(&spec).await;
    let path = host.mount("kiln-scratch", false).await.expect("mounted");
    let of = format!("of={path}/large");
    let write = ["dd", "if=/dev/zero", &of, "bs=1M", "count=48", "conv=fsync"];
    let began = Instant::now();
    let lost = host.exec(&write).await;
    assert!(matches!(lost, Err(Failed::Broken(_))), "{lost:?}");
    let state = tokio::time::timeout(SOON, machine.stopped()).await;
    let state = state.expect("a full disk ends the machine");
    assert_eq!(state, MachineState::Stopped(StopReason::HostIo));
    assert!(began.elapsed() < SOON, "it hung for {:?}", began.elapsed());
    assert!(machine.take_disk(DiskRole::Scratch).is_err());
    test.destroy(&*machine).await;
}

async fn no_room_for_a_template(test: &UnderTest) {
    let spec = test.spec("origin");
    let (machine, host) = test.boot_spec(&spec).await;
    let key = test.template_key(&spec, "test").await;
    let make = async |target: TemplateRef| {
        host.quiesce().await.expect("quiesced");
        machine.into_template(&target).await
    };
    let store = test.templates();
    let made = store.get_or_make(&key, &|_| {}, make).await;
    let error = format!("{:?}", made.expect_err("no room"));
    assert!(error.contains("StorageFull"), "{error}");
    assert!(machine.state().is_terminal());
    test.destroy(&*machine).await;
    assert_eq!(store.list().expect("listed"), []);
    test.assert_nothing_left().await;
}

#[test]
fn a_full_disk_of_the_host_ends_machines_with_its_reason() {
    let Some(test) = UnderTest::qemu() else {
        return;
    };
    if !rustix::process::geteuid().is_root() {
        // Only root mounts a small disk that the VMM's own user can use.
        return;
    }
    let home = test.home.join("small");
    fs::create_dir(&home).expect("made");
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-ec"])
        .arg("mount -t tmpfs -o size=$1 kiln-test \"$2\"; shift 2; exec \"$@\"")
        .arg("sh")
        .arg(FULL.0.to_string())
        .arg(&home)
        .arg(format!("/proc/{}/exe", std::process::id()));
    let mut child = Role::start_by(command, &["full-disk", home.to_str().expect("utf-8")]);
    child.wait_for("held");
}

/// The child's part, inside a machine whose only cgroup version is 2: the same code that a host runs.
pub(crate) fn play_cgroup_v2() {
    let host = CgroupHost::detect();
    assert_eq!(host.version(), Some(Version::V2), "{:?}", host.checks());
    for controller in Controller::ALL {
        assert!(host.limits(controller), "{:?}", host.checks());
    }
    let token = "0123456789abcdef0123456789abcdef";
    let limits = Limits {
        cpu_milli: 2500,
        memory_max: ByteSize::mib(24),
        pids_max: 8,
    };
    let group = host.create(&format!("kiln-inside-{token}"), &limits);
    let group = group.expect("made");
    let [dir] = group.dirs() else {
        panic!("version 2 has one hierarchy: {:?}", group.dirs());
    };
    for (file, want) in [
        ("cpu.max", "250000 100000"),
        ("memory.max", "25165824"),
        ("memory.oom.group", "1"),
        ("pids.max", "8"),
    ] {
        let text = fs::read_to_string(dir.join(file)).expect("read");
        assert_eq!(text.trim(), want, "{file}");
    }
    let start = |script: &str| {
        let procs = group.open_procs().expect("open");
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        #[expect(unsafe_code, reason = "entering a group between fork and exec")]
        // SAFETY: `enter` only makes write(2) calls on files that are open in the child too.
        unsafe {
            command.pre_exec(move || cgroup::enter(&procs));
        }
        command.spawn().expect("sh")
    };
    // Memory: killed, and counted.
    let ended = start("tail /dev/zero").wait().expect("ended");
    assert!(!ended.success());
    assert!(group.oom_kills() > 0, "nobody was killed for memory");
    // Processes: with one allowed, a shell cannot start another, says so and ends.
    fs::write(dir.join("pids.max"), "1").expect("lowered");
    let refused = start("true & wait; exit 0").wait().expect("ended");
    assert!(!refused.success(), "it started another process");
    let mut last = start("exec sleep 1000");
    assert_eq!(host.find_by_token(token), group.dirs());
    group.remove(SOON).expect("removed with all in it");
    group.remove(SOON).expect("idempotent");
    assert!(!dir.exists());
    assert!(!last.wait().expect("ended").success(), "it was killed");
    say("holds");
}

#[test]
fn cgroup_version_2_holds_inside_a_machine() {
    let Some(test) = UnderTest::qemu() else {
        return;
    };
    test.run(|test| {
        Box::pin(async move {
            let (machine, host) = test.boot("cgroup").await;
            let own = fs::read("/proc/self/exe").expect("own binary");
            let mut tar = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_size(own.len() as u64);
            header.set_mode(0o755);
            tar.append_data(&mut header, "it", own.as_slice())
                .expect("tar");
            let order = PutTree {
                place: Place::Work,
                bytes_max: own.len() as u64,
                entries_max: 4,
            };
            let tar = tar.into_inner().expect("tar");
            put(&host, kind::PUT_TREE, &order, &tar).await.expect("put");
            // Alone in its group, as in a delegated scope, it makes room there; beside others it uses a group above.
            let alone = ["/work/it", "--exact", Role::TEST, "--nocapture"];
            let beside = ["sh", "-c", "\"$@\" && echo and it ended", "sh"];
            for argv in [alone.to_vec(), [&beside[..], &alone[..]].concat()] {
                let mut run = request(&argv);
                run.env.push((ROLE.to_owned(), "cgroup-v2".to_owned()));
                let ran = host.exec_with(run, b"").await.expect("ran");
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                let (out, err) = (text(&ran.stdout), text(&ran.stderr));
                assert!(out.contains("child says: holds"), "{out}\n{err}");
            }
            test.destroy(&*machine).await;
        })
    });
}
