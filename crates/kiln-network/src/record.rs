//! What is kept of the gateway's decisions: a bounded log, and a summary for the end of a job.
//!
//! Refusals and connections have separate budgets, so a guest cannot push a real connection out of the record
//! by asking for a million refused names. Connections beyond their budget are merged into an earlier one to
//! the same place (bytes add up), and those to hosts not seen before are kept under the rule that admitted them: a wildcard
//! covers more names than fit. So the set of places reached is never incomplete, and a record has a largest size, which its
//! worker's report of the attempt counts on.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Mutex, PoisonError};

use kiln_core::network::{EgressEvent, EgressVerdict, INTERNAL_SUFFIX, NameFault, SpecialRange};
use serde::{Deserialize, Serialize};

use crate::flows::{Counts, FLOWS_MAX, Flow, flows};

/// Most separate events of admitted connections.
pub const CONNECTION_EVENTS_MAX: usize = 10_000;
/// Most distinct refusals (host, port and verdict).
pub const REFUSAL_EVENTS_MAX: usize = 1_000;
/// Most bytes of events of admitted connections, as JSON, but for one more for each rule.
pub const CONNECTION_BYTES_MAX: usize = 1 << 20;
/// Most bytes of refusals, as JSON.
pub const REFUSAL_BYTES_MAX: usize = 256 * 1024;
/// Most hosts a one-line summary names per kind.
const LINE_HOSTS_MAX: usize = 8;

/// What hosts that no rule admitted are kept as, when there are too many.
const ANY_HOST: &str = "*";

/// Where decisions go. Must not block.
pub trait EgressSink: Send + Sync {
    /// Takes one decision.
    fn record(&self, event: EgressEvent);
}

/// The bounded record of one machine's egress.
#[derive(Debug, Default)]
pub struct EgressLog {
    state: Mutex<LogState>,
}

#[derive(Debug, Default)]
struct LogState {
    events: Vec<EgressEvent>,
    /// Index of the first event of each kind.
    seen: HashMap<(String, u16, &'static str), usize>,
    connections: Used,
    refusals: Used,
    merged: u64,
    dropped: u64,
}

/// How much of a budget is used.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    events: usize,
    bytes: usize,
}

/// What a log holds.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct EgressRecord {
    /// In the order they ended; repeated refusals appear once.
    pub events: Vec<EgressEvent>,
    /// Events whose bytes were added to an earlier one, and repeated refusals.
    pub merged: u64,
    /// Refusals that were not kept because their budget was used up.
    pub dropped: u64,
}

pub(crate) fn verdict_name(verdict: &EgressVerdict) -> &'static str {
    match verdict {
        EgressVerdict::Allowed => "allowed",
        EgressVerdict::HostRefused => "host",
        EgressVerdict::PortRefused => "port",
        EgressVerdict::AddressRefused { .. } => "address",
        EgressVerdict::NameMismatch { .. } => "name",
        EgressVerdict::GitRefused { .. } => "git",
        EgressVerdict::Unreachable { .. } => "unreachable",
    }
}

/// As scripts may rely on it.
fn reason_code(verdict: &EgressVerdict) -> &'static str {
    match verdict {
        EgressVerdict::Allowed => "",
        EgressVerdict::HostRefused => "host_not_allowed",
        EgressVerdict::PortRefused => "port_not_allowed",
        EgressVerdict::AddressRefused { .. } => "address_not_allowed",
        EgressVerdict::NameMismatch { fault, .. } => fault.code(),
        EgressVerdict::GitRefused { why, .. } => why.code(),
        EgressVerdict::Unreachable { .. } => "unreachable",
    }
}

/// Whether bytes moved or could have: also a connection that was cut off after some legal requests.
pub(crate) fn reached_host(event: &EgressEvent) -> bool {
    event.verdict == EgressVerdict::Allowed || event.bytes_out > 0 || event.bytes_in > 0
}

impl EgressLog {
    /// An empty log.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A copy of everything recorded so far.
    #[must_use]
    pub fn snapshot(&self) -> EgressRecord {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        EgressRecord {
            events: state.events.clone(),
            merged: state.merged,
            dropped: state.dropped,
        }
    }
}

impl LogState {
    fn budget(&mut self, allowed: bool) -> &mut Used {
        match allowed {
            true => &mut self.connections,
            false => &mut self.refusals,
        }
    }

    fn is_full(&self, allowed: bool, more: usize) -> bool {
        let (used, events, bytes) = match allowed {
            true => (
                self.connections,
                CONNECTION_EVENTS_MAX,
                CONNECTION_BYTES_MAX,
            ),
            false => (self.refusals, REFUSAL_EVENTS_MAX, REFUSAL_BYTES_MAX),
        };
        used.events >= events || used.bytes.saturating_add(more) > bytes
    }

    fn keep(&mut self, event: EgressEvent, allowed: bool, bytes: usize) {
        let used = self.budget(allowed);
        used.events += 1;
        used.bytes = used.bytes.saturating_add(bytes);
        let at = self.events.len();
        self.seen.entry(key_of(&event)).or_insert(at);
        self.events.push(event);
    }

    fn merge(&mut self, at: usize, event: &EgressEvent) {
        self.merged += 1;
        let earlier = &mut self.events[at];
        earlier.bytes_out = earlier.bytes_out.saturating_add(event.bytes_out);
        earlier.bytes_in = earlier.bytes_in.saturating_add(event.bytes_in);
    }
}

fn key_of(event: &EgressEvent) -> (String, u16, &'static str) {
    let host = match &event.verdict {
        // Each thing that was asked for is a refusal of its own.
        EgressVerdict::GitRefused { why, path } => format!("{}/{path} {}", event.host, why.code()),
        _ => event.host.clone(),
    };
    (host, event.port, verdict_name(&event.verdict))
}

impl EgressSink for EgressLog {
    fn record(&self, mut event: EgressEvent) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let allowed = reached_host(&event);
        let bytes = serde_json::to_vec(&event).map_or(usize::MAX, |text| text.len());
        let full = state.is_full(allowed, bytes);
        match state.seen.get(&key_of(&event)).copied() {
            Some(at) if !allowed || full => state.merge(at, &event),
            None if full && !allowed => state.dropped += 1,
            None if full => {
                // Rules are few.
                event.host = event.rule.clone().unwrap_or_else(|| ANY_HOST.to_owned());
                (event.port, event.address) = (0, None);
                event.verdict = EgressVerdict::Allowed;
                match state.seen.get(&key_of(&event)).copied() {
                    Some(at) => state.merge(at, &event),
                    None => state.keep(event, allowed, bytes),
                }
            }
            _ => state.keep(event, allowed, bytes),
        }
    }
}

/// One host that was reached.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ReachedHost {
    /// Its name.
    pub host: String,
    /// Ports used, sorted.
    pub ports: Vec<u16>,
    /// Connections in the record.
    pub connections: u64,
    /// Bytes from the guest.
    pub bytes_out: u64,
    /// Bytes to the guest.
    pub bytes_in: u64,
    /// Rules that admitted them, sorted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<String>,
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
}

/// Sums events up per host.
#[must_use]
pub fn summary(events: &[EgressEvent]) -> EgressSummary {
    let mut reached: BTreeMap<&str, ReachedHost> = BTreeMap::new();
    let mut refused: BTreeMap<(&str, u16, String, &str), Option<String>> = BTreeMap::new();
    for event in events {
        if event.verdict != EgressVerdict::Allowed {
            let (reason, allow) = explain(event);
            let code = reason_code(&event.verdict);
            refused.insert((&event.host, event.port, reason, code), allow);
        }
        if !reached_host(event) {
            continue;
        }
        let host = reached.entry(&event.host).or_default();
        host.host.clone_from(&event.host);
        if !host.ports.contains(&event.port) {
            host.ports.push(event.port);
            host.ports.sort_unstable();
        }
        if let Some(rule) = &event.rule
            && !host.rules.contains(rule)
        {
            host.rules.push(rule.clone());
            host.rules.sort_unstable();
        }
        host.connections += 1;
        host.bytes_out = host.bytes_out.saturating_add(event.bytes_out);
        host.bytes_in = host.bytes_in.saturating_add(event.bytes_in);
    }
    let refused = refused
        .into_iter()
        .map(|((host, port, reason, code), allow)| RefusedHost {
            host: host.to_owned(),
            port,
            reason,
            code: code.to_owned(),
            allow,
        })
        .collect();
    EgressSummary {
        reached: reached.into_values().collect(),
        refused,
        flows: {
            let mut flows = flows(events);
            flows.truncate(FLOWS_MAX);
            flows
        },
        counts: Counts::of(events),
    }
}

/// What a summary comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct EgressTotals {
    /// Hosts that were reached.
    pub reached: u64,
    /// Hosts and ports that were refused, each reason by itself.
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
            reached: self.reached.len() as u64,
            refused: self.refused.len() as u64,
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

    /// The first so many hosts of each kind, where there is no room for all.
    #[must_use]
    pub fn first(&self, most: usize) -> Self {
        Self {
            reached: self.reached.iter().take(most).cloned().collect(),
            refused: self.refused.iter().take(most).cloned().collect(),
            flows: self.flows.iter().take(most).cloned().collect(),
            counts: self.counts,
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
        let list = |all: Vec<String>| match all.len() {
            0 => "none".to_owned(),
            len if len > LINE_HOSTS_MAX => format!(
                "{} and {} more",
                all[..LINE_HOSTS_MAX].join(", "),
                len - LINE_HOSTS_MAX
            ),
            _ => all.join(", "),
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
            list(reached),
            list(refused.collect())
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(host: &str, port: u16, verdict: EgressVerdict) -> EgressEvent {
        EgressEvent {
            bytes_out: u64::from(verdict == EgressVerdict::Allowed),
            bytes_in: 2 * u64::from(verdict == EgressVerdict::Allowed),
            ..EgressEvent::of(host, port, verdict)
        }
    }

    #[test]
    fn refusals_cannot_push_connections_out() {
        let log = EgressLog::new();
        for at in 0..REFUSAL_EVENTS_MAX + 50 {
            let host = format!("x{at}.example.org");
            log.record(event(&host, 0, EgressVerdict::HostRefused));
            log.record(event(&host, 0, EgressVerdict::HostRefused));
        }
        for _ in 0..CONNECTION_EVENTS_MAX + 7 {
            log.record(event("a.example.org", 443, EgressVerdict::Allowed));
        }
        let mut admitted = event("b.example.org", 443, EgressVerdict::Allowed);
        admitted.rule = Some("b.example.org".to_owned());
        log.record(admitted);
        let record = log.snapshot();
        assert_eq!(record.dropped, 100);
        assert_eq!(record.merged, REFUSAL_EVENTS_MAX as u64 + 7);
        let summary = summary(&record.events);
        let names: Vec<&str> = summary.reached.iter().map(|h| h.host.as_str()).collect();
        assert_eq!(names, ["a.example.org", "b.example.org"]);
        assert_eq!(
            summary.reached[0].bytes_in,
            2 * (CONNECTION_EVENTS_MAX as u64 + 7)
        );
    }

    #[test]
    fn a_wildcard_with_names_without_end_has_a_record_with_an_end() {
        let log = EgressLog::new();
        let label = "x".repeat(60);
        for at in 0..30_000 {
            let host = format!("n{at}.{label}.{label}.{label}.example.org");
            let mut reached = event(&host, 443, EgressVerdict::Allowed);
            reached.rule = Some("*.example.org".to_owned());
            log.record(reached);
            log.record(event(&host, 1, EgressVerdict::PortRefused));
        }
        let record = log.snapshot();
        let bytes = serde_json::to_vec(&record.events).expect("written").len();
        assert!(
            bytes < CONNECTION_BYTES_MAX + REFUSAL_BYTES_MAX + 64 * 1024,
            "{bytes}"
        );
        let summary = summary(&record.events);
        let all: u64 = summary.reached.iter().map(|host| host.bytes_out).sum();
        assert_eq!(all, 30_000, "every byte is there");
        assert!(
            summary
                .reached
                .iter()
                .any(|host| host.host == "*.example.org")
        );
        let bytes = bytes + serde_json::to_vec(&summary).expect("written").len();
        assert!(
            bytes < 7 << 19,
            "{bytes}: it fits into one report of a worker"
        );
    }

    #[test]
    fn a_connection_cut_off_after_legal_requests_was_reached_and_refused() {
        let mut cut = event(
            "a.example.org",
            80,
            EgressVerdict::NameMismatch {
                said: Some("b.example.org".to_owned()),
                fault: NameFault::Mismatch,
            },
        );
        cut.bytes_out = 7;
        let summary = summary(&[cut]);
        assert_eq!(summary.reached[0].bytes_out, 7);
        assert_eq!(summary.refused.len(), 1);
    }

    #[test]
    fn a_summary_adds_up_and_can_be_cut() {
        let rule = |host: &str, rule: &str| EgressEvent {
            rule: Some(rule.to_owned()),
            ..event(host, 443, EgressVerdict::Allowed)
        };
        let events = [
            rule("a.example.org", "*.example.org"),
            rule("a.example.org", "*.example.org"),
            rule("b.example.org", "b.example.org"),
            event("c.example.org", 0, EgressVerdict::HostRefused),
        ];
        let summary = summary(&events);
        assert_eq!(summary.reached[0].rules, ["*.example.org"]);
        let totals = EgressTotals {
            reached: 2,
            refused: 1,
            connections: 3,
            bytes_out: 3,
            bytes_in: 6,
            decisions: Counts {
                allowed: 3,
                host: 1,
                ..Counts::default()
            },
        };
        assert_eq!(summary.totals(), totals);
        let first = summary.first(1);
        assert_eq!((first.reached.len(), first.refused.len()), (1, 1));
    }

    #[test]
    fn the_summary_names_the_flag_that_admits() {
        let events = [
            event("a.example.org", 443, EgressVerdict::Allowed),
            event("b.example.org", 0, EgressVerdict::HostRefused),
            event("b.example.org", 0, EgressVerdict::HostRefused),
            event("c.example.org", 8080, EgressVerdict::PortRefused),
            event(
                "d.example.org",
                443,
                EgressVerdict::AddressRefused {
                    range: SpecialRange::LinkLocal,
                },
            ),
            event("nope.kiln.internal", 0, EgressVerdict::HostRefused),
        ];
        let summary = summary(&events);
        let flags: Vec<Option<&str>> = summary.refused.iter().map(|r| r.allow.as_deref()).collect();
        assert_eq!(
            flags,
            [
                Some("--allow b.example.org"),
                Some("--allow c.example.org:8080"),
                None,
                None
            ]
        );
        let line = summary.to_string();
        assert!(
            line.starts_with(
                "hosts reached: a.example.org; refused: b.example.org (--allow b.example.org), "
            ),
            "{line}"
        );
        // Under a policy a flag only narrows.
        let line = summary.under_policy("kiln.yaml", "run").to_string();
        let wanted = "b.example.org (phases.run.network.allow of kiln.yaml names no b.example.org)";
        assert!(line.contains(wanted) && !line.contains("--allow"), "{line}");
        let line = super::summary(&[EgressEvent {
            phase: Some("dependencies".to_owned()),
            ..event("b.example.org", 8080, EgressVerdict::HostRefused)
        }]);
        let line = line.under_policy("kiln.yaml", "run").to_string();
        assert!(
            line.contains(
                "phases.dependencies.network.allow of kiln.yaml names no b.example.org:8080"
            ),
            "{line}"
        );
    }
}
