//! The host's interface, as owner and attached, and what happens when the owner goes away.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use http::{Method, StatusCode};
use kiln_core::Digest;
use kiln_store::HostRegistry;
use kiln_store::host::{HostConfig, HostError, Publish};
use kiln_store::registry::manifest::OCI_MANIFEST;
use kiln_store::registry::{AttemptAuthority, Authority, ErrorKind, Reference, RepoName};
use tokio::io::AsyncReadExt;

use crate::client::{Client, code, digest_of, header, manifest};
use crate::room::{Room, entries, lease};

async fn open(dir: &Path) -> Result<HostRegistry> {
    Ok(HostRegistry::open_or_attach(dir, HostConfig::default()).await?)
}

async fn connect(host: &HostRegistry, authority: Authority) -> Result<Client> {
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let host = host.clone();
    tokio::spawn(async move { host.serve_connection(theirs, authority).await });
    Client::over(ours).await
}

fn repo(text: &str) -> RepoName {
    text.parse().unwrap()
}

async fn read(host: &HostRegistry, name: &RepoName, digest: &Digest) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    host.open_blob(name, digest)
        .await?
        .into_reader()
        .read_to_end(&mut bytes)
        .await?;
    Ok(bytes)
}

/// The same life of an image, whoever owns the registry.
async fn whole_life(host: &HostRegistry, own: &str) -> Result<()> {
    let from = repo(&format!("quarantine/{own}/1"));
    let to = repo(&format!("t/local/{own}"));
    let layer = own.repeat(400_000).into_bytes();
    let (digest, size) = host
        .put_blob(&from, std::io::Cursor::new(layer.clone()), None)
        .await?;
    assert_eq!((digest, size), (Digest::of(&layer), layer.len() as u64));
    let wrong = host.put_blob(&from, &b"evil"[..], Some(digest)).await;
    assert_eq!(wrong.unwrap_err().kind(), ErrorKind::Invalid);
    host.put_blob(&from, &b"{}"[..], None).await?;
    let image = manifest(b"{}", &[&layer]);
    let pushed = Reference::Tag("pushed".to_owned());
    let bytes = serde_json::to_vec(&image)?;
    let manifest = host
        .put_manifest(&from, &pushed, OCI_MANIFEST, bytes)
        .await?;
    assert_eq!(manifest, digest_of(&image));
    assert!(!host.has_blob(&to, &digest).await?);
    assert!(
        host.open_blob(&to, &digest)
            .await
            .unwrap_err()
            .is_not_found()
    );
    let publish = Publish {
        from: from.clone(),
        manifest,
        to: to.clone(),
        tags: vec!["v1".to_owned(), "latest".to_owned()],
    };
    let published = host.publish(&publish, None).await?;
    assert!(published.bytes > size);
    assert_eq!(host.list_tags(&to).await?, ["latest", "v1"]);
    assert_eq!(read(host, &to, &digest).await?, layer);
    let tag = Reference::Tag("v1".to_owned());
    assert_eq!(host.resolve(&to, &tag).await?, manifest);
    assert_eq!(host.get_manifest(&to, &tag).await?.digest, manifest);
    let job = repo(&format!("quarantine/{own}"));
    assert_eq!(
        host.list_repositories(Some(&job)).await?,
        vec![from.clone()]
    );
    host.delete_tree(&job).await?;
    assert!(host.delete_tree(&job).await.unwrap_err().is_not_found());
    assert_eq!(host.list_repositories(Some(&job)).await?, []);
    assert_eq!(
        read(host, &to, &digest).await?,
        layer,
        "published images stay"
    );
    host.delete(&to, &Reference::Tag("latest".to_owned()))
        .await?;
    assert_eq!(host.list_tags(&to).await?, ["v1"]);
    host.delete(&to, &Reference::Digest(manifest)).await?;
    let collected = host.gc(Duration::ZERO).await?;
    assert!(
        collected.contents >= 2 && collected.bytes > size,
        "{collected:?}"
    );
    assert!(
        host.get_manifest(&to, &tag)
            .await
            .unwrap_err()
            .is_not_found()
    );
    assert_eq!(host.scrub().await?.corrupt, []);
    Ok(())
}

#[tokio::test]
async fn owner_and_attached_have_the_same_interface() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // Longer than the path of a unix socket may be.
    let path = dir.path().join("d".repeat(120)).join("registry");
    let owner = open(&path).await?;
    let attached = open(&path).await?;
    assert!(owner.is_owner().await && !attached.is_owner().await);
    assert_eq!(attached.about().await?.pid, std::process::id());
    whole_life(&owner, "one").await?;
    whole_life(&attached, "two").await?;
    assert_eq!(owner.stats().await?.contents, 0);
    assert_eq!(entries(&path.join("repos")), 0, "no empty directories stay");
    assert_eq!(entries(&path.join("tmp")), 0);
    Ok(())
}

/// Not a test of its own: what a child process runs until it is killed.
#[tokio::test]
#[ignore = "run by `a_killed_owner_is_followed_by_an_attached_process` in a process of its own"]
async fn owner_child() -> Result<()> {
    if !Path::new("own-this").exists() {
        return Ok(());
    }
    let host = open(Path::new("registry")).await?;
    host.put_blob(&repo("t/local/app"), &b"kept"[..], None)
        .await?;
    std::future::pending::<()>().await;
    Ok(())
}

#[tokio::test]
async fn a_killed_owner_is_followed_by_an_attached_process() -> Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("own-this"), "")?;
    let mut child = tokio::process::Command::new(std::env::current_exe()?)
        .args(["--exact", "host_api::owner_child", "--ignored"])
        .current_dir(dir.path())
        .stdout(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let path = dir.path().join("registry");
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while !path.join("host.sock").exists() {
        anyhow::ensure!(
            std::time::Instant::now() < deadline,
            "the child owns nothing"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let attached = open(&path).await?;
    assert_eq!(Some(attached.about().await?.pid), child.id());
    let name = repo("t/local/app");
    let digest = Digest::of(b"kept");
    while !attached.has_blob(&name, &digest).await? {
        anyhow::ensure!(
            std::time::Instant::now() < deadline,
            "the child stores nothing"
        );
    }
    child.kill().await?;
    assert_eq!(read(&attached, &name, &digest).await?, b"kept");
    assert!(attached.is_owner().await);
    let mut guest = connect(&attached, Authority::Operator).await?;
    assert_eq!(
        guest.push_blob("a", b"x").await?.status(),
        StatusCode::CREATED
    );
    Ok(())
}

#[tokio::test]
async fn of_many_that_open_at_once_one_owns() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let openings: Vec<_> = (0..8)
        .map(|_| {
            let path = dir.path().join("registry");
            tokio::spawn(
                async move { HostRegistry::open_or_attach(&path, HostConfig::default()).await },
            )
        })
        .collect();
    let mut owners = 0;
    let mut hosts = Vec::new();
    for opening in openings {
        let host = opening.await??;
        owners += usize::from(host.is_owner().await);
        hosts.push(host);
    }
    assert_eq!(owners, 1);
    for host in &hosts {
        host.put_blob(&repo("a"), &b"x"[..], None).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_attached_process_takes_over_when_the_owner_goes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let owner = open(dir.path()).await?;
    let attached = open(dir.path()).await?;
    let third = open(dir.path()).await?;
    let name = repo("t/local/app");
    let (digest, _) = attached.put_blob(&name, &b"kept"[..], None).await?;
    drop(owner);
    assert_eq!(read(&attached, &name, &digest).await?, b"kept");
    assert!(attached.is_owner().await);
    assert_eq!(read(&third, &name, &digest).await?, b"kept");
    assert!(!third.is_owner().await);
    drop(attached);
    let mut guest = connect(&third, Authority::Operator).await?;
    let path = format!("/v2/{name}/blobs/{digest}");
    assert_eq!(guest.get(&path).await?.body().as_ref(), b"kept");
    assert!(third.is_owner().await);
    Ok(())
}

#[tokio::test]
async fn a_guest_is_served_alike_through_an_attached_process() -> Result<()> {
    let room = Room::new()?;
    let dir = room.dir.path().join("shared-registry");
    let _owner = open(&dir).await?;
    let attached = open(&dir).await?;
    let authority = room.guest("b1");
    let mut guest = connect(&attached, Authority::Attempt(authority.clone())).await?;
    let layer = vec![7; 2_000_000];
    for bytes in [&layer[..], b"{}"] {
        let pushed = guest.push_blob("quarantine/b1/1", bytes).await?;
        assert_eq!(pushed.status(), StatusCode::CREATED, "{}", code(&pushed));
    }
    let image = manifest(b"{}", &[&layer]);
    let put = guest.push_manifest("quarantine/b1/1", "x", &image).await?;
    assert_eq!(put.status(), StatusCode::CREATED, "{}", code(&put));
    assert_eq!(code(&guest.push_blob("t/local/app", b"x").await?), "DENIED");
    for path in ["/_kiln/call", "/v2/../_kiln/call", "//_kiln/call"] {
        let headers = [("kiln-authority", "\"operator\"")];
        let body = br#"{"call":"stats"}"#;
        let refused = guest.send(Method::POST, path, &headers, body).await?;
        assert!(
            refused.status().is_client_error(),
            "{path}: {}",
            refused.status()
        );
    }
    let headers = [("kiln-authority", "\"operator\"")];
    let claimed = guest
        .send(
            Method::POST,
            "/v2/t/local/app/blobs/uploads/",
            &headers,
            b"",
        )
        .await?;
    assert_eq!(code(&claimed), "DENIED", "a guest cannot say who it is");

    let publish = Publish {
        from: repo("quarantine/b1/1"),
        manifest: digest_of(&image),
        to: repo("t/local/app"),
        tags: vec!["v1".to_owned()],
    };
    let stale = AttemptAuthority::new(lease("b1", 0), room.leases.clone());
    let refused = attached.publish(&publish, Some(&stale)).await;
    assert!(matches!(refused, Err(HostError::Store(_))), "{refused:?}");
    attached.publish(&publish, Some(&authority)).await?;
    Ok(())
}

#[tokio::test]
async fn a_lease_that_ends_during_a_forwarded_body_stops_its_commit() -> Result<()> {
    let room = Room::new()?;
    let dir = room.dir.path().join("shared-registry");
    let owner = open(&dir).await?;
    let attached = open(&dir).await?;
    let authority = Authority::Attempt(room.guest("b1"));
    let mut guest = connect(&attached, authority).await?;
    let uploads = "/v2/quarantine/b1/1/blobs/uploads/";
    let begun = guest.send(Method::POST, uploads, &[], b"").await?;
    let location = header(&begun, "location")?.to_owned();
    room.leases.end(&lease("b1", 1).attempt);
    let path = format!("{location}?digest={}", Digest::of(b"layer"));
    let refused = guest.send(Method::PUT, &path, &[], b"layer").await?;
    assert_eq!(code(&refused), "DENIED");
    assert_eq!(owner.stats().await?.contents, 0);
    Ok(())
}

/// Runs as another user and says what the private socket answered.
const STRANGER: &str = r#"
    $SIG{PIPE} = 'IGNORE';
    my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or do { print "closed: $!\n"; exit };
    $s->print("POST /_kiln/call HTTP/1.1\r\nhost: x\r\nkiln-authority: \"operator\"\r\ncontent-length: 16\r\n\r\n{\"call\":\"stats\"}");
    print "answer: ", join("", <$s>), "\n";
"#;

#[tokio::test]
async fn the_private_socket_turns_other_users_away() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can act as another user");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("registry");
    let host = open(&path).await?;
    assert!(host.is_owner().await);
    let ask = async || -> Result<String> {
        let output = tokio::process::Command::new("perl")
            .args(["-MIO::Socket::UNIX", "-e", STRANGER])
            .arg(path.join("host.sock"))
            .uid(NOBODY)
            .gid(NOBODY)
            .output()
            .await?;
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let said = ask().await?;
    assert!(
        said.starts_with("closed: "),
        "the directory is closed: {said}"
    );
    // Even with every file open to all, the peer's user decides.
    for (path, mode) in [
        (dir.path().to_owned(), 0o755),
        (path.clone(), 0o755),
        (path.join("host.sock"), 0o666),
    ] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    assert_eq!(ask().await?, "answer:");
    assert_eq!(host.stats().await?.contents, 0);
    Ok(())
}

#[tokio::test]
async fn a_newer_layout_is_refused_clearly() -> Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("VERSION"), "kiln-registry 99\n")?;
    let error = HostRegistry::open_or_attach(dir.path(), HostConfig::default()).await;
    let text = error.unwrap_err().to_string();
    assert!(
        text.contains("kiln-registry 99") && text.contains("newer"),
        "{text}"
    );
    std::fs::write(dir.path().join("VERSION"), "")?;
    let error = HostRegistry::open_or_attach(dir.path(), HostConfig::default()).await;
    let text = error.unwrap_err().to_string();
    assert!(
        text.contains("VERSION") && text.contains("damaged") && text.contains("kiln-registry 1"),
        "{text}"
    );
    let foreign = tempfile::tempdir()?;
    std::fs::write(foreign.path().join("thesis.tex"), "precious")?;
    assert!(
        open(foreign.path()).await.is_err(),
        "never moves in with other files"
    );
    Ok(())
}
