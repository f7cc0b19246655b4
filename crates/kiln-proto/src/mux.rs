//! The multiplexer: what frames mean. A state machine without I/O, clock or tasks.
//!
//! The driver (`driver.rs`) shows it every frame that arrived (`Mux::on_frame`) and asks it for
//! bytes to send (`Mux::fill`); stream handles (`stream.rs`) read and write through it. It decides:
//!
//! - **Credit.** Each direction of a stream starts with [`WINDOW`] bytes. The reader gives bytes
//!   back only when the application consumed them, so a stuck reader stops its own sender and
//!   nobody else, and a stream never buffers more than a window.
//! - **Fairness.** Streams with something to send take turns, one frame each.
//! - **Order.** Any frame that an honest peer cannot send ends the session with a
//!   [`ProtocolError`]. Frames that merely crossed the end of their stream are ignored.
//!
//! Whatever the peer does, one session holds at most: `streams_max` streams (or what `peer_may_open` said) in each direction
//! with a window in and [`SEND_BUFFER`] out each, `control_max` + [`REFUSALS_MAX`] queued control
//! frames, [`PINGS_MAX`] pongs.

use crate::frame::{DATA_LEN_MAX, Frame, put_data};
use crate::session::{CloseReason, SessionLimits};
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};
use std::task::Waker;
use thiserror::Error;
use tokio::sync::oneshot;

mod handles;
mod violation;
pub use violation::ProtocolError;
#[cfg(test)]
mod tests;

/// Credit each direction of a new stream starts with, in bytes. Part of the wire: both sides
/// know it, and more outstanding credit than this is a protocol error.
pub const WINDOW: u32 = 256 * 1024;
/// Consumed bytes are given back when this many have gathered.
pub const CREDIT_BATCH: u32 = WINDOW / 4;
/// Most bytes written to a stream and not yet handed to the transport.
pub const SEND_BUFFER: usize = 128 * 1024;
/// Bytes of queued frames the driver gathers for one write; one frame may go beyond it.
pub const BATCH_TARGET: usize = 128 * 1024;
/// Pings under way at once in one direction; older unanswered pongs are dropped.
pub const PINGS_MAX: usize = 16;
/// Answers queued beyond `control_max` for a peer that opens streams and does not read; more is
/// a flood.
pub const REFUSALS_MAX: usize = 4096;

/// Reset code: the handle was dropped before both directions ended.
pub const RESET_DROPPED: u16 = 1;
/// Reset code: nobody takes streams of this kind, or too many wait.
pub const RESET_REFUSED: u16 = 2;
/// First reset and close code that belongs to the messages above this layer.
pub const CODE_FIRST_FREE: u16 = 16;
/// Close code: an ordinary end.
pub const CLOSE_NORMAL: u16 = 0;
/// Close code: the other side broke the protocol.
pub const CLOSE_PROTOCOL: u16 = 1;

/// Which end of the channel this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Opens odd streams.
    Host,
    /// Opens even streams.
    Guest,
}

/// The peer ended a stream; inside the `io::Error` of reads and writes.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the stream was reset with code {code}: {reason:?}")]
pub struct StreamReset {
    /// Why, as a number.
    pub code: u16,
    /// Why, in the peer's words: untrusted, at most [`crate::frame::REASON_LEN_MAX`] bytes.
    pub reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SendEnd {
    Open,
    Queued,
    Sent,
}

/// One stream, as this side sees it.
#[derive(Debug)]
pub(crate) struct Entry {
    inbound: bool,
    /// A `Stream` refers to it, or it waits in the backlog.
    handle: bool,
    /// It counts as open on the wire.
    counted: bool,
    /// It is in `Mux::ready`.
    ready: bool,
    recv: VecDeque<u8>,
    /// Bytes the peer may still send.
    recv_credit: u32,
    /// Bytes consumed and not given back.
    consumed: u32,
    recv_eof: bool,
    read_waker: Option<Waker>,
    send: VecDeque<u8>,
    /// Bytes the application may still write.
    send_credit: u32,
    send_end: SendEnd,
    write_waker: Option<Waker>,
    reset: Option<StreamReset>,
}

impl Entry {
    fn new(inbound: bool) -> Self {
        Self {
            inbound,
            handle: true,
            counted: true,
            ready: false,
            recv: VecDeque::new(),
            recv_credit: WINDOW,
            consumed: 0,
            recv_eof: false,
            read_waker: None,
            send: VecDeque::new(),
            send_credit: WINDOW,
            send_end: SendEnd::Open,
            write_waker: None,
            reset: None,
        }
    }

    /// No frame of ours will follow, and none of the peer's may.
    fn over(&self) -> bool {
        self.reset.is_some() || (self.recv_eof && self.send_end == SendEnd::Sent)
    }
}

/// A frame that waits for the transport and belongs to no stream's turn.
#[derive(Debug)]
enum Control {
    Open {
        stream: u32,
        kind: u8,
        payload: Bytes,
    },
    Reset {
        stream: u32,
        code: u16,
        reason: String,
    },
    Ping(u64),
}

/// A stream the peer opened and nobody took yet.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) stream: u32,
    pub(crate) kind: u8,
    pub(crate) payload: Bytes,
}

/// Why a stream could not be opened right now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum OpenRefusal {
    QueueFull,
    TooMany,
    Exhausted,
}

/// The state of one session.
#[derive(Debug)]
pub(crate) struct Mux {
    role: Role,
    limits: SessionLimits,
    /// Streams that the peer, and that this side, may have open.
    inbound_max: usize,
    outbound_max: usize,
    streams: BTreeMap<u32, Entry>,
    /// The next id of ours; 0 when they are used up.
    next_local: u32,
    last_remote: u32,
    inbound_open: usize,
    inbound_handles: usize,
    outbound_open: usize,
    backlog: VecDeque<Waiting>,
    incoming_waker: Option<Waker>,
    incoming_gone: bool,
    control: VecDeque<Control>,
    pongs: VecDeque<u64>,
    ready: VecDeque<u32>,
    pings: BTreeMap<u64, oneshot::Sender<()>>,
    last_ping: u64,
    ended: Option<CloseReason>,
    close_request: Option<(u16, String)>,
    driver_waker: Option<Waker>,
    /// Wakers to be called once the lock is free.
    wakes: Vec<Waker>,
}

impl Mux {
    pub(crate) fn new(role: Role, limits: SessionLimits) -> Self {
        Self {
            role,
            limits,
            inbound_max: limits.streams_max,
            outbound_max: limits.streams_max,
            streams: BTreeMap::new(),
            next_local: if role == Role::Host { 1 } else { 2 },
            last_remote: 0,
            inbound_open: 0,
            inbound_handles: 0,
            outbound_open: 0,
            backlog: VecDeque::new(),
            incoming_waker: None,
            incoming_gone: false,
            control: VecDeque::new(),
            pongs: VecDeque::new(),
            ready: VecDeque::new(),
            pings: BTreeMap::new(),
            last_ping: 0,
            ended: None,
            close_request: None,
            driver_waker: None,
            wakes: Vec::new(),
        }
    }

    // ---- the driver's side -------------------------------------------------------------

    /// Takes one frame from the peer. `Err` ends the session.
    pub(crate) fn on_frame(&mut self, frame: Frame<'_>) -> Result<(), CloseReason> {
        match frame {
            Frame::Hello(_) => Err(ProtocolError::SecondHello.into()),
            Frame::Open {
                stream,
                kind,
                payload,
            } => Ok(self.on_open(stream, kind, payload)?),
            Frame::Data { stream, bytes } => Ok(self.on_data(stream, bytes)?),
            Frame::Credit { stream, bytes } => Ok(self.on_credit(stream, bytes)?),
            Frame::Eof { stream } => Ok(self.on_eof(stream)?),
            Frame::Reset {
                stream,
                code,
                reason,
            } => Ok(self.on_reset(stream, code, reason)?),
            Frame::Ping(number) => {
                if self.pongs.len() == PINGS_MAX {
                    self.pongs.pop_front();
                }
                self.pongs.push_back(number);
                Ok(())
            }
            Frame::Pong(number) if number > self.last_ping => {
                Err(ProtocolError::Pong { number }.into())
            }
            Frame::Pong(number) => {
                if let Some(waiter) = self.pings.remove(&number) {
                    let _ = waiter.send(());
                }
                Ok(())
            }
            Frame::Close { code, reason } => Err(CloseReason::PeerClosed {
                code,
                reason: reason.to_owned(),
            }),
        }
    }

    /// Lets the peer open this many, never fewer than before: it may have been told already.
    pub(crate) fn peer_may_open(&mut self, streams: usize) {
        self.inbound_max = self.inbound_max.max(streams);
    }

    /// Opens this many, as the peer agreed to.
    pub(crate) fn may_open(&mut self, streams: usize) {
        self.outbound_max = self.outbound_max.max(streams);
    }

    fn on_open(&mut self, stream: u32, kind: u8, payload: &[u8]) -> Result<(), ProtocolError> {
        if self.is_local(stream) || stream <= self.last_remote {
            return Err(ProtocolError::StreamId { stream });
        }
        let max = self.inbound_max;
        if self.inbound_open >= max {
            return Err(ProtocolError::TooManyStreams { stream, max });
        }
        self.last_remote = stream;
        if self.control.len() + self.ready.len() >= self.limits.control_max + REFUSALS_MAX {
            return Err(ProtocolError::Flood);
        }
        let full = self.backlog.len() >= self.limits.accept_backlog || self.inbound_handles >= max;
        if self.incoming_gone || full {
            let reason = if full {
                "too many streams wait"
            } else {
                "no streams are taken"
            };
            self.control.push_back(Control::Reset {
                stream,
                code: RESET_REFUSED,
                reason: reason.to_owned(),
            });
            return Ok(());
        }
        self.streams.insert(stream, Entry::new(true));
        self.inbound_open += 1;
        self.inbound_handles += 1;
        let payload = Bytes::copy_from_slice(payload);
        self.backlog.push_back(Waiting {
            stream,
            kind,
            payload,
        });
        self.wakes.extend(self.incoming_waker.take());
        Ok(())
    }

    fn on_data(&mut self, stream: u32, bytes: &[u8]) -> Result<(), ProtocolError> {
        let Some(entry) = self.live(stream)? else {
            return Ok(());
        };
        if entry.recv_eof || entry.reset.is_some() {
            return Err(ProtocolError::AfterEnd { stream });
        }
        let (len, credit) = (bytes.len(), entry.recv_credit);
        if len > credit as usize {
            return Err(ProtocolError::CreditExceeded {
                stream,
                len,
                credit,
            });
        }
        entry.recv_credit -= len as u32;
        if entry.handle {
            entry.recv.extend(bytes);
            let waker = entry.read_waker.take();
            self.wakes.extend(waker);
        }
        Ok(())
    }

    fn on_credit(&mut self, stream: u32, bytes: u32) -> Result<(), ProtocolError> {
        let Some(entry) = self.live(stream)? else {
            return Ok(());
        };
        // Bytes in `send` were taken from the credit and never reached the peer.
        let outstanding = u64::from(entry.send_credit) + entry.send.len() as u64;
        if outstanding + u64::from(bytes) > u64::from(WINDOW) {
            return Err(ProtocolError::CreditOverflow { stream });
        }
        entry.send_credit += bytes;
        let waker = entry.write_waker.take();
        self.wakes.extend(waker);
        Ok(())
    }

    fn on_eof(&mut self, stream: u32) -> Result<(), ProtocolError> {
        let Some(entry) = self.live(stream)? else {
            return Ok(());
        };
        if entry.recv_eof || entry.reset.is_some() {
            return Err(ProtocolError::AfterEnd { stream });
        }
        entry.recv_eof = true;
        let waker = entry.read_waker.take();
        self.wakes.extend(waker);
        self.settle(stream);
        Ok(())
    }

    fn on_reset(&mut self, stream: u32, code: u16, reason: &str) -> Result<(), ProtocolError> {
        let Some(entry) = self.live(stream)? else {
            return Ok(());
        };
        if entry.reset.is_some() {
            return Err(ProtocolError::AfterEnd { stream });
        }
        entry.reset = Some(StreamReset {
            code,
            reason: reason.to_owned(),
        });
        entry.send = VecDeque::new();
        let (reader, writer) = (entry.read_waker.take(), entry.write_waker.take());
        self.wakes.extend(reader);
        self.wakes.extend(writer);
        self.settle(stream);
        Ok(())
    }

    fn is_local(&self, stream: u32) -> bool {
        (stream % 2 == 1) == (self.role == Role::Host)
    }

    /// The stream a frame is for; `None` if it is already gone here.
    fn live(&mut self, stream: u32) -> Result<Option<&mut Entry>, ProtocolError> {
        let opened = if self.is_local(stream) {
            self.next_local == 0 || stream < self.next_local
        } else {
            stream <= self.last_remote
        };
        if !opened {
            return Err(ProtocolError::UnknownStream { stream });
        }
        Ok(self.streams.get_mut(&stream))
    }

    /// Brings counts and table in line after a stream may have ended.
    fn settle(&mut self, stream: u32) {
        let Some(entry) = self.streams.get_mut(&stream) else {
            return;
        };
        if !entry.over() {
            return;
        }
        if entry.counted {
            entry.counted = false;
            if entry.inbound {
                self.inbound_open -= 1;
            } else {
                self.outbound_open -= 1;
            }
        }
        if !entry.handle {
            self.streams.remove(&stream);
        }
    }

    /// Appends frames to `out` until it holds about [`BATCH_TARGET`] bytes.
    pub(crate) fn fill(&mut self, out: &mut Vec<u8>) {
        while out.len() < BATCH_TARGET {
            if let Some(number) = self.pongs.pop_front() {
                Frame::Pong(number).encode_into(out);
            } else if let Some(control) = self.control.pop_front() {
                match &control {
                    Control::Open {
                        stream,
                        kind,
                        payload,
                    } => {
                        Frame::Open {
                            stream: *stream,
                            kind: *kind,
                            payload,
                        }
                        .encode_into(out);
                    }
                    Control::Reset {
                        stream,
                        code,
                        reason,
                    } => {
                        Frame::Reset {
                            stream: *stream,
                            code: *code,
                            reason,
                        }
                        .encode_into(out);
                    }
                    Control::Ping(number) => Frame::Ping(*number).encode_into(out),
                }
            } else if let Some(stream) = self.ready.pop_front() {
                self.fill_turn(stream, out);
            } else {
                return;
            }
        }
    }

    /// One stream's turn: its credit, one Data frame, its end.
    fn fill_turn(&mut self, stream: u32, out: &mut Vec<u8>) {
        let Some(entry) = self.streams.get_mut(&stream) else {
            return;
        };
        entry.ready = false;
        if entry.reset.is_some() {
            return;
        }
        if entry.consumed >= CREDIT_BATCH && !entry.recv_eof {
            Frame::Credit {
                stream,
                bytes: entry.consumed,
            }
            .encode_into(out);
            entry.recv_credit += entry.consumed;
            entry.consumed = 0;
        }
        let len = entry.send.len().min(DATA_LEN_MAX);
        if len > 0 {
            let (head, tail) = entry.send.as_slices();
            let head = &head[..head.len().min(len)];
            put_data(out, stream, head, &tail[..len - head.len()]);
            entry.send.drain(..len);
        }
        if !entry.send.is_empty() {
            entry.ready = true;
            self.ready.push_back(stream);
        } else if entry.send_end == SendEnd::Queued {
            Frame::Eof { stream }.encode_into(out);
            entry.send_end = SendEnd::Sent;
            if !entry.handle && !entry.recv_eof {
                // Dropped after its shutdown: nobody will read what the peer still sends.
                let reset = StreamReset {
                    code: RESET_DROPPED,
                    reason: String::new(),
                };
                Frame::Reset {
                    stream,
                    code: reset.code,
                    reason: "",
                }
                .encode_into(out);
                entry.reset = Some(reset);
            }
        }
        let waker = entry.write_waker.take();
        self.wakes.extend(waker);
        self.settle(stream);
    }

    /// Ends the session for all handles. The first reason stays.
    pub(crate) fn end(&mut self, reason: CloseReason) {
        if self.ended.is_some() {
            return;
        }
        let local = matches!(reason, CloseReason::Local { .. });
        self.ended = Some(reason);
        self.pings.clear();
        if !local {
            // After a local close the driver still sends what was written before it.
            self.control = VecDeque::new();
            self.ready = VecDeque::new();
        }
        self.pongs.clear();
        self.wakes.extend(self.incoming_waker.take());
        for entry in self.streams.values_mut() {
            self.wakes.extend(entry.read_waker.take());
            self.wakes.extend(entry.write_waker.take());
            if !local {
                entry.send = VecDeque::new();
            }
        }
    }

    /// Remembers how to wake the driver and hands it a close request, if there is one.
    pub(crate) fn attend(&mut self, waker: &Waker) -> Option<(u16, String)> {
        match &mut self.driver_waker {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        self.close_request.take()
    }

    /// Wakers to be called after the lock was released.
    pub(crate) fn take_wakes(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.wakes)
    }
}

/// Why a read or write on a stream cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StreamFault {
    Reset(StreamReset),
    Ended(CloseReason),
    AfterShutdown,
}
