//! Every metric and span name, log set-up and trace context, in one place.
//!
//! No exporter for OpenTelemetry: spans carry W3C ids in the JSON logs ([`trace`]), and a collector can read them there.

mod logs;
pub mod metrics;
pub mod trace;

pub use logs::{LogFormat, init_logs};

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
