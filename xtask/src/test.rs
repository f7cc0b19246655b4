//! `make test`: format, lints, arrows, budgets, docs, then set-up and every test, the real machines included.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{Binaries, docs, layers, root, run, tidy};

/// Where the test suite keeps its machine image, bases and templates.
fn test_home() -> PathBuf {
    root().join("target/test-home")
}

/// Every check and test.
pub(crate) fn all(binaries: &Binaries) -> Result<()> {
    run::wait_on_interrupt()?;
    run::heading("formatting, lints, arrows, budgets");
    run::must(run::cargo().args(["fmt", "--all", "--check"]))?;
    run::must(run::cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ]))?;
    layers::check()?;
    tidy::check()?;
    docs::check(binaries, false)?;
    prepare(binaries)?;
    run::heading("tests");
    counted(tests(binaries).args(["--workspace", "--no-fail-fast"]))
}

/// The end-to-end builds alone.
pub(crate) fn end_to_end(binaries: &Binaries) -> Result<()> {
    prepare(binaries)?;
    counted(tests(binaries).args(["--package", "kiln-cli", "--test", "it"]))
}

/// Runs cargo test, passes its lines on as they come, and closes with the sum of all its binaries.
fn counted(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}");
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("could not start {shown}"))?;
    let stdout = child.stdout.take().context("a pipe")?;
    let (mut passed, mut failed) = (0, 0);
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        if let Some((more_passed, more_failed)) = result_of(&line) {
            passed += more_passed;
            failed += more_failed;
        }
        run::say(&line);
    }
    let status = child.wait()?;
    run::say(&format!("\ntests: {passed} passed, {failed} failed"));
    if !status.success() {
        bail!("{shown} failed: {status}");
    }
    Ok(())
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

fn prepare(binaries: &Binaries) -> Result<()> {
    run::heading(
        "set-up: machine image, bases, shared cache head, templates (kept in target/test-home)",
    );
    run::must(
        Command::new(&binaries.kiln)
            .args(["setup", "--recipe", "machine-image", "--guest"])
            .arg(&binaries.guest)
            .env("KILN_HOME", test_home()),
    )
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
    }
}
