//! Disks that are full: the machine's own, and the host's under a machine, a registry, a template, a whole home.
//!
//! A full disk of the host is a small memory file system in a mount namespace of the command's own.

use std::fs;

use crate::annex::{Annex, may_mount};
use crate::support::{app, path};

/// A base, and a step.
fn dockerfile(run: &str) -> String {
    format!("FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\n{run}\n")
}

#[test]
fn a_step_that_fills_the_machines_disk_is_the_users_failure() {
    let Some(annex) = Annex::open_with("[limits]\ndisk_max = \"48MB\"\n") else {
        return;
    };
    let text = dockerfile("RUN head -c 100M /dev/zero > /filled");
    let dir = app(&[("Dockerfile", &text)]);
    annex
        .run(&["build", path(dir.path()), "--tag", "it-fill"])
        .exits(1)
        .says("filled the machine's disk")
        .says("limits.disk_max");
    annex.is_well();
}

#[test]
fn a_full_disk_of_the_host_stops_a_build_and_does_not_hang() {
    if !may_mount() {
        return;
    }
    let Some(annex) = Annex::open() else { return };
    let text = dockerfile("RUN head -c 200M /dev/urandom > /filled");
    let dir = app(&[("Dockerfile", &text)]);
    let mounts = "mkdir -p \"$HOME_DIR/machines\"; mount -t tmpfs -o size=40m,mode=700 none \"$HOME_DIR/machines\"";
    // QEMU stops the guest at the first write that fails, and the host ends the machine.
    annex
        .run_among(
            mounts,
            &[
                "build",
                path(dir.path()),
                "--tag",
                "it-full",
                "--timeout",
                "120s",
            ],
        )
        .exits(3)
        .says("the host's disk failed or is full")
        .says("kiln cache prune");
    annex.is_well();
}

#[test]
fn a_registry_without_room_is_the_hosts_failure_and_not_the_builds() {
    if !may_mount() {
        return;
    }
    let Some(mut annex) = Annex::open() else {
        return;
    };
    annex.without("registry");
    let dir = app(&[("Dockerfile", "FROM scratch\nCOPY content /content\n")]);
    fs::write(dir.path().join("content"), vec![7; 1 << 20]).expect("write");
    let mounts = "mount -t tmpfs -o size=24m,mode=700 none \"$HOME_DIR/registry\"";
    annex
        .run_among(mounts, &["build", path(dir.path()), "--tag", "it-room"])
        .exits(3)
        .says("the host's disk is full");
    annex.is_well();
}

#[test]
fn a_home_without_any_room_is_told_at_once() {
    if !may_mount() {
        return;
    }
    let Some(annex) = Annex::open() else { return };
    for part in ["controller", "machines"] {
        let mounts = format!(
            "mkdir -p \"$HOME_DIR/{part}\"; mount -t tmpfs -o size=16k,mode=700 none \"$HOME_DIR/{part}\"; head -c 1M /dev/zero > \"$HOME_DIR/{part}/.filler\" 2>/dev/null || true"
        );
        let said = annex.run_among(&mounts, &["run", "--", "true"]);
        assert_eq!(said.code, 3, "{part}: {said:?}");
        let words = said.err.to_lowercase();
        let told = (words.contains("no space left") || words.contains("disk is full"))
            && words.contains("kiln cache prune");
        assert!(told, "{part}: {said:?}");
    }
    annex.is_well();
}

#[test]
fn a_template_that_does_not_fit_is_told_and_leaves_nothing() {
    if !may_mount() {
        return;
    }
    let Some(mut annex) = Annex::open() else {
        return;
    };
    annex.without("templates");
    let mounts = "mount -t tmpfs -o size=24m,mode=700 none \"$HOME_DIR/templates\"";
    let script = format!("{mounts}; trap 'ls -A \"$HOME_DIR/templates\" >&2' EXIT");
    let said = annex
        .run_among(
            &script,
            &["run", "--memory", "512M", "--cpus", "1", "--", "true"],
        )
        .exits(3);
    let said = said
        .says("No space left on device")
        .says("kiln cache prune");
    assert!(
        said.err.ends_with("\n.make\n"),
        "only the folder of makers' locks: {said:?}"
    );
    annex.give_back("templates");
    annex.is_well();
}
