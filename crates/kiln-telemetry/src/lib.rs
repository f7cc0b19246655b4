//! Every metric and span name, log set-up and trace context, in one place.
//!
//! Spans carry W3C ids in the JSON logs ([`trace`]), and go to a collector where the operator names one ([`otlp`]).

mod logs;
pub mod metrics;
pub mod otlp;
pub mod trace;

pub use logs::{Kind, LogFormat, init_logs};

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
    /// Waiting for whoever attends a command, and what comes before that command.
    pub const ATTEND: &str = "attend";
    /// A user's command.
    pub const RUN: &str = "run";
    /// Reading the files that a command left.
    pub const COLLECT: &str = "collect";
    /// Sending them to the controller.
    pub const ARTIFACTS: &str = "artifacts";
    /// Sending an image to the controller.
    pub const PUBLISH: &str = "publish";
}
