//! The task that owns a session's transport and moves bytes between it and the [`Mux`].
//!
//! One task for both directions: a write that cannot go on never stops reading, and the other way
//! round, because both are polled in turn. Outgoing frames are gathered into one buffer and
//! written in one call; incoming frames are decoded in place from one fixed buffer.

use crate::frame::{Frame, FrameBuffer};
use crate::mux::{BATCH_TARGET, CLOSE_NORMAL, CLOSE_PROTOCOL, Mux, ProtocolError};
use crate::preamble::{PREAMBLE_LEN, PREAMBLE_MAGIC, find};
use crate::session::{CloseReason, SessionLimits, Shared};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};

/// Rounds of writing and reading before other tasks get a turn.
const ROUNDS_MAX: usize = 16;

/// What the start of a session leaves for the driver.
pub(crate) struct Opening {
    /// Bytes read and not yet looked at.
    pub(crate) input: FrameBuffer,
    /// Bytes to write before any frame.
    pub(crate) output: Vec<u8>,
    /// The preamble whose further copies precede the first frame (guest).
    pub(crate) copies: Option<[u8; PREAMBLE_LEN]>,
}

/// The driver's future. It is ready when the session is over and the transport dropped.
pub(crate) struct Driver<T> {
    io: Option<T>,
    shared: Arc<Shared>,
    limits: SessionLimits,
    guest: bool,
    /// Bytes that came with the end of the handshake were not looked at yet.
    fresh: bool,
    input: FrameBuffer,
    output: Vec<u8>,
    written: usize,
    /// The transport takes no more bytes, but its last words may still be readable.
    write_broken: bool,
    copies: Option<[u8; PREAMBLE_LEN]>,
    /// Runs while output waits for the transport.
    stall: Option<Pin<Box<Sleep>>>,
    stalling: bool,
    closing: Option<Closing>,
    done: watch::Sender<Option<CloseReason>>,
}

/// The last phase: only writing, for a short time.
struct Closing {
    /// The Close frame, until it is queued.
    last_words: Option<(u16, String)>,
    deadline: Pin<Box<Sleep>>,
}

enum Round {
    Progress,
    Idle,
    End(CloseReason),
}

impl<T> Driver<T> {
    pub(crate) fn new(
        io: T,
        shared: Arc<Shared>,
        limits: SessionLimits,
        opening: Opening,
        done: watch::Sender<Option<CloseReason>>,
    ) -> Self {
        Self {
            io: Some(io),
            shared,
            limits,
            guest: opening.copies.is_some(),
            fresh: true,
            input: opening.input,
            output: opening.output,
            written: 0,
            write_broken: false,
            copies: opening.copies,
            stall: None,
            stalling: false,
            closing: None,
            done,
        }
    }

    /// Shows the multiplexer every complete frame of the input buffer.
    fn digest_input(&mut self) -> Result<(), CloseReason> {
        if let Some(copy) = self.copies {
            if !skip_copies(&mut self.input, &copy) {
                return Ok(());
            }
            self.copies = None;
        }
        let (input, guest) = (&mut self.input, self.guest);
        self.shared.with(|mux| {
            loop {
                match input.next_frame() {
                    Ok(Some(frame)) => mux.on_frame(frame)?,
                    Ok(None) => return Ok(()),
                    Err(error) => {
                        let restarted = guest && shows_preamble(input.rest());
                        let error = ProtocolError::Frame(error);
                        return Err(if restarted {
                            CloseReason::Restarted
                        } else {
                            error.into()
                        });
                    }
                }
            }
        })
    }

    /// Fills an empty output buffer; true if there is something to write.
    fn gather(&mut self, fill: impl FnOnce(&mut Mux, &mut Vec<u8>)) -> bool {
        if self.written == self.output.len() {
            self.output.clear();
            self.written = 0;
            self.shared.with(|mux| fill(mux, &mut self.output));
            self.shared.room.notify_waiters();
        }
        self.written < self.output.len()
    }

    /// Ends the session for all handles; then either the closing phase or the end.
    fn begin_end(&mut self, reason: &CloseReason) {
        self.shared.with(|mux| mux.end(reason.clone()));
        self.shared.room.notify_waiters();
        let last_words = match reason {
            CloseReason::Local { code, reason } => (*code, reason.clone()),
            CloseReason::Protocol(error) => (CLOSE_PROTOCOL, error.to_string()),
            _ => return,
        };
        if !self.write_broken {
            let deadline = Box::pin(tokio::time::sleep(self.limits.close_flush));
            self.closing = Some(Closing {
                last_words: Some(last_words),
                deadline,
            });
        }
    }

    /// Drops the transport, then tells those who wait for it.
    fn finish(&mut self) {
        self.io = None;
        let shared = &self.shared;
        self.done.send_if_modified(|done| {
            let first = done.is_none();
            if first {
                tracing::debug!(reason = ?shared.with(|mux| mux.ended().cloned()), "session over");
                *done = shared.with(|mux| mux.ended().cloned());
            }
            first
        });
    }
}

/// True if bytes that are no frame come from the middle of a new host's run. A guest in doubt
/// gives another name to the end of its session, nothing else.
fn shows_preamble(rest: &[u8]) -> bool {
    let near = &rest[..rest.len().min(2 * PREAMBLE_LEN)];
    find(near, &PREAMBLE_MAGIC).is_ok()
}

/// Skips further copies of the accepted preamble; true once something else follows.
fn skip_copies(input: &mut FrameBuffer, copy: &[u8; PREAMBLE_LEN]) -> bool {
    loop {
        let rest = input.rest();
        let compared = rest.len().min(PREAMBLE_LEN);
        if rest[..compared] != copy[..compared] {
            return true;
        }
        if compared < PREAMBLE_LEN {
            return false;
        }
        input.consume(PREAMBLE_LEN);
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    fn round(&mut self, cx: &mut Context<'_>) -> Round {
        if let Some((code, reason)) = self.shared.with(|mux| mux.attend(cx.waker())) {
            return Round::End(CloseReason::Local { code, reason });
        }
        if std::mem::take(&mut self.fresh)
            && let Err(reason) = self.digest_input()
        {
            return Round::End(reason);
        }
        let mut progress = false;
        if self.gather(|mux, output| mux.fill(output)) && !self.write_broken {
            match self.poll_output(cx) {
                Poll::Ready(Ok(())) => progress = true,
                Poll::Ready(Err(_)) => self.write_broken = true,
                Poll::Pending => {}
            }
        }
        match self.poll_input(cx) {
            Poll::Ready(Ok(())) => progress = true,
            Poll::Ready(Err(reason)) => return Round::End(reason),
            Poll::Pending => {}
        }
        if progress {
            return Round::Progress;
        }
        if self.poll_stall(cx).is_ready() {
            Round::End(CloseReason::Stalled)
        } else {
            Round::Idle
        }
    }

    /// Writes from the output buffer once.
    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(io) = &mut self.io else {
            return Poll::Pending;
        };
        let count = ready!(Pin::new(io).poll_write(cx, &self.output[self.written..]))?;
        if count == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.written += count;
        self.stalling = false;
        if self.written == self.output.len() && self.output.capacity() > 4 * BATCH_TARGET {
            self.output = Vec::new();
            self.written = 0;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once and hands on what came.
    fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CloseReason>> {
        let Some(io) = &mut self.io else {
            return Poll::Pending;
        };
        let mut buffer = ReadBuf::new(self.input.spare());
        let result = ready!(Pin::new(io).poll_read(cx, &mut buffer));
        let count = buffer.filled().len();
        Poll::Ready(match result {
            Ok(()) if count == 0 => Err(CloseReason::Eof),
            Ok(()) => {
                self.input.filled(count);
                self.digest_input()
            }
            Err(error) => Err(transport_end(&error)),
        })
    }

    /// Ready when output has waited for the whole stall deadline.
    fn poll_stall(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.written == self.output.len() {
            self.stalling = false;
            return Poll::Pending;
        }
        let deadline = self.limits.stall_deadline;
        let stall = self
            .stall
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(deadline)));
        if !self.stalling {
            self.stalling = true;
            stall.as_mut().reset(Instant::now() + deadline);
        }
        stall.as_mut().poll(cx)
    }

    /// The closing phase; ready when everything is out or the time is up.
    fn poll_closing(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let Some(closing) = &mut self.closing else {
                return Poll::Ready(());
            };
            if closing.deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            let mut last_words = closing.last_words.take();
            let more = self.gather(|mux, output| {
                mux.fill(output);
                if let (true, Some((code, reason))) = (output.is_empty(), &last_words) {
                    Frame::Close {
                        code: *code,
                        reason,
                    }
                    .encode_into(output);
                    last_words = None;
                }
            });
            if let Some(closing) = &mut self.closing {
                closing.last_words = last_words;
            }
            if !more {
                return Poll::Ready(());
            }
            if ready!(self.poll_output(cx)).is_err() {
                return Poll::Ready(());
            }
        }
    }
}

/// A lost connection is the end of the channel, however the system words it.
fn transport_end(error: &io::Error) -> CloseReason {
    match error.kind() {
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::NotConnected
        | io::ErrorKind::UnexpectedEof => CloseReason::Eof,
        kind => CloseReason::Transport { kind },
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Future for Driver<T> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        for _ in 0..ROUNDS_MAX {
            if this.closing.is_some() {
                ready!(this.poll_closing(cx));
                this.finish();
                return Poll::Ready(());
            }
            match this.round(cx) {
                Round::Progress => {}
                Round::Idle => return Poll::Pending,
                Round::End(reason) => {
                    this.begin_end(&reason);
                    if this.closing.is_none() {
                        this.finish();
                        return Poll::Ready(());
                    }
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<T> Drop for Driver<T> {
    /// Also when the runtime is shut down: nobody waits for a session without a driver.
    fn drop(&mut self) {
        let reason = CloseReason::Local {
            code: CLOSE_NORMAL,
            reason: "the runtime was shut down".to_owned(),
        };
        self.shared.with(|mux| mux.end(reason));
        self.shared.room.notify_waiters();
        self.finish();
    }
}
