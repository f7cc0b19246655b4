//! A project's folder goes along with its command, into the base that fits its runtime; nothing comes back.

use std::fs;
use std::path::Path;

use crate::annex::Annex;
use crate::fleet_kill::asked;
use crate::support::{Kiln, Said, Started, kiln, path, said};

/// Files of a small Node project, some of which stay behind.
fn project(dir: &Path) {
    let test = "require('node:test')('adds', () => require('assert').equal(require('../lib/a').sum(1, 2), 3));";
    for (name, text) in [
        (
            "package.json",
            r#"{"name": "app", "scripts": {"test": "node --test && echo tested > out.txt"}}"#,
        ),
        ("lib/a.js", "exports.sum = (a, b) => a + b;"),
        ("test/a.test.js", test),
        (".gitignore", "node_modules\n*.log\n"),
        ("node_modules/x/index.js", ""),
        ("old.log", ""),
        (".git/HEAD", "ref: refs/heads/main\n"),
        ("run.sh", "#!/bin/sh\necho ran \"$PWD\"\n"),
    ] {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().expect("inside")).expect("folder");
        fs::write(path, text).expect("write");
    }
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    fs::set_permissions(dir.join("run.sh"), fs::Permissions::from_mode(0o755)).expect("mode");
    symlink("lib/a.js", dir.join("link.js")).expect("link");
}

fn run_in(kiln: &Kiln, dir: &Path, args: &[&str]) -> Said {
    let mut command = kiln.command(&[&["run"], args].concat());
    command.current_dir(dir);
    said(command)
}

#[test]
fn the_tests_of_a_folder_run_in_the_base_of_its_runtime() {
    // The base is unpacked once in the home that all tests share.
    let Some(kiln) = kiln() else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    project(dir.path());
    let said = run_in(&kiln, dir.path(), &["--", "npm", "test"]).exits(0);
    let said = said.says("runs in the base of node");
    assert!(said.out.contains("# pass 1"), "{said:?}");
    assert!(
        !dir.path().join("out.txt").exists(),
        "nothing is written back"
    );

    // What is there: modes and links as they are, and nothing that the rules keep away.
    let look = "find . -mindepth 1 | sort; readlink link.js; ./run.sh; test $(stat -c %d .) != $(stat -c %d /etc)";
    let said = run_in(&kiln, dir.path(), &["--", "sh", "-c", look]).exits(0);
    let there = "./.gitignore\n./lib\n./lib/a.js\n./link.js\n./package.json\n./run.sh\n./test\n./test/a.test.js\nlib/a.js\nran /work\n";
    assert_eq!(said.out, there);

    // The code is the command's, files come back when somebody asks for them, and an image's user works on files of its own.
    let out = dir.path().join("back");
    let back = format!("made/b:{}/", path(&out));
    fs::create_dir(&out).expect("folder");
    let make = "cd lib && mkdir ../made && cp a.js ../made/b && exit 7";
    let said = run_in(
        &kiln,
        dir.path(),
        &["--copy-out", &back, "--", "sh", "-c", make],
    );
    said.exits(7);
    let copied = fs::read_to_string(out.join("b")).expect("copied");
    assert!(copied.contains("sum"), "{copied}");
    assert!(!dir.path().join("made").exists());
}

#[test]
fn a_command_in_a_base_ends_as_one_in_the_machine_does() {
    let Some(kiln) = kiln() else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    project(dir.path());
    let run = |words: &[&str]| run_in(&kiln, dir.path(), &[&["--"], words].concat());
    // No signal is lost because the command is the first of its container: nobody takes a crash for success.
    run(&["sh", "-c", "kill -9 $$"])
        .exits(137)
        .says("exit code 137");
    let crash = "process.kill(process.pid, 'SIGSEGV')";
    run(&["node", "-e", crash]).exits(139);
    // What it leaves behind is no concern of its end.
    run(&["sh", "-c", "sleep 1000 & exit 5"]).exits(5);
    let none = run(&["nosuchprogram"]).exits(127);
    none.says("error: run \"nosuchprogram\": No such file or directory")
        .says("`--image NAME` runs an image that has it");
    run(&["./package.json"])
        .exits(126)
        .says("error: run \"./package.json\": Permission denied");
    // Found, and yet not to be run: its init says so.
    let text = "#!/no/such/interpreter\n";
    fs::write(dir.path().join("run.sh"), text).expect("write");
    run(&["./run.sh"])
        .exits(127)
        .says("kiln: run \"./run.sh\":");
}

/// Only with `KILN_TEST_LONG`: kiln gives a command one second for each signal, and an emulated guest of a busy host may need longer.
#[test]
fn signals_from_outside_reach_a_command_in_a_base() {
    if asked("KILN_TEST_LONG").is_none() {
        return;
    }
    let Some(kiln) = kiln() else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    project(dir.path());
    let begun = |traps: &str| {
        // A shell waits for its own child before it sees a signal: that child gets it too, as with a terminal.
        let script = format!("{traps}; echo begun; while :; do sleep 600; done");
        let mut command = kiln.command(&["run", "--", "sh", "-c", &script]);
        command.current_dir(dir.path());
        let mut running = Started::of(command);
        running.until_it_prints("begun\n");
        running
    };
    // Whichever of the two kiln gets, the command is interrupted first, and told to end when that was not enough.
    for (sent, traps, told) in [
        (
            "INT",
            "trap 'echo interrupted; exit 9' INT",
            "interrupted\n",
        ),
        (
            "TERM",
            "trap 'echo interrupted; exit 9' INT",
            "interrupted\n",
        ),
        (
            "TERM",
            "trap '' INT; trap 'echo told to end; exit 9' TERM",
            "told to end\n",
        ),
    ] {
        let running = begun(traps);
        running.signal(sent);
        let said = running.end().exits(130).says("cancelling");
        assert_eq!(said.out, told, "{sent}, {traps}");
    }
}

#[test]
fn a_folder_stays_out_unless_it_is_a_project_or_named() {
    let Some(annex) = Annex::open() else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    fs::write(dir.path().join("notes.txt"), "n").expect("write");
    let list = ["--", "sh", "-c", "pwd; ls; exit 1"];
    let said = run_in(&annex, dir.path(), &list).exits(1);
    assert_eq!(said.out, "/root\n", "no project");
    said.says("--source . copies it");
    let named = [&["--source", "."][..], &list].concat();
    assert_eq!(
        run_in(&annex, dir.path(), &named).exits(1).out,
        "/work\nnotes.txt\n"
    );

    // A policy makes a project of the folders below it, too.
    let top = tempfile::tempdir().expect("temp dir");
    let below = top.path().join("web");
    fs::create_dir_all(top.path().join(".git")).expect("folder");
    fs::create_dir(&below).expect("folder");
    fs::write(top.path().join("kiln.yaml"), "version: 1\n").expect("write");
    fs::write(below.join("a"), "").expect("write");
    let said = run_in(&annex, &below, &["--", "sh", "-c", "pwd; ls .."]).exits(0);
    assert_eq!(said.out, "/work/web\nkiln.yaml\nweb\n");
    let without = ["--no-source", "--", "sh", "-c", "pwd; ls"];
    assert_eq!(run_in(&annex, &below, &without).exits(0).out, "/root\n");

    // What cannot be sent is told in the words of a build, and by its place.
    std::os::unix::fs::symlink("/etc/passwd", below.join("out")).expect("link");
    let refused = run_in(&annex, &below, &["--", "true"]).exits(2);
    refused.says("web/out");
    fs::write(top.path().join(".kilnignore"), "web/out\n").expect("write");
    run_in(&annex, &below, &["--", "test", "-f", "a"]).exits(0);
    annex.is_clear();
}

#[test]
fn what_a_stopped_command_wrote_is_kept() {
    let Some(annex) = Annex::open() else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    let to = format!("part:{}/", path(dir.path()));
    let script = "echo half > part; echo written; sleep 1000";
    let args = [
        "run",
        "--no-source",
        "--copy-out",
        &to,
        "--",
        "sh",
        "-c",
        script,
    ];
    let mut running = annex.start(&args);
    running.until_it_prints("written");
    running.signal("INT");
    running.end().exits(130).says("copied");
    let part = fs::read_to_string(dir.path().join("part")).expect("copied");
    assert_eq!(part, "half\n");
    annex.is_clear();
}

#[test]
fn variables_of_a_file_come_before_those_of_the_command_line() {
    let Some(annex) = Annex::open() else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    let file = dir.path().join("vars");
    fs::write(&file, "# for tests\nA=1\nB=two words\n").expect("write");
    let args = [
        "--env-file",
        "vars",
        "-e",
        "A=9",
        "--",
        "sh",
        "-c",
        "echo $A $B",
    ];
    assert_eq!(
        run_in(&annex, dir.path(), &args).exits(0).out,
        "9 two words\n"
    );
    fs::write(&file, "A=1\n2=x\n").expect("write");
    run_in(&annex, dir.path(), &args).exits(2).says("line 2");
}
