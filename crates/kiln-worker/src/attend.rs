//! Commands of a server's jobs that somebody attends: whoever submitted the job holds the command's streams, through the controller, and the command
//! ends with him.
//!
//! ```text
//! kiln run -i -t -p --way--> controller --way--> [`door`]: one attender; connections to ports beside him
//! ```
//!
//! The protocol is `kiln_proto::kept`, on ways as they lead to a kept machine. Read next: [`door`] (the worker's side), [`client`] (the attender's).

pub mod client;
pub mod door;
mod inbox;

use std::time::Duration;

/// How long a machine that is ready waits for whoever attends its command.
pub const ATTEND_TIMEOUT: Duration = Duration::from_secs(60);
