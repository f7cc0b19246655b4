//! What `kiln serve` finds when it starts, and a copy of what it keeps: no machine is needed.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use crate::support::{Kiln, Started, kiln, path};

/// An empty home of its own.
fn fresh() -> Option<(Kiln, tempfile::TempDir)> {
    let kiln = kiln()?;
    let dir = tempfile::tempdir().expect("temp dir");
    let home = dir.path().to_owned();
    Some((Kiln { home, ..kiln }, dir))
}

fn serve(kiln: &Kiln) -> Started {
    let mut server = kiln.start(&["serve"]);
    server.until_it_prints("private socket");
    server
}

fn stop(server: Started) {
    server.signal("INT");
    server.end().exits(0);
}

#[test]
fn a_server_that_cannot_start_says_why() {
    let Some((kiln, _dir)) = fresh() else { return };
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = taken.local_addr().expect("address").to_string();
    kiln.run(&["serve", "--listen", &address])
        .exits(2)
        .says(&format!("cannot listen on {address}"));
    kiln.run(&[
        "serve",
        "--listen",
        "0.0.0.0:0",
        "--tls-cert",
        "/nowhere.pem",
        "--tls-key",
        "/x",
    ])
    .exits(2)
    .says("/nowhere.pem");
    for wrong in ["mysql://x", "kiln.db", ""] {
        kiln.run(&["serve", "--database", wrong])
            .exits(2)
            .says("--database");
    }
    let secret = "postgres://kiln:hidden@db.example.org:\u{1b}[2J/queue";
    let said = kiln.run(&["serve", "--database", secret]).exits(2);
    assert!(
        !said.err.contains("hidden") && !said.err.contains('\u{1b}'),
        "{}",
        said.err
    );

    let server = serve(&kiln);
    kiln.run(&["serve"])
        .exits(2)
        .says("another kiln controller runs in");
    stop(server);
    let file = kiln.home.join("controller/kiln.db");
    let good = fs::read(&file).expect("a database");
    fs::write(&file, &good[..good.len() / 2]).expect("write");
    kiln.run(&["serve"]).exits(3).says("is damaged");
    fs::write(&file, "x".repeat(9000)).expect("write");
    kiln.run(&["serve"]).exits(3).says("is damaged");
    fs::write(&file, &good).expect("write");
    stop(serve(&kiln));
}

#[test]
fn a_bucket_that_cannot_be_used_is_said() {
    let Some((kiln, dir)) = fresh() else { return };
    let key = dir.path().join("bucket-key");
    let mode = |mode| fs::set_permissions(&key, fs::Permissions::from_mode(mode)).expect("chmod");
    fs::write(&key, "access_key_id = \"hidden\"\n").expect("write");
    mode(0o644);
    let plain = "s3://b?endpoint=http://s3.example.org";
    let with_key = |store| ["serve", "--store", store, "--store-key", path(&key)];
    kiln.run(&with_key("s3://b"))
        .exits(2)
        .says("can be read by others");
    mode(0o600);
    let said = kiln.run(&with_key("s3://b")).exits(2);
    assert!(!said.err.contains("hidden"), "{}", said.err);
    fs::write(&key, "access_key_id = \"a\"\nsecret_access_key = \"b\"\n").expect("write");
    kiln.run(&with_key("ftp://b")).exits(2).says("--store");
    kiln.run(&with_key(plain)).exits(2).says("is not https");
    let nowhere = "s3://b?endpoint=http://127.0.0.1:1";
    kiln.run(&with_key(nowhere)).exits(3).says("object store");
}

#[test]
fn a_server_is_copied_while_it_serves_and_put_back_while_it_does_not() {
    let Some((kiln, dir)) = fresh() else { return };
    let server = serve(&kiln);
    kiln.run(&["tenant", "create", "before"]).exits(0);
    let saved: PathBuf = dir.path().join("saved.db");
    let create = ["backup", "create", path(&saved)];
    kiln.run(&create).exits(0);
    kiln.run(&create).exits(2).says("exists already");
    kiln.run(&["tenant", "create", "after"]).exits(0);
    let restore = ["backup", "restore", path(&saved)];
    kiln.run(&restore)
        .exits(2)
        .says("another kiln controller runs in");
    stop(server);
    kiln.run(&restore).exits(2).says("--replace");
    let bad = dir.path().join("bad.db");
    let good = fs::read(&saved).expect("a backup");
    fs::write(&bad, &good[..good.len() / 2]).expect("write");
    kiln.run(&["backup", "restore", "--replace", path(&bad)])
        .exits(2)
        .says("the backup is not good");
    let replace = ["backup", "restore", "--replace", path(&saved), "--json"];
    let said = kiln.run(&replace).exits(0);
    let told: serde_json::Value = serde_json::from_str(said.out.trim()).expect("JSON");
    assert_eq!(told["incarnation"], 2);
    let kept = told["replaced"].as_str().expect("a path");
    assert!(fs::metadata(kept).is_ok_and(|meta| meta.len() > 0));
    let server = serve(&kiln);
    let tenants = kiln.run(&["tenant", "list"]).exits(0).out;
    assert!(
        tenants.contains("before") && !tenants.contains("after"),
        "{tenants}"
    );
    stop(server);
    kiln.run(&create).exits(2);
    fs::remove_file(&saved).expect("remove");
    // Without a server the command looks after the queue itself.
    kiln.run(&create).exits(0);
    assert!(saved.exists());
}
