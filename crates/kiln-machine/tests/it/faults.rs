//! Every trouble at every step of a simulated machine's life: the host always learns in bounded time, and nothing is left behind.
//!
//! The clock is virtual: a deadline of a minute costs nothing.

use std::time::Duration;

use kiln_core::FailureClass;
use kiln_machine::bring_up::{self, BringUpError, CLOCK_TOLERANCE};
use kiln_machine::driver::{
    Driver as _, LaunchError, MachineState, Start, StopReason, TemplateRef,
};
use kiln_machine::sim::{Fault, Lie, SimConfig, SimDriver, Step, Trouble, Violation};
use kiln_proto::CloseReason;
use kiln_proto::msg::{GuestErrorCode, Order, Place, PutTree, kind};

use crate::host::{Failed, Host, identity, request};
use crate::life::{DEADLINE, DEADLINES, Ended, Sim, get_tree, live, put, tar, whole_life};

#[tokio::test(start_paused = true)]
async fn a_life_without_faults_ends_well() {
    let sim = Sim::new();
    let Ended::Well(machine) = whole_life(&sim, &sim.spec("m")).await else {
        panic!("it had no reason");
    };
    let state = machine.stop(DEADLINE).await;
    assert_eq!(state, MachineState::Stopped(StopReason::PoweredOff));
    assert!(machine.destroy().await.leaks.is_empty());
    sim.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn the_end_of_guest_or_vmm_is_noticed_at_every_step() {
    let reasons = [
        StopReason::GuestPanic,
        StopReason::VmmDied,
        StopReason::Reset,
        StopReason::HostIo,
        StopReason::PoweredOff,
    ];
    for step in Step::ALL {
        for reason in reasons {
            let sim = Sim::new();
            let trouble = Trouble::Stops(reason);
            sim.driver.inject_always(Fault::At(step, trouble));
            match whole_life(&sim, &sim.spec("m")).await {
                Ended::BringUp(BringUpError::Stopped { reason: told, .. }) => {
                    assert_eq!(told, reason, "{step:?}");
                }
                Ended::At(at, Failed::Broken(_), machine, _host) => {
                    assert_eq!(at, step);
                    assert_eq!(machine.stopped().await, MachineState::Stopped(reason));
                    assert!(machine.destroy().await.leaks.is_empty());
                }
                Ended::BringUp(error) => panic!("{step:?} {reason:?}: {error:?}"),
                Ended::At(at, failed, ..) => panic!("{step:?} {reason:?}: {at:?} {failed:?}"),
                Ended::Well(_) => panic!("{step:?} {reason:?}: nobody noticed"),
            }
            sim.assert_nothing_left();
        }
    }
}

/// The same for a clone, on its way to ready: from there on its life is that of any machine.
#[tokio::test(start_paused = true)]
async fn the_end_of_a_clone_is_noticed_at_every_step_of_its_start() {
    let sim = Sim::new();
    let template = sim.template().await;
    for step in [Step::Boot, Step::Hello, Step::Reidentify, Step::Thaw] {
        for trouble in [
            Trouble::Stops(StopReason::GuestPanic),
            Trouble::Stops(StopReason::VmmDied),
            Trouble::Stops(StopReason::HostIo),
            Trouble::Silent,
        ] {
            sim.driver.inject(Fault::At(step, trouble));
            let start = Start::Template(template.template.clone());
            let spec = sim.spec("clone");
            let started = bring_up::start(&sim.driver, &spec, &start, DEADLINES).await;
            let error = started.expect_err("it did not live");
            let what = format!("{step:?} {trouble:?}: {error:?}");
            match (&trouble, &error) {
                (Trouble::Stops(reason), BringUpError::Stopped { reason: told, .. }) => {
                    assert_eq!(reason, told, "{what}");
                }
                (Trouble::Silent, BringUpError::Hello { .. } | BringUpError::Order { .. }) => {}
                _ => panic!("{what}"),
            }
            assert_eq!(error.class(), FailureClass::Infrastructure, "{what}");
            let again = !matches!(trouble, Trouble::Stops(StopReason::HostIo));
            assert_eq!(error.is_worth_a_retry(), again, "{what}");
            sim.assert_nothing_left();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_guest_is_given_up_at_every_step() {
    for step in Step::ALL {
        let sim = Sim::new();
        sim.driver.inject_always(Fault::At(step, Trouble::Silent));
        match whole_life(&sim, &sim.spec("m")).await {
            Ended::BringUp(BringUpError::Hello { .. }) => {
                assert!(matches!(step, Step::Boot | Step::Hello), "{step:?}");
            }
            Ended::BringUp(BringUpError::Order { .. }) => {
                assert!(matches!(step, Step::Reidentify | Step::Thaw), "{step:?}");
            }
            Ended::At(at, Failed::Timeout, machine, _host) => {
                assert_eq!(at, step);
                let state = machine.stop(DEADLINE).await;
                assert_eq!(state, MachineState::Stopped(StopReason::Killed));
                assert!(machine.destroy().await.leaks.is_empty());
            }
            Ended::BringUp(error) => panic!("{step:?}: {error:?}"),
            Ended::At(at, failed, ..) => panic!("{step:?}: {at:?} {failed:?}"),
            Ended::Well(_) => panic!("{step:?}: nobody noticed"),
        }
        sim.assert_nothing_left();
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_breaks_the_protocol_is_caught_at_every_step() {
    for step in Step::ALL.into_iter().filter(|step| *step != Step::Boot) {
        for violation in Violation::ALL {
            let sim = Sim::new();
            let trouble = Trouble::Violates(violation);
            sim.driver.inject_always(Fault::At(step, trouble));
            // These leave a conversation that is well-formed and goes nowhere.
            let may_stall = matches!(violation, Violation::OpenFlood | Violation::NotJson);
            match whole_life(&sim, &sim.spec("m")).await {
                Ended::BringUp(error) => {
                    let class = error.class();
                    let caught = class == FailureClass::GuestFault;
                    assert!(
                        caught || may_stall || step == Step::Hello,
                        "{step:?} {violation:?}: {class:?} {error:?}"
                    );
                }
                Ended::At(at, failed, machine, host) => {
                    assert_eq!(at, step, "{violation:?}");
                    match failed {
                        Failed::Broken(_) => {}
                        Failed::Timeout if may_stall => {}
                        other => panic!("{step:?} {violation:?}: {other:?}"),
                    }
                    if matches!(
                        violation,
                        Violation::OversizedFrame | Violation::Garbage | Violation::UnknownStream
                    ) {
                        let reason = host.session.closed().await;
                        assert!(matches!(reason, CloseReason::Protocol(_)), "{reason:?}");
                    }
                    assert!(!machine.state().is_terminal(), "its machine is ours to end");
                    assert!(machine.destroy().await.leaks.is_empty());
                }
                Ended::Well(_) => panic!("{step:?} {violation:?}: nobody noticed"),
            }
            sim.assert_nothing_left();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_passed_on_and_the_guest_lives() {
    for step in Step::ALL {
        if matches!(step, Step::Boot | Step::Hello) {
            continue;
        }
        let sim = Sim::new();
        let trouble = Trouble::Refuses(GuestErrorCode::DiskFull);
        sim.driver.inject_always(Fault::At(step, trouble));
        match whole_life(&sim, &sim.spec("m")).await {
            Ended::BringUp(error) => {
                assert!(matches!(step, Step::Reidentify | Step::Thaw), "{error:?}");
            }
            Ended::At(at, Failed::Refused(_), machine, host) => {
                assert_eq!(at, step);
                host.session.ping(DEADLINE).await.expect("it lives");
                assert!(machine.destroy().await.leaks.is_empty());
            }
            Ended::At(at, failed, ..) => panic!("{step:?}: {at:?} {failed:?}"),
            Ended::Well(_) => panic!("{step:?}: nobody noticed"),
        }
        sim.assert_nothing_left();
    }
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_dies_anywhere_is_noticed() {
    // Within the echo, within the hello, and within each frame that follows.
    for bytes in (1..400).step_by(13).chain([48, 49, 57, 1000, 2000, 3000]) {
        let sim = Sim::new();
        sim.driver.inject_always(Fault::ChannelDiesAfter { bytes });
        match whole_life(&sim, &sim.spec("m")).await {
            Ended::BringUp(_) => {}
            Ended::At(step, failed, machine, _host) => {
                assert!(
                    matches!(failed, Failed::Broken(_)),
                    "{bytes}: {step:?} {failed:?}"
                );
                assert!(!machine.state().is_terminal(), "only the channel died");
                assert!(machine.destroy().await.leaks.is_empty());
            }
            Ended::Well(_) => panic!("{bytes}: nobody noticed"),
        }
        sim.assert_nothing_left();
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_guest_is_waited_for() {
    let sim = Sim::new();
    let per_step = DEADLINE / 3;
    sim.driver.inject(Fault::Slow { per_step });
    let Ended::Well(machine) = whole_life(&sim, &sim.spec("m")).await else {
        panic!("slow is not dead");
    };
    assert!(machine.destroy().await.leaks.is_empty());
    // Slower than the deadline is.
    let per_step = DEADLINE * 2;
    sim.driver.inject_always(Fault::Slow { per_step });
    let ended = whole_life(&sim, &sim.spec("m")).await;
    assert!(matches!(ended, Ended::BringUp(_)));
    sim.assert_nothing_left();
}

/// Its clock was set to the time at which it was asked, and is late by what the answer took.
#[tokio::test(start_paused = true)]
async fn a_guest_that_takes_its_identity_slowly_is_told_the_time_again() {
    let mut took = Vec::new();
    for per_step in [
        CLOCK_TOLERANCE,
        CLOCK_TOLERANCE + Duration::from_millis(100),
    ] {
        let sim = Sim::new();
        sim.driver.inject(Fault::Slow { per_step });
        let asked = tokio::time::Instant::now();
        let spec = sim.spec("m");
        let ready = bring_up::start(&sim.driver, &spec, &Start::Cold, DEADLINES).await;
        let ready = ready.expect("slow is not dead");
        took.push(asked.elapsed().div_duration_f32(per_step).round());
        assert!(ready.machine.destroy().await.leaks.is_empty());
    }
    assert_eq!(took[0] + 2.0, took[1], "two more of its steps");
}

#[tokio::test(start_paused = true)]
async fn a_boot_that_hangs_is_tried_once_more() {
    let sim = Sim::new();
    sim.driver.inject(Fault::At(Step::Boot, Trouble::Silent));
    let spec = sim.spec("m");
    let ready = bring_up::start(&sim.driver, &spec, &Start::Cold, DEADLINES).await;
    let ready = ready.expect("the second boot");
    assert_eq!(ready.timings.retries, 1);
    assert!(ready.machine.destroy().await.leaks.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_full_host_disk_stops_a_launch_and_leaves_nothing() {
    let sim = Sim::new();
    sim.driver.inject(Fault::HostDiskFull);
    let launched = sim.driver.launch(&sim.spec("m"), Start::Cold).await;
    let error = launched.expect_err("no space");
    assert!(matches!(error, LaunchError::DiskFull(_)), "{error:?}");
    sim.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn a_clone_that_lies_about_its_identity_is_destroyed() {
    let lies = [
        Lie::BootId,
        Lie::MachineId,
        Lie::Hostname,
        Lie::Clock,
        Lie::NoEntropy,
        Lie::NoReseed,
        Lie::WorkloadRan,
    ];
    let sim = Sim::new();
    let template = sim.template().await;
    for lie in lies {
        sim.driver.inject(Fault::Lies(lie));
        let start = Start::Template(template.template.clone());
        let started = bring_up::start(&sim.driver, &sim.spec("clone"), &start, DEADLINES).await;
        let error = started.expect_err("a liar");
        assert!(
            matches!(error, BringUpError::False(_)),
            "{lie:?}: {error:?}"
        );
        assert_eq!(error.class(), FailureClass::GuestFault);
        sim.assert_nothing_left();
    }
    let start = Start::Template(template.template.clone());
    let honest = bring_up::start(&sim.driver, &sim.spec("clone"), &start, DEADLINES).await;
    let honest = honest.expect("an honest clone");
    assert!(honest.machine.destroy().await.leaks.is_empty());
}

#[tokio::test(start_paused = true)]
async fn no_template_is_made_of_a_guest_that_may_not_become_one() {
    for lie in [Lie::NotFrozen, Lie::SecretIssued] {
        let sim = Sim::new();
        sim.driver.inject(Fault::Lies(lie));
        let target = TemplateRef {
            key: "k".to_owned(),
            dir: sim.home.path().join("templates/k"),
        };
        let prepare = |_session| async { Ok::<(), std::io::Error>(()) };
        let spec = sim.spec("origin");
        let made = bring_up::make_template(&sim.driver, &spec, &target, DEADLINES, prepare).await;
        assert!(matches!(made, Err(BringUpError::False(_))), "{made:?}");
        assert!(!target.dir.exists(), "nothing was written");
        sim.assert_nothing_left();
    }
}

/// The conformance suite's checks would notice these: the simulated guest really does what the lie says.
#[tokio::test(start_paused = true)]
async fn lies_that_no_single_answer_shows_are_seen_by_the_suite() {
    let sim = Sim::new();
    let template = sim.template().await;
    let mut drawn = Vec::new();
    for name in ["a", "b"] {
        sim.driver.inject(Fault::Lies(Lie::RepeatedRandom));
        let start = Start::Template(template.template.clone());
        let machine = sim.driver.launch(&sim.spec(name), start).await;
        let machine = machine.expect("cloned");
        let host = Host::connect(&*machine, DEADLINE).await.expect("hello");
        let answer = host.reidentify(&identity(name)).await.expect("answers");
        assert!(answer.entropy_added && answer.reseeded, "it claims so");
        drawn.push(answer.sample);
        assert!(machine.destroy().await.leaks.is_empty());
    }
    assert_eq!(drawn[0], drawn[1], "siblings repeat");
    sim.driver.inject(Fault::Lies(Lie::FalselyFrozen));
    let start = Start::Template(template.template.clone());
    let machine = sim.driver.launch(&sim.spec("c"), start).await;
    let machine = machine.expect("cloned");
    let host = Host::connect(&*machine, DEADLINE).await.expect("hello");
    let early = host.exec(&["echo", "early"]).await.expect("it ran");
    assert_eq!(early.text(), "early", "before any thaw");
    let answer = host.reidentify(&identity("c")).await.expect("answers");
    assert_eq!(answer.workload_ran, 1);
}

#[tokio::test(start_paused = true)]
async fn lies_about_trees_and_output_are_seen() {
    let sim = Sim::new();
    for lie in [Lie::TreeReport, Lie::HostileTree, Lie::Offsets] {
        sim.driver.inject(Fault::Lies(lie));
        let machine = sim.driver.launch(&sim.spec("m"), Start::Cold).await;
        let machine = machine.expect("launched");
        let host = Host::connect(&*machine, DEADLINE).await.expect("hello");
        let order = PutTree {
            place: Place::Work,
            bytes_max: 1000,
            entries_max: 10,
        };
        let report = put(&host, kind::PUT_TREE, &order, &tar()).await;
        let report = report.expect("put");
        let honest = (report.entries, report.bytes) == (1, 5);
        assert_eq!(honest, lie != Lie::TreeReport);
        let tar = get_tree(&host, "/work").await.expect("got");
        let hostile = tar::Archive::new(tar.as_slice())
            .entries()
            .expect("tar")
            .filter_map(Result::ok)
            .filter(|entry| {
                let path = entry.path_bytes();
                path.starts_with(b"..") || path.starts_with(b"/") || path.starts_with(b"out/")
            })
            .count();
        assert_eq!(hostile, if lie == Lie::HostileTree { 3 } else { 0 });
        let ran = host.exec_with(request(&["echo", "x"]), b"").await;
        let refused = matches!(ran, Err(Failed::Broken(_)));
        assert_eq!(refused, lie == Lie::Offsets, "{ran:?}");
        assert!(machine.destroy().await.leaks.is_empty());
    }
}

/// kill -9 of kiln at every step: the handle is lost without any destructor, and another driver on the same home reaps.
#[tokio::test(start_paused = true)]
async fn what_a_killed_kiln_leaves_at_any_step_is_reaped() {
    for step in Step::ALL {
        let sim = Sim::new();
        sim.driver.inject_always(Fault::At(step, Trouble::Silent));
        let spec = sim.spec("m");
        let launched = sim.driver.launch(&spec, Start::Cold).await;
        let machine = launched.expect("launched");
        if let Ok(host) = Host::connect(&*machine, DEADLINE).await {
            let told = host.reidentify(&identity("m")).await;
            if told.is_ok() && host.call(&Order::Thaw).await.is_ok() {
                let stuck = live(&host).await.expect_err("stuck at the step");
                assert_eq!(stuck.0, step);
            }
        }
        let lost = sim.driver.machine(&spec.name).expect("alive");
        lost.abandon();
        std::mem::forget((machine, lost));
        let next = SimDriver::new(sim.home.path(), SimConfig::default());
        let report = next.reap().await;
        assert_eq!(report.reaped, ["m"], "{step:?}");
        assert!(report.leaks.is_empty(), "{report:?}");
        sim.assert_nothing_left();
    }
}

/// On the real clock: a kept machine has a process that stands in for its VMM.
#[tokio::test]
async fn a_silent_guest_is_not_adopted_and_stays_for_another_try() {
    let sim = Sim::new();
    let mut spec = sim.spec("m");
    spec.keepable = true;
    let started = bring_up::start(&sim.driver, &spec, &Start::Cold, DEADLINES).await;
    let ready = started.expect("ready");
    sim.driver.machine(&spec.name).expect("alive").silence();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let until = now.expect("clock") + std::time::Duration::from_secs(3600);
    let kept = kiln_machine::driver::Kept {
        until_unix_ms: u64::try_from(until.as_millis()).expect("fits"),
        identity: ready.identity.clone(),
    };
    ready.machine.keep(kept).expect("kept");
    ready.machine.release().expect("released");
    let next = SimDriver::new(sim.home.path(), SimConfig::default());
    let soon = bring_up::Deadlines {
        clone_hello: std::time::Duration::from_millis(100),
        ..DEADLINES
    };
    for _ in 0..2 {
        let refused = bring_up::adopt(&next, &spec.name, soon).await;
        let silent = |error: &BringUpError| matches!(error, BringUpError::Hello { .. });
        assert!(refused.as_ref().is_err_and(silent), "{refused:?}");
        assert_eq!(next.adoptable().await, std::slice::from_ref(&spec.name));
        assert!(next.reap().await.reaped.is_empty());
    }
    // Whoever does not want it any more needs no answer of its guest.
    let machine = next.adopt(&spec.name).await.expect("adopted");
    assert!(machine.destroy().await.leaks.is_empty());
    sim.assert_nothing_left();
}
