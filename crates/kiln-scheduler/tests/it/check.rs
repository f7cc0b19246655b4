//! The rules every plan keeps, written a second time and without any index.

use std::collections::{BTreeMap, BTreeSet};

use kiln_core::dispatch::{OWN_LABEL, PendingReason, Room};
use kiln_core::{ByteSize, JobId};
use kiln_scheduler::{HistoryKey, PendingJob, Plan, PoolView, Worker};

pub(crate) const OVERDUE_MS: u64 = 600_000;

pub(crate) fn plus(a: &Room, b: &Room) -> Room {
    Room {
        cpus: a.cpus + b.cpus,
        memory: ByteSize(a.memory.0 + b.memory.0),
        disk: ByteSize(a.disk.0 + b.disk.0),
        machines: a.machines + b.machines,
    }
}

fn charge(worker: &Worker, room: &Room, pinned: bool) -> Room {
    let capacity = worker.facts.capacity.cpus;
    match worker.whole_cpus {
        Some(whole) if pinned => Room {
            cpus: if whole == 0 {
                u32::MAX / 4
            } else {
                (room.cpus * capacity).div_ceil(whole)
            },
            ..*room
        },
        _ => *room,
    }
}

/// What is taken on a worker before the plan.
fn taken(view: &PoolView, worker: &Worker) -> Room {
    let on = || view.running.iter().filter(|job| job.worker == worker.id);
    let used = on().fold(Room::default(), |sum, job| plus(&sum, &job.room));
    let more: u32 = on()
        .map(|job| charge(worker, &job.room, job.pinned_cpus).cpus - job.room.cpus)
        .sum();
    Room {
        cpus: used.cpus.max(worker.held.cpus) + more,
        memory: used.memory.max(worker.held.memory),
        disk: used.disk.max(worker.held.disk),
        machines: used.machines.max(worker.held.machines),
    }
}

fn suits(worker: &Worker, job: &PendingJob) -> bool {
    let requires = &job.requires;
    let own = worker.labels.keys().any(|name| name.as_str() == OWN_LABEL);
    (!own || requires.own().is_some())
        && worker
            .tenants
            .as_ref()
            .is_none_or(|tenants| tenants.contains(&job.tenant))
        && requires
            .arch
            .as_ref()
            .is_none_or(|arch| *arch == worker.facts.arch)
        && requires
            .runtime
            .as_ref()
            .is_none_or(|runtime| worker.facts.runtimes.contains(runtime))
        && requires
            .labels
            .iter()
            .all(|(name, value)| worker.labels.get(name) == Some(value))
}

fn end_of(view: &PoolView, job: &PendingJob) -> Option<u64> {
    let key = HistoryKey {
        tenant: job.tenant.clone(),
        queue: job.queue.clone(),
        kind: job.kind.clone(),
    };
    Some(view.now_unix_ms + view.history.get(&key)?.p50_ms)
}

/// Fails with what is wrong.
pub(crate) fn check(view: &PoolView, plan: &Plan) {
    let jobs: BTreeMap<&JobId, &PendingJob> = view
        .pending
        .iter()
        .map(|job| (&job.attempt.job, job))
        .collect();
    let mut seen = BTreeSet::new();
    for assignment in &plan.assignments {
        assert!(
            seen.insert(&assignment.attempt.job),
            "twice: {assignment:?}"
        );
        assert_eq!(assignment.attempt, jobs[&assignment.attempt.job].attempt);
    }
    for (job, _, _) in &plan.reasons {
        assert!(seen.insert(job), "twice: {job}");
    }
    assert_eq!(
        seen.len(),
        jobs.len(),
        "every job has an assignment or a reason"
    );
    let mut after: BTreeMap<_, Room> = view
        .workers
        .iter()
        .map(|worker| (&worker.id, taken(view, worker)))
        .collect();
    let mut touched = BTreeSet::new();
    for assignment in &plan.assignments {
        let job = jobs[&assignment.attempt.job];
        let worker = view
            .workers
            .iter()
            .find(|worker| worker.id == assignment.worker)
            .expect("a worker of the view");
        assert!(
            !view.settling && worker.state.takes_jobs() && suits(worker, job),
            "{assignment:?}"
        );
        assert!(
            job.not_before_unix_ms <= view.now_unix_ms,
            "{assignment:?} backs off"
        );
        assert!(
            !view.queues.get(&job.queue).is_some_and(|rule| rule.paused),
            "{assignment:?} is paused"
        );
        let room = after.get_mut(&worker.id).expect("known");
        *room = plus(room, &charge(worker, &job.need, job.requires.pinned_cpus));
        touched.insert(&worker.id);
    }
    for worker in view
        .workers
        .iter()
        .filter(|worker| touched.contains(&worker.id))
    {
        assert!(
            worker.facts.capacity.holds(&after[&worker.id]),
            "over capacity: {} {:?}",
            worker.id,
            after[&worker.id]
        );
    }
    limits(view, plan, &jobs);
    reasons(view, plan, &jobs, &after);
    reservations(view, plan, &jobs);
}

fn limits(view: &PoolView, plan: &Plan, jobs: &BTreeMap<&JobId, &PendingJob>) {
    let new = || {
        plan.assignments
            .iter()
            .map(|assignment| jobs[&assignment.attempt.job])
    };
    let count = |of: &dyn Fn(&PendingJob) -> bool,
                 before: &dyn Fn(&kiln_scheduler::RunningJob) -> bool| {
        let added = new().filter(|job| of(job)).count();
        let total = added + view.running.iter().filter(|job| before(job)).count();
        (added > 0).then_some(total as u32)
    };
    for (name, rule) in &view.tenants {
        let total = count(&|job| job.tenant == *name, &|job| job.tenant == *name);
        if let (Some(total), Some(limit)) = (total, rule.running_max) {
            assert!(
                total <= limit + rule.burst,
                "tenant {name}: {total} > {limit} + {}",
                rule.burst
            );
        }
    }
    for (name, rule) in &view.queues {
        let total = count(&|job| job.queue == *name, &|job| job.queue == *name);
        if let (Some(total), Some(limit)) = (total, rule.running_max) {
            assert!(total <= limit, "queue {name}: {total} > {limit}");
        }
    }
    if let (Some(total), Some(limit)) = (count(&|_| true, &|_| true), view.running_max) {
        assert!(total <= limit, "global: {total} > {limit}");
    }
    for job in new() {
        let Some(group) = &job.group else { continue };
        let total = count(
            &|other| other.tenant == job.tenant && other.group.as_ref() == Some(group),
            &|other| other.tenant == job.tenant && other.group.as_ref() == Some(group),
        );
        assert_eq!(total, Some(1), "group {group} of {}", job.tenant);
    }
}

/// Reasons are true, name nothing foreign, and nobody young waits for room that is there.
fn reasons(
    view: &PoolView,
    plan: &Plan,
    jobs: &BTreeMap<&JobId, &PendingJob>,
    after: &BTreeMap<&kiln_core::WorkerId, Room>,
) {
    let reserved: BTreeSet<_> = plan
        .reservations
        .iter()
        .map(|reservation| &reservation.worker)
        .collect();
    for (id, reason, estimate) in &plan.reasons {
        let job = jobs[id];
        if let Some(estimate) = estimate {
            assert!(
                estimate.start_unix_ms >= view.now_unix_ms,
                "{id} should have started: {estimate:?}"
            );
        }
        match reason {
            PendingReason::Capacity { need, best } => {
                assert!(*need == job.need && !best.holds(need), "{id}: {reason:?}");
            }
            PendingReason::ConcurrencyGroup { group, holder } => {
                assert_eq!(Some(group), job.group.as_ref());
                let holder = holder.as_ref().expect("named: it is of the same tenant");
                let owner = jobs.get(holder).map(|job| &job.tenant);
                let runs = view
                    .running
                    .iter()
                    .find(|job| job.job == *holder)
                    .map(|job| &job.tenant);
                assert_eq!(owner.or(runs), Some(&job.tenant), "{id}: a foreign holder");
            }
            PendingReason::Quota { running, limit, .. } => {
                assert!(running >= limit, "{id}: {reason:?}")
            }
            PendingReason::Settling => assert!(view.settling),
            PendingReason::New => panic!("{id} was not looked at"),
            _ => {}
        }
        let waits_for_room = matches!(
            reason,
            PendingReason::Capacity { .. } | PendingReason::Behind { .. } | PendingReason::Reserved
        );
        let young = view
            .pending
            .iter()
            .all(|job| view.now_unix_ms - job.queued_unix_ms < OVERDUE_MS);
        if waits_for_room && young {
            for worker in &view.workers {
                let with = plus(
                    &after[&worker.id],
                    &charge(worker, &job.need, job.requires.pinned_cpus),
                );
                let free = worker.state.takes_jobs()
                    && suits(worker, job)
                    && !reserved.contains(&worker.id);
                assert!(
                    !(free && worker.facts.capacity.holds(&with)),
                    "{id} waits although {} has room",
                    worker.id
                );
            }
        }
    }
}

/// By the estimates, each reserved host has room for its job when it should.
fn reservations(view: &PoolView, plan: &Plan, jobs: &BTreeMap<&JobId, &PendingJob>) {
    let mut hosts = BTreeSet::new();
    for reservation in &plan.reservations {
        assert!(
            hosts.insert(&reservation.worker),
            "{} is kept twice",
            reservation.worker
        );
        let job = jobs[&reservation.job];
        let worker = view
            .workers
            .iter()
            .find(|worker| worker.id == reservation.worker)
            .expect("known");
        assert!(worker.state.takes_jobs() && suits(worker, job));
        let Some(from) = reservation.from_unix_ms else {
            continue;
        };
        let mut used = Room::default();
        let mut gone = Room::default();
        for runs in view.running.iter().filter(|runs| runs.worker == worker.id) {
            let charge = charge(worker, &runs.room, runs.pinned_cpus);
            if runs
                .expected_end_unix_ms
                .is_some_and(|end| end.max(view.now_unix_ms + 1) <= from)
            {
                gone = plus(&gone, &charge);
            }
        }
        for assignment in plan
            .assignments
            .iter()
            .filter(|assignment| assignment.worker == worker.id)
        {
            let other = jobs[&assignment.attempt.job];
            if end_of(view, other).is_none_or(|end| end > from) {
                used = plus(
                    &used,
                    &charge(worker, &other.need, other.requires.pinned_cpus),
                );
            }
        }
        let taken = taken(view, worker);
        let left = Room {
            cpus: taken.cpus.saturating_sub(gone.cpus),
            memory: ByteSize(taken.memory.0.saturating_sub(gone.memory.0)),
            disk: ByteSize(taken.disk.0.saturating_sub(gone.disk.0)),
            machines: taken.machines.saturating_sub(gone.machines),
        };
        let with = plus(
            &plus(&left, &used),
            &charge(worker, &job.need, job.requires.pinned_cpus),
        );
        assert!(
            worker.facts.capacity.holds(&with),
            "{reservation:?} is delayed: {with:?} of {:?}",
            worker.facts.capacity
        );
    }
}
