//! Services beside a command: each an image of its own in the same machine, reached by its name, ready before anything else goes on.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_core::job::{RunHealth, RunService};
use kiln_core::{DiskRole, FailureClass};
use kiln_proto::msg::{ConnectReply, ContainerSpec, ExecRequest, Forward, Order, kind};
use kiln_proto::{Session, codec};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{ending, inside};
use crate::attempt::Attempt;
use crate::failure::Failure;
use crate::joblog::JobLog;
use crate::orders::{self, ExecIo};
use crate::unpack::Unpacked;

/// Pause between two looks whether a service is ready: nothing tells it.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Longest time of one look.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes of an answer's first line that are read.
const STATUS_BYTES_MAX: usize = 64;
/// Lines of a service's output that a failure shows.
const LAST_LINES: usize = 12;
/// Most bytes of one line.
const LINE_BYTES_MAX: usize = 4096;
/// Most bytes of a service's output in the log.
const LOG_BYTES_MAX: usize = 1 << 20;

/// A service that can be started.
#[derive(Clone, Debug)]
pub struct ServiceInput {
    /// What it is.
    pub wanted: RunService,
    /// Its place in the machine, from 1.
    pub place: u8,
    /// Its image.
    pub image: (Unpacked, ContainerSpec),
}

/// A service that runs; dropped, it ends.
#[derive(Debug)]
pub(super) struct Serving(JoinHandle<()>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Lets the names of all services mean the machine.
pub(super) async fn name(attempt: &Attempt, services: &[ServiceInput]) -> Result<(), Failure> {
    let names = services.iter().map(|service| service.wanted.name.clone());
    let order = Order::NameServices {
        names: names.collect(),
    };
    let within = orders::ORDER_TIMEOUT;
    Ok(orders::call_done(&attempt.session, "name its services", &order, within).await?)
}

/// Starts a service and waits until it is ready.
pub(super) async fn start(
    attempt: &Attempt,
    service: &ServiceInput,
    log: &Arc<JobLog>,
) -> Result<Serving, Failure> {
    let wanted = &service.wanted;
    let role = DiskRole::service(service.place).ok_or_else(|| {
        Failure::new(
            FailureClass::Usage,
            format!("there is no place for the service {}", wanted.name),
        )
    })?;
    let (unpacked, spec) = &service.image;
    inside::attach_image(attempt, unpacked, role).await?;
    let spec = ContainerSpec {
        hostname: wanted.name.clone(),
        place: service.place,
        ..spec.clone()
    };
    let argv = inside::prepare_container(attempt, spec).await?;
    let last = Arc::new(Mutex::new(VecDeque::new()));
    let (over, ended) = oneshot::channel();
    let request = ExecRequest {
        argv: argv.clone(),
        cwd: "/".to_owned(),
        ..ExecRequest::default()
    };
    let output = Output {
        name: wanted.name.clone(),
        log: Arc::clone(log),
        last: Arc::clone(&last),
    };
    let task = tokio::spawn(run(attempt.session.clone(), request, output, over));
    let serving = Serving(task);
    let within = Duration::from_millis(wanted.ready_ms);
    let failed = tokio::select! {
        () = ready(&attempt.session, wanted, &argv) => return Ok(serving),
        how = ended => how.unwrap_or_else(|_| "it ended".to_owned()),
        () = tokio::time::sleep(within) => format!("it was not ready within {within:?}"),
    };
    let last = last.lock().unwrap_or_else(PoisonError::into_inner);
    let lines: Vec<String> = last.iter().cloned().collect();
    let message = format!(
        "the service {}: {failed}\n{}",
        wanted.name,
        lines.join("\n")
    );
    Err(Failure::new(
        FailureClass::User,
        message.trim_end().to_owned(),
    ))
}

/// Where the output of a service goes.
struct Output {
    name: String,
    log: Arc<JobLog>,
    last: Arc<Mutex<VecDeque<String>>>,
}

impl Output {
    /// Keeps it, a line each, with the service's name before it.
    async fn keep(self, mut pieces: mpsc::Receiver<(u8, Vec<u8>)>) {
        let (mut line, mut left) = (Vec::new(), LOG_BYTES_MAX);
        while let Some((_, bytes)) = pieces.recv().await {
            for byte in bytes {
                if byte != b'\n' && line.len() < LINE_BYTES_MAX {
                    line.push(byte);
                    continue;
                }
                self.line(&mut line, &mut left);
            }
        }
        if !line.is_empty() {
            self.line(&mut line, &mut left);
        }
    }

    fn line(&self, line: &mut Vec<u8>, left: &mut usize) {
        let text = format!("{} | {}", self.name, String::from_utf8_lossy(line));
        line.clear();
        if let Some(rest) = left.checked_sub(text.len() + 1) {
            *left = rest;
            self.log.raw(format!("{text}\n").as_bytes());
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        let plain = text.chars().map(|c| if c.is_control() { ' ' } else { c });
        last.push_back(plain.collect());
    }
}

async fn run(
    session: Session,
    request: ExecRequest,
    output: Output,
    over: oneshot::Sender<String>,
) {
    let (sender, pieces) = mpsc::channel(64);
    let (_nobody, control) = mpsc::channel(1);
    let io = ExecIo {
        stdin: None,
        output: sender,
        control,
    };
    let exec = orders::exec(&session, "run a service", &request, io);
    let (ended, ()) = tokio::join!(exec, output.keep(pieces));
    let how = match ended {
        Ok(exit) => ending(&exit).replace("the command", "it"),
        Err(error) => orders::chain(&error),
    };
    let _ready_long_ago = over.send(how);
}

/// Completes when the service is ready.
async fn ready(session: &Session, wanted: &RunService, argv: &[String]) {
    loop {
        let since = Instant::now();
        let looked = tokio::time::timeout(LOOK_TIMEOUT, async {
            match &wanted.health {
                RunHealth::Port => connect(session, wanted.port).await.is_some(),
                RunHealth::Http(path) => answers(session, wanted, path).await.unwrap_or(false),
                RunHealth::Command(words) => succeeds(session, argv, words).await,
            }
        });
        if looked.await.unwrap_or(false) {
            return;
        }
        tokio::time::sleep_until(since + LOOK_AGAIN).await;
    }
}

async fn connect(session: &Session, port: u16) -> Option<kiln_proto::Stream> {
    let payload = serde_json::to_vec(&Forward { port }).ok()?;
    let mut stream = session.open(kind::FORWARD, &payload).await.ok()?;
    let reply: ConnectReply = codec::read_msg(&mut stream, orders::REPLY_BYTES_MAX)
        .await
        .ok()?;
    (reply == ConnectReply::Connected).then_some(stream)
}

/// Whether a GET is answered with success (RFC 9110, section 15.3).
async fn answers(session: &Session, wanted: &RunService, path: &str) -> Option<bool> {
    let mut stream = connect(session, wanted.port).await?;
    let path = path.trim_start_matches('/');
    let request = format!(
        "GET /{path} HTTP/1.1\r\nHost: {}:{}\r\nConnection: close\r\n\r\n",
        wanted.name, wanted.port
    );
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut head = Vec::new();
    while head.len() < STATUS_BYTES_MAX && !head.contains(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).await.ok()?;
        head.extend(byte);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?;
    Some(status.len() == 3 && status.starts_with('2'))
}

/// Whether a command succeeds in the service's container.
async fn succeeds(session: &Session, argv: &[String], words: &[String]) -> bool {
    // As the guest starts it: runc --root DIR run --bundle DIR ID.
    let [runc, root, dir, .., id] = argv else {
        return false;
    };
    let mut argv = [runc, root, dir].map(String::clone).to_vec();
    argv.extend(["exec".to_owned(), id.clone()]);
    argv.extend_from_slice(words);
    let request = ExecRequest {
        argv,
        cwd: "/".to_owned(),
        ..ExecRequest::default()
    };
    let (output, mut said) = mpsc::channel(16);
    let (_nobody, control) = mpsc::channel(1);
    let io = ExecIo {
        stdin: None,
        output,
        control,
    };
    let exec = orders::exec(session, "look after a service", &request, io);
    let all = async { while said.recv().await.is_some() {} };
    let (ended, ()) = tokio::join!(exec, all);
    ended.is_ok_and(|exit| exit.code == Some(0))
}
