//! Builds whose steps fail, hang, devour or lie: the right class, nothing lost, nothing left behind.
//!
//! One test per fault of docs/design/faults.md. Read next: `faults_disk`, `faults_host`, `faults_kill`, `faults_large`, `faults_rot`.

use crate::annex::Annex;
use crate::support::{Said, app, path};

/// Builds a Dockerfile on the Python base that does this, with these options; whatever came of it, all is well afterwards.
fn build(run: &str, more: &[&str]) -> Option<Said> {
    let annex = Annex::open()?;
    let text = format!("FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\n{run}\n");
    let dir = app(&[("Dockerfile", &text)]);
    let mut args = vec!["build", path(dir.path()), "--tag", "it-fault"];
    args.extend(more);
    let said = annex.run(&args);
    annex.is_well();
    Some(said)
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
    let Some(said) = build("RUN sleep 600", &["--timeout", "10s"]) else {
        return;
    };
    said.exits(124).says("--timeout");
}

#[test]
fn a_memory_hog_is_out_of_memory_and_buildkit_survives() {
    // One impossible allocation fails inside Python and is a step's own matter; memory that is really filled is not.
    let hog = "RUN [\"python3\", \"-c\", \"try: bytearray(1 << 40)\\nexcept MemoryError: print('refused')\"]\n\
        RUN [\"python3\", \"-c\", \"x = [bytearray(1 << 24) for _ in range(1 << 20)]\"]";
    let Some(said) = build(hog, &["--no-cache"]) else {
        return;
    };
    let said = said.says("| refused");
    said.exits(1).says("out of memory");
}

#[test]
fn a_step_that_starts_too_much_meets_its_bound() {
    // Threads count as processes do, and take less memory.
    let many = "RUN [\"python3\", \"-c\", \"import threading, time\\nwhile True: threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\"]";
    let Some(said) = build(many, &[]) else { return };
    said.exits(1).says("can't start new thread");
}

#[test]
fn a_fork_bomb_that_never_ends_is_ended_with_its_machine() {
    let bomb = "RUN [\"python3\", \"-c\", \"import os\\nwhile True:\\n  os.fork()\"]";
    let Some(said) = build(bomb, &["--timeout", "15s"]) else {
        return;
    };
    said.exits(124).says("--timeout");
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
    let Some(said) = build(run, &["--no-cache"]) else {
        return;
    };
    said.exits(0);
    let Some(annex) = Annex::open() else { return };
    let listed = annex.run(&["registry", "list", "--all"]).exits(0);
    assert!(!listed.out.contains("stolen"), "{}", listed.out);
}
