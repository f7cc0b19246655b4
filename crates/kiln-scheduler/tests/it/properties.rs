//! Random views keep every rule, and their order does not matter.

use kiln_core::Priority;
use kiln_core::dispatch::WorkerState;
use kiln_scheduler::{
    HistoryKey, PendingJob, PoolView, Profile, QueueRule, RunningJob, TenantRule, Typical, Worker,
    plan,
};
use proptest::prelude::*;

use crate::build::{NOW, cpus, host, job, label, queue, started, tenant, view, worker_id};
use crate::check::check;

const TENANTS: [&str; 4] = ["ant", "bee", "cat", "dog"];
const QUEUES: [&str; 3] = ["default", "nightly", "release"];

fn a_worker(number: usize) -> impl Strategy<Value = Worker> {
    (
        (1..9_u32, 0..4_u32, 0..12_u32, 0..12_u32),
        (
            any::<bool>(),
            any::<bool>(),
            0..4_u32,
            proptest::option::of(0..9_u32),
        ),
    )
        .prop_map(
            move |((size, held, state, owner), (arm, gpu, failures, whole))| {
                let mut worker = host(&format!("w{number}"), size);
                worker.held = cpus(held.min(size));
                worker.state = match state {
                    0 => WorkerState::Draining,
                    1 => WorkerState::Cordoned,
                    2 => WorkerState::Quarantined,
                    3 => WorkerState::Lost,
                    _ => WorkerState::Active,
                };
                worker.tenants = TENANTS
                    .get(owner as usize)
                    .map(|only| [tenant(only)].into());
                if arm {
                    worker.facts.arch = label("arm64");
                }
                if gpu {
                    worker.labels.insert(label("gpu"), label("a100"));
                }
                worker.infra_failures = failures;
                worker.whole_cpus = whole;
                worker
            },
        )
}

fn a_job(name: String) -> impl Strategy<Value = PendingJob> {
    (
        (0..4_usize, 0..3_usize, 1..7_u32, -100..=100_i16),
        (0..6_u32, 0..6_u32, 0..8_u32, 0..900_000_u64),
        (0..6_u32, 0..4_u32),
    )
        .prop_map(
            move |((owner, at, size, priority), (arch, gpu, group, age), (backoff, pinned))| {
                let mut job = job(&name, TENANTS[owner], size);
                job.queue = queue(QUEUES[at]);
                job.priority = Priority::try_from(priority).expect("in range");
                job.requires.arch = (arch == 0).then(|| label("arm64"));
                job.requires.runtime = (arch == 1).then(|| label("node"));
                job.requires.pinned_cpus = pinned == 0;
                if gpu == 0 {
                    job.requires.labels.insert(label("gpu"), label("a100"));
                }
                job.group = (group < 2).then(|| label(&format!("g{group}")));
                job.queued_unix_ms = NOW - age;
                job.not_before_unix_ms = if backoff == 0 { NOW + 5000 } else { 0 };
                if backoff == 1 {
                    job.avoid.insert(worker_id("w0"));
                }
                job
            },
        )
}

fn a_running(number: usize) -> impl Strategy<Value = RunningJob> {
    (
        a_job(format!("r{number}")),
        0..6_usize,
        proptest::option::of(0..900_000_u64),
    )
        .prop_map(|(mut job, on, end)| {
            job.need = cpus(1);
            job.group = None;
            job.requires.pinned_cpus = false;
            let on = worker_id(&format!("w{on}"));
            started(&job, &on, NOW - 60_000, end.map(|end| NOW + end - 100_000))
        })
}

fn a_view() -> impl Strategy<Value = PoolView> {
    let workers = (0..7_usize).prop_flat_map(|count| (0..count).map(a_worker).collect::<Vec<_>>());
    let jobs = (0..40_usize).prop_flat_map(|count| {
        (0..count)
            .map(|at| a_job(format!("j{at}")))
            .collect::<Vec<_>>()
    });
    let running =
        (0..12_usize).prop_flat_map(|count| (0..count).map(a_running).collect::<Vec<_>>());
    let tenants = proptest::collection::vec(
        (
            1..500_u32,
            proptest::option::of(0..9_u32),
            0..4_u32,
            0..3_u32,
        ),
        4,
    );
    let queues = proptest::collection::vec((0..8_u32, proptest::option::of(0..12_u32)), 3);
    let history = proptest::collection::vec(proptest::option::of(1..600_000_u64), 4);
    let rest = (
        any::<bool>(),
        0..20_u32,
        proptest::option::of(0..20_u32),
        history,
    );
    (workers, jobs, running, tenants, queues, rest).prop_map(
        |(workers, jobs, running, tenants, queues, rest)| {
            let (pack, settling, limit, history) = rest;
            let mut view = view(workers, jobs);
            view.running = running;
            view.settling = settling == 0;
            view.running_max = limit;
            view.profile = if pack { Profile::Pack } else { Profile::Spread };
            for (name, (weight, running_max, burst, reserved)) in TENANTS.iter().zip(tenants) {
                let rule = TenantRule {
                    weight,
                    running_max,
                    burst,
                    reserved,
                };
                view.tenants.insert(tenant(name), rule);
            }
            for (name, (paused, running_max)) in QUEUES.iter().zip(queues) {
                let rule = QueueRule {
                    paused: paused == 0,
                    running_max,
                    ..QueueRule::default()
                };
                view.queues.insert(queue(name), rule);
            }
            for (name, p50) in TENANTS.iter().zip(history) {
                for at in QUEUES {
                    if let Some(p50_ms) = p50 {
                        let key = HistoryKey {
                            tenant: tenant(name),
                            queue: queue(at),
                            kind: label("build"),
                        };
                        view.history.insert(key, Typical { p50_ms, runs: 3 });
                    }
                }
            }
            view
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn every_rule_holds(view in a_view()) {
        let first = plan(&view);
        check(&view, &first);
        let mut next = view;
        next.reserved = first.reservations;
        check(&next, &plan(&next));
    }

    #[test]
    fn order_of_input_does_not_matter(view in a_view(), turn in 0..100_usize) {
        let expected = plan(&view);
        let mut other = view;
        other.pending.reverse();
        other.running.reverse();
        other.workers.reverse();
        if !other.pending.is_empty() {
            let by = turn % other.pending.len();
            other.pending.rotate_left(by);
        }
        if !other.workers.is_empty() {
            let by = turn % other.workers.len();
            other.workers.rotate_left(by);
        }
        prop_assert_eq!(plan(&other), expected);
    }

    #[test]
    fn a_view_survives_being_written_and_read(view in a_view()) {
        let text = serde_json::to_string(&view).expect("writes");
        prop_assert_eq!(serde_json::from_str::<PoolView>(&text).expect("reads"), view);
    }
}
