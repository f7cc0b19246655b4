//! Policies from the command line: read, explained, and held to by real machines.

use std::fs;
use std::path::Path;

use crate::annex::Annex;
use crate::support::{Kiln, Said, app, kiln, path, said};

/// Runs `kiln` in a folder.
fn within(kiln: &Kiln, dir: &Path, args: &[&str]) -> Said {
    let mut command = kiln.command(args);
    command.current_dir(dir);
    said(command)
}

const POLICY: &str = "\
version: 1
resources: {memory: 512M}
network:
  allow:
    - \"*.example.org:443\"
    - db.example.net:5432
limits: {output: 1K}
";

#[test]
fn a_policy_is_checked_explained_and_begun() {
    let Some(kiln) = kiln() else { return };
    let dir = app(&[("kiln.yaml", POLICY), ("sub/x", "")]);
    let here = |args: &[&str]| within(&kiln, dir.path(), args);
    here(&["policy", "check"]).exits(0);
    let shown = here(&["policy", "show", "--json"]).exits(0);
    let shown: serde_json::Value = serde_json::from_str(&shown.out).expect("json");
    assert_eq!(shown["hash"], shown["file_hash"]);
    here(&["policy", "explain", "a.example.org"]).exits(0);
    let no = here(&["policy", "explain", "example.org:443"]).exits(4);
    assert!(no.out.contains("kiln.yaml:"), "{no:?}");
    here(&["policy", "explain", "a.example.org", "--phase", "checkout"]).exits(4);
    here(&["policy", "explain", "10.0.0.1"]).exits(2);

    fs::write(
        dir.path().join("kiln.yaml"),
        "version: 1\nnetwork: {alow: [x]}\n",
    )
    .expect("written");
    let wrong = here(&["policy", "check"]).exits(2);
    assert!(
        wrong.err.contains("kiln.yaml:2:11") && wrong.err.contains("allow"),
        "{wrong:?}"
    );
    // A run is not started with a policy that nobody can read.
    here(&["run", "--", "true"]).exits(2);
    here(&["init"]).exits(2);
    here(&["init", "--force"]).exits(0);
    here(&["policy", "check"]).exits(0);
    fs::write(dir.path().join("cleanroom.yaml"), "version: 1\n").expect("written");
    let both = here(&["run", "--", "true"]).exits(2);
    assert!(both.err.contains("cleanroom.yaml"), "{both:?}");

    let node = app(&[
        (
            "package.json",
            "{\"name\":\"a\",\"version\":\"1.0.0\",\"scripts\":{\"start\":\"node a\"}}",
        ),
        (
            "package-lock.json",
            "{\"lockfileVersion\":3,\"packages\":{}}",
        ),
        ("a.js", ""),
    ]);
    kiln.run(&["init", path(node.path())]).exits(0);
    let text = fs::read_to_string(node.path().join("kiln.yaml")).expect("written");
    assert!(text.contains("\nimage: node"), "{text}");
}

#[test]
fn verbs_of_a_policy_look_where_a_run_looks_and_say_what_it_would() {
    let Some(annex) = Annex::open() else { return };
    let pinned = format!("registry.example.org/app@sha256:{}", "a".repeat(64));
    let dir = app(&[("kiln.yaml", POLICY), (".git/HEAD", ""), ("web/x", "")]);
    let web = dir.path().join("web");
    let here = |args: &[&str], code: i32| within(&annex, &web, args).exits(code);
    for verb in ["check", "show"] {
        let said = here(&["policy", verb, "--json"], 0);
        assert!(said.out.contains("/kiln.yaml\""), "{said:?}");
    }
    here(&["policy", "explain", "a.example.org"], 0);
    // A file of its own would take the place of the one above.
    let shadow = here(&["init"], 2);
    assert!(shadow.err.contains("kiln.yaml holds in"), "{shadow:?}");
    assert!(!web.join("kiln.yaml").exists());
    let forced = here(&["init", "--force"], 0);
    assert!(forced.err.contains("is not read in"), "{forced:?}");
    fs::remove_file(web.join("kiln.yaml")).expect("gone");

    let grant = annex.home.join("config/policy.toml");
    fs::write(&grant, "[tenant.local]\nmax = { memory = \"256M\" }\n").expect("grant");
    for verb in ["check", "show"] {
        let refused = here(&["policy", verb], 4);
        assert!(
            refused.err.contains("kiln.yaml:2") && refused.err.contains("resources.memory"),
            "{refused:?}"
        );
    }
    here(&["policy", "explain", "a.example.org"], 4);
    fs::remove_file(&grant).expect("gone");

    // What no run could be held to is told before one is asked for.
    fs::write(
        dir.path().join("kiln.yaml"),
        format!("version: 1\nimage: {pinned}\n"),
    )
    .expect("written");
    for args in [&["policy", "check"][..], &["run", "--", "true"]] {
        let refused = here(args, 4);
        assert!(refused.err.contains("kiln's own registry"), "{refused:?}");
    }
}

#[test]
fn flags_narrow_and_what_cannot_be_enforced_is_refused_before_anything_starts() {
    let Some(kiln) = kiln() else { return };
    let dir = app(&[("kiln.yaml", POLICY)]);
    let run = |args: &[&str], code: i32| {
        let mut all = vec!["run"];
        all.extend(args);
        all.extend(["--", "true"]);
        within(&kiln, dir.path(), &all).exits(code)
    };
    for wider in [
        &["--allow", "other.example.com"][..],
        &["--allow", "a.example.org:443/raw"],
        &["--net", "open"],
        &["--memory", "2G"],
        &["--net", "isolated", "--allow", "a.example.org:443"],
    ] {
        run(wider, 2);
    }
    let asks = |more: &str| {
        fs::write(
            dir.path().join("kiln.yaml"),
            format!("version: 1\n{more}\n"),
        )
        .expect("written")
    };
    for (more, word) in [
        (
            "secrets: [{name: a, env: A, phase: run, hosts: []}]",
            "--secret a",
        ),
        (
            "secrets: [{name: a, file: /etc/a, phase: run, hosts: []}]",
            "/run/secrets/a",
        ),
        ("network: {mode: open}", "not grant"),
    ] {
        asks(more);
        let refused = run(&[], 4);
        assert!(refused.err.contains(word), "{more}: {refused:?}");
    }
    asks("image: cobol");
    run(&[], 2);
}

#[test]
fn a_machine_is_held_to_the_folders_policy_and_the_operators_grant() {
    let Some(annex) = Annex::open() else { return };
    let dir = app(&[("kiln.yaml", POLICY), (".git/HEAD", ""), ("sub/x", "")]);
    let names = "for name in a.example.org b.a.example.org db.example.net example.org c.example.com; do \
        getent hosts $name > /dev/null && echo $name; done; true";
    let said = within(&annex, dir.path(), &["run", "--", "sh", "-c", names]).exits(0);
    assert_eq!(said.out, "a.example.org\nb.a.example.org\ndb.example.net\n");
    // From a folder below, with a flag that narrows.
    let below = dir.path().join("sub");
    let said = within(
        &annex,
        &below,
        &[
            "run",
            "--allow",
            "b.a.example.org:443",
            "--",
            "sh",
            "-c",
            names,
        ],
    )
    .exits(0);
    assert_eq!(said.out, "b.a.example.org\n");
    let said = within(
        &annex,
        dir.path(),
        &["run", "--no-policy", "--", "sh", "-c", names],
    )
    .exits(0);
    assert_eq!(said.out, "");

    // The record says which policy held.
    let shown = within(&annex, dir.path(), &["policy", "show", "--json"]).exits(0);
    let shown: serde_json::Value = serde_json::from_str(&shown.out).expect("json");
    let jobs = annex.run(&["job", "list", "--json"]).exits(0).out;
    let ids: Vec<String> = jobs
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|job| job["id"].as_str().map(str::to_owned))
        .collect();
    let hashes: Vec<serde_json::Value> = ids
        .iter()
        .map(|id| {
            serde_json::from_str(&annex.run(&["job", "show", id, "--json"]).exits(0).out)
                .expect("json")
        })
        .map(|job: serde_json::Value| job["policy"]["hash"].clone())
        .collect();
    assert_eq!(
        hashes.iter().filter(|hash| **hash == shown["hash"]).count(),
        2,
        "{hashes:?} {shown}"
    );

    // More output than the policy allows.
    let loud = within(
        &annex,
        dir.path(),
        &[
            "run",
            "--",
            "sh",
            "-c",
            "head -c 100000 /dev/zero | tr '\\0' x",
        ],
    )
    .exits(1);
    assert!(
        loud.out.len() <= 1024 && loud.err.contains("output_limit"),
        "{} {}",
        loud.out.len(),
        loud.err
    );

    let shown = annex.run(&["job", "show", "--json"]).exits(0).out;
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("json");
    let outcome = &shown["outcome"];
    assert_eq!(
        (&outcome["class"], &outcome["reason"]),
        (&"user".into(), &"output_limit".into()),
        "{shown}"
    );

    // The operator takes away, and gives what only an operator can.
    let grants = annex.home.join("config/policy.toml");
    fs::write(&grants, "[tenant.local]\nhosts = [\"a.example.org\"]\n").expect("written");
    let said = within(&annex, dir.path(), &["run", "--", "sh", "-c", names]).exits(0);
    assert_eq!(said.out, "a.example.org\n");
    assert!(
        said.err.contains("db.example.net:5432/raw is not granted"),
        "{said:?}"
    );
    let flag = annex
        .run(&["run", "--allow", "b.example.org", "--", "true"])
        .exits(4);
    assert!(flag.err.contains("policy.toml"), "{flag:?}");
    fs::write(&grants, "[tenant.local]\nopen = true\n").expect("written");
    let said = annex
        .run(&["run", "--net", "open", "--", "sh", "-c", names])
        .exits(0);
    assert_eq!(said.out.lines().count(), 5, "{said:?}");
}

#[test]
fn commands_of_a_policy_run_before_the_command() {
    let Some(kiln) = kiln() else { return };
    let policy = "version: 1\nphases:\n  run:\n    commands:\n      - \"echo 'first one'\"\n      - [printf, '%s\\n', second]\n";
    let dir = app(&[("kiln.yaml", policy)]);
    let said = within(&kiln, dir.path(), &["run"]).exits(0);
    assert_eq!(said.out, "first one\nsecond\n");
    let script = "printf '<%s>\\377' 'a b'; echo e >&2; exit 7";
    let loud = ["--json", "run", "--", "bash", "-c", script];
    let said = within(&kiln, dir.path(), &loud).exits(7);
    let (events, [out, err]) = said.events();
    assert_eq!(out, b"first one\nsecond\n<a b>\xff");
    assert_eq!((&*err, said.err.as_str()), (&b"e\n"[..], ""));
    let exit = events.last().expect("events");
    assert_eq!((&exit["event"], &exit["code"]), (&"exit".into(), &7.into()));
}
