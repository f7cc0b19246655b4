//! Which package registries a build may reach: asked of the host and its tools, kept in `registries.toml`.
//!
//! No registry's host is written anywhere in kiln. [`discover`] reads the package managers' own settings on the
//! host, else what the tool itself reports, else what the tool in the base image reports, then looks once at the
//! index to see where its files live. The operator can edit the file; a later discovery keeps those edits.
//!
//! Not a registry client: it reads one index page and follows redirects of one file, nothing more.
//! Read next: [`file`] (the file and its meaning), [`discover`] (who is asked), [`merge`] (how edits survive),
//! [`probe`] (the outside world behind a trait).

pub mod discover;
pub mod file;
mod index;
mod merge;
pub mod probe;
mod settings;

pub use discover::{AskBase, Discovery, ask_argv, discover};
pub use file::{
    CaSection, ExceptionSection, ProxySection, Registries, RegistriesError, Runtime, RuntimeSection,
};
pub use merge::{MergeError, merge};
