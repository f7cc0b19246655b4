//! Starts other programs and says what happens.

#![expect(
    clippy::print_stdout,
    reason = "an xtask talks to the person who ran it"
)]

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use anyhow::{Context, Result, bail};

/// Set by Ctrl-C once [`wait_on_interrupt`] was called.
static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// What this person stopped, which is no failure of it.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stopped; start it again to go on from here")
    }
}

impl std::error::Error for Interrupted {}

/// From now on Ctrl-C does not end this program: what it started gets Ctrl-C too, cleans up in its own way and is waited for.
pub(crate) fn wait_on_interrupt() -> Result<()> {
    signal_hook::flag::register(signal_hook::consts::SIGINT, INTERRUPTED.clone())
        .context("could not watch for Ctrl-C")?;
    Ok(())
}

/// Fails once Ctrl-C was pressed.
pub(crate) fn go_on() -> Result<()> {
    match INTERRUPTED.load(Ordering::Relaxed) {
        true => Err(Interrupted.into()),
        false => Ok(()),
    }
}

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
    go_on()?;
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
