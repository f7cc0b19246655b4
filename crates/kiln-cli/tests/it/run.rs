//! `kiln run` without an image: a clean machine, nothing reachable, the command's own exit code.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Stdio;

use crate::support::kiln;

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

#[test]
fn interrupt_cancels_cleanly_and_leaves_nothing() {
    let Some(kiln) = kiln() else { return };
    // The machine's host name is its name on the host.
    let mut running = kiln.start(&["run", "--", "sh", "-c", "hostname; sleep 600"]);
    let mut name = String::new();
    let stdout = running.child.stdout.as_mut().expect("piped");
    BufReader::new(stdout)
        .read_line(&mut name)
        .expect("started");
    let since = std::time::Instant::now();
    running.signal("INT");
    let said = running.end().exits(130).says("cancel");
    assert!(
        since.elapsed() < std::time::Duration::from_secs(10),
        "{said:?}"
    );
    assert!(name.trim().ends_with("-run"), "{name:?}");
    let dir = kiln.home.join("machines").join(name.trim());
    assert!(!dir.exists(), "left behind: {}", dir.display());
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
