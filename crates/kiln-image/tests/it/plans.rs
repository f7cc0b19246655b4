//! Golden plans: what is detected, and the exact Dockerfile.

use std::path::{Path, PathBuf};

use kiln_core::Digest;
use kiln_image::bases::Bases;
use kiln_image::dockerfile::{PinOptions, pin};
use kiln_image::plan::{Options, Plan, plan, render};

/// The built-in bases as a bake would leave them: digests, and Debian 13's versions.
pub(crate) fn baked() -> Bases {
    let mut bases = Bases::builtin();
    for base in &mut bases.bases {
        base.build.digest = Some(Digest::of(format!("{}-build", base.name).as_bytes()));
        base.run.digest = Some(Digest::of(format!("{}-run", base.name).as_bytes()));
        let tools: &[(&str, &str)] = match base.name.as_str() {
            "node" => &[
                ("node", "20.19.2"),
                ("npm", "9.2.0"),
                ("pnpm", "10.34.9"),
                ("yarn", "1.22.22"),
            ],
            _ => &[("python", "3.13.5")],
        };
        base.tools = tools
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
    }
    bases
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../examples")
        .join(name)
}

/// Plans a folder, checks that the Dockerfile stands the checks that user files go through, and compares the text.
fn golden(name: &str, dir: &Path) -> Plan {
    let bases = baked();
    let found = plan(dir, &Options::default(), &bases)
        .unwrap_or_else(|e| panic!("{name}: {e}: {:?}", e.hint()));
    assert_eq!(found.unbaked(), Vec::<&_>::new());
    let pinned = pin(&found.dockerfile, &PinOptions::default(), &bases).expect("pins");
    assert_eq!(
        pinned.text, found.dockerfile,
        "every image is a digest already"
    );
    for base in &pinned.bases {
        assert!(
            found.bases.iter().any(|b| b.reference == base.reference),
            "{base:?}"
        );
    }
    let mut settings = insta::Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_snapshot_path("../golden");
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, render(&found)));
    found
}

#[test]
fn examples() {
    for name in ["node-express", "python-flask"] {
        let found = golden(name, &example(name));
        assert!(found.hosts_named.is_empty(), "{:?}", found.hosts_named);
    }
}

#[test]
fn node_fixtures() {
    for name in [
        "yarn1",
        "berry",
        "pnpm",
        "pnpm-workspace",
        "npm-workspaces",
        "native",
        "postinstall",
        "vite",
    ] {
        let found = golden(name, &fixture(name));
        assert!(
            found.hosts_named.is_empty(),
            "{name}: {:?}",
            found.hosts_named
        );
        assert_eq!(found.lockfiles.len(), 1, "{name}");
    }
}

#[test]
fn python_fixtures() {
    for name in [
        "uv-fastapi",
        "uv-package",
        "poetry-flask",
        "pdm-flask",
        "pipenv-flask",
        "django",
        "script-packages",
    ] {
        let found = golden(name, &fixture(name));
        let hosts: Vec<_> = found.hosts_named.iter().map(|m| m.host.as_str()).collect();
        match name {
            "uv-fastapi" | "uv-package" => assert_eq!(hosts, ["index.invalid"], "{name}"),
            "pipenv-flask" => assert_eq!(hosts, ["index.invalid"; 2], "{name}"),
            _ => assert!(hosts.is_empty(), "{name}: {hosts:?}"),
        }
    }
}

#[test]
fn json_says_the_same() {
    let found = plan(&example("python-flask"), &Options::default(), &baked()).expect("plans");
    let json = serde_json::to_value(&found).expect("serialises");
    assert_eq!(json["schema"], 1);
    assert_eq!(json["runtime"], "python");
    assert_eq!(json["version"]["version"], "3.13");
    assert_eq!(json["start"]["line"], "gunicorn app:app");
    assert_eq!(json["start"]["why"]["file"], "app.py");
    assert_eq!(json["dockerfile"], found.dockerfile);
    assert_eq!(json["lockfiles"][0]["path"], "requirements.txt");
}

#[test]
fn a_plan_without_baked_bases_can_be_shown_but_says_so() {
    let found = plan(
        &example("node-express"),
        &Options::default(),
        &Bases::builtin(),
    )
    .expect("plans");
    assert_eq!(found.unbaked().len(), 2);
    assert!(render(&found).contains("not baked yet"));
}

/// What a source change may touch: the instructions in front of the first `COPY . .` must not name the source.
#[test]
fn dependencies_come_before_the_source() {
    for name in ["yarn1", "pnpm", "native", "npm-workspaces", "vite", "berry"] {
        let found = plan(&fixture(name), &Options::default(), &baked()).expect("plans");
        let source = found
            .dockerfile
            .find(" . .\n")
            .expect("the source is copied");
        for command in &found.install {
            let at = found
                .dockerfile
                .find(&command.line)
                .expect("stands in the Dockerfile");
            assert!(at < source, "{name}: {}", command.line);
        }
    }
}
