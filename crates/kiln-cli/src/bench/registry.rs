//! Benchmark of the registry: push and pull of 1 GB, in turn with Debian's `docker-registry` where that is installed.
//! Each serves from a process of its own, out of an empty directory on the same filesystem, on loopback.

use std::fs;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use kiln_core::FailureClass;
use kiln_store::HostRegistry;
use kiln_store::host::HostConfig;
use kiln_store::load::{Load, Sample, Target, measure};
use kiln_worker::home::Home;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

use super::report::Report;
use super::series::{Promise, Unit};
use super::{Bench, cancelled, child};
use crate::error::{CliError, OrInfrastructure as _, Result};

/// Size of the blob.
const BLOB_BYTES: u64 = 1_000_000_000;
/// A server must listen within this time.
const START_MAX: Duration = Duration::from_secs(20);
/// Between two looks whether it does.
const START_POLL: Duration = Duration::from_millis(20);
/// Debian's registry: its program, and its name in the samples.
const DEBIAN: &str = "docker-registry";

/// A registry's process and how it is reached.
struct Server {
    target: Target,
    child: Child,
}

/// `registry`: see the module.
pub(super) async fn registry(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let mut servers = vec![bench.unless_cancelled(start_kiln(bench)).await?];
    match bench.unless_cancelled(start_debian(bench)).await? {
        Some(server) => servers.push(server),
        None => bench
            .screen
            .note("docker-registry is not installed: kiln's registry is measured alone"),
    }
    let targets: Vec<Target> = servers.iter().map(|server| server.target.clone()).collect();
    let load = Load {
        bytes: BLOB_BYTES,
        rounds: u32::try_from(bench.samples).unwrap_or(u32::MAX),
        dir: bench.work.to_owned(),
    };
    let measuring = tokio::task::spawn_blocking(move || measure(&targets, &load, |_| {}));
    let samples = tokio::select! {
        samples = measuring => Some(samples),
        () = bench.cancel.cancelled() => None,
    };
    // Without its servers a cancelled measurement ends by itself.
    for server in &mut servers {
        child::end(&mut server.child).await;
    }
    let samples = samples.ok_or_else(cancelled)?;
    tell(&samples.or_infrastructure()?.or_infrastructure()?, report);
    Ok(())
}

fn tell(samples: &[Sample], report: &mut Report) {
    let seconds = Duration::from_secs_f64;
    for sample in samples {
        let name = &sample.registry;
        report.time(&format!("{name}: push"), None, seconds(sample.push_s));
        report.time(&format!("{name}: pull"), None, seconds(sample.pull_s));
        let promise = (name != DEBIAN).then_some(Promise::EachAtMost(64e6));
        #[expect(clippy::cast_precision_loss, reason = "a process's bytes fit a double")]
        let peak = (sample.peak_memory_kib * 1024) as f64;
        report.add(&format!("{name}: memory"), Unit::Bytes, promise, peak);
    }
    for ours in samples.iter().filter(|sample| sample.registry != DEBIAN) {
        let theirs = samples
            .iter()
            .find(|other| other.registry == DEBIAN && other.round == ours.round);
        if let Some(theirs) = theirs {
            let most = Some(Promise::MedianAtMost(1.0));
            report.add(
                "push / docker-registry",
                Unit::Ratio,
                most,
                ours.push_s / theirs.push_s,
            );
            report.add(
                "pull / docker-registry",
                Unit::Ratio,
                most,
                ours.pull_s / theirs.pull_s,
            );
        }
    }
}

async fn start_kiln(bench: &Bench<'_>) -> Result<Server> {
    let root = bench.work.join("registry");
    let address = free_address().await?;
    let child = Command::new(child::THIS_PROGRAM)
        .args(["registry", "serve", "--listen", &address.to_string()])
        .env("KILN_HOME", &root)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .or_infrastructure()?;
    let mut server = server("kiln", address, child).await?;
    // The child owns the store by now, so this attaches to it.
    let dir = Home::below(&root).registry();
    let registry = HostRegistry::open_or_attach(&dir, HostConfig::default())
        .await
        .or_infrastructure()?;
    let (user, secret) = registry.credentials().or_infrastructure()?;
    let login = format!("{user}:{}", secret.reveal());
    let login = base64::engine::general_purpose::STANDARD.encode(login);
    server.target.authorization = Some(format!("Basic {login}"));
    Ok(server)
}

async fn start_debian(bench: &Bench<'_>) -> Result<Option<Server>> {
    let address = free_address().await?;
    let config = bench.work.join("docker-registry.yml");
    let root = serde_json::json!(bench.work.join(DEBIAN));
    let text = format!(
        "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: {root}\nhttp:\n  addr: {address}\n"
    );
    fs::write(&config, text).or_infrastructure()?;
    let spawned = Command::new(DEBIAN)
        .arg("serve")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    match spawned {
        Ok(child) => server(DEBIAN, address, child).await.map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CliError::infrastructure(&error)),
    }
}

async fn free_address() -> Result<SocketAddr> {
    let free = TcpListener::bind("127.0.0.1:0").await.or_infrastructure()?;
    free.local_addr().or_infrastructure()
}

/// Waits until the child listens.
async fn server(name: &str, address: SocketAddr, mut child: Child) -> Result<Server> {
    let listens = async {
        while TcpStream::connect(address).await.is_err() {
            if child.try_wait().or_infrastructure()?.is_some() {
                break;
            }
            tokio::time::sleep(START_POLL).await;
        }
        Ok::<(), CliError>(())
    };
    let waited = tokio::time::timeout(START_MAX, listens).await;
    let pid = child.id();
    match (waited, pid) {
        (Ok(done), Some(pid)) => {
            done?;
            let target = Target {
                name: name.to_owned(),
                address: address.to_string(),
                authorization: None,
                pid,
            };
            Ok(Server { target, child })
        }
        _ => Err(CliError::new(
            FailureClass::Infrastructure,
            format!("the registry {name} did not start"),
        )),
    }
}
