//! Services beside a command: each an image of its own in the same machine, reached by its name, ready before anything else goes on.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_core::job::{RunHealth, RunService};
use kiln_core::{DiskRole, FailureClass};
use kiln_proto::msg::{ConnectReply, ContainerSpec, ExecRequest, Exit, Forward, Order, kind};
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
/// Longest time of one look at a port.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time of one health command: without KVM a large program takes seconds to begin.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes of a health command's last words that a failure shows.
const WORDS_BYTES_MAX: usize = 1024;
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
    let last = Arc::new(Mutex::new(Last::default()));
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
        left: LOG_BYTES_MAX,
    };
    let task = tokio::spawn(run(attempt.session.clone(), request, output, over));
    let serving = Serving(task);
    let within = Duration::from_millis(wanted.ready_ms);
    let seen = Mutex::new(String::new());
    let failed = tokio::select! {
        () = ready(&attempt.session, wanted, &argv, &seen) => return Ok(serving),
        how = ended => match how {
            Ok(Ok(exit)) => ending(&exit).replace("the command", "it"),
            // Neither the service's doing nor its user's, unless the guest says so.
            Ok(Err(error)) => return Err(of_the_machine(&wanted.name, error)),
            Err(_) => "it ended".to_owned(),
        },
        () = tokio::time::sleep(within) => {
            let seen = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
            match seen.is_empty() {
                true => format!("it was not ready within {within:?}"),
                false => format!("it was not ready within {within:?}: {seen}"),
            }
        }
    };
    let last = last.lock().unwrap_or_else(PoisonError::into_inner);
    Err(not_ready(&wanted.name, &failed, &last.shown(&wanted.name)))
}

/// The service's own fault, told by its name with its last words.
fn not_ready(name: &str, why: &str, last: &str) -> Failure {
    let said = match last.is_empty() {
        true => "it printed nothing",
        false => last,
    };
    let message = format!("the service {name}: {why}\n{said}");
    Failure::new(FailureClass::User, message).hint(format!(
        "its image or its health check is at fault, not the command: see services.{name} of the policy"
    ))
}

fn of_the_machine(name: &str, error: orders::CallError) -> Failure {
    let failure = Failure::from(error);
    Failure {
        message: format!("the service {name}: {}", failure.message),
        ..failure
    }
}

/// What a service printed last.
#[derive(Debug, Default)]
struct Last {
    lines: VecDeque<String>,
    /// A line that has not ended.
    begun: Vec<u8>,
}

impl Last {
    fn shown(&self, name: &str) -> String {
        let begun = Some(line_of(name, &self.begun)).filter(|_| !self.begun.is_empty());
        let lines = self.lines.iter().cloned().chain(begun);
        lines
            .map(|line| plain(&line))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

fn line_of(name: &str, line: &[u8]) -> String {
    format!("{name} | {}", String::from_utf8_lossy(line))
}

/// Without what could drive a terminal.
fn plain(text: &str) -> String {
    let chars = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    chars.collect()
}

/// Where the output of a service goes.
struct Output {
    name: String,
    log: Arc<JobLog>,
    last: Arc<Mutex<Last>>,
    /// Bytes that the log still takes.
    left: usize,
}

impl Output {
    /// Keeps it, a line each, with the service's name before it.
    async fn keep(mut self, mut pieces: mpsc::Receiver<(u8, Vec<u8>)>) {
        while let Some((_, bytes)) = pieces.recv().await {
            let last = Arc::clone(&self.last);
            let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
            for byte in bytes {
                if byte != b'\n' && last.begun.len() < LINE_BYTES_MAX {
                    last.begun.push(byte);
                } else {
                    self.line(&mut last);
                }
            }
        }
        let last = Arc::clone(&self.last);
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if !last.begun.is_empty() {
            self.line(&mut last);
        }
    }

    fn line(&mut self, last: &mut Last) {
        let text = line_of(&self.name, &last.begun);
        last.begun.clear();
        if let Some(rest) = self.left.checked_sub(text.len() + 1) {
            self.left = rest;
            self.log.raw(format!("{text}\n").as_bytes());
        }
        if last.lines.len() == LAST_LINES {
            last.lines.pop_front();
        }
        last.lines.push_back(text);
    }
}

async fn run(
    session: Session,
    request: ExecRequest,
    output: Output,
    over: oneshot::Sender<Result<Exit, orders::CallError>>,
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
    let _ready_long_ago = over.send(ended);
}

/// Completes when the service is ready. `seen` gets what the last look saw.
async fn ready(session: &Session, wanted: &RunService, argv: &[String], seen: &Mutex<String>) {
    loop {
        let since = Instant::now();
        let (what, within) = match &wanted.health {
            RunHealth::Port => (format!("its port {}", wanted.port), LOOK_TIMEOUT),
            RunHealth::Http(path) => (format!("GET {path}"), LOOK_TIMEOUT),
            RunHealth::Command(_) => ("its health command".to_owned(), COMMAND_TIMEOUT),
        };
        let looked = tokio::time::timeout(within, async {
            match &wanted.health {
                RunHealth::Port => match connect(session, wanted.port).await {
                    Some(_) => Ok(()),
                    None => Err("takes no connection".to_owned()),
                },
                RunHealth::Http(path) => answers(session, wanted, path).await,
                RunHealth::Command(words) => succeeds(session, argv, words).await,
            }
        });
        let why = match looked.await {
            Ok(Ok(())) => return,
            Ok(Err(why)) => why,
            Err(_) => format!("did not come to an end within {within:?}"),
        };
        *seen.lock().unwrap_or_else(PoisonError::into_inner) = plain(&format!("{what} {why}"));
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

/// Whether a GET is answered with success (RFC 9110, section 15.3); else what was answered.
async fn answers(session: &Session, wanted: &RunService, path: &str) -> Result<(), String> {
    let nothing = || "was not answered".to_owned();
    let mut stream = connect(session, wanted.port)
        .await
        .ok_or_else(|| format!("found nobody at port {}", wanted.port))?;
    let path = path.trim_start_matches('/');
    let request = format!(
        "GET /{path} HTTP/1.1\r\nHost: {}:{}\r\nConnection: close\r\n\r\n",
        wanted.name, wanted.port
    );
    let asked = stream.write_all(request.as_bytes()).await;
    asked.map_err(|_| nothing())?;
    let mut head = Vec::new();
    while head.len() < STATUS_BYTES_MAX && !head.contains(&b'\n') {
        let mut byte = [0];
        let read = stream.read_exact(&mut byte).await;
        read.map_err(|_| nothing())?;
        head.extend(byte);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let status = head.strip_prefix("HTTP/1.");
    let status = status.and_then(|rest| rest.split(' ').nth(1));
    match status {
        Some(status) if status.len() == 3 && status.starts_with('2') => Ok(()),
        _ => Err(format!("was answered with {:?}", head.trim_end())),
    }
}

/// Whether a command succeeds in the service's container; else how it ended and what it said last.
async fn succeeds(session: &Session, argv: &[String], words: &[String]) -> Result<(), String> {
    // As the guest starts it: runc --root DIR run --bundle DIR ID.
    let [runc, root, dir, .., id] = argv else {
        return Err("has no container".to_owned());
    };
    let mut argv = [runc, root, dir].map(String::clone).to_vec();
    argv.extend(["exec".to_owned(), id.clone()]);
    argv.extend_from_slice(words);
    let request = ExecRequest {
        argv,
        cwd: "/".to_owned(),
        ..ExecRequest::default()
    };
    let (output, mut said) = mpsc::channel::<(u8, Vec<u8>)>(16);
    let (_nobody, control) = mpsc::channel(1);
    let io = ExecIo {
        stdin: None,
        output,
        control,
    };
    let exec = orders::exec(session, "look after a service", &request, io);
    let last_words = async {
        let mut last = Vec::new();
        while let Some((_, bytes)) = said.recv().await {
            last.extend(bytes);
            let over = last.len().saturating_sub(WORDS_BYTES_MAX);
            last.drain(..over);
        }
        last
    };
    let (ended, last) = tokio::join!(exec, last_words);
    let last = String::from_utf8_lossy(&last);
    match ended {
        Ok(exit) if exit.code == Some(0) => Ok(()),
        Ok(exit) => {
            let how = ending(&exit);
            let how = how.strip_prefix("the command ").unwrap_or(&how);
            match last.trim() {
                "" => Err(how.to_owned()),
                last => Err(format!("{how}, saying: {last}")),
            }
        }
        Err(error) => Err(format!("could not be run: {}", orders::chain(&error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_that_is_not_ready_is_named_with_its_last_words() {
        let mut last = Last::default();
        last.lines.push_back("db | \u{1b}[31mno table".to_owned());
        last.begun = b"waiting".to_vec();
        let failure = not_ready("db", "it was not ready within 5s", &last.shown("db"));
        assert_eq!(failure.class, FailureClass::User);
        assert_eq!(
            failure.message,
            "the service db: it was not ready within 5s\ndb |  [31mno table\ndb | waiting"
        );
        assert!(
            failure
                .hint
                .is_some_and(|hint| hint.contains("services.db"))
        );
        let silent = not_ready("db", "it ended", "");
        assert!(silent.message.ends_with("printed nothing"));
    }

    #[test]
    fn a_machine_that_is_gone_is_not_the_services_fault() {
        let gone = orders::CallError::Gone {
            what: "run a service",
            why: "reset".to_owned(),
        };
        let failure = of_the_machine("db", gone);
        assert_eq!(failure.class, FailureClass::Lost);
        assert!(failure.message.starts_with("the service db: "));
    }
}
