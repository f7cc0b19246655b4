//! The ways to break the protocol.

use crate::frame::FrameError;
use crate::hello::HelloError;
use thiserror::Error;

/// What an honest peer never does. On the host this is a guest fault.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ProtocolError {
    /// The bytes are not a frame.
    #[error("malformed frame")]
    Frame(#[source] FrameError),
    /// The first frame was not a Hello.
    #[error("the first frame is not a hello")]
    NoHello,
    /// A Hello with bad contents.
    #[error("malformed hello")]
    Hello(#[source] HelloError),
    /// A second Hello.
    #[error("a hello in the middle of a session")]
    SecondHello,
    /// An Open with an id that is not the peer's to choose, or not rising.
    #[error("the peer opened stream {stream}, which it may not choose")]
    StreamId {
        /// The id.
        stream: u32,
    },
    /// More streams open at once than agreed.
    #[error("the peer opened stream {stream} beyond {max} open streams")]
    TooManyStreams {
        /// The id of the stream too many.
        stream: u32,
        /// The bound.
        max: usize,
    },
    /// A frame for a stream that was never opened.
    #[error("a frame for stream {stream}, which was never opened")]
    UnknownStream {
        /// The id.
        stream: u32,
    },
    /// Data without credit for it.
    #[error("{len} bytes on stream {stream} with credit for {credit}")]
    CreditExceeded {
        /// The id.
        stream: u32,
        /// Bytes that came.
        len: usize,
        /// Bytes allowed.
        credit: u32,
    },
    /// More credit given than bytes taken.
    #[error("credit on stream {stream} beyond its window")]
    CreditOverflow {
        /// The id.
        stream: u32,
    },
    /// Data or a second Eof after Eof or Reset.
    #[error("bytes on stream {stream} after its end")]
    AfterEnd {
        /// The id.
        stream: u32,
    },
    /// Streams opened faster than their ends can be sent.
    #[error("the peer opens streams and does not read the answers")]
    Flood,
    /// A Pong that answers no Ping.
    #[error("a pong for ping {number}, which was never sent")]
    Pong {
        /// The number.
        number: u64,
    },
}
