//! The wire between host and guest: frames, streams, orders and reports.

pub mod codec;
mod driver;
pub mod frame;
pub mod hello;
pub mod msg;
pub mod mux;
pub mod preamble;
pub mod session;
pub mod stream;

pub use codec::{Chunk, CodecError, next_msg, read_chunk, read_msg, write_chunk, write_msg};
pub use hello::Hello;
pub use mux::{ProtocolError, StreamReset};
pub use session::{CloseReason, OpenError, PingError, Session, SessionError, SessionLimits};
pub use stream::{Inbound, Incoming, SessionEnded, Stream, reset_of, session_end_of};
