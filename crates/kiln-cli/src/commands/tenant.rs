//! `kiln tenant`: quotas, weights and usage on a server.

use kiln_controller::api::{List, TenantView, UsageView};
use kiln_core::ByteSize;
use kiln_worker::host::now_unix_ms;
use serde_json::{Map, Value, json};

use super::table::{Facts, Table, counted, left, right, wide};
use super::when;
use super::{home_queue, retention};
use crate::args::{QuotaArgs, ServerArgs, TenantCommand};
use crate::error::{CliError, Result};
use crate::server::{Server, escaped};
use crate::show::Screen;

/// Milliseconds of a day.
const DAY_MS: u64 = 86_400_000;

pub(super) async fn run(verb: TenantCommand, said: &ServerArgs, screen: Screen) -> Result<u8> {
    let asked = home_queue::ask(said).await?;
    let answered = answer(verb, &asked.server, screen).await;
    asked.done().await;
    answered.map(|()| 0)
}

async fn answer(verb: TenantCommand, server: &Server, screen: Screen) -> Result<()> {
    let tell = |tenant: &TenantView| screen.data(tenant, || show(tenant));
    let at = |name: &str| format!("/v1/tenants/{}", escaped(name));
    match verb {
        TenantCommand::Create { name, quota } => {
            let mut asked = bounds(&quota);
            asked.insert("name".to_owned(), name.into());
            tell(&server.post("/v1/tenants", &asked).await?);
        }
        TenantCommand::List => {
            let tenants: List<TenantView> = server.get("/v1/tenants").await?;
            if screen.json() {
                for tenant in &tenants.items {
                    screen.data(tenant, String::new);
                }
            } else {
                screen.text(&table(&tenants.items, now_unix_ms(), screen.width()));
            }
        }
        TenantCommand::Quota { name, quota } => {
            let asked = bounds(&quota);
            if asked.is_empty() {
                return Err(CliError::usage("no bound is named").hint(
                    "give --running N, --pending N, --stored SIZE, or none to take one away",
                ));
            }
            tell(&server.post(&at(&name), &asked).await?);
        }
        TenantCommand::Weight { name, weight } => {
            tell(
                &server
                    .post(&at(&name), &json!({ "weight": weight }))
                    .await?,
            );
        }
        TenantCommand::Usage { name, days } => {
            let from = now_unix_ms().saturating_sub(days * DAY_MS);
            let usage: UsageView = server
                .get(&format!("{}/usage?from_unix_ms={from}", at(&name)))
                .await?;
            screen.data(&usage, || used(&name, days, &usage));
        }
        TenantCommand::Retention(verb) => retention::answer(verb, server, screen).await?,
    }
    Ok(())
}

fn bounds(quota: &QuotaArgs) -> Map<String, Value> {
    let running = quota.running.map(|bound| json!(bound.0));
    let pending = quota.pending.map(|bound| json!(bound.0));
    let stored = quota.stored.map(|bound| json!(bound.0));
    let fields = [
        ("running_max", running),
        ("burst", quota.burst.map(Value::from)),
        ("reserved", quota.reserved.map(Value::from)),
        ("pending_max", pending),
        ("stored_max", stored),
    ];
    let given = fields
        .into_iter()
        .filter_map(|(name, bound)| Some((name.to_owned(), bound?)));
    given.collect()
}

fn bound(most: Option<u32>) -> String {
    most.map_or_else(|| "any".to_owned(), |most| most.to_string())
}

fn table(tenants: &[TenantView], now_unix_ms: u64, width: Option<usize>) -> String {
    let columns = [
        wide("TENANT"),
        right("WEIGHT"),
        right("RUN AT MOST"),
        right("WAIT AT MOST"),
        left("MADE"),
    ];
    let mut table = Table::new(&columns).within(width);
    for tenant in tenants {
        table.row([
            tenant.name.clone(),
            tenant.weight.to_string(),
            bound(tenant.running_max),
            bound(tenant.pending_max),
            when::ago(tenant.created_unix_ms, now_unix_ms),
        ]);
    }
    table.render()
}

fn show(tenant: &TenantView) -> String {
    let mut facts = Facts::default();
    facts.add("tenant", &tenant.name);
    facts.add("weight", tenant.weight.to_string());
    let more = match tenant.burst {
        0 => String::new(),
        more => format!(", {more} more while there is idle room"),
    };
    facts.add(
        "run at most",
        format!("{}{more}", bound(tenant.running_max)),
    );
    facts.add("sure of", counted(tenant.reserved.into(), "running job"));
    facts.add("wait at most", bound(tenant.pending_max));
    let most = tenant
        .stored_max
        .map(|most| format!(", with its uploads at most {}", ByteSize(most)));
    facts.add(
        "requests",
        format!("{}{}", ByteSize(tenant.requests), most.unwrap_or_default()),
    );
    if tenant.hold {
        facts.add("on hold", "nothing of it goes: `kiln hold list`");
    }
    facts.render()
}

fn used(name: &str, days: u64, usage: &UsageView) -> String {
    let mut facts = Facts::default();
    facts.add("tenant", name);
    facts.add("of the last", format!("{days} days"));
    facts.add(
        "jobs",
        format!("{}, {} of them passed", usage.jobs, usage.passed),
    );
    facts.add("CPU time", when::span(usage.cpu_ms));
    facts.add("memory", format!("{} MiB hours", usage.memory_mib_s / 3600));
    let each = usage.wait_ms.checked_div(usage.jobs).unwrap_or_default();
    facts.add(
        "waited",
        format!(
            "{} in all, {} a job",
            when::span(usage.wait_ms),
            when::span(each)
        ),
    );
    facts.add(
        "now",
        format!("{} waiting, {} running", usage.pending, usage.running),
    );
    facts.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Bound;

    #[test]
    fn none_takes_a_bound_away_and_silence_leaves_it() {
        let quota = QuotaArgs {
            running: Some(Bound(None)),
            burst: Some(0),
            reserved: None,
            pending: None,
            stored: None,
        };
        assert_eq!(
            Value::Object(bounds(&quota)),
            json!({ "running_max": null, "burst": 0 })
        );
    }

    #[test]
    fn usage_in_words() {
        let usage = UsageView {
            jobs: 4,
            passed: 3,
            cpu_ms: 120_000,
            memory_mib_s: 7200,
            wait_ms: 8000,
            pending: 1,
            running: 2,
        };
        let text = used("acme", 30, &usage);
        for line in [
            "jobs         4, 3 of them passed",
            "memory       2 MiB hours",
            "waited       8.0 s in all, 2.0 s a job",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
