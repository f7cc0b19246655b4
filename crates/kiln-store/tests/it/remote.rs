//! Pushing to other registries: Debian's docker-registry (open, with passwords, with TLS), kiln's own door, and one
//! that misbehaves.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, Method, StatusCode};
use kiln_core::Digest;
use kiln_store::HostRegistry;
use kiln_store::host::HostConfig;
use kiln_store::image::{VerifiedImage, Verify, verify};
use kiln_store::registry::manifest::OCI_MANIFEST;
use kiln_store::registry::{Reference, RepoName};
use kiln_store::remote::{
    Credential, PushEvent, Pushed, RemoteConfig, RemoteError, RemoteRegistry, Target,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::client::{Client, manifest};
use crate::loopback::Door;

pub(crate) const USER: &str = "ann";
pub(crate) const PASSWORD: &str = "s3cret pass";
/// bcrypt of [`PASSWORD`].
const HTPASSWD: &str = "ann:$2y$04$t7qJCqxbH07rkQpyu1CVou6dzm1dJTC.aAMRNeHIvO//KyZbFY5gO\n";

/// An image in kiln's own registry.
pub(crate) struct Image {
    pub(crate) host: HostRegistry,
    pub(crate) repo: RepoName,
    pub(crate) image: VerifiedImage,
    pub(crate) layer: Vec<u8>,
    _dir: TempDir,
}

impl Image {
    pub(crate) async fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let host =
            HostRegistry::open_or_attach(&dir.path().join("r"), HostConfig::default()).await?;
        let repo: RepoName = "t/local/app".parse()?;
        // Larger than any buffer on the way.
        let mut layer = vec![0_u8; 3 << 20];
        let mut state = 7_u32;
        for byte in &mut layer {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = state.to_le_bytes()[3];
        }
        let config = serde_json::to_vec(&json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer), Digest::of(&layer)]}
        }))?;
        for bytes in [layer.clone(), config.clone()] {
            host.put_blob(&repo, std::io::Cursor::new(bytes), None)
                .await?;
        }
        let bytes = serde_json::to_vec(&manifest(&config, &[&layer, &layer]))?;
        let reference = Reference::Digest(Digest::of(&bytes));
        let digest = host
            .put_manifest(&repo, &reference, OCI_MANIFEST, bytes)
            .await?;
        let image = verify(&host, &Verify::image(repo.clone(), digest)).await?;
        Ok(Self {
            host,
            repo,
            image,
            layer,
            _dir: dir,
        })
    }

    pub(crate) async fn push(
        &self,
        to: &str,
        credential: Option<Credential>,
        config: &RemoteConfig,
    ) -> Result<(Pushed, Vec<PushEvent>), RemoteError> {
        let target = Target::new(&to.parse().unwrap())?;
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = {
            let told = Arc::clone(&told);
            move |event| told.lock().unwrap().push(event)
        };
        let remote = RemoteRegistry::new(config, target, credential)?;
        let pushed = remote
            .push(&self.host, &self.repo, &self.image, tell)
            .await?;
        let events = told.lock().unwrap().clone();
        Ok((pushed, events))
    }

    async fn refusal(&self, to: &str, credential: Option<Credential>) -> RemoteError {
        match self.push(to, credential, &RemoteConfig::default()).await {
            Ok(pushed) => panic!("pushed: {pushed:?}"),
            Err(error) => error,
        }
    }
}

pub(crate) fn login(user: &str, password: &str) -> Option<Credential> {
    Some(Credential::Basic {
        user: user.to_owned(),
        password: password.to_owned(),
    })
}

/// Debian's docker-registry on a free port.
pub(crate) struct Distribution {
    _child: Child,
    pub(crate) address: String,
    dir: TempDir,
}

/// Whether a program is here. Missing, it is said; where tools are required, it fails.
#[expect(
    clippy::disallowed_methods,
    reason = "the test's own switch is read from the environment"
)]
pub(crate) fn program(name: &str) -> Result<Option<PathBuf>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    if found.is_none() {
        if std::env::var_os("KILN_TEST_REQUIRE_TOOLS").is_some() {
            bail!("{name} is required and not installed");
        }
        eprintln!("SKIPPED: {name} is not installed");
    }
    Ok(found)
}

impl Distribution {
    pub(crate) async fn start(auth: bool, tls: Option<(&Path, &Path)>) -> Result<Option<Self>> {
        let Some(program) = program("docker-registry")? else {
            return Ok(None);
        };
        let dir = tempfile::tempdir()?;
        let mut config = json!({
            "version": "0.1",
            "log": {"level": "info", "formatter": "json"},
            "storage": {"filesystem": {"rootdirectory": dir.path().join("storage")}},
            "http": {"addr": "127.0.0.1:0", "secret": "test"},
        });
        if auth {
            let file = dir.path().join("htpasswd");
            std::fs::write(&file, HTPASSWD)?;
            config["auth"] = json!({"htpasswd": {"realm": "test", "path": file}});
        }
        if let Some((certificate, key)) = tls {
            config["http"]["tls"] = json!({"certificate": certificate, "key": key});
        }
        // JSON is YAML.
        let file = dir.path().join("config.yml");
        std::fs::write(&file, serde_json::to_vec(&config)?)?;
        let mut child = Command::new(program)
            .arg("serve")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(child.stderr.take().context("no pipe")?).lines();
        let address = loop {
            let line = lines.next_line().await?.context("docker-registry ended")?;
            if let Some((_, rest)) = line.split_once("listening on ") {
                let end = rest.find([',', '"', ' ']).unwrap_or(rest.len());
                break rest[..end].to_owned();
            }
        };
        // Its log must not fill the pipe.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Some(Self {
            _child: child,
            address,
            dir,
        }))
    }

    fn blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        let hex = digest.hex();
        let path = format!(
            "storage/docker/registry/v2/blobs/sha256/{}/{hex}/data",
            &hex[..2]
        );
        Ok(std::fs::read(self.dir.path().join(path))?)
    }

    fn tag(&self, repository: &str, tag: &str) -> Option<String> {
        let path = format!(
            "storage/docker/registry/v2/repositories/{repository}/_manifests/tags/{tag}/current/link"
        );
        std::fs::read_to_string(self.dir.path().join(path)).ok()
    }
}

#[tokio::test]
async fn an_open_registry_gets_every_byte_once() -> Result<()> {
    let Some(registry) = Distribution::start(false, None).await? else {
        return Ok(());
    };
    let image = Image::new().await?;
    let to = format!("{}/team/app:1.0", registry.address);
    let (pushed, events) = image.push(&to, None, &RemoteConfig::default()).await?;
    assert_eq!(pushed.manifest, image.image.manifest);
    // The layer is named twice and sent once.
    assert_eq!(
        pushed.sent,
        image.layer.len() as u64 + image.image.config_blob.1
    );
    assert_eq!(events.len(), 2);
    assert_eq!(registry.blob(&Digest::of(&image.layer))?, image.layer);
    assert_eq!(
        registry.tag("team/app", "1.0"),
        Some(image.image.manifest.to_string())
    );

    let (again, events) = image.push(&to, None, &RemoteConfig::default()).await?;
    assert_eq!((again.sent, again.present), (0, pushed.sent));
    assert!(
        events
            .iter()
            .all(|event| matches!(event, PushEvent::Present { .. }))
    );
    Ok(())
}

#[tokio::test]
async fn passwords_are_asked_for_and_checked() -> Result<()> {
    let Some(registry) = Distribution::start(true, None).await? else {
        return Ok(());
    };
    let image = Image::new().await?;
    let to = format!("{}/app:v1", registry.address);
    for (credential, known) in [(None, false), (login(USER, "wrong"), true)] {
        let error = image.refusal(&to, credential).await;
        assert!(error.is_usage() && error.hint().is_some(), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("wants a login") && text.contains("refuses") == known,
            "{text}"
        );
    }
    assert_eq!(registry.tag("app", "v1"), None);
    image
        .push(&to, login(USER, PASSWORD), &RemoteConfig::default())
        .await?;
    assert_eq!(
        registry.tag("app", "v1"),
        Some(image.image.manifest.to_string())
    );
    Ok(())
}

/// A certificate of its own authority for 127.0.0.1, and its key.
pub(crate) async fn certificate(dir: &Path) -> Result<Option<(PathBuf, PathBuf)>> {
    let Some(openssl) = program("openssl")? else {
        return Ok(None);
    };
    let (certificate, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    let made = Command::new(openssl)
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ])
        .args([
            "-subj",
            "/CN=test",
            "-addext",
            "subjectAltName=IP:127.0.0.1,DNS:registry.example.org",
        ])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .await?;
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    Ok(Some((certificate, key)))
}

#[tokio::test]
async fn tls_needs_a_trusted_certificate() -> Result<()> {
    let keys = tempfile::tempdir()?;
    let Some((certificate, key)) = certificate(keys.path()).await? else {
        return Ok(());
    };
    let Some(registry) = Distribution::start(true, Some((&certificate, &key))).await? else {
        return Ok(());
    };
    let image = Image::new().await?;
    let to = format!("{}/app:v1", registry.address);
    let error = image.refusal(&to, login(USER, PASSWORD)).await;
    assert!(!error.is_usage(), "{error}");
    let config = RemoteConfig {
        ca_bundle: Some(std::fs::read(&certificate)?),
        ..RemoteConfig::default()
    };
    image.push(&to, login(USER, PASSWORD), &config).await?;
    // As workers do, who are shown another certificate for what they offer; this registry knows nothing of it.
    let config = RemoteConfig {
        offers: Some(b"kiln-worker".to_vec()),
        ..config
    };
    let again = format!("{}/app:v2", registry.address);
    image.push(&again, login(USER, PASSWORD), &config).await?;
    assert_eq!(registry.tag("app", "v2"), registry.tag("app", "v1"));
    assert_eq!(
        registry.tag("app", "v1"),
        Some(image.image.manifest.to_string())
    );
    Ok(())
}

#[tokio::test]
async fn kilns_own_door_hands_out_tokens() -> Result<()> {
    let door = Door::open(&[]).await?;
    let image = Image::new().await?;
    let (user, secret) = door.host.credentials()?;
    let right = login(user, secret.reveal());
    let to = format!("{}/t/local/copy:v1", door.address);
    let error = image.refusal(&to, None).await;
    assert!(
        matches!(
            error,
            RemoteError::Unauthorized {
                logged_in: false,
                ..
            }
        ),
        "{error}"
    );
    let error = image.refusal(&to, login(user, "guess")).await;
    assert!(
        matches!(
            error,
            RemoteError::Unauthorized {
                logged_in: true,
                ..
            }
        ),
        "{error}"
    );
    let foreign = format!("{}/shared/node:v1", door.address);
    let error = image.refusal(&foreign, right.clone()).await;
    assert!(
        matches!(error, RemoteError::Forbidden { .. }) && error.is_usage(),
        "{error}"
    );

    image.push(&to, right, &RemoteConfig::default()).await?;
    let repo = "t/local/copy".parse()?;
    let digest = door
        .host
        .resolve(&repo, &Reference::Tag("v1".to_owned()))
        .await?;
    assert_eq!(digest, image.image.manifest);
    verify(&door.host, &Verify::image(repo, digest)).await?;
    Ok(())
}

#[tokio::test]
async fn nobody_at_home_is_the_networks_fault() -> Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    drop(listener);
    let image = Image::new().await?;
    let error = image.refusal(&format!("{address}/app:v1"), None).await;
    assert!(
        matches!(error, RemoteError::Network { .. }) && !error.is_usage(),
        "{error}"
    );
    Ok(())
}

/// A registry that does what a test tells it, and notes what it was asked.
#[derive(Clone, Default)]
struct Odd {
    asked: Arc<Mutex<Vec<(Method, String, HeaderMap)>>>,
    blobs: Arc<Mutex<Vec<Bytes>>>,
    /// Where uploads go, when not here.
    uploads: Option<String>,
    /// Answers to give first: to this method, this status, this often.
    first: Arc<Mutex<Vec<(Method, StatusCode)>>>,
    token_server: Option<String>,
    manifest_digest: Option<String>,
}

impl Odd {
    async fn start(self) -> Result<String> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let router = Router::new().fallback(answer).with_state(self);
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(address)
    }

    fn asked(&self, method: &Method, what: &str) -> Vec<HeaderMap> {
        let asked = self.asked.lock().unwrap();
        let fits = asked
            .iter()
            .filter(|(m, uri, _)| m == method && uri.contains(what));
        fits.map(|(_, _, headers)| headers.clone()).collect()
    }
}

async fn answer(State(odd): State<Odd>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let uri = parts.uri.to_string();
    odd.asked
        .lock()
        .unwrap()
        .push((parts.method.clone(), uri.clone(), parts.headers.clone()));
    let body = axum::body::to_bytes(body, 64 << 20)
        .await
        .unwrap_or_default();
    let early = {
        let mut first = odd.first.lock().unwrap();
        let at = first.iter().position(|(method, _)| *method == parts.method);
        at.map(|at| first.remove(at).1)
    };
    if let Some(status) = early {
        return (status, [("retry-after", "0")]).into_response();
    }
    if uri == "/token" {
        let form = String::from_utf8_lossy(&body).into_owned();
        odd.asked
            .lock()
            .unwrap()
            .push((Method::POST, form, HeaderMap::new()));
        return axum::Json(json!({"access_token": "fresh", "expires_in": 300})).into_response();
    }
    let welcome = odd.token_server.is_none()
        || parts
            .headers
            .get("authorization")
            .is_some_and(|v| v == "Bearer fresh");
    if !welcome {
        let realm = odd.token_server.as_deref().unwrap_or_default();
        let challenge = format!("Bearer realm=\"{realm}\",service=\"odd\"");
        return (StatusCode::UNAUTHORIZED, [("www-authenticate", challenge)]).into_response();
    }
    match parts.method {
        Method::HEAD => StatusCode::NOT_FOUND.into_response(),
        Method::POST => {
            let location = odd
                .uploads
                .unwrap_or_else(|| format!("{}x?state=1", parts.uri.path()));
            (StatusCode::ACCEPTED, [("location", location)]).into_response()
        }
        Method::PUT if uri.contains("/manifests/") => {
            let digest = odd
                .manifest_digest
                .unwrap_or_else(|| Digest::of(&body).to_string());
            (StatusCode::CREATED, [("docker-content-digest", digest)]).into_response()
        }
        Method::PUT => {
            odd.blobs.lock().unwrap().push(body);
            StatusCode::CREATED.into_response()
        }
        _ => StatusCode::OK.into_response(),
    }
}

#[tokio::test]
async fn uploads_elsewhere_never_see_the_login() -> Result<()> {
    let storage = Odd::default();
    let elsewhere = storage.clone().start().await?;
    let tokens = Odd::default();
    let token_server = format!("http://{}/token", tokens.clone().start().await?);
    let odd = Odd {
        uploads: Some(format!("http://{elsewhere}/put?signature=1")),
        token_server: Some(token_server),
        ..Odd::default()
    };
    let address = odd.clone().start().await?;
    let image = Image::new().await?;
    let credential = Some(Credential::IdentityToken("long lived".to_owned()));
    image
        .push(
            &format!("{address}/app:v1"),
            credential,
            &RemoteConfig::default(),
        )
        .await?;
    let puts = storage.asked(&Method::PUT, "signature=1&digest=sha256%3A");
    assert_eq!(puts.len(), 2);
    assert!(
        puts.iter()
            .all(|headers| !headers.contains_key("authorization"))
    );
    assert!(
        puts.iter()
            .any(|headers| headers["content-length"] == image.layer.len().to_string().as_str())
    );
    assert!(
        storage
            .blobs
            .lock()
            .unwrap()
            .iter()
            .any(|blob| **blob == *image.layer)
    );
    let forms = tokens.asked(&Method::POST, "refresh_token=long%20lived");
    assert_eq!(forms.len(), 1, "one token for the whole push");
    assert_eq!(
        odd.asked(&Method::PUT, "/v2/app/manifests/v1")[0]["authorization"],
        "Bearer fresh"
    );
    Ok(())
}

#[tokio::test]
async fn passing_trouble_is_survived_and_lasting_trouble_told() -> Result<()> {
    let image = Image::new().await?;
    let busy = StatusCode::SERVICE_UNAVAILABLE;
    let odd = Odd::default();
    *odd.first.lock().unwrap() = vec![(Method::HEAD, busy), (Method::PUT, StatusCode::BAD_GATEWAY)];
    let address = odd.clone().start().await?;
    let (_, events) = image
        .push(&format!("{address}/app:v1"), None, &RemoteConfig::default())
        .await?;
    let again = events
        .iter()
        .filter(|event| matches!(event, PushEvent::Again { .. }))
        .count();
    assert_eq!(again, 2);

    let odd = Odd::default();
    *odd.first.lock().unwrap() = vec![(Method::PUT, StatusCode::INTERNAL_SERVER_ERROR)];
    let address = odd.clone().start().await?;
    let error = image.refusal(&format!("{address}/app:v1"), None).await;
    assert!(
        matches!(error, RemoteError::Status { status: 500, .. }) && !error.is_usage(),
        "{error}"
    );
    assert_eq!(odd.asked(&Method::PUT, "/v2/").len(), 1);

    let odd = Odd::default();
    *odd.first.lock().unwrap() = vec![(Method::PUT, busy); 3];
    let address = odd.clone().start().await?;
    let error = image.refusal(&format!("{address}/app:v1"), None).await;
    assert!(
        matches!(error, RemoteError::Status { status: 503, .. }),
        "{error}"
    );
    Ok(())
}

#[tokio::test]
async fn a_lying_registry_is_found_out() -> Result<()> {
    let image = Image::new().await?;
    let other = Digest::of(b"other").to_string();
    let lies = [
        Odd {
            manifest_digest: Some(other),
            ..Odd::default()
        },
        Odd {
            uploads: Some("http://registry.example.org/put".to_owned()),
            ..Odd::default()
        },
        Odd {
            token_server: Some("http://registry.example.org/token".to_owned()),
            ..Odd::default()
        },
    ];
    for odd in lies {
        let address = odd.start().await?;
        let error = image
            .refusal(&format!("{address}/app:v1"), login(USER, PASSWORD))
            .await;
        assert!(matches!(error, RemoteError::Protocol { .. }), "{error}");
        assert!(!format!("{error:?}").contains(PASSWORD));
    }
    Ok(())
}

#[tokio::test]
async fn a_pushed_image_is_pulled_by_its_tag() -> Result<()> {
    let Some(registry) = Distribution::start(false, None).await? else {
        return Ok(());
    };
    let image = Image::new().await?;
    image
        .push(
            &format!("{}/app", registry.address),
            None,
            &RemoteConfig::default(),
        )
        .await?;
    let stream = TcpStream::connect(&registry.address).await?;
    let mut client = Client::over(stream).await?.with_host(&registry.address);
    let accept = [("accept", OCI_MANIFEST)];
    let got = client
        .send(Method::GET, "/v2/app/manifests/latest", &accept, b"")
        .await?;
    let value: Value = serde_json::from_slice(got.body())?;
    assert_eq!(value["layers"].as_array().map(Vec::len), Some(2));
    assert_eq!(Digest::of(got.body()), image.image.manifest);
    Ok(())
}
