//! A worker of a controller: asks for leases, keeps them alive, runs each to its end, and destroys what it may no longer run.
//!
//! The controller decides who runs what; here nothing is decided but how. Read next: [`daemon`] (the loops), [`fence`] (when a lease is over
//! without a word from anybody), [`job`] (one lease from source to finish), and `docs/design/control-plane.md` for the wire.

mod artifacts;
pub mod client;
pub mod clock;
mod commit_policy;
pub mod daemon;
mod ends;
mod far;
pub mod fence;
pub mod http;
pub mod identity;
pub mod idle;
pub mod job;
pub mod local;
pub mod mask;
pub mod own;
pub mod reconcile;
pub mod report;
mod source;
mod spans;
pub mod spool;
mod staying;
pub(crate) mod told;
pub mod witness;
