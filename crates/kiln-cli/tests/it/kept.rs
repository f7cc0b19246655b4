//! Machines that stay when their command is over: reached, copied from, stood in, ended; and whoever dies leaves nothing.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::annex::Annex;
use crate::support::{Kiln, app, free_port, path, said, until};

/// A made-up user: nobody has this id.
const STRANGER: &str = "60618";

/// Runs a command in a machine that stays; gives its id.
pub(crate) fn kept(kiln: &Kiln, code: i32, options: &[&str], command: &[&str]) -> String {
    let mut words = vec!["--json", "run"];
    words.extend(options);
    words.push("--");
    words.extend(command);
    let said = kiln.run(&words).exits(code);
    let mut lines = said
        .out
        .lines()
        .map(|line| serde_json::from_str(line).expect("every line is JSON"));
    let told = lines.rfind(|line: &serde_json::Value| line["event"] == "kept");
    let told = told.unwrap_or_else(|| panic!("{said:?}"));
    told["id"].as_str().expect("an id").to_owned()
}

fn dir_of(kiln: &Kiln, id: &str) -> PathBuf {
    kiln.home.join("machines").join(format!("{id}-1-run"))
}

fn keeper_of(kiln: &Kiln, id: &str) -> i32 {
    let facts = fs::read(dir_of(kiln, id).join("keeper.json")).expect("facts");
    let facts: serde_json::Value = serde_json::from_slice(&facts).expect("JSON");
    facts["pid"]
        .as_i64()
        .and_then(|pid| pid.try_into().ok())
        .expect("a pid")
}

fn kill(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, signal).expect("kill");
}

/// Whether a process with this in its command line runs in the machine.
fn runs(kiln: &Kiln, id: &str, word: &str) -> bool {
    let script = format!("cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -q '{word}'");
    // Its own command line must not be found.
    let script = script.replace(
        &format!("'{word}'"),
        &format!("'[{}]{}'", &word[..1], &word[1..]),
    );
    kiln.run(&["exec", id, "--", "sh", "-c", &script]).code == 0
}

/// With `--json`, a command's output is events, its last is how it ended, and nothing else is on the streams.
fn told_as_events(kiln: &Kiln, id: &str) {
    let words = ["--json", "exec", id, "--"];
    let script = ["sh", "-c", "echo out; echo err >&2; exit 3"];
    let said = kiln.run(&[&words[..], &script].concat()).exits(3);
    let events: Vec<serde_json::Value> = said
        .out
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    let of = |stream: &str| {
        let texts = events.iter().filter(|event| event["stream"] == stream);
        texts
            .filter_map(|event| event["text"].as_str())
            .collect::<String>()
    };
    assert_eq!(
        (of("stdout"), of("stderr")),
        ("out\n".to_owned(), "err\n".to_owned()),
        "{said:?}"
    );
    let last = events.last().expect("events");
    assert_eq!(
        (&last["event"], &last["code"]),
        (&"exit".into(), &3.into()),
        "{said:?}"
    );
    assert!(said.err.is_empty(), "{said:?}");
    kiln.run(&["--json", "exec", "-t", id, "--", "true"])
        .exits(2);
    kiln.run(&["--json", "console", id]).exits(2);
}

#[test]
fn a_machine_that_stays_takes_commands_and_whoever_dies_leaves_nothing() {
    let Some(kiln) = Annex::open() else { return };
    let id = kept(
        &kiln,
        3,
        &["--keep=10m", "-e", "TOKEN=hush-hush"],
        &["sh", "-c", "echo hi > /root/f; exit 3"],
    );
    let said = kiln.run(&["machine", "list"]).exits(0);
    assert!(
        said.out.contains(&id) && said.out.contains("echo hi"),
        "{said:?}"
    );
    assert!(
        said.out.lines().all(|line| line.chars().count() <= 80),
        "{said:?}"
    );
    let words = [
        "exec",
        &id,
        "-e",
        "A=b",
        "--",
        "sh",
        "-c",
        "cat /root/f; echo $A$TOKEN >&2; exit 7",
    ];
    let said = kiln.run(&words).exits(7);
    assert_eq!((said.out.as_str(), said.err.as_str()), ("hi\n", "b\n"));
    for entry in fs::read_dir(dir_of(&kiln, &id)).expect("list").flatten() {
        let text = fs::read(entry.path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(!text.contains("hush-hush"), "{:?}", entry.path());
    }
    // Several at once, each with its own input, to its end.
    let children: Vec<(Child, String)> = (0..3)
        .map(|n| {
            let mut command = kiln.command(&["exec", &id, "--", "sha256sum"]);
            let mut child = command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("start");
            let bytes = vec![b'a' + n; 300_000];
            child
                .stdin
                .take()
                .expect("piped")
                .write_all(&bytes)
                .expect("write");
            (child, kiln_core::Digest::of(&bytes).hex())
        })
        .collect();
    for (child, want) in children {
        let output = child.wait_with_output().expect("wait");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            format!("{want}  -\n")
        );
    }
    for words in [
        vec!["exec", "r0nobody", "--", "true"],
        vec!["console", "r0nobody"],
        vec!["cp", "r0nobody:/x", "."],
        vec!["port-forward", "r0nobody", "0:1"],
        vec!["machine", "show", "r0nobody"],
        vec!["machine", "rm", "r0nobody"],
        vec!["machine", "kill", "r0nobody", "--incident"],
    ] {
        kiln.run(&words).exits(2).says("r0nobody");
    }
    kiln.run(&["exec", &id, "--", "no-such-program"]).exits(127);
    kiln.run(&["exec", &id, "--", "/etc/passwd"]).exits(126);
    let long = "x".repeat(20_000);
    kiln.run(&["exec", &id, "--", "true", &long])
        .exits(2)
        .says("at most 16384 can be sent to a machine");
    told_as_events(&kiln, &id);
    // Ctrl-C reaches the command; one that is killed takes its command with it.
    let mut interrupted = kiln.start(&[
        "exec",
        &id,
        "--",
        "sh",
        "-c",
        "trap 'exit 9' INT; echo ready; while :; do sleep 0.1; done",
    ]);
    interrupted.until_it_prints("ready");
    interrupted.signal("INT");
    interrupted.end().exits(9);
    let mut killed = kiln.start(&[
        "exec",
        &id,
        "--",
        "sh",
        "-c",
        "echo ready; sleep 4321; true",
    ]);
    killed.until_it_prints("ready");
    until("its command", || {
        runs(&kiln, &id, "sleep 4321").then_some(())
    });
    killed.signal("KILL");
    until("its command's end", || {
        (!runs(&kiln, &id, "sleep 4321")).then_some(())
    });
    who_keeps_it_dies(&kiln, &id);
}

#[test]
fn a_job_that_runs_ends_as_an_incident() {
    let Some(kiln) = Annex::open() else { return };
    let mut running = kiln.start(&["run", "--", "sh", "-c", "echo evidence; exec sleep 3600"]);
    running.until_it_prints("evidence");
    let jobs = kiln.run(&["job", "list", "--json"]).exits(0);
    let lines = jobs
        .out
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    let job = lines
        .into_iter()
        .find(|job: &serde_json::Value| job["state"] == "running");
    let job = job.unwrap_or_else(|| panic!("{jobs:?}"));
    let id = job["id"].as_str().expect("an id");
    let words = ["--json", "machine", "kill", id, "--incident=it mined"];
    let told = kiln.run(&words).exits(0);
    let told: serde_json::Value = serde_json::from_str(told.out.trim()).expect("JSON");
    let ended = running.end().exits(130);
    assert!(ended.err.contains("as an incident"), "{ended:?}");
    let dir = Path::new(told["incident"].as_str().expect("a folder"));
    let text = |name: &str| fs::read_to_string(dir.join(name)).expect("kept");
    let incident: serde_json::Value = serde_json::from_str(&text("incident.json")).expect("JSON");
    assert_eq!(incident["note"], "it mined", "{incident}");
    assert_eq!(incident["left_behind"], serde_json::json!([]));
    assert_eq!(text("worker.log"), "evidence\n");
    assert!(text("record.json").contains(id) && text("job.json").contains("it mined"));
    for name in ["job.log", "console.log", "egress.json"] {
        let _there = text(name);
    }
    let audit = kiln.run(&["audit", "list", "--json"]).exits(0);
    assert!(audit.out.contains("job.incident"), "{audit:?}");
    let held = kiln.run(&["hold", "list"]).exits(0);
    assert!(held.out.contains(id), "{held:?}");
    assert_eq!(told["held"], true);
    kiln.run(&["machine", "kill", id, "--incident"])
        .exits(2)
        .says("over already");
    let incidents = fs::remove_dir_all(kiln.home.join("incidents"));
    incidents.expect("there");
    kiln.is_clear();
}

/// The processes that watch whoever keeps a machine.
pub(crate) fn watchers_of(id: &str) -> Vec<i32> {
    let words = format!("keep-machine\0--watch\0{id}-1-run\0");
    let all = fs::read_dir("/proc").expect("processes").flatten();
    all.filter(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&words)
    })
    .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
    .collect()
}

/// Whoever is killed, the machine goes with nobody's help; where all of them are, with the next command.
fn who_keeps_it_dies(kiln: &Annex, id: &str) {
    use rustix::process::Signal;
    let one = || watchers_of(id).first().copied();
    let first = one().expect("a watcher");
    kill(first, Signal::KILL);
    until("another watcher", || one().filter(|pid| *pid != first));
    kiln.run(&["exec", id, "--", "true"]).exits(0);
    kill(keeper_of(kiln, id), Signal::KILL);
    until("its end", || (!dir_of(kiln, id).exists()).then_some(()));
    until("its watcher's end", || one().is_none().then_some(()));
    kiln.is_clear();
    kiln.run(&["exec", id, "--", "true"]).exits(2);

    // A keeper that hangs beyond its machine's time is ended with it: here by a watcher whose time is short.
    let id = &kept(kiln, 0, &["--keep"], &["true"]);
    kill(keeper_of(kiln, id), Signal::STOP);
    let machine = format!("{id}-1-run");
    let words = ["keep-machine", "--watch", &machine, "--for-ms", "1"];
    let mut command = kiln.command(&words);
    let mut watcher = command.stdin(Stdio::piped()).spawn().expect("starts");
    let _nothing_is_told = watcher.stdin.take();
    until("its end", || (!dir_of(kiln, id).exists()).then_some(()));
    assert!(watcher.wait().expect("ends").success());
    until("its own watcher's end", || {
        watchers_of(id).is_empty().then_some(())
    });
    kiln.is_clear();

    let id = &kept(kiln, 0, &["--keep"], &["true"]);
    kill(keeper_of(kiln, id), Signal::STOP);
    kill(watchers_of(id)[0], Signal::KILL);
    kill(keeper_of(kiln, id), Signal::KILL);
    // Killed processes are seen for a moment after their kill.
    until("a command that removes it", || {
        kiln.run(&["machine", "list"]).exits(0);
        (!dir_of(kiln, id).exists()).then_some(())
    });
    kiln.is_clear();
}

/// What the job's record says of its machine that stayed: names that were refused in it, and the sum, once it is there.
pub(crate) fn machine_record(
    kiln: &Kiln,
    server: &[&str],
    id: &str,
) -> Option<(Vec<String>, serde_json::Value)> {
    let words = [server, &["--json", "job", "egress", id]].concat();
    let said = kiln.run(&words).exits(0);
    let lines = said.out.lines();
    let lines: Vec<serde_json::Value> = lines
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    let sum = lines
        .iter()
        .find(|line| line["event"] == "machine_egress")?;
    let refused = lines
        .iter()
        .filter(|line| line["event"] == "refused" && line["machine"] == true);
    let names = refused.filter_map(|line| line["host"].as_str().map(str::to_owned));
    Some((names.collect(), sum.clone()))
}

#[test]
fn what_a_kept_machine_asks_for_is_in_its_jobs_record() {
    let Some(kiln) = Annex::open() else { return };
    let asks = |id: &str, name: &str| {
        let script = format!("getent hosts {name}; true");
        kiln.run(&["exec", id, "--", "sh", "-c", &script]).exits(0);
    };
    let id = kept(
        &kiln,
        0,
        &["--keep=10m"],
        &["sh", "-c", "getent hosts before.example.org; true"],
    );
    asks(&id, "after.example.org");
    kiln.run(&["machine", "rm", &id]).exits(0);
    let (names, sum) = machine_record(&kiln, &[], &id).expect("a record");
    assert_eq!(names, ["after.example.org"]);
    assert_eq!(
        (&sum["cut_off"], &sum["totals"]["decisions"]["host"]),
        (&false.into(), &1.into())
    );
    let shown = kiln.run(&["job", "egress", &id]).exits(0);
    assert!(
        shown.out.contains("before.example.org") && shown.out.contains("ITS MACHINE"),
        "{shown:?}"
    );

    // A keeper that is killed leaves what it wrote down.
    let id = kept(&kiln, 0, &["--keep=10m"], &["true"]);
    asks(&id, "noted.example.org");
    let note = kiln.home.join(format!("machine-records/{id}-1-run.json"));
    until("its note", || {
        let text = fs::read_to_string(&note).unwrap_or_default();
        text.contains("noted.example.org").then_some(())
    });
    kill(keeper_of(&kiln, &id), rustix::process::Signal::KILL);
    until("its end", || (!dir_of(&kiln, &id).exists()).then_some(()));
    let (names, sum) = machine_record(&kiln, &[], &id).expect("a record");
    assert_eq!(
        (names, &sum["cut_off"]),
        (vec!["noted.example.org".to_owned()], &true.into())
    );
    assert!(!note.exists(), "it was handed in");
    kiln.is_clear();
}

#[test]
fn a_deadline_an_incident_and_a_stop_end_it() {
    let Some(kiln) = Annex::open() else { return };
    let short = kept(&kiln, 0, &["--keep=1s"], &["true"]);
    until("its deadline", || {
        (!dir_of(&kiln, &short).exists()).then_some(())
    });
    kiln.run(&["run", "--keep=25h", "--", "true"])
        .exits(2)
        .says("24h");

    let id = kept(&kiln, 0, &["--keep"], &["echo", "evidence"]);
    kiln.run(&["uninstall", "--yes"])
        .exits(2)
        .says("kiln machine rm --all");
    let doctor = kiln.run(&["doctor"]);
    assert!(
        doctor.out.contains("kept-machines") && doctor.out.contains(&id),
        "{doctor:?}"
    );
    let shown = kiln.run(&["machine", "show", &id]).exits(0);
    assert!(
        shown.out.contains("echo evidence") && shown.out.contains("left"),
        "{shown:?}"
    );
    kiln.run(&["machine", "stats", &id]).exits(0);
    let told = kiln
        .run(&["--json", "machine", "kill", &id, "--incident=it mined"])
        .exits(0);
    let told: serde_json::Value = serde_json::from_str(told.out.trim()).expect("JSON");
    let dir = Path::new(told["incident"].as_str().expect("a folder"));
    assert!(
        dir.starts_with(kiln.home.join("incidents")) && told["job"] == "finished",
        "{told}"
    );
    let text = |name: &str| fs::read_to_string(dir.join(name)).expect("kept");
    assert!(text("incident.json").contains("it mined"));
    assert_eq!(text("job.log"), "evidence\n");
    for name in [
        "job.json",
        "record.json",
        "console.log",
        "keeper.log",
        "egress.json",
    ] {
        let _there = text(name);
    }
    assert!(!dir_of(&kiln, &id).exists() && kiln.vmms().is_empty());

    let id = kept(&kiln, 0, &["--keep"], &["true"]);
    kiln.run(&["machine", "stop", &id]).exits(0);
    assert!(!dir_of(&kiln, &id).exists() && kiln.vmms().is_empty());
}

#[test]
fn files_and_ports_lead_into_a_kept_machine_and_no_link_leads_out() {
    let Some(kiln) = Annex::open() else { return };
    let server = "use IO::Socket; $s = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => 3000, Listen => 1, ReuseAddr => 1); \
        print \"ready\\n\"; $c = $s->accept; undef $/; $x = <$c>; print $c \"got $x\";";
    let hostile = "mkdir -p out/sub; echo whole > out/sub/f; ln -s /etc/passwd out/abs; ln -s ../../../x out/up; ln -s sub/f out/in; \
        mkfifo out/pipe; mknod out/disk b 8 0; echo one > single";
    let id = kept(&kiln, 0, &["--keep=10m"], &["sh", "-c", hostile]);
    let here = app(&[("src/a/file", "into"), ("there", "precious")]);
    let at = |name: &str| here.path().join(name);
    let there = |path: &str| format!("{id}:{path}");
    let said = kiln
        .run(&["cp", &there("/root/out"), path(&at("copy"))])
        .exits(0)
        .says("2 links");
    assert!(said.out.contains("copy"));
    assert_eq!(
        fs::read_to_string(at("copy/in")).expect("inside"),
        "whole\n"
    );
    let mut names: Vec<_> = fs::read_dir(at("copy"))
        .expect("list")
        .flatten()
        .map(|e| e.file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["in", "sub"]);
    kiln.run(&["cp", &there("/root/out"), path(&at("copy"))])
        .exits(0);
    assert!(
        at("copy/out/sub/f").exists(),
        "below a folder that is there"
    );
    kiln.run(&["cp", &there("/root/out"), path(&at("copy"))])
        .exits(2)
        .says("not merged");
    std::os::unix::fs::symlink("there", at("link")).expect("link");
    kiln.run(&["cp", &there("/root/single"), path(&at("link"))])
        .exits(0);
    assert_eq!(fs::read_to_string(at("there")).expect("reads"), "precious");
    assert_eq!(fs::read_to_string(at("link")).expect("reads"), "one\n");
    copies_lead_through_no_link_and_over_no_fifo(&kiln, &there("/root/single"));
    let missing = there("/no/such");
    kiln.run(&["cp", &missing, path(&at("none"))])
        .exits(2)
        .says(&format!("{missing}: the machine does not give it"));
    let said = kiln
        .run(&["cp", path(&at("src")), &there("/root/")])
        .exits(0);
    assert_eq!(said.out, "");
    let said = kiln.run(&["exec", &id, "--", "cat", "src/a/file"]).exits(0);
    assert_eq!(said.out, "into");
    kiln.run(&["cp", path(&at("src")), &there("/no/such/folder/x")])
        .exits(2)
        .says("no folder");

    let port = free_port();
    let forwarded = kiln.start(&["port-forward", &id, &format!("{port}:3000")]);
    let mut serving = kiln.start(&[
        "exec",
        &id,
        "--",
        "perl",
        "-e",
        &format!("$| = 1; {server}"),
    ]);
    serving.until_it_prints("ready");
    let mut stream = until("the port", || TcpStream::connect(("127.0.0.1", port)).ok());
    stream.write_all(b"half").expect("write");
    stream
        .shutdown(std::net::Shutdown::Write)
        .expect("half-close");
    let mut answer = String::new();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("timeout");
    stream.read_to_string(&mut answer).expect("read");
    assert_eq!(answer, "got half");
    serving.end().exits(0);
    forwarded.signal("INT");
    forwarded.end().exits(0);

    a_stranger_is_refused(&kiln, &id);
    kiln.run(&["machine", "rm", "--all"]).exits(0);
    assert!(kiln.vmms().is_empty());
}

/// A project that somebody else wrote may hold links and fifos where a copy is to go.
fn copies_lead_through_no_link_and_over_no_fifo(kiln: &Kiln, from: &str) {
    let project = app(&[("outside/mine", "precious")]);
    let at = |name: &str| project.path().join(name);
    std::os::unix::fs::symlink("outside", at("out")).expect("link");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .expect("fifo");
    for (dest, told) in [
        ("out", "out is a link or no folder"),
        ("out/new", "out is a link or no folder"),
        ("fifo", "is a fifo, not a file"),
    ] {
        let mut command = kiln.command(&["cp", from, dest]);
        command.current_dir(project.path());
        said(command).exits(2).says(told);
    }
    let left = fs::read_dir(at("outside")).expect("list").count();
    assert_eq!(left, 1, "nothing was written through the link");
}

/// Even where every file were open to all, the keeper answers its owner alone.
fn a_stranger_is_refused(kiln: &Kiln, id: &str) {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let socket = dir_of(kiln, id).join("keeper.sock");
    let mode = fs::metadata(&socket).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let as_stranger = || {
        let connect = "use IO::Socket::UNIX; alarm 20; $SIG{PIPE} = 'IGNORE'; $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or exit 3; \
            print $s pack('V', 14) . '{\"ask\":\"show\"}'; $s->flush; print '<' . <$s> . '>'";
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid",
            STRANGER,
            "--regid",
            STRANGER,
            "--clear-groups",
            "perl",
            "-e",
            connect,
        ]);
        command.arg(&socket);
        said(command)
    };
    as_stranger().exits(3);
    let mut opened = Vec::new();
    for open in [
        kiln.home.clone(),
        kiln.home.join("machines"),
        dir_of(kiln, id),
        socket.clone(),
    ] {
        let before = fs::metadata(&open).expect("there").permissions();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).expect("chmod");
        opened.push((open, before));
    }
    let said = as_stranger();
    for (path, before) in opened {
        fs::set_permissions(path, before).expect("chmod");
    }
    // The suite's own directory may be closed to others: then nobody even gets there.
    assert!(said.code == 3 || said.out == "<>", "{said:?}");
    if said.code != 3 {
        let log = fs::read_to_string(dir_of(kiln, id).join("keeper.log")).expect("log");
        assert!(log.contains("not its owner"), "{log}");
    }
}

/// Words typed into a terminal of a command's own, each once the terminal shows what comes before it.
pub(crate) fn typed(
    kiln: &Kiln,
    words: &str,
    typed: &[(&str, &str)],
    then: impl FnOnce(),
) -> (i32, String) {
    // One that hangs ends, and its words are not found.
    let mut command = Command::new("timeout");
    command.args(["60", "script"]);
    let words = format!("stty rows 33 cols 101; {words}; code=$?; stty -a; exit $code");
    command.args([
        "--quiet",
        "--return",
        "--flush",
        "--command",
        &words,
        "/dev/null",
    ]);
    command
        .env("KILN_HOME", &kiln.home)
        .env("TERM", "dumb")
        .env("NO_COLOR", "1");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script");
    let mut stdin = child.stdin.take().expect("piped");
    let mut stdout = child.stdout.take().expect("piped");
    let mut all = Vec::new();
    for (before, keys) in typed {
        let from = all.len();
        while !String::from_utf8_lossy(&all[from..]).contains(before) {
            let mut byte = [0];
            let read = stdout.read_exact(&mut byte);
            assert!(
                read.is_ok(),
                "no {before:?} in {}",
                String::from_utf8_lossy(&all)
            );
            all.extend(byte);
        }
        stdin.write_all(keys.as_bytes()).expect("type");
    }
    then();
    let _read = stdout.read_to_end(&mut all);
    let status = child.wait().expect("wait");
    (
        status.code().unwrap_or(-1),
        String::from_utf8_lossy(&all).into_owned(),
    )
}

#[test]
fn a_console_is_a_terminal_and_gives_it_back() {
    let Some(kiln) = Annex::open() else { return };
    let id = kept(&kiln, 0, &["--keep=10m"], &["true"]);
    let program = path(&kiln.program);
    let console = format!("{program} console {id} -- sh -i");
    let (code, all) = typed(
        &kiln,
        &console,
        &[
            ("Ctrl-]", ""),
            ("# ", "stty size\r"),
            // Typed words come back as they are: what a command says has to differ from them.
            (
                "33 101",
                "sh -c 'trap \"echo cau\"\"ght; exit\" INT; echo rea\"\"dy; while :; do sleep 0.1; done'\r",
            ),
            ("ready", "\x03"),
            ("caught", "echo $((6 * 7))\r"),
            ("42", "exit 6\r"),
        ],
        || {},
    );
    assert_eq!(code, 6, "{all}");
    assert!(
        all.contains(" icanon") && all.contains(" echo "),
        "given back: {all}"
    );
    let (code, all) = typed(
        &kiln,
        &console,
        &[("# ", "sleep 9876\r"), ("9876", "\x1d\x1d")],
        || {},
    );
    assert!(
        code == 0 && all.contains("left ") && all.contains(" icanon"),
        "{code} {all}"
    );
    until("its end", || {
        (!runs(&kiln, &id, "sleep 9876")).then_some(())
    });
    let pid = kiln.home.join("pid");
    let noted = format!("sh -c 'echo $$ > {}; exec {console}'", path(&pid));
    let (code, all) = typed(&kiln, &noted, &[("# ", "")], || {
        let pid = fs::read_to_string(&pid).expect("a pid");
        kill(
            pid.trim().parse().expect("a pid"),
            rustix::process::Signal::TERM,
        );
    });
    assert!(code == 130 && all.contains(" icanon"), "{code} {all}");
    kiln.run(&["console", &id]).exits(2).says("terminal");
    kiln.run(&["machine", "rm", &id]).exits(0);

    // Where a command failed, its user stands in its machine; then it is gone.
    let failing =
        format!("{program} run --shell-on-failure -- sh -c 'echo left-behind > /root/f; exit 5'");
    let (code, all) = typed(&kiln, &failing, &[("Ctrl-]", "cat /root/f; exit\r")], || {});
    assert!(code == 5 && all.contains("left-behind"), "{code} {all}");
    // Later, from the same inputs.
    let newest = kiln.run(&["job", "show", "--json"]).exits(0);
    let newest: serde_json::Value = serde_json::from_str(newest.out.trim()).expect("JSON");
    let newest = newest["id"].as_str().expect("an id");
    let again = format!("{program} job retry {newest} --shell");
    let (code, all) = typed(&kiln, &again, &[("Ctrl-]", "cat /root/f; exit\r")], || {});
    assert!(code == 5 && all.contains("left-behind"), "{code} {all}");
    let said = kiln
        .run(&["run", "--shell-on-failure", "--", "false"])
        .exits(1);
    assert!(said.err.contains("needs a terminal"), "{said:?}");
    assert!(kiln.vmms().is_empty());
    assert!(
        kiln.run(&["machine", "list", "--json"])
            .exits(0)
            .out
            .is_empty()
    );
}
