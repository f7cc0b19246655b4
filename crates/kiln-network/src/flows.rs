//! A machine's decisions, one line for each kind: who was asked for, by which rule, to which addresses, how much. And what an allowlist needs
//! to say so that the same happens again.

use std::collections::BTreeMap;
use std::net::IpAddr;

use kiln_core::network::{AllowRule, EgressEvent, EgressVerdict, Protocol};
use serde::{Deserialize, Serialize};

use crate::record::{reached_host, verdict_name};

/// Most addresses that one line names.
pub const ADDRESSES_MAX: usize = 8;

/// How many decisions of each kind a record has. Repeated refusals of one thing are one, unless the record was full when it came.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Connections that were admitted and reached.
    pub allowed: u64,
    /// Of these, cut off because a phase allowed less.
    pub narrowed: u64,
    /// No rule names the host.
    pub host: u64,
    /// No rule names the port.
    pub port: u64,
    /// The address is below the floor.
    pub address: u64,
    /// The bytes named another host, or spoke another protocol.
    pub name: u64,
    /// The git gateway did not do what it was asked.
    pub git: u64,
    /// Allowed, and nobody answered.
    pub unreachable: u64,
}

impl Counts {
    /// Of these events.
    #[must_use]
    pub fn of(events: &[EgressEvent]) -> Self {
        let mut counts = Self::default();
        for event in events {
            let count = match event.verdict {
                EgressVerdict::Allowed => &mut counts.allowed,
                EgressVerdict::HostRefused => &mut counts.host,
                EgressVerdict::PortRefused => &mut counts.port,
                EgressVerdict::AddressRefused { .. } => &mut counts.address,
                EgressVerdict::NameMismatch { .. } => &mut counts.name,
                EgressVerdict::GitRefused { .. } => &mut counts.git,
                EgressVerdict::Unreachable { .. } => &mut counts.unreachable,
            };
            *count += 1;
            counts.narrowed += u64::from(event.narrowed);
        }
        counts
    }

    /// As many more.
    pub fn add(&mut self, more: &Self) {
        for (count, more) in [
            (&mut self.allowed, more.allowed),
            (&mut self.narrowed, more.narrowed),
            (&mut self.host, more.host),
            (&mut self.port, more.port),
            (&mut self.address, more.address),
            (&mut self.name, more.name),
            (&mut self.git, more.git),
            (&mut self.unreachable, more.unreachable),
        ] {
            *count = count.saturating_add(more);
        }
    }

    /// All of them; what was narrowed is part of what was allowed.
    #[must_use]
    pub fn sum(&self) -> u64 {
        let refused = [self.host, self.port, self.address, self.name, self.git];
        let refused = refused.into_iter().fold(0, u64::saturating_add);
        self.allowed
            .saturating_add(refused)
            .saturating_add(self.unreachable)
    }
}

/// Most lines of a summary.
pub const FLOWS_MAX: usize = 2_000;

/// Connections and questions that were decided alike.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Flow {
    /// The policy's phase, where it has phases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// `allowed`, or why not: `host`, `port`, `address`, `name`, `git`, `unreachable`.
    pub verdict: String,
    /// The name; a rule, where so many names were reached that they are kept by it.
    pub host: String,
    /// The port; 0 where only the name was asked for.
    pub port: u16,
    /// What the rule makes it speak, if it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// The rule that admitted it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Addresses dialled, and those that were refused, the first [`ADDRESSES_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// How many in the record.
    pub connections: u64,
    /// Of these, how many ended because a phase allowed less.
    #[serde(default)]
    pub narrowed: u64,
    /// Bytes from the guest.
    pub bytes_out: u64,
    /// Bytes to the guest.
    pub bytes_in: u64,
}

/// One line for each kind of decision, sorted by phase, verdict, name and port.
#[must_use]
pub fn flows(events: &[EgressEvent]) -> Vec<Flow> {
    let mut lines: BTreeMap<_, Flow> = BTreeMap::new();
    for event in events {
        let verdict = verdict_name(&event.verdict);
        let key = (
            event.phase.as_deref(),
            verdict,
            event.host.as_str(),
            event.port,
            event.rule.as_deref(),
        );
        let line = lines.entry(key).or_insert_with(|| Flow {
            phase: event.phase.clone(),
            verdict: verdict.to_owned(),
            host: event.host.clone(),
            port: event.port,
            protocol: event.protocol,
            rule: event.rule.clone(),
            ..Flow::default()
        });
        if let Some(addr) = event.address
            && line.addresses.len() < ADDRESSES_MAX
            && !line.addresses.contains(&addr)
        {
            line.addresses.push(addr);
        }
        line.connections += 1;
        line.narrowed += u64::from(event.narrowed);
        line.bytes_out = line.bytes_out.saturating_add(event.bytes_out);
        line.bytes_in = line.bytes_in.saturating_add(event.bytes_in);
    }
    lines.into_values().collect()
}

/// A destination that an open machine reached.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Learned {
    /// In which phase; none where the policy has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// As an allowlist says it.
    pub rule: AllowRule,
    /// Connections.
    pub connections: u64,
    /// Bytes from the guest.
    pub bytes_out: u64,
    /// Bytes to the guest.
    pub bytes_in: u64,
}

/// What an allowlist must name so that everything that was reached is reached again: each name and port that bytes moved to or could
/// have, speaking what it was held to. What was refused, or did not answer, is not part of it.
#[must_use]
pub fn learned(events: &[EgressEvent]) -> Vec<Learned> {
    let mut all: BTreeMap<(Option<String>, AllowRule), Learned> = BTreeMap::new();
    for event in events.iter().filter(|event| reached_host(event)) {
        // Of an open policy the rule is the destination itself, also where events were merged under it.
        let Some(rule) = event
            .rule
            .as_deref()
            .and_then(|rule| rule.parse::<AllowRule>().ok())
        else {
            continue;
        };
        let key = (event.phase.clone(), rule.clone());
        let line = all.entry(key).or_insert_with(|| Learned {
            phase: event.phase.clone(),
            rule,
            connections: 0,
            bytes_out: 0,
            bytes_in: 0,
        });
        line.connections += 1;
        line.bytes_out = line.bytes_out.saturating_add(event.bytes_out);
        line.bytes_in = line.bytes_in.saturating_add(event.bytes_in);
    }
    all.into_values().collect()
}

#[cfg(test)]
mod tests {
    use kiln_core::network::NetworkPolicy;

    use super::*;
    use crate::record::{EgressLog, EgressSink as _};

    fn reached(phase: &str, host: &str, port: u16) -> EgressEvent {
        let protocol = Protocol::of_port(port);
        EgressEvent {
            phase: Some(phase.to_owned()),
            rule: Some(format!("{host}:{port}/{}", protocol.name())),
            protocol: Some(protocol),
            address: Some("8.8.8.8".parse().expect("address")),
            bytes_out: 10,
            bytes_in: 20,
            ..EgressEvent::of(host, port, EgressVerdict::Allowed)
        }
    }

    #[test]
    fn lines_add_up_by_phase_verdict_name_port_and_rule() {
        let mut cut = reached("run", "a.example.org", 443);
        cut.narrowed = true;
        let events = [
            reached("dependencies", "a.example.org", 443),
            reached("run", "a.example.org", 443),
            cut,
            EgressEvent::of("b.example.org", 0, EgressVerdict::HostRefused),
        ];
        let flows = flows(&events);
        let told: Vec<_> = flows
            .iter()
            .map(|flow| {
                (
                    flow.phase.as_deref(),
                    flow.verdict.as_str(),
                    flow.connections,
                    flow.bytes_in,
                )
            })
            .collect();
        assert_eq!(
            told,
            [
                (None, "host", 1, 0),
                (Some("dependencies"), "allowed", 1, 20),
                (Some("run"), "allowed", 2, 40)
            ]
        );
        assert_eq!((flows[2].narrowed, flows[2].addresses.len()), (1, 1));
        let counts = Counts::of(&events);
        assert_eq!((counts.allowed, counts.narrowed, counts.host), (3, 1, 1));
    }

    #[test]
    fn what_is_learned_admits_what_was_reached_and_nothing_more() {
        let log = EgressLog::new();
        let mut wanted = Vec::new();
        for at in 0_u16..2_000 {
            // More names than a record keeps apart.
            let host = format!("n{at}.{}.example.org", "x".repeat(60));
            for port in [443, 80, 1000 + at] {
                log.record(reached("run", &host, port));
                wanted.push((host.clone(), port));
            }
        }
        let refused = EgressVerdict::AddressRefused {
            range: kiln_core::network::SpecialRange::LinkLocal,
        };
        log.record(EgressEvent {
            rule: Some("metadata.example.org:80/http".to_owned()),
            ..EgressEvent::of("metadata.example.org", 80, refused)
        });
        let learned = learned(&log.snapshot().events);
        assert_eq!(learned.len(), wanted.len());
        let policy = NetworkPolicy::from_rules(learned.iter().map(|line| line.rule.clone()));
        for (host, port) in &wanted {
            let kiln_core::network::NameVerdict::Allowed(rule) = policy.decide(host, *port) else {
                panic!("{host}:{port}");
            };
            assert_eq!(rule.protocol(), Some(Protocol::of_port(*port)));
        }
        assert!(!policy.knows_host("metadata.example.org"));
        let bytes: u64 = learned.iter().map(|line| line.bytes_in).sum();
        assert_eq!(bytes, 20 * wanted.len() as u64);
    }
}
