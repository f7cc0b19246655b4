//! `make demo`: two apps from source to an image that answers HTTP, then one changed line and again.

use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{Binaries, demo_learn, root, run};

/// Longest wait for an app to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// Pause between two looks at a port that does not listen yet.
const ANSWER_POLL: Duration = Duration::from_millis(100);
/// Most bytes of a page.
const PAGE_BYTES_MAX: u64 = 1 << 20;

struct App {
    name: &'static str,
    folder: &'static str,
    /// File with the line that changes, the text in it, and its replacement.
    change: (&'static str, &'static str, &'static str),
    /// What the page says before and after.
    says: (&'static str, &'static str),
    guest_port: u16,
    /// Where the page is shown, unless another program has that port.
    host_port: u16,
}

const APPS: [App; 2] = [
    App {
        name: "node-express",
        folder: "examples/node-express",
        change: ("server.js", "version = \"1\"", "version = \"2\""),
        says: ("version 1", "version 2"),
        guest_port: 3000,
        host_port: 18080,
    },
    App {
        name: "python-flask",
        folder: "examples/python-flask",
        change: ("app.py", "VERSION = \"1\"", "VERSION = \"2\""),
        says: ("version 1", "version 2"),
        guest_port: 8000,
        host_port: 18081,
    },
];

struct Row {
    what: String,
    built: Value,
    answer_ms: u128,
}

/// Runs the whole demonstration.
pub(crate) fn run(binaries: &Binaries) -> Result<()> {
    run::wait_on_interrupt()?;
    run::heading("set-up: machine image, bases, templates (skips what is there)");
    run::must(
        Command::new(&binaries.kiln)
            .args(["setup", "--recipe", "machine-image", "--guest"])
            .arg(&binaries.guest),
    )?;
    let mut rows = Vec::new();
    for app in &APPS {
        let folder = copy(app)?;
        rows.push(build_and_ask(binaries, app, &folder, "first", app.says.0)?);
        let file = folder.join(app.change.0);
        let text = fs::read_to_string(&file)?;
        if !text.contains(app.change.1) {
            bail!("{} does not contain {:?}", file.display(), app.change.1);
        }
        fs::write(&file, text.replacen(app.change.1, app.change.2, 1))?;
        rows.push(build_and_ask(
            binaries,
            app,
            &folder,
            "one line changed",
            app.says.1,
        )?);
    }
    table(&rows);
    demo_learn::run(binaries)
}

/// A fresh copy of the app below target/, so that the checkout stays as it is.
fn copy(app: &App) -> Result<PathBuf> {
    let to = root().join("target/demo").join(app.name);
    if to.exists() {
        fs::remove_dir_all(&to)?;
    }
    fs::create_dir_all(to.parent().context("a parent")?)?;
    run::must(
        Command::new("cp")
            .arg("-R")
            .arg(root().join(app.folder))
            .arg(&to),
    )?;
    Ok(to)
}

fn build_and_ask(
    binaries: &Binaries,
    app: &App,
    folder: &Path,
    label: &str,
    want: &str,
) -> Result<Row> {
    run::heading(&format!("{}: build ({label})", app.name));
    let built = build(binaries, app, folder)?;
    let reference = built["reference"]
        .as_str()
        .context("the build names no image")?;
    run::heading(&format!("{}: run {reference}", app.name));
    let started = Instant::now();
    let port = free_port(app.host_port)?;
    let mut machine = Running::start(binaries, app, reference, port)?;
    let page = machine.fetch(port)?;
    let answer_ms = started.elapsed().as_millis();
    if !page.contains(want) {
        bail!("the page does not say {want:?}:\n{page}");
    }
    run::say(&format!(
        "   http://127.0.0.1:{port}/ says: {}",
        page.lines().last().unwrap_or_default()
    ));
    Ok(Row {
        what: format!("{} ({label})", app.name),
        built,
        answer_ms,
    })
}

/// This port, or another one that nobody listens on.
fn free_port(wanted: u16) -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", wanted))
        .or_else(|_taken| TcpListener::bind(("127.0.0.1", 0)))
        .context("no port is free on 127.0.0.1")?;
    Ok(listener.local_addr()?.port())
}

/// Builds with live progress on standard error; the last JSON line on standard output is the result.
fn build(binaries: &Binaries, app: &App, folder: &Path) -> Result<Value> {
    let result = root()
        .join("target/demo")
        .join(format!("{}.json", app.name));
    run::must(
        Command::new(&binaries.kiln)
            .arg("build")
            .arg(folder)
            .args(["--tag", &format!("demo-{}", app.name), "--result"])
            .arg(&result),
    )?;
    let text = fs::read_to_string(&result)?;
    serde_json::from_str(&text).context("the result file is not JSON")
}

/// An app that runs. Its words are shown until its page was seen: then it is stopped, which is no news.
struct Running {
    child: Child,
    seen: Arc<AtomicBool>,
    words: Option<JoinHandle<()>>,
}

impl Running {
    fn start(binaries: &Binaries, app: &App, reference: &str, port: u16) -> Result<Self> {
        let publish = format!("{port}:{}", app.guest_port);
        let mut child = Command::new(&binaries.kiln)
            .args(["run", "--image", reference, "-p", &publish])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("could not start kiln run")?;
        let seen = Arc::new(AtomicBool::new(false));
        let words = child.stderr.take().map(|stderr| {
            let seen = Arc::clone(&seen);
            thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    if !seen.load(Ordering::Relaxed) {
                        run::say(&line);
                    }
                }
            })
        });
        Ok(Self { child, seen, words })
    }

    fn fetch(&mut self, port: u16) -> Result<String> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            run::go_on()?;
            if let Some(status) = self.child.try_wait()? {
                bail!("kiln run ended before the app answered: {status}");
            }
            match get(port) {
                Ok(page) => {
                    self.seen.store(true, Ordering::Relaxed);
                    return Ok(page);
                }
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context("the app did not answer in time"));
                }
                Err(_) => std::thread::sleep(ANSWER_POLL),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One interrupt, as a person would press Ctrl-C; then the process is waited for.
        if let Ok(None) = self.child.try_wait() {
            let asked = i32::try_from(self.child.id())
                .ok()
                .and_then(rustix::process::Pid::from_raw)
                .map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::INT));
            if !matches!(asked, Some(Ok(()))) {
                let _ended_already = self.child.kill();
            }
        }
        let _status = self.child.wait();
        let _said = self.words.take().map(JoinHandle::join);
    }
}

fn get(port: u16) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    write!(
        stream,
        "GET / HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
    )?;
    let mut page = String::new();
    stream.take(PAGE_BYTES_MAX).read_to_string(&mut page)?;
    if !page.starts_with("HTTP/1.1 200") && !page.starts_with("HTTP/1.0 200") {
        bail!("answered {:?}", page.lines().next().unwrap_or_default());
    }
    Ok(page)
}

fn table(rows: &[Row]) {
    run::heading("what was built, and how long it took");
    run::say(&format!(
        "{:<34} {:<16} {:>8} {:>8} {:>8} {:>9}  phases (ms)",
        "image", "digest", "size", "steps", "build", "answered"
    ));
    for row in rows {
        let digest = row.built["digest"]
            .as_str()
            .unwrap_or_default()
            .trim_start_matches("sha256:");
        let size = row.built["size"].as_u64().unwrap_or_default();
        let phases: Vec<(String, u64)> = row.built["phases_ms"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|pair| Some((pair[0].as_str()?.to_owned(), pair[1].as_u64()?)))
            .collect();
        let total: u64 = phases.iter().map(|(_, ms)| ms).sum();
        let shown: Vec<String> = phases
            .iter()
            .map(|(name, ms)| format!("{name} {ms}"))
            .collect();
        run::say(&format!(
            "{:<34} {:<16} {:>6.1}MB {:>8} {:>7.1}s {:>8.1}s  {}",
            row.what,
            &digest[..digest.len().min(16)],
            size as f64 / 1e6,
            format!("{}/{}", row.built["cached"][0], row.built["cached"][1]),
            total as f64 / 1e3,
            row.answer_ms as f64 / 1e3,
            shown.join(", ")
        ));
    }
    run::say(
        "\nsteps: found in the cache / all. The images are in kiln's own registry: `kiln registry list`.",
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_passed_over() {
        let held = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let taken = held.local_addr().expect("an address").port();
        assert_ne!(free_port(taken).expect("another"), taken);
    }
}
