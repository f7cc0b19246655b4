//! Artifacts: files that a job leaves. What they may be called, which files of a machine a request may name, and how much there may be.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Most bytes of one artifact.
pub const ARTIFACT_BYTES_MAX: u64 = 1 << 30;
/// Most bytes of all artifacts of a job.
pub const ARTIFACTS_BYTES_MAX: u64 = 4 << 30;
/// Most artifacts of a job.
pub const ARTIFACTS_MAX: u32 = 1_000;
/// Most files and folders that one request names.
pub const ARTIFACT_PATHS_MAX: usize = 64;

/// Why a text is no name of an artifact, or no path of files to keep.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not {kind}: {rule}")]
pub struct ParseArtifactError {
    text: String,
    kind: &'static str,
    rule: &'static str,
}

/// An artifact's name within its job: a relative path of plain characters, so that it can be a file name, a URL and a line of a terminal.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ArtifactName(String);

/// A file or folder in the machine whose files are kept when the command has ended; relative to the command's working directory unless it begins
/// with a slash.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ArtifactPath(String);

fn bad(text: &str, kind: &'static str, rule: &'static str) -> ParseArtifactError {
    ParseArtifactError {
        text: text.chars().take(80).collect(),
        kind,
        rule,
    }
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-+@=,~/".contains(&byte)
}

/// Segments that are no step up, no step nowhere and nothing.
fn has_plain_segments(text: &str) -> bool {
    text.split('/')
        .all(|segment| !matches!(segment, "" | "." | ".."))
}

impl ArtifactName {
    /// Longest name, in bytes.
    pub const LEN_MAX: usize = 250;

    /// The text of the name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ArtifactName {
    type Err = ParseArtifactError;

    fn from_str(text: &str) -> Result<Self, ParseArtifactError> {
        let good =
            text.len() <= Self::LEN_MAX && text.bytes().all(is_plain) && has_plain_segments(text);
        if good {
            return Ok(Self(text.to_owned()));
        }
        let rule = "write a relative path of at most 250 letters, digits and . _ - + @ = , ~ with no empty, . or .. part";
        Err(bad(text, "the name of an artifact", rule))
    }
}

impl ArtifactPath {
    /// Longest path, in bytes.
    pub const LEN_MAX: usize = 200;

    /// The path in the machine, as seen from its root.
    #[must_use]
    pub fn below(&self, cwd: &str) -> String {
        match self.0.starts_with('/') {
            true => self.0.clone(),
            false => format!("{}/{}", cwd.trim_end_matches('/'), self.0),
        }
    }

    /// What the names of its files begin with.
    #[must_use]
    pub fn stem(&self) -> &str {
        self.0.trim_start_matches('/')
    }
}

impl FromStr for ArtifactPath {
    type Err = ParseArtifactError;

    fn from_str(text: &str) -> Result<Self, ParseArtifactError> {
        let inner = text.strip_prefix('/').unwrap_or(text);
        let inner = inner.strip_suffix('/').unwrap_or(inner);
        let good =
            text.len() <= Self::LEN_MAX && inner.bytes().all(is_plain) && has_plain_segments(inner);
        if good {
            return Ok(Self(text.strip_suffix('/').unwrap_or(text).to_owned()));
        }
        let rule = "write the path of a file or folder, at most 200 letters, digits and . _ - + @ = , ~ with no empty, . or .. part";
        Err(bad(text, "a path of files to keep", rule))
    }
}

macro_rules! text_type {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = ParseArtifactError;

            fn try_from(text: String) -> Result<Self, ParseArtifactError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_type!(ArtifactName);
text_type!(ArtifactPath);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths() {
        for good in ["a", "dist/app-1.2.tar.gz", "a/..b/c", "~x=1,2+3@4", "..."] {
            assert_eq!(good.parse::<ArtifactName>().expect(good).as_str(), good);
        }
        let long = "a".repeat(251);
        for bad in [
            "", "/a", "a/", "a//b", ".", "..", "a/../b", "a b", "a\n", "é", "a\\b", "a?b", "%2e",
            &long,
        ] {
            assert!(bad.parse::<ArtifactName>().is_err(), "{bad:?}");
        }
        let path = |text: &str| text.parse::<ArtifactPath>().expect(text);
        assert_eq!(path("dist/").below("/work"), "/work/dist");
        assert_eq!(path("dist").below("/"), "/dist");
        assert_eq!(path("/out/x.xml").below("/work"), "/out/x.xml");
        assert_eq!(path("/out/x.xml").stem(), "out/x.xml");
        for bad in ["", "/", "//", "a/../b", "../a", "*", "a b", "\u{1b}"] {
            assert!(bad.parse::<ArtifactPath>().is_err(), "{bad:?}");
        }
    }
}
