//! What a push or a pull is about: registry, repository, tag or digest, from a reference as people write it.

use std::net::IpAddr;

use kiln_core::{Digest, ImageRef};

use super::error::RemoteError;

/// Docker Hub as references name it. Its other names, and what stands in front of one-word repositories, are part of
/// the reference grammar (`distribution/reference`).
const HUB: &str = "docker.io";
/// Names people and configuration files use for Docker Hub.
const HUB_NAMES: [&str; 3] = [HUB, "index.docker.io", "registry-1.docker.io"];
/// Where Docker Hub speaks the registry protocol.
const HUB_API: &str = "registry-1.docker.io";
/// Key of Docker Hub in docker's configuration and credential helpers.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// A registry host, its names made one.
pub(super) fn canonical_host(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    if HUB_NAMES.contains(&host.as_str()) {
        HUB.to_owned()
    } else {
        host
    }
}

/// A repository of another registry, and a tag or a digest in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Target {
    /// Where a push goes, from a reference; without a tag, `latest`.
    ///
    /// # Errors
    /// When it names no registry, or names a digest.
    pub fn new(reference: &ImageRef) -> Result<Self, RemoteError> {
        let refuse = |why, hint| {
            Err(RemoteError::Target {
                reference: reference.to_string(),
                why,
                hint,
            })
        };
        if reference.registry.is_none() {
            return refuse(
                "it names no registry",
                "write registry/name:tag, for example registry.example.org/team/app:1.0",
            );
        }
        if reference.digest.is_some() {
            return refuse(
                "a push goes to a tag, not to a digest",
                "leave out the part after '@'",
            );
        }
        Ok(Self::source(reference))
    }

    /// What a pull takes, from a reference as a Dockerfile may write it: without a registry Docker Hub's, without tag
    /// and digest `latest`.
    #[must_use]
    pub fn source(reference: &ImageRef) -> Self {
        let registry = canonical_host(reference.registry.as_deref().unwrap_or(HUB));
        let mut repository = reference.repository.clone();
        if registry == HUB && !repository.contains('/') {
            repository = format!("library/{repository}");
        }
        Self {
            registry,
            repository,
            tag: reference.tag.clone(),
            digest: reference.digest,
        }
    }

    /// Host, with a port where one was named.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Repository within the registry.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Tag; `latest` when none was named.
    #[must_use]
    pub fn tag(&self) -> &str {
        self.tag.as_deref().unwrap_or("latest")
    }

    /// Digest, where one was named.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// As a reference in full, with this digest.
    #[must_use]
    pub fn pinned(&self, digest: Digest) -> ImageRef {
        ImageRef {
            registry: Some(self.registry.clone()),
            repository: self.repository.clone(),
            tag: self.tag.clone(),
            digest: Some(digest),
        }
    }

    /// The name credential helpers know the registry by.
    pub(super) fn helper_key(&self) -> &str {
        if self.registry == HUB {
            HUB_KEY
        } else {
            &self.registry
        }
    }

    /// Roots to try, in this order. Plain HTTP is spoken to this host alone.
    pub(super) fn roots(&self) -> Vec<String> {
        let host = if self.registry == HUB {
            HUB_API
        } else {
            &self.registry
        };
        if is_loopback(host) {
            vec![format!("http://{host}"), format!("https://{host}")]
        } else {
            vec![format!("https://{host}")]
        }
    }
}

/// Whether `host[:port]` can only be this host.
pub(super) fn is_loopback(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    };
    let host = host.trim_matches(['[', ']']);
    match host.parse::<IpAddr>() {
        Ok(address) => address.is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        match (&self.tag, &self.digest) {
            (tag, None) => write!(f, ":{}", tag.as_deref().unwrap_or("latest")),
            (None, Some(digest)) => write!(f, "@{digest}"),
            (Some(tag), Some(digest)) => write!(f, ":{tag}@{digest}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str) -> Result<Target, RemoteError> {
        Target::new(&text.parse().expect("a reference"))
    }

    #[test]
    fn names_become_targets() {
        let full = target("registry.example.org:5000/team/app:1.0").expect("legal");
        assert_eq!(full.to_string(), "registry.example.org:5000/team/app:1.0");
        assert_eq!(full.roots(), ["https://registry.example.org:5000"]);
        assert_eq!(
            target("registry.example.org/app").expect("legal").tag(),
            "latest"
        );
        for short in ["app:1", "team/app"] {
            let error = target(short).expect_err("no registry");
            assert!(error.is_usage() && error.hint().is_some(), "{error}");
        }
        let digest = kiln_core::Digest::of(b"");
        assert!(target(&format!("registry.example.org/app@{digest}")).is_err());
    }

    #[test]
    fn one_registry_with_many_names() {
        for name in ["docker.io/app", "index.docker.io/library/app"] {
            let hub = target(name).expect("legal");
            assert_eq!(hub.repository(), "library/app");
            assert_eq!(hub.helper_key(), HUB_KEY);
            assert_eq!(hub.roots(), [format!("https://{HUB_API}")]);
        }
    }

    #[test]
    fn short_names_are_docker_hubs() {
        let source = |text: &str| Target::source(&text.parse().expect("a reference")).to_string();
        assert_eq!(source("alpine:3.20"), "docker.io/library/alpine:3.20");
        assert_eq!(source("team/app"), "docker.io/team/app:latest");
        assert_eq!(
            source("registry-1.docker.io/x"),
            "docker.io/library/x:latest"
        );
        assert_eq!(source("r.example.org/x:1"), "r.example.org/x:1");
        let digest = Digest::of(b"");
        let full = Target::source(&format!("alpine:3@{digest}").parse().expect("legal"));
        assert_eq!(
            full.to_string(),
            format!("docker.io/library/alpine:3@{digest}")
        );
        assert_eq!(full.pinned(digest).to_string(), full.to_string());
    }

    #[test]
    fn only_this_host_is_spoken_to_in_plain() {
        for yes in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:80",
            "127.8.8.8",
            "[::1]:5000",
        ] {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in [
            "10.0.0.1:5000",
            "localhost.example.org",
            "example.org",
            "[2001:db8::1]:5000",
            "0.0.0.0:5000",
        ] {
            assert!(!is_loopback(no), "{no}");
        }
        assert_eq!(
            target("127.0.0.1:5000/a").expect("legal").roots()[0],
            "http://127.0.0.1:5000"
        );
    }
}
