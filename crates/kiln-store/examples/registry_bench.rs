//! Pushes and pulls a large blob against kiln's registry and Debian's `docker-registry`, alternating,
//! each in its own process on the same file system, and prints every sample as JSON.
//!
//! `cargo run --release -p kiln-store --example registry_bench -- [bytes] [rounds] [directory]`
//! Defaults: 1 GiB, 5 rounds, the system's temporary directory. Without `docker-registry` only kiln is measured.

#![expect(
    clippy::print_stdout,
    reason = "a measuring program prints its samples"
)]

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use base64::Engine;
use kiln_core::TenantName;
use kiln_store::HostRegistry;
use kiln_store::host::{HostConfig, LoopbackState};
use kiln_store::load::{Load, Target, measure};
use kiln_store::registry::{LoopbackConfig, UserAuthority};

/// Argument that makes this program serve instead of measure.
const SERVE: &str = "--serve";
/// A server must listen within this time.
const START_MAX: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().map(String::as_str) == Some(SERVE) {
        return serve(Path::new(args.get(1).context("a directory")?));
    }
    let base = args.get(2).map_or_else(std::env::temp_dir, Into::into);
    let dir = tempfile::tempdir_in(base)?;
    let load = Load {
        bytes: args.first().map_or(Ok(1 << 30), |text| text.parse())?,
        rounds: args.get(1).map_or(Ok(5), |text| text.parse())?,
        dir: dir.path().to_owned(),
    };
    let mut servers = vec![start_kiln(dir.path())?];
    servers.extend(start_debian(dir.path())?);
    let targets: Vec<Target> = servers.iter().map(|server| server.target.clone()).collect();
    measure(&targets, &load, |sample| {
        println!("{}", serde_json::to_string(sample).unwrap_or_default());
    })?;
    Ok(())
}

fn serve(dir: &Path) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let config = HostConfig {
            loopback: Some(LoopbackConfig {
                address: "127.0.0.1:0".parse()?,
                user: UserAuthority::embedded("kiln", &TenantName::local()),
                anonymous_pull: Vec::new(),
            }),
            ..HostConfig::default()
        };
        let host = HostRegistry::open_or_attach(dir, config).await?;
        let LoopbackState::Open(address) = host.about().await?.loopback else {
            bail!("not listening");
        };
        let (user, secret) = host.credentials()?;
        println!("{address} {user}:{}", secret.reveal());
        std::future::pending().await
    })
}

/// A registry in a process of its own, ended when dropped.
struct Server {
    target: Target,
    child: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start_kiln(dir: &Path) -> Result<Server> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg(SERVE)
        .arg(dir.join("kiln"))
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let stdout = child.stdout.take().context("stdout")?;
    BufReader::new(stdout).read_line(&mut line)?;
    let (address, login) = line.trim().split_once(' ').context("an address")?;
    let login = base64::engine::general_purpose::STANDARD.encode(login);
    let target = Target {
        name: "kiln".to_owned(),
        address: address.to_owned(),
        authorization: Some(format!("Basic {login}")),
        pid: child.id(),
    };
    Ok(Server { target, child })
}

fn start_debian(dir: &Path) -> Result<Option<Server>> {
    let free = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = free.local_addr()?.to_string();
    drop(free);
    let root = dir.join("debian");
    let config = dir.join("debian.yml");
    let text = format!(
        "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
        root.display()
    );
    std::fs::write(&config, text)?;
    let spawned = Command::new("docker-registry")
        .arg("serve")
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(child) = spawned else {
        return Ok(None);
    };
    let target = Target {
        name: "docker-registry".to_owned(),
        address,
        authorization: None,
        pid: child.id(),
    };
    let server = Server { target, child };
    let deadline = Instant::now() + START_MAX;
    while TcpStream::connect(&server.target.address).is_err() {
        if Instant::now() > deadline {
            bail!("docker-registry does not listen");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Some(server))
}
