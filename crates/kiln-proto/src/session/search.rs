//! The host's half of a session's start: runs out, echo and Hello in.

use super::{READ_BUFFER, RUN_PAUSE, RUN_PAUSE_MAX, SessionError};
use crate::driver::Opening;
use crate::frame::{Frame, FrameBuffer, FrameError};
use crate::hello::Hello;
use crate::mux::ProtocolError;
use crate::preamble::{ECHO_LEN, PREAMBLE_LEN, Preamble, find};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::Instant;

/// The host's search for echo and Hello. Its fields survive when the search is cancelled.
pub(super) struct EchoSearch {
    echo: [u8; ECHO_LEN],
    run: Vec<u8>,
    /// Bytes of `run` written in this round.
    sent: usize,
    input: FrameBuffer,
    pub(super) discarded: u64,
    discard_max: u64,
    pub(super) echoed: bool,
}

impl EchoSearch {
    pub(super) fn new(preamble: &Preamble, discard_max: u64) -> Self {
        Self {
            echo: preamble.echo(),
            run: preamble.run(),
            sent: 0,
            input: FrameBuffer::new(READ_BUFFER),
            discarded: 0,
            discard_max,
            echoed: false,
        }
    }

    pub(super) async fn run<T: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        io: &mut T,
    ) -> Result<Hello, SessionError> {
        let (mut reader, mut writer): (ReadHalf<&mut T>, WriteHalf<&mut T>) = tokio::io::split(io);
        let mut next_pause = RUN_PAUSE;
        let pause = tokio::time::sleep(Duration::ZERO);
        tokio::pin!(pause);
        loop {
            let paused = self.sent == self.run.len();
            tokio::select! {
                count = reader.read(self.input.spare()) => {
                    match count.map_err(SessionError::Transport)? {
                        0 => return Err(SessionError::TransportEnded),
                        count => self.input.filled(count),
                    }
                    if let Some(hello) = self.look()? {
                        return Ok(hello);
                    }
                }
                count = writer.write(&self.run[self.sent..]), if !paused => {
                    match count.map_err(SessionError::Transport)? {
                        0 => return Err(SessionError::TransportEnded),
                        count => self.sent += count,
                    }
                    if self.sent == self.run.len() {
                        pause.as_mut().reset(Instant::now() + next_pause);
                        next_pause = (next_pause * 2).min(RUN_PAUSE_MAX);
                    }
                }
                () = &mut pause, if paused && !self.echoed => self.sent = 0,
            }
        }
    }

    fn look(&mut self) -> Result<Option<Hello>, SessionError> {
        if !self.echoed {
            let stale = match find(self.input.rest(), &self.echo) {
                Ok(at) => {
                    self.echoed = true;
                    self.input.consume(at + self.echo.len());
                    at
                }
                Err(useless) => {
                    self.input.consume(useless);
                    useless
                }
            };
            self.discarded += stale as u64;
            if self.discarded > self.discard_max {
                return Err(SessionError::NoEcho {
                    max: self.discard_max,
                });
            }
        }
        if !self.echoed {
            return Ok(None);
        }
        let malformed = |error: FrameError| SessionError::Protocol(ProtocolError::Frame(error));
        match self.input.next_frame().map_err(malformed)? {
            None => Ok(None),
            Some(Frame::Hello(body)) => Hello::parse(body)
                .map(Some)
                .map_err(|error| SessionError::Protocol(ProtocolError::Hello(error))),
            Some(_) => Err(SessionError::Protocol(ProtocolError::NoHello)),
        }
    }

    /// What the driver goes on with: the unread bytes, and the rest of a copy that was begun.
    pub(super) fn opening(self) -> Opening {
        let whole = self.sent.next_multiple_of(PREAMBLE_LEN);
        let output = self.run[self.sent..whole].to_vec();
        Opening {
            input: self.input,
            output,
            copies: None,
        }
    }
}
