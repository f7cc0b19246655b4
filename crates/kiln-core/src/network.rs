//! What a machine may reach: meaning only. `kiln-network` gives it effect.
//!
//! A rule is an exact host name with optional ports. Wildcards and learning belong to the clean-room work.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Suffix of kiln's own services inside a guest; never resolvable outside.
pub const INTERNAL_SUFFIX: &str = ".kiln.internal";
/// kiln's registry as a guest names it.
pub const REGISTRY_HOST: &str = "registry.kiln.internal";
/// Most ports one rule may name.
pub const PORTS_MAX: usize = 16;

/// One allowed destination: `host`, `host:443` or `host:80,443`. Without ports: 80 and 443.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AllowRule {
    host: String,
    ports: Vec<u16>,
}

/// Why a text is not an allow rule.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseRuleError {
    /// The host part is not a DNS name.
    #[error(
        "{0:?} is not a host name: write an exact DNS name, for example example.org or example.org:443"
    )]
    Host(String),
    /// IP addresses are refused: policy is about names.
    #[error("{0:?} is an IP address: rules name hosts, never addresses")]
    Address(String),
    /// kiln's own services are not a matter of rules.
    #[error("{0:?} is a name of kiln's own: no rule can admit what ends in kiln.internal")]
    Internal(String),
    /// The ports part is wrong.
    #[error("{0:?} is not a list of ports (1-65535, at most 16, separated by commas)")]
    Ports(String),
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
        Ok(Self { host, ports })
    }

    /// The exact host name, lower case.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The allowed ports, sorted.
    #[must_use]
    pub fn ports(&self) -> &[u16] {
        &self.ports
    }
}

impl FromStr for AllowRule {
    type Err = ParseRuleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.parse::<Ipv6Addr>().is_ok() {
            return Err(ParseRuleError::Address(text.to_owned()));
        }
        if text.contains("://") {
            return Err(ParseRuleError::Host(text.chars().take(260).collect()));
        }
        let (host, ports) = text.split_once(':').unwrap_or((text, ""));
        let bad_ports = || ParseRuleError::Ports(ports.chars().take(120).collect());
        if text.contains(':') && ports.is_empty() {
            return Err(bad_ports());
        }
        let ports: Result<Vec<u16>, _> = ports
            .split(',')
            .filter(|p| !p.is_empty())
            .map(str::parse)
            .collect();
        Self::new(host, &ports.map_err(|_| bad_ports())?)
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
        write!(f, "{}:{}", self.host, ports.join(","))
    }
}

impl fmt::Debug for AllowRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

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

    /// The rules, empty when isolated.
    #[must_use]
    pub fn rules(&self) -> &[AllowRule] {
        match self {
            Self::Isolated => &[],
            Self::Egress { allow } => allow,
        }
    }

    /// Whether any rule names this host (for DNS).
    #[must_use]
    pub fn knows_host(&self, host: &str) -> bool {
        normal_host(host).is_some_and(|host| self.rules().iter().any(|rule| rule.host == host))
    }

    /// Decides one connection by name. Addresses are checked later, at connect time.
    #[must_use]
    pub fn decide(&self, host: &str, port: u16) -> NameVerdict {
        let Some(host) = normal_host(host) else {
            return NameVerdict::HostRefused;
        };
        let mut known = false;
        for rule in self.rules().iter().filter(|rule| rule.host == host) {
            known = true;
            if rule.ports.contains(&port) {
                return NameVerdict::Allowed(rule.clone());
            }
        }
        if known {
            NameVerdict::PortRefused
        } else {
            NameVerdict::HostRefused
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
            "*.x.org",
            "10.0.0.1",
            "::1",
            "[::1]:80",
            "a:",
            "a:0",
            "a:70000",
            "a b",
            "0x7f.1",
            "registry.kiln.internal",
            "kiln.internal:443",
            "a.KILN.internal.",
        ] {
            assert!(bad.parse::<AllowRule>().is_err(), "{bad}");
        }
        assert!("notkiln.internal".parse::<AllowRule>().is_ok());
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
