//! How machines start and end.

use std::fs;
use std::time::Duration;

use kiln_core::DiskRole;
use kiln_machine::driver::{MachineState, SpecRefused, Start, StopReason};
use kiln_proto::msg::{GuestEvent, Order, feature};

use super::under_test::UnderTest;
use crate::host::{Failed, request};

pub(crate) async fn boot_cold(test: &UnderTest) {
    let (machine, host) = test.boot("cold").await;
    assert!(host.hello.has(feature::EXEC), "{:?}", host.hello);
    assert_eq!(machine.state(), MachineState::Running);
    let ran = host.exec(&["uname", "-s"]).await.expect("ran");
    assert_eq!(ran.text(), "Linux");
    assert_eq!(host.exec(&["false"]).await.expect("ran").exit.code, Some(1));
    let missing = host.exec(&["no-such-command"]).await;
    assert!(matches!(missing, Err(Failed::Refused(_))), "{missing:?}");
    assert!(!machine.console_tail().is_empty());
    machine.stats().await.expect("stats");
    if test.kind == "qemu" {
        // Where the host trusts its counter, so does the guest: else every look at the clock is a device access.
        let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        let ours = host.exec(&["cat", clock]).await.expect("ran").text();
        if fs::read_to_string(clock).is_ok_and(|text| text.trim() == "tsc") {
            assert!(ours.starts_with("tsc"), "{ours}");
        }
    }
    // The answer may never arrive.
    let _ = host.call(&Order::Shutdown).await;
    let state = machine.stop(test.deadline).await;
    assert_eq!(state, MachineState::Stopped(StopReason::PoweredOff));
    assert_eq!(machine.stopped().await, state, "final");
    assert!(machine.channel().await.is_err());
    test.destroy(&*machine).await;
    test.destroy(&*machine).await;
}

pub(crate) async fn refused_before_side_effects(test: &UnderTest) {
    let good = test.spec("refused");
    let mut twice = good.clone();
    twice.disks.push(good.disks[0].clone());
    let mut no_kernel = good.clone();
    no_kernel.boot.kernel = test.home.join("missing");
    let mut no_disk = good.clone();
    no_disk.disks[0].backing = Some(test.home.join("missing"));
    let mut no_cpu = good.clone();
    no_cpu.cpus = 0;
    for spec in [&twice, &no_kernel, &no_disk, &no_cpu] {
        assert!(test.driver.validate(spec, &Start::Cold).is_err());
        assert!(test.driver.launch(spec, Start::Cold).await.is_err());
        assert!(!test.machine_dir(&spec.name).exists());
    }
    let refused = test.driver.validate(&twice, &Start::Cold);
    assert_eq!(refused, Err(SpecRefused::DuplicateRole(DiskRole::Root)));
    assert_eq!(test.driver.validate(&good, &Start::Cold), Ok(()));
}

pub(crate) async fn one_machine_per_name(test: &UnderTest) {
    let spec = test.spec("one");
    let (machine, host) = test.boot_spec(&spec).await;
    assert!(test.driver.launch(&spec, Start::Cold).await.is_err());
    let ran = host.exec(&["uname", "-s"]).await.expect("the first lives");
    assert_eq!(ran.text(), "Linux");
    test.destroy(&*machine).await;
    let again = test.launch(&spec).await;
    test.destroy(&*again).await;
}

pub(crate) async fn guest_panic(test: &UnderTest) {
    let (machine, host) = test.boot("panic").await;
    let trigger = request(&["tee", "/proc/sysrq-trigger"]);
    let lost = host.exec_with(trigger, b"c").await;
    assert!(matches!(lost, Err(Failed::Broken(_))), "{lost:?}");
    let stopped = tokio::time::timeout(test.deadline, machine.stopped()).await;
    let state = stopped.expect("a panic ends the machine");
    let console = machine.console_tail();
    let panicked = MachineState::Stopped(StopReason::GuestPanic);
    assert_eq!(state, panicked, "console:\n{console}");
    assert!(console.contains("panic"), "{console}");
    test.destroy(&*machine).await;
}

pub(crate) async fn guest_silent(test: &UnderTest) {
    let (machine, host) = test.boot("silent").await;
    test.silence(&*machine);
    let waited = tokio::time::timeout(Duration::from_millis(300), host.exec(&["true"])).await;
    assert!(waited.is_err(), "a silent guest says nothing: {waited:?}");
    assert!(!machine.state().is_terminal());
    let state = machine.stop(Duration::from_millis(100)).await;
    assert_eq!(state, MachineState::Stopped(StopReason::Killed));
    test.destroy(&*machine).await;
    // And one that is destroyed while it is silent.
    let (machine, _host) = test.boot("silent").await;
    test.silence(&*machine);
    test.destroy(&*machine).await;
}

pub(crate) async fn vmm_killed(test: &UnderTest) {
    let (machine, host) = test.boot("vmm").await;
    test.kill_vmm(&*machine);
    let state = tokio::time::timeout(test.deadline, machine.stopped()).await;
    let state = state.expect("noticed");
    assert_eq!(state, MachineState::Stopped(StopReason::VmmDied));
    let lost = host.exec(&["true"]).await;
    assert!(matches!(lost, Err(Failed::Broken(_))), "{lost:?}");
    test.destroy(&*machine).await;
}

pub(crate) async fn stop_with_deadline(test: &UnderTest) {
    let (machine, host) = test.boot("stop").await;
    let begun = std::time::Instant::now();
    let state = machine.stop(Duration::from_millis(200)).await;
    assert_eq!(state, MachineState::Stopped(StopReason::Killed));
    assert!(begun.elapsed() >= Duration::from_millis(200));
    assert!(begun.elapsed() < Duration::from_secs(60));
    assert!(host.exec(&["true"]).await.is_err());
    test.destroy(&*machine).await;
}

pub(crate) async fn destroy_leaves_nothing(test: &UnderTest) {
    // At once, without any guest.
    let machine = test.launch(&test.spec("gone")).await;
    test.destroy(&*machine).await;
    // With a command running and a disk of its own.
    let mut spec = test.spec("gone");
    spec.disks.push(UnderTest::new_disk(DiskRole::Scratch));
    let (machine, host) = test.boot_spec(&spec).await;
    let running = host.exec(&["sleep", "1000"]);
    tokio::select! {
        ended = running => panic!("{ended:?}"),
        () = tokio::time::sleep(Duration::from_millis(50)) => {}
    }
    test.destroy(&*machine).await;
    // By dropping the handle only.
    let machine = test.launch(&test.spec("gone")).await;
    let name = machine.name().clone();
    drop(machine);
    let end = tokio::time::Instant::now() + test.deadline;
    while !test.leftovers(name.as_str()).is_empty() {
        assert!(
            tokio::time::Instant::now() < end,
            "{:?}",
            test.leftovers(name.as_str())
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // By dropping the launch itself, at different moments.
    for micros in [0, 100, 1000, 5000, 20_000] {
        let spec = test.spec("cut");
        let launch = test.driver.launch(&spec, Start::Cold);
        let cut = tokio::time::timeout(Duration::from_micros(micros), launch).await;
        drop(cut);
        let end = tokio::time::Instant::now() + test.deadline;
        while !test.leftovers(spec.name.as_str()).is_empty() {
            let left = test.leftovers(spec.name.as_str());
            assert!(
                tokio::time::Instant::now() < end,
                "after {micros} µs: {left:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let machines = fs::read_dir(test.home.join("machines")).expect("list");
    assert_eq!(machines.count(), 1, "only the lock");
}

pub(crate) async fn memory_limit(test: &UnderTest) {
    let (machine, host) = test.boot("memory").await;
    let mut hog = request(&["tail", "/dev/zero"]);
    hog.memory_max = 48 << 20;
    let ran = host.exec_with(hog, b"").await.expect("reported");
    assert!(ran.exit.oom, "{:?}", ran.exit);
    assert_ne!(ran.exit.code, Some(0));
    let end = tokio::time::Instant::now() + test.deadline;
    let told = || {
        let events = host.events.lock().expect("lock");
        let kills = events.iter();
        kills
            .filter(|event| matches!(event, GuestEvent::OomKill { .. }))
            .count()
    };
    while told() == 0 {
        assert!(tokio::time::Instant::now() < end, "no event came");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let ran = host.exec(&["uname", "-s"]).await.expect("the guest lives");
    assert_eq!(ran.text(), "Linux");
    test.destroy(&*machine).await;
}
