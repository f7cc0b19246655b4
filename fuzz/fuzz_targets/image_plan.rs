//! Whole folders: manifests, lockfiles and configuration of every package manager. What is planned builds from pinned bases
//! alone, whatever the files say. The input is files one after another, each below a line `=== name`.
#![no_main]

use std::path::{Component, Path};

use kiln_core::Digest;
use kiln_image::bases::Bases;
use kiln_image::dockerfile::{PinOptions, pin};
use kiln_image::plan::{Options, RuntimeKind, plan, render};
use libfuzzer_sys::fuzz_target;

/// Most files of one folder.
const FILES_MAX: usize = 12;

fn bases() -> Bases {
    let mut bases = Bases::builtin();
    for base in &mut bases.bases {
        base.build.digest = Some(Digest::of(format!("{}-build", base.name).as_bytes()));
        base.run.digest = Some(Digest::of(format!("{}-run", base.name).as_bytes()));
    }
    bases
}

fn write(dir: &Path, name: &str, text: &[u8]) {
    let path = Path::new(name);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if name.is_empty() || name.len() > 100 || !plain {
        return;
    }
    let file = dir.join(path);
    // A name that is already a folder, or below a file, is left out.
    if std::fs::create_dir_all(file.parent().expect("inside")).is_ok() {
        let _left_out = std::fs::write(file, text);
    }
}

fuzz_target!(|input: &[u8]| {
    let memory = Path::new("/dev/shm");
    let dir = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    let dir = dir.expect("a folder");
    let text = String::from_utf8_lossy(input);
    for part in text.split("=== ").skip(1).take(FILES_MAX) {
        let (name, content) = part.split_once('\n').unwrap_or((part, ""));
        write(dir.path(), name, content.as_bytes());
    }
    let bases = bases();
    let found = match plan(dir.path(), &Options::default(), &bases) {
        Ok(found) => found,
        Err(error) => {
            // Everything a user reads of it can be said.
            let _said = (error.to_string(), error.hint(), error.class());
            return;
        }
    };
    let _shown = render(&found);
    let pinned = pin(&found.dockerfile, &PinOptions::default(), &bases).expect("stands its own check");
    assert_eq!(pinned.text, found.dockerfile);
    if found.runtime != RuntimeKind::Dockerfile {
        for used in &pinned.bases {
            assert!(found.bases.iter().any(|base| base.reference == used.reference), "{used:?}");
        }
        assert!(found.dockerfile.contains("\nUSER 10001:10001\n"));
    }
});
