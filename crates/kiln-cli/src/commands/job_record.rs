//! What the host recorded of a job that is over: what it reached and was refused, how long each part took, how much memory it came to.

use kiln_controller::api::JobView;
use kiln_core::job::AppliedPolicy;
use kiln_core::{ByteSize, Digest};
use kiln_network::record::parts::{EgressPart, joined};
use kiln_network::record::{EgressSummary, EgressTotals};
use kiln_network::{Flow, Learned};
use kiln_proto::fleet::EGRESS_PARTS_MAX;
use kiln_worker::measured::Measured;
use serde_json::{Value, json};

use super::job::events;
use super::table::{Facts, Table, counted, left, right, wide};
use super::when;
use crate::error::Result;
use crate::server::Server;
use crate::show::Screen;

/// Events at a job's end among which its report is: that with its parts, the record of a machine that stayed, and the end itself.
const LAST_EVENTS: u64 = 2 * (EGRESS_PARTS_MAX as u64 + 1) + 14;

/// What a job's last worker told at its end.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// What the host measured, when it told.
    pub(super) measured: Option<Measured>,
    /// Hosts reached and refused.
    pub(super) egress: EgressSummary,
    /// What an open machine reached.
    pub(super) learned: Vec<Learned>,
    /// Digest of the files that its command was given.
    pub(super) source: Option<Digest>,
    /// The policy in its commit that it was held to.
    pub(super) policy: Option<AppliedPolicy>,
    /// What of it the server had no room for, in words.
    pub(super) missing: Option<String>,
    /// The same of its machine, which stayed when the job was over.
    pub(super) machine: Option<Box<OfMachine>>,
}

/// What a machine reached that stayed.
#[derive(Debug)]
pub(super) struct OfMachine {
    egress: EgressSummary,
    totals: EgressTotals,
    /// Its keeper was killed: what came after its last note is not here.
    cut_off: bool,
    missing: Option<String>,
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
        Ok(Self::read(&events(server, job, after).await?))
    }

    /// Of a report and its parts.
    pub(super) fn told(report: Option<&Value>, parts: &[Value]) -> Self {
        let event = |kind: &str, data: &Value| json!({"kind": kind, "data": data});
        let mut events: Vec<Value> = parts.iter().map(|part| event("egress", part)).collect();
        events.extend(report.map(|report| event("report", report)));
        Self::read(&events)
    }

    /// The last report among these events, and its parts before it.
    fn read(events: &[Value]) -> Self {
        let machine = OfMachine::read(events).map(Box::new);
        let Some(at) = events.iter().rposition(|event| event["kind"] == "report") else {
            return Self {
                machine,
                ..Self::default()
            };
        };
        let report = &events[at]["data"];
        let (egress, learned, lost) = egress_of(report, &events[..at]);
        // What an older worker told has less.
        Self {
            measured: serde_json::from_value(report["measured"].clone()).ok(),
            egress,
            learned,
            source: serde_json::from_value(report["source"].clone()).unwrap_or_default(),
            policy: serde_json::from_value(report["policy"].clone()).unwrap_or_default(),
            missing: missing(report, lost),
            machine,
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

impl OfMachine {
    fn read(events: &[Value]) -> Option<Self> {
        let of_machine = |event: &Value| event["kind"] == "machine_report";
        let at = events.iter().rposition(of_machine)?;
        let report = &events[at]["data"];
        let (egress, _, lost) = egress_of(report, &events[..at]);
        let totals = report["measured"]["egress"].clone();
        Some(Self {
            egress,
            totals: serde_json::from_value(totals).unwrap_or_default(),
            cut_off: report["over"] != true,
            missing: missing(report, lost),
        })
    }

    fn text(&self, width: Option<usize>) -> String {
        let mut text = "\nITS MACHINE, which stayed:\n".to_owned();
        text.push_str(&text_of(&self.egress, &self.totals, width));
        if self.cut_off {
            text.push_str("its keeper was killed: what the machine did last is not recorded\n");
        }
        if let Some(missing) = &self.missing {
            text.push_str(&format!("{missing}\n"));
        }
        text
    }
}

/// What a report says of the network, its parts the last of `before`; and how many of these are not there.
fn egress_of(report: &Value, before: &[Value]) -> (EgressSummary, Vec<Learned>, u64) {
    let first: EgressSummary = serde_json::from_value(report["egress"].clone()).unwrap_or_default();
    let Some(told) = report["egress_parts"].as_u64() else {
        // An older worker's report is all there is.
        let learned = serde_json::from_value(report["learned"].clone()).unwrap_or_default();
        let mut first = first;
        first.left_out.learned = report["learned_more"].as_u64().unwrap_or(0);
        return (first, learned, 0);
    };
    let parts = before
        .iter()
        .rev()
        .take_while(|event| event["kind"] == "egress");
    let parts = parts.take(usize::try_from(told).unwrap_or(usize::MAX));
    let mut parts: Vec<EgressPart> = parts
        .filter_map(|event| serde_json::from_value(event["data"].clone()).ok())
        .collect();
    parts.reverse();
    let lost = told.saturating_sub(parts.len() as u64);
    let (mut egress, learned) = joined(parts);
    egress.counts = first.counts;
    egress.left_out = serde_json::from_value(report["egress_left_out"].clone()).unwrap_or_default();
    (egress, learned, lost)
}

/// What of a record is not there.
fn missing(report: &Value, lost: u64) -> Option<String> {
    let left_out = &report["left_out"];
    let parts = left_out["egress_parts"]
        .as_u64()
        .unwrap_or(0)
        .saturating_add(lost);
    let mut said = Vec::new();
    if let Some(bytes) = left_out["report_bytes"].as_u64() {
        said.push(format!(
            "the worker's report of {bytes} bytes was too large for its place"
        ));
    }
    if parts > 0 {
        said.push(format!(
            "{} of the record of its network are missing",
            counted(parts, "part")
        ));
    }
    (!said.is_empty()).then(|| said.join("; "))
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
    if screen.json() {
        for line in record.lines(&job.line.id) {
            screen.data(&line, String::new);
        }
        return Ok(());
    }
    if job.line.state != "finished" {
        screen.note("the job is not over: what it reached is told at its end");
        return Ok(());
    }
    if let Some(missing) = &record.missing {
        screen.note(&format!("warning: {missing}"));
    }
    if record.measured.is_none() && record.machine.is_none() {
        screen.note("nothing is recorded of its network");
        return Ok(());
    }
    let mut text = String::new();
    if let Some(measured) = &record.measured {
        text.push_str(&text_of(&record.egress, &measured.egress, screen.width()));
    }
    if let Some(machine) = &record.machine {
        text.push_str(&machine.text(screen.width()));
    }
    screen.text(&text);
    Ok(())
}

impl Record {
    /// What is told of the network, for programs.
    fn lines(&self, job: &str) -> Vec<Value> {
        let egress = &self.egress;
        let mut lines = lines(egress, job);
        let totals = self.measured.map(|measured| measured.egress);
        if let Some(machine) = &self.machine {
            let of_machine = |mut line: Value| {
                line["machine"] = json!(true);
                line
            };
            lines.extend(
                self::lines(&machine.egress, job)
                    .into_iter()
                    .map(of_machine),
            );
            lines.push(json!({"event": "machine_egress", "job": job, "totals": machine.totals, "left_out": machine.egress.left_out, "missing": machine.missing, "cut_off": machine.cut_off}));
        }
        lines.push(json!({"event": "egress", "job": job, "totals": totals, "left_out": egress.left_out, "missing": self.missing}));
        lines
    }
}

/// One line for each host and decision.
fn lines(egress: &EgressSummary, job: &str) -> Vec<Value> {
    let reached = egress.reached.iter().map(|host| {
        json!({"event": "reached", "job": job, "host": host.host, "ports": host.ports, "more_ports": host.more_ports, "rules": host.rules, "more_rules": host.more_rules, "connections": host.connections, "bytes_out": host.bytes_out, "bytes_in": host.bytes_in})
    });
    let refused = egress.refused.iter().map(|host| {
        json!({"event": "refused", "job": job, "host": host.host, "port": host.port, "addresses": host.addresses, "reason": host.reason, "code": host.code, "allow": host.allow})
    });
    let flows = egress.flows.iter();
    let flows = flows.map(|flow| json!({"event": "decision", "job": job, "decision": flow}));
    reached.chain(refused).chain(flows).collect()
}

fn text_of(summary: &EgressSummary, all: &EgressTotals, width: Option<usize>) -> String {
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
        let record = Record::read(&[json!({"kind": "report", "data": report})]);
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
        assert_eq!(text_of(&record.egress, &measured.egress, Some(80)), want);
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
        assert!(Record::read(&[]).measured.is_none());
    }

    /// The events of a job that reached so many hosts.
    fn told(hosts: u64, left_out: &Value) -> Vec<Value> {
        let line = |at: u64| json!({"host": format!("n{at:04}.example.org"), "ports": [443], "connections": 1, "bytes_out": 1, "bytes_in": 2});
        let parts: Vec<Vec<Value>> = (0..hosts)
            .map(line)
            .collect::<Vec<_>>()
            .chunks(50)
            .map(<[Value]>::to_vec)
            .collect();
        let mut events: Vec<Value> = parts
            .iter()
            .map(|part| json!({"kind": "egress", "data": {"reached": part}}))
            .collect();
        let report = json!({
            "egress": {"reached": parts[0][..30], "refused": []},
            "egress_parts": parts.len(), "egress_left_out": {"refusals": 5, "flows": 9}, "left_out": left_out,
            "measured": {"egress": {"reached": hosts, "refused": 5, "connections": hosts, "bytes_out": hosts, "bytes_in": 2 * hosts}},
        });
        events.push(json!({"kind": "report", "data": report}));
        events.push(json!({"kind": "finished", "data": {}}));
        events
    }

    #[test]
    fn a_record_of_many_parts_is_told_whole_and_what_was_cut_is_counted() {
        let record = Record::read(&told(210, &Value::Null));
        assert_eq!((record.egress.reached.len(), &record.missing), (210, &None));
        let names = record.egress.reached.iter().map(|host| host.host.as_str());
        assert!(names.is_sorted(), "parts are in order");
        let measured = record.measured.expect("told");
        let shown = text_of(&record.egress, &measured.egress, Some(80));
        assert!(shown.contains("n0209.example.org"), "{shown}");
        assert!(shown.contains("and 5 more that are not named"), "{shown}");
        assert!(shown.contains("and 9 more decisions"), "{shown}");
        let lines = record.lines("r1");
        let last = lines.last().expect("the sum");
        assert_eq!(
            (lines.len(), &last["left_out"]["refusals"]),
            (211, &json!(5))
        );
    }

    #[test]
    fn what_a_machine_that_stayed_reached_is_told_beside_its_job() {
        let mut events = told(60, &Value::Null);
        let line = json!({"host": "later.example.org", "ports": [443], "connections": 1, "bytes_out": 1, "bytes_in": 2});
        events.push(json!({"kind": "egress", "data": {"reached": [line]}}));
        let report = json!({"attempt": 1, "over": false, "egress_parts": 1, "measured": {"egress": {"reached": 1, "refused": 0, "connections": 1, "bytes_out": 1, "bytes_in": 2}}});
        events.push(json!({"kind": "machine_report", "data": report}));
        let record = Record::read(&events);
        assert_eq!((record.egress.reached.len(), &record.missing), (60, &None));
        let shown = record.machine.as_ref().expect("told").text(Some(80));
        assert!(
            shown.contains("later.example.org") && shown.contains("was killed"),
            "{shown}"
        );
        let lines = record.lines("r1");
        let of_machine =
            |line: &&Value| line["machine"] == true || line["event"] == "machine_egress";
        assert_eq!(lines.iter().filter(of_machine).count(), 2);
        let ends = lines.iter().find(|line| line["event"] == "machine_egress");
        assert_eq!(ends.expect("the machine's sum")["cut_off"], true);
    }

    #[test]
    fn a_record_that_lacks_something_says_so() {
        let mut events = told(210, &json!({"egress_parts": 2, "report_bytes": 70_000}));
        let lost = Record::read(&events[1..]);
        let said = lost.missing.clone().expect("told");
        assert!(
            said.contains("3 parts") && said.contains("70000 bytes"),
            "{said}"
        );
        assert_eq!(
            lost.lines("r1").last().expect("the sum")["missing"],
            json!(said)
        );
        // An earlier attempt's parts are not this one's.
        events.insert(0, json!({"kind": "egress", "data": {"reached": [{"host": "old", "ports": [], "connections": 1, "bytes_out": 0, "bytes_in": 0}]}}));
        assert_eq!(Record::read(&events).egress.reached.len(), 210);
    }
}
