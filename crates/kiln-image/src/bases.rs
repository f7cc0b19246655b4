//! Runtime bases by name: which image a `FROM` means, pinned to a digest.
//!
//! This room only names them. Building them is [`crate::bake`]'s work; pulling them into the shared head is the
//! worker's. Three files: the generated one, written by the bake with the digests it made; `bases.toml`, written by
//! the operator, which wins; and `bases-pulled.json`, which says where images of other registries lie in kiln's own.

mod config;
mod file;
mod pulled;
mod runtime;

pub use config::{Base, BaseKind, Bases, PinnedImage, SHARED_PREFIX};
pub use file::BasesError;
pub(crate) use file::line_of;
pub use pulled::{Pulled, PulledImage, is_own};
pub use runtime::NoBase;

#[cfg(test)]
mod tests;
