//! Why a folder has no plan, and which file would change that.

use std::io;

use kiln_core::FailureClass;

use crate::build_config::BuildConfigError;
use crate::dockerfile::DockerfileError;

/// Why a folder has no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The folder or a file in it cannot be read.
    #[error("read {path}")]
    Read {
        /// Which.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file is larger than any sensible one.
    #[error("{file} has more than {max} bytes")]
    TooLarge {
        /// Which.
        file: String,
        /// The limit.
        max: u64,
    },
    /// There is nothing in it.
    #[error("the folder {0} is empty")]
    Empty(String),
    /// Nothing in it is known.
    #[error("nothing here says how to build it (found {found})")]
    UnknownRuntime {
        /// Some names that are there.
        found: String,
        /// What to add.
        hint: String,
    },
    /// A file that is nearly one kiln knows.
    #[error("there is a {found} but no {meant}")]
    NearMiss {
        /// What is there.
        found: String,
        /// What kiln would read.
        meant: String,
        /// What to do.
        hint: String,
    },
    /// A manifest without its lockfile.
    #[error("{manifest} lists dependencies, but there is no lockfile that freezes them")]
    NoLockfile {
        /// The manifest.
        manifest: String,
        /// What to do.
        hint: String,
    },
    /// Lockfiles of several package managers.
    #[error("there are lockfiles of several package managers: {}", .files.join(", "))]
    SeveralLockfiles {
        /// Which.
        files: Vec<String>,
        /// What to do.
        hint: String,
    },
    /// No base has a version that fits.
    #[error("{place} asks for {runtime} {wanted}; available here: {}", .available.join(", "))]
    Version {
        /// Runtime.
        runtime: &'static str,
        /// The range.
        wanted: String,
        /// Who asks.
        place: String,
        /// What there is.
        available: Vec<String>,
    },
    /// A file that is not what its name says.
    #[error("{file}{}: {what}", line_text(*.line))]
    Broken {
        /// Which.
        file: String,
        /// Line, from 1.
        line: Option<u32>,
        /// What is wrong.
        what: String,
    },
    /// Something kiln understands and does not do.
    #[error("{file}{}: {what}", line_text(*.line))]
    Unsupported {
        /// Which file asks for it.
        file: String,
        /// Line, from 1.
        line: Option<u32>,
        /// What.
        what: String,
        /// What to do instead.
        hint: String,
    },
    /// Nothing says how to start it.
    #[error("nothing here says how to start the app")]
    NoStart {
        /// What to add.
        hint: String,
    },
    /// A web framework without a server to run it.
    #[error("{framework} apps need a server, and the dependencies name none")]
    NoServer {
        /// The framework.
        framework: &'static str,
        /// What to add.
        hint: String,
    },
    /// `kiln.toml` is wrong.
    #[error("the build configuration is wrong")]
    Config(#[from] BuildConfigError),
    /// The Dockerfile is wrong or refused.
    #[error("{file} cannot be used")]
    Dockerfile {
        /// Which.
        file: String,
        /// Why.
        #[source]
        source: DockerfileError,
    },
}

fn line_text(line: Option<u32>) -> String {
    line.map_or_else(String::new, |line| format!(", line {line}"))
}

impl PlanError {
    /// Whose fault: decides the exit code.
    #[must_use]
    pub fn class(&self) -> FailureClass {
        match self {
            Self::Dockerfile { source, .. } => source.class(),
            _ => FailureClass::Usage,
        }
    }

    /// What to do about it, where kiln knows.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownRuntime { hint, .. }
            | Self::NearMiss { hint, .. }
            | Self::NoLockfile { hint, .. }
            | Self::SeveralLockfiles { hint, .. }
            | Self::Unsupported { hint, .. }
            | Self::NoStart { hint }
            | Self::NoServer { hint, .. } => Some(hint.clone()),
            Self::Version { runtime, .. } => Some(format!(
                "ask for a version that is there, or add one: kiln bases add {runtime}:VERSION BUILD@sha256:DIGEST --run RUN@sha256:DIGEST"
            )),
            Self::Empty(_) => Some(
                "a Node app has a package.json, a Python app a requirements.txt or pyproject.toml; anything else needs a Dockerfile"
                    .to_owned(),
            ),
            Self::Dockerfile { source, .. } => source.hint(),
            _ => None,
        }
    }
}
