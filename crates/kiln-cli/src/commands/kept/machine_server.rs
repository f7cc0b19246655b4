//! `kiln machine` through a server: machines that its workers keep.

use kiln_controller::api::{EndedView, List, MachineView, StatsView};
use kiln_core::{ByteSize, FailureClass, run_script};
use serde_json::{Value, json};

use crate::args::MachineCommand;
use crate::commands::table::{self, Table, left, right, wide};
use crate::commands::when;
use crate::error::{CliError, Result};
use crate::server::{Server, escaped};
use crate::show::Screen;

pub(super) async fn run(server: &Server, verb: MachineCommand, screen: Screen) -> Result<u8> {
    match verb {
        MachineCommand::List => list(server, screen).await?,
        MachineCommand::Show { id } => show(server, &id, screen).await?,
        MachineCommand::Stop { ids } => return end(server, &ids, true, screen).await,
        MachineCommand::Rm { ids, all: false } => return end(server, &ids, false, screen).await,
        MachineCommand::Rm { all: true, .. } => {
            let ids: Vec<_> = all(server).await?.into_iter().map(|it| it.id).collect();
            return end(server, &ids, false, screen).await;
        }
        MachineCommand::Logs { keeper: true, .. } => {
            return Err(CliError::usage("--keeper does not work through a server")
                .hint("who did what is in the audit trail: kiln audit list --action machine:use"));
        }
        MachineCommand::Logs { id, keeper: false } => {
            let id = find(server, &id).await?.id;
            let told: Value = server.get(&path(&id, "/console")).await?;
            screen.data(&told, || {
                crate::show::printable(told["console"].as_str().unwrap_or_default())
            });
        }
        MachineCommand::Stats { id } => {
            let id = find(server, &id).await?.id;
            let used: StatsView = server.get(&path(&id, "/stats")).await?;
            screen.data(&used, || used_of(&used));
        }
        MachineCommand::Kill { id, incident } => kill(server, &id, &incident, screen).await?,
    }
    Ok(0)
}

fn path(id: &str, rest: &str) -> String {
    format!("/v1/machines/{}{rest}", escaped(id))
}

async fn all(server: &Server) -> Result<Vec<MachineView>> {
    let list: List<MachineView> = server.get("/v1/machines").await?;
    Ok(list.items)
}

/// The machine whose id is, or begins, so.
///
/// # Errors
/// When there is none, or several.
pub(super) async fn find(server: &Server, start: &str) -> Result<MachineView> {
    let mut fitting = all(server).await?;
    fitting.retain(|machine| machine.id.starts_with(start) && !start.is_empty());
    if let Some(at) = fitting.iter().position(|machine| machine.id == start) {
        return Ok(fitting.swap_remove(at));
    }
    match (fitting.pop(), fitting.is_empty()) {
        (Some(one), true) => Ok(one),
        (Some(last), false) => {
            fitting.push(last);
            let ids: Vec<_> = fitting.iter().map(|machine| machine.id.as_str()).collect();
            let text = format!("{start:?} may be any of {}", ids.join(", "));
            Err(CliError::usage(text).hint("write more of the id"))
        }
        // An operator may name one of another tenant, which the list does not have.
        (None, _) if start.parse::<kiln_core::JobId>().is_ok() => {
            server.get(&path(start, "")).await
        }
        (None, _) => Err(
            CliError::usage(format!("there is no kept machine {start:?}"))
                .hint("`kiln machine list` shows them; `kiln run --keep` keeps one"),
        ),
    }
}

/// What ran in it, for a person.
fn what(machine: &MachineView) -> String {
    let words = run_script::shown(&machine.command).join(" ");
    match (&machine.image, words.is_empty()) {
        (Some(image), true) => image.clone(),
        (Some(image), false) => format!("{image}: {words}"),
        (None, _) => words,
    }
}

async fn list(server: &Server, screen: Screen) -> Result<()> {
    let machines = all(server).await?;
    if screen.json() {
        for machine in &machines {
            screen.data(machine, String::new);
        }
        return Ok(());
    }
    if machines.is_empty() {
        screen.note("no machine is kept; `kiln run --keep -- COMMAND` keeps one");
        return Ok(());
    }
    screen.text(&table(&machines, screen.width()));
    Ok(())
}

fn table(machines: &[MachineView], width: Option<usize>) -> String {
    let columns = [
        left("ID"),
        left("OWNER"),
        left("WORKER"),
        left("LEFT"),
        right("EXIT"),
        wide("COMMAND"),
    ];
    let mut table = Table::new(&columns).within(width);
    for machine in machines {
        let exit = machine.exit_code.map(|code| code.to_string());
        table.row([
            machine.id.clone(),
            machine.owner.clone(),
            machine.worker.clone(),
            when::span(machine.left_ms),
            exit.unwrap_or_else(|| "-".to_owned()),
            what(machine),
        ]);
    }
    table.render()
}

async fn show(server: &Server, id: &str, screen: Screen) -> Result<()> {
    let id = find(server, id).await?.id;
    let machine: MachineView = server.get(&path(&id, "")).await?;
    screen.data(&machine, || facts_of(&machine));
    Ok(())
}

fn facts_of(machine: &MachineView) -> String {
    let mut lines = table::Facts::default();
    lines.add("id", machine.id.as_str());
    lines.add("tenant", machine.tenant.as_str());
    lines.add("owner", machine.owner.as_str());
    lines.add("worker", machine.worker.as_str());
    if let Some(image) = &machine.image {
        lines.add("image", image.as_str());
    }
    lines.add("command", run_script::shown(&machine.command).join(" "));
    lines.add("ended", machine.ended.as_str());
    let until = when::stamp(machine.until_unix_ms);
    let left = when::span(machine.left_ms);
    lines.add("until", format!("{until} ({left} left)"));
    lines.add(
        "size",
        format!(
            "{} CPUs, {} of memory",
            machine.cpus,
            ByteSize(machine.memory)
        ),
    );
    match (machine.busy, &machine.egress) {
        (Some(busy), Some(egress)) => {
            lines.add("in use by", table::counted(busy, "command"));
            lines.add("network", egress.as_str());
        }
        _ => lines.add("in use by", "its worker does not answer now"),
    }
    lines.render()
}

/// Ends one.
///
/// # Errors
/// What the server says, or that something of it could not be removed.
pub(super) async fn remove(server: &Server, id: &str, stop: bool) -> Result<EndedView> {
    let query = if stop { "?stop=true" } else { "" };
    let ended: EndedView = server.delete(&path(id, query)).await?;
    whole(ended)
}

fn whole(ended: EndedView) -> Result<EndedView> {
    match ended.leaks.first() {
        None => Ok(ended),
        Some(leak) => Err(CliError::new(
            FailureClass::Infrastructure,
            format!("{}: could not be removed: {leak}", ended.id),
        )),
    }
}

/// Ends machines one after another; what failed is told at the end.
async fn end(server: &Server, ids: &[String], stop: bool, screen: Screen) -> Result<u8> {
    let mut failed = None;
    for id in ids {
        let ended = async {
            let id = find(server, id).await?.id;
            remove(server, &id, stop).await
        };
        match ended.await {
            Ok(ended) => {
                let gone = ended.result == "gone";
                if !gone {
                    screen.note(&format!("{}: its worker ends it", ended.id));
                }
                let told = json!({ "id": ended.id, "gone": gone });
                screen.data(&told, || ended.id.clone());
            }
            Err(error) if failed.is_none() => failed = Some(error),
            Err(error) => screen.note(&error.message),
        }
    }
    failed.map_or(Ok(0), Err)
}

fn used_of(used: &StatsView) -> String {
    let mut lines = table::Facts::default();
    let host = format!("{} ({} of its own)", ByteSize(used.rss), ByteSize(used.pss));
    lines.add("memory of its VMM", host);
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

async fn kill(server: &Server, id: &str, note: &str, screen: Screen) -> Result<()> {
    let machine = match find(server, id).await {
        Ok(machine) => machine,
        // Not one that stays: a job that runs.
        Err(none) if none.class == FailureClass::Usage => {
            return super::incident::kill_there(server, id, note, screen).await;
        }
        Err(error) => return Err(error),
    };
    let asked = json!({ "note": note });
    let ended: EndedView = server.post(&path(&machine.id, "/incident"), &asked).await?;
    let ended = whole(ended)?;
    let Some(incident) = &ended.incident else {
        let text = format!(
            "{} is gone, but its worker could not keep what it knew",
            ended.id
        );
        return Err(
            CliError::new(FailureClass::Infrastructure, text).hint(format!(
                "the job\'s own record is left: kiln job show {}",
                ended.id
            )),
        );
    };
    let told = json!({
        "id": ended.id, "gone": true, "worker": machine.worker, "incident": incident,
    });
    screen.data(&told, || {
        format!(
            "{} is gone; what tells of it: {incident} on {}",
            ended.id, machine.worker
        )
    });
    Ok(())
}
