//! `kiln machine`: what is kept, how it stands, and its end.

use std::fs;
use std::io::Read as _;

use kiln_core::{ByteSize, FailureClass, run_script};
use kiln_worker::home::Home;
use kiln_worker::host::now_unix_ms;
use kiln_worker::kept::ask::{Ask, Reply, Status, Used};
use kiln_worker::kept::client::Near;
use kiln_worker::kept::{self, Facts, FindError, LOG_FILE};
use serde::Serialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{ask, find, home, incident, machine_server, reap, surprised};
use crate::args::{MachineCommand, ServerArgs};
use crate::commands::table::{self, Table, left, right, wide};
use crate::commands::when;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::{Screen, ShownPath as _};

/// Most bytes of a keeper's log that are read.
const LOG_BYTES_MAX: u64 = 4 << 20;

pub(in crate::commands) async fn run(
    verb: MachineCommand,
    said: &ServerArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    if let Some(server) = crate::server::configured(said)? {
        return machine_server::run(&server, verb, screen).await;
    }
    let home = home()?;
    match verb {
        MachineCommand::List => list(&home, screen).await,
        MachineCommand::Show { id } => show(&home, &id, screen).await,
        MachineCommand::Stop { ids } => {
            let mut all = Vec::new();
            for id in &ids {
                all.push(find(&home, id).await?);
            }
            end(&home, all, &Ask::Stop, screen).await
        }
        MachineCommand::Rm { ids, all: false } => {
            let mut all = Vec::new();
            for id in &ids {
                all.push(find(&home, id).await?);
            }
            end(&home, all, &Ask::Remove, screen).await
        }
        MachineCommand::Rm { all: true, .. } => {
            reap(&home).await?;
            end(&home, kept::list(&home.data), &Ask::Remove, screen).await
        }
        MachineCommand::Logs { id, keeper } => logs(&home, &id, keeper, screen).await,
        MachineCommand::Stats { id } => stats(&home, &id, screen).await,
        MachineCommand::Kill { id, incident } => kill(&home, &id, incident, screen, cancel).await,
    }
}

/// One line of `kiln machine list`.
#[derive(Serialize)]
struct Line<'a> {
    id: &'a str,
    #[serde(flatten)]
    facts: &'a Facts,
    left_ms: u64,
}

/// What ran in it, for a person.
fn what(facts: &Facts) -> String {
    let image = facts.machine.image.as_ref().map(ToString::to_string);
    let words = run_script::shown(&facts.machine.command).join(" ");
    match (image, words.is_empty()) {
        (Some(image), true) => image,
        (Some(image), false) => format!("{image}: {words}"),
        (None, _) => words,
    }
}

async fn list(home: &Home, screen: Screen) -> Result<u8> {
    reap(home).await?;
    let all = kept::list(&home.data);
    if screen.json() {
        for facts in &all {
            let left_ms = facts.until_unix_ms.saturating_sub(now_unix_ms());
            screen.data(
                &Line {
                    id: facts.id(),
                    facts,
                    left_ms,
                },
                String::new,
            );
        }
        return Ok(0);
    }
    if all.is_empty() {
        screen.note("no machine is kept; `kiln run --keep -- COMMAND` keeps one");
        return Ok(0);
    }
    screen.text(&table(&all, now_unix_ms(), screen.width()));
    Ok(0)
}

fn table(all: &[Facts], now: u64, width: Option<usize>) -> String {
    let columns = [
        left("ID"),
        left("KEPT"),
        left("LEFT"),
        right("EXIT"),
        wide("COMMAND"),
    ];
    let mut table = Table::new(&columns).within(width);
    for facts in all {
        let exit = facts.machine.exit_code.map(|code| code.to_string());
        table.row([
            facts.id().to_owned(),
            when::ago(facts.since_unix_ms, now),
            when::span(facts.until_unix_ms.saturating_sub(now)),
            exit.unwrap_or_else(|| "-".to_owned()),
            what(facts),
        ]);
    }
    table.render()
}

async fn show(home: &Home, id: &str, screen: Screen) -> Result<u8> {
    let facts = find(home, id).await?;
    let Reply::Shown(status) = ask(&near(home, &facts), &Ask::Show).await? else {
        return Err(surprised());
    };
    let shown = Line {
        id: facts.id(),
        facts: &status.facts,
        left_ms: status.left_ms,
    };
    let value = json!({ "busy": status.busy, "egress": status.egress });
    let mut line = serde_json::to_value(&shown).or_infrastructure()?;
    if let (Value::Object(line), Value::Object(more)) = (&mut line, value) {
        line.extend(more);
    }
    screen.data(&line, || facts_of(&status, now_unix_ms()));
    Ok(0)
}

fn facts_of(status: &Status, now: u64) -> String {
    let (facts, machine) = (&status.facts, &status.facts.machine);
    let mut lines = table::Facts::default();
    lines.add("id", facts.id());
    lines.add("machine", machine.machine.as_str());
    lines.add("tenant", machine.tenant.as_str());
    lines.add("owner", format!("user {}", facts.uid));
    if let Some(image) = &machine.image {
        lines.add("image", image.to_string());
    }
    lines.add("command", run_script::shown(&machine.command).join(" "));
    lines.add("ended", machine.ended.as_str());
    lines.add("kept", when::ago(facts.since_unix_ms, now));
    let until = when::stamp(facts.until_unix_ms);
    lines.add(
        "until",
        format!("{until} ({} left)", when::span(status.left_ms)),
    );
    lines.add(
        "size",
        format!("{} CPUs, {} of memory", machine.cpus, machine.memory),
    );
    lines.add("in use by", table::counted(status.busy as u64, "command"));
    lines.add("network", status.egress.as_str());
    lines.add(
        "keeper",
        format!("process {}, kiln {}", facts.pid, facts.version),
    );
    lines.render()
}

fn near(home: &Home, facts: &Facts) -> Near {
    Near {
        home: home.data.clone(),
        facts: facts.clone(),
    }
}

/// Ends machines one after another; what failed is told at the end.
async fn end(home: &Home, all: Vec<Facts>, how: &Ask, screen: Screen) -> Result<u8> {
    let mut failed = None;
    for facts in all {
        let ended = gone(home, &facts, how).await;
        match ended {
            Ok(_) => screen.data(&json!({ "id": facts.id(), "gone": true }), || {
                facts.id().to_owned()
            }),
            Err(error) if failed.is_none() => failed = Some(error),
            Err(error) => screen.note(&error.message),
        }
    }
    failed.map_or(Ok(0), Err)
}

/// Ends one without a word.
///
/// # Errors
/// When it cannot be removed.
pub(in crate::commands) async fn remove(home: &Home, facts: &Facts) -> Result<()> {
    gone(home, facts, &Ask::Remove).await.map(drop)
}

/// Where an incident was kept.
type Incident = Option<std::path::PathBuf>;

/// Ends one. A keeper that does not answer is killed, and its machine reaped.
async fn gone(home: &Home, facts: &Facts, how: &Ask) -> Result<Incident> {
    match ask(&near(home, facts), how).await {
        Ok(Reply::Gone { leaks, incident }) => match leaks.first() {
            None => Ok(incident),
            Some(leak) => Err(CliError::new(
                FailureClass::Infrastructure,
                format!("{}: could not be removed: {leak}", facts.id()),
            )),
        },
        Ok(_) => Err(surprised()),
        // A worker's own process is not killed for one machine: `kiln machine rm --server` has the controller tell it.
        Err(error)
            if error.class == FailureClass::Infrastructure && facts.machine.worker.is_none() =>
        {
            kill_keeper(home, facts)?;
            reap(home).await?;
            match kept::find(&home.data, facts.machine.machine.as_str()) {
                Err(_) => Ok(None),
                Ok(_) => Err(error),
            }
        }
        Err(error) => Err(error),
    }
}

/// Only a process that still holds this machine is killed: its record names it with the time of its start.
fn kill_keeper(home: &Home, facts: &Facts) -> Result<()> {
    kiln_machine::reap::kill_owner(&home.data, &facts.machine.machine)
        .map_err(|error| CliError::new(FailureClass::Infrastructure, error.to_string()))
}

async fn logs(home: &Home, id: &str, keeper: bool, screen: Screen) -> Result<u8> {
    let facts = find(home, id).await?;
    if keeper {
        let path = home
            .data
            .join("machines")
            .join(facts.machine.machine.as_str())
            .join(LOG_FILE);
        let mut text = String::new();
        let file = fs::File::open(path).or_infrastructure()?;
        file.take(LOG_BYTES_MAX)
            .read_to_string(&mut text)
            .or_infrastructure()?;
        screen.text(&crate::show::printable(&text));
        return Ok(0);
    }
    let Reply::Text { text } = ask(&near(home, &facts), &Ask::Console).await? else {
        return Err(surprised());
    };
    screen.data(&json!({ "console": text }), || {
        crate::show::printable(&text)
    });
    Ok(0)
}

async fn stats(home: &Home, id: &str, screen: Screen) -> Result<u8> {
    let facts = find(home, id).await?;
    let Reply::Used(used) = ask(&near(home, &facts), &Ask::Stats).await? else {
        return Err(surprised());
    };
    screen.data(&used, || used_of(&used));
    Ok(0)
}

fn used_of(used: &Used) -> String {
    let mut lines = table::Facts::default();
    let host = format!("{} ({} of its own)", ByteSize(used.rss), ByteSize(used.pss));
    lines.add("memory of QEMU", host);
    lines.add("CPU time", when::span(used.cpu_ms));
    if let Some(guest) = &used.guest {
        lines.add(
            "its guest says",
            format!(
                "{} of memory in use ({} at most), {} of CPU time, {} for memory",
                ByteSize(guest.memory_bytes),
                ByteSize(guest.memory_peak),
                when::span(guest.cpu_ms),
                table::counted(guest.oom_kills, "kill"),
            ),
        );
    }
    lines.render()
}

async fn kill(
    home: &Home,
    id: &str,
    note: String,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    reap(home).await?;
    let facts = match kept::find(&home.data, id) {
        Ok(facts) => facts,
        Err(FindError::Unknown(_)) => return incident::kill(home, id, note, screen, &cancel).await,
        Err(several) => return Err(CliError::usage(several.to_string())),
    };
    let incident = gone(home, &facts, &Ask::Incident { note }).await?;
    let Some(dir) = incident else {
        let message = format!("{id} is gone, but its keeper could not say what it knew");
        return Err(
            CliError::new(FailureClass::Infrastructure, message).hint(format!(
                "the job's own record is left: kiln job show {}",
                facts.id()
            )),
        );
    };
    let job = incident::keep_job(facts.id(), &dir, &cancel).await;
    let told = json!({ "id": facts.id(), "gone": true, "incident": dir, "job": job.as_ref().ok() });
    screen.data(&told, || {
        format!("{} is gone; what tells of it: {}", facts.id(), dir.shown())
    });
    match job {
        Ok(_) => Ok(0),
        Err(error) => Err(error.hint(format!("everything else is in {}", dir.shown()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let told = json!({
            "schema": 1, "machine": "r1m7zxmk0w0t3neew0-1-run", "job": "r1m7zxmk0w0t3neew0", "tenant": "local",
            "image": null, "command": ["sh", "-c", "make test && echo a very long line that is cut somewhere"],
            "ended": "the command ended with exit code 2", "exit_code": 2, "cpus": 2, "memory": ByteSize::mib(512),
            "network": kiln_core::NetworkPolicy::Isolated, "bytes_out_and_in_per_second": [null, null], "connections_max": null, "runc": null, "stays_ms": 3_600_000,
            "uid": 1000, "pid": 4711, "version": "0.1.0",
            "since_unix_ms": 1_900_000_000_000_u64, "until_unix_ms": 1_900_003_600_000_u64,
        });
        serde_json::from_value(told).expect("facts")
    }

    #[test]
    fn the_list_fits_a_terminal() {
        let text = table(&[facts()], 1_900_000_060_000, Some(table::WIDTH));
        let want = "\
ID                  KEPT       LEFT         EXIT  COMMAND
r1m7zxmk0w0t3neew0  1 min ago  59 min 00 s     2  sh -c make test && echo a ver…
";
        assert_eq!(text, want);
    }

    #[test]
    fn what_is_shown_of_one() {
        let status = Status {
            facts: facts(),
            left_ms: 90_000,
            busy: 1,
            root: String::new(),
            egress: "none".to_owned(),
        };
        let want = "\
id         r1m7zxmk0w0t3neew0
machine    r1m7zxmk0w0t3neew0-1-run
tenant     local
owner      user 1000
command    sh -c make test && echo a very long line that is cut somewhere
ended      the command ended with exit code 2
kept       1 min ago
until      2030-03-17 18:46:40 UTC (1 min 30 s left)
size       2 CPUs, 512.0 MiB of memory
in use by  1 command
network    none
keeper     process 4711, kiln 0.1.0
";
        assert_eq!(facts_of(&status, 1_900_000_060_000), want);
    }
}
