//! Every trouble at every step of a simulated machine's life: the host always learns in bounded time, and nothing is left behind.
//!
//! The clock is virtual: a deadline of a minute costs nothing.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_core::machine::{BootSource, DiskAccess, DiskFormat};
use kiln_core::{ByteSize, Digest, DiskRole, DiskSlot, FailureClass, MachineSpec};
use kiln_machine::bring_up::{self, BringUpError, Deadlines};
use kiln_machine::driver::{
    Driver as _, LaunchError, Machine, MachineState, Start, StopReason, TemplateRef,
};
use kiln_machine::sim::{Fault, Lie, SimConfig, SimDriver, Step, Trouble, Violation};
use kiln_machine::template::{Held, Purpose, TemplateKey, TemplateStore};
use kiln_proto::CloseReason;
use kiln_proto::msg::{
    BuildkitConfig, ConnectReply, ContainerSpec, Forward, GetTree, GuestError, GuestErrorCode,
    Order, Place, PutFile, PutTree, TreeReport, kind,
};
use kiln_proto::read_msg;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::host::{Failed, Host, broken, identity, request};

/// For everything; virtual.
const DEADLINE: Duration = Duration::from_secs(10);

const DEADLINES: Deadlines = Deadlines {
    clone_hello: DEADLINE,
    order: DEADLINE,
};

struct Sim {
    home: tempfile::TempDir,
    driver: SimDriver,
}

impl Sim {
    fn new() -> Self {
        let home = tempfile::tempdir().expect("temp");
        for name in ["kernel", "initrd", "root.img", "head.img"] {
            std::fs::write(home.path().join(name), "").expect("write");
        }
        let driver = SimDriver::new(home.path(), SimConfig::default());
        Self { home, driver }
    }

    fn spec(&self, name: &str) -> MachineSpec {
        let file = |name: &str| self.home.path().join(name);
        let disk = |role, name: &str, access| DiskSlot {
            role,
            backing: Some(file(name)),
            format: DiskFormat::Raw,
            access,
        };
        MachineSpec {
            name: name.parse().expect("a name"),
            cpus: 1,
            memory: ByteSize::mib(256),
            boot: BootSource {
                kernel: file("kernel"),
                initrd: file("initrd"),
                args: Vec::new(),
                image: Digest::of(b"image"),
            },
            disks: vec![
                disk(DiskRole::Root, "root.img", DiskAccess::ReadOnly),
                disk(DiskRole::State, "head.img", DiskAccess::Fork),
            ],
            boot_timeout_ms: 10_000,
        }
    }

    fn assert_nothing_left(&self) {
        assert_nothing_left(self.home.path());
    }

    async fn template(&self) -> Held {
        let store = TemplateStore::open(&self.home.path().join("templates")).expect("store");
        let spec = self.spec("origin");
        let key = TemplateKey::of(Purpose::Run, "test", &spec, Vec::new(), Vec::new());
        let make = async |target: TemplateRef| {
            let prepare = |_session| async { Ok::<(), std::io::Error>(()) };
            bring_up::make_template(&self.driver, &spec, &target, DEADLINES, prepare).await
        };
        let made = store.get_or_make(&key, &|_| {}, make).await;
        made.expect("a template")
    }
}

fn assert_nothing_left(home: &Path) {
    let left: Vec<_> = std::fs::read_dir(home.join("machines"))
        .expect("list")
        .flatten()
        .map(|entry| entry.file_name())
        .filter(|name| name != ".lock")
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A life that uses everything, after the bring-up. Gives the step that failed.
async fn live(host: &Host) -> Result<(), (Step, Failed)> {
    let order = async |step: Step, order: Order| {
        let reply = host.call(&order).await;
        reply.map(drop).map_err(|failed| (step, failed))
    };
    let limits = Order::SetLimits {
        memory_max: 0,
        pids_max: 100,
    };
    order(Step::SetLimits, limits).await?;
    order(Step::SetStepEnv, Order::SetStepEnv { env: Vec::new() }).await?;
    let state = DiskRole::State.serial().to_owned();
    let mounted = host.mount(&state, false).await;
    mounted.map_err(|failed| (Step::Mount, failed))?;
    let config = BuildkitConfig::default();
    order(Step::StartBuildkit, Order::StartBuildkit(config)).await?;
    trees(host).await?;
    let ran = host.exec(&["echo", "hello"]).await;
    let ran = ran.map_err(|failed| (Step::Exec, failed))?;
    assert_eq!(ran.text(), "hello");
    forward(host)
        .await
        .map_err(|failed| (Step::Forward, failed))?;
    let container = Box::new(ContainerSpec::default());
    order(Step::PrepareContainer, Order::PrepareContainer(container)).await?;
    order(Step::Stats, Order::Stats).await?;
    let place = Place::Work;
    order(Step::RemoveTree, Order::RemoveTree { place }).await?;
    order(Step::StopBuildkit, Order::StopBuildkit).await?;
    order(Step::Unmount, Order::Unmount { serial: state }).await?;
    order(Step::Quiesce, Order::Quiesce).await?;
    order(Step::Shutdown, Order::Shutdown).await
}

/// What is sent as a tree: one file of 5 bytes.
fn tar() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    builder
        .append_data(&mut header, "src/a", &b"bytes"[..])
        .expect("tar");
    builder.into_inner().expect("tar")
}

async fn put(
    host: &Host,
    kind: u8,
    payload: &(impl serde::Serialize + Sync),
    bytes: &[u8],
) -> Result<TreeReport, Failed> {
    host.within(async {
        let mut stream = host.open(kind, payload).await?;
        let sent = stream.write_all(bytes).await;
        sent.map_err(|error| broken(&error))?;
        // The guest may be gone already: reading says how.
        let _ = stream.shutdown().await;
        let report: Result<TreeReport, GuestError> = read_msg(&mut stream, 4096)
            .await
            .map_err(|error| broken(&error))?;
        report.map_err(Failed::Refused)
    })
    .await
}

async fn trees(host: &Host) -> Result<(), (Step, Failed)> {
    let put_tree = PutTree {
        place: Place::Work,
        bytes_max: 1000,
        entries_max: 10,
    };
    let report = put(host, kind::PUT_TREE, &put_tree, &tar()).await;
    report.map_err(|failed| (Step::PutTree, failed))?;
    let put_file = PutFile {
        place: Place::CaBundle,
        bytes_max: 1000,
    };
    let report = put(host, kind::PUT_FILE, &put_file, b"pem").await;
    report.map_err(|failed| (Step::PutFile, failed))?;
    let got = get_tree(host, "/work").await;
    let got = got.map_err(|failed| (Step::GetTree, failed))?;
    assert!(!got.is_empty());
    Ok(())
}

async fn get_tree(host: &Host, path: &str) -> Result<Vec<u8>, Failed> {
    host.within(async {
        let order = GetTree {
            path: path.to_owned(),
            bytes_max: 1000,
            entries_max: 10,
        };
        let mut stream = host.open(kind::GET_TREE, &order).await?;
        let mut tar = Vec::new();
        match stream.read_to_end(&mut tar).await {
            Ok(_) => Ok(tar),
            Err(error) => Err(match kiln_proto::reset_of(&error) {
                Some(reset) => Failed::Refused(GuestError {
                    code: GuestErrorCode::System,
                    message: reset.reason.clone(),
                }),
                None => broken(&error),
            }),
        }
    })
    .await
}

async fn forward(host: &Host) -> Result<(), Failed> {
    host.within(async {
        let mut stream = host.open(kind::FORWARD, &Forward { port: 7 }).await?;
        let reply: ConnectReply = read_msg(&mut stream, 4096)
            .await
            .map_err(|error| broken(&error))?;
        if let ConnectReply::Refused { reason } = reply {
            return Err(Failed::Refused(GuestError {
                code: GuestErrorCode::System,
                message: reason,
            }));
        }
        stream.write_all(b"ping").await.map_err(|e| broken(&e))?;
        stream.flush().await.map_err(|e| broken(&e))?;
        let mut answer = [0; 4];
        stream
            .read_exact(&mut answer)
            .await
            .map_err(|e| broken(&e))?;
        assert_eq!(&answer, b"ping");
        Ok(())
    })
    .await
}

/// How a life ended.
enum Ended {
    /// Before the guest was ready.
    BringUp(BringUpError),
    /// At a step, with the machine still in hand.
    At(Step, Failed, Arc<dyn Machine>, Host),
    /// It did all of it.
    Well(Arc<dyn Machine>),
}

async fn whole_life(sim: &Sim, spec: &MachineSpec) -> Ended {
    let ready = match bring_up::start(&sim.driver, spec, &Start::Cold, DEADLINES).await {
        Ok(ready) => ready,
        Err(error) => return Ended::BringUp(error),
    };
    let machine = Arc::clone(&ready.machine);
    let host = Host::of(ready.session, ready.hello, ready.incoming, DEADLINE);
    match live(&host).await {
        Ok(()) => Ended::Well(machine),
        Err((step, failed)) => Ended::At(step, failed, machine, host),
    }
}

#[tokio::test(start_paused = true)]
async fn a_life_without_faults_ends_well() {
    let sim = Sim::new();
    let Ended::Well(machine) = whole_life(&sim, &sim.spec("m")).await else {
        panic!("it had no reason");
    };
    let state = machine.stop(DEADLINE).await;
    assert_eq!(state, MachineState::Stopped(StopReason::PoweredOff));
    assert!(machine.destroy().await.leaks.is_empty());
    sim.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn the_end_of_guest_or_vmm_is_noticed_at_every_step() {
    let reasons = [
        StopReason::GuestPanic,
        StopReason::VmmDied,
        StopReason::Reset,
        StopReason::HostIo,
        StopReason::PoweredOff,
    ];
    for step in Step::ALL {
        for reason in reasons {
            let sim = Sim::new();
            let trouble = Trouble::Stops(reason);
            sim.driver.inject_always(Fault::At(step, trouble));
            match whole_life(&sim, &sim.spec("m")).await {
                Ended::BringUp(BringUpError::Stopped { reason: told, .. }) => {
                    assert_eq!(told, reason, "{step:?}");
                }
                Ended::At(at, Failed::Broken(_), machine, _host) => {
                    assert_eq!(at, step);
                    assert_eq!(machine.stopped().await, MachineState::Stopped(reason));
                    assert!(machine.destroy().await.leaks.is_empty());
                }
                Ended::BringUp(error) => panic!("{step:?} {reason:?}: {error:?}"),
                Ended::At(at, failed, ..) => panic!("{step:?} {reason:?}: {at:?} {failed:?}"),
                Ended::Well(_) => panic!("{step:?} {reason:?}: nobody noticed"),
            }
            sim.assert_nothing_left();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_guest_is_given_up_at_every_step() {
    for step in Step::ALL {
        let sim = Sim::new();
        sim.driver.inject_always(Fault::At(step, Trouble::Silent));
        match whole_life(&sim, &sim.spec("m")).await {
            Ended::BringUp(BringUpError::Hello { .. }) => {
                assert!(matches!(step, Step::Boot | Step::Hello), "{step:?}");
            }
            Ended::BringUp(BringUpError::Order { .. }) => {
                assert!(matches!(step, Step::Reidentify | Step::Thaw), "{step:?}");
            }
            Ended::At(at, Failed::Timeout, machine, _host) => {
                assert_eq!(at, step);
                let state = machine.stop(DEADLINE).await;
                assert_eq!(state, MachineState::Stopped(StopReason::Killed));
                assert!(machine.destroy().await.leaks.is_empty());
            }
            Ended::BringUp(error) => panic!("{step:?}: {error:?}"),
            Ended::At(at, failed, ..) => panic!("{step:?}: {at:?} {failed:?}"),
            Ended::Well(_) => panic!("{step:?}: nobody noticed"),
        }
        sim.assert_nothing_left();
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_breaks_the_protocol_is_caught_at_every_step() {
    for step in Step::ALL.into_iter().filter(|step| *step != Step::Boot) {
        for violation in Violation::ALL {
            let sim = Sim::new();
            let trouble = Trouble::Violates(violation);
            sim.driver.inject_always(Fault::At(step, trouble));
            // These leave a conversation that is well-formed and goes nowhere.
            let may_stall = matches!(violation, Violation::OpenFlood | Violation::NotJson);
            match whole_life(&sim, &sim.spec("m")).await {
                Ended::BringUp(error) => {
                    let class = error.class();
                    let caught = class == FailureClass::GuestFault;
                    assert!(
                        caught || may_stall || step == Step::Hello,
                        "{step:?} {violation:?}: {class:?} {error:?}"
                    );
                }
                Ended::At(at, failed, machine, host) => {
                    assert_eq!(at, step, "{violation:?}");
                    match failed {
                        Failed::Broken(_) => {}
                        Failed::Timeout if may_stall => {}
                        other => panic!("{step:?} {violation:?}: {other:?}"),
                    }
                    if matches!(
                        violation,
                        Violation::OversizedFrame | Violation::Garbage | Violation::UnknownStream
                    ) {
                        let reason = host.session.closed().await;
                        assert!(matches!(reason, CloseReason::Protocol(_)), "{reason:?}");
                    }
                    assert!(!machine.state().is_terminal(), "its machine is ours to end");
                    assert!(machine.destroy().await.leaks.is_empty());
                }
                Ended::Well(_) => panic!("{step:?} {violation:?}: nobody noticed"),
            }
            sim.assert_nothing_left();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_passed_on_and_the_guest_lives() {
    for step in Step::ALL {
        if matches!(step, Step::Boot | Step::Hello) {
            continue;
        }
        let sim = Sim::new();
        let trouble = Trouble::Refuses(GuestErrorCode::DiskFull);
        sim.driver.inject_always(Fault::At(step, trouble));
        match whole_life(&sim, &sim.spec("m")).await {
            Ended::BringUp(error) => {
                assert!(matches!(step, Step::Reidentify | Step::Thaw), "{error:?}");
            }
            Ended::At(at, Failed::Refused(_), machine, host) => {
                assert_eq!(at, step);
                host.session.ping(DEADLINE).await.expect("it lives");
                assert!(machine.destroy().await.leaks.is_empty());
            }
            Ended::At(at, failed, ..) => panic!("{step:?}: {at:?} {failed:?}"),
            Ended::Well(_) => panic!("{step:?}: nobody noticed"),
        }
        sim.assert_nothing_left();
    }
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_dies_anywhere_is_noticed() {
    // Within the echo, within the hello, and within each frame that follows.
    for bytes in (1..400).step_by(13).chain([48, 49, 57, 1000, 2000, 3000]) {
        let sim = Sim::new();
        sim.driver.inject_always(Fault::ChannelDiesAfter { bytes });
        match whole_life(&sim, &sim.spec("m")).await {
            Ended::BringUp(_) => {}
            Ended::At(step, failed, machine, _host) => {
                assert!(
                    matches!(failed, Failed::Broken(_)),
                    "{bytes}: {step:?} {failed:?}"
                );
                assert!(!machine.state().is_terminal(), "only the channel died");
                assert!(machine.destroy().await.leaks.is_empty());
            }
            Ended::Well(_) => panic!("{bytes}: nobody noticed"),
        }
        sim.assert_nothing_left();
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_guest_is_waited_for() {
    let sim = Sim::new();
    let per_step = DEADLINE / 3;
    sim.driver.inject(Fault::Slow { per_step });
    let Ended::Well(machine) = whole_life(&sim, &sim.spec("m")).await else {
        panic!("slow is not dead");
    };
    assert!(machine.destroy().await.leaks.is_empty());
    // Slower than the deadline is.
    let per_step = DEADLINE * 2;
    sim.driver.inject_always(Fault::Slow { per_step });
    let ended = whole_life(&sim, &sim.spec("m")).await;
    assert!(matches!(ended, Ended::BringUp(_)));
    sim.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn a_boot_that_hangs_is_tried_once_more() {
    let sim = Sim::new();
    sim.driver.inject(Fault::At(Step::Boot, Trouble::Silent));
    let spec = sim.spec("m");
    let ready = bring_up::start(&sim.driver, &spec, &Start::Cold, DEADLINES).await;
    let ready = ready.expect("the second boot");
    assert_eq!(ready.timings.retries, 1);
    assert!(ready.machine.destroy().await.leaks.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_full_host_disk_stops_a_launch_and_leaves_nothing() {
    let sim = Sim::new();
    sim.driver.inject(Fault::HostDiskFull);
    let launched = sim.driver.launch(&sim.spec("m"), Start::Cold).await;
    let error = launched.expect_err("no space");
    assert!(matches!(error, LaunchError::DiskFull(_)), "{error:?}");
    sim.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn a_clone_that_lies_about_its_identity_is_destroyed() {
    let lies = [
        Lie::BootId,
        Lie::MachineId,
        Lie::Hostname,
        Lie::Clock,
        Lie::NoEntropy,
        Lie::NoReseed,
        Lie::WorkloadRan,
    ];
    let sim = Sim::new();
    let template = sim.template().await;
    for lie in lies {
        sim.driver.inject(Fault::Lies(lie));
        let start = Start::Template(template.template.clone());
        let started = bring_up::start(&sim.driver, &sim.spec("clone"), &start, DEADLINES).await;
        let error = started.expect_err("a liar");
        assert!(
            matches!(error, BringUpError::False(_)),
            "{lie:?}: {error:?}"
        );
        assert_eq!(error.class(), FailureClass::GuestFault);
        sim.assert_nothing_left();
    }
    let start = Start::Template(template.template.clone());
    let honest = bring_up::start(&sim.driver, &sim.spec("clone"), &start, DEADLINES).await;
    let honest = honest.expect("an honest clone");
    assert!(honest.machine.destroy().await.leaks.is_empty());
}

#[tokio::test(start_paused = true)]
async fn no_template_is_made_of_a_guest_that_may_not_become_one() {
    for lie in [Lie::NotFrozen, Lie::SecretIssued] {
        let sim = Sim::new();
        sim.driver.inject(Fault::Lies(lie));
        let target = TemplateRef {
            key: "k".to_owned(),
            dir: sim.home.path().join("templates/k"),
        };
        let prepare = |_session| async { Ok::<(), std::io::Error>(()) };
        let spec = sim.spec("origin");
        let made = bring_up::make_template(&sim.driver, &spec, &target, DEADLINES, prepare).await;
        assert!(matches!(made, Err(BringUpError::False(_))), "{made:?}");
        assert!(!target.dir.exists(), "nothing was written");
        sim.assert_nothing_left();
    }
}

/// The conformance suite's checks would notice these: the simulated guest really does what the lie says.
#[tokio::test(start_paused = true)]
async fn lies_that_no_single_answer_shows_are_seen_by_the_suite() {
    let sim = Sim::new();
    let template = sim.template().await;
    let mut drawn = Vec::new();
    for name in ["a", "b"] {
        sim.driver.inject(Fault::Lies(Lie::RepeatedRandom));
        let start = Start::Template(template.template.clone());
        let machine = sim.driver.launch(&sim.spec(name), start).await;
        let machine = machine.expect("cloned");
        let host = Host::connect(&*machine, DEADLINE).await.expect("hello");
        let answer = host.reidentify(&identity(name)).await.expect("answers");
        assert!(answer.entropy_added && answer.reseeded, "it claims so");
        drawn.push(answer.sample);
        assert!(machine.destroy().await.leaks.is_empty());
    }
    assert_eq!(drawn[0], drawn[1], "siblings repeat");
    sim.driver.inject(Fault::Lies(Lie::FalselyFrozen));
    let start = Start::Template(template.template.clone());
    let machine = sim.driver.launch(&sim.spec("c"), start).await;
    let machine = machine.expect("cloned");
    let host = Host::connect(&*machine, DEADLINE).await.expect("hello");
    let early = host.exec(&["echo", "early"]).await.expect("it ran");
    assert_eq!(early.text(), "early", "before any thaw");
    let answer = host.reidentify(&identity("c")).await.expect("answers");
    assert_eq!(answer.workload_ran, 1);
}

#[tokio::test(start_paused = true)]
async fn lies_about_trees_and_output_are_seen() {
    let sim = Sim::new();
    for lie in [Lie::TreeReport, Lie::HostileTree, Lie::Offsets] {
        sim.driver.inject(Fault::Lies(lie));
        let machine = sim.driver.launch(&sim.spec("m"), Start::Cold).await;
        let machine = machine.expect("launched");
        let host = Host::connect(&*machine, DEADLINE).await.expect("hello");
        let order = PutTree {
            place: Place::Work,
            bytes_max: 1000,
            entries_max: 10,
        };
        let report = put(&host, kind::PUT_TREE, &order, &tar()).await;
        let report = report.expect("put");
        let honest = (report.entries, report.bytes) == (1, 5);
        assert_eq!(honest, lie != Lie::TreeReport);
        let tar = get_tree(&host, "/work").await.expect("got");
        let hostile = tar::Archive::new(tar.as_slice())
            .entries()
            .expect("tar")
            .filter_map(Result::ok)
            .filter(|entry| {
                let path = entry.path_bytes();
                path.starts_with(b"..") || path.starts_with(b"/") || path.starts_with(b"out/")
            })
            .count();
        assert_eq!(hostile, if lie == Lie::HostileTree { 3 } else { 0 });
        let ran = host.exec_with(request(&["echo", "x"]), b"").await;
        let refused = matches!(ran, Err(Failed::Broken(_)));
        assert_eq!(refused, lie == Lie::Offsets, "{ran:?}");
        assert!(machine.destroy().await.leaks.is_empty());
    }
}

/// kill -9 of kiln at every step: the handle is lost without any destructor, and another driver on the same home reaps.
#[tokio::test(start_paused = true)]
async fn what_a_killed_kiln_leaves_at_any_step_is_reaped() {
    for step in Step::ALL {
        let sim = Sim::new();
        sim.driver.inject_always(Fault::At(step, Trouble::Silent));
        let spec = sim.spec("m");
        let launched = sim.driver.launch(&spec, Start::Cold).await;
        let machine = launched.expect("launched");
        if let Ok(host) = Host::connect(&*machine, DEADLINE).await {
            let told = host.reidentify(&identity("m")).await;
            if told.is_ok() && host.call(&Order::Thaw).await.is_ok() {
                let stuck = live(&host).await.expect_err("stuck at the step");
                assert_eq!(stuck.0, step);
            }
        }
        let lost = sim.driver.machine(&spec.name).expect("alive");
        lost.abandon();
        std::mem::forget((machine, lost));
        let next = SimDriver::new(sim.home.path(), SimConfig::default());
        let report = next.reap().await;
        assert_eq!(report.reaped, ["m"], "{step:?}");
        assert!(report.leaks.is_empty(), "{report:?}");
        sim.assert_nothing_left();
    }
}
