//! Why a folder cannot be a build's source.

use std::io;
use std::path::PathBuf;

use super::patterns::PatternError;

/// How many refused paths a message names; the rest are counted.
pub(super) const REFUSED_NAMED_MAX: usize = 20;

/// Why a source tree is not read.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// The folder itself is not there or is no folder.
    #[error("{path} is not a folder that can be read")]
    Root {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Some file in it cannot be read.
    #[error("read {path:?} in the source folder")]
    Read {
        /// Path inside the folder.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An ignore file is wrong.
    #[error("{file}, line {line}")]
    Ignore {
        /// The file, inside the folder.
        file: String,
        /// Line, from 1.
        line: usize,
        /// What is wrong with it.
        #[source]
        source: PatternError,
    },
    /// An ignore file is too large.
    #[error("{file} has more than {max} bytes")]
    IgnoreSize {
        /// The file, inside the folder.
        file: String,
        /// The limit.
        max: u64,
    },
    /// Entries that cannot be part of a build.
    #[error("{}", refused(.first, *.total))]
    Refused {
        /// The first of them.
        first: Vec<Refused>,
        /// How many there are.
        total: usize,
    },
    /// Too many entries.
    #[error("the source folder has more than {max} files and folders")]
    TooManyEntries {
        /// The limit.
        max: u64,
    },
    /// Too many bytes.
    #[error("the source folder has more than {max} bytes")]
    TooLarge {
        /// The limit.
        max: u64,
    },
    /// A file grew, shrank or vanished between listing and reading.
    #[error("{path:?} changed while it was read")]
    Changed {
        /// Path inside the folder.
        path: String,
    },
    /// The receiver failed.
    #[error("write the source archive")]
    Write(#[source] io::Error),
}

/// An entry that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The name is not UTF-8: BuildKit's paths are UTF-8 strings.
    NotUtf8(String),
    /// Neither file, folder nor symbolic link.
    Special(String, &'static str),
    /// A symbolic link that leads out of the folder.
    Escapes(String, String),
    /// A path longer than the limit.
    TooLong(String),
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotUtf8(path) => write!(f, "{path:?}: the name is not UTF-8"),
            Self::Special(path, what) => write!(f, "{path:?}: a {what}"),
            Self::Escapes(path, target) => {
                write!(f, "{path:?}: a link to {target:?}, outside the folder")
            }
            Self::TooLong(path) => write!(f, "{path:?}: the path is too long"),
        }
    }
}

fn refused(first: &[Refused], total: usize) -> String {
    let mut text = match total {
        1 => "1 entry cannot be sent to a machine:".to_owned(),
        _ => format!("{total} entries cannot be sent to a machine:"),
    };
    for one in first {
        text.push_str("\n  ");
        text.push_str(&one.to_string());
    }
    if total > first.len() {
        text.push_str(&format!("\n  and {} more", total - first.len()));
    }
    text
}

impl ContextError {
    /// Whose fault: decides the exit code.
    #[must_use]
    pub fn class(&self) -> kiln_core::FailureClass {
        match self {
            Self::Write(_) => kiln_core::FailureClass::Infrastructure,
            _ => kiln_core::FailureClass::Usage,
        }
    }

    /// What to do about it in a build, where kiln knows.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        self.hint_with("build", ".dockerignore")
    }

    /// What to do about it in a run, where kiln knows: there another file says first what stays behind.
    #[must_use]
    pub fn hint_of_run(&self) -> Option<String> {
        self.hint_with("command", ".kilnignore")
    }

    fn hint_with(&self, who: &str, file: &str) -> Option<String> {
        match self {
            Self::Refused { .. } => Some(format!(
                "rename or remove them, or name them in {file} so that they stay behind"
            )),
            Self::TooManyEntries { .. } | Self::TooLarge { .. } => Some(format!(
                "name folders that the {who} does not need in {file}"
            )),
            Self::Changed { .. } => {
                Some("stop what writes into the folder and start again".to_owned())
            }
            _ => None,
        }
    }
}
