//! What a machine may reach: meaning only. `kiln-network` gives it effect.
//!
//! [`rule`] is one destination, [`NetworkPolicy`] all of a machine; the rest is which addresses no name may lead to.

mod rule;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use rule::{AllowRule, ParseRuleError, Protocol, normal_host};

/// Suffix of kiln's own services inside a guest; never resolvable outside.
pub const INTERNAL_SUFFIX: &str = ".kiln.internal";
/// kiln's registry as a guest names it.
pub const REGISTRY_HOST: &str = "registry.kiln.internal";
/// Most ports one rule may name.
pub const PORTS_MAX: usize = 16;

/// What a machine may reach. kiln's own services are not part of it: the worker wires them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
pub enum NetworkPolicy {
    /// Nothing but kiln's own services.
    #[default]
    Isolated,
    /// The listed hosts and nothing else.
    Egress {
        /// Sorted, without duplicates.
        allow: Vec<AllowRule>,
    },
    /// Every name, above the floor of addresses. Only by an operator's grant.
    Open,
}

/// Answer of a policy for a name and port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NameVerdict {
    /// A rule names the host and the port.
    Allowed(AllowRule),
    /// A rule names the host but not this port.
    PortRefused,
    /// No rule names the host.
    HostRefused,
}

impl NetworkPolicy {
    /// A policy of these rules; none means isolated.
    #[must_use]
    pub fn from_rules(rules: impl IntoIterator<Item = AllowRule>) -> Self {
        let mut allow: Vec<AllowRule> = rules.into_iter().collect();
        allow.sort();
        allow.dedup();
        if allow.is_empty() {
            Self::Isolated
        } else {
            Self::Egress { allow }
        }
    }

    /// The rules, empty when isolated, and when open.
    #[must_use]
    pub fn rules(&self) -> &[AllowRule] {
        match self {
            Self::Isolated | Self::Open => &[],
            Self::Egress { allow } => allow,
        }
    }

    /// Whether any rule names this host (for DNS).
    #[must_use]
    pub fn knows_host(&self, host: &str) -> bool {
        let Some(host) = normal_host(host) else {
            return false;
        };
        match self {
            Self::Open => AllowRule::new(&host, &[]).is_ok(),
            _ => self.rules().iter().any(|rule| rule.matches(&host)),
        }
    }

    /// Decides one connection by name. Addresses are checked later, at connect time. Of several rules for the same name and port an
    /// exact one decides before a wildcard, and a longer wildcard before a shorter one.
    #[must_use]
    pub fn decide(&self, host: &str, port: u16) -> NameVerdict {
        let Some(host) = normal_host(host) else {
            return NameVerdict::HostRefused;
        };
        if matches!(self, Self::Open) {
            return match AllowRule::new(&host, &[port]) {
                Ok(rule) => NameVerdict::Allowed(rule.with_protocol(Protocol::of_port(port))),
                Err(_) => NameVerdict::HostRefused,
            };
        }
        let matching = || self.rules().iter().filter(|rule| rule.matches(&host));
        let nearest = matching()
            .filter(|rule| rule.ports().contains(&port))
            .max_by_key(|rule| (!rule.is_wildcard(), rule.host().len()));
        match nearest {
            Some(rule) => NameVerdict::Allowed(rule.clone()),
            None if matching().next().is_some() => NameVerdict::PortRefused,
            None => NameVerdict::HostRefused,
        }
    }

    /// Whether everything that `rule` admits is admitted here as well.
    #[must_use]
    pub fn covers_rule(&self, rule: &AllowRule) -> bool {
        match self {
            Self::Isolated => false,
            Self::Open => true,
            Self::Egress { allow } => rule
                .single_ports()
                .all(|one| allow.iter().any(|may| may.covers(&one))),
        }
    }

    /// Whether everything that `other` admits is admitted here as well.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        match other {
            Self::Isolated => true,
            Self::Open => matches!(self, Self::Open),
            Self::Egress { allow } => allow.iter().all(|rule| self.covers_rule(rule)),
        }
    }

    /// What this policy and the other one both admit.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::Open, both) | (both, Self::Open) => both.clone(),
            (Self::Isolated, _) | (_, Self::Isolated) => Self::Isolated,
            (Self::Egress { allow }, Self::Egress { allow: others }) => Self::from_rules(
                allow
                    .iter()
                    .flat_map(|rule| others.iter().filter_map(|other| rule.and(other))),
            ),
        }
    }
}

/// Why an address may not be dialled although its name is allowed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpecialRange {
    /// This host itself. Can never be excepted.
    Loopback,
    /// Link-local, where clouds serve instance metadata. Can never be excepted.
    LinkLocal,
    /// Unspecified, broadcast or multicast. Can never be excepted.
    NotUnicast,
    /// Private (RFC 1918, RFC 4193, RFC 6598).
    Private,
    /// Any other range of the IANA special-purpose registries (documentation, benchmarking, transition...).
    Reserved,
}

impl SpecialRange {
    /// Whether an operator may except a name that resolves into such a range.
    #[must_use]
    pub fn may_be_excepted(self) -> bool {
        matches!(self, Self::Private | Self::Reserved)
    }
}

/// Classifies an address by the IANA special-purpose registries (RFC 6890 and later entries).
/// `None` means an ordinary public unicast address. IPv4-mapped, 6to4, NAT64 and Teredo addresses
/// are never public, because they hide another address.
#[must_use]
pub fn special_range(addr: IpAddr) -> Option<SpecialRange> {
    match addr {
        IpAddr::V4(v4) => special_v4(v4),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => Some(special_v4(v4).unwrap_or(SpecialRange::Reserved)),
            None => special_v6(v6),
        },
    }
}

fn special_v4(addr: Ipv4Addr) -> Option<SpecialRange> {
    use SpecialRange::*;
    const TABLE: &[([u8; 4], u32, SpecialRange)] = &[
        ([0, 0, 0, 0], 8, NotUnicast),
        ([10, 0, 0, 0], 8, Private),
        ([100, 64, 0, 0], 10, Private),
        ([127, 0, 0, 0], 8, Loopback),
        ([169, 254, 0, 0], 16, LinkLocal),
        ([172, 16, 0, 0], 12, Private),
        ([192, 0, 0, 0], 24, Reserved),
        ([192, 0, 2, 0], 24, Reserved),
        ([192, 31, 196, 0], 24, Reserved),
        ([192, 52, 193, 0], 24, Reserved),
        ([192, 88, 99, 0], 24, Reserved),
        ([192, 168, 0, 0], 16, Private),
        ([192, 175, 48, 0], 24, Reserved),
        ([198, 18, 0, 0], 15, Reserved),
        ([198, 51, 100, 0], 24, Reserved),
        ([203, 0, 113, 0], 24, Reserved),
        ([224, 0, 0, 0], 4, NotUnicast),
        ([255, 255, 255, 255], 32, NotUnicast),
        ([240, 0, 0, 0], 4, Reserved),
    ];
    // Alibaba Cloud's and others' metadata services live inside otherwise exceptable ranges.
    if addr == Ipv4Addr::new(100, 100, 100, 200) || addr == Ipv4Addr::new(192, 0, 0, 192) {
        return Some(LinkLocal);
    }
    let bits = u32::from(addr);
    TABLE
        .iter()
        .find(|(net, len, _)| (bits ^ u32::from_be_bytes(*net)) >> (32 - len) == 0)
        .map(|(_, _, range)| *range)
}

fn special_v6(addr: Ipv6Addr) -> Option<SpecialRange> {
    use SpecialRange::*;
    const TABLE: &[([u16; 4], u32, SpecialRange)] = &[
        ([0x64, 0xff9b, 0, 0], 96, Reserved),
        ([0x64, 0xff9b, 1, 0], 48, Reserved),
        ([0x100, 0, 0, 0], 64, Reserved),
        ([0x2001, 0, 0, 0], 23, Reserved),
        ([0x2001, 0xdb8, 0, 0], 32, Reserved),
        ([0x2002, 0, 0, 0], 16, Reserved),
        ([0x2620, 0x4f, 0x8000, 0], 48, Reserved),
        ([0x3fff, 0, 0, 0], 20, Reserved),
        ([0x5f00, 0, 0, 0], 16, Reserved),
        ([0xfc00, 0, 0, 0], 7, Private),
        ([0xfe80, 0, 0, 0], 10, LinkLocal),
        ([0xfec0, 0, 0, 0], 10, Private),
        ([0xff00, 0, 0, 0], 8, NotUnicast),
    ];
    if addr.is_loopback() {
        return Some(Loopback);
    }
    // The EC2 metadata service over IPv6.
    if addr == Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254) {
        return Some(LinkLocal);
    }
    let bits = u128::from(addr);
    if bits >> 32 == 0 {
        return Some(NotUnicast);
    }
    TABLE
        .iter()
        .find(|(net, len, _)| {
            let net = net
                .iter()
                .fold(0_u128, |acc, part| (acc << 16) | u128::from(*part))
                << 64;
            (bits ^ net) >> (128 - len) == 0
        })
        .map(|(_, _, range)| *range)
}

/// An address range an operator excepts for one name: `192.0.2.0/24`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    net: IpAddr,
    len: u8,
}

/// Why a text is not an address range.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not an address range such as 192.0.2.0/24")]
pub struct ParseCidrError(String);

impl Cidr {
    /// Whether the address lies in the range. Families never mix.
    #[must_use]
    pub fn contains(&self, addr: IpAddr) -> bool {
        match (self.net, addr) {
            (IpAddr::V4(net), IpAddr::V4(addr)) => {
                self.len == 0
                    || (u32::from(net) ^ u32::from(addr)) >> (32 - u32::from(self.len)) == 0
            }
            (IpAddr::V6(net), IpAddr::V6(addr)) => {
                self.len == 0
                    || (u128::from(net) ^ u128::from(addr)) >> (128 - u32::from(self.len)) == 0
            }
            _ => false,
        }
    }
}

impl FromStr for Cidr {
    type Err = ParseCidrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseCidrError(text.chars().take(60).collect());
        let (net, len) = text.split_once('/').ok_or_else(error)?;
        let net: IpAddr = net.parse().map_err(|_| error())?;
        let len: u8 = len.parse().map_err(|_| error())?;
        let len_max = if net.is_ipv4() { 32 } else { 128 };
        if len > len_max {
            return Err(error());
        }
        Ok(Self { net, len })
    }
}

impl TryFrom<String> for Cidr {
    type Error = ParseCidrError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.net, self.len)
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Operator-written: this name may resolve into this range although the range is special.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RangeException {
    /// Exact host name.
    pub host: String,
    /// The range its address may lie in.
    pub range: Cidr,
}

/// Checks an address at connect time.
///
/// # Errors
/// The special range it lies in, when no exception for this host covers it.
pub fn check_address(
    host: &str,
    addr: IpAddr,
    exceptions: &[RangeException],
) -> Result<(), SpecialRange> {
    let Some(range) = special_range(addr) else {
        return Ok(());
    };
    let host = normal_host(host).unwrap_or_default();
    let excepted =
        |e: &RangeException| e.host.eq_ignore_ascii_case(&host) && e.range.contains(addr);
    if range.may_be_excepted() && exceptions.iter().any(excepted) {
        Ok(())
    } else {
        Err(range)
    }
}

/// One decision of the gateway, kept in the job's record.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EgressEvent {
    /// Host name as asked.
    pub host: String,
    /// Port as asked; 0 for a DNS question.
    pub port: u16,
    /// Address dialled, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Rule that admitted it, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// What was decided.
    pub verdict: EgressVerdict,
    /// Bytes from the guest to the host named.
    pub bytes_out: u64,
    /// Bytes back.
    pub bytes_in: u64,
    /// The policy's phase in which it began, where a policy has phases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// What the rule that admitted it makes it speak, if the rule says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// It ended because the rules became narrower.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub narrowed: bool,
}

impl EgressEvent {
    /// An event of a decision alone: no address, no rule, no bytes.
    #[must_use]
    pub fn of(host: &str, port: u16, verdict: EgressVerdict) -> Self {
        Self {
            host: host.to_owned(),
            port,
            address: None,
            rule: None,
            verdict,
            bytes_out: 0,
            bytes_in: 0,
            phase: None,
            protocol: None,
            narrowed: false,
        }
    }
}

/// What the gateway decided for one connection.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "decision")]
pub enum EgressVerdict {
    /// Connected.
    Allowed,
    /// No rule for this host.
    HostRefused,
    /// A rule for the host, none for the port.
    PortRefused,
    /// The address lies in a special-purpose range.
    AddressRefused {
        /// Which.
        range: SpecialRange,
    },
    /// TLS without the right SNI, or HTTP without the right Host.
    NameMismatch {
        /// What the client said, if anything.
        said: Option<String>,
    },
    /// Allowed, but the network failed.
    Unreachable {
        /// The error text.
        error: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_policy_admits_names_and_no_addresses() {
        let open = NetworkPolicy::Open;
        let NameVerdict::Allowed(rule) = open.decide("Any.example.org", 5432) else {
            panic!("not admitted");
        };
        assert_eq!(rule.to_string(), "any.example.org:5432/raw");
        for no in [
            "10.0.0.1",
            "169.254.169.254",
            "registry.kiln.internal",
            "a b",
        ] {
            assert_eq!(open.decide(no, 443), NameVerdict::HostRefused, "{no}");
            assert!(!open.knows_host(no), "{no}");
        }
    }

    #[test]
    fn the_nearest_rule_decides() {
        let rules = [
            "*.example.org:443/raw",
            "*.a.example.org:443/tls",
            "x.a.example.org:443/http",
        ];
        let policy = NetworkPolicy::from_rules(rules.map(|rule| rule.parse().expect("rule")));
        for (host, want) in [
            ("x.a.example.org", rules[2]),
            ("y.a.example.org", rules[1]),
            ("y.example.org", rules[0]),
        ] {
            let NameVerdict::Allowed(rule) = policy.decide(host, 443) else {
                panic!("{host}");
            };
            assert_eq!(rule.to_string(), want);
        }
        assert_eq!(policy.decide("y.example.org", 80), NameVerdict::PortRefused);
        assert_eq!(policy.decide("example.org", 443), NameVerdict::HostRefused);
    }

    #[test]
    fn special_addresses_of_each_kind() {
        use SpecialRange::*;
        let cases = [
            ("127.0.0.1", Some(Loopback)),
            ("::1", Some(Loopback)),
            ("::ffff:127.0.0.1", Some(Loopback)),
            ("169.254.169.254", Some(LinkLocal)),
            ("fe80::1", Some(LinkLocal)),
            ("fd00:ec2::254", Some(LinkLocal)),
            ("100.100.100.200", Some(LinkLocal)),
            ("10.1.2.3", Some(Private)),
            ("100.64.0.1", Some(Private)),
            ("172.31.255.255", Some(Private)),
            ("172.32.0.0", None),
            ("192.168.0.1", Some(Private)),
            ("198.19.255.255", Some(Reserved)),
            ("192.0.2.1", Some(Reserved)),
            ("224.0.0.1", Some(NotUnicast)),
            ("255.255.255.255", Some(NotUnicast)),
            ("0.0.0.0", Some(NotUnicast)),
            ("250.0.0.1", Some(Reserved)),
            ("::", Some(NotUnicast)),
            ("64:ff9b::7f00:1", Some(Reserved)),
            ("2002:7f00:1::", Some(Reserved)),
            ("2001:db8::1", Some(Reserved)),
            ("::ffff:8.8.8.8", Some(Reserved)),
            ("8.8.8.8", None),
            ("2606:4700::1111", None),
        ];
        for (text, want) in cases {
            assert_eq!(
                special_range(text.parse().expect("address")),
                want,
                "{text}"
            );
        }
    }

    #[test]
    fn exceptions_cover_one_name_and_never_loopback_or_metadata() {
        let exception = |range: &str| RangeException {
            host: "mirror.example.org".to_owned(),
            range: range.parse().expect("range"),
        };
        let private = "10.9.8.7".parse().expect("address");
        let exceptions = [
            exception("10.0.0.0/8"),
            exception("127.0.0.0/8"),
            exception("169.254.0.0/16"),
        ];
        assert_eq!(
            check_address("mirror.example.org", private, &exceptions),
            Ok(())
        );
        assert_eq!(
            check_address("other.example.org", private, &exceptions),
            Err(SpecialRange::Private)
        );
        for never in ["127.0.0.1", "169.254.169.254"] {
            let addr = never.parse().expect("address");
            assert!(
                check_address("mirror.example.org", addr, &exceptions).is_err(),
                "{never}"
            );
        }
    }
}
