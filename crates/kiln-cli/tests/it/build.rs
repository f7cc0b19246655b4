//! Builds that pass: real apps from source to an image that answers HTTP.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::annex::Annex;
use crate::fleet_kill::asked;
use crate::support::{Kiln, app, free_port, get, kiln, path, root, until};

/// Runs an image until its page says what it should.
fn answers(kiln: &Kiln, image: &str, guest_port: u16, target: &str, want: &str) {
    let port = free_port();
    let publish = format!("{port}:{guest_port}");
    let mut running = kiln.start(&["run", "--image", image, "-p", &publish]);
    let page = until("the app to answer", || {
        if let Ok(Some(status)) = running.child.try_wait() {
            panic!("kiln run ended: {status}");
        }
        get(port, target).filter(|(code, _)| *code != 502)
    });
    assert_eq!(page.0, 200, "{}", page.1);
    assert!(page.1.contains(want), "{}", page.1);
    running.signal("INT");
    let said = running.end();
    assert_eq!(said.code, 130, "{said:?}");
}

pub(crate) fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temp dir");
    copy_tree(&root().join(name), dir.path());
    dir
}

fn copy_tree(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("list").flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            fs::create_dir_all(&target).expect("folder");
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copy");
        }
    }
}

/// Of the same source: what is built from the cache, and anew where its image is gone.
fn built_again(kiln: &Annex, dir: &Path, tag: &str, built: &serde_json::Value) {
    // An argument that no step reads makes it another build, whose steps are all in the cache.
    let again = kiln.build(dir, tag, &["--build-arg", "UNREAD=1"]);
    assert!(again["same_as"].is_null(), "{again}");
    assert_eq!(
        built["digest"], again["digest"],
        "the same source gives the same image"
    );
    assert!(
        again["egress"]["reached"]
            .as_array()
            .is_some_and(Vec::is_empty),
        "nothing is fetched again: {again}"
    );
    // A result whose image was removed has to be built again.
    for name in [format!("{tag}-same"), tag.to_owned()] {
        kiln.run(&["registry", "rm", &format!("{name}:latest")])
            .exits(0);
    }
    let anew = kiln.build(dir, tag, &[]);
    assert!(anew["same_as"].is_null(), "{anew}");
    assert_eq!(built["digest"], anew["digest"]);
}

/// Builds an example, changes a line, builds it again, and once more unchanged. `make demo` and the long form build it yet again, for both.
fn example(name: &str, file: &str, from: &str, to: &str, guest_port: u16) {
    let Some(mut kiln) = Annex::open() else {
        return;
    };
    kiln.fresh_heads();
    let dir = copy(&format!("examples/{name}"));
    let tag = format!("it-{name}");
    // A home that has seen this test before must not know the source already.
    let comment = if file.ends_with(".js") { "//" } else { "#" };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock");
    let text = fs::read_to_string(dir.path().join(file)).expect("source");
    let text = format!("{text}\n{comment} {}\n", now.as_nanos());
    fs::write(dir.path().join(file), text).expect("write");
    let first = kiln.build(dir.path(), &tag, &[]);
    answers(&kiln, &tag, guest_port, "/", "version 1");
    let text = fs::read_to_string(dir.path().join(file)).expect("source");
    fs::write(dir.path().join(file), text.replacen(from, to, 1)).expect("write");
    let second = kiln.build(dir.path(), &tag, &[]);
    assert_ne!(first["digest"], second["digest"]);
    let (cached, all) = (second["cached"][0].as_u64(), second["cached"][1].as_u64());
    assert!(
        cached > Some(0) && cached < all,
        "a source change reinstalls nothing: {second}"
    );
    answers(&kiln, &tag, guest_port, "/", "version 2");
    // Nothing at all changed: the host knows the result, and starts no machine for it.
    let same = kiln.build(dir.path(), &format!("{tag}-same"), &[]);
    assert_eq!(second["digest"], same["digest"]);
    assert_eq!(second["job"], same["same_as"], "{same}");
    assert!(same["template"].is_null(), "no machine was started: {same}");
    if asked("KILN_TEST_LONG").is_some() {
        built_again(&kiln, dir.path(), &tag, &second);
    }
}

#[test]
fn node_express_is_built_run_changed_and_rebuilt() {
    example(
        "node-express",
        "server.js",
        "version = \"1\"",
        "version = \"2\"",
        3000,
    );
}

#[test]
fn python_flask_is_built_run_changed_and_rebuilt() {
    example(
        "python-flask",
        "app.py",
        "VERSION = \"1\"",
        "VERSION = \"2\"",
        8000,
    );
}

#[test]
fn dockerfile_with_args_stages_heredoc_secret_and_cache_mount() {
    let Some(kiln) = kiln() else { return };
    let dockerfile = r#"# syntax=docker/dockerfile:1
ARG TAG=3.13
FROM registry.kiln.internal/shared/python:${TAG}-run AS one
USER root
RUN --mount=type=cache,target=/cache echo kept > /cache/file
RUN --mount=type=secret,id=token test "$(wc -c < /run/secrets/token)" = 6
RUN <<END
set -e
echo heredoc > /made
END
FROM registry.kiln.internal/shared/python:3.13-run
USER root
COPY --from=one /made /made
ARG WORD=none
ENV WORD=$WORD
CMD ["sh", "-c", "cat /made; echo $WORD; id -u"]
"#;
    let dir = app(&[("Dockerfile", dockerfile), ("kept.txt", "x")]);
    let secret = tempfile::NamedTempFile::new().expect("temp file");
    fs::write(secret.path(), "s3cret").expect("write");
    let spec = format!("id=token,src={}", path(secret.path()));
    let built = kiln.build(
        dir.path(),
        "it-dockerfile",
        &["--secret", &spec, "--build-arg", "WORD=given"],
    );
    let said = kiln.run(&["run", "--image", "it-dockerfile"]).exits(0);
    assert!(said.out.starts_with("heredoc\ngiven\n"), "{said:?}");
    let job = built["job"].as_str().expect("job");
    let log = kiln.run(&["job", "logs", job]).exits(0);
    assert!(!log.out.contains("s3cret"), "a secret is never in a log");
}

#[test]
fn an_image_leaves_as_an_archive_that_skopeo_reads() {
    let Some(kiln) = kiln() else { return };
    let dir = app(&[(
        "Dockerfile",
        "FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\nLABEL a=b\nRUN echo x > /x\n",
    )]);
    let out = tempfile::tempdir().expect("temp dir");
    let file = out.path().join("image.tar");
    let spec = format!("oci:{}", path(&file));
    let built = kiln.build(dir.path(), "it-archive", &["--output", &spec]);
    let inspected = std::process::Command::new("skopeo")
        .args(["inspect", &format!("oci-archive:{}", path(&file))])
        .output()
        .expect("skopeo");
    assert!(
        inspected.status.success(),
        "{}",
        String::from_utf8_lossy(&inspected.stderr)
    );
    let value: serde_json::Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
    assert_eq!(value["Digest"], built["digest"]);
}

#[test]
fn builds_side_by_side_share_everything_without_harm() {
    let Some(kiln) = kiln() else { return };
    let handles: Vec<_> = (0..3)
        .map(|number| {
            let kiln = kiln.clone();
            std::thread::spawn(move || {
                let text = format!("FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\nRUN echo {number} > /number\nCMD [\"cat\", \"/number\"]\n");
                let dir = app(&[("Dockerfile", &text)]);
                let tag = format!("it-parallel-{number}");
                kiln.build(dir.path(), &tag, &[]);
                let said = kiln.run(&["run", "--image", &tag]).exits(0);
                assert_eq!(said.out, format!("{number}\n"));
            })
        })
        .collect();
    for handle in handles {
        handle.join().expect("build");
    }
}
