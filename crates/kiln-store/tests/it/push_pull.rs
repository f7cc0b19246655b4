//! Pushing and pulling over HTTP: chunks, single requests, ranges, manifests, tags, referrers.

use anyhow::Result;
use http::{Method, StatusCode};
use kiln_core::Digest;
use serde_json::{Value, json};

use crate::client::{code, descriptor, digest_of, header, manifest};
use crate::room::{Room, entries};

#[tokio::test]
async fn chunked_upload_manifest_and_pull() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    let bytes: Vec<u8> = (0..3_000_000_u32).flat_map(|n| n.to_le_bytes()).collect();
    let (first, second) = bytes.split_at(5_000_000);
    let begun = client
        .send(Method::POST, "/v2/t/local/app/blobs/uploads/", &[], b"")
        .await?;
    assert_eq!(begun.status(), StatusCode::ACCEPTED);
    let location = header(&begun, "location")?.to_owned();
    let ranges = [
        ("content-range", format!("0-{}", first.len() - 1)),
        (
            "content-range",
            format!("{}-{}", first.len(), bytes.len() - 1),
        ),
    ];
    for (chunk, (name, range)) in [first, second].into_iter().zip(&ranges) {
        let headers = [(*name, range.as_str())];
        let sent = client
            .send(Method::PATCH, &location, &headers, chunk)
            .await?;
        assert_eq!(sent.status(), StatusCode::ACCEPTED, "{}", code(&sent));
    }
    let status = client.get(&location).await?;
    assert_eq!(status.status(), StatusCode::NO_CONTENT);
    assert_eq!(header(&status, "range")?, format!("0-{}", bytes.len() - 1));
    let digest = Digest::of(&bytes);
    let path = format!("{location}?digest={digest}");
    let done = client.send(Method::PUT, &path, &[], b"").await?;
    assert_eq!(done.status(), StatusCode::CREATED, "{}", code(&done));
    assert_eq!(header(&done, "docker-content-digest")?, digest.to_string());

    client.push_blob("t/local/app", b"{}").await?;
    let image = manifest(b"{}", &[&bytes]);
    let put = client.push_manifest("t/local/app", "v1", &image).await?;
    assert_eq!(put.status(), StatusCode::CREATED, "{}", code(&put));
    let got = client.get("/v2/t/local/app/manifests/v1").await?;
    assert_eq!(serde_json::from_slice::<Value>(got.body())?, image);
    let blob = format!("/v2/t/local/app/blobs/{digest}");
    assert_eq!(client.get(&blob).await?.body(), &bytes);
    let head = client.send(Method::HEAD, &blob, &[], b"").await?;
    assert_eq!(header(&head, "content-length")?, bytes.len().to_string());
    let part = [("range", "bytes=700000-1400000")];
    let part = client.send(Method::GET, &blob, &part, b"").await?;
    assert_eq!(part.status(), StatusCode::PARTIAL_CONTENT);
    assert_eq!(part.body(), &bytes[700_000..=1_400_000]);
    assert_eq!(entries(&room.path().join("tmp")), 0);
    Ok(())
}

#[tokio::test]
async fn chunks_out_of_order_are_refused_and_the_session_goes_on() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    let begun = client
        .send(Method::POST, "/v2/a/blobs/uploads/", &[], b"")
        .await?;
    let location = header(&begun, "location")?.to_owned();
    let ahead = [("content-range", "5-9")];
    let refused = client
        .send(Method::PATCH, &location, &ahead, b"56789")
        .await?;
    assert_eq!(refused.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(header(&refused, "location")?, location);
    let lying = [("content-range", "0-9")];
    let refused = client
        .send(Method::PATCH, &location, &lying, b"01234")
        .await?;
    assert_eq!(code(&refused), "SIZE_INVALID");
    client.send(Method::PATCH, &location, &[], b"01234").await?;
    let path = format!("{location}?digest={}", Digest::of(b"0123456789"));
    let tail = [("content-range", "5-9")];
    let done = client.send(Method::PUT, &path, &tail, b"56789").await?;
    assert_eq!(done.status(), StatusCode::CREATED);
    let again = client.get(&location).await?;
    assert_eq!(code(&again), "BLOB_UPLOAD_UNKNOWN");
    Ok(())
}

#[tokio::test]
async fn a_wrong_digest_stores_nothing() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    let path = format!("/v2/a/blobs/uploads/?digest={}", Digest::of(b"good"));
    let refused = client.send(Method::POST, &path, &[], b"evil").await?;
    assert_eq!(
        (refused.status().as_u16(), code(&refused).as_str()),
        (400, "DIGEST_INVALID")
    );
    let sha512 = "/v2/a/blobs/uploads/?digest=sha512:00";
    let refused = client.send(Method::POST, sha512, &[], b"x").await?;
    assert_eq!(code(&refused), "DIGEST_INVALID");
    assert_eq!(entries(&room.path().join("tmp")), 0);
    assert_eq!(room.store.stats()?.contents, 0);
    Ok(())
}

#[tokio::test]
async fn blobs_are_readable_only_where_they_were_pushed_or_mounted() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    client.push_blob("t/one/app", b"layer").await?;
    let digest = Digest::of(b"layer");
    let elsewhere = client.get(&format!("/v2/t/two/app/blobs/{digest}")).await?;
    assert_eq!(
        (elsewhere.status().as_u16(), code(&elsewhere).as_str()),
        (404, "BLOB_UNKNOWN")
    );
    client.push_blob("t/two/app", b"{}").await?;
    let image = manifest(b"{}", &[b"layer"]);
    let refused = client.push_manifest("t/two/app", "v1", &image).await?;
    assert_eq!(code(&refused), "MANIFEST_BLOB_UNKNOWN");
    let still = client.get(&format!("/v2/t/two/app/blobs/{digest}")).await?;
    assert_eq!(
        still.status(),
        StatusCode::NOT_FOUND,
        "a manifest makes no link"
    );
    let mount = format!("/v2/t/two/app/blobs/uploads/?mount={digest}&from=t/one/app");
    let mounted = client.send(Method::POST, &mount, &[], b"").await?;
    assert_eq!(mounted.status(), StatusCode::CREATED);
    assert_eq!(
        client
            .push_manifest("t/two/app", "v1", &image)
            .await?
            .status(),
        StatusCode::CREATED
    );
    let absent = format!(
        "/v2/t/two/app/blobs/uploads/?mount={}&from=t/one/app",
        Digest::of(b"?")
    );
    let begun = client.send(Method::POST, &absent, &[], b"").await?;
    assert_eq!(begun.status(), StatusCode::ACCEPTED, "an upload instead");
    Ok(())
}

#[tokio::test]
async fn a_manifest_is_no_blob_and_sizes_must_be_true() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    client.push_blob("a", b"{}").await?;
    let image = manifest(b"{}", &[]);
    client.push_manifest("a", "v1", &image).await?;
    let as_blob = client
        .get(&format!("/v2/a/blobs/{}", digest_of(&image)))
        .await?;
    assert_eq!(as_blob.status(), StatusCode::NOT_FOUND);
    let mut lying = image.clone();
    lying["config"]["size"] = json!(3);
    assert_eq!(
        code(&client.push_manifest("a", "v2", &lying).await?),
        "SIZE_INVALID"
    );
    let wrong = Digest::of(b"other").to_string();
    assert_eq!(
        code(&client.push_manifest("a", &wrong, &image).await?),
        "DIGEST_INVALID"
    );
    let huge = vec![b' '; (4 << 20) + 1];
    let refused = client
        .send(Method::PUT, "/v2/a/manifests/v3", &[], &huge)
        .await?;
    assert_eq!(refused.status(), StatusCode::PAYLOAD_TOO_LARGE);
    Ok(())
}

#[tokio::test]
async fn tags_are_listed_in_pages_and_deleted() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    assert_eq!(code(&client.get("/v2/a/tags/list").await?), "NAME_UNKNOWN");
    client.push_blob("a", b"{}").await?;
    let image = manifest(b"{}", &[]);
    for tag in ["b", "A", "c", "a"] {
        client.push_manifest("a", tag, &image).await?;
    }
    let mut seen = Vec::new();
    let mut path = "/v2/a/tags/list?n=3".to_owned();
    loop {
        let page = client.get(&path).await?;
        let value: Value = serde_json::from_slice(page.body())?;
        seen.extend(
            value["tags"]
                .as_array()
                .unwrap()
                .iter()
                .map(|t| t.as_str().unwrap().to_owned()),
        );
        match header(&page, "link") {
            Ok(link) => path = link[1..link.find('>').unwrap()].to_owned(),
            Err(_) => break,
        }
    }
    assert_eq!(seen, ["A", "a", "b", "c"]);
    let gone = client
        .send(Method::DELETE, "/v2/a/manifests/b", &[], b"")
        .await?;
    assert_eq!(gone.status(), StatusCode::ACCEPTED);
    assert_eq!(
        code(&client.get("/v2/a/manifests/b").await?),
        "MANIFEST_UNKNOWN"
    );
    let path = format!("/v2/a/manifests/{}", digest_of(&image));
    assert_eq!(client.get(&path).await?.status(), StatusCode::OK);
    client.send(Method::DELETE, &path, &[], b"").await?;
    assert_eq!(
        code(&client.get("/v2/a/manifests/c").await?),
        "MANIFEST_UNKNOWN"
    );
    Ok(())
}

#[tokio::test]
async fn referrers_are_found_filtered_and_forgotten() -> Result<()> {
    let room = Room::new()?;
    let mut client = room.operator().await?;
    client.push_blob("a", b"{}").await?;
    let subject = manifest(b"{}", &[]);
    let about = digest_of(&subject);
    let mut referrer = subject.clone();
    referrer["artifactType"] = json!("application/x.sbom");
    referrer["annotations"] = json!({"k": "v"});
    referrer["subject"] = descriptor("application/vnd.oci.image.manifest.v1+json", b"");
    referrer["subject"]["digest"] = json!(about);
    // The subject does not exist yet: allowed.
    let put = client
        .push_manifest("a", &digest_of(&referrer).to_string(), &referrer)
        .await?;
    assert_eq!(put.status(), StatusCode::CREATED, "{}", code(&put));
    assert_eq!(header(&put, "oci-subject")?, about.to_string());
    let path = format!("/v2/a/referrers/{about}");
    let list: Value = serde_json::from_slice(client.get(&path).await?.body())?;
    assert_eq!(list["manifests"][0]["artifactType"], "application/x.sbom");
    assert_eq!(list["manifests"][0]["annotations"]["k"], "v");
    let filtered = client
        .get(&format!("{path}?artifactType=application/x.other"))
        .await?;
    assert_eq!(header(&filtered, "oci-filters-applied")?, "artifactType");
    let list: Value = serde_json::from_slice(filtered.body())?;
    assert_eq!(list["manifests"], json!([]));
    let this = format!("/v2/a/manifests/{}", digest_of(&referrer));
    client.send(Method::DELETE, &this, &[], b"").await?;
    let list: Value = serde_json::from_slice(client.get(&path).await?.body())?;
    assert_eq!(list["manifests"], json!([]));
    let nowhere = client
        .get(&format!("/v2/nowhere/referrers/{about}"))
        .await?;
    assert_eq!(nowhere.status(), StatusCode::OK);
    Ok(())
}
