//! What is shown, from the start and after something happened.

use super::*;

fn series(text: &str) -> Vec<&str> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' ').map(|(name, _)| name))
        .collect()
}

#[test]
fn every_series_exists_from_the_start_and_none_comes_later() {
    let metrics = Metrics::new(Prefix::Kiln, "1.2.3");
    let before = metrics.render();
    let reasons =
        PendingReason::CODES.map(|code| format!("kiln_jobs_pending{{reason=\"{code}\"}} 0"));
    for line in [
        "kiln_build_cache_hits_total{result=\"hit\",tier=\"tenant\"} 0",
        "kiln_build_duration_seconds_count{runtime=\"node\",status=\"out_of_memory\"} 0",
        "kiln_build_queue_wait_seconds_count 0",
        "kiln_build_vm_boot_seconds_count 0",
        "kiln_build_push_duration_seconds_count 0",
        "kiln_lease_expiries_total 0",
        "kiln_machine_orphans_total 0",
        "kiln_egress_decisions_total{verdict=\"refused\",reason=\"address\"} 0",
        "kiln_egress_bytes_total{direction=\"out\"} 0",
        "kiln_workers{state=\"quarantined\"} 0",
        "kiln_access_total{door=\"registry\",result=\"denied\"} 0",
        "kiln_build_info{version=\"1.2.3\"} 1",
    ]
    .into_iter()
    .chain(reasons.iter().map(String::as_str))
    {
        assert!(
            before.lines().any(|l| l == line),
            "{line} is not in\n{before}"
        );
    }
    let evil = "x\",y=\"1\n#";
    metrics.build_ended(evil, &Verdict::Passed, 3.0);
    metrics.cache(true, evil, 1);
    metrics.access("user", false);
    metrics.egress("refused", "name", 4);
    metrics.egress("refused", evil, 4);
    metrics.egress_bytes(7, 9);
    metrics.queue(&QueueNow {
        oldest_seconds: 1.5,
        pending: vec![("capacity", 2), ("quota", 1), ("capacity", 1), ("evil", 9)],
        running: 4,
        workers: vec![(WorkerState::Lost, 1)],
    });
    let after = metrics.render();
    assert_eq!(series(&before), series(&after));
    for line in [
        "kiln_build_duration_seconds_count{runtime=\"other\",status=\"passed\"} 1",
        "kiln_queue_depth 4",
        "kiln_egress_decisions_total{verdict=\"refused\",reason=\"name\"} 4",
        "kiln_egress_bytes_total{direction=\"in\"} 9",
        "kiln_queue_age_seconds 1.5",
        "kiln_jobs_pending{reason=\"capacity\"} 3",
        "kiln_workers{state=\"lost\"} 1",
        "kiln_access_total{door=\"user\",result=\"denied\"} 1",
    ] {
        assert!(
            after.lines().any(|l| l == line),
            "{line} is not in\n{after}"
        );
    }
    assert!(after.ends_with("# EOF\n"));
}

#[test]
fn another_prefix_changes_every_name() {
    let text = Metrics::new("hypeman".parse().expect("known"), "1").render();
    assert!(
        series(&text)
            .iter()
            .all(|name| name.starts_with("hypeman_"))
    );
    for name in [
        "hypeman_build_duration_seconds",
        "hypeman_build_cache_hits",
        "hypeman_build_queue_wait_seconds",
        "hypeman_build_vm_boot_seconds",
        "hypeman_build_push_duration_seconds",
    ] {
        assert!(text.contains(&format!("# TYPE {name} ")), "{name}");
    }
    assert!("Kiln".parse::<Prefix>().is_err());
}
