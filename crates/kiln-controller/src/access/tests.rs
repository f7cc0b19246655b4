//! Every way a proof of identity can be wrong, at each door.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kiln_core::job::TrustClass;
use kiln_core::{Action, AttemptId, Epoch, Priority, Role, WorkerId};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};

use super::jwt::Registered;
use super::shown::Shown;
use super::*;

const NOW: u64 = 1_800_000_000_000;

fn open(dir: &tempfile::TempDir) -> Access {
    Access::open(
        &dir.path().join("keys"),
        "https://kiln.test",
        Vec::new(),
        NOW,
    )
    .expect("access")
}

fn developer() -> Principal {
    Principal {
        subject: "dev".to_owned(),
        token: Some("kst-1".parse().expect("id")),
        tenant: "acme".parse().expect("name"),
        role: Role::Developer,
        operator: false,
        scopes: Some([Action::JobRead].into()),
        priority_max: Priority::default(),
        trust: TrustClass::Untrusted,
        expires_unix_ms: Some(NOW + 600_000),
        gives_until_unix_ms: Some(NOW + 600_000),
    }
}

fn lease() -> Lease {
    Lease {
        attempt: AttemptId {
            job: "b1".parse().expect("id"),
            number: 2,
        },
        tenant: "acme".parse().expect("name"),
        worker: "w1".parse::<WorkerId>().expect("id"),
        epoch: Epoch {
            incarnation: 1,
            count: 7,
        },
        deadline_unix_ms: NOW + 15_000,
    }
}

fn grants() -> Vec<RepositoryGrant> {
    vec![RepositoryGrant {
        name: "quarantine/b1/2".to_owned(),
        actions: vec![RegistryAction::Push],
    }]
}

/// The token with its header and claims changed by `edit`, under its old signature.
fn edited(token: &str, edit: impl Fn(&mut serde_json::Value, &mut serde_json::Value)) -> String {
    let parts: Vec<&str> = token.split('.').collect();
    let read = |text: &str| -> serde_json::Value { jwt::part(text).expect("json") };
    let (mut header, mut claims) = (read(parts[0]), read(parts[1]));
    edit(&mut header, &mut claims);
    let write = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.{}", write(&header), write(&claims), parts[2])
}

#[test]
fn a_user_token_says_what_it_was_made_for() {
    let dir = tempfile::tempdir().expect("dir");
    let access = open(&dir);
    let made = access.issue_user(&developer(), 900, NOW).expect("made");
    assert_eq!(
        made.expires_unix_ms,
        NOW + 600_000,
        "never beyond its parent"
    );
    let verified = access.verify_user(&made.text, NOW + 599_999).expect("good");
    let wanted = Principal {
        token: Some(made.id.clone()),
        ..developer()
    };
    assert_eq!(verified.principal, wanted);
    assert_eq!(verified.revocable, [made.id, "kst-1".parse().expect("id")]);
}

#[test]
fn every_wrong_token_is_refused_for_its_reason() {
    use TokenRefused as R;
    let dir = tempfile::tempdir().expect("dir");
    let access = open(&dir);
    let good = access
        .issue_user(&developer(), 900, NOW)
        .expect("made")
        .text;
    let verify = |token: &str| access.verify_user(token, NOW).map(|_| ());
    assert_eq!(verify(&good), Ok(()));
    let alg = |alg: &'static str| {
        let edit = move |header: &mut serde_json::Value, _: &mut serde_json::Value| {
            header["alg"] = alg.into();
        };
        edited(&good, edit)
    };
    for name in ["none", "None", "HS256", "RS256", "ES384", "es256", ""] {
        assert_eq!(verify(&alg(name)), Err(R::Algorithm), "{name}");
    }
    // The public key as an HMAC secret, the classic.
    let unsigned = good.rsplit_once('.').expect("dots").0;
    let key = access.jwks()["keys"][0].to_string();
    let hmac_text = alg("HS256");
    let mac = ring::hmac::sign(
        &ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key.as_bytes()),
        hmac_text.as_bytes(),
    );
    let hmac = format!(
        "{}.{}",
        hmac_text.rsplit_once('.').expect("dots").0,
        URL_SAFE_NO_PAD.encode(mac)
    );
    assert_eq!(verify(&hmac), Err(R::Algorithm));
    assert_eq!(verify(&format!("{unsigned}.")), Err(R::Signature));
    let claims = |name: &'static str, value: serde_json::Value| {
        edited(&good, move |_, claims| claims[name] = value.clone())
    };
    for (name, value) in [
        ("exp", (NOW / 1000 + 3000).into()),
        ("sub", "root".into()),
        (
            "kiln",
            serde_json::json!({"tenant": "other", "role": "admin", "priority_max": 0, "trust": "trusted"}),
        ),
    ] {
        assert_eq!(verify(&claims(name, value)), Err(R::Signature), "{name}");
    }
    let kid = |kid: &'static str| edited(&good, move |header, _| header["kid"] = kid.into());
    for name in ["", "../user", "x"] {
        assert_eq!(verify(&kid(name)), Err(R::Signature), "{name}");
    }
    let crit = edited(&good, |header, _| {
        header["crit"] = serde_json::json!(["exp"])
    });
    let jwk = edited(&good, |header, _| header["jwk"] = serde_json::json!({}));
    let long = format!("{good}{}", "A".repeat(jwt::TOKEN_BYTES_MAX));
    let padded = format!("{good}==");
    for bad in [
        &crit, &jwk, "", ".", "..", "a.b.c", "a.b.c.d", &long, &padded, "Bearer x",
    ] {
        assert_eq!(verify(bad), Err(R::Malformed), "{bad:.40}");
    }
}

#[test]
fn times_issuer_audience_and_life_are_checked_under_a_good_signature() {
    use TokenRefused as R;
    let dir = tempfile::tempdir().expect("dir");
    let access = open(&dir);
    let good = access
        .issue_user(&developer(), 900, NOW)
        .expect("made")
        .text;
    let ring = &access.user;
    let parts: Vec<&str> = good.split('.').collect();
    let own: serde_json::Value =
        jwt::part::<serde_json::Value>(parts[1]).expect("json")["kiln"].clone();
    let now = NOW / 1000;
    let base = Registered {
        iss: access.issuer().to_owned(),
        aud: "kiln:user".to_owned(),
        sub: "dev".to_owned(),
        iat: now,
        nbf: now,
        exp: now + 60,
        jti: "jwt-1".to_owned(),
    };
    let check = |registered: Registered| {
        let text = jwt::sign(ring, door::USER, registered, own.clone()).expect("sign");
        access.verify_user(&text, NOW).map(|_| ())
    };
    assert_eq!(check(base.clone()), Ok(()));
    let cases = [
        (
            Registered {
                exp: now,
                ..base.clone()
            },
            R::Expired,
        ),
        (
            Registered {
                iat: now + 61,
                ..base.clone()
            },
            R::Future,
        ),
        (
            Registered {
                nbf: now + 61,
                ..base.clone()
            },
            R::Future,
        ),
        (
            Registered {
                exp: now + 3601,
                ..base.clone()
            },
            R::TooLong,
        ),
        (
            Registered {
                aud: "kiln:registry".to_owned(),
                ..base.clone()
            },
            R::Audience,
        ),
        (
            Registered {
                iss: "https://other.test".to_owned(),
                ..base.clone()
            },
            R::Issuer,
        ),
        (
            Registered {
                jti: "No Id".to_owned(),
                ..base.clone()
            },
            R::Malformed,
        ),
    ];
    for (registered, why) in cases {
        assert_eq!(check(registered.clone()), Err(why), "{registered:?}");
    }
    let registry_typ = jwt::sign(ring, door::REGISTRY, base, own).expect("sign");
    assert_eq!(
        access.verify_user(&registry_typ, NOW).map(|_| ()),
        Err(R::Kind)
    );
}

#[tokio::test]
async fn no_token_opens_another_door() {
    use TokenRefused as R;
    let dir = tempfile::tempdir().expect("dir");
    let access = open(&dir);
    let user = access
        .issue_user(&developer(), 900, NOW)
        .expect("made")
        .text;
    let registry = access
        .issue_for_attempt(&lease(), grants(), NOW)
        .expect("made")
        .text;
    let service = secret_token::new_service().text;
    let join = secret_token::new_join(&access.authority().fingerprint()).text;
    let at_user = |token: &str| access.verify_user(token, NOW).map(|_| ());
    assert_eq!(at_user(&registry), Err(R::Kind));
    assert_eq!(at_user(&join), Err(R::Kind));
    assert_eq!(
        at_user(&service),
        Err(R::Kind),
        "a service token is looked up, not verified"
    );
    for token in [&user, &service, &join] {
        let got = access
            .verify_registry(token, NOW, |_| std::future::ready(Ok(())))
            .await;
        assert_eq!(got.map(|_| ()), Err(RegistryRefused::Token(R::Kind)));
    }
    for kind in [
        secret_token::SecretKind::Service,
        secret_token::SecretKind::Join,
    ] {
        for token in [&user, &registry] {
            assert_eq!(secret_token::parse(kind, token), Err(R::Malformed));
        }
    }
    // Even with the type rewritten, the other door's key does not verify.
    let forged = edited(&registry, |header, _| {
        header["typ"] = "kiln-user+jwt".into()
    });
    assert_eq!(at_user(&forged), Err(R::Signature));
    let elsewhere = tempfile::tempdir().expect("dir");
    let foreign = open(&elsewhere)
        .issue_user(&developer(), 900, NOW)
        .expect("made")
        .text;
    assert_eq!(
        at_user(&foreign),
        Err(R::Signature),
        "another installation's"
    );
}

#[tokio::test]
async fn a_registry_token_lives_and_dies_with_its_lease() {
    let dir = tempfile::tempdir().expect("dir");
    let access = open(&dir);
    let made = access
        .issue_for_attempt(&lease(), grants(), NOW)
        .expect("made");
    assert_eq!(made.expires_unix_ms, NOW + 300_000);
    let live = |live: Option<Lease>| {
        move |asked: Lease| std::future::ready(asked.check(live.as_ref(), NOW + 1))
    };
    let verify = |state| access.verify_registry(&made.text, NOW + 1, live(state));
    let grant = verify(Some(lease())).await.expect("live");
    assert!(grant.allows("quarantine/b1/2", RegistryAction::Push));
    assert!(!grant.allows("quarantine/b1/2", RegistryAction::Pull));
    assert!(!grant.allows("quarantine/b1/2/x", RegistryAction::Push));
    assert!(!grant.allows("t/acme/app", RegistryAction::Push));
    let mut claimed_again = lease();
    claimed_again.epoch.count += 1;
    let mut restored = lease();
    restored.epoch.incarnation += 1;
    let mut elsewhere = lease();
    elsewhere.worker = "w2".parse().expect("id");
    let mut over = lease();
    over.deadline_unix_ms = NOW;
    for gone in [
        None,
        Some(claimed_again),
        Some(restored),
        Some(elsewhere),
        Some(over),
    ] {
        assert!(matches!(verify(gone).await, Err(RegistryRefused::Lease(_))));
    }
    let late = access
        .verify_registry(&made.text, NOW + 300_000, live(Some(lease())))
        .await;
    assert_eq!(late, Err(RegistryRefused::Token(TokenRefused::Expired)));
    let many = vec![grants().remove(0); registry_token::REPOSITORIES_MAX + 1];
    assert!(access.issue_for_attempt(&lease(), many, NOW).is_err());
}

#[test]
fn tokens_outlive_a_rotation_and_not_their_overlap() {
    let dir = tempfile::tempdir().expect("dir");
    let access = open(&dir);
    let mut long = developer();
    long.expires_unix_ms = None;
    let made = access.issue_user(&long, 3600, NOW).expect("made").text;
    access.rotate(NOW + 1).expect("rotate");
    assert_eq!(access.jwks()["keys"].as_array().map(Vec::len), Some(2));
    assert!(access.verify_user(&made, NOW + 3_599_000).is_ok());
    access.reload(NOW + 3_700_000).expect("reload");
    assert_eq!(access.jwks()["keys"].as_array().map(Vec::len), Some(1));
    assert!(access.verify_user(&made, NOW).is_err());
}

// ---- OpenID Connect ----

struct Issuer {
    url: String,
    pair: EcdsaKeyPair,
}

/// A real issuer on loopback: discovery document and key set, one connection at a time.
fn issuer() -> Issuer {
    let random = SystemRandom::new();
    let pkcs8 =
        EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("key");
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random);
    let pair = pair.expect("key");
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let url = format!("http://{}", listener.local_addr().expect("address"));
    let point = pair.public_key().as_ref().to_vec();
    let half = |at: std::ops::Range<usize>| URL_SAFE_NO_PAD.encode(&point[at]);
    let discovery = serde_json::json!({"issuer": url, "jwks_uri": format!("{url}/jwks")});
    let keys = serde_json::json!({"keys": [
        {"kty": "OKP", "kid": "other", "crv": "Ed25519", "x": "AA"},
        {"kty": "EC", "crv": "P-256", "kid": "k1", "use": "sig", "x": half(1..33), "y": half(33..65)},
    ]});
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let mut request = [0_u8; 2048];
            let got = stream.read(&mut request).unwrap_or(0);
            let path = String::from_utf8_lossy(&request[..got]).into_owned();
            let body = if path.starts_with("GET /jwks ") {
                &keys
            } else {
                &discovery
            };
            let body = body.to_string();
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
        }
    });
    Issuer { url, pair }
}

impl Issuer {
    fn token(&self, alg: &str, claims: &serde_json::Value) -> String {
        let header = serde_json::json!({"alg": alg, "kid": "k1", "typ": "JWT"}).to_string();
        let text = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header),
            URL_SAFE_NO_PAD.encode(claims.to_string())
        );
        let signature = self
            .pair
            .sign(&SystemRandom::new(), text.as_bytes())
            .expect("sign");
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn claims(&self) -> serde_json::Value {
        let now = NOW / 1000;
        serde_json::json!({
            "iss": self.url, "aud": "kiln", "sub": "repo:acme/app:ref:main",
            "iat": now, "exp": now + 300, "environment": "release",
        })
    }
}

fn trust(issuer: &str) -> TrustedIssuer {
    serde_json::from_value(serde_json::json!({
        "issuer": issuer, "audience": "kiln",
        "rules": [
            {"subject": "repo:acme/*", "claims": {"environment": "release"}, "tenant": "acme",
             "role": "developer", "priority_max": 10, "trust": "trusted"},
            {"subject": "repo:acme/*", "tenant": "acme", "role": "read-only"},
        ],
    }))
    .expect("trust")
}

#[test]
fn an_identity_token_is_exchanged_by_issuer_audience_and_subject() {
    let issuer = issuer();
    let dir = tempfile::tempdir().expect("dir");
    let trusted = vec![trust(&issuer.url)];
    let access = Access::open(&dir.path().join("keys"), "https://kiln.test", trusted, NOW);
    let access = access.expect("access");
    let token = issuer.token("ES256", &issuer.claims());
    let who = access.issuers().exchange(&token, NOW).expect("exchanged");
    assert_eq!(
        (who.role, who.trust),
        (Role::Developer, TrustClass::Trusted)
    );
    assert_eq!((who.tenant.as_str(), who.operator), ("acme", false));
    let ours = access.issue_user(&who, 900, NOW).expect("made");
    assert_eq!(ours.expires_unix_ms, NOW + 300_000);
    assert!(access.verify_user(&ours.text, NOW).is_ok());
    assert!(
        access.verify_user(&token, NOW).is_err(),
        "never accepted at another door"
    );

    let with = |name: &str, value: serde_json::Value| {
        let mut claims = issuer.claims();
        claims[name] = value;
        issuer.token("ES256", &claims)
    };
    let weaker = access
        .issuers()
        .exchange(&with("environment", "dev".into()), NOW);
    assert_eq!(weaker.expect("second rule").role, Role::ReadOnly);
    let refused = |token: &str| {
        access
            .issuers()
            .exchange(token, NOW)
            .map(|_| ())
            .expect_err("refused")
            .to_string()
            + &match access.issuers().exchange(token, NOW) {
                Err(ExchangeRefused::Token(why)) => format!(" {}", why.code()),
                _ => String::new(),
            }
    };
    let now = NOW / 1000;
    for (token, why) in [
        (with("aud", "other".into()), "audience"),
        (
            with("aud", serde_json::json!(["kiln", "other"])),
            "audience",
        ),
        (with("iss", "https://evil.test".into()), "issuer"),
        (with("exp", now.into()), "expired"),
        (with("iat", (now + 100).into()), "future"),
        (with("sub", "repo:acme2/app".into()), "no rule"),
        (issuer.token("HS256", &issuer.claims()), "algorithm"),
        (issuer.token("none", &issuer.claims()), "algorithm"),
        (issuer.token("RS256", &issuer.claims()), "signature"),
        (
            edited(&token, |_, claims| claims["sub"] = "repo:acme/x".into()),
            "signature",
        ),
    ] {
        let got = refused(&token);
        assert!(got.to_lowercase().contains(why), "{got} is not about {why}");
    }
}

// ---- TLS ----

/// One handshake; the certificate that the server verified, or why the handshake failed.
fn handshake(
    server: &Arc<rustls::ServerConfig>,
    authority: &Authority,
    client: Option<(String, &rcgen::KeyPair)>,
) -> Result<Option<PeerCertificate>, rustls::Error> {
    use rustls::pki_types::pem::PemObject;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.der().clone()).expect("root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("versions")
        .with_root_certificates(roots);
    let config = match client {
        None => builder.with_no_client_auth(),
        Some((pem, key)) => {
            let chain = vec![
                rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).expect("pem"),
            ];
            let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der());
            builder
                .with_client_auth_cert(chain, key.into())
                .expect("client")
        }
    };
    let name = "controller.test".try_into().expect("name");
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).expect("client");
    let mut server = rustls::ServerConnection::new(Arc::clone(server)).expect("server");
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).expect("write");
        }
        let mut reader = &wire[..];
        while !reader.is_empty() {
            server.read_tls(&mut reader).expect("read");
            server.process_new_packets()?;
        }
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
    Ok(server
        .peer_certificates()
        .and_then(|chain| PeerCertificate::read(chain.first()?)))
}

#[test]
fn a_worker_is_known_by_its_certificate_and_a_sleeper_may_come_back() {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("clock");
    let now = u64::try_from(now.as_millis()).expect("clock");
    let dir = tempfile::tempdir().expect("dir");
    let day = 86_400_000;
    // An authority that is old enough to have signed what is long over.
    let open = |name: &str| {
        Access::open(&dir.path().join(name), "x", Vec::new(), now - 100 * day).expect("access")
    };
    let (access, foreign) = (open("keys"), open("other"));
    let authority = access.authority();
    let names = vec!["controller.test".to_owned(), "127.0.0.1".to_owned()];
    let shown = Shown::new(authority, names, None, now).expect("identity");
    let config = tls::server_config(Arc::new(shown), authority).expect("config");
    let key = rcgen::KeyPair::generate().expect("key");
    let csr = rcgen::CertificateParams::default()
        .serialize_request(&key)
        .and_then(|csr| csr.pem())
        .expect("csr");
    let worker: WorkerId = "w1".parse().expect("id");
    let made = |by: &Authority, at| {
        by.worker_certificate(&csr, &worker, None, at)
            .expect("made")
    };
    assert_eq!(handshake(&config, authority, None), Ok(None));
    let fresh = made(authority, now);
    let peer = handshake(&config, authority, Some((fresh.pem, &key))).expect("handshake");
    let peer = peer.expect("certificate");
    assert_eq!((&peer.worker, peer.key), (&worker, fresh.key));
    assert!(peer.is_current(now));
    let slept = made(authority, now - 20 * day);
    let peer = handshake(&config, authority, Some((slept.pem, &key))).expect("handshake");
    let peer = peer.expect("certificate");
    assert!(!peer.is_current(now) && peer.may_renew(now));
    for (what, by, at) in [
        ("too old", authority, now - 40 * day),
        ("future", authority, now + day),
        ("foreign", foreign.authority(), now),
    ] {
        let bad = made(by, at);
        assert!(
            handshake(&config, authority, Some((bad.pem, &key))).is_err(),
            "{what}"
        );
    }
    let other = rcgen::KeyPair::generate().expect("key");
    let stolen = made(authority, now);
    let config_of_thief = handshake_with_other_key(&config, authority, &stolen.pem, &other);
    assert!(config_of_thief, "a certificate without its key is nothing");
}

/// Whether showing a certificate with another key fails, at the client's own check or in the handshake.
fn handshake_with_other_key(
    server: &Arc<rustls::ServerConfig>,
    authority: &Authority,
    pem: &str,
    other: &rcgen::KeyPair,
) -> bool {
    let attempt = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        handshake(server, authority, Some((pem.to_owned(), other)))
    }));
    attempt.map_or(true, |result| result.is_err())
}
