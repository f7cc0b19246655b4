//! How long a decision takes, and how many placements that makes per second.
//!
//! `cargo bench -p kiln-scheduler [-- PART OF A NAME]` prints one line per case: median and slowest of the samples, what was placed, what that is per second.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark prints or fails"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use kiln_core::dispatch::{Requirements, Room, WorkerFacts, WorkerState};
use kiln_core::{AttemptId, ByteSize, JobId, Label, Priority, WorkerId};
use kiln_scheduler::{HistoryKey, PendingJob, PoolView, RunningJob, Typical, Worker, plan};

const NOW: u64 = 1_800_000_000_000;
const TENANTS: usize = 50;
const SLOTS: u32 = 8;
const SAMPLES: usize = 30;

fn label(text: &str) -> Label {
    text.parse().unwrap()
}

fn room(cpus: u32, memory_mib: u64) -> Room {
    Room {
        cpus,
        memory: ByteSize::mib(memory_mib),
        disk: ByteSize::gib(10),
        machines: 1,
    }
}

fn worker(number: usize, held: u32) -> Worker {
    let rack = [
        (label("rack"), label(&format!("r{}", number % 20))),
        (label("host"), label(&format!("h{number}"))),
    ];
    Worker {
        id: format!("w{number:05}").parse().unwrap(),
        state: WorkerState::Active,
        facts: WorkerFacts {
            arch: label(if number.is_multiple_of(5) {
                "arm64"
            } else {
                "amd64"
            }),
            runtimes: [label("node"), label("python")].into(),
            capacity: Room {
                cpus: 2 * SLOTS,
                memory: ByteSize::mib(4096 * u64::from(SLOTS)),
                disk: ByteSize::gib(10 * u64::from(SLOTS)),
                machines: SLOTS,
            },
            whole_cpus: None,
            version: "1".to_owned(),
            warm: (0..3).map(|at| tenant((number + at) % TENANTS)).collect(),
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
        templates: [label(&format!("t{}", number % 10))].into(),
    }
}

fn tenant(number: usize) -> kiln_core::TenantName {
    format!("tenant-{number}").parse().unwrap()
}

/// The `class`-th way to need something of a host, each another: by arch, runtime, rack, room; beyond 200 every third wants one certain host.
fn needs(class: usize) -> (Requirements, Room) {
    let mut requires = Requirements {
        arch: Some(label(if class.is_multiple_of(5) {
            "arm64"
        } else {
            "amd64"
        })),
        runtime: Some(label(if class.is_multiple_of(2) {
            "node"
        } else {
            "python"
        })),
        ..Requirements::default()
    };
    if class.is_multiple_of(4) {
        requires
            .labels
            .insert(label("rack"), label(&format!("r{}", class % 20)));
    }
    if class >= 200 && class.is_multiple_of(3) {
        requires.labels = [(label("host"), label(&format!("h{}", class % 500)))].into();
    }
    let mut need = room(1 + (class as u32 / 40) % 2, 1024 + 512 * (class as u64 % 5));
    need.disk = ByteSize(ByteSize::gib(10).0 - class as u64);
    (requires, need)
}

fn view(jobs: usize, hosts: usize, classes: usize, free_every: usize) -> PoolView {
    let mut view = PoolView {
        now_unix_ms: NOW,
        ..PoolView::default()
    };
    for host in 0..hosts {
        let held = match free_every {
            1 => 0,
            every => SLOTS - u32::from(every > 0 && host.is_multiple_of(every)),
        };
        view.workers.push(worker(host, held));
        for slot in 0..held {
            view.running.push(RunningJob {
                job: JobId::new('r', NOW, [0, (host >> 8) as u8, host as u8, slot as u8, 0]),
                tenant: tenant(host % TENANTS),
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
        let (requires, need) = needs(at % classes);
        view.pending.push(PendingJob {
            attempt: AttemptId {
                job: JobId::new(
                    'b',
                    NOW - jobs as u64 + at as u64,
                    [0, 0, 0, (at >> 8) as u8, at as u8],
                ),
                number: 1,
            },
            tenant: tenant((at * 7) % TENANTS),
            queue: if at.is_multiple_of(3) {
                "nightly".parse().unwrap()
            } else {
                kiln_core::QueueName::default_queue()
            },
            priority: Priority::try_from((at % 7) as i16).unwrap(),
            requires,
            need,
            group: at
                .is_multiple_of(50)
                .then(|| label(&format!("deploy-{}", at % 1000))),
            queued_unix_ms: NOW - 60_000 + (at as u64) % 50_000,
            not_before_unix_ms: 0,
            avoid: BTreeSet::new(),
            kind: label("build"),
            template: Some(label(&format!("t{}", at % 10))),
        });
    }
    for number in 0..TENANTS {
        for queue in ["default", "nightly"] {
            let key = HistoryKey {
                tenant: tenant(number),
                queue: queue.parse().unwrap(),
                kind: label("build"),
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
    view
}

/// Nanoseconds this thread was on a CPU: what a decision costs on a host that has more to do.
fn cpu_nanos() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ')
        .next()
        .and_then(|nanos| nanos.parse().ok())
        .unwrap_or(0)
}

fn measure(name: &str, view: &PoolView) {
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    if wanted.is_some_and(|wanted| !name.contains(&wanted)) {
        return;
    }
    let mut millis: Vec<f64> = Vec::new();
    let cpu = cpu_nanos();
    let mut placed = 0;
    for _ in 0..SAMPLES {
        let begun = Instant::now();
        let plan = plan(std::hint::black_box(view));
        millis.push(begun.elapsed().as_secs_f64() * 1e3);
        assert_eq!(
            plan.assignments.len() + plan.reasons.len(),
            view.pending.len()
        );
        placed = plan.assignments.len();
    }
    millis.sort_by(f64::total_cmp);
    let on_cpu = (cpu_nanos() - cpu) as f64 / 1e6 / SAMPLES as f64;
    let (median, most) = (millis[millis.len() / 2], millis[millis.len() - 1]);
    let rate = placed as f64 / median * 1e3;
    println!(
        "{name:<66} p50 {median:>7.2} ms (on CPU {on_cpu:>6.2})  max {most:>7.2} ms   placed {placed:>5}   {rate:>7.0}/s"
    );
}

fn main() {
    measure(
        "10,000 jobs, 500 hosts, 200 classes, all hosts full",
        &view(10_000, 500, 200, 0),
    );
    measure(
        "10,000 jobs, 500 hosts, 200 classes, 100 hosts with a slot",
        &view(10_000, 500, 200, 5),
    );
    measure(
        "10,000 jobs, 500 hosts, 200 classes, all hosts empty",
        &view(10_000, 500, 200, 1),
    );
    measure(
        "10,000 jobs, 500 hosts, every job its own class, all full",
        &view(10_000, 500, 10_000, 0),
    );
    measure(
        "10,000 jobs, 500 hosts, every job its own class, 100 slots",
        &view(10_000, 500, 10_000, 5),
    );
    measure(
        "10,000 jobs, 500 hosts, every job its own class, all empty",
        &view(10_000, 500, 10_000, 1),
    );
    measure(
        "10,000 jobs, 5,000 hosts, 200 classes, all hosts empty",
        &view(10_000, 5_000, 200, 1),
    );
    measure(
        "10,000 jobs, 5,000 hosts, 200 classes, 1,000 hosts with a slot",
        &view(10_000, 5_000, 200, 5),
    );
}
