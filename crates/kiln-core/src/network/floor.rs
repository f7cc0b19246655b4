//! The floor below every policy: which addresses no name may lead to, and what an operator may except.
//!
//! The tables are IANA's special-purpose address registries (RFC 6890 and what was registered since, as of RFC 9780), multicast,
//! and the addresses at which clouds serve credentials. Whatever hides an IPv4 address (mapped, compatible, translated, 6to4, Teredo,
//! ISATAP, NAT64) is never public, and where the hidden address can never be excepted neither can the hiding one.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::normal_host;

/// Why an address may not be dialled although its name is allowed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpecialRange {
    /// This host itself. Can never be excepted.
    Loopback,
    /// Link-local, where clouds serve instance metadata. Can never be excepted.
    LinkLocal,
    /// A cloud's metadata or host service outside of link-local. Can never be excepted.
    Metadata,
    /// Unspecified, broadcast or multicast. Can never be excepted.
    NotUnicast,
    /// Private (RFC 1918, RFC 4193, RFC 6598).
    Private,
    /// Any other range of the IANA special-purpose registries (documentation, benchmarking, transition...).
    Reserved,
    /// An address of this host, or of a controller, worker or database of this installation, however public.
    Own,
}

impl SpecialRange {
    /// Whether an operator may except a name that resolves into such a range.
    #[must_use]
    pub fn may_be_excepted(self) -> bool {
        matches!(self, Self::Private | Self::Reserved | Self::Own)
    }
}

/// Classifies an address by itself. `None` means an ordinary public unicast address.
#[must_use]
pub fn special_range(addr: IpAddr) -> Option<SpecialRange> {
    match addr {
        IpAddr::V4(v4) => special_v4(v4),
        IpAddr::V6(v6) => match hidden_v4(v6) {
            hidden if hidden.is_empty() => special_v6(v6),
            hidden => Some(of_hidden(&hidden)),
        },
    }
}

/// The range of an address that hides these: theirs when it can never be excepted or is told alone, else reserved.
fn of_hidden(hidden: &[Ipv4Addr]) -> SpecialRange {
    let ranges: Vec<SpecialRange> = hidden.iter().filter_map(|v4| special_v4(*v4)).collect();
    let never = ranges.iter().find(|range| !range.may_be_excepted());
    match (never, hidden) {
        (Some(range), _) => *range,
        (None, [_]) => ranges.first().copied().unwrap_or(SpecialRange::Reserved),
        (None, _) => SpecialRange::Reserved,
    }
}

/// IPv4 addresses that lie outside of link-local and other ranges that are never excepted, and hand out credentials or control the host.
const METADATA_V4: [Ipv4Addr; 3] = [
    // Alibaba Cloud.
    Ipv4Addr::new(100, 100, 100, 200),
    // Oracle Cloud.
    Ipv4Addr::new(192, 0, 0, 192),
    // Azure's host agent, in a public range.
    Ipv4Addr::new(168, 63, 129, 16),
];

/// The same of IPv6.
const METADATA_V6: [Ipv6Addr; 4] = [
    // EC2 metadata, EKS pod identity.
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23),
    // Google Cloud.
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
    // Scaleway.
    Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42),
];

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
    if METADATA_V4.contains(&addr) {
        return Some(Metadata);
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
        ([0x100, 0, 0, 0], 64, Reserved),
        ([0x100, 0, 0, 1], 64, Reserved),
        ([0x2001, 0, 0, 0], 23, Reserved),
        ([0x2001, 0xdb8, 0, 0], 32, Reserved),
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
    if addr.is_unspecified() {
        return Some(NotUnicast);
    }
    if METADATA_V6.contains(&addr) {
        return Some(Metadata);
    }
    let listed = TABLE.iter().find(|(net, len, _)| {
        let net = net
            .iter()
            .fold(0_u128, |acc, part| (acc << 16) | u128::from(*part))
            << 64;
        (u128::from(addr) ^ net) >> (128 - len) == 0
    });
    // Global unicast is 2000::/3; nothing else was ever given out (RFC 4291 §2.4, IANA's IPv6 address space).
    let outside = u128::from(addr) >> 125 != 1;
    listed
        .map(|(_, _, range)| *range)
        .or(outside.then_some(Reserved))
}

/// The IPv4 addresses that an IPv6 address can stand for; several where the form does not say where it is.
fn hidden_v4(addr: Ipv6Addr) -> Vec<Ipv4Addr> {
    let bits = u128::from(addr);
    let part = |shift: u32| {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "32 bits are what is wanted"
        )]
        let part = (bits >> shift) as u32;
        Ipv4Addr::from(part)
    };
    let segments = addr.segments();
    match segments {
        // Its own meaning: unspecified and loopback.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => Vec::new(),
        // Compatible (RFC 4291 §2.5.5.1), mapped (§2.5.5.2), translated (RFC 2765), NAT64 (RFC 6052 §2.1).
        [0, 0, 0, 0, 0, 0 | 0xffff, ..]
        | [0, 0, 0, 0, 0xffff, 0, ..]
        | [0x64, 0xff9b, 0, 0, 0, 0, ..] => vec![part(0)],
        // NAT64 of a site's own choice of length (RFC 8215).
        [0x64, 0xff9b, 1, ..] => {
            let places = Nat64Prefix::LENGTHS.iter().filter(|len| **len >= 48);
            places.map(|len| embedded(bits, *len)).collect()
        }
        // Teredo: its server, and the client with all bits turned (RFC 4380 §4).
        [0x2001, 0, ..] => vec![part(64), Ipv4Addr::from(!u32::from(part(0)))],
        // 6to4 (RFC 3056 §2).
        [0x2002, ..] => vec![part(80)],
        // ISATAP (RFC 5214 §6.1), in whatever network.
        [_, _, _, _, 0 | 0x200, 0x5efe, ..] => vec![part(0)],
        _ => Vec::new(),
    }
}

/// The IPv4 address after a prefix of this length (RFC 6052 §2.2): bits 64 to 71 are left out.
fn embedded(bits: u128, len: u32) -> Ipv4Addr {
    let mut octets = [0; 4];
    let mut at = usize::try_from(len / 8).unwrap_or(0);
    for octet in &mut octets {
        if at == 8 {
            at += 1;
        }
        *octet = bits.to_be_bytes()[at.min(15)];
        at += 1;
    }
    Ipv4Addr::from(octets)
}

/// A prefix under which the network of this host translates IPv6 to IPv4 (RFC 6052).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Nat64Prefix {
    net: u128,
    len: u32,
}

impl Nat64Prefix {
    /// The name whose IPv6 addresses, where there are any, were made by the translator (RFC 7050 §2.1).
    pub const NAME: &str = "ipv4only.arpa";
    /// Lengths a prefix may have (RFC 6052 §2.2), longest first.
    const LENGTHS: [u32; 6] = [96, 64, 56, 48, 40, 32];
    /// The addresses that [`Self::NAME`] has (RFC 7050 §8.2).
    const WELL_KNOWN: [Ipv4Addr; 2] =
        [Ipv4Addr::new(192, 0, 0, 170), Ipv4Addr::new(192, 0, 0, 171)];

    /// Every prefix that these answers for [`Self::NAME`] show (RFC 7050 §3): one that fits two ways is taken both ways.
    #[must_use]
    pub fn of_answers(answers: &[IpAddr]) -> Vec<Self> {
        let mut found = Vec::new();
        for answer in answers {
            let IpAddr::V6(v6) = answer else { continue };
            let bits = u128::from(*v6);
            for len in Self::LENGTHS {
                let prefix = Self {
                    net: bits >> (128 - len) << (128 - len),
                    len,
                };
                if Self::WELL_KNOWN.contains(&embedded(bits, len)) && !found.contains(&prefix) {
                    found.push(prefix);
                }
            }
        }
        found
    }

    /// The IPv4 address that an address under this prefix stands for.
    #[must_use]
    pub fn hidden(&self, addr: IpAddr) -> Option<Ipv4Addr> {
        let IpAddr::V6(v6) = addr else { return None };
        let bits = u128::from(v6);
        ((bits ^ self.net) >> (128 - self.len) == 0).then(|| embedded(bits, self.len))
    }
}

/// What of the floor only this host knows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Surroundings {
    /// Addresses of this host and of the installation's controllers, workers and databases.
    pub own: Vec<Cidr>,
    /// Prefixes of the network's translator.
    pub nat64: Vec<Nat64Prefix>,
}

impl Surroundings {
    /// As [`special_range`], with what is known here.
    #[must_use]
    pub fn special_range(&self, addr: IpAddr) -> Option<SpecialRange> {
        let itself = special_range(addr);
        if itself.is_some_and(|range| !range.may_be_excepted()) {
            return itself;
        }
        let hidden: Vec<Ipv4Addr> = (self.nat64.iter())
            .filter_map(|prefix| prefix.hidden(addr))
            .collect();
        if !hidden.is_empty() {
            let range = of_hidden(&hidden);
            if !range.may_be_excepted() {
                return Some(range);
            }
            let own = hidden.iter().any(|v4| self.is_own((*v4).into()));
            return Some(if own { SpecialRange::Own } else { range });
        }
        let own = || self.is_own(addr).then_some(SpecialRange::Own);
        let hidden_own = || {
            let IpAddr::V6(v6) = addr else { return None };
            let own = hidden_v4(v6).iter().any(|v4| self.is_own((*v4).into()));
            own.then_some(SpecialRange::Own)
        };
        own().or_else(hidden_own).or(itself)
    }

    fn is_own(&self, addr: IpAddr) -> bool {
        self.own.iter().any(|own| own.contains(addr))
    }

    /// As [`check_address`], with what is known here.
    ///
    /// # Errors
    /// The special range it lies in, when no exception for this host covers it.
    pub fn check(
        &self,
        host: &str,
        addr: IpAddr,
        exceptions: &[RangeException],
    ) -> Result<(), SpecialRange> {
        let Some(range) = self.special_range(addr) else {
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

impl From<IpAddr> for Cidr {
    /// This address alone.
    fn from(addr: IpAddr) -> Self {
        Self {
            net: addr,
            len: if addr.is_ipv4() { 32 } else { 128 },
        }
    }
}

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

/// Checks an address by itself at connect time.
///
/// # Errors
/// The special range it lies in, when no exception for this host covers it.
pub fn check_address(
    host: &str,
    addr: IpAddr,
    exceptions: &[RangeException],
) -> Result<(), SpecialRange> {
    Surroundings::default().check(host, addr, exceptions)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// IANA's registries of special-purpose addresses and of multicast, copied row by row: the other way to say what the tables say.
    const IANA_V4: &str = "0.0.0.0/8 0.0.0.0/32 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.0.0/29 \
        192.0.0.8/32 192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 \
        192.88.99.2/32 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 \
        255.255.255.255/32 168.63.129.16/32";
    const IANA_V6: &str = "::1/128 ::/128 ::ffff:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001::/32 2001:1::1/128 \
        2001:1::2/128 2001:1::3/128 2001:2::/48 2001:3::/32 2001:4:112::/48 2001:10::/28 2001:20::/28 2001:30::/28 2001:db8::/32 2002::/16 \
        2620:4f:8000::/48 3fff::/20 5f00::/16 fc00::/7 fe80::/10 ff00::/8";

    fn rows(text: &str) -> Vec<Cidr> {
        let rows = text.split_whitespace().map(|row| row.parse());
        rows.collect::<Result<_, _>>().expect("ranges")
    }

    /// An address of the range whose other bits are these.
    fn inside(range: &Cidr, other: u128) -> IpAddr {
        match range.net {
            IpAddr::V4(net) => {
                let mask = u32::MAX.checked_shr(u32::from(range.len)).unwrap_or(0);
                #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
                let other = other as u32;
                Ipv4Addr::from(u32::from(net) | (other & mask)).into()
            }
            IpAddr::V6(net) => {
                let mask = u128::MAX.checked_shr(u32::from(range.len)).unwrap_or(0);
                Ipv6Addr::from(u128::from(net) | (other & mask)).into()
            }
        }
    }

    proptest! {
        #[test]
        fn nothing_in_a_registered_range_is_public(other: u128) {
            for range in rows(IANA_V4).iter().chain(&rows(IANA_V6)) {
                let addr = inside(range, other);
                prop_assert!(special_range(addr).is_some(), "{addr} of {range}");
            }
        }

        #[test]
        fn an_ipv4_address_outside_of_them_is_public(bits: u32) {
            let addr = IpAddr::from(Ipv4Addr::from(bits));
            let listed = rows(IANA_V4).iter().any(|range| range.contains(addr));
            prop_assert_eq!(special_range(addr).is_some(), listed, "{}", addr);
        }

        #[test]
        fn an_ipv6_address_is_public_in_2000_3_outside_of_them(bits: u128) {
            let bits = bits >> 3 | 1 << 125;
            let addr = Ipv6Addr::from(bits);
            let isatap = matches!(addr.segments(), [_, _, _, _, 0 | 0x200, 0x5efe, ..]);
            let listed = rows(IANA_V6).iter().any(|range| range.contains(addr.into()));
            prop_assert_eq!(special_range(addr.into()).is_some(), listed || isatap, "{}", addr);
        }

        #[test]
        fn no_way_of_hiding_makes_an_address_public_or_an_exception_possible(bits: u32, other: u128, own_isatap: bool) {
            let v4 = Ipv4Addr::from(bits);
            let low = u128::from(bits);
            let network = u128::from(special_v6(Ipv6Addr::from(other)).is_none()) * (other >> 64 << 64);
            let hiding = [
                low, 0xffff_u128 << 32 | low, 0xffff_u128 << 48 | low,
                0x64_ff9b_u128 << 96 | low,
                0x64_ff9b_0001_u128 << 80 | low,
                0x2002_u128 << 112 | low << 80 | (other >> 48),
                0x2001_u128 << 112 | low << 64 | (other >> 64),
                0x2001_u128 << 112 | (other >> 64 << 64 & (u128::from(u32::MAX) << 64)) | u128::from(!bits),
                network | (if own_isatap { 0x200_5efe_u128 } else { 0x5efe }) << 32 | low,
            ];
            let itself = special_range(v4.into());
            for bits in hiding.into_iter().filter(|bits| *bits > 1) {
                let addr = IpAddr::from(Ipv6Addr::from(bits));
                let range = special_range(addr);
                prop_assert!(range.is_some(), "{} hides {}", addr, v4);
                if itself.is_some_and(|range| !range.may_be_excepted()) {
                    prop_assert!(range.is_some_and(|range| !range.may_be_excepted()), "{} hides {}", addr, v4);
                }
            }
        }

        #[test]
        fn a_discovered_prefix_hides_every_address_below_it(net: u128, len in 0_usize..6, bits: u32, second: bool) {
            let len = Nat64Prefix::LENGTHS[len];
            let embed = |v4: u32| {
                let mut octets = (net >> (128 - len) << (128 - len)).to_be_bytes();
                let mut at = usize::try_from(len).expect("small") / 8;
                for octet in v4.to_be_bytes() {
                    at += usize::from(at == 8);
                    octets[at] = octet;
                    at += 1;
                }
                Ipv6Addr::from(octets)
            };
            let answer = embed(0xc000_00aa | u32::from(second)).into();
            let here = Surroundings { nat64: Nat64Prefix::of_answers(&[answer]), own: vec![IpAddr::from([9, 9, 9, 9]).into()] };
            prop_assert!(!here.nat64.is_empty());
            let range = here.special_range(embed(bits).into());
            prop_assert!(range.is_some());
            if special_v4(Ipv4Addr::from(bits)).is_some_and(|range| !range.may_be_excepted()) {
                prop_assert!(range.is_some_and(|range| !range.may_be_excepted()));
            }
            prop_assert!(here.special_range(embed(0x0909_0909).into()).is_some());
        }

        #[test]
        fn no_exception_reaches_loopback_metadata_or_no_host_at_all(bits: u128, v4: bool) {
            let addr: IpAddr = match v4 {
                #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
                true => Ipv4Addr::from(bits as u32).into(),
                false => Ipv6Addr::from(bits).into(),
            };
            let all = ["0.0.0.0/0", "::/0"].map(|range| RangeException { host: "a.example.org".to_owned(), range: range.parse().expect("range") });
            let never = special_range(addr).is_some_and(|range| !range.may_be_excepted());
            prop_assert_eq!(check_address("a.example.org", addr, &all).is_err(), never);
        }
    }

    #[test]
    fn own_addresses_are_special_however_public() {
        let here = Surroundings {
            own: ["198.41.0.4/32", "2600::/64", "10.9.0.0/16"]
                .map(|own| own.parse().expect("range"))
                .to_vec(),
            nat64: Vec::new(),
        };
        let range = |text: &str| here.special_range(text.parse().expect("address"));
        for own in [
            "198.41.0.4",
            "2600::9",
            "10.9.1.1",
            "::ffff:198.41.0.4",
            "2002:c629:4::1",
        ] {
            assert_eq!(range(own), Some(SpecialRange::Own), "{own}");
        }
        assert_eq!(range("198.41.0.5"), None);
        assert_eq!(range("127.0.0.1"), Some(SpecialRange::Loopback));
        let exception = |range: &str| {
            [RangeException {
                host: "a.example.org".to_owned(),
                range: range.parse().expect("range"),
            }]
        };
        let own = "198.41.0.4".parse().expect("address");
        assert_eq!(
            here.check("a.example.org", own, &[]),
            Err(SpecialRange::Own)
        );
        assert_eq!(
            here.check("a.example.org", own, &exception("198.41.0.4/32")),
            Ok(())
        );
        assert_eq!(
            here.check("b.example.org", own, &exception("198.41.0.4/32")),
            Err(SpecialRange::Own)
        );
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
            ("fd00:ec2::254", Some(Metadata)),
            ("100.100.100.200", Some(Metadata)),
            ("168.63.129.16", Some(Metadata)),
            ("fd20:ce::254", Some(Metadata)),
            ("64:ff9b::8.8.8.8", Some(Reserved)),
            ("4000::1", Some(Reserved)),
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
            ("64:ff9b::7f00:1", Some(Loopback)),
            ("2002:7f00:1::", Some(Loopback)),
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
