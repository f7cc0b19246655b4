//! A policy through `kiln serve --with-worker` on real machines: what a command reaches, what it is refused, and what its end is, are the same as
//! without a server.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::annex::Annex;
use crate::serve::serve;
use crate::support::{Said, app, free_port, path, said};

/// One name for one phase, and nothing for the command itself.
const POLICY: &str = r#"
version: 1
resources: {cpus: 1, memory: 512M}
limits: {output: 4K}
phases:
  checkout:
    commands: ["test -f hello.txt && echo one > made"]
  dependencies:
    network: {allow: ["dep.example.org:443"]}
    commands:
      - "echo dependencies: $(getent hosts dep.example.org | wc -l) $(getent hosts run.example.org | wc -l)"
  run:
    commands: [["cat", "made"]]
artifacts: [made]
"#;

fn within(annex: &Annex, dir: &Path, args: &[&str]) -> Said {
    let mut command = annex.command(args);
    command.current_dir(dir);
    said(command)
}

fn last_job(annex: &Annex) -> Value {
    let shown = annex.run(&["job", "show", "--json"]).exits(0);
    serde_json::from_str(&shown.out).expect("json")
}

/// A command line that is too long is its user's mistake, before anything starts.
fn what_no_machine_can_be_sent_is_refused(annex: &Annex, at: &str) {
    let (long, told) = ("x".repeat(20_000), "at most 16384 can be sent to a machine");
    let jobs = || {
        let listed = annex.run(&["job", "list", "--limit", "1000", "--json"]);
        listed.exits(0).out.lines().count()
    };
    let before = jobs();
    let variable = format!("WORD={long}");
    for on in [&[][..], &["--server", at]] {
        for what in [["-e", &variable, "--", "true"], ["--", "echo", &long, ""]] {
            let run = [on, &["run", "--no-source"], &what].concat();
            let refused = annex.run(&run).exits(2).says(told);
            refused.says("put what is long into a file");
        }
    }
    assert_eq!(jobs(), before, "none of them was queued");
}

#[test]
fn a_policy_holds_through_a_server_as_it_does_without() {
    let Some(annex) = Annex::open() else { return };
    let dir = app(&[("kiln.yaml", POLICY), ("hello.txt", "hi")]);
    let script = "echo run: $(getent hosts dep.example.org | wc -l); exit 3";
    let run = ["run", "--", "sh", "-c", script];
    let here = within(&annex, dir.path(), &run).exits(3);
    assert_eq!(here.out, "dependencies: 1 0\none\nrun: 0\n", "{here:?}");
    let of_here = last_job(&annex);
    // Under a policy a flag admits nothing: the file's own line would.
    let asked = "phases.run.network.allow of kiln.yaml names no dep.example.org";
    let before = "phases.dependencies.network.allow of kiln.yaml names no run.example.org";
    let told = |text: &str| {
        assert!(text.contains(asked) && text.contains(before), "{text}");
        assert!(!text.contains("--allow"), "{text}");
    };
    told(&here.err);

    let (server, at) = serve(&annex, free_port());
    let far = |args: &[&str]| {
        let all = [&["--server", at.as_str()], args].concat();
        within(&annex, dir.path(), &all)
    };
    let there = far(&run).exits(3);
    assert_eq!(there.out, here.out, "{there:?}");
    told(&there.err);
    let of_there = last_job(&annex);
    let policy_of = |job: &Value| {
        let mut policy = job["policy"].clone();
        // How long each took to find and compile it is its own.
        policy
            .as_object_mut()
            .map(|fields| fields.remove("decided_us"));
        policy
    };
    assert_eq!(policy_of(&of_there), policy_of(&of_here), "the same held");
    assert!(of_there["policy"]["hash"].is_string(), "{of_there}");
    let names = |job: &Value| -> Vec<String> {
        let phases = job["outcome"]["phases_ms"].as_array().expect("phases");
        let names = phases.iter().filter_map(|phase| phase[0].as_str());
        let driven = ["checkout", "dependencies", "services", "run"];
        names
            .filter(|name| driven.contains(name))
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(names(&of_there), ["checkout", "dependencies", "run"]);
    assert_eq!(names(&of_there), names(&of_here));
    let refused = annex.run(&["job", "egress"]).exits(0);
    told(&refused.out);

    // What is refused is refused in the same words and with the same code.
    let allow = ["run", "--allow", "other.example.org:443", "--", "true"];
    far(&allow).exits(2).says("only narrow a policy");
    fs::write(
        dir.path().join("kiln.yaml"),
        "version: 1\nnetwork: {mode: open}\n",
    )
    .expect("write");
    far(&["run", "--", "true"]).exits(4).says("kiln.yaml:2");
    far(&["run", "--no-policy", "--net", "learn", "--", "true"]).exits(4);
    what_no_machine_can_be_sent_is_refused(&annex, &at);
    // What a build cannot honour is refused by name, on either side.
    let bounds = app(&[
        ("Dockerfile", "FROM scratch\nCOPY . /\n"),
        ("kiln.yaml", "version: 1\nlimits: {processes: 9}\n"),
    ]);
    for on in [&[][..], &["--server", at.as_str()]] {
        let build = [on, &["build", path(bounds.path())]].concat();
        annex.run(&build).exits(4).says("limits.processes");
    }
    fs::write(dir.path().join("cleanroom.yaml"), "version: 1\n").expect("write");
    far(&["run", "--", "true"]).exits(2).says("cleanroom.yaml");

    // The operator grants it, from then on; what a machine that learns reached comes back.
    fs::write(
        annex.home.join("config/policy.toml"),
        "[tenant.local]\nlearn = true\n",
    )
    .expect("grant");
    let learn = [
        "--json",
        "run",
        "--no-policy",
        "--net",
        "learn",
        "--",
        "bash",
        "-c",
        "printf 'a\\377'; exit 7",
    ];
    let (events, [both, none]) = far(&learn).exits(7).events();
    assert_eq!((&*both, &*none), (&b"a\xff"[..], &b""[..]), "{events:?}");
    let exit = events.iter().find(|event| event["event"] == "exit");
    assert_eq!(exit.expect("its end")["code"], 7, "{events:?}");
    let learnt = last_job(&annex);
    assert_eq!(learnt["policy"]["learn"], true, "{learnt}");
    fs::remove_file(annex.home.join("config/policy.toml")).expect("withdrawn");
    let id = learnt["id"].as_str().expect("an id").to_owned();
    far(&["job", "retry", &id]).exits(4).says("withdrawn");
    server.signal("INT");
    server.end().says("the operator's grants are gone");
    annex.is_clear();
}
