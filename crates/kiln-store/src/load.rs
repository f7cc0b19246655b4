//! A load for measuring registries: pushes and pulls one large blob over plain HTTP, on several
//! registries in turn, and gives every sample. What `kiln bench` and `examples/registry_bench.rs` run.
//!
//! It does what docker does (POST, one PATCH, PUT; GET) and as little else as possible: the blob goes
//! from its file to the socket without passing through this program. Starting the registries, each in
//! a process of its own and on the same file system, is the caller's part.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_core::Digest;
use serde::{Deserialize, Serialize};

/// Repository the load uses.
pub const LOAD_REPOSITORY: &str = "t/local/bench";
/// A registry that gives no byte for this long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// Longest head of an answer, bytes.
const HEAD_BYTES_MAX: u64 = 64 << 10;
/// Block of made-up bytes, and buffer for reading.
const BLOCK_BYTES: usize = 1 << 20;
/// Clock ticks per second in proc(5): 100 on every Linux a user sees.
const TICKS_PER_S: f64 = 100.0;

/// One registry under load.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// Name in the samples.
    pub name: String,
    /// `host:port`.
    pub address: String,
    /// Value of the `Authorization` header, if it needs one.
    pub authorization: Option<String>,
    /// Process that serves it: its memory and processor time are read.
    pub pid: u32,
}

/// How much to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Load {
    /// Size of the blob.
    pub bytes: u64,
    /// Times each registry gets it; its content differs each time.
    pub rounds: u32,
    /// Directory for the blob's file.
    pub dir: PathBuf,
}

/// One push and pull.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Name of the registry.
    pub registry: String,
    /// From 0.
    pub round: u32,
    /// Size of the blob.
    pub bytes: u64,
    /// Wall time of the push, seconds.
    pub push_s: f64,
    /// Wall time of the pull, seconds.
    pub pull_s: f64,
    /// The registry's processor time for the push, seconds.
    pub push_cpu_s: f64,
    /// The registry's processor time for the pull, seconds.
    pub pull_cpu_s: f64,
    /// Most memory its process ever had, KiB.
    pub peak_memory_kib: u64,
}

/// Why a measurement stopped.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The blob's file, or what is read of the registry's process.
    #[error("cannot {what} {}", path.display())]
    File {
        /// Verb.
        what: &'static str,
        /// Which path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The connection to a registry failed.
    #[error("{registry} broke off at {method} {path}")]
    Connection {
        /// Its name.
        registry: String,
        /// Of the request.
        method: &'static str,
        /// Of the request.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A registry did not do what was asked.
    #[error("{registry} answered {method} {path} with {status}, not {expected}")]
    Answer {
        /// Its name.
        registry: String,
        /// Of the request.
        method: &'static str,
        /// Of the request.
        path: String,
        /// What it answered.
        status: u16,
        /// What it should have answered.
        expected: u16,
    },
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LoadError {
    let path = path.to_owned();
    move |source| LoadError::File { what, path, source }
}

/// Puts the load on each registry in turn, round by round; `each` sees every sample as it comes. Blocks.
///
/// # Errors
/// The first thing that goes wrong ends the measurement.
pub fn measure(
    targets: &[Target],
    load: &Load,
    mut each: impl FnMut(&Sample),
) -> Result<Vec<Sample>, LoadError> {
    let path = load.dir.join("kiln-load.blob");
    let measured = write_blob(&path, load.bytes)
        .map_err(file("write", &path))
        .and_then(|()| {
            let mut samples = Vec::new();
            for round in 0..load.rounds {
                let digest = freshen(&path, round).map_err(file("change", &path))?;
                for target in targets {
                    let sample = target.sample(&path, &digest, load.bytes, round)?;
                    each(&sample);
                    samples.push(sample);
                }
            }
            Ok(samples)
        });
    // The blob is of no use to anybody else; a failure above matters more.
    let _ = std::fs::remove_file(&path);
    measured
}

/// The head of an answer, and the connection behind it.
struct Answer {
    location: String,
    rest: BufReader<TcpStream>,
}

impl Target {
    fn sample(
        &self,
        blob: &Path,
        digest: &Digest,
        bytes: u64,
        round: u32,
    ) -> Result<Sample, LoadError> {
        // What others left to be written would slow whoever comes next.
        rustix::fs::sync();
        let idle = self.cpu_s()?;
        let push_s = self.push(blob, digest, bytes)?;
        let pushed = self.cpu_s()?;
        let pull_s = self.pull(digest, bytes)?;
        let pulled = self.cpu_s()?;
        Ok(Sample {
            registry: self.name.clone(),
            round,
            bytes,
            push_s,
            pull_s,
            push_cpu_s: pushed - idle,
            pull_cpu_s: pulled - pushed,
            peak_memory_kib: self.peak_memory_kib()?,
        })
    }

    fn push(&self, blob: &Path, digest: &Digest, bytes: u64) -> Result<f64, LoadError> {
        let begin = Instant::now();
        let path = format!("/v2/{LOAD_REPOSITORY}/blobs/uploads/");
        let session = self.ask("POST", &path, 202, 0, None)?.location;
        let session = self
            .ask("PATCH", &session, 202, bytes, Some(blob))?
            .location;
        let join = if session.contains('?') { '&' } else { '?' };
        self.ask(
            "PUT",
            &format!("{session}{join}digest={digest}"),
            201,
            0,
            None,
        )?;
        Ok(begin.elapsed().as_secs_f64())
    }

    fn pull(&self, digest: &Digest, bytes: u64) -> Result<f64, LoadError> {
        let begin = Instant::now();
        let path = format!("/v2/{LOAD_REPOSITORY}/blobs/{digest}");
        let mut answer = self.ask("GET", &path, 200, 0, None)?;
        let mut buffer = vec![0; BLOCK_BYTES];
        let mut got = 0;
        let broken = |source| LoadError::Connection {
            registry: self.name.clone(),
            method: "GET",
            path: path.clone(),
            source,
        };
        loop {
            match answer.rest.read(&mut buffer).map_err(broken)? {
                0 => break,
                count => got += count as u64,
            }
        }
        if got == bytes {
            return Ok(begin.elapsed().as_secs_f64());
        }
        Err(broken(io::ErrorKind::UnexpectedEof.into()))
    }

    fn ask(
        &self,
        method: &'static str,
        path: &str,
        expected: u16,
        length: u64,
        body: Option<&Path>,
    ) -> Result<Answer, LoadError> {
        let registry = self.name.clone();
        let asked = self.exchange(method, path, length, body);
        let (status, answer) = asked.map_err(|source| LoadError::Connection {
            registry: registry.clone(),
            method,
            path: path.to_owned(),
            source,
        })?;
        if status == expected {
            return Ok(answer);
        }
        Err(LoadError::Answer {
            registry,
            method,
            path: path.to_owned(),
            status,
            expected,
        })
    }

    fn exchange(
        &self,
        method: &str,
        path: &str,
        length: u64,
        body: Option<&Path>,
    ) -> io::Result<(u16, Answer)> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        stream.set_write_timeout(Some(SILENCE_MAX))?;
        let login = self.authorization.as_ref();
        let login = login.map_or_else(String::new, |text| format!("Authorization: {text}\r\n"));
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\n{login}Content-Type: application/octet-stream\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n",
            self.address
        );
        stream.write_all(head.as_bytes())?;
        if let Some(body) = body {
            io::copy(&mut File::open(body)?, &mut stream)?;
        }
        let mut rest = BufReader::with_capacity(BLOCK_BYTES, stream);
        let (status, location) = read_head(&mut rest)?;
        Ok((status, Answer { location, rest }))
    }

    /// Processor time so far: fields 14 and 15 of proc(5)'s `stat`.
    fn cpu_s(&self) -> Result<f64, LoadError> {
        let path = PathBuf::from(format!("/proc/{}/stat", self.pid));
        let stat = std::fs::read_to_string(&path).map_err(file("read", &path))?;
        let (_, fields) = stat.rsplit_once(')').unwrap_or_default();
        let ticks = fields.split_whitespace().skip(11).take(2);
        let ticks: f64 = ticks.filter_map(|text| text.parse::<f64>().ok()).sum();
        Ok(ticks / TICKS_PER_S)
    }

    fn peak_memory_kib(&self) -> Result<u64, LoadError> {
        let path = PathBuf::from(format!("/proc/{}/status", self.pid));
        let status = std::fs::read_to_string(&path).map_err(file("read", &path))?;
        status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .and_then(|text| text.trim().strip_suffix(" kB")?.parse().ok())
            .ok_or_else(|| file("understand", &path)(io::ErrorKind::InvalidData.into()))
    }
}

/// Status and `Location` (its path) of an answer.
fn read_head(reader: &mut impl BufRead) -> io::Result<(u16, String)> {
    let mut head = reader.take(HEAD_BYTES_MAX);
    let mut line = String::new();
    head.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|text| text.parse().ok());
    let status = status.ok_or(io::ErrorKind::InvalidData)?;
    let mut location = String::new();
    loop {
        line.clear();
        if head.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match line.trim().split_once(": ") {
            None => return Ok((status, location)),
            Some((name, value)) if name.eq_ignore_ascii_case("location") => {
                value[value.find("/v2/").unwrap_or(0)..].clone_into(&mut location);
            }
            Some(_) => {}
        }
    }
}

/// Bytes that do not repeat, made quickly (xorshift).
fn write_blob(path: &Path, bytes: u64) -> io::Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    let mut file = File::create(path)?;
    let mut left = bytes;
    while left > 0 {
        block.clear();
        while block.len() < BLOCK_BYTES {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend_from_slice(&state.to_le_bytes());
        }
        let part = usize::try_from(left).map_or(block.len(), |left| left.min(block.len()));
        file.write_all(&block[..part])?;
        left -= part as u64;
    }
    Ok(())
}

/// Changes the blob, so that no registry has it yet.
fn freshen(path: &Path, round: u32) -> io::Result<Digest> {
    let mut file = File::options().read(true).write(true).open(path)?;
    file.write_all(&round.to_le_bytes())?;
    file.seek(SeekFrom::Start(0))?;
    Ok(Digest::of_reader(file)?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_with_absolute_and_relative_locations() {
        for location in [
            "/v2/a/blobs/uploads/1?s=x",
            "http://h:1/v2/a/blobs/uploads/1?s=x",
        ] {
            let text = format!("HTTP/1.1 202 Accepted\r\nX: y\r\nlocation: {location}\r\n\r\nbody");
            let (status, path) = read_head(&mut text.as_bytes()).expect("a head");
            assert_eq!((status, path.as_str()), (202, "/v2/a/blobs/uploads/1?s=x"));
        }
        assert!(read_head(&mut &b"HTTP/1.1 202 Accepted\r\nX: y\r\n"[..]).is_err());
        assert!(read_head(&mut &b"nonsense"[..]).is_err());
    }

    #[test]
    fn blobs_have_their_size_and_differ_each_round() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("blob");
        write_blob(&path, 1_500_000).expect("written");
        assert_eq!(std::fs::metadata(&path).expect("there").len(), 1_500_000);
        assert_ne!(
            freshen(&path, 0).expect("changed"),
            freshen(&path, 1).expect("changed")
        );
    }
}
