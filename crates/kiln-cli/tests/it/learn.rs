//! Learning on a real machine and a real install: what it reached is written, and the same command passes under it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::annex::Annex;
use crate::support::{Said, app, kiln, said};

fn within(annex: &Annex, dir: &Path, args: &[&str]) -> Said {
    let mut command = annex.command(args);
    command.current_dir(dir);
    said(command)
}

/// Where this host's Python packages come from.
fn index(annex: &Annex) -> String {
    let text = fs::read_to_string(annex.home.join("config/registries.toml")).expect("registries");
    let settings: toml::Table = text.parse().expect("toml");
    let index = settings["runtime"]["python"]["index"].as_str();
    index.expect("an index").to_owned()
}

#[test]
fn what_an_install_reached_is_written_and_then_enforced() {
    let Some(annex) = Annex::open() else { return };
    let there = kiln().expect("a home").home.join("unpacked");
    fs::create_dir_all(&there).expect("folder");
    let own = annex.home.join("unpacked");
    let _nothing_unpacked = fs::remove_dir_all(&own);
    symlink(there, &own).expect("link");
    let policy = "version: 1\n# the base of this host\nimage: python\n";
    let dir = app(&[("kiln.yaml", policy)]);
    let file = || fs::read_to_string(dir.path().join("kiln.yaml")).expect("policy");
    let here = |args: &[&str]| within(&annex, dir.path(), args);
    let install = format!(
        "pip install -q --no-cache-dir --target /tmp/x --index-url {} six==1.16.0 && ls /tmp/x",
        index(&annex)
    );
    let install = ["--", "sh", "-c", &install];
    let learn = |more: &[&str]| {
        let verb = ["policy", "learn"];
        here(&[&verb[..], more, &install[..]].concat())
    };

    // Only an operator opens a machine, and never one with a secret in it.
    learn(&[]).exits(4);
    fs::write(
        annex.home.join("config/policy.toml"),
        "[tenant.local]\nlearn = true\n",
    )
    .expect("grant");
    let secret = learn(&["--secret", "token"]).exits(4);
    assert!(secret.err.contains("secrets"), "{secret:?}");
    // Nobody is there to agree.
    learn(&["--write"]).exits(2);
    // What fails has not shown all that it needs.
    let fails = ["policy", "learn", "--write", "--yes", "--", "false"];
    here(&fails).exits(1);
    assert_eq!(file(), policy);

    // A folder without a policy gets one.
    let bare = app(&[("x", "")]);
    let first = ["policy", "learn", "--write", "--yes", "--", "true"];
    within(&annex, bare.path(), &first).exits(0);
    within(&annex, bare.path(), &["policy", "check"]).exits(0);

    let learned = learn(&["--write", "--yes"]).exits(0);
    assert!(learned.out.contains("six.py"), "{learned:?}");
    let written = file();
    assert!(written.starts_with(policy), "{written}");
    assert!(
        written.contains(":443/tls\"") || written.contains(":80/http\""),
        "{written}"
    );
    here(&["policy", "check"]).exits(0);

    let mut run = vec!["run"];
    run.extend(install);
    let enforced = here(&run).exits(0);
    assert!(enforced.out.contains("six.py"), "{enforced:?}");
    // And it holds: another name is not even known.
    let other = here(&["run", "--", "getent", "hosts", "other.example.org"]).exits(2);
    assert!(other.err.contains("other.example.org"), "{other:?}");
}
