//! Every metric and span name, and log set-up, in one place. Exporters arrive with the control plane.

use tracing_subscriber::EnvFilter;

/// Names of spans: one per phase of an attempt.
pub mod span {
    /// Waiting for room on the host.
    pub const QUEUE: &str = "queue";
    /// From launch to a re-identified guest.
    pub const MACHINE: &str = "machine";
    /// Sending the source tree.
    pub const SOURCE: &str = "source";
    /// BuildKit at work.
    pub const BUILD: &str = "build";
    /// Pushing into quarantine.
    pub const PUSH: &str = "push";
    /// Reading and checking what was pushed.
    pub const VERIFY: &str = "verify";
    /// Committing the cache head.
    pub const COMMIT: &str = "commit";
    /// A user's command.
    pub const RUN: &str = "run";
}

/// How logs are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people, on standard error.
    Text,
    /// One JSON object a line, on standard error.
    Json,
}

/// Sets up logging for this process. `verbosity` 0 shows warnings, 1 information, 2 and more debugging.
/// A second call does nothing.
pub fn init_logs(format: LogFormat, verbosity: u8) {
    let level = match verbosity {
        0 => "error",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("KILN_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let _already_set = match format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}
