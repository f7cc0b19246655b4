//! A server that keeps its images in a bucket, with a worker beside it: both share one registry, and the controller alone gives names.

use kiln_db::{Database, DatabaseUrl, OpenOptions};
use kiln_testkit::seaweed;

use crate::annex::Annex;
use crate::serve::SMALL;
use crate::support::{Started, app, path, until};

#[test]
fn what_the_worker_beside_it_builds_is_named_by_the_controller() {
    let Some(mut annex) = Annex::open() else {
        return;
    };
    let Some(s3) = seaweed::server() else { return };
    annex.fresh_heads();
    annex.own_registry();
    let mut serve = annex.command(&["serve", "--with-worker", "--store", &s3.url()]);
    serve
        .env("AWS_ACCESS_KEY_ID", "key")
        .env("AWS_SECRET_ACCESS_KEY", "secret");
    let server = Started::of(serve);
    until("a worker", || {
        let listed = annex.run(&["worker", "list", "--json"]);
        (listed.code == 0 && listed.out.contains("\"active\"")).then_some(())
    });
    let socket = annex.home.join("controller/controller.sock");
    let at = format!("unix:{}", path(&socket));
    let dir = app(&[
        ("Dockerfile", "FROM scratch\nCOPY kept /\n"),
        ("kept", path(&annex.home)),
    ]);
    let build = ["--server", &at, "build", path(dir.path()), "--json"];
    let names = ["--tag", "it-bucket:v1", "--tag", "it-bucket:v2"];
    let built = annex
        .run(&[&build[..], &names[..], &SMALL[..]].concat())
        .exits(0);
    server.signal("INT");
    server.end().exits(0);

    let file = DatabaseUrl::Sqlite(annex.home.join("controller/kiln.db"));
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    runtime.block_on(async {
        let db = Database::open(&file, OpenOptions::default())
            .await
            .expect("opens");
        for tag in ["v1", "v2"] {
            let named = db.image_tagged("t/local/it-bucket", tag).await;
            let named = named.expect("answers").expect("the controller named it");
            let digest = named.content.digest.to_string();
            assert!(built.out.contains(&digest), "{digest}: {}", built.out);
        }
        let other = db.image_tagged("t/local/it-bucket", "v3").await;
        assert!(other.expect("answers").is_none());
        db.close().await;
    });
    annex.is_clear();
}
