//! What is left of a secret's value when a run and a build had it: nothing, on no disk of theirs, in no record, no log, no layer, no core file.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::annex::Annex;
use crate::support::{app, kiln, path, said};

/// Nothing else in a home has these bytes. Its parts are put together nowhere but in memory.
fn value() -> String {
    ["Rq4", "residue", "8812", "wren"].join("-")
}

/// Files below a folder, not behind links, that hold these bytes; compressed ones are read as what they were.
fn holders(folder: &Path, bytes: &str) -> Vec<PathBuf> {
    let found = Command::new("grep")
        .args(["--recursive", "--text", "--fixed-strings"])
        .args(["--files-with-matches", "--regexp", bytes, path(folder)])
        .output()
        .expect("grep");
    assert!(
        matches!(found.status.code(), Some(0 | 1)),
        "{}",
        String::from_utf8_lossy(&found.stderr)
    );
    let listed = String::from_utf8_lossy(&found.stdout).into_owned();
    let mut holders: Vec<PathBuf> = listed.lines().map(PathBuf::from).collect();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let kind = entry.file_type().expect("stat");
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() && packed_holds(&entry.path(), bytes) {
                holders.push(entry.path());
            }
        }
    }
    holders
}

fn packed_holds(file: &Path, bytes: &str) -> bool {
    let mut start = [0; 4];
    let read = fs::File::open(file).and_then(|mut file| file.read_exact(&mut start));
    let program = match start {
        _ if read.is_err() => return false,
        [0x1f, 0x8b, ..] => "gzip",
        [0x28, 0xb5, 0x2f, 0xfd] => "zstd",
        _ => return false,
    };
    let file = fs::File::open(file).expect("open");
    let unpacked = Command::new(program)
        .arg("-dc")
        .stdin(file)
        .stderr(Stdio::null())
        .output()
        .expect("unpack");
    let text = bytes.as_bytes();
    unpacked.stdout.windows(text.len()).any(|part| part == text)
}

/// A home of its own, with the secrets `token` and `key` in its store, whose value is the same.
fn home() -> Option<Annex> {
    let annex = Annex::open()?;
    for name in ["token", "key"] {
        let mut command = annex.command(&["secret", "set", name]);
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut set = command.spawn().expect("kiln");
        let mut stdin = set.stdin.take().expect("a pipe");
        std::io::Write::write_all(&mut stdin, value().as_bytes()).expect("write");
        drop(stdin);
        assert!(set.wait().expect("ends").success());
    }
    Some(annex)
}

#[test]
fn a_run_leaves_nothing_of_a_secret_on_its_disk_or_in_its_records() {
    let Some(annex) = home() else { return };
    let dir = app(&[("a.txt", "a")]);
    // Both ways to have it; a crash with it in memory, for which the command asks for a core file; and a word that shows that disks are read.
    let script = format!(
        "test \"$TOKEN\" = \"$(cat /run/secrets/key)\" || exit 9; ulimit -c unlimited; sh -c 'kill -SEGV $$'; echo crash $?; \
         ls | grep core; echo {} > found; echo $TOKEN; echo \"to the console: $TOKEN\" > /dev/console; mkdir out; echo x > out/$TOKEN.log; sync",
        ["marked", "7731"].join("-")
    );
    let mut command = annex.command(&["run", "--keep=10m", "--secret", "token=TOKEN"]);
    let more = ["--secret", "key:file", "--artifact", "out/**", "--", "sh"];
    command.args(more).args(["-c", &script]);
    command.current_dir(dir.path());
    let ran = said(command).exits(0);
    let ran = ran.says("out/***.log is not kept: its name has a secret in it");
    assert!(ran.out.contains("crash 139"), "{ran:?}");
    assert!(!ran.out.contains("core"), "{ran:?}");
    let shown = annex.run(&["job", "logs"]).exits(0);
    assert!(shown.out.contains("***"), "masked: {shown:?}");

    // The machine is there: its scratch disk, console and control sockets too.
    let marked = holders(&annex.home.join("machines"), &["marked", "7731"].join("-"));
    assert!(!marked.is_empty(), "the disk is read");
    assert_eq!(holders(&annex.home, &value()), Vec::<PathBuf>::new());
    let listed = annex.run(&["machine", "list", "--json"]).exits(0);
    let line = listed.out.lines().next().expect("a machine");
    let machine: serde_json::Value = serde_json::from_str(line).expect("JSON");
    let id = machine["id"].as_str().expect("an id");
    has_none(&annex, id);
    annex
        .run(&["machine", "kill", id, "--incident=why"])
        .exits(0);
    assert_eq!(holders(&annex.home, &value()), Vec::<PathBuf>::new());
    assert_eq!(holders(dir.path(), &value()), Vec::<PathBuf>::new());
}

/// A further command in a container that does not begin ends as in any shell.
fn what_does_not_begin_is_told(annex: &Annex, id: &str) {
    for (program, code) in [("no-such-program", 127), ("/work/a.txt", 126)] {
        let ended = annex.run(&["exec", id, "--", program]).exits(code);
        ended.says(&format!("run \"{program}\":"));
    }
}

/// A later command in a machine that stayed has nothing of what its job was given.
fn has_none(annex: &Annex, id: &str) {
    let look = "cat /run/secrets/key 2>/dev/null; echo \"[$TOKEN]\"; grep -ls TOKEN= /run/kiln/container/config.json; true";
    let looked = annex.run(&["exec", id, "--", "sh", "-c", look]).exits(0);
    assert_eq!(looked.out, "[]\n", "{looked:?}");
}

#[test]
fn a_container_that_stays_has_nothing_of_its_commands_secrets() {
    let Some(annex) = home() else { return };
    let policy = "version: 1\nimage: node\nphases:\n  dependencies: {commands: ['test -n \"$TOKEN\" && test -s /run/secrets/key && test ! -e fails']}\n\
        secrets:\n  - {name: token, env: TOKEN, phase: dependencies, hosts: []}\n  - {name: key, file: /run/secrets/key, phase: dependencies, hosts: []}\n";
    let dir = app(&[("a.txt", "a"), ("kiln.yaml", policy)]);
    let kept = |more: &[&str], code: i32| {
        let mut command = annex.command(&[&["--json", "run", "--keep=10m"], more].concat());
        command.current_dir(dir.path());
        said(command).exits(code);
        let listed = annex.run(&["machine", "list", "--json"]).exits(0);
        let line = listed.out.lines().next().expect("a machine");
        let machine: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let id = machine["id"].as_str().expect("an id").to_owned();
        has_none(&annex, &id);
        id
    };
    let gone = |id: &str| annex.run(&["machine", "rm", id]).exits(0);
    // The policy says where they go, the person that this project may have them.
    let phase = ["--secret", "token", "--secret", "key", "--", "true"];
    let id = kept(&phase, 0);
    what_does_not_begin_is_told(&annex, &id);
    gone(&id);
    // A phase that fails has had them as well.
    std::fs::write(dir.path().join("fails"), "").expect("write");
    gone(&kept(&phase, 1));
    std::fs::remove_file(dir.path().join("kiln.yaml")).expect("remove");
    std::fs::write(dir.path().join("package.json"), "{}").expect("write");
    let secrets = ["--secret", "token=TOKEN", "--secret", "key:file"];
    let test = [
        "--",
        "sh",
        "-c",
        "test -n \"$TOKEN\" && test -s /run/secrets/key",
    ];
    gone(&kept(&[&secrets[..], &test].concat(), 0));
    assert_eq!(holders(&annex.home, &value()), Vec::<PathBuf>::new());
}

#[test]
fn a_build_leaves_nothing_of_a_secret_in_layers_cache_or_records() {
    if kiln().is_none() {
        return;
    }
    let Some(mut annex) = home() else { return };
    annex.own_registry();
    annex.fresh_heads();
    let dockerfile = format!(
        "FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\n\
         RUN --mount=type=secret,id=token ulimit -c unlimited; cat /run/secrets/token; \
         V=$(cat /run/secrets/token) sh -c 'kill -SEGV $$'; echo {} > /made\n",
        ["marked", "7732"].join("-")
    );
    let dir = app(&[("Dockerfile", &dockerfile)]);
    let built = annex.build(dir.path(), "residue", &["--secret", "id=token"]);
    assert_eq!(
        annex
            .run(&["run", "--image", "residue", "--", "ls", "/", "/root"])
            .exits(0)
            .out
            .matches("core")
            .count(),
        0
    );
    let log = annex
        .run(&["job", "logs", built["job"].as_str().expect("job")])
        .exits(0);
    assert!(log.out.contains("***"), "masked: {log:?}");
    let marked = holders(&annex.home.join("registry"), &["marked", "7732"].join("-"));
    assert!(!marked.is_empty(), "layers are read");
    assert_eq!(holders(&annex.home, &value()), Vec::<PathBuf>::new());
}
