//! The private door `/metrics`, and what the controller's rows mean as metrics. Names and labels are `kiln_telemetry::metrics`'s.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use kiln_core::dispatch::WorkerState;
use kiln_core::{Outcome, PendingReason, PoolName};
use kiln_db::PoolRows;
use kiln_telemetry::metrics::{CONTENT_TYPE, Metrics, QueueNow};
use kiln_telemetry::span;

/// `GET /metrics`, for a listener of its own: loopback, unless the operator says otherwise. It asks for no token.
pub fn router(metrics: Metrics) -> Router {
    Router::new()
        .route("/metrics", get(show))
        .with_state(metrics)
}

async fn show(State(metrics): State<Metrics>) -> Response {
    let headers = [
        (header::CONTENT_TYPE, CONTENT_TYPE),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, metrics.render()).into_response()
}

/// What was seen of each pool last: the metrics are their sums, because no label names a pool. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct PoolsNow(Arc<Mutex<BTreeMap<PoolName, QueueNow>>>);

impl PoolsNow {
    /// Its queue and workers as the scheduler has just seen them.
    pub fn observe(&self, metrics: &Metrics, pool: &PoolName, rows: &PoolRows) {
        let mut pools = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pools.insert(pool.clone(), queue_now(rows));
        metrics.queue(&sum(pools.values()));
    }
}

fn sum<'a>(pools: impl Iterator<Item = &'a QueueNow>) -> QueueNow {
    let mut all = QueueNow::default();
    let mut pending: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut workers: BTreeMap<&'static str, (WorkerState, u64)> = BTreeMap::new();
    for one in pools {
        all.oldest_seconds = all.oldest_seconds.max(one.oldest_seconds);
        all.running += one.running;
        for (code, count) in &one.pending {
            *pending.entry(code).or_default() += count;
        }
        for (state, count) in &one.workers {
            workers.entry(state.name()).or_insert((*state, 0)).1 += count;
        }
    }
    all.pending = pending.into_iter().collect();
    all.workers = workers.into_values().collect();
    all
}

/// `pending` of the rows may be fewer than wait: those beyond count as [`PendingReason::Behind`], because that is why they were not
/// looked at.
fn queue_now(rows: &PoolRows) -> QueueNow {
    let mut pending: BTreeMap<&'static str, u64> = BTreeMap::new();
    for job in &rows.pending {
        *pending.entry(job.reason.code()).or_default() += 1;
    }
    let seen = u64::try_from(rows.pending.len()).unwrap_or(u64::MAX);
    let behind = PendingReason::Behind { jobs: 0 }.code();
    *pending.entry(behind).or_default() += u64::from(rows.pending_total).saturating_sub(seen);
    let oldest = rows.pending.iter().map(|job| job.created_unix_ms).min();
    let waited = oldest.map_or(0, |since| rows.now_unix_ms.saturating_sub(since));
    let mut workers: BTreeMap<&'static str, (WorkerState, u64)> = BTreeMap::new();
    for (worker, _) in &rows.workers {
        let entry = workers.entry(worker.state.name());
        entry.or_insert((worker.state, 0)).1 += 1;
    }
    QueueNow {
        oldest_seconds: seconds(waited),
        pending: pending.into_iter().collect(),
        running: u64::try_from(rows.held.len()).unwrap_or(u64::MAX),
        workers: workers.into_values().collect(),
    }
}

/// What a worker tells of its machine's gateway, as far as it is counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Deserialize)]
#[serde(default)]
pub struct Egress {
    bytes_out: u64,
    bytes_in: u64,
    decisions: Decisions,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Deserialize)]
#[serde(default)]
struct Decisions {
    allowed: u64,
    narrowed: u64,
    host: u64,
    port: u64,
    address: u64,
    name: u64,
    git: u64,
    unreachable: u64,
}

impl Egress {
    /// Of an attempt's report; nothing where it does not say.
    #[must_use]
    pub fn told(report: &serde_json::Value) -> Self {
        let egress = report.pointer("/measured/egress").cloned();
        let read = egress.and_then(|egress| serde_json::from_value(egress).ok());
        read.unwrap_or_default()
    }
}

/// Most decisions of one kind that one attempt counts for: a worker's word has an end.
const EGRESS_DECISIONS_MAX: u64 = 1_000_000;
/// Most bytes of one direction that one attempt counts for: a day at 100 Gbit/s.
const EGRESS_BYTES_MAX: u64 = 1 << 50;

/// A machine's gateway decided.
pub fn observe_egress(metrics: &Metrics, told: &Egress) {
    let said = told.decisions;
    for (verdict, reason, count) in [
        (
            "allowed",
            "rule",
            said.allowed.saturating_sub(said.narrowed),
        ),
        ("allowed", "narrowed", said.narrowed),
        ("refused", "host", said.host),
        ("refused", "port", said.port),
        ("refused", "address", said.address),
        ("refused", "name", said.name),
        ("refused", "git", said.git),
        ("failed", "unreachable", said.unreachable),
    ] {
        metrics.egress(verdict, reason, count.min(EGRESS_DECISIONS_MAX));
    }
    let bytes = |told: u64| told.min(EGRESS_BYTES_MAX);
    metrics.egress_bytes(bytes(told.bytes_out), bytes(told.bytes_in));
}

/// An attempt ended. `runtime` is the language runtime of an image build, as it was planned; none for a run, which counts in the
/// phases alone.
pub fn observe_end(metrics: &Metrics, runtime: Option<&str>, outcome: &Outcome) {
    if let Some(runtime) = runtime {
        let total: u64 = outcome.phases_ms.iter().map(|(_, ms)| ms).sum();
        metrics.build_ended(runtime, &outcome.verdict, seconds(total));
    }
    for (phase, ms) in &outcome.phases_ms {
        match phase.as_str() {
            span::MACHINE => metrics.booted(seconds(*ms)),
            span::PUSH => metrics.pushed(seconds(*ms)),
            _ => {}
        }
    }
}

/// A job got its lease: `created` when it came, `ready` when it might run, `now`, all milliseconds since the Unix epoch. `at_once` when a worker
/// had room for it all the time, so that the wait was ours alone.
pub fn observe_lease(metrics: &Metrics, created: u64, ready: u64, now: u64, at_once: bool) {
    metrics.waited(seconds(now.saturating_sub(created)));
    if at_once {
        metrics.picked_up(seconds(now.saturating_sub(ready)));
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "milliseconds of a wait are far below the 53 bits that stay exact"
)]
fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use kiln_core::{FailureClass, Verdict};
    use kiln_telemetry::metrics::Prefix;
    use tower::ServiceExt as _;

    use super::*;

    #[test]
    fn pools_are_summed() {
        let one = QueueNow {
            oldest_seconds: 3.0,
            pending: vec![("behind", 2), ("quota", 1)],
            running: 4,
            workers: vec![(WorkerState::Active, 2)],
        };
        let other = QueueNow {
            oldest_seconds: 9.0,
            pending: vec![("quota", 5)],
            running: 1,
            workers: vec![(WorkerState::Active, 1), (WorkerState::Draining, 1)],
        };
        let both = sum([&one, &other].into_iter());
        assert_eq!((both.oldest_seconds, both.running), (9.0, 5));
        assert_eq!(both.pending, [("behind", 2), ("quota", 6)]);
        assert_eq!(
            both.workers,
            [(WorkerState::Active, 3), (WorkerState::Draining, 1)]
        );
    }

    #[tokio::test]
    async fn the_door_shows_what_was_observed() {
        let metrics = Metrics::new(Prefix::Hypeman, "1");
        let outcome = Outcome {
            verdict: Verdict::Failed {
                class: FailureClass::Timeout,
                message: String::new(),
                hint: None,
                command_code: None,
                reason: None,
            },
            phases_ms: vec![("machine".to_owned(), 120), ("build".to_owned(), 880)],
        };
        observe_end(&metrics, Some("node"), &outcome);
        observe_lease(&metrics, 1_000, 2_000, 2_040, true);
        let request = http::Request::get("/metrics").body(axum::body::Body::empty());
        let answer = router(metrics).oneshot(request.expect("legal")).await;
        let answer = answer.expect("infallible");
        assert_eq!(answer.headers()[header::CONTENT_TYPE], CONTENT_TYPE);
        let body = axum::body::to_bytes(answer.into_body(), 1 << 22).await;
        let text = String::from_utf8(body.expect("whole").to_vec()).expect("text");
        for line in [
            "hypeman_build_duration_seconds_sum{runtime=\"node\",status=\"timeout\"} 1.0",
            "hypeman_build_vm_boot_seconds_sum 0.12",
            "hypeman_build_queue_wait_seconds_sum 1.04",
            "hypeman_pickup_seconds_sum 0.04",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
