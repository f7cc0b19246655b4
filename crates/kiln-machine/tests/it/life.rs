//! One whole life of a simulated machine, with everything a host asks of a guest, on a virtual clock.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_core::machine::{BootSource, DiskAccess, DiskFormat};
use kiln_core::{ByteSize, Digest, DiskRole, DiskSlot, MachineSpec};
use kiln_machine::bring_up::{self, BringUpError, Deadlines};
use kiln_machine::driver::{Machine, Start, TemplateRef};
use kiln_machine::sim::{SimConfig, SimDriver, Step};
use kiln_machine::template::{Held, Purpose, TemplateKey, TemplateStore};
use kiln_proto::msg::{
    BuildkitConfig, ConnectReply, ContainerSpec, Forward, GetTree, GuestError, GuestErrorCode,
    Order, Place, PutFile, PutTree, TreeReport, kind,
};
use kiln_proto::read_msg;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::host::{Failed, Host, broken};

/// For everything; virtual.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

pub(crate) const DEADLINES: Deadlines = Deadlines {
    clone_hello: DEADLINE,
    order: DEADLINE,
};

pub(crate) struct Sim {
    pub(crate) home: tempfile::TempDir,
    pub(crate) driver: SimDriver,
}

impl Sim {
    pub(crate) fn new() -> Self {
        let home = tempfile::tempdir().expect("temp");
        for name in ["kernel", "initrd", "root.img", "head.img"] {
            std::fs::write(home.path().join(name), "").expect("write");
        }
        let driver = SimDriver::new(home.path(), SimConfig::default());
        Self { home, driver }
    }

    pub(crate) fn spec(&self, name: &str) -> MachineSpec {
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
            keepable: false,
            host_cpus: Vec::new(),
            disk_bytes_per_second: None,
        }
    }

    pub(crate) fn assert_nothing_left(&self) {
        assert_nothing_left(self.home.path());
    }

    pub(crate) async fn template(&self) -> Held {
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

pub(crate) fn assert_nothing_left(home: &Path) {
    let left: Vec<_> = std::fs::read_dir(home.join("machines"))
        .expect("list")
        .flatten()
        .map(|entry| entry.file_name())
        .filter(|name| name != ".lock")
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A life that uses everything, after the bring-up. Gives the step that failed.
pub(crate) async fn live(host: &Host) -> Result<(), (Step, Failed)> {
    let order = async |step: Step, order: Order| {
        let reply = host.call(&order).await;
        reply.map(drop).map_err(|failed| (step, failed))
    };
    let limits = Order::SetLimits {
        memory_max: 0,
        pids_max: 100,
        disk_bytes_max: 1 << 30,
        open_files_max: 0,
    };
    order(Step::SetLimits, limits).await?;
    order(Step::SetStepEnv, Order::SetStepEnv { env: Vec::new() }).await?;
    order(Step::SetConnections, Order::SetConnections { most: 500 }).await?;
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
    let names = vec!["db".to_owned()];
    order(Step::NameServices, Order::NameServices { names }).await?;
    order(Step::Stats, Order::Stats).await?;
    let place = Place::Work;
    order(Step::RemoveTree, Order::RemoveTree { place }).await?;
    order(Step::StopBuildkit, Order::StopBuildkit).await?;
    order(Step::Unmount, Order::Unmount { serial: state }).await?;
    order(Step::Quiesce, Order::Quiesce).await?;
    order(Step::Shutdown, Order::Shutdown).await
}

/// What is sent as a tree: one file of 5 bytes.
pub(crate) fn tar() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    builder
        .append_data(&mut header, "src/a", &b"bytes"[..])
        .expect("tar");
    builder.into_inner().expect("tar")
}

pub(crate) async fn put(
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

pub(crate) async fn get_tree(host: &Host, path: &str) -> Result<Vec<u8>, Failed> {
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
pub(crate) enum Ended {
    /// Before the guest was ready.
    BringUp(BringUpError),
    /// At a step, with the machine still in hand.
    At(Step, Failed, Arc<dyn Machine>, Host),
    /// It did all of it.
    Well(Arc<dyn Machine>),
}

pub(crate) async fn whole_life(sim: &Sim, spec: &MachineSpec) -> Ended {
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
