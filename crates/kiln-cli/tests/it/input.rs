//! Bad input: a clear error, the right exit code, nothing started.

use crate::support::{app, kiln, path};

#[test]
fn folders_that_cannot_be_built_say_why() {
    let Some(kiln) = kiln() else { return };
    type Case<'a> = (&'a [(&'a str, &'a str)], i32, &'a str);
    let cases: &[Case<'_>] = &[
        (&[], 2, "empty"),
        (&[("notes.txt", "x")], 2, "hint"),
        (&[("package.json", "{ broken")], 2, "package.json"),
        (
            &[(
                "package.json",
                "{\"name\":\"a\",\"version\":\"1.0.0\",\"dependencies\":{\"x\":\"1\"}}",
            )],
            2,
            "lock",
        ),
        (&[("pyproject.toml", "[project\n")], 2, "pyproject.toml"),
        (
            &[("requirments.txt", "flask"), ("app.py", "x=1")],
            2,
            "requirements.txt",
        ),
        (&[("Dockerfile", "FRM x\n")], 2, "Dockerfile"),
        (
            &[("Dockerfile", "FROM nobody/knows:this\n")],
            4,
            "kiln bases add",
        ),
        (
            &[("Dockerfile", "# syntax=evil/frontend\nFROM python:3.13\n")],
            4,
            "frontend",
        ),
    ];
    for (files, code, text) in cases {
        let dir = app(files);
        let said = kiln.run(&["build", path(dir.path())]);
        assert_eq!(said.code, *code, "{files:?}\n{said:?}");
        assert!(
            said.err.to_lowercase().contains(&text.to_lowercase()),
            "{files:?} lacks {text:?}\n{}",
            said.err
        );
    }
}

#[test]
fn usage_errors_exit_2() {
    let Some(kiln) = kiln() else { return };
    for args in [
        &["build", "/no/such/folder"][..],
        &["build", "ftp://example.org/x"],
        &["build", ".", "--platform", "linux/arm64"],
        &["build", ".", "--memory", "1"],
        &["build", ".", "--secret", "id=x"],
        &["build", ".", "--build-arg", "A B=c"],
        &["build", ".", "--allow", "registry.kiln.internal"],
        &["plan", "/no/such/folder"],
        &["run"],
        &["run", "--image", "nobody/built-this"],
        &["run", "-p", "x:y", "--", "true"],
        &["nonsense"],
    ] {
        let said = kiln.run(args);
        assert_eq!(said.code, 2, "{args:?}\n{said:?}");
        assert!(!said.err.is_empty(), "{args:?}");
    }
}

#[test]
fn odd_file_names_work_and_non_utf8_ones_are_listed() {
    use std::os::unix::ffi::OsStrExt as _;
    let Some(kiln) = kiln() else { return };
    let long = format!("{}/f", vec!["d".repeat(200); 18].join("/"));
    let dir = app(&[
        (
            "Dockerfile",
            "FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\nCOPY . /all\nRUN [\"python3\", \"-c\", \"open('/all/new\\\\nline')\"]\n",
        ),
        ("new\nline", "x"),
        (&long, "y"),
    ]);
    kiln.build(dir.path(), "it-names", &[]);
    let bad = std::ffi::OsStr::from_bytes(b"caf\xe9");
    std::fs::write(dir.path().join(bad), "x").expect("write");
    kiln.run(&["build", path(dir.path())]).exits(2).says("caf");
}

#[test]
fn plan_needs_no_machine_and_is_json_when_asked() {
    let Some(kiln) = kiln() else { return };
    let dir = crate::support::root().join("examples/node-express");
    let said = kiln.run(&["plan", path(&dir), "--json"]).exits(0);
    let value: serde_json::Value = serde_json::from_str(&said.out).expect("JSON");
    assert_eq!(value["runtime"], "node");
    assert!(
        value["dockerfile"]
            .as_str()
            .is_some_and(|text| text.contains("FROM "))
    );
}
