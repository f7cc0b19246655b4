//! The record of what a worker tells at an end, as events of its job: the parts of what was reached and refused, then the report that counts them. Each
//! has room in one event; what has none is left out, and the report says so.

use axum::extract::State;
use axum::{Extension, Json};
use kiln_db::{EVENT_BYTES_MAX, HandedIn, RECORD_EVENTS_MAX};
use kiln_proto::fleet::{EGRESS_PARTS_MAX, EVENT_DATA_MAX, MachineRecord};
use serde_json::{Value, json};

use super::doors::Answered;
use super::refusal::Refused;
use super::who::Worker;
use crate::access::Peer;
use crate::metrics::{Egress, observe_egress};
use crate::state::Controller;

const _: () = assert!(EVENT_DATA_MAX == EVENT_BYTES_MAX && EGRESS_PARTS_MAX < RECORD_EVENTS_MAX);

/// Kind of the events that have the parts.
const PART: &str = "egress";
/// Most bytes of what is kept of a report that is too large itself: numbers alone.
const MEASURED_BYTES_MAX: usize = 8 * 1024;

/// Kind of the report of a machine that stayed.
const MACHINE: &str = "machine_report";

/// `POST machines/record`: what a machine that stayed reached. Only who ran its attempt may tell, and once.
pub(super) async fn of_machine(
    State(controller): State<Controller>,
    worker: Worker,
    peer: Option<Extension<Peer>>,
    Json(told): Json<MachineRecord>,
) -> Answered<Value> {
    let MachineRecord {
        attempt,
        mut report,
        egress,
    } = told;
    if !report.is_object() {
        return Err(Refused::bad("the report of a machine is an object"));
    }
    let counted = Egress::told(&report);
    report["attempt"] = json!(attempt.number);
    // Whoever owns this controller's files speaks for the workers of its own commands, whose names nobody has any more.
    let owner = peer.is_some_and(|Extension(peer)| peer.is_owner());
    let whose = (!owner).then_some(&worker.id);
    let events = of(MACHINE, report, egress);
    let handed = controller.db.hand_in(&attempt, whose, events).await;
    match handed? {
        HandedIn::Kept => observe_egress(&controller.metrics, &counted),
        HandedIn::Before => {}
        HandedIn::NotOver => return Err(Refused::unavailable("the job is not over yet")),
        HandedIn::Unknown => return Err(Refused::missing("this worker ran no such attempt")),
    }
    Ok(Json(json!({})))
}

/// The events of a record: `kind` is the report's. Beside what the report says it has `egress_parts`, how many events before it are its parts, and
/// where something was left out `left_out`, which says what.
pub(super) fn of(
    kind: &'static str,
    report: Value,
    parts: Vec<Value>,
) -> Vec<(&'static str, Value)> {
    let told = parts.len();
    let fits = |part: &Value| part.is_object() && length(part) <= EVENT_BYTES_MAX;
    let parts = parts.into_iter().take(EGRESS_PARTS_MAX).filter(fits);
    let mut events: Vec<_> = parts.map(|part| (PART, part)).collect();
    let mut report = bounded(report);
    report["egress_parts"] = json!(events.len());
    if events.len() < told {
        report["left_out"]["egress_parts"] = json!(told - events.len());
    }
    events.push((kind, report));
    events
}

/// The report, or of one that is too large what was measured, and that it was.
fn bounded(report: Value) -> Value {
    let bytes = length(&report);
    // Room for what is added above.
    if bytes <= EVENT_BYTES_MAX - 256 {
        return report;
    }
    tracing::warn!(bytes, "the report of an attempt is too large");
    let mut less = json!({ "left_out": { "report_bytes": bytes } });
    for key in ["measured", "egress_left_out", "exit"] {
        let value = report.get(key).cloned().unwrap_or_default();
        if !value.is_null() && length(&value) <= MEASURED_BYTES_MAX {
            less[key] = value;
        }
    }
    less
}

fn length(value: &Value) -> usize {
    serde_json::to_vec(value).map_or(usize::MAX, |text| text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_kept_as_it_is() {
        let report = json!({ "measured": { "clone_ms": 3 } });
        let part = json!({ "reached": [] });
        let events = of("report", report, vec![part.clone(), part.clone()]);
        let want = json!({ "measured": { "clone_ms": 3 }, "egress_parts": 2 });
        assert_eq!(
            events,
            [(PART, part.clone()), (PART, part), ("report", want)]
        );
    }

    #[test]
    fn what_is_too_large_is_said_and_what_was_measured_stays() {
        let big = json!({ "reached": ["x".repeat(EVENT_BYTES_MAX)] });
        let small = json!({ "refused": [] });
        let mut parts = vec![big.clone(), json!(7), small.clone()];
        parts.extend(std::iter::repeat_n(small, 2 * EGRESS_PARTS_MAX));
        let told = parts.len();
        let report = json!({ "measured": { "egress": { "refused": 4 } }, "egress": big });
        let events = of("report", report, parts);
        assert!(events.len() <= RECORD_EVENTS_MAX);
        let (kind, report) = events.last().expect("the report");
        assert_eq!(*kind, "report");
        assert_eq!(report["measured"]["egress"]["refused"], 4);
        assert!(report["left_out"]["report_bytes"].as_u64() > Some(EVENT_BYTES_MAX as u64));
        let kept = events.len() - 1;
        assert_eq!(report["egress_parts"], kept);
        assert_eq!(report["left_out"]["egress_parts"], told - kept);
        assert!(
            events
                .iter()
                .all(|(_, data)| length(data) <= EVENT_BYTES_MAX)
        );
    }
}
