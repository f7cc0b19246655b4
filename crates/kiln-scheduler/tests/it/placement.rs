//! Where a job goes, and in which order jobs go.

use kiln_core::Priority;
use kiln_core::dispatch::{PendingReason, WorkerState, own_labels};
use kiln_scheduler::{Plan, PoolView, Profile, QueueRule, TenantRule, plan};

use crate::build::{NOW, cpus, host, job, label, queue, running, tenant, typical, view, worker_id};
use crate::check::check;

fn planned(view: &PoolView) -> Plan {
    let plan = plan(view);
    check(view, &plan);
    plan
}

fn places(view: &PoolView) -> Vec<(String, String)> {
    let to = |new: &kiln_core::Assignment| (new.attempt.job.to_string(), new.worker.to_string());
    planned(view).assignments.iter().map(to).collect()
}

fn order(view: &PoolView) -> Vec<String> {
    places(view).into_iter().map(|(job, _)| job).collect()
}

#[test]
fn spread_takes_the_emptiest_host_and_pack_the_fullest() {
    let mut view = view(vec![host("w0", 8), host("w1", 8)], vec![job("j", "ant", 1)]);
    view.running = (0..3)
        .map(|at| running(&format!("r{at}"), "ant", 1, "w0", None))
        .collect();
    assert_eq!(places(&view), [("j".to_owned(), "w1".to_owned())]);
    view.profile = Profile::Pack;
    assert_eq!(places(&view), [("j".to_owned(), "w0".to_owned())]);
}

#[test]
fn a_warm_host_is_preferred_until_it_is_four_fifths_full() {
    let mut view = view(
        (0..8).map(|at| host(&format!("w{at}"), 10)).collect(),
        vec![job("j", "ant", 1)],
    );
    view.workers[5].facts.warm.insert(tenant("ant"));
    view.workers[5].held = cpus(7);
    assert_eq!(places(&view)[0].1, "w5");
    view.workers[5].held = cpus(8);
    assert_ne!(places(&view)[0].1, "w5");
    view.workers[3].templates.insert(label("t1"));
    view.pending[0].template = Some(label("t1"));
    assert_eq!(places(&view)[0].1, "w3");
}

#[test]
fn a_tenant_keeps_its_host_when_others_come_and_go() {
    let full = view(
        (0..9).map(|at| host(&format!("w{at}"), 10)).collect(),
        vec![job("j", "ant", 1)],
    );
    let home = places(&full)[0].1.clone();
    for gone in 0..9 {
        let mut fewer = full.clone();
        fewer.workers.remove(gone);
        if home != format!("w{gone}") {
            assert_eq!(places(&fewer)[0].1, home);
        }
    }
}

#[test]
fn hosts_that_failed_come_last_and_those_to_avoid_after_all_others() {
    let mut view = view(vec![host("w0", 4), host("w1", 4)], vec![job("j", "ant", 1)]);
    for host in 0..2 {
        view.workers[host].infra_failures = 2;
        assert_eq!(places(&view)[0].1, format!("w{}", 1 - host));
        view.workers[host].infra_failures = 0;
    }
    view.workers[1].infra_failures = 9;
    view.pending[0].avoid.insert(worker_id("w0"));
    assert_eq!(places(&view)[0].1, "w1");
    view.workers[1].state = WorkerState::Lost;
    assert_eq!(places(&view)[0].1, "w0", "better than nowhere");
}

#[test]
fn tenants_share_by_weight_and_queues_within_them() {
    let mut view = view(vec![host("w0", 8)], Vec::new());
    view.running_max = Some(8);
    for at in 0..8 {
        view.pending.push(job(&format!("a{at}"), "ant", 1));
        let mut bee = job(&format!("b{at}"), "bee", 1);
        bee.queue = queue(if at < 4 { "default" } else { "nightly" });
        view.pending.push(bee);
    }
    let rule = |weight| TenantRule {
        weight,
        ..TenantRule::default()
    };
    view.tenants = [(tenant("ant"), rule(100)), (tenant("bee"), rule(300))].into();
    let nightly = QueueRule {
        weight: 200,
        ..QueueRule::default()
    };
    view.queues.insert(queue("nightly"), nightly);
    let order = order(&view);
    let count = |of: &dyn Fn(&str) -> bool| order.iter().filter(|job| of(job)).count();
    assert_eq!(
        (
            count(&|job| job.starts_with('a')),
            count(&|job| job.starts_with('b'))
        ),
        (2, 6)
    );
    assert_eq!(
        count(&|job| job.starts_with('b') && job > "b3"),
        4,
        "twice the weight: {order:?}"
    );
}

#[test]
fn priority_moves_a_job_up_but_not_for_ever() {
    let mut view = view(
        vec![host("w0", 1)],
        vec![job("old", "ant", 1), job("high", "ant", 1)],
    );
    view.pending[1].priority = Priority::try_from(100).expect("in range");
    assert_eq!(order(&view), ["high"]);
    view.pending[0].queued_unix_ms = NOW - 11 * 60_000;
    assert_eq!(order(&view), ["old"]);
}

#[test]
fn a_limit_may_be_passed_only_after_all_others_had_their_turn() {
    let mut view = view(vec![host("w0", 4)], Vec::new());
    view.pending = (0..4).map(|at| job(&format!("a{at}"), "ant", 1)).collect();
    let rule = TenantRule {
        running_max: Some(1),
        burst: 2,
        weight: 1000,
        ..TenantRule::default()
    };
    view.tenants.insert(tenant("ant"), rule);
    assert_eq!(order(&view), ["a0", "a1", "a2"]);
    for at in 0..2 {
        view.pending.push(job(&format!("b{at}"), "bee", 1));
    }
    assert_eq!(order(&view), ["a0", "b0", "b1", "a1"]);
}

#[test]
fn what_is_reserved_for_a_tenant_is_left_free_and_comes_first() {
    let mut view = view(
        vec![host("w0", 9)],
        (0..9).map(|at| job(&format!("a{at}"), "ant", 1)).collect(),
    );
    view.running_max = Some(4);
    let rule = TenantRule {
        reserved: 2,
        weight: 1,
        ..TenantRule::default()
    };
    view.tenants.insert(tenant("bee"), rule);
    assert_eq!(
        order(&view).len(),
        2,
        "two of four are left for the other tenant"
    );
    view.pending.push(job("b0", "bee", 1));
    assert_eq!(order(&view)[0], "b0");
}

#[test]
fn pinned_cpus_of_an_overcommitted_host_are_whole() {
    let mut view = view(vec![host("w0", 8)], Vec::new());
    view.workers[0].whole_cpus = Some(4);
    for at in 0..6 {
        let mut job = job(&format!("j{at}"), "ant", 1);
        job.requires.pinned_cpus = true;
        view.pending.push(job);
    }
    assert_eq!(
        order(&view).len(),
        4,
        "four whole CPUs, whatever the capacity says"
    );
}

#[test]
fn small_jobs_pass_a_large_one_only_when_they_end_in_time_or_elsewhere() {
    let mut view = view(
        vec![host("w0", 4)],
        vec![
            job("large", "ant", 4),
            job("short", "bee", 1),
            job("long", "cat", 1),
        ],
    );
    view.running = vec![running("r0", "ant", 2, "w0", Some(NOW + 60_000))];
    view.pending[0].queued_unix_ms -= 5000;
    typical(&mut view, "bee", 30_000);
    typical(&mut view, "cat", 90_000);
    for (name, weight) in [("ant", 1000), ("bee", 1), ("cat", 1)] {
        let rule = TenantRule {
            weight,
            ..TenantRule::default()
        };
        view.tenants.insert(tenant(name), rule);
    }
    let plan = planned(&view);
    assert_eq!(order(&view), ["short"]);
    assert_eq!(plan.reservations[0].from_unix_ms, Some(NOW + 60_000));
    let long = plan
        .reasons
        .iter()
        .find(|(job, _, _)| job.as_str() == "long")
        .map(|(_, reason, _)| reason.code());
    assert_eq!(long, Some("reserved"));
    view.workers.push(host("w1", 2));
    assert!(places(&view).contains(&("long".to_owned(), "w1".to_owned())));
}

#[test]
fn an_overdue_large_job_without_a_host_is_not_passed_by_its_own_tenant() {
    let mut view = view(
        vec![host("w0", 4), host("w1", 4)],
        vec![
            job("first", "ant", 4),
            job("large", "bee", 3),
            job("small", "bee", 1),
            job("other", "cat", 1),
        ],
    );
    view.running = vec![
        running("r0", "bee", 2, "w0", None),
        running("r1", "cat", 2, "w1", None),
    ];
    for (name, weight) in [("ant", 1000), ("cat", 1)] {
        let rule = TenantRule {
            weight,
            ..TenantRule::default()
        };
        view.tenants.insert(tenant(name), rule);
    }
    view.pending[1].queued_unix_ms = NOW - 9 * 60_000;
    assert_eq!(
        order(&view),
        ["small", "other"],
        "it may pass one that came lately"
    );
    view.pending[1].queued_unix_ms = NOW - 11 * 60_000;
    assert_eq!(
        order(&view),
        ["other"],
        "what it leaves is for other tenants"
    );
    view.running[0].started_unix_ms = NOW - 12 * 60_000;
    assert_eq!(
        planned(&view).reservations[0].job.as_str(),
        "large",
        "then its tenant is due, before heavier ones"
    );
}

#[test]
fn a_commands_own_worker_runs_nothing_else_and_its_job_runs_nowhere_else() {
    let mut own = host("command-1", 8);
    own.labels = own_labels(&own.id);
    let mut mine = job("mine", "ant", 1);
    mine.requires.only_own(&own.id);
    let jobs = vec![job("a", "ant", 1), mine.clone(), job("b", "ant", 1)];
    let both = view(vec![own.clone(), host("w0", 1)], jobs);
    let mut placed = places(&both);
    placed.sort();
    let want = [("a", "w0"), ("mine", "command-1")];
    assert_eq!(
        placed,
        want.map(|(job, host)| (job.to_owned(), host.to_owned()))
    );
    let alone = view(vec![own], vec![job("a", "ant", 1)]);
    assert_eq!(planned(&alone).reasons[0].1, PendingReason::NoWorkers);
    let without = planned(&view(vec![host("w0", 8)], vec![mine]));
    let missing = "label kiln/own=command-1".to_owned();
    let why = PendingReason::NoWorkerMatches {
        missing,
        workers: 1,
    };
    assert_eq!(without.reasons[0].1, why);
}
