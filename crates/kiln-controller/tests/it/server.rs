//! A real server on loopback, with SQLite, keys and stores below a folder of its own; and a client that can misbehave.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use kiln_controller::access::{Access, Door, TrustedIssuer};
use kiln_controller::api::{
    self, ApiConfig, Backend, ListenConfig, LogPiece, Pieces, SecretsUnheld, Sockets,
    SourceRefused, Trouble,
};
use kiln_core::dispatch::{Room, WorkerFacts};
use kiln_core::{
    Assignment, AttemptId, ByteSize, Digest, JobId, Lease, Outcome, TenantName, WorkerId,
};
use kiln_db::{
    Artifact, AttemptEnd, Database, DatabaseUrl, Job, NamedImage, NewWorker, OpenOptions, Placement,
};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// Longest wait for anything in these tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The parts of a controller that are not under test here: sources in files, logs and artifacts in memory.
pub(crate) struct Parts {
    db: Database,
    access: Access,
    sources: PathBuf,
    source_max: u64,
    logs: Mutex<HashMap<JobId, Vec<u8>>>,
    grown: watch::Sender<u64>,
    pub(crate) artifacts: Mutex<HashMap<String, Bytes>>,
    pub(crate) secrets: Mutex<HashMap<JobId, HashMap<String, Vec<u8>>>>,
    pub(crate) attempts: Mutex<Vec<(&'static str, Option<&'static str>)>>,
    pub(crate) most_in_memory: Mutex<usize>,
}

impl Backend for Parts {
    fn db(&self) -> &Database {
        &self.db
    }

    fn access(&self) -> &Access {
        &self.access
    }

    fn put_source<'a>(
        &'a self,
        tenant: &'a TenantName,
        kept_max: Option<u64>,
        mut pieces: Pieces<'a>,
    ) -> BoxFuture<'a, Result<(Digest, u64), SourceRefused>> {
        async move {
            let store = |error: io::Error| SourceRefused::Store(error.into());
            let folder = self.sources.join(tenant.as_str());
            std::fs::create_dir_all(&folder).map_err(store)?;
            let mut file = tempfile::NamedTempFile::new_in(&folder).map_err(store)?;
            let mut hasher = kiln_core::digest::Hasher::default();
            let mut size = 0_u64;
            while let Some(piece) = pieces.next().await {
                let piece = piece.map_err(SourceRefused::Cut)?;
                let mut most = self.most_in_memory.lock().expect("lock");
                *most = (*most).max(piece.len());
                size += piece.len() as u64;
                if let Some(max) = kept_max.filter(|max| size > *max) {
                    return Err(SourceRefused::Full(max));
                }
                if size > self.source_max {
                    return Err(SourceRefused::TooLarge(self.source_max));
                }
                hasher.update(&piece);
                file.write_all(&piece).map_err(store)?;
            }
            let (digest, _) = hasher.finish();
            file.persist(folder.join(digest.hex()))
                .map_err(|error| store(error.error))?;
            Ok((digest, size))
        }
        .boxed()
    }

    fn keep_source<'a>(
        &'a self,
        tenant: &'a TenantName,
        digest: &'a Digest,
    ) -> BoxFuture<'a, io::Result<bool>> {
        let path = self.sources.join(tenant.as_str()).join(digest.hex());
        async move { Ok(path.exists()) }.boxed()
    }

    fn hold_secrets(
        &self,
        _tenant: &TenantName,
        job: &JobId,
        values: HashMap<String, Vec<u8>>,
    ) -> Result<(), SecretsUnheld> {
        self.secrets
            .lock()
            .expect("lock")
            .insert(job.clone(), values);
        Ok(())
    }

    fn forget_secrets(&self, job: &JobId) {
        self.secrets.lock().expect("lock").remove(job);
    }

    fn read_log<'a>(
        &'a self,
        job: &'a Job,
        offset: u64,
        max: usize,
    ) -> BoxFuture<'a, io::Result<LogPiece>> {
        async move {
            let logs = self.logs.lock().expect("lock");
            let log = logs.get(&job.request.id).map_or(&[][..], Vec::as_slice);
            let from = log.len().min(usize::try_from(offset).unwrap_or(usize::MAX));
            let to = log.len().min(from.saturating_add(max));
            Ok(LogPiece {
                bytes: Bytes::copy_from_slice(&log[from..to]),
                size: log.len() as u64,
                truncated: false,
            })
        }
        .boxed()
    }

    fn log_longer_than<'a>(&'a self, _job: &'a Job, _offset: u64) -> BoxFuture<'a, ()> {
        let mut grown = self.grown.subscribe();
        async move {
            let _closed = grown.changed().await;
        }
        .boxed()
    }

    fn open_artifact<'a>(
        &'a self,
        _job: &'a Job,
        artifact: &'a Artifact,
        range: std::ops::Range<u64>,
    ) -> BoxFuture<'a, io::Result<Pieces<'static>>> {
        let bytes = self
            .artifacts
            .lock()
            .expect("lock")
            .get(&artifact.name)
            .cloned();
        async move {
            let bytes = bytes.ok_or(io::ErrorKind::NotFound)?;
            let place = |at| usize::try_from(at).expect("a place");
            let bytes = bytes.slice(place(range.start)..place(range.end));
            Ok(stream::iter([Ok(bytes)]).boxed())
        }
        .boxed()
    }

    fn images<'a>(
        &'a self,
        _tenant: &'a TenantName,
        _after: (String, String),
        _limit: u32,
    ) -> BoxFuture<'a, Result<Vec<NamedImage>, Trouble>> {
        async move { Ok(Vec::new()) }.boxed()
    }

    fn withdraw_image<'a>(
        &'a self,
        _repo: &'a str,
        _tag: &'a str,
    ) -> BoxFuture<'a, Result<bool, Trouble>> {
        async move { Ok(false) }.boxed()
    }

    fn count(&self, _door: Door, action: &'static str, refused: Option<&'static str>) {
        self.attempts.lock().expect("lock").push((action, refused));
    }
}

/// A server and everything below it.
pub(crate) struct Server {
    pub(crate) parts: Arc<Parts>,
    pub(crate) address: SocketAddr,
    socket: PathBuf,
    sockets: Sockets,
    runtime: Runtime,
    _dir: tempfile::TempDir,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::with(|_| {}, ListenConfig::default())
    }

    pub(crate) fn with(change: impl FnOnce(&mut ApiConfig), listen: ListenConfig) -> Self {
        Self::made(change, listen, Vec::new())
    }

    /// One that trusts other issuers.
    pub(crate) fn trusting(trusted: Vec<TrustedIssuer>) -> Self {
        Self::made(|_| {}, ListenConfig::default(), trusted)
    }

    fn made(
        change: impl FnOnce(&mut ApiConfig),
        listen: ListenConfig,
        trusted: Vec<TrustedIssuer>,
    ) -> Self {
        let mut config = ApiConfig {
            source_max: 1 << 20,
            requests_per_s: 100_000,
            requests_burst: 100_000,
            heartbeat: Duration::from_millis(200),
            ..ApiConfig::default()
        };
        change(&mut config);
        let dir = tempfile::tempdir().expect("dir");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("runtime");
        let now = u64::try_from(
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .expect("clock")
                .as_millis(),
        )
        .expect("clock");
        let access = Access::open(&dir.path().join("keys"), "https://kiln.test", trusted, now);
        let socket = dir.path().join("kiln.sock");
        let sockets = Sockets::new(listen);
        let (parts, address) = runtime.block_on(async {
            let url = DatabaseUrl::Sqlite(dir.path().join("kiln.db"));
            let db = Database::open(&url, OpenOptions::default())
                .await
                .expect("database");
            let parts = Arc::new(Parts {
                db,
                access: access.expect("access"),
                sources: dir.path().join("sources"),
                source_max: config.source_max,
                logs: Mutex::default(),
                grown: watch::Sender::new(0),
                artifacts: Mutex::default(),
                secrets: Mutex::default(),
                attempts: Mutex::default(),
                most_in_memory: Mutex::default(),
            });
            let router = api::router(Arc::clone(&parts) as Arc<dyn Backend>, config);
            let any = "127.0.0.1:0".parse().expect("address");
            let address = sockets
                .tcp(any, None, router.clone())
                .await
                .expect("listens");
            sockets.unix(socket.clone(), router).expect("listens");
            (parts, address)
        });
        Self {
            parts,
            address,
            socket,
            sockets,
            runtime,
            _dir: dir,
        }
    }

    pub(crate) fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// A client that says who it is by a token, or not at all.
    pub(crate) fn client(&self, token: &str) -> Client {
        Client {
            to: To::Tcp(self.address),
            token: token.to_owned(),
        }
    }

    /// The owner, over the private socket.
    pub(crate) fn owner(&self) -> Client {
        Client {
            to: To::Unix(self.socket.clone()),
            token: String::new(),
        }
    }

    /// A new tenant and a token in it.
    pub(crate) fn member(&self, tenant: &str, role: &str) -> Client {
        let _exists =
            self.owner()
                .json("POST", "/v1/tenants", &serde_json::json!({"name": tenant}));
        self.token(&serde_json::json!({"tenant": tenant, "role": role}))
    }

    /// A client with a token as asked.
    pub(crate) fn token(&self, asked: &serde_json::Value) -> Client {
        let made = self.owner().json("POST", "/v1/tokens", asked);
        assert_eq!(made.status, 201, "{}", made.text());
        self.client(made.value()["token"].as_str().expect("token"))
    }

    /// As when it went away.
    pub(crate) fn close_database(&self) {
        self.run(self.parts.db.close());
    }

    /// As when they grew old.
    pub(crate) fn lose_sources(&self) {
        std::fs::remove_dir_all(&self.parts.sources).expect("removed");
    }

    pub(crate) fn log(&self, job: &str, bytes: &[u8]) {
        let job: JobId = job.parse().expect("id");
        self.parts
            .logs
            .lock()
            .expect("lock")
            .entry(job)
            .or_default()
            .extend_from_slice(bytes);
        self.parts.grown.send_modify(|n| *n += 1);
    }

    /// Gives a queued job to a worker.
    pub(crate) fn lease(&self, job: &str) -> Lease {
        let worker: WorkerId = "w1".parse().expect("id");
        let room = Room {
            cpus: 64,
            memory: ByteSize::gib(256),
            disk: ByteSize::gib(2000),
            machines: 64,
        };
        let new = NewWorker {
            id: worker.clone(),
            facts: WorkerFacts {
                arch: "amd64".parse().expect("label"),
                runtimes: std::collections::BTreeSet::new(),
                capacity: room,
                whole_cpus: None,
                version: "1".to_owned(),
                generation: kiln_core::dispatch::POLICY_GENERATION,
                warm: std::collections::BTreeSet::new(),
            },
            certificate: None,
        };
        let placement = Placement {
            pool: kiln_core::PoolName::default_pool(),
            labels: std::collections::BTreeMap::new(),
            tenants: None,
        };
        let db = &self.parts.db;
        self.run(async {
            db.admit_worker(new, placement).await.expect("joins");
            let pool = kiln_core::PoolName::default_pool();
            let lead = db
                .lead(&pool, "test", 3_600_000)
                .await
                .expect("answers")
                .expect("leads");
            let attempt = AttemptId {
                job: job.parse().expect("id"),
                number: 1,
            };
            let claimed = db.claim(&lead, vec![Assignment { attempt, worker }]).await;
            claimed.expect("leads").remove(0).expect("claims")
        })
    }

    pub(crate) fn finish(&self, lease: &Lease, outcome: Outcome) {
        let end = AttemptEnd {
            outcome,
            receipt: None,
            observed: None,
            jitter: 1,
        };
        self.run(self.parts.db.finish(lease, end))
            .expect("finishes");
    }

    pub(crate) fn passed() -> Outcome {
        Outcome {
            verdict: kiln_core::Verdict::Passed,
            phases_ms: Vec::new(),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let sockets = self.sockets.clone();
        self.runtime
            .block_on(sockets.close(Duration::from_millis(200)));
    }
}

#[derive(Clone)]
enum To {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// One request a connection, written by hand so that it may be wrong.
#[derive(Clone)]
pub(crate) struct Client {
    to: To,
    pub(crate) token: String,
}

pub(crate) trait Line: Read + Write {}
impl<T: Read + Write> Line for T {}

/// What came back.
#[derive(Debug)]
pub(crate) struct Got {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Got {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn value(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    pub(crate) fn code(&self) -> String {
        self.value()["code"].as_str().unwrap_or_default().to_owned()
    }
}

impl Client {
    pub(crate) fn line(&self) -> Box<dyn Line> {
        match &self.to {
            To::Tcp(address) => {
                let line = TcpStream::connect(address).expect("connects");
                line.set_read_timeout(Some(PATIENCE)).expect("timeout");
                line.set_write_timeout(Some(PATIENCE)).expect("timeout");
                Box::new(line)
            }
            To::Unix(path) => {
                let line = UnixStream::connect(path).expect("connects");
                line.set_read_timeout(Some(PATIENCE)).expect("timeout");
                Box::new(line)
            }
        }
    }

    pub(crate) fn head(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> String {
        let mut head =
            format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
        if !self.token.is_empty() {
            head += &format!("authorization: Bearer {}\r\n", self.token);
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head
    }

    pub(crate) fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Got {
        let mut line = self.line();
        let head = self.head(method, path, headers);
        let head = format!("{head}content-length: {}\r\n\r\n", body.len());
        line.write_all(head.as_bytes()).expect("writes");
        // A server that refuses early need not read the rest.
        let _refused = line.write_all(body);
        receive(&mut *line)
    }

    pub(crate) fn get(&self, path: &str) -> Got {
        self.send("GET", path, &[], b"")
    }

    pub(crate) fn delete(&self, path: &str) -> Got {
        self.send("DELETE", path, &[], b"")
    }

    pub(crate) fn json(&self, method: &str, path: &str, body: &serde_json::Value) -> Got {
        let kind = [("content-type", "application/json")];
        self.send(method, path, &kind, body.to_string().as_bytes())
    }

    /// A multipart form of (name, content).
    pub(crate) fn form(&self, path: &str, parts: &[(&str, &[u8])]) -> Got {
        let body = multipart(parts);
        self.send("POST", path, &[("content-type", FORM)], &body)
    }

    /// Submits a run; gives its id.
    pub(crate) fn run(&self) -> String {
        let got = self.json("POST", "/v1/runs", &serde_json::json!({"argv": ["true"]}));
        assert_eq!(got.status, 202, "{}", got.text());
        got.value()["id"].as_str().expect("id").to_owned()
    }
}

pub(crate) const FORM: &str = "multipart/form-data; boundary=XX";

pub(crate) fn multipart(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, content) in parts {
        body.extend_from_slice(
            format!("--XX\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n").as_bytes(),
        );
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--XX--\r\n");
    body
}

/// Reads one answer to its end.
pub(crate) fn receive(line: &mut dyn Line) -> Got {
    let mut bytes = Vec::new();
    let mut piece = [0; 64 * 1024];
    loop {
        match line.read(&mut piece) {
            Ok(0) => break,
            Ok(got) => bytes.extend_from_slice(&piece[..got]),
            // A reset after the answer: the server did not read all that was sent.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!(
                "no answer: {error}; so far {}",
                String::from_utf8_lossy(&bytes)
            ),
        }
    }
    parse(&bytes)
}

pub(crate) fn parse(bytes: &[u8]) -> Got {
    let at = bytes.windows(4).position(|w| w == b"\r\n\r\n");
    let at = at.unwrap_or_else(|| panic!("no head: {}", String::from_utf8_lossy(bytes)));
    let head = String::from_utf8_lossy(&bytes[..at]).into_owned();
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|l| l.split(' ').nth(1)?.parse().ok())
        .expect("status");
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let mut body = bytes[at + 4..].to_vec();
    if headers
        .get("transfer-encoding")
        .is_some_and(|v| v == "chunked")
    {
        body = dechunk(&body);
    }
    Got {
        status,
        headers,
        body,
    }
}

fn dechunk(mut from: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(at) = from.windows(2).position(|w| w == b"\r\n") {
        let size = String::from_utf8_lossy(&from[..at]).into_owned();
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        let Some(chunk) = from.get(at + 2..at + 2 + size).filter(|_| size > 0) else {
            break;
        };
        body.extend_from_slice(chunk);
        from = from.get(at + 4 + size..).unwrap_or_default();
    }
    body
}

/// A small real archive.
pub(crate) fn archive() -> Vec<u8> {
    let mut tar = vec![0_u8; 512];
    tar[..10].copy_from_slice(b"Dockerfile");
    tar[100..107].copy_from_slice(b"0000644");
    tar[124..135].copy_from_slice(b"00000000005");
    tar[136..147].copy_from_slice(b"00000000000");
    tar[156] = b'0';
    tar[257..263].copy_from_slice(b"ustar\0");
    tar[263..265].copy_from_slice(b"00");
    tar[148..156].copy_from_slice(b"        ");
    let sum: u32 = tar.iter().map(|b| u32::from(*b)).sum();
    tar[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    tar.extend_from_slice(b"FROM \0");
    tar.resize(512 * 4, 0);
    tar
}
