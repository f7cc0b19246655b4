//! The user's Dockerfile, read on the host before any machine starts.
//!
//! It is split into instructions exactly as BuildKit's built-in frontend splits them, so that every image it would
//! pull is known and pinned to a digest before boot. It is not a Dockerfile interpreter: commands are never looked into.
//! A line that BuildKit reads differently gains nothing: a machine can pull from kiln's own registry only.
//! Read next: [`lines`] (splitting), [`pin`] (what is replaced), [`expand`] (`${ARG:-default}`).

mod error;
mod expand;
mod flags;
mod lines;
mod pin;
mod slim;
mod spelled;
mod syntax;

pub use error::DockerfileError;
pub use expand::{ExpandError, expand};
pub use lines::{Heredoc, Instruction, split};
pub use pin::{BaseUse, DOCKERFILE_BYTES_MAX, PinOptions, Pinned, STAGES_MAX, pin};
pub use spelled::Spelled;
pub use syntax::{BUILTIN_FRONTEND, check_frontend, is_builtin_frontend};
