//! From a source folder to a plan: runtime, version, commands and the exact Dockerfile, each with the line of the
//! file that says so.
//!
//! Pure and host-side: reads the folder, runs nothing, asks nobody. `kiln plan` prints it, `kiln build` builds it.
//! Not here: the user's Dockerfile ([`crate::dockerfile`]), which files are sent ([`crate::context`]).
//! Read next: [`detect`] (who decides what), then `node` and `python`.

mod custom;
mod detect;
mod error;
mod files;
mod folder;
mod locate;
mod lockfiles;
mod node;
mod procfile;
mod python;
mod ranges;
mod render;
mod shown;
mod start;
mod suited;
mod system_packages;
mod types;
mod version;
mod write;

pub use detect::plan;
pub use error::PlanError;
pub(crate) use locate::toml_line;
pub use lockfiles::{HostMention, Lockfile};
pub use render::render;
pub use shown::shown;
pub use suited::{Suited, is_project, suited};
pub use types::{
    Command, DockerfileChoice, Evidence, Options, Plan, PlannedBase, RuntimeKind, StaticSite,
    VersionChoice,
};
