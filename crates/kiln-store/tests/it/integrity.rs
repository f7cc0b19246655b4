//! Nothing corrupt is ever served, and collection removes what nobody refers to and nothing else.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use http::{Method, StatusCode};
use kiln_core::Digest;
use kiln_store::registry::{Store, StoreConfig, StoreError};

use crate::client::{code, digest_of, header, manifest};
use crate::room::{Room, entries, opened_again};

fn content(room: &Room, digest: &Digest) -> std::path::PathBuf {
    let hex = digest.hex();
    room.path().join("blobs/sha256").join(&hex[..2]).join(hex)
}

/// Changes a file as bit rot would, and makes sure its times tell.
fn rot(path: &std::path::Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let stamp = |path| std::fs::metadata(path).map(|m| (m.ctime(), m.ctime_nsec()));
    let before = stamp(path)?;
    let mut bytes = std::fs::read(path)?;
    bytes[0] ^= 1;
    while stamp(path)? == before {
        std::fs::write(path, &bytes)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_corrupt_blob_is_found_refused_and_healed_by_a_push() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    client.push_blob("a", b"layer").await?;
    client.push_blob("a", b"{}").await?;
    let image = manifest(b"{}", &[b"layer"]);
    client.push_manifest("a", "v1", &image).await?;
    let digest = Digest::of(b"layer");
    rot(&content(&room, &digest))?;
    let path = format!("/v2/a/blobs/{digest}");
    for method in [Method::HEAD, Method::GET] {
        let refused = client.send(method, &path, &[], b"").await?;
        assert_eq!(refused.status(), StatusCode::NOT_FOUND);
    }
    assert_eq!(entries(&room.path().join("corrupt")), 1);
    assert_eq!(
        code(&client.push_manifest("a", "v2", &image).await?),
        "MANIFEST_BLOB_UNKNOWN"
    );
    assert_eq!(
        room.store.scrub()?.broken,
        [("a".parse()?, digest_of(&image))]
    );
    client.push_blob("a", b"layer").await?;
    assert_eq!(client.get(&path).await?.body().as_ref(), b"layer");
    assert_eq!(room.store.scrub()?.broken, []);
    Ok(())
}

#[tokio::test]
async fn a_truncated_blob_and_a_corrupt_manifest_are_found() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    client.push_blob("a", b"layer").await?;
    client.push_blob("a", b"{}").await?;
    let image = manifest(b"{}", &[b"layer"]);
    client.push_manifest("a", "v1", &image).await?;
    std::fs::File::options()
        .write(true)
        .open(content(&room, &Digest::of(b"layer")))?
        .set_len(2)?;
    let path = format!("/v2/a/blobs/{}", Digest::of(b"layer"));
    assert_eq!(client.get(&path).await?.status(), StatusCode::NOT_FOUND);
    rot(&content(&room, &digest_of(&image)))?;
    assert_eq!(
        client.get("/v2/a/manifests/v1").await?.status(),
        StatusCode::NOT_FOUND
    );
    Ok(())
}

#[tokio::test]
async fn whatever_happens_to_a_file_is_named_and_healed_by_a_push() -> Result<()> {
    type Harm = fn(&std::path::Path) -> Result<()>;
    let harms: [(&str, Harm); 4] = [
        ("a flipped byte", rot),
        ("a shorter file", |path| {
            Ok(std::fs::File::options()
                .write(true)
                .open(path)?
                .set_len(3)?)
        }),
        ("a longer file", |path| {
            use std::io::Write;
            Ok(std::fs::File::options()
                .append(true)
                .open(path)?
                .write_all(b"more")?)
        }),
        ("no file", |path| Ok(std::fs::remove_file(path)?)),
    ];
    for (what, harm) in harms {
        for manifest_too in [false, true] {
            let room = Room::new()?;
            let mut client = room.operator().await?;
            let image = manifest(b"{}", &[b"layer"]);
            let push = async |client: &mut crate::client::Client| -> Result<()> {
                client.push_blob("a", b"layer").await?;
                client.push_blob("a", b"{}").await?;
                let put = client.push_manifest("a", "v1", &image).await?;
                assert_eq!(put.status(), StatusCode::CREATED, "{}", code(&put));
                Ok(())
            };
            push(&mut client).await?;
            let (digest, path) = match manifest_too {
                true => (digest_of(&image), "/v2/a/manifests/v1".to_owned()),
                false => {
                    let digest = Digest::of(b"layer");
                    (digest, format!("/v2/a/blobs/{digest}"))
                }
            };
            assert_eq!(client.get(&path).await?.status(), StatusCode::OK);
            harm(&content(&room, &digest))?;
            let report = room.store.scrub()?;
            let set_aside = what != "no file";
            assert_eq!(report.corrupt.contains(&digest), set_aside, "{what}");
            assert_eq!(report.broken, [("a".parse()?, digest_of(&image))], "{what}");
            let got = client.get(&path).await?;
            assert_eq!(got.status(), StatusCode::NOT_FOUND, "{what}");
            push(&mut client).await?;
            let report = room.store.scrub()?;
            assert!(
                report.corrupt.is_empty() && report.broken.is_empty(),
                "{what}"
            );
            assert_eq!(client.get(&path).await?.status(), StatusCode::OK, "{what}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_full_disk_is_told_and_leaves_nothing() -> Result<()> {
    for step in [
        "create",
        "write unsynced",
        "write blob",
        "sync blob",
        "mark",
        "rename",
        "write",
    ] {
        let full = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let switch = full.clone();
        let room = Room::with(StoreConfig {
            fault: Some(Arc::new(move |at| {
                match at == step && switch.load(std::sync::atomic::Ordering::SeqCst) {
                    true => Err(std::io::ErrorKind::StorageFull.into()),
                    false => Ok(()),
                }
            })),
            ..StoreConfig::default()
        })?;
        let mut client = room.operator().await?;
        client.push_blob("a", b"{}").await?;
        full.store(true, std::sync::atomic::Ordering::SeqCst);
        let refused = client.push_blob("a", b"layer").await?;
        if step != "write" {
            assert_eq!(refused.status(), StatusCode::INSUFFICIENT_STORAGE, "{step}");
            assert!(String::from_utf8_lossy(refused.body()).contains("disk is full"));
            let path = format!("/v2/a/blobs/{}", Digest::of(b"layer"));
            assert_eq!(client.get(&path).await?.status(), StatusCode::NOT_FOUND);
        }
        let put = client
            .push_manifest("a", "v1", &manifest(b"{}", &[]))
            .await?;
        assert!(
            matches!(put.status().as_u16(), 201 | 507),
            "{step}: {put:?}"
        );
        full.store(false, std::sync::atomic::Ordering::SeqCst);
        assert_eq!(entries(&room.path().join("uploads")), 0, "{step}");
        assert_eq!(entries(&room.path().join("tmp")), 0, "{step}");
        let pushed = client.push_blob("a", b"layer").await?;
        assert_eq!(pushed.status(), StatusCode::CREATED, "{step}");
        assert_eq!(room.store.scrub()?.corrupt, []);
    }
    // A disk that takes no writes at all: said in words.
    let room = Room::with(StoreConfig {
        fault: Some(Arc::new(|at| match at {
            "create" => Err(std::io::ErrorKind::ReadOnlyFilesystem.into()),
            _ => Ok(()),
        })),
        ..StoreConfig::default()
    })?;
    let refused = room.operator().await?.push_blob("a", b"layer").await?;
    assert_eq!(refused.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert!(String::from_utf8_lossy(refused.body()).contains("read-only"));
    // The bound on free space, before any byte is written.
    let room = Room::with(StoreConfig {
        free_bytes_min: u64::MAX,
        ..StoreConfig::default()
    })?;
    let refused = room.operator().await?.push_blob("a", b"layer").await?;
    assert_eq!(refused.status(), StatusCode::INSUFFICIENT_STORAGE);
    Ok(())
}

#[test]
fn a_scrub_reads_what_the_boots_table_would_believe() -> Result<()> {
    let room = Room::new()?;
    let store = &room.store;
    let operator = kiln_store::registry::Authority::Operator;
    let repo = "a".parse()?;
    let mut upload = store.begin_upload(&operator, &repo)?;
    upload.write(b"layer")?;
    let (digest, _) = upload.commit_any(&operator)?;
    assert_eq!(store.scrub()?.corrupt, []);
    // A table that lies: as if the disk had changed bytes without telling the file system.
    let path = content(&room, &digest);
    rot(&path)?;
    let meta = std::fs::metadata(&path)?;
    use std::os::unix::fs::MetadataExt;
    let line = format!(
        "{digest} {} {} {} {} {}\n",
        meta.dev(),
        meta.ino(),
        meta.size(),
        meta.ctime(),
        meta.ctime_nsec()
    );
    let table = std::fs::read_dir(room.path().join("verified"))?
        .next()
        .unwrap()?
        .path();
    std::fs::write(&table, line)?;
    let path = room.path();
    let Room { store, dir, .. } = room;
    drop(store);
    let store = opened_again(&path, &StoreConfig::default())?;
    assert!(
        store.has_blob(&repo, &digest)?,
        "the table is believed within a boot"
    );
    let report = store.scrub()?;
    assert_eq!(report.corrupt, [digest]);
    assert!(!store.has_blob(&repo, &digest)?);
    drop(dir);
    Ok(())
}

#[tokio::test]
async fn collection_keeps_what_is_named_and_young() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    for bytes in [&b"{}"[..], b"layer", b"stray"] {
        client.push_blob("a", bytes).await?;
    }
    let image = manifest(b"{}", &[b"layer"]);
    client.push_manifest("a", "v1", &image).await?;
    let collected = room.store.gc(Duration::from_secs(3600))?;
    assert_eq!(
        (collected.links, collected.contents),
        (0, 0),
        "all of it is young"
    );
    let collected = room.store.gc(Duration::ZERO)?;
    assert_eq!(
        (collected.links, collected.contents, collected.bytes),
        (1, 1, 5)
    );
    let layer = format!("/v2/a/blobs/{}", Digest::of(b"layer"));
    assert_eq!(client.get(&layer).await?.status(), StatusCode::OK);
    let path = format!("/v2/a/manifests/{}", digest_of(&image));
    client.send(Method::DELETE, &path, &[], b"").await?;
    room.store.gc(Duration::ZERO)?;
    assert_eq!(room.store.stats()?.contents, 0);
    assert_eq!(room.store.stats()?.repositories, 0);
    assert_eq!(entries(&room.path().join("repos")), 0);
    Ok(())
}

#[tokio::test]
async fn quarantine_of_attempts_long_over_is_collected() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    for repo in [
        "quarantine/b1/1",
        "quarantine/b2/1",
        "quarantine-not",
        "t/local/app",
    ] {
        client.push_blob(repo, b"{}").await?;
        client
            .push_manifest(repo, "x", &manifest(b"{}", &[]))
            .await?;
    }
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(48 * 3600);
    for repo in ["quarantine/b1/1", "quarantine-not", "t/local/app"] {
        for kind in ["_blobs", "_manifests", "_tags"] {
            let dir = room.path().join("repos").join(repo).join(kind);
            std::fs::File::open(dir)?.set_modified(long_ago)?;
        }
    }
    assert_eq!(room.store.gc(Duration::ZERO)?.quarantined, 1);
    let left: Vec<String> = room
        .store
        .repositories(None)?
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(left, ["quarantine-not", "quarantine/b2/1", "t/local/app"]);
    assert!(!room.path().join("repos/quarantine/b1").exists());
    Ok(())
}

#[test]
fn one_owner_at_a_time_and_stale_temporary_files_are_reaped() -> Result<()> {
    let room = Room::new()?;
    let path = room.path();
    let second = Store::open(&path, StoreConfig::default());
    assert!(matches!(
        second,
        Err(kiln_store::registry::OpenError::Owned { .. })
    ));
    std::fs::write(path.join("tmp/left"), "x")?;
    std::fs::create_dir_all(path.join("tmp/dir/below"))?;
    let Room { store, dir, .. } = room;
    drop(store);
    let store = opened_again(&path, &StoreConfig::default())?;
    assert_eq!(entries(&path.join("tmp")), 0);
    drop((store, dir));
    Ok(())
}

#[tokio::test]
async fn a_write_that_fails_leaves_the_session_where_it_stood() -> Result<()> {
    let full = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let switch = full.clone();
    let room = Room::with(StoreConfig {
        fault: Some(Arc::new(move |step| {
            match step == "write blob" && switch.load(std::sync::atomic::Ordering::SeqCst) {
                true => Err(std::io::ErrorKind::StorageFull.into()),
                false => Ok(()),
            }
        })),
        ..StoreConfig::default()
    })?;
    let mut client = room.operator().await?;
    let begun = client
        .send(Method::POST, "/v2/a/blobs/uploads/", &[], b"")
        .await?;
    let location = header(&begun, "location")?.to_owned();
    client.send(Method::PATCH, &location, &[], b"01234").await?;
    full.store(true, std::sync::atomic::Ordering::SeqCst);
    let refused = client.send(Method::PATCH, &location, &[], b"56789").await?;
    assert_eq!(refused.status(), StatusCode::INSUFFICIENT_STORAGE);
    full.store(false, std::sync::atomic::Ordering::SeqCst);
    let status = client.get(&location).await?;
    assert_eq!(header(&status, "range")?, "0-4");
    let path = format!("{location}?digest={}", Digest::of(b"0123456789"));
    let done = client.send(Method::PUT, &path, &[], b"56789").await?;
    assert_eq!(done.status(), StatusCode::CREATED);
    Ok(())
}

#[test]
fn collections_do_not_overlap_and_spare_what_is_linked_meanwhile() -> Result<()> {
    let slot: Arc<std::sync::Mutex<Option<std::sync::Weak<Store>>>> = Arc::default();
    let inner = slot.clone();
    let seen = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = seen.clone();
    let room = Room::with(StoreConfig {
        // While content is being removed, another collection asks to begin.
        fault: Some(Arc::new(move |step| {
            let store = inner
                .lock()
                .unwrap()
                .as_ref()
                .and_then(std::sync::Weak::upgrade);
            if let Some(store) = store.filter(|_| step == "remove") {
                let second = store.gc(Duration::ZERO);
                flag.store(
                    matches!(second, Err(StoreError::Collecting)),
                    std::sync::atomic::Ordering::SeqCst,
                );
            }
            Ok(())
        })),
        ..StoreConfig::default()
    })?;
    let operator = kiln_store::registry::Authority::Operator;
    let repo = "a".parse()?;
    let mut upload = room.store.begin_upload(&operator, &repo)?;
    upload.write(b"stray")?;
    upload.commit_any(&operator)?;
    *slot.lock().unwrap() = Some(Arc::downgrade(&room.store));
    let collected = room.store.gc(Duration::ZERO)?;
    assert_eq!(collected.contents, 1);
    assert!(seen.load(std::sync::atomic::Ordering::SeqCst));
    Ok(())
}
