//! The four workflows of the OCI distribution-spec v1.1 (pull, push, content discovery, content management), end-point
//! by end-point as its table names them, over real TCP against the loopback door. docs/reference/conformance.md lists
//! what is run.

use anyhow::{Context as _, Result};
use http::{Method, StatusCode};
use kiln_core::Digest;
use kiln_store::registry::manifest::{OCI_INDEX, OCI_MANIFEST};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::client::{Answer, Client, descriptor, digest_of, header, manifest};
use crate::loopback::Door;

const NAME: &str = "t/local/conformance/app";
const OTHER: &str = "t/local/conformance/other";
const CONFIG: &[u8] =
    br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
const LAYER: &[u8] = b"the one layer of this image, which is not a tar at all";
const EMPTY: &[u8] = b"{}";
/// Error codes of the specification.
const CODES: [&str; 14] = [
    "BLOB_UNKNOWN",
    "BLOB_UPLOAD_INVALID",
    "BLOB_UPLOAD_UNKNOWN",
    "DIGEST_INVALID",
    "MANIFEST_BLOB_UNKNOWN",
    "MANIFEST_INVALID",
    "MANIFEST_UNKNOWN",
    "NAME_INVALID",
    "NAME_UNKNOWN",
    "SIZE_INVALID",
    "UNAUTHORIZED",
    "DENIED",
    "UNSUPPORTED",
    "TOOMANYREQUESTS",
];

struct Spec {
    client: Client,
    login: String,
    _door: Door,
}

impl Spec {
    async fn new() -> Result<Self> {
        let door = Door::open(&[]).await?;
        let stream = TcpStream::connect(door.address).await?;
        let client = Client::over(stream).await?;
        Ok(Self {
            client: client.with_host(&door.address.to_string()),
            login: door.basic()?,
            _door: door,
        })
    }

    /// One request; whatever is refused has the specification's error body.
    async fn ask(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Answer> {
        let login = self.login.clone();
        let mut all = vec![("authorization", login.as_str())];
        all.extend(headers);
        let head = method == Method::HEAD;
        // A location may be absolute or relative.
        let path = path
            .split_once("://")
            .and_then(|(_, rest)| rest.split_once('/'))
            .map_or(path.to_owned(), |(_, rest)| format!("/{rest}"));
        let answer = self.client.send(method, &path, &all, body).await?;
        if answer.status().is_client_error() && !head {
            let value: Value = serde_json::from_slice(answer.body())
                .with_context(|| format!("{path}: {:?}", answer.body()))?;
            let code = value["errors"][0]["code"].as_str().unwrap_or_default();
            assert!(CODES.contains(&code), "{path}: {code:?}");
        }
        Ok(answer)
    }

    async fn get(&mut self, path: &str) -> Result<Answer> {
        self.ask(Method::GET, path, &[], b"").await
    }

    async fn status(&mut self, method: Method, path: &str) -> Result<u16> {
        Ok(self.ask(method, path, &[], b"").await?.status().as_u16())
    }

    /// end-4b, or end-4a and end-6.
    async fn push_blob(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = format!("/v2/{name}/blobs/uploads/?digest={}", Digest::of(bytes));
        let pushed = self.ask(Method::POST, &path, &OCTETS, bytes).await?;
        assert_eq!(pushed.status(), StatusCode::CREATED);
        Ok(())
    }

    async fn put_manifest(&mut self, name: &str, reference: &str, value: &Value) -> Result<Answer> {
        let media_type = value["mediaType"].as_str().unwrap_or(OCI_MANIFEST);
        let path = format!("/v2/{name}/manifests/{reference}");
        let bytes = serde_json::to_vec(value)?;
        self.ask(Method::PUT, &path, &[("content-type", media_type)], &bytes)
            .await
    }

    /// An image with these tags.
    async fn image(&mut self, tags: &[&str]) -> Result<Value> {
        for bytes in [CONFIG, LAYER] {
            self.push_blob(NAME, bytes).await?;
        }
        let image = manifest(CONFIG, &[LAYER]);
        for tag in tags {
            let put = self.put_manifest(NAME, tag, &image).await?;
            assert_eq!(put.status(), StatusCode::CREATED);
        }
        Ok(image)
    }
}

const OCTETS: [(&str, &str); 1] = [("content-type", "application/octet-stream")];

#[tokio::test]
async fn pull() -> Result<()> {
    let mut spec = Spec::new().await?;
    let image = spec.image(&["tagtest0"]).await?;
    // end-1
    assert_eq!(spec.get("/v2/").await?.status(), StatusCode::OK);
    // end-2
    let absent = Digest::of(b"nothing has this content");
    let blob = format!("/v2/{NAME}/blobs/{}", Digest::of(LAYER));
    let no_blob = format!("/v2/{NAME}/blobs/{absent}");
    for method in [Method::HEAD, Method::GET] {
        assert_eq!(spec.status(method.clone(), &no_blob).await?, 404);
        let found = spec.ask(method.clone(), &blob, &[], b"").await?;
        assert_eq!(found.status(), StatusCode::OK);
        let named = header(&found, "docker-content-digest")?;
        assert_eq!(named, Digest::of(LAYER).to_string());
        assert_eq!(header(&found, "content-length")?, LAYER.len().to_string());
        let body: &[u8] = if method == Method::HEAD { b"" } else { LAYER };
        assert_eq!(found.body().as_ref(), body);
    }
    let part = [("range", "bytes=4-7")];
    let part = spec.ask(Method::GET, &blob, &part, b"").await?;
    assert_eq!(part.status(), StatusCode::PARTIAL_CONTENT);
    assert_eq!(part.body().as_ref(), &LAYER[4..8]);
    // end-3
    let accept = [("accept", OCI_MANIFEST)];
    for method in [Method::HEAD, Method::GET] {
        for reference in ["nosuchtag".to_owned(), absent.to_string()] {
            let path = format!("/v2/{NAME}/manifests/{reference}");
            let missing = spec.ask(method.clone(), &path, &accept, b"").await?;
            assert_eq!(missing.status(), StatusCode::NOT_FOUND);
        }
        for reference in ["tagtest0".to_owned(), digest_of(&image).to_string()] {
            let path = format!("/v2/{NAME}/manifests/{reference}");
            let found = spec.ask(method.clone(), &path, &accept, b"").await?;
            assert_eq!(found.status(), StatusCode::OK);
            assert_eq!(header(&found, "content-type")?, OCI_MANIFEST);
            let named = header(&found, "docker-content-digest")?;
            assert_eq!(named, digest_of(&image).to_string());
        }
    }
    // Error codes.
    let wrong = spec
        .put_manifest(NAME, "sha256:totallywrong", &image)
        .await?;
    assert!(wrong.status().is_client_error());
    let nowhere = format!("/v2/{OTHER}/blobs/{}", Digest::of(LAYER));
    assert_eq!(spec.status(Method::GET, &nowhere).await?, 404);
    Ok(())
}

#[tokio::test]
async fn push_of_blobs() -> Result<()> {
    let mut spec = Spec::new().await?;
    let uploads = format!("/v2/{NAME}/blobs/uploads/");
    // end-4a, end-5 without a range (streamed), end-6
    let begun = spec.ask(Method::POST, &uploads, &[], b"").await?;
    assert_eq!(begun.status(), StatusCode::ACCEPTED);
    let session = header(&begun, "location")?.to_owned();
    let sent = spec.ask(Method::PATCH, &session, &OCTETS, LAYER).await?;
    assert_eq!(sent.status(), StatusCode::ACCEPTED);
    let put = format!(
        "{}?digest={}",
        header(&sent, "location")?,
        Digest::of(LAYER)
    );
    let done = spec.ask(Method::PUT, &put, &OCTETS, b"").await?;
    assert_eq!(done.status(), StatusCode::CREATED);
    let location = header(&done, "location")?.to_owned();
    assert_eq!(spec.get(&location).await?.body().as_ref(), LAYER);
    // end-4a, end-6 with the whole blob
    let begun = spec.ask(Method::POST, &uploads, &[], b"").await?;
    let put = format!(
        "{}?digest={}",
        header(&begun, "location")?,
        Digest::of(CONFIG)
    );
    let done = spec.ask(Method::PUT, &put, &OCTETS, CONFIG).await?;
    assert_eq!(done.status(), StatusCode::CREATED);
    // A digest that is not the content's.
    let begun = spec.ask(Method::POST, &uploads, &[], b"").await?;
    let put = format!(
        "{}?digest={}",
        header(&begun, "location")?,
        Digest::of(b"x")
    );
    let refused = spec.ask(Method::PUT, &put, &OCTETS, b"y").await?;
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    // end-11
    let digest = Digest::of(LAYER);
    let absent = Digest::of(b"nothing has this content");
    for (query, expected) in [
        (format!("mount={digest}&from={NAME}"), StatusCode::CREATED),
        (
            format!("mount={digest}&from={OTHER}/no"),
            StatusCode::ACCEPTED,
        ),
        (format!("mount={absent}&from={NAME}"), StatusCode::ACCEPTED),
        (format!("mount={digest}"), StatusCode::ACCEPTED),
    ] {
        let path = format!("/v2/{OTHER}/blobs/uploads/?{query}");
        let mounted = spec.ask(Method::POST, &path, &[], b"").await?;
        assert_eq!(mounted.status(), expected, "{query}");
        assert!(!header(&mounted, "location")?.is_empty());
    }
    let mounted = format!("/v2/{OTHER}/blobs/{digest}");
    assert_eq!(spec.get(&mounted).await?.body().as_ref(), LAYER);
    Ok(())
}

#[tokio::test]
async fn push_in_chunks() -> Result<()> {
    let mut spec = Spec::new().await?;
    let uploads = format!("/v2/{NAME}/blobs/uploads/");
    let begun = spec
        .ask(Method::POST, &uploads, &[("content-length", "0")], b"")
        .await?;
    let session = header(&begun, "location")?.to_owned();
    let (first, second) = LAYER.split_at(20);
    let range = |from: usize, bytes: &[u8]| format!("{from}-{}", from + bytes.len() - 1);
    let chunk = |range: String| {
        [
            OCTETS[0],
            ("content-range", Box::leak(range.into_boxed_str()) as &str),
        ]
    };
    // Out of order.
    let late = chunk(range(20, second));
    let refused = spec.ask(Method::PATCH, &session, &late, second).await?;
    assert_eq!(refused.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    let early = chunk(range(0, first));
    let taken = spec.ask(Method::PATCH, &session, &early, first).await?;
    assert_eq!(taken.status(), StatusCode::ACCEPTED);
    assert_eq!(header(&taken, "range")?, "0-19");
    let session = header(&taken, "location")?.to_owned();
    // The same again.
    let refused = spec.ask(Method::PATCH, &session, &early, first).await?;
    assert_eq!(refused.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    // end-13
    let status = spec.get(&session).await?;
    assert_eq!(status.status(), StatusCode::NO_CONTENT);
    assert_eq!(header(&status, "range")?, "0-19");
    let session = header(&status, "location")?.to_owned();
    let taken = spec.ask(Method::PATCH, &session, &late, second).await?;
    assert_eq!(taken.status(), StatusCode::ACCEPTED);
    let put = format!(
        "{}?digest={}",
        header(&taken, "location")?,
        Digest::of(LAYER)
    );
    let done = spec
        .ask(Method::PUT, &put, &[("content-length", "0")], b"")
        .await?;
    assert_eq!(done.status(), StatusCode::CREATED);
    let location = header(&done, "location")?.to_owned();
    assert_eq!(spec.get(&location).await?.body().as_ref(), LAYER);
    // A session that is over, and one that is given up.
    assert_eq!(spec.status(Method::GET, &session).await?, 404);
    let begun = spec.ask(Method::POST, &uploads, &[], b"").await?;
    let session = header(&begun, "location")?.to_owned();
    assert_eq!(spec.status(Method::DELETE, &session).await?, 204);
    assert_eq!(spec.status(Method::GET, &session).await?, 404);
    Ok(())
}

#[tokio::test]
async fn push_of_manifests() -> Result<()> {
    let mut spec = Spec::new().await?;
    let tags = ["test0", "test1", "test2", "test3"];
    let image = spec.image(&tags).await?;
    let put = spec.put_manifest(NAME, "latest", &image).await?;
    let location = header(&put, "location")?.to_owned();
    let accept = [("accept", OCI_MANIFEST)];
    let got = spec.ask(Method::GET, &location, &accept, b"").await?;
    assert_eq!(got.body().as_ref(), serde_json::to_vec(&image)?);
    // By digest, and one without layers.
    let digest = digest_of(&image).to_string();
    let put = spec.put_manifest(NAME, &digest, &image).await?;
    assert_eq!(put.status(), StatusCode::CREATED);
    let bare = manifest(CONFIG, &[]);
    let put = spec.put_manifest(NAME, "emptylayer", &bare).await?;
    assert_eq!(put.status(), StatusCode::CREATED);
    // Another digest than its own; blobs that are not there; something else than a manifest.
    let wrong = Digest::of(b"x").to_string();
    assert_eq!(spec.put_manifest(NAME, &wrong, &image).await?.status(), 400);
    let dangling = manifest(CONFIG, &[b"never pushed"]);
    let refused = spec.put_manifest(NAME, "dangling", &dangling).await?;
    assert!(refused.status().is_client_error());
    let refused = spec.put_manifest(NAME, "junk", &json!(["junk"])).await?;
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    // An index of it.
    let entry = descriptor(OCI_MANIFEST, &serde_json::to_vec(&image)?);
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]});
    let put = spec.put_manifest(NAME, "index", &index).await?;
    assert_eq!(put.status(), StatusCode::CREATED);
    Ok(())
}

#[tokio::test]
async fn content_discovery() -> Result<()> {
    let mut spec = Spec::new().await?;
    let image = spec.image(&["test2", "test0", "test3", "test1"]).await?;
    // end-8a, end-8b
    let list = format!("/v2/{NAME}/tags/list");
    let mut names = async |query: &str| -> Result<Vec<String>> {
        let got = spec.get(&format!("{list}{query}")).await?;
        assert_eq!(got.status(), StatusCode::OK);
        let value: Value = serde_json::from_slice(got.body())?;
        assert_eq!(value["name"], NAME);
        Ok(serde_json::from_value(value["tags"].clone())?)
    };
    assert_eq!(names("").await?, ["test0", "test1", "test2", "test3"]);
    assert_eq!(names("?n=2").await?, ["test0", "test1"]);
    assert_eq!(names("?n=2&last=test1").await?, ["test2", "test3"]);
    assert_eq!(names("?n=0").await?, Vec::<String>::new());
    let page = spec.get(&format!("{list}?n=2")).await?;
    assert!(header(&page, "link")?.contains("rel=\"next\""));
    let unknown = format!("/v2/{OTHER}/tags/list");
    assert_eq!(spec.status(Method::GET, &unknown).await?, 404);
    // end-12a, end-12b
    spec.push_blob(NAME, EMPTY).await?;
    let subject = descriptor(OCI_MANIFEST, &serde_json::to_vec(&image)?);
    let of = digest_of(&image);
    let refers = |artifact_type: &str, subject: &Value| {
        let mut value = manifest(EMPTY, &[LAYER]);
        value["artifactType"] = json!(artifact_type);
        value["annotations"] = json!({"org.example.kind": artifact_type});
        value["subject"] = subject.clone();
        value
    };
    for artifact_type in ["application/vnd.nba.strawberry", "application/vnd.nba.jam"] {
        let value = refers(artifact_type, &subject);
        let digest = digest_of(&value).to_string();
        let put = spec.put_manifest(NAME, &digest, &value).await?;
        assert_eq!(put.status(), StatusCode::CREATED);
        assert_eq!(header(&put, "oci-subject")?, of.to_string());
    }
    let missing = descriptor(OCI_MANIFEST, b"not pushed yet");
    let value = refers("application/vnd.nba.jam", &missing);
    let put = spec
        .put_manifest(NAME, &digest_of(&value).to_string(), &value)
        .await?;
    assert_eq!(
        put.status(),
        StatusCode::CREATED,
        "a subject may be missing"
    );
    let mut found = async |digest: &Digest, query: &str| -> Result<(Value, bool)> {
        let path = format!("/v2/{NAME}/referrers/{digest}{query}");
        let got = spec.get(&path).await?;
        assert_eq!(got.status(), StatusCode::OK);
        assert_eq!(header(&got, "content-type")?, OCI_INDEX);
        let filtered = got.headers().contains_key("oci-filters-applied");
        Ok((serde_json::from_slice(got.body())?, filtered))
    };
    let (all, filtered) = found(&of, "").await?;
    assert_eq!(
        (all["manifests"].as_array().map(Vec::len), filtered),
        (Some(2), false)
    );
    let (jam, filtered) = found(&of, "?artifactType=application/vnd.nba.jam").await?;
    assert_eq!(
        (jam["manifests"].as_array().map(Vec::len), filtered),
        (Some(1), true)
    );
    let entry = &jam["manifests"][0];
    assert_eq!(entry["artifactType"], "application/vnd.nba.jam");
    assert_eq!(
        entry["annotations"]["org.example.kind"],
        "application/vnd.nba.jam"
    );
    let (ahead, _) = found(&Digest::of(b"not pushed yet"), "").await?;
    assert_eq!(ahead["manifests"].as_array().map(Vec::len), Some(1));
    let (none, _) = found(&Digest::of(b"nobody"), "").await?;
    assert_eq!(none["manifests"], json!([]));
    Ok(())
}

#[tokio::test]
async fn content_management() -> Result<()> {
    let mut spec = Spec::new().await?;
    let image = spec.image(&["one", "two"]).await?;
    let tag = |name: &str| format!("/v2/{NAME}/manifests/{name}");
    // end-9
    assert_eq!(spec.status(Method::DELETE, &tag("one")).await?, 202);
    assert_eq!(spec.status(Method::GET, &tag("one")).await?, 404);
    assert_eq!(spec.status(Method::GET, &tag("two")).await?, 200);
    let digest = tag(&digest_of(&image).to_string());
    assert_eq!(spec.status(Method::DELETE, &digest).await?, 202);
    assert_eq!(spec.status(Method::GET, &digest).await?, 404);
    assert_eq!(spec.status(Method::GET, &tag("two")).await?, 404);
    assert_eq!(spec.status(Method::DELETE, &digest).await?, 404);
    let list = spec.get(&format!("/v2/{NAME}/tags/list")).await?;
    if list.status() == StatusCode::OK {
        let value: Value = serde_json::from_slice(list.body())?;
        assert_eq!(value["tags"], json!([]));
    }
    // end-10
    for bytes in [CONFIG, LAYER] {
        let blob = format!("/v2/{NAME}/blobs/{}", Digest::of(bytes));
        assert_eq!(spec.status(Method::DELETE, &blob).await?, 202);
        assert_eq!(spec.status(Method::GET, &blob).await?, 404);
        assert_eq!(spec.status(Method::DELETE, &blob).await?, 404);
    }
    Ok(())
}
