//! kill -9 of kiln at each moment of a machine's life: the next reaper leaves nothing.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_machine::driver::TemplateRef;
use kiln_machine::sim::{Phase, SimConfig};
use kiln_machine::template::MakeError;

use super::under_test::UnderTest;
use crate::child::{Role, say, wait_to_be_killed};

/// Moments that every driver has: what the parent waits for before it kills.
const MOMENTS: &[&str] = &["dir", "launching", "running", "hello", "exec", "saving"];

/// The child's part: a machine's life, up to the moment at which it waits to be killed.
pub(crate) fn play(kind: &str, home: &Path, name: &str, moment: &str, keepable: bool) {
    let phase = Phase::ALL
        .into_iter()
        .find(|phase| format!("{phase:?}") == moment);
    let config = SimConfig {
        on_phase: Some(Arc::new(move |reached| {
            if Some(reached) == phase {
                say(moment_name(reached));
                wait_to_be_killed();
            }
        })),
        ..SimConfig::default()
    };
    let test = UnderTest::named(kind, home, config);
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    runtime.block_on(async {
        let mut spec = test.spec("child");
        spec.name = super::under_test::machine_name(name);
        spec.keepable = keepable;
        spec.disks
            .push(UnderTest::new_disk(kiln_core::DiskRole::Scratch));
        let (machine, host) = test.boot_spec(&spec).await;
        // It is killed at the first moments as soon as they are seen; one that went on would be through before a busy parent looks.
        if matches!(moment, "dir" | "launching" | "running" | "hello") {
            say("hello");
            wait_to_be_killed();
        }
        if moment == "exec" {
            say("exec");
            let _ = host.exec(&["sleep", "1000"]).await;
        }
        if moment == "Destroying" {
            machine.destroy().await;
        }
        say("saving");
        // A simulated machine may be saved before the signal comes: its template is whole then, and still in use.
        let _held = test.template_of(&spec, &*machine, host).await;
        wait_to_be_killed();
    });
}

fn moment_name(phase: Phase) -> &'static str {
    match phase {
        Phase::DirMade => "DirMade",
        Phase::FilesMade => "FilesMade",
        Phase::Launching => "Launching",
        Phase::Spawned => "Spawned",
        Phase::Running => "Running",
        Phase::Saving => "Saving",
        Phase::Destroying => "Destroying",
    }
}

pub(crate) async fn reap_after_kill_9(test: &UnderTest) {
    // Beside a live machine of this process, which no reaper may touch.
    let (live, host) = test.boot("live").await;
    for moment in MOMENTS {
        let name = test.spec(moment).name;
        let home = test.home.to_str().expect("utf-8");
        let mut child = Role::start(&["machine", test.kind, home, name.as_str(), moment]);
        match *moment {
            "hello" | "exec" | "saving" => child.wait_for(moment),
            early => wait_for_record(test, &name, early),
        }
        child.kill();
        let report = test.driver.reap().await;
        assert!(report.leaks.is_empty(), "{moment}: {report:?}");
        assert_eq!(test.leftovers(name.as_str()), [""; 0], "{moment}");
        sweep(test);
        let ran = host.exec(&["uname", "-s"]).await.expect("the living live");
        assert_eq!(ran.text(), "Linux");
    }
    if test.kind == "sim" {
        sim_phases(test).await;
    }
    test.destroy(&*live).await;
}

/// A VMM that is killed while its machine becomes a template: an error, no template, nothing left.
pub(crate) async fn vmm_killed_while_saved(test: &UnderTest) {
    for early in [true, false] {
        let spec = test.spec("saved");
        let (machine, host) = test.boot_spec(&spec).await;
        let key = test.template_key(&spec, "killed").await;
        let make = async |target: TemplateRef| {
            host.quiesce().await.expect("quiesced");
            if early {
                test.kill_vmm(&*machine);
                if test.kind == "sim" {
                    // Its memory is this process's own: it can be saved until the end of its stand-in is noticed.
                    machine.stopped().await;
                }
                return machine.into_template(&target).await;
            }
            // Saving waits for the guest to rest first; a simulated one is saved at once, or dies at once.
            let (saved, ()) = tokio::join!(machine.into_template(&target), async {
                tokio::task::yield_now().await;
                if !machine.state().is_terminal() {
                    test.kill_vmm_if_there(&*machine);
                }
            });
            saved
        };
        let store = test.templates();
        let made = store.get_or_make(&key, &|_| {}, make).await;
        if test.kind == "qemu" || early {
            assert!(matches!(made, Err(MakeError::Make(_))), "{made:?}");
        }
        drop(made);
        let end = Instant::now() + test.deadline;
        while !machine.state().is_terminal() {
            assert!(Instant::now() < end, "its end was not noticed");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        test.destroy(&*machine).await;
        if test.kind == "qemu" {
            assert_eq!(store.list().expect("listed"), []);
        }
    }
}

/// The simulated driver stops exactly at each of its phases.
async fn sim_phases(test: &UnderTest) {
    for phase in Phase::ALL {
        let moment = moment_name(phase);
        let name = test.spec(&moment.to_lowercase()).name;
        let home = test.home.to_str().expect("utf-8");
        let mut child = Role::start(&["machine", "sim", home, name.as_str(), moment]);
        child.wait_for(moment);
        assert!(test.machine_dir(&name).exists(), "{moment}");
        assert!(test.driver.reap().await.reaped.is_empty(), "it lives");
        child.kill();
        let report = test.driver.reap().await;
        assert_eq!(report.reaped, [name.as_str()], "{moment}");
        assert!(report.leaks.is_empty(), "{moment}: {report:?}");
        assert_eq!(test.leftovers(name.as_str()), [""; 0], "{moment}");
        sweep(test);
    }
}

/// A killed writer's unfinished template. One that was finished in the last moment is whole.
fn sweep(test: &UnderTest) {
    let report = kiln_machine::reap::sweep_partial(&[test.templates().root().to_owned()]);
    assert!(report.leaks.is_empty(), "{report:?}");
}

/// Waits until the child has come so far: by its directory, then by its record.
pub(crate) fn wait_for_record(test: &UnderTest, name: &kiln_core::MachineName, moment: &str) {
    let end = Instant::now() + test.deadline;
    loop {
        let record = test.record(name);
        let state = record
            .as_ref()
            .and_then(|record| record["state"]["state"].as_str());
        let reached = match moment {
            "dir" => test.machine_dir(name).exists(),
            "launching" => matches!(state, Some("launching" | "running")),
            _ => state == Some("running"),
        };
        if reached {
            return;
        }
        assert!(Instant::now() < end, "never came to {moment}");
        std::thread::sleep(Duration::from_micros(200));
    }
}
