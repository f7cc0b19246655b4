//! Splits small trees and looks at what came out.

use super::*;

#[test]
fn versions_of_debian_become_those_people_know() {
    assert_eq!(upstream_version("20.19.2+dfsg-1+deb13u2"), "20.19.2");
    assert_eq!(upstream_version("3.13.5-1"), "3.13.5");
    assert_eq!(upstream_version("1:2.3~rc1"), "2.3");
}

/// A root with a runtime, a library of it, a compiler and a package manager.
fn sample() -> (Tree, Packages) {
    let database = "Package: base\nStatus: install ok installed\nVersion: 1\nArchitecture: amd64\n\n\
        Package: nodejs\nStatus: install ok installed\nVersion: 20.1.0-1\nArchitecture: amd64\n\
        Depends: base, lib, dpkg\n\nPackage: lib\nStatus: install ok installed\nVersion: 1\nArchitecture: amd64\n\n\
        Package: dpkg\nStatus: install ok installed\nVersion: 1\nArchitecture: amd64\n\n\
        Package: gcc\nStatus: install ok installed\nVersion: 1\nArchitecture: amd64\n\n";
    let mut tree = Tree::default();
    for (package, file) in [
        ("base", "bin/sh"),
        ("nodejs", "usr/bin/node"),
        ("lib", "usr/lib/lib.so"),
        ("dpkg", "usr/bin/dpkg"),
        ("gcc", "usr/bin/gcc"),
    ] {
        tree.insert(file, Node::text(package));
        let list = format!("var/lib/dpkg/info/{package}.list");
        tree.insert(&list, Node::text(&format!("/.\n/usr\n/{file}\n")));
    }
    tree.insert("var/lib/dpkg/status", Node::text(database));
    tree.insert("etc/passwd", Node::text("root:x:0:0:root:/root:/bin/sh\n"));
    (tree, Packages::parse(database))
}

fn recipe() -> BasesRecipe {
    let mut recipe = RecipeFiles::built_in().bases().expect("a recipe");
    recipe.common.packages = vec!["base".to_owned()];
    recipe.common.extra = vec!["etc/passwd".to_owned()];
    recipe.build.npm.clear();
    recipe.runtimes.truncate(1);
    recipe.runtimes[0].tools.clear();
    recipe
}

fn paths(work: &Path, layer: &LayerBlob) -> Vec<String> {
    let file = fs::File::open(work.join(&layer.name)).expect("the layer is there");
    let reader: Box<dyn std::io::Read> = match layer.name.as_str() {
        BUILD => Box::new(file),
        _ => Box::new(flate2::read::GzDecoder::new(file)),
    };
    let mut archive = tar::Archive::new(reader);
    let entries = archive
        .entries()
        .expect("a tar")
        .map(|entry| entry.expect("readable"));
    let files = entries.filter(|entry| !entry.header().entry_type().is_dir());
    files
        .map(|entry| entry.path().expect("a path").to_string_lossy().into_owned())
        .collect()
}

#[test]
fn layers_split_as_the_recipe_says_and_no_run_image_has_a_package_manager() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (tree, packages) = sample();
    let recipe = recipe();
    let apt = HostApt::default();
    let tree = complete(&recipe, tree, dir.path(), &apt).expect("it completes");
    let made =
        write_images(&recipe, Digest::of(b""), tree, &packages, dir.path()).expect("written");
    let base = &made.bases[0];
    assert_eq!(
        (base.version.as_str(), base.run.tag.as_str()),
        ("20", "20-run")
    );
    assert_eq!(base.aliases[0], "node:20");
    let [common, node] = &base.run.layers[..] else {
        panic!("two layers")
    };
    assert_eq!(
        paths(dir.path(), common),
        ["bin/sh", "etc/passwd", "var/lib/dpkg/status.d/base"]
    );
    let status = |name| format!("var/lib/dpkg/status.d/{name}");
    let expected = [
        "usr/bin/node",
        "usr/lib/lib.so",
        &status("lib"),
        &status("nodejs"),
    ];
    assert_eq!(paths(dir.path(), node), expected);
    assert_eq!(base.build.layers[..2], base.run.layers[..]);
    let build = paths(dir.path(), &base.build.layers[2]);
    assert!(
        build.contains(&"usr/bin/gcc".to_owned()) && build.contains(&"usr/bin/dpkg".to_owned())
    );
    assert!(
        !build.contains(&"usr/bin/node".to_owned()),
        "no file is in two layers"
    );
    let config: serde_json::Value = serde_json::from_str(&base.run.config).expect("JSON");
    assert_eq!(config["config"]["User"], "10001:10001");
}

#[test]
fn names_of_bases_carry_the_digests_that_were_made() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (tree, packages) = sample();
    let made =
        write_images(&recipe(), Digest::of(b""), tree, &packages, dir.path()).expect("written");
    let bases = made.to_bases();
    let found = bases.resolve_from("node:20").expect("it has a digest");
    assert_eq!(found.digest, Some(made.bases[0].build.digest));
}

#[test]
fn the_user_has_the_names_that_public_dockerfiles_use() {
    let recipe = RecipeFiles::built_in().bases().expect("a recipe");
    let [passwd, group, ..] = recipe.user.accounts();
    assert_eq!(passwd.0, "etc/passwd");
    for name in ["app", "node"] {
        let line = format!("{name}:x:10001:10001::/home/app:/bin/sh\n");
        assert!(passwd.1.contains(&line), "{}", passwd.1);
        assert!(
            group.1.contains(&format!("{name}:x:10001:\n")),
            "{}",
            group.1
        );
    }
}

#[test]
fn python_has_the_layout_of_the_public_images() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut recipe = RecipeFiles::built_in().bases().expect("a recipe");
    recipe.build.npm.clear();
    let (tree, _) = sample();
    let tree = complete(&recipe, tree, dir.path(), &HostApt::default()).expect("it completes");
    let python = tree.get("usr/local/bin/python3").expect("a link");
    assert!(matches!(&python.body, Body::Symlink(target) if target == "/usr/bin/python3.13"));
    let pip = tree.get("usr/local/bin/pip").expect("a program");
    let text = tree.content("usr/local/bin/pip").expect("a file").bytes();
    assert_eq!(pip.mode, 0o755);
    assert!(
        text.expect("text")
            .starts_with(b"#!/usr/local/bin/python3\n")
    );
    // What the run image needs of it is in the runtime's layer, pip is not.
    let extra = patterns(&recipe.runtimes[1].extra).expect("patterns");
    for (path, runs) in [
        ("usr/local/pyvenv.cfg", true),
        ("usr/local/bin/python3.13", true),
        ("usr/local/bin/pip", false),
    ] {
        assert_eq!(extra.is_match(path), runs, "{path}");
    }
}
