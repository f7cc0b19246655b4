//! `kiln job timeline`: the events of a job as a table.

use kiln_controller::api::JobView;
use serde_json::Value;

use super::table::{Table, left, right, wide};
use super::when;

/// What happened and how long after the job came.
pub(super) fn table(job: &JobView, events: &[Value], width: Option<usize>) -> String {
    let mut table = Table::new(&[right("AFTER"), left("EVENT"), wide("WHAT")]).within(width);
    for event in events {
        let at = event["at_unix_ms"].as_u64().unwrap_or_default();
        let data = &event["data"];
        let kind = event["kind"].as_str().unwrap_or("?");
        if kind == "egress" {
            // One part of many: `kiln job egress` joins them.
            continue;
        }
        let text = |name: &str| data[name].as_str().unwrap_or_default().to_owned();
        let what = match kind {
            "queued" => match data["outcome"]["message"].as_str() {
                Some(message) => format!("again: {message}"),
                None => format!("in queue {}", text("queue")),
            },
            "leased" => format!("attempt {} to worker {}", data["attempt"], text("worker")),
            "running" => format!("on worker {}", text("worker")),
            "phase" => text("phase"),
            "note" | "warning" => text("text"),
            "step" => format!("#{} {} {}", data["number"], text("name"), text("state")),
            "cancelling" => format!("asked by {}", text("by")),
            "finished" => match data["outcome"]["message"].as_str() {
                Some(message) => message.to_owned(),
                None => "passed".to_owned(),
            },
            _ => String::new(),
        };
        table.row([
            when::span(at.saturating_sub(job.line.created_unix_ms)),
            kind.to_owned(),
            what,
        ]);
    }
    table.render()
}
