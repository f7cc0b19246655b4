//! The policy of a project: what its commands may use and reach, in a file beside its sources.
//!
//! ```text
//! text -> yaml (bounded tree with places) -> shape (keys, types, counts) -> compiled policy, hash -> AND the operator's grant -> what a run is held to
//! ```
//!
//! It is pure: it opens no file, knows no clock and starts nothing; the command reads the files and the worker applies what comes out.
//! What a destination means is `kiln_core::network`; what happens on a connection is `kiln-network`.
//!
//! Read next: [`policy`] (what a file means, and its canonical form), [`compile`], [`effective()`], [`explain`].

mod again;
mod build;
mod cleanroom_file;
mod compiled;
mod diagnostic;
mod effective;
mod grant;
mod honoured;
mod kiln_file;
mod kiln_keys;
mod learned;
pub mod policy;
mod read;
mod run;
mod run_git;
mod run_parts;
mod shape;
mod starter;
mod trust;
mod yaml;

pub use again::{Standing, stands};
pub use build::{Beyond, BuildAsked, HeldBuild, Narrowed, hold_build, hold_untrusted_build};
pub use compiled::{
    CLEANROOM_FALLBACK, CLEANROOM_FILE, Choice, ChoiceError, Compiled, Format, KILN_FILE,
    NEAR_MISSES, choose, compile, json_schema,
};
pub use diagnostic::{DIAGNOSTICS_MAX, Diagnostic, Diagnostics, Place, unseen};
pub use effective::{
    Effective, Explanation, NotGranted, Removed, Say, effective, explain, explain_git,
};
pub use grant::{GRANT_BYTES_MAX, GRANT_FILE, Grant, GrantedGit, GrantedHost, Grants, Maxima};
pub use honoured::{other_image, runnable};
pub use kiln_keys::RULES_MAX;
pub use learned::{CannotWrite, with_learned};
pub use policy::{Image, Phase, PhaseNetwork, Policy};
pub use run::{Asked, Held, Mode, Refusal, below, hold_run};
pub use starter::{StarterFacts, starter};
pub use trust::{TrustedRef, UntrustedSource, policy_ref, trusted_source};
pub use yaml::{DEPTH_MAX, FILE_BYTES_MAX, NODES_MAX};
