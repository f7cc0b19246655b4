//! What the host measured of an attempt: how long each part took, what was reached, how much memory it came to. Shown to people and programs; it
//! decides nothing.

use std::time::{Duration, Instant};

use kiln_core::job::AppliedPolicy;
use kiln_machine::bring_up::Timings;
use kiln_machine::driver::Machine;
use kiln_network::record::{EgressSummary, EgressTotals};
use serde::{Deserialize, Serialize};

/// The record of an attempt. A part that did not happen is absent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Measured {
    /// Milliseconds of the policy: finding, compiling and bounding it, and the gateway that holds the machine to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy_ms: Option<u64>,
    /// Milliseconds of starting the machine's process, from its template when there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clone_ms: Option<u64>,
    /// Milliseconds from there until the guest had its identity and took orders.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_ms: Option<u64>,
    /// Milliseconds of plugging and mounting disks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_ms: Option<u64>,
    /// Milliseconds of sending the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_ms: Option<u64>,
    /// Milliseconds of the command, or of the build's steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command_ms: Option<u64>,
    /// Milliseconds of reading files out of the machine and storing them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifacts_ms: Option<u64>,
    /// Milliseconds from the end of the work until nothing was left of the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teardown_ms: Option<u64>,
    /// What the gateway let through and refused.
    pub egress: EgressTotals,
    /// The most bytes that the machine's process had resident, as the host counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_peak: Option<u64>,
    /// The most bytes that the command used, as the guest says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command_memory_peak: Option<u64>,
}

/// Whole milliseconds.
pub(crate) fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Adds time to a part.
pub(crate) fn add(part: &mut Option<u64>, since: Instant) {
    *part = Some(part.unwrap_or(0).saturating_add(ms(since.elapsed())));
}

impl Measured {
    /// From the decision what holds, wherever it was made, to the gateway that holds it.
    pub(crate) fn policy(&mut self, applied: Option<&AppliedPolicy>, since: Instant) {
        let decided = applied.and_then(|applied| applied.decided_us).unwrap_or(0);
        let all = since
            .elapsed()
            .saturating_add(Duration::from_micros(decided));
        self.policy_ms = Some(self.policy_ms.unwrap_or(0).saturating_add(ms(all)));
    }

    /// How the machine came up.
    pub(crate) fn started(&mut self, timings: &Timings) {
        self.clone_ms = Some(ms(timings.launch));
        self.ready_ms = Some(ms(timings.total().saturating_sub(timings.launch)));
    }

    /// Before the machine goes.
    pub(crate) async fn memory(&mut self, machine: &dyn Machine) {
        // One that has stopped already has nothing to tell.
        let peak = machine.stats().await.ok().map(|stats| stats.rss_peak.0);
        self.memory_peak = peak.filter(|peak| *peak > 0);
    }

    /// The parts that are phases, too, and what was reached.
    pub(crate) fn finish(&mut self, phases_ms: &[(String, u64)], egress: &EgressSummary) {
        for (name, time) in phases_ms {
            let part = match name.as_str() {
                "source" => &mut self.source_ms,
                "checkout" | "dependencies" | "services" | "run" | "build" | "push" => {
                    &mut self.command_ms
                }
                "collect" => &mut self.artifacts_ms,
                _ => continue,
            };
            *part = Some(part.unwrap_or(0).saturating_add(*time));
        }
        self.egress = egress.totals();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A policy, with what it took to decide it.
    fn applied(decided: Option<Duration>) -> AppliedPolicy {
        let hash = kiln_core::Digest::of(b"policy");
        let applied = serde_json::json!({"file": hash, "hash": hash});
        let mut applied: AppliedPolicy = serde_json::from_value(applied).expect("a policy");
        if let Some(decided) = decided {
            applied.took(decided);
        }
        applied
    }

    #[test]
    fn what_it_took_to_decide_a_policy_is_part_of_its_time_wherever_that_was() {
        let measured = |applied: Option<&AppliedPolicy>| {
            let mut measured = Measured::default();
            measured.policy(applied, Instant::now());
            measured.policy_ms.expect("it happened")
        };
        // Nothing here takes minutes: what is beside the decision is below one.
        let hour = Duration::from_secs(3600);
        let [minute_ms, hour_ms] = [60_000, 3_600_000];
        let of = |decided| measured(Some(&applied(decided)));
        assert!((hour_ms..hour_ms + minute_ms).contains(&of(Some(hour))));
        assert!(of(None) < minute_ms && measured(None) < minute_ms);
        // A gateway that is made again adds to it; a part of a millisecond is none.
        let mut twice = Measured::default();
        for decided in [hour, Duration::from_micros(900)] {
            twice.policy(Some(&applied(Some(decided))), Instant::now());
        }
        let value = serde_json::to_value(twice).expect("JSON");
        let told = value["policy_ms"].as_u64().expect("it happened");
        assert!((hour_ms..hour_ms + minute_ms).contains(&told), "{told}");
    }

    #[test]
    fn phases_become_parts_and_what_did_not_happen_is_absent() {
        let mut measured = Measured::default();
        measured.started(&Timings {
            launch: Duration::from_millis(30),
            hello: Duration::from_millis(8),
            thaw: Duration::from_millis(2),
            ..Timings::default()
        });
        let phases = [("queue", 1), ("machine", 40), ("run", 500), ("collect", 7)];
        let phases = phases.map(|(name, time)| (name.to_owned(), time));
        measured.finish(&phases, &EgressSummary::default());
        let value = serde_json::to_value(measured).expect("JSON");
        assert_eq!(
            (&value["clone_ms"], &value["ready_ms"]),
            (&30.into(), &10.into())
        );
        assert_eq!(
            (&value["command_ms"], &value["artifacts_ms"]),
            (&500.into(), &7.into())
        );
        assert!(value.get("source_ms").is_none() && value.get("memory_peak").is_none());
        let back: Measured = serde_json::from_value(value).expect("reads");
        assert_eq!(back, measured);
    }
}
