//! A secret whose value is another store's: named by the operator, fetched for the job, kept nowhere.

use crate::annex::Annex;
use crate::support::said;

const VALUE: &str = "Zq7-borrowed-5521-hush";
const SETTINGS: &str = r#"
[[controller.secret_stores]]
name = "host"
env = true
grants = { local = ["KILN_TEST_BORROWED", "KILN_TEST_NONE"], other = ["KILN_TEST_OTHERS"] }
"#;

#[test]
fn a_value_is_fetched_from_the_operators_store_and_kept_nowhere() {
    let Some(annex) = Annex::open_with(SETTINGS) else {
        return;
    };
    let run = |args: &[&str]| {
        let mut command = annex.command(args);
        command
            .env("KILN_TEST_BORROWED", VALUE)
            .env("KILN_TEST_OTHERS", VALUE);
        said(command)
    };
    run(&[
        "secret",
        "set",
        "TOKEN",
        "--from",
        "host:KILN_TEST_BORROWED",
    ])
    .exits(0);
    let listed = run(&["secret", "list", "--json"]).exits(0).out;
    assert!(
        listed.contains(r#""source":"host:KILN_TEST_BORROWED""#),
        "{listed}"
    );
    let given = [
        "run",
        "--no-source",
        "--secret",
        "TOKEN",
        "--",
        "sh",
        "-c",
        "printf %s \"$TOKEN\" | sha256sum",
    ];
    let given = run(&given).exits(0).out;
    let digest = kiln_core::Digest::of(VALUE.as_bytes()).hex();
    assert!(given.starts_with(&digest), "{given}");
    // Of another tenant, or nowhere: the same words.
    for source in ["host:KILN_TEST_OTHERS", "host:PATH", "vault:a"] {
        run(&["secret", "set", "OTHER", "--from", source])
            .exits(2)
            .says("the operator grants this tenant no");
    }
    // What is not there fails the job before its machine starts, and is written down.
    run(&["secret", "set", "NONE", "--from", "host:KILN_TEST_NONE"]).exits(0);
    run(&["run", "--no-source", "--secret", "NONE", "--", "true"])
        .exits(4)
        .says("KILN_TEST_NONE is not there");
    let log = run(&["secret", "access-log", "NONE", "--json"])
        .exits(0)
        .out;
    assert!(log.contains("source_missing"), "{log}");
    for entry in walk(&annex.home) {
        let bytes = std::fs::read(&entry).unwrap_or_default();
        let found = bytes
            .windows(VALUE.len())
            .any(|window| window == VALUE.as_bytes());
        assert!(!found, "{}", entry.display());
    }
    annex.is_clear();
}

/// Files of the home's own: what is baked is linked and holds nothing of a job.
fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let (mut open, mut files) = (vec![dir.to_owned()], Vec::new());
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).into_iter().flatten().flatten() {
            let kind = entry.file_type().expect("a type");
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    files
}
