//! Templates on disk: what they depend on, who makes them, who uses them, when they go.
//!
//! ```text
//! <root>/.make/<id>            held by the one process that makes this template
//! <root>/<id>/meta.json        key, files and their digests
//! <root>/<id>/seen.json        the host boot in which the digests were last computed, and what the files looked like
//! <root>/<id>/lock             held shared by every user; its time is the last use
//! <root>/<id>/...              the driver's own files, opaque here
//! <root>/<id>.partial-...      being made or removed; swept once its process has gone
//! ```
//!
//! A template appears by a rename, whole. One that is damaged is removed and made again, never used. This module
//! knows no VMM: a driver fills the directory ([`crate::Machine::into_template`]).

mod key;
mod origin;
mod store;
mod verify;

#[cfg(test)]
pub(crate) use key::tests::spec as tests_spec;
pub use key::{Purpose, TEMPLATE_FORMAT, TemplateKey};
pub(crate) use origin::{DiskOrigin, first_difference};
pub use store::{
    Held, Listed, MakeError, Progress, PrunePolicy, PruneReport, TemplateError, TemplateStore,
    lock_for_use,
};
