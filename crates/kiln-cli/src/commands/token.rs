//! `kiln token`: tokens of a server, and those by which workers join it.

use kiln_controller::api::{List, TokenView};
use kiln_worker::host::now_unix_ms;
use serde_json::{Value, json};

use super::home_queue;
use super::table::{Table, left, wide};
use super::{queueing, when};
use crate::args::{ServerArgs, TokenArgs, TokenCommand};
use crate::error::Result;
use crate::server::{Server, escaped};
use crate::show::Screen;

pub(super) async fn run(verb: TokenCommand, said: &ServerArgs, screen: Screen) -> Result<u8> {
    let asked = home_queue::ask(said).await?;
    let answered = answer(verb, &asked.server, screen).await;
    asked.done().await;
    answered.map(|()| 0)
}

async fn answer(verb: TokenCommand, server: &Server, screen: Screen) -> Result<()> {
    match verb {
        TokenCommand::Create(args) => create(server, &args, screen).await?,
        TokenCommand::List => {
            let tokens: List<TokenView> = server.get("/v1/tokens").await?;
            if tokens.items.is_empty() {
                screen.note("no tokens; `kiln token create` makes one");
            } else if screen.json() {
                for token in &tokens.items {
                    screen.data(token, String::new);
                }
            } else {
                screen.text(&table(&tokens.items, now_unix_ms(), screen.width()));
            }
        }
        TokenCommand::Revoke { id } => {
            server
                .delete::<Value>(&format!("/v1/tokens/{}", escaped(&id)))
                .await?;
            screen.data(&json!({ "event": "revoked", "token": id }), || {
                format!("token {id} is revoked")
            });
        }
    }
    Ok(())
}

async fn create(server: &Server, args: &TokenArgs, screen: Screen) -> Result<()> {
    let expires_in = args.expires.map(|life| life.as_secs());
    let labels = queueing::labels(&args.labels, "--label")?;
    let tenants = (!args.tenants.is_empty()).then_some(&args.tenants);
    let made: Value = match args.join {
        true => {
            let asked = json!({ "pool": args.pool, "labels": labels, "tenants": tenants, "expires_in": expires_in });
            server.post("/v1/tokens/join", &asked).await?
        }
        false => {
            let asked = json!({
                "role": args.role, "tenant": args.tenant, "scopes": args.scopes, "operator": args.operator,
                "priority_max": args.priority_max, "trusted": args.trusted, "description": args.description,
                "expires_in": expires_in,
            });
            server.post("/v1/tokens", &asked).await?
        }
    };
    screen.data(&made, || {
        made["token"].as_str().unwrap_or_default().to_owned()
    });
    let until = made["expires_unix_ms"]
        .as_u64()
        .map(when::stamp)
        .unwrap_or_default();
    let id = made["id"].as_str().unwrap_or_default();
    screen.note(&match args.join {
        true => format!("token {id}, good for one worker until {until}, shown this once: kiln worker --controller https://HOST:PORT --join TOKEN"),
        false => format!("token {id}, good until {until}, shown this once: put it into KILN_TOKEN, or with mode 600 into ~/.config/kiln/token"),
    });
    Ok(())
}

fn table(tokens: &[TokenView], now_unix_ms: u64, width: Option<usize>) -> String {
    let columns = [
        left("ID"),
        left("FOR"),
        left("ROLE"),
        left("STATE"),
        wide("WHAT"),
    ];
    let mut table = Table::new(&columns).within(width);
    for token in tokens {
        let whom = token
            .tenant
            .clone()
            .unwrap_or_else(|| "a worker".to_owned());
        table.row([
            token.id.clone(),
            whom,
            token.role.clone().unwrap_or_else(|| token.kind.clone()),
            state(token, now_unix_ms),
            what(token),
        ]);
    }
    table.render()
}

fn what(token: &TokenView) -> String {
    match token.scopes.is_empty() {
        true => token.description.clone(),
        false => format!("{} ({})", token.description, token.scopes.join(" "))
            .trim_start()
            .to_owned(),
    }
}

fn state(token: &TokenView, now_unix_ms: u64) -> String {
    if token.revoked_unix_ms.is_some() {
        return "revoked".to_owned();
    }
    if let Some(worker) = &token.used_by {
        return format!("used by {worker}");
    }
    match token.expires_unix_ms {
        Some(until) if until <= now_unix_ms => "expired".to_owned(),
        Some(until) => format!("{} left", when::span(until - now_unix_ms)),
        None => "good".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(more: &Value) -> TokenView {
        let mut value = json!({
            "id": "kst-4f2a9c", "kind": "service", "tenant": "acme", "role": "developer", "scopes": [],
            "description": "the nightly build", "created_unix_ms": 0, "created_by": "owner", "expires_unix_ms": 7_200_000,
            "revoked_unix_ms": null, "last_used_unix_ms": null, "used_by": null
        });
        for (key, field) in more.as_object().expect("fields") {
            value[key] = field.clone();
        }
        serde_json::from_value(value).expect("a token")
    }

    #[test]
    fn tokens_say_whether_they_are_good() {
        assert_eq!(state(&token(&json!({})), 0), "2 h 00 min left");
        assert_eq!(state(&token(&json!({})), 7_200_000), "expired");
        assert_eq!(state(&token(&json!({"revoked_unix_ms": 1})), 0), "revoked");
        assert_eq!(
            state(&token(&json!({"used_by": "host-2"})), 0),
            "used by host-2"
        );
        let text = table(
            &[token(&json!({"scopes": ["job_read"]}))],
            0,
            Some(super::super::table::WIDTH),
        );
        let want = "\
ID          FOR   ROLE       STATE            WHAT
kst-4f2a9c  acme  developer  2 h 00 min left  the nightly build (job_read)
";
        assert_eq!(text, want);
    }
}
