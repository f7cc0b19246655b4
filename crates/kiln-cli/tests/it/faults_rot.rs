//! Files that changed since they were written, as a failing disk leaves them: found, rebuilt or refused, never used.

use std::fs;
use std::path::{Path, PathBuf};

use crate::annex::{Annex, copy, rot};
use crate::support::{Kiln, app, path};

/// The only file of this name below a folder, or the largest of several.
fn find(dir: &Path, name: &str) -> PathBuf {
    let mut found = Vec::new();
    collect(dir, name, &mut found);
    found.sort();
    found
        .pop()
        .unwrap_or_else(|| panic!("no {name} below {}", dir.display()))
        .1
}

fn collect(dir: &Path, name: &str, found: &mut Vec<(u64, PathBuf)>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, name, found);
        } else if entry.file_name() == name {
            found.push((entry.metadata().map_or(0, |meta| meta.len()), path));
        }
    }
}

/// An image that says it lives, on the Python base.
fn build_alive(kiln: &Kiln, tag: &str, more: &[&str]) -> serde_json::Value {
    let text = "FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\nRUN echo it lives > /alive\nCMD [\"cat\", \"/alive\"]\n";
    let dir = app(&[("Dockerfile", text)]);
    kiln.build(dir.path(), tag, more)
}

fn lives(kiln: &Kiln, tag: &str) {
    let said = kiln.run(&["run", "--image", tag]).exits(0);
    assert_eq!(said.out, "it lives\n", "{said:?}");
}

/// Where the registry keeps a blob.
fn blob(registry: &Path, digest: &str) -> PathBuf {
    let hex = digest.strip_prefix("sha256:").expect("a digest");
    registry.join("blobs/sha256").join(&hex[..2]).join(hex)
}

#[test]
fn a_corrupt_machine_image_is_refused() {
    let Some(mut annex) = Annex::open() else {
        return;
    };
    annex.own("images");
    for name in ["initrd", "root.img"] {
        let file = annex.image().join(name);
        rot(&file);
        annex
            .run(&["run", "--", "true"])
            .exits(3)
            .says("is damaged")
            .says(name)
            .says("kiln machine-image bake");
        // The same byte again: whole.
        rot(&file);
    }
    annex.give_back("images");
    annex.is_well();
}

#[test]
fn a_corrupt_template_is_removed_and_made_again() {
    let Some(mut annex) = Annex::open() else {
        return;
    };
    let template = annex.own_run_template();
    let made = || {
        let text = fs::read(template.join("meta.json")).expect("meta");
        let meta: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        meta["created_unix_ms"].clone()
    };
    annex.run(&["run", "--", "true"]).exits(0);
    let before = made();
    rot(&template.join("ram"));
    let said = annex.run(&["run", "--", "echo", "well"]).exits(0);
    assert_eq!(said.out, "well\n");
    said.says("the old one was damaged and is made again");
    assert_ne!(made(), before);
    annex.is_well();
}

#[test]
fn a_corrupt_cache_head_is_left_behind_and_a_corrupt_shared_one_refused() {
    let Some(mut annex) = Annex::open() else {
        return;
    };
    let heads = annex.own_heads();
    let first = build_alive(&annex, "it-rot-head", &[]);
    assert!(first["head"][1].is_string(), "it committed: {first}");
    let own = fs::read_to_string(heads.join("local/HEAD")).expect("a head");
    rot(&heads.join("local").join(own.trim()).join("disk"));
    let text = "FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\nRUN echo two\n";
    let dir = app(&[("Dockerfile", text)]);
    let said = annex
        .run(&["build", path(dir.path()), "--tag", "it-rot-head"])
        .exits(0)
        .says("the build cache was damaged and is left behind");
    let next = fs::read_to_string(heads.join("local/HEAD"));
    assert!(next.is_ok_and(|next| next != own), "{said:?}");
    let shared = fs::read_link(heads.join("shared")).expect("a link");
    fs::remove_file(heads.join("shared")).expect("unlink");
    copy(&shared, &heads.join("shared"));
    let id = fs::read_to_string(heads.join("shared/HEAD")).expect("a head");
    rot(&heads.join("shared").join(id.trim()).join("disk"));
    let args = [
        "build",
        path(dir.path()),
        "--tag",
        "it-rot-head",
        "--no-cache",
    ];
    annex
        .run(&args)
        .exits(3)
        .says("does not match its record")
        .says("kiln bases bake");
    annex.run(&args).exits(3).says("kiln setup");
    annex.is_well();
}

#[test]
fn corrupt_blobs_and_disks_are_refused_or_made_again_and_a_scrub_finds_everything() {
    let Some(mut annex) = Annex::open() else {
        return;
    };
    let registry = annex.own("registry");
    let built = build_alive(&annex, "it-rot-blob", &["--no-cache"]);
    lives(&annex, "it-rot-blob");
    let unpacked = annex.home.join("unpacked");
    let disk = find(&unpacked, "disk");
    rot(&disk);
    let wrong = fs::read(&disk).expect("disk");
    lives(&annex, "it-rot-blob");
    let disk = find(&unpacked, "disk");
    assert!(fs::read(&disk).expect("disk") != wrong, "unpacked again");
    fs::remove_dir_all(&unpacked).expect("remove");
    let layers = built["layers"].as_array().expect("layers");
    let layer = layers.last().and_then(|layer| layer[0].as_str());
    let layer = layer.expect("a layer");
    rot(&blob(&registry, layer));
    annex
        .run(&["run", "--image", "it-rot-blob"])
        .exits(3)
        .says(layer);
    assert!(!blob(&registry, layer).exists(), "set aside");
    // What is unchanged is not taken for whole: it is built, and its blob pushed, again.
    let built = build_alive(&annex, "it-rot-blob", &[]);
    lives(&annex, "it-rot-blob");
    let layers = built["layers"].as_array().expect("layers");
    let layer = layers.last().and_then(|layer| layer[0].as_str());
    scrub_finds_everything(&mut annex, &blob(&registry, layer.expect("a layer")));
    annex.is_well();
}

/// Damages one of each in a home that has all of them.
fn scrub_finds_everything(annex: &mut Annex, blob: &Path) {
    let template = annex.own_run_template();
    let heads = annex.own_heads();
    annex.own("images");
    let own = fs::read_to_string(heads.join("local/HEAD")).expect("a head");
    rot(&annex.image().join("initrd"));
    rot(&heads.join("local").join(own.trim()).join("disk"));
    rot(&template.join("ram"));
    rot(&find(&annex.home.join("unpacked"), "disk"));
    rot(blob);
    let queue = annex.home.join("controller/kiln.db");
    let kept = fs::read(&queue).expect("a database");
    fs::write(&queue, "no database").expect("write");
    let said = annex.run(&["doctor", "--scrub"]).exits(3);
    fs::write(&queue, kept).expect("write");
    for what in [
        "images",
        "heads",
        "templates",
        "unpacked",
        "registry",
        "jobs",
    ] {
        let start = format!("FAIL  scrub-{what} ");
        let found = said.out.lines().any(|line| line.starts_with(&start));
        assert!(found, "{what}\n{}", said.out);
    }
    // What was found is used by nobody, though it was in order when it was last used in this boot.
    annex
        .run(&["run", "--", "true"])
        .exits(3)
        .says("is damaged");
    annex.give_back("images");
    annex.give_back("templates");
}

#[test]
fn small_files_of_the_home_that_are_damaged_are_named_or_made_again() {
    let Some(annex) = Annex::open() else { return };
    annex.run(&["run", "--", "true"]).exits(0);
    // What can be found out again is.
    fs::write(annex.home.join("probe.json"), "{\"damaged").expect("write");
    annex.run(&["run", "--", "true"]).exits(0);
    let dir = app(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
    for name in ["version.json", "bases.json", "config/registries.toml"] {
        let file = annex.home.join(name);
        let kept = fs::read(&file).expect("file");
        fs::write(&file, "{\"damaged").expect("write");
        let plain = name.rsplit('/').next().expect("a name");
        annex.run(&["build", path(dir.path())]).exits(2).says(plain);
        fs::write(&file, kept).expect("write");
    }
    annex.is_well();
}
