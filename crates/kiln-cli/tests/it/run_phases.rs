//! Phases, secrets, services and bounds of a policy on real machines: what each phase gets, what it does not, and what is told when it fails.

use std::fs;
use std::path::Path;

use crate::support::{Kiln, Said, app, kiln, said};

fn run_in(kiln: &Kiln, dir: &Path, args: &[&str]) -> Said {
    let mut command = kiln.command(args);
    command.current_dir(dir);
    said(command)
}

/// Who may be asked for in which phase; the secret is the second phase's alone.
const POLICY: &str = r#"
version: 1
phases:
  checkout:
    commands: ["test -f hello.txt; echo one > made; getent hosts dep.example.org || echo checkout reaches nothing"]
  dependencies:
    network: {allow: ["dep.example.org:443"]}
    commands:
      - "echo dependencies: $(getent hosts dep.example.org | wc -l) $(getent hosts run.example.org | wc -l)"
      - [sh, -c, 'test "$KEY" = "top secret" && test -z "$OTHER" && echo "<$KEY>" && cat made && echo two > /var/tmp/two']
  run:
    network: {allow: ["dep.example.org:443"]}
    commands: [["cat", "/var/tmp/two"]]
secrets:
  - {name: phase-key, env: KEY, phase: dependencies, hosts: ["dep.example.org:443"]}
"#;

#[test]
fn each_phase_has_its_own_network_and_secrets_and_the_files_of_the_one_before() {
    let Some(annex) = crate::annex::Annex::open() else {
        return;
    };
    let dir = app(&[("kiln.yaml", POLICY), ("hello.txt", "hi")]);
    let here = |args: &[&str]| run_in(&annex, dir.path(), args);
    let last = "test -z \"$KEY\" && echo run: $(getent hosts run.example.org | wc -l); exit 3";
    // A policy comes with a project; a secret is its owner's.
    let refused = here(&["run", "--", "true"]).exits(4);
    refused.says("--secret phase-key:file");
    let mut command = annex.command(&["secret", "set", "phase-key"]);
    let value = dir.path().join("value");
    fs::write(&value, "top secret").expect("write");
    command.stdin(fs::File::open(&value).expect("open"));
    said(command).exits(0);
    fs::remove_file(&value).expect("gone");

    let ran = here(&["run", "--secret", "phase-key:file", "--", "sh", "-c", last]).exits(3);
    let words = "checkout reaches nothing\ndependencies: 1 0\n<***>\none\ntwo\nrun: 0\n";
    assert_eq!(ran.out, words, "{ran:?}");
    assert!(!dir.path().join("made").exists());
    let job = here(&["job", "show", "--json"]).exits(0);
    let job: serde_json::Value = serde_json::from_str(&job.out).expect("json");
    let phases = job["outcome"]["phases_ms"].as_array().expect("phases");
    let names: Vec<_> = phases
        .iter()
        .filter_map(|phase| phase[0].as_str())
        .collect();
    let order = [
        "queue",
        "machine",
        "source",
        "checkout",
        "dependencies",
        "run",
    ];
    assert_eq!(names, order);
    for part in [
        "clone_ms",
        "ready_ms",
        "disk_ms",
        "source_ms",
        "command_ms",
        "teardown_ms",
    ] {
        assert!(job["record"][part].is_u64(), "{part}: {job}");
    }

    // A flag narrows every phase; the one that fails is named, with its command, and its code is passed on.
    let args = [
        "run",
        "--secret",
        "phase-key:file",
        "--net",
        "isolated",
        "--",
        "true",
    ];
    let narrow = here(&args).exits(0);
    assert!(narrow.out.contains("dependencies: 0 0"), "{narrow:?}");
    let failing = "version: 1\nphases:\n  dependencies: {commands: [\"exit 9\"]}\n  run: {commands: [\"echo never\"]}\n";
    fs::write(dir.path().join("kiln.yaml"), failing).expect("write");
    let failed = here(&["run", "--", "true"]).exits(9);
    assert_eq!(failed.out, "");
    failed.says("the phase dependencies failed: `exit 9`");
    stays_narrowed(&annex, dir.path());
    annex.is_clear();
}

/// A machine that was given a secret and stays reaches no more with its keeper than it did with its run.
fn stays_narrowed(annex: &crate::annex::Annex, dir: &Path) {
    let policy = "\
version: 1
phases:
  dependencies: {network: {allow: [\"dep.example.org:443\"]}, commands: [\"getent hosts dep.example.org\"]}
  run: {network: {allow: [\"dep.example.org:443\", \"run.example.org:443\"]}}
secrets:
  - {name: phase-key, env: KEY, phase: dependencies, hosts: [\"dep.example.org:443\", \"run.example.org:443\"]}
";
    fs::write(dir.join("kiln.yaml"), policy).expect("write");
    let asks = "getent hosts dep.example.org > /dev/null && ! getent hosts run.example.org";
    let args = ["--json", "run", "--secret", "phase-key:file", "--keep=5m"];
    let args = [&args[..], &["--", "sh", "-c", asks]].concat();
    let ran = run_in(annex, dir, &args).exits(0);
    let events = ran.out.lines().map(serde_json::from_str);
    let mut events = events.map(|event: Result<serde_json::Value, _>| event.expect("JSON"));
    let kept = events.find(|event| event["event"] == "kept").expect("kept");
    let id = kept["id"].as_str().expect("an id");
    annex.run(&["exec", id, "--", "sh", "-c", asks]).exits(0);
    annex.run(&["machine", "rm", id]).exits(0);
    // Whoever asks for it brings its record to its job.
    let told = annex.run(&["job", "egress", id]).exits(0);
    assert!(told.out.contains("run.example.org"), "{told:?}");
}

#[test]
fn bounds_of_a_policy_are_told_by_their_names() {
    let Some(kiln) = kiln() else { return };
    let dir = app(&[(
        "kiln.yaml",
        "version: 1\nlimits: {disk: 64M, processes: 40}\n",
    )]);
    let here = |script: &str| run_in(&kiln, dir.path(), &["run", "--", "sh", "-c", script]);
    let full = "head -c 90000000 /dev/zero > big || exit 6";
    here(full).exits(6).says("disk_full");
    let many = "for i in $(seq 1 200); do sleep 60 & done; exit 0";
    let refused = here(many);
    assert_ne!(refused.code, 0, "{refused:?}");
    refused.says("process_limit");
    // Neither is told of a command that failed for its own reasons, and both leave room for an ordinary one.
    let own = here("seq 1 20 | xargs -P 10 -n 1 sleep 0 && exit 5").exits(5);
    assert!(
        !own.err.contains("_limit") && !own.err.contains("disk_full"),
        "{own:?}"
    );
}

#[test]
fn services_are_ready_before_the_command_and_reached_by_name() {
    let Some(kiln) = kiln() else { return };
    let server = app(&[
        (
            "package.json",
            r#"{"name": "svc", "scripts": {"start": "node server.js"}}"#,
        ),
        (
            "package-lock.json",
            r#"{"name": "svc", "lockfileVersion": 3, "packages": {"": {"name": "svc"}}}"#,
        ),
        (
            "server.js",
            "const fs = require('fs'); const ready = '/tmp/ready';
             require('http').createServer((q, r) => { r.end(process.env.WORD + ' ' + q.url + ' ' + fs.existsSync(ready)); })
             .listen(process.env.DOOR || 8123, () => { console.log('listening'); setTimeout(() => fs.writeFileSync(ready, ''), 2000); });
             if (process.env.WORD !== 'served') { console.error('no table ' + process.env.WORD); process.exit(4); }",
        ),
    ]);
    let built = kiln.build(server.path(), "phase-service:v1", &[]);
    let digest = built["digest"].as_str().expect("a digest");
    let image = format!("phase-service@{digest}");
    let policy = format!(
        "version: 1\nimage: node\nservices:\n  web:\n    image: {image}\n    port: 8123\n    env: {{WORD: served}}\n    health: {{timeout: 5m, http: /up}}\n"
    );
    let dir = app(&[("kiln.yaml", &policy)]);
    // A second one, whose port alone says that it is ready.
    let second = format!(
        "  db:\n    image: {image}\n    port: 8124\n    env: {{WORD: served, DOOR: '8124'}}\n"
    );
    fs::write(dir.path().join("kiln.yaml"), format!("{policy}{second}")).expect("write");
    let both = "Promise.all(['web:8123/1', 'db:8124/2'].map(at => fetch('http://' + at).then(r => r.text()))).then(t => console.log(t.join()))";
    let ran = run_in(&kiln, dir.path(), &["run", "--", "node", "-e", both]).exits(0);
    assert!(
        ran.out.starts_with("served /1 ") && ran.out.contains(",served /2 "),
        "{ran:?}"
    );
    fs::write(dir.path().join("kiln.yaml"), &policy).expect("write");
    let ask = "fetch('http://web:8123/asked').then(r => r.text()).then(t => console.log(t))";
    let ran = run_in(&kiln, dir.path(), &["run", "--", "node", "-e", ask]).exits(0);
    assert!(ran.out.starts_with("served /asked "), "{ran:?}");
    let with = |health: &str| {
        let text = policy.replace("timeout: 5m, http: /up", health);
        fs::write(dir.path().join("kiln.yaml"), text).expect("write");
    };
    // A command in the service's own container, with its variables: it says that the file is there, and only then the run's own begins.
    with(r#"timeout: 5m, command: 'test "$WORD" = served && test -e /tmp/ready'"#);
    let ran = run_in(&kiln, dir.path(), &["run", "--", "node", "-e", ask]).exits(0);
    assert_eq!(ran.out, "served /asked true\n");
    // One that never succeeds is the run's failure, with what it said.
    with("timeout: 20s, command: [sh, -c, 'echo no $WORD table; exit 3']");
    let args = ["run", "--", "echo", "never"];
    let never = run_in(&kiln, dir.path(), &args).exits(1);
    assert_eq!(never.out, "");
    never
        .says("the service web: it was not ready within 20s: its health command ended with exit code 3, saying: no served table")
        .says("services.web of the policy");
    // So is one that ends, with its last words.
    let text = policy.replace("WORD: served", "WORD: tables");
    fs::write(dir.path().join("kiln.yaml"), text).expect("write");
    let ended = run_in(&kiln, dir.path(), &args).exits(1);
    assert_eq!(ended.out, "");
    ended
        .says("the service web: it ended with exit code 4\n")
        .says("web | no table tables");
}
