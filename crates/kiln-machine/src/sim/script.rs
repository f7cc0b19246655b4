//! What commands do in a simulated guest: rules of the test first, then a few commands of a real system.

use std::fmt;
use std::io;
use std::sync::Arc;

use kiln_proto::codec::CHUNK_LEN_MAX;
use kiln_proto::msg::{
    Connect, ConnectReply, ExecRequest, GuestError, GuestErrorCode, GuestEvent, Resolve,
    ResolveReply, chunk, kind,
};
use kiln_proto::{CodecError, Stream, read_msg, write_chunk};
use tokio::io::{AsyncWriteExt as _, WriteHalf};
use tokio::sync::mpsc;

use super::fault::{Lie, Step};
use super::guest::Guest;
use crate::driver::BoxFuture;

/// Bytes of an answer from the host.
const REPLY_BYTES_MAX: usize = 64 * 1024;

/// How a command ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExecEnd {
    /// It exits with this code.
    Code(i32),
    /// A signal ends it.
    Signal(i32),
    /// The kernel kills it for memory.
    OutOfMemory,
    /// There is no such command.
    NotFound,
}

/// What a rule does: writes output and says how the command ended.
pub type Action = Arc<dyn for<'a> Fn(&'a mut ExecCall) -> BoxFuture<'a, ExecEnd> + Send + Sync>;
type Matcher = Arc<dyn Fn(&ExecRequest) -> bool + Send + Sync>;
/// What a listening port does with a connection.
pub type Listener = Arc<dyn Fn(Stream) -> BoxFuture<'static, ()> + Send + Sync>;

/// What commands and ports do.
#[derive(Clone, Default)]
pub struct Script {
    rules: Vec<(Matcher, Action)>,
    ports: Vec<(u16, Listener)>,
}

impl Script {
    /// Commands whose first arguments are these do this. An earlier rule goes before a later one.
    #[must_use]
    pub fn on(
        self,
        argv: &[&str],
        action: impl for<'a> Fn(&'a mut ExecCall) -> BoxFuture<'a, ExecEnd> + Send + Sync + 'static,
    ) -> Self {
        let argv: Vec<String> = argv.iter().map(|arg| (*arg).to_owned()).collect();
        self.on_match(move |request| request.argv.starts_with(&argv), action)
    }

    /// Commands that the matcher accepts do this.
    #[must_use]
    pub fn on_match(
        mut self,
        matcher: impl Fn(&ExecRequest) -> bool + Send + Sync + 'static,
        action: impl for<'a> Fn(&'a mut ExecCall) -> BoxFuture<'a, ExecEnd> + Send + Sync + 'static,
    ) -> Self {
        self.rules.push((Arc::new(matcher), Arc::new(action)));
        self
    }

    /// Commands whose first arguments are these print this and exit.
    #[must_use]
    pub fn reply(self, argv: &[&str], stdout: &str, code: i32) -> Self {
        let text = stdout.as_bytes().to_vec();
        self.on(argv, move |call| {
            let text = text.clone();
            Box::pin(async move {
                match call.stdout(&text).await {
                    Ok(()) => ExecEnd::Code(code),
                    Err(_) => ExecEnd::Signal(libc::SIGPIPE),
                }
            })
        })
    }

    /// Something listens on a port of the guest's loopback.
    #[must_use]
    pub fn listen(
        mut self,
        port: u16,
        listener: impl Fn(Stream) -> BoxFuture<'static, ()> + Send + Sync + 'static,
    ) -> Self {
        self.ports.push((port, Arc::new(listener)));
        self
    }

    pub(super) fn find(&self, request: &ExecRequest) -> Option<Action> {
        self.rules
            .iter()
            .find(|(matches, _)| matches(request))
            .map(|(_, action)| Arc::clone(action))
    }

    pub(super) fn port(&self, port: u16) -> Option<Listener> {
        self.ports
            .iter()
            .find(|(number, _)| *number == port)
            .map(|(_, listener)| Arc::clone(listener))
    }
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Script({} rules)", self.rules.len())
    }
}

/// A command that runs.
#[derive(Debug)]
pub struct ExecCall {
    /// What was asked.
    pub request: ExecRequest,
    pub(super) guest: GuestHandle,
    pub(super) stdin: mpsc::Receiver<Vec<u8>>,
    pub(super) output: WriteHalf<Stream>,
    pub(super) stream: u32,
    pub(super) sent: u64,
    pub(super) stdout_at: u64,
    pub(super) stderr_at: u64,
    pub(super) dropped: u64,
}

impl ExecCall {
    /// Writes to standard output.
    ///
    /// # Errors
    /// When the host has gone.
    pub async fn stdout(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write(chunk::STDOUT, bytes).await
    }

    /// Writes to standard error.
    ///
    /// # Errors
    /// When the host has gone.
    pub async fn stderr(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write(chunk::STDERR, bytes).await
    }

    /// The next piece of standard input; `None` at its end.
    pub async fn stdin(&mut self) -> Option<Vec<u8>> {
        self.stdin.recv().await
    }

    /// The guest around the command.
    #[must_use]
    pub fn guest(&self) -> &GuestHandle {
        &self.guest
    }

    async fn write(&mut self, tag: u8, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(CHUNK_LEN_MAX - 8) {
            self.guest.0.meet_slow().await;
            let room = match self.request.output_bytes_max {
                0 => piece.len(),
                max => piece
                    .len()
                    .min(usize::try_from(max.saturating_sub(self.sent)).unwrap_or(usize::MAX)),
            };
            self.dropped += (piece.len() - room) as u64;
            let (kept, _) = piece.split_at(room);
            if kept.is_empty() {
                continue;
            }
            let at = match tag {
                chunk::STDOUT => &mut self.stdout_at,
                _ => &mut self.stderr_at,
            };
            let lie = if self.guest.0.lies(Lie::Offsets) {
                7
            } else {
                0
            };
            let mut body = (*at + lie).to_le_bytes().to_vec();
            body.extend_from_slice(kept);
            *at += kept.len() as u64;
            self.sent += kept.len() as u64;
            write_chunk(&mut self.output, tag, &body)
                .await
                .map_err(codec_io)?;
        }
        self.output.flush().await
    }
}

fn codec_io(error: CodecError) -> io::Error {
    match error {
        CodecError::Io(error) => error,
        other => io::Error::other(other),
    }
}

/// The guest, as its commands see it.
#[derive(Clone, Debug)]
pub struct GuestHandle(pub(super) Arc<Guest>);

impl GuestHandle {
    /// Asks the host for a connection to a name.
    ///
    /// # Errors
    /// When the host refuses, with its reason, or has gone.
    pub async fn connect(&self, host: &str, port: u16) -> Result<Stream, GuestError> {
        let ask = Connect {
            host: host.to_owned(),
            port,
        };
        let mut stream = self.ask(kind::CONNECT, &ask).await?;
        match read_msg(&mut stream, REPLY_BYTES_MAX).await {
            Ok(ConnectReply::Connected) => Ok(stream),
            Ok(ConnectReply::Refused { reason }) => Err(system(reason)),
            Err(error) => Err(system(error.to_string())),
        }
    }

    /// Asks the host whether a name exists.
    ///
    /// # Errors
    /// When the host has gone.
    pub async fn resolve(&self, host: &str) -> Result<bool, GuestError> {
        let ask = Resolve {
            host: host.to_owned(),
        };
        let mut stream = self.ask(kind::RESOLVE, &ask).await?;
        let reply: ResolveReply = read_msg(&mut stream, REPLY_BYTES_MAX)
            .await
            .map_err(|error| system(error.to_string()))?;
        Ok(reply.known)
    }

    async fn ask(&self, kind: u8, ask: &impl serde::Serialize) -> Result<Stream, GuestError> {
        let payload = serde_json::to_vec(ask).map_err(|error| system(error.to_string()))?;
        self.0.open(kind, &payload).await
    }

    /// Reads a file of the guest.
    #[must_use]
    pub fn read(&self, path: &str) -> Option<Vec<u8>> {
        self.0.memory().read(path)
    }

    /// Writes a file of the guest; false when its place is read-only.
    #[must_use]
    pub fn write(&self, path: &str, content: Vec<u8>) -> bool {
        self.0.memory().write(path, content)
    }

    /// Files in memory whose path begins so, without those on disks.
    #[must_use]
    pub fn files_below(&self, prefix: &str) -> Vec<(String, Vec<u8>)> {
        let memory = self.0.memory();
        let below = memory.files.iter();
        below
            .filter(|(path, _)| path.starts_with(prefix))
            .map(|(path, content)| (path.clone(), content.clone()))
            .collect()
    }

    /// Bytes from the kernel's generator, at most 32.
    #[must_use]
    pub fn random(&self) -> [u8; 32] {
        self.0.memory().draw()
    }

    /// Whether BuildKit was started and not stopped.
    #[must_use]
    pub fn buildkit_runs(&self) -> bool {
        self.0.memory().buildkit
    }

    /// The environment that the host set for RUN steps.
    #[must_use]
    pub fn step_env(&self) -> Vec<(String, String)> {
        self.0.memory().step_env.clone()
    }

    /// Tells the host that something happened.
    pub fn event(&self, event: GuestEvent) {
        self.0.event(event);
    }

    /// Meets the faults of a step, as if the host had asked for it.
    ///
    /// # Errors
    /// When the guest must refuse there.
    pub async fn meet(&self, step: Step) -> Result<(), GuestError> {
        self.0.meet(step, 1).await
    }

    /// The machine stops for this reason.
    pub fn power_off(&self, reason: crate::driver::StopReason) {
        self.0.power_off(reason);
    }
}

fn system(message: String) -> GuestError {
    GuestError {
        code: GuestErrorCode::System,
        message,
    }
}
