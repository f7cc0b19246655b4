//! Runs one program of the system as part of a stage: own process group, bounded output, deadline, cancellation.
//!
//! The child's standard input is the lock file of the bake cache, so the lock outlives a killed
//! parent until its last child has gone and no second bake starts beside an orphan.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::orphan;
use super::progress::{BakeEvent, BakeProgress, Cancel};

/// How often a running program is checked for its end, its deadline and cancellation.
const POLL: Duration = Duration::from_millis(25);
/// Longest line that is passed on; the rest of a longer one follows as another line.
const LINE_BYTES_MAX: u64 = 4096;
/// Lines kept for an error message.
const TAIL_LINES: usize = 30;
/// Lines that may wait between the readers and the caller.
const LINE_QUEUE: usize = 256;
/// Most bytes of standard output that are captured in memory.
const CAPTURE_BYTES_MAX: u64 = 64 << 20;
/// How long output may still arrive after the program has gone.
const DRAIN_WAIT: Duration = Duration::from_secs(2);

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The program is not installed or cannot be started.
    #[error("cannot start {program}{}", hint(.source, .program))]
    Start {
        /// Name of the program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended with another code than 0.
    #[error("{program} failed ({status}); its last lines:\n{tail}")]
    Failed {
        /// Name of the program.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines it wrote.
        tail: String,
    },
    /// It did not end in time and was killed.
    #[error("{program} did not end within {} s", .deadline.as_secs())]
    Deadline {
        /// Name of the program.
        program: String,
        /// How long it had.
        deadline: Duration,
    },
    /// The caller cancelled; the program was killed.
    #[error("cancelled")]
    Cancelled,
    /// Its output or end could not be read.
    #[error("cannot read from {program}")]
    Read {
        /// Name of the program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn hint(source: &io::Error, program: &str) -> String {
    if source.kind() == io::ErrorKind::NotFound {
        format!(": install the system package that has `{program}`")
    } else {
        String::new()
    }
}

/// What every program of one bake shares.
#[derive(Clone, Copy)]
pub struct RunContext<'a> {
    /// Stage the program belongs to, for events.
    pub stage: &'a str,
    /// Receives its lines.
    pub progress: &'a dyn BakeProgress,
    /// Stops it.
    pub cancel: &'a Cancel,
    /// Becomes its standard input (see the module).
    pub lock: &'a File,
}

impl std::fmt::Debug for RunContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunContext")
            .field("stage", &self.stage)
            .finish_non_exhaustive()
    }
}

/// A program to run.
#[derive(Debug)]
pub struct Program {
    name: String,
    args: Vec<OsString>,
    env: Vec<(String, OsString)>,
    unset: Vec<&'static str>,
    directory: Option<PathBuf>,
    deadline: Duration,
    stdout: Stdout,
}

#[derive(Debug)]
enum Stdout {
    Lines,
    Capture,
    File(File),
}

impl Program {
    /// A program looked up in PATH, with this long to finish.
    #[must_use]
    pub fn new(name: &str, deadline: Duration) -> Self {
        Self {
            name: name.to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            unset: Vec::new(),
            directory: None,
            deadline,
            stdout: Stdout::Lines,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets a variable of its environment; the rest is inherited.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Removes a variable of the inherited environment.
    #[must_use]
    pub fn unset(mut self, name: &'static str) -> Self {
        self.unset.push(name);
        self
    }

    /// Runs it in this directory.
    #[must_use]
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Its standard output goes to a file instead of to the caller as lines.
    #[must_use]
    pub fn stdout_to(mut self, file: File) -> Self {
        self.stdout = Stdout::File(file);
        self
    }

    /// Runs it and returns its standard output.
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn capture(mut self, context: &RunContext<'_>) -> Result<Vec<u8>, RunError> {
        self.stdout = Stdout::Capture;
        self.start(context)
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn run(self, context: &RunContext<'_>) -> Result<(), RunError> {
        self.start(context).map(drop)
    }

    fn start(self, context: &RunContext<'_>) -> Result<Vec<u8>, RunError> {
        if context.cancel.is_cancelled() {
            return Err(RunError::Cancelled);
        }
        let program = self.name.clone();
        let start_error = |source| RunError::Start {
            program: program.clone(),
            source,
        };
        let mut command = Command::new(&self.name);
        command.args(&self.args).envs(self.env).process_group(0);
        command.env("LC_ALL", "C.UTF-8").env_remove("LANGUAGE");
        for name in self.unset {
            command.env_remove(name);
        }
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        let captures = matches!(self.stdout, Stdout::Capture);
        command.stdin(Stdio::from(context.lock.try_clone().map_err(start_error)?));
        command.stderr(Stdio::piped());
        command.stdout(match self.stdout {
            Stdout::Lines | Stdout::Capture => Stdio::piped(),
            Stdout::File(file) => Stdio::from(file),
        });
        let child = command.spawn().map_err(start_error)?;
        let group = child.id();
        let running = Running::new(child, captures);
        orphan::record(context.lock, Some(group)).map_err(start_error)?;
        running.wait(&self.name, self.deadline, context)
    }
}

/// A running program; killed with its whole group when dropped.
struct Running {
    child: Child,
    lines: Receiver<String>,
    captured: Option<JoinHandle<io::Result<Vec<u8>>>>,
}

impl Running {
    fn new(mut child: Child, captures: bool) -> Self {
        let (sender, lines) = sync_channel(LINE_QUEUE);
        if let Some(stderr) = child.stderr.take() {
            let sender = sender.clone();
            thread::spawn(move || send_lines(stderr, &sender));
        }
        let captured = match child.stdout.take() {
            Some(stdout) if captures => Some(thread::spawn(move || {
                let mut bytes = Vec::new();
                stdout.take(CAPTURE_BYTES_MAX).read_to_end(&mut bytes)?;
                Ok(bytes)
            })),
            Some(stdout) => {
                thread::spawn(move || send_lines(stdout, &sender));
                None
            }
            None => None,
        };
        Self {
            child,
            lines,
            captured,
        }
    }

    fn wait(
        mut self,
        program: &str,
        deadline: Duration,
        context: &RunContext<'_>,
    ) -> Result<Vec<u8>, RunError> {
        let read_error = |source| RunError::Read {
            program: program.to_owned(),
            source,
        };
        let started = Instant::now();
        let mut tail = Vec::new();
        let mut ended: Option<(ExitStatus, Instant)> = None;
        loop {
            match self.lines.recv_timeout(POLL) {
                Ok(line) => keep_line(line, &mut tail, context),
                Err(RecvTimeoutError::Disconnected) if ended.is_some() => break,
                Err(RecvTimeoutError::Disconnected) => thread::sleep(POLL),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if context.cancel.is_cancelled() {
                return Err(RunError::Cancelled);
            }
            match ended {
                Some((_, at)) if at.elapsed() > DRAIN_WAIT => break,
                Some(_) => {}
                None if started.elapsed() > deadline => {
                    let program = program.to_owned();
                    return Err(RunError::Deadline { program, deadline });
                }
                None => {
                    let status = self.child.try_wait().map_err(read_error)?;
                    ended = status.map(|status| (status, Instant::now()));
                }
            }
        }
        let status = ended.map_or_else(|| self.child.wait(), |(status, _)| Ok(status));
        let status = status.map_err(read_error)?;
        let captured = match self.captured.take().map(JoinHandle::join) {
            Some(Ok(bytes)) => bytes.map_err(read_error)?,
            Some(Err(_)) => return Err(read_error(io::Error::other("the reader ended early"))),
            None => Vec::new(),
        };
        if status.success() {
            return Ok(captured);
        }
        Err(RunError::Failed {
            program: program.to_owned(),
            status,
            tail: tail.join("\n"),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(group) = i32::try_from(self.child.id())
            && let Some(group) = rustix::process::Pid::from_raw(group)
        {
            // What is left of the group after its leader ended goes too. ESRCH means nothing is left.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

fn keep_line(line: String, tail: &mut Vec<String>, context: &RunContext<'_>) {
    let stage = context.stage;
    context
        .progress
        .event(&BakeEvent::Line { stage, line: &line });
    if tail.len() == TAIL_LINES {
        tail.remove(0);
    }
    tail.push(line);
}

fn send_lines(from: impl Read, to: &SyncSender<String>) {
    let mut reader = BufReader::new(from);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        match reader
            .by_ref()
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut bytes)
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&bytes);
        if to
            .send(text.trim_end_matches(['\n', '\r']).to_owned())
            .is_err()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn with_context<T>(body: impl FnOnce(&RunContext<'_>, &Mutex<Vec<String>>) -> T) -> T {
        let seen = Mutex::new(Vec::new());
        let progress = |event: &BakeEvent<'_>| {
            if let BakeEvent::Line { line, .. } = event {
                seen.lock().expect("test lock").push((*line).to_owned());
            }
        };
        let lock = tempfile::tempfile().expect("a temporary file");
        let cancel = Cancel::new();
        let context = RunContext {
            stage: "test",
            progress: &progress,
            cancel: &cancel,
            lock: &lock,
        };
        body(&context, &seen)
    }

    fn shell(script: &str) -> Program {
        Program::new("sh", Duration::from_secs(20)).args(["-c", script])
    }

    #[test]
    fn lines_arrive_and_a_failure_shows_the_last_ones() {
        with_context(|context, seen| {
            let error = shell("echo one; echo two >&2; exit 3").run(context);
            let Err(RunError::Failed { tail, status, .. }) = error else {
                panic!("{error:?}");
            };
            assert_eq!(status.code(), Some(3));
            assert!(tail.contains("one") && tail.contains("two"), "{tail}");
            assert_eq!(seen.lock().expect("test lock").len(), 2);
        });
    }

    #[test]
    fn standard_output_is_captured_apart_from_errors() {
        with_context(|context, _| {
            let bytes = shell("echo out; echo err >&2").capture(context);
            assert_eq!(bytes.expect("sh runs"), b"out\n");
        });
    }

    #[test]
    fn a_deadline_kills_the_whole_group() {
        with_context(|context, _| {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let file = dir.path().join("pid");
            let script = format!("sleep 60 & echo $! > {}; wait", file.display());
            let mut program = shell(&script);
            program.deadline = Duration::from_millis(400);
            let error = program.run(context);
            assert!(matches!(error, Err(RunError::Deadline { .. })), "{error:?}");
            let pid = std::fs::read_to_string(&file).expect("the shell wrote its child's pid");
            let state = format!("/proc/{}/stat", pid.trim());
            let until = Instant::now() + Duration::from_secs(5);
            loop {
                // Gone, or a zombie that nobody has collected yet.
                let gone =
                    std::fs::read_to_string(&state).map_or(true, |stat| stat.contains(") Z"));
                if gone {
                    break;
                }
                assert!(Instant::now() < until, "the child of the shell survived");
                thread::yield_now();
            }
        });
    }

    #[test]
    fn a_cancelled_bake_starts_nothing() {
        with_context(|context, _| {
            context.cancel.cancel();
            assert!(matches!(
                shell("true").run(context),
                Err(RunError::Cancelled)
            ));
        });
    }

    #[test]
    fn a_missing_program_says_what_to_install() {
        with_context(|context, _| {
            let program = Program::new("kiln-no-such-program", Duration::from_secs(1));
            let text = program
                .run(context)
                .expect_err("it does not exist")
                .to_string();
            assert!(text.contains("install the system package"), "{text}");
        });
    }
}
