//! Runs git in a checkout machine. What it says is shown or parsed, never believed.

use std::time::{Duration, Instant};

use kiln_core::FailureClass;
use kiln_proto::Session;
use kiln_proto::msg::{ExecRequest, Exit};
use tokio::sync::mpsc;

use crate::event::{Event, Events};
use crate::failure::Failure;
use crate::orders::{self, ExecIo};

/// Where the repository lies in the machine: on its scratch disk.
pub(super) const REPOSITORY: &str = "/work/repository.git";
/// Most bytes of a short command's answer.
const ANSWER_BYTES_MAX: usize = 4096;
/// Most bytes kept of what git says beside.
const WORDS_BYTES_MAX: usize = 8192;
/// Most lines and characters of that shown in an error.
const WORDS_LINES_MAX: usize = 6;
const WORDS_CHARS_MAX: usize = 700;
/// Least time between two progress events.
const PROGRESS_PAUSE: Duration = Duration::from_millis(250);

/// A git command of a checkout.
#[derive(Clone, Debug)]
pub(super) struct Git {
    env: Vec<(String, String)>,
}

impl Git {
    /// With this CA bundle (a path in the machine), or the machine's own.
    pub(super) fn new(ca_bundle: Option<&str>) -> Self {
        // Nothing of a user: no settings, no login, no prompt, no other protocol.
        let plain = [
            ("PATH", "/usr/local/bin:/usr/bin:/bin"),
            ("HOME", "/nonexistent"),
            ("LC_ALL", "C.UTF-8"),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_ALLOW_PROTOCOL", "https"),
            ("GIT_NO_LAZY_FETCH", "1"),
            ("GIT_NO_REPLACE_OBJECTS", "1"),
        ];
        let env = plain
            .into_iter()
            .chain(ca_bundle.map(|path| ("GIT_SSL_CAINFO", path)));
        Self {
            env: env
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
        }
    }

    /// The order for `git ARGS`.
    pub(super) fn request(&self, args: &[&str], after: Duration) -> ExecRequest {
        let argv = std::iter::once("git")
            .chain(args.iter().copied())
            .map(str::to_owned)
            .collect();
        let timeout_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        ExecRequest {
            argv,
            env: self.env.clone(),
            cwd: "/work".to_owned(),
            timeout_ms,
            ..ExecRequest::default()
        }
    }

    /// Runs a command to its end; gives what it printed.
    pub(super) async fn run(
        &self,
        session: &Session,
        what: &'static str,
        args: &[&str],
        after: Duration,
        events: &Events,
    ) -> Result<Said, Failure> {
        let (sender, mut chunks) = mpsc::channel::<(u8, Vec<u8>)>(16);
        let (_no_orders, control) = mpsc::channel(1);
        let mut said = Said::default();
        let listen = async {
            let mut meter = Meter::new(what, events);
            while let Some((stream, bytes)) = chunks.recv().await {
                said.add(stream, &bytes);
                if stream == 2 {
                    meter.add(&bytes);
                }
            }
        };
        let request = self.request(args, after);
        let io = ExecIo {
            stdin: None,
            output: sender,
            control,
        };
        let (exit, ()) = tokio::join!(orders::exec(session, what, &request, io), listen);
        said.exit = Some(exit?);
        Ok(said)
    }
}

/// What a command said, and how it ended.
#[derive(Default, Debug)]
pub(super) struct Said {
    /// Standard output, cut at its bound.
    out: Vec<u8>,
    /// End of standard error.
    beside: Vec<u8>,
    pub(super) exit: Option<Exit>,
}

impl Said {
    pub(super) fn add(&mut self, stream: u8, bytes: &[u8]) {
        if stream == 1 {
            let room = ANSWER_BYTES_MAX - self.out.len();
            self.out.extend_from_slice(&bytes[..bytes.len().min(room)]);
        } else {
            self.beside.extend_from_slice(bytes);
            let over = self.beside.len().saturating_sub(WORDS_BYTES_MAX);
            self.beside.drain(..over);
        }
    }

    /// First line of its output.
    pub(super) fn line(&self) -> String {
        let text = String::from_utf8_lossy(&self.out);
        text.lines().next().unwrap_or_default().trim().to_owned()
    }

    /// Whether one line of an answer of `ls-remote` names exactly this ref. A last line without an end may have been cut.
    pub(super) fn names_ref(&self, wanted: &str) -> bool {
        let text = String::from_utf8_lossy(&self.out);
        let whole = text
            .split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'));
        let mut names = whole.filter_map(|line| line.split_once('\t'));
        names.any(|(_, name)| name == wanted)
    }

    /// Last lines of its error output, progress left out.
    pub(super) fn words(&self) -> String {
        let text = String::from_utf8_lossy(&self.beside);
        let lines: Vec<&str> = text
            .split('\n')
            .map(|line| line.rsplit('\r').next().unwrap_or_default().trim())
            .filter(|line| {
                !line.is_empty() && !line.starts_with("remote: ") && !line.ends_with('%')
            })
            .collect();
        let last = &lines[lines.len().saturating_sub(WORDS_LINES_MAX)..];
        last.join("\n").chars().take(WORDS_CHARS_MAX).collect()
    }

    /// Nothing to complain about, or how it failed.
    pub(super) fn check(self, what: &str) -> Result<Self, Failure> {
        let Some(exit) = &self.exit else {
            return Ok(self);
        };
        if exit.code == Some(0) {
            return Ok(self);
        }
        if exit.oom {
            return Err(Failure::new(
                FailureClass::OutOfMemory,
                format!("git ran out of memory while it was to {what}"),
            )
            .hint(
                "this repository is too large for a checkout machine; clone it and give the folder",
            ));
        }
        if exit.timed_out {
            return Err(Failure::new(
                FailureClass::Timeout,
                format!("git took too long to {what}"),
            ));
        }
        Err(explained(what, &self.words()))
    }
}

/// What git's words mean for its user. They come from a machine and a server: shown, and used for a hint only.
fn explained(what: &str, words: &str) -> Failure {
    let has = |needle: &str| words.contains(needle);
    let message = format!("git could not {what}: {words}");
    let usage = |hint: &str| Failure::new(FailureClass::Usage, message.clone()).hint(hint);
    if has("couldn't find remote ref") || has("not our ref") || has("unadvertised object") {
        return usage("give a branch, a tag or a commit that the server hands out, as in URL#v1.2");
    }
    if has("could not read Username")
        || has("Authentication failed")
        || has("terminal prompts disabled")
        || has("error: 403")
    {
        return usage(
            "no login enters a checkout machine; clone a private repository and give the folder",
        );
    }
    if has("not found") || has("error: 404") || has("not valid: is this a git repository") {
        return usage("check the URL");
    }
    let failure = Failure::new(FailureClass::Infrastructure, message.clone());
    if has("certificate") {
        return failure.hint("a private certificate authority belongs into the host's CA bundle (`kiln registries discover`)");
    }
    failure
}

/// Turns git's progress lines into events, not too many.
struct Meter<'a> {
    what: &'static str,
    events: &'a Events,
    line: Vec<u8>,
    last: Option<Instant>,
}

impl<'a> Meter<'a> {
    fn new(what: &'static str, events: &'a Events) -> Self {
        Self {
            what,
            events,
            line: Vec::new(),
            last: None,
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\r' | b'\n' => self.tell(),
                byte if self.line.len() < 160 => self.line.push(*byte),
                _ => {}
            }
        }
    }

    fn tell(&mut self) {
        let line = String::from_utf8_lossy(&self.line).trim().to_owned();
        self.line.clear();
        if line.is_empty()
            || self
                .last
                .is_some_and(|last| last.elapsed() < PROGRESS_PAUSE)
        {
            return;
        }
        self.last = Some(Instant::now());
        self.events.tell_now(Event::Progress {
            what: self.what.to_owned(),
            detail: line,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(beside: &str) -> Said {
        let mut said = Said::default();
        said.add(2, beside.as_bytes());
        said
    }

    #[test]
    fn words_without_progress() {
        let said = said(
            "remote: Counting: 1%\rReceiving objects:  50%\rReceiving objects: 100%\nfatal: the end\n",
        );
        assert_eq!(said.words(), "fatal: the end");
    }

    #[test]
    fn a_ref_is_known_by_all_of_its_name() {
        let mut said = Said::default();
        said.add(
            1,
            b"aa\trefs/heads/x/refs/heads/main\nbb\trefs/tags/refs/heads/main\n",
        );
        assert!(!said.names_ref("refs/heads/main"));
        said.add(1, b"cc\trefs/heads/main");
        assert!(!said.names_ref("refs/heads/main"), "it may go on");
        said.add(1, b"\n");
        assert!(said.names_ref("refs/heads/main"));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut said = Said::default();
        for _ in 0..100 {
            said.add(1, &[b'o'; 1000]);
            said.add(2, &[b'e'; 1000]);
        }
        assert_eq!(
            (said.out.len(), said.beside.len()),
            (ANSWER_BYTES_MAX, WORDS_BYTES_MAX)
        );
        assert!(said.words().len() <= WORDS_CHARS_MAX);
    }

    #[test]
    fn whose_fault_it_is() {
        let class = |words: &str| explained("fetch", words).class;
        assert_eq!(
            class("fatal: couldn't find remote ref nope"),
            FailureClass::Usage
        );
        assert_eq!(
            class("fatal: could not read Username for 'https://x': terminal prompts disabled"),
            FailureClass::Usage
        );
        assert_eq!(
            class("fatal: repository 'https://x/' not found"),
            FailureClass::Usage
        );
        assert_eq!(
            class("fatal: unable to access 'https://x/': Failed to connect"),
            FailureClass::Infrastructure
        );
    }
}
