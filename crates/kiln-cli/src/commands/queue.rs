//! `kiln queue`: what waits where; operators make queues, bound them, pause and resume.

use std::collections::BTreeMap;

use kiln_controller::api::{JobLine, List, QueueView};
use kiln_worker::host::now_unix_ms;
use serde_json::{Value, json};

use super::table::{Facts, Table, counted, left, right, wide};
use super::{home_queue, job, when};
use crate::args::{QueueCommand, ServerArgs};
use crate::error::{CliError, Result};
use crate::server::{Server, escaped, words};
use crate::show::Screen;

/// Waiting jobs that are looked at.
const WAITING_MAX: usize = 500;

pub(super) async fn run(verb: QueueCommand, said: &ServerArgs, screen: Screen) -> Result<u8> {
    let asked = home_queue::ask(said).await?;
    let answered = answer(verb, &asked.server, screen).await;
    asked.done().await;
    answered.map(|()| 0)
}

async fn answer(verb: QueueCommand, server: &Server, screen: Screen) -> Result<()> {
    match verb {
        QueueCommand::List => {
            let queues: List<QueueView> = server.get("/v1/queues").await?;
            if screen.json() {
                for queue in &queues.items {
                    screen.data(queue, String::new);
                }
            } else {
                screen.text(&table(&queues.items, now_unix_ms(), screen.width()));
            }
        }
        QueueCommand::Show { name } => show(server, &name, screen).await?,
        QueueCommand::Stats => stats(server, screen).await?,
        QueueCommand::Pause { name, reason } => {
            change(
                server,
                &name,
                &json!({ "paused": true, "reason": reason }),
                screen,
            )
            .await?;
        }
        QueueCommand::Resume { name } => {
            change(server, &name, &json!({ "paused": false }), screen).await?;
        }
        QueueCommand::Create { name, pool } => {
            let asked = json!({ "name": name, "pool": pool });
            tell(&server.post("/v1/queues", &asked).await?, screen);
        }
        QueueCommand::Quota { name, running } => {
            let asked = json!({ "running_max": running.0 });
            tell(&server.post(&at(&name), &asked).await?, screen);
        }
        QueueCommand::Weight { name, weight } => {
            let asked = json!({ "weight": weight });
            tell(&server.post(&at(&name), &asked).await?, screen);
        }
    }
    Ok(())
}

fn at(name: &str) -> String {
    format!("/v1/queues/{}", escaped(name))
}

fn tell(queue: &QueueView, screen: Screen) {
    screen.data(queue, || facts(queue).render());
}

fn facts(queue: &QueueView) -> Facts {
    let mut facts = Facts::default();
    facts.add("queue", &queue.name);
    facts.add("pool", &queue.pool);
    facts.add("state", state(queue));
    facts.add("weight", queue.weight.to_string());
    facts.add("waiting", queue.pending.to_string());
    let most = queue
        .running_max
        .map(|most| format!(" of at most {most}"))
        .unwrap_or_default();
    facts.add("running", format!("{}{most}", queue.running));
    facts
}

async fn change(server: &Server, name: &str, asked: &Value, screen: Screen) -> Result<()> {
    let queue: QueueView = server.post(&at(name), asked).await?;
    screen.data(&queue, || match queue.paused_since_unix_ms {
        Some(_) => format!(
            "queue {} is paused; {} waiting",
            queue.name,
            counted(queue.pending.into(), "job")
        ),
        None => format!(
            "queue {} goes on; {} waiting",
            queue.name,
            counted(queue.pending.into(), "job")
        ),
    });
    Ok(())
}

fn table(queues: &[QueueView], now_unix_ms: u64, width: Option<usize>) -> String {
    let mut table = Table::new(&[
        left("QUEUE"),
        left("POOL"),
        right("WAIT"),
        right("RUN"),
        right("MOST"),
        right("OLDEST"),
        wide("STATE"),
    ])
    .within(width);
    for queue in queues {
        table.row([
            queue.name.clone(),
            queue.pool.clone(),
            queue.pending.to_string(),
            queue.running.to_string(),
            queue
                .running_max
                .map_or_else(|| "any".to_owned(), |most| most.to_string()),
            queue
                .oldest_unix_ms
                .map(|then| when::span(now_unix_ms.saturating_sub(then)))
                .unwrap_or_default(),
            state(queue),
        ]);
    }
    table.render()
}

fn state(queue: &QueueView) -> String {
    match (&queue.paused_since_unix_ms, &queue.paused_reason) {
        (None, _) => "open".to_owned(),
        (Some(_), None) => "paused".to_owned(),
        (Some(_), Some(why)) => format!("paused: {why}"),
    }
}

async fn show(server: &Server, name: &str, screen: Screen) -> Result<()> {
    let queues: List<QueueView> = server.get("/v1/queues").await?;
    let queue = queues.items.into_iter().find(|queue| queue.name == name);
    let queue = queue.ok_or_else(|| {
        CliError::usage(format!("there is no queue {name}"))
            .hint("`kiln queue list` shows the queues there are")
    })?;
    let waiting: List<JobLine> = server
        .get(&format!(
            "/v1/jobs?state=queued,leased,running&limit=20&queue={}",
            escaped(name)
        ))
        .await?;
    let value = json!({ "queue": queue, "jobs": waiting.items });
    screen.data(&value, || {
        let now = now_unix_ms();
        let mut text = facts(&queue).render();
        if !waiting.items.is_empty() {
            text.push('\n');
            text.push_str(&job::table(&waiting.items, now, screen.width()));
        }
        text
    });
    Ok(())
}

/// What waits, by reason.
async fn stats(server: &Server, screen: Screen) -> Result<()> {
    let waiting: List<JobLine> = server
        .get(&format!("/v1/jobs?state=queued&limit={WAITING_MAX}"))
        .await?;
    let now = now_unix_ms();
    let counts = by_reason(&waiting.items);
    let more = waiting.next.is_some();
    let reasons: BTreeMap<&str, usize> = counts
        .iter()
        .map(|(code, (count, _))| (code.as_str(), *count))
        .collect();
    let ages: Vec<u64> = waiting
        .items
        .iter()
        .map(|job| now.saturating_sub(job.created_unix_ms))
        .collect();
    let value = json!({
        "waiting": waiting.items.len(), "more": more, "reasons": reasons, "oldest_ms": ages.iter().max(),
    });
    screen.data(&value, || {
        if waiting.items.is_empty() {
            return "nothing waits".to_owned();
        }
        let plus = if more { " at least" } else { "" };
        let oldest = when::span(ages.iter().copied().max().unwrap_or_default());
        let mut table = Table::new(&[right("JOBS"), left("REASON"), wide("FOR EXAMPLE")])
            .within(screen.width());
        for (code, (count, job)) in &counts {
            let example = job
                .pending
                .as_ref()
                .map(|pending| words::waits(pending, now))
                .unwrap_or_default();
            table.row([
                count.to_string(),
                code.clone(),
                format!("{}: {example}", job.id),
            ]);
        }
        format!(
            "waiting{plus}: {}, the oldest for {oldest}\n{}",
            counted(waiting.items.len() as u64, "job"),
            table.render()
        )
    });
    Ok(())
}

/// How many wait for each reason, and one of them.
fn by_reason(jobs: &[JobLine]) -> BTreeMap<String, (usize, &JobLine)> {
    let mut counts: BTreeMap<String, (usize, &JobLine)> = BTreeMap::new();
    for job in jobs {
        let code = job
            .pending
            .as_ref()
            .and_then(|pending| pending["reason"].as_str())
            .unwrap_or("new");
        counts.entry(code.to_owned()).or_insert((0, job)).0 += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_fit_eighty_columns() {
        let queue: QueueView = serde_json::from_value(json!({
            "name": "default", "pool": "default", "weight": 100, "running_max": null, "paused_since_unix_ms": 5,
            "paused_reason": "the disks of both hosts are being changed until noon", "pending": 12, "running": 3, "oldest_unix_ms": 0
        }))
        .expect("a queue");
        let text = table(
            std::slice::from_ref(&queue),
            65_000,
            Some(super::super::table::WIDTH),
        );
        let want = "\
QUEUE    POOL     WAIT  RUN  MOST      OLDEST  STATE
default  default    12    3   any  1 min 05 s  paused: the disks of both hosts …
";
        assert_eq!(text, want);
    }
}
