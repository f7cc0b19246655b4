//! What the QEMU of a running machine may do, read from /proc as the kernel sees it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::kept::kept;
use crate::support::{Kiln, Started, app, kiln, path, until};

/// The process that runs this machine.
fn vmm(machine: &str) -> Option<PathBuf> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    entries.map(|entry| entry.path()).find(|path| {
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.contains("qemu-system") && line.contains(machine)
    })
}

fn status(path: &std::path::Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path.join("status")).expect("status");
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect()
}

/// The limits of its control groups: file names and values of every controller that has some.
fn limits(path: &std::path::Path) -> BTreeMap<String, String> {
    let groups = fs::read_to_string(path.join("cgroup")).expect("cgroup");
    let mut found = BTreeMap::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else {
            continue;
        };
        let controller = controllers.split(',').next().unwrap_or_default();
        for base in [
            "/sys/fs/cgroup".to_owned(),
            format!("/sys/fs/cgroup/{controller}"),
            format!("/sys/fs/cgroup/{controllers}"),
        ] {
            for file in [
                "memory.max",
                "memory.limit_in_bytes",
                "pids.max",
                "cpu.max",
                "cpu.cfs_quota_us",
            ] {
                if let Ok(value) = fs::read_to_string(format!("{base}{group}/{file}")) {
                    found.insert(file.to_owned(), value.trim().to_owned());
                }
            }
        }
    }
    found
}

/// The limits of its groups: for the guest's memory, processes and CPUs.
pub(crate) fn is_bounded(process: &Path, guest: i64) {
    let found = limits(process);
    let number = |files: [&str; 2]| {
        let value = files.iter().find_map(|file| found.get(*file));
        let first = value.and_then(|value| value.split_whitespace().next()?.parse::<i64>().ok());
        first.unwrap_or_else(|| panic!("no bound in {files:?}: {found:?}"))
    };
    // What the guest has, and what QEMU itself needs.
    let memory = number(["memory.max", "memory.limit_in_bytes"]);
    assert!((guest..guest + (2 << 30)).contains(&memory), "{found:?}");
    assert!(
        (1..=1000).contains(&number(["pids.max", "pids.max"])),
        "{found:?}"
    );
    assert!(number(["cpu.max", "cpu.cfs_quota_us"]) > 0, "{found:?}");
}

/// Every thread of a machine's process: a filter of system calls, no new rights, no capability, and as root a user of its own.
pub(crate) fn is_confined(process: &Path) {
    let root = rustix::process::geteuid().is_root();
    let threads = fs::read_dir(process.join("task")).expect("threads");
    let mut seen = 0;
    for thread in threads.flatten() {
        let status = status(&thread.path());
        // 2 is a filter (seccomp(2)); the thread that QEMU starts its own threads from has it as well.
        assert_eq!(status["Seccomp"], "2", "{status:?}");
        assert_eq!(status["NoNewPrivs"], "1", "{status:?}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status[set].trim_start_matches('0'), "", "{set}: {status:?}");
        }
        let ids = |key: &str| -> Vec<u32> {
            let words = status[key].split_whitespace();
            words.map(|word| word.parse().expect("an id")).collect()
        };
        let (users, groups) = (ids("Uid"), ids("Gid"));
        // Real, effective, saved and of the file system: all the same, and never root's.
        assert!(
            users.iter().all(|id| *id == users[0] && *id != 0),
            "{status:?}"
        );
        assert!(
            groups.iter().all(|id| *id == groups[0] && *id != 0),
            "{status:?}"
        );
        if root {
            assert!(users[0] >= 1000, "{status:?}");
            assert_eq!(status["CapBnd"].trim_start_matches('0'), "", "{status:?}");
            assert_eq!(status["Groups"], "", "{status:?}");
        } else {
            // Its own starter's, of which it can take nothing up.
            let own = rustix::process::geteuid().as_raw();
            assert_eq!(users[0], own, "{status:?}");
        }
        seen += 1;
    }
    assert!(seen >= 2, "it has more threads than that");
}

/// The QEMU of the machine that a command of this home just started.
pub(crate) fn vmm_of(kiln: &Kiln, running: &Started, kind: &str) -> PathBuf {
    let ours = format!("PPid:\t{}\n", running.child.id());
    until("its QEMU", || {
        let machines = fs::read_dir(kiln.home.join("machines")).ok()?;
        machines
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.ends_with(kind))
            .filter_map(|name| vmm(&name))
            .find(|path| {
                fs::read_to_string(path.join("status")).is_ok_and(|text| text.contains(&ours))
            })
    })
}

#[test]
fn a_machines_process_can_do_little_and_is_bounded() {
    let Some(kiln) = kiln() else { return };
    let root = rustix::process::geteuid().is_root();
    let mut running = kiln.start(&[
        "run",
        "--no-source",
        "--",
        "sh",
        "-c",
        "hostname; sleep 600",
    ]);
    running.until_it_prints("-run\n");
    let process = vmm_of(&kiln, &running, "-run");
    is_confined(&process);
    if root {
        is_bounded(&process, 512 << 20);
    }
    running.signal("INT");
    until("the end of its process", || {
        (!process.exists()).then_some(())
    });
    running.end().exits(130);
}

#[test]
fn so_is_that_of_a_build_and_of_a_machine_that_is_kept() {
    let Some(kiln) = kiln() else { return };
    let root = rustix::process::geteuid().is_root();
    let text = "FROM registry.kiln.internal/shared/python:3.13-run\nRUN [\"python3\", \"-c\", \"import time; time.sleep(600)\"]\n";
    let dir = app(&[("Dockerfile", text)]);
    let args = [
        "build",
        path(dir.path()),
        "--tag",
        "it-confined",
        "--no-cache",
    ];
    let building = kiln.start(&args);
    let process = vmm_of(&kiln, &building, "-build");
    // A run has printed something when it is looked at; this one may still be QEMU on its way to its filter, in which no guest has run yet.
    until("its filter", || {
        let text = fs::read_to_string(process.join("status")).ok()?;
        text.contains("\nSeccomp:\t2\n").then_some(())
    });
    until("threads", || {
        (fs::read_dir(process.join("task")).ok()?.count() >= 2).then_some(())
    });
    is_confined(&process);
    if root {
        is_bounded(&process, 2 << 30);
    }
    building.signal("INT");
    building.end().exits(130);

    let id = kept(&kiln, 0, &["--keep=10m", "--no-source"], &["true"]);
    let process = vmm(&format!("{id}-1-run")).expect("the kept machine's QEMU");
    is_confined(&process);
    if root {
        is_bounded(&process, 512 << 20);
    }
    kiln.run(&["machine", "rm", &id]).exits(0);
}
