//! `kiln job why`: the chain from what was asked to why it has not begun.

use kiln_controller::api::{JobView, List, QueueView};
use kiln_core::PendingReason;
use kiln_worker::host::now_unix_ms;
use serde_json::json;

use super::job::kind;
use super::table::{WIDTH, wrap};
use crate::server::{Server, words};
use crate::show::{Screen, printable};

/// Why its queue is paused, in the words of whoever did it; none when it is not, or that is not for the caller to see.
async fn paused(server: &Server, job: &JobView) -> Option<String> {
    let pending = words::reason(job.line.pending.as_ref())?;
    let PendingReason::Paused { queue } = pending else {
        return None;
    };
    let queues: List<QueueView> = server.get("/v1/queues").await.ok()?;
    let paused = queues
        .items
        .into_iter()
        .find(|one| one.name == queue.as_str());
    paused?.paused_reason
}

/// Says it.
pub(super) async fn tell(server: &Server, job: &JobView, screen: Screen) {
    let paused = paused(server, job).await;
    let mut lines = words::chain(job, now_unix_ms());
    if let Some(reason) = paused {
        let because = lines.iter().position(|line| line.starts_with("because "));
        lines.insert(
            because.map_or(0, |at| at + 1),
            format!("it was paused because: {reason}"),
        );
    }
    let value = json!({
        "event": "why", "job": job.line.id, "state": job.line.state, "pending": job.line.pending,
        "estimate": job.estimate, "chain": lines,
    });
    screen.data(&value, || {
        let mut text = format!(
            "job {} ({} {})\n",
            job.line.id,
            kind(&job.line),
            job.line.name
        );
        for line in &lines {
            let mut indent = "  ";
            for part in wrap(line, WIDTH - 4) {
                text.push_str(&printable(&format!("{indent}{part}\n")));
                indent = "    ";
            }
        }
        text
    });
}
