//! The operator's files as people get them wrong, and who is shown which certificate.

use std::os::unix::fs::PermissionsExt as _;
use std::time::{SystemTime, UNIX_EPOCH};

use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConnection};

use super::*;
use crate::access::{Access, tls};

const DAY_MS: u64 = 24 * 3600 * 1000;

struct Scene {
    dir: tempfile::TempDir,
    access: Access,
    now_ms: u64,
}

fn scene() -> Scene {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let now_ms = u64::try_from(since.expect("clock").as_millis()).expect("clock");
    let dir = tempfile::tempdir().expect("dir");
    let access = Access::open(&dir.path().join("keys"), "x", Vec::new(), now_ms);
    Scene {
        access: access.expect("access"),
        dir,
        now_ms,
    }
}

fn moment(unix_ms: u64) -> time::OffsetDateTime {
    let seconds = i64::try_from(unix_ms / 1000).expect("time");
    time::OffsetDateTime::from_unix_timestamp(seconds).expect("time")
}

/// A certificate that signs itself, as somebody's own authority would, good from `from` to `to`.
fn made(from: u64, to: u64) -> (String, KeyPair) {
    let key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::new(vec!["ci.test".to_owned()]).expect("params");
    params.not_before = moment(from);
    params.not_after = moment(to);
    let certificate = params.self_signed(&key).expect("signed");
    (certificate.pem(), key)
}

impl Scene {
    fn write(&self, name: &str, text: &str, mode: u32) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).expect("write");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
        path
    }

    fn good(&self) -> IdentityFiles {
        let (pem, key) = made(self.now_ms - 200 * DAY_MS, self.now_ms + DAY_MS);
        IdentityFiles {
            chain: self.write("cert.pem", &pem, 0o644),
            key: self.write("key.pem", &key.serialize_pem(), 0o640),
        }
    }

    fn shown(&self, files: IdentityFiles, now_ms: u64) -> Result<Shown, TlsError> {
        let names = vec!["worker.test".to_owned()];
        Shown::new(self.access.authority(), names, Some(files), now_ms)
    }

    /// Why files are refused.
    fn refused(&self, files: IdentityFiles) -> String {
        let refused = self.shown(files, self.now_ms).expect_err("refused");
        let reason = std::error::Error::source(&refused).map(ToString::to_string);
        format!("{refused} {}", reason.unwrap_or_default())
    }
}

/// The certificate that a client is shown which offers these protocols and trusts `root`.
fn seen(
    shown: &Arc<Shown>,
    authority: &Authority,
    offered: &[&[u8]],
    name: &str,
    root: &CertificateDer<'_>,
) -> Result<CertificateDer<'static>, rustls::Error> {
    let server = tls::server_config(Arc::clone(shown) as _, authority).expect("config");
    let mut roots = RootCertStore::empty();
    roots.add(root.clone().into_owned()).expect("root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = offered.iter().map(|one| one.to_vec()).collect();
    let name: ServerName<'static> = name.to_owned().try_into().expect("name");
    let mut client = ClientConnection::new(Arc::new(config), name).expect("client");
    let mut server = ServerConnection::new(server).expect("server");
    while client.is_handshaking() {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).expect("write");
        }
        server.read_tls(&mut &wire[..]).expect("read");
        server.process_new_packets()?;
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).expect("write");
        }
        let mut reader = &wire[..];
        while !reader.is_empty() {
            client.read_tls(&mut reader).expect("read");
            client.process_new_packets()?;
        }
    }
    assert_ne!(client.alpn_protocol(), Some(ALPN), "it is never chosen");
    let chain = client.peer_certificates().expect("shown");
    Ok(chain[0].clone().into_owned())
}

#[test]
fn files_that_cannot_be_shown_are_refused_with_the_reason() {
    let scene = scene();
    let good = scene.good();
    assert!(scene.shown(good.clone(), scene.now_ms).is_ok());
    let chain = |chain| IdentityFiles {
        chain,
        ..good.clone()
    };
    let key = |key| IdentityFiles {
        key,
        ..good.clone()
    };
    let nowhere = scene.dir.path().join("nowhere.pem");
    assert!(
        scene
            .refused(chain(nowhere.clone()))
            .contains("nowhere.pem")
    );
    assert!(scene.refused(key(nowhere)).contains("nowhere.pem"));
    let pipe = scene.dir.path().join("pipe");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, mode).expect("pipe");
    assert!(scene.refused(chain(pipe)).contains("no file"));
    let empty = scene.write("empty", "", 0o600);
    assert!(
        scene
            .refused(chain(empty.clone()))
            .contains("no certificate")
    );
    assert!(
        scene
            .refused(key(empty))
            .contains("no unencrypted private key")
    );
    let locked =
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let locked = scene.write("locked", locked, 0o600);
    assert!(
        scene
            .refused(key(locked))
            .contains("no unencrypted private key")
    );

    let (_, other) = made(scene.now_ms - DAY_MS, scene.now_ms + DAY_MS);
    let other = scene.write("other", &other.serialize_pem(), 0o600);
    assert!(
        scene
            .refused(key(other))
            .contains("is not that of the certificate")
    );
    for (name, from, to) in [
        ("over", scene.now_ms - 2 * DAY_MS, scene.now_ms - DAY_MS),
        ("future", scene.now_ms + DAY_MS, scene.now_ms + 2 * DAY_MS),
    ] {
        let (pem, own) = made(from, to);
        let files = IdentityFiles {
            chain: scene.write(name, &pem, 0o644),
            key: scene.write("its-key", &own.serialize_pem(), 0o600),
        };
        assert!(scene.refused(files).contains("not now"), "{name}");
    }
    for mode in [0o604, 0o602, 0o666] {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&good.key, permissions).expect("chmod");
        let said = scene.refused(good.clone());
        assert!(said.contains("chmod o="), "{mode:o}: {said}");
    }
}

#[test]
fn workers_are_shown_the_authority_they_pinned_and_people_the_operators_certificate() {
    let scene = scene();
    let authority = scene.access.authority();
    let files = scene.good();
    // A server that has run for nearly half a year.
    let began_ms = scene.now_ms - 183 * DAY_MS;
    let shown = Arc::new(scene.shown(files.clone(), began_ms).expect("shown"));
    let read = || {
        let pem = std::fs::read(&files.chain).expect("chain");
        CertificateDer::from_pem_slice(&pem).expect("pem")
    };
    let first = read();
    let by_people =
        |root: &CertificateDer<'_>| seen(&shown, authority, &[b"http/1.1"], "ci.test", root);
    assert_eq!(by_people(&first).expect("people"), first);
    assert!(seen(&shown, authority, &[], "ci.test", &first).is_ok());
    let offered: &[&[u8]] = &[ALPN, b"http/1.1"];
    // By the names it was given, and by those of the operator's certificate.
    for name in ["worker.test", "ci.test"] {
        let own = seen(&shown, authority, offered, name, authority.der());
        assert_ne!(own.expect("worker"), first);
    }

    // Renewed as a tool does it: not both files at once.
    let (pem, key) = made(scene.now_ms - 200 * DAY_MS, scene.now_ms + DAY_MS);
    scene.write("cert.pem", &pem, 0o644);
    shown.look(authority, began_ms);
    assert_eq!(by_people(&first).expect("still"), first);
    scene.write("key.pem", &key.serialize_pem(), 0o600);
    shown.look(authority, scene.now_ms - 2 * DAY_MS);
    let second = read();
    assert_eq!(by_people(&second).expect("renewed"), second);

    let before = seen(&shown, authority, offered, "ci.test", authority.der());
    shown.look(authority, began_ms + 182 * DAY_MS);
    let same = seen(&shown, authority, offered, "ci.test", authority.der());
    assert_eq!(before, same);
    shown.look(authority, scene.now_ms);
    let after = seen(&shown, authority, offered, "ci.test", authority.der());
    assert_ne!(before.expect("worker"), after.expect("worker"));
}
