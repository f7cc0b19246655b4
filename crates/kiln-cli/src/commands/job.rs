//! `kiln job`: with a server its jobs (see [`super::job_server`]), else the records of this host's, read from files only.

use std::fs::File;
use std::io::{BufRead as _, BufReader, IsTerminal as _};
use std::time::Duration;

use kiln_core::{ByteSize, JobId, Observed, Outcome, Verdict};
use kiln_store::records::{JobRecord, RecordError, RecordState, Records};
use kiln_worker::home::Home;
use kiln_worker::host::now_unix_ms;
use serde::Serialize;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::table::{Facts, Table, left, right, wide, wrap};
use super::when;
use crate::args::{JobCommand, ServerArgs};
use crate::error::{CliError, OrInfrastructure as _, Result, chain};
use crate::server;
use crate::show::{Screen, printable};

/// How often a followed log is looked at.
const FOLLOW_POLL: Duration = Duration::from_millis(150);
/// Most ids that an ambiguous beginning lists.
const IDS_SHOWN_MAX: usize = 8;
/// Longest line of a log that is shown as one line, bytes.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// What is said of a job whose process is gone.
const LOST: &str = "the kiln process that ran it is gone and did not say how it ended";
/// Columns left for values beside their names.
const VALUE_WIDTH: usize = 66;

pub(super) async fn run(
    verb: JobCommand,
    server: &ServerArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    let verb = match server::any(server).await? {
        None => verb,
        Some(server) => match super::job_server::run(verb, &server, screen, &cancel).await? {
            // Built by this host without its server.
            Some(verb) => verb,
            None => return Ok(0),
        },
    };
    let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
    let records = match home.jobs().is_dir() {
        true => Some(Records::open(&home.jobs()).or_infrastructure()?),
        false => None,
    };
    match verb {
        JobCommand::List { limit, filter } => {
            super::job_server::refuse_filter(&filter)?;
            list(records.as_ref(), limit, screen)?;
        }
        JobCommand::Show { id } => {
            let (records, id) = find(records, id.as_deref())?;
            let record = records.show(&id).map_err(record_error)?;
            let observed = records.observed(&id).map_err(record_error)?;
            screen.data(
                &Shown {
                    record: &record,
                    observed: observed.as_ref(),
                },
                || show(&record, observed.as_ref(), now_unix_ms()),
            );
        }
        JobCommand::Logs { id, follow } => {
            let (records, id) = find(records, id.as_deref())?;
            logs(&records, &id, follow, screen, &cancel).await?;
        }
        JobCommand::Cancel { .. }
        | JobCommand::Retry { .. }
        | JobCommand::Timeline { .. }
        | JobCommand::Why { .. } => {
            server::needed(server).await?;
        }
    }
    Ok(0)
}

#[expect(clippy::needless_pass_by_value, reason = "fits map_err")]
fn record_error(error: RecordError) -> CliError {
    match error {
        RecordError::Unknown { .. } => {
            CliError::usage(chain(&error)).hint("`kiln job list` shows the jobs there are")
        }
        RecordError::Newer { .. } => CliError::usage(chain(&error)),
        _ => CliError::infrastructure(&error),
    }
}

/// The job whose id begins so; the newest without.
fn find(records: Option<Records>, start: Option<&str>) -> Result<(Records, JobId)> {
    let none = || CliError::usage("there are no jobs yet").hint("try `kiln build`");
    let records = records.ok_or_else(none)?;
    let Some(start) = start else {
        let newest = records.list(0, 1).or_infrastructure()?;
        let id = newest
            .records
            .into_iter()
            .next()
            .map(|record| record.id)
            .ok_or_else(none)?;
        return Ok((records, id));
    };
    if let Ok(id) = start.parse::<JobId>()
        && records.dir_of(&id).is_dir()
    {
        return Ok((records, id));
    }
    let all = records.list(0, usize::MAX).or_infrastructure()?;
    let readable = all.records.into_iter().map(|record| record.id);
    let ids = readable.chain(all.unreadable.into_iter().map(|one| one.id));
    let mut fitting: Vec<JobId> = ids.filter(|id| id.as_str().starts_with(start)).collect();
    match fitting.len() {
        0 => Err(CliError::usage(format!("there is no job {start:?}"))
            .hint("`kiln job list` shows the jobs there are")),
        1 => Ok((records, fitting.remove(0))),
        count => {
            let shown: Vec<&str> = fitting
                .iter()
                .take(IDS_SHOWN_MAX)
                .map(JobId::as_str)
                .collect();
            Err(CliError::usage(format!(
                "{count} jobs begin with {start:?}: {}",
                shown.join(", ")
            ))
            .hint("write more of the id"))
        }
    }
}

fn list(records: Option<&Records>, limit: usize, screen: Screen) -> Result<()> {
    let listing = records
        .map(|records| records.list(0, limit))
        .transpose()
        .or_infrastructure()?
        .unwrap_or_default();
    for bad in &listing.unreadable {
        screen.note(&format!("warning: {}: {}", bad.id, chain(&bad.error)));
    }
    if listing.records.is_empty() {
        screen.note("no jobs yet; try `kiln build`");
        return Ok(());
    }
    if screen.json() {
        for record in &listing.records {
            screen.data(record, String::new);
        }
        return Ok(());
    }
    screen.text(&table(&listing.records, now_unix_ms(), screen.width()));
    if listing.more {
        screen.note(&format!(
            "older ones are not shown; --limit {} shows more",
            limit.saturating_mul(5)
        ));
    }
    Ok(())
}

fn table(records: &[JobRecord], now_unix_ms: u64, width: Option<usize>) -> String {
    let mut table = Table::new(&[
        left("ID"),
        left("STATE"),
        left("STARTED"),
        right("TOOK"),
        wide("WHAT"),
    ])
    .within(width);
    for record in records {
        let took = took_ms(record, now_unix_ms)
            .map(when::span)
            .unwrap_or_default();
        table.row([
            record.id.to_string(),
            record.state.name().to_owned(),
            when::ago(record.started_unix_ms, now_unix_ms),
            took,
            record.title.clone(),
        ]);
    }
    table.render()
}

fn took_ms(record: &JobRecord, now_unix_ms: u64) -> Option<u64> {
    let end = match &record.state {
        RecordState::Finished { ended_unix_ms, .. } => *ended_unix_ms,
        RecordState::Running => now_unix_ms,
        RecordState::Lost => return None,
    };
    Some(end.saturating_sub(record.started_unix_ms))
}

#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    record: &'a JobRecord,
    #[serde(skip_serializing_if = "Option::is_none")]
    observed: Option<&'a Observed>,
}

fn show(record: &JobRecord, observed: Option<&Observed>, now_unix_ms: u64) -> String {
    let mut facts = Facts::default();
    facts.add("id", record.id.as_str());
    facts.add("kind", &record.kind);
    facts.add("what", wrap(&record.title, VALUE_WIDTH).join("\n"));
    facts.add("state", record.state.name());
    facts.add(
        "started",
        format!(
            "{} ({})",
            when::stamp(record.started_unix_ms),
            when::ago(record.started_unix_ms, now_unix_ms)
        ),
    );
    if let Some(ms) = took_ms(record, now_unix_ms) {
        facts.add("took", when::span(ms));
    }
    if record.state == RecordState::Lost {
        facts.add("reason", LOST);
    }
    if let RecordState::Finished { outcome, .. } = &record.state {
        ending(&mut facts, outcome);
    }
    if let Some(receipt) = &record.receipt {
        let tags: Vec<String> = receipt.tags.iter().map(ToString::to_string).collect();
        facts.add("image", tags.join("\n"));
        facts.add("digest", receipt.manifest.to_string());
        facts.add("size", ByteSize(receipt.size).to_string());
        facts.add("new head", receipt.head.clone().unwrap_or_default());
    }
    details(&mut facts, &record.details);
    if let Some(observed) = observed {
        facts.add("source", observed.source.to_string());
        facts.add("machine", &observed.machine_image);
        facts.add("template", observed.template.clone().unwrap_or_default());
        facts.add("head", observed.head.clone().unwrap_or_default());
    }
    let cut = match record.log_cut_bytes {
        0 => String::new(),
        bytes => format!(", {} were cut", ByteSize(bytes)),
    };
    facts.add(
        "log",
        format!(
            "{}{cut}; kiln job logs {}",
            ByteSize(record.log_bytes),
            record.id
        ),
    );
    facts.render()
}

/// How it ended, and where its time went.
fn ending(facts: &mut Facts, outcome: &Outcome) {
    if let Verdict::Failed {
        class,
        message,
        hint,
        command_code,
    } = &outcome.verdict
    {
        let fault = serde_json::to_value(class).ok();
        let fault = fault.as_ref().and_then(Value::as_str).unwrap_or_default();
        facts.add("fault", fault);
        facts.add("reason", wrap(message, VALUE_WIDTH).join("\n"));
        if let Some(hint) = hint {
            facts.add("hint", wrap(hint, VALUE_WIDTH).join("\n"));
        }
        if let Some(code) = command_code {
            facts.add("exit code", code.to_string());
        }
    }
    let phases = outcome.phases_ms.iter();
    let phases: Vec<String> = phases
        .map(|(name, ms)| format!("{name:<8} {}", when::span(*ms)))
        .collect();
    facts.add("phases", phases.join("\n"));
}

/// What a kind of job keeps besides, as far as it is not shown by another line.
fn details(facts: &mut Facts, details: &Value) {
    if let Some([cached, all]) = details["cached"].as_array().map(Vec::as_slice) {
        facts.add("steps", format!("{cached} of {all} from the cache"));
    }
    for (name, key) in [("reached", "reached"), ("refused", "refused")] {
        let hosts = details["egress"][key]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        let lines: Vec<String> = hosts.iter().map(host_line).collect();
        facts.add(name, lines.join("\n"));
    }
}

/// One host of an egress summary: its name, or whatever stands there.
fn host_line(value: &Value) -> String {
    match (
        value.as_str(),
        value["host"].as_str(),
        value["port"].as_u64(),
    ) {
        (Some(text), ..) => text.to_owned(),
        (None, Some(host), Some(port)) if port != 0 => format!("{host}:{port}"),
        (None, Some(host), _) => host.to_owned(),
        _ => value.to_string(),
    }
}

/// Prints a job's log, or with `--json` its events; with `follow` until the job ends.
async fn logs(
    records: &Records,
    id: &JobId,
    follow: bool,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<()> {
    let opened = if screen.json() {
        records.open_events(id)
    } else {
        records.open_log(id)
    };
    let mut tail = Tail {
        file: BufReader::new(opened.map_err(record_error)?),
        rest: Vec::new(),
    };
    // On a terminal a tenant's bytes must not drive it; a pipe gets them as they are.
    let plain = !std::io::stdout().is_terminal();
    let print = |line: String| screen.text(&if plain { line } else { printable(&line) });
    loop {
        // Looked at before reading: what is written before the end is read after it.
        let running = follow
            && matches!(
                records.show(id).map_err(record_error)?.state,
                RecordState::Running
            );
        while let Some(line) = tail.line(!running).or_infrastructure()? {
            print(line);
        }
        if !running {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(FOLLOW_POLL) => {}
            () = cancel.cancelled() => return Err(CliError::new(kiln_core::FailureClass::Cancelled, "stopped following; the job goes on")),
        }
    }
}

/// Whole lines of a file that may still grow.
struct Tail {
    file: BufReader<File>,
    rest: Vec<u8>,
}

impl Tail {
    /// The next line without its end; a last one without an end only when `last` says that nothing follows.
    fn line(&mut self, last: bool) -> std::io::Result<Option<String>> {
        use std::io::Read as _;
        let room = LINE_BYTES_MAX.saturating_sub(self.rest.len() as u64);
        self.file
            .by_ref()
            .take(room)
            .read_until(b'\n', &mut self.rest)?;
        let whole = self.rest.last() == Some(&b'\n') || self.rest.len() as u64 >= LINE_BYTES_MAX;
        if !whole && (!last || self.rest.is_empty()) {
            return Ok(None);
        }
        let mut bytes = std::mem::take(&mut self.rest);
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::{FailureClass, TenantName};
    use kiln_store::records::NewRecord;
    use std::io::Write as _;

    fn record(state: RecordState) -> JobRecord {
        JobRecord {
            id: "b0123456789abcdefg".parse().expect("id"),
            tenant: TenantName::local(),
            kind: "image-build".to_owned(),
            title: "build examples/node-express -> t/local/node-express:latest and more".to_owned(),
            started_unix_ms: 1_000_000,
            state,
            receipt: None,
            details: serde_json::json!({"cached": [3, 7], "egress": {"refused": [{"host": "evil.example", "port": 443}]}}),
            log_bytes: 2048,
            log_cut_bytes: 0,
        }
    }

    fn failed() -> RecordState {
        let verdict = Verdict::Failed {
            class: FailureClass::OutOfMemory,
            message: "step 4 used more than 2.0 GiB".to_owned(),
            hint: Some("try --memory 4G".to_owned()),
            command_code: Some(137),
        };
        let outcome = Outcome {
            verdict,
            phases_ms: vec![("machine".to_owned(), 120), ("build".to_owned(), 61_000)],
        };
        RecordState::Finished {
            outcome,
            ended_unix_ms: 1_062_000,
        }
    }

    #[test]
    fn the_list_fits_eighty_columns() {
        let records = [record(failed()), record(RecordState::Lost)];
        let whole = table(&records, 1_300_000, None);
        assert!(whole.contains(&records[0].title), "{whole}");
        let text = table(&records, 1_300_000, Some(super::super::table::WIDTH));
        let want = "\
ID                  STATE   STARTED          TOOK  WHAT
b0123456789abcdefg  failed  5 min ago  1 min 02 s  build examples/node-express …
";
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], want.lines().nth(1).expect("row"), "{text}");
        assert!(
            lines[2].contains("lost")
                && lines
                    .iter()
                    .all(|line| line.chars().count() <= super::super::table::WIDTH)
        );
    }

    #[test]
    fn a_failed_job_says_why_and_where_the_time_went() {
        let text = show(&record(failed()), None, 1_300_000);
        for line in [
            "fault      out_of_memory",
            "reason     step 4 used more than 2.0 GiB",
            "hint       try --memory 4G",
            "exit code  137",
            "phases     machine  120 ms",
            "           build    1 min 01 s",
            "steps      3 of 7 from the cache",
            "refused    evil.example:443",
            "log        2.0 KiB; kiln job logs b0123456789abcdefg",
        ] {
            assert!(text.lines().any(|have| have == line), "{line:?} in\n{text}");
        }
    }

    #[test]
    fn ids_may_be_shortened_while_they_are_clear() {
        let dir = tempfile::tempdir().expect("temp dir");
        let records = Records::open(dir.path()).expect("open");
        assert_eq!(
            find(Some(records.clone()), None)
                .expect_err("none yet")
                .exit_code(),
            2
        );
        for id in ["b00000000100000001", "b00000000200000002"] {
            let new = NewRecord {
                id: id.parse().expect("id"),
                tenant: TenantName::local(),
                kind: "run".to_owned(),
                title: "true".to_owned(),
                started_unix_ms: 1,
            };
            drop(records.begin(new).expect("begin"));
        }
        let of =
            |start: Option<&str>| find(Some(records.clone()), start).map(|(_, id)| id.to_string());
        assert_eq!(of(None).expect("newest"), "b00000000200000002");
        assert_eq!(of(Some("b000000001")).expect("one"), "b00000000100000001");
        assert!(
            of(Some("b0"))
                .expect_err("two")
                .message
                .starts_with("2 jobs begin with")
        );
        assert!(of(Some("../x")).is_err() && of(Some("r")).is_err());
    }

    #[test]
    fn a_growing_file_gives_whole_lines() {
        let mut file = tempfile::NamedTempFile::new().expect("temp file");
        let mut tail = Tail {
            file: BufReader::new(file.reopen().expect("open")),
            rest: Vec::new(),
        };
        file.write_all(b"one\ntw").expect("write");
        assert_eq!(tail.line(false).expect("read").as_deref(), Some("one"));
        assert_eq!(tail.line(false).expect("read"), None);
        file.write_all(b"o\nthree").expect("write");
        assert_eq!(tail.line(false).expect("read").as_deref(), Some("two"));
        assert_eq!(tail.line(false).expect("read"), None);
        assert_eq!(tail.line(true).expect("read").as_deref(), Some("three"));
        assert_eq!(tail.line(true).expect("read"), None);
    }
}
