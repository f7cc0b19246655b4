//! The origin of an `http` or `https` URL: scheme, host and port, and the rest as it was written.
//!
//! Not a general URL library: it reads what package managers and proxies write and refuses the rest.
//! Credentials are recognised so that they can be cut out, never kept.

use std::fmt;

use kiln_core::network::{Protocol, normal_host};

/// Longest URL that is looked at.
pub const URL_BYTES_MAX: usize = 8 * 1024;

/// A URL taken apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    /// `true` for `https`.
    pub tls: bool,
    /// Lower-case host name or the address as written (IPv6 without brackets).
    pub host: String,
    /// The port, the scheme's own when none was written.
    pub port: u16,
    /// Path, query and fragment; empty or starting with `/`, `?` or `#`.
    pub rest: String,
}

/// A URL with its credentials, if it carried any.
#[derive(Clone, PartialEq, Eq)]
pub struct Split {
    /// Where it points.
    pub origin: Origin,
    /// `user[:password]` as written (percent-encoded), if any.
    pub userinfo: Option<String>,
}

impl fmt::Debug for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Split")
            .field("origin", &self.origin)
            .field("userinfo", &self.userinfo.as_ref().map(|_| "…"))
            .finish()
    }
}

impl Origin {
    /// Takes an `http` or `https` URL apart, dropping credentials. `None` for anything else.
    #[must_use]
    pub fn parse(url: &str) -> Option<Self> {
        Some(split(url)?.origin)
    }

    /// Whether the port is the scheme's own.
    #[must_use]
    pub fn has_default_port(&self) -> bool {
        self.port == if self.tls { 443 } else { 80 }
    }

    /// What its scheme speaks.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        match self.tls {
            true => Protocol::Tls,
            false => Protocol::Http,
        }
    }

    /// `host` or `host:port`, with brackets around an IPv6 address.
    #[must_use]
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') {
            format!("[{}]", self.host)
        } else {
            self.host.clone()
        };
        if self.has_default_port() {
            host
        } else {
            format!("{host}:{}", self.port)
        }
    }

    /// Resolves a link found on the page at `self` (absolute, scheme-relative, rooted or relative).
    #[must_use]
    pub fn join(&self, link: &str) -> Option<Self> {
        if link.starts_with("http://") || link.starts_with("https://") {
            return Self::parse(link);
        }
        let scheme = if self.tls { "https:" } else { "http:" };
        if link.starts_with("//") {
            return Self::parse(&format!("{scheme}{link}"));
        }
        let first = link.split(['/', '?', '#']).next().unwrap_or_default();
        if first.contains(':') {
            return None;
        }
        let rest = if link.starts_with('/') {
            link.to_owned()
        } else {
            let path = self.rest.split(['?', '#']).next().unwrap_or_default();
            let folder = path.rfind('/').map_or("", |at| &path[..at]);
            format!("{folder}/{link}")
        };
        Some(Self {
            rest,
            ..self.clone()
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.rest)
    }
}

/// Takes a URL apart and keeps its credentials apart. `None` when it is no `http(s)` URL.
#[must_use]
pub fn split(url: &str) -> Option<Split> {
    if url.len() > URL_BYTES_MAX || url.bytes().any(|b| b <= b' ' || b == 0x7f || b == b'\\') {
        return None;
    }
    let (scheme, after) = url.split_once("://")?;
    let tls = match scheme.to_ascii_lowercase().as_str() {
        "https" => true,
        "http" => false,
        _ => return None,
    };
    let end = after.find(['/', '?', '#']).unwrap_or(after.len());
    let (authority, rest) = after.split_at(end);
    let (userinfo, place) = match authority.rsplit_once('@') {
        Some((user, place)) => (Some(user.to_owned()), place),
        None => (None, authority),
    };
    let (host, port) = host_and_port(place)?;
    Some(Split {
        origin: Origin {
            tls,
            host,
            port: port.unwrap_or(if tls { 443 } else { 80 }),
            rest: rest.to_owned(),
        },
        userinfo: userinfo.filter(|user| !user.is_empty()),
    })
}

/// `host`, `host:port`, `[v6]` or `[v6]:port`; the host lower case and legal.
#[must_use]
pub fn host_and_port(text: &str) -> Option<(String, Option<u16>)> {
    let (host, port) = if let Some(inner) = text.strip_prefix('[') {
        let (host, after) = inner.split_once(']')?;
        host.parse::<std::net::Ipv6Addr>().ok()?;
        let port = match after {
            "" => None,
            _ => Some(after.strip_prefix(':')?),
        };
        (host.to_ascii_lowercase(), port)
    } else {
        let (host, port) = match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        };
        (normal_host(host)?, port)
    };
    let port = match port {
        None | Some("") => None,
        Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
            Some(digits.parse::<u16>().ok().filter(|port| *port != 0)?)
        }
        Some(_) => return None,
    };
    Some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn urls_of_package_managers() {
        let split = split("https://user:p%40ss@Mirror.Example.ORG:8443/simple/?x#y").expect("url");
        assert_eq!(split.userinfo.as_deref(), Some("user:p%40ss"));
        assert_eq!(
            split.origin.to_string(),
            "https://mirror.example.org:8443/simple/?x#y"
        );
        assert_eq!(Origin::parse("http://a.example.org").expect("url").port, 80);
        for bad in [
            "ftp://a.example.org",
            "https://",
            "https://a b/",
            "https://a:0/",
            "https://a:99999/",
            "https://a\\@b/",
            "file:///etc/passwd",
            "https://a:+1/",
        ] {
            assert_eq!(Origin::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_last_at_sign_ends_the_credentials() {
        let origin = Origin::parse("https://a.example.org@b.example.org/x").expect("url");
        assert_eq!(origin.host, "b.example.org");
    }

    #[test]
    fn links_are_resolved_against_the_page() {
        let page = Origin::parse("https://a.example.org/simple/pip/").expect("url");
        let join = |link: &str| page.join(link).map(|o| o.to_string());
        let want = |text: &str| Some(text.to_owned());
        assert_eq!(
            join("../../packages/x.whl"),
            want("https://a.example.org/simple/pip/../../packages/x.whl")
        );
        assert_eq!(join("/f/x"), want("https://a.example.org/f/x"));
        assert_eq!(
            join("//files.example.org/x"),
            want("https://files.example.org/x")
        );
        assert_eq!(
            join("http://files.example.org/x"),
            want("http://files.example.org/x")
        );
        assert_eq!(join("mailto:x"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived_and_a_url_prints_as_itself(text in ".{0,80}") {
            if let Some(origin) = Origin::parse(&text) {
                prop_assert_eq!(Origin::parse(&origin.to_string()), Some(origin));
            }
        }

        #[test]
        fn near_urls(text in "https?://[a-z0-9.@:\\[\\]/?#%-]{0,40}") {
            if let Some(origin) = Origin::parse(&text) {
                prop_assert_eq!(Origin::parse(&origin.to_string()), Some(origin));
            }
        }
    }
}
