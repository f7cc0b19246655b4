//! Where a webhook may go. The text is checked when it is given and when it is used; the address whenever it is dialled.

use std::net::IpAddr;

use http::Uri;
use http::uri::Authority;
use kiln_core::network::{RangeException, SpecialRange, normal_host, special_range};

/// Longest URL.
const URL_MAX: usize = 2048;

/// What the operator permits.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReceiverPolicy {
    /// Hosts that may lie in a special-purpose range, this host's own loopback included. Ranges where clouds serve instance metadata, and
    /// those that are no single host, are never permitted.
    pub exceptions: Vec<RangeException>,
    /// Permits `http://`, where anybody on the way can read.
    pub allow_http: bool,
}

/// Why a receiver is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DestinationRefused {
    /// Not a URL that can be called.
    #[error("not a URL that can be called: {0}")]
    Url(&'static str),
    /// `http://` is not permitted.
    #[error("the URL is not https")]
    NotHttps,
    /// Its address is in a special-purpose range.
    #[error(
        "its address is in a special-purpose range ({0:?}); the operator can permit it for this host"
    )]
    Range(SpecialRange),
}

/// A URL that can be called.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Destination {
    host: String,
    port: u16,
    secure: bool,
    path: String,
}

impl Destination {
    /// Checks the text of a URL; resolves nothing.
    ///
    /// # Errors
    /// [`DestinationRefused`] with what is wrong.
    pub fn parse(url: &str, policy: &ReceiverPolicy) -> Result<Self, DestinationRefused> {
        use DestinationRefused::Url;
        if url.len() > URL_MAX {
            return Err(Url("it is too long"));
        }
        if !url.bytes().all(|byte| byte.is_ascii_graphic()) || url.contains('#') {
            return Err(Url("it has characters a URL may not have, or a fragment"));
        }
        let uri: Uri = url.parse().map_err(|_| Url("it cannot be read"))?;
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") if policy.allow_http => false,
            Some("http") => return Err(DestinationRefused::NotHttps),
            _ => return Err(Url("it is neither https nor http")),
        };
        let authority = uri.authority().map_or("", Authority::as_str);
        if authority.contains('@') {
            return Err(Url("it has a user name or password"));
        }
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let host = match host.parse::<IpAddr>() {
            Ok(addr) => addr.to_string(),
            Err(_) => normal_host(host).ok_or(Url("it names no host"))?,
        };
        // What follows the host is nothing or a port; `Uri` itself takes a number that is none for no port at all.
        let usual = if secure { 443 } else { 80 };
        let rest = authority.strip_prefix(uri.host().unwrap_or_default());
        let port = match rest.unwrap_or("?").strip_prefix(':') {
            Some(port) => port.parse().ok().filter(|port: &u16| *port != 0),
            None => rest.filter(|rest| rest.is_empty()).map(|_| usual),
        };
        Ok(Self {
            host,
            port: port.ok_or(Url("its port is not one"))?,
            secure,
            path: uri
                .path_and_query()
                .map_or("/", |path| path.as_str())
                .to_owned(),
        })
    }

    /// Checks a URL that somebody gives: its text, and the address when it names one. A name is resolved when it is called, not here.
    ///
    /// # Errors
    /// [`DestinationRefused`] with what is wrong.
    pub fn accept(url: &str, policy: &ReceiverPolicy) -> Result<Self, DestinationRefused> {
        let to = Self::parse(url, policy)?;
        let local = to.host == "localhost" || to.host.ends_with(".localhost");
        // Such a name is this host's loopback by definition (RFC 6761 section 6.3).
        let named = match local {
            true => Some(IpAddr::from([127, 0, 0, 1])),
            false => to.host.parse().ok(),
        };
        if let Some(addr) = named {
            to.check(addr, policy)?;
        }
        Ok(to)
    }

    /// The host: a name in lower case, or an address.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether TLS is spoken.
    #[must_use]
    pub fn is_secure(&self) -> bool {
        self.secure
    }

    /// Path and query.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Value of the header `host`.
    #[must_use]
    pub fn authority(&self) -> String {
        let usual = if self.secure { 443 } else { 80 };
        let host = if self.host.contains(':') {
            format!("[{}]", self.host)
        } else {
            self.host.clone()
        };
        if self.port == usual {
            host
        } else {
            format!("{host}:{}", self.port)
        }
    }

    /// Whether an address of this host may be dialled.
    ///
    /// # Errors
    /// The range it lies in.
    pub fn check(&self, addr: IpAddr, policy: &ReceiverPolicy) -> Result<(), DestinationRefused> {
        let Some(range) = special_range(addr) else {
            return Ok(());
        };
        let possible = range.may_be_excepted() || range == SpecialRange::Loopback;
        let excepted =
            |e: &RangeException| e.host.eq_ignore_ascii_case(&self.host) && e.range.contains(addr);
        if possible && policy.exceptions.iter().any(excepted) {
            Ok(())
        } else {
            Err(DestinationRefused::Range(range))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(host: &str, range: &str) -> ReceiverPolicy {
        ReceiverPolicy {
            exceptions: vec![RangeException {
                host: host.to_owned(),
                range: range.parse().expect("range"),
            }],
            allow_http: true,
        }
    }

    #[test]
    fn urls_that_are_not_called() {
        let strict = ReceiverPolicy::default();
        for bad in [
            "",
            "hook",
            "https://",
            "ftp://example.org/",
            "https://user:pass@example.org/",
            "https://user@example.org/",
            "https://example.org:0/",
            "https://example.org:70000/",
            "https://exa mple.org/",
            "https://example.org/\r\nx: y",
            "https://example.org/#x",
            "https://-x.org/",
            "file:///etc/passwd",
            &format!("https://example.org/{}", "a".repeat(2048)),
        ] {
            assert!(Destination::parse(bad, &strict).is_err(), "{bad:?}");
        }
        let plain = Destination::parse("http://example.org/", &strict);
        assert_eq!(plain, Err(DestinationRefused::NotHttps));
        let good = Destination::parse("https://Hooks.Example.org./a?b=c", &strict).expect("legal");
        assert_eq!(
            (good.host(), good.port(), good.path()),
            ("hooks.example.org", 443, "/a?b=c")
        );
        assert_eq!(good.authority(), "hooks.example.org");
        let odd = Destination::parse("https://[2600::1]:8443", &strict).expect("legal");
        assert_eq!(
            (odd.authority().as_str(), odd.path()),
            ("[2600::1]:8443", "/")
        );
    }

    #[test]
    fn an_address_that_is_written_out_is_refused_when_it_is_given() {
        let strict = ReceiverPolicy::default();
        for bad in [
            "https://127.0.0.1/",
            "https://10.1.2.3:8443/hook",
            "https://169.254.169.254/latest",
            "https://[::1]/",
            "https://[fd00::1]/",
            "https://[::ffff:10.0.0.1]/",
            "https://0.0.0.0/",
            "https://localhost/",
            "https://a.localhost/",
        ] {
            let refused = Destination::accept(bad, &strict);
            let range = matches!(refused, Err(DestinationRefused::Range(_)));
            assert!(range, "{bad}: {refused:?}");
        }
        for good in ["https://8.8.8.8/", "https://hooks.example.org/"] {
            assert!(Destination::accept(good, &strict).is_ok(), "{good}");
        }
        let allowed = policy("10.1.2.3", "10.0.0.0/8");
        assert!(Destination::accept("https://10.1.2.3/", &allowed).is_ok());
        assert!(Destination::accept("https://10.1.2.4/", &allowed).is_err());
    }

    #[test]
    fn exceptions_are_for_one_host_and_never_for_metadata() {
        let to = |host: &str| {
            Destination::parse(&format!("https://{host}/"), &ReceiverPolicy::default())
                .expect("legal")
        };
        let check = |host: &str, addr: &str, policy: &ReceiverPolicy| {
            to(host)
                .check(addr.parse().expect("address"), policy)
                .is_ok()
        };
        let none = ReceiverPolicy::default();
        assert!(check("example.org", "8.8.8.8", &none));
        for addr in [
            "127.0.0.1",
            "10.0.0.1",
            "169.254.169.254",
            "::1",
            "fd00::1",
            "::ffff:10.0.0.1",
        ] {
            assert!(!check("example.org", addr, &none), "{addr}");
        }
        assert!(check(
            "ci.example.org",
            "10.1.1.1",
            &policy("ci.example.org", "10.0.0.0/8")
        ));
        assert!(!check(
            "other.org",
            "10.1.1.1",
            &policy("ci.example.org", "10.0.0.0/8")
        ));
        assert!(check(
            "localhost",
            "127.0.0.1",
            &policy("localhost", "127.0.0.0/8")
        ));
        assert!(!check(
            "m.org",
            "169.254.169.254",
            &policy("m.org", "169.254.0.0/16")
        ));
        assert!(!check(
            "m.org",
            "255.255.255.255",
            &policy("m.org", "0.0.0.0/0")
        ));
    }
}
