//! What is told of an attempt at its end: a report that has room in one event of its job whatever its guest did, and beside it the whole record of what
//! its machine reached and was refused, in parts. No secret of the job stands in either.

use kiln_core::Verdict;
use kiln_core::network::{EgressEvent, EgressVerdict};
use kiln_network::record::parts::parts;
use kiln_network::{EgressSummary, Learned};
use kiln_proto::fleet::Finish;
use serde_json::{Value, json};

use super::job::{Ended, JobEnd};
use super::mask::Mask;

/// How many hosts of each kind a report names, the first of these whose lines have room; the record has all.
const REPORT_HOSTS: [usize; 4] = [30, 10, 3, 0];
/// Most bytes of the egress in a report, and of what was learned, as JSON. A build's report has its egress twice.
const REPORT_LIST_BYTES_MAX: usize = 12 * 1024;

/// The end of an attempt without its secrets.
pub(super) fn masked(mut end: JobEnd, mask: &Mask) -> JobEnd {
    if let Verdict::Failed { message, hint, .. } = &mut end.outcome.verdict {
        *message = mask.text(message);
        *hint = hint.take().map(|hint| mask.text(&hint));
    }
    match &mut end.result {
        Err(failure) => {
            failure.message = mask.text(&failure.message);
            failure.hint = failure.hint.take().map(|hint| mask.text(&hint));
        }
        Ok(Ended::Built(report)) => summary(&mut report.egress, mask),
        Ok(Ended::Ran(_)) => {}
    }
    if let Some(kept) = &mut end.kept {
        kept.ended = mask.text(&kept.ended);
    }
    summary(&mut end.egress, mask);
    let all = end.learned.len();
    // A rule with a hole in it is none.
    end.learned.retain(|line| {
        let rule = line.rule.to_string();
        mask.name(&rule) == rule
    });
    let without = (all - end.learned.len()) as u64;
    end.egress.left_out.learned = end.egress.left_out.learned.saturating_add(without);
    end
}

/// A record of egress without these secrets.
pub(crate) fn summary(egress: &mut EgressSummary, mask: &Mask) {
    let name = |text: &mut String| *text = mask.name(text);
    for host in &mut egress.reached {
        name(&mut host.host);
        host.rules.iter_mut().for_each(name);
    }
    for host in &mut egress.refused {
        name(&mut host.host);
        name(&mut host.reason);
        host.allow.iter_mut().for_each(name);
    }
    for flow in &mut egress.flows {
        name(&mut flow.host);
        flow.rule.iter_mut().for_each(name);
    }
}

/// The same for single decisions.
pub(crate) fn events(events: &mut [EgressEvent], mask: &Mask) {
    let name = |text: &mut String| *text = mask.name(text);
    for event in events {
        name(&mut event.host);
        event.rule.iter_mut().for_each(name);
        match &mut event.verdict {
            EgressVerdict::NameMismatch { said, .. } => said.iter_mut().for_each(name),
            EgressVerdict::GitRefused { path, .. } => name(path),
            EgressVerdict::Unreachable { error } => name(error),
            EgressVerdict::Allowed
            | EgressVerdict::HostRefused
            | EgressVerdict::PortRefused
            | EgressVerdict::AddressRefused { .. } => {}
        }
    }
}

/// The first hosts of a record, as many as have room in a report.
fn first(egress: &EgressSummary) -> EgressSummary {
    let fits = |most: &usize| {
        let text = serde_json::to_vec(&egress.first(*most));
        text.is_ok_and(|text| text.len() <= REPORT_LIST_BYTES_MAX)
    };
    egress.first(REPORT_HOSTS.into_iter().find(fits).unwrap_or(0))
}

/// The first of what was learned, as much as has room in a report.
fn first_learned(learned: &[Learned]) -> &[Learned] {
    let mut bytes = 0_usize;
    let has_room = |line: &&Learned| {
        let more = serde_json::to_vec(line).map_or(usize::MAX, |text| text.len() + 1);
        bytes = bytes.saturating_add(more);
        bytes <= REPORT_LIST_BYTES_MAX
    };
    let count = learned.iter().take_while(has_room).count();
    &learned[..count]
}

pub(super) fn finish_of(end: &JobEnd, observed: Option<Box<kiln_core::Observed>>) -> Finish {
    let receipt = match (&end.result, &observed) {
        (Ok(Ended::Built(report)), Some(observed)) => Some(report.receipt(observed)),
        _ => None,
    };
    let (parts, left_out) = parts(&end.egress, &end.learned);
    let mut details = json!({
        "egress": first(&end.egress), "egress_left_out": left_out, "measured": end.measured, "artifacts": end.artifacts.len(),
    });
    if !end.learned.is_empty() {
        let told = first_learned(&end.learned);
        details["learned"] = json!(told);
        details["learned_more"] = json!(end.learned.len() - told.len());
    }
    if let Some(source) = &end.source {
        details["source"] = json!(source);
    }
    if let Some(policy) = &end.policy {
        details["policy"] = json!(policy);
    }
    match &end.result {
        Ok(Ended::Built(report)) => {
            details["build"] = json!(report);
            details["build"]["egress"] = json!(first(&report.egress));
        }
        Ok(Ended::Ran(exit)) => details["exit"] = json!(exit),
        Err(_) => {}
    }
    Finish {
        outcome: end.outcome.clone(),
        receipt,
        observed,
        runtime: end.runtime.clone(),
        details,
        egress: parts.iter().map(|part| json!(part)).collect::<Vec<Value>>(),
    }
}

#[cfg(test)]
mod tests {
    use kiln_core::FailureClass;
    use kiln_network::flows::learned;
    use kiln_network::record::parts::{EgressPart, joined};
    use kiln_network::{EgressLog, EgressSink as _};
    use kiln_proto::fleet::{BODY_MAX, EVENT_DATA_MAX};

    use super::*;
    use crate::failure::Failure;

    fn end_of(log: &EgressLog) -> JobEnd {
        let record = log.snapshot();
        let mut end = JobEnd::failed(Failure::new(FailureClass::User, "it ended with 1"));
        end.egress = record.summary();
        end.learned = learned(&record.events);
        end.measured.egress = end.egress.totals();
        end
    }

    fn joined_of(finish: &Finish) -> (EgressSummary, Vec<Learned>) {
        let parts = finish.egress.iter().cloned();
        joined(parts.map(|part| serde_json::from_value::<EgressPart>(part).expect("a part")))
    }

    #[test]
    fn every_host_is_told_and_the_report_names_the_first() {
        let log = EgressLog::new();
        for at in 0..200 {
            let host = format!("n{at}.example.org");
            log.record(EgressEvent {
                bytes_out: 1,
                rule: Some("*.example.org".to_owned()),
                ..EgressEvent::of(&host, 443, EgressVerdict::Allowed)
            });
            log.record(EgressEvent::of(
                &format!("x{at}.example.net"),
                0,
                EgressVerdict::HostRefused,
            ));
        }
        let end = end_of(&log);
        let finish = finish_of(&end, None);
        let (egress, _) = joined_of(&finish);
        assert_eq!((egress.reached.len(), egress.refused.len()), (200, 200));
        let told: EgressSummary =
            serde_json::from_value(finish.details["egress"].clone()).expect("a summary");
        assert_eq!((told.reached.len(), told.left_out.reached), (30, 170));
        assert_eq!(told.totals().refused, 200);
        assert_eq!(finish.details["egress_left_out"]["reached"], 0);
    }

    #[test]
    fn a_hostile_guest_cannot_make_its_report_too_large() {
        let log = EgressLog::new();
        let evil = |at: usize| format!("{at}{}", "\"\u{7f}\\".repeat(900));
        for at in 0..12_000 {
            log.record(EgressEvent::of(&evil(at), 443, EgressVerdict::HostRefused));
            let said = Some(evil(at));
            let verdict = EgressVerdict::NameMismatch {
                said,
                fault: kiln_core::network::NameFault::Mismatch,
            };
            log.record(EgressEvent::of("a.example.org", 443, verdict));
            let (long, port) = ("x".repeat(60), u16::try_from(at).expect("small"));
            let host = format!("{long}.{long}.{long}.n{at}.example.org");
            log.record(EgressEvent {
                bytes_out: 1,
                rule: Some(format!("{host}:{port}/raw")),
                ..EgressEvent::of(&host, port, EgressVerdict::Allowed)
            });
        }
        let end = end_of(&log);
        assert!(end.learned.len() > 1_000, "{}", end.learned.len());
        let finish = finish_of(&end, None);
        let bytes = |value: &Value| serde_json::to_vec(value).expect("JSON").len();
        assert!(bytes(&finish.details) <= EVENT_DATA_MAX);
        assert!(
            finish
                .egress
                .iter()
                .all(|part| bytes(part) <= EVENT_DATA_MAX)
        );
        let whole = serde_json::to_vec(&finish).expect("JSON").len();
        assert!(whole < BODY_MAX / 2, "{whole}");
        let (egress, all) = joined_of(&finish);
        let left_out = &finish.details["egress_left_out"];
        let named = |list: usize, key: &str| list as u64 + left_out[key].as_u64().expect("told");
        assert_eq!(
            named(egress.refused.len(), "refused") + named(0, "refusals"),
            end.measured.egress.refused
        );
        assert_eq!(named(all.len(), "learned"), end.learned.len() as u64);
        assert_eq!(
            finish.details["measured"]["egress"]["decisions"]["host"],
            12_000
        );
    }

    #[test]
    fn a_secret_that_is_asked_for_as_a_host_stands_in_no_record() {
        let secret = b"Sup3rS3cretValue";
        let mask = Mask::new([&secret[..]]);
        let log = EgressLog::new();
        let lower = "sup3rs3cretvalue";
        let reached = EgressEvent {
            bytes_out: 1,
            rule: Some(format!("{lower}.example.org:443/tls")),
            ..EgressEvent::of(&format!("{lower}.example.org"), 443, EgressVerdict::Allowed)
        };
        log.record(reached);
        let said = Some(format!("{lower}.evil.example.org"));
        for verdict in [
            EgressVerdict::HostRefused,
            EgressVerdict::NameMismatch {
                said,
                fault: kiln_core::network::NameFault::Mismatch,
            },
            EgressVerdict::GitRefused {
                why: kiln_core::GitRefused::Repository,
                path: "Sup3rS3cretValue/repo".to_owned(),
            },
            EgressVerdict::Unreachable {
                error: format!("no {lower}"),
            },
        ] {
            log.record(EgressEvent::of("a.example.org", 443, verdict.clone()));
            // Its middle is where the text is cut off.
            let long = format!("{}{lower}", "y".repeat(245));
            log.record(EgressEvent::of(&long, 443, verdict));
        }
        let mut all = log.snapshot().events;
        events(&mut all, &mask);
        let end = masked(end_of(&log), &mask);
        assert_eq!((end.learned.len(), end.egress.left_out.learned), (0, 1));
        let finish = finish_of(&end, None);
        let told = serde_json::to_string(&(&finish, &all)).expect("JSON");
        for secret in ["sup3", "Sup3"] {
            assert!(!told.contains(secret), "{told}");
        }
        assert!(told.contains("***.example.org") && told.contains("***/repo"));
    }
}
