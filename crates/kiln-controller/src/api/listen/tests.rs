//! Real handshakes on loopback: who is seen, who is not let in, who is cut.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::Extension;
use axum::routing::get;
use kiln_db::{DatabaseUrl, NewWorker, OpenOptions, Placement};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::*;
use crate::access::shown::Shown;
use crate::access::{Access, tls};

const PATIENCE: Duration = Duration::from_secs(20);

struct Scene {
    _dir: tempfile::TempDir,
    access: Access,
    sockets: Sockets,
    address: SocketAddr,
    now_ms: u64,
}

async fn who(Extension(peer): Extension<Peer>) -> String {
    match peer {
        Peer::Tls { certificate, .. } => certificate.map_or_else(
            || "nobody".to_owned(),
            |certificate| certificate.worker.to_string(),
        ),
        Peer::Local { .. } => "local".to_owned(),
        Peer::Plain { .. } => "plain".to_owned(),
    }
}

async fn scene() -> Scene {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("clock");
    let now_ms = u64::try_from(since.as_millis()).expect("clock");
    let dir = tempfile::tempdir().expect("dir");
    let access = Access::open(&dir.path().join("keys"), "x", Vec::new(), now_ms).expect("access");
    let names = vec!["controller.test".to_owned()];
    let shown = Shown::new(access.authority(), names, None, now_ms).expect("identity");
    let config = tls::server_config(Arc::new(shown), access.authority()).expect("config");
    let sockets = Sockets::new(ListenConfig::default());
    let any = "127.0.0.1:0".parse().expect("address");
    let router = Router::new().route("/who", get(who));
    let address = sockets
        .tcp(any, Some(config), router)
        .await
        .expect("listens");
    Scene {
        _dir: dir,
        access,
        sockets,
        address,
        now_ms,
    }
}

impl Scene {
    fn client(
        &self,
        version: &'static rustls::SupportedProtocolVersion,
        worker: Option<&str>,
    ) -> rustls::ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(self.access.authority().der().clone())
            .expect("root");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .expect("versions")
            .with_root_certificates(roots);
        let Some(worker) = worker else {
            return builder.with_no_client_auth();
        };
        let key = rcgen::KeyPair::generate().expect("key");
        let csr = rcgen::CertificateParams::default()
            .serialize_request(&key)
            .and_then(|csr| csr.pem())
            .expect("csr");
        let worker = worker.parse().expect("name");
        let made = self
            .access
            .authority()
            .worker_certificate(&csr, &worker, None, self.now_ms)
            .expect("made");
        let chain = vec![CertificateDer::from_pem_slice(made.pem.as_bytes()).expect("pem")];
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        builder.with_client_auth_cert(chain, key).expect("client")
    }

    async fn connect(&self, config: rustls::ClientConfig) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.address).await?;
        let name = "controller.test".try_into().expect("name");
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
    }
}

/// Asks on a connection that stays open; gives the body.
async fn ask(stream: &mut TlsStream<TcpStream>) -> io::Result<String> {
    stream
        .write_all(b"GET /who HTTP/1.1\r\nhost: controller.test\r\n\r\n")
        .await?;
    let mut bytes = vec![0; 4096];
    let got = stream.read(&mut bytes).await?;
    let text = String::from_utf8_lossy(&bytes[..got]).into_owned();
    Ok(text.rsplit("\r\n").next().unwrap_or_default().to_owned())
}

/// Whether the other end closes.
async fn is_cut(stream: &mut TlsStream<TcpStream>) -> bool {
    let mut byte = [0];
    let read = tokio::time::timeout(PATIENCE, stream.read(&mut byte)).await;
    matches!(read, Ok(Ok(0) | Err(_)))
}

#[tokio::test]
async fn a_worker_is_seen_by_its_certificate_and_cut_when_it_is_removed() {
    let scene = scene().await;
    let new = &rustls::version::TLS13;
    let mut nobody = scene
        .connect(scene.client(new, None))
        .await
        .expect("let in");
    assert_eq!(ask(&mut nobody).await.expect("answers"), "nobody");
    let mut first = scene
        .connect(scene.client(new, Some("w1")))
        .await
        .expect("let in");
    assert_eq!(ask(&mut first).await.expect("answers"), "w1");
    let mut other = scene
        .connect(scene.client(new, Some("w2")))
        .await
        .expect("let in");
    assert_eq!(ask(&mut other).await.expect("answers"), "w2");

    let url = DatabaseUrl::Sqlite(scene._dir.path().join("kiln.db"));
    let db = Database::open(&url, OpenOptions::default())
        .await
        .expect("database");
    let facts = serde_json::json!({
        "arch": "amd64", "runtimes": [], "version": "1", "warm": [],
        "capacity": {"cpus": 1, "memory": 1, "disk": 1, "machines": 1},
    });
    let worker = NewWorker {
        id: "w1".parse().expect("name"),
        facts: serde_json::from_value(facts).expect("facts"),
        certificate: None,
    };
    let id = worker.id.clone();
    let placement = Placement {
        pool: kiln_core::PoolName::default_pool(),
        labels: std::collections::BTreeMap::new(),
        tenants: None,
    };
    db.admit_worker(worker, placement).await.expect("joins");
    scene.sockets.close_removed(db.clone());
    assert_eq!(
        ask(&mut first).await.expect("answers"),
        "w1",
        "joined, not removed"
    );
    db.remove_worker(&id).await.expect("removed");
    assert!(is_cut(&mut first).await, "a removed worker stays connected");
    assert_eq!(ask(&mut other).await.expect("answers"), "w2");
    scene.sockets.close(PATIENCE).await;
}

#[tokio::test]
async fn old_versions_and_plain_text_are_not_let_in() {
    let scene = scene().await;
    let old = scene
        .connect(scene.client(&rustls::version::TLS12, None))
        .await;
    assert!(old.is_err(), "TLS 1.2");
    let mut plain = TcpStream::connect(scene.address).await.expect("connects");
    plain
        .write_all(b"GET /who HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .expect("writes");
    let mut answer = Vec::new();
    let _reset = tokio::time::timeout(PATIENCE, plain.read_to_end(&mut answer)).await;
    assert!(
        !String::from_utf8_lossy(&answer).contains("200"),
        "plain text"
    );
    scene.sockets.close(Duration::from_millis(100)).await;
}

#[tokio::test]
async fn closing_waits_no_longer_than_it_may_for_answers_without_end() {
    let sockets = Sockets::new(ListenConfig::default());
    let any = "127.0.0.1:0".parse().expect("address");
    let endless = || async {
        let pieces = futures_util::stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            Some((Ok::<_, std::convert::Infallible>("x"), ()))
        });
        Body::from_stream(pieces)
    };
    let router = Router::new().route("/endless", get(endless));
    let address = sockets.tcp(any, None, router).await.expect("listens");
    let mut stream = TcpStream::connect(address).await.expect("connects");
    stream
        .write_all(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .expect("writes");
    let mut bytes = vec![0; 1024];
    assert!(stream.read(&mut bytes).await.expect("reads") > 0);
    let closed = tokio::time::timeout(PATIENCE, sockets.close(Duration::from_millis(50))).await;
    assert!(closed.is_ok(), "it waits for ever");
    let end = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await;
    assert!(end.is_ok(), "the connection stays open");
}

#[tokio::test]
async fn no_more_connections_than_may_be_and_places_come_back() {
    let sockets = Sockets::new(ListenConfig {
        connections_max: 2,
        ..ListenConfig::default()
    });
    let any = "127.0.0.1:0".parse().expect("address");
    let router = Router::new().route("/who", get(who));
    let address = sockets.tcp(any, None, router).await.expect("listens");
    let open = || async {
        let mut stream = TcpStream::connect(address).await.expect("connects");
        stream
            .write_all(b"GET /who HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .expect("writes");
        let mut bytes = vec![0; 1024];
        let got = stream.read(&mut bytes).await.unwrap_or(0);
        (stream, got > 0)
    };
    let (first, served) = open().await;
    assert!(served);
    let (_second, served) = open().await;
    assert!(served);
    assert!(!open().await.1, "one too many");
    drop(first);
    let end = tokio::time::Instant::now() + PATIENCE;
    while !open().await.1 {
        assert!(
            tokio::time::Instant::now() < end,
            "the place never came back"
        );
    }
    sockets.close(Duration::from_millis(100)).await;
}

#[tokio::test]
async fn a_connection_that_turned_out_to_be_a_workers_is_cut_with_it() {
    async fn mine(Extension(connection): Extension<Connection>) -> String {
        let first = connection.belongs_to(&"w1".parse().expect("name"));
        first.to_string()
    }
    let sockets = Sockets::new(ListenConfig::default());
    let any = "127.0.0.1:0".parse().expect("address");
    let router = Router::new().route("/mine", get(mine));
    let address = sockets.tcp(any, None, router).await.expect("listens");
    let mut line = TcpStream::connect(address).await.expect("connects");
    for want in ["true", "false"] {
        let asked = b"GET /mine HTTP/1.1\r\nhost: controller.test\r\n\r\n";
        line.write_all(asked).await.expect("writes");
        let mut bytes = vec![0; 4096];
        let got = line.read(&mut bytes).await.expect("reads");
        let text = String::from_utf8_lossy(&bytes[..got]).into_owned();
        assert!(text.ends_with(want), "{text}");
    }
    sockets.close_worker(&"w2".parse().expect("name"));
    assert_eq!(sockets.connected(), ["w1".parse().expect("name")]);
    sockets.close_worker(&"w1".parse().expect("name"));
    let mut byte = [0];
    let cut = tokio::time::timeout(PATIENCE, line.read(&mut byte)).await;
    assert!(matches!(cut, Ok(Ok(0) | Err(_))), "{cut:?}");
    sockets.close(PATIENCE).await;
}

#[tokio::test]
async fn strangers_do_not_take_the_private_sockets_place() {
    let dir = tempfile::tempdir().expect("dir");
    let sockets = Sockets::new(ListenConfig {
        connections_max: 2,
        ..ListenConfig::default()
    });
    let router = Router::new().route("/who", get(who));
    let any = "127.0.0.1:0".parse().expect("address");
    let address = sockets.tcp(any, None, router.clone()).await;
    let address = address.expect("listens");
    let path = dir.path().join("socket");
    sockets.unix(&path, router).expect("listens");
    let ask = b"GET /who HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut line = TcpStream::connect(address).await.expect("connects");
        line.write_all(ask).await.expect("writes");
        let mut byte = [0];
        line.read_exact(&mut byte).await.expect("is served");
        held.push(line);
    }
    let mut third = TcpStream::connect(address).await.expect("connects");
    let _cut = third.write_all(ask).await;
    let mut nothing = Vec::new();
    let _cut = third.read_to_end(&mut nothing).await;
    assert!(nothing.is_empty(), "a third was served");
    let mut own = UnixStream::connect(&path).await.expect("connects");
    own.write_all(ask).await.expect("writes");
    let mut byte = [0];
    let served = tokio::time::timeout(PATIENCE, own.read_exact(&mut byte)).await;
    served.expect("in time").expect("is served");
    sockets.close(Duration::from_millis(10)).await;
}
