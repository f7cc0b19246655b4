//! Reads BuildKit's progress as its client in the machine prints it: one `SolveStatus` as a JSON object a line.
//!
//! Format: `client.SolveStatus` of BuildKit 0.33 (client/graph.go). Everything in it comes out of a machine and is a
//! claim: it is shown, bounded and counted, never trusted. The pushed digest it names is compared with the registry.

use std::collections::HashMap;

use base64::Engine as _;
use serde::Deserialize;

use crate::event::{Event, StepState};

/// Longest line of progress that is read, bytes.
pub const LINE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Most steps of one build that are told apart.
pub const STEPS_MAX: usize = 10_000;
/// Longest text of one step name that is kept, bytes.
pub const NAME_BYTES_MAX: usize = 1024;
/// What the C library says of ENOSPC.
const DISK_FULL: &[u8] = b"No space left on device";
/// Longest partial log line that waits for its end, bytes.
pub const PARTIAL_LINE_BYTES_MAX: usize = 16 * 1024;

#[derive(Deserialize, Default)]
#[serde(default)]
struct Status {
    vertexes: Vec<Vertex>,
    statuses: Vec<VertexStatus>,
    logs: Vec<VertexLog>,
    warnings: Vec<Warning>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Vertex {
    digest: String,
    name: String,
    started: Option<String>,
    completed: Option<String>,
    cached: bool,
    error: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct VertexStatus {
    id: String,
    started: Option<String>,
    completed: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct VertexLog {
    vertex: String,
    stream: i64,
    data: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Warning {
    short: Option<String>,
}

/// What became of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What it is.
    pub name: String,
    /// How it stands.
    pub state: StepState,
    /// Seconds, by the guest's clock, when it ended.
    pub seconds: f64,
    /// BuildKit's error text.
    pub error: String,
    /// Whether its output had the words of a full disk.
    pub disk_full: bool,
    /// Whether an event told of it yet.
    told: bool,
}

/// Collects a build's progress.
#[derive(Debug, Default)]
pub struct Solve {
    steps: Vec<Step>,
    by_digest: HashMap<String, usize>,
    started: HashMap<usize, f64>,
    partial: HashMap<(usize, u8), Vec<u8>>,
    /// Digest the guest says it pushed.
    pub claimed_manifest: Option<String>,
    /// Whether the push of the image has begun.
    pub pushing: bool,
    /// Lines that were not progress (the client's own words), newest last, bounded.
    pub other_lines: Vec<String>,
    first_start: Option<f64>,
    last_end: Option<f64>,
    /// Seconds from the first step's start to the first RUN step's start, by the guest's clock.
    pub first_run: Option<f64>,
    /// Milliseconds from the job's submission to the start of the solve, by the host's clock.
    pub submitted_ms: u64,
    push: Option<(f64, f64)>,
}

impl Solve {
    /// Takes one line; gives the events it means.
    pub fn line(&mut self, line: &str) -> Vec<Event> {
        let mut events = Vec::new();
        let Ok(status) = serde_json::from_str::<Status>(line) else {
            if !line.trim().is_empty() && self.other_lines.len() < 200 {
                self.other_lines.push(clip(line, 4096));
            }
            return events;
        };
        for vertex in &status.vertexes {
            self.vertex(vertex, &mut events);
        }
        for status in &status.statuses {
            self.status(status);
        }
        for log in &status.logs {
            self.log(log, &mut events);
        }
        for warning in &status.warnings {
            let text = warning
                .short
                .as_deref()
                .and_then(decode)
                .unwrap_or_default();
            let text = clip(String::from_utf8_lossy(&text).trim(), 500);
            if !text.is_empty() {
                events.push(Event::Warning { text });
            }
        }
        events
    }

    /// All steps so far.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Steps found in the cache, and steps that count (all but BuildKit's internal ones).
    #[must_use]
    pub fn cache_hits(&self) -> (usize, usize) {
        let counted = self
            .steps
            .iter()
            .filter(|step| step.name.starts_with('[') && !is_internal(&step.name));
        let (mut hits, mut all) = (0, 0);
        for step in counted {
            all += 1;
            hits += usize::from(step.state == StepState::Cached);
        }
        (hits, all)
    }

    /// Seconds BuildKit itself reports from the first start to the last end.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        match (self.first_start, self.last_end) {
            (Some(start), Some(end)) => (end - start).max(0.0),
            _ => 0.0,
        }
    }

    /// The step that failed first, if any.
    #[must_use]
    pub fn failed(&self) -> Option<(usize, &Step)> {
        let failed = |step: &&Step| step.state == StepState::Failed;
        self.steps
            .iter()
            .enumerate()
            .find(|(_, step)| failed(step))
            .map(|(i, step)| (i + 1, step))
    }

    fn vertex(&mut self, vertex: &Vertex, events: &mut Vec<Event>) {
        if vertex.name.is_empty() {
            return;
        }
        let Some(index) = self.index(&vertex.digest, &vertex.name) else {
            return;
        };
        let start = vertex.started.as_deref().and_then(unix_seconds);
        let end = vertex.completed.as_deref().and_then(unix_seconds);
        if let Some(start) = start {
            self.started.insert(index, start);
            self.first_start = Some(self.first_start.map_or(start, |first| first.min(start)));
            if vertex.name.contains("] RUN ") && !vertex.cached && self.first_run.is_none() {
                self.first_run = self.first_start.map(|first| start - first);
            }
        }
        let state = if !vertex.error.is_empty() {
            let cancelled = vertex.error.contains("context canceled");
            if cancelled {
                StepState::Cancelled
            } else {
                StepState::Failed
            }
        } else if vertex.cached {
            StepState::Cached
        } else if end.is_some() {
            StepState::Done
        } else if start.is_some() {
            StepState::Running
        } else {
            return;
        };
        let seconds = match (end, self.started.get(&index)) {
            (Some(end), Some(start)) => {
                self.last_end = Some(self.last_end.map_or(end, |last| last.max(end)));
                Some((end - start).max(0.0))
            }
            _ => None,
        };
        let step = &mut self.steps[index];
        let fresh =
            step.state != state || (step.seconds - seconds.unwrap_or(step.seconds)).abs() > 1e-9;
        if fresh || !step.told {
            step.told = true;
            step.state = state;
            step.seconds = seconds.unwrap_or(step.seconds);
            step.error = clip(&vertex.error, 16 * 1024);
            let name = step.name.clone();
            if state != StepState::Running {
                self.flush(index, events);
            }
            events.push(Event::Step {
                number: index + 1,
                name,
                state,
                seconds,
            });
        }
    }

    fn status(&mut self, status: &VertexStatus) {
        if let Some(digest) = status.id.strip_prefix("exporting manifest ") {
            // With one platform and no attestations, the manifest is what is pushed; the last one named wins.
            self.claimed_manifest = Some(clip(digest.trim(), 100));
        }
        if status.id.starts_with("pushing ") {
            self.pushing = true;
            let start = status.started.as_deref().and_then(unix_seconds);
            let end = status.completed.as_deref().and_then(unix_seconds).or(start);
            if let (Some(start), Some(end)) = (start, end) {
                let (first, last) = self.push.unwrap_or((start, end));
                self.push = Some((first.min(start), last.max(end)));
            }
        }
    }

    /// Seconds the push took, by the guest's clock.
    #[must_use]
    pub fn push_seconds(&self) -> f64 {
        self.push.map_or(0.0, |(start, end)| (end - start).max(0.0))
    }

    fn log(&mut self, log: &VertexLog, events: &mut Vec<Event>) {
        let Some(&index) = self.by_digest.get(&log.vertex) else {
            return;
        };
        let Some(bytes) = log.data.as_deref().and_then(decode) else {
            return;
        };
        let stream = if log.stream == 2 { 2 } else { 1 };
        self.steps[index].disk_full |= bytes.windows(DISK_FULL.len()).any(|w| w == DISK_FULL);
        let partial = self.partial.entry((index, stream)).or_default();
        for byte in bytes {
            if byte == b'\n' || partial.len() >= PARTIAL_LINE_BYTES_MAX {
                let text = String::from_utf8_lossy(partial).into_owned();
                events.push(Event::Log {
                    step: index + 1,
                    stream,
                    text,
                });
                partial.clear();
                if byte == b'\n' {
                    continue;
                }
            }
            partial.push(byte);
        }
    }

    fn flush(&mut self, index: usize, events: &mut Vec<Event>) {
        for stream in [1, 2] {
            if let Some(partial) = self
                .partial
                .remove(&(index, stream))
                .filter(|p| !p.is_empty())
            {
                let text = String::from_utf8_lossy(&partial).into_owned();
                events.push(Event::Log {
                    step: index + 1,
                    stream,
                    text,
                });
            }
        }
    }

    fn index(&mut self, digest: &str, name: &str) -> Option<usize> {
        if let Some(index) = self.by_digest.get(digest) {
            return Some(*index);
        }
        if self.steps.len() >= STEPS_MAX {
            return None;
        }
        let index = self.steps.len();
        self.by_digest.insert(clip(digest, 200), index);
        self.steps.push(Step {
            name: clip(name, NAME_BYTES_MAX),
            state: StepState::Running,
            seconds: 0.0,
            error: String::new(),
            disk_full: false,
            told: false,
        });
        Some(index)
    }
}

/// Steps BuildKit makes for itself: not what the user wrote.
fn is_internal(name: &str) -> bool {
    name.starts_with("[internal]") || name.starts_with("[auth]")
}

fn decode(text: &str) -> Option<Vec<u8>> {
    base64::engine::general_purpose::STANDARD.decode(text).ok()
}

fn clip(text: &str, bytes_max: usize) -> String {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

fn unix_seconds(text: &str) -> Option<f64> {
    let stamp: jiff::Timestamp = text.parse().ok()?;
    #[expect(
        clippy::cast_precision_loss,
        reason = "microseconds are enough for a display"
    )]
    Some(stamp.as_microsecond() as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = r#"{"vertexes":[{"digest":"sha256:a","name":"[2/2] RUN make","started":"2026-01-01T00:00:01.5Z"}]}"#;
    const DONE: &str = r#"{"vertexes":[{"digest":"sha256:a","name":"[2/2] RUN make","started":"2026-01-01T00:00:01.5Z","completed":"2026-01-01T00:00:03Z"}]}"#;

    #[test]
    fn a_step_starts_logs_and_ends() {
        let mut solve = Solve::default();
        let events = solve.line(RUN);
        assert!(matches!(
            &events[..],
            [Event::Step {
                number: 1,
                state: StepState::Running,
                ..
            }]
        ));
        let data = base64::engine::general_purpose::STANDARD.encode("one\ntwo");
        let log = format!(
            r#"{{"logs":[{{"vertex":"sha256:a","stream":1,"data":"{data}","timestamp":"x"}}]}}"#
        );
        let events = solve.line(&log);
        assert!(matches!(&events[..], [Event::Log { step: 1, stream: 1, text }] if text == "one"));
        let events = solve.line(DONE);
        assert!(matches!(&events[0], Event::Log { text, .. } if text == "two"));
        assert!(
            matches!(&events[1], Event::Step { state: StepState::Done, seconds: Some(s), .. } if (*s - 1.5).abs() < 1e-6)
        );
        assert_eq!(solve.cache_hits(), (0, 1));
        assert_eq!(solve.line(DONE), []);
    }

    #[test]
    fn junk_is_kept_as_words_and_bounded() {
        let mut solve = Solve::default();
        for _ in 0..1000 {
            assert_eq!(solve.line("error: failed to solve"), []);
        }
        assert_eq!(solve.other_lines.len(), 200);
        assert_eq!(
            solve.line(r#"{"logs":[{"vertex":"nobody","data":"!!"}]}"#),
            []
        );
    }
}
