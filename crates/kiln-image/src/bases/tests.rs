//! Names, merging, and the two files.

use std::path::Path;

use kiln_core::Digest;

use super::{Bases, BasesError};

fn toml(text: &str) -> Result<Bases, BasesError> {
    Bases::parse_toml(text, Path::new("bases.toml"))
}

fn one(what: &str) -> String {
    format!(
        "registry.kiln.internal/shared/x@{}",
        Digest::of(what.as_bytes())
    )
}

#[test]
fn the_operator_wins_over_the_bake_and_the_bake_over_the_builtin() {
    let dir = tempfile::tempdir().expect("a folder");
    let (lock, conf) = (
        dir.path().join("d/bases.lock.json"),
        dir.path().join("bases.toml"),
    );
    assert_eq!(
        Bases::load(&lock, &conf).expect("no files"),
        Bases::builtin()
    );
    let mut baked = Bases::builtin();
    for base in &mut baked.bases {
        base.build.digest = Some(Digest::of(b"b"));
        base.run.digest = Some(Digest::of(b"r"));
        base.tools.insert(base.name.clone(), "20.19.2".to_owned());
    }
    baked.save_generated(&lock).expect("writes");
    let loaded = Bases::load(&lock, &conf).expect("reads");
    assert_eq!(loaded, baked);
    let node = loaded
        .resolve_from("docker.io/library/node:20")
        .expect("known");
    assert_eq!(node.digest, Some(Digest::of(b"b")));
    let text = format!(
        "[[base]]\nname = \"node\"\nversion = \"22\"\nbuild = \"{}\"\nrun = \"{}\"\naliases = [\"node:20\", \"node\"]\n\n[[image]]\nname = \"golang:1.24\"\nref = \"{}\"\n",
        one("22b"),
        one("22r"),
        one("go"),
    );
    std::fs::write(&conf, text).expect("writes");
    let loaded = Bases::load(&lock, &conf).expect("reads");
    assert_eq!(loaded.bases.len(), 3);
    let named = |name: &str| loaded.resolve_from(name).map(|r| r.to_string());
    assert_eq!(named("node:20"), Some(one("22b")));
    assert_eq!(named("node:latest"), Some(one("22b")));
    assert_eq!(
        named("index.docker.io/library/golang:1.24"),
        Some(one("go"))
    );
    assert_eq!(named(&one("go")), Some(one("go")));
    let digest = Digest::of(b"go");
    assert_eq!(named(&format!("golang:1.24@{digest}")), Some(one("go")));
    let other = Digest::of(b"other");
    assert_eq!(named(&format!("golang:1.24@{other}")), None);
    assert_eq!(named("golang"), None);
    assert_eq!(named("ghcr.example/library/node:20"), None);
}

#[test]
fn wrong_files_name_the_line() {
    let line = |text: &str| match toml(text) {
        Err(BasesError::Invalid { line, .. }) => line,
        other => panic!("{text}: {other:?}"),
    };
    assert_eq!(line("schema = 1\nbsae = 1\n"), 2);
    assert_eq!(line("[[image]]\nname = \"a\"\nref = \"b:1\"\n"), 3);
    assert_eq!(line("\nschema = 9\n"), 2);
    let json = Bases::parse_json("{\n\"x\": 1}", Path::new("l"));
    assert!(matches!(json, Err(BasesError::Invalid { line: 2, .. })));
}

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("bases.toml");
    let text = format!(
        "[[image]]\nname = \"golang:1.24\"\nref = \"{}\"\n",
        one("go")
    );
    let bases = toml(&text).expect("legal");
    bases.save_operator(&path).expect("writes");
    let again = toml(&std::fs::read_to_string(&path).expect("reads")).expect("legal");
    assert_eq!(again, bases);
    assert_eq!(std::fs::read_dir(dir.path()).expect("lists").count(), 1);
}
