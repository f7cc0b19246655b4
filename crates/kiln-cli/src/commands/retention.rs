//! `kiln tenant retention`: how long a tenant's finished jobs are kept, and what would go.

use std::time::Duration;

use kiln_controller::api::{List, RetentionPlanView, RetentionView, TenantView};
use serde_json::{Map, Value};

use super::table::{Facts, Table, counted, left, wide};
use super::when;
use crate::args::{RetentionArgs, RetentionCommand};
use crate::error::Result;
use crate::server::{Server, escaped};
use crate::show::Screen;

/// Milliseconds of a day.
const DAY_MS: u64 = 86_400_000;

pub(super) async fn answer(verb: RetentionCommand, server: &Server, screen: Screen) -> Result<()> {
    match verb {
        RetentionCommand::Show { name } => {
            let rule: RetentionView = server.get(&at(&name)).await?;
            screen.data(&rule, || show(&rule));
        }
        RetentionCommand::Set {
            name,
            rule,
            dry_run,
        } => change(server, &name, asked(&rule), dry_run, screen).await?,
        RetentionCommand::Reset { name, dry_run } => {
            let asked = Map::from_iter([("usual".to_owned(), Value::Bool(true))]);
            change(server, &name, asked, dry_run, screen).await?;
        }
        RetentionCommand::Plan { name: Some(name) } => {
            plan(server, &name, &Map::new(), screen).await?;
        }
        RetentionCommand::Plan { name: None } => {
            let tenants: List<TenantView> = server.get("/v1/tenants").await?;
            for tenant in &tenants.items {
                plan(server, &tenant.name, &Map::new(), screen).await?;
            }
        }
    }
    Ok(())
}

fn at(name: &str) -> String {
    format!("/v1/tenants/{}/retention", escaped(name))
}

fn asked(rule: &RetentionArgs) -> Map<String, Value> {
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let times = [
        ("hot_ms", rule.hot),
        ("warm_ms", rule.warm),
        ("cold_ms", rule.cold),
    ];
    let named = times.into_iter();
    named
        .filter_map(|(name, time)| Some((name.to_owned(), ms(time?).into())))
        .collect()
}

async fn change(
    server: &Server,
    name: &str,
    asked: Map<String, Value>,
    dry_run: bool,
    screen: Screen,
) -> Result<()> {
    if dry_run {
        return plan(server, name, &asked, screen).await;
    }
    let rule: RetentionView = server.post(&at(name), &asked).await?;
    screen.data(&rule, || show(&rule));
    Ok(())
}

async fn plan(
    server: &Server,
    name: &str,
    asked: &Map<String, Value>,
    screen: Screen,
) -> Result<()> {
    let words: Vec<String> = asked
        .iter()
        .map(|(key, to)| format!("{key}={to}"))
        .collect();
    let plan: RetentionPlanView = server
        .get(&format!("{}/plan?{}", at(name), words.join("&")))
        .await?;
    screen.data(&plan, || told(&plan, screen.width()));
    Ok(())
}

/// `30 days`, or as precise as it is.
fn kept(ms: u64) -> String {
    match ms % DAY_MS {
        0 => counted(ms / DAY_MS, "day"),
        _ => when::span(ms),
    }
}

fn show(rule: &RetentionView) -> String {
    let mut facts = Facts::default();
    facts.add("tenant", &rule.tenant);
    let whose = if rule.own { "its own" } else { "everybody's" };
    facts.add("rule", whose);
    facts.add("hot", format!("{} at hand", kept(rule.hot_ms)));
    facts.add(
        "warm",
        format!("{} with log, artifacts and events", kept(rule.warm_ms)),
    );
    facts.add("cold", format!("{} as a record", kept(rule.cold_ms)));
    if rule.hold {
        facts.add("on hold", "nothing goes");
    }
    facts.render()
}

/// What would go, in words.
fn told(plan: &RetentionPlanView, width: Option<usize>) -> String {
    let mut text = format!(
        "tenant {}: {} would become warm, {} cold, {} go altogether; {} on hold\n",
        plan.rule.tenant, plan.to_warm, plan.to_cold, plan.gone, plan.held
    );
    if plan.jobs.is_empty() {
        return text;
    }
    let columns = [
        left("JOB"),
        left("FROM"),
        left("TO"),
        left("ENDED"),
        wide("NAME"),
    ];
    let mut table = Table::new(&columns).within(width);
    for job in &plan.jobs {
        let to = if job.held { "on hold" } else { &job.to };
        table.row([
            job.job.clone(),
            job.from.clone(),
            to.to_owned(),
            when::stamp(job.finished_unix_ms),
            job.name.clone(),
        ]);
    }
    text.push_str(&table.render());
    let all = plan.to_warm + plan.to_cold + plan.gone + plan.held;
    let more = all.saturating_sub(plan.jobs.len() as u64);
    if more > 0 {
        text.push_str(&format!("and {}\n", counted(more, "more job")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_plan_in_words() {
        let plan: RetentionPlanView = serde_json::from_value(json!({
            "rule": {"tenant": "acme", "own": true, "hot_ms": 0, "warm_ms": DAY_MS, "cold_ms": 2 * DAY_MS, "hold": false},
            "to_warm": 1, "to_cold": 0, "gone": 0, "held": 1, "jobs": [
                {"job": "b1", "name": "app", "from": "hot", "to": "warm", "finished_unix_ms": 0, "held": false},
                {"job": "b2", "name": "app", "from": "hot", "to": "warm", "finished_unix_ms": 0, "held": true},
            ],
        }))
        .expect("a plan");
        let text = told(&plan, None);
        for line in [
            "tenant acme: 1 would become warm, 0 cold, 0 go altogether; 1 on hold",
            "b2   hot   on hold  1970-01-01 00:00:00 UTC  app",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        let rule = show(&plan.rule);
        assert!(rule.contains("warm    1 day with log"), "{rule}");
    }

    #[test]
    fn only_named_times_change() {
        let rule = RetentionArgs {
            hot: Some(Duration::from_secs(86_400)),
            warm: None,
            cold: None,
        };
        assert_eq!(Value::Object(asked(&rule)), json!({ "hot_ms": DAY_MS }));
    }
}
