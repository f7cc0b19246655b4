//! Repository names, manifest references and the trees of names that rights are given on.
//!
//! Grammar: OCI distribution-spec v1.1 ("Pulling manifests"). Names laid out as kiln uses them:
//! `t/<tenant>/...`, `cache/<tenant>/...`, `shared/...`, `quarantine/<job>/<attempt>/...`.

use std::fmt;
use std::str::FromStr;

use kiln_core::image_ref::{is_repository, is_tag};
use kiln_core::{AttemptId, Digest, JobId, TenantName};

/// A legal repository name. Safe as a relative path: no component is empty, `.` or `..`, and none
/// begins with `_`, which is how the store marks its own directories.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RepoName(String);

/// Why a text is not a repository name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a repository name: use lower-case words joined by '/', '.', '_' or '-'")]
pub struct ParseRepoError(String);

impl RepoName {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is `tree` itself or a name below it. Whole components only: `a/bc` is not under `a/b`.
    #[must_use]
    pub fn is_under(&self, tree: &str) -> bool {
        self.0
            .strip_prefix(tree)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// The one repository (and tree) a guest running this attempt may push to.
    #[must_use]
    pub fn quarantine(attempt: &AttemptId) -> Self {
        Self(format!("quarantine/{}/{}", attempt.job, attempt.number))
    }

    /// The tree of everything a job's attempts pushed.
    #[must_use]
    pub fn quarantine_of_job(job: &JobId) -> Self {
        Self(format!("quarantine/{job}"))
    }

    /// The tree of a tenant's own repositories.
    #[must_use]
    pub fn tenant_tree(tenant: &TenantName) -> Self {
        Self(format!("t/{tenant}"))
    }
}

impl FromStr for RepoName {
    type Err = ParseRepoError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if is_repository(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseRepoError(text.chars().take(300).collect()))
        }
    }
}

impl fmt::Display for RepoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RepoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl serde::Serialize for RepoName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for RepoName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// What names a manifest within a repository.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reference {
    /// By tag: may be moved to another manifest later.
    Tag(String),
    /// By digest: always the same bytes.
    Digest(Digest),
}

/// Why a text is neither a tag nor a digest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseReferenceError {
    /// It looks like a digest but is not a sha256 one.
    #[error("not a digest of the form sha256:<64 lower-case hex digits>: {0:?}")]
    Digest(String),
    /// It is no tag.
    #[error("not a tag: {0:?}")]
    Tag(String),
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let clipped = || text.chars().take(200).collect();
        if text.contains(':') {
            let digest = text.parse();
            return digest
                .map(Self::Digest)
                .map_err(|_| ParseReferenceError::Digest(clipped()));
        }
        if is_tag(text) {
            Ok(Self::Tag(text.to_owned()))
        } else {
            Err(ParseReferenceError::Tag(clipped()))
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_end_at_component_borders() {
        let repo: RepoName = "quarantine/b1/1/app".parse().expect("legal");
        assert!(repo.is_under("quarantine/b1/1"));
        assert!(repo.is_under("quarantine/b1/1/app"));
        assert!(!repo.is_under("quarantine/b1/1/ap"));
        assert!(!repo.is_under("quarantine/b1/11"));
        let eleven: RepoName = "quarantine/b1/11".parse().expect("legal");
        assert!(!eleven.is_under("quarantine/b1/1"));
    }

    #[test]
    fn references_are_tags_or_sha256_digests() {
        assert!(matches!("v1.2_x".parse(), Ok(Reference::Tag(_))));
        let text = Digest::of(b"x").to_string();
        assert!(matches!(text.parse(), Ok(Reference::Digest(_))));
        for bad in ["", ".", "..", "a/b", "sha512:00", "sha256:zz", "a b", "-a"] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
