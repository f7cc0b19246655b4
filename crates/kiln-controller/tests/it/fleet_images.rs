//! Images of two controllers in one bucket: what one takes outlives it, a publish that is killed names nothing or everything, and what is
//! collected is what nobody needs.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use kiln_controller::access::{RegistryAction, RepositoryGrant};
use kiln_controller::images::Collected;
use kiln_controller::server::start_with;
use kiln_core::job::{Source, SourceBuild};
use kiln_core::{Digest, JobId, JobKind, Lease, TenantName};
use kiln_db::{ImageContent, LeaseTimes, NewImages};
use kiln_proto::fleet::{LeaseHeader, NOT_PUSHED};
use kiln_store::Bucket;
use kiln_store::logs::ObjectTarget;
use serde_json::json;

use crate::fleet_line::{Line, send};
use crate::fleet_server::{Fleet, PATIENCE, SHORT, Served, script, socket, times, until_killed};
use crate::fleet_shared::{Common, copy_keys, folder, now_ms};
use crate::server::{Got, archive};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Leases that nobody has to renew in a test.
const LONG: LeaseTimes = LeaseTimes {
    ttl_ms: 600_000,
    grace_ms: 5_000,
};
/// More than one part of an upload to the bucket.
const LAYER_BYTES: usize = 10 << 20;
/// When a controller that publishes is killed, milliseconds after it was asked to: before, while and after it sends and names.
const KILLS: [u64; 5] = [0, 60, 180, 400, 1_500];

/// An image of one layer.
struct Image {
    config: Vec<u8>,
    layer: Vec<u8>,
    manifest: Vec<u8>,
}

impl Image {
    /// Another number is another image.
    fn new(number: usize) -> Self {
        let mut layer = archive();
        layer.resize(LAYER_BYTES + number * 512, 0);
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer)]}
        });
        let config = config.to_string().into_bytes();
        let descriptor = |kind: &str, bytes: &[u8]| json!({"mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len()});
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &config), "layers": [descriptor(LAYER, &layer)]
        });
        Self {
            layer,
            manifest: manifest.to_string().into_bytes(),
            config,
        }
    }

    fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }
}

/// Whoever pushes and pulls with a token, at whichever controller.
struct Client {
    bearer: String,
    repo: String,
}

impl Client {
    fn person(fleet: &Fleet, repo: &str) -> Self {
        let grant = RepositoryGrant {
            name: repo.to_owned(),
            actions: vec![RegistryAction::Pull, RegistryAction::Push],
        };
        let owner = kiln_controller::access::owner();
        let access = &fleet.running.controller.access;
        let token =
            access.issue_for_person(&owner, None, &TenantName::local(), vec![grant], now_ms());
        Self {
            bearer: format!("Bearer {}", token.expect("made").text),
            repo: repo.to_owned(),
        }
    }

    fn attempt(fleet: &Fleet, lease: &Lease) -> Self {
        let repo = format!("quarantine/{}/{}", lease.attempt.job, lease.attempt.number);
        let grant = RepositoryGrant {
            name: repo.clone(),
            actions: vec![RegistryAction::Pull, RegistryAction::Push],
        };
        let access = &fleet.running.controller.access;
        let token = access.issue_for_attempt(lease, vec![grant], now_ms());
        Self {
            bearer: format!("Bearer {}", token.expect("made").text),
            repo,
        }
    }

    async fn ask(&self, to: &Path, method: &str, path: &str, kind: &str, body: &[u8]) -> Got {
        let headers = [
            ("authorization", self.bearer.as_str()),
            ("content-type", kind),
        ];
        let path = format!("/v2/{}/{path}", self.repo);
        let got = send(to, method, &path, &headers, body).await;
        got.expect("answers")
    }

    async fn get(&self, to: &Path, path: &str) -> Got {
        self.ask(to, "GET", path, MANIFEST, b"").await
    }

    async fn blob(&self, to: &Path, bytes: &[u8]) {
        let path = format!("blobs/uploads/?digest={}", Digest::of(bytes));
        let put = self
            .ask(to, "POST", &path, "application/octet-stream", bytes)
            .await;
        assert_eq!(put.status, 201, "{}", put.text());
    }

    async fn push(&self, to: &Path, image: &Image, name: &str) {
        self.blob(to, &image.config).await;
        self.blob(to, &image.layer).await;
        let path = format!("manifests/{name}");
        let put = self.ask(to, "PUT", &path, MANIFEST, &image.manifest).await;
        assert_eq!(put.status, 201, "{}", put.text());
    }

    /// Reads all of an image, by a name and by its digest.
    async fn pulls(&self, to: &Path, image: &Image, name: &str) {
        for reference in [name.to_owned(), image.digest().to_string()] {
            let got = self.get(to, &format!("manifests/{reference}")).await;
            assert_eq!(got.status, 200, "{reference}: {}", got.text());
            assert!(got.body == image.manifest, "{reference}");
        }
        for bytes in [&image.config, &image.layer] {
            let digest = Digest::of(bytes);
            let got = self.get(to, &format!("blobs/{digest}")).await;
            assert_eq!(got.status, 200, "{}", got.text());
            assert!(got.body == *bytes, "{digest}");
        }
    }
}

/// A controller is lost with its folder: what was pushed to it is pulled from the other, by digest and by tag, listed and named anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_outlives_the_controller_that_took_it() {
    let Some(common) = Common::new() else { return };
    let (a, b) = (folder(), folder());
    let [first, second] = common.two(a.path(), b.path()).await;
    let (image, next) = (Image::new(1), Image::new(2));
    let client = Client::person(&first, "t/local/app");
    client.push(&first.socket, &image, "1").await;
    client.push(&first.socket, &image, "latest").await;
    refusals_name_nothing(&client, &first, &next).await;
    // What was uploaded here is asked for there, and a manifest may come to either.
    client.blob(&first.socket, &next.config).await;
    client.blob(&first.socket, &next.layer).await;
    let put = client
        .ask(
            &second.socket,
            "PUT",
            "manifests/2",
            MANIFEST,
            &next.manifest,
        )
        .await;
    assert_eq!(put.status, 201, "{}", put.text());
    let about = referrer(&client, &first, &image).await;

    first.stop().await;
    drop(a);
    client.pulls(&second.socket, &image, "1").await;
    client.pulls(&second.socket, &next, "2").await;
    let tags = client.get(&second.socket, "tags/list").await.value();
    assert_eq!(
        tags,
        json!({"name": "t/local/app", "tags": ["1", "2", "latest"]})
    );
    let page = client.get(&second.socket, "tags/list?n=1&last=1").await;
    assert_eq!(page.value()["tags"], json!(["2"]));
    let shown = format!("referrers/{}", image.digest());
    let shown = client.get(&second.socket, &shown).await.value();
    assert_eq!(shown["manifests"][0]["digest"], json!(about));
    assert_eq!(shown["manifests"].as_array().map(Vec::len), Some(1));
    // Nobody else's, whatever the digest.
    let other = Client::person(&second, "t/local/other");
    let path = format!("blobs/{}", Digest::of(&image.layer));
    assert_eq!(other.get(&second.socket, &path).await.status, 404);
    let path = format!("manifests/{}", image.digest());
    assert_eq!(other.get(&second.socket, &path).await.status, 404);
    client.push(&second.socket, &next, "latest").await;
    client.pulls(&second.socket, &next, "latest").await;
    second.stop().await;
}

/// A manifest that names what is not there, or is called what it is not, gets no name.
async fn refusals_name_nothing(client: &Client, fleet: &Fleet, image: &Image) {
    let put = async |path: &str, body: &[u8]| {
        let got = client.ask(&fleet.socket, "PUT", path, MANIFEST, body).await;
        (got.status, got.text())
    };
    let (status, text) = put("manifests/3", &image.manifest).await;
    assert!(
        status == 400 && text.contains("MANIFEST_BLOB_UNKNOWN"),
        "{status} {text}"
    );
    let other = format!("manifests/{}", Digest::of(b"other"));
    assert_eq!(put(&other, &image.manifest).await.0, 400);
    assert_eq!(put("manifests/3", b"{}").await.0, 400);
    let got = client.get(&fleet.socket, "manifests/3").await;
    assert_eq!(got.status, 404, "{}", got.text());
}

/// Pushes a manifest that is about another; gives its digest.
async fn referrer(client: &Client, fleet: &Fleet, image: &Image) -> Digest {
    let empty = b"{}";
    client.blob(&fleet.socket, empty).await;
    let entry = |kind: &str, bytes: &[u8]| json!({"mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len()});
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/x-about",
        "config": entry("application/vnd.oci.empty.v1+json", empty), "layers": [],
        "subject": entry(MANIFEST, &image.manifest)
    });
    let manifest = manifest.to_string();
    let digest = Digest::of(manifest.as_bytes());
    let path = format!("manifests/{digest}");
    let put = client
        .ask(&fleet.socket, "PUT", &path, MANIFEST, manifest.as_bytes())
        .await;
    assert_eq!(put.status, 201, "{}", put.text());
    digest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test, which starts it"]
async fn controller_child() {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("is told");
    let words: Vec<&str> = line.trim().split('\t').collect();
    let [folder, database, store] = words[..] else {
        return;
    };
    let common = Common {
        database: database.to_owned(),
        store: store.to_owned(),
    };
    let config = common.config(Path::new(folder)).await;
    until_killed(start_with(config, times(LONG)).await.expect("starts")).await;
}

/// Asks a controller to name what an attempt pushed.
async fn name(to: &Path, lease: &Lease, image: &Image) -> std::io::Result<Got> {
    let tags = ["a", "b"].map(|end| format!("t/local/app:{}-{end}", lease.attempt.job));
    let asked = json!({"manifest": image.digest(), "tags": tags});
    let path = format!("/worker/v1/jobs/{}/image", lease.attempt.job);
    let header = LeaseHeader::of(lease).to_string();
    let line = Line::new(to, lease.worker.as_str());
    line.raw("POST", &path, Some(&header), asked.to_string().as_bytes())
        .await
}

/// A build that is to have two names.
async fn build(fleet: &Fleet, id: &str) -> JobId {
    let mut new = script(id, 1, 1);
    let tags = ["a", "b"].map(|end| format!("t/local/app:{id}-{end}"));
    new.request.kind = JobKind::SourceBuild(SourceBuild {
        source: Source::Tree {
            digest: Digest::of(b""),
            size: 0,
        },
        name: "app".to_owned(),
        dockerfile: None,
        dockerfile_text: None,
        target: None,
        build_args: BTreeMap::new(),
        secrets: Vec::new(),
        stored_secrets: Vec::new(),
        tags: tags
            .iter()
            .map(|tag| tag.parse().expect("a name"))
            .collect(),
        no_cache: false,
        only_network: false,
        repository_policy: false,
        policy_ref: None,
    });
    let submitted = fleet.db().submit(new).await.expect("submits");
    submitted.job.request.id
}

/// The answers to two names. A commit between the two looks is seen by a third.
async fn both(person: &Client, to: &Path, names: &[String; 2]) -> [u16; 2] {
    let mut found = [0; 2];
    for _look in 0..2 {
        for (status, name) in found.iter_mut().zip(names) {
            *status = person.get(to, &format!("manifests/{name}")).await.status;
        }
        if found[0] == found[1] {
            break;
        }
    }
    found
}

/// A controller is killed while it publishes: both names are there or none is, the other controller finishes it, and what the kills left
/// is collected, but nothing that has a name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publish_that_is_killed_names_everything_or_nothing() {
    let Some(common) = Common::new() else { return };
    let (a, b, c) = (folder(), folder(), folder());
    let config = common.config(b.path()).await;
    let second = Fleet::of(start_with(config, times(LONG)).await.expect("starts"));
    copy_keys(b.path(), a.path());
    let child = format!(
        "{}\t{}\t{}",
        a.path().display(),
        common.database,
        common.store
    );
    let (dying, person) = (socket(a.path()), Client::person(&second, "t/local/app"));
    let line = Line::new(&second.socket, "w1");
    line.join(8).await.expect("joins");
    let mut images = Vec::new();
    let mut halfway = 0;
    for (round, at_ms) in KILLS.into_iter().enumerate() {
        let start = || Served::spawn("fleet_images::controller_child", &child);
        let killed = tokio::task::block_in_place(start);
        let job = build(&second, &format!("j{round}")).await;
        let lease = line
            .poll(Vec::new())
            .await
            .expect("answers")
            .remove(0)
            .lease;
        assert_eq!(lease.attempt.job, job);
        let image = Image::new(10 + round);
        let client = Client::attempt(&second, &lease);
        client.push(&dying, &image, "out").await;
        let naming = {
            let (to, lease) = (dying.clone(), lease.clone());
            let image = Image::new(10 + round);
            tokio::spawn(async move { name(&to, &lease, &image).await })
        };
        tokio::time::sleep(Duration::from_millis(at_ms)).await;
        killed.kill();
        let answered = naming
            .await
            .expect("no panic")
            .is_ok_and(|got| got.status == 200);
        let names = [format!("{job}-a"), format!("{job}-b")];
        let found = both(&person, &second.socket, &names).await;
        assert!(matches!(found, [200, 200] | [404, 404]), "{found:?}");
        assert!(!answered || found == [200, 200], "said and lost");
        if found == [404, 404] {
            halfway += 1;
            let refused = name(&second.socket, &lease, &image).await.expect("answers");
            assert_eq!((refused.status, refused.code().as_str()), (409, NOT_PUSHED));
            client.push(&second.socket, &image, "out").await;
        }
        for _again in 0..2 {
            let named = name(&second.socket, &lease, &image).await.expect("answers");
            assert_eq!(named.status, 200, "{}", named.text());
        }
        line.finish(&lease).await.expect("finishes");
        let late = name(&second.socket, &lease, &image).await.expect("answers");
        assert_eq!((late.status, late.code().as_str()), (409, "lease_refused"));
        images.push((names, image));
    }
    println!(
        "{halfway} of {} publishes were cut before their names",
        KILLS.len()
    );
    // What a kill leaves before its names: an object that was not noted, and one that was.
    let left = ImageContent {
        digest: Digest::of(b"left"),
        key: "images/00/noted".to_owned(),
        size: 4,
    };
    second.db().image_stored(left, None).await.expect("noted");
    let bucket = Bucket::open(&ObjectTarget::S3(common.bucket())).expect("a bucket");
    for key in ["images/00/not-noted", "images/00/noted"] {
        bucket.put(key, &b"left"[..], None).await.expect("put");
    }
    tokio::time::sleep(Duration::from_millis(5)).await;
    let controller = &second.running.controller;
    let shared = controller.images.as_ref().expect("shared");
    let collect = async || {
        let now = Duration::ZERO;
        shared
            .collect(&controller.db, now, now)
            .await
            .expect("collects")
    };
    // A content that is about to be named is touched first; one that nothing is made of goes, with what kills left.
    let first = collect().await;
    println!("{first:?}");
    assert!(first.contents >= 1 && first.unknown >= 1, "{first:?}");
    for key in ["images/00/not-noted", "images/00/noted"] {
        assert_eq!(bucket.size(key).await.expect("asks"), None, "{key}");
    }
    assert_eq!(collect().await, Collected::default(), "all at once");
    gone_contents_are_noticed(&second).await;
    // Nothing that has a name: a controller that has no copy of anything reads all of it.
    copy_keys(b.path(), c.path());
    let third = common.start(c.path()).await;
    for (names, image) in &images {
        for name in names {
            person.pulls(&third.socket, image, name).await;
        }
    }
    third.stop().await;
    second.stop().await;
}

/// Whoever finds a content that is collected before it is named is told, and names nothing.
async fn gone_contents_are_noticed(fleet: &Fleet) {
    let digest = Digest::of(b"collected meanwhile");
    let new = NewImages {
        manifests: vec![kiln_db::NewManifest {
            repo: "t/local/app".to_owned(),
            digest,
            media_type: MANIFEST.to_owned(),
            size: 1,
            subject: None,
            artifact_type: None,
            descriptor: "{}".to_owned(),
            blobs: Vec::new(),
        }],
        tags: Vec::new(),
        ..NewImages::default()
    };
    let named = fleet.db().name_images(None, new).await;
    assert!(
        matches!(named, Err(kiln_db::NameImagesError::Gone(gone)) if gone == digest),
        "{named:?}"
    );
}

/// Names that a server tells of, as `repository:tag`.
async fn listed(to: &Path, query: &str) -> Vec<String> {
    let got = send(to, "GET", &format!("/v1/images{query}"), &[], b"").await;
    let got = got.expect("answers");
    assert_eq!(got.status, 200, "{}", got.text());
    let items = got.value()["items"].as_array().expect("items").clone();
    let text =
        |item: &serde_json::Value, field: &str| item[field].as_str().expect("text").to_owned();
    let named = items
        .iter()
        .inspect(|item| assert!(item["bytes"].as_u64() > Some(LAYER_BYTES as u64)));
    named
        .map(|item| format!("{}:{}", text(item, "repository"), text(item, "tag")))
        .collect()
}

async fn withdrawn(to: &Path, name: &str) -> u16 {
    let path = format!(
        "/v1/images/{}",
        name.replace('/', "%2F").replace(':', "%3A")
    );
    let got = send(to, "DELETE", &path, &[], b"").await;
    got.expect("answers").status
}

/// What is pushed is listed and loses its names, at one controller of several, or at one that is alone.
async fn names_come_and_go(push_to: &Fleet, ask: &Fleet) {
    let (image, next) = (Image::new(11), Image::new(12));
    let app = Client::person(push_to, "t/local/app");
    app.push(&push_to.socket, &image, "1").await;
    app.push(&push_to.socket, &image, "latest").await;
    let other = Client::person(push_to, "t/local/web/shop");
    other.push(&push_to.socket, &next, "1.4").await;
    let to = &ask.socket;
    let all = [
        "t/local/app:1",
        "t/local/app:latest",
        "t/local/web/shop:1.4",
    ];
    assert_eq!(listed(to, "").await, all);
    assert_eq!(listed(to, "?limit=1&after=t/local/app:1").await, all[1..2]);
    assert_eq!(listed(to, "?after=t/local/web/shop:1.4").await, [""; 0]);
    for (name, status) in [
        ("app:2", 404),
        ("t/acme/app:1", 404),
        ("app@x", 422),
        ("app:1", 204),
    ] {
        assert_eq!(withdrawn(to, name).await, status, "{name}");
    }
    assert_eq!(app.get(to, "manifests/1").await.status, 404);
    app.pulls(to, &image, "latest").await;
    assert_eq!(withdrawn(to, "app").await, 204);
    assert_eq!(withdrawn(to, "app").await, 404);
    let path = format!("manifests/{}", image.digest());
    assert_eq!(app.get(to, &path).await.status, 404, "it had no other name");
    assert_eq!(listed(to, "").await, all[2..]);
    let held = json!({"reason": "case 7"}).to_string();
    let kind = [("content-type", "application/json")];
    let put = send(to, "PUT", "/v1/holds/tenant/local", &kind, held.as_bytes()).await;
    assert_eq!(put.expect("answers").status, 200);
    assert_eq!(withdrawn(to, "web/shop:1.4").await, 409, "it is on hold");
    other.pulls(to, &next, "1.4").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_of_images_are_listed_and_taken_away() {
    let a = folder();
    let alone = Fleet::start(a.path(), times(LONG)).await;
    names_come_and_go(&alone, &alone).await;
    alone.stop().await;
    let Some(common) = Common::new() else { return };
    let (a, b) = (folder(), folder());
    let [first, second] = common.two(a.path(), b.path()).await;
    names_come_and_go(&first, &second).await;
    first.stop().await;
    second.stop().await;
}

/// A controller that began alone gets a bucket: what it took before is everybody's then, and goes up once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_from_before_the_bucket_go_up_once() {
    let Some(common) = Common::new() else { return };
    let (a, b) = (folder(), folder());
    let mut config = common.config(a.path()).await;
    config.sharing.store = None;
    let alone = Fleet::of(start_with(config, times(SHORT)).await.expect("starts"));
    let image = Image::new(21);
    let client = Client::person(&alone, "t/local/app");
    client.push(&alone.socket, &image, "1").await;
    alone.stop().await;

    let mut config = common.config(a.path()).await;
    config.sharing.adopt = true;
    let first = Fleet::of(start_with(config, times(SHORT)).await.expect("starts"));
    let done = a.path().join("controller/images-shared");
    let moved = async {
        while !done.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, moved)
        .await
        .expect("goes up");
    copy_keys(a.path(), b.path());
    let second = common.start(b.path()).await;
    let client = Client::person(&second, "t/local/app");
    client.pulls(&second.socket, &image, "1").await;
    assert_eq!(withdrawn(&second.socket, "app:1").await, 204);
    assert_eq!(listed(&first.socket, "").await, [""; 0]);
    first.stop().await;

    let again = common.start(a.path()).await;
    assert_eq!(listed(&again.socket, "").await, [""; 0], "it goes up once");
    again.stop().await;
    second.stop().await;
}
