//! What the host recorded of a job that is over: what it reached and was refused, how long each part took, how much memory it came to.

use kiln_controller::api::JobView;
use kiln_core::job::AppliedPolicy;
use kiln_core::{ByteSize, Digest};
use kiln_network::Flow;
use kiln_network::record::{EgressSummary, EgressTotals};
use kiln_worker::measured::Measured;
use serde_json::{Value, json};

use super::job::events;
use super::table::{Facts, Table, counted, left, right, wide};
use super::when;
use crate::error::Result;
use crate::server::Server;
use crate::show::Screen;

/// Events at a job's end among which its report is.
const LAST_EVENTS: u64 = 8;

/// What a job's last worker told at its end.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// What the host measured, when it told.
    pub(super) measured: Option<Measured>,
    /// Hosts reached and refused, the first of them.
    pub(super) egress: EgressSummary,
    /// Digest of the files that its command was given.
    pub(super) source: Option<Digest>,
    /// The policy in its commit that it was held to.
    pub(super) policy: Option<AppliedPolicy>,
}

impl Record {
    /// Asks for it.
    ///
    /// # Errors
    /// When the server does not answer.
    pub(super) async fn of(server: &Server, job: &JobView) -> Result<Self> {
        if job.line.state != "finished" {
            return Ok(Self::default());
        }
        let after = job.last_event.saturating_sub(LAST_EVENTS);
        let events = events(server, job, after).await?;
        let report = events.iter().rev().find(|event| event["kind"] == "report");
        Ok(report
            .map(|event| Self::read(&event["data"]))
            .unwrap_or_default())
    }

    fn read(report: &Value) -> Self {
        // What an older worker told has less.
        Self {
            measured: serde_json::from_value(report["measured"].clone()).ok(),
            egress: serde_json::from_value(report["egress"].clone()).unwrap_or_default(),
            source: serde_json::from_value(report["source"].clone()).unwrap_or_default(),
            policy: serde_json::from_value(report["policy"].clone()).unwrap_or_default(),
        }
    }

    /// As facts of a job.
    pub(super) fn add_to(&self, facts: &mut Facts) {
        let Some(measured) = &self.measured else {
            return;
        };
        let parts = [
            ("policy", measured.policy_ms),
            ("clone", measured.clone_ms),
            ("ready", measured.ready_ms),
            ("disk", measured.disk_ms),
            ("source", measured.source_ms),
            ("command", measured.command_ms),
            ("artifacts", measured.artifacts_ms),
            ("teardown", measured.teardown_ms),
        ];
        let parts = parts.iter().filter_map(|(name, ms)| {
            let ms = (*ms)?;
            Some(format!("{name:<9} {}", when::span(ms)))
        });
        facts.add("times", parts.collect::<Vec<_>>().join("\n"));
        let memory = [
            (measured.memory_peak, "of the machine"),
            (
                measured.command_memory_peak,
                "of the command, as the guest says",
            ),
        ];
        let memory = memory.iter().filter_map(|(peak, whose)| {
            let peak = ByteSize((*peak)?);
            Some(format!("at most {peak} {whose}"))
        });
        facts.add("memory", memory.collect::<Vec<_>>().join("\n"));
        facts.add("network", totals(&measured.egress));
    }

    /// As a field of a job in JSON.
    pub(super) fn value(&self) -> Value {
        json!(self.measured)
    }
}

fn totals(egress: &EgressTotals) -> String {
    format!(
        "{} reached, {} refused; {} out, {} in",
        counted(egress.reached, "host"),
        egress.refused,
        ByteSize(egress.bytes_out),
        ByteSize(egress.bytes_in)
    )
}

/// `kiln job egress ID`
pub(super) async fn egress(server: &Server, job: &JobView, screen: Screen) -> Result<()> {
    let record = Record::of(server, job).await?;
    let summary = &record.egress;
    if screen.json() {
        for host in &summary.reached {
            screen.data(&json!({"event": "reached", "job": job.line.id, "host": host.host, "ports": host.ports, "more_ports": host.more_ports, "rules": host.rules, "more_rules": host.more_rules, "connections": host.connections, "bytes_out": host.bytes_out, "bytes_in": host.bytes_in}), String::new);
        }
        for host in &summary.refused {
            screen.data(&json!({"event": "refused", "job": job.line.id, "host": host.host, "port": host.port, "addresses": host.addresses, "reason": host.reason, "code": host.code, "allow": host.allow}), String::new);
        }
        for flow in &summary.flows {
            screen.data(
                &json!({"event": "decision", "job": job.line.id, "decision": flow}),
                String::new,
            );
        }
        let totals = record.measured.map(|measured| measured.egress);
        screen.data(
            &json!({"event": "egress", "job": job.line.id, "totals": totals, "left_out": summary.left_out}),
            String::new,
        );
        return Ok(());
    }
    if job.line.state != "finished" {
        screen.note("the job is not over: what it reached is told at its end");
        return Ok(());
    }
    let Some(measured) = &record.measured else {
        screen.note("nothing is recorded of its network");
        return Ok(());
    };
    screen.text(&text(summary, &measured.egress, screen.width()));
    Ok(())
}

fn text(summary: &EgressSummary, all: &EgressTotals, width: Option<usize>) -> String {
    let mut text = String::new();
    if !summary.reached.is_empty() {
        let columns = [
            left("REACHED"),
            left("PORTS"),
            right("TIMES"),
            right("OUT"),
            right("IN"),
            wide("RULE"),
        ];
        let mut table = Table::new(&columns).within(width);
        for host in &summary.reached {
            let mut ports: Vec<String> = host.ports.iter().map(ToString::to_string).collect();
            if host.more_ports > 0 {
                ports.push(format!("and {} more", host.more_ports));
            }
            table.row([
                host.host.clone(),
                ports.join(","),
                host.connections.to_string(),
                ByteSize(host.bytes_out).to_string(),
                ByteSize(host.bytes_in).to_string(),
                host.rules.join(" "),
            ]);
        }
        text.push_str(&table.render());
    }
    text.push_str(&decisions(&summary.flows, width));
    if !summary.refused.is_empty() {
        let mut table = Table::new(&[left("REFUSED"), left("PORT"), wide("WHY")]).within(width);
        for host in &summary.refused {
            let port = match host.port {
                0 => "-".to_owned(),
                port => port.to_string(),
            };
            let mut why = match &host.allow {
                Some(flag) => format!("{}; {flag} admits it", host.reason),
                None => host.reason.clone(),
            };
            if !host.addresses.is_empty() {
                let addresses: Vec<String> =
                    host.addresses.iter().map(ToString::to_string).collect();
                why.push_str(&format!(" ({})", addresses.join(", ")));
            }
            table.row([host.host.clone(), port, why]);
        }
        text.push_str(&table.render());
    }
    let shown = (summary.reached.len() + summary.refused.len()) as u64;
    let more = (all.reached + all.refused).saturating_sub(shown);
    if more > 0 {
        text.push_str(&format!("and {more} more that are not named\n"));
    }
    if summary.left_out.flows > 0 {
        let more = summary.left_out.flows;
        text.push_str(&format!("and {more} more decisions that have no line\n"));
    }
    text.push_str(&format!("{}\n", totals(all)));
    text
}

/// Where each connection went: rule, port and addresses, in which phase.
fn decisions(flows: &[Flow], width: Option<usize>) -> String {
    let mut table = Table::new(&[
        left("DECISION"),
        left("PHASE"),
        left("HOST"),
        right("PORT"),
        right("OUT"),
        right("IN"),
        wide("ADDRESS"),
    ])
    .within(width);
    let told = flows
        .iter()
        .filter(|flow| !flow.addresses.is_empty() || flow.narrowed > 0);
    let mut any = false;
    for flow in told {
        any = true;
        let addresses: Vec<String> = flow.addresses.iter().map(ToString::to_string).collect();
        let verdict = match flow.narrowed {
            0 => flow.verdict.clone(),
            cut => format!("{} ({cut} cut)", flow.verdict),
        };
        table.row([
            verdict,
            flow.phase.clone().unwrap_or_else(|| "-".to_owned()),
            flow.host.clone(),
            flow.port.to_string(),
            ByteSize(flow.bytes_out).to_string(),
            ByteSize(flow.bytes_in).to_string(),
            addresses.join(" "),
        ]);
    }
    match any {
        true => table.render(),
        false => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_reached_and_refused_is_told_by_rule() {
        let report = json!({
            "egress": {
                "reached": [{"host": "a.example.org", "ports": [443], "connections": 2, "bytes_out": 2048, "bytes_in": 1_048_576, "rules": ["*.example.org"]}],
                "refused": [{"host": "b.example.org", "port": 0, "reason": "no rule names it", "allow": "--allow b.example.org"}],
                "flows": [{"phase": "run", "verdict": "allowed", "host": "a.example.org", "port": 443, "rule": "*.example.org", "addresses": ["192.0.2.7"], "connections": 2, "narrowed": 1, "bytes_out": 2048, "bytes_in": 1_048_576}],
            },
            "measured": {"clone_ms": 30, "memory_peak": 104_857_600, "egress": {"reached": 1, "refused": 4, "connections": 2, "bytes_out": 2048, "bytes_in": 1_048_576}},
        });
        let record = Record::read(&report);
        let measured = record.measured.expect("told");
        let want = "\
REACHED        PORTS  TIMES      OUT       IN  RULE
a.example.org  443        2  2.0 KiB  1.0 MiB  *.example.org
DECISION         PHASE  HOST           PORT      OUT       IN  ADDRESS
allowed (1 cut)  run    a.example.org   443  2.0 KiB  1.0 MiB  192.0.2.7
REFUSED        PORT  WHY
b.example.org  -     no rule names it; --allow b.example.org admits it
and 3 more that are not named
1 host reached, 4 refused; 2.0 KiB out, 1.0 MiB in
";
        assert_eq!(text(&record.egress, &measured.egress, Some(80)), want);
        let mut facts = Facts::default();
        record.add_to(&mut facts);
        let shown = facts.render();
        for line in [
            "clone     30 ms",
            "at most 100.0 MiB of the machine",
            "1 host reached, 4 refused",
        ] {
            assert!(shown.contains(line), "{line}\n{shown}");
        }
        assert!(Record::read(&json!({})).measured.is_none());
    }
}
