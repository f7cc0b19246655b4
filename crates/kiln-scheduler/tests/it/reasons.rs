//! Why a job waits: the first thing that keeps it, in its own terms only.

use kiln_core::dispatch::{PendingReason, QuotaScope, WorkerState};
use kiln_scheduler::{Estimate, EstimateBasis, PoolView, QueueRule, TenantRule, plan};

use crate::build::{NOW, cpus, host, job, job_id, label, queue, running, tenant, typical, view};
use crate::check::check;

fn why(view: &PoolView, id: &str) -> (PendingReason, Option<Estimate>) {
    let plan = plan(view);
    check(view, &plan);
    let found = plan
        .reasons
        .into_iter()
        .find(|(job, _, _)| job.as_str() == id);
    found
        .map(|(_, reason, estimate)| (reason, estimate))
        .expect("it waits")
}

fn reason(view: &PoolView, id: &str) -> PendingReason {
    why(view, id).0
}

#[test]
fn nobody_there() {
    let empty = view(Vec::new(), vec![job("j", "ant", 1)]);
    assert_eq!(reason(&empty, "j"), PendingReason::NoWorkers);
    let mut foreign = host("w0", 4);
    foreign.tenants = Some([tenant("bee")].into());
    let foreign = view(vec![foreign], vec![job("j", "ant", 1)]);
    assert_eq!(
        reason(&foreign, "j"),
        PendingReason::NoWorkers,
        "another tenant's hosts do not exist for it"
    );
}

#[test]
fn the_first_requirement_that_leaves_nobody() {
    let mut view = view(vec![host("w0", 4), host("w1", 4)], vec![job("j", "ant", 1)]);
    let missing = |missing: &str| PendingReason::NoWorkerMatches {
        missing: missing.to_owned(),
        workers: 2,
    };
    view.workers[0].labels.insert(label("gpu"), label("a100"));
    view.workers[1].labels.insert(label("zone"), label("b"));
    view.pending[0].requires.labels =
        [(label("gpu"), label("a100")), (label("zone"), label("b"))].into();
    assert_eq!(reason(&view, "j"), missing("label zone=b"));
    view.pending[0].requires.runtime = Some(label("python"));
    assert_eq!(reason(&view, "j"), missing("runtime python"));
    view.pending[0].requires.arch = Some(label("arm64"));
    assert_eq!(reason(&view, "j"), missing("arch arm64"));
}

#[test]
fn hosts_that_are_away_and_hosts_that_are_too_small() {
    let mut view = view(vec![host("w0", 4), host("w1", 6)], vec![job("j", "ant", 5)]);
    view.workers[1].state = WorkerState::Draining;
    assert_eq!(
        reason(&view, "j"),
        PendingReason::WorkersUnavailable { workers: 1 }
    );
    view.pending[0].need = cpus(7);
    let largest = view.workers[1].facts.capacity;
    let need = cpus(7);
    assert_eq!(
        reason(&view, "j"),
        PendingReason::TooLarge { need, largest }
    );
}

#[test]
fn the_first_in_line_waits_for_room_and_the_others_behind_it() {
    let mut view = view(vec![host("w0", 4)], Vec::new());
    view.running = vec![running("r0", "bee", 3, "w0", Some(NOW + 30_000))];
    for at in 0..3 {
        let mut job = job(&format!("j{at}"), "ant", 2);
        job.queued_unix_ms += at;
        view.pending.push(job);
    }
    typical(&mut view, "ant", 60_000);
    let estimate = |after: u64, basis| {
        Some(Estimate {
            start_unix_ms: NOW + after,
            basis,
        })
    };
    let mut best = cpus(1);
    best.machines = 3;
    let first = PendingReason::Capacity {
        need: cpus(2),
        best,
    };
    assert_eq!(
        why(&view, "j0"),
        (first, estimate(30_000, EstimateBasis::ExpectedEnds))
    );
    assert_eq!(
        why(&view, "j2"),
        (
            PendingReason::Behind { jobs: 2 },
            estimate(150_000, EstimateBasis::P50 { runs: 9 })
        )
    );
    view.history.clear();
    view.running[0].expected_end_unix_ms = None;
    assert_eq!(why(&view, "j0").1, None, "no history, no estimate");
}

#[test]
fn jobs_of_other_hosts_are_not_before_it() {
    let mut arm = host("w1", 4);
    arm.facts.arch = label("arm64");
    arm.held = cpus(4);
    let mut full = host("w0", 4);
    full.held = cpus(4);
    let mut view = view(vec![full, arm], Vec::new());
    for at in 0..5 {
        let mut job = job(&format!("a{at}"), "ant", 1);
        job.requires.arch = Some(label("amd64"));
        view.pending.push(job);
    }
    let mut other = job("b", "bee", 1);
    other.requires.arch = Some(label("arm64"));
    view.pending.push(other);
    assert!(matches!(reason(&view, "b"), PendingReason::Capacity { .. }));
    assert_eq!(reason(&view, "a4"), PendingReason::Behind { jobs: 4 });
}

#[test]
fn limits_say_whose_they_are() {
    let mut view = view(vec![host("w0", 9)], vec![job("j", "ant", 1)]);
    view.running = vec![
        running("r0", "ant", 1, "w0", None),
        running("r1", "bee", 1, "w0", None),
    ];
    let quota = |scope, running, limit| PendingReason::Quota {
        scope,
        running,
        limit,
    };
    view.running_max = Some(2);
    assert_eq!(reason(&view, "j"), quota(QuotaScope::Global, 2, 2));
    let limited = QueueRule {
        running_max: Some(1),
        ..QueueRule::default()
    };
    view.queues.insert(queue("default"), limited);
    assert_eq!(reason(&view, "j"), quota(QuotaScope::Queue, 2, 1));
    let limited = TenantRule {
        running_max: Some(1),
        ..TenantRule::default()
    };
    view.tenants.insert(tenant("ant"), limited);
    assert_eq!(reason(&view, "j"), quota(QuotaScope::Tenant, 1, 1));
}

#[test]
fn a_group_is_held_by_who_runs_else_by_who_came_first() {
    let mut view = view(
        vec![host("w0", 9)],
        vec![job("j1", "ant", 1), job("j0", "ant", 1), job("k", "bee", 1)],
    );
    for job in &mut view.pending {
        job.group = Some(label("deploy"));
    }
    view.pending[1].queued_unix_ms -= 10;
    let held = |by: &str| PendingReason::ConcurrencyGroup {
        group: label("deploy"),
        holder: Some(job_id(by)),
    };
    assert_eq!(reason(&view, "j1"), held("j0"));
    assert_eq!(
        plan(&view).assignments.len(),
        2,
        "another tenant's group of that name is another group"
    );
    let mut runs = running("r0", "ant", 1, "w0", Some(NOW + 5000));
    runs.group = Some(label("deploy"));
    view.running.push(runs);
    assert_eq!(reason(&view, "j0"), held("r0"));
    assert_eq!(
        why(&view, "j0").1.map(|estimate| estimate.start_unix_ms),
        Some(NOW + 5000)
    );
    view.running.clear();
    view.pending[1].not_before_unix_ms = NOW + 1;
    assert_eq!(reason(&view, "j1"), held("j0"), "a retry keeps its turn");
    view.pending[1].requires.arch = Some(label("riscv64"));
    assert_eq!(
        plan(&view).assignments.len(),
        2,
        "one that can never start holds nothing"
    );
}

#[test]
fn pauses_backoffs_and_starts() {
    let mut view = view(vec![host("w0", 9)], vec![job("j", "ant", 1)]);
    view.pending[0].not_before_unix_ms = NOW + 7;
    assert_eq!(
        reason(&view, "j"),
        PendingReason::Backoff {
            until_unix_ms: NOW + 7
        }
    );
    let paused = QueueRule {
        paused: true,
        ..QueueRule::default()
    };
    view.queues.insert(queue("default"), paused);
    assert_eq!(
        reason(&view, "j"),
        PendingReason::Paused {
            queue: queue("default")
        }
    );
    view.settling = true;
    assert_eq!(reason(&view, "j"), PendingReason::Settling);
}
