//! The handles' side of the multiplexer: what `Session`, `Incoming` and `Stream` do to it.

use super::{
    CREDIT_BATCH, Control, Entry, Mux, OpenRefusal, PINGS_MAX, RESET_DROPPED, RESET_REFUSED,
    SEND_BUFFER, SendEnd, StreamFault, StreamReset, Waiting,
};
use crate::frame::clip_reason;
use crate::session::CloseReason;
use bytes::Bytes;
use std::collections::VecDeque;
use std::task::Waker;
use tokio::sync::oneshot;

impl Mux {
    pub(crate) fn ended(&self) -> Option<&CloseReason> {
        self.ended.as_ref()
    }

    pub(crate) fn open(&mut self, kind: u8, payload: &Bytes) -> Result<u32, OpenRefusal> {
        if self.outbound_open >= self.outbound_max {
            return Err(OpenRefusal::TooMany);
        }
        if self.next_local == 0 {
            return Err(OpenRefusal::Exhausted);
        }
        if self.control.len() >= self.limits.control_max {
            return Err(OpenRefusal::QueueFull);
        }
        let stream = self.next_local;
        self.next_local = stream.checked_add(2).unwrap_or(0);
        self.streams.insert(stream, Entry::new(false));
        self.outbound_open += 1;
        self.control.push_back(Control::Open {
            stream,
            kind,
            payload: payload.clone(),
        });
        self.wake_driver();
        Ok(stream)
    }

    /// Queues a ping; `None` if too many are unanswered.
    pub(crate) fn ping(&mut self) -> Option<(u64, oneshot::Receiver<()>)> {
        if self.pings.len() >= PINGS_MAX || self.control.len() >= self.limits.control_max {
            return None;
        }
        self.last_ping += 1;
        let (sender, receiver) = oneshot::channel();
        self.pings.insert(self.last_ping, sender);
        self.control.push_back(Control::Ping(self.last_ping));
        self.wake_driver();
        Some((self.last_ping, receiver))
    }

    pub(crate) fn forget_ping(&mut self, number: u64) {
        self.pings.remove(&number);
    }

    pub(crate) fn request_close(&mut self, code: u16, reason: &str) {
        if self.ended.is_none() && self.close_request.is_none() {
            self.close_request = Some((code, clip_reason(reason).to_owned()));
            self.wake_driver();
        }
    }

    /// The next stream the peer opened.
    pub(crate) fn take_waiting(&mut self, waker: &Waker) -> Option<Waiting> {
        let waiting = self.backlog.pop_front();
        if waiting.is_none() {
            self.incoming_waker = Some(waker.clone());
        }
        waiting
    }

    /// Nobody takes streams any more: refuses those that wait and all that will come.
    pub(crate) fn refuse_incoming(&mut self) {
        self.incoming_gone = true;
        for waiting in std::mem::take(&mut self.backlog) {
            self.abandon(
                waiting.stream,
                Some((RESET_REFUSED, "no streams are taken")),
            );
        }
    }

    /// Copies received bytes out. `Ok(None)`: nothing there yet. `Ok(Some(0))`: the end.
    pub(crate) fn read(
        &mut self,
        stream: u32,
        waker: &Waker,
        most: usize,
        mut sink: impl FnMut(&[u8]),
    ) -> Result<Option<usize>, StreamFault> {
        let Some(entry) = self.streams.get_mut(&stream) else {
            return Err(self.fault(None));
        };
        let count = entry.recv.len().min(most);
        if count > 0 {
            let (head, tail) = entry.recv.as_slices();
            let head = &head[..head.len().min(count)];
            sink(head);
            sink(&tail[..count - head.len()]);
            entry.recv.drain(..count);
            entry.consumed += count as u32;
            if entry.consumed >= CREDIT_BATCH && !entry.recv_eof {
                self.schedule(stream);
            }
            return Ok(Some(count));
        }
        if entry.recv_eof || most == 0 {
            return Ok(Some(0));
        }
        if let Some(reset) = entry.reset.clone() {
            return Err(self.fault(Some(reset)));
        }
        if self.ended.is_some() {
            return Err(self.fault(None));
        }
        entry.read_waker = Some(waker.clone());
        Ok(None)
    }

    /// Queues bytes of `parts` and says how many fitted; `Ok(None)`: no room, wait.
    pub(crate) fn write<'a>(
        &mut self,
        stream: u32,
        waker: &Waker,
        parts: impl Iterator<Item = &'a [u8]>,
    ) -> Result<Option<usize>, StreamFault> {
        let entry = self.writable(stream)?;
        if entry.send_end != SendEnd::Open {
            return Err(StreamFault::AfterShutdown);
        }
        let room = (SEND_BUFFER - entry.send.len()).min(entry.send_credit as usize);
        let mut left = room;
        let mut wanted = false;
        for part in parts {
            let taken = part.len().min(left);
            wanted |= !part.is_empty();
            entry.send.extend(&part[..taken]);
            left -= taken;
        }
        let count = room - left;
        entry.send_credit -= count as u32;
        if count > 0 {
            self.schedule(stream);
            return Ok(Some(count));
        }
        if !wanted {
            return Ok(Some(0));
        }
        entry.write_waker = Some(waker.clone());
        Ok(None)
    }

    /// True once all written bytes were handed to the transport; else wakes later.
    pub(crate) fn flushed(&mut self, stream: u32, waker: &Waker) -> Result<bool, StreamFault> {
        let entry = self.writable(stream)?;
        if entry.send.is_empty() {
            return Ok(true);
        }
        entry.write_waker = Some(waker.clone());
        Ok(false)
    }

    /// Queues the Eof; true once it was handed to the transport, else wakes later.
    pub(crate) fn shutdown(&mut self, stream: u32, waker: &Waker) -> Result<bool, StreamFault> {
        if self
            .streams
            .get(&stream)
            .is_some_and(|entry| entry.send_end == SendEnd::Sent)
        {
            return Ok(true);
        }
        let entry = self.writable(stream)?;
        entry.write_waker = Some(waker.clone());
        if entry.send_end == SendEnd::Open {
            entry.send_end = SendEnd::Queued;
            self.schedule(stream);
        }
        Ok(false)
    }

    /// The handle is gone. Without `reset` the rules of a dropped handle hold.
    pub(crate) fn abandon(&mut self, stream: u32, reset: Option<(u16, &str)>) {
        let Some(entry) = self.streams.get_mut(&stream) else {
            return;
        };
        if std::mem::take(&mut entry.handle) && entry.inbound {
            self.inbound_handles -= 1;
        }
        entry.recv = VecDeque::new();
        let lingers = reset.is_none() && entry.send_end == SendEnd::Queued;
        if !entry.over() && !lingers {
            let (code, reason) = reset.unwrap_or((RESET_DROPPED, ""));
            let reset = StreamReset {
                code,
                reason: clip_reason(reason).to_owned(),
            };
            entry.reset = Some(reset.clone());
            if self.ended.is_none() {
                let StreamReset { code, reason } = reset;
                self.control.push_back(Control::Reset {
                    stream,
                    code,
                    reason,
                });
                self.wake_driver();
            }
        }
        self.settle(stream);
    }

    fn writable(&mut self, stream: u32) -> Result<&mut Entry, StreamFault> {
        let ended = self.ended.clone();
        match self.streams.get_mut(&stream) {
            Some(Entry {
                reset: Some(reset), ..
            }) => Err(StreamFault::Reset(reset.clone())),
            Some(entry) if ended.is_none() => Ok(entry),
            _ => Err(StreamFault::Ended(ended.unwrap_or(CloseReason::Eof))),
        }
    }

    fn fault(&self, reset: Option<StreamReset>) -> StreamFault {
        match reset {
            Some(reset) => StreamFault::Reset(reset),
            None => StreamFault::Ended(self.ended.clone().unwrap_or(CloseReason::Eof)),
        }
    }

    fn schedule(&mut self, stream: u32) {
        let Some(entry) = self.streams.get_mut(&stream) else {
            return;
        };
        if !entry.ready && entry.reset.is_none() {
            entry.ready = true;
            self.ready.push_back(stream);
            self.wake_driver();
        }
    }

    fn wake_driver(&mut self) {
        self.wakes.extend(self.driver_waker.take());
    }
}
