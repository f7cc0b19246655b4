//! Pools that nobody has, to measure decisions on: the same for `cargo bench` and `kiln bench`. Never used to decide anything.
//!
//! `None` would mean that one of the constant names here is no legal one.

use std::collections::{BTreeMap, BTreeSet};

use kiln_core::dispatch::{Requirements, Room, WorkerFacts, WorkerState};
use kiln_core::{AttemptId, ByteSize, JobId, Label, Priority, TenantName, WorkerId};

use crate::{HistoryKey, PendingJob, PoolView, RunningJob, Typical, Worker};

const NOW: u64 = 1_800_000_000_000;
const TENANTS: usize = 50;
const SLOTS: u32 = 8;

fn label(text: &str) -> Option<Label> {
    text.parse().ok()
}

fn room(cpus: u32, memory_mib: u64) -> Room {
    Room {
        cpus,
        memory: ByteSize::mib(memory_mib),
        disk: ByteSize::gib(10),
        machines: 1,
    }
}

fn worker(number: usize, held: u32) -> Option<Worker> {
    let rack = [
        (label("rack")?, label(&format!("r{}", number % 20))?),
        (label("host")?, label(&format!("h{number}"))?),
    ];
    Some(Worker {
        id: format!("w{number:05}").parse().ok()?,
        state: WorkerState::Active,
        facts: WorkerFacts {
            arch: label(if number.is_multiple_of(5) {
                "arm64"
            } else {
                "amd64"
            })?,
            runtimes: [label("node")?, label("python")?].into(),
            capacity: Room {
                cpus: 2 * SLOTS,
                memory: ByteSize::mib(4096 * u64::from(SLOTS)),
                disk: ByteSize::gib(10 * u64::from(SLOTS)),
                machines: SLOTS,
            },
            whole_cpus: None,
            version: "1".to_owned(),
            generation: kiln_core::dispatch::POLICY_GENERATION,
            warm: (0..3)
                .filter_map(|at| tenant((number + at) % TENANTS))
                .collect(),
        },
        labels: BTreeMap::from(rack),
        tenants: None,
        held: Room {
            cpus: 2 * held,
            memory: ByteSize::mib(4096 * u64::from(held)),
            disk: ByteSize::gib(10 * u64::from(held)),
            machines: held,
        },
        whole_cpus: None,
        infra_failures: 0,
        templates: [label(&format!("t{}", number % 10))?].into(),
    })
}

fn tenant(number: usize) -> Option<TenantName> {
    format!("tenant-{number}").parse().ok()
}

/// The `class`-th way to need something of a host, each another: by arch, runtime, rack, room; beyond 200 every third wants one certain host.
fn needs(class: usize) -> Option<(Requirements, Room)> {
    let mut requires = Requirements {
        arch: Some(label(if class.is_multiple_of(5) {
            "arm64"
        } else {
            "amd64"
        })?),
        runtime: Some(label(if class.is_multiple_of(2) {
            "node"
        } else {
            "python"
        })?),
        ..Requirements::default()
    };
    if class.is_multiple_of(4) {
        requires
            .labels
            .insert(label("rack")?, label(&format!("r{}", class % 20))?);
    }
    if class >= 200 && class.is_multiple_of(3) {
        requires.labels = [(label("host")?, label(&format!("h{}", class % 500))?)].into();
    }
    let mut need = room(
        1 + u32::from(class / 40 % 2 == 1),
        1024 + 512 * (class as u64 % 5),
    );
    need.disk = ByteSize(ByteSize::gib(10).0 - class as u64);
    Some((requires, need))
}

/// A pool of this many hosts of eight slots, of which every `free_every`-th has one free (0: none has, 1: all are empty), and this many waiting jobs of 50
/// tenants, in so many different classes of needs.
#[must_use]
pub fn pool(jobs: usize, hosts: usize, classes: usize, free_every: usize) -> Option<PoolView> {
    let mut view = PoolView {
        now_unix_ms: NOW,
        ..PoolView::default()
    };
    for host in 0..hosts {
        let held = match free_every {
            1 => 0,
            every => SLOTS - u32::from(every > 0 && host.is_multiple_of(every)),
        };
        view.workers.push(worker(host, held)?);
        for slot in 0..held {
            view.running.push(RunningJob {
                job: JobId::new('r', NOW, id(host, slot as usize)),
                tenant: tenant(host % TENANTS)?,
                queue: kiln_core::QueueName::default_queue(),
                worker: WorkerId::clone(&view.workers[host].id),
                room: room(2, 4096),
                pinned_cpus: false,
                group: None,
                started_unix_ms: NOW - 60_000,
                expected_end_unix_ms: Some(NOW + 1_000 * (u64::from(slot) + host as u64)),
            });
        }
    }
    for at in 0..jobs {
        let (requires, need) = needs(at % classes)?;
        view.pending.push(PendingJob {
            attempt: AttemptId {
                job: JobId::new('b', NOW - jobs as u64 + at as u64, id(0, at)),
                number: 1,
            },
            tenant: tenant((at * 7) % TENANTS)?,
            queue: if at.is_multiple_of(3) {
                "nightly".parse().ok()?
            } else {
                kiln_core::QueueName::default_queue()
            },
            priority: Priority::try_from(i16::try_from(at % 7).ok()?).ok()?,
            requires,
            need,
            group: match at.is_multiple_of(50) {
                true => label(&format!("deploy-{}", at % 1000)),
                false => None,
            },
            queued_unix_ms: NOW - 60_000 + (at as u64) % 50_000,
            not_before_unix_ms: 0,
            avoid: BTreeSet::new(),
            kind: label("build")?,
            template: label(&format!("t{}", at % 10)),
        });
    }
    for number in 0..TENANTS {
        for queue in ["default", "nightly"] {
            let key = HistoryKey {
                tenant: tenant(number)?,
                queue: queue.parse().ok()?,
                kind: label("build")?,
            };
            view.history.insert(
                key,
                Typical {
                    p50_ms: 60_000,
                    runs: 10,
                },
            );
        }
    }
    Some(view)
}

/// The random part of an id, counted instead.
fn id(high: usize, low: usize) -> [u8; 5] {
    let [_, _, _, _, _, _, a, b] = (high as u64).to_be_bytes();
    let [_, _, _, _, _, c, d, e] = (low as u64).to_be_bytes();
    [a, b, c, d, e]
}
