//! The loopback door over real TCP: challenges, tokens, anonymous pull, hosts, and a taken port.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{Method, StatusCode};
use kiln_core::{Digest, TenantName};
use kiln_store::HostRegistry;
use kiln_store::host::{HostConfig, LoopbackState};
use kiln_store::registry::{LoopbackConfig, UserAuthority, loopback};
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::client::{Client, code, header};

pub(crate) struct Door {
    pub(crate) host: HostRegistry,
    pub(crate) address: SocketAddr,
    pub(crate) dir: TempDir,
}

impl Door {
    pub(crate) async fn open(anonymous_pull: &[&str]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let config = config("127.0.0.1:0", anonymous_pull)?;
        let host = HostRegistry::open_or_attach(&dir.path().join("registry"), config).await?;
        let LoopbackState::Open(address) = host.about().await?.loopback else {
            anyhow::bail!("the door is not open");
        };
        Ok(Self { host, address, dir })
    }

    pub(crate) fn basic(&self) -> Result<String> {
        let (user, secret) = self.host.credentials()?;
        let text = STANDARD.encode(format!("{user}:{}", secret.reveal()));
        Ok(format!("Basic {text}"))
    }

    async fn client(&self) -> Result<Client> {
        let stream = TcpStream::connect(self.address).await?;
        Ok(Client::over(stream)
            .await?
            .with_host(&self.address.to_string()))
    }

    async fn bearer(&self, basic: &str, scope: &str) -> Result<String> {
        let mut client = self.client().await?;
        let path = format!("/token?service=kiln&scope={scope}");
        let headers = [("authorization", basic)];
        let headers = if basic.is_empty() {
            &[][..]
        } else {
            &headers[..]
        };
        let answer = client.send(Method::GET, &path, headers, b"").await?;
        let value: Value = serde_json::from_slice(answer.body())?;
        let token = value["token"].as_str().context("no token")?;
        assert!(value["expires_in"].as_u64() <= Some(300));
        Ok(format!("Bearer {token}"))
    }
}

fn config(address: &str, anonymous_pull: &[&str]) -> Result<HostConfig> {
    Ok(HostConfig {
        loopback: Some(LoopbackConfig {
            address: address.parse()?,
            user: UserAuthority::embedded("kiln", &TenantName::local()),
            anonymous_pull: anonymous_pull.iter().map(|&t| t.to_owned()).collect(),
        }),
        ..HostConfig::default()
    })
}

#[tokio::test]
async fn challenge_token_push_pull() -> Result<()> {
    let door = Door::open(&[]).await?;
    let mut client = door.client().await?;
    let challenge = client.get("/v2/").await?;
    assert_eq!(challenge.status(), StatusCode::UNAUTHORIZED);
    let realm = format!("realm=\"http://{}/token\"", door.address);
    assert!(header(&challenge, "www-authenticate")?.contains(&realm));
    let challenge = client.get("/v2/t/local/app/tags/list").await?;
    let scope = "scope=\"repository:t/local/app:pull\"";
    assert!(header(&challenge, "www-authenticate")?.contains(scope));

    let bearer = door
        .bearer(&door.basic()?, "repository:t/local/app:pull,push")
        .await?;
    let auth = [("authorization", bearer.as_str())];
    let path = format!("/v2/t/local/app/blobs/uploads/?digest={}", Digest::of(b"x"));
    let pushed = client.send(Method::POST, &path, &auth, b"x").await?;
    assert_eq!(pushed.status(), StatusCode::CREATED, "{}", code(&pushed));
    let other = "/v2/t/local/other/blobs/uploads/";
    let refused = client.send(Method::POST, other, &auth, b"").await?;
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    assert!(header(&refused, "www-authenticate")?.contains("insufficient_scope"));

    // shared/ is asked for with push, and granted for pull only.
    let bearer = door
        .bearer(&door.basic()?, "repository:shared/node:pull,push")
        .await?;
    let auth = [("authorization", bearer.as_str())];
    let shared = "/v2/shared/node/blobs/uploads/";
    let refused = client.send(Method::POST, shared, &auth, b"").await?;
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    Ok(())
}

#[tokio::test]
async fn wrong_credentials_buy_nothing() -> Result<()> {
    let door = Door::open(&[]).await?;
    let mut client = door.client().await?;
    let wrong = format!("Basic {}", STANDARD.encode("kiln:guess"));
    for (path, auth) in [
        ("/token", wrong.as_str()),
        ("/token", "Basic !!!"),
        ("/token", ""),
        ("/v2/", wrong.as_str()),
        ("/v2/", "Bearer a.b"),
        ("/v2/", "Negotiate x"),
    ] {
        let answer = client
            .send(Method::GET, path, &[("authorization", auth)], b"")
            .await?;
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path} {auth}");
    }
    assert!(
        door.bearer("", "repository:t/local/app:pull")
            .await
            .is_err()
    );
    let mode = std::fs::metadata(door.dir.path().join("registry/token"))?;
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777,
        0o600
    );
    Ok(())
}

#[tokio::test]
async fn anonymous_pull_reads_its_trees_and_writes_nothing() -> Result<()> {
    let door = Door::open(&["shared"]).await?;
    let shared = "shared/node".parse()?;
    let (digest, _) = door.host.put_blob(&shared, &b"base"[..], None).await?;
    door.host
        .put_blob(&"t/local/app".parse()?, &b"base"[..], None)
        .await?;
    let mut client = door.client().await?;
    let path = format!("/v2/shared/node/blobs/{digest}");
    assert_eq!(client.get(&path).await?.body().as_ref(), b"base");
    let bearer = door.bearer("", "repository:shared/node:pull,push").await?;
    let auth = [("authorization", bearer.as_str())];
    let got = client.send(Method::GET, &path, &auth, b"").await?;
    assert_eq!(got.body().as_ref(), b"base");
    let push = client
        .send(Method::POST, "/v2/shared/node/blobs/uploads/", &auth, b"")
        .await?;
    assert_eq!(push.status(), StatusCode::UNAUTHORIZED);
    let private = format!("/v2/t/local/app/blobs/{digest}");
    assert_eq!(
        client.get(&private).await?.status(),
        StatusCode::UNAUTHORIZED
    );
    Ok(())
}

#[tokio::test]
async fn names_that_are_not_loopback_are_turned_away() -> Result<()> {
    let door = Door::open(&["shared"]).await?;
    for (host, expected) in [
        ("localhost:5000", StatusCode::UNAUTHORIZED),
        ("[::1]:5000", StatusCode::UNAUTHORIZED),
        ("evil.example", StatusCode::MISDIRECTED_REQUEST),
        ("127.0.0.1.evil.example", StatusCode::MISDIRECTED_REQUEST),
        ("user@localhost", StatusCode::MISDIRECTED_REQUEST),
    ] {
        let stream = TcpStream::connect(door.address).await?;
        let mut client = Client::over(stream).await?.with_host(host);
        assert_eq!(client.get("/v2/").await?.status(), expected, "{host}");
    }
    Ok(())
}

#[tokio::test]
async fn a_refused_large_push_still_gets_its_reason() -> Result<()> {
    let door = Door::open(&[]).await?;
    let mut client = door.client().await?;
    let basic = door.basic()?;
    let auth = [("authorization", basic.as_str())];
    let body = vec![0; 20 << 20];
    let path = format!(
        "/v2/shared/node/blobs/uploads/?digest={}",
        Digest::of(b"other")
    );
    let refused = client.send(Method::POST, &path, &auth, &body).await?;
    assert_eq!(code(&refused), "DENIED");
    let path = path.replace("shared/node", "t/local/app");
    let refused = client.send(Method::POST, &path, &auth, &body).await?;
    assert_eq!(code(&refused), "DIGEST_INVALID");
    Ok(())
}

#[tokio::test]
async fn a_taken_port_is_told_and_builds_go_on() -> Result<()> {
    let stranger = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let taken = stranger.local_addr()?;
    let dir = tempfile::tempdir()?;
    let config = config(&taken.to_string(), &[])?;
    let host = HostRegistry::open_or_attach(dir.path(), config).await?;
    let LoopbackState::Failed(why) = host.about().await?.loopback else {
        anyhow::bail!("it cannot be open");
    };
    assert!(
        why.contains(&taken.port().to_string()) && why.contains("taken"),
        "{why}"
    );
    host.put_blob(&"a".parse()?, &b"x"[..], None).await?;
    let outside = loopback::bind("0.0.0.0:0".parse()?).await;
    assert!(matches!(
        outside,
        Err(loopback::BindError::NotLoopback { .. })
    ));
    Ok(())
}
