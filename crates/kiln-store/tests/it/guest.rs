//! What a guest may and may not do: its own quarantine only, within its quota, while its lease lives.

use anyhow::Result;
use http::{Method, StatusCode};
use kiln_core::Digest;
use kiln_store::registry::{AttemptAuthority, Authority, StoreConfig};

use crate::client::{code, header, manifest};
use crate::room::{Room, entries, lease};

#[tokio::test]
async fn a_guest_cannot_read_or_write_beyond_its_trees() -> Result<()> {
    let room = Room::new()?;
    let mut operator = room.operator().await?;
    operator.push_blob("shared/node", b"base").await?;
    operator.push_blob("t/other/app", b"secret").await?;
    let mut guest = room.connect(Authority::Attempt(room.guest("b1"))).await?;
    assert_eq!(
        guest.push_blob("quarantine/b1/1", b"x").await?.status(),
        StatusCode::CREATED
    );
    for repo in ["t/local/app", "shared/node", "quarantine/b2/1"] {
        let refused = guest.push_blob(repo, b"x").await?;
        assert_eq!(
            (refused.status().as_u16(), code(&refused).as_str()),
            (403, "DENIED"),
            "{repo}"
        );
    }
    let base = format!("/v2/shared/node/blobs/{}", Digest::of(b"base"));
    assert_eq!(guest.get(&base).await?.body().as_ref(), b"base");
    let secret = Digest::of(b"secret");
    for path in [
        format!("/v2/t/other/app/blobs/{secret}"),
        "/v2/t/other/app/tags/list".to_owned(),
        format!("/v2/t/other/app/referrers/{secret}"),
    ] {
        assert_eq!(code(&guest.get(&path).await?), "DENIED", "{path}");
    }
    // A mount from where it may not read begins an upload and tells nothing.
    let mount = format!("/v2/quarantine/b1/1/blobs/uploads/?mount={secret}&from=t/other/app");
    let begun = guest.send(Method::POST, &mount, &[], b"").await?;
    assert_eq!(begun.status(), StatusCode::ACCEPTED);
    let stolen = format!("/v2/quarantine/b1/1/blobs/{secret}");
    assert_eq!(guest.get(&stolen).await?.status(), StatusCode::NOT_FOUND);
    let delete = guest.send(Method::DELETE, &base, &[], b"").await?;
    assert_eq!(code(&delete), "DENIED");
    Ok(())
}

#[tokio::test]
async fn what_lies_in_a_source_is_there_when_a_guest_asks_and_nothing_else_is() -> Result<()> {
    let room = Room::new()?;
    let mut operator = room.operator().await?;
    operator.push_blob("shared/node", b"base").await?;
    operator.push_blob("t/local/app", b"layer").await?;
    operator.push_blob("t/local/not-a-source", b"other").await?;
    operator.push_blob("t/other/app", b"secret").await?;
    let sources =
        ["shared/node", "t/local/app", "t/other/app"].map(|name| name.parse().expect("a name"));
    let authority = room.guest("b1").with_sources(sources);
    let mut guest = room.connect(Authority::Attempt(authority)).await?;
    let path = |content: &[u8]| format!("/v2/quarantine/b1/1/blobs/{}", Digest::of(content));
    // Reading alone mounts nothing.
    assert_eq!(
        guest.get(&path(b"base")).await?.status(),
        StatusCode::NOT_FOUND
    );
    for (content, status) in [
        (b"base".as_slice(), StatusCode::OK),
        (b"layer", StatusCode::OK),
        (b"other", StatusCode::NOT_FOUND),
        (b"secret", StatusCode::NOT_FOUND),
        (b"nowhere", StatusCode::NOT_FOUND),
    ] {
        let asked = guest.send(Method::HEAD, &path(content), &[], b"").await?;
        assert_eq!(
            asked.status(),
            status,
            "{}",
            String::from_utf8_lossy(content)
        );
    }
    assert_eq!(guest.get(&path(b"base")).await?.body().as_ref(), b"base");
    // Elsewhere than in its quarantine asking changes nothing, and without a live lease it is refused.
    let shared = format!("/v2/shared/node/blobs/{}", Digest::of(b"layer"));
    let asked = guest.send(Method::HEAD, &shared, &[], b"").await?;
    assert_eq!(asked.status(), StatusCode::NOT_FOUND);
    operator.push_blob("shared/node", b"later").await?;
    room.leases.end(&lease("b1", 1).attempt);
    let asked = guest.send(Method::HEAD, &path(b"later"), &[], b"").await?;
    assert_eq!(asked.status(), StatusCode::FORBIDDEN);
    Ok(())
}

#[tokio::test]
async fn writes_end_with_the_lease_even_between_chunk_and_commit() -> Result<()> {
    let room = Room::new()?;
    let authority = room.guest("b1");
    let mut guest = room.connect(Authority::Attempt(authority.clone())).await?;
    let uploads = "/v2/quarantine/b1/1/blobs/uploads/";
    let begun = guest.send(Method::POST, uploads, &[], b"").await?;
    let location = header(&begun, "location")?.to_owned();
    guest.send(Method::PATCH, &location, &[], b"layer").await?;
    room.leases.grant(lease("b1", 2));
    let path = format!("{location}?digest={}", Digest::of(b"layer"));
    let refused = guest.send(Method::PUT, &path, &[], b"").await?;
    assert_eq!(
        (refused.status().as_u16(), code(&refused).as_str()),
        (403, "DENIED")
    );
    assert_eq!(room.store.stats()?.contents, 0);
    // The next claim has sessions of its own and cannot take up the old one's.
    let next = AttemptAuthority::new(lease("b1", 2), room.leases.clone());
    let mut next = room.connect(Authority::Attempt(next)).await?;
    assert_eq!(
        code(&next.send(Method::PUT, &path, &[], b"").await?),
        "BLOB_UPLOAD_UNKNOWN"
    );
    assert_eq!(
        next.push_blob("quarantine/b1/1", b"layer").await?.status(),
        StatusCode::CREATED
    );
    room.leases.end(&authority.lease().attempt);
    assert_eq!(
        code(&next.push_blob("quarantine/b1/1", b"y").await?),
        "DENIED"
    );
    Ok(())
}

#[tokio::test]
async fn sessions_belong_to_their_repository_and_caller() -> Result<()> {
    let room = Room::new()?;
    let mut one = room.connect(Authority::Attempt(room.guest("b1"))).await?;
    let mut two = room.connect(Authority::Attempt(room.guest("b2"))).await?;
    let begun = one
        .send(Method::POST, "/v2/quarantine/b1/1/blobs/uploads/", &[], b"")
        .await?;
    let id = header(&begun, "docker-upload-uuid")?.to_owned();
    let theirs = format!("/v2/quarantine/b2/1/blobs/uploads/{id}");
    assert_eq!(code(&two.get(&theirs).await?), "BLOB_UPLOAD_UNKNOWN");
    let side = format!("/v2/quarantine/b1/1/side/blobs/uploads/{id}");
    assert_eq!(code(&one.get(&side).await?), "BLOB_UPLOAD_UNKNOWN");
    let own = format!("/v2/quarantine/b1/1/blobs/uploads/{id}");
    let gone = one.send(Method::DELETE, &own, &[], b"").await?;
    assert_eq!(gone.status(), StatusCode::NO_CONTENT);
    assert_eq!(entries(&room.path().join("tmp")), 0);
    Ok(())
}

#[tokio::test]
async fn an_attempt_cannot_store_more_than_its_quota() -> Result<()> {
    let room = Room::new()?;
    let authority = room.guest("b1").with_bytes_max(100_000);
    let mut guest = room.connect(Authority::Attempt(authority.clone())).await?;
    let repo = "quarantine/b1/1";
    assert_eq!(
        guest.push_blob(repo, &[1; 60_000]).await?.status(),
        StatusCode::CREATED
    );
    let refused = guest.push_blob(repo, &[2; 60_000]).await?;
    assert_eq!(
        (refused.status().as_u16(), code(&refused).as_str()),
        (403, "DENIED")
    );
    // The refused bytes were given back, and pushing the same blob again costs nothing.
    let mut guest = room.connect(Authority::Attempt(authority)).await?;
    assert_eq!(
        guest.push_blob(repo, &[3; 30_000]).await?.status(),
        StatusCode::CREATED
    );
    assert_eq!(entries(&room.path().join("tmp")), 0);
    let names = (0..30).map(|n| format!("v{n}"));
    guest.push_blob(repo, b"").await?;
    let image = manifest(b"", &[]);
    let mut refused = false;
    for tag in names {
        refused |= code(&guest.push_manifest(repo, &tag, &image).await?) == "DENIED";
    }
    assert!(refused, "names count too");
    Ok(())
}

#[tokio::test]
async fn unfinished_uploads_are_bounded() -> Result<()> {
    let room = Room::new()?;
    let mut guest = room.connect(Authority::Attempt(room.guest("b1"))).await?;
    let path = "/v2/quarantine/b1/1/blobs/uploads/";
    for _ in 0..kiln_store::registry::upload::SESSIONS_PER_CALLER_MAX {
        let begun = guest.send(Method::POST, path, &[], b"").await?;
        assert_eq!(begun.status(), StatusCode::ACCEPTED);
    }
    let refused = guest.send(Method::POST, path, &[], b"").await?;
    assert_eq!(code(&refused), "TOOMANYREQUESTS");
    let mut other = room.connect(Authority::Attempt(room.guest("b2"))).await?;
    assert_eq!(
        other.push_blob("quarantine/b2/1", b"x").await?.status(),
        StatusCode::CREATED
    );
    Ok(())
}

#[tokio::test]
async fn a_nearly_full_disk_refuses_clearly_and_loses_nothing() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    client.push_blob("a", b"kept").await?;
    let path = room.path();
    drop(client);
    let Room { store, dir, leases } = room;
    // The connection's task lets go of the store when it sees the end of its stream.
    while std::sync::Arc::strong_count(&store) > 1 {
        tokio::task::yield_now().await;
    }
    drop(store);
    let config = StoreConfig {
        free_bytes_min: u64::MAX,
        ..StoreConfig::default()
    };
    let store = crate::room::opened_again(&path, &config)?;
    let room = Room { store, dir, leases };
    let mut client = room.operator().await?;
    let refused = client.push_blob("a", b"new").await?;
    assert_eq!(refused.status(), StatusCode::INSUFFICIENT_STORAGE);
    let message = String::from_utf8(refused.body().to_vec())?;
    assert!(message.contains("disk is full"), "{message}");
    let kept = client
        .get(&format!("/v2/a/blobs/{}", Digest::of(b"kept")))
        .await?;
    assert_eq!(kept.body().as_ref(), b"kept");
    Ok(())
}
