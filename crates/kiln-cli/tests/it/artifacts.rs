//! What a run leaves in its machine, brought to this host: kept, listed, fetched, copied out; a hostile machine writes nowhere else.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::Value;

use crate::annex::Annex;
use crate::support::{Said, app, free_port, path, said};

/// Leaves plain files, and what must not leave a machine; then fails.
const LEAVES: &str = "mkdir -p out/sub 'out/odd name' && echo one > out/a.xml && echo two > out/sub/b.xml && echo log > out/sub/c.log && \
ln -s /etc/shadow out/link && ln -s / out/root && mkfifo out/pipe && echo x > 'out/odd name/x'; exit 3";

fn names(said: &Said) -> Vec<String> {
    let name = |line: &str| {
        let value: Value = serde_json::from_str(line).expect("JSON");
        value["name"].as_str().expect("a name").to_owned()
    };
    said.out.lines().map(name).collect()
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Everything below a folder, folders aside.
fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("folder").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        match entry.path().is_dir() {
            true => found.extend(
                files(&entry.path())
                    .iter()
                    .map(|below| format!("{name}/{below}")),
            ),
            false => found.push(name),
        }
    }
    found.sort();
    found
}

#[test]
fn what_a_failed_command_left_is_kept_and_copied_out() {
    let Some(annex) = Annex::open() else { return };
    let dir = tempfile::tempdir().expect("dir");
    let to = dir.path().join("copied");
    let copy = format!("out/sub:{}", path(&to));
    let run = [
        "run",
        "--artifact",
        "out/**/*.xml",
        "--artifact",
        "out/*",
        "--copy-out",
        &copy,
        "--",
        "sh",
        "-c",
        LEAVES,
    ];
    let said = annex.run(&run).exits(3);
    for word in [
        "out/link is not kept: it is a link",
        "out/root is not kept: it is a link",
        "out/odd name/x\" is not the name of an artifact",
        "kiln: copied 2 files below",
        "kiln: 1 file kept; `kiln job artifacts",
    ] {
        assert!(said.err.contains(word), "{word}\n{}", said.err);
    }
    assert_eq!(files(&to), ["b.xml", "c.log"]);
    assert_eq!(text(&to.join("b.xml")), "two\n");

    let job: Value =
        serde_json::from_str(&annex.run(&["job", "show", "--json"]).exits(0).out).expect("JSON");
    let id = job["id"].as_str().expect("an id");
    let listed = annex.run(&["job", "artifacts", id, "--json"]).exits(0);
    assert_eq!(
        names(&listed),
        ["out/a.xml", "out/sub/b.xml", "out/sub/c.log"]
    );
    let listed = annex.run(&["job", "artifacts", id]).exits(0);
    assert_eq!(
        listed.out,
        "SIZE  NAME\n 4 B  out/a.xml\n 4 B  out/sub/b.xml\n 4 B  out/sub/c.log\n"
    );

    // Fetched below a folder in which somebody has laid links.
    let all = dir.path().join("all");
    let outside = dir.path().join("outside");
    fs::create_dir_all(all.join("out")).expect("folder");
    fs::create_dir(&outside).expect("folder");
    fs::write(outside.join("a.xml"), "mine").expect("write");
    symlink(outside.join("a.xml"), all.join("out/a.xml")).expect("link");
    annex
        .run(&["job", "artifacts", id, "--all", "-o", path(&all)])
        .exits(0);
    assert_eq!(files(&all), ["out/a.xml", "out/sub/b.xml", "out/sub/c.log"]);
    assert_eq!(
        (text(&all.join("out/a.xml")), text(&outside.join("a.xml"))),
        ("one\n".to_owned(), "mine".to_owned())
    );
    let linked = dir.path().join("linked");
    fs::create_dir(&linked).expect("folder");
    symlink(&outside, linked.join("out")).expect("link");
    let refused = annex
        .run(&["job", "artifacts", id, "out/a.xml", "-o", path(&linked)])
        .exits(2);
    refused.says("out is a link or no folder");
    assert_eq!(text(&outside.join("a.xml")), "mine");
    annex
        .run(&["job", "artifacts", id, "out/none"])
        .exits(2)
        .says("no artifact");
    annex.is_well();
}

#[test]
fn no_copy_leads_through_a_link_or_over_a_fifo_of_a_hostile_project() {
    let Some(annex) = Annex::open() else { return };
    let project = app(&[("outside/mine", "precious")]);
    let at = |name: &str| project.path().join(name);
    fs::create_dir(at("deep")).expect("folder");
    symlink("outside", at("out")).expect("link");
    symlink("../outside", at("deep/out")).expect("link");
    symlink("outside/mine", at("file")).expect("link");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), kind, mode, 0).expect("fifo");
    let copied = |copy: &str| {
        let words = [
            "run",
            "--no-source",
            "--copy-out",
            copy,
            "--",
            "sh",
            "-c",
            "mkdir out; echo new | tee out/a out/b > file",
        ];
        let mut command = annex.command(&words);
        command.current_dir(project.path());
        said(command)
    };
    // What is only known when it came, and what is known before anything runs.
    copied("out").exits(2).says("out is a link or no folder");
    for copy in ["out/a:out", "out:out/new", "out/*:deep/out", "file:out/x"] {
        copied(copy).exits(2).says("out is a link or no folder");
    }
    copied("file:fifo")
        .exits(2)
        .says("fifo is a fifo, not a file");
    assert_eq!(files(&at("outside")), ["mine"]);
    assert_eq!(text(&at("outside/mine")), "precious");
    // A link that has a file's own name is replaced.
    copied("file").exits(0);
    assert_eq!(
        (text(&at("file")), text(&at("outside/mine"))),
        ("new\n".to_owned(), "precious".to_owned())
    );
    annex.is_well();
}

#[test]
fn a_copy_that_finds_nothing_fails_a_command_that_passed() {
    let Some(annex) = Annex::open() else { return };
    let run = ["run", "--copy-out", "none.txt", "--", "true"];
    annex
        .run(&run)
        .exits(1)
        .says("--copy-out none.txt: the command left no such file");
    for bad in ["../x", "/*", "a b", "x:"] {
        annex
            .run(&["run", "--copy-out", bad, "--", "true"])
            .exits(2);
    }
    // A job that a command ran itself waits for no worker when it is asked for again.
    let shown = annex.run(&["job", "show", "--json"]).exits(0).out;
    let job: Value = serde_json::from_str(&shown).expect("JSON");
    let own = job["id"].as_str().expect("an id").to_owned();
    let (server, at) = crate::serve::serve(&annex, free_port());
    let dir = tempfile::tempdir().expect("dir");
    let copy = format!("r.txt:{}", path(&dir.path().join("here.txt")));
    let mut run = vec!["--server", &at, "run"];
    run.extend(crate::serve::SMALL);
    run.extend(["--copy-out", &copy, "--", "sh", "-c", "echo far > r.txt"]);
    annex.run(&run).exits(0).says("kiln: copied");
    assert_eq!(text(&dir.path().join("here.txt")), "far\n");
    annex
        .run(&["--server", &at, "job", "retry", &own])
        .exits(2)
        .says("type it again: kiln run --artifact none.txt -- true");
    annex
        .run(&[
            "--server",
            &at,
            "run",
            "--detach",
            "--copy-out",
            "x",
            "--",
            "true",
        ])
        .exits(2)
        .says("--detach");
    server.signal("TERM");
    server.end();
    annex.is_well();
}
