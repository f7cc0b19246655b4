//! A bound on what an archive says beside the content of its files: heads, long names, extensions, content of what is no file.
//!
//! The tar reader keeps long names and extensions in memory whole, and skips what nobody reads byte by byte. Both are the archive's
//! to choose, and a compressed one chooses terabytes in a megabyte. So whoever goes through an archive says in turn: now its next
//! head is read ([`Gauge::head`]), now a file's content that is counted elsewhere ([`Gauge::content`]).

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

/// Most bytes between the content of two files.
pub const HEAD_BYTES_MAX: u64 = 1 << 20;
/// Most bytes beside contents in one archive.
const ALL_HEADS_BYTES_MAX: u64 = 2 << 30;

/// A reader that stops where a head is too long.
#[derive(Debug)]
pub struct Gauged<R> {
    inner: R,
    gauge: Gauge,
}

/// Says what is read next.
#[derive(Clone, Debug)]
pub struct Gauge {
    /// Bytes that the head at hand may still have; none while content is read.
    left: Rc<Cell<Option<u64>>>,
    all: Rc<Cell<u64>>,
}

impl<R: Read> Gauged<R> {
    /// A reader that reads a head first, and the gauge that tells it what follows.
    pub fn new(inner: R) -> (Self, Gauge) {
        let gauge = Gauge {
            left: Rc::new(Cell::new(Some(HEAD_BYTES_MAX))),
            all: Rc::new(Cell::new(ALL_HEADS_BYTES_MAX)),
        };
        let reader = Self {
            inner,
            gauge: gauge.clone(),
        };
        (reader, gauge)
    }
}

impl Gauge {
    /// A head is read next, and what nobody read of the entry before it.
    pub fn head(&self) {
        self.left.set(Some(HEAD_BYTES_MAX.min(self.all.get())));
    }

    /// Content is read next, which its reader counts.
    pub fn content(&self) {
        self.left.set(None);
    }
}

impl<R: Read> Read for Gauged<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(left) = self.gauge.left.get() else {
            return self.inner.read(buffer);
        };
        if left == 0 && !buffer.is_empty() {
            let message = "the head of an entry, or what is no file's content, is too long";
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        let most = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let got = self.inner.read(&mut buffer[..most])?;
        self.gauge.left.set(Some(left - got as u64));
        self.gauge
            .all
            .set(self.gauge.all.get().saturating_sub(got as u64));
        Ok(got)
    }
}
