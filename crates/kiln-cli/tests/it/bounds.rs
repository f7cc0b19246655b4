//! Bounds of a machine on real machines: the rate of its disks, open files, and what is told of one that was run over.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::annex::Annex;
use crate::kept::kept;
use crate::support::{Kiln, Said, Started, app, kiln, said, until};

fn run_in(kiln: &Kiln, dir: &Path, args: &[&str]) -> Said {
    let mut command = kiln.command(args);
    command.current_dir(dir);
    said(command)
}

/// Mebibytes that are written, and how many of them may be each second.
const WRITTEN: u32 = 48;
const RATE: u32 = 6;

#[test]
fn a_machines_disks_have_the_rate_of_its_policy_and_no_process_more_files() {
    let Some(kiln) = kiln() else { return };
    let policy = format!(
        "version: 1\nlimits: {{disk: 256M, disk_rate: {RATE}M, open_files: 200}}\nphases: {{dependencies: {{commands: [\"ulimit -n\"]}}}}\n"
    );
    let dir = app(&[("kiln.yaml", &policy)]);
    let script = format!(
        "ulimit -n; ulimit -Hn; (exec 3</dev/null; for n in $(seq 4 300); do eval \"exec $n</dev/null\" || exit; done) 2>&1 | tail -n 1; \
         echo begins; dd if=/dev/zero of=big bs=1M count={WRITTEN} conv=fsync 2>&1; echo written; sleep 600"
    );
    let mut command = kiln.command(&["run", "--", "bash", "-c", &script]);
    command.current_dir(dir.path());
    let mut running = Started::of(command);
    let before = running.until_it_prints("begins\n");
    assert!(
        before.starts_with("200\n200\n200\n") && before.contains("Too many open files"),
        "{before}"
    );
    let began = Instant::now();
    // The VMM that runs it shares one rate among its disks.
    let rate = format!("\"bps-total\":{}", u64::from(RATE) << 20);
    let ours = format!("PPid:\t{}\n", running.child.id());
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let lines: Vec<String> = processes
        .filter(|entry| {
            let status = fs::read_to_string(entry.path().join("status"));
            status.is_ok_and(|status| status.contains(&ours))
        })
        .map(|entry| fs::read(entry.path().join("cmdline")).unwrap_or_default())
        .map(|line| String::from_utf8_lossy(&line).into_owned())
        .collect();
    let rated = |line: &String| line.contains("throttle-group") && line.contains(&rate);
    assert!(lines.iter().any(rated), "{lines:?}");
    let after = running.until_it_prints("written\n");
    // What a second may take at once is not part of the lower bound; a host that is busy only makes it longer.
    let least = Duration::from_secs(u64::from(WRITTEN / RATE - 3));
    assert!(began.elapsed() >= least, "{:?}: {after}", began.elapsed());
    running.signal("INT");
    running.end().exits(130);
    // The same files hold a container's command.
    fs::write(
        dir.path().join("kiln.yaml"),
        "version: 1\nimage: node\nlimits: {open_files: 300}\n",
    )
    .expect("write");
    let inside = "ulimit -n; ulimit -n 400 || echo refused";
    let ran = run_in(&kiln, dir.path(), &["run", "--", "sh", "-c", inside]).exits(0);
    assert_eq!(ran.out, "300\nrefused\n", "{ran:?}");
}

#[test]
fn an_operators_most_holds_without_a_policy() {
    let Some(annex) = Annex::open() else { return };
    let grants = "[tenant.local.max]\nopen_files = 250\ndisk_rate = \"20M\"\n";
    fs::write(annex.home.join("config/policy.toml"), grants).expect("write");
    let words = ["run", "--no-source", "--", "sh", "-c", "ulimit -n"];
    let ran = annex.run(&words).exits(0);
    assert_eq!(ran.out, "250\n", "{ran:?}");
    let dir = app(&[(
        "kiln.yaml",
        "version: 1\nlimits: {open_files: 251, disk_rate: 21M}\n",
    )]);
    run_in(&annex, dir.path(), &["run", "--", "true"])
        .exits(4)
        .says("limits.open_files")
        .says("limits.disk_rate");
    let slow = "version: 1\nlimits: {disk_rate: 100K}\n";
    fs::write(dir.path().join("kiln.yaml"), slow).expect("write");
    run_in(&annex, dir.path(), &["run", "--", "true"])
        .exits(4)
        .says("limits.disk_rate of 100.0 KiB");
}

#[test]
fn what_was_run_over_is_told_by_name_without_a_policy_and_in_a_kept_machine() {
    let Some(kiln) = kiln() else { return };
    let run = |script: &str| kiln.run(&["run", "--no-source", "--", "sh", "-c", script]);
    // Its files lie in memory, of which they may have a part.
    run("head -c 900000000 /dev/zero > /var/big || exit 6")
        .exits(6)
        .says("disk_full")
        .says("--disk");
    // The bound of every machine, here a lower one, as nothing but root in it may set.
    let many = "echo 40 > /sys/fs/cgroup/workload/pids.max; for i in $(seq 1 200); do sleep 60 & done; exit 0";
    let refused = run(many);
    assert_ne!(refused.code, 0, "{refused:?}");
    refused.says("process_limit").says("beyond 40");
    // Neither is told of a command that failed for its own reasons.
    let own = run("seq 1 20 | xargs -P 10 -n 1 sleep 0 && exit 5").exits(5);
    assert!(
        !own.err.contains("_limit") && !own.err.contains("disk_full"),
        "{own:?}"
    );
    let id = kept(&kiln, 0, &["--keep=10m", "--no-source"], &["true"]);
    let hog = ["exec", &id, "--", "tail", "/dev/zero"];
    let short = kiln.run(&hog);
    assert_eq!(short.code, 137, "{short:?}");
    short.says("ran out of memory");
    let json = kiln.run(&[&["--json"][..], &hog].concat()).exits(137);
    let (events, _) = json.events();
    let last = events.last().expect("events");
    assert_eq!(last["reason"], "out_of_memory", "{json:?}");
    // The machine goes on.
    kiln.run(&["exec", &id, "--", "true"]).exits(0);
    kiln.run(&["machine", "rm", &id]).exits(0);
}

/// What one machine does to the host while another one is used, each with how it may end. As much of each as it gets.
const BOMBS: [(&str, &str); 4] = [
    ("processes", "f() { f | f & }; f; while :; do f; done"),
    ("memory", "tail /dev/zero | tail"),
    ("disk", "head -c 900000000 /dev/zero > /var/big || exit 6"),
    (
        "log",
        "yes 0123456789012345678901234567890123456789012345678901234567890123",
    ),
];

#[test]
fn a_machine_is_served_while_another_one_takes_all_it_can() {
    let Some(kiln) = kiln() else { return };
    let id = kept(&kiln, 0, &["--keep=10m", "--no-source"], &["true"]);
    for (what, script) in BOMBS {
        let words = ["run", "--no-source", "--timeout", "12s", "--", "bash", "-c"];
        let mut command =
            kiln.command(&[&words[..], &[&format!("echo begins; {script}")]].concat());
        // Nobody reads it slowly: a flood comes as fast as the channel goes.
        let out = tempfile::NamedTempFile::new().expect("a file");
        command
            .stdout(out.reopen().expect("the file"))
            .stderr(std::process::Stdio::piped());
        let mut bomb = Started {
            child: command.spawn().expect("kiln starts"),
        };
        until("its begin", || {
            (out.as_file().metadata().expect("a file").len() >= 7).then_some(())
        });
        let mut served = 0;
        while bomb.child.try_wait().expect("waited").is_none() || served == 0 {
            let said = kiln.run(&[
                "exec",
                &id,
                "--",
                "sh",
                "-c",
                "head -c 1000000 /dev/urandom | wc -c",
            ]);
            assert_eq!(said.exits(0).out, "1000000\n", "{what}");
            served += 1;
        }
        let ended = bomb.end();
        assert!(
            [1, 5, 6, 124, 137].contains(&ended.code),
            "{what}: {ended:?}"
        );
    }
    // And the next machine of the host is as any.
    kiln.run(&["run", "--no-source", "--", "true"]).exits(0);
    kiln.run(&["machine", "rm", &id]).exits(0);
}
