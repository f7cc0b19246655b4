//! Artifacts: files that a job leaves. What they may be called, which files of a machine a request may name, and how much there may be.

mod glob;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Most bytes of one artifact.
pub const ARTIFACT_BYTES_MAX: u64 = 1 << 30;
/// Most bytes of all artifacts of a job.
pub const ARTIFACTS_BYTES_MAX: u64 = 4 << 30;
/// Most artifacts of a job.
pub const ARTIFACTS_MAX: u32 = 1_000;
/// Most files, folders and patterns that one request names.
pub const ARTIFACT_PATHS_MAX: usize = 64;
/// Most parts of an artifact's name: folders, and the file.
pub const ARTIFACT_DEPTH_MAX: usize = 32;

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

/// A file or folder in the machine whose files are kept when the command has ended, or a pattern of such: `*` and `?` stand for characters of a
/// part, `**` as a part for any number of parts. Relative to the command's working directory unless it begins with a slash.
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
        let good = text.len() <= Self::LEN_MAX
            && text.bytes().all(is_plain)
            && has_plain_segments(text)
            && text.split('/').count() <= ARTIFACT_DEPTH_MAX;
        if good {
            return Ok(Self(text.to_owned()));
        }
        let rule = "write a relative path of at most 250 letters, digits and . _ - + @ = , ~ in at most 32 parts, with no empty, . or .. part";
        Err(bad(text, "the name of an artifact", rule))
    }
}

impl ArtifactPath {
    /// Longest path, in bytes.
    pub const LEN_MAX: usize = 200;

    /// The file or folder in the machine that is looked at, as seen from its root: all of the path, or what stands before a pattern's first
    /// wildcard.
    #[must_use]
    pub fn below(&self, cwd: &str) -> String {
        match (self.fixed(), cwd.trim_end_matches('/')) {
            (fixed, _) if fixed.starts_with('/') => fixed.to_owned(),
            ("", "") => "/".to_owned(),
            ("", cwd) => cwd.to_owned(),
            (fixed, cwd) => format!("{cwd}/{fixed}"),
        }
    }

    /// What the names of its files begin with; empty for a pattern of the working directory itself.
    #[must_use]
    pub fn stem(&self) -> &str {
        self.fixed().trim_start_matches('/')
    }

    /// Whether it has wildcards.
    #[must_use]
    pub fn is_pattern(&self) -> bool {
        glob::has_wildcards(&self.0)
    }

    /// Whether a file of this name is meant, by its own name or by that of a folder it lies in.
    #[must_use]
    pub fn means(&self, name: &str) -> bool {
        glob::names(self.0.trim_start_matches('/'), name)
    }

    /// The parts before the first with a wildcard.
    fn fixed(&self) -> &str {
        let mut end = 0;
        for part in self.0.split_inclusive('/') {
            if glob::has_wildcards(part) {
                return self.0[..end].trim_end_matches('/');
            }
            end += part.len();
        }
        &self.0
    }
}

impl FromStr for ArtifactPath {
    type Err = ParseArtifactError;

    fn from_str(text: &str) -> Result<Self, ParseArtifactError> {
        let inner = text.strip_prefix('/').unwrap_or(text);
        let inner = inner.strip_suffix('/').unwrap_or(inner);
        let good = text.len() <= Self::LEN_MAX
            && inner
                .bytes()
                .all(|byte| is_plain(byte) || b"*?".contains(&byte))
            && has_plain_segments(inner);
        if !good {
            let rule = "write the path of a file or folder, or a pattern with * ? **: at most 200 letters, digits and . _ - + @ = , ~ with no empty, . or .. part";
            return Err(bad(text, "a path of files to keep", rule));
        }
        let path = Self(text.strip_suffix('/').unwrap_or(text).to_owned());
        if path.0.starts_with('/') && path.stem().is_empty() {
            // The machine's own root holds /proc and /sys.
            let rule = "a pattern from the root names at least one folder before its first * or ?";
            return Err(bad(text, "a path of files to keep", rule));
        }
        Ok(path)
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
        let deep = |parts: usize| vec!["a"; parts].join("/").parse::<ArtifactName>();
        assert!(deep(ARTIFACT_DEPTH_MAX).is_ok() && deep(ARTIFACT_DEPTH_MAX + 1).is_err());
        let path = |text: &str| text.parse::<ArtifactPath>().expect(text);
        assert_eq!(path("dist/").below("/work"), "/work/dist");
        assert_eq!(path("dist").below("/"), "/dist");
        assert_eq!(path("/out/x.xml").below("/work"), "/out/x.xml");
        assert_eq!(path("/out/x.xml").stem(), "out/x.xml");
        for bad in [
            "", "/", "//", "a/../b", "../a", "/*", "/**/a", "a b", "\u{1b}", "a[b]",
        ] {
            assert!(bad.parse::<ArtifactPath>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_pattern_is_looked_for_below_its_fixed_part() {
        let path = |text: &str| text.parse::<ArtifactPath>().expect(text);
        for (text, below, stem) in [
            ("*.xml", "/work", ""),
            ("out/*.xml", "/work/out", "out"),
            ("a/b?/c/*", "/work/a", "a"),
            ("/out/**/x", "/out", "out"),
            ("a*/", "/work", ""),
        ] {
            let path = path(text);
            assert_eq!((path.below("/work/").as_str(), path.stem()), (below, stem));
            assert!(path.is_pattern(), "{text}");
        }
        assert_eq!(path("*").below("/"), "/");
        assert!(path("/out/**/*.xml").means("out/a/b/x.xml"));
        assert!(!path("/out/**/*.xml").means("out/a/b/x.txt"));
        assert!(path("out").means("out/a") && path("out").means("out"));
        assert!(!path("out").means("outer"));
    }
}
