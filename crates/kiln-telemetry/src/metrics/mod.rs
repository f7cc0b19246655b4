//! Metrics of a controller. Every name and every label value is written down here.
//!
//! All label sets exist from the start, at 0, because an alert on a series that does not exist is silent. No label value comes from
//! a request: what is not known is `other`. Text is OpenMetrics 1.0.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64};

use kiln_core::dispatch::WorkerState;
use kiln_core::{FailureClass, PendingReason, Verdict};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

/// Verdicts of a machine's gateway, each with its reasons.
pub const EGRESS_REASONS: [(&str, &str); 8] = [
    ("allowed", "rule"),
    ("allowed", "narrowed"),
    ("refused", "host"),
    ("refused", "port"),
    ("refused", "address"),
    ("refused", "name"),
    ("refused", "git"),
    ("failed", "unreachable"),
];

/// Type of the text, for the header `content-type`.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Language runtimes that have a label value of their own.
pub const RUNTIMES: [&str; 9] = [
    "node",
    "python",
    "go",
    "ruby",
    "rust",
    "java",
    "php",
    "dockerfile",
    "other",
];
/// How a job ended: passed, or the class of its failure.
pub const STATUSES: [&str; 10] = [
    "passed",
    "user",
    "usage",
    "timeout",
    "out_of_memory",
    "policy",
    "guest_fault",
    "infrastructure",
    "lost",
    "cancelled",
];
/// Where something was found in the cache, or looked for.
pub const CACHE_TIERS: [&str; 3] = ["shared", "tenant", "registry"];
/// Doors that callers come through.
pub const DOORS: [&str; 5] = ["user", "worker", "registry", "metrics", "controller"];
/// Where the secrets of jobs come from.
pub const SECRET_SOURCES: [&str; 2] = ["request", "store"];
/// What became of a try to deliver a webhook.
pub const WEBHOOK_RESULTS: [&str; 4] = ["delivered", "failed", "refused", "dead"];
/// What a worker may be, for the gauge of workers.
const WORKER_STATES: [WorkerState; 5] = [
    WorkerState::Active,
    WorkerState::Draining,
    WorkerState::Cordoned,
    WorkerState::Quarantined,
    WorkerState::Lost,
];

/// From an identical build again to the longest build.
const LONG: [f64; 12] = [
    0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0,
];
/// From a decision at once to a host that is full for an hour.
const WAIT: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0,
];
/// From a clone with KVM to a cold boot without.
const BOOT: [f64; 10] = [0.01, 0.03, 0.05, 0.1, 0.15, 0.3, 1.0, 2.5, 5.0, 15.0];

type One = [(&'static str, &'static str); 1];
type Two = [(&'static str, &'static str); 2];

#[derive(Clone)]
struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

/// First word of every name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Prefix {
    /// `kiln`.
    #[default]
    Kiln,
    /// `hypeman`, for dashboards made for it.
    Hypeman,
}

impl Prefix {
    /// The word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kiln => "kiln",
            Self::Hypeman => "hypeman",
        }
    }
}

/// Why a text is no prefix.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("metrics.prefix must be kiln or hypeman")]
pub struct ParsePrefixError;

impl std::str::FromStr for Prefix {
    type Err = ParsePrefixError;

    fn from_str(text: &str) -> Result<Self, ParsePrefixError> {
        [Self::Kiln, Self::Hypeman]
            .into_iter()
            .find(|prefix| prefix.as_str() == text)
            .ok_or(ParsePrefixError)
    }
}

/// The queue at one moment.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct QueueNow {
    /// How long the job that waits longest has waited, seconds; 0 when none waits.
    pub oldest_seconds: f64,
    /// Jobs that wait, by [`PendingReason::code`].
    pub pending: Vec<(&'static str, u64)>,
    /// Jobs that have a worker.
    pub running: u64,
    /// Workers, by state.
    pub workers: Vec<(WorkerState, u64)>,
}

type GaugeF = Gauge<f64, AtomicU64>;
type GaugeI = Gauge<i64, AtomicI64>;

struct Inner {
    registry: Registry,
    duration: Family<Two, Histogram, Buckets>,
    cache: Family<Two, Counter>,
    wait: Histogram,
    boot: Histogram,
    push: Histogram,
    pickup: Histogram,
    queue_age: GaugeF,
    queue_depth: GaugeI,
    running: GaugeI,
    pending: Family<One, GaugeI>,
    workers: Family<One, GaugeI>,
    failing: GaugeI,
    pipeline_failures: Counter,
    spans_dropped: Counter,
    lease_expiries: Counter,
    orphans: Counter,
    retries: Counter,
    access: Family<Two, Counter>,
    webhooks: Family<One, Counter>,
    webhook_backlog: GaugeI,
    secrets: Family<Two, Counter>,
    log_bytes: Counter,
    logs_truncated: Counter,
    egress: Family<Two, Counter>,
    egress_bytes: Family<One, Counter>,
}

/// The metrics of one controller. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Inner {
    fn new(prefix: Prefix, version: &str) -> Self {
        Self {
            registry: Registry::with_prefix(prefix.as_str()),
            duration: Family::new_with_constructor(Buckets(&LONG)),
            cache: Family::default(),
            wait: Histogram::new(WAIT),
            boot: Histogram::new(BOOT),
            push: Histogram::new(LONG),
            pickup: Histogram::new(WAIT),
            queue_age: Gauge::default(),
            queue_depth: Gauge::default(),
            running: Gauge::default(),
            pending: Family::default(),
            workers: Family::default(),
            failing: Gauge::default(),
            pipeline_failures: Counter::default(),
            spans_dropped: Counter::default(),
            lease_expiries: Counter::default(),
            orphans: Counter::default(),
            retries: Counter::default(),
            access: Family::default(),
            webhooks: Family::default(),
            webhook_backlog: Gauge::default(),
            secrets: Family::default(),
            log_bytes: Counter::default(),
            logs_truncated: Counter::default(),
            egress: Family::default(),
            egress_bytes: Family::default(),
        }
        .with_names(version)
        .with_zeroes()
    }

    fn with_names(mut self, version: &str) -> Self {
        let r = &mut self.registry;
        // The registry ends each help with a full stop, and a counter's name with _total.
        r.register(
            "build_duration_seconds",
            "Time from the start of an image build's attempt to its end, by runtime and status",
            self.duration.clone(),
        );
        r.register(
            "build_cache_hits",
            "Build steps looked up in the cache, by result and tier",
            self.cache.clone(),
        );
        r.register(
            "build_queue_wait_seconds",
            "Time a job waited for a worker",
            self.wait.clone(),
        );
        r.register(
            "build_vm_boot_seconds",
            "Time from the launch of a machine to a guest that is ready",
            self.boot.clone(),
        );
        r.register(
            "build_push_duration_seconds",
            "Time an image took into the registry",
            self.push.clone(),
        );
        r.register(
            "pickup_seconds",
            "Time from a job being ready to its lease, workers with room being there",
            self.pickup.clone(),
        );
        r.register(
            "queue_age_seconds",
            "How long the job that waits longest has waited",
            self.queue_age.clone(),
        );
        r.register("queue_depth", "Jobs that wait", self.queue_depth.clone());
        r.register(
            "jobs_running",
            "Jobs that have a worker",
            self.running.clone(),
        );
        r.register(
            "jobs_pending",
            "Jobs that wait, by the reason they wait for",
            self.pending.clone(),
        );
        r.register("workers", "Workers, by state", self.workers.clone());
        r.register(
            "lease_expiries",
            "Leases that ended because their worker was silent",
            self.lease_expiries.clone(),
        );
        r.register(
            "machine_orphans",
            "Machines found without a lease and destroyed",
            self.orphans.clone(),
        );
        self.with_names_of_doors(version)
    }

    /// What goes in and out: connections, callers, webhooks, secrets, logs.
    fn with_names_of_doors(mut self, version: &str) -> Self {
        let r = &mut self.registry;
        r.register(
            "egress_decisions",
            "Decisions of machines' gateways, by verdict and reason",
            self.egress.clone(),
        );
        r.register(
            "egress_bytes",
            "Bytes of machines' connections, by direction as the machine sees it",
            self.egress_bytes.clone(),
        );
        r.register(
            "job_retries",
            "Attempts after the first",
            self.retries.clone(),
        );
        r.register(
            "access",
            "Attempts to get in, by door and result",
            self.access.clone(),
        );
        r.register(
            "webhook_deliveries",
            "Tries to deliver webhooks, by result",
            self.webhooks.clone(),
        );
        r.register(
            "secret_reads",
            "Secrets that workers asked for, by where they come from and result",
            self.secrets.clone(),
        );
        r.register(
            "webhook_backlog",
            "Webhooks that are taken and not delivered yet",
            self.webhook_backlog.clone(),
        );
        r.register(
            "log_bytes",
            "Bytes of log that were taken from workers",
            self.log_bytes.clone(),
        );
        r.register(
            "logs_truncated",
            "Logs that were cut at their limit",
            self.logs_truncated.clone(),
        );
        let build = Info::new([("version", version.to_owned())]);
        r.register("build", "The program that is running", build);
        self.with_names_of_signs()
    }

    /// What an operator is to look at.
    fn with_names_of_signs(mut self) -> Self {
        let r = &mut self.registry;
        r.register(
            "pipelines_failing",
            "Pipelines whose last three builds or more have failed",
            self.failing.clone(),
        );
        r.register(
            "pipeline_failures",
            "Pipelines that came to three failed builds in a row",
            self.pipeline_failures.clone(),
        );
        r.register(
            "spans_dropped",
            "Spans that found no room or no collector",
            self.spans_dropped.clone(),
        );
        self
    }

    fn with_zeroes(self) -> Self {
        for runtime in RUNTIMES {
            for status in STATUSES {
                let labels = [("runtime", runtime), ("status", status)];
                drop(self.duration.get_or_create(&labels));
            }
        }
        for (verdict, reason) in EGRESS_REASONS {
            drop(
                self.egress
                    .get_or_create(&[("verdict", verdict), ("reason", reason)]),
            );
        }
        for direction in ["in", "out"] {
            drop(self.egress_bytes.get_or_create(&[("direction", direction)]));
        }
        for tier in CACHE_TIERS {
            for result in ["hit", "miss"] {
                drop(
                    self.cache
                        .get_or_create(&[("result", result), ("tier", tier)]),
                );
            }
        }
        for reason in PendingReason::CODES {
            drop(self.pending.get_or_create(&[("reason", reason)]));
        }
        for state in WORKER_STATES {
            drop(self.workers.get_or_create(&[("state", state.name())]));
        }
        for door in DOORS {
            for result in ["allowed", "denied"] {
                drop(
                    self.access
                        .get_or_create(&[("door", door), ("result", result)]),
                );
            }
        }
        for from in SECRET_SOURCES {
            for result in ["allowed", "denied"] {
                let labels = [("from", from), ("result", result)];
                drop(self.secrets.get_or_create(&labels));
            }
        }
        for result in WEBHOOK_RESULTS {
            drop(self.webhooks.get_or_create(&[("result", result)]));
        }
        self
    }
}

impl Metrics {
    /// All metrics, at 0.
    #[must_use]
    pub fn new(prefix: Prefix, version: &str) -> Self {
        Self {
            inner: Arc::new(Inner::new(prefix, version)),
        }
    }

    /// Everything as text of type [`CONTENT_TYPE`].
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing into a string cannot fail; half a text would be worse than none.
        match prometheus_client::encoding::text::encode(&mut text, &self.inner.registry) {
            Ok(()) => text,
            Err(fmt::Error) => String::new(),
        }
    }

    /// An image build's attempt ended.
    pub fn build_ended(&self, runtime: &str, verdict: &Verdict, seconds: f64) {
        let labels = [
            ("runtime", known(&RUNTIMES, runtime)),
            ("status", status_of(verdict)),
        ];
        self.inner.duration.get_or_create(&labels).observe(seconds);
    }

    /// Steps were looked up in the cache.
    pub fn cache(&self, hit: bool, tier: &str, steps: u64) {
        let Some(tier) = CACHE_TIERS.into_iter().find(|known| *known == tier) else {
            return;
        };
        let labels = [("result", if hit { "hit" } else { "miss" }), ("tier", tier)];
        self.inner.cache.get_or_create(&labels).inc_by(steps);
    }

    /// A job has got a worker after this long.
    pub fn waited(&self, seconds: f64) {
        self.inner.wait.observe(seconds);
    }

    /// A job that was ready, with room for it, was leased after this long.
    pub fn picked_up(&self, seconds: f64) {
        self.inner.pickup.observe(seconds);
    }

    /// A machine became ready after this long.
    pub fn booted(&self, seconds: f64) {
        self.inner.boot.observe(seconds);
    }

    /// An image was pushed in this long.
    pub fn pushed(&self, seconds: f64) {
        self.inner.push.observe(seconds);
    }

    /// What the queue and the workers are now.
    pub fn queue(&self, now: &QueueNow) {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let inner = &self.inner;
        inner.queue_age.set(now.oldest_seconds);
        inner.running.set(number(now.running));
        let mut depth = 0;
        for reason in PendingReason::CODES {
            let count = now.pending.iter().filter(|(code, _)| *code == reason);
            let count = count.map(|(_, n)| n).sum::<u64>();
            depth += count;
            let gauge = inner.pending.get_or_create(&[("reason", reason)]);
            gauge.set(number(count));
        }
        inner.queue_depth.set(number(depth));
        for state in WORKER_STATES {
            let count = now.workers.iter().filter(|(at, _)| *at == state);
            let gauge = inner.workers.get_or_create(&[("state", state.name())]);
            gauge.set(number(count.map(|(_, n)| n).sum()));
        }
    }

    /// This many pipelines have failed three times in a row or more.
    pub fn failing_pipelines(&self, count: u64) {
        self.inner
            .failing
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// A pipeline came to three failed builds in a row.
    pub fn pipeline_failed(&self) {
        self.inner.pipeline_failures.inc();
    }

    /// Spans were dropped.
    pub fn spans_dropped(&self, count: u64) {
        self.inner.spans_dropped.inc_by(count);
    }

    /// Leases ended in silence.
    pub fn leases_expired(&self, count: u64) {
        self.inner.lease_expiries.inc_by(count);
    }

    /// Machines without a lease were destroyed.
    pub fn orphans(&self, count: u64) {
        self.inner.orphans.inc_by(count);
    }

    /// A machine's gateway decided so often, for this reason: a pair of [`EGRESS_REASONS`]; others are not counted.
    pub fn egress(&self, verdict: &str, reason: &str, count: u64) {
        let known = EGRESS_REASONS
            .into_iter()
            .find(|known| *known == (verdict, reason));
        if let Some((verdict, reason)) = known {
            let labels = [("verdict", verdict), ("reason", reason)];
            self.inner.egress.get_or_create(&labels).inc_by(count);
        }
    }

    /// Bytes of a machine's connections.
    pub fn egress_bytes(&self, out: u64, into: u64) {
        for (direction, bytes) in [("out", out), ("in", into)] {
            let labels = [("direction", direction)];
            self.inner.egress_bytes.get_or_create(&labels).inc_by(bytes);
        }
    }

    /// A job is tried again.
    pub fn retried(&self) {
        self.inner.retries.inc();
    }

    /// Somebody came to a door of [`DOORS`].
    pub fn access(&self, door: &'static str, allowed: bool) {
        let result = if allowed { "allowed" } else { "denied" };
        if DOORS.contains(&door) {
            let labels = [("door", door), ("result", result)];
            self.inner.access.get_or_create(&labels).inc();
        }
    }

    /// A worker asked for a secret of its job, of one of [`SECRET_SOURCES`].
    pub fn secret_read(&self, from: &'static str, allowed: bool) {
        let result = if allowed { "allowed" } else { "denied" };
        if SECRET_SOURCES.contains(&from) {
            let labels = [("from", from), ("result", result)];
            self.inner.secrets.get_or_create(&labels).inc();
        }
    }

    /// A try to deliver a webhook ended as one of [`WEBHOOK_RESULTS`].
    pub fn webhook(&self, result: &'static str) {
        if WEBHOOK_RESULTS.contains(&result) {
            let labels = [("result", result)];
            self.inner.webhooks.get_or_create(&labels).inc();
        }
    }

    /// Webhooks that are taken and not delivered yet.
    pub fn webhook_backlog(&self, count: usize) {
        self.inner
            .webhook_backlog
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Bytes of log were taken.
    pub fn logged(&self, bytes: u64) {
        self.inner.log_bytes.inc_by(bytes);
    }

    /// A log was cut at its limit.
    pub fn log_truncated(&self) {
        self.inner.logs_truncated.inc();
    }
}

/// The label value of a verdict.
#[must_use]
pub fn status_of(verdict: &Verdict) -> &'static str {
    let Verdict::Failed { class, .. } = verdict else {
        return "passed";
    };
    match class {
        FailureClass::User => "user",
        FailureClass::Usage => "usage",
        FailureClass::Timeout => "timeout",
        FailureClass::OutOfMemory => "out_of_memory",
        FailureClass::Policy => "policy",
        FailureClass::GuestFault => "guest_fault",
        FailureClass::Infrastructure => "infrastructure",
        FailureClass::Lost => "lost",
        FailureClass::Cancelled => "cancelled",
    }
}

fn known(list: &'static [&'static str], value: &str) -> &'static str {
    list.iter()
        .find(|known| **known == value)
        .copied()
        .unwrap_or("other")
}

/// The label sets are ordinary label sets.
const _: fn() = || {
    fn is<T: EncodeLabelSet>() {}
    is::<One>();
    is::<Two>();
};

#[cfg(test)]
mod tests;
