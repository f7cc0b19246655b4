//! Sessions over in-memory and socket transports: honest pairs, hostile peers, restarts.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod hostile;
mod peer;
mod relay;
mod restart;
mod sessions;
