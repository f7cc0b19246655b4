//! An owner that ends in the middle of anything that is neither an upload nor a download: it is asked again of the next one.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use http::{Method, StatusCode};
use kiln_core::Digest;
use kiln_store::HostRegistry;
use kiln_store::host::HostConfig;
use kiln_store::registry::serve::serve_connection;
use kiln_store::registry::{Authority, Reference, RepoName, Store, StoreConfig};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use crate::client::{Answer, Client, digest_of, manifest};

/// How much of its answer an owner still gives.
#[derive(Clone, Copy, Debug)]
enum End {
    WithoutAWord,
    InTheHead,
    InTheBody,
}

/// A store with an image, owned by somebody who answers who he is, and ends at the next request.
async fn owned(dir: &Path, end: End) -> Result<HostRegistry> {
    let store = Arc::new(Store::open(dir, StoreConfig::default())?);
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    tokio::spawn(serve_connection(store.clone(), theirs, Authority::Operator));
    let mut client = Client::over(ours).await?;
    for blob in [&b"{}"[..], b"layer"] {
        let pushed = client.push_blob("t/local/app", blob).await?;
        assert_eq!(pushed.status(), StatusCode::CREATED);
    }
    let image = manifest(b"{}", &[b"layer"]);
    let pushed = client
        .push_manifest("t/local/app", "latest", &image)
        .await?;
    assert_eq!(pushed.status(), StatusCode::CREATED);
    drop(client);
    let listener = UnixListener::bind(dir.join("host.sock"))?;
    tokio::spawn(ends_at_a_request(listener, store, end));
    let attached = HostRegistry::open_or_attach(dir, HostConfig::default()).await?;
    assert!(!attached.is_owner().await);
    Ok(attached)
}

async fn ends_at_a_request(listener: UnixListener, store: Arc<Store>, end: End) -> Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        let head = head_of(&mut stream).await?;
        if head.starts_with("POST /_kiln/call") {
            let about =
                json!({"reply": "about", "with": {"version": 1, "pid": 1, "loopback": "off"}});
            let body = about.to_string();
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(answer.as_bytes()).await?;
            continue;
        }
        let said = match end {
            End::WithoutAWord => "",
            End::InTheHead => "HTTP/1.1 200 OK\r\ncontent-le",
            End::InTheBody => "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"half\":",
        };
        stream.write_all(said.as_bytes()).await?;
        stream.shutdown().await?;
        // The lock of the store goes with its last handle.
        drop((listener, store));
        return Ok(());
    }
}

async fn head_of(stream: &mut UnixStream) -> Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.context("a request")?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// What came of a request, and who answers now.
struct Asked {
    answer: Answer,
    host: HostRegistry,
    _dir: tempfile::TempDir,
}

async fn asked(end: End, method: Method, path: &str, body: &[u8]) -> Result<Asked> {
    let dir = tempfile::tempdir()?;
    let attached = owned(dir.path(), end).await?;
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let host = attached.clone();
    tokio::spawn(async move { host.serve_connection(theirs, Authority::Operator).await });
    let types = [("content-type", "application/vnd.oci.image.manifest.v1+json")];
    let headers = if body.is_empty() { &[][..] } else { &types[..] };
    let mut client = Client::over(ours).await?;
    let answer = client.send(method.clone(), path, headers, body).await;
    let answer = answer.with_context(|| format!("{method} {path} {end:?}"))?;
    assert!(attached.is_owner().await, "{method} {path} {end:?}");
    Ok(Asked {
        answer,
        host: attached,
        _dir: dir,
    })
}

#[tokio::test]
async fn whatever_its_owner_took_along_is_asked_of_the_next() -> Result<()> {
    let image = manifest(b"{}", &[b"layer"]);
    let bytes = serde_json::to_vec(&image)?;
    let digest = digest_of(&image);
    let layer = Digest::of(b"layer");
    for end in [End::WithoutAWord, End::InTheHead, End::InTheBody] {
        let got = asked(end, Method::GET, "/v2/t/local/app/manifests/latest", b"").await?;
        assert_eq!(
            (got.answer.status(), &got.answer.body()[..]),
            (StatusCode::OK, &bytes[..]),
            "{end:?}"
        );
        let listed = asked(end, Method::GET, "/v2/t/local/app/tags/list", b"").await?;
        let names: serde_json::Value = serde_json::from_slice(listed.answer.body())?;
        assert_eq!(names["tags"], json!(["latest"]), "{end:?}");
        let put = asked(end, Method::PUT, "/v2/t/local/app/manifests/again", &bytes).await?;
        assert_eq!(put.answer.status(), StatusCode::CREATED, "{end:?}");
        let (repo, again): (RepoName, Reference) = ("t/local/app".parse()?, "again".parse()?);
        assert_eq!(put.host.resolve(&repo, &again).await?, digest, "{end:?}");
        let begin = "/v2/t/local/new/blobs/uploads/";
        let begun = asked(end, Method::POST, begin, b"").await?;
        assert_eq!(begun.answer.status(), StatusCode::ACCEPTED, "{end:?}");
        assert!(begun.answer.headers().contains_key("location"), "{end:?}");
        let mount = format!("{begin}?mount={layer}&from=t/local/app");
        let mounted = asked(end, Method::POST, &mount, b"").await?;
        assert_eq!(mounted.answer.status(), StatusCode::CREATED, "{end:?}");
        let none = "/v2/t/local/app/manifests/none";
        let missing = asked(end, Method::GET, none, b"").await?;
        assert_eq!(missing.answer.status(), StatusCode::NOT_FOUND, "{end:?}");
    }
    for end in [End::WithoutAWord, End::InTheHead] {
        let path = format!("/v2/t/local/app/blobs/{layer}");
        let there = asked(end, Method::HEAD, &path, b"").await?;
        assert_eq!(there.answer.status(), StatusCode::OK, "{end:?}");
    }
    Ok(())
}
