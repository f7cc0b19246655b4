//! Too much of everything: sources of gigabytes and of hundreds of thousands of files, logs of a gigabyte. kiln's own memory stays small.

use std::fs::{self, File};
use std::process::Stdio;

use crate::annex::Annex;
use crate::support::{Said, Started, app, path};

/// Most memory kiln itself may take, in KiB: a build from a debug binary takes a quarter of it.
const MEMORY_KIB_MAX: u64 = 130_000;

/// Runs a build and watches kiln's memory; gives the most it took, in KiB.
fn watched(annex: &Annex, args: &[&str]) -> (Said, u64) {
    let mut command = annex.command(args);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kiln starts");
    let status = format!("/proc/{}/status", child.id());
    let watch = std::thread::spawn(move || {
        let mut most = 0;
        // The line goes with the process.
        while let Some(now) = high_water(&status) {
            most = most.max(now);
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        most
    });
    let said = Started { child }.end();
    (said, watch.join().expect("watched"))
}

/// The most that a process of this file ever had resident, in KiB.
pub(crate) fn high_water(status: &str) -> Option<u64> {
    let text = fs::read_to_string(status).ok()?;
    let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Pieces of 64,000 bytes in the flood: more than kiln may hold; with `KILN_TEST_LONG`, as `make soak` sets it, a gigabyte.
#[expect(
    clippy::disallowed_methods,
    reason = "the test command talks to tests this way"
)]
fn pieces() -> u32 {
    match std::env::var_os("KILN_TEST_LONG") {
        Some(_) => 16_778,
        None => 2_200,
    }
}

#[test]
fn a_flood_of_log_is_cut_honestly_and_in_constant_memory() {
    let Some(annex) = Annex::open() else { return };
    let text = "FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\n\
        RUN [\"python3\", \"-c\", \"import os\\nline = (b'x' * 199 + b'\\\\n') * 320\\nfor _ in range(PIECES): os.write(1, line)\"]\n\
        RUN echo after the flood\n";
    let text = text.replace("PIECES", &pieces().to_string());
    assert!(u64::from(pieces()) * 64_000 > MEMORY_KIB_MAX << 10);
    let dir = app(&[("Dockerfile", &text)]);
    let (said, most) = watched(
        &annex,
        &["build", path(dir.path()), "--tag", "it-flood", "--no-cache"],
    );
    said.exits(0);
    assert!(most < MEMORY_KIB_MAX, "{most} KiB");
    let log = annex.run(&["job", "logs"]).exits(0);
    assert!(
        log.out.contains("the rest is cut"),
        "{} bytes",
        log.out.len()
    );
    assert!(
        log.out.contains("after the flood"),
        "other steps keep theirs"
    );
    assert!(log.out.len() < 20_000_000, "{} bytes", log.out.len());
    annex.is_well();
}

#[test]
fn a_flood_of_a_runs_output_is_passed_on_whole_kept_to_its_bound_and_costs_no_memory() {
    let Some(annex) = Annex::open() else { return };
    let bytes = u64::from(pieces()) * 64_000;
    let line = "0123456789".repeat(19) + "012345678";
    let script = format!("yes {line} | head -c {bytes}");
    let shown = tempfile::NamedTempFile::new().expect("a file");
    let mut command = annex.command(&["run", "--no-source", "--", "sh", "-c", &script]);
    command
        .stdout(shown.reopen().expect("the file"))
        .stderr(Stdio::piped());
    let mut run = Started {
        child: command.spawn().expect("kiln starts"),
    };
    let status = format!("/proc/{}/status", run.child.id());
    let mut most = 0;
    let mut beside = 0;
    while run.child.try_wait().expect("waited").is_none() || beside == 0 {
        most = most.max(high_water(&status).unwrap_or(0));
        // The line of this home's queue goes on.
        annex.run(&["run", "--no-source", "--", "true"]).exits(0);
        beside += 1;
    }
    let ended = run.end().exits(0);
    assert!((1..MEMORY_KIB_MAX).contains(&most), "{most} KiB");
    assert_eq!(shown.as_file().metadata().expect("a file").len(), bytes);
    // A log beyond its bound is told.
    let cut = bytes > kiln_worker::fleet::spool::LOG_BYTES_MAX;
    assert_eq!(ended.err.contains("the log is cut"), cut, "{ended:?}");
    annex.is_clear();
}

#[test]
fn a_large_source_streams_in_constant_memory() {
    let Some(annex) = Annex::open() else { return };
    let text = "FROM scratch\nCOPY small /small\n";
    let dir = app(&[("Dockerfile", text), ("small", "x")]);
    // Without KVM a gigabyte takes a minute to reach a machine's disk: kiln-image packs three, and here more than kiln may hold goes
    // all the way.
    File::create(dir.path().join("large"))
        .and_then(|file| file.set_len(200 << 20))
        .expect("200 MB of holes");
    let (said, most) = watched(
        &annex,
        &["build", path(dir.path()), "--tag", "it-large", "--no-cache"],
    );
    said.exits(0);
    assert!(most < MEMORY_KIB_MAX, "{most} KiB");
    annex.is_well();
}

#[test]
fn a_source_beyond_the_bounds_is_refused_with_the_bound_before_anything_starts() {
    let Some(annex) = Annex::open() else { return };
    let dir = app(&[("Dockerfile", "FROM scratch\nCOPY . /\n")]);
    File::create(dir.path().join("large"))
        .and_then(|file| file.set_len(9 << 30))
        .expect("9 GB of holes");
    annex
        .run(&["build", path(dir.path())])
        .exits(2)
        .says("8589934592 bytes")
        .says(".dockerignore");
    annex.is_well();
}

/// Many names of one small file, in memory where the host has that.
fn many_files(count: u32) -> tempfile::TempDir {
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("temp dir");
    fs::write(
        dir.path().join("Dockerfile"),
        "FROM scratch\nCOPY Dockerfile /\n",
    )
    .expect("write");
    let one = dir.path().join("one");
    fs::write(&one, "x").expect("write");
    for number in 0..count {
        let folder = dir.path().join(format!("d{}", number / 1000));
        if number % 1000 == 0 {
            fs::create_dir(&folder).expect("folder");
        }
        fs::hard_link(&one, folder.join(number.to_string())).expect("link");
    }
    dir
}

#[test]
fn a_source_of_too_many_files_is_refused_with_the_bound_and_many_fewer_stream() {
    let Some(annex) = Annex::open() else { return };
    let dir = many_files(500_000);
    let (said, most) = watched(&annex, &["build", path(dir.path())]);
    said.exits(2)
        .says("more than 500000 files and folders")
        .says(".dockerignore");
    assert!(most < MEMORY_KIB_MAX, "{most} KiB");
    drop(dir);
    // 400,000 take minutes in a machine without KVM: kiln-image packs as many, and here a part of them goes all the way.
    let dir = many_files(20_000);
    let (said, most) = watched(
        &annex,
        &["build", path(dir.path()), "--tag", "it-many", "--no-cache"],
    );
    said.exits(0);
    assert!(most < MEMORY_KIB_MAX, "{most} KiB");
    annex.is_well();
}
