//! The user's own tools with built images: skopeo at kiln's registry, Podman behind `--load`.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::annex::Annex;
use crate::support::{app, free_port, kiln, path, said, until};

/// Places for credentials and images that nobody else uses.
fn at_home(command: &mut Command, home: &Path) {
    command
        .env("HOME", home)
        .env("DOCKER_CONFIG", home.join("docker"))
        .env("REGISTRY_AUTH_FILE", home.join("auth.json"))
        .env("XDG_RUNTIME_DIR", home)
        .env("CONTAINERS_STORAGE_CONF", home.join("storage.conf"))
        // Docker's client, where there is one, has no daemon to talk to.
        .env("DOCKER_HOST", "unix:///nowhere/docker.sock");
}

fn tool(home: &Path, program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    at_home(command.args(args), home);
    command.output().expect(program)
}

#[track_caller]
fn works(output: Output) -> Vec<u8> {
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    output.stdout
}

/// Whether a tool is here. Missing, it is said; where tools are required, it fails.
#[expect(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "the test command talks to tests this way"
)]
fn is_here(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    assert!(
        found || std::env::var_os("KILN_TEST_REQUIRE_TOOLS").is_none(),
        "{program} is required and not installed"
    );
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}

#[test]
fn skopeo_reads_built_images_from_the_registry() {
    let Some(mut kiln) = Annex::open() else {
        return;
    };
    if !is_here("skopeo") {
        return;
    }
    // The registry's door is open while `registry serve` owns the store: no other build holds it meanwhile.
    kiln.own_registry();
    let dir = app(&[
        (
            "Dockerfile",
            "FROM registry.kiln.internal/shared/python:3.13-run\nCOPY words /words\nLABEL a=b\nCMD [\"cat\", \"/words\"]\n",
        ),
        ("words", "hello\n"),
    ]);
    let built = kiln.build(dir.path(), "it-skopeo:1.0", &[]);
    let digest = built["digest"].as_str().expect("a digest");
    let home = tempfile::tempdir().expect("temp dir");
    let address = format!("127.0.0.1:{}", free_port());
    let source = format!("docker://{address}/t/local/it-skopeo:1.0");
    let inspect = ["inspect", "--tls-verify=false", &source];
    let mut serving = kiln.start(&["registry", "serve", "--listen", &address]);
    // The door answers as soon as it is open, and to nobody without a token.
    let refused = until("the registry to be served", || {
        if let Ok(Some(status)) = serving.child.try_wait() {
            panic!("kiln registry serve ended: {status}");
        }
        let output = tool(home.path(), "skopeo", &inspect);
        assert!(!output.status.success(), "read without a token");
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        // It tries three ways one after another: a door that opens in between is met by the last, oldest one alone.
        let too_early = words.contains("connection refused") || words.contains("V1 container");
        (!too_early).then_some(words)
    });
    assert!(
        refused.contains("uthenti") || refused.contains("unauthorized"),
        "{refused}"
    );
    let login = |verb: &[&str]| {
        let mut command = kiln.command(verb);
        at_home(&mut command, home.path());
        said(command).exits(0)
    };
    let said = login(&["registry", "login", "--address", &address]);
    assert!(said.out.contains("wrote the token"), "{said:?}");

    let told: Value =
        serde_json::from_slice(&works(tool(home.path(), "skopeo", &inspect))).expect("JSON");
    assert_eq!(
        (&told["Digest"], &told["Labels"]["a"]),
        (&digest.into(), &"b".into()),
        "{told}"
    );
    let layers = told["Layers"].as_array().map(Vec::len);
    assert_eq!(layers, built["layers"].as_array().map(Vec::len));
    let copy = home.path().join("copy");
    let target = format!("oci:{}:1.0", path(&copy));
    let args = [
        "copy",
        "--src-tls-verify=false",
        "--preserve-digests",
        &source,
        &target,
    ];
    works(tool(home.path(), "skopeo", &args));
    let read = works(tool(home.path(), "skopeo", &["inspect", &target]));
    let read: Value = serde_json::from_slice(&read).expect("JSON");
    assert_eq!(read["Digest"], digest, "every byte came over");

    login(&["registry", "logout"]);
    let again = tool(home.path(), "skopeo", &inspect);
    assert!(!again.status.success(), "the token is gone");
    serving.signal("INT");
    let _ended = serving.child.wait();
}

#[test]
fn a_built_image_is_loaded_into_podman() {
    let Some(kiln) = kiln() else { return };
    if !is_here("podman") {
        return;
    }
    let home = tempfile::tempdir().expect("temp dir");
    let storage = format!(
        "[storage]\ndriver = \"vfs\"\ngraphroot = {:?}\nrunroot = {:?}\n",
        home.path().join("graph"),
        home.path().join("run")
    );
    std::fs::write(home.path().join("storage.conf"), storage).expect("write");
    let dir = app(&[
        (
            "Dockerfile",
            "FROM scratch\nCOPY words /words\nUSER 1234\nENV A=b\nCMD [\"/words\"]\n",
        ),
        ("words", "hello\n"),
    ]);
    let build = |more: &[&str], engines: &str| {
        let mut args = vec!["build", path(dir.path()), "--tag", "it-load:1.0"];
        args.extend(more);
        let mut command = kiln.command(&args);
        at_home(&mut command, home.path());
        command.env("PATH", engines);
        said(command)
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "kiln finds podman as the user's shell would"
    )]
    let here = std::env::var("PATH").expect("PATH");
    build(&["--load"], &here)
        .exits(0)
        .says("loaded it-load:1.0 into podman");

    let shown = works(tool(
        home.path(),
        "podman",
        &["image", "inspect", "localhost/it-load:1.0"],
    ));
    let shown: Value = serde_json::from_slice(&shown).expect("JSON");
    let config = &shown[0]["Config"];
    assert_eq!(
        (&config["User"], &config["Cmd"][0]),
        (&"1234".into(), &"/words".into()),
        "{shown}"
    );
    let saved = home.path().join("saved.tar");
    let args = [
        "save",
        "--format",
        "oci-archive",
        "--output",
        path(&saved),
        "localhost/it-load:1.0",
    ];
    works(tool(home.path(), "podman", &args));
    let size = std::fs::metadata(&saved).expect("the archive").len();
    assert!(size > 0);
}
