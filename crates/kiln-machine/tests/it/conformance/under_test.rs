//! A driver under test: how it is made, what it boots, and what it must not leave behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_core::machine::{BootSource, DiskAccess, DiskFormat};
use kiln_core::{ByteSize, Digest, DiskRole, DiskSlot, MachineName, MachineSpec};
use kiln_machine::cgroup::CgroupHost;
use kiln_machine::driver::{Driver, Machine, MachineState, Start, TemplateRef};
use kiln_machine::proc::{self, Wanted};
use kiln_machine::qemu::{Program, QemuConfig, QemuDriver};
use kiln_machine::sim::{SimConfig, SimDriver};
use kiln_machine::template::{Held, Purpose, TemplateKey, TemplateStore};

use crate::host::{Host, identity};
use kiln_proto::msg::Identity;

/// Names the directory with `kernel`, `initrd` and `root.img` that the qemu half boots.
const IMAGE: &str = "KILN_TEST_IMAGE";
/// When set, a missing image fails instead of skipping.
const REQUIRE: &str = "KILN_TEST_REQUIRE_TOOLS";

/// How far a clone's clock may be off right after it was set.
pub(crate) const CLOCK_SLACK: Duration = Duration::from_secs(1);

/// Bytes of a test disk.
const DISK: ByteSize = ByteSize::mib(64);

/// One driver on a home of its own.
pub(crate) struct UnderTest {
    pub(crate) kind: &'static str,
    pub(crate) home: PathBuf,
    pub(crate) driver: Arc<dyn Driver>,
    /// The same driver, when it is the simulated one.
    sim: Option<Arc<SimDriver>>,
    boot: BootSource,
    root: PathBuf,
    memory: ByteSize,
    /// For a boot or an order on the slowest host.
    pub(crate) deadline: Duration,
    /// Removed at the end.
    _temp: Option<tempfile::TempDir>,
}

type Case<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

impl UnderTest {
    /// The simulated driver, with a real process and cgroup to lose.
    #[expect(clippy::unnecessary_wraps, reason = "other drivers may be missing")]
    pub(crate) fn sim() -> Option<Self> {
        let temp = tempfile::tempdir().expect("temp");
        let mut test = Self::sim_at(temp.path(), SimConfig::default());
        test._temp = Some(temp);
        Some(test)
    }

    /// The simulated driver on a given home.
    pub(crate) fn sim_at(home: &Path, config: SimConfig) -> Self {
        let config = SimConfig {
            stand_in: true,
            cgroup: true,
            ..config
        };
        let files = home.join("image");
        fs::create_dir_all(&files).expect("dir");
        for name in ["kernel", "initrd", "root.img"] {
            fs::write(files.join(name), name).expect("write");
        }
        let driver = Arc::new(SimDriver::new(home, config));
        Self {
            kind: "sim",
            home: home.to_owned(),
            driver: Arc::clone(&driver) as Arc<dyn Driver>,
            sim: Some(driver),
            boot: boot_source(&files),
            root: files.join("root.img"),
            memory: ByteSize::mib(256),
            deadline: Duration::from_secs(20),
            _temp: None,
        }
    }

    /// QEMU, when the environment names a machine image.
    pub(crate) fn qemu() -> Option<Self> {
        if image_dir().is_none() {
            skip("qemu", &format!("{IMAGE} names no machine image"));
            return None;
        }
        if let Err(error) = Program::find(None) {
            skip("qemu", &error.to_string());
            return None;
        }
        let temp = tempfile::tempdir().expect("temp");
        let mut test = Self::qemu_at(temp.path());
        test._temp = Some(temp);
        Some(test)
    }

    /// QEMU on a given home.
    pub(crate) fn qemu_at(home: &Path) -> Self {
        let image = image_dir().expect("checked before");
        let config = QemuConfig {
            // The verdict on KVM is another test's; a probe per home would cost a boot per case.
            emulate: true,
            ..QemuConfig::new(home)
        };
        let driver = QemuDriver::new(config).expect("QEMU, as checked before");
        Self {
            kind: "qemu",
            home: home.to_owned(),
            driver: Arc::new(driver),
            sim: None,
            boot: boot_source(&image),
            root: image.join("root.img"),
            memory: ByteSize::mib(512),
            deadline: Duration::from_secs(120),
            _temp: None,
        }
    }

    /// The driver that a child process is told to use.
    pub(crate) fn named(kind: &str, home: &Path, config: SimConfig) -> Self {
        match kind {
            "sim" => Self::sim_at(home, config),
            _ => Self::qemu_at(home),
        }
    }

    /// Runs a case, then checks that nothing is left of any machine.
    pub(crate) fn run(self, case: impl for<'a> FnOnce(&'a Self) -> Case<'a>) {
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        runtime.block_on(async {
            case(&self).await;
            self.assert_nothing_left().await;
        });
        runtime.shutdown_timeout(Duration::from_secs(5));
    }

    /// A machine with the root disk. Names are unique among all tests of this host.
    pub(crate) fn spec(&self, name: &str) -> MachineSpec {
        let mut random = [0; 4];
        getrandom::fill(&mut random).expect("random");
        MachineSpec {
            name: machine_name(&format!("t{}-{name}", hex::encode(random))),
            cpus: 1,
            memory: self.memory,
            boot: self.boot.clone(),
            disks: vec![DiskSlot {
                role: DiskRole::Root,
                backing: Some(self.root.clone()),
                format: DiskFormat::Raw,
                access: DiskAccess::ReadOnly,
            }],
            boot_timeout_ms: u64::try_from(self.deadline.as_millis()).expect("fits"),
            keepable: false,
            host_cpus: Vec::new(),
            disk_bytes_per_second: None,
        }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) async fn launch(&self, spec: &MachineSpec) -> Arc<dyn Machine> {
        let machine = self.driver.launch(spec, Start::Cold).await;
        machine.expect("launched")
    }

    /// A machine whose guest answers.
    pub(crate) async fn boot(&self, name: &str) -> (Arc<dyn Machine>, Host) {
        self.boot_spec(&self.spec(name)).await
    }

    pub(crate) async fn boot_spec(&self, spec: &MachineSpec) -> (Arc<dyn Machine>, Host) {
        let machine = self.launch(spec).await;
        let host = self.host(&*machine).await;
        (machine, host)
    }

    pub(crate) async fn host(&self, machine: &dyn Machine) -> Host {
        match Host::connect(machine, self.deadline).await {
            Ok(host) => host,
            Err(error) => panic!("{error:?}; console:\n{}", machine.console_tail()),
        }
    }

    pub(crate) fn templates(&self) -> TemplateStore {
        TemplateStore::open(&self.home.join("templates")).expect("a store")
    }

    pub(crate) async fn template_key(&self, spec: &MachineSpec, what: &str) -> TemplateKey {
        let facts = self.driver.template_facts().await;
        TemplateKey::of(Purpose::Run, what, spec, facts, Vec::new())
    }

    /// Makes a template of a machine, in the home's store.
    pub(crate) async fn template_of(
        &self,
        spec: &MachineSpec,
        machine: &dyn Machine,
        host: Host,
    ) -> Held {
        let key = self.template_key(spec, "test").await;
        let make = async |target: TemplateRef| {
            let quiesced = host.quiesce().await.expect("quiesced");
            assert!(quiesced.frozen, "{quiesced:?}");
            drop(host);
            machine.into_template(&target).await
        };
        let made = self.templates().get_or_make(&key, &|_| {}, make).await;
        let held = made.expect("saved");
        let state = machine.state();
        assert!(
            matches!(state, MachineState::Stopped(_)),
            "a machine that became a template is gone: {state:?}"
        );
        held
    }

    /// A clone whose identity was taken and checked; still frozen.
    pub(crate) async fn clone_of(
        &self,
        held: &Held,
        spec: &MachineSpec,
    ) -> (Arc<dyn Machine>, Host) {
        let (machine, host, _) = self.identified_clone_of(held, spec).await;
        (machine, host)
    }

    /// As [`Self::clone_of`], with the identity it was given.
    pub(crate) async fn identified_clone_of(
        &self,
        held: &Held,
        spec: &MachineSpec,
    ) -> (Arc<dyn Machine>, Host, Identity) {
        let start = Start::Template(held.template.clone());
        let machine = self.driver.launch(spec, start).await.expect("cloned");
        let host = self.host(&*machine).await;
        let end = Instant::now() + self.deadline;
        let (wanted, answer) = loop {
            let wanted = identity(spec.name.as_str());
            let asked = Instant::now();
            let answer = host.reidentify(&wanted).await.expect("a new identity");
            // As every host of a guest: an answer that took long has made the clock late by that time.
            if asked.elapsed() < CLOCK_SLACK / 2 {
                break (wanted, answer);
            }
            assert!(Instant::now() < end, "never answered in time");
        };
        assert!(answer.entropy_added && answer.reseeded, "{answer:?}");
        assert_eq!(answer.boot_id, wanted.boot_id);
        assert_eq!(answer.machine_id, wanted.machine_id);
        assert_eq!(answer.hostname, wanted.hostname);
        assert_eq!(answer.workload_ran, 0);
        (machine, host, wanted)
    }

    /// A disk whose writes die with the machine, over a blank file.
    pub(crate) fn fork_of(&self, role: DiskRole, base: &str) -> DiskSlot {
        let backing = self.home.join(base);
        if !backing.exists() {
            let file = fs::File::create(&backing).expect("make");
            file.set_len(DISK.0).expect("size");
        }
        DiskSlot {
            role,
            backing: Some(backing),
            format: DiskFormat::Raw,
            access: DiskAccess::Fork,
        }
    }

    pub(crate) fn new_disk(role: DiskRole) -> DiskSlot {
        DiskSlot {
            role,
            backing: None,
            format: DiskFormat::Raw,
            access: DiskAccess::New { size: DISK },
        }
    }

    /// The guest stops answering for good.
    pub(crate) fn silence(&self, machine: &dyn Machine) {
        match &self.sim {
            Some(sim) => sim.machine(machine.name()).expect("alive").silence(),
            None => signal(self.vmm_pid(machine), libc::SIGSTOP),
        }
    }

    /// As if the owner of a simulated machine had been killed.
    pub(crate) fn abandon(&self, name: &MachineName) {
        let sim = self.sim.as_ref().expect("the simulated driver");
        sim.machine(name).expect("alive").abandon();
    }

    /// kill -9 of the VMM, by somebody else.
    pub(crate) fn kill_vmm(&self, machine: &dyn Machine) {
        signal(self.vmm_pid(machine), libc::SIGKILL);
    }

    /// The same at a moment when it may be ending by itself.
    pub(crate) fn kill_vmm_if_there(&self, machine: &dyn Machine) {
        let Some(record) = self.record(machine.name()) else {
            return;
        };
        let pid = record["state"]["vmm"]["pid"].as_u64();
        if let Some(pid) = pid.and_then(|pid| i32::try_from(pid).ok()) {
            let _ended_before = send(pid, libc::SIGKILL);
        }
    }

    /// The VMM's process as the record names it.
    pub(crate) fn vmm_pid(&self, machine: &dyn Machine) -> i32 {
        let record = self.record(machine.name()).expect("a record");
        let pid = &record["state"]["vmm"]["pid"];
        i32::try_from(pid.as_u64().expect("a running VMM")).expect("fits")
    }

    /// The record on disk, if it can be read.
    pub(crate) fn record(&self, name: &MachineName) -> Option<serde_json::Value> {
        let path = self.machine_dir(name).join("record.json");
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    pub(crate) fn machine_dir(&self, name: &MachineName) -> PathBuf {
        self.home.join("machines").join(name.as_str())
    }

    /// Destroys a machine and checks its own word.
    pub(crate) async fn destroy(&self, machine: &dyn Machine) {
        let report = machine.destroy().await;
        assert!(report.leaks.is_empty(), "{report:?}");
        assert_eq!(self.leftovers(machine.name().as_str()), [""; 0]);
    }

    /// What is left of machines whose name contains this: directories, processes, cgroups.
    pub(crate) fn leftovers(&self, name: &str) -> Vec<String> {
        let mut left = Vec::new();
        let machines = self.home.join("machines");
        for entry in fs::read_dir(machines).into_iter().flatten().flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            if file != ".lock" && file.contains(name) {
                left.push(format!("{}", entry.path().display()));
            }
        }
        let wanted = Wanted {
            token: name,
            program: None,
            dir: &self.home,
        };
        for process in proc::find(&wanted) {
            left.push(format!("process {process:?}"));
        }
        for group in CgroupHost::detect().groups() {
            if group.to_string_lossy().contains(name) {
                left.push(format!("cgroup {}", group.display()));
            }
        }
        left
    }

    /// Nothing at all is left below `machines`, and no file of an unfinished write anywhere in the home.
    pub(crate) async fn assert_nothing_left(&self) {
        // A dropped handle ends its process in the background.
        let end = tokio::time::Instant::now() + Duration::from_secs(10);
        loop {
            let mut left = self.leftovers("");
            left.retain(|what| !what.starts_with("process") && !what.starts_with("cgroup"));
            find_partial(&self.home, &mut left);
            if left.is_empty() {
                return;
            }
            assert!(tokio::time::Instant::now() < end, "{left:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn find_partial(dir: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().contains(".partial-") {
            found.push(entry.path().display().to_string());
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find_partial(&entry.path(), found);
        }
    }
}

fn boot_source(files: &Path) -> BootSource {
    BootSource {
        kernel: files.join("kernel"),
        initrd: files.join("initrd"),
        args: Vec::new(),
        image: Digest::of(b"a machine image under test"),
    }
}

pub(crate) fn machine_name(text: &str) -> MachineName {
    text.parse().expect("a name")
}

fn signal(pid: i32, number: i32) {
    assert_eq!(send(pid, number), 0, "kill -{number} {pid}");
}

fn send(pid: i32, number: i32) -> i32 {
    #[expect(unsafe_code, reason = "a signal by number")]
    // SAFETY: kill(2) takes two numbers and touches no memory of this process.
    unsafe {
        libc::kill(pid, number)
    }
}

/// The image's directory. A file there holds the name of a directory beside it.
#[expect(clippy::disallowed_methods, reason = "how the test run is configured")]
fn image_dir() -> Option<PathBuf> {
    let named = PathBuf::from(std::env::var_os(IMAGE)?);
    if named.is_dir() {
        return Some(named);
    }
    let name = fs::read_to_string(&named).ok()?;
    Some(named.with_file_name(name.trim()))
}

/// Says once per test run that a driver is not tested. Fails instead where everything has to be there.
#[expect(clippy::disallowed_methods, reason = "how the test run is configured")]
fn skip(what: &str, why: &str) {
    use std::io::Write as _;
    static SAID: std::sync::Once = std::sync::Once::new();
    assert!(
        std::env::var_os(REQUIRE).is_none(),
        "{what} must be tested here, but {why}"
    );
    // Written past the test harness, which hides what a passing test prints.
    SAID.call_once(|| {
        let line = format!("skipped: conformance of {what}: {why}\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
    });
}
