//! What a machine may reach: meaning only. `kiln-network` gives it effect.
//!
//! [`rule`] is one destination, [`NetworkPolicy`] all of a machine, [`floor`] which addresses no name may lead to.

mod floor;
mod rule;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::git_gateway::GitRefused;

pub use floor::{
    Cidr, Nat64Prefix, ParseCidrError, RangeException, SpecialRange, Surroundings, check_address,
    special_range,
};
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

    /// The same, every rule of one port with what it speaks: as it is enforced, recorded and hashed.
    #[must_use]
    pub fn spelled_out(&self) -> Self {
        match self {
            Self::Egress { allow } => {
                Self::from_rules(allow.iter().flat_map(AllowRule::spelled_out))
            }
            _ => self.clone(),
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
    /// What the rule that admitted it makes it speak. Absent in records from before every rule said it.
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
        /// What was the matter. Absent in records from before it was told.
        #[serde(default, skip_serializing_if = "NameFault::is_mismatch")]
        fault: NameFault,
    },
    /// The git gateway did not do what it was asked.
    GitRefused {
        /// Why.
        why: GitRefused,
        /// What was asked for, below the host, shortened.
        path: String,
    },
    /// Allowed, but the network failed.
    Unreachable {
        /// The error text.
        error: String,
    },
}

/// Why a connection's own bytes did not satisfy its rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NameFault {
    /// Another name, none, or what could be read in two ways.
    #[default]
    Mismatch,
    /// The TLS ClientHello is encrypted (ECH), so that the name in it cannot be checked.
    Encrypted,
    /// An HTTP request asked for another protocol, after which no request could be checked.
    Upgrade,
}

impl NameFault {
    /// As scripts may rely on it.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Mismatch => "name_mismatch",
            Self::Encrypted => "name_encrypted",
            Self::Upgrade => "upgrade_refused",
        }
    }

    fn is_mismatch(&self) -> bool {
        *self == Self::Mismatch
    }
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
}
