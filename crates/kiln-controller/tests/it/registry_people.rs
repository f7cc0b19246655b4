//! The registry of a server for people: a token for a login, a login for five minutes of what the role allows, in the own tenant alone.

use std::path::Path;
use std::process::{Command, Output};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_core::Digest;
use kiln_db::OpenOptions;
use serde_json::{Value, json};

use crate::fleet_server::Fleet;
use crate::fleet_worker::send;
use crate::server::Got;

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

async fn ask(
    fleet: &Fleet,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Got {
    send(&fleet.socket, method, path, headers, body)
        .await
        .expect("answers")
}

/// A service token: its id and its text.
async fn member(fleet: &Fleet, tenant: &str, role: &str) -> (String, String) {
    let kind = [("content-type", "application/json")];
    let name = json!({ "name": tenant }).to_string();
    ask(fleet, "POST", "/v1/tenants", &kind, name.as_bytes()).await;
    let asked = json!({ "tenant": tenant, "role": role }).to_string();
    let made = ask(fleet, "POST", "/v1/tokens", &kind, asked.as_bytes())
        .await
        .value();
    let text = |name: &str| made[name].as_str().expect("made").to_owned();
    (text("id"), text("token"))
}

/// What `docker login` and its kin ask for; none when the login is refused.
async fn login(fleet: &Fleet, password: &str, scope: &str) -> Option<String> {
    let basic = format!("Basic {}", STANDARD.encode(format!("anybody:{password}")));
    let path = format!("/v2/token?service=kiln&scope={scope}");
    let got = ask(fleet, "GET", &path, &[("authorization", &basic)], b"").await;
    if got.status != 200 {
        assert_eq!(got.status, 401, "{}", got.text());
        return None;
    }
    assert_eq!(got.headers["cache-control"], "no-store");
    let value = got.value();
    assert!(value["expires_in"].as_u64().expect("seconds") <= 300);
    Some(value["token"].as_str().expect("a token").to_owned())
}

async fn with(fleet: &Fleet, token: &str, method: &str, path: &str, body: &[u8]) -> Got {
    let bearer = format!("Bearer {token}");
    ask(fleet, method, path, &[("authorization", &bearer)], body).await
}

/// Whether a token lets a blob be pushed into a repository.
async fn push(fleet: &Fleet, token: &str, repo: &str) -> u16 {
    let digest = Digest::of(b"a blob");
    let path = format!("/v2/{repo}/blobs/uploads/?digest={digest}");
    with(fleet, token, "POST", &path, b"a blob").await.status
}

async fn pull(fleet: &Fleet, token: &str, repo: &str) -> u16 {
    let path = format!("/v2/{repo}/blobs/{}", Digest::of(b"a blob"));
    with(fleet, token, "GET", &path, b"").await.status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_opens_what_the_role_allows_in_the_own_tenant() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let first = ask(&fleet, "GET", "/v2/", &[], b"").await;
    assert_eq!(first.status, 401);
    assert_eq!(
        first.headers["www-authenticate"],
        "Bearer realm=\"http://localhost/v2/token\",service=\"kiln\""
    );
    let host = [("host", "evil\"host")];
    let odd = ask(&fleet, "GET", "/v2/t/acme/app/manifests/1", &host, b"").await;
    assert!(
        !odd.headers
            .get("www-authenticate")
            .is_some_and(|text| text.contains("evil"))
    );
    let about = ask(&fleet, "GET", "/v2/t/acme/app/manifests/1", &[], b"").await;
    assert!(about.headers["www-authenticate"].ends_with("scope=\"repository:t/acme/app:pull\""));

    let (developer_id, developer) = member(&fleet, "acme", "developer").await;
    let (_, security) = member(&fleet, "acme", "security").await;
    let (_, looks) = member(&fleet, "acme", "read-only").await;
    let (_, rival) = member(&fleet, "rival", "admin").await;
    let both = "repository:t/acme/app:pull,push";
    let own = login(&fleet, &developer, both).await.expect("logs in");
    assert_eq!(push(&fleet, &own, "t/acme/app").await, 201);
    assert_eq!(pull(&fleet, &own, "t/acme/app").await, 200);
    assert_ne!(push(&fleet, &own, "t/acme/other").await, 201, "not named");
    let reads = login(&fleet, &security, both).await.expect("logs in");
    assert_eq!(pull(&fleet, &reads, "t/acme/app").await, 200);
    let mut closed = 0;
    for (what, password, scope, repo, pushes) in [
        (
            "a role that only reads",
            &security,
            both,
            "t/acme/app",
            true,
        ),
        ("a role without images", &looks, both, "t/acme/app", false),
        ("another tenant", &rival, both, "t/acme/app", false),
        ("another tenant", &rival, both, "t/acme/app", true),
        (
            "a scope for pulls",
            &developer,
            "repository:t/acme/app:pull",
            "t/acme/app",
            true,
        ),
        (
            "a quarantine",
            &developer,
            "repository:quarantine/b1/1:pull,push",
            "quarantine/b1/1",
            true,
        ),
        (
            "what the host writes",
            &developer,
            "repository:shared/node:pull,push",
            "shared/node",
            true,
        ),
        ("no scope", &developer, "", "t/acme/app", false),
    ] {
        let token = login(&fleet, password, scope).await.expect("logs in");
        let status = match pushes {
            true => push(&fleet, &token, repo).await,
            false => pull(&fleet, &token, repo).await,
        };
        assert!(matches!(status, 401 | 403 | 404), "{what}: {status}");
        closed += 1;
    }
    assert_eq!(closed, 8);
    for wrong in ["", "nonsense", "kst_kst-0000000000000000_00", &own] {
        assert!(login(&fleet, wrong, both).await.is_none(), "{wrong}");
    }
    // Tokens of another door open nothing here, and these open no other door.
    assert_eq!(pull(&fleet, &developer, "t/acme/app").await, 401);
    assert_eq!(
        with(&fleet, &own, "GET", "/v1/whoami", b"").await.status,
        401
    );
    // Called back: at once, also what was made from it.
    let gone = ask(
        &fleet,
        "DELETE",
        &format!("/v1/tokens/{developer_id}"),
        &[],
        b"",
    )
    .await;
    assert_eq!(gone.status, 204);
    assert_eq!(pull(&fleet, &own, "t/acme/app").await, 401);
    assert!(login(&fleet, &developer, both).await.is_none());
    let rows = fleet.db().audit_rows(None, 0, 500).await.expect("reads");
    let noted = |allowed: bool| {
        let about = rows.iter().filter(|row| row.entry.target == "t/acme/app");
        about.filter(|row| row.entry.allowed == allowed).count()
    };
    assert!(noted(true) > 0 && noted(false) > 0);
    fleet.stop().await;
}

/// A session is made from a service token, and a registry's token from the session: what is called back ends all of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registrys_token_ends_with_what_its_session_was_made_from() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let (id, developer) = member(&fleet, "acme", "developer").await;
    let session = with(&fleet, &developer, "POST", "/v1/token/exchange", b"{}").await;
    let session = session.value()["access_token"].clone();
    let session = session.as_str().expect("a session");
    let scope = "repository:t/acme/app:pull,push";
    let token = login(&fleet, session, scope).await.expect("logs in");
    assert_eq!(push(&fleet, &token, "t/acme/app").await, 201);
    let gone = ask(&fleet, "DELETE", &format!("/v1/tokens/{id}"), &[], b"").await;
    assert_eq!(gone.status, 204);
    assert_eq!(pull(&fleet, &token, "t/acme/app").await, 401);
    assert_eq!(push(&fleet, &token, "t/acme/app").await, 401);
    fleet.stop().await;
}

/// Sessions are made for the asking, and each is somebody else to the registry: their tenant is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_tenants_uploads_leave_room_for_the_others() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let (_, greedy) = member(&fleet, "acme", "developer").await;
    let (_, other) = member(&fleet, "rival", "developer").await;
    let begin = async |password: &str, tenant: &str| {
        let scope = format!("repository:t/{tenant}/app:pull,push");
        let token = login(&fleet, password, &scope).await.expect("logs in");
        let path = format!("/v2/t/{tenant}/app/blobs/uploads/");
        let mut begun = 0;
        for _ in 0..70 {
            let got = with(&fleet, &token, "POST", &path, b"").await;
            begun += usize::from(got.status == 202);
        }
        begun
    };
    let mut all = 0;
    for _ in 0..3 {
        let session = with(&fleet, &greedy, "POST", "/v1/token/exchange", b"{}").await;
        let session = session.value()["access_token"].clone();
        all += begin(session.as_str().expect("a session"), "acme").await;
    }
    assert_eq!(all, 128);
    assert_eq!(begin(&other, "rival").await, 64);
    fleet.stop().await;
}

/// An image of one layer in the layout that tools read.
fn layout(dir: &Path) -> Value {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).expect("folder");
    let keep = |bytes: &[u8], kind: &str| -> Value {
        let digest = Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).expect("written");
        json!({ "mediaType": kind, "digest": digest, "size": bytes.len() })
    };
    let layer = crate::server::archive();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [Digest::of(&layer)] }
    });
    let config = keep(config.to_string().as_bytes(), CONFIG);
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": config, "layers": [keep(&layer, LAYER)],
    });
    let manifest = keep(manifest.to_string().as_bytes(), MANIFEST);
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    std::fs::write(dir.join("index.json"), index.to_string()).expect("written");
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("written");
    config["digest"].clone()
}

fn skopeo(home: &Path, words: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command
        .args(["60", "skopeo", "--insecure-policy"])
        .args(words);
    command.env("HOME", home).env("XDG_RUNTIME_DIR", home);
    command.output().expect("starts")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skopeo_pushes_and_pulls_with_a_token_as_the_password() {
    if Command::new("skopeo").arg("--version").output().is_err() {
        println!("there is no skopeo here: the exchange alone was tested");
        return;
    }
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let (_, developer) = member(&fleet, "acme", "developer").await;
    let (_, rival) = member(&fleet, "rival", "admin").await;
    let config = layout(&folder.path().join("image"));
    let image = format!("oci:{}", folder.path().join("image").display());
    let there = format!("docker://{}/t/acme/app:1", fleet.running.addresses[0]);
    let copied = format!("dir:{}", folder.path().join("copy").display());
    let home = folder.path().to_owned();
    let tried = tokio::task::spawn_blocking(move || {
        let login = |token: &str| format!("anybody:{token}");
        let (own, other) = (login(&developer), login(&rival));
        let push = |creds: &str| {
            skopeo(
                &home,
                &[
                    "copy",
                    "--dest-tls-verify=false",
                    "--dest-creds",
                    creds,
                    &image,
                    &there,
                ],
            )
        };
        let pull = |creds: &str| {
            skopeo(
                &home,
                &[
                    "copy",
                    "--src-tls-verify=false",
                    "--src-creds",
                    creds,
                    &there,
                    &copied,
                ],
            )
        };
        let words = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
        let refused = push(&other);
        assert!(!refused.status.success(), "another tenant pushed");
        let pushed = push(&own);
        assert!(pushed.status.success(), "{}", words(&pushed));
        let refused = pull(&other);
        assert!(!refused.status.success(), "another tenant pulled");
        let pulled = pull(&own);
        assert!(pulled.status.success(), "{}", words(&pulled));
    });
    tried.await.expect("skopeo works");
    // Layers are compressed on their way; the config says what they are.
    let copy = std::fs::read(folder.path().join("copy/manifest.json")).expect("a manifest");
    let copy: Value = serde_json::from_slice(&copy).expect("JSON");
    assert_eq!(copy["config"]["digest"], config);
    fleet.stop().await;
}
