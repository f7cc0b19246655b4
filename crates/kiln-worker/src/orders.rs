//! Orders to a guest, one function each: calls, commands, trees, files, forwards.
//!
//! Every wait has a deadline and every answer a bound. An answer that breaks the protocol is a
//! [`CallError::GuestFault`]; a channel that ended is [`CallError::Gone`].

use std::io::Cursor;
use std::time::Duration;

use kiln_core::command_line::CommandTooLong;
use kiln_proto::Session;
use kiln_proto::Stream;
use kiln_proto::codec::{self, CodecError};
use kiln_proto::msg::{
    CallResult, ExecRequest, Exit, GetTree, GuestError, Order, OrderReply, Place, PutFile, PutTree,
    Signal, TreeReport, TtySize, chunk, kind,
};
use kiln_proto::session::OpenError;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// Most bytes of an answer to an order.
pub const REPLY_BYTES_MAX: usize = 64 * 1024;
/// Longest wait for an ordinary order.
pub const ORDER_TIMEOUT: Duration = Duration::from_secs(60);
/// Most bytes of one chunk to a command's standard input.
const STDIN_CHUNK: usize = 32 * 1024;

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The guest said no.
    #[error("the guest could not {what}: {error}")]
    Refused {
        /// What was ordered.
        what: &'static str,
        /// The guest's words.
        error: GuestError,
    },
    /// The guest broke the protocol.
    #[error("the guest broke the protocol while asked to {what}: {why}")]
    GuestFault {
        /// What was ordered.
        what: &'static str,
        /// What was wrong.
        why: String,
    },
    /// The channel ended.
    #[error("the channel to the machine ended while it was asked to {what}: {why}")]
    Gone {
        /// What was ordered.
        what: &'static str,
        /// How it ended.
        why: String,
    },
    /// A command line that fits into no order; nothing was sent.
    #[error(transparent)]
    TooLong(CommandTooLong),
    /// No answer in time.
    #[error("the guest did not {what} within {after:?}")]
    Timeout {
        /// What was ordered.
        what: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// What was to be sent could not be read on the host.
    #[error("could not read what was to be sent to the guest")]
    Source(#[source] std::io::Error),
}

fn codec_error(what: &'static str) -> impl FnOnce(CodecError) -> CallError {
    move |error| {
        let why = chain(&error);
        if error.is_peer_fault() {
            CallError::GuestFault { what, why }
        } else {
            CallError::Gone { what, why }
        }
    }
}

fn gone(what: &'static str) -> impl FnOnce(std::io::Error) -> CallError {
    move |error| CallError::Gone {
        what,
        why: error.to_string(),
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

async fn open(
    session: &Session,
    what: &'static str,
    kind: u8,
    payload: &(impl Serialize + Sync),
) -> Result<Stream, CallError> {
    let payload = serde_json::to_vec(payload).map_err(|error| CallError::GuestFault {
        what,
        why: error.to_string(),
    })?;
    session
        .open(kind, &payload)
        .await
        .map_err(|error| match error {
            OpenError::Payload { len } => CallError::TooLong(CommandTooLong { len }),
            error => CallError::Gone {
                what,
                why: chain(&error),
            },
        })
}

async fn within<T>(
    what: &'static str,
    after: Duration,
    work: impl Future<Output = Result<T, CallError>>,
) -> Result<T, CallError> {
    tokio::time::timeout(after, work)
        .await
        .unwrap_or(Err(CallError::Timeout { what, after }))
}

/// Gives one order and waits for its answer.
///
/// # Errors
/// See [`CallError`].
pub async fn call(
    session: &Session,
    what: &'static str,
    order: &Order,
    after: Duration,
) -> Result<OrderReply, CallError> {
    within(what, after, async {
        let mut stream = open(session, what, kind::CALL, order).await?;
        // A guest that answered already has let go of the stream: then only its answer counts.
        let _answered_already = stream.shutdown().await;
        let reply: CallResult = codec::read_msg(&mut stream, REPLY_BYTES_MAX)
            .await
            .map_err(codec_error(what))?;
        reply.map_err(|error| CallError::Refused { what, error })
    })
    .await
}

/// Gives an order whose only good answer is "done".
///
/// # Errors
/// See [`CallError`].
pub async fn call_done(
    session: &Session,
    what: &'static str,
    order: &Order,
    after: Duration,
) -> Result<(), CallError> {
    match call(session, what, order, after).await? {
        OrderReply::Done => Ok(()),
        other => Err(CallError::GuestFault {
            what,
            why: format!("answered {other:?}"),
        }),
    }
}

/// Sends a tree as a tar stream. `write` runs on a blocking thread and writes the tar.
///
/// # Errors
/// See [`CallError`].
pub async fn put_tree(
    session: &Session,
    what: &'static str,
    order: &PutTree,
    after: Duration,
    write: impl FnOnce(&mut dyn std::io::Write) -> std::io::Result<()> + Send + 'static,
) -> Result<TreeReport, CallError> {
    within(what, after, async {
        let stream = open(session, what, kind::PUT_TREE, order).await?;
        let (mut from_guest, mut to_guest) = tokio::io::split(stream);
        let (sender, mut receiver) = mpsc::channel::<Vec<u8>>(4);
        let writer = tokio::task::spawn_blocking(move || {
            let mut out = std::io::BufWriter::with_capacity(64 * 1024, ChannelWriter(sender));
            write(&mut out)?;
            std::io::Write::flush(&mut out)
        });
        let pump = async {
            while let Some(bytes) = receiver.recv().await {
                to_guest.write_all(&bytes).await.map_err(gone(what))?;
            }
            Ok::<_, CallError>(())
        };
        let reply = codec::read_msg::<Result<TreeReport, GuestError>, _>(&mut from_guest, REPLY_BYTES_MAX);
        tokio::pin!(reply);
        // The guest may refuse before everything was sent (a limit, a full disk): its answer wins.
        tokio::select! {
            biased;
            reply = &mut reply => {
                let reply = reply.map_err(codec_error(what))?;
                return reply.map_err(|error| CallError::Refused { what, error });
            }
            sent = pump => {
                drop(receiver);
                let written = writer.await.map_err(|e| CallError::Source(std::io::Error::other(e)))?;
                // A writer that failed because the stream was gone has no story of its own.
                if let Err(error) = written && sent.is_ok() {
                    return Err(CallError::Source(error));
                }
                if sent.is_ok() {
                    let _answered_already = to_guest.shutdown().await;
                }
            }
        }
        reply.await.map_err(codec_error(what))?.map_err(|error| CallError::Refused { what, error })
    })
    .await
}

/// Sends one file.
///
/// # Errors
/// See [`CallError`].
pub async fn put_file(
    session: &Session,
    what: &'static str,
    place: Place,
    bytes: &[u8],
) -> Result<TreeReport, CallError> {
    within(what, ORDER_TIMEOUT, async {
        let order = PutFile {
            place,
            bytes_max: bytes.len() as u64,
        };
        let mut stream = open(session, what, kind::PUT_FILE, &order).await?;
        // A guest that refuses may answer before it has taken everything: its answer says more than the broken stream.
        if stream.write_all(bytes).await.is_ok() {
            let _answered_already = stream.shutdown().await;
        }
        let reply: Result<TreeReport, GuestError> = codec::read_msg(&mut stream, REPLY_BYTES_MAX)
            .await
            .map_err(codec_error(what))?;
        reply.map_err(|error| CallError::Refused { what, error })
    })
    .await
}

/// Asks for a tree; what comes is a tar stream of the guest's. Its end without an error is the end of the tree.
///
/// # Errors
/// See [`CallError`]. A guest that refuses ends the stream with an error.
pub async fn get_tree(
    session: &Session,
    what: &'static str,
    order: &GetTree,
) -> Result<Stream, CallError> {
    within(what, ORDER_TIMEOUT, async {
        let mut stream = open(session, what, kind::GET_TREE, order).await?;
        // A guest that refused already has let go of the stream: reading says so.
        let _refused_already = stream.shutdown().await;
        Ok(stream)
    })
    .await
}

struct ChannelWriter(mpsc::Sender<Vec<u8>>);

impl std::io::Write for ChannelWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.blocking_send(bytes.to_vec()).map_err(|_| {
            std::io::Error::new(std::io::ErrorKind::BrokenPipe, "the stream is gone")
        })?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What may be told to a running command.
#[derive(Debug)]
pub enum Control {
    /// Send a signal to its process group.
    Signal(i32),
    /// Its terminal has a new size.
    Resize(TtySize),
}

/// Where a command's input comes from and its output goes.
pub struct ExecIo<'a> {
    /// Standard input, if connected.
    pub stdin: Option<Box<dyn AsyncRead + Send + Unpin + 'a>>,
    /// Gets standard output (1) and standard error (2) in order. Awaited: a slow taker slows the guest.
    pub output: mpsc::Sender<(u8, Vec<u8>)>,
    /// Signals and window sizes.
    pub control: mpsc::Receiver<Control>,
}

impl std::fmt::Debug for ExecIo<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExecIo")
            .field("stdin", &self.stdin.is_some())
            .finish_non_exhaustive()
    }
}

/// Runs a command until it ends. Dropping the future resets the stream, and the guest kills the command's group.
///
/// # Errors
/// See [`CallError`].
pub async fn exec(
    session: &Session,
    what: &'static str,
    request: &ExecRequest,
    io: ExecIo<'_>,
) -> Result<Exit, CallError> {
    let stream = open(session, what, kind::EXEC, request).await?;
    exec_over(stream, what, io).await
}

/// Runs a small program of the machine to its end, within [`ORDER_TIMEOUT`]. Nobody hears what it prints; `input`, if any, is all that it reads.
///
/// # Errors
/// See [`CallError`].
pub async fn exec_quiet(
    session: &Session,
    what: &'static str,
    argv: &[&str],
    input: Option<Vec<u8>>,
) -> Result<Exit, CallError> {
    let request = ExecRequest {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        stdin: input.is_some(),
        ..ExecRequest::default()
    };
    let (output, mut said) = mpsc::channel(16);
    let (_nobody, control) = mpsc::channel(1);
    let io = ExecIo {
        stdin: input.map(|bytes| Box::new(Cursor::new(bytes)) as _),
        output,
        control,
    };
    let all = async { while said.recv().await.is_some() {} };
    let run = exec(session, what, &request, io);
    within(what, ORDER_TIMEOUT, async { tokio::join!(run, all).0 }).await
}

/// As [`exec`], on a stream that a guest's command was begun on already, or one that leads there.
///
/// # Errors
/// As [`exec`].
pub async fn exec_over(
    stream: impl AsyncRead + AsyncWrite,
    what: &'static str,
    io: ExecIo<'_>,
) -> Result<Exit, CallError> {
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    let ExecIo {
        stdin,
        output,
        control,
    } = io;
    let send = send_input(what, &mut to_guest, stdin, control);
    let receive = receive_output(what, &mut from_guest, output);
    tokio::pin!(send, receive);
    tokio::select! {
        biased;
        exit = &mut receive => return exit,
        // The guest may have stopped reading because the command ended; its last words decide.
        _input_over = &mut send => {}
    }
    receive.await
}

async fn send_input(
    what: &'static str,
    to_guest: &mut (impl AsyncWrite + Unpin),
    mut stdin: Option<Box<dyn AsyncRead + Send + Unpin + '_>>,
    mut control: mpsc::Receiver<Control>,
) -> Result<(), CallError> {
    let mut buffer = vec![0; STDIN_CHUNK];
    let mut control_open = true;
    while stdin.is_some() || control_open {
        let read = async {
            match stdin.as_mut() {
                Some(stdin) => stdin.read(&mut buffer).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            order = control.recv(), if control_open => match order {
                None => control_open = false,
                Some(order) => {
                    let (tag, body) = match order {
                        Control::Signal(number) => (chunk::SIGNAL, serde_json::to_vec(&Signal { number })),
                        Control::Resize(size) => (chunk::RESIZE, serde_json::to_vec(&size)),
                    };
                    let body = body.map_err(|e| CallError::GuestFault { what, why: e.to_string() })?;
                    codec::write_chunk(to_guest, tag, &body).await.map_err(codec_error(what))?;
                    to_guest.flush().await.map_err(gone(what))?;
                }
            },
            got = read => {
                let got = got.unwrap_or(0);
                let (tag, body) = if got == 0 { (chunk::STDIN_EOF, &[][..]) } else { (chunk::STDIN, &buffer[..got]) };
                codec::write_chunk(to_guest, tag, body).await.map_err(codec_error(what))?;
                to_guest.flush().await.map_err(gone(what))?;
                if got == 0 {
                    stdin = None;
                }
            }
        }
    }
    Ok(())
}

async fn receive_output(
    what: &'static str,
    from_guest: &mut (impl AsyncRead + Unpin),
    output: mpsc::Sender<(u8, Vec<u8>)>,
) -> Result<Exit, CallError> {
    let mut offsets = [0_u64; 2];
    let fault = |why: String| CallError::GuestFault { what, why };
    loop {
        let chunk = codec::read_chunk(from_guest)
            .await
            .map_err(codec_error(what))?;
        let Some(chunk) = chunk else {
            return Err(CallError::Gone {
                what,
                why: "the command's stream ended without its exit".to_owned(),
            });
        };
        match chunk.tag {
            chunk::STDOUT | chunk::STDERR => {
                let index = usize::from(chunk.tag - chunk::STDOUT);
                let (offset, bytes) = chunk
                    .body
                    .split_at_checked(8)
                    .ok_or_else(|| fault("an output chunk without an offset".to_owned()))?;
                let offset = u64::from_le_bytes(offset.try_into().unwrap_or_default());
                if offset != offsets[index] {
                    return Err(fault(format!(
                        "output at offset {offset}, expected {}",
                        offsets[index]
                    )));
                }
                offsets[index] += bytes.len() as u64;
                let stream = if index == 0 { 1 } else { 2 };
                let _reader_gone = output.send((stream, bytes.to_vec())).await;
            }
            chunk::EXIT => {
                return serde_json::from_slice(&chunk.body)
                    .map_err(|error| fault(error.to_string()));
            }
            chunk::FAILED => {
                let error = serde_json::from_slice(&chunk.body)
                    .map_err(|error| fault(error.to_string()))?;
                return Err(CallError::Refused { what, error });
            }
            other => return Err(fault(format!("an unknown chunk {other}"))),
        }
    }
}
