//! A build whose guest or VMM dies, or hangs, in each phase, and one whose guest lies: the right class, nothing published, nothing left.

use kiln_core::FailureClass;
use kiln_core::job::TrustClass;
use kiln_image::heads::{Candidate, Commit, SHARED};
use kiln_machine::driver::StopReason;
use kiln_machine::sim::{Fault, Step, Trouble};
use tokio_util::sync::CancellationToken;

use crate::workshop::{Guest, Workshop};

/// Longer than any of these builds takes.
const TIMEOUT_MS: u64 = 60_000;
/// Steps of a build up to its end; a failure there is the build's.
const BUILDING: [Step; 11] = [
    Step::Boot,
    Step::Hello,
    Step::Reidentify,
    Step::Thaw,
    Step::Mount,
    Step::SetLimits,
    Step::PutFile,
    Step::SetStepEnv,
    Step::StartBuildkit,
    Step::PutTree,
    Step::Exec,
];
/// Steps after its image was named; a failure there only costs the cache.
const COMMITTING: [Step; 3] = [Step::StopBuildkit, Step::Unmount, Step::Shutdown];

#[tokio::test]
async fn an_honest_build_is_verified_named_and_recorded() {
    let shop = Workshop::open(Guest::Honest).await;
    let end = shop.build(TIMEOUT_MS, &CancellationToken::new()).await;
    let report = end.result.expect("built");
    assert_eq!(report.reference, "t/local/app:latest");
    assert_eq!(end.observed.map(|seen| seen.manifest), Some(report.digest));
    shop.assert_left(&["t/local/app"], "built").await;
}

/// A head of this scope, as a build of it would leave it.
fn head_of(shop: &Workshop, scope: &str) -> String {
    let heads = &shop.host.heads;
    let shared = heads.current(SHARED).expect("reads").expect("a head");
    let file = shop.host.home.heads().join("next");
    std::fs::write(&file, scope).expect("write");
    let candidate = Candidate {
        file: &file,
        stands_on: Some(&shared),
        written_by: "test".to_owned(),
        buildkit: "v0".to_owned(),
        now_unix_ms: 1,
    };
    match heads.commit(scope, Some(&shared), &candidate) {
        Ok(Commit::Committed(head)) => head.id,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_untrusted_build_forks_nothing_that_a_secret_may_have_touched() {
    let shop = Workshop::open(Guest::Honest).await;
    let (own, plain) = (head_of(&shop, "local"), head_of(&shop, "local.plain"));
    let secret = || vec![("token".to_owned(), b"tr0ub4dor".to_vec())];
    let cancel = CancellationToken::new();
    for (trust, secrets, forks) in [
        (TrustClass::Untrusted, Vec::new(), &plain),
        (TrustClass::Untrusted, secret(), &plain),
        (TrustClass::Trusted, secret(), &own),
    ] {
        let what = format!("{trust:?}, {} secrets", secrets.len());
        let with = (trust, secrets);
        let end = shop.build_with(with, kiln_core::Dispatch::default(), TIMEOUT_MS, &cancel);
        let report = end.await.result.expect("built");
        assert_eq!(report.head.0.as_ref(), Some(forks), "{what}");
    }
    shop.assert_left(&["t/local/app"], "built").await;
}

/// What the records of the machines of this home say of their CPUs.
fn host_cpus(shop: &Workshop) -> Vec<Vec<u64>> {
    let machines = std::fs::read_dir(shop.host.home.data.join("machines"));
    let records = machines.into_iter().flatten().flatten();
    let texts = records.filter_map(|entry| std::fs::read(entry.path().join("record.json")).ok());
    let values = texts.filter_map(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
    let cpus = values.filter_map(|record| serde_json::from_value(record["host_cpus"].clone()).ok());
    cpus.collect()
}

#[tokio::test]
async fn a_job_that_asks_for_whole_cpus_gets_a_machine_with_its_own() {
    let shop = Workshop::open(Guest::Honest).await;
    let dispatch = kiln_core::Dispatch {
        requires: kiln_core::dispatch::Requirements {
            pinned_cpus: true,
            ..Default::default()
        },
        ..Default::default()
    };
    // Its guest says nothing any more once it is to build, so that the machine can be looked at.
    shop.driver
        .inject_always(Fault::At(Step::Exec, Trouble::Silent));
    let cancel = CancellationToken::new();
    let building = shop.build_as(dispatch, TIMEOUT_MS, &cancel);
    let looking = async {
        loop {
            if let Some(cpus) = host_cpus(&shop).pop() {
                cancel.cancel();
                return cpus;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    let (end, cpus) = tokio::join!(building, looking);
    assert_eq!(
        end.result.expect_err("cancelled").class,
        FailureClass::Cancelled
    );
    let last = kiln_machine::pins::usable()
        .expect("affinity")
        .last()
        .copied();
    assert_eq!(cpus, [u64::from(last.expect("a CPU"))]);
    let left = shop.host.ledger.list().await.expect("a list");
    assert!(left.is_empty(), "given back: {left:?}");
    shop.assert_left(&[], "cancelled").await;
}

#[tokio::test]
async fn a_guest_that_lies_about_its_image_is_a_guest_fault_and_nothing_gets_a_name() {
    let lies = [
        (Guest::NamesAnother, "the registry holds"),
        (Guest::PushesNothing, "there is none"),
    ];
    for (lie, words) in lies {
        let shop = Workshop::open(lie).await;
        let end = shop.build(TIMEOUT_MS, &CancellationToken::new()).await;
        let failure = end.result.expect_err("a lie");
        assert_eq!(
            failure.class,
            FailureClass::GuestFault,
            "{lie:?}: {failure}"
        );
        assert_eq!(failure.class.exit_code(), 5);
        assert!(failure.message.contains(words), "{lie:?}: {failure}");
        assert!(end.observed.is_none(), "{lie:?}");
        shop.assert_left(&[], &format!("{lie:?}")).await;
    }
}

#[tokio::test]
async fn the_end_of_guest_or_vmm_in_any_phase_is_told_and_leaves_nothing() {
    for step in BUILDING {
        for (reason, class) in [
            (StopReason::GuestPanic, FailureClass::GuestFault),
            (StopReason::PoweredOff, FailureClass::GuestFault),
            (StopReason::VmmDied, FailureClass::Infrastructure),
            (StopReason::HostIo, FailureClass::Infrastructure),
        ] {
            let what = format!("{step:?} {reason:?}");
            let shop = Workshop::open(Guest::Honest).await;
            shop.driver
                .inject_always(Fault::At(step, Trouble::Stops(reason)));
            let end = shop.build(TIMEOUT_MS, &CancellationToken::new()).await;
            let failure = end.result.expect_err(&what);
            // Before it has proved its identity nothing of the job is in it: then it is the host's to explain.
            let early = matches!(
                step,
                Step::Boot | Step::Hello | Step::Reidentify | Step::Thaw
            );
            let told =
                failure.class == class || (early && matches!(failure.class.exit_code(), 3 | 5));
            assert!(told, "{what}: {:?} {failure}", failure.class);
            shop.assert_left(&[], &what).await;
        }
    }
}

#[tokio::test]
async fn the_end_of_a_machine_after_its_image_was_named_only_costs_the_cache() {
    for step in COMMITTING {
        for reason in [
            StopReason::GuestPanic,
            StopReason::VmmDied,
            StopReason::HostIo,
        ] {
            let what = format!("{step:?} {reason:?}");
            let shop = Workshop::open(Guest::Honest).await;
            shop.driver
                .inject_always(Fault::At(step, Trouble::Stops(reason)));
            let end = shop.build(TIMEOUT_MS, &CancellationToken::new()).await;
            let report = end
                .result
                .unwrap_or_else(|failure| panic!("{what}: {failure}"));
            assert_eq!(report.head.1, None, "{what}: not committed");
            shop.assert_left(&["t/local/app"], &what).await;
        }
    }
}

#[tokio::test]
async fn a_guest_that_hangs_in_any_phase_is_ended_by_the_time_limit() {
    for step in BUILDING {
        let what = format!("{step:?}");
        let shop = Workshop::open(Guest::Honest).await;
        shop.driver.inject_always(Fault::At(step, Trouble::Silent));
        let end = shop.build(300, &CancellationToken::new()).await;
        let failure = end.result.expect_err(&what);
        assert_eq!(failure.class, FailureClass::Timeout, "{what}: {failure}");
        shop.assert_left(&[], &what).await;
    }
}

/// As kill -9 does it: the build's future is gone at some moment of each phase, and the next command on the home tidies up.
#[tokio::test]
async fn a_build_that_is_dropped_in_any_phase_leaves_nothing() {
    for step in BUILDING {
        let what = format!("{step:?}");
        let shop = Workshop::open(Guest::Honest).await;
        shop.driver.inject_always(Fault::At(step, Trouble::Silent));
        let cancel = CancellationToken::new();
        let building = shop.build(TIMEOUT_MS, &cancel);
        let ended = tokio::time::timeout(std::time::Duration::from_millis(300), building).await;
        assert!(ended.is_err(), "{what}: it hangs there");
        shop.registry
            .discard_quarantine(&kiln_core::AttemptId {
                job: "b1".parse().expect("an id"),
                number: 1,
            })
            .await;
        shop.assert_left(&[], &what).await;
    }
}
