//! A session: many streams over one duplex byte stream between host and guest.
//!
//! [`Session::connect`] is the host's side, [`Session::accept`] the guest's; afterwards both are
//! alike. One task per session owns the transport (`driver.rs`), the rules are in [`crate::mux`],
//! the start of a session and its soundness in [`crate::preamble`]. A tokio runtime of either
//! flavour with I/O and time enabled is needed.
//!
//! # The guest's transport
//! A session consumes its transport, and [`Session::closed`] returns only after the transport
//! was dropped. So the guest's loop is:
//!
//! 1. open the device (or take another handle of the one it keeps, e.g. an `Arc`),
//! 2. `accept`; an error [`SessionError::TransportEnded`] means that nobody is connected: go to 1,
//! 3. serve until `closed()`, whatever the reason, then go to 1.
//!
//! A virtio-serial port opens once at a time, reads 0 and polls HUP *while* no host is connected,
//! and epoll reports that HUP at once and for good in tokio's `AsyncFd`. Wait for a host on an
//! edge-triggered epoll of one's own (its descriptor in an `AsyncFd`) or by a bounded pause
//! before step 1. Nothing depends on seeing the disconnect: a host that comes back sends
//! preambles until echoed, and a session in their way ends as [`CloseReason::Restarted`].
//!
//! The transport must write through: bytes accepted by `poll_write` go out without a flush.

use crate::driver::{Driver, Opening};
use crate::frame::{Frame, FrameBuffer};
use crate::hello::{GENERATION_MAX, GENERATION_MIN, Hello, HelloError, PreparedHello, negotiate};
use crate::mux::{CLOSE_NORMAL, Mux, OpenRefusal, ProtocolError, Role};
use crate::preamble::{Preamble, RunScanner, Scan};
use crate::stream::{Incoming, Stream};
use bytes::Bytes;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

mod search;
use search::EchoSearch;

/// Streams open at once in one direction, unless both sides agree on more ([`Session::peer_may_open`]).
pub const STREAMS_MAX: usize = 256;
/// Streams opened by the peer that wait in [`Incoming`]; more are refused one by one.
pub const ACCEPT_BACKLOG: usize = 256;
/// Queued Open, Reset and Ping frames at which `open` waits for the transport.
pub const CONTROL_MAX: usize = 256;
/// How long a peer may take no byte while some wait for it.
pub const STALL_DEADLINE: Duration = Duration::from_secs(30);
/// How long a closing session tries to send what is left.
pub const CLOSE_FLUSH: Duration = Duration::from_secs(1);
/// Bytes the host drops while it waits for the echo.
pub const DISCARD_MAX: u64 = 64 * 1024 * 1024;
/// Bytes read from the transport at once.
pub const READ_BUFFER: usize = 256 * 1024;
/// The same in a guest, which makes this buffer anew while its host waits.
pub const GUEST_READ_BUFFER: usize = 128 * 1024;
/// Pause between the first two runs of preambles; it doubles up to [`RUN_PAUSE_MAX`].
pub const RUN_PAUSE: Duration = Duration::from_millis(20);
/// Longest pause between two runs of preambles.
pub const RUN_PAUSE_MAX: Duration = Duration::from_millis(400);

/// Bounds of one session. The defaults are the constants of this module; the window is part of
/// the wire ([`crate::mux::WINDOW`]). Both sides must agree on `streams_max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionLimits {
    /// Lowest generation spoken (host; a guest says it in its Hello).
    pub generation_min: u32,
    /// Highest generation spoken (host; a guest says it in its Hello).
    pub generation_max: u32,
    /// See [`STREAMS_MAX`].
    pub streams_max: usize,
    /// See [`ACCEPT_BACKLOG`].
    pub accept_backlog: usize,
    /// See [`CONTROL_MAX`].
    pub control_max: usize,
    /// See [`STALL_DEADLINE`].
    pub stall_deadline: Duration,
    /// See [`CLOSE_FLUSH`].
    pub close_flush: Duration,
    /// See [`DISCARD_MAX`].
    pub discard_max: u64,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self {
            generation_min: GENERATION_MIN,
            generation_max: GENERATION_MAX,
            streams_max: STREAMS_MAX,
            accept_backlog: ACCEPT_BACKLOG,
            control_max: CONTROL_MAX,
            stall_deadline: STALL_DEADLINE,
            close_flush: CLOSE_FLUSH,
            discard_max: DISCARD_MAX,
        }
    }
}

/// Why a session is over.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CloseReason {
    /// The transport ended: the peer, its machine or the way to it is gone.
    #[error("the channel ended")]
    Eof,
    /// The transport failed in another way.
    #[error("the channel failed: {kind}")]
    Transport {
        /// What the system said.
        kind: io::ErrorKind,
    },
    /// The peer closed the session.
    #[error("the peer closed the session with code {code}: {reason:?}")]
    PeerClosed {
        /// Why, as a number: [`CLOSE_NORMAL`] and its like, or one of the messages' own.
        code: u16,
        /// Why, in the peer's words: untrusted.
        reason: String,
    },
    /// The peer did what no honest peer does. On the host: a guest fault.
    #[error("the peer broke the protocol")]
    Protocol(#[source] ProtocolError),
    /// A host began a new session on this transport (guest only).
    #[error("a host began a new session")]
    Restarted,
    /// The peer took nothing for the stall deadline.
    #[error("the peer took no byte in time")]
    Stalled,
    /// This side closed it, or dropped its last handle.
    #[error("the session was closed here with code {code}: {reason:?}")]
    Local {
        /// As given to [`Session::close`].
        code: u16,
        /// As given to [`Session::close`].
        reason: String,
    },
}

impl CloseReason {
    /// True if the peer broke the protocol: on the host, a guest fault.
    pub fn is_peer_fault(&self) -> bool {
        matches!(self, Self::Protocol(_))
    }
}

impl From<ProtocolError> for CloseReason {
    fn from(error: ProtocolError) -> Self {
        Self::Protocol(error)
    }
}

/// Why a session did not start.
#[derive(Debug, Error)]
pub enum SessionError {
    /// No complete answer within the deadline.
    #[error("no answer within {waited:?} ({discarded} stale bytes dropped, echo seen: {echoed})")]
    Deadline {
        /// How long the host waited.
        waited: Duration,
        /// Bytes dropped before the echo.
        discarded: u64,
        /// Whether the guest's echo came, without its Hello.
        echoed: bool,
    },
    /// The transport ended before the session began.
    #[error("the channel ended before the session began")]
    TransportEnded,
    /// The transport failed.
    #[error("the channel failed before the session began")]
    Transport(#[source] io::Error),
    /// The guest sent more than `max` bytes and no echo.
    #[error("{max} bytes and no echo among them")]
    NoEcho {
        /// The bound.
        max: u64,
    },
    /// What came after the echo is not a guest's introduction. On the host: a guest fault.
    #[error("the guest broke the protocol in its first frame")]
    Protocol(#[source] ProtocolError),
    /// Host and guest have no generation in common.
    #[error("this side speaks generations {ours:?}, the other {theirs:?}")]
    Generation {
        /// Lowest and highest of this side.
        ours: (u32, u32),
        /// Lowest and highest of the other.
        theirs: (u32, u32),
    },
    /// The guest's own Hello exceeds a bound.
    #[error("this guest's hello cannot be sent")]
    Hello(#[source] HelloError),
    /// The system gave no random bytes for the nonce.
    #[error("no random bytes for the nonce: {0}")]
    Random(getrandom::Error),
}

impl SessionError {
    /// True if the peer broke the protocol: on the host, a guest fault.
    pub fn is_peer_fault(&self) -> bool {
        matches!(self, Self::Protocol(_) | Self::NoEcho { .. })
    }
}

/// Why a stream could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OpenError {
    /// The payload is longer than [`crate::frame::OPEN_PAYLOAD_MAX`].
    #[error("a payload of {len} bytes is too long for an open")]
    Payload {
        /// Its length.
        len: usize,
    },
    /// As many streams as agreed are open.
    #[error("{max} streams are open")]
    TooMany {
        /// The bound.
        max: usize,
    },
    /// All stream ids of this session are used up.
    #[error("this session has no stream ids left")]
    Exhausted,
    /// The session is over.
    #[error("the session is over")]
    Ended(#[source] CloseReason),
}

impl OpenError {
    /// True if the session is over because the peer broke the protocol.
    pub fn is_peer_fault(&self) -> bool {
        matches!(self, Self::Ended(reason) if reason.is_peer_fault())
    }
}

/// Why a ping was not answered.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PingError {
    /// No answer in time; the session may still live.
    #[error("no pong within {waited:?}")]
    Deadline {
        /// How long was waited.
        waited: Duration,
    },
    /// Too many pings are unanswered already.
    #[error("too many pings are unanswered")]
    Busy,
    /// The session is over.
    #[error("the session is over")]
    Ended(#[source] CloseReason),
}

/// What the handles and the driver of one session have in common.
pub(crate) struct Shared {
    mux: Mutex<Mux>,
    /// Told when `open` may try again.
    pub(crate) room: Notify,
}

impl std::fmt::Debug for Shared {
    /// Without the contents: buffers may hold secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Mux> {
        self.mux.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `action` under the lock, then wakes whom it woke.
    pub(crate) fn with<T>(&self, action: impl FnOnce(&mut Mux) -> T) -> T {
        let mut mux = self.lock();
        let result = action(&mut mux);
        let wakes = mux.take_wakes();
        drop(mux);
        wakes.into_iter().for_each(std::task::Waker::wake);
        result
    }
}

/// Held by every handle; when the last is gone, nobody needs the session.
#[derive(Debug)]
pub(crate) struct Anchor {
    pub(crate) shared: Arc<Shared>,
}

impl Drop for Anchor {
    fn drop(&mut self) {
        self.shared
            .with(|mux| mux.request_close(CLOSE_NORMAL, "all handles are gone"));
    }
}

/// A running session; clones are handles of the same one. It ends by [`Session::close`], when the
/// last of its `Session`, [`Incoming`] and [`Stream`] handles is dropped, by the peer, or by the
/// transport.
#[derive(Debug, Clone)]
pub struct Session {
    anchor: Arc<Anchor>,
    done: watch::Receiver<Option<CloseReason>>,
    generation: u32,
    streams_max: usize,
}

impl Session {
    /// The host's side: starts a session with the guest at the other end of `io`.
    ///
    /// Sends runs of preambles until the guest echoes their nonce, drops everything before the
    /// echo, reads the guest's [`Hello`] and agrees on a generation. Cancelling it drops `io`.
    ///
    /// # Errors
    /// [`SessionError`]; `io` is dropped then.
    pub async fn connect<T>(
        mut io: T,
        limits: SessionLimits,
        deadline: Duration,
    ) -> Result<(Session, Hello, Incoming), SessionError>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).map_err(SessionError::Random)?;
        let ours = (limits.generation_min, limits.generation_max);
        let preamble = Preamble {
            nonce,
            generation_min: ours.0,
            generation_max: ours.1,
        };
        let mut search = EchoSearch::new(&preamble, limits.discard_max);
        let hello = match tokio::time::timeout(deadline, search.run(&mut io)).await {
            Ok(answer) => answer?,
            Err(_) => {
                let EchoSearch {
                    discarded, echoed, ..
                } = search;
                return Err(SessionError::Deadline {
                    waited: deadline,
                    discarded,
                    echoed,
                });
            }
        };
        let theirs = (hello.generation_min, hello.generation_max);
        let generation =
            negotiate(ours, theirs).ok_or(SessionError::Generation { ours, theirs })?;
        let opening = search.opening();
        let (session, incoming) = Self::start(io, Role::Host, limits, opening, generation);
        Ok((session, hello, incoming))
    }

    /// The guest's side: waits on `io` for a host, without a deadline, and answers with `hello`.
    ///
    /// # Errors
    /// [`SessionError::TransportEnded`] when `io` reads 0 before a host spoke, and the other
    /// [`SessionError`]s that name the guest; `io` is dropped then.
    pub async fn accept<T>(
        io: T,
        hello: Hello,
        limits: SessionLimits,
    ) -> Result<(Session, Incoming), SessionError>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let hello = hello.prepare().map_err(SessionError::Hello)?;
        Self::accept_prepared(io, &hello, limits).await
    }

    /// As [`Self::accept`], with a hello that was made before.
    ///
    /// # Errors
    /// As [`Self::accept`].
    pub async fn accept_prepared<T>(
        mut io: T,
        hello: &PreparedHello,
        limits: SessionLimits,
    ) -> Result<(Session, Incoming), SessionError>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut input = FrameBuffer::new(GUEST_READ_BUFFER);
        let mut scanner = RunScanner::default();
        let preamble = loop {
            match scanner.scan(input.rest()) {
                Scan::Found(preamble, taken) => {
                    input.consume(taken);
                    break preamble;
                }
                Scan::Consumed(taken) => input.consume(taken),
            }
            match io
                .read(input.spare())
                .await
                .map_err(SessionError::Transport)?
            {
                0 => return Err(SessionError::TransportEnded),
                count => input.filled(count),
            }
        };
        let mut output = preamble.echo().to_vec();
        Frame::Hello(&hello.body).encode_into(&mut output);
        let ours = hello.generations;
        let theirs = (preamble.generation_min, preamble.generation_max);
        let Some(generation) = negotiate(ours, theirs) else {
            // The host learns the guest's range from the same answer and says so.
            let _ = tokio::time::timeout(limits.close_flush, io.write_all(&output)).await;
            return Err(SessionError::Generation { ours, theirs });
        };
        let opening = Opening {
            input,
            output,
            copies: Some(preamble.to_bytes()),
        };
        Ok(Self::start(io, Role::Guest, limits, opening, generation))
    }

    fn start<T>(
        io: T,
        role: Role,
        limits: SessionLimits,
        opening: Opening,
        generation: u32,
    ) -> (Session, Incoming)
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mux = Mutex::new(Mux::new(role, limits));
        let shared = Arc::new(Shared {
            mux,
            room: Notify::new(),
        });
        let (done_sender, done) = watch::channel(None);
        tokio::spawn(Driver::new(
            io,
            Arc::clone(&shared),
            limits,
            opening,
            done_sender,
        ));
        let anchor = Arc::new(Anchor { shared });
        let incoming = Incoming::new(Arc::clone(&anchor));
        let session = Session {
            anchor,
            done,
            generation,
            streams_max: limits.streams_max,
        };
        (session, incoming)
    }

    /// Opens a stream. It does not wait for the peer: a refusal shows as [`crate::StreamReset`]
    /// on the first read. Waits while many frames are queued.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(&self, kind: u8, payload: &[u8]) -> Result<Stream, OpenError> {
        if payload.len() > crate::frame::OPEN_PAYLOAD_MAX {
            return Err(OpenError::Payload { len: payload.len() });
        }
        let payload = Bytes::copy_from_slice(payload);
        let shared = &self.anchor.shared;
        loop {
            let room = shared.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            let opened = shared.with(|mux| match mux.ended() {
                Some(reason) => Err(OpenError::Ended(reason.clone())),
                None => Ok(mux.open(kind, &payload)),
            })?;
            match opened {
                Ok(id) => return Ok(Stream::new(Arc::clone(&self.anchor), id)),
                Err(OpenRefusal::QueueFull) => room.await,
                Err(OpenRefusal::Exhausted) => return Err(OpenError::Exhausted),
                Err(OpenRefusal::TooMany) => {
                    return Err(OpenError::TooMany {
                        max: self.streams_max,
                    });
                }
            }
        }
    }

    /// From now on the peer may have this many streams open. To be called before it is told so: one too many ends a session.
    pub fn peer_may_open(&self, streams: usize) {
        self.anchor.shared.with(|mux| mux.peer_may_open(streams));
    }

    /// From now on this side may have this many streams open, because the peer said that it takes them.
    pub fn may_open(&self, streams: usize) {
        self.anchor.shared.with(|mux| mux.may_open(streams));
    }

    /// Asks the peer's driver for a sign of life and returns the round trip.
    ///
    /// # Errors
    /// [`PingError`].
    pub async fn ping(&self, deadline: Duration) -> Result<Duration, PingError> {
        let begun = Instant::now();
        let shared = &self.anchor.shared;
        let (number, answer) = shared
            .with(|mux| match mux.ended() {
                Some(reason) => Err(PingError::Ended(reason.clone())),
                None => Ok(mux.ping()),
            })?
            .ok_or(PingError::Busy)?;
        let answer = tokio::time::timeout(deadline, answer).await;
        match answer {
            Ok(Ok(())) => Ok(begun.elapsed()),
            Ok(Err(_)) => Err(PingError::Ended(
                shared
                    .with(|mux| mux.ended().cloned())
                    .unwrap_or(CloseReason::Eof),
            )),
            Err(_) => {
                shared.with(|mux| mux.forget_ping(number));
                Err(PingError::Deadline { waited: deadline })
            }
        }
    }

    /// Ends the session: what was written before is sent as far as the peer takes it within
    /// `close_flush`, then a Close with `code` and `reason`. Streams fail from now on.
    pub fn close(&self, code: u16, reason: &str) {
        self.anchor
            .shared
            .with(|mux| mux.request_close(code, reason));
    }

    /// Waits until the session is over and its transport dropped; then always returns at once.
    pub async fn closed(&self) -> CloseReason {
        let mut done = self.done.clone();
        match done.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(reason)) => reason.clone(),
            // The driver stores a reason even when its runtime is shut down.
            _ => CloseReason::Eof,
        }
    }

    /// Why the session is over, `None` while it runs. Known before [`Session::closed`] returns.
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.anchor.shared.with(|mux| mux.ended().cloned())
    }

    /// The generation both sides agreed on.
    pub fn generation(&self) -> u32 {
        self.generation
    }
}
