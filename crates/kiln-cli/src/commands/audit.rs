//! `kiln audit`: who asked a server for what, and what it said.

use kiln_controller::api::{AuditView, List};
use kiln_worker::host::now_unix_ms;

use super::table::{Table, left, wide};
use super::{home_queue, when};
use crate::args::{AuditArgs, AuditCommand, Moment, ServerArgs};
use crate::error::Result;
use crate::server::{Server, escaped};
use crate::show::Screen;

/// Rows of a page.
const PAGE: usize = 500;

pub(super) async fn run(verb: AuditCommand, said: &ServerArgs, screen: Screen) -> Result<u8> {
    let AuditCommand::List(args) = verb;
    let asked = home_queue::ask(said).await?;
    let answered = list(&args, &asked.server, screen).await;
    asked.done().await;
    answered.map(|()| 0)
}

/// Page by page; nothing is kept, so that the whole trail may pass.
async fn list(args: &AuditArgs, server: &Server, screen: Screen) -> Result<()> {
    let query = query(args, now_unix_ms());
    let mut left = if args.all { usize::MAX } else { args.limit };
    let mut start = match args.oldest {
        true => "after=0".to_owned(),
        false => "newest=true".to_owned(),
    };
    let mut any = false;
    while left > 0 {
        let limit = left.min(PAGE);
        let path = format!("/v1/audit?{start}&limit={limit}{query}");
        let page: List<AuditView> = server.get(&path).await?;
        left = left.saturating_sub(page.items.len());
        if screen.json() {
            for row in &page.items {
                screen.data(row, String::new);
            }
        } else if !page.items.is_empty() {
            screen.text(&table(&page.items, screen.width()));
        }
        any |= !page.items.is_empty();
        let Some(next) = page.next else { break };
        let way = if args.oldest { "after" } else { "before" };
        start = format!("{way}={}", escaped(&next));
    }
    if !any {
        screen.note("there are no such rows");
    }
    Ok(())
}

fn query(args: &AuditArgs, now_unix_ms: u64) -> String {
    let moment = |moment: Moment| match moment {
        Moment::At(at) => at.to_string(),
        Moment::Ago(ago) => {
            let ago = u64::try_from(ago.as_millis()).unwrap_or(u64::MAX);
            now_unix_ms.saturating_sub(ago).to_string()
        }
    };
    let fields = [
        ("tenant", args.tenant.clone()),
        ("actor", args.actor.clone()),
        ("action", args.action.clone()),
        ("verdict", args.verdict.clone()),
        ("from_unix_ms", args.since.map(moment)),
        ("until_unix_ms", args.until.map(moment)),
    ];
    let named = fields.into_iter();
    named
        .filter_map(|(name, value)| Some(format!("&{name}={}", escaped(&value?))))
        .collect()
}

fn table(rows: &[AuditView], width: Option<usize>) -> String {
    let columns = [
        left("WHEN"),
        left("ANSWER"),
        left("ACTION"),
        left("TENANT"),
        left("TARGET"),
        wide("WHO"),
    ];
    let mut table = Table::new(&columns).within(width);
    for row in rows {
        let answer = match (row.allowed, &row.reason) {
            (true, _) => "allowed".to_owned(),
            (false, None) => "refused".to_owned(),
            (false, Some(why)) => format!("refused: {why}"),
        };
        table.row([
            when::stamp(row.at_unix_ms),
            answer,
            row.action.clone(),
            row.tenant.clone().unwrap_or_default(),
            row.target.clone(),
            row.actor.clone(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_is_what_was_named() {
        let args = AuditArgs {
            tenant: Some("acme".to_owned()),
            actor: Some("a b".to_owned()),
            action: None,
            verdict: Some("refused".to_owned()),
            since: Some(Moment::Ago(std::time::Duration::from_secs(2))),
            until: Some(Moment::At(9000)),
            limit: 50,
            all: false,
            oldest: false,
        };
        assert_eq!(
            query(&args, 5000),
            "&tenant=acme&actor=a%20b&verdict=refused&from_unix_ms=3000&until_unix_ms=9000"
        );
    }
}
