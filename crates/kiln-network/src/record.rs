//! What is kept of the gateway's decisions: a bounded log, and a summary for the end of a job.
//!
//! Connections and each kind of refusal have budgets of their own, so a guest cannot push a real connection out of the record
//! by asking for a million refused names, nor a refused address by saying a million wrong ones. Refusals that differ in anything but their bytes (what was said
//! instead, the address, the phase) are kept apart; what has no room is counted by its kind. Connections beyond their budget are merged into an earlier one to
//! the same place (bytes add up), and those to hosts not seen before are kept under the rule that admitted them: a wildcard
//! covers more names than fit. So the set of places reached is never incomplete, and a record has a largest size, which its
//! worker's report of the attempt counts on.

pub mod parts;
mod summary;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use kiln_core::network::{EgressEvent, EgressVerdict};
use serde::{Deserialize, Serialize};

pub use self::summary::{
    EgressSummary, EgressTotals, LeftOut, NAMED_MAX, ReachedHost, RefusedHost, summary,
};
use crate::flows::Counts;

/// Most separate events of admitted connections.
pub const CONNECTION_EVENTS_MAX: usize = 10_000;
/// Most distinct refusals of one kind.
pub const REFUSAL_EVENTS_MAX: usize = 1_000;
/// Most bytes of events of admitted connections, as JSON, but for one more for each rule.
pub const CONNECTION_BYTES_MAX: usize = 1 << 20;
/// Most bytes of refusals of one kind, as JSON.
pub const REFUSAL_BYTES_MAX: usize = 128 * 1024;
/// Most bytes of a text that a guest or a server chose: a name that is none, what was said instead of one, a path, an error.
pub const TEXT_BYTES_MAX: usize = 256;

/// What hosts that no rule admitted are kept as, when there are too many.
const ANY_HOST: &str = "*";
/// What stands where the rest of a text was cut off.
pub const CUT: &str = "…";

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
    seen: HashMap<String, usize>,
    connections: Used,
    refusals: HashMap<&'static str, Used>,
    merged: u64,
    dropped: Counts,
    taken: u64,
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
    /// These, by kind.
    #[serde(default)]
    pub dropped_by: Counts,
}

impl EgressRecord {
    /// Its sum per host.
    #[must_use]
    pub fn summary(&self) -> EgressSummary {
        let mut summary = summary(&self.events);
        summary.counts.add(&self.dropped_by);
        summary.left_out.refusals = self.dropped;
        summary
    }
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

/// At most [`TEXT_BYTES_MAX`] bytes of a text; that something is missing can be seen.
#[must_use]
pub(crate) fn shortened(text: &str) -> String {
    if text.len() <= TEXT_BYTES_MAX {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(TEXT_BYTES_MAX - CUT.len());
    format!("{}{CUT}", &text[..end])
}

/// Texts of an event that somebody else chose, in place.
fn shorten(event: &mut EgressEvent) {
    let text = |text: &mut String| {
        if text.len() > TEXT_BYTES_MAX {
            *text = shortened(text);
        }
    };
    text(&mut event.host);
    match &mut event.verdict {
        EgressVerdict::NameMismatch {
            said: Some(said), ..
        } => text(said),
        EgressVerdict::GitRefused { path, .. } => text(path),
        EgressVerdict::Unreachable { error } => text(error),
        _ => {}
    }
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
            dropped: state.dropped.sum(),
            dropped_by: state.dropped,
        }
    }

    /// How many decisions it was told, whatever became of them: whether it changed since somebody looked.
    #[must_use]
    pub fn taken(&self) -> u64 {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.taken
    }
}

impl LogState {
    fn is_full(&self, event: &EgressEvent, more: usize) -> bool {
        let (used, events, bytes) = match reached_host(event) {
            true => (
                self.connections,
                CONNECTION_EVENTS_MAX,
                CONNECTION_BYTES_MAX,
            ),
            false => {
                let used = self.refusals.get(verdict_name(&event.verdict));
                let used = used.copied().unwrap_or_default();
                (used, REFUSAL_EVENTS_MAX, REFUSAL_BYTES_MAX)
            }
        };
        used.events >= events || used.bytes.saturating_add(more) > bytes
    }

    fn keep(&mut self, event: EgressEvent, allowed: bool, bytes: usize) {
        let used = match allowed {
            true => &mut self.connections,
            false => {
                let kind = verdict_name(&event.verdict);
                self.refusals.entry(kind).or_default()
            }
        };
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

/// What makes an event another one than those before. Connections are one by where they go; refusals by everything that is told of them.
fn key_of(event: &EgressEvent) -> String {
    let kind = verdict_name(&event.verdict);
    let place = format!("{kind} {}:{}", event.host, event.port);
    if reached_host(event) {
        return place;
    }
    let more = (&event.verdict, event.address, &event.phase, &event.rule);
    format!("{place} {more:?}")
}

impl EgressSink for EgressLog {
    fn record(&self, mut event: EgressEvent) {
        shorten(&mut event);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.taken += 1;
        let allowed = reached_host(&event);
        let bytes = serde_json::to_vec(&event).map_or(usize::MAX, |text| text.len());
        let full = state.is_full(&event, bytes);
        match state.seen.get(&key_of(&event)).copied() {
            Some(at) if !allowed || full => state.merge(at, &event),
            None if full && !allowed => state.dropped.add(&Counts::of(&[event])),
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

#[cfg(test)]
mod tests {
    use kiln_core::network::{NameFault, SpecialRange};

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
        assert_eq!((record.dropped, record.dropped_by.host), (100, 100));
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
    fn one_kind_of_refusal_pushes_no_other_out_and_what_is_left_out_is_counted() {
        let log = EgressLog::new();
        for at in 0..3 * REFUSAL_EVENTS_MAX {
            let host = format!("x{at}.example.org");
            log.record(event(&host, 0, EgressVerdict::HostRefused));
            let said = Some(format!("y{at}.example.org"));
            let verdict = EgressVerdict::NameMismatch {
                said,
                fault: NameFault::Mismatch,
            };
            log.record(event("a.example.org", 443, verdict));
        }
        let range = SpecialRange::LinkLocal;
        log.record(event(
            "b.example.org",
            80,
            EgressVerdict::AddressRefused { range },
        ));
        let record = log.snapshot();
        let summary = record.summary();
        let last = summary.refused.iter().find(|host| host.port == 80);
        assert_eq!(last.map(|host| host.host.as_str()), Some("b.example.org"));
        assert_eq!(summary.counts.host, 3 * REFUSAL_EVENTS_MAX as u64);
        assert_eq!(summary.counts.name, 3 * REFUSAL_EVENTS_MAX as u64);
        assert_eq!(summary.left_out.refusals, record.dropped);
        assert!(record.dropped > 3 * REFUSAL_EVENTS_MAX as u64, "{record:?}");
        assert_eq!(
            summary.totals().refused,
            6 * REFUSAL_EVENTS_MAX as u64 + 1,
            "named or counted"
        );
        assert_eq!(log.taken(), 6 * REFUSAL_EVENTS_MAX as u64 + 1);
    }

    #[test]
    fn refusals_that_differ_are_kept_apart() {
        let log = EgressLog::new();
        let said = |said: &str| EgressVerdict::NameMismatch {
            said: Some(said.to_owned()),
            fault: NameFault::Mismatch,
        };
        let refused = |range| EgressVerdict::AddressRefused { range };
        let (inside, metadata) = (SpecialRange::Private, SpecialRange::LinkLocal);
        let at = |address: &str, range| EgressEvent {
            address: Some(address.parse().expect("address")),
            ..event("b.example.org", 443, refused(range))
        };
        let in_phase = |phase: &str| EgressEvent {
            phase: Some(phase.to_owned()),
            ..event("c.example.org", 1, EgressVerdict::PortRefused)
        };
        let all = [
            event("a.example.org", 443, said("harmless.example.org")),
            event("a.example.org", 443, said("exfiltration.example.org")),
            at("10.0.0.1", inside),
            at("10.0.0.2", inside),
            at("169.254.169.254", metadata),
            in_phase("dependencies"),
            in_phase("run"),
        ];
        for event in all.iter().chain(&all) {
            log.record(event.clone());
        }
        let record = log.snapshot();
        assert_eq!((record.events.len(), record.merged), (all.len(), 7));
        let summary = record.summary();
        let told = serde_json::to_string(&summary.refused).expect("JSON");
        for text in [
            "harmless.example.org",
            "exfiltration.example.org",
            "10.0.0.1",
            "10.0.0.2",
            "169.254.169.254",
        ] {
            assert!(told.contains(text), "{text} is not in {told}");
        }
    }

    #[test]
    fn what_a_guest_says_is_shortened() {
        let log = EgressLog::new();
        let long = "ä".repeat(5_000);
        log.record(event(&long, 443, EgressVerdict::HostRefused));
        let said = Some(long.clone());
        log.record(event(
            "a.example.org",
            443,
            EgressVerdict::NameMismatch {
                said,
                fault: NameFault::Mismatch,
            },
        ));
        log.record(event(
            "a.example.org",
            443,
            EgressVerdict::Unreachable { error: long },
        ));
        let record = log.snapshot();
        let bytes = serde_json::to_vec(&record.events).expect("JSON").len();
        assert!(bytes < 5 * TEXT_BYTES_MAX, "{bytes}");
        let host = &record.events[0].host;
        assert!(
            host.len() <= TEXT_BYTES_MAX && host.ends_with(CUT),
            "{host}"
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
        assert_eq!((first.left_out.reached, first.left_out.flows), (1, 2));
        assert_eq!(first.totals().reached, 2, "what is cut is counted");
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
