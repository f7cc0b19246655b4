//! Why a folder has no plan, and which file would change that.

use std::io;

use kiln_core::FailureClass;

use super::shown;
use crate::build_config::BuildConfigError;
use crate::dockerfile::DockerfileError;

/// Why a folder has no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The folder or a file in it cannot be read.
    #[error("read {}", shown(.path))]
    Read {
        /// Which.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file that is a symbolic link.
    #[error("{} is a symbolic link, and {what}", shown(.path))]
    Link {
        /// Which.
        path: String,
        /// What is wrong with that.
        what: &'static str,
    },
    /// A file is larger than any sensible one.
    #[error("{} has more than {max} bytes", shown(.file))]
    TooLarge {
        /// Which.
        file: String,
        /// The limit.
        max: u64,
    },
    /// There is nothing in it.
    #[error("the folder {} is empty", shown(.dir))]
    Empty {
        /// Which.
        dir: String,
        /// What to do, where more is known.
        hint: Option<String>,
    },
    /// Nothing in it is known.
    #[error("nothing here says how to build it (found {})", shown(.found))]
    UnknownRuntime {
        /// Some names that are there.
        found: String,
        /// What to add.
        hint: String,
    },
    /// A file that is nearly one kiln knows.
    #[error("there is a {} but no {meant}", shown(.found))]
    NearMiss {
        /// What is there.
        found: String,
        /// What kiln would read.
        meant: String,
        /// What to do.
        hint: String,
    },
    /// A manifest without its lockfile.
    #[error("{} lists dependencies, but there is no lockfile that freezes them", shown(.manifest))]
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
    #[error("{} asks for {runtime} {}; available here: {}", shown(.place), shown(.wanted), .available.join(", "))]
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
    #[error("{}{}: {}", shown(.file), line_text(*.line), shown(.what))]
    Broken {
        /// Which.
        file: String,
        /// Line, from 1.
        line: Option<u32>,
        /// What is wrong.
        what: String,
    },
    /// Something kiln understands and does not do.
    #[error("{}{}: {}", shown(.file), line_text(*.line), shown(.what))]
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
    #[error("{} cannot be used", shown(.file))]
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
            | Self::NoServer { hint, .. } => Some(shown(hint)),
            Self::Empty {
                hint: Some(hint), ..
            } => Some(shown(hint)),
            Self::Link { path, .. } => Some(format!(
                "put the file itself in place of the link {}; a Dockerfile of elsewhere is named with --file",
                shown(path)
            )),
            Self::Version { runtime, .. } => Some(format!(
                "ask for a version that is there, or add one: kiln bases add {runtime}:VERSION BUILD@sha256:DIGEST --run RUN@sha256:DIGEST"
            )),
            Self::Empty { .. } => Some(
                "a Node app has a package.json, a Python app a requirements.txt or pyproject.toml; anything else needs a Dockerfile"
                    .to_owned(),
            ),
            Self::Dockerfile { source, .. } => source.hint(),
            _ => None,
        }
    }
}
