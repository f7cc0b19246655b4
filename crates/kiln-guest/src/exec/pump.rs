//! Input and output of one command.
//!
//! Output is read only as fast as the host takes it. Input waits in a bounded queue, so that a signal is seen
//! even when the command does not read what it was sent.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::Bytes;
use kiln_proto::codec::{self, CHUNK_LEN_MAX, CodecError};
use kiln_proto::msg::{Signal, TtySize, chunk};
use kiln_proto::stream::Stream;
use rustix::io::Errno;
use rustix::termios::tcsetwinsize;
use tokio::io::unix::AsyncFd;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};

use super::{Handle, winsize};

/// Bytes of offset before the output in a chunk.
const OFFSET_LEN: usize = 8;
/// Input chunks that wait for a command that does not read; each has at most [`CHUNK_LEN_MAX`] bytes.
const INPUT_QUEUE: usize = 64;
/// How long the output of a command that is dead may be silent before it counts as complete.
const DRAIN_QUIET: Duration = Duration::from_millis(500);
/// What ends the input of a terminal.
const END_OF_TRANSMISSION: &[u8] = &[4];

type Fd = AsyncFd<OwnedFd>;

/// The guest's ends of a command's standard streams.
#[derive(Debug)]
pub(super) struct Io {
    pub(super) input: Option<Fd>,
    pub(super) out: Option<Fd>,
    pub(super) err: Option<Fd>,
    /// The terminal's master, for its size.
    pub(super) terminal: Option<OwnedFd>,
}

/// Where input goes.
#[derive(Debug)]
pub(super) struct Input {
    fd: Option<Fd>,
    terminal: Option<OwnedFd>,
}

/// Where output comes from.
#[derive(Debug)]
pub(super) struct Output {
    out: Option<Fd>,
    err: Option<Fd>,
}

impl Io {
    pub(super) fn split(self) -> (Input, Output) {
        let Self {
            input,
            out,
            err,
            terminal,
        } = self;
        (
            Input {
                fd: input,
                terminal,
            },
            Output { out, err },
        )
    }
}

/// Reads what is there; 0 is the end. Safe to cancel. Never ready without a descriptor.
async fn read_some(fd: Option<&Fd>, buffer: &mut [u8]) -> usize {
    let Some(fd) = fd else {
        return std::future::pending().await;
    };
    loop {
        let Ok(mut ready) = fd.readable().await else {
            return 0;
        };
        match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *buffer)?)) {
            Ok(Ok(count)) => return count,
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal whose other side is closed says EIO.
            Ok(Err(_)) => return 0,
            Err(_would_block) => {}
        }
    }
}

/// Counts and bounds what goes to the host.
struct Sender<'a> {
    writer: &'a mut WriteHalf<Stream>,
    offsets: [u64; 2],
    bytes_max: u64,
    dropped: u64,
}

impl Sender<'_> {
    /// `buffer` holds room for the offset and `count` bytes of output.
    async fn send(&mut self, tag: u8, buffer: &mut [u8], count: usize) -> Result<(), CodecError> {
        let sent: u64 = self.offsets.iter().sum();
        let room = if self.bytes_max == 0 {
            u64::MAX
        } else {
            self.bytes_max.saturating_sub(sent)
        };
        let kept = usize::try_from(room).unwrap_or(usize::MAX).min(count);
        self.dropped += (count - kept) as u64;
        if kept == 0 {
            return Ok(());
        }
        let offset = &mut self.offsets[usize::from(tag - chunk::STDOUT)];
        buffer[..OFFSET_LEN].copy_from_slice(&offset.to_le_bytes());
        *offset += kept as u64;
        codec::write_chunk(self.writer, tag, &buffer[..OFFSET_LEN + kept]).await
    }
}

/// Sends output until both streams end. Gives the number of bytes that were dropped.
///
/// # Errors
/// When the host is gone.
pub(super) async fn output(
    mut from: Output,
    writer: &mut WriteHalf<Stream>,
    bytes_max: u64,
    mut over: watch::Receiver<bool>,
) -> Result<u64, CodecError> {
    let mut sender = Sender {
        writer,
        offsets: [0; 2],
        bytes_max,
        dropped: 0,
    };
    let mut out = vec![0; CHUNK_LEN_MAX];
    let mut err = vec![
        0;
        if from.err.is_some() {
            CHUNK_LEN_MAX
        } else {
            OFFSET_LEN
        }
    ];
    while from.out.is_some() || from.err.is_some() {
        let draining = *over.borrow();
        tokio::select! {
            count = read_some(from.out.as_ref(), &mut out[OFFSET_LEN..]) => match count {
                0 => from.out = None,
                count => sender.send(chunk::STDOUT, &mut out, count).await?,
            },
            count = read_some(from.err.as_ref(), &mut err[OFFSET_LEN..]) => match count {
                0 => from.err = None,
                count => sender.send(chunk::STDERR, &mut err, count).await?,
            },
            _ended = over.changed(), if !draining => {}
            () = tokio::time::sleep(DRAIN_QUIET), if draining => break,
        }
    }
    Ok(sender.dropped)
}

/// Takes what the host sends. Ready only when the host is gone.
pub(super) async fn input(to: Input, mut reader: ReadHalf<Stream>, handle: &Handle) {
    let Input { fd, terminal } = to;
    let (queue, queued) = mpsc::channel(INPUT_QUEUE);
    let mut queue = fd.is_some().then_some(queue);
    let feed = async {
        feed(fd, queued).await;
        std::future::pending::<()>().await;
    };
    let listen = async {
        loop {
            match codec::read_chunk(&mut reader).await {
                Ok(Some(part)) => match part.tag {
                    chunk::STDIN => {
                        if let Some(sender) = &queue
                            && sender.send(part.body).await.is_err()
                        {
                            queue = None;
                        }
                    }
                    chunk::STDIN_EOF => {
                        if let (Some(sender), Some(_)) = (queue.take(), &terminal) {
                            let _nobody_reads =
                                sender.send(Bytes::from_static(END_OF_TRANSMISSION)).await;
                        }
                    }
                    chunk::SIGNAL => {
                        if let Ok(signal) = serde_json::from_slice::<Signal>(&part.body) {
                            handle.signal(signal.number);
                        }
                    }
                    chunk::RESIZE => {
                        let size = serde_json::from_slice::<TtySize>(&part.body);
                        if let (Ok(size), Some(terminal)) = (size, &terminal) {
                            let _gone = tcsetwinsize(terminal, winsize(size));
                        }
                    }
                    _ => {}
                },
                // The host has nothing more to say; the command goes on.
                Ok(None) => {
                    queue = None;
                    std::future::pending::<()>().await;
                }
                Err(_gone) => return,
            }
        }
    };
    tokio::select! {
        () = listen => {}
        () = feed => {}
    }
}

/// Writes queued input until the queue or the command ends; then closes the command's input.
async fn feed(fd: Option<Fd>, mut queued: mpsc::Receiver<Bytes>) {
    let Some(fd) = fd else { return };
    while let Some(mut bytes) = queued.recv().await {
        while !bytes.is_empty() {
            let Ok(mut ready) = fd.writable().await else {
                return;
            };
            match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), &bytes)?)) {
                Ok(Ok(count)) => drop(bytes.split_to(count)),
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::INTR.raw_os_error()) => {}
                Ok(Err(_nobody_reads)) => return,
                Err(_would_block) => {}
            }
        }
    }
}
