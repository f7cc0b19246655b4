//! Views in few words.

use std::collections::{BTreeMap, BTreeSet};

use kiln_core::dispatch::{Requirements, Room, WorkerFacts, WorkerState};
use kiln_core::{AttemptId, ByteSize, JobId, Label, Priority, QueueName, TenantName, WorkerId};
use kiln_scheduler::{HistoryKey, PendingJob, PoolView, RunningJob, Typical, Worker};

pub(crate) const NOW: u64 = 1_800_000_000_000;

pub(crate) fn label(text: &str) -> Label {
    text.parse().expect("a label")
}

pub(crate) fn tenant(text: &str) -> TenantName {
    text.parse().expect("a tenant")
}

pub(crate) fn queue(text: &str) -> QueueName {
    text.parse().expect("a queue")
}

pub(crate) fn worker_id(text: &str) -> WorkerId {
    text.parse().expect("a worker")
}

pub(crate) fn job_id(text: &str) -> JobId {
    text.parse().expect("a job")
}

/// So many CPUs, with a GiB of memory and of disk each, for one machine.
pub(crate) fn cpus(cpus: u32) -> Room {
    Room {
        cpus,
        memory: ByteSize::gib(cpus.into()),
        disk: ByteSize::gib(cpus.into()),
        machines: 1,
    }
}

/// A host with room for so many jobs of one CPU.
pub(crate) fn host(id: &str, size: u32) -> Worker {
    Worker {
        id: worker_id(id),
        state: WorkerState::Active,
        facts: WorkerFacts {
            arch: label("amd64"),
            runtimes: [label("node")].into(),
            capacity: Room {
                machines: size,
                ..cpus(size)
            },
            whole_cpus: None,
            version: "1".to_owned(),
            generation: kiln_core::dispatch::POLICY_GENERATION,
            warm: BTreeSet::new(),
        },
        labels: BTreeMap::new(),
        tenants: None,
        held: Room::default(),
        whole_cpus: None,
        infra_failures: 0,
        templates: BTreeSet::new(),
    }
}

/// A job that was queued a second ago.
pub(crate) fn job(id: &str, owner: &str, size: u32) -> PendingJob {
    PendingJob {
        attempt: AttemptId {
            job: job_id(id),
            number: 1,
        },
        tenant: tenant(owner),
        queue: QueueName::default_queue(),
        priority: Priority::default(),
        requires: Requirements::default(),
        need: cpus(size),
        group: None,
        queued_unix_ms: NOW - 1000,
        not_before_unix_ms: 0,
        avoid: BTreeSet::new(),
        kind: label("build"),
        template: None,
    }
}

/// What a pending job is once it runs.
pub(crate) fn started(
    job: &PendingJob,
    worker: &WorkerId,
    at: u64,
    expected_end_unix_ms: Option<u64>,
) -> RunningJob {
    RunningJob {
        job: job.attempt.job.clone(),
        tenant: job.tenant.clone(),
        queue: job.queue.clone(),
        worker: worker.clone(),
        room: job.need,
        pinned_cpus: job.requires.pinned_cpus,
        group: job.group.clone(),
        started_unix_ms: at,
        expected_end_unix_ms,
    }
}

pub(crate) fn running(id: &str, owner: &str, size: u32, on: &str, end: Option<u64>) -> RunningJob {
    started(&job(id, owner, size), &worker_id(on), NOW - 10_000, end)
}

pub(crate) fn view(workers: Vec<Worker>, pending: Vec<PendingJob>) -> PoolView {
    PoolView {
        now_unix_ms: NOW,
        workers,
        pending,
        ..PoolView::default()
    }
}

/// Says how long a tenant's builds of the default queue take.
pub(crate) fn typical(view: &mut PoolView, owner: &str, p50_ms: u64) {
    let key = HistoryKey {
        tenant: tenant(owner),
        queue: QueueName::default_queue(),
        kind: label("build"),
    };
    view.history.insert(key, Typical { p50_ms, runs: 9 });
}
