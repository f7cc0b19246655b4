//! `kiln build --push`: to Debian's docker-registry with a password that docker's own configuration holds; and what lies there
//! as a base: `kiln bases add|pull`.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::support::{Kiln, app, kiln, path, said};

/// bcrypt of `s3cret pass` for the user `ann`.
const HTPASSWD: &str = "ann:$2y$04$t7qJCqxbH07rkQpyu1CVou6dzm1dJTC.aAMRNeHIvO//KyZbFY5gO\n";
/// base64 of `ann:s3cret pass`.
const LOGIN: &str = "YW5uOnMzY3JldCBwYXNz";

struct Registry {
    child: Child,
    address: String,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn registry(dir: &Path) -> Option<Registry> {
    std::fs::write(dir.join("htpasswd"), HTPASSWD).expect("write");
    let config = serde_json::json!({
        "version": "0.1",
        "log": {"level": "info", "formatter": "json"},
        "storage": {"filesystem": {"rootdirectory": dir.join("storage")}},
        "auth": {"htpasswd": {"realm": "test", "path": dir.join("htpasswd")}},
        "http": {"addr": "127.0.0.1:0", "secret": "test"},
    });
    std::fs::write(dir.join("config.yml"), config.to_string()).expect("write");
    let started = Command::new("docker-registry")
        .arg("serve")
        .arg(dir.join("config.yml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = started else {
        eprintln!("skipped: docker-registry is not installed");
        return None;
    };
    let mut lines = BufReader::new(child.stderr.take().expect("pipe"))
        .lines()
        .map_while(Result::ok);
    let line = lines.find_map(|line| {
        line.split_once("listening on ")
            .map(|(_, rest)| rest.to_owned())
    });
    let line = line.expect("it listens");
    let address = line[..line.find([',', '"', ' ']).unwrap_or(line.len())].to_owned();
    // Its log must not fill the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    Some(Registry { child, address })
}

#[test]
fn an_image_is_pushed_with_dockers_login() {
    let Some(kiln) = kiln() else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    let Some(registry) = registry(dir.path()) else {
        return;
    };
    let source = app(&[
        (
            "Dockerfile",
            "FROM registry.kiln.internal/shared/node:20-run\nCOPY words /words\n",
        ),
        ("words", "hello\n"),
    ]);
    let target = format!("{}/team/app:1.0", registry.address);
    let build = |config: &Path| {
        let mut command = kiln.command(&[
            "build",
            path(source.path()),
            "--tag",
            "it-push",
            "--push",
            &target,
        ]);
        command
            .env("DOCKER_CONFIG", config)
            .env_remove("REGISTRY_AUTH_FILE");
        said(command)
    };
    let tag = dir
        .path()
        .join("storage/docker/registry/v2/repositories/team/app/_manifests/tags/1.0/current/link");

    let empty = tempfile::tempdir().expect("temp dir");
    let refused = build(empty.path()).exits(2);
    refused.says("wants a login").says("docker login");
    assert!(!tag.exists());

    let config = serde_json::json!({"auths": {registry.address.clone(): {"auth": LOGIN}}});
    std::fs::write(empty.path().join("config.json"), config.to_string()).expect("write");
    let pushed = build(empty.path()).exits(0);
    let digest = std::fs::read_to_string(&tag).expect("the tag");
    assert!(
        pushed.out.contains(&format!("pushed {target}")) && pushed.out.contains(&digest),
        "{pushed:?}"
    );
    assert!(
        !pushed.out.contains("s3cret")
            && !pushed.err.contains("s3cret")
            && !pushed.err.contains(LOGIN)
    );
    stands_on_it(&kiln, &target, digest.trim(), empty.path());
}

/// The image that was pushed, as the base of another, pinned by the digest its tag has.
fn stands_on_it(kiln: &Kiln, pushed: &str, digest: &str, logins: &Path) {
    const NAME: &str = "it-foreign:1";
    let bases = |args: &[&str], logins: &Path| {
        let mut command = kiln.command(&[&["bases"], args].concat());
        command
            .env("DOCKER_CONFIG", logins)
            .env_remove("REGISTRY_AUTH_FILE");
        said(command)
    };
    let source = app(&[
        ("Dockerfile", "FROM it-foreign:1\nCOPY more /more\n"),
        ("more", "words\n"),
    ]);
    let build = || kiln.run(&["build", path(source.path()), "--tag", "it-on-foreign"]);
    build().exits(4).says("kiln bases add it-foreign:1");
    let nobody = tempfile::tempdir().expect("temp dir");
    bases(&["add", NAME, pushed], nobody.path())
        .exits(2)
        .says("wants a login");
    bases(&["add", NAME, pushed], logins).exits(0);
    build().exits(4).says("kiln bases pull");
    let listed = bases(&["list", "--json"], logins).exits(0);
    let line = listed.out.lines().find(|line| line.contains(NAME));
    let line = line.expect("listed");
    assert!(
        line.contains(digest) && line.contains("\"ready\":false"),
        "{line}"
    );
    bases(&["pull"], nobody.path())
        .exits(2)
        .says("wants a login");
    bases(&["pull"], logins).exits(0);
    build().exits(0);
    // A digest that the registry does not have.
    let wrong = format!("{}@sha256:{}", pushed.replace(":1.0", ""), "5".repeat(64));
    bases(&["add", NAME, &wrong], logins).exits(0);
    bases(&["pull"], logins).exits(2).says("has no repository");
    bases(&["rm", NAME], logins).exits(0);
    bases(&["pull"], logins).exits(0);
    let all = kiln.run(&["registry", "list", "--all"]).exits(0);
    assert!(!all.out.contains("shared/from/"), "{}", all.out);
    build().exits(4);
}
