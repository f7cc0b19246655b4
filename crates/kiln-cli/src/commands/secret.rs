//! `kiln secret`: what a tenant keeps for its jobs. A value comes from standard input or a prompt, and never comes back.

use std::io::{self, IsTerminal as _, Read as _};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_controller::api::{List, ScopeView, SecretView};
use kiln_core::secret::SECRET_VALUE_MAX;
use kiln_worker::host::now_unix_ms;
use serde_json::{Value, json};

use super::table::{Table, left, wide};
use super::{home_queue, when};
use crate::args::{OwnerArgs, ScopeArgs, SecretCommand, ServerArgs, ValueArgs};
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::server::{Server, escaped};
use crate::show::Screen;
use crate::terminal;

/// Most pages of accesses that are shown.
const PAGES_MAX: usize = 50;

pub(super) async fn run(verb: SecretCommand, said: &ServerArgs, screen: Screen) -> Result<u8> {
    // Read before anything is asked: a person types while nothing waits for them.
    let value = match &verb {
        SecretCommand::Set { from: Some(_), .. } => None,
        SecretCommand::Set { name, value, .. } | SecretCommand::Rotate { name, value, .. } => {
            Some(read_value(name, value, screen).await?)
        }
        _ => None,
    };
    let asked = home_queue::ask(said).await?;
    let answered = answer(verb, value, &asked.server, screen).await;
    asked.done().await;
    answered.map(|()| 0)
}

async fn answer(
    verb: SecretCommand,
    value: Option<Vec<u8>>,
    server: &Server,
    screen: Screen,
) -> Result<()> {
    use SecretCommand as Verb;
    let encoded = value.map(|value| STANDARD.encode(value));
    match verb {
        Verb::Set {
            name,
            from,
            scope,
            owner,
            ..
        } => {
            let scope = scope_of(&scope);
            let asked = match &from {
                Some(source) => json!({ "source": source, "scope": scope }),
                None => json!({ "value_base64": encoded, "scope": scope }),
            };
            let kept: SecretView = server.put(&path(&name, "", &owner), &asked).await?;
            let what = match &from {
                Some(source) => format!("comes from {source}"),
                None => "is kept".to_owned(),
            };
            said(&kept, &what, screen);
        }
        Verb::Rotate { name, owner, .. } => {
            let asked = json!({ "value_base64": encoded });
            let kept: SecretView = server.post(&path(&name, "/rotate", &owner), &asked).await?;
            said(&kept, "has a new value", screen);
        }
        Verb::Scope { name, scope, owner } => {
            let asked = scope_of(&scope).unwrap_or_default();
            let kept: SecretView = server.post(&path(&name, "/scope", &owner), &asked).await?;
            said(&kept, &format!("is for {}", words(&kept.scope)), screen);
        }
        Verb::Delete { name, owner } => {
            server.delete::<Value>(&path(&name, "", &owner)).await?;
            screen.data(&json!({ "event": "removed", "secret": name }), || {
                format!("secret {name} is gone")
            });
        }
        Verb::List { owner } => {
            let all: List<SecretView> = server.get(&path("", "", &owner)).await?;
            if all.items.is_empty() {
                screen.note("no secrets; `kiln secret set NAME` keeps one");
            } else if screen.json() {
                for secret in &all.items {
                    screen.data(secret, String::new);
                }
            } else {
                screen.text(&table(&all.items, now_unix_ms(), screen.width()));
            }
        }
        Verb::AccessLog { name, owner } => accesses(server, &name, &owner, screen).await?,
    }
    Ok(())
}

fn path(name: &str, verb: &str, owner: &OwnerArgs) -> String {
    let below = match name.is_empty() {
        true => String::new(),
        false => format!("/{}", escaped(name)),
    };
    let tenant = owner.tenant.as_ref();
    let query = tenant.map_or(String::new(), |name| format!("?tenant={}", escaped(name)));
    format!("/v1/secrets{below}{verb}{query}")
}

fn scope_of(said: &ScopeArgs) -> Option<ScopeView> {
    let scope = ScopeView {
        repositories: said.repositories.clone(),
        uses: said.uses.clone(),
    };
    (!scope.repositories.is_empty() || !scope.uses.is_empty()).then_some(scope)
}

fn said(kept: &SecretView, what: &str, screen: Screen) {
    screen.data(kept, || format!("secret {} {what}", kept.name));
}

/// Which jobs, in words.
fn words(scope: &ScopeView) -> String {
    let uses = match scope.uses.as_slice() {
        [] => "trusted jobs".to_owned(),
        uses => format!("trusted {} jobs", uses.join(" and ")),
    };
    match scope.repositories.as_slice() {
        [] => uses,
        from => format!("{uses} of {}", from.join(", ")),
    }
}

/// Reads a value from standard input, or asks for it.
///
/// # Errors
/// When there is none, or it is too long.
async fn read_value(name: &str, said: &ValueArgs, screen: Screen) -> Result<Vec<u8>> {
    let asks = io::stdin().is_terminal();
    if asks {
        if screen.json() {
            return Err(CliError::usage("there is no value on standard input")
                .hint("write for example `kiln secret set NAME < FILE`"));
        }
        screen.note(&format!("Value of {name} (it is not shown):"));
    }
    let read = tokio::task::spawn_blocking(move || {
        if asks {
            return terminal::hidden_line(SECRET_VALUE_MAX + 2);
        }
        let mut bytes = Vec::new();
        let most = SECRET_VALUE_MAX as u64 + 3;
        io::stdin().lock().take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    let bytes = read.await.or_infrastructure()?.or_infrastructure()?;
    let (value, cut) = match said.raw && !asks {
        true => (bytes, false),
        false => without_newline(bytes),
    };
    if cut && !asks {
        screen.note("the newline at the end is not a part of the value (--raw keeps it)");
    }
    if value.is_empty() {
        return Err(CliError::usage("the value is empty: nothing was changed"));
    }
    if value.len() > SECRET_VALUE_MAX {
        return Err(CliError::usage(format!(
            "a value has at most {SECRET_VALUE_MAX} bytes"
        )));
    }
    Ok(value)
}

/// What `echo` and editors end a line with is no part of a password; a key of several lines is not usable without it.
fn without_newline(mut bytes: Vec<u8>) -> (Vec<u8>, bool) {
    let before = bytes.len();
    if bytes.iter().filter(|b| **b == b'\n').count() == 1 && bytes.ends_with(b"\n") {
        bytes.pop();
        if bytes.ends_with(b"\r") {
            bytes.pop();
        }
    }
    let cut = bytes.len() != before;
    (bytes, cut)
}

async fn accesses(server: &Server, name: &str, owner: &OwnerArgs, screen: Screen) -> Result<()> {
    let (mut all, mut after): (Vec<Value>, Option<String>) = (Vec::new(), None);
    for _ in 0..PAGES_MAX {
        let mut asked = path(name, "/accesses", owner);
        if let Some(after) = &after {
            let mark = if asked.contains('?') { '&' } else { '?' };
            asked.push_str(&format!("{mark}after={}", escaped(after)));
        }
        let page: List<Value> = server.get(&asked).await?;
        all.extend(page.items);
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    if all.is_empty() {
        screen.note("nobody asked for it");
    } else if screen.json() {
        for one in &all {
            screen.data(one, String::new);
        }
    } else {
        screen.text(&log(&all, screen.width()));
    }
    Ok(())
}

fn table(secrets: &[SecretView], now_unix_ms: u64, width: Option<usize>) -> String {
    let mut table = Table::new(&[
        left("NAME"),
        left("VERSION"),
        left("SET"),
        left("BY"),
        wide("FOR"),
    ])
    .within(width);
    for secret in secrets {
        let set = secret.rotated_unix_ms.unwrap_or(secret.created_unix_ms);
        let by = secret.rotated_by.as_ref().unwrap_or(&secret.created_by);
        table.row([
            secret.name.clone(),
            secret.version.to_string(),
            when::ago(set, now_unix_ms),
            by.clone(),
            words(&secret.scope),
        ]);
    }
    table.render()
}

fn log(rows: &[Value], width: Option<usize>) -> String {
    let mut table = Table::new(&[
        left("WHEN"),
        left("WHAT"),
        left("ANSWER"),
        left("JOB"),
        wide("WHO"),
    ])
    .within(width);
    for row in rows {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let answer = match row["allowed"].as_bool() {
            Some(true) => "allowed".to_owned(),
            _ => format!("refused: {}", text(&row["reason"])),
        };
        let action = text(&row["action"]);
        let what = action
            .trim_start_matches("secret")
            .trim_start_matches([':', '.']);
        table.row([
            when::stamp(row["at_unix_ms"].as_u64().unwrap_or_default()),
            match action.as_str() {
                "secret.read" => "given".to_owned(),
                _ => what.to_owned(),
            },
            answer,
            text(&row["detail"]["job"]),
            text(&row["actor"]),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_newline_of_one_line_is_no_part_of_a_value() {
        for (given, kept) in [
            (&b"hunter2\n"[..], &b"hunter2"[..]),
            (b"hunter2\r\n", b"hunter2"),
            (b"hunter2", b"hunter2"),
            (b"\n", b""),
            (b"a\nb\n", b"a\nb\n"),
            (b"a\n\n", b"a\n\n"),
            (b"\na", b"\na"),
            (b"a\r", b"a\r"),
        ] {
            assert_eq!(without_newline(given.to_vec()).0, kept, "{given:?}");
        }
    }

    #[test]
    fn paths_and_scopes() {
        let owner = OwnerArgs {
            tenant: Some("a b".to_owned()),
        };
        assert_eq!(path("", "", &OwnerArgs::default()), "/v1/secrets");
        assert_eq!(
            path("x/y", "/scope", &owner),
            "/v1/secrets/x%2Fy/scope?tenant=a%20b"
        );
        assert!(scope_of(&ScopeArgs::default()).is_none());
        let scope = ScopeView {
            repositories: vec!["h.example/**".to_owned()],
            uses: vec!["build".to_owned()],
        };
        assert_eq!(words(&scope), "trusted build jobs of h.example/**");
        assert_eq!(words(&ScopeView::default()), "trusted jobs");
    }

    #[test]
    fn lists() {
        let secret = SecretView {
            tenant: "local".to_owned(),
            name: "NPM_TOKEN".to_owned(),
            version: 2,
            source: None,
            scope: ScopeView::default(),
            created_unix_ms: 0,
            created_by: "owner".to_owned(),
            rotated_unix_ms: Some(3_600_000),
            rotated_by: Some("ann".to_owned()),
        };
        let want = "\
NAME       VERSION  SET      BY   FOR
NPM_TOKEN  2        1 h ago  ann  trusted jobs
";
        let width = Some(super::super::table::WIDTH);
        assert_eq!(table(&[secret], 7_200_000, width), want);
        let row = json!({
            "at_unix_ms": 0, "actor": "worker:w1", "action": "secret.read", "allowed": false, "reason": "untrusted",
            "detail": { "job": "r1" },
        });
        let shown = log(&[row], width);
        for word in ["given", "refused: untrusted", "r1", "worker:w1"] {
            assert!(shown.contains(word), "{word} is not in {shown}");
        }
    }
}
