//! Pulling from other registries: Debian's docker-registry (open, with passwords, with a private authority's
//! certificate), through an index, and one that lies.

use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use http::{Method, StatusCode};
use kiln_core::Digest;
use kiln_store::HostRegistry;
use kiln_store::host::HostConfig;
use kiln_store::registry::manifest::{OCI_INDEX, OCI_MANIFEST};
use kiln_store::registry::{Reference, RepoName};
use kiln_store::remote::{
    CertificateSources, Credential, ProxyServer, PullEvent, Pulled, RemoteConfig, RemoteError,
    RemoteRegistry, Target,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use crate::client::{Client, manifest};
use crate::loopback::Door;
use crate::remote::{Distribution, Image, PASSWORD, USER, certificate, login};

/// Where pulled images go.
struct Here {
    host: HostRegistry,
    repo: RepoName,
    _dir: TempDir,
}

impl Here {
    async fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let host = HostRegistry::open_or_attach(dir.path(), HostConfig::default()).await?;
        Ok(Self {
            host,
            repo: "shared/from/app".parse()?,
            _dir: dir,
        })
    }

    async fn pull(
        &self,
        from: &str,
        credential: Option<Credential>,
        config: &RemoteConfig,
    ) -> Result<(Pulled, Vec<PullEvent>), RemoteError> {
        let target = Target::source(&from.parse().unwrap());
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = {
            let told = Arc::clone(&told);
            move |event| told.lock().unwrap().push(event)
        };
        let remote = RemoteRegistry::new(config, target, credential)?;
        let pulled = remote
            .pull(&self.host, &self.repo, |digest| digest.short(12), tell)
            .await?;
        let events = told.lock().unwrap().clone();
        Ok((pulled, events))
    }

    async fn refusal(&self, from: &str, credential: Option<Credential>) -> RemoteError {
        match self.pull(from, credential, &RemoteConfig::default()).await {
            Ok((pulled, _)) => panic!("pulled: {pulled:?}"),
            Err(error) => error,
        }
    }

    /// Nothing can be read here.
    async fn has_nothing(&self) -> Result<()> {
        let tags = match self.host.list_tags(&self.repo).await {
            Ok(tags) => tags,
            Err(error) if error.is_not_found() => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        assert_eq!(tags, Vec::<String>::new());
        let manifests = self.host.stats().await?.manifests;
        assert_eq!(manifests, 0);
        Ok(())
    }
}

#[tokio::test]
async fn an_image_is_pulled_by_tag_and_by_digest() -> Result<()> {
    let Some(registry) = Distribution::start(false, None).await? else {
        return Ok(());
    };
    let image = Image::new().await?;
    let name = format!("{}/team/app", registry.address);
    image
        .push(&format!("{name}:1.0"), None, &RemoteConfig::default())
        .await?;
    let here = Here::new().await?;
    let open = RemoteConfig::default();
    let (pulled, events) = here.pull(&format!("{name}:1.0"), None, &open).await?;
    assert_eq!(pulled.named, image.image.manifest);
    assert_eq!(pulled.image, image.image);
    assert_eq!(
        pulled.fetched,
        image.layer.len() as u64 + image.image.config_blob.1
    );
    assert_eq!(events.len(), 2, "a layer that is named twice comes once");
    let tag = Reference::Tag(pulled.named.short(12));
    assert_eq!(here.host.resolve(&here.repo, &tag).await?, pulled.named);
    let (again, _) = here
        .pull(&format!("{name}@{}", pulled.named), None, &open)
        .await?;
    assert_eq!((again.fetched, again.present), (0, pulled.fetched));

    let target = Target::source(&format!("{name}:1.0").parse()?);
    let remote = RemoteRegistry::new(&open, target, None)?;
    assert_eq!(remote.resolve().await?, pulled.named);

    let here = Here::new().await?;
    let absent = format!("{name}@{}", Digest::of(b"another image"));
    let error = here.refusal(&absent, None).await;
    assert!(matches!(error, RemoteError::NotFound { .. }), "{error:?}");
    let error = here.refusal(&format!("{name}:2.0"), None).await;
    assert!(
        error.is_usage() && error.to_string().contains("MANIFEST_UNKNOWN"),
        "{error}"
    );
    here.has_nothing().await
}

#[tokio::test]
async fn the_image_for_this_platform_is_taken_from_an_index() -> Result<()> {
    let Some(registry) = Distribution::start(false, None).await? else {
        return Ok(());
    };
    let image = Image::new().await?;
    let name = format!("{}/app", registry.address);
    image.push(&name, None, &RemoteConfig::default()).await?;
    let stored = Reference::Digest(image.image.manifest);
    let stored = image.host.get_manifest(&image.repo, &stored).await?;
    // Another platform's image with the same content: only the platform differs.
    let mut other: Value = serde_json::from_slice(&stored.bytes)?;
    other["annotations"] = json!({"for": "arm64"});
    let other = serde_json::to_vec(&other)?;
    let entry = |bytes: &[u8], architecture: &str| {
        json!({
            "mediaType": OCI_MANIFEST, "digest": Digest::of(bytes), "size": bytes.len(),
            "platform": {"architecture": architecture, "os": "linux"},
        })
    };
    let index = |entries: Vec<Value>| json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
    let both = index(vec![entry(&other, "arm64"), entry(&stored.bytes, "amd64")]);
    let foreign = index(vec![entry(&other, "arm64")]);
    let mut client = Client::over(TcpStream::connect(&registry.address).await?)
        .await?
        .with_host(&registry.address);
    for (tag, value) in [
        ("other", serde_json::from_slice(&other)?),
        ("both", both.clone()),
        ("foreign", foreign),
    ] {
        let put = client.push_manifest("app", tag, &value).await?;
        assert_eq!(put.status(), StatusCode::CREATED, "{tag}: {put:?}");
    }
    let here = Here::new().await?;
    let (pulled, _) = here
        .pull(&format!("{name}:both"), None, &RemoteConfig::default())
        .await?;
    assert_eq!(pulled.image.manifest, image.image.manifest);
    assert_eq!(pulled.named, Digest::of(&serde_json::to_vec(&both)?));
    let error = here.refusal(&format!("{name}:foreign"), None).await;
    assert!(error.to_string().contains("linux/amd64"), "{error}");
    Ok(())
}

#[tokio::test]
async fn a_login_and_a_private_authority_are_needed_where_they_are() -> Result<()> {
    let keys = tempfile::tempdir()?;
    let Some((certificate, key)) = certificate(keys.path()).await? else {
        return Ok(());
    };
    let Some(registry) = Distribution::start(true, Some((&certificate, &key))).await? else {
        return Ok(());
    };
    let trust = keys.path().join("certs.d").join(&registry.address);
    std::fs::create_dir_all(&trust)?;
    std::fs::copy(&certificate, trust.join("ca.crt"))?;
    let sources = CertificateSources::in_dirs(vec![keys.path().join("certs.d")]);
    let name = format!("{}/app:v1", registry.address);
    let config = RemoteConfig {
        ca_bundle: sources.bundle_for(&Target::source(&name.parse()?), None)?,
        ..RemoteConfig::default()
    };
    let image = Image::new().await?;
    image.push(&name, login(USER, PASSWORD), &config).await?;
    let here = Here::new().await?;
    let untrusted = here.refusal(&name, login(USER, PASSWORD)).await;
    assert!(
        matches!(untrusted, RemoteError::Network { .. }),
        "{untrusted:?}"
    );
    for credential in [None, login(USER, "wrong")] {
        let refused = here.pull(&name, credential, &config).await;
        let error = refused.err().context("it was pulled")?;
        assert!(error.to_string().contains("wants a login"), "{error}");
        assert!(!format!("{error:?}").contains("wrong"));
    }
    here.has_nothing().await?;
    let (pulled, _) = here.pull(&name, login(USER, PASSWORD), &config).await?;
    assert_eq!(pulled.named, image.image.manifest);
    Ok(())
}

/// A proxy that knows one way, and tells how it was asked.
async fn proxy(to: String) -> Result<(ProxyServer, Arc<Mutex<Vec<String>>>)> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (to, told) = (to.clone(), Arc::clone(&told));
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") && stream.read_line(&mut head).await? > 0 {}
                told.lock().unwrap().push(head);
                let mut far = TcpStream::connect(to).await?;
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
                tokio::io::copy_bidirectional(&mut stream, &mut far).await?;
                Ok::<_, std::io::Error>(())
            });
        }
    });
    let server = ProxyServer {
        host: "127.0.0.1".to_owned(),
        port,
        login: Some(("ann".to_owned(), "proxy pass".to_owned())),
    };
    Ok((server, asked))
}

#[tokio::test]
async fn the_hosts_proxy_leads_to_a_registry_that_it_alone_can_reach() -> Result<()> {
    let keys = tempfile::tempdir()?;
    let Some((certificate, key)) = certificate(keys.path()).await? else {
        return Ok(());
    };
    let Some(registry) = Distribution::start(true, Some((&certificate, &key))).await? else {
        return Ok(());
    };
    let (server, asked) = proxy(registry.address.clone()).await?;
    let config = RemoteConfig {
        ca_bundle: Some(std::fs::read(&certificate)?),
        proxy: Some(Arc::new(move |host: &str, port: u16| {
            assert_eq!((host, port), ("registry.example.org", 443));
            Some(server.clone())
        })),
        ..RemoteConfig::default()
    };
    let name = "registry.example.org/team/app:v1";
    let image = Image::new().await?;
    image.push(name, login(USER, PASSWORD), &config).await?;
    let here = Here::new().await?;
    let (pulled, _) = here.pull(name, login(USER, PASSWORD), &config).await?;
    assert_eq!(pulled.named, image.image.manifest);
    let asked = asked.lock().unwrap();
    assert!(!asked.is_empty());
    for head in asked.iter() {
        assert!(
            head.starts_with("CONNECT registry.example.org:443 "),
            "{head}"
        );
        // base64 of ann:proxy pass; the registry's login is not for the proxy.
        assert!(
            head.to_lowercase().contains("proxy-authorization: basic"),
            "{head}"
        );
        assert!(head.contains("YW5uOnByb3h5IHBhc3M="), "{head}");
        assert!(!head.to_lowercase().contains("\nauthorization"), "{head}");
    }
    Ok(())
}

#[tokio::test]
async fn a_token_server_hands_out_what_a_pull_needs() -> Result<()> {
    let door = Door::open(&["shared"]).await?;
    let image = Image::new().await?;
    let (user, secret) = door.host.credentials()?;
    let right = login(user, secret.reveal());
    let name = format!("{}/t/local/copy:v1", door.address);
    image
        .push(&name, right.clone(), &RemoteConfig::default())
        .await?;
    let here = Here::new().await?;
    for credential in [None, login(user, "guess")] {
        let error = here.refusal(&name, credential).await;
        assert!(error.to_string().contains("wants a login"), "{error}");
    }
    let (pulled, _) = here.pull(&name, right, &RemoteConfig::default()).await?;
    assert_eq!(pulled.named, image.image.manifest);
    // Where anybody may pull, no login is needed.
    let from = "shared/app".parse()?;
    door.host
        .adopt(&"t/local/copy".parse()?, &from, &pulled.named)
        .await?;
    let here = Here::new().await?;
    let open = format!("{}/shared/app@{}", door.address, pulled.named);
    here.pull(&open, None, &RemoteConfig::default()).await?;
    Ok(())
}

#[tokio::test]
async fn content_elsewhere_never_sees_the_login() -> Result<()> {
    async fn serve(router: Router) -> Result<std::net::SocketAddr> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(address)
    }
    let config = config("amd64");
    let image = serde_json::to_vec(&manifest(&config, &[LAYER]))?;
    let blobs = [config.clone(), LAYER.to_vec()];
    let elsewhere = serve(Router::new().fallback(move |request: Request| async move {
        if request.headers().contains_key("authorization") {
            return StatusCode::IM_A_TEAPOT.into_response();
        }
        let path = request.uri().path().to_owned();
        let mut blobs = blobs.iter();
        let found = blobs.find(|blob| path.ends_with(&Digest::of(blob).hex()));
        found.map_or(StatusCode::NOT_FOUND.into_response(), |blob| {
            blob.clone().into_response()
        })
    }))
    .await?;
    let registry = serve(Router::new().fallback(move |request: Request| async move {
        let path = request.uri().path().to_owned();
        let welcome = request.headers().get("authorization");
        if welcome.is_none_or(|value| value != "Basic YW5uOnMzY3JldCBwYXNz") {
            let challenge = [("www-authenticate", "Basic realm=\"x\"")];
            return (StatusCode::UNAUTHORIZED, challenge).into_response();
        }
        match path.rsplit_once("/blobs/sha256:") {
            Some((_, hex)) => {
                let to = format!("http://{elsewhere}/content/{hex}");
                (StatusCode::TEMPORARY_REDIRECT, [("location", to)]).into_response()
            }
            None if path.contains("/manifests/") => {
                ([("content-type", OCI_MANIFEST)], image).into_response()
            }
            None => StatusCode::OK.into_response(),
        }
    }))
    .await?;
    let here = Here::new().await?;
    let name = format!("{registry}/app:v1");
    let (pulled, _) = here
        .pull(&name, login(USER, PASSWORD), &RemoteConfig::default())
        .await?;
    assert_eq!(pulled.fetched, (config.len() + LAYER.len()) as u64);
    Ok(())
}

/// What a lying registry does with one image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lie {
    /// A blob with one byte changed.
    Blob,
    /// A blob without its end, in an answer that ends well.
    Short,
    /// A blob with more after its end.
    Long,
    /// Another manifest than the digest that was asked for.
    Manifest,
    /// A configuration for another platform.
    Platform,
    /// A manifest without an end.
    Endless,
}

#[derive(Clone)]
struct Liar(Lie);

const LAYER: &[u8] = b"the bytes of a layer";

fn config(architecture: &str) -> Vec<u8> {
    let value = json!({
        "architecture": architecture, "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(LAYER)]}
    });
    serde_json::to_vec(&value).expect("JSON")
}

async fn lie(State(Liar(lie)): State<Liar>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    assert_eq!(*request.method(), Method::GET);
    let config = config(if lie == Lie::Platform {
        "arm64"
    } else {
        "amd64"
    });
    let image = serde_json::to_vec(&manifest(&config, &[LAYER])).expect("JSON");
    if path.contains("/manifests/") {
        let bytes = match lie {
            Lie::Endless => vec![b' '; 64 << 20],
            Lie::Manifest if path.contains("sha256:") => [&image[..], b" "].concat(),
            _ => image,
        };
        return ([("content-type", OCI_MANIFEST)], bytes).into_response();
    }
    if path.ends_with(&Digest::of(&config).to_string()) {
        return config.into_response();
    }
    if path.contains("/blobs/") {
        let mut bytes = LAYER.to_vec();
        match lie {
            Lie::Blob => bytes[3] ^= 1,
            Lie::Short => bytes.truncate(5),
            Lie::Long => bytes.extend(vec![0; 1 << 20]),
            _ => {}
        }
        return bytes.into_response();
    }
    StatusCode::OK.into_response()
}

#[tokio::test]
async fn a_registry_that_lies_is_found_out_and_nothing_is_kept() -> Result<()> {
    for what in [
        Lie::Blob,
        Lie::Short,
        Lie::Long,
        Lie::Manifest,
        Lie::Platform,
        Lie::Endless,
    ] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let router = Router::new().fallback(lie).with_state(Liar(what));
        tokio::spawn(async move { axum::serve(listener, router).await });
        let here = Here::new().await?;
        let by_digest = format!("{address}/app@{}", Digest::of(b"what was promised"));
        let error = match what {
            Lie::Manifest => here.refusal(&by_digest, None).await,
            _ => here.refusal(&format!("{address}/app:v1"), None).await,
        };
        let fits = match what {
            Lie::Blob | Lie::Long | Lie::Manifest => matches!(error, RemoteError::Content { .. }),
            Lie::Short => matches!(error, RemoteError::Network { .. }),
            Lie::Platform | Lie::Endless => matches!(error, RemoteError::Unusable { .. }),
        };
        assert!(fits, "{what:?}: {error:?}");
        here.has_nothing().await?;
    }
    Ok(())
}
