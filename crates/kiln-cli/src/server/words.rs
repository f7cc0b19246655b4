//! What a server says about a job, in words: why it waits, when it is expected to begin, what state it is in.

use kiln_controller::api::{JobLine, JobView};
use kiln_core::PendingReason;
use kiln_core::dispatch::{QuotaScope, Room};
use serde_json::Value;

use crate::commands::table::counted;
use crate::commands::when;

/// Why a job waits, from a server's answer.
pub(crate) fn reason(pending: Option<&Value>) -> Option<PendingReason> {
    serde_json::from_value(pending?.clone()).ok()
}

/// Why a job waits, as one clause without a full stop; a reason that a newer server invented by its name.
pub(crate) fn waits(pending: &Value, now_unix_ms: u64) -> String {
    let Some(reason) = reason(Some(pending)) else {
        return pending["reason"]
            .as_str()
            .unwrap_or("an unknown reason")
            .to_owned();
    };
    match reason {
        PendingReason::New => "it came just now; nothing is decided yet".to_owned(),
        PendingReason::NoWorkers => "no worker is connected".to_owned(),
        PendingReason::NoWorkerMatches { missing, workers } => {
            format!(
                "none of {} has {missing}",
                counted(u64::from(workers), "worker")
            )
        }
        PendingReason::WorkersUnavailable { workers } => format!(
            "{} would fit, but none takes jobs now (drained, cordoned, quarantined or lost)",
            counted(u64::from(workers), "worker")
        ),
        PendingReason::Capacity { need, best } => {
            format!(
                "it needs {}; the most that a fitting worker has free is {}",
                room(&need),
                room(&best)
            )
        }
        PendingReason::TooLarge { need, largest } => {
            format!(
                "it needs {}, and even an empty worker has at most {}",
                room(&need),
                room(&largest)
            )
        }
        PendingReason::Quota {
            scope,
            running,
            limit,
        } => {
            let whose = match scope {
                QuotaScope::Tenant => "its tenant's",
                QuotaScope::Queue => "its queue's",
                QuotaScope::Global => "the installation's",
            };
            format!("{whose} limit is reached: {running} of {limit} run")
        }
        PendingReason::ConcurrencyGroup { group, holder } => match holder {
            Some(holder) => format!("job {holder} of its concurrency group {group} goes first"),
            None => format!("another job of its concurrency group {group} goes first"),
        },
        PendingReason::Paused { queue } => format!("its queue {queue} is paused"),
        PendingReason::Backoff { until_unix_ms } => {
            format!(
                "it failed for reasons that are not its own and is tried again in {}",
                when::span(until_unix_ms.saturating_sub(now_unix_ms))
            )
        }
        PendingReason::Behind { jobs } => format!(
            "{} of fairer share or higher priority come first",
            counted(u64::from(jobs), "job")
        ),
        PendingReason::Reserved => {
            "the host that would fit is kept for a larger job that waited longer".to_owned()
        }
        PendingReason::Settling => {
            "the server started just now and waits for its workers to report".to_owned()
        }
    }
}

/// What to do about a reason, where something can be done.
pub(crate) fn advice(pending: &Value, job: &JobLine) -> Option<String> {
    Some(match reason(Some(pending))? {
        PendingReason::NoWorkers => "start one: `kiln worker` on a host, or `kiln serve --with-worker`".to_owned(),
        PendingReason::NoWorkerMatches { .. } => {
            "an operator's `kiln worker list` shows what there is; labels are fixed by the token a worker joins with".to_owned()
        }
        PendingReason::WorkersUnavailable { .. } => "an operator sees why with `kiln worker show NAME`; `kiln worker resume NAME` takes one back".to_owned(),
        PendingReason::TooLarge { need, largest } => {
            format!("ask for less with {}, or add a larger host", flags(&need, &largest))
        }
        PendingReason::Capacity { need, best } if need.disk > best.disk => {
            format!("ask for less with {}, or make room on a worker's disk", flags(&need, &best))
        }
        PendingReason::Quota { scope: QuotaScope::Tenant, .. } => {
            format!("an operator raises it with `kiln tenant quota {} --running N`", job.tenant)
        }
        PendingReason::Paused { queue } => format!("an operator lets it go on with `kiln queue resume {queue}`"),
        PendingReason::ConcurrencyGroup { holder: Some(holder), .. } => format!("`kiln job show {holder}` shows the one before it"),
        _ => return None,
    })
}

/// The flags that ask for what there is too little of.
fn flags(need: &Room, there: &Room) -> String {
    let short = [
        ("--cpus", need.cpus > there.cpus),
        ("--memory", need.memory > there.memory),
        ("--disk", need.disk > there.disk),
    ];
    let short = short.iter().filter(|(_, short)| *short);
    let flags: Vec<&str> = short.map(|(flag, _)| *flag).collect();
    match flags.is_empty() {
        true => "--cpus, --memory or --disk".to_owned(),
        false => flags.join(" and "),
    }
}

fn room(room: &Room) -> String {
    let mut text = format!(
        "{}, {} of memory, {} of disk",
        counted(u64::from(room.cpus), "CPU"),
        room.memory,
        room.disk
    );
    if room.machines == 0 {
        text.push_str(", no machine");
    }
    text
}

/// When it is expected to begin, and on what that rests.
pub(crate) fn estimate(estimate: Option<&Value>) -> Option<String> {
    let estimate = estimate?;
    let wait = estimate["wait_ms"].as_u64()?;
    let basis = estimate["basis"].as_str().unwrap_or("a guess");
    let samples = match estimate["samples"].as_u64() {
        None | Some(0) => String::new(),
        Some(count) => format!("; {} known", counted(count, "run")),
    };
    // What should have ended by now goes on: nobody knows for how long.
    let when = match wait {
        0 => "at any moment".to_owned(),
        wait => format!("in about {}", when::span(wait)),
    };
    Some(format!("{when} ({basis}{samples})"))
}

/// The state of a job in one word: `queued`, `leased`, `running`, `passed`, or what it failed of.
pub(crate) fn state(job: &JobLine) -> String {
    match &job.outcome {
        _ if job.state != "finished" && job.cancel_asked => "cancelling".to_owned(),
        None => job.state.clone(),
        Some(outcome) if outcome.verdict == "passed" => "passed".to_owned(),
        Some(outcome) => match outcome.class.as_deref() {
            None | Some("user") => "failed".to_owned(),
            Some(class) => class.to_owned(),
        },
    }
}

/// The chain from what is asked to why it has not begun, one line each.
pub(crate) fn chain(job: &JobView, now_unix_ms: u64) -> Vec<String> {
    let line = &job.line;
    let since = when::span(now_unix_ms.saturating_sub(line.created_unix_ms));
    let mut lines = Vec::new();
    match line.state.as_str() {
        "queued" => {
            lines.push(format!(
                "it waits in queue {} for {since}, priority {}",
                line.queue, line.priority
            ));
            for attempt in &job.attempts {
                if let Some(outcome) = &attempt.outcome {
                    let why = outcome.message.as_deref().unwrap_or("no reason given");
                    lines.push(format!("attempt {} failed: {why}", attempt.number));
                }
            }
            if line.cancel_asked {
                lines.push("somebody asked to stop it".to_owned());
            }
            if let Some(pending) = &line.pending {
                lines.push(format!("because {}", waits(pending, now_unix_ms)));
                lines.extend(advice(pending, line).map(|advice| format!("try: {advice}")));
            }
            lines.push(match estimate(job.estimate.as_ref()) {
                Some(estimate) => format!("it is expected to begin {estimate}"),
                None => "when it begins cannot be told: nothing that runs leads to it".to_owned(),
            });
        }
        "leased" => {
            let phase = job.phase.as_deref().unwrap_or("start");
            lines.push(format!(
                "it does not wait: a worker has it and prepares its machine (phase {phase})"
            ));
        }
        "running" => {
            let phase = job.phase.as_deref().unwrap_or("run");
            lines.push(format!("it does not wait: it runs (phase {phase})"));
        }
        _ => {
            lines.push(format!("it does not wait: it is over ({})", state(line)));
            let message = line
                .outcome
                .as_ref()
                .and_then(|outcome| outcome.message.as_ref());
            lines.extend(message.map(|message| format!("because {message}")));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::ByteSize;
    use serde_json::json;

    fn job(more: &Value) -> JobView {
        let mut value = json!({
            "id": "b1", "tenant": "acme", "kind": "run", "name": "x", "state": "queued", "cancel_asked": false,
            "queue": "default", "priority": 5, "created_unix_ms": 1_000_000, "submitted_by": "owner", "tags": [],
            "limits": {"cpus": 1, "memory": 1, "disk": 1, "timeout_ms": 1}, "network": {}, "trust": "trusted",
            "labels": {}, "attempts": [], "last_event": 1, "log_bytes": 0
        });
        for (key, field) in more.as_object().expect("fields") {
            value[key] = field.clone();
        }
        serde_json::from_value(value).expect("a job")
    }

    #[test]
    fn every_reason_has_words() {
        let need = Room {
            cpus: 4,
            memory: ByteSize::gib(8),
            disk: ByteSize::gib(20),
            machines: 1,
        };
        let queue = kiln_core::QueueName::default_queue();
        let reasons = [
            PendingReason::New,
            PendingReason::NoWorkers,
            PendingReason::NoWorkerMatches {
                missing: "label gpu=a100".to_owned(),
                workers: 1,
            },
            PendingReason::WorkersUnavailable { workers: 2 },
            PendingReason::Capacity {
                need,
                best: Room::default(),
            },
            PendingReason::TooLarge {
                need,
                largest: need,
            },
            PendingReason::Quota {
                scope: QuotaScope::Tenant,
                running: 8,
                limit: 8,
            },
            PendingReason::ConcurrencyGroup {
                group: "deploy".parse().expect("label"),
                holder: None,
            },
            PendingReason::Paused { queue },
            PendingReason::Backoff {
                until_unix_ms: 5000,
            },
            PendingReason::Behind { jobs: 3 },
            PendingReason::Reserved,
            PendingReason::Settling,
        ];
        assert_eq!(reasons.len(), PendingReason::CODES.len());
        let said: Vec<String> = reasons
            .iter()
            .map(|reason| waits(&serde_json::to_value(reason).expect("JSON"), 1000))
            .collect();
        assert_eq!(said[2], "none of 1 worker has label gpu=a100");
        assert_eq!(
            said[4],
            "it needs 4 CPUs, 8.0 GiB of memory, 20.0 GiB of disk; the most that a fitting worker has free is 0 CPUs, 0 B of memory, 0 B of disk, no machine"
        );
        assert_eq!(said[6], "its tenant's limit is reached: 8 of 8 run");
        assert_eq!(
            said[9],
            "it failed for reasons that are not its own and is tried again in 4.0 s"
        );
        assert!(
            said.iter()
                .all(|text| !text.is_empty() && !text.ends_with('.'))
        );
        assert_eq!(waits(&json!({"reason": "eclipse"}), 0), "eclipse");
    }

    #[test]
    fn the_chain_leads_from_the_queue_to_the_estimate() {
        let waiting = job(&json!({
            "pending": {"reason": "no_worker_matches", "missing": "label gpu=a100", "workers": 1},
            "estimate": {"wait_ms": 90_000, "samples": 50, "basis": "median of the last 50 builds"},
            "attempts": [{"number": 1, "leased_unix_ms": 1, "outcome": {"verdict": "failed", "class": "lost", "message": "its worker is gone", "exit_code": 3, "phases_ms": []}}],
        }));
        assert_eq!(
            chain(&waiting, 1_061_000),
            [
                "it waits in queue default for 1 min 01 s, priority 5",
                "attempt 1 failed: its worker is gone",
                "because none of 1 worker has label gpu=a100",
                "try: an operator's `kiln worker list` shows what there is; labels are fixed by the token a worker joins with",
                "it is expected to begin in about 1 min 30 s (median of the last 50 builds; 50 runs known)",
            ]
        );
        let room =
            |disk: u64| json!({"cpus": 1, "memory": 1 << 30, "disk": disk << 30, "machines": 1});
        for (reason, there, try_this) in [
            (
                "too_large",
                "largest",
                "try: ask for less with --disk, or add a larger host",
            ),
            (
                "capacity",
                "best",
                "try: ask for less with --disk, or make room on a worker's disk",
            ),
        ] {
            let pending = json!({"reason": reason, "need": room(20), there: room(3)});
            let lines = chain(&job(&json!({"pending": pending})), 1_000_000);
            assert!(
                lines[1].contains("20.0 GiB of disk") && lines[1].contains("3.0 GiB of disk"),
                "{lines:?}"
            );
            assert_eq!(lines[2], try_this);
        }
        let late = json!({"wait_ms": 0, "basis": "when jobs that run now should end"});
        assert_eq!(
            estimate(Some(&late)).as_deref(),
            Some("at any moment (when jobs that run now should end)")
        );
        let over = job(
            &json!({"state": "finished", "outcome": {"verdict": "failed", "class": "timeout", "message": "it took too long", "exit_code": 124, "phases_ms": []}}),
        );
        assert_eq!(
            chain(&over, 0),
            [
                "it does not wait: it is over (timeout)",
                "because it took too long"
            ]
        );
    }
}
