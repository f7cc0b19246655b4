//! Pushes and pulls a large blob against kiln's registry and Debian's `docker-registry`, alternating,
//! each in its own process on the same file system, and prints every sample as JSON.
//!
//! `cargo run --release -p kiln-store --example registry_bench -- [bytes] [rounds] [directory]`
//! Defaults: 1 GiB, 5 rounds, the system's temporary directory. Without `docker-registry` only kiln is measured.

#![expect(
    clippy::print_stdout,
    reason = "a measuring program prints its samples"
)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use base64::Engine;
use kiln_core::{Digest, TenantName};
use kiln_store::HostRegistry;
use kiln_store::host::{HostConfig, LoopbackState};
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
    let number = |at: usize, default: u64| args.get(at).map_or(Ok(default), |text| text.parse());
    let bytes = number(0, 1 << 30)?;
    let rounds = number(1, 5)?;
    let base = args.get(2).map_or_else(std::env::temp_dir, Into::into);
    let dir = tempfile::tempdir_in(base)?;
    let mut servers = vec![start_kiln(dir.path())?];
    servers.extend(start_debian(dir.path())?);
    let file = dir.path().join("blob");
    write_blob(&file, bytes)?;
    for round in 0..rounds {
        let digest = freshen(&file, round)?;
        for server in &servers {
            Command::new("sync").status()?;
            let idle_cpu = server.cpu_s()?;
            let push_s = server.push(&file, &digest)?;
            let pushed_cpu = server.cpu_s()?;
            let pull_s = server.pull(&digest, bytes)?;
            let pulled_cpu = server.cpu_s()?;
            let sample = serde_json::json!({
                "registry": server.name, "round": round, "bytes": bytes,
                "push_s": push_s, "pull_s": pull_s,
                "push_cpu_s": pushed_cpu - idle_cpu, "pull_cpu_s": pulled_cpu - pushed_cpu,
                "peak_memory_kib": server.peak_memory_kib()?,
            });
            println!("{sample}");
        }
    }
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

struct Server {
    name: &'static str,
    address: String,
    authorization: String,
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
    Ok(Server {
        name: "kiln",
        address: address.to_owned(),
        authorization: format!("Authorization: Basic {login}\r\n"),
        child,
    })
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
    let server = Server {
        name: "debian",
        address,
        authorization: String::new(),
        child,
    };
    let deadline = Instant::now() + START_MAX;
    while TcpStream::connect(&server.address).is_err() {
        if Instant::now() > deadline {
            bail!("docker-registry does not listen");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Some(server))
}

/// The head of an answer, and the connection behind it.
struct Answer {
    status: u16,
    location: String,
    rest: BufReader<TcpStream>,
}

impl Server {
    fn ask(&self, method: &str, path: &str, length: u64, body: Option<&Path>) -> Result<Answer> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_nodelay(true)?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\n{}Content-Type: application/octet-stream\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n",
            self.address, self.authorization
        );
        stream.write_all(head.as_bytes())?;
        if let Some(path) = body {
            // Zero-copy on Linux: the client's own cost stays small.
            std::io::copy(&mut File::open(path)?, &mut stream)?;
        }
        let mut rest = BufReader::with_capacity(1 << 20, stream);
        let mut line = String::new();
        rest.read_line(&mut line)?;
        let status = line.split(' ').nth(1).context("a status")?.parse()?;
        let mut location = String::new();
        loop {
            line.clear();
            rest.read_line(&mut line)?;
            match line.trim().split_once(": ") {
                None => break,
                Some((name, value)) if name.eq_ignore_ascii_case("location") => {
                    let path = value.find("/v2/").map_or(value, |at| &value[at..]);
                    path.clone_into(&mut location);
                }
                Some(_) => {}
            }
        }
        Ok(Answer {
            status,
            location,
            rest,
        })
    }

    /// As docker does it: POST, one PATCH with everything, PUT with the digest.
    fn push(&self, file: &Path, digest: &Digest) -> Result<f64> {
        let begin = Instant::now();
        let path = "/v2/t/local/bench/blobs/uploads/";
        let session = self.expect(202, self.ask("POST", path, 0, None)?)?;
        let size = std::fs::metadata(file)?.len();
        let session = self.expect(202, self.ask("PATCH", &session, size, Some(file))?)?;
        let join = if session.contains('?') { '&' } else { '?' };
        let path = format!("{session}{join}digest={digest}");
        self.expect(201, self.ask("PUT", &path, 0, None)?)?;
        Ok(begin.elapsed().as_secs_f64())
    }

    fn expect(&self, status: u16, mut answer: Answer) -> Result<String> {
        if answer.status == status {
            return Ok(answer.location);
        }
        let mut text = String::new();
        answer.rest.read_to_string(&mut text)?;
        bail!(
            "{}: {} instead of {status}: {text}",
            self.name,
            answer.status
        )
    }

    fn pull(&self, digest: &Digest, bytes: u64) -> Result<f64> {
        let begin = Instant::now();
        let path = format!("/v2/t/local/bench/blobs/{digest}");
        let mut answer = self.ask("GET", &path, 0, None)?;
        let mut buffer = vec![0; 1 << 20];
        let mut got = 0;
        loop {
            match answer.rest.read(&mut buffer)? {
                0 => break,
                count => got += count as u64,
            }
        }
        if (answer.status, got) != (200, bytes) {
            bail!("{}: {} with {got} bytes", self.name, answer.status);
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    /// Processor time of the server so far: fields 14 and 15 of proc(5)'s stat, 100 ticks a second.
    fn cpu_s(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let (_, fields) = stat.rsplit_once(')').context("stat")?;
        let ticks = fields.split_whitespace().skip(11).take(2);
        let ticks: u64 = ticks.map(|text| text.parse::<u64>().unwrap_or(0)).sum();
        Ok(ticks as f64 / 100.0)
    }

    fn peak_memory_kib(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        Ok(line
            .context("VmHWM")?
            .trim()
            .trim_end_matches(" kB")
            .parse()?)
    }
}

/// Bytes that do not repeat, made quickly.
fn write_blob(path: &Path, bytes: u64) -> Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut block = Vec::with_capacity(1 << 20);
    let mut file = File::create(path)?;
    let mut left = bytes;
    while left > 0 {
        block.clear();
        while block.len() < 1 << 20 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend_from_slice(&state.to_le_bytes());
        }
        let part = usize::try_from(left)?.min(block.len());
        file.write_all(&block[..part])?;
        left -= part as u64;
    }
    Ok(())
}

/// Changes the blob, so that no registry has it yet.
fn freshen(path: &Path, round: u64) -> Result<Digest> {
    let mut file = File::options().read(true).write(true).open(path)?;
    file.write_all(&round.to_le_bytes())?;
    file.seek(SeekFrom::Start(0))?;
    Ok(Digest::of_reader(file)?.0)
}
