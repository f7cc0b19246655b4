//! `kiln hold`: what stays on a server whatever its age.

use kiln_controller::api::{HoldView, List};
use kiln_worker::host::now_unix_ms;
use serde_json::{Value, json};

use super::table::{Table, left, wide};
use super::{home_queue, when};
use crate::args::{HeldArgs, HoldCommand, ServerArgs};
use crate::error::Result;
use crate::server::{Server, escaped};
use crate::show::Screen;

pub(super) async fn run(verb: HoldCommand, said: &ServerArgs, screen: Screen) -> Result<u8> {
    let asked = home_queue::ask(said).await?;
    let answered = answer(verb, &asked.server, screen).await;
    asked.done().await;
    answered.map(|()| 0)
}

async fn answer(verb: HoldCommand, server: &Server, screen: Screen) -> Result<()> {
    match verb {
        HoldCommand::Set { what, reason } => {
            let (kind, name) = what_of(server, what).await?;
            let asked = json!({ "reason": reason });
            let held: HoldView = server.put(&at(kind, &name), &asked).await?;
            screen.data(&held, || {
                format!("{} {} is on hold: {}", held.kind, held.name, held.reason)
            });
        }
        HoldCommand::Clear { what } => {
            let (kind, name) = what_of(server, what).await?;
            server.delete::<Value>(&at(kind, &name)).await?;
            let event = json!({ "event": "released", "kind": kind, "name": name });
            screen.data(&event, || format!("{kind} {name} is not on hold any more"));
        }
        HoldCommand::List => {
            let holds: List<HoldView> = server.get("/v1/holds").await?;
            if screen.json() {
                for hold in &holds.items {
                    screen.data(hold, String::new);
                }
            } else if holds.items.is_empty() {
                screen.note("nothing is on hold");
            } else {
                screen.text(&table(&holds.items, now_unix_ms(), screen.width()));
            }
        }
    }
    Ok(())
}

fn at(kind: &str, name: &str) -> String {
    format!("/v1/holds/{kind}/{}", escaped(name))
}

/// Kind and whole name of what was named.
async fn what_of(server: &Server, what: HeldArgs) -> Result<(&'static str, String)> {
    match what.tenant {
        Some(tenant) => Ok(("tenant", tenant)),
        None => {
            let job = server.job(what.job.as_deref()).await?;
            Ok(("job", job.line.id))
        }
    }
}

fn table(holds: &[HoldView], now_unix_ms: u64, width: Option<usize>) -> String {
    let columns = [
        left("WHAT"),
        left("NAME"),
        left("TENANT"),
        left("SINCE"),
        left("BY"),
        wide("REASON"),
    ];
    let mut table = Table::new(&columns).within(width);
    for hold in holds {
        table.row([
            hold.kind.clone(),
            hold.name.clone(),
            hold.tenant.clone(),
            when::ago(hold.since_unix_ms, now_unix_ms),
            hold.by.clone(),
            hold.reason.clone(),
        ]);
    }
    table.render()
}
