//! What can be wrong with a Dockerfile, and whose fault it is.

use kiln_core::FailureClass;

/// Why a Dockerfile is not built. Lines count from 1.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DockerfileError {
    /// Larger than [`super::DOCKERFILE_BYTES_MAX`].
    #[error("the Dockerfile has {bytes} bytes; the limit is {max}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// Not text.
    #[error("the Dockerfile is not UTF-8 text (line {line})")]
    NotUtf8 {
        /// Where the first bad byte is.
        line: u32,
    },
    /// Not a Dockerfile.
    #[error("Dockerfile line {line}: {what}")]
    Syntax {
        /// Line of the instruction.
        line: u32,
        /// What is wrong with it.
        what: String,
    },
    /// More than [`super::STAGES_MAX`] stages.
    #[error("Dockerfile line {line}: more than {max} stages")]
    TooManyStages {
        /// Line of the first stage too many.
        line: u32,
        /// The limit.
        max: usize,
    },
    /// No FROM at all.
    #[error("the Dockerfile has no FROM instruction")]
    NoStage,
    /// A frontend other than the built-in one.
    #[error("{place} asks for the frontend {frontend:?}; only docker/dockerfile:1 is allowed")]
    Frontend {
        /// `Dockerfile line 1` or the build argument that named it.
        place: String,
        /// What was asked for.
        frontend: String,
    },
    /// An entitlement that would weaken the step's sandbox.
    #[error("Dockerfile line {line}: RUN {flag} is not allowed")]
    Entitlement {
        /// Line of the instruction.
        line: u32,
        /// The flag as written.
        flag: String,
    },
    /// Base images that no configuration names.
    #[error("{}", unknown(.0))]
    UnknownBases(Vec<UnknownImage>),
    /// `--target` names no stage.
    #[error("the Dockerfile has no stage {target:?}")]
    NoTarget {
        /// What was asked for.
        target: String,
        /// The names there are.
        stages: Vec<String>,
    },
}

/// An image that could not be resolved to a digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownImage {
    /// Line of the instruction that names it.
    pub line: u32,
    /// The name, arguments expanded.
    pub image: String,
    /// The command that would add it.
    pub add: String,
}

fn unknown(images: &[UnknownImage]) -> String {
    let each = images
        .iter()
        .map(|image| format!("line {}: {}", image.line, image.image));
    let each: Vec<_> = each.collect();
    format!(
        "base images that this host has no digest for ({})",
        each.join("; ")
    )
}

impl DockerfileError {
    /// Whose fault: decides the exit code.
    #[must_use]
    pub fn class(&self) -> FailureClass {
        match self {
            Self::Frontend { .. } | Self::Entitlement { .. } | Self::UnknownBases(_) => {
                FailureClass::Policy
            }
            _ => FailureClass::Usage,
        }
    }

    /// What to do about it, where kiln knows.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownBases(images) => {
                let mut lines: Vec<_> = images.iter().map(|image| image.add.clone()).collect();
                lines.sort();
                lines.dedup();
                Some(lines.join("\n"))
            }
            Self::NoTarget { stages, .. } if stages.is_empty() => {
                Some("no stage has a name: write `FROM image AS name`".to_owned())
            }
            Self::NoTarget { stages, .. } => Some(format!("stages: {}", stages.join(", "))),
            Self::Frontend { .. } => Some(
                "remove the syntax line: the built-in frontend understands heredocs, mounts and --link"
                    .to_owned(),
            ),
            Self::Entitlement { .. } => {
                Some("the step already runs as root of its own machine: remove the flag".to_owned())
            }
            _ => None,
        }
    }
}
