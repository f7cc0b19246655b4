//! One allowed destination: whom, on which ports, speaking what.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{INTERNAL_SUFFIX, PORTS_MAX};

/// What a connection that a rule admits must speak.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TLS whose server name is the admitted one.
    Tls,
    /// HTTP/1 whose every request names the admitted host.
    Http,
    /// Anything: nothing is looked at, so a server may speak first.
    Raw,
}

impl Protocol {
    /// What a port speaks when nobody says otherwise: TLS on 443, HTTP on 80, anything elsewhere.
    #[must_use]
    pub fn of_port(port: u16) -> Self {
        match port {
            443 => Self::Tls,
            80 => Self::Http,
            _ => Self::Raw,
        }
    }

    /// What connections may speak where both hold: `raw` is everything, and TLS and HTTP have nothing in common.
    #[must_use]
    pub fn and(self, other: Self) -> Option<Self> {
        match (self, other) {
            (Self::Raw, both) | (both, Self::Raw) => Some(both),
            (one, other) => (one == other).then_some(one),
        }
    }

    /// The word for it in a rule.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::Http => "http",
            Self::Raw => "raw",
        }
    }
}

/// One allowed destination: `host`, `host:443`, `host:80,443` or `host:5432/raw`; `*.host` stands for every name below `host`, at any depth,
/// never for `host` itself. Without ports: 80 and 443. Without a protocol each port speaks what [`Protocol::of_port`] says: nothing is told by a
/// connection's own first bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AllowRule {
    host: String,
    ports: Vec<u16>,
    protocol: Option<Protocol>,
}

/// Why a text is not an allow rule.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseRuleError {
    /// The host part is not a DNS name.
    #[error(
        "{0:?} is not a host name: write an exact DNS name, for example example.org or example.org:443"
    )]
    Host(String),
    /// A `*` stands where none may, or for too much.
    #[error(
        "{0:?} is not a wildcard: write `*.` before a name of at least two parts, for example *.example.org"
    )]
    Wildcard(String),
    /// IP addresses are refused: policy is about names.
    #[error("{0:?} is an IP address: rules name hosts, never addresses")]
    Address(String),
    /// kiln's own services are not a matter of rules.
    #[error("{0:?} is a name of kiln's own: no rule can admit what ends in kiln.internal")]
    Internal(String),
    /// The ports part is wrong.
    #[error("{0:?} is not a list of ports (1-65535, at most 16, separated by commas)")]
    Ports(String),
    /// The protocol part is wrong.
    #[error(
        "{0:?} is not a protocol: write tls, http or raw after the port, for example :8443/tls"
    )]
    Protocol(String),
}

/// Lower-case DNS name without the trailing dot, or `None` when it is not a legal host name.
#[must_use]
pub fn normal_host(text: &str) -> Option<String> {
    let host = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let label = |l: &str| {
        !l.is_empty()
            && l.len() <= 63
            && l.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    (host.len() <= 253 && !host.is_empty() && host.split('.').all(label)).then_some(host)
}

/// Whether `*.suffix` stands for this name.
fn is_below(name: &str, suffix: &str) -> bool {
    name.strip_suffix(suffix)
        .is_some_and(|front| front.len() > 1 && front.ends_with('.'))
}

impl AllowRule {
    /// A rule for one host; no ports means 80 and 443.
    ///
    /// # Errors
    /// When the host is not an exact DNS name or the ports are illegal.
    pub fn new(host: &str, ports: &[u16]) -> Result<Self, ParseRuleError> {
        let shown = || host.chars().take(260).collect::<String>();
        if host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
            return Err(ParseRuleError::Address(shown()));
        }
        let host = normal_host(host).ok_or_else(|| ParseRuleError::Host(shown()))?;
        let last = host.rsplit('.').next().unwrap_or_default();
        if last.bytes().all(|b| b.is_ascii_digit()) {
            return Err(ParseRuleError::Address(shown()));
        }
        if format!(".{host}").ends_with(INTERNAL_SUFFIX) {
            return Err(ParseRuleError::Internal(host));
        }
        if ports.len() > PORTS_MAX || ports.contains(&0) {
            return Err(ParseRuleError::Ports(format!("{ports:?}")));
        }
        let mut ports = if ports.is_empty() {
            vec![80, 443]
        } else {
            ports.to_vec()
        };
        ports.sort_unstable();
        ports.dedup();
        Ok(Self {
            host,
            ports,
            protocol: None,
        })
    }

    /// As [`AllowRule::new`], where the host may begin with `*.`.
    ///
    /// # Errors
    /// As there; also when a wildcard stands for too much.
    pub fn of_pattern(pattern: &str, ports: &[u16]) -> Result<Self, ParseRuleError> {
        let wrong = || ParseRuleError::Wildcard(pattern.chars().take(260).collect());
        let Some(suffix) = pattern.strip_prefix("*.") else {
            return match pattern.contains('*') {
                true => Err(wrong()),
                false => Self::new(pattern, ports),
            };
        };
        if suffix.contains('*') {
            return Err(wrong());
        }
        let rule = Self::new(suffix, ports)?;
        // All names of a top-level domain is no list of names, and a longest suffix leaves no name below it.
        if !rule.host.contains('.') || rule.host.len() > 250 {
            return Err(wrong());
        }
        Ok(Self {
            host: format!("*.{}", rule.host),
            ..rule
        })
    }

    /// The same destination, speaking this and nothing else.
    #[must_use]
    pub fn with_protocol(self, protocol: Protocol) -> Self {
        Self {
            protocol: Some(protocol),
            ..self
        }
    }

    /// The host, lower case: an exact name, or `*.` and the name that all its hosts lie below.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The allowed ports, sorted.
    #[must_use]
    pub fn ports(&self) -> &[u16] {
        &self.ports
    }

    /// What its connections to this port must speak.
    #[must_use]
    pub fn speaks(&self, port: u16) -> Protocol {
        self.protocol.unwrap_or(Protocol::of_port(port))
    }

    /// What it says that its connections speak; none means what each port speaks by default.
    #[must_use]
    pub fn protocol(&self) -> Option<Protocol> {
        self.protocol
    }

    /// Whether it stands for the names below one.
    #[must_use]
    pub fn is_wildcard(&self) -> bool {
        self.host.starts_with("*.")
    }

    /// Whether it names this host, which [`normal_host`] gave.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match self.host.strip_prefix("*.") {
            Some(suffix) => is_below(name, suffix),
            None => self.host == name,
        }
    }

    /// The same rule as rules of one port each.
    pub fn single_ports(&self) -> impl Iterator<Item = Self> {
        self.ports.iter().map(|port| Self {
            host: self.host.clone(),
            ports: vec![*port],
            protocol: self.protocol,
        })
    }

    /// Rules of one port each, with what that port speaks when this rule does not say it.
    pub fn spelled_out(&self) -> impl Iterator<Item = Self> {
        self.single_ports().map(|rule| Self {
            protocol: rule
                .protocol
                .or(rule.ports.first().map(|port| Protocol::of_port(*port))),
            ..rule
        })
    }

    /// Whether this rule's host stands for every name that the other's stands for.
    #[must_use]
    pub fn covers_host(&self, other: &Self) -> bool {
        if self.host == other.host {
            return true;
        }
        match (self.host.strip_prefix("*."), other.host.strip_prefix("*.")) {
            (Some(suffix), Some(below)) => is_below(below, suffix),
            (Some(suffix), None) => is_below(&other.host, suffix),
            (None, _) => false,
        }
    }

    /// Whether everything that the other rule admits is admitted by this one alone.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        let covered = |port: &u16| {
            let speaks = other.speaks(*port);
            self.ports.contains(port) && self.speaks(*port).and(speaks) == Some(speaks)
        };
        self.covers_host(other) && other.ports.iter().all(covered)
    }

    /// What both rules admit, if they have anything in common.
    #[must_use]
    pub fn and(&self, other: &Self) -> Option<Self> {
        let host = match (self.covers_host(other), other.covers_host(self)) {
            (true, _) => &other.host,
            (false, true) => &self.host,
            (false, false) => return None,
        };
        let both = |port: u16| self.speaks(port).and(other.speaks(port));
        let common = |port: &u16| other.ports.contains(port) && both(*port).is_some();
        let ports: Vec<u16> = self.ports.iter().copied().filter(common).collect();
        let first = both(*ports.first()?)?;
        // One word for all ports, or none where each speaks what it does by default.
        let said = self.protocol.is_some() || other.protocol.is_some();
        let alike = ports.iter().all(|port| both(*port) == Some(first));
        Some(Self {
            host: host.clone(),
            protocol: (said && alike).then_some(first),
            ports,
        })
    }
}

impl FromStr for AllowRule {
    type Err = ParseRuleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.parse::<Ipv6Addr>().is_ok() || text.starts_with('[') {
            return Err(ParseRuleError::Address(text.chars().take(260).collect()));
        }
        if text.contains("://") {
            return Err(ParseRuleError::Host(text.chars().take(260).collect()));
        }
        let (host, rest) = text.split_once(':').unwrap_or((text, ""));
        let (ports, word) = match rest.split_once('/') {
            Some((ports, word)) => (ports, Some(word)),
            None => (rest, None),
        };
        let bad_ports = || ParseRuleError::Ports(ports.chars().take(120).collect());
        if text.contains(':') && ports.is_empty() {
            return Err(bad_ports());
        }
        let protocol = match word {
            None => None,
            Some("tls") => Some(Protocol::Tls),
            Some("http") => Some(Protocol::Http),
            Some("raw") => Some(Protocol::Raw),
            Some(word) => return Err(ParseRuleError::Protocol(word.chars().take(40).collect())),
        };
        let ports: Result<Vec<u16>, _> = ports
            .split(',')
            .filter(|p| !p.is_empty())
            .map(str::parse)
            .collect();
        let rule = Self::of_pattern(host, &ports.map_err(|_| bad_ports())?)?;
        Ok(Self { protocol, ..rule })
    }
}

impl TryFrom<String> for AllowRule {
    type Error = ParseRuleError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<AllowRule> for String {
    fn from(rule: AllowRule) -> Self {
        rule.to_string()
    }
}

impl fmt::Display for AllowRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports: Vec<String> = self.ports.iter().map(u16::to_string).collect();
        write!(f, "{}:{}", self.host, ports.join(","))?;
        match self.protocol {
            Some(protocol) => write!(f, "/{}", protocol.name()),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for AllowRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::network::{NameVerdict, NetworkPolicy};

    fn rule(text: &str) -> AllowRule {
        text.parse().expect("rule")
    }

    #[test]
    fn rules_parse_and_match_exactly() {
        let rule: AllowRule = "Example.org:443,8443".parse().expect("legal");
        assert_eq!(rule.to_string(), "example.org:443,8443");
        let policy = NetworkPolicy::from_rules([rule.clone()]);
        assert_eq!(
            policy.decide("EXAMPLE.org.", 443),
            NameVerdict::Allowed(rule)
        );
        assert_eq!(policy.decide("example.org", 80), NameVerdict::PortRefused);
        assert_eq!(
            policy.decide("sub.example.org", 443),
            NameVerdict::HostRefused
        );
        assert_eq!(
            policy.decide("example.org\0", 443),
            NameVerdict::HostRefused
        );
        for bad in [
            "",
            "*",
            "*.org",
            "a.*.org",
            "*.*.x.org",
            "*x.org",
            "x.*",
            "*.10.0.0.1",
            "*.kiln.internal",
            "10.0.0.1",
            "::1",
            "[::1]:80",
            "a:",
            "a:0",
            "a:70000",
            "a b",
            "0x7f.1",
            "a:443/",
            "a:443/TLS",
            "a/tls",
            "a:443/tls/raw",
            "registry.kiln.internal",
            "kiln.internal:443",
            "a.KILN.internal.",
        ] {
            assert!(bad.parse::<AllowRule>().is_err(), "{bad}");
        }
        assert!("notkiln.internal".parse::<AllowRule>().is_ok());
        assert!(AllowRule::new("*.x.org", &[443]).is_err());
    }

    #[test]
    fn a_wildcard_is_every_name_below_and_never_the_apex() {
        let wild = rule("*.Example.org");
        for (name, want) in [
            ("a.example.org", true),
            ("a.b.example.org", true),
            ("example.org", false),
            ("aexample.org", false),
            (".example.org", false),
            ("a.example.org.evil.org", false),
        ] {
            assert_eq!(wild.matches(name), want, "{name}");
        }
    }

    #[test]
    fn what_two_rules_have_in_common() {
        let common = |a: &str, b: &str| {
            let both = rule(a).and(&rule(b));
            assert_eq!(both, rule(b).and(&rule(a)), "{a} {b}");
            both.map(|rule| rule.to_string())
        };
        for (a, b, want) in [
            ("*.x.org:443/tls", "a.x.org:443", Some("a.x.org:443/tls")),
            ("*.x.org:443", "*.b.x.org:443,80", Some("*.b.x.org:443")),
            ("*.x.org:443", "x.org:443", None),
            ("a.org:5432/raw", "a.org:5432/tls", Some("a.org:5432/tls")),
            ("a.org:80/http", "a.org:80/tls", None),
            ("a.org:80", "a.org:81", None),
            ("a.org:443", "a.org:443/raw", Some("a.org:443/tls")),
            ("a.org:80", "a.org:80/tls", None),
            ("a.org", "a.org:80,443/raw", Some("a.org:80,443")),
            ("a.org", "a.org:80,443/tls", Some("a.org:443/tls")),
            (
                "a.org:80,8443",
                "a.org:80,8443/http",
                Some("a.org:80,8443/http"),
            ),
            ("a.org:5432", "a.org:5432/raw", Some("a.org:5432/raw")),
        ] {
            assert_eq!(common(a, b).as_deref(), want, "{a} {b}");
        }
        assert!(!rule("a.org:443/tls").covers(&rule("a.org:443/raw")));
        assert!(rule("a.org:443/raw").covers(&rule("a.org:443")));
        assert!(!rule("a.org:443").covers(&rule("a.org:443/raw")));
        assert!(!rule("a.org:443").covers(&rule("a.org:443/http")));
        assert!(rule("a.org:443").covers(&rule("a.org:443/tls")));
        assert!(rule("a.org:443/tls").covers(&rule("a.org:443")));
        assert!(rule("a.org:5432").covers(&rule("a.org:5432/raw")));
    }

    fn any_rule() -> impl Strategy<Value = AllowRule> {
        let host = "(\\*\\.)?([ab]\\.){0,2}[xy]\\.org";
        let ports = "(:(80|443|22|80,22)(/(tls|http|raw))?)?";
        (host, ports).prop_map(|(host, ports)| rule(&format!("{host}{ports}")))
    }

    fn any_port() -> impl Strategy<Value = u16> {
        prop::sample::select(vec![22, 80, 443, 444])
    }

    fn any_protocol() -> impl Strategy<Value = Protocol> {
        prop::sample::select(vec![Protocol::Tls, Protocol::Http, Protocol::Raw])
    }

    fn any_name() -> impl Strategy<Value = String> {
        "([ab]\\.){0,3}[xy]\\.org"
    }

    proptest! {
        #[test]
        fn rules_read_back(rule in any_rule()) {
            prop_assert_eq!(rule.to_string().parse::<AllowRule>(), Ok(rule));
        }

        #[test]
        fn both_admit_what_each_admits(a in any_rule(), b in any_rule(), name in any_name(), port in any_port(), speaks in any_protocol()) {
            let admits = |rule: &AllowRule| {
                let said = rule.speaks(port).and(speaks) == Some(speaks);
                rule.matches(&name) && rule.ports().contains(&port) && said
            };
            let both = a.and(&b);
            prop_assert_eq!(both.as_ref().is_some_and(admits), admits(&a) && admits(&b));
            if let Some(both) = &both {
                prop_assert!(a.covers(both) && b.covers(both));
            }
            let spelled: Vec<AllowRule> = a.spelled_out().collect();
            prop_assert_eq!(spelled.iter().any(admits), admits(&a));
            if a.covers(&b) {
                prop_assert!(!admits(&b) || admits(&a));
                let both: Vec<AllowRule> = both.iter().flat_map(AllowRule::spelled_out).collect();
                prop_assert_eq!(both, b.spelled_out().collect::<Vec<_>>());
            }
        }
    }
}
