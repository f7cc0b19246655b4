//! What a person sees of `kiln` without a machine: help, completions, man pages, colour, directories, settings, doctor, uninstall.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Kiln, Said, free_port, kiln, path, said, until};

/// A kiln of its own below an empty directory.
fn below(dir: &Path) -> Option<Kiln> {
    let kiln = kiln()?;
    Some(Kiln {
        home: dir.join("kiln-home"),
        ..kiln
    })
}

/// As a fresh user whose home is this directory, without `KILN_HOME`.
fn as_user(kiln: &Kiln, home: &Path, args: &[&str], env: &[(&str, &Path)]) -> Said {
    let mut command = kiln.command(args);
    command.env_remove("KILN_HOME").env("HOME", home);
    for name in ["XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"] {
        command.env_remove(name);
    }
    command.envs(env.iter().copied());
    said(command)
}

/// Verbs as a help text lists them.
fn verbs(help: &str) -> Vec<String> {
    let listed = help.split("Commands:\n").nth(1).unwrap_or_default();
    let lines = listed.lines().take_while(|line| !line.trim().is_empty());
    let lines = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    lines
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .collect()
}

/// Every directory and file below, relative.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let mut open = vec![dir.to_owned()];
    let mut all = Vec::new();
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).expect("list").flatten() {
            if entry.file_type().expect("type").is_dir() {
                open.push(entry.path());
            }
            all.push(entry.path().strip_prefix(dir).expect("below").to_owned());
        }
    }
    all.sort();
    all
}

#[test]
fn every_verb_has_help_with_examples_completions_and_a_man_page() {
    let dir = tempfile::tempdir().expect("temp dir");
    let Some(kiln) = below(dir.path()) else {
        return;
    };
    let help = kiln.run(&["--help"]).exits(0).out;
    assert!(
        help.contains("Exit codes:") && help.contains("Examples:"),
        "{help}"
    );
    let man = dir.path().join("man");
    kiln.run(&["man", path(&man)]).exits(0);
    let page = |name: &str| fs::read_to_string(man.join(name)).expect("a page");
    assert!(page("kiln.1").contains(".TH kiln 1"));
    let all = verbs(&help);
    assert!(all.len() >= 16, "{all:?}");
    for verb in &all {
        let help = kiln.run(&[verb, "--help"]).exits(0).out;
        assert!(help.contains("Usage: kiln"), "{help}");
        assert!(help.contains("Examples:\n  kiln "), "no examples:\n{help}");
        assert!(page(&format!("kiln-{verb}.1")).contains(".SH SYNOPSIS"));
        for below in verbs(&help) {
            assert!(page(&format!("kiln-{verb}-{below}.1")).contains(".SH SYNOPSIS"));
        }
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = kiln.run(&["completions", shell]).exits(0).out;
        assert!(
            all.iter().all(|verb| script.contains(verb.as_str())),
            "{shell}"
        );
    }
    assert!(!kiln.home.exists(), "none of these makes anything");
    kiln.run(&["no-such-verb"]).exits(2).says("unrecognized");
    kiln.run(&["build", "--no-such-option"])
        .exits(2)
        .says("--no-such-option");
}

#[test]
fn colour_is_for_terminals_and_obeys_no_color() {
    let dir = tempfile::tempdir().expect("temp dir");
    let Some(kiln) = below(dir.path()) else {
        return;
    };
    let colour = |no_color: Option<&str>, term: &str| {
        let words = format!("{} run --cpus 99 -- true", path(&kiln.program));
        let mut command = Command::new("script");
        command.args(["--quiet", "--return", "--command", &words, "/dev/null"]);
        command
            .env("KILN_HOME", &kiln.home)
            .env("TERM", term)
            .env_remove("NO_COLOR");
        command.envs(no_color.map(|value| ("NO_COLOR", value)));
        let said = said(command).exits(2);
        assert!(said.out.contains("--cpus 99"), "{said:?}");
        said.out.contains('\x1b')
    };
    assert!(colour(None, "xterm"));
    assert!(!colour(Some("1"), "xterm"));
    assert!(!colour(None, "dumb"));
    let piped = kiln.run(&["run", "--cpus", "99", "--", "true"]).exits(2);
    assert!(!piped.err.contains('\x1b'));
}

#[test]
fn only_the_xdg_directories_are_written_and_uninstall_undoes_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    let Some(kiln) = kiln() else { return };
    let home = dir.path().join("me");
    fs::create_dir_all(home.join(".config/other")).expect("make");
    let doctor = as_user(&kiln, &home, &["doctor", "--json"], &[]).exits(3);
    for line in doctor.out.lines() {
        let check: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let level = check["level"].as_str().expect("level");
        assert!(
            level == "pass" || check["hint"].is_string(),
            "how to mend it: {line}"
        );
    }
    let below = [".cache/kiln", ".config/kiln", ".local/share/kiln"];
    for name in below {
        assert!(home.join(name).is_dir(), "{name}");
    }
    let strange = tree(&home).into_iter().filter(|path| {
        !below
            .iter()
            .any(|own| path.starts_with(own) || Path::new(own).starts_with(path))
    });
    assert_eq!(strange.collect::<Vec<_>>(), [Path::new(".config/other")]);

    fs::write(
        home.join(".config/kiln/kiln.toml"),
        "[limits]\ncpus_max = 2\n",
    )
    .expect("write");
    as_user(&kiln, &home, &["uninstall"], &[])
        .exits(2)
        .says("nothing was removed");
    assert!(home.join(".config/kiln/kiln.toml").exists());
    let said = as_user(&kiln, &home, &["uninstall", "--yes", "--json"], &[]).exits(0);
    let removed: serde_json::Value = serde_json::from_str(&said.out).expect("JSON");
    assert_eq!(
        removed["removed"].as_array().map(Vec::len),
        Some(3),
        "{}",
        said.out
    );
    assert_eq!(
        removed["left"].as_array().map(Vec::len),
        Some(0),
        "{}",
        said.out
    );
    assert!(below.iter().all(|name| !home.join(name).exists()));
    assert!(home.join(".config/other").is_dir());
    as_user(&kiln, &home, &["uninstall", "--yes"], &[])
        .exits(0)
        .says("nothing to remove");

    let data = dir.path().join("elsewhere");
    as_user(&kiln, &home, &["doctor"], &[("XDG_DATA_HOME", &data)]).exits(3);
    assert!(data.join("kiln/version.json").exists() && !home.join(".local/share/kiln").exists());
    as_user(
        &kiln,
        &home,
        &["uninstall", "--yes"],
        &[("XDG_DATA_HOME", &data)],
    )
    .exits(0);
    assert_eq!(tree(&data), [] as [PathBuf; 0]);
}

#[test]
fn settings_with_unknown_keys_are_refused_with_their_line() {
    let dir = tempfile::tempdir().expect("temp dir");
    let Some(kiln) = below(dir.path()) else {
        return;
    };
    fs::create_dir_all(kiln.home.join("config")).expect("make");
    let file = kiln.home.join("config/kiln.toml");
    fs::write(&file, "[limits]\ncpus_max = 2\ncpu = 3\n").expect("write");
    let said = kiln.run(&["run", "--", "true"]).exits(2).says("line 3");
    assert!(
        said.err.contains("kiln.toml") && said.err.contains("`cpu`"),
        "{said:?}"
    );
    let doctor = kiln.run(&["doctor", "--json"]).exits(3).out;
    let settings = doctor
        .lines()
        .find(|line| line.contains("\"name\":\"settings\""));
    let settings = settings.expect("a check of the settings");
    assert!(
        settings.contains("\"level\":\"fail\"") && settings.contains("line 3"),
        "{settings}"
    );
}

#[test]
fn damaged_files_of_the_home_are_named_with_what_to_do() {
    let dir = tempfile::tempdir().expect("temp dir");
    let Some(kiln) = below(dir.path()) else {
        return;
    };
    kiln.run(&["registry", "list"]).exits(0);
    kiln.run(&["registry", "rm", "none"]).exits(2);
    let app = dir.path().join("app");
    fs::create_dir_all(&app).expect("make");
    fs::write(app.join("index.html"), "x").expect("write");
    fs::create_dir_all(kiln.home.join("config")).expect("make");
    for (name, verb, code) in [
        ("version.json", &["job", "list"][..], 2),
        ("bases.json", &["plan", path(&app)], 2),
        ("bases-pulled.json", &["plan", path(&app)], 2),
        ("config/registries.toml", &["plan", path(&app)], 2),
        ("config/kiln.toml", &["plan", path(&app)], 2),
        ("registry/VERSION", &["registry", "rm", "none"], 3),
    ] {
        let file = kiln.home.join(name);
        let kept = fs::read(&file).ok();
        fs::write(&file, "{\"torn").expect("write");
        let said = kiln.run(verb).exits(code).says(path(&file));
        let advised = said.err.contains("hint:") || said.err.contains("write those words");
        assert!(advised, "{name}: {}", said.err);
        match kept {
            Some(bytes) => fs::write(&file, bytes).expect("write"),
            None => fs::remove_file(&file).expect("remove"),
        }
    }
    // What can be made again is.
    for torn in ["", "0123"] {
        fs::write(kiln.home.join("registry/token"), torn).expect("write");
        kiln.run(&["registry", "rm", "none"])
            .exits(2)
            .says("no image");
    }
}

#[test]
fn too_few_file_descriptors_are_said_to_be_that() {
    let dir = tempfile::tempdir().expect("temp dir");
    let Some(kiln) = below(dir.path()) else {
        return;
    };
    let mut command = Command::new("sh");
    let words = format!("ulimit -n 32; exec {} run -- true", path(&kiln.program));
    command.args(["-c", &words]).env("KILN_HOME", &kiln.home);
    said(command).exits(3).says("ulimit -n");
}

#[test]
fn a_second_registry_says_who_serves() {
    let dir = tempfile::tempdir().expect("temp dir");
    let Some(kiln) = below(dir.path()) else {
        return;
    };
    let address = |port: u16| format!("127.0.0.1:{port}");
    let (first, second) = (address(free_port()), address(free_port()));
    let owner = kiln.start(&["registry", "serve", "--listen", &first]);
    let socket = kiln.home.join("registry/host.sock");
    until("the registry", || socket.exists().then_some(()));
    let mut waiting = kiln.start(&["registry", "serve", "--json", "--listen", &second]);
    let mut said = String::new();
    let out = waiting.child.stdout.take().expect("piped");
    BufReader::new(out).read_line(&mut said).expect("a line");
    let event: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(event["event"], "waiting", "{said}");
    assert_eq!(event["owner"], owner.child.id(), "{said}");
}

#[test]
fn what_another_kiln_wrote_is_neither_used_nor_changed() {
    let dir = tempfile::tempdir().expect("temp dir");
    let Some(kiln) = below(dir.path()) else {
        return;
    };
    fs::create_dir_all(&kiln.home).expect("make");
    let version = kiln.home.join("version.json");
    for (text, word) in [
        ("{\"layout\":99}", "newer"),
        ("{\"layout\":0}", "older"),
        ("?", "damaged"),
    ] {
        fs::write(&version, text).expect("write");
        for verb in [
            &["run", "--", "true"][..],
            &["build", "."],
            &["setup"],
            &["cache", "prune"],
            &["registry", "list"],
            &["job", "list"],
            &["template", "list"],
        ] {
            let said = kiln.run(verb).exits(2).says(word);
            assert!(said.err.contains("KILN_HOME"), "{said:?}");
        }
        kiln.run(&["doctor"]).exits(3);
        assert_eq!(fs::read_to_string(&version).expect("still there"), text);
    }
    assert_eq!(
        tree(&kiln.home)
            .iter()
            .filter(|path| path.ends_with("controller"))
            .count(),
        0
    );
}

#[test]
fn a_home_below_a_long_name_has_a_queue() {
    let dir = tempfile::tempdir().expect("temp dir");
    let Some(kiln) = below(&dir.path().join("d".repeat(120))) else {
        return;
    };
    kiln.run(&["queue", "list"]).exits(0);
    kiln.run(&["job", "list"]).exits(0).says("no jobs here");
}

#[test]
fn a_relative_kiln_home_is_refused() {
    let dir = tempfile::tempdir().expect("temp dir");
    let Some(kiln) = kiln() else { return };
    let relative = [("KILN_HOME", Path::new("here"))];
    as_user(&kiln, dir.path(), &["job", "list"], &relative)
        .exits(2)
        .says("absolute");
    assert_eq!(tree(dir.path()), [] as [PathBuf; 0]);
}
