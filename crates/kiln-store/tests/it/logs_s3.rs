//! Logs in a bucket: a real S3 server (SeaweedFS), and one that says yes to everything.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use axum::Router;
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use kiln_store::logs::{
    ConditionalPut, LogConfig, LogError, LogKey, LogKeys, LogStore, ObjectTarget, RetentionClass,
    S3Credentials, S3Target,
};

use kiln_store::Bucket;
use tokio::io::AsyncWriteExt as _;

use crate::logs::{all, followed, lines, name};

/// Time until the server answers.
const START: Duration = Duration::from_secs(90);

/// The server's program. Missing, it is said; where tools are required, it fails.
#[expect(
    clippy::disallowed_methods,
    reason = "the test's own switches are read from the environment"
)]
fn weed() -> Result<Option<PathBuf>> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/seaweedfs/bin/weed");
    let weed = std::env::var_os("KILN_TEST_WEED").map_or(ours, PathBuf::from);
    if weed.is_file() {
        return Ok(Some(weed));
    }
    if std::env::var_os("KILN_TEST_REQUIRE_TOOLS").is_some() {
        bail!("{} is required and not there", weed.display());
    }
    eprintln!(
        "SKIPPED: {} is not there (cargo xtask test makes it)",
        weed.display()
    );
    Ok(None)
}

struct Server {
    child: Child,
    port: u16,
    ports: [(&'static str, u16); 4],
    dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Sockets that it makes in a place of its own choosing.
        for (part, port) in &self.ports {
            let grpc = port + 10_000;
            let _ = std::fs::remove_file(format!("/tmp/seaweedfs-{part}-grpc-{grpc}.sock"));
        }
    }
}

/// A port that is free, and its gRPC sister 10,000 above as well.
fn port() -> Result<u16> {
    for _ in 0..200 {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let pair = if port > 45_000 { port - 20_000 } else { port };
        let free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if free(pair) && free(pair + 10_000) {
            return Ok(pair);
        }
    }
    bail!("no pair of free ports")
}

impl Server {
    fn start(weed: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let config = r#"{"identities":[{"name":"kiln","credentials":[{"accessKey":"key","secretKey":"secret"}],
            "actions":["Admin","Read","Write","List","Tagging"]}]}"#;
        std::fs::write(dir.path().join("s3.json"), config)?;
        let (master, volume, filer, s3) = (port()?, port()?, port()?, port()?);
        let child = Command::new(weed)
            .args([
                "-logtostderr=true",
                "server",
                "-dir=.",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
            ])
            .args(["-filer=true", "-s3=true", "-s3.config=s3.json"])
            .args([
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                "-master.telemetry=false",
                "-filer.localSocket=filer.sock",
                "-s3.localSocket=s3.sock",
                "-volume.max=4",
                "-master.volumeSizeLimitMB=64",
            ])
            .arg(format!("-master.port={master}"))
            .arg(format!("-volume.port={volume}"))
            .arg(format!("-filer.port={filer}"))
            .arg(format!("-s3.port={s3}"))
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.path().join("log"))?)
            .spawn()?;
        let server = Self {
            child,
            port: s3,
            ports: [
                ("master", master),
                ("volume", volume),
                ("filer", filer),
                ("s3", s3),
            ],
            dir,
        };
        server.make_bucket(weed, master)?;
        let deadline = Instant::now() + START;
        // Its door to S3 opens last.
        while TcpStream::connect(("127.0.0.1", s3)).is_err() {
            ensure!(
                Instant::now() < deadline,
                "its S3 door stays closed: {}",
                server.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// By the server's own shell, again until it is up.
    fn make_bucket(&self, weed: &Path, master: u16) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            let mut shell = Command::new(weed)
                .args(["shell", &format!("-master=127.0.0.1:{master}")])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()?;
            use std::io::Write as _;
            let mut stdin = shell.stdin.take().context("a pipe")?;
            stdin.write_all(b"s3.bucket.create -name kiln\n")?;
            drop(stdin);
            let said = shell.wait_with_output()?.stdout;
            if String::from_utf8_lossy(&said).contains("created bucket kiln") {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the server does not answer: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn target(&self, secret: &str) -> Result<S3Target> {
        let url = format!(
            "s3://kiln/some/where?endpoint=http://127.0.0.1:{}",
            self.port
        );
        let credentials = S3Credentials {
            access_key_id: "key".to_owned(),
            secret_access_key: secret.to_owned(),
            session_token: None,
        };
        Ok(S3Target::from_url(&url, Some(credentials))?)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ended_logs_live_in_a_bucket_or_stay_here_while_it_is_lost() -> Result<()> {
    let Some(weed) = weed()? else {
        return Ok(());
    };
    let server = Server::start(&weed)?;
    a_bucket_keeps_them(&server).await?;
    an_upload_that_nobody_finished_is_ended(&server).await?;
    a_lost_bucket_keeps_them_here(server).await
}

async fn a_bucket_keeps_them(server: &Server) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut config = LogConfig::in_folder(dir.path());
    config.ended = ObjectTarget::S3(server.target("secret")?);
    config.keys = LogKeys::new(LogKey::new([3; 32]), []);
    let store = LogStore::open(config.clone()).await?;
    assert_eq!(store.conditional_put(), ConditionalPut::Honest);
    let b1 = name("b1");
    let text = lines(0..30_000);
    let mut at = 0;
    let reader = {
        let (store, b1) = (store.clone(), b1.clone());
        tokio::spawn(async move { followed(&store, &b1, 0).await })
    };
    for piece in text.as_bytes().chunks(100_000) {
        at = store
            .append(&b1, at, bytes::Bytes::copy_from_slice(piece))
            .await?
            .next;
    }
    let status = store.end(&b1, RetentionClass::Hot, 0).await?;
    assert!(status.archived);
    assert_eq!(status.bytes, text.len() as u64);
    assert_eq!(reader.await??, text.as_bytes());
    assert!(store.unarchived().await?.is_empty());
    // Another controller with another folder reads the same.
    let elsewhere = tempfile::tempdir()?;
    config.live = elsewhere.path().join("live");
    let other = LogStore::open(config.clone()).await?;
    assert_eq!(all(&other, &b1).await?, text.as_bytes());
    let middle = text.len() / 2;
    assert_eq!(
        other.read(&b1, middle as u64, 11).await?,
        text[middle..middle + 11]
    );
    other.remove(&b1).await?;
    let fresh = LogStore::open(config).await?;
    assert!(matches!(
        fresh.read(&b1, 0, 1).await,
        Err(LogError::NotFound { .. })
    ));
    Ok(())
}

async fn an_upload_that_nobody_finished_is_ended(server: &Server) -> Result<()> {
    let mut target = server.target("secret")?;
    target.prefix = "eu/one".to_owned();
    let bucket = Bucket::open(&ObjectTarget::S3(target))?;
    // As of somebody who is killed: more than one part, and never an end.
    let (mut sender, content) = tokio::io::duplex(1 << 20);
    let writing = {
        let bucket = bucket.clone();
        tokio::spawn(async move { bucket.put("images/half", content, None).await })
    };
    sender.write_all(&vec![1; 20 << 20]).await?;
    let end = Instant::now() + START;
    while bucket.end_unfinished("images", Duration::ZERO).await? == 0 {
        ensure!(Instant::now() < end, "the upload is not listed");
        ensure!(bucket.end_unfinished("sources", Duration::ZERO).await? == 0);
        ensure!(
            bucket
                .end_unfinished("images", Duration::from_secs(3600))
                .await?
                == 0
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    writing.abort();
    drop(sender);
    ensure!(bucket.end_unfinished("images", Duration::ZERO).await? == 0);
    ensure!(bucket.size("images/half").await?.is_none());
    Ok(())
}

async fn a_lost_bucket_keeps_them_here(server: Server) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut config = LogConfig::in_folder(dir.path());
    config.ended = ObjectTarget::S3(server.target("wrong")?);
    let refused = LogStore::open(config.clone()).await;
    assert!(
        matches!(refused, Err(LogError::Objects { .. })),
        "{refused:?}"
    );
    config.ended = ObjectTarget::S3(server.target("secret")?);
    let store = LogStore::open(config).await?;
    let b1 = name("b1");
    store.append(&b1, 0, lines(0..100).into()).await?;
    drop(server);
    let lost = store.end(&b1, RetentionClass::Hot, 0).await;
    assert!(matches!(lost, Err(LogError::Objects { .. })), "{lost:?}");
    assert_eq!(store.unarchived().await?, std::slice::from_ref(&b1));
    assert_eq!(all(&store, &b1).await?, lines(0..100).as_bytes());
    assert_eq!(followed(&store, &b1, 0).await?, lines(0..100).as_bytes());
    Ok(())
}

static PUTS: AtomicUsize = AtomicUsize::new(0);

/// A bucket that takes everything and keeps nothing.
async fn yes(method: Method) -> Response {
    let body = match method {
        Method::POST => "<DeleteResult><Deleted><Key>x</Key></Deleted></DeleteResult>",
        _ => "",
    };
    if method == Method::PUT {
        PUTS.fetch_add(1, Ordering::Relaxed);
    }
    (StatusCode::OK, [(header::ETAG, "\"same\"")], body).into_response()
}

/// The same behind TLS, with a certificate of an authority that nobody knows. Gives the port and the authority, PEM.
async fn yes_by_tls() -> Result<(u16, Vec<u8>)> {
    let ca_key = rcgen::KeyPair::generate()?;
    let mut ca = rcgen::CertificateParams::new(Vec::new())?;
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = ca.self_signed(&ca_key)?.pem();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate()?;
    let cert =
        rcgen::CertificateParams::new(vec!["localhost".to_owned()])?.signed_by(&key, &issuer)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der())
        .map_err(anyhow::Error::msg)?;
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)?;
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else {
                    return;
                };
                let service = hyper::service::service_fn(async |request: http::Request<_>| {
                    Ok::<_, std::convert::Infallible>(yes(request.method().clone()).await)
                });
                let _ended = hyper::server::conn::http1::Builder::new()
                    .serve_connection(hyper_util::rt::TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    Ok((port, authority.into_bytes()))
}

#[tokio::test]
async fn a_bucket_behind_tls_must_prove_its_name() -> Result<()> {
    let (port, authority) = yes_by_tls().await?;
    let dir = tempfile::tempdir()?;
    let open = async |host: &str, roots: Option<Vec<u8>>| {
        let credentials = S3Credentials {
            access_key_id: "key".to_owned(),
            secret_access_key: "secret".to_owned(),
            session_token: None,
        };
        let url = format!("s3://kiln?endpoint=https://{host}:{port}");
        let mut target = S3Target::from_url(&url, Some(credentials))?;
        target.extra_roots = roots;
        let mut config = LogConfig::in_folder(dir.path());
        config.ended = ObjectTarget::S3(target);
        LogStore::open(config).await
    };
    assert!(open("localhost", Some(authority.clone())).await.is_ok());
    let strange = open("localhost", None).await;
    assert!(
        matches!(strange, Err(LogError::Objects { .. })),
        "{strange:?}"
    );
    let other_name = open("127.0.0.1", Some(authority)).await;
    assert!(
        matches!(other_name, Err(LogError::Objects { .. })),
        "{other_name:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_server_that_ignores_conditions_is_found_out() -> Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let serving =
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(yes)).await });
    let dir = tempfile::tempdir()?;
    let mut config = LogConfig::in_folder(dir.path());
    let credentials = S3Credentials {
        access_key_id: "key".to_owned(),
        secret_access_key: "secret".to_owned(),
        session_token: None,
    };
    let url = format!("s3://kiln?endpoint=http://127.0.0.1:{port}");
    config.ended = ObjectTarget::S3(S3Target::from_url(&url, Some(credentials))?);
    let store = LogStore::open(config).await?;
    assert_eq!(store.conditional_put(), ConditionalPut::Ignored);
    assert!(PUTS.load(Ordering::Relaxed) >= 2);
    serving.abort();
    Ok(())
}
