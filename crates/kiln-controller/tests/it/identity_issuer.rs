//! An issuer of identity tokens as companies have them: over TLS by an authority of their own, with keys that change, sometimes away.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use kiln_controller::access::TrustedIssuer;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer as Signer, KeyPair as TlsKey};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};

use crate::schema::tools;
use crate::server::Server;

/// Longest wait for a new key to be taken.
const PATIENCE: Duration = Duration::from_secs(60);

fn signing_key() -> EcdsaKeyPair {
    let random = SystemRandom::new();
    let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &random).expect("key");
    EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref(), &random).expect("key")
}

/// What it shows at each path; nothing: it is away.
type Pages = Arc<Mutex<BTreeMap<&'static str, String>>>;

struct Issuer {
    url: String,
    dir: tempfile::TempDir,
    pages: Pages,
}

impl Issuer {
    /// Over TLS, by an authority that nobody trusts but who has its file.
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = TlsKey::generate().expect("key");
        let authority = params.self_signed(&key).expect("authority");
        std::fs::write(dir.path().join("ca.pem"), authority.pem()).expect("write");
        let signer = Signer::new(params, key);
        let key = TlsKey::generate().expect("key");
        let names = vec!["localhost".to_owned()];
        let leaf = CertificateParams::new(names).expect("names");
        let leaf = leaf.signed_by(&key, &signer).expect("signed");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = config.with_single_cert(vec![leaf.der().clone()], key);
        let config = Arc::new(config.expect("config"));
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let port = listener.local_addr().expect("address").port();
        let pages = Pages::default();
        let shown = Arc::clone(&pages);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = rustls::ServerConnection::new(Arc::clone(&config)).expect("server");
                let mut stream = rustls::StreamOwned::new(server, stream);
                let mut request = [0; 2048];
                let Ok(got) = stream.read(&mut request) else {
                    continue;
                };
                let request = String::from_utf8_lossy(&request[..got]).into_owned();
                let path = request.split(' ').nth(1).unwrap_or_default();
                let page = shown.lock().expect("pages").get(path).cloned();
                let status = if page.is_some() { "200 OK" } else { "503 Away" };
                let body = page.unwrap_or_default();
                let length = body.len();
                let _gone = write!(
                    stream,
                    "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
                );
                stream.conn.send_close_notify();
                let _gone = stream.flush();
            }
        });
        let url = format!("https://localhost:{port}/");
        Self { url, dir, pages }
    }

    fn shows(&self, kid: &str, key: &EcdsaKeyPair) {
        let point = key.public_key().as_ref().to_vec();
        let half = |at: std::ops::Range<usize>| URL_SAFE_NO_PAD.encode(&point[at]);
        let discovery = json!({"issuer": self.url, "jwks_uri": format!("{}keys", self.url)});
        let keys = json!({"keys": [
            {"kty": "EC", "crv": "P-256", "kid": kid, "x": half(1..33), "y": half(33..65)}]});
        let mut pages = self.pages.lock().expect("pages");
        pages.insert("/.well-known/openid-configuration", discovery.to_string());
        pages.insert("/keys", keys.to_string());
    }

    fn is_away(&self) {
        self.pages.lock().expect("pages").clear();
    }

    fn token(&self, kid: &str, key: &EcdsaKeyPair, audience: &str) -> Value {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("clock");
        let now = since.as_secs();
        let header = json!({"alg": "ES256", "kid": kid}).to_string();
        let claims = json!({"iss": self.url, "aud": [audience], "sub": "job-1", "iat": now, "exp": now + 300});
        let text = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header),
            URL_SAFE_NO_PAD.encode(claims.to_string())
        );
        let signed = key.sign(&SystemRandom::new(), text.as_bytes());
        json!({"subject_token": format!("{text}.{}", URL_SAFE_NO_PAD.encode(signed.expect("signs")))})
    }

    /// Trusted with two audiences, by the authority's file or without.
    fn trusted(&self, ca: bool) -> Vec<TrustedIssuer> {
        let ca = ca.then(|| self.dir.path().join("ca.pem"));
        let one = |audience: &str, role: &str| {
            json!({"issuer": self.url, "audience": audience, "ca": ca,
                "rules": [{"subject": "job-*", "tenant": "acme", "role": role}]})
        };
        let all = json!([one("kiln", "developer"), one("watch", "read-only")]);
        serde_json::from_value(all).expect("trust")
    }
}

#[test]
fn an_issuer_of_a_private_authority_is_asked_and_its_keys_may_change() {
    let issuer = Issuer::start();
    let (old, new) = (signing_key(), signing_key());
    issuer.shows("old", &old);
    let server = Server::trusting(issuer.trusted(true));
    server.member("acme", "developer");
    let nobody = server.client("");
    let exchange = |token: &Value| nobody.json("POST", "/v1/token/exchange", token);
    for (audience, role) in [("kiln", "developer"), ("watch", "read-only")] {
        let got = exchange(&issuer.token("old", &old, audience));
        assert_eq!(got.status, 200, "{}", got.text());
        let session = got.value()["access_token"]
            .as_str()
            .expect("token")
            .to_owned();
        assert_eq!(
            server.client(&session).get("/v1/whoami").value()["role"],
            role
        );
    }
    assert_eq!(exchange(&issuer.token("old", &old, "other")).status, 401);
    // A key of the right name that is not the issuer's.
    assert_eq!(exchange(&issuer.token("old", &new, "kiln")).status, 401);

    issuer.shows("new", &new);
    let token = issuer.token("new", &new, "kiln");
    let end = Instant::now() + PATIENCE;
    loop {
        // Keys are not asked for more often than every few seconds.
        match exchange(&token).status {
            200 => break,
            401 => assert!(Instant::now() < end, "the new key is not taken"),
            other => panic!("{other}"),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(
        exchange(&issuer.token("old", &old, "kiln")).status,
        401,
        "a key that was taken back"
    );
    // With known keys it may be away.
    issuer.is_away();
    assert_eq!(exchange(&token).status, 200);
}

#[test]
fn an_issuer_that_is_away_or_unproven_is_said_to_be_and_no_token_is_blamed() {
    let issuer = Issuer::start();
    let key = signing_key();
    let token = issuer.token("k", &key, "kiln");
    let nobody_trusts = Server::trusting(issuer.trusted(false));
    let away = Server::trusting(issuer.trusted(true));
    for server in [&away, &nobody_trusts] {
        // The second time nobody is asked again, and the answer is the same.
        for _ in 0..2 {
            let got = server.client("").json("POST", "/v1/token/exchange", &token);
            assert_eq!(
                (got.status, got.value()["code"].as_str()),
                (502, Some("issuer_unavailable"))
            );
        }
        issuer.shows("k", &key);
    }
}

#[test]
fn an_issuer_that_cannot_be_trusted_is_refused_at_the_start() {
    let issuer = Issuer::start();
    let mut one = issuer.trusted(true).remove(0);
    one.check().expect("good");
    let no_certificate = issuer.dir.path().join("empty");
    std::fs::write(&no_certificate, "").expect("write");
    for (ca, why) in [("nowhere", "No such file"), ("empty", "no certificate")] {
        one.ca = Some(issuer.dir.path().join(ca));
        let said = one.check().expect_err(ca).to_string();
        assert!(said.contains(why) && said.contains(ca), "{said}");
    }
    one.issuer = "http://ci.example.org".to_owned();
    assert!(
        one.check()
            .expect_err("plain")
            .to_string()
            .contains("https")
    );
}

/// A provider of somebody else's making (Authlib's), as a process: RS256, and no key id in its tokens.
struct Provider {
    child: Child,
    url: String,
}

impl Provider {
    fn start(life_s: u32) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").expect("binds");
        let port = free.local_addr().expect("address").port().to_string();
        drop(free);
        let child = Command::new(tools().join("oidc-provider-mock"))
            .args(["--port", &port, "--user", "job-1"])
            .args(["--token-max-age", &life_s.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        let provider = Self {
            child,
            url: format!("http://127.0.0.1:{port}"),
        };
        let end = Instant::now() + PATIENCE;
        while TcpStream::connect(format!("127.0.0.1:{port}")).is_err() {
            assert!(Instant::now() < end, "the provider does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        provider
    }

    /// An identity token by the authorization code flow (OpenID Connect Core §3.1) of a client of this name.
    fn token(&self, client: &str) -> Value {
        const BACK: &str = "redirect_uri=http%3A%2F%2F127.0.0.1%3A1%2Fback";
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .max_redirects(0)
            .build()
            .into();
        let form = "application/x-www-form-urlencoded";
        let asked = format!("client_id={client}&{BACK}&response_type=code&scope=openid");
        let login = agent
            .post(format!("{}/oauth2/authorize?{asked}", self.url))
            .content_type(form)
            .send("sub=job-1")
            .expect("logs in");
        let to = login.headers()["location"].to_str().expect("text");
        let (_, code) = to.split_once("code=").expect("a code");
        let basic = STANDARD.encode(format!("{client}:secret"));
        let mut got = agent
            .post(format!("{}/oauth2/token", self.url))
            .header("authorization", format!("Basic {basic}"))
            .content_type(form)
            .send(format!("grant_type=authorization_code&{BACK}&code={code}"))
            .expect("a token");
        let got: Value = got.body_mut().read_json().expect("JSON");
        json!({"subject_token": got["id_token"].as_str().expect("text")})
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _ended = self.child.wait();
    }
}

#[test]
fn tokens_of_a_real_provider_are_exchanged_until_they_are_over() {
    let (provider, hasty) = (Provider::start(600), Provider::start(1));
    let trusted = [&provider, &hasty].map(|provider| {
        json!({"issuer": provider.url, "audience": "kiln",
            "rules": [{"subject": "job-*", "tenant": "acme", "role": "developer"}]})
    });
    let trusted = serde_json::from_value(json!(trusted)).expect("trust");
    let server = Server::trusting(trusted);
    server.member("acme", "developer");
    let nobody = server.client("");
    let exchange = |token: &Value| nobody.json("POST", "/v1/token/exchange", token);
    let token = provider.token("kiln");
    let got = exchange(&token);
    assert_eq!(got.status, 200, "{}", got.text());
    let session = got.value()["access_token"]
        .as_str()
        .expect("token")
        .to_owned();
    server.client(&session).run();
    let other = exchange(&provider.token("another"));
    assert_eq!(other.status, 401, "another client's");
    assert!(other.text().contains("audience"), "{}", other.text());
    let text = token["subject_token"].as_str().expect("text");
    let end = text.rfind('.').expect("a signature");
    let unsigned = json!({"subject_token": &text[..=end]});
    assert_eq!(exchange(&unsigned).status, 401);
    let token = hasty.token("kiln");
    let over = Instant::now() + PATIENCE;
    loop {
        let got = exchange(&token);
        if got.status == 401 {
            assert!(got.text().contains("expired"), "{}", got.text());
            break;
        }
        assert!(Instant::now() < over, "it never ends");
        std::thread::sleep(Duration::from_millis(200));
    }
}
