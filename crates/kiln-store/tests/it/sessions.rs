//! Uploads and downloads outlive the process that owned the registry, and unfinished ones are collected.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use http::{Method, StatusCode};
use kiln_core::Digest;
use kiln_store::HostRegistry;
use kiln_store::host::HostConfig;
use kiln_store::registry::upload::SESSION_IDLE_MAX;
use kiln_store::registry::{Authority, RepoName, Store, StoreConfig, StoreError};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use crate::client::{Client, header};
use crate::room::{Room, entries, opened_again};

/// Larger than all that is buffered on the way.
const LARGE: usize = 24 << 20;

fn large() -> Vec<u8> {
    let mut state = 11_u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    (0..LARGE).map(next).collect()
}

fn repo() -> RepoName {
    "t/local/app".parse().expect("name")
}

/// A registry that another process owns, until it is killed.
struct Owned {
    dir: TempDir,
    child: Child,
}

impl Owned {
    async fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let child = Self::owner(dir.path()).await?;
        Ok(Self { dir, child })
    }

    /// Starts an owner and waits until it is one.
    async fn owner(dir: &Path) -> Result<Child> {
        std::fs::write(dir.join("own-this"), "")?;
        let mut child = Command::new(std::env::current_exe()?)
            .args([
                "--exact",
                "sessions::owner_child",
                "--ignored",
                "--nocapture",
            ])
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("no pipe")?).lines();
        while let Some(line) = lines.next_line().await? {
            if line.contains("OWNS") {
                return Ok(child);
            }
        }
        anyhow::bail!("the child owns nothing")
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("registry")
    }

    async fn attach(&self) -> Result<HostRegistry> {
        let host = HostRegistry::open_or_attach(&self.path(), HostConfig::default()).await?;
        assert!(!host.is_owner().await);
        Ok(host)
    }

    /// Bytes on the disk that belong to no blob yet.
    fn uploaded(&self) -> u64 {
        let entries = std::fs::read_dir(self.path().join("uploads"));
        let sizes = entries.into_iter().flatten().flatten();
        sizes
            .filter(|entry| entry.path().extension().is_none())
            .filter_map(|entry| Some(entry.metadata().ok()?.len()))
            .sum()
    }

    async fn uploads_reach(&self, bytes: u64) -> Result<()> {
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while self.uploaded() < bytes {
            anyhow::ensure!(
                std::time::Instant::now() < deadline,
                "the upload does not go on"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }
}

/// Not a test of its own: what a child process runs until it is killed.
#[tokio::test]
#[ignore = "run by the tests of this file in a process of its own"]
async fn owner_child() -> Result<()> {
    if !Path::new("own-this").exists() {
        return Ok(());
    }
    let host = HostRegistry::open_or_attach(Path::new("registry"), HostConfig::default()).await?;
    if !host.is_owner().await {
        return Ok(());
    }
    println!("OWNS");
    std::future::pending::<()>().await;
    Ok(())
}

#[tokio::test]
async fn an_upload_in_flight_goes_on_with_the_next_owner() -> Result<()> {
    let mut owned = Owned::new().await?;
    let attached = owned.attach().await?;
    let bytes = large();
    let digest = Digest::of(&bytes);
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let host = attached.clone();
    tokio::spawn(async move { host.serve_connection(theirs, Authority::Operator).await });
    let (reader, mut writer) = tokio::io::split(ours);
    let head = format!(
        "POST /v2/t/local/app/blobs/uploads/?digest={digest} HTTP/1.1\r\nhost: x\r\ncontent-length: {LARGE}\r\n\r\n"
    );
    writer.write_all(head.as_bytes()).await?;
    writer.write_all(&bytes[..LARGE / 2]).await?;
    owned.uploads_reach(LARGE as u64 / 4).await?;
    owned.child.kill().await?;
    writer.write_all(&bytes[LARGE / 2..]).await?;
    let mut line = String::new();
    BufReader::new(reader).read_line(&mut line).await?;
    assert!(line.starts_with("HTTP/1.1 201"), "{line}");
    assert!(attached.is_owner().await);
    let mut stored = Vec::new();
    let blob = attached.open_blob(&repo(), &digest).await?;
    blob.into_reader().read_to_end(&mut stored).await?;
    assert!(stored == bytes);
    assert_eq!(entries(&owned.path().join("uploads")), 0);
    Ok(())
}

#[tokio::test]
async fn hosts_own_streams_go_on_through_several_owners() -> Result<()> {
    let mut owned = Owned::new().await?;
    let attached = owned.attach().await?;
    let bytes = large();
    let digest = Digest::of(&bytes);
    let (mut writer, reader) = tokio::io::duplex(64 << 10);
    let host = attached.clone();
    let storing = tokio::spawn(async move { host.put_blob(&repo(), reader, Some(digest)).await });
    for part in bytes.chunks(LARGE / 3) {
        writer.write_all(part).await?;
        if !attached.is_owner().await {
            owned.uploads_reach(LARGE as u64 / 8).await?;
            owned.child.kill().await?;
            owned.child = match Owned::owner(owned.dir.path()).await {
                Ok(child) => child,
                // This process was first.
                Err(_) => continue,
            };
        }
    }
    drop(writer);
    assert_eq!(storing.await??, (digest, LARGE as u64));
    Ok(())
}

#[tokio::test]
async fn a_download_goes_on_with_the_next_owner() -> Result<()> {
    let mut owned = Owned::new().await?;
    let attached = owned.attach().await?;
    let bytes = large();
    let (digest, _) = attached
        .put_blob(&repo(), std::io::Cursor::new(bytes.clone()), None)
        .await?;
    let mut reader = attached.open_blob(&repo(), &digest).await?.into_reader();
    let mut guest = {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let host = attached.clone();
        tokio::spawn(async move { host.serve_connection(theirs, Authority::Operator).await });
        let mut stream = BufReader::new(ours);
        let ask = format!(
            "GET /v2/{}/blobs/{digest} HTTP/1.1\r\nhost: x\r\nrange: bytes=1000-\r\nconnection: close\r\n\r\n",
            repo()
        );
        stream.write_all(ask.as_bytes()).await?;
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            stream.read_line(&mut line).await?;
        }
        stream
    };
    let mut got = vec![0; 100_000];
    reader.read_exact(&mut got).await?;
    let mut part = vec![0; 50_000];
    guest.read_exact(&mut part).await?;
    owned.child.kill().await?;
    reader.read_to_end(&mut got).await?;
    assert!(got == bytes, "{} of {LARGE} bytes", got.len());
    guest.read_to_end(&mut part).await?;
    assert!(part == bytes[1000..], "{} of {LARGE} bytes", part.len());
    Ok(())
}

#[tokio::test]
async fn a_session_has_its_url_with_the_next_owner() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    let begun = client
        .send(Method::POST, "/v2/a/blobs/uploads/", &[], b"")
        .await?;
    let location = header(&begun, "location")?.to_owned();
    client.send(Method::PATCH, &location, &[], b"hel").await?;
    let stranger = client
        .send(Method::POST, "/v2/a/blobs/uploads/", &[], b"")
        .await?;
    let empty = header(&stranger, "location")?.to_owned();
    drop(client);
    let path = room.path();
    let Room { store, dir, leases } = room;
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while Arc::strong_count(&store) > 1 {
        anyhow::ensure!(
            std::time::Instant::now() < deadline,
            "a connection holds the store"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    drop(store);
    let store = opened_again(&path, &StoreConfig::default())?;
    let room = Room { store, dir, leases };
    assert_eq!(room.store.stats()?.uploads, 0, "none of this owner's");
    // Whoever did not begin it cannot go on with it.
    let mut other = room.connect(Authority::Attempt(room.guest("b1"))).await?;
    assert!(other.get(&location).await?.status().is_client_error());
    let mut client = room.operator().await?;
    assert_eq!(header(&client.get(&location).await?, "range")?, "0-2");
    let wrong = [("content-range", "0-1")];
    let refused = client.send(Method::PATCH, &location, &wrong, b"lo").await?;
    assert_eq!(refused.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    let right = [("content-range", "3-4")];
    let taken = client.send(Method::PATCH, &location, &right, b"lo").await?;
    assert_eq!(taken.status(), StatusCode::ACCEPTED);
    let put = format!("{location}?digest={}", Digest::of(b"hello"));
    let done = client.send(Method::PUT, &put, &[], b"").await?;
    assert_eq!(done.status(), StatusCode::CREATED);
    let put = format!("{empty}?digest={}", Digest::of(b"all"));
    let done = client.send(Method::PUT, &put, &[], b"all").await?;
    assert_eq!(done.status(), StatusCode::CREATED);
    assert_eq!(entries(&path.join("uploads")), 0);
    Ok(())
}

#[test]
fn unfinished_uploads_are_collected() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let uploads = dir.path().join("uploads");
    let open = || opened_again(dir.path(), &StoreConfig::default());
    let (operator, name) = (Authority::Operator, "a".parse()?);
    let begin = |store: &Arc<Store>| -> Result<String> {
        let mut upload = store.begin_upload(&operator, &name)?;
        upload.write(b"part")?;
        Ok(upload.id().to_owned())
    };
    let store = open()?;
    let (old, young, torn) = (begin(&store)?, begin(&store)?, begin(&store)?);
    drop(store);
    // Files are dated by a coarser clock than this one.
    let long_ago = SystemTime::now() - 2 * SESSION_IDLE_MAX;
    std::fs::File::options()
        .write(true)
        .open(uploads.join(&old))?
        .set_modified(long_ago)?;
    std::fs::write(uploads.join(format!("{torn}.json")), "{\"repo\":")?;
    std::fs::write(uploads.join("0123.json"), "not of any session")?;
    std::fs::write(uploads.join("f".repeat(32)), "without a record")?;
    let store = open()?;
    for gone in [&old, &torn] {
        let resumed = store.resume_upload(&operator, &name, gone);
        assert!(matches!(resumed, Err(StoreError::UploadUnknown)));
    }
    assert_eq!(entries(&uploads), 2, "one session is left");
    let mut upload = store.resume_upload(&operator, &name, &young)?;
    upload.write(b"ner")?;
    let (digest, size) = upload.commit_any(&operator)?;
    assert_eq!((digest, size), (Digest::of(b"partner"), 7));
    assert_eq!(entries(&uploads), 0);
    Ok(())
}

#[tokio::test]
async fn a_session_is_not_guessed() -> Result<()> {
    let room = Room::new()?;
    let mut client: Client = room.operator().await?;
    client.push_blob("a", b"done").await?;
    let path = format!("/v2/a/blobs/{}", Digest::of(b"done"));
    assert_eq!(client.get(&path).await?.status(), StatusCode::OK);
    let unknown = format!("/v2/a/blobs/uploads/{}", "0".repeat(32));
    let put = format!("{unknown}?digest={}", Digest::of(b"done"));
    let refused = client.send(Method::PUT, &put, &[], b"").await?;
    assert_eq!(
        refused.status(),
        StatusCode::NOT_FOUND,
        "a session is not guessed"
    );
    Ok(())
}
