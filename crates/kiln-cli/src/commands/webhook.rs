//! `kiln webhook`: who is told of changes, what waits to be told, what was given up.

use kiln_controller::api::{DeliveryView, List, WebhookView};
use kiln_worker::host::now_unix_ms;
use serde_json::{Value, json};

use super::table::{Table, left, wide};
use super::{home_queue, when};
use crate::args::{ServerArgs, WebhookCommand};
use crate::error::Result;
use crate::server::{Server, escaped};
use crate::show::Screen;

/// Most pages of deliveries that are shown.
const PAGES_MAX: usize = 50;

pub(super) async fn run(verb: WebhookCommand, said: &ServerArgs, screen: Screen) -> Result<u8> {
    let asked = home_queue::ask(said).await?;
    let answered = answer(verb, &asked.server, screen).await;
    asked.done().await;
    answered.map(|()| 0)
}

async fn answer(verb: WebhookCommand, server: &Server, screen: Screen) -> Result<()> {
    use WebhookCommand as Verb;
    match verb {
        Verb::Create {
            url,
            kinds,
            tenant,
            all_tenants,
        } => {
            let asked =
                json!({ "url": url, "kinds": kinds, "tenant": tenant, "all_tenants": all_tenants });
            let made: Value = server.post("/v1/webhooks", &asked).await?;
            show_secret(&made, screen);
        }
        Verb::Rotate {
            id,
            overlap,
            end_overlap,
        } => {
            let path = format!("/v1/webhooks/{}/rotate", escaped(&id));
            let asked = json!({ "overlap_s": overlap.as_secs(), "end_overlap": end_overlap });
            let made: Value = server.post(&path, &asked).await?;
            show_secret(&made, screen);
        }
        Verb::List => {
            let webhooks: List<WebhookView> = server.get("/v1/webhooks").await?;
            if webhooks.items.is_empty() {
                screen.note("no webhooks; `kiln webhook create URL` makes one");
            } else if screen.json() {
                for webhook in &webhooks.items {
                    screen.data(webhook, String::new);
                }
            } else {
                screen.text(&table(&webhooks.items, now_unix_ms(), screen.width()));
            }
        }
        Verb::Enable { id } => enable(server, &id, true, screen).await?,
        Verb::Disable { id } => enable(server, &id, false, screen).await?,
        Verb::Remove { id } => {
            let path = format!("/v1/webhooks/{}", escaped(&id));
            server.delete::<Value>(&path).await?;
            screen.data(&json!({ "event": "removed", "webhook": id }), || {
                format!("webhook {id} is removed")
            });
        }
        Verb::Deliveries { dead, webhook } => deliveries(server, dead, webhook, screen).await?,
        Verb::Replay { names } => {
            for name in names {
                let path = format!("/v1/deliveries/{}/replay", escaped(&name));
                server.post::<Value>(&path, &json!({})).await?;
                screen.data(&json!({ "event": "replayed", "delivery": name }), || {
                    format!("{name} is sent again")
                });
            }
        }
        Verb::NotifySecret => {
            let shown: Value = server.get("/v1/notify-secret").await?;
            screen.data(&shown, || text(&shown["secret"]));
        }
    }
    Ok(())
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn show_secret(made: &Value, screen: Screen) {
    screen.data(made, || text(&made["secret"]));
    let (id, url) = (text(&made["webhook"]["id"]), text(&made["webhook"]["url"]));
    screen.note(&format!(
        "webhook {id} to {url}: its messages are signed with this secret, shown this once"
    ));
}

async fn enable(server: &Server, id: &str, on: bool, screen: Screen) -> Result<()> {
    let path = format!("/v1/webhooks/{}", escaped(id));
    let webhook: WebhookView = server.post(&path, &json!({ "enabled": on })).await?;
    screen.data(&webhook, || match on {
        true => format!("webhook {id} is told again"),
        false => format!("webhook {id} is told nothing more"),
    });
    Ok(())
}

async fn deliveries(
    server: &Server,
    dead: bool,
    webhook: Option<String>,
    screen: Screen,
) -> Result<()> {
    let mut query = String::from("?");
    if dead {
        query.push_str("state=dead&");
    }
    if let Some(webhook) = webhook {
        query.push_str(&format!("webhook={}&", escaped(&webhook)));
    }
    let (mut all, mut after): (Vec<DeliveryView>, Option<String>) = (Vec::new(), None);
    for _ in 0..PAGES_MAX {
        let from = after.map_or(String::new(), |after| format!("after={}", escaped(&after)));
        let page: List<DeliveryView> = server.get(&format!("/v1/deliveries{query}{from}")).await?;
        all.extend(page.items);
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    if all.is_empty() {
        screen.note("nothing waits and nothing was given up");
    } else if screen.json() {
        for one in &all {
            screen.data(one, String::new);
        }
    } else {
        screen.text(&letters(&all, now_unix_ms(), screen.width()));
    }
    Ok(())
}

fn table(webhooks: &[WebhookView], now_unix_ms: u64, width: Option<usize>) -> String {
    let mut table = Table::new(&[
        left("ID"),
        left("FOR"),
        left("OF"),
        left("STATE"),
        wide("TO"),
    ])
    .within(width);
    for webhook in webhooks {
        let state = if webhook.enabled { "told" } else { "disabled" };
        let old = webhook.overlap_until_unix_ms;
        let state = match old.map(|until| until.saturating_sub(now_unix_ms)) {
            Some(left) => format!("{state}, old secret {} more", when::span(left)),
            None => state.to_owned(),
        };
        table.row([
            webhook.id.clone(),
            webhook
                .tenant
                .clone()
                .unwrap_or_else(|| "everybody".to_owned()),
            match webhook.kinds.is_empty() {
                true => "all".to_owned(),
                false => webhook.kinds.join(","),
            },
            state,
            webhook.url.clone(),
        ]);
    }
    table.render()
}

fn letters(all: &[DeliveryView], now_unix_ms: u64, width: Option<usize>) -> String {
    let mut table = Table::new(&[
        left("NAME"),
        left("STATE"),
        left("TRIES"),
        left("AGE"),
        wide("LAST FAILURE"),
    ])
    .within(width);
    for one in all {
        table.row([
            one.id.clone(),
            one.state.clone(),
            one.tries.to_string(),
            when::span(now_unix_ms.saturating_sub(one.created_unix_ms)),
            one.last_error.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        let webhook = json!({
            "id": "kwh-2f", "tenant": null, "url": "https://hooks.example.org/x", "kinds": ["finished"],
            "enabled": true, "created_by": "owner"
        });
        let mut webhook: WebhookView = serde_json::from_value(webhook).expect("a webhook");
        let want = "\
ID      FOR        OF        STATE  TO
kwh-2f  everybody  finished  told   https://hooks.example.org/x
";
        let width = Some(super::super::table::WIDTH);
        assert_eq!(table(&[webhook.clone()], 0, width), want);
        webhook.overlap_until_unix_ms = Some(7_200_000);
        let shown = table(&[webhook], 0, None);
        assert!(
            shown.contains("told, old secret 2 h 00 min more"),
            "{shown}"
        );
        let letter = json!({
            "id": "b1.4.kwh-2f", "job": "b1", "tenant": "acme", "webhook": "kwh-2f", "kind": "finished", "state": "dead",
            "created_unix_ms": 0, "tries": 13, "dead_unix_ms": 1, "last_error": "the receiver said 500"
        });
        let letter = serde_json::from_value(letter).expect("a delivery");
        let want = "\
NAME         STATE  TRIES  AGE           LAST FAILURE
b1.4.kwh-2f  dead   13     2 h 00 min    the receiver said 500
";
        let shown = letters(&[letter], 7_200_000, Some(super::super::table::WIDTH));
        assert_eq!(
            shown.split_whitespace().collect::<Vec<_>>(),
            want.split_whitespace().collect::<Vec<_>>()
        );
    }
}
