//! What flags of `kiln run` make of a machine, as its command sees it; a terminal of its own; and a policy of the other format on a real machine.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::annex::Annex;
use crate::kept::typed;
use crate::support::{Kiln, Said, app, kiln, said};

fn run_in(kiln: &Kiln, dir: &Path, args: &[&str]) -> Said {
    let mut command = kiln.command(args);
    command.current_dir(dir);
    said(command)
}

/// The digest of a base that this home has.
fn base(kiln: &Kiln, repository: &str, tag: &str) -> Option<String> {
    let listed = kiln.run(&["registry", "list", "--json"]).exits(0).out;
    let mut lines = listed.lines().filter_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        let this = line["repository"] == repository && line["tag"].as_str()?.ends_with(tag);
        this.then(|| line["digest"].as_str().map(str::to_owned))?
    });
    lines.next()
}

#[test]
fn a_machine_is_what_its_flags_say() {
    let Some(annex) = Annex::open() else { return };
    let seen = "nproc; awk '/MemTotal/ {print $2}' /proc/meminfo; df -m --output=size /work | tail -1; \
        echo \"<$KILN_IT_WORD>\"; echo kept > out.txt";
    let flags = "run --no-source --cpus 2 --memory 1G --disk 64M -e KILN_IT_WORD --artifact out.txt -- sh -c";
    let mut args: Vec<&str> = flags.split(' ').collect();
    args.push(seen);
    let mut command = annex.command(&args);
    command.env("KILN_IT_WORD", "of the host");
    let ran = said(command).exits(0);
    let lines: Vec<&str> = ran.out.lines().map(str::trim).collect();
    let [cpus, memory, disk, word] = lines[..] else {
        panic!("{ran:?}");
    };
    assert_eq!((cpus, word), ("2", "<of the host>"));
    // What the kernel keeps for itself is missing.
    let mib = |text: &str| text.parse::<u64>().expect("a number");
    assert!((850..=1024).contains(&(mib(memory) / 1024)), "{ran:?}");
    assert!((48..=64).contains(&mib(disk)), "{ran:?}");
    let shown = annex.run(&["job", "show", "--json"]).exits(0).out;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    assert!(shown["record"]["artifacts_ms"].is_u64(), "{shown}");
    // A mode that reaches what is listed needs a list.
    let nothing = ["run", "--no-source", "--net", "egress", "--", "true"];
    annex.run(&nothing).exits(2).says("--allow HOST[:PORT]");
    let listed = "run --no-source --net egress --allow a.example.org:443 -- sh -c";
    let mut args: Vec<&str> = listed.split(' ').collect();
    args.push(
        "getent hosts a.example.org > /dev/null && ! getent hosts b.example.org && echo only",
    );
    assert_eq!(annex.run(&args).exits(0).out, "only\n");
    for (flag, amount, least) in [
        ("--disk", "15M", "16.0 MiB"),
        ("--memory", "127M", "128.0 MiB"),
    ] {
        let refused = annex.run(&["run", "--no-source", flag, amount, "--", "true"]);
        refused.exits(2).says(&format!("at least {least}"));
    }
}

#[test]
fn a_command_has_a_terminal_and_what_is_typed_into_it() {
    let Some(kiln) = kiln() else { return };
    let words = "'echo ready; read word; stty size; test -t 1 && echo \"<$word>\"; exit 6'";
    for flag in ["-t", "-i"] {
        let program = kiln.program.display();
        let line = format!("{program} run --no-source {flag} -- sh -c {words}");
        let (code, shown) = typed(&kiln, &line, &[("ready", "typed\n")], || {});
        assert_eq!(code, 6, "{flag}: {shown}");
        assert!(
            shown.contains("33 101") && shown.contains("<typed>"),
            "{flag}: {shown}"
        );
    }
}

#[test]
fn a_cleanroom_file_holds_a_real_machine_to_what_it_means() {
    let Some(kiln) = kiln() else { return };
    let digest = base(&kiln, "shared/python", "-run").expect("a base of this home");
    let policy = |repository: &str| {
        format!(
            "version: 1\nrepository: {{{repository}}}\nsandbox:\n  image: {{ref: shared/python@{digest}}}\n  \
             network: {{default: deny, allow: [\"api.example.org:443\"]}}\n  \
             dependencies: {{command: [sh, -c, \"echo dependencies; echo made > /tmp/made\"]}}\n  \
             run: {{before: \"cat /tmp/made; ls marker || true\"}}\n"
        )
    };
    let dir = app(&[
        ("marker", "here"),
        ("cleanroom.yaml", &policy("enabled: false")),
    ]);
    let names = "import socket\nfor name in ['api.example.org', 'other.example.org']:\n  try: socket.gethostbyname(name); print(name)\n  except OSError: print('no', name)";
    let here = || run_in(&kiln, dir.path(), &["run", "--", "python3", "-c", names]);
    let named = "api.example.org\nno other.example.org\n";
    // No repository in the sandbox: nothing of the folder is there.
    let without = here().exits(0);
    assert_eq!(without.out, format!("dependencies\nmade\n{named}"));
    let asked = ["run", "--source", ".", "--", "true"];
    run_in(&kiln, dir.path(), &asked)
        .exits(2)
        .says("nothing copied in");
    fs::write(
        dir.path().join("cleanroom.yaml"),
        policy("mode: current-repo"),
    )
    .expect("write");
    let with = here().exits(0);
    assert_eq!(with.out, format!("dependencies\nmade\nmarker\n{named}"));
}

#[test]
fn the_doctor_looks_at_the_system_by_name() {
    let Some(kiln) = kiln() else { return };
    let told = kiln.run(&["doctor", "--json"]).out;
    let lines = told.lines().map(serde_json::from_str::<Value>);
    let checks: Vec<Value> = lines.collect::<Result<_, _>>().expect("JSON lines");
    for name in [
        "os",
        "accelerator",
        "private-folders",
        "sudoers",
        "memory",
        "disk",
        "programs",
    ] {
        let check = checks.iter().find(|check| check["name"] == name);
        let check = check.unwrap_or_else(|| panic!("no {name}: {told}"));
        let level = check["level"].as_str().expect("a level");
        assert!(["pass", "warn", "fail"].contains(&level), "{check}");
        let found = check["found"].as_str().expect("what was found");
        assert!(!found.is_empty(), "{check}");
        // What is not in order comes with what to do.
        assert!(level == "pass" || check["hint"].is_string(), "{check}");
    }
}
