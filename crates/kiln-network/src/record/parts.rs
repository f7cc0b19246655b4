//! A job's record, cut into parts of a largest size, so that each has room where it is kept: beside the job, one event for each part.

use serde::{Deserialize, Serialize};

use super::{EgressSummary, LeftOut, ReachedHost, RefusedHost};
use crate::flows::{Flow, Learned};

/// Most bytes of one part, as JSON.
pub const PART_BYTES_MAX: usize = 48 * 1024;
/// Most parts of each list. Whatever a guest does, its record has no more than [`PARTS_MAX`] parts; what has no room in them is counted.
pub const LIST_PARTS_MAX: usize = 8;
/// Most parts of one record.
pub const PARTS_MAX: usize = 4 * LIST_PARTS_MAX;
/// Bytes around the lines of a part, at most.
const FRAME_BYTES: usize = 64;

/// Some lines of a record, of one list.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EgressPart {
    /// Hosts that were reached.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reached: Vec<ReachedHost>,
    /// Hosts that were refused.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedHost>,
    /// Decisions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub flows: Vec<Flow>,
    /// What an open machine reached, as an allowlist says it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub learned: Vec<Learned>,
}

/// A record in parts, in order, and how much of it has no room in them or had none in the gateway's own log.
#[must_use]
pub fn parts(summary: &EgressSummary, learned: &[Learned]) -> (Vec<EgressPart>, LeftOut) {
    let mut left_out = summary.left_out;
    let mut all = Vec::new();
    let mut list = |pieces: (Vec<EgressPart>, u64), count: &mut u64| {
        all.extend(pieces.0);
        *count = count.saturating_add(pieces.1);
    };
    let reached = cut(&summary.reached, |reached| EgressPart {
        reached,
        ..EgressPart::default()
    });
    list(reached, &mut left_out.reached);
    let refused = cut(&summary.refused, |refused| EgressPart {
        refused,
        ..EgressPart::default()
    });
    list(refused, &mut left_out.refused);
    let flows = cut(&summary.flows, |flows| EgressPart {
        flows,
        ..EgressPart::default()
    });
    list(flows, &mut left_out.flows);
    let learned = cut(learned, |learned| EgressPart {
        learned,
        ..EgressPart::default()
    });
    list(learned, &mut left_out.learned);
    (all, left_out)
}

/// The lists of these parts, and what was learned. Their counts are told elsewhere.
#[must_use]
pub fn joined(parts: impl IntoIterator<Item = EgressPart>) -> (EgressSummary, Vec<Learned>) {
    let (mut summary, mut learned) = (EgressSummary::default(), Vec::new());
    for part in parts {
        summary.reached.extend(part.reached);
        summary.refused.extend(part.refused);
        summary.flows.extend(part.flows);
        learned.extend(part.learned);
    }
    (summary, learned)
}

/// Lines in pieces of at most [`PART_BYTES_MAX`], and how many lines are in none.
fn cut<T: Clone + Serialize>(
    lines: &[T],
    part: impl Fn(Vec<T>) -> EgressPart,
) -> (Vec<EgressPart>, u64) {
    let (mut pieces, mut left_out) = (Vec::new(), 0_u64);
    let (mut piece, mut bytes) = (Vec::new(), FRAME_BYTES);
    for line in lines {
        let more = serde_json::to_vec(line).map_or(usize::MAX, |text| text.len() + 1);
        if FRAME_BYTES.saturating_add(more) > PART_BYTES_MAX {
            left_out += 1;
            continue;
        }
        if bytes + more > PART_BYTES_MAX {
            pieces.push(std::mem::take(&mut piece));
            bytes = FRAME_BYTES;
        }
        piece.push(line.clone());
        bytes += more;
    }
    if !piece.is_empty() {
        pieces.push(piece);
    }
    let beyond = pieces
        .iter()
        .skip(LIST_PARTS_MAX)
        .map(Vec::len)
        .sum::<usize>();
    pieces.truncate(LIST_PARTS_MAX);
    let left_out = left_out.saturating_add(beyond as u64);
    (pieces.into_iter().map(part).collect(), left_out)
}

#[cfg(test)]
mod tests {
    use kiln_core::network::{EgressEvent, EgressVerdict};

    use super::*;
    use crate::record::{EgressLog, EgressSink as _};

    fn told(log: &EgressLog) -> EgressSummary {
        log.snapshot().summary()
    }

    #[test]
    fn a_record_of_many_hosts_is_whole_again() {
        let log = EgressLog::new();
        for at in 0_u16..900 {
            let host = format!("n{at}.example.org");
            log.record(EgressEvent {
                bytes_in: 7,
                rule: Some("*.example.org".to_owned()),
                ..EgressEvent::of(&host, 443, EgressVerdict::Allowed)
            });
            log.record(EgressEvent::of(&host, at, EgressVerdict::PortRefused));
        }
        let summary = told(&log);
        let (parts, left_out) = parts(&summary, &[]);
        assert!(left_out.is_nothing(), "{left_out:?}");
        assert!(parts.len() > 3, "{}", parts.len());
        let (back, learned) = joined(parts);
        assert_eq!(
            (back.reached, back.refused, back.flows, learned.len()),
            (summary.reached, summary.refused, summary.flows, 0)
        );
    }

    #[test]
    fn whatever_a_guest_does_its_record_has_an_end_and_the_rest_is_counted() {
        let log = EgressLog::new();
        // Every byte of these is escaped.
        let evil = |at: usize| format!("{at}\"{}", "\\".repeat(5_000));
        for at in 0..20_000 {
            let host = evil(at);
            log.record(EgressEvent::of(&host, 443, EgressVerdict::HostRefused));
            let said = Some(evil(at));
            let verdict = EgressVerdict::NameMismatch {
                said,
                fault: kiln_core::network::NameFault::Mismatch,
            };
            log.record(EgressEvent::of("a.example.org", 443, verdict));
            let port = u16::try_from(at).expect("small");
            log.record(EgressEvent {
                bytes_out: 1,
                rule: Some(format!("a.example.org:{port}")),
                ..EgressEvent::of("a.example.org", port, EgressVerdict::Allowed)
            });
            log.record(EgressEvent {
                bytes_out: 1,
                rule: Some("*.example.org".to_owned()),
                ..EgressEvent::of(&format!("n{at}.example.org"), 443, EgressVerdict::Allowed)
            });
        }
        let record = log.snapshot();
        let summary = record.summary();
        let learned = crate::flows::learned(&record.events);
        let (parts, left_out) = parts(&summary, &learned);
        assert!(parts.len() <= PARTS_MAX, "{}", parts.len());
        for part in &parts {
            let bytes = serde_json::to_vec(part).expect("JSON").len();
            assert!(bytes <= PART_BYTES_MAX, "{bytes}");
        }
        let totals = summary.totals();
        let (back, back_learned) = joined(parts);
        let named = |list: usize, left_out: u64| list as u64 + left_out;
        assert_eq!(named(back.reached.len(), left_out.reached), totals.reached);
        assert_eq!(
            named(back.refused.len(), left_out.refused) + left_out.refusals,
            totals.refused
        );
        assert_eq!(
            named(back_learned.len(), left_out.learned),
            learned.len() as u64
        );
        assert!(
            left_out.refusals > 0 && totals.refused >= 40_000,
            "{left_out:?}"
        );
        let many = summary
            .reached
            .iter()
            .find(|one| one.host == "a.example.org");
        let many = many.expect("reached");
        assert_eq!(many.ports.len(), crate::record::NAMED_MAX);
        assert!(many.more_ports > 0 && many.more_rules > 0, "{many:?}");
    }
}
