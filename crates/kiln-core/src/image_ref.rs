//! Image references: `[registry/]repository[:tag][@digest]`.
//!
//! Grammar: OCI distribution-spec v1.1 (names, tags) and the reference grammar of `distribution/reference`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Digest;

/// Longest repository name, bytes (as docker and the spec's regular expression need it).
pub const REPOSITORY_LEN_MAX: usize = 255;
/// Longest tag, bytes.
pub const TAG_LEN_MAX: usize = 128;

/// A parsed reference. No default registry or tag is filled in.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageRef {
    /// Registry host with optional port, when the text named one.
    pub registry: Option<String>,
    /// Repository, lower case, components separated by `/`.
    pub repository: String,
    /// Tag.
    pub tag: Option<String>,
    /// Digest.
    pub digest: Option<Digest>,
}

/// Why a text is not an image reference.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not an image reference: {why}")]
pub struct ParseRefError {
    text: String,
    why: &'static str,
}

/// Whether a text is a legal repository name.
#[must_use]
pub fn is_repository(text: &str) -> bool {
    text.len() <= REPOSITORY_LEN_MAX && !text.is_empty() && text.split('/').all(is_component)
}

/// One path component: `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn is_component(text: &str) -> bool {
    let bytes = text.as_bytes();
    let word = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if !bytes.first().is_some_and(word) || !bytes.last().is_some_and(word) {
        return false;
    }
    let mut rest = bytes;
    while let Some(start) = rest.iter().position(|b| !word(b)) {
        let run = rest[start..].iter().position(word).unwrap_or(0);
        let separator = &rest[start..start + run];
        let legal =
            matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-');
        if run == 0 || !legal {
            return false;
        }
        rest = &rest[start + run..];
    }
    true
}

/// Whether a text is a legal tag: `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
#[must_use]
pub fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= TAG_LEN_MAX
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// `host` or `host:port`, where the host is a DNS name, an IPv4 address or a bracketed IPv6 address.
fn is_registry(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let v6 = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host_ok = match v6 {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => crate::network::normal_host(host).is_some(),
    };
    host_ok && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port != 0))
}

impl FromStr for ImageRef {
    type Err = ParseRefError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = |why| ParseRefError {
            text: text.chars().take(300).collect(),
            why,
        };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (
                rest,
                Some(
                    digest
                        .parse()
                        .map_err(|_| error("the digest must be sha256:<64 hex>"))?,
                ),
            ),
            None => (text, None),
        };
        let (registry, rest) = match rest.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
                if !is_registry(first) {
                    return Err(error(
                        "the registry must be a host name or address with an optional port",
                    ));
                }
                (Some(first.to_ascii_lowercase()), rest)
            }
            _ => (None, rest),
        };
        let (repository, tag) = match rest.split_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (rest, None),
        };
        if !is_repository(repository) {
            return Err(error(
                "repository names are lower-case words joined by '/', '.', '_' or '-'",
            ));
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(error(
                "tags are up to 128 letters, digits, '.', '_' and '-'",
            ));
        }
        Ok(Self {
            registry,
            repository: repository.to_owned(),
            tag: tag.map(str::to_owned),
            digest,
        })
    }
}

impl TryFrom<String> for ImageRef {
    type Error = ParseRefError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ImageRef> for String {
    fn from(reference: ImageRef) -> Self {
        reference.to_string()
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(registry) = &self.registry {
            write!(f, "{registry}/")?;
        }
        f.write_str(&self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_split_as_docker_splits_them() {
        let all: ImageRef = format!("Registry.example:5000/t/local/app:v1@{}", Digest::of(b""))
            .parse()
            .expect("legal");
        assert_eq!(all.registry.as_deref(), Some("registry.example:5000"));
        assert_eq!(
            (all.repository.as_str(), all.tag.as_deref()),
            ("t/local/app", Some("v1"))
        );
        let short: ImageRef = "library/node:20".parse().expect("legal");
        assert_eq!(short.registry, None);
        for bad in [
            "",
            "A",
            "a//b",
            "a/",
            "/a",
            "a:",
            "a:b c",
            "a@sha256:00",
            "a___b",
            "a..b",
            "../x",
        ] {
            assert!(bad.parse::<ImageRef>().is_err(), "{bad}");
        }
        for good in ["a__b", "a--b", "a.b-c_d/e"] {
            assert!(good.parse::<ImageRef>().is_ok(), "{good}");
        }
    }
}
