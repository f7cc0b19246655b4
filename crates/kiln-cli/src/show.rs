//! The screen: progress on standard error, data on standard output. The only module that writes to either.
//!
//! On a terminal the last line shows what runs now; elsewhere every event is one plain line. With `--json` every event
//! is one JSON object a line on standard output. Colour never carries meaning and obeys `NO_COLOR`.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use kiln_worker::event::{Event, StepState};
use serde::Serialize;
use tokio::sync::mpsc;

use crate::error::CliError;

/// How often the running line is drawn again.
const REDRAW: Duration = Duration::from_millis(200);
/// Where no line is drawn again, something that says nothing for this long is said to go on.
const STILL: Duration = Duration::from_secs(15);
/// Widest line drawn on a terminal, in characters, when its width is unknown.
const WIDTH_DEFAULT: usize = 100;

/// How this process talks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Screen {
    json: bool,
    live: bool,
    color: bool,
}

/// A value as one line that drives no terminal: JSON may hold the control characters beyond ASCII as they are, here they are escaped.
pub(crate) fn json_line(value: &impl Serialize) -> String {
    let line = serde_json::to_string(value)
        .unwrap_or_else(|error| serde_json::json!({ "error": error.to_string() }).to_string());
    let drives = |c: char| ('\u{7f}'..='\u{9f}').contains(&c);
    if !line.contains(drives) {
        return line;
    }
    let mut escaped = String::with_capacity(line.len() + 16);
    for c in line.chars() {
        match drives(c) {
            true => escaped.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => escaped.push(c),
        }
    }
    escaped
}

impl Screen {
    /// From the command line and what standard error is.
    pub(crate) fn new(json: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let no_color = crate::environment::is_set("NO_COLOR");
        let dumb = crate::environment::var("TERM").is_some_and(|term| term == "dumb");
        Self {
            json,
            live: terminal && !json && !dumb,
            color: terminal && !no_color && !dumb,
        }
    }

    /// Whether `--json` was given.
    pub(crate) fn json(self) -> bool {
        self.json
    }

    /// Prints one object: a JSON line with `--json`, else what `text` gives.
    pub(crate) fn data(self, value: &impl Serialize, text: impl FnOnce() -> String) {
        let line = if self.json { json_line(value) } else { text() };
        out(&line);
    }

    /// Most columns of a line of data: the terminal's, and none where no terminal shows it.
    pub(crate) fn width(self) -> Option<usize> {
        let columns = crate::environment::output_width()?;
        Some(match columns {
            0 => crate::commands::table::WIDTH,
            columns => columns,
        })
    }

    /// Prints text as it is on standard output.
    pub(crate) fn text(self, text: &str) {
        out(text);
    }

    /// A command's own output, byte for byte.
    ///
    /// # Errors
    /// When nobody takes it.
    pub(crate) fn raw(self, bytes: &[u8]) -> std::io::Result<()> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush())
    }

    /// A remark on standard error.
    pub(crate) fn note(self, text: &str) {
        if !self.json {
            err_line(&printable(text));
        }
    }

    /// Shows an error with its hints.
    pub(crate) fn error(self, error: &CliError) {
        if self.json {
            let mut value = serde_json::json!({
                "event": "error", "class": error.class, "message": error.message, "hints": error.hints,
            });
            if let Some(reason) = error.reason {
                value["reason"] = serde_json::json!(reason);
            }
            out(&json_line(&value));
            return;
        }
        let (red, bold, off) = self.paint("31", "1");
        err_line(&format!(
            "{red}{bold}error:{off} {}",
            printable(&error.message)
        ));
        for hint in &error.hints {
            err_line(&format!("{bold}hint:{off} {}", printable(hint)));
        }
    }

    fn paint(self, first: &str, second: &str) -> (String, String, &'static str) {
        if self.color {
            (
                format!("\x1b[{first}m"),
                format!("\x1b[{second}m"),
                "\x1b[0m",
            )
        } else {
            (String::new(), String::new(), "")
        }
    }

    /// Draws events until their sender is gone. `passthrough` sends command output (step 0) to this process's own
    /// standard output and error, byte for byte as text.
    pub(crate) async fn follow(self, mut events: mpsc::Receiver<Event>) {
        let mut running = Running::default();
        let mut redraw = tokio::time::interval(REDRAW);
        loop {
            tokio::select! {
                event = events.recv() => {
                    let Some(event) = event else { break };
                    self.event(&event, &mut running);
                }
                _ = redraw.tick(), if !self.json => self.tick(&mut running),
            }
        }
        self.wipe(&mut running);
    }

    fn tick(self, running: &mut Running) {
        if self.live {
            self.draw(running);
        } else if running.said.elapsed() >= STILL
            && let Some(line) = running.line()
        {
            running.said = Instant::now();
            err_line(&format!("   still: {}", printable(&line)));
        }
    }

    /// As [`Screen::follow`], but phases and notes are shown only where they explain a wait: a command's own output
    /// is what its user wants to see.
    pub(crate) async fn follow_quietly(self, mut events: mpsc::Receiver<Event>) {
        let mut running = Running::default();
        let mut redraw = tokio::time::interval(REDRAW);
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    None => break,
                    Some(Event::Phase { .. }) => {
                        self.wipe(&mut running);
                        running = Running::default();
                    }
                    Some(event) => self.event(&event, &mut running),
                },
                _ = redraw.tick(), if self.live => self.draw(&mut running),
            }
        }
        self.wipe(&mut running);
    }

    fn event(self, event: &Event, running: &mut Running) {
        if self.json {
            out(&json_line(event));
            return;
        }
        self.wipe(running);
        let (dim, bold, off) = self.paint("2", "1");
        running.said = Instant::now();
        match event {
            Event::Phase { name } => {
                running.what = format!("{name} ...");
                running.since = Some(Instant::now());
                if !self.live {
                    err_line(&format!("== {name}"));
                }
            }
            Event::Progress { what, detail } => {
                let line = if detail.is_empty() {
                    what.clone()
                } else {
                    format!("{what}: {detail}")
                };
                if running.last_plain != *what {
                    running.last_plain.clone_from(what);
                    running.since = Some(Instant::now());
                    if !self.live {
                        err_line(&format!("   {}", printable(&line)));
                    }
                }
                running.what = line;
            }
            Event::Note { text } => {
                // What went on has an end; what comes next says so itself.
                running.what.clear();
                err_line(&format!("   {}", printable(text)));
            }
            Event::Warning { text } => {
                err_line(&format!("{bold}warning:{off} {}", printable(text)))
            }
            Event::Step {
                number,
                name,
                state,
                seconds,
            } => {
                self.step(*number, name, *state, *seconds, running);
            }
            Event::Log { step: 0, text, .. } => err_line(&printable(text)),
            Event::Log { step, text, .. } => {
                err_line(&format!("{dim}#{step} | {off}{}", printable(text)))
            }
        }
    }

    fn step(
        self,
        number: usize,
        name: &str,
        state: StepState,
        seconds: Option<f64>,
        running: &mut Running,
    ) {
        if name.starts_with("[internal]") {
            return;
        }
        let (color, word) = match state {
            StepState::Running => ("36", "..."),
            StepState::Cached => ("32", "cached"),
            StepState::Done => ("32", "done"),
            StepState::Failed => ("31", "FAILED"),
            StepState::Cancelled => ("33", "stopped"),
        };
        let (paint, _, off) = self.paint(color, "1");
        if state == StepState::Running {
            running
                .steps
                .insert(number, (one_line(name), Instant::now()));
            if !self.live {
                err_line(&format!("#{number} {}", one_line(name)));
            }
            return;
        }
        running.steps.remove(&number);
        let time = seconds.map(|s| format!(" {s:.1}s")).unwrap_or_default();
        let label = if self.live || state == StepState::Cached {
            one_line(name)
        } else {
            String::new()
        };
        err_line(&format!(
            "#{number} {label}{}{paint}{word}{time}{off}",
            if label.is_empty() { "" } else { " " }
        ));
    }

    fn draw(self, running: &mut Running) {
        self.wipe(running);
        let Some(line) = running.line() else { return };
        let width = crate::environment::terminal_width()
            .unwrap_or(WIDTH_DEFAULT)
            .saturating_sub(1);
        let line: String = printable(&line).chars().take(width).collect();
        err(&line);
        running.drawn = true;
    }

    fn wipe(self, running: &mut Running) {
        if running.drawn {
            err("\r\x1b[K");
            running.drawn = false;
        }
    }
}

/// What goes on now.
struct Running {
    steps: BTreeMap<usize, (String, Instant)>,
    what: String,
    since: Option<Instant>,
    last_plain: String,
    drawn: bool,
    /// When something was last shown.
    said: Instant,
}

impl Default for Running {
    fn default() -> Self {
        Self {
            steps: BTreeMap::new(),
            what: String::new(),
            since: None,
            last_plain: String::new(),
            drawn: false,
            said: Instant::now(),
        }
    }
}

impl Running {
    /// One line with the seconds it has taken so far.
    fn line(&self) -> Option<String> {
        if let Some((number, (name, since))) = self.steps.iter().next() {
            let more = match self.steps.len() - 1 {
                0 => String::new(),
                more => format!(" (+{more})"),
            };
            let seconds = since.elapsed().as_secs_f64();
            return Some(format!("#{number} {name} {seconds:.0}s{more}"));
        }
        let seconds = self
            .since
            .map_or(0.0, |since| since.elapsed().as_secs_f64());
        (!self.what.is_empty()).then(|| format!("{} {seconds:.0}s", self.what))
    }
}

/// A terminal that was closed is no reason to fail either: what was started must still be ended.
fn err(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _reader_gone = stderr
        .write_all(text.as_bytes())
        .and_then(|()| stderr.flush());
}

fn err_line(text: &str) {
    err(&format!("{text}\n"));
}

/// A reader that went away (`kiln job list | head`) is no error; any other loss is told when the command ends.
fn out(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let mut written = stdout.write_all(text.as_bytes());
    if !text.ends_with('\n') {
        written = written.and_then(|()| stdout.write_all(b"\n"));
    }
    if let Err(error) = written.and_then(|()| stdout.flush())
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        let _first_one_counts = LOST.set(error);
    }
}

/// Why output of this process was lost.
static LOST: std::sync::OnceLock<std::io::Error> = std::sync::OnceLock::new();

/// The first error of writing to standard output, but for a reader that went away.
pub(crate) fn lost_output() -> Option<&'static std::io::Error> {
    LOST.get()
}

/// Text of a guest or tenant without control characters that would drive the terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if (c.is_control() && c != '\t' && c != '\n') || turns(c) {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect()
}

/// A character that turns the direction of writing (UAX 9). Those that are only not seen stay: scripts and emoji are written with them.
fn turns(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A path as a person may see it: on one line, nothing in it drives the terminal.
pub(crate) trait ShownPath {
    /// See the trait.
    fn shown(&self) -> String;
}

impl ShownPath for std::path::Path {
    fn shown(&self) -> String {
        kiln_image::plan::shown(&self.to_string_lossy())
    }
}

fn one_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let short: String = line.chars().take(120).collect();
    printable(&if short.len() < text.len() {
        format!("{short} ...")
    } else {
        short
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_line_tells_what_takes_time() {
        let screen = Screen {
            json: false,
            live: false,
            color: false,
        };
        let mut running = Running::default();
        assert_eq!(running.line(), None);
        let progress = |detail: &str| Event::Progress {
            what: "bake root".to_owned(),
            detail: detail.to_owned(),
        };
        screen.event(&progress("a"), &mut running);
        screen.event(&progress("b"), &mut running);
        assert_eq!(running.line().as_deref(), Some("bake root: b 0s"));
        let text = "baked root".to_owned();
        screen.event(&Event::Note { text }, &mut running);
        assert_eq!(running.line(), None);
    }

    #[test]
    fn guest_text_cannot_drive_the_terminal() {
        let text = "a\u{9b}2J\u{7f}\u{1b}[2J\u{e9}";
        let line = json_line(&serde_json::json!({ "text": text }));
        assert_eq!(line, "{\"text\":\"a\\u009b2J\\u007f\\u001b[2J\u{e9}\"}");
        let read: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(read["text"], text);
        assert_eq!(printable("a\x1b[2Jb\tc\r"), "a\u{fffd}[2Jb\tc\u{fffd}");
        assert_eq!(one_line("RUN a\nb"), "RUN a ...");
    }
}
