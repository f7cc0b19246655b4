//! The files beside this one: legal ones and their canonical forms, illegal ones and their messages.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_policy::{Format, compile, json_schema};

fn files(folder: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/it")
        .join(folder);
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .expect("folder")
        .map(|entry| entry.expect("entry").path())
        .collect();
    files.sort();
    assert!(files.len() > 4);
    files
}

fn read(path: &Path) -> (Format, String, String) {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .expect("name")
        .to_owned();
    (
        Format::of_name(&name),
        name,
        fs::read_to_string(path).expect("text"),
    )
}

#[test]
fn legal_files_and_what_they_mean() {
    let mut all = String::new();
    for path in files("good") {
        let (format, name, text) = read(&path);
        let compiled = compile(format, &name, &text).unwrap_or_else(|wrong| panic!("{wrong}"));
        all.push_str(&format!(
            "{name}\n{}\n{}\n\n",
            compiled.hash(),
            compiled.policy().canonical()
        ));
    }
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("canonical", all);
    });
}

#[test]
fn illegal_files_and_how_they_are_refused() {
    let mut all = String::new();
    for path in files("bad") {
        let (format, name, text) = read(&path);
        let wrong = compile(format, &name, &text).expect_err(&name);
        all.push_str(&format!("{wrong}\n---------- \n"));
    }
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("errors", all);
    });
}

#[test]
fn the_same_meaning_has_the_same_hash() {
    let hash = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/it/good")
            .join(name);
        let (format, name, text) = read(&path);
        compile(format, &name, &text).expect("legal").hash()
    };
    assert_eq!(hash("whole.yaml"), hash("whole-again.yaml"));
    assert_ne!(hash("whole.yaml"), hash("plain.yaml"));
    assert_eq!(hash("no-source.yaml"), hash("no-repository.cleanroom.yaml"));
}

#[test]
#[expect(
    clippy::disallowed_methods,
    reason = "asked to write instead of to compare"
)]
fn the_committed_schemas_are_those_of_the_types() {
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference");
    for (format, name) in [
        (Format::Kiln, "kiln.schema.json"),
        (Format::Cleanroom, "cleanroom.schema.json"),
    ] {
        let mut text = serde_json::to_string_pretty(&json_schema(format)).expect("json");
        text.push('\n');
        let path = reference.join(name);
        if std::env::var_os("KILN_WRITE_SCHEMAS").is_some() {
            fs::write(&path, &text).expect("written");
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == text,
            "{name} is not current: run this test with KILN_WRITE_SCHEMAS=1"
        );
    }
}
