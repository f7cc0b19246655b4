//! Builds that fail, lie or die: the right class, nothing lost, nothing left behind.

use crate::support::{Said, app, kiln, path, until};

/// Builds a Dockerfile on the Python base that does this, with these options.
fn build(run: &str, more: &[&str]) -> Option<Said> {
    let kiln = kiln()?;
    let text = format!("FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\n{run}\n");
    let dir = app(&[("Dockerfile", &text)]);
    let mut args = vec!["build", path(dir.path()), "--tag", "it-fault"];
    args.extend(more);
    Some(kiln.run(&args))
}

#[test]
fn a_failing_step_is_the_users_failure_and_its_words_are_shown() {
    let Some(said) = build("RUN echo because >&2; exit 3", &[]) else {
        return;
    };
    said.exits(1).says("because").says("step #");
}

#[test]
fn a_hanging_step_is_ended_by_the_timeout() {
    let Some(said) = build("RUN sleep 600", &["--timeout", "15s"]) else {
        return;
    };
    said.exits(124).says("--timeout");
}

#[test]
fn a_memory_hog_is_out_of_memory_and_buildkit_survives() {
    let Some(said) = build("RUN [\"python3\", \"-c\", \"x = bytearray(1 << 40)\"]", &[]) else {
        return;
    };
    // One impossible allocation fails inside Python: the user's failure.
    said.exits(1);
    let Some(said) = build(
        "RUN [\"python3\", \"-c\", \"x = [bytearray(1 << 24) for _ in range(1 << 20)]\"]",
        &[],
    ) else {
        return;
    };
    said.exits(1).says("out of memory");
}

#[test]
fn a_fork_bomb_is_bounded_and_ends_with_the_step() {
    let bomb = "RUN [\"python3\", \"-c\", \"import os\\nfor _ in range(100000):\\n  os.fork()\"]";
    let Some(said) = build(bomb, &["--timeout", "90s"]) else {
        return;
    };
    assert!(said.code == 1 || said.code == 124, "{said:?}");
}

#[test]
fn a_flood_of_output_is_cut_honestly() {
    let Some(kiln) = kiln() else { return };
    let text = "FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\nRUN head -c 60000000 /dev/zero | tr '\\\\0' x | fold -w 200\n";
    let dir = app(&[("Dockerfile", text)]);
    let built = kiln.build(dir.path(), "it-flood", &["--no-cache"]);
    let log = kiln
        .run(&["job", "logs", built["job"].as_str().expect("job")])
        .exits(0);
    assert!(
        log.out.contains("the rest is cut"),
        "{} bytes",
        log.out.len()
    );
    assert!(log.out.len() < 20_000_000);
}

#[test]
fn steps_cannot_reach_what_is_not_named() {
    let run = "RUN [\"python3\", \"-c\", \"import urllib.request; urllib.request.urlopen('https://example.org/')\"]";
    let Some(said) = build(run, &[]) else { return };
    said.exits(1).says("--allow example.org");
}

#[test]
fn a_step_that_pushes_to_the_registry_itself_changes_nothing() {
    let run = "RUN [\"python3\", \"-c\", \"import urllib.request as u\\nr = u.Request('http://registry.kiln.internal/v2/t/local/stolen/blobs/uploads/', method='POST')\\ntry:\\n  u.urlopen(r)\\n  raise SystemExit(9)\\nexcept u.HTTPError as e:\\n  assert e.code in (401, 403, 404, 405), e.code\"]";
    let Some(said) = build(run, &[]) else { return };
    said.exits(0);
    let Some(kiln) = kiln() else { return };
    let listed = kiln.run(&["registry", "list"]).exits(0);
    assert!(!listed.out.contains("stolen"), "{}", listed.out);
}

#[test]
fn kill_9_of_kiln_leaves_nothing_once_the_next_command_ran() {
    let Some(kiln) = kiln() else { return };
    let mut running = kiln.start(&["run", "--", "sh", "-c", "echo started; sleep 600"]);
    let mut first = [0; 8];
    std::io::Read::read_exact(running.child.stdout.as_mut().expect("piped"), &mut first)
        .expect("started");
    let ours = vmm_count(&kiln.home);
    assert!(ours >= 1);
    running.signal("KILL");
    running.end();
    kiln.run(&["run", "--", "true"]).exits(0);
    until("the orphan to be reaped", || {
        (vmm_count(&kiln.home) < ours).then_some(())
    });
}

/// Processes that hold a file of this home's machines open.
fn vmm_count(home: &std::path::Path) -> usize {
    let machines = home.join("machines");
    let mut count = 0;
    for entry in std::fs::read_dir("/proc").expect("proc").flatten() {
        let Ok(comm) = std::fs::read_to_string(entry.path().join("comm")) else {
            continue;
        };
        if !comm.starts_with("qemu") {
            continue;
        }
        let fds = std::fs::read_dir(entry.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let inside = |fd: std::fs::DirEntry| {
            std::fs::read_link(fd.path()).is_ok_and(|to| to.starts_with(&machines))
        };
        count += usize::from(fds.into_iter().any(inside));
    }
    count
}

#[test]
fn kill_9_of_the_vmm_is_infrastructure_and_not_a_hang() {
    let Some(kiln) = kiln() else { return };
    let mut running = kiln.start(&["run", "--", "sh", "-c", "echo started; sleep 600"]);
    let mut first = [0; 8];
    std::io::Read::read_exact(running.child.stdout.as_mut().expect("piped"), &mut first)
        .expect("started");
    let pid = children_of(running.child.id())
        .into_iter()
        .next()
        .expect("a VMM below kiln");
    let killed = std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .expect("kill");
    assert!(killed.success());
    running.end().exits(3);
}

fn children_of(parent: u32) -> Vec<u32> {
    std::fs::read_dir("/proc")
        .expect("proc")
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            let after = stat.rsplit_once(')')?.1;
            let ppid: u32 = after.split_ascii_whitespace().nth(1)?.parse().ok()?;
            (ppid == parent && stat.contains("(qemu")).then_some(pid)
        })
        .collect()
}
