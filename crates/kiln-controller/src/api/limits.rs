//! What one token, tenant or stranger may use of this server at a time: requests, uploads, followers, rows of the audit trail.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln_core::access::Ceiling;
use kiln_core::job::Limits;
use kiln_core::{ByteSize, JobKind};
use kiln_db::Retention;

use crate::secret_stores::SecretStores;
use crate::webhooks::ReceiverPolicy;

/// Disk of a build that asks for none: what a common app's layers and its share of the cache take, so that a small worker has room for it.
const BUILD_DISK: ByteSize = ByteSize::gib(8);
/// Disk of a run that asks for none.
const RUN_DISK: ByteSize = ByteSize::gib(1);
/// Buckets that are remembered; a full one more is forgotten first.
const BUCKETS_MAX: usize = 10_000;

/// Longest time for which a machine may stay when its job is over.
const STAYS_MAX_MS: u64 = 24 * 3600 * 1000;
/// How long one stays whose job does not say.
const STAYS_DEFAULT_MS: u64 = 3600 * 1000;
/// Machines that one tenant may keep.
const KEPT_PER_TENANT: u32 = 16;

/// Bounds of machines that stay when their jobs are over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeptBounds {
    /// Milliseconds for which one stays whose job does not say.
    pub stays_default_ms: u64,
    /// Milliseconds for which one may stay, at most a day.
    pub stays_max_ms: u64,
    /// Machines that one tenant may keep at a time.
    pub tenant_max: u32,
    /// Ways to one machine that are open at a time: commands, copies, connections.
    pub ways_max: u32,
    /// Longest time without a byte on such a way.
    pub idle: Duration,
}

impl Default for KeptBounds {
    fn default() -> Self {
        Self {
            stays_default_ms: STAYS_DEFAULT_MS,
            stays_max_ms: STAYS_MAX_MS,
            tenant_max: KEPT_PER_TENANT,
            ways_max: 32,
            idle: Duration::from_secs(3600),
        }
    }
}

/// Bounds of the public API.
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// The most that a request may ask for.
    pub ceiling: Ceiling,
    /// What it gets when it asks for nothing; of the disk, a run gets [`ApiConfig::run_disk`].
    pub default_limits: Limits,
    /// Disk of a run that asks for none: its files live in memory, an image it runs is the host's.
    pub run_disk: ByteSize,
    /// Largest uploaded source, bytes.
    pub source_max: u64,
    /// Requests per second of one token, in the long run.
    pub requests_per_s: u32,
    /// Requests of one token at once.
    pub requests_burst: u32,
    /// Requests of one token that are open at the same time, its followers included.
    pub open_per_token: u32,
    /// Uploads of one tenant at a time.
    pub uploads_per_tenant: u32,
    /// Followers (events, logs) of one tenant at a time.
    pub followers_per_tenant: u32,
    /// Time between two signs of life to a follower.
    pub heartbeat: Duration,
    /// Longest time until a request is answered; followers and bodies aside.
    pub request_timeout: Duration,
    /// Longest time without a byte of a request's body.
    pub body_stall: Duration,
    /// Hosts that this server is called by, beside addresses; empty means any. Keeps pages of other sites from reaching it.
    pub hosts: Vec<String>,
    /// Where webhooks may go.
    pub receivers: ReceiverPolicy,
    /// How long finished jobs are kept, of tenants that have no rule of their own.
    pub retention: Retention,
    /// Stores of other makers that hold secrets.
    pub secret_stores: SecretStores,
    /// The operator's grants, `policy.toml`: read for each submission. None: any named host, nothing open, no learning.
    pub grants: Option<PathBuf>,
    /// Machines that stay when their jobs are over.
    pub kept: KeptBounds,
}

impl Default for ApiConfig {
    fn default() -> Self {
        let ceiling = Ceiling::default();
        Self {
            default_limits: Limits {
                cpus: 2,
                memory: ByteSize::gib(4),
                disk: BUILD_DISK,
                timeout_ms: 1_800_000,
            },
            run_disk: RUN_DISK,
            ceiling,
            source_max: 1 << 30,
            requests_per_s: 50,
            requests_burst: 200,
            open_per_token: 2_500,
            uploads_per_tenant: 8,
            followers_per_tenant: 2_000,
            heartbeat: Duration::from_secs(15),
            request_timeout: Duration::from_secs(30),
            body_stall: Duration::from_secs(20),
            hosts: Vec::new(),
            receivers: ReceiverPolicy::default(),
            retention: Retention::default(),
            secret_stores: SecretStores::default(),
            grants: None,
            kept: KeptBounds::default(),
        }
    }
}

impl ApiConfig {
    /// What a job of this kind gets when it asks for nothing.
    #[must_use]
    pub fn defaults(&self, kind: &JobKind) -> Limits {
        let disk = match kind {
            JobKind::Run(_) => self.run_disk,
            JobKind::SourceBuild(_) | JobKind::ImageBuild(_) => self.default_limits.disk,
        };
        Limits {
            disk,
            ..self.default_limits
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

/// Token buckets by name.
#[derive(Debug)]
pub(crate) struct Rates {
    per_s: f64,
    burst: f64,
    buckets: Mutex<HashMap<String, Bucket>>,
}

impl Rates {
    pub(crate) fn new(per_s: u32, burst: u32) -> Self {
        Self {
            per_s: f64::from(per_s),
            burst: f64::from(burst.max(1)),
            buckets: Mutex::new(HashMap::new()),
        }
    }

    /// Takes one, if there is one.
    pub(crate) fn take(&self, name: &str, now: Instant) -> bool {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= BUCKETS_MAX && !buckets.contains_key(name) {
            let full = |bucket: &Bucket| {
                bucket.left + now.duration_since(bucket.at).as_secs_f64() * self.per_s >= self.burst
            };
            buckets.retain(|_, bucket| !full(bucket));
            if buckets.len() >= BUCKETS_MAX {
                return false;
            }
        }
        let bucket = buckets.entry(name.to_owned()).or_insert(Bucket {
            left: self.burst,
            at: now,
        });
        let grown = now.saturating_duration_since(bucket.at).as_secs_f64() * self.per_s;
        bucket.left = (bucket.left + grown).min(self.burst);
        bucket.at = now;
        if bucket.left < 1.0 {
            return false;
        }
        bucket.left -= 1.0;
        true
    }
}

/// Counts what each tenant or token has open.
#[derive(Debug)]
pub(crate) struct Slots {
    most: u32,
    open: Mutex<HashMap<String, u32>>,
}

/// One slot; given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Arc<Slots>,
    name: String,
}

impl Slots {
    pub(crate) fn new(most: u32) -> Arc<Self> {
        Arc::new(Self {
            most,
            open: Mutex::new(HashMap::new()),
        })
    }

    pub(crate) fn take(self: &Arc<Self>, name: &str) -> Option<Slot> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(name.to_owned()).or_insert(0);
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Slot {
            slots: Arc::clone(self),
            name: name.to_owned(),
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = self
            .slots
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_empties_and_fills_and_is_nobody_elses() {
        let rates = Rates::new(10, 2);
        let start = Instant::now();
        let took: Vec<bool> = (0..3).map(|_| rates.take("a", start)).collect();
        assert_eq!(took, [true, true, false]);
        assert!(rates.take("b", start));
        assert!(rates.take("a", start + Duration::from_millis(100)));
        assert!(!rates.take("a", start + Duration::from_millis(101)));
    }

    #[test]
    fn a_job_that_asks_for_nothing_gets_what_its_kind_needs() {
        let config = ApiConfig::default();
        let run: JobKind = serde_json::from_value(serde_json::json!({
            "kind": "run", "image": null, "argv": ["true"], "env": {}, "ports": [], "tty": false, "stdin": false,
        }))
        .expect("a run");
        let build: JobKind = serde_json::from_value(serde_json::json!({
            "kind": "source_build", "name": "a", "source": {"from": "git", "url": "https://example.org/a", "reference": "HEAD"},
        }))
        .expect("a build");
        assert_eq!(config.defaults(&run).disk, ByteSize::gib(1));
        assert_eq!(config.defaults(&build).disk, ByteSize::gib(8));
        assert_eq!(config.defaults(&run).memory, config.defaults(&build).memory);
    }

    #[test]
    fn names_without_end_cost_no_memory_without_end() {
        let rates = Rates::new(0, 1);
        let now = Instant::now();
        for i in 0..BUCKETS_MAX {
            assert!(rates.take(&i.to_string(), now));
        }
        assert!(!rates.take("one more", now));
    }

    #[test]
    fn slots_come_back() {
        let slots = Slots::new(1);
        let held = slots.take("acme").expect("first");
        assert!(slots.take("acme").is_none());
        assert!(slots.take("rival").is_some());
        drop(held);
        assert!(slots.take("acme").is_some());
    }
}
