//! `kiln run -i`, `-t` and `-p` through a server: this process holds the command's streams while it runs on a worker, and leads connections to its ports.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kiln_controller::api::{AttendAsk, JobView};
use kiln_core::{FailureClass, Verdict};
use kiln_proto::msg::TtySize;
use kiln_worker::attend::client::{self, HoldError};
use kiln_worker::event::Events;
use kiln_worker::kept::ask::Ask;
use kiln_worker::kept::client::{AskError, Line, ask};
use kiln_worker::orders::{Control, ExecIo};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use super::kept::{Running, refused};
use super::run::{READER_GONE, own_terminal};
use super::run_ports::{Said, announce, listen};
use super::run_server::{Left, finish};
use crate::args::RunArgs;
use crate::error::{CliError, OrInfrastructure as _, Result, chain};
use crate::server::Server;
use crate::server::follow::{Ended, LogKind, follow_held};
use crate::show::Screen;
use crate::terminal::{self, RawMode, Shown};

/// Wait before a way that could not be opened is tried again.
const OPEN_AGAIN: Duration = Duration::from_secs(1);
/// How long the end of the output may come after the job's own end.
const LAST_WORDS: Duration = Duration::from_secs(20);
/// Connections to ports that are open at a time; a server bounds them too, and more wait here.
const FORWARDS: usize = 24;

/// What of a command this process holds.
#[derive(Debug)]
pub(super) struct Held {
    /// Size of the terminal, if the command gets one.
    size: Option<TtySize>,
    stdin: bool,
    listeners: Vec<(TcpListener, u16)>,
}

impl Held {
    /// What a command line asks for; none: nothing. Ports are bound already.
    ///
    /// # Errors
    /// When nobody would be there to hold it, or a port is not free.
    pub(super) async fn of(args: &RunArgs, screen: Screen) -> Result<Option<Self>> {
        let flags = [
            ("--publish", !args.publish.is_empty()),
            ("--tty", args.tty),
            ("--interactive", args.interactive),
        ];
        if args.queueing.detach {
            if let Some((flag, _)) = flags.iter().find(|(_, given)| *given) {
                let message = format!("{flag} needs somebody who waits: --detach does not");
                return Err(CliError::usage(message)
                    .hint("`kiln run --keep` leaves a machine to come back to with `kiln exec` and `kiln port-forward`"));
            }
            if terminal::stdin_is_piped() {
                screen.note("standard input stays here: --detach leaves nobody to send it");
            }
            return Ok(None);
        }
        let listeners = listen(Said::Publish, &args.publish).await?;
        announce(&listeners, screen)?;
        let size = own_terminal(args, screen)?;
        let stdin = size.is_some() || args.interactive || terminal::stdin_is_piped();
        let held = Self {
            size,
            stdin,
            listeners,
        };
        Ok((held.stdin || !held.listeners.is_empty()).then_some(held))
    }

    /// As a server is asked for it.
    pub(super) fn asked(&self) -> AttendAsk {
        let mut ports: Vec<u16> = self.listeners.iter().map(|(_, guest)| *guest).collect();
        ports.sort_unstable();
        ports.dedup();
        AttendAsk {
            tty: self.size.is_some(),
            stdin: self.stdin,
            ports,
        }
    }

    /// Follows a run to its end while it holds the command's streams; gives its exit code.
    ///
    /// # Errors
    /// When it did not run, or was not held to its end.
    pub(super) async fn followed(
        self,
        server: &Server,
        job: &JobView,
        left: Left<'_>,
        screen: Screen,
        cancel: &CancellationToken,
    ) -> Result<u8> {
        let (events, receiver) = Events::channel();
        let drawing = tokio::spawn(screen.follow_quietly(receiver));
        let (ready, told) = watch::channel(false);
        let (stop, over) = (cancel.child_token(), CancellationToken::new());
        let running = Running {
            server: server.clone(),
            id: job.line.id.clone(),
        };
        let holding = self.hold(running, told, (stop.clone(), over.clone()), screen);
        let holding = tokio::spawn(holding);
        let id = &job.line.id;
        let ended = follow_held(server, id, LogKind::Held, &events, screen, (&stop, &ready)).await;
        over.cancel();
        drop(events);
        let _screen_ended = drawing.await;
        let held = last_words(holding, id).await;
        let ended = ended?;
        let asked = cancel.is_cancelled();
        match held {
            Ok(Ok(())) => finish(server, job, left, ended, screen, cancel).await,
            // Like any program whose reader has gone; one that ended before keeps its own code.
            Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                let code = finish(server, job, left, ended, screen, cancel).await;
                code.or(Ok(READER_GONE))
            }
            Ok(Err(error)) => Err(CliError::new(
                FailureClass::Infrastructure,
                format!("the command's output could not be written: {error}"),
            )),
            Err(error) if !asked && explains(&ended) => Err(error),
            Err(_) => finish(server, job, left, ended, screen, cancel).await,
        }
    }

    /// Holds the streams from when that is possible until the command has said everything, or its job is over. Gives what became of the output.
    async fn hold(
        self,
        running: Running,
        mut ready: watch::Receiver<bool>,
        (stop, over): (CancellationToken, CancellationToken),
        screen: Screen,
    ) -> Result<io::Result<()>> {
        let opened = async {
            // The sender lives as long as the job is followed.
            let _ready = ready.wait_for(|ready| *ready).await.is_ok();
            open(&running, self.size).await
        };
        let opened = tokio::select! {
            opened = opened => opened,
            () = over.cancelled() => return Ok(Ok(())),
        };
        let line = match opened {
            Ok(line) => line,
            Err(error) => {
                // It would wait for nobody.
                stop.cancel();
                return Err(error);
            }
        };
        let raw = self.size.map(|_| RawMode::enter()).transpose();
        let raw = raw.or_infrastructure().inspect_err(|_| stop.cancel())?;
        let shown = match (screen.json(), self.size) {
            (true, _) => Shown::Events,
            (false, Some(_)) => Shown::Terminal,
            (false, None) => Shown::Streams,
        };
        let (output, chunks) = mpsc::channel(64);
        let (control_in, control) = mpsc::channel::<Control>(16);
        let printing = tokio::spawn(terminal::print(chunks, stop, shown));
        let mut beside = JoinSet::new();
        if self.size.is_some() {
            beside.spawn(terminal::watch_size(control_in));
        }
        let slots = Arc::new(Semaphore::new(FORWARDS));
        for (listener, port) in self.listeners {
            beside.spawn(forward(
                running.clone(),
                listener,
                port,
                Arc::clone(&slots),
                screen,
            ));
        }
        let io = ExecIo {
            stdin: self.stdin.then(terminal::stdin),
            output,
            control,
        };
        let held = client::hold(line, io).await;
        drop(beside);
        let printed = printing.await.unwrap_or(Ok(()));
        drop(raw);
        match held {
            Ok(()) => Ok(printed),
            Err(_) if printed.is_err() => Ok(printed),
            Err(error @ HoldError::Input(_)) => Err(CliError::usage(chain(&error))),
            Err(error) => Err(CliError::new(FailureClass::Infrastructure, chain(&error))),
        }
    }
}

/// Whether an end says less than how holding the streams failed.
fn explains(ended: &Ended) -> bool {
    matches!(
        ended.outcome.verdict,
        Verdict::Passed
            | Verdict::Failed {
                class: FailureClass::Cancelled,
                ..
            }
    )
}

/// The command may have said its last while its job ended.
async fn last_words(
    mut holding: JoinHandle<Result<io::Result<()>>>,
    id: &str,
) -> Result<io::Result<()>> {
    match tokio::time::timeout(LAST_WORDS, &mut holding).await {
        Ok(held) => held.or_infrastructure()?,
        Err(_) => {
            holding.abort();
            let message = "the end of the output did not come";
            Err(CliError::new(FailureClass::Infrastructure, message)
                .hint(format!("`kiln job logs {id}` has it")))
        }
    }
}

/// Opens the way to a command that waits; as long as it does, where the server has none just now.
async fn open(running: &Running, size: Option<TtySize>) -> Result<Box<dyn Line>> {
    loop {
        let error = match client::open(running, size).await {
            Ok(line) => return Ok(line),
            Err(error) => refused(error),
        };
        if error.class != FailureClass::Infrastructure {
            return Err(error);
        }
        tracing::debug!(error = error.message, "not attended yet");
        tokio::time::sleep(OPEN_AGAIN).await;
    }
}

/// Leads connections to one port until it is dropped.
async fn forward(
    running: Running,
    listener: TcpListener,
    port: u16,
    slots: Arc<Semaphore>,
    screen: Screen,
) {
    let mut connections = JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let Ok((peer, _)) = listener.accept().await else {
            continue;
        };
        while connections.try_join_next().is_some() {}
        let running = running.clone();
        connections.spawn(async move {
            let _slot = slot;
            if let Err(error) = one(&running, peer, port).await {
                screen.note(&chain(&error));
            }
        });
    }
}

async fn one(running: &Running, mut peer: TcpStream, port: u16) -> Result<(), AskError> {
    let (_begins, mut way) = ask(running, &Ask::Forward { port }).await?;
    let _slow_network = peer.set_nodelay(true);
    // Each direction to its own end; a broken connection is its two ends' to see.
    let _ended = kiln_proto::relay::join(&mut way, &mut peer, || {}).await;
    Ok(())
}
