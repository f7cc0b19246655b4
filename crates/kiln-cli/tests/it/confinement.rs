//! What the QEMU of a running machine may do, read from /proc as the kernel sees it.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use crate::support::{kiln, until};

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

#[test]
fn a_machines_process_can_do_little_and_is_bounded() {
    let Some(kiln) = kiln() else { return };
    let mut running = kiln.start(&[
        "run",
        "--no-source",
        "--",
        "sh",
        "-c",
        "hostname; sleep 600",
    ]);
    running.until_it_prints("-run\n");
    let machines = fs::read_dir(kiln.home.join("machines")).expect("machines");
    let ours = machines
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name != ".lock")
        .find_map(|name| {
            let path = vmm(&name)?;
            let parent = fs::read_to_string(path.join("status")).ok()?;
            parent
                .contains(&format!("PPid:\t{}\n", running.child.id()))
                .then_some(path)
        });
    let process = ours.expect("the machine's QEMU");
    let root = rustix::process::geteuid().is_root();
    let threads = fs::read_dir(process.join("task"))
        .expect("threads")
        .flatten();
    let mut seen = 0;
    for thread in threads {
        let status = status(&thread.path());
        // 2 is a filter (seccomp(2)); the thread that QEMU starts its own threads from has it as well.
        assert_eq!(status["Seccomp"], "2", "{status:?}");
        assert_eq!(status["NoNewPrivs"], "1", "{status:?}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status[set].trim_start_matches('0'), "", "{set}: {status:?}");
        }
        if root {
            let ids = |key: &str| -> Vec<u32> {
                let words = status[key].split_whitespace();
                words.map(|word| word.parse().expect("an id")).collect()
            };
            let (users, groups) = (ids("Uid"), ids("Gid"));
            assert!(
                users.iter().all(|id| *id >= 1000 && *id == users[0]),
                "{status:?}"
            );
            assert!(
                groups.iter().all(|id| *id == groups[0] && *id != 0),
                "{status:?}"
            );
        }
        seen += 1;
    }
    assert!(seen >= 2, "it has more threads than that");
    if root {
        let found = limits(&process);
        let number = |files: [&str; 2]| {
            let value = files.iter().find_map(|file| found.get(*file));
            let first =
                value.and_then(|value| value.split_whitespace().next()?.parse::<i64>().ok());
            first.unwrap_or_else(|| panic!("no bound in {files:?}: {found:?}"))
        };
        // 512 MiB for the guest, and what QEMU itself needs.
        let memory = number(["memory.max", "memory.limit_in_bytes"]);
        assert!((512 << 20..2 << 30).contains(&memory), "{found:?}");
        assert!(
            (1..=1000).contains(&number(["pids.max", "pids.max"])),
            "{found:?}"
        );
        assert!(number(["cpu.max", "cpu.cfs_quota_us"]) > 0, "{found:?}");
    }
    running.signal("INT");
    until("the end of its process", || {
        (!process.exists()).then_some(())
    });
    running.end().exits(130);
}
