//! Faults of the host: no QEMU, an old one, a port that is taken, a clock that jumps.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use crate::annex::{Annex, may_mount};
use crate::support::{app, path, said};

/// Where QEMU is, links followed.
fn qemu() -> std::path::PathBuf {
    let places = ["/usr/local/bin", "/usr/bin", "/bin"];
    let found = places
        .iter()
        .find_map(|place| fs::canonicalize(format!("{place}/qemu-system-x86_64")).ok());
    found.expect("QEMU is installed")
}

#[test]
fn a_missing_qemu_is_told_with_its_package() {
    if !may_mount() {
        return;
    }
    let Some(annex) = Annex::open() else { return };
    // Nothing that is a program is there any more.
    let mounts = format!("mount --bind /dev/null {}", path(&qemu()));
    let dir = app(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
    for args in [&["run", "--", "true"][..], &["build", path(dir.path())]] {
        annex
            .run_among(&mounts, args)
            .exits(3)
            .says("not installed")
            .says("qemu-system-x86")
            .says("kiln doctor");
    }
    let doctor = annex.run_among(&mounts, &["doctor"]).exits(3);
    assert!(doctor.out.contains("qemu-system-x86"), "{doctor:?}");
    annex.is_well();
}

#[test]
fn a_qemu_that_is_too_old_is_refused_by_its_version() {
    if !may_mount() {
        return;
    }
    let Some(annex) = Annex::open() else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    // A named fake: it answers as QEMU 7.2 does, and fails if it is asked for more.
    let fake = dir.path().join("qemu-7.2");
    fs::write(&fake, "#!/bin/sh\n[ \"$1\" = --version ] || exit 99\necho 'QEMU emulator version 7.2.17 (Debian 1:7.2+dfsg-7+deb12u16)'\n")
        .expect("write");
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).expect("chmod");
    let mounts = format!("mount --bind {} {}", path(&fake), path(&qemu()));
    annex
        .run_among(&mounts, &["run", "--", "true"])
        .exits(3)
        .says("7.2.17 is too old")
        .says("8.2");
    let doctor = annex.run_among(&mounts, &["doctor"]).exits(3);
    assert!(doctor.out.contains("8.2"), "{doctor:?}");
    annex.is_well();
}

#[test]
fn a_registry_port_taken_by_a_stranger_is_named_and_stops_nothing_else() {
    let Some(mut annex) = Annex::open() else {
        return;
    };
    annex.without("registry");
    let stranger = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = stranger.local_addr().expect("address").to_string();
    let port = format!("port {}", stranger.local_addr().expect("address").port());
    annex
        .run(&["registry", "serve", "--listen", &address])
        .exits(3)
        .says(&port)
        .says("taken by")
        .says("--listen");
    // Builds and lists need no port.
    annex.run(&["registry", "list"]).exits(0);
    annex.is_well();
}

/// A named fake: the wall clock of one process jumps a month ahead and two months back, again and again.
const JUMPING_CLOCK: &str = r#"
#define _GNU_SOURCE
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>
int clock_gettime(clockid_t which, struct timespec *now) {
    static unsigned long calls;
    int done = (int)syscall(SYS_clock_gettime, which, now);
    if (which == CLOCK_REALTIME && calls++ >= 12)
        now->tv_sec += (calls / 4) % 2 ? 2592000 : -5184000;
    return done;
}
"#;

#[test]
fn a_wall_clock_that_jumps_ends_no_job() {
    let Some(annex) = Annex::open() else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    let (source, library) = (dir.path().join("clock.c"), dir.path().join("clock.so"));
    fs::write(&source, JUMPING_CLOCK).expect("write");
    let compiled = Command::new("cc")
        .args([
            "-shared",
            "-fPIC",
            "-O1",
            "-o",
            path(&library),
            path(&source),
        ])
        .status()
        .expect("a C compiler, which Rust needs too");
    assert!(compiled.success());
    let jumping = |args: &[&str]| {
        let mut command = annex.command(args);
        command.env("LD_PRELOAD", &library);
        said(command)
    };
    jumping(&["run", "--", "true"]).exits(0);
    let text = "FROM scratch\nCOPY Dockerfile /clock\n";
    let dir = app(&[("Dockerfile", text)]);
    jumping(&["build", path(dir.path()), "--tag", "it-clock", "--no-cache"]).exits(0);
    jumping(&["job", "list"]).exits(0);
    annex.is_well();
}

#[test]
fn a_guest_may_set_its_own_clock_as_it_likes() {
    let Some(annex) = Annex::open() else { return };
    let jumps = "date -s @1000; date -s @4000000000; echo still here";
    let said = annex.run(&["run", "--", "sh", "-c", jumps]).exits(0);
    assert!(said.out.contains("still here"), "{said:?}");
    annex.is_well();
}
