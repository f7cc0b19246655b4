//! The wire between host and guest: frames, streams, orders and reports; and [`fleet`], what controller and worker say to each other;
//! and [`kept`], what is said to whoever keeps a machine.
//!
//! Host and guest use the same code over one duplex byte stream per machine. It knows nothing of
//! virtual machines, jobs or files; who opens the transport and who obeys the messages is
//! elsewhere. Read next: [`session`] (start and end), [`stream`] (what one works with), [`msg`]
//! (what is said), then [`mux`] and [`preamble`] for the rules underneath.

pub mod codec;
mod driver;
pub mod fleet;
pub mod frame;
pub mod hello;
pub mod kept;
pub mod msg;
pub mod mux;
pub mod preamble;
pub mod relay;
pub mod session;
pub mod stream;

pub use codec::{Chunk, CodecError, next_msg, read_chunk, read_msg, write_chunk, write_msg};
pub use hello::Hello;
pub use mux::{ProtocolError, StreamReset};
pub use session::{CloseReason, OpenError, PingError, Session, SessionError, SessionLimits};
pub use stream::{Inbound, Incoming, SessionEnded, Stream, reset_of, session_end_of};
