//! `kiln serve` with a worker, and every verb that asks it: builds, runs, jobs, queues, workers, tenants, tokens.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::Value;

use crate::annex::Annex;
use crate::support::{Said, Started, app, free_port, path, until};

/// Limits that fit any host this test runs on; a server's own defaults are a fleet's.
pub(crate) const SMALL: [&str; 6] = ["--cpus", "1", "--memory", "512M", "--disk", "1G"];

fn json(said: &Said) -> Value {
    serde_json::from_str(said.out.trim()).expect("JSON")
}

/// A server of this home, with a worker and a TLS door; its private socket as a `--server`.
pub(crate) fn serve(annex: &Annex, port: u16) -> (Started, String) {
    let listen = format!("127.0.0.1:{port}");
    serve_as(annex, || {
        annex.start(&["serve", "--with-worker", "--listen", &listen])
    })
}

/// The same, started by the caller.
pub(crate) fn serve_as(annex: &Annex, start: impl FnOnce() -> Started) -> (Started, String) {
    let server = start();
    let socket = annex.home.join("controller/controller.sock");
    let at = format!("unix:{}", path(&socket));
    until("a worker", || {
        // The server itself is asked: without it, the home's database would tell of a worker that another one had.
        let listed = annex.run(&["--server", &at, "worker", "list", "--json"]);
        (listed.code == 0 && listed.out.contains("\"active\"")).then_some(())
    });
    (server, at)
}

#[test]
fn a_server_builds_runs_and_explains() {
    let Some(mut annex) = Annex::open() else {
        return;
    };
    annex.fresh_heads();
    annex.own_registry();
    let port = free_port();
    let (server, at) = serve(&annex, port);
    let on = |args: &[&str]| annex.run(&[&["--server", at.as_str()], args].concat());

    // A run's folder goes there, and nothing of it comes back but what is asked for.
    let project = app(&[
        ("Makefile", ""),
        ("kept", "k"),
        (".kilnignore", "secret\n"),
        ("secret", "s"),
    ]);
    let mut far = annex.command(&["--server", &at, "run", "--", "sh", "-c", "pwd; ls; exit 3"]);
    far.current_dir(project.path());
    let far = crate::support::said(far).exits(3);
    assert_eq!(far.out, "/work\nMakefile\nkept\n");

    // A build: the Dockerfile is found although it is ignored, what else is ignored stays here.
    // New content at every run: nothing of it is cached.
    let dir = app(&[
        ("Dockerfile", "FROM scratch\nCOPY . /\n"),
        (".dockerignore", "*\n!kept\n"),
        ("kept", path(&annex.home)),
        ("secret", "s"),
    ]);
    let built = on(&[
        &["build", path(dir.path()), "--tag", "it-serve:v1"],
        &SMALL[..],
    ]
    .concat())
    .exits(0);
    assert!(
        built.out.starts_with("built t/local/it-serve:v1\n"),
        "{}",
        built.out
    );
    assert!(
        built.err.contains("== build\n") && built.err.contains("COPY . /"),
        "{}",
        built.err
    );
    let newest = json(&annex.run(&["job", "show", "--json"]).exits(0));
    let id = newest["id"].as_str().expect("an id").to_owned();
    assert_eq!(newest["outcome"]["verdict"], "passed");
    let log = annex.run(&["job", "logs", &id[..14]]).exits(0);
    assert!(log.out.contains("COPY . / Done"), "{}", log.out);
    let timeline = annex.run(&["job", "timeline", &id]).exits(0);
    for word in ["queued", "leased", "running", "phase", "finished"] {
        assert!(timeline.out.contains(word), "{word}: {}", timeline.out);
    }
    on(&[
        "build",
        path(dir.path()),
        "--push",
        "registry.example.org/x",
    ])
    .exits(2)
    .says("--push");

    // A run over TLS with a token; its own exit code.
    let token = annex
        .run(&["token", "create", "--role", "developer", "--expires", "1h"])
        .exits(0);
    let client = tempfile::tempdir().expect("temp dir");
    fs::create_dir(client.path().join("config")).expect("folder");
    let file = client.path().join("config/token");
    fs::write(&file, &token.out).expect("token");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("mode");
    let ca = annex.home.join("controller/authority.pem");
    let url = format!("https://127.0.0.1:{port}");
    let far = |args: &[&str]| {
        let mut command = annex.command(&[&["--server", &url, "--ca", path(&ca)], args].concat());
        crate::support::said({
            command.env("KILN_HOME", client.path());
            command
        })
    };
    let ran = far(&[
        &["run"],
        &SMALL[..],
        &["--", "sh", "-c", "echo out; exit 7"],
    ]
    .concat())
    .exits(7);
    assert_eq!(ran.out, "out\n");
    far(&["worker", "drain", "here"]).exits(4);
    far(&["job", "show", "b0000000000000000z"]).exits(2);
    fs::remove_file(&file).expect("remove");
    far(&["job", "list"]).exits(4).says("KILN_TOKEN");

    // What no worker can take waits, and says why; cancelled, it is over.
    let waiting = on(&["run", "--require", "gpu=a100", "--detach", "--", "true"]).exits(0);
    let waiting = waiting.out.trim();
    let why = until("a reason", || {
        let why = annex.run(&["job", "why", waiting]);
        why.out.contains("label gpu=a100").then_some(why)
    });
    assert!(
        why.out
            .contains("because none of 1 worker has label gpu=a100"),
        "{}",
        why.out
    );
    let stats = json(&annex.run(&["queue", "stats", "--json"]).exits(0));
    assert_eq!(stats["reasons"]["no_worker_matches"], 1);
    annex
        .run(&["job", "cancel", waiting, "--reason", "enough"])
        .exits(0);
    annex.run(&["job", "cancel", waiting]).exits(0);
    let over = annex.run(&["job", "why", waiting]).exits(0);
    assert!(over.out.contains("over (cancelled)"), "{}", over.out);

    // A paused queue holds; resumed, it goes on.
    annex
        .run(&["queue", "pause", "default", "--reason", "a test"])
        .exits(0);
    let held =
        on(&[&["run", "--detach"], &SMALL[..], &["--", "echo", "through"]].concat()).exits(0);
    let held = held.out.trim();
    until("the pause as reason", || {
        annex
            .run(&["job", "why", held])
            .out
            .contains("queue default is paused")
            .then_some(())
    });
    annex.run(&["queue", "resume", "default"]).exits(0);
    let log = annex.run(&["job", "logs", "--follow", held]).exits(0);
    assert_eq!(log.out, "through\n");

    // Ctrl-C stops the job, not only the one who watches it.
    let long = annex.start(
        &[
            &["--server", at.as_str(), "run"],
            &SMALL[..],
            &["--", "sleep", "600"],
        ]
        .concat(),
    );
    until("a running job", || {
        annex
            .run(&["job", "list", "--state", "running"])
            .out
            .contains("sleep 600")
            .then_some(())
    });
    long.signal("INT");
    long.end().exits(130).says("is being cancelled");
    ends_as_an_incident(&annex, &at);

    server.signal("INT");
    server.end().exits(0);
    // What it knew, any command of this home knows.
    let newest = json(&annex.run(&["job", "show", "--json"]).exits(0));
    assert_eq!(newest["outcome"]["class"], "cancelled");
}

/// A job that runs is ended because of what it did: its machine goes, what it could act with is over, and what tells of it stays.
fn ends_as_an_incident(annex: &Annex, at: &str) {
    let on = |args: &[&str]| annex.run(&[&["--server", at], args].concat());
    let value = app(&[("value", "s3cret-of-the-store")]);
    let mut set = annex.command(&["--server", at, "secret", "set", "IT_INCIDENT"]);
    set.stdin(fs::File::open(value.path().join("value")).expect("file"));
    crate::support::said(set).exits(0);
    let script = "echo evidence; exec sleep 3600";
    let run = ["--server", at, "run", "--secret", "IT_INCIDENT"];
    let mut running = annex.start(&[&run[..], &SMALL[..], &["--", "sh", "-c", script]].concat());
    running.until_it_prints("evidence");
    let id = on(&["job", "list", "--state", "running", "--json"]).exits(0);
    let id = json(&id)["id"].as_str().expect("one job").to_owned();
    assert!(!annex.vmms().is_empty(), "its machine");

    let kill = ["--json", "machine", "kill", &id, "--incident=it mined"];
    let told = json(&on(&kill).exits(0));
    assert_eq!(
        (&told["worker"], &told["held"], &told["secrets"]),
        (
            &"here".into(),
            &true.into(),
            &serde_json::json!(["IT_INCIDENT"])
        ),
        "{told}"
    );
    running.end().exits(130).says("as an incident");
    until("the end of its machine", || {
        annex.vmms().is_empty().then_some(())
    });
    let kept = until("what tells of it", || {
        let all = fs::read_dir(annex.home.join("incidents")).ok()?.flatten();
        let name = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
        let mut its = all.filter(|entry| name(entry).starts_with(&format!("{id}-")));
        its.next().map(|entry| entry.path())
    });
    let text = |name: &str| fs::read_to_string(kept.join(name)).expect("kept");
    let incident: Value = serde_json::from_str(&text("incident.json")).expect("JSON");
    assert_eq!(
        (&incident["note"], &incident["left_behind"]),
        (&"it mined".into(), &serde_json::json!([])),
        "{incident}"
    );
    assert_eq!(
        incident["secrets_given"],
        serde_json::json!(["IT_INCIDENT"])
    );
    assert!(incident["revoked"]["registry_tokens"].is_string());
    assert_eq!(text("worker.log"), "evidence\n");
    assert!(text("record.json").contains(&id));
    for name in ["console.log", "egress.json"] {
        let _there = text(name);
    }
    // The server has the rest: its end, its log, who did it, and that neither is thrown away.
    let job = json(&on(&["job", "show", &id, "--json"]).exits(0));
    assert_eq!(job["outcome"]["class"], "cancelled", "{job}");
    assert_eq!(on(&["job", "logs", &id]).exits(0).out, "evidence\n");
    let audit = on(&["audit", "list", "--action", "job.incident", "--json"]).exits(0);
    assert!(
        audit.out.contains(&id) && audit.out.contains("it mined"),
        "{audit:?}"
    );
    assert!(on(&["hold", "list"]).exits(0).out.contains(&id));
    on(&["machine", "kill", &id, "--incident"])
        .exits(2)
        .says("over already");
    let left: Vec<_> = fs::read_dir(annex.home.join("machines"))
        .expect("machines")
        .flatten()
        .map(|entry| entry.file_name())
        .filter(|name| name.to_string_lossy().starts_with(&*id))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
