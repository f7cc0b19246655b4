//! Runs `kiln` and makes apps.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for a state a test waits for.
pub(crate) const WAIT: Duration = Duration::from_secs(120);
/// Pause between two looks at a state that cannot be waited for.
const POLL: Duration = Duration::from_millis(50);

/// What a kiln command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    /// Fails the test unless the exit code is this one.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(
            self.code, code,
            "exit code\n--- stdout\n{}\n--- stderr\n{}",
            self.out, self.err
        );
        self
    }

    /// Fails the test unless standard error contains this.
    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(
            self.err.contains(text),
            "stderr lacks {text:?}\n--- stdout\n{}\n--- stderr\n{}",
            self.out,
            self.err
        );
        self
    }

    /// What `kiln --json run` said: every line is an event. Gives all of them, and the bytes that the command printed, one stream after the
    /// other; where both are one, as in a job's log, the first has them.
    #[track_caller]
    pub(crate) fn events(&self) -> (Vec<serde_json::Value>, [Vec<u8>; 2]) {
        use base64::Engine as _;
        let parsed = self.out.lines().map(serde_json::from_str);
        let events: Vec<serde_json::Value> = parsed
            .collect::<Result<_, _>>()
            .unwrap_or_else(|error| panic!("{error}: {self:?}"));
        let mut printed = [Vec::new(), Vec::new()];
        for event in events.iter().filter(|event| event["event"] == "output") {
            let stream = &mut printed[usize::from(event["stream"] == "stderr")];
            match (event["text"].as_str(), event["base64"].as_str()) {
                (Some(text), None) => stream.extend(text.bytes()),
                (None, Some(text)) => {
                    let bytes = base64::engine::general_purpose::STANDARD.decode(text);
                    stream.extend(bytes.expect("base 64"));
                }
                _ => panic!("{event}"),
            }
        }
        (events, printed)
    }
}

/// The program and home to test, or `None` when this run has none.
#[expect(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "the test command talks to tests this way"
)]
pub(crate) fn kiln() -> Option<Kiln> {
    match (
        std::env::var_os("KILN_TEST_BIN"),
        std::env::var_os("KILN_TEST_HOME"),
    ) {
        (Some(program), Some(home)) => {
            let absolute = |path| std::path::absolute(path).expect("a path");
            Some(Kiln {
                program: absolute(program),
                home: absolute(home),
            })
        }
        _ => {
            assert!(
                std::env::var_os("KILN_TEST_REQUIRE_TOOLS").is_none(),
                "KILN_TEST_BIN and KILN_TEST_HOME are not set"
            );
            eprintln!("skipped: KILN_TEST_BIN and KILN_TEST_HOME are not set (use make test)");
            None
        }
    }
}

/// A kiln program with a home. Builds that commit a cache head at the same time race for it, and the loser keeps nothing: a test that counts
/// on its own head has [`crate::annex::Annex::fresh_heads`].
#[derive(Clone, Debug)]
pub(crate) struct Kiln {
    pub(crate) program: PathBuf,
    pub(crate) home: PathBuf,
}

impl Kiln {
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(args)
            .env("KILN_HOME", &self.home)
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        if self.home.is_dir() {
            // No project: the folder that tests are started in is one.
            command.current_dir(&self.home);
        }
        command
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Said {
        said(self.command(args))
    }

    /// Starts a command that goes on.
    pub(crate) fn start(&self, args: &[&str]) -> Started {
        Started::of(self.command(args))
    }

    /// Builds a folder under a name; gives the JSON result.
    pub(crate) fn build(&self, dir: &Path, tag: &str, more: &[&str]) -> serde_json::Value {
        let result = tempfile::NamedTempFile::new().expect("temp file");
        let mut args = vec![
            "build",
            path(dir),
            "--tag",
            tag,
            "--result",
            path(result.path()),
        ];
        args.extend(more);
        self.run(&args).exits(0);
        let text = std::fs::read(result.path()).expect("result");
        serde_json::from_slice(&text).expect("JSON")
    }
}

/// A running kiln command.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) child: Child,
}

impl Started {
    /// A command of [`Kiln::command`] that goes on.
    pub(crate) fn of(mut command: Command) -> Self {
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kiln starts");
        Self { child }
    }

    /// Sends `INT`, `TERM`, `HUP`, `KILL`, `TSTP` or `CONT`.
    pub(crate) fn signal(&self, name: &str) {
        use rustix::process::{Pid, Signal, kill_process};
        let signal = match name {
            "INT" => Signal::INT,
            "TERM" => Signal::TERM,
            "HUP" => Signal::HUP,
            "KILL" => Signal::KILL,
            "TSTP" => Signal::TSTP,
            "CONT" => Signal::CONT,
            other => panic!("no signal {other:?}"),
        };
        let pid = i32::try_from(self.child.id()).expect("a pid");
        kill_process(Pid::from_raw(pid).expect("a pid"), signal).expect("kill");
    }

    /// Reads its standard output until it contains this, and gives what was read; what comes after stays for the end.
    #[track_caller]
    pub(crate) fn until_it_prints(&mut self, text: &str) -> String {
        let stdout = self.child.stdout.as_mut().expect("piped");
        let mut printed = Vec::new();
        while !String::from_utf8_lossy(&printed).contains(text) {
            let mut byte = [0];
            let read = stdout.read_exact(&mut byte);
            assert!(read.is_ok(), "{}", String::from_utf8_lossy(&printed));
            printed.extend(byte);
        }
        String::from_utf8_lossy(&printed).into_owned()
    }

    pub(crate) fn end(mut self) -> Said {
        let (mut out, mut err) = (String::new(), String::new());
        let mut stderr = self.child.stderr.take().expect("piped");
        let reader = std::thread::spawn(move || {
            let _read = stderr.read_to_string(&mut err);
            err
        });
        // One that goes to a file is there.
        if let Some(mut stdout) = self.child.stdout.take() {
            let _read = stdout.read_to_string(&mut out);
        }
        let status = self.child.wait().expect("wait");
        let err = reader.join().expect("reader");
        Said {
            code: status.code().unwrap_or(-1),
            out,
            err,
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

pub(crate) fn said(mut command: Command) -> Said {
    let output = command.output().expect("kiln starts");
    Said {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A folder with these files.
pub(crate) fn app(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temp dir");
    for (name, text) in files {
        let file = dir.path().join(name);
        std::fs::create_dir_all(file.parent().expect("parent")).expect("folder");
        std::fs::write(file, text).expect("file");
    }
    dir
}

pub(crate) fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("root")
        .to_owned()
}

/// A port that nobody listens on, and that neither another test of this process is given nor a connection that somebody makes meanwhile.
pub(crate) fn free_port() -> u16 {
    /// Below the range that the system takes the near ends of connections from.
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 20_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Processes that test side by side begin at different places.
    let from = std::process::id().wrapping_mul(397);
    for _ in 0..COUNT {
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + from.wrapping_add(next) % COUNT;
        let port = u16::try_from(port).expect("a port");
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no port of loopback is free");
}

/// Waits until something holds.
#[track_caller]
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + WAIT;
    loop {
        if let Some(value) = look() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(POLL);
    }
}

/// One GET; `None` while nothing answers.
pub(crate) fn get(port: u16, target: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(WAIT)).ok()?;
    write!(
        stream,
        "GET {target} HTTP/1.0\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    )
    .ok()?;
    let mut page = String::new();
    stream.take(1 << 20).read_to_string(&mut page).ok()?;
    let code = page.split(' ').nth(1)?.parse().ok()?;
    Some((code, page))
}
