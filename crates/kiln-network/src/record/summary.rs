//! What a job reached and what it was refused, for people and programs: the sum of its gateway's decisions.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use kiln_core::network::{EgressEvent, EgressVerdict, INTERNAL_SUFFIX, NameFault, SpecialRange};
use serde::{Deserialize, Serialize};

use super::{reached_host, reason_code};
use crate::flows::{ADDRESSES_MAX, Counts, FLOWS_MAX, Flow, flows};

/// Most hosts a one-line summary names per kind.
const LINE_HOSTS_MAX: usize = 8;
/// Most ports and rules that are named of one host.
pub const NAMED_MAX: usize = 64;

/// One host that was reached.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ReachedHost {
    /// Its name.
    pub host: String,
    /// Ports used, sorted, the first [`NAMED_MAX`].
    pub ports: Vec<u16>,
    /// How many more.
    #[serde(default, skip_serializing_if = "is_none")]
    pub more_ports: u64,
    /// Connections in the record.
    pub connections: u64,
    /// Bytes from the guest.
    pub bytes_out: u64,
    /// Bytes to the guest.
    pub bytes_in: u64,
    /// Rules that admitted them, sorted, the first [`NAMED_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<String>,
    /// How many more.
    #[serde(default, skip_serializing_if = "is_none")]
    pub more_rules: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_none(count: &u64) -> bool {
    *count == 0
}

/// What admits a host where no policy file holds.
const FLAG: &str = "--allow ";

/// One host and port that was refused.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RefusedHost {
    /// Its name.
    pub host: String,
    /// Port; 0 when only its name was asked for.
    pub port: u16,
    /// Why, in words.
    pub reason: String,
    /// Why, for programs: `host_not_allowed`, `port_not_allowed`, `address_not_allowed`, `name_mismatch`, `name_encrypted`,
    /// `upgrade_refused`, `unreachable`, or a code of the git gateway ([`kiln_core::GitRefused::code`]). Empty in records
    /// from before there were codes.
    #[serde(default)]
    pub code: String,
    /// The flag that would admit it, when a flag can: `--allow HOST[:PORT]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow: Option<String>,
    /// Addresses that were refused, or dialled and did not answer, the first [`ADDRESSES_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
}

/// How much of a summary there was no room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LeftOut {
    /// Hosts reached that no line names.
    pub reached: u64,
    /// Hosts refused that no line names.
    pub refused: u64,
    /// Lines of decisions.
    pub flows: u64,
    /// Destinations that were learned.
    pub learned: u64,
    /// Refusals that the gateway's record had no room for: they are in [`EgressSummary::counts`] and nowhere else.
    pub refusals: u64,
}

impl LeftOut {
    /// Whether nothing was.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// What a job reached and what it was refused.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct EgressSummary {
    /// Sorted by name.
    pub reached: Vec<ReachedHost>,
    /// Sorted by name and port.
    pub refused: Vec<RefusedHost>,
    /// Every decision, one line for each kind, the first [`FLOWS_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flows: Vec<Flow>,
    /// How many of each kind, those included that no line names.
    #[serde(default)]
    pub counts: Counts,
    /// What is missing above.
    #[serde(default, skip_serializing_if = "LeftOut::is_nothing")]
    pub left_out: LeftOut,
}

/// One host, with everything of it.
#[derive(Default)]
struct Reached<'a> {
    ports: BTreeSet<u16>,
    rules: BTreeSet<&'a str>,
    connections: u64,
    bytes_out: u64,
    bytes_in: u64,
}

/// As it is told.
fn named((host, of): (&str, Reached<'_>)) -> ReachedHost {
    let more = |all: usize| all.saturating_sub(NAMED_MAX) as u64;
    ReachedHost {
        host: host.to_owned(),
        more_ports: more(of.ports.len()),
        more_rules: more(of.rules.len()),
        ports: of.ports.into_iter().take(NAMED_MAX).collect(),
        rules: of
            .rules
            .into_iter()
            .take(NAMED_MAX)
            .map(str::to_owned)
            .collect(),
        connections: of.connections,
        bytes_out: of.bytes_out,
        bytes_in: of.bytes_in,
    }
}

/// Sums events up per host.
#[must_use]
pub fn summary(events: &[EgressEvent]) -> EgressSummary {
    let mut reached: BTreeMap<&str, Reached<'_>> = BTreeMap::new();
    let mut refused: BTreeMap<(&str, u16, String, &str), RefusedHost> = BTreeMap::new();
    for event in events {
        if event.verdict != EgressVerdict::Allowed {
            let (reason, allow) = explain(event);
            let code = reason_code(&event.verdict);
            let key = (event.host.as_str(), event.port, reason.clone(), code);
            let line = refused.entry(key).or_insert_with(|| RefusedHost {
                host: event.host.clone(),
                port: event.port,
                reason,
                code: code.to_owned(),
                allow,
                addresses: Vec::new(),
            });
            if let Some(addr) = event.address
                && line.addresses.len() < ADDRESSES_MAX
                && !line.addresses.contains(&addr)
            {
                line.addresses.push(addr);
            }
        }
        if !reached_host(event) {
            continue;
        }
        let host = reached.entry(&event.host).or_default();
        host.ports.insert(event.port);
        host.rules.extend(event.rule.as_deref());
        host.connections += 1;
        host.bytes_out = host.bytes_out.saturating_add(event.bytes_out);
        host.bytes_in = host.bytes_in.saturating_add(event.bytes_in);
    }
    let mut flows = flows(events);
    let cut = flows.len().saturating_sub(FLOWS_MAX);
    flows.truncate(FLOWS_MAX);
    EgressSummary {
        reached: reached.into_iter().map(named).collect(),
        refused: refused.into_values().collect(),
        flows,
        counts: Counts::of(events),
        left_out: LeftOut {
            flows: cut as u64,
            ..LeftOut::default()
        },
    }
}

/// What a summary comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct EgressTotals {
    /// Hosts that were reached.
    pub reached: u64,
    /// Hosts and ports that were refused, each reason by itself, and refusals that the record had no room for.
    pub refused: u64,
    /// Connections in the record.
    pub connections: u64,
    /// Bytes from the guest.
    pub bytes_out: u64,
    /// Bytes to the guest.
    pub bytes_in: u64,
    /// Decisions of each kind.
    #[serde(default)]
    pub decisions: Counts,
}

impl EgressSummary {
    /// The sum of it.
    #[must_use]
    pub fn totals(&self) -> EgressTotals {
        let sum = |of: fn(&ReachedHost) -> u64| {
            let all = self.reached.iter().map(of);
            all.fold(0, u64::saturating_add)
        };
        EgressTotals {
            reached: (self.reached.len() as u64).saturating_add(self.left_out.reached),
            refused: (self.refused.len() as u64)
                .saturating_add(self.left_out.refused)
                .saturating_add(self.left_out.refusals),
            connections: sum(|host| host.connections),
            bytes_out: sum(|host| host.bytes_out),
            bytes_in: sum(|host| host.bytes_in),
            decisions: self.counts,
        }
    }

    /// The same for a job of a policy file: there a flag admits nothing, so the file is named, and the phase that asked, else `phase`.
    #[must_use]
    pub fn under_policy(mut self, file: &str, phase: &str) -> Self {
        for refused in &mut self.refused {
            let Some(flag) = refused.allow.take() else {
                continue;
            };
            let rule = flag.strip_prefix(FLAG).unwrap_or(&flag);
            let asked = |flow: &&Flow| {
                (&flow.host, flow.port) == (&refused.host, refused.port)
                    && flow.verdict != "allowed"
            };
            let flow = self.flows.iter().find(asked);
            let phase = flow.and_then(|flow| flow.phase.as_deref()).unwrap_or(phase);
            refused.reason = format!("phases.{phase}.network.allow of {file} names no {rule}");
        }
        self
    }

    /// The first so many hosts of each kind, where there is no room for all; the rest is counted.
    #[must_use]
    pub fn first(&self, most: usize) -> Self {
        let cut = |length: usize| length.saturating_sub(most) as u64;
        Self {
            reached: self.reached.iter().take(most).cloned().collect(),
            refused: self.refused.iter().take(most).cloned().collect(),
            flows: self.flows.iter().take(most).cloned().collect(),
            counts: self.counts,
            left_out: LeftOut {
                reached: self.left_out.reached + cut(self.reached.len()),
                refused: self.left_out.refused + cut(self.refused.len()),
                flows: self.left_out.flows + cut(self.flows.len()),
                ..self.left_out
            },
        }
    }
}

fn explain(event: &EgressEvent) -> (String, Option<String>) {
    let internal = format!(".{}", event.host).ends_with(INTERNAL_SUFFIX);
    let flag = |text: String| {
        let legal = text.parse::<kiln_core::AllowRule>().is_ok();
        (legal && !internal).then(|| format!("{FLAG}{text}"))
    };
    match &event.verdict {
        EgressVerdict::HostRefused if matches!(event.port, 0 | 80 | 443) => {
            ("no rule names it".to_owned(), flag(event.host.clone()))
        }
        EgressVerdict::HostRefused => (
            "no rule names it".to_owned(),
            flag(format!("{}:{}", event.host, event.port)),
        ),
        EgressVerdict::PortRefused => (
            "its rule does not name this port".to_owned(),
            flag(format!("{}:{}", event.host, event.port)),
        ),
        EgressVerdict::AddressRefused {
            range: SpecialRange::Own,
        } => (
            "it resolves to this host or another of the installation: the operator may except it in registries.toml"
                .to_owned(),
            None,
        ),
        EgressVerdict::AddressRefused { range } if range.may_be_excepted() => (
            "it resolves into a special-purpose range: the operator may except it in registries.toml"
                .to_owned(),
            None,
        ),
        EgressVerdict::AddressRefused { .. } => (
            "it resolves to this host, a metadata service or no host at all".to_owned(),
            None,
        ),
        EgressVerdict::NameMismatch { said, fault } => {
            let raw = format!("a rule {}:{}/raw admits it", event.host, event.port);
            let why = match (fault, said) {
                (NameFault::Encrypted, _) => {
                    format!("its ClientHello is encrypted (ECH): {raw}")
                }
                (NameFault::Upgrade, _) => {
                    format!("an HTTP request asked for another protocol (Upgrade, h2c): {raw}")
                }
                (NameFault::Mismatch, Some(said)) => {
                    format!("the connection asked for {said:?} instead")
                }
                (NameFault::Mismatch, None) => "the connection did not say this name".to_owned(),
            };
            (why, None)
        }
        EgressVerdict::GitRefused { why, path } => {
            let path = path.trim_start_matches('/');
            (format!("git, {path}: {}", why.why()), None)
        }
        EgressVerdict::Unreachable { error } => (format!("unreachable: {error}"), None),
        EgressVerdict::Allowed => (String::new(), None),
    }
}

impl fmt::Display for EgressSummary {
    /// One line: hosts reached, hosts refused, and the flag that would admit each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |all: Vec<String>, left_out: u64| {
            let shown = &all[..all.len().min(LINE_HOSTS_MAX)];
            let more = (all.len() - shown.len()) as u64;
            match (shown.is_empty(), more.saturating_add(left_out)) {
                (true, 0) => "none".to_owned(),
                (true, more) => format!("{more} that are not named"),
                (false, 0) => shown.join(", "),
                (false, more) => format!("{} and {more} more", shown.join(", ")),
            }
        };
        let reached = self.reached.iter().map(|host| host.host.clone()).collect();
        let refused = self.refused.iter().map(|refused| {
            let place = match refused.port {
                0 => refused.host.clone(),
                port => format!("{}:{port}", refused.host),
            };
            match &refused.allow {
                Some(flag) => format!("{place} ({flag})"),
                None => format!("{place} ({})", refused.reason),
            }
        });
        write!(
            f,
            "hosts reached: {}; refused: {}",
            list(reached, self.left_out.reached),
            list(
                refused.collect(),
                self.left_out.refused.saturating_add(self.left_out.refusals)
            )
        )
    }
}
