//! The read buffer of a session, and its incremental decoder.

use super::{FRAME_SPAN_MAX, Frame, FrameError};

/// A fixed read buffer that hands out the frames in it: the incremental decoder.
///
/// Its size never changes, so no peer can make it grow.
pub struct FrameBuffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl std::fmt::Debug for FrameBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameBuffer")
            .field("capacity", &self.bytes.len())
            .field("filled", &(self.end - self.start))
            .finish()
    }
}

impl FrameBuffer {
    /// A buffer of `capacity` bytes, at least [`FRAME_SPAN_MAX`] so that every frame fits.
    pub fn new(capacity: usize) -> Self {
        let bytes = vec![0; capacity.max(FRAME_SPAN_MAX)].into_boxed_slice();
        Self {
            bytes,
            start: 0,
            end: 0,
        }
    }

    /// Room to read into; moves what is left to the front first. Never empty while
    /// [`Self::next_frame`] was called until it returned `Ok(None)` or an error.
    pub fn spare(&mut self) -> &mut [u8] {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.bytes.len() - self.end < FRAME_SPAN_MAX {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.bytes[self.end..]
    }

    /// Says that `count` bytes were read into [`Self::spare`]; more than fits counts as full.
    pub fn filled(&mut self, count: usize) {
        self.end = self.end.saturating_add(count).min(self.bytes.len());
    }

    /// Copies `bytes` in and returns how many fitted.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let spare = self.spare();
        let count = spare.len().min(bytes.len());
        spare[..count].copy_from_slice(&bytes[..count]);
        self.filled(count);
        count
    }

    /// Bytes read and not yet handed out.
    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Drops `count` bytes of [`Self::rest`], or all of it if it has fewer.
    pub fn consume(&mut self, count: usize) {
        self.start = self.start.saturating_add(count).min(self.end);
    }

    /// The next complete frame; `Ok(None)` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`]; the buffer stays where it is, so every later call gives the same error.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        match Frame::decode(&self.bytes[self.start..self.end])? {
            None => Ok(None),
            Some((frame, taken)) => {
                self.start += taken;
                Ok(Some(frame))
            }
        }
    }
}
