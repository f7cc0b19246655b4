//! `kiln job`: jobs of the server that somebody named, else of this home.

use std::io::IsTerminal as _;

use futures_util::StreamExt as _;
use http::Method;
use http::header::HeaderName;
use http_body_util::BodyDataStream;
use kiln_controller::api::{JobLine, JobView, List};
use kiln_core::{ByteSize, FailureClass};
use kiln_worker::host::now_unix_ms;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::job_record::Record;
use super::table::{Facts, Table, counted, left, right, wide, wrap};
use super::{artifacts, home_queue, job_record, retry, timeline, when, why};
use crate::args::{JobCommand, JobFilterArgs, ServerArgs};
use crate::config::NO_TIMEOUT;
use crate::error::{CliError, Result};
use crate::printed::cut_character;
use crate::server::follow::{Take, read_log};
use crate::server::{Server, configured, empty, escaped, words};
use crate::show::{Screen, printable};

/// How often a followed job is asked whether it is over.
const OVER_POLL: std::time::Duration = std::time::Duration::from_secs(1);
/// Rows of a page.
const PAGE_MAX: usize = 500;
/// What an empty list says.
const NO_JOBS: &str = "no jobs here; try `kiln build`";
/// Columns left for values beside their names.
const VALUE_WIDTH: usize = 66;

pub(super) async fn run(
    verb: JobCommand,
    said: &ServerArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    if configured(said)?.is_none() && home_queue::is_untouched()? {
        // Looking changes nothing.
        if matches!(verb, JobCommand::List { .. }) {
            screen.note(NO_JOBS);
            return Ok(0);
        }
        return Err(CliError::usage("there are no jobs yet").hint("try `kiln build`"));
    }
    let asked = home_queue::ask(said).await?;
    if let (JobCommand::Egress { .. } | JobCommand::Show { .. }, Some(queue)) =
        (&verb, asked.of_home())
    {
        queue.hand_in().await;
    }
    let answered = match verb {
        JobCommand::Retry { id, shell } => retry::run(&id, shell, &asked, screen, &cancel).await,
        verb => answer(verb, &asked.server, screen, &cancel)
            .await
            .map(|()| 0),
    };
    asked.done().await;
    answered
}

async fn answer(
    verb: JobCommand,
    server: &Server,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<()> {
    match verb {
        JobCommand::List { limit, filter } => list(server, limit, &filter, screen).await?,
        JobCommand::Show { id } => {
            let mut job = server.job(id.as_deref()).await?;
            let record = Record::of(server, &job).await?;
            // What held was known when the commit was.
            job.policy = job
                .policy
                .or_else(|| record.policy.as_ref().map(|held| json!(held)));
            let mut value = json!(job);
            value["record"] = record.value();
            screen.data(&value, || show(&job, &record, now_unix_ms()));
        }
        JobCommand::Logs { id, follow } => {
            let job = server.job(id.as_deref()).await?;
            logs(server, &job, follow, screen, cancel).await?;
        }
        JobCommand::Cancel { ids, reason } => {
            for id in &ids {
                cancel_one(server, id, reason.as_deref(), screen).await?;
            }
        }
        // It may run here: see `run`.
        JobCommand::Retry { .. } => {}
        JobCommand::Egress { id } => {
            let job = server.job(id.as_deref()).await?;
            job_record::egress(server, &job, screen).await?;
        }
        JobCommand::Artifacts {
            id,
            names,
            all,
            output,
        } => {
            let job = server.job(id.as_deref()).await?;
            match names.is_empty() && !all {
                true => artifacts::list(server, &job, screen).await?,
                false => artifacts::fetch(server, &job, &names, &output, screen, cancel).await?,
            }
        }
        JobCommand::Timeline { id } => {
            let job = server.job(id.as_deref()).await?;
            let events = events(server, &job, 0).await?;
            if screen.json() {
                for event in &events {
                    screen.data(event, String::new);
                }
            } else {
                screen.text(&timeline::table(&job, &events, screen.width()));
            }
        }
        JobCommand::Why { id } => {
            let job = server.job(id.as_deref()).await?;
            why::tell(server, &job, screen).await;
        }
    }
    Ok(())
}

fn query(filter: &JobFilterArgs) -> String {
    let fields = [
        ("state", &filter.state),
        ("queue", &filter.queue),
        ("tenant", &filter.tenant),
        ("label", &filter.label),
        ("worker", &filter.worker),
    ];
    let mut query = String::new();
    for (name, value) in fields {
        if let Some(value) = value {
            query.push_str(&format!("&{name}={}", escaped(value)));
        }
    }
    query
}

async fn list(server: &Server, limit: usize, filter: &JobFilterArgs, screen: Screen) -> Result<()> {
    let query = query(filter);
    let mut jobs: Vec<JobLine> = Vec::new();
    let mut cursor: Option<String> = None;
    while jobs.len() < limit {
        let page = (limit - jobs.len()).min(PAGE_MAX);
        let from = cursor
            .as_ref()
            .map(|cursor| format!("&cursor={}", escaped(cursor)))
            .unwrap_or_default();
        let got: List<JobLine> = server
            .get(&format!("/v1/jobs?limit={page}{query}{from}"))
            .await?;
        jobs.extend(got.items);
        cursor = got.next;
        if cursor.is_none() {
            break;
        }
    }
    if jobs.is_empty() {
        screen.note(NO_JOBS);
        return Ok(());
    }
    if screen.json() {
        for job in &jobs {
            screen.data(job, String::new);
        }
        return Ok(());
    }
    screen.text(&table(&jobs, now_unix_ms(), screen.width()));
    if cursor.is_some() {
        screen.note(&format!(
            "older ones are not shown; --limit {} shows more",
            limit.saturating_mul(5)
        ));
    }
    Ok(())
}

pub(super) fn table(jobs: &[JobLine], now_unix_ms: u64, width: Option<usize>) -> String {
    let mut table = Table::new(&[
        left("ID"),
        left("TENANT"),
        left("STATE"),
        left("CAME"),
        right("TOOK"),
        wide("WHAT"),
    ])
    .within(width);
    for job in jobs {
        table.row([
            job.id.clone(),
            job.tenant.clone(),
            words::state(job),
            when::ago(job.created_unix_ms, now_unix_ms),
            took_ms(job, now_unix_ms)
                .map(when::span)
                .unwrap_or_default(),
            format!("{} {}", kind(job), job.name),
        ]);
    }
    table.render()
}

pub(super) fn kind(job: &JobLine) -> &'static str {
    if job.kind == "run" { "run" } else { "build" }
}

/// How long its machine has run.
fn took_ms(job: &JobLine, now_unix_ms: u64) -> Option<u64> {
    let end = match job.state.as_str() {
        "finished" => job.finished_unix_ms?,
        _ => now_unix_ms,
    };
    Some(end.saturating_sub(job.started_unix_ms?))
}

fn show(job: &JobView, record: &Record, now_unix_ms: u64) -> String {
    let line = &job.line;
    let mut facts = Facts::default();
    facts.add("id", &line.id);
    facts.add("tenant", &line.tenant);
    facts.add(
        "what",
        wrap(&format!("{} {}", kind(line), line.name), VALUE_WIDTH).join("\n"),
    );
    facts.add("state", words::state(line));
    facts.add("asked by", &line.submitted_by);
    facts.add(
        "queue",
        format!("{}, priority {}", line.queue, line.priority),
    );
    facts.add(
        "came",
        format!(
            "{} ({})",
            when::stamp(line.created_unix_ms),
            when::ago(line.created_unix_ms, now_unix_ms)
        ),
    );
    if let Some(started) = line.started_unix_ms {
        facts.add(
            "waited",
            when::span(started.saturating_sub(line.created_unix_ms)),
        );
    }
    if let Some(ms) = took_ms(line, now_unix_ms) {
        facts.add("took", when::span(ms));
    }
    if let Some(pending) = &line.pending {
        facts.add(
            "waits",
            wrap(&words::waits(pending, now_unix_ms), VALUE_WIDTH).join("\n"),
        );
        facts.add(
            "expected",
            words::estimate(job.estimate.as_ref()).unwrap_or_default(),
        );
    }
    facts.add("phase", job.phase.clone().unwrap_or_default());
    ending(&mut facts, job);
    record.add_to(&mut facts);
    let limits = &job.limits;
    facts.add(
        "limits",
        format!(
            "{}, {} of memory, {} of disk, {}",
            counted(limits.cpus.into(), "CPU"),
            ByteSize(limits.memory),
            ByteSize(limits.disk),
            match u128::from(limits.timeout_ms) >= NO_TIMEOUT.as_millis() {
                true => "no time limit".to_owned(),
                false => format!("at most {}", when::span(limits.timeout_ms)),
            }
        ),
    );
    let policy = job.policy.clone().unwrap_or_default();
    facts.add("policy", policy["hash"].as_str().unwrap_or_default());
    let pairs: Vec<String> = job
        .labels
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    facts.add("labels", pairs.join("\n"));
    if job.attempts.len() > 1 {
        facts.add("attempts", job.attempts.len().to_string());
    }
    for (name, file) in [("kernel", &job.kernel), ("root disk", &job.root_disk)] {
        let file = file.clone().unwrap_or_default();
        let parts = ["name", "digest"].map(|part| file[part].as_str().unwrap_or_default());
        facts.add(name, parts.join(" ").trim());
    }
    let observed = job.observed.clone().unwrap_or_default();
    for (name, key) in [
        ("source", "source"),
        ("machine", "machine_image"),
        ("template", "template"),
        ("head", "head"),
    ] {
        facts.add(name, observed[key].as_str().unwrap_or_default());
    }
    facts.add(
        "log",
        format!("{}; kiln job logs {}", ByteSize(job.log_bytes), line.id),
    );
    facts.render()
}

/// How it ended, and where its time went.
fn ending(facts: &mut Facts, job: &JobView) {
    let Some(outcome) = &job.line.outcome else {
        return;
    };
    if outcome.verdict != "passed" {
        let class = outcome.class.as_deref().unwrap_or_default();
        facts.add(
            "fault",
            match outcome.reason.as_deref().filter(|reason| *reason != class) {
                Some(reason) => format!("{class} ({reason})"),
                None => class.to_owned(),
            },
        );
        facts.add(
            "reason",
            wrap(outcome.message.as_deref().unwrap_or_default(), VALUE_WIDTH).join("\n"),
        );
        facts.add(
            "hint",
            wrap(outcome.hint.as_deref().unwrap_or_default(), VALUE_WIDTH).join("\n"),
        );
        facts.add(
            "exit code",
            outcome
                .command_code
                .map(|code| code.to_string())
                .unwrap_or_default(),
        );
    }
    let phases: Vec<String> = outcome
        .phases_ms
        .iter()
        .map(|(name, ms)| format!("{name:<8} {}", when::span(*ms)))
        .collect();
    facts.add("phases", phases.join("\n"));
    let receipt = job.receipt.clone().unwrap_or_default();
    let tags = receipt["tags"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let tags: Vec<&str> = tags.iter().filter_map(Value::as_str).collect();
    facts.add("image", tags.join("\n"));
    facts.add("digest", receipt["manifest"].as_str().unwrap_or_default());
    facts.add(
        "size",
        receipt["size"]
            .as_u64()
            .map(|size| ByteSize(size).to_string())
            .unwrap_or_default(),
    );
}

struct Printer {
    screen: Screen,
    plain: bool,
    /// The beginning of a character whose end has not come yet.
    begun: Vec<u8>,
    gone: bool,
}

impl Take for Printer {
    async fn take(&mut self, bytes: &[u8]) -> bool {
        let taken = match self.plain {
            true => self.screen.raw(bytes),
            // On a terminal a tenant's bytes must not drive it.
            false => {
                let mut piece = std::mem::take(&mut self.begun);
                piece.extend_from_slice(bytes);
                self.begun = cut_character(&mut piece);
                let text = printable(&String::from_utf8_lossy(&piece));
                self.screen.raw(text.as_bytes())
            }
        };
        self.gone |= taken.is_err();
        !self.gone
    }
}

/// Prints a job's log, or with `--json` its events; with `follow` until the job ends.
async fn logs(
    server: &Server,
    job: &JobView,
    follow: bool,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<()> {
    if screen.json() {
        for event in events(server, job, 0).await? {
            screen.data(&event, String::new);
        }
        return Ok(());
    }
    let plain = !std::io::stdout().is_terminal();
    let mut printer = Printer {
        screen,
        plain,
        begun: Vec::new(),
        gone: false,
    };
    let over = CancellationToken::new();
    if !follow || job.line.state == "finished" {
        over.cancel();
    }
    let watch = async {
        while !over.is_cancelled() {
            tokio::time::sleep(OVER_POLL).await;
            let path = format!("/v1/jobs/{}", job.line.id);
            let now = server.get::<JobView>(&path).await;
            if now.is_ok_and(|job| job.line.state == "finished") {
                over.cancel();
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        read = read_log(server, &job.line.id, &over, &mut printer) => read,
        () = watch => Ok(()),
        () = cancel.cancelled() => Err(CliError::new(
            FailureClass::Cancelled,
            "stopped following; the job goes on",
        )),
    }
}

/// What happened until now after this event, in order.
pub(super) async fn events(server: &Server, job: &JobView, after: u64) -> Result<Vec<Value>> {
    let path = format!("/v1/jobs/{}/events", job.line.id);
    let seen = HeaderName::from_static("last-event-id");
    let from = [(seen, after.to_string())];
    let from = if after > 0 { &from[..] } else { &[] };
    let response = server.send(Method::GET, &path, empty(), from).await?;
    let mut body = BodyDataStream::new(response.into_body());
    let mut frames = crate::server::Frames::default();
    let mut events = Vec::new();
    let broken = |why: String| {
        CliError::new(
            FailureClass::Infrastructure,
            format!("the events broke off: {why}"),
        )
    };
    loop {
        while let Some(frame) = frames.next() {
            let Some(number) = frame.id else {
                return Ok(events);
            };
            events.push(serde_json::from_str(&frame.data).unwrap_or_default());
            if number >= job.last_event {
                return Ok(events);
            }
        }
        match body.next().await {
            Some(Ok(piece)) => frames
                .push(&piece)
                .map_err(|error| broken(error.to_string()))?,
            Some(Err(error)) => return Err(broken(error.to_string())),
            None => return Ok(events),
        }
    }
}

async fn cancel_one(server: &Server, id: &str, reason: Option<&str>, screen: Screen) -> Result<()> {
    let job = server.job(Some(id)).await?;
    let reason = reason
        .map(|reason| format!("?reason={}", escaped(reason)))
        .unwrap_or_default();
    let answer: Value = server
        .delete(&format!("/v1/jobs/{}{reason}", job.line.id))
        .await?;
    screen.data(&answer, || {
        format!(
            "{} {}",
            job.line.id,
            answer["result"].as_str().unwrap_or("cancelling")
        )
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(state: &str) -> JobLine {
        serde_json::from_value(json!({
            "id": "r1m7z7g68prr466fez", "tenant": "acme", "kind": "run", "name": "sh -c 'make everything that there is'",
            "state": state, "cancel_asked": false, "queue": "default", "priority": 0, "created_unix_ms": 1_000_000,
            "started_unix_ms": 1_018_000, "finished_unix_ms": 1_080_000, "submitted_by": "owner", "tags": [],
            "outcome": (state == "finished").then(|| json!({"verdict": "failed", "class": "user", "message": "it ended with 7", "command_code": 7, "exit_code": 1, "phases_ms": [["run", 62_000]]})),
        }))
        .expect("a job")
    }

    #[test]
    fn the_list_fits_eighty_columns() {
        let jobs = [line("finished"), line("queued")];
        let text = table(&jobs, 1_300_000, Some(super::super::table::WIDTH));
        let want = "\
ID                  TENANT  STATE   CAME             TOOK  WHAT
r1m7z7g68prr466fez  acme    failed  5 min ago  1 min 02 s  run sh -c 'make ever…
";
        assert!(text.starts_with(want), "{text}");
        assert!(
            text.lines()
                .all(|line| line.chars().count() <= super::super::table::WIDTH)
        );
    }

    #[test]
    fn the_timeline_counts_from_the_request() {
        let mut value = serde_json::to_value(line("finished")).expect("JSON");
        for (key, field) in [
            (
                "limits",
                json!({"cpus": 1, "memory": 536_870_912, "disk": 1, "timeout_ms": 60_000}),
            ),
            ("network", json!({})),
            ("trust", json!("trusted")),
            ("labels", json!({"team": "web"})),
            ("attempts", json!([])),
            ("last_event", json!(3)),
            ("log_bytes", json!(10)),
        ] {
            value[key] = field;
        }
        let job: JobView = serde_json::from_value(value).expect("a job");
        let events = [
            json!({"seq": 1, "at_unix_ms": 1_000_000, "kind": "queued", "data": {"queue": "default", "attempts": 0}}),
            json!({"seq": 2, "at_unix_ms": 1_000_040, "kind": "leased", "data": {"attempt": 1, "worker": "here"}}),
            json!({"seq": 3, "at_unix_ms": 1_080_000, "kind": "finished", "data": {"outcome": {"message": "it ended with 7"}}}),
        ];
        let want = "\
      AFTER  EVENT     WHAT
       0 ms  queued    in queue default
      40 ms  leased    attempt 1 to worker here
1 min 20 s  finished  it ended with 7
";
        let text = timeline::table(&job, &events, None);
        let lean = |text: &str| {
            text.lines()
                .map(str::trim)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(lean(&text), lean(want));
        let shown = show(&job, &Record::default(), 1_300_000);
        for line in [
            "waited     18.0 s",
            "fault      user",
            "exit code  7",
            "labels     team=web",
            "log        10 B; kiln job logs r1m7z7g68prr466fez",
        ] {
            assert!(shown.contains(line), "{line}\n{shown}");
        }
    }
}
