//! Kept machines through `kiln serve` with a worker: real machines, the command's own verbs, a terminal.

use std::fs;

use crate::annex::Annex;
use crate::hostile_output::on_a_terminal;
use crate::kept::{kept, machine_record, typed, watchers_of};
use crate::serve::serve;
use crate::support::{Started, app, free_port, path, until};

#[test]
fn a_servers_machine_is_entered_copied_from_stood_in_and_ended() {
    let Some(mut kiln) = Annex::open() else {
        return;
    };
    kiln.own_registry();
    let port = free_port();
    let (server, at) = serve(&kiln, port);
    let on = |args: &[&str]| kiln.run(&[&["--server", at.as_str()], args].concat());
    let options = [
        "--server",
        &at,
        "--keep=10m",
        "--no-source",
        "--cpus",
        "1",
        "--memory",
        "512M",
    ];
    let id = kept(
        &kiln,
        3,
        &options,
        &["sh", "-c", "echo hi > /root/f; exit 3"],
    );
    let listed = on(&["machine", "list"]).exits(0);
    assert!(
        listed.out.contains(&id) && listed.out.contains("echo hi"),
        "{listed:?}"
    );
    let words = [
        "exec",
        &id[..14],
        "-e",
        "A=b",
        "--",
        "sh",
        "-c",
        "cat /root/f; echo $A >&2; exit 7",
    ];
    let said = on(&words).exits(7);
    assert_eq!((said.out.as_str(), said.err.as_str()), ("hi\n", "b\n"));
    let none = on(&["exec", &id, "--", "no-such-program"]).exits(127);
    let nowhere = on(&["exec", "-w", "/nosuch", &id, "--", "pwd"]).exits(127);
    assert!(
        !none.err.contains("--image") && !nowhere.err.contains("no such program"),
        "{none:?} {nowhere:?}"
    );
    on(&["exec", "r0nobody", "--", "true"])
        .exits(2)
        .says("r0nobody");
    let here = app(&[("src/a/file", "into")]);
    let there = |path: &str| format!("{id}:{path}");
    on(&["cp", path(&here.path().join("src")), &there("/root/")]).exits(0);
    let copied = here.path().join("copied");
    on(&["cp", &there("/root/src/a/file"), path(&copied)]).exits(0);
    assert_eq!(fs::read_to_string(&copied).expect("reads"), "into");
    let shown = on(&["machine", "show", &id]).exits(0);
    assert!(
        shown.out.contains("worker") && shown.out.contains("left)"),
        "{shown:?}"
    );
    let used = on(&["machine", "stats", &id]).exits(0);
    assert!(used.out.contains("memory of its VMM"), "{used:?}");
    let program = format!("{} --server {at}", path(&kiln.program));
    let console = format!("{program} console {id} -- sh -i");
    let keys = [
        ("# ", "stty size\r"),
        ("33 101", "echo $((6 * 7))\r"),
        ("42", "exit 6\r"),
    ];
    let (code, all) = typed(&kiln, &console, &keys, || {});
    assert!(code == 6 && all.contains(" icanon"), "{code} {all}");
    let asks = [
        "exec",
        &id,
        "--",
        "sh",
        "-c",
        "getent hosts after.example.org; true",
    ];
    on(&asks).exits(0);
    on(&["machine", "rm", &id]).exits(0);
    until("its end", || kiln.vmms().is_empty().then_some(()));
    let recorded = || machine_record(&kiln, &["--server", &at], &id);
    let (names, sum) = until("its record", recorded);
    assert_eq!(
        (names, &sum["cut_off"]),
        (vec!["after.example.org".to_owned()], &false.into())
    );
    let left = on(&["machine", "list", "--json"]).exits(0);
    assert!(left.out.is_empty(), "{left:?}");

    // What a command prints through a server drives no terminal either.
    let words = format!("--server {at} run --no-source -- printf 'a\\033[2Jb'");
    let shown = on_a_terminal(&kiln.home, &kiln.program, &words)
        .exits(0)
        .out;
    let evil = shown.contains("\u{1b}[2J");
    assert!(shown.contains("a\u{fffd}[2Jb") && !evil, "{shown:?}");

    // Where a command failed, its user stands in its machine; then it is gone.
    let failing = "run --no-source --shell-on-failure --cpus 1 --memory 512M -- sh -c 'echo left-behind > /root/f; exit 5'";
    let stood = |words: &str| {
        let words = format!("{program} {words}");
        let (code, all) = typed(&kiln, &words, &[("Ctrl-]", "cat /root/f; exit\r")], || {});
        assert!(code == 5 && all.contains("left-behind"), "{code} {all}");
    };
    stood(failing);
    let newest = on(&["job", "show", "--json"]).exits(0);
    let newest: serde_json::Value = serde_json::from_str(newest.out.trim()).expect("JSON");
    let newest = newest["id"].as_str().expect("an id");
    stood(&format!("job retry {newest} --shell"));
    until("its end", || kiln.vmms().is_empty().then_some(()));
    a_server_that_is_killed_keeps_nothing(&kiln, server, port);
}

/// With its worker: whoever is in the machine is told, it is gone with nobody's help, and the next server finds nothing of it.
fn a_server_that_is_killed_keeps_nothing(kiln: &Annex, server: Started, port: u16) {
    let at = format!(
        "unix:{}",
        path(&kiln.home.join("controller/controller.sock"))
    );
    let options = [
        "--server",
        &at,
        "--keep=10m",
        "--no-source",
        "--cpus",
        "1",
        "--memory",
        "512M",
    ];
    let id = kept(kiln, 0, &options, &["true"]);
    let script = "echo ready; sleep 4321; true";
    let mut inside = kiln.start(&["--server", &at, "exec", &id, "--", "sh", "-c", script]);
    inside.until_it_prints("ready");
    let vmm = kiln.vmms()[0];
    assert_eq!(watchers_of(&id).len(), 1);
    server.signal("KILL");
    inside.end().exits(3);
    drop(server);
    // No command of kiln runs meanwhile.
    let gone = |path: String| !fs::exists(path).expect("looks");
    let dir = format!("{}/machines/{id}-1-run", path(&kiln.home));
    until("its end", || gone(dir.clone()).then_some(()));
    until("its VMM's end", || {
        gone(format!("/proc/{vmm}")).then_some(())
    });
    until("its watcher's end", || {
        watchers_of(&id).is_empty().then_some(())
    });
    let (server, at) = serve(kiln, port);
    // Its worker has said that it is a new process, or will in a moment.
    until("nothing is listed", || {
        let left = kiln.run(&["--server", &at, "machine", "list", "--json"]);
        left.exits(0).out.is_empty().then_some(())
    });
    kiln.run(&["--server", &at, "exec", &id, "--", "true"])
        .exits(2)
        .says(&id);
    server.signal("INT");
    server.end().exits(0);
}
