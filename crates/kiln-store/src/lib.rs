//! Where results live: the embedded OCI registry, the logs of jobs, the files they left.
//!
//! This room decides nothing about builds: it keeps what it is given, proves it is unchanged, and
//! lets only those read or write whom the wiring named. Read next: [`host`] (the interface of the worker
//! and the command line), [`registry`] (what is behind it).

pub mod artifacts;
pub mod bucket;
pub mod dial;
#[doc(hidden)]
pub mod fuzz;
pub mod host;
pub mod image;
pub mod load;
pub mod logs;
pub mod private_socket;
pub mod registry;
pub mod remote;

pub use bucket::{Bucket, BucketError};
pub use host::HostRegistry;
