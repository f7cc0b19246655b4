//! Names, merging, and the two files.

use std::path::Path;

use kiln_core::Digest;

use super::{Bases, BasesError, Pulled, PulledImage};

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

#[test]
fn images_of_other_registries_are_used_once_they_are_pulled() {
    let dir = tempfile::tempdir().expect("a folder");
    let (lock, conf) = (dir.path().join("bases.json"), dir.path().join("bases.toml"));
    let (index, image) = (Digest::of(b"index"), one("pulled"));
    let (build, run) = (Digest::of(b"build"), Digest::of(b"run"));
    let text = format!(
        "[[image]]\nname = \"alpine:3.20\"\nref = \"docker.io/library/alpine:3.20@{index}\"\n\n\
         [[base]]\nname = \"node\"\nversion = \"22\"\nbuild = \"r.example.org/b@{build}\"\nrun = \"r.example.org/r@{run}\"\n"
    );
    std::fs::write(&conf, text).expect("writes");
    let names = [
        "alpine:3.20".to_owned(),
        "docker.io/library/alpine:3.20".to_owned(),
        format!("alpine@{index}"),
        format!("docker.io/library/alpine:3.20@{index}"),
    ];
    let bases = Bases::load(&lock, &conf).expect("reads");
    for name in &names {
        assert_eq!(bases.resolve_from(name), None, "{name}");
        assert_eq!(bases.line_to_add(name), "kiln bases pull");
    }
    assert_eq!(bases.foreign().len(), 3);
    assert_eq!(bases.shared_images(), []);
    assert_eq!(
        bases.line_to_add("busybox"),
        "kiln bases add busybox && kiln bases pull"
    );

    let mut pulled = Pulled::default();
    for (from, image) in [
        (
            format!("docker.io/library/alpine:3.20@{index}"),
            image.clone(),
        ),
        (format!("r.example.org/b@{build}"), one("b")),
        (format!("r.example.org/r@{run}"), one("r")),
    ] {
        let (from, image) = (from.parse().expect("legal"), image.parse().expect("legal"));
        pulled.images.push(PulledImage {
            from,
            image,
            bytes: 1,
        });
    }
    let path = Pulled::path(&lock);
    pulled.save(&path).expect("writes");
    let bases = Bases::load(&lock, &conf).expect("reads");
    for name in names.iter().chain([&image]) {
        let found = bases.resolve_from(name).map(|found| found.to_string());
        assert_eq!(found.as_ref(), Some(&image), "{name}");
    }
    let node = bases.of_runtime("node").find(|base| base.version == "22");
    assert_eq!(node.expect("there").build.to_string(), one("b"));
    assert_eq!(bases.shared_images().len(), 3);
    let own = toml(&std::fs::read_to_string(&conf).expect("reads")).expect("legal");
    assert_eq!(
        own.foreign().len(),
        3,
        "what the operator wrote stays known"
    );

    std::fs::write(&path, "{\"schema\":2,\"images\":[]}").expect("writes");
    assert!(matches!(
        Bases::load(&lock, &conf),
        Err(BasesError::Invalid { .. })
    ));
}
