//! What the public API says and is told: its own shapes, so that the inside may change without them.

use std::collections::{BTreeMap, BTreeSet};

use kiln_core::dispatch::Room;
use kiln_core::{JobKind, JobState, Verdict, job::Limits};
use kiln_db::{Attempt, Depth, Job, JobSummary, JoinToken, Queue, Tenant, Token, Usage, Worker};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// A page of a list.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct List<T: ToSchema> {
    /// The rows.
    pub items: Vec<T>,
    /// Cursor of the next page; absent after the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// How a job ended.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct OutcomeView {
    /// `passed` or `failed`.
    pub verdict: String,
    /// Class of the failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// One sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What to try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Exit code of the user's command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_code: Option<i32>,
    /// The bound that was run over: `timeout`, `out_of_memory`, `disk_full`, `output_limit` or `process_limit`; there may be others some day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Exit code of `kiln` for it.
    pub exit_code: u8,
    /// Wall time of each phase in milliseconds, in order.
    #[schema(value_type = Vec<Vec<Value>>)]
    pub phases_ms: Vec<(String, u64)>,
}

impl OutcomeView {
    pub(crate) fn of(outcome: &kiln_core::Outcome) -> Self {
        let mut view = Self {
            verdict: "passed".to_owned(),
            class: None,
            message: None,
            hint: None,
            command_code: None,
            reason: None,
            exit_code: outcome.exit_code(),
            phases_ms: outcome.phases_ms.clone(),
        };
        if let Verdict::Failed {
            class,
            message,
            hint,
            command_code,
            reason,
        } = &outcome.verdict
        {
            "failed".clone_into(&mut view.verdict);
            view.class = word(class);
            view.message = Some(message.clone());
            view.hint.clone_from(hint);
            view.command_code = *command_code;
            // What an older worker told has the class alone.
            let reason = reason.or(kiln_core::Overrun::of_class(*class));
            view.reason = reason.as_ref().and_then(word);
        }
        view
    }
}

/// The serialised name of an enum without data.
fn word(value: &impl Serialize) -> Option<String> {
    match serde_json::to_value(value) {
        Ok(Value::String(text)) => Some(text),
        _ => None,
    }
}

/// A job as lists show it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct JobLine {
    /// Id.
    pub id: String,
    /// Whose.
    pub tenant: String,
    /// `source_build`, `image_build` or `run`.
    pub kind: String,
    /// What is built or run.
    pub name: String,
    /// `queued`, `leased`, `running` or `finished`.
    pub state: String,
    /// Somebody asked to stop it.
    pub cancel_asked: bool,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<OutcomeView>,
    /// Its queue.
    pub queue: String,
    /// Its order, -100 to 100.
    pub priority: i16,
    /// Why it waits: an object with a member `reason`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<Value>,
    /// When it came, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// When its machine was ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_unix_ms: Option<u64>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_unix_ms: Option<u64>,
    /// Who asked.
    pub submitted_by: String,
    /// Tags.
    pub tags: Vec<String>,
}

fn outcome(state: &JobState) -> Option<OutcomeView> {
    match state {
        JobState::Finished { outcome } => Some(OutcomeView::of(outcome)),
        _ => None,
    }
}

impl JobLine {
    pub(crate) fn of(job: &JobSummary) -> Self {
        Self {
            id: job.id.to_string(),
            tenant: job.tenant.to_string(),
            kind: job.kind.clone(),
            name: job.name.clone(),
            state: job.state.name().to_owned(),
            cancel_asked: job.cancel_asked,
            outcome: outcome(&job.state),
            queue: job.queue.to_string(),
            priority: job.priority.get(),
            pending: job
                .reason
                .as_ref()
                .and_then(|r| serde_json::to_value(r).ok()),
            created_unix_ms: job.created_unix_ms,
            started_unix_ms: job.started_unix_ms,
            finished_unix_ms: job.finished_unix_ms,
            submitted_by: job.submitted_by.clone(),
            tags: job.tags.iter().map(ToString::to_string).collect(),
        }
    }
}

/// What a machine may use.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct LimitsView {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// Disk in bytes.
    pub disk: u64,
    /// Wall time in milliseconds.
    pub timeout_ms: u64,
}

impl LimitsView {
    fn of(limits: &Limits) -> Self {
        Self {
            cpus: limits.cpus,
            memory: limits.memory.0,
            disk: limits.disk.0,
            timeout_ms: limits.timeout_ms,
        }
    }
}

/// One try of a job.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AttemptView {
    /// From 1.
    pub number: u32,
    /// When it was leased, milliseconds since the Unix epoch.
    pub leased_unix_ms: u64,
    /// When its machine was ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_unix_ms: Option<u64>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_unix_ms: Option<u64>,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<OutcomeView>,
}

impl AttemptView {
    pub(crate) fn of(attempt: &Attempt) -> Self {
        Self {
            number: attempt.id.number,
            leased_unix_ms: attempt.leased_unix_ms,
            started_unix_ms: attempt.started_unix_ms,
            ended_unix_ms: attempt.ended_unix_ms,
            outcome: attempt.outcome.as_ref().map(OutcomeView::of),
        }
    }
}

/// A job with everything a caller may know.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct JobView {
    /// As lists show it.
    #[serde(flatten)]
    pub line: JobLine,
    /// What its machine may use.
    pub limits: LimitsView,
    /// `isolated`, `egress` with its destinations, or `open`.
    pub network: Value,
    /// The policy file it was narrowed by: its `name`, hash of the `file`, and `hash` of what held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Value>,
    /// `trusted` or `untrusted`.
    pub trust: String,
    /// A command runs it itself, and no worker of a fleet does.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own: bool,
    /// Phase of the running attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// When it is expected to begin, while it waits: `wait_ms`, `samples`, `basis`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Value>,
    /// Who asked to stop it, when, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancel: Option<Value>,
    /// What was stored, once it passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Value>,
    /// What the worker saw of it: source, machine image, template, cache head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed: Option<Value>,
    /// Digest of its source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Value>,
    /// Kernel of its machine that its command gave: `name` and `digest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Value>,
    /// Root disk of its machine that its command gave: `name` and `digest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root_disk: Option<Value>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Its tries.
    pub attempts: Vec<AttemptView>,
    /// Number of its last event.
    pub last_event: u64,
    /// Bytes of log so far.
    pub log_bytes: u64,
    /// What its user should know, in words: only in the answer to whoever asked for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

fn json(value: &impl Serialize) -> Option<Value> {
    serde_json::to_value(value).ok().filter(|v| !v.is_null())
}

impl JobView {
    pub(crate) fn of(job: &Job, attempts: &[Attempt]) -> Self {
        let request = &job.request;
        let (name, source) = match &request.kind {
            JobKind::SourceBuild(build) => (build.name.clone(), json(&build.source)),
            JobKind::ImageBuild(build) => (build.source.to_string(), json(&build.source)),
            // An image that is run with its own command is known by its name.
            JobKind::Run(run) => match (&run.argv[..], &run.image) {
                ([], Some(image)) => (image.to_string(), None),
                (argv, _) => (kiln_core::run_script::shown(argv).join(" "), None),
            },
        };
        let [kernel, root_disk] = match &request.kind {
            JobKind::Run(run) => [&run.kernel, &run.root_disk].map(json),
            _ => [None, None],
        };
        Self {
            line: JobLine {
                id: request.id.to_string(),
                tenant: request.tenant.to_string(),
                kind: kiln_db::kind_name(&request.kind).to_owned(),
                name: name
                    .chars()
                    .filter(|c| !kiln_policy::unseen(*c))
                    .take(120)
                    .collect(),
                state: job.state.name().to_owned(),
                cancel_asked: job.cancel.is_some(),
                outcome: outcome(&job.state),
                queue: request.dispatch.queue.to_string(),
                priority: request.dispatch.priority.get(),
                pending: job.reason.as_ref().and_then(json),
                created_unix_ms: job.created_unix_ms,
                started_unix_ms: job.started_unix_ms,
                finished_unix_ms: job.finished_unix_ms,
                submitted_by: job.submitted_by.clone(),
                tags: texts(&request.dispatch.tags),
            },
            limits: LimitsView::of(&request.limits),
            network: json(&request.network).unwrap_or_default(),
            policy: request.policy.as_ref().and_then(json),
            trust: word(&request.trust).unwrap_or_default(),
            own: request.dispatch.requires.own().is_some(),
            phase: job.phase.clone(),
            estimate: job.estimate.as_ref().and_then(json),
            cancel: job.cancel.as_ref().and_then(json),
            receipt: job.receipt.as_ref().and_then(json),
            observed: job.observed.clone(),
            source,
            kernel,
            root_disk,
            labels: pairs(&job.labels),
            attempts: attempts.iter().map(AttemptView::of).collect(),
            last_event: job.last_event,
            log_bytes: job.log_bytes,
            notes: Vec::new(),
        }
    }
}

fn texts(set: &BTreeSet<kiln_core::Label>) -> Vec<String> {
    set.iter().map(ToString::to_string).collect()
}

fn pairs(map: &BTreeMap<kiln_core::Label, kiln_core::Label>) -> BTreeMap<String, String> {
    map.iter()
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .collect()
}

/// A stored artifact.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ArtifactView {
    /// Name within the job.
    pub name: String,
    /// Digest.
    pub digest: String,
    /// Bytes.
    pub size: u64,
    /// Media type, as its maker says.
    pub media_type: String,
}

/// A queue, with what waits and runs in it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct QueueView {
    /// Name.
    pub name: String,
    /// Pool of workers.
    pub pool: String,
    /// Share against other queues of a tenant.
    pub weight: u32,
    /// Most jobs of it that have a worker.
    pub running_max: Option<u32>,
    /// Since when nothing of it begins, milliseconds since the Unix epoch.
    pub paused_since_unix_ms: Option<u64>,
    /// Why.
    pub paused_reason: Option<String>,
    /// Jobs that wait; the caller's own unless it is an operator.
    pub pending: u32,
    /// Jobs that have a worker; the caller's own unless it is an operator.
    pub running: u32,
    /// When the oldest waiting one came.
    pub oldest_unix_ms: Option<u64>,
}

impl QueueView {
    pub(crate) fn of<'a>(queue: &Queue, depths: impl Iterator<Item = &'a Depth>) -> Self {
        let mut view = Self {
            name: queue.name.to_string(),
            pool: queue.pool.to_string(),
            weight: queue.weight,
            running_max: queue.running_max,
            paused_since_unix_ms: queue.paused.as_ref().map(|p| p.since_unix_ms),
            paused_reason: queue.paused.as_ref().and_then(|p| p.reason.clone()),
            pending: 0,
            running: 0,
            oldest_unix_ms: None,
        };
        for depth in depths.filter(|depth| depth.queue == queue.name) {
            view.pending += depth.pending;
            view.running += depth.running;
            view.oldest_unix_ms = match (view.oldest_unix_ms, depth.oldest_unix_ms) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        view
    }
}

/// Room of a host.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct RoomView {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// Disk in bytes.
    pub disk: u64,
    /// Machines.
    pub machines: u32,
}

impl RoomView {
    fn of(room: &Room) -> Self {
        Self {
            cpus: room.cpus,
            memory: room.memory.0,
            disk: room.disk.0,
            machines: room.machines,
        }
    }
}

/// A worker.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct WorkerView {
    /// Name.
    pub id: String,
    /// Pool.
    pub pool: String,
    /// `active`, `draining`, `cordoned`, `quarantined` or `lost`.
    pub state: String,
    /// Who changed its state last.
    pub state_by: Option<String>,
    /// Why.
    pub state_reason: Option<String>,
    /// CPU architecture.
    pub arch: String,
    /// Language runtimes it has bases for.
    pub runtimes: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Tenants whose jobs it may run; null means all.
    pub tenants: Option<Vec<String>>,
    /// Room of the whole host.
    pub capacity: RoomView,
    /// Program version.
    pub version: String,
    /// Its last heartbeat, milliseconds since the Unix epoch.
    pub seen_unix_ms: u64,
    /// When it joined.
    pub joined_unix_ms: u64,
    /// Failures of its own in a row.
    pub infra_failures: u32,
    /// End of its certificate.
    pub certificate_until_unix_ms: Option<u64>,
}

impl WorkerView {
    pub(crate) fn of(worker: &Worker) -> Self {
        let tenants = worker.placement.tenants.as_ref();
        Self {
            id: worker.id.to_string(),
            pool: worker.placement.pool.to_string(),
            state: worker.state.name().to_owned(),
            state_by: worker.state_by.as_ref().map(|(by, _)| by.clone()),
            state_reason: worker.state_by.as_ref().and_then(|(_, why)| why.clone()),
            arch: worker.facts.arch.to_string(),
            runtimes: texts(&worker.facts.runtimes),
            labels: pairs(&worker.placement.labels),
            tenants: tenants.map(|set| set.iter().map(ToString::to_string).collect()),
            capacity: RoomView::of(&worker.facts.capacity),
            version: worker
                .facts
                .version
                .chars()
                .filter(|c| !kiln_policy::unseen(*c))
                .take(80)
                .collect(),
            seen_unix_ms: worker.seen_unix_ms,
            joined_unix_ms: worker.joined_unix_ms,
            infra_failures: worker.infra_failures,
            certificate_until_unix_ms: worker.certificate.as_ref().map(|c| c.until_unix_ms),
        }
    }
}

/// A tenant.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TenantView {
    /// Name.
    pub name: String,
    /// Share against others.
    pub weight: u32,
    /// Most jobs of it that have a worker.
    pub running_max: Option<u32>,
    /// How many more may run when what they use would otherwise be idle.
    pub burst: u32,
    /// Running jobs it is sure of.
    pub reserved: u32,
    /// Most jobs of it that wait.
    pub pending_max: Option<u32>,
    /// Most bytes of its uploads and of its jobs' requests.
    pub stored_max: Option<u64>,
    /// Bytes of its jobs' requests.
    pub requests: u64,
    /// Nothing of it is deleted.
    pub hold: bool,
    /// When it was made, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
}

impl TenantView {
    pub(crate) fn of(tenant: &Tenant) -> Self {
        Self {
            name: tenant.name.to_string(),
            weight: tenant.weight,
            running_max: tenant.quota.running_max,
            burst: tenant.quota.burst,
            reserved: tenant.quota.reserved,
            pending_max: tenant.quota.pending_max,
            stored_max: tenant.quota.stored_max,
            requests: tenant.stored,
            hold: tenant.hold,
            created_unix_ms: tenant.created_unix_ms,
        }
    }
}

/// What a tenant used.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct UsageView {
    /// Jobs that came to an end.
    pub jobs: u64,
    /// Of these, passed.
    pub passed: u64,
    /// CPUs times milliseconds.
    pub cpu_ms: u64,
    /// Mebibytes times seconds.
    pub memory_mib_s: u64,
    /// Milliseconds of waiting.
    pub wait_ms: u64,
    /// Jobs that wait now.
    pub pending: u32,
    /// Jobs that have a worker now.
    pub running: u32,
}

impl UsageView {
    pub(crate) fn of(usage: &Usage) -> Self {
        Self {
            jobs: usage.jobs,
            passed: usage.passed,
            cpu_ms: usage.cpu_ms,
            memory_mib_s: usage.memory_mib_s,
            wait_ms: usage.wait_ms,
            pending: usage.pending,
            running: usage.running,
        }
    }
}

/// A token; never its secret.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TokenView {
    /// Public name.
    pub id: String,
    /// `service`, or `join` for a worker's.
    pub kind: String,
    /// Whose; absent for a worker's.
    pub tenant: Option<String>,
    /// Role; absent for a worker's.
    pub role: Option<String>,
    /// The only actions it is good for; empty means all of its role.
    pub scopes: Vec<String>,
    /// For people.
    pub description: String,
    /// When it was made, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Who made it.
    pub created_by: String,
    /// Not good from then on.
    pub expires_unix_ms: Option<u64>,
    /// When it was called back.
    pub revoked_unix_ms: Option<u64>,
    /// When it was used last, or by whom.
    pub last_used_unix_ms: Option<u64>,
    /// The worker that used it.
    pub used_by: Option<String>,
}

impl TokenView {
    pub(crate) fn of(token: &Token) -> Self {
        Self {
            id: token.id.to_string(),
            kind: "service".to_owned(),
            tenant: Some(token.tenant.to_string()),
            role: Some(token.role.clone()),
            scopes: token.scopes.iter().cloned().collect(),
            description: token.description.clone(),
            created_unix_ms: token.created_unix_ms,
            created_by: token.created_by.clone(),
            expires_unix_ms: token.expires_unix_ms,
            revoked_unix_ms: token.revoked_unix_ms,
            last_used_unix_ms: token.last_used_unix_ms,
            used_by: None,
        }
    }

    pub(crate) fn of_join(token: &JoinToken) -> Self {
        Self {
            id: token.id.to_string(),
            kind: "join".to_owned(),
            tenant: None,
            role: None,
            scopes: Vec::new(),
            description: format!("lets one worker join pool {}", token.placement.pool),
            created_unix_ms: token.created_unix_ms,
            created_by: token.created_by.clone(),
            expires_unix_ms: Some(token.expires_unix_ms),
            revoked_unix_ms: token.revoked_unix_ms,
            last_used_unix_ms: None,
            used_by: token.used_by.as_ref().map(ToString::to_string),
        }
    }
}
