//! Starts other programs and says what happens.

#![expect(
    clippy::print_stdout,
    reason = "an xtask talks to the person who ran it"
)]

use std::process::Command;

use anyhow::{Context, Result, bail};

/// The cargo that runs this, so that a toolchain override holds.
pub(crate) fn cargo() -> Command {
    #[expect(
        clippy::disallowed_methods,
        reason = "cargo tells its own path this way"
    )]
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    Command::new(cargo)
}

/// Prints a line.
pub(crate) fn say(text: &str) {
    println!("{text}");
}

/// Prints a heading.
pub(crate) fn heading(text: &str) {
    println!("\n== {text}");
}

/// Runs a command and fails when it fails.
pub(crate) fn must(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}");
    let status = command
        .status()
        .with_context(|| format!("could not start {shown}"))?;
    if !status.success() {
        bail!("{shown} failed: {status}");
    }
    Ok(())
}

/// Runs a command and gives its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let output = command
        .stderr(std::process::Stdio::inherit())
        .output()
        .with_context(|| format!("could not start {shown}"))?;
    if !output.status.success() {
        bail!("{shown} failed: {}", output.status);
    }
    String::from_utf8(output.stdout).context("the output is not UTF-8")
}
