//! Images that controllers share: names and contents, what is collected and what is not, also when both happen at once.

use kiln_core::Digest;
use kiln_db::{DoorError, ImageContent, ImageTag, NameImagesError, NewImages, NewManifest};

use crate::on_both;
use crate::support::{World, end, id, passed};

on_both!(
    names_lead_to_contents_of_their_repository_alone,
    nothing_is_named_half_or_without_a_lease,
    what_is_about_to_be_named_is_not_collected,
    lists_come_in_pages,
    a_name_goes_and_the_image_with_its_last,
);

fn content(name: &str) -> ImageContent {
    ImageContent {
        digest: Digest::of(name.as_bytes()),
        key: format!("images/{name}"),
        size: name.len() as u64,
    }
}

async fn stored(w: &World, name: &str) -> ImageContent {
    let noted = w.db.image_stored(content(name), None).await;
    noted.expect("notes")
}

fn manifest(repo: &str, name: &str, blobs: &[&str]) -> NewManifest {
    NewManifest {
        repo: repo.to_owned(),
        digest: Digest::of(name.as_bytes()),
        media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
        size: name.len() as u64,
        subject: None,
        artifact_type: None,
        descriptor: format!("{{\"name\":\"{name}\"}}"),
        blobs: blobs
            .iter()
            .map(|blob| Digest::of(blob.as_bytes()))
            .collect(),
    }
}

fn image(repo: &str, name: &str, blobs: &[&str], tags: &[&str]) -> NewImages {
    let new = manifest(repo, name, blobs);
    let tag = |tag: &&str| ImageTag {
        repo: repo.to_owned(),
        tag: (*tag).to_owned(),
        digest: new.digest,
    };
    NewImages {
        tags: tags.iter().map(tag).collect(),
        manifests: vec![new],
        keeps_names: false,
    }
}

async fn names_lead_to_contents_of_their_repository_alone(w: World) {
    for name in ["m1", "m2", "layer"] {
        assert_eq!(stored(&w, name).await, content(name));
    }
    for (name, tags) in [("m1", &["1", "latest"][..]), ("m2", &["latest"])] {
        let new = image("t/acme/app", name, &["layer"], tags);
        w.db.name_images(None, new).await.expect("names");
    }
    let tagged = async |repo: &str, tag: &str| {
        let found = w.db.image_tagged(repo, tag).await.expect("reads");
        found.map(|found| found.content)
    };
    assert_eq!(tagged("t/acme/app", "1").await, Some(content("m1")));
    assert_eq!(tagged("t/acme/app", "latest").await, Some(content("m2")));
    assert_eq!(tagged("t/acme/app", "2").await, None);
    assert_eq!(tagged("t/other/app", "1").await, None);
    let part = async |repo: &str, name: &str| {
        let digest = Digest::of(name.as_bytes());
        w.db.image_content(repo, &digest).await.expect("reads")
    };
    for name in ["m1", "layer"] {
        assert_eq!(part("t/acme/app", name).await, Some(content(name)));
        assert_eq!(part("t/other/app", name).await, None, "by its digest alone");
    }
    let digest = Digest::of(b"m1");
    let known = w.db.image_manifest("t/acme/app", &digest).await;
    assert_eq!(
        known.expect("reads").map(|m| m.content),
        Some(content("m1"))
    );
    let none = w.db.image_manifest("t/other/app", &digest).await;
    assert_eq!(none.expect("reads"), None);
    // Of two that store a content at once one stays, unless it is the one that was found missing.
    let other = ImageContent {
        key: "images/again".to_owned(),
        ..content("layer")
    };
    let kept = w.db.image_stored(other.clone(), None).await.expect("notes");
    assert_eq!(kept, content("layer"));
    let gone = Some("images/layer".to_owned());
    let kept = w.db.image_stored(other.clone(), gone).await.expect("notes");
    assert_eq!(kept, other);
    let keys = ["images/again", "images/layer", "images/m1"].map(str::to_owned);
    let mut known = w.db.image_keys(&keys).await.expect("reads");
    known.sort();
    assert_eq!(known, ["images/again", "images/m1"]);
}

async fn nothing_is_named_half_or_without_a_lease(w: World) {
    let worker = w.worker("w1").await;
    let lease = w.leased("b1", &worker).await;
    stored(&w, "m1").await;
    let new = image("t/local/app", "m1", &["layer"], &["a", "b"]);
    let named = w.db.name_images(Some(&lease), new.clone()).await;
    let layer = Digest::of(b"layer");
    assert!(
        matches!(named, Err(NameImagesError::Gone(gone)) if gone == layer),
        "{named:?}"
    );
    let tags = async || w.db.image_tags("t/local/app", "", 9).await.expect("lists");
    assert_eq!(tags().await, None, "no half");
    stored(&w, "layer").await;
    for _said_again in 0..2 {
        let named = w.db.name_images(Some(&lease), new.clone()).await;
        named.expect("names");
    }
    assert_eq!(tags().await, Some(vec!["a".to_owned(), "b".to_owned()]));
    w.db.cancel(&id("b1"), "user:x", None)
        .await
        .expect("cancels");
    let late = image("t/local/app", "m1", &["layer"], &["c"]);
    let refused = w.db.name_images(Some(&lease), late.clone()).await;
    assert!(
        matches!(refused, Err(NameImagesError::Door(DoorError::Cancelled))),
        "{refused:?}"
    );
    w.db.finish(&lease, end(passed())).await.expect("finishes");
    let refused = w.db.name_images(Some(&lease), late).await;
    assert!(
        matches!(refused, Err(NameImagesError::Door(DoorError::Lease(_)))),
        "{refused:?}"
    );
    assert_eq!(tags().await, Some(vec!["a".to_owned(), "b".to_owned()]));
}

async fn what_is_about_to_be_named_is_not_collected(w: World) {
    let garbage = async |grace_ms: u64| {
        let gone = w.db.image_garbage(grace_ms).await.expect("collects");
        let mut keys: Vec<String> = gone.into_iter().map(|gone| gone.key).collect();
        keys.sort();
        keys
    };
    for name in ["m1", "layer", "touched", "left"] {
        stored(&w, name).await;
    }
    let new = image("t/acme/app", "m1", &["layer"], &["1"]);
    w.db.name_images(None, new).await.expect("names");
    w.advance(5_000);
    let digests = [Digest::of(b"touched"), Digest::of(b"unknown")];
    let known = w.db.image_contents(&digests).await.expect("reads");
    assert_eq!(known, [content("touched")]);
    assert_eq!(garbage(3_000).await, ["images/left"]);
    assert!(garbage(3_000).await.is_empty());
    w.advance(5_000);
    assert_eq!(garbage(3_000).await, ["images/touched"]);
    let known = w.db.image_contents(&digests).await.expect("reads");
    assert!(known.is_empty());
    // A collection and a publish at once: the image is whole, or its publisher is told that a content is gone.
    for round in 0..30 {
        let (own, shared) = (format!("m-{round}"), format!("layer-{round}"));
        stored(&w, &own).await;
        stored(&w, &shared).await;
        w.advance(5_000);
        let new = image("t/acme/app", &own, &[&shared], &[&own]);
        let (collected, named) =
            tokio::join!(w.db.image_garbage(3_000), w.db.name_images(None, new),);
        let collected = collected.expect("collects");
        match named {
            Ok(()) => assert!(collected.is_empty(), "{collected:?} of a named image"),
            Err(NameImagesError::Gone(_)) => assert!(!collected.is_empty()),
            Err(error) => panic!("{error}"),
        }
        w.advance(5_000);
        garbage(3_000).await;
    }
}

async fn lists_come_in_pages(w: World) {
    stored(&w, "m1").await;
    let about = Digest::of(b"m1");
    let new = image("t/acme/app", "m1", &[], &["a", "b", "c"]);
    w.db.name_images(None, new).await.expect("names");
    let tags = async |after: &str, limit: u32| {
        let page = w.db.image_tags("t/acme/app", after, limit).await;
        page.expect("lists").expect("is there").join(" ")
    };
    assert_eq!(tags("", 2).await, "a b");
    assert_eq!(tags("b", 2).await, "c");
    let mut digests = Vec::new();
    for name in ["r1", "r2", "r3"] {
        let blob = stored(&w, name).await;
        digests.push(blob.digest);
        let new = NewImages {
            manifests: vec![NewManifest {
                subject: Some(about),
                artifact_type: Some(if name == "r3" { "x" } else { "y" }.to_owned()),
                ..manifest("t/acme/app", name, &[])
            }],
            ..NewImages::default()
        };
        w.db.name_images(None, new).await.expect("names");
    }
    digests.sort();
    let list = async |kind: Option<&str>, after: Option<&Digest>, limit: u32| {
        let found =
            w.db.image_referrers("t/acme/app", &about, kind, after, limit);
        found.await.expect("lists").len()
    };
    assert_eq!(list(None, None, 9).await, 3);
    assert_eq!(list(None, None, 2).await, 2);
    assert_eq!(list(None, digests.get(1), 9).await, 1);
    assert_eq!(list(Some("x"), None, 9).await, 1);
    assert_eq!(list(Some("z"), None, 9).await, 0);
}

async fn a_name_goes_and_the_image_with_its_last(w: World) {
    for name in ["m1", "m2", "about", "child", "index", "layer"] {
        stored(&w, name).await;
    }
    let put = |images: NewImages| w.db.name_images(None, images);
    put(image("t/a_c/app", "m1", &["layer"], &["1", "latest"]))
        .await
        .expect("names");
    put(image("t/a_c/web", "m2", &["layer"], &["1"]))
        .await
        .expect("names");
    put(image("t/abc/app", "m1", &["layer"], &["1"]))
        .await
        .expect("names");
    let about = NewManifest {
        subject: Some(Digest::of(b"m1")),
        ..manifest("t/a_c/app", "about", &[])
    };
    let about = NewImages {
        manifests: vec![about],
        ..NewImages::default()
    };
    put(about).await.expect("names");
    let names = |after: (&'static str, &'static str), limit| {
        let db = w.db.clone();
        async move {
            let named = db.image_names("t/a_c", after, limit).await.expect("reads");
            let text = named.iter().map(|one| format!("{}:{}", one.repo, one.tag));
            (text.collect::<Vec<_>>(), named.first().map(|one| one.bytes))
        }
    };
    let all = ["t/a_c/app:1", "t/a_c/app:latest", "t/a_c/web:1"];
    let (found, bytes) = names(("", ""), 10).await;
    assert_eq!(
        (found.as_slice(), bytes),
        (&all.map(str::to_owned)[..], Some(7))
    );
    assert_eq!(names(("t/a_c/app", "1"), 1).await.0, all[1..2]);
    let mut other = image("t/a_c/app", "m2", &["layer"], &["latest", "new"]);
    other.keeps_names = true;
    put(other).await.expect("names");
    let latest =
        w.db.image_tagged("t/a_c/app", "latest")
            .await
            .expect("reads");
    assert_eq!(
        latest.expect("is there").content.digest,
        Digest::of(b"m1"),
        "it stays"
    );
    let unname = |tag: &'static str, children: Vec<Digest>| {
        let db = w.db.clone();
        async move {
            db.unname_image("t/a_c/app", tag, children)
                .await
                .expect("ends")
        }
    };
    let there = |name: &'static str| {
        let db = w.db.clone();
        async move {
            let digest = Digest::of(name.as_bytes());
            let found = db.image_manifest("t/a_c/app", &digest).await;
            found.expect("reads").is_some()
        }
    };
    assert!(unname("1", Vec::new()).await && !unname("1", Vec::new()).await);
    assert!(there("m1").await, "it has another name");
    assert!(unname("latest", Vec::new()).await);
    assert!(!there("m1").await && !there("about").await && there("m2").await);
    let elsewhere = w.db.image_tagged("t/abc/app", "1").await.expect("reads");
    assert!(elsewhere.is_some(), "another repository's");
    let mut index = image("t/a_c/app", "index", &[], &["multi"]);
    index.manifests[0].media_type = "application/vnd.oci.image.index.v1+json".to_owned();
    index
        .manifests
        .insert(0, manifest("t/a_c/app", "child", &["layer"]));
    put(index).await.expect("names");
    let children = vec![Digest::of(b"child"), Digest::of(b"m2")];
    assert!(unname("multi", children).await);
    assert!(!there("index").await && !there("child").await && there("m2").await);
    w.advance(10_000);
    let gone = w.db.image_garbage(1_000).await.expect("collects");
    let mut gone: Vec<_> = gone.iter().map(|one| one.key.as_str()).collect();
    gone.sort_unstable();
    assert_eq!(gone, ["images/about", "images/child", "images/index"]);
}
