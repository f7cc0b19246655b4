//! `make test`: format, lints, arrows, budgets, docs, then set-up and every test, the real machines included.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::{Binaries, docs, layers, root, run, tidy};

/// Where the test suite keeps its machine image, bases and templates.
fn test_home() -> PathBuf {
    root().join("target/test-home")
}

/// Every check and test.
pub(crate) fn all(binaries: &Binaries) -> Result<()> {
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
    run::must(tests(binaries).args(["--workspace"]))
}

/// The end-to-end builds alone.
pub(crate) fn end_to_end(binaries: &Binaries) -> Result<()> {
    prepare(binaries)?;
    run::must(tests(binaries).args(["--package", "kiln-cli", "--test", "it"]))
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
