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
