//! `kiln worker list|show|drain|resume|cordon|remove`: operators see and steer a server's workers.

use kiln_controller::api::{List, WorkerView};
use kiln_core::ByteSize;
use kiln_worker::host::now_unix_ms;
use serde_json::{Value, json};

use super::home_queue;
use super::table::{Facts, Table, left, right, wide};
use super::when;
use crate::args::{ServerArgs, WorkerCommand, WorkerStateArgs};
use crate::error::Result;
use crate::server::{Server, escaped};
use crate::show::Screen;

pub(super) async fn run(verb: WorkerCommand, said: &ServerArgs, screen: Screen) -> Result<u8> {
    let asked = home_queue::ask(said).await?;
    let answered = answer(verb, &asked.server, screen).await;
    asked.done().await;
    answered.map(|()| 0)
}

async fn answer(verb: WorkerCommand, server: &Server, screen: Screen) -> Result<()> {
    match verb {
        WorkerCommand::List { pool } => {
            let pool = pool
                .map(|pool| format!("?pool={}", escaped(&pool)))
                .unwrap_or_default();
            let workers: List<WorkerView> = server.get(&format!("/v1/workers{pool}")).await?;
            if workers.items.is_empty() {
                screen.note(
                    "no workers; `kiln token create --join` makes a token by which one joins",
                );
            } else if screen.json() {
                for worker in &workers.items {
                    screen.data(worker, String::new);
                }
            } else {
                screen.text(&table(&workers.items, now_unix_ms(), screen.width()));
            }
        }
        WorkerCommand::Show { name } => {
            let worker: WorkerView = server
                .get(&format!("/v1/workers/{}", escaped(&name)))
                .await?;
            screen.data(&worker, || show(&worker, now_unix_ms()));
        }
        WorkerCommand::Drain(args) => change(server, args, "draining", screen).await?,
        WorkerCommand::Resume(args) => change(server, args, "active", screen).await?,
        WorkerCommand::Cordon(args) => change(server, args, "cordoned", screen).await?,
        WorkerCommand::Remove { name } => {
            server
                .delete::<Value>(&format!("/v1/workers/{}", escaped(&name)))
                .await?;
            screen.data(&json!({ "event": "removed", "worker": name }), || {
                format!("worker {name} is removed")
            });
        }
    }
    Ok(())
}

async fn change(server: &Server, args: WorkerStateArgs, state: &str, screen: Screen) -> Result<()> {
    let asked = json!({ "state": state, "reason": args.reason });
    let path = format!("/v1/workers/{}/state", escaped(&args.name));
    let worker: WorkerView = server.post(&path, &asked).await?;
    screen.data(&worker, || {
        format!("worker {} is {}", worker.id, worker.state)
    });
    Ok(())
}

fn table(workers: &[WorkerView], now_unix_ms: u64, width: Option<usize>) -> String {
    let mut table = Table::new(&[
        left("WORKER"),
        left("POOL"),
        left("STATE"),
        right("CPUS"),
        right("MEMORY"),
        right("MACHINES"),
        left("SEEN"),
        wide("REASON, LABELS"),
    ])
    .within(width);
    for worker in workers {
        table.row([
            worker.id.clone(),
            worker.pool.clone(),
            worker.state.clone(),
            worker.capacity.cpus.to_string(),
            ByteSize(worker.capacity.memory).to_string(),
            worker.capacity.machines.to_string(),
            when::ago(worker.seen_unix_ms, now_unix_ms),
            noted(worker),
        ]);
    }
    table.render()
}

/// Why it gets no jobs, if it gets none, then its labels.
fn noted(worker: &WorkerView) -> String {
    let reason = worker.state_reason.as_deref();
    let reason = reason.filter(|_| worker.state != "active");
    let labels = Some(labels(worker, " ")).filter(|labels| !labels.is_empty());
    let words: Vec<&str> = reason.into_iter().chain(labels.as_deref()).collect();
    words.join("; ")
}

fn labels(worker: &WorkerView, between: &str) -> String {
    let pairs: Vec<String> = worker
        .labels
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    pairs.join(between)
}

fn show(worker: &WorkerView, now_unix_ms: u64) -> String {
    let mut facts = Facts::default();
    facts.add("worker", &worker.id);
    facts.add("pool", &worker.pool);
    let by = worker
        .state_by
        .as_ref()
        .map(|by| format!(", by {by}"))
        .unwrap_or_default();
    facts.add("state", format!("{}{by}", worker.state));
    facts.add("reason", worker.state_reason.clone().unwrap_or_default());
    facts.add("seen", when::ago(worker.seen_unix_ms, now_unix_ms));
    facts.add("joined", when::stamp(worker.joined_unix_ms));
    facts.add("arch", &worker.arch);
    facts.add("runtimes", worker.runtimes.join(", "));
    facts.add("labels", labels(worker, "\n"));
    facts.add(
        "tenants",
        worker
            .tenants
            .as_ref()
            .map_or_else(|| "all".to_owned(), |tenants| tenants.join("\n")),
    );
    let room = &worker.capacity;
    facts.add(
        "room",
        format!(
            "{} CPUs, {} of memory, {} of disk, {} machines",
            room.cpus,
            ByteSize(room.memory),
            ByteSize(room.disk),
            room.machines
        ),
    );
    facts.add(
        "failures",
        format!("{} of its own in a row", worker.infra_failures),
    );
    facts.add("version", &worker.version);
    facts.add(
        "certificate",
        worker
            .certificate_until_unix_ms
            .map(|until| format!("until {}", when::stamp(until)))
            .unwrap_or_default(),
    );
    facts.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_fit_eighty_columns() {
        let worker: WorkerView = serde_json::from_value(json!({
            "id": "build-host-2", "pool": "default", "state": "draining", "state_by": "owner", "state_reason": "new disks",
            "arch": "amd64", "runtimes": ["node", "python"], "labels": {"zone": "a", "disk": "fast-and-large"}, "tenants": null,
            "capacity": {"cpus": 16, "memory": 68_719_476_736_u64, "disk": 1_u64 << 40, "machines": 8}, "version": "0.1.0",
            "seen_unix_ms": 1000, "joined_unix_ms": 0, "infra_failures": 0, "certificate_until_unix_ms": null
        }))
        .expect("a worker");
        let text = table(
            std::slice::from_ref(&worker),
            2000,
            Some(super::super::table::WIDTH),
        );
        assert!(
            text.lines()
                .all(|line| line.chars().count() <= super::super::table::WIDTH),
            "{text}"
        );
        let whole = table(std::slice::from_ref(&worker), 2000, None);
        assert!(
            whole.contains("new disks; disk=fast-and-large zone=a"),
            "{whole}"
        );
        let shown = show(&worker, 2000);
        for line in [
            "state        draining, by owner",
            "reason       new disks",
            "tenants      all",
        ] {
            assert!(shown.contains(line), "{line}\n{shown}");
        }
    }
}
