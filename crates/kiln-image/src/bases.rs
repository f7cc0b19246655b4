//! Runtime bases by name: which image a `FROM` means, pinned to a digest.
//!
//! This room only names them. Building them is [`crate::bake`]'s work; pulling them into the shared head is the
//! worker's. Two files: `bases.lock.json`, written by the bake with the digests it made, and `bases.toml`,
//! written by the operator, which wins.

mod config;
mod file;

pub use config::{Base, BaseKind, Bases, PinnedImage, SHARED_PREFIX};
pub use file::BasesError;
pub(crate) use file::line_of;

#[cfg(test)]
mod tests;
