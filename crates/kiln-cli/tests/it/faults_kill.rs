//! kill -9 of kiln and of QEMU, and the death of a guest, on real machines. All phases are killed on `sim` in kiln-machine and
//! kiln-worker; here is one of each, and runs that are killed or interrupted at random moments: one in the suite, 20 with `KILN_TEST_LONG`,
//! and `KILN_FAULT_SEED` repeats them.

use std::io::Read as _;
use std::process::{Command, Stdio};

use crate::annex::Annex;
use crate::fleet_kill::{Rng, asked};
use crate::support::{Started, app, path, until};

/// A run that has said it started.
fn started(annex: &Annex) -> Started {
    let mut running = annex.start(&["run", "--", "sh", "-c", "echo started; sleep 600"]);
    let mut first = [0; 8];
    let stdout = running.child.stdout.as_mut().expect("piped");
    stdout.read_exact(&mut first).expect("started");
    running
}

fn kill(pid: u32) {
    let killed = Command::new("kill").args(["-9", &pid.to_string()]).status();
    assert!(killed.expect("kill runs").success());
}

#[test]
fn kill_9_of_kiln_leaves_nothing_once_the_next_command_ran() {
    let Some(annex) = Annex::open() else { return };
    let running = started(&annex);
    assert_eq!(annex.vmms().len(), 1);
    running.signal("KILL");
    running.end();
    annex.run(&["run", "--", "true"]).exits(0);
    annex.is_well();
}

#[test]
fn kill_9_of_kiln_in_a_build_leaves_nothing_once_the_next_command_ran() {
    let Some(annex) = Annex::open() else { return };
    let building = build_that_hangs(&annex);
    building.signal("KILL");
    building.end();
    // A command that touches no machine reaps none.
    annex
        .run(&[
            "plan",
            path(&crate::support::root().join("examples/node-express")),
        ])
        .exits(0);
    annex.run(&["run", "--", "true"]).exits(0);
    annex.is_well();
}

#[test]
fn kill_9_of_kiln_while_it_makes_a_template_leaves_nothing_and_the_next_one_makes_it() {
    let Some(mut annex) = Annex::open() else {
        return;
    };
    let templates = annex.without("templates");
    let args = ["run", "--cpus", "1", "--memory", "512M", "--", "true"];
    let making = annex.start(&args);
    until("a machine that becomes a template", || {
        (!annex.vmms().is_empty()).then_some(())
    });
    making.signal("KILL");
    making.end();
    annex.run(&args).exits(0);
    let names: Vec<String> = std::fs::read_dir(&templates)
        .expect("list")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with(".make"))
        .collect();
    assert_eq!(
        names.len(),
        1,
        "one whole template and no part of another: {names:?}"
    );
    annex.is_clear();
}

#[test]
fn kill_9_of_the_vmm_is_infrastructure_and_not_a_hang() {
    let Some(annex) = Annex::open() else { return };
    let running = started(&annex);
    kill(annex.vmms()[0]);
    running.end().exits(3).says("QEMU ended unexpectedly");
    annex.is_well();
}

#[test]
fn kill_9_of_the_vmm_in_a_build_is_infrastructure_and_not_a_hang() {
    let Some(annex) = Annex::open() else { return };
    let building = build_that_hangs(&annex);
    kill(annex.vmms()[0]);
    building.end().exits(3).says("QEMU ended unexpectedly");
    annex.is_well();
}

#[test]
fn a_guest_whose_kernel_panics_is_a_guest_fault() {
    let Some(annex) = Annex::open() else { return };
    let crash = "echo c > /proc/sysrq-trigger; sleep 60";
    annex
        .run(&["run", "--", "sh", "-c", crash])
        .exits(5)
        .says("the kernel inside the machine panicked")
        .says("Kernel panic");
    annex.is_well();
}

#[test]
fn a_guest_that_powers_off_by_itself_is_a_guest_fault() {
    let Some(annex) = Annex::open() else { return };
    let off = "echo o > /proc/sysrq-trigger; sleep 60";
    annex
        .run(&["run", "--", "sh", "-c", off])
        .exits(5)
        .says("powered itself off");
    annex.is_well();
}

/// Rounds of the long version.
const ROUNDS: u64 = 20;
/// The latest moment of a kill: past the end of a run that nothing stopped.
const MOMENT_MAX_MS: u64 = 4_000;

#[test]
fn runs_that_are_stopped_at_random_moments_leave_nothing() {
    let Some(annex) = Annex::open() else { return };
    let rounds = match asked("KILN_TEST_LONG") {
        Some(_) => ROUNDS,
        None => 1,
    };
    let seed = asked("KILN_FAULT_SEED").unwrap_or(7);
    println!("KILN_FAULT_SEED={seed}");
    let folder = app(&[("package.json", "{}"), ("a/b", "b"), (".git/HEAD", "")]);
    let out = tempfile::tempdir().expect("temp dir");
    let back = format!("c:{}/", path(out.path()));
    let script = "echo c > c; sleep 1";
    let (mut rng, mut ended) = (Rng(seed), std::collections::BTreeMap::new());
    for round in 0..rounds {
        // In the machine itself, or in a base with a folder and files that come back.
        let more = match rng.below(2) {
            0 => &["--no-source"][..],
            _ => &["--source", path(folder.path()), "--copy-out", &back],
        };
        let words = [&["run"], more, &["--", "sh", "-c", script]].concat();
        let running = annex.start(&words);
        let moment = rng.below(MOMENT_MAX_MS);
        std::thread::sleep(std::time::Duration::from_millis(moment));
        let signal = ["KILL", "INT", "TERM"][usize::try_from(rng.below(3)).expect("small")];
        running.signal(signal);
        let said = running.end();
        println!(
            "{round}: {signal} after {moment} ms of {more:?}: {}",
            said.code
        );
        let fits = match said.code {
            // Too late: it was over.
            0 => true,
            130 => signal != "KILL",
            -1 => signal == "KILL",
            _ => false,
        };
        assert!(fits, "{signal} after {moment} ms: {said:?}");
        *ended.entry((signal, said.code)).or_insert(0) += 1;
        if said.code == -1 {
            // What was killed is cleared away by the next one.
            annex.run(&["run", "--", "true"]).exits(0);
        }
        annex.is_well();
    }
    println!("{rounds} runs ended as {ended:?}");
}

/// A build that is in the middle of its step.
fn build_that_hangs(annex: &Annex) -> Started {
    let text = "FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\nRUN echo in the step; sleep 600\n";
    let dir = app(&[("Dockerfile", text)]);
    let mut command = annex.command(&[
        "build",
        path(dir.path()),
        "--tag",
        "it-killed",
        "--no-cache",
    ]);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut building = Started {
        child: child.expect("kiln starts"),
    };
    // Read to the step's words, byte by byte: the rest stays for the end.
    let mut words = Vec::new();
    let stderr = building.child.stderr.as_mut().expect("piped");
    while !words.ends_with(b"| in the step\n") {
        let mut byte = [0];
        let read = stderr.read_exact(&mut byte);
        assert!(read.is_ok(), "{}", String::from_utf8_lossy(&words));
        words.extend(byte);
    }
    building
}
