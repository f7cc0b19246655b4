//! The source tree of an image build: which files belong to it, its digest, and the tar stream that carries it.
//!
//! Everything is read once, never followed through a symbolic link, and checked for change while it is read.
//! [`unpack`] is the way back: an uploaded archive becomes a folder of this host. Not here: sending (the worker) and unpacking in a machine (the guest).
//! Read next: [`ignore`] (what stays behind), [`walk`] (order and refusals), [`tree_digest`] (the canonical form).

mod error;
mod gauge;
mod ignore;
mod pack;
mod patterns;
mod read;
mod tree_digest;
mod unpack;
mod walk;

pub use error::{ContextError, Refused};
pub use gauge::{Gauge, Gauged, HEAD_BYTES_MAX};
pub use ignore::{IgnoreSource, Ignores};
pub use pack::{Packed, digest, pack};
pub use patterns::{PatternError, Patterns};
pub use read::open_beneath;
pub(crate) use read::{open_inside, read_small};
pub use tree_digest::{EntryKind, TreeDigest};
pub use unpack::{UnpackError, Unpacked, unpack, unpack_copy};
pub use walk::{Entry, Limits, Tree, scan};
