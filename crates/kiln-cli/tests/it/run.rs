//! `kiln run` without an image: a clean machine, nothing reachable, the command's own exit code.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{Kiln, Started, kiln};

/// Far below what the interrupted commands run for. How fast they end is measured by `kiln bench`.
const HANGS: Duration = Duration::from_secs(60);

#[test]
fn output_and_exit_code_are_the_commands_own() {
    let Some(kiln) = kiln() else { return };
    let said = kiln
        .run(&["run", "--", "sh", "-c", "echo out; echo err >&2; exit 7"])
        .exits(7);
    assert_eq!(said.out, "out\n");
    assert!(
        said.err.contains("err\n") && said.err.contains("exit code 7"),
        "{said:?}"
    );
    kiln.run(&["run", "--", "no-such-command"]).exits(127);
    kiln.run(&["run", "--", "sh", "-c", "kill -9 $$"])
        .exits(137);
}

#[test]
fn standard_input_reaches_the_command() {
    let Some(kiln) = kiln() else { return };
    let mut command = kiln.command(&["run", "--interactive", "--", "sha256sum"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start");
    let bytes = vec![b'k'; 3_000_000];
    child
        .stdin
        .take()
        .expect("piped")
        .write_all(&bytes)
        .expect("write");
    let output = child.wait_with_output().expect("wait");
    let want = kiln_core::Digest::of(&bytes).hex();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        format!("{want}  -\n")
    );
}

#[test]
fn nothing_is_reachable_and_refusals_are_named() {
    let Some(kiln) = kiln() else { return };
    let said = kiln.run(&["run", "--", "git", "ls-remote", "https://example.org/x.git"]);
    assert_ne!(said.code, 0);
    assert!(said.err.contains("--allow example.org"), "{said:?}");
    let raw = "exec 3<>/dev/tcp/192.0.2.1/80";
    assert_ne!(
        kiln.run(&["run", "--", "bash", "-c", raw]).code,
        0,
        "raw addresses go nowhere"
    );
}

/// A command that sleeps in a machine, and its machine's name: the host name inside is the name on the host.
fn sleeper(kiln: &Kiln, first: &str) -> (Started, String) {
    let script = format!("{first}hostname; sleep 600");
    let mut running = kiln.start(&["run", "--", "sh", "-c", &script]);
    let mut name = String::new();
    let stdout = running.child.stdout.as_mut().expect("piped");
    BufReader::new(stdout)
        .read_line(&mut name)
        .expect("started");
    assert!(name.trim().ends_with("-run"), "{name:?}");
    (running, name.trim().to_owned())
}

/// VMMs of this machine that still run.
fn vmms(machine: &str) -> usize {
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let is_its = |line: &Vec<u8>| {
        let line = String::from_utf8_lossy(line);
        line.contains("qemu") && line.contains(machine)
    };
    lines.filter(is_its).count()
}

#[test]
fn interrupt_cancels_cleanly_and_leaves_nothing() {
    let Some(kiln) = kiln() else { return };
    let (running, name) = sleeper(&kiln, "");
    assert_eq!(vmms(&name), 1);
    let since = Instant::now();
    running.signal("INT");
    let said = running.end().exits(130).says("cancelling");
    assert!(since.elapsed() < HANGS, "{said:?}");
    let dir = kiln.home.join("machines").join(&name);
    assert!(!dir.exists(), "left behind: {}", dir.display());
    assert_eq!(vmms(&name), 0);
}

#[test]
fn a_second_interrupt_kills_and_the_next_command_cleans_up() {
    let Some(kiln) = kiln() else { return };
    // The command outlives what a clean cancel asks of it.
    let (mut running, name) = sleeper(&kiln, "trap '' INT TERM; ");
    running.signal("INT");
    let stderr = BufReader::new(running.child.stderr.take().expect("piped"));
    let mut lines = stderr.lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("press Ctrl-C again")));
    let since = Instant::now();
    running.signal("INT");
    let status = running.child.wait().expect("wait");
    assert_eq!(status.code(), Some(130));
    assert!(since.elapsed() < HANGS, "{:?}", since.elapsed());
    kiln.run(&["run", "--", "true"]).exits(0);
    let dir = kiln.home.join("machines").join(&name);
    assert!(!dir.exists(), "left behind: {}", dir.display());
    assert_eq!(vmms(&name), 0);
}

#[test]
fn a_closed_terminal_ends_the_machine() {
    let Some(kiln) = kiln() else { return };
    let (mut running, name) = sleeper(&kiln, "");
    // Nobody reads any more, so that every word kiln says fails.
    drop(running.child.stderr.take());
    drop(running.child.stdout.take());
    running.signal("HUP");
    assert_eq!(running.child.wait().expect("wait").code(), Some(130));
    assert_eq!(vmms(&name), 0);
}

#[test]
fn a_timeout_ends_the_command() {
    let Some(kiln) = kiln() else { return };
    kiln.run(&["run", "--timeout", "2s", "--", "sleep", "600"])
        .exits(124)
        .says("--timeout");
}

#[test]
fn a_memory_hog_is_reported_as_out_of_memory() {
    let Some(kiln) = kiln() else { return };
    let hog = "x=a; while :; do x=$x$x; done";
    kiln.run(&["run", "--", "bash", "-c", hog])
        .exits(137)
        .says("out of memory");
}

#[test]
fn two_machines_never_share_an_identity() {
    let Some(kiln) = kiln() else { return };
    let read = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; hostname; head -c 16 /dev/urandom | sha256sum";
    let one = kiln.run(&["run", "--", "sh", "-c", read]).exits(0).out;
    let two = kiln.run(&["run", "--", "sh", "-c", read]).exits(0).out;
    for (a, b) in one.lines().zip(two.lines()) {
        assert_ne!(a, b);
    }
    assert_eq!(one.lines().count(), 4, "{one}");
}
