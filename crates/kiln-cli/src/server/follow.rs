//! A job on a server, followed to its end: its events and its log, over connections that may break and go on where they were.

use std::io::IsTerminal as _;
use std::time::Duration;

use futures_util::StreamExt as _;
use http::Method;
use http::header::HeaderName;
use http_body_util::BodyDataStream;
use hyper::body::Incoming;
use kiln_controller::api::JobView;
use kiln_core::{FailureClass, Outcome};
use kiln_proto::fleet::EGRESS_PARTS_MAX;
use kiln_worker::event::{Event, Events, StepState};
use kiln_worker::host::now_unix_ms;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::sse::{Frame, Frames};
use super::{Server, empty, words};
use crate::error::{CliError, Result};
use crate::neutral::Neutral;
use crate::printed::Printed;
use crate::show::{Screen, json_line};

/// How often a job that waits is asked why.
const WHY_EVERY: Duration = Duration::from_secs(2);
/// A connection that shows no sign of life for this long is given up: the server sends one every 15 seconds.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// A server that is away for this long is given up.
const AWAY_MAX: Duration = Duration::from_secs(180);
/// First wait before a broken connection is made again, and the longest.
const AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Longest wait for the end of a log when its job is over.
const LOG_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest line of a log that is shown as one line, bytes.
const LINE_MAX: usize = 1 << 20;

/// How a log is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LogKind {
    /// Steps and their lines, as events.
    Steps,
    /// A command's own output, as it is.
    Raw,
    /// Not at all: its command's streams are held.
    Held,
}

/// The phase in which a command waits for whoever attends it.
const ATTEND: &str = "attend";

/// How a job ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Its verdict.
    pub(crate) outcome: Outcome,
    /// What its worker told at its end.
    pub(crate) report: Option<Value>,
    /// The parts of its record of egress, before that report.
    pub(crate) parts: Vec<Value>,
}

/// Follows a job to its end. Ctrl-C cancels the job; the end is waited for all the same.
///
/// # Errors
/// When the server is lost for good, or refuses.
pub(crate) async fn follow(
    server: &Server,
    id: &str,
    kind: LogKind,
    events: &Events,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<Ended> {
    let ready = watch::Sender::new(false);
    follow_held(server, id, kind, events, screen, (cancel, &ready)).await
}

/// As [`follow`]; `ready` hears when the job's command may be attended.
///
/// # Errors
/// As [`follow`].
pub(crate) async fn follow_held(
    server: &Server,
    id: &str,
    kind: LogKind,
    events: &Events,
    screen: Screen,
    (cancel, ready): (&CancellationToken, &watch::Sender<bool>),
) -> Result<Ended> {
    let mut follower = Follower {
        server,
        id,
        kind,
        events,
        screen,
        ready,
        seen: 0,
        waiting: true,
        log: None,
        report: None,
        parts: Vec::new(),
    };
    let ended = follower.run(cancel).await;
    if let Some(log) = follower.log.take() {
        match &ended {
            Ok(_) => {
                let mut log = log;
                log.over.cancel();
                if tokio::time::timeout(LOG_TIMEOUT, &mut log.task)
                    .await
                    .is_err()
                {
                    log.task.abort();
                    screen.note(&format!(
                        "warning: the end of the log did not come; `kiln job logs {id}` has it"
                    ));
                }
            }
            Err(_) => log.task.abort(),
        }
    }
    ended
}

struct Log {
    attempt: u64,
    task: JoinHandle<()>,
    /// Nothing more is written to it.
    over: CancellationToken,
}

struct Follower<'a> {
    server: &'a Server,
    id: &'a str,
    kind: LogKind,
    events: &'a Events,
    screen: Screen,
    ready: &'a watch::Sender<bool>,
    /// Number of the last event that was shown.
    seen: u64,
    /// No worker has it yet.
    waiting: bool,
    log: Option<Log>,
    report: Option<Value>,
    parts: Vec<Value>,
}

/// Why a connection's events ended.
enum Cut {
    /// The job is over.
    Over(Outcome),
    /// Worth another try.
    Again(String),
    /// Not worth one.
    Refused(CliError),
}

impl Follower<'_> {
    async fn run(&mut self, cancel: &CancellationToken) -> Result<Ended> {
        let mut away: Option<Instant> = None;
        let mut pause = AGAIN.0;
        let mut asked = false;
        loop {
            let before = self.seen;
            let cut = self.connection(cancel, &mut asked).await;
            let why = match cut {
                Cut::Over(outcome) => {
                    return Ok(Ended {
                        outcome,
                        report: self.report.take(),
                        parts: std::mem::take(&mut self.parts),
                    });
                }
                Cut::Refused(error) => return Err(error),
                Cut::Again(why) => why,
            };
            if self.seen > before {
                (away, pause) = (None, AGAIN.0);
            }
            if away.get_or_insert_with(Instant::now).elapsed() > AWAY_MAX {
                return Err(CliError::new(
                    FailureClass::Infrastructure,
                    format!("the server was lost: {why}"),
                )
                .hint(format!(
                    "the job may go on; `kiln job show {}` says so when the server is back",
                    self.id
                )));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(AGAIN.1);
        }
    }

    /// One connection, until it ends.
    async fn connection(&mut self, cancel: &CancellationToken, asked: &mut bool) -> Cut {
        let path = format!("/v1/jobs/{}/events", self.id);
        let seen = [(
            HeaderName::from_static("last-event-id"),
            self.seen.to_string(),
        )];
        let response = match self.server.send(Method::GET, &path, empty(), &seen).await {
            Ok(response) => response,
            Err(error) if error.class == FailureClass::Infrastructure => {
                return Cut::Again(error.message);
            }
            Err(error) => return Cut::Refused(error),
        };
        let mut body = BodyDataStream::new(response.into_body());
        let mut frames = Frames::default();
        let mut alive = Instant::now();
        let mut why = tokio::time::interval_at(Instant::now() + WHY_EVERY, WHY_EVERY);
        loop {
            while let Some(frame) = frames.next() {
                if let Some(cut) = self.frame(&frame).await {
                    return cut;
                }
            }
            tokio::select! {
                piece = body.next() => match piece {
                    Some(Ok(piece)) => {
                        alive = Instant::now();
                        if let Err(error) = frames.push(&piece) {
                            return Cut::Refused(CliError::infrastructure(&error));
                        }
                    }
                    Some(Err(error)) => return Cut::Again(error.to_string()),
                    None => return Cut::Again("the connection ended".to_owned()),
                },
                () = cancel.cancelled(), if !*asked => {
                    *asked = true;
                    if let Err(error) = self.cancel().await {
                        return Cut::Refused(error);
                    }
                }
                _ = why.tick() => {
                    if alive.elapsed() > SILENCE_MAX {
                        return Cut::Again("no sign of life".to_owned());
                    }
                    if self.waiting {
                        self.say_why().await;
                    }
                }
            }
        }
    }

    async fn cancel(&self) -> Result<()> {
        let path = format!("/v1/jobs/{}?reason=interrupted", self.id);
        match self.server.delete::<Value>(&path).await {
            Ok(_) => {
                self.screen
                    .note(&format!("job {} is being cancelled", self.id));
                Ok(())
            }
            // It ended meanwhile: its end is on its way.
            Err(error) if error.class == FailureClass::Usage => Ok(()),
            Err(error) => Err(error.hint(format!(
                "the job goes on; `kiln job cancel {}` stops it",
                self.id
            ))),
        }
    }

    async fn say_why(&self) {
        let Ok(job) = self
            .server
            .get::<JobView>(&format!("/v1/jobs/{}", self.id))
            .await
        else {
            return;
        };
        if let (true, Some(pending)) = (job.line.state == "queued", &job.line.pending) {
            let what = format!("waits: {}", words::waits(pending, now_unix_ms()));
            self.events
                .tell(Event::Progress {
                    what,
                    detail: String::new(),
                })
                .await;
        }
    }

    async fn frame(&mut self, frame: &Frame) -> Option<Cut> {
        let Some(number) = frame.id else {
            return match frame.kind.as_str() {
                "end" => Some(self.missed_end().await),
                "unauthenticated" => Some(Cut::Refused(
                    CliError::new(FailureClass::Policy, "the token's time is over")
                        .hint(format!("the job goes on; with a new token, `kiln job logs --follow {}` shows the rest", self.id)),
                )),
                _ => Some(Cut::Again("the server cannot now".to_owned())),
            };
        };
        if number <= self.seen {
            return None;
        }
        self.seen = number;
        let value: Value = serde_json::from_str(&frame.data).unwrap_or_default();
        let data = &value["data"];
        match frame.kind.as_str() {
            "queued" => {
                self.waiting = true;
                if let Some(message) = data["outcome"]["message"].as_str() {
                    let text = format!(
                        "attempt {} failed: {message}; it is tried again",
                        data["attempt"]
                    );
                    self.events.warn(text).await;
                }
            }
            "leased" => {
                self.waiting = false;
                self.show_log(data["attempt"].as_u64().unwrap_or(1));
                let worker = data["worker"].as_str().unwrap_or("?");
                if self.kind == LogKind::Steps {
                    self.events.note(format!("worker {worker} has it")).await;
                }
            }
            "phase" => {
                let name = data["phase"].as_str().unwrap_or_default();
                if name == ATTEND {
                    self.ready.send_replace(true);
                }
                let name = phase(name);
                self.events.tell(Event::Phase { name }).await;
            }
            "note" | "warning" => {
                let text = data["text"].as_str().unwrap_or_default().to_owned();
                let event = if frame.kind == "note" {
                    Event::Note { text }
                } else {
                    Event::Warning { text }
                };
                self.events.tell(event).await;
            }
            "egress" => {
                if self.report.take().is_some() {
                    // That was an earlier attempt's.
                    self.parts.clear();
                }
                if self.parts.len() < EGRESS_PARTS_MAX {
                    self.parts.push(data.clone());
                }
            }
            "report" => self.report = Some(data.clone()),
            "finished" => {
                return Some(match serde_json::from_value(data["outcome"].clone()) {
                    Ok(outcome) => Cut::Over(outcome),
                    Err(error) => Cut::Refused(CliError::infrastructure(&error)),
                });
            }
            _ => {}
        }
        None
    }

    /// The server says that nothing more comes, and the last event was not seen: it was put away already.
    async fn missed_end(&self) -> Cut {
        Cut::Refused(
            CliError::new(
                FailureClass::Infrastructure,
                "the job's events are gone already",
            )
            .hint(format!("`kiln job show {}` says how it ended", self.id)),
        )
    }

    fn show_log(&mut self, attempt: u64) {
        let shown = self.log.as_ref().is_some_and(|log| log.attempt == attempt);
        if shown || self.kind == LogKind::Held {
            return;
        }
        if let Some(old) = self.log.take() {
            old.task.abort();
        }
        let (server, id, kind) = (self.server.clone(), self.id.to_owned(), self.kind);
        let (events, screen) = (self.events.clone(), self.screen);
        let over = CancellationToken::new();
        let ended = over.clone();
        let task = tokio::spawn(async move {
            let mut sink = Sink {
                kind,
                events,
                screen,
                lines: Lines::default(),
                printed: Printed::default(),
                neutral: std::io::stdout().is_terminal().then(Neutral::default),
                gone: false,
            };
            let read = read_log(&server, &id, &ended, &mut sink).await;
            sink.end().await;
            if let Err(error) = read
                && error.class == FailureClass::Infrastructure
            {
                sink.events.warn(error.message).await;
            }
        });
        self.log = Some(Log {
            attempt,
            task,
            over,
        });
    }
}

/// Phases are known by their names.
fn phase(name: &str) -> &'static str {
    const KNOWN: [&str; 11] = [
        "queue", "checkout", "plan", "machine", "source", "build", "push", "verify", "commit",
        "publish", "run",
    ];
    KNOWN
        .into_iter()
        .find(|known| *known == name)
        .unwrap_or("work")
}

/// Where bytes of a log go.
pub(crate) trait Take {
    /// Takes bytes; `false` when nobody wants more.
    async fn take(&mut self, bytes: &[u8]) -> bool;
}

/// Reads a log from its beginning, over as many connections as it takes: follows it until the job is `over`, then reads what is
/// left.
///
/// # Errors
/// When the server refuses, or is away for too long.
pub(crate) async fn read_log(
    server: &Server,
    id: &str,
    over: &CancellationToken,
    sink: &mut impl Take,
) -> Result<()> {
    let mut at = 0;
    let mut away: Option<Instant> = None;
    let mut pause = AGAIN.0;
    loop {
        let follow = !over.is_cancelled();
        let path = format!("/v1/jobs/{id}/logs?offset={at}&follow={follow}");
        let before = at;
        let cut = match server.send(Method::GET, &path, empty(), &[]).await {
            Ok(response) => {
                let copied = copy(response.into_body(), &mut at, sink);
                // A piece is taken whole or not at all: the offset stays true.
                tokio::select! {
                    biased;
                    copied = copied => copied,
                    () = over.cancelled(), if follow => continue,
                }
            }
            Err(error) if error.class == FailureClass::Infrastructure => Err(error.message),
            Err(error) => return Err(error),
        };
        let Err(why) = cut else { return Ok(()) };
        if at > before {
            (away, pause) = (None, AGAIN.0);
        }
        if away.get_or_insert_with(Instant::now).elapsed() > AWAY_MAX {
            let told = format!("the log broke off: {why}");
            return Err(CliError::new(FailureClass::Infrastructure, told));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(AGAIN.1);
    }
}

async fn copy(body: Incoming, at: &mut u64, sink: &mut impl Take) -> Result<(), String> {
    let mut body = BodyDataStream::new(body);
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|error| error.to_string())?;
        *at += piece.len() as u64;
        if !sink.take(&piece).await {
            return Ok(());
        }
    }
    Ok(())
}

struct Sink {
    kind: LogKind,
    events: Events,
    screen: Screen,
    lines: Lines,
    /// A command's output, as events.
    printed: Printed,
    /// Where a terminal shows it: nobody asked for the command to have that terminal.
    neutral: Option<Neutral>,
    gone: bool,
}

impl Take for Sink {
    async fn take(&mut self, bytes: &[u8]) -> bool {
        match self.kind {
            LogKind::Raw if self.screen.json() => {
                let event = self.printed.event(bytes);
                self.gone |= self.tell(event).is_err();
            }
            LogKind::Raw => {
                let shown = match &mut self.neutral {
                    Some(neutral) => self.screen.raw(neutral.text(bytes).as_bytes()),
                    None => self.screen.raw(bytes),
                };
                self.gone |= shown.is_err();
            }
            LogKind::Held => {}
            LogKind::Steps => {
                for event in self.lines.push(bytes) {
                    self.events.tell(event).await;
                }
            }
        }
        !self.gone
    }
}

impl Sink {
    /// An event of the command's output, with `--json`.
    fn tell(&self, event: Option<Value>) -> std::io::Result<()> {
        match event {
            Some(event) => {
                let line = format!("{}\n", json_line(&event));
                self.screen.raw(line.as_bytes())
            }
            None => Ok(()),
        }
    }

    async fn end(&mut self) {
        if self.kind == LogKind::Raw && !self.gone {
            let rest = self.printed.rest();
            self.gone |= self.tell(rest).is_err();
            let rest = self.neutral.as_mut().map(Neutral::rest).unwrap_or_default();
            self.gone |= self.screen.raw(rest.as_bytes()).is_err();
        }
        for event in self.lines.push(b"\n") {
            self.events.tell(event).await;
        }
    }
}

/// The lines of a build's log, as the events they were made of: `#3 RUN make Running`, `#3 cc x.c`, `#3 RUN make Done 1.2s`.
#[derive(Debug, Default)]
struct Lines {
    rest: Vec<u8>,
    names: std::collections::HashMap<usize, String>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        for byte in bytes {
            if *byte != b'\n' && self.rest.len() < LINE_MAX {
                self.rest.push(*byte);
                continue;
            }
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.rest)).into_owned();
            events.extend(self.line(&line));
            if *byte != b'\n' {
                self.rest.push(*byte);
            }
        }
        events
    }

    fn line(&mut self, line: &str) -> Option<Event> {
        // Warnings come as events.
        if line.is_empty() || line.starts_with("warning: ") {
            return None;
        }
        let plain = |text: &str| {
            Some(Event::Log {
                step: 0,
                stream: 1,
                text: text.to_owned(),
            })
        };
        let Some((number, rest)) = line.strip_prefix('#').and_then(|rest| rest.split_once(' '))
        else {
            return plain(line);
        };
        let Ok(number) = number.parse::<usize>() else {
            return plain(line);
        };
        let known = self.names.get(&number);
        if let Some((name, state, seconds)) = step(rest)
            && known.is_none_or(|known| known == name)
        {
            self.names.insert(number, name.to_owned());
            return Some(Event::Step {
                number,
                name: name.to_owned(),
                state,
                seconds,
            });
        }
        Some(Event::Log {
            step: number,
            stream: 1,
            text: rest.to_owned(),
        })
    }
}

/// `NAME STATE`, or `NAME STATE 1.2s`.
fn step(text: &str) -> Option<(&str, StepState, Option<f64>)> {
    let state = |word: &str| {
        Some(match word {
            "Running" => StepState::Running,
            "Cached" => StepState::Cached,
            "Done" => StepState::Done,
            "Failed" => StepState::Failed,
            "Cancelled" => StepState::Cancelled,
            _ => return None,
        })
    };
    let (front, last) = text.rsplit_once(' ')?;
    if let Some(found) = state(last) {
        return Some((front, found, None));
    }
    let seconds: f64 = last.strip_suffix('s')?.parse().ok()?;
    let (name, word) = front.rsplit_once(' ')?;
    Some((name, state(word)?, Some(seconds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_becomes_the_steps_it_was_made_of() {
        let text = "#1 [internal] load Cached\n#2 RUN make Running\n#2 cc Done\nwarning: x\n#2 RUN make Done 1.2s\nfree text\n#x y\n#3 RUN a b Failed 0.1s";
        for size in [1, 5, text.len()] {
            let mut lines = Lines::default();
            let mut events: Vec<Event> = text
                .as_bytes()
                .chunks(size)
                .flat_map(|piece| lines.push(piece))
                .collect();
            events.extend(lines.push(b"\n"));
            let log = |step, text: &str| Event::Log {
                step,
                stream: 1,
                text: text.to_owned(),
            };
            let step = |number, name: &str, state, seconds| Event::Step {
                number,
                name: name.to_owned(),
                state,
                seconds,
            };
            let want = [
                step(1, "[internal] load", StepState::Cached, None),
                step(2, "RUN make", StepState::Running, None),
                log(2, "cc Done"),
                step(2, "RUN make", StepState::Done, Some(1.2)),
                log(0, "free text"),
                log(0, "#x y"),
                step(3, "RUN a b", StepState::Failed, Some(0.1)),
            ];
            assert_eq!(events, want, "{size}");
        }
    }

    #[test]
    fn endless_lines_are_cut() {
        let mut lines = Lines::default();
        let events = lines.push(&vec![b'x'; LINE_MAX + 5]);
        assert_eq!(events.len(), 1);
        assert_eq!(lines.rest.len(), 5);
    }
}
