//! Secrets of other makers' stores: a Vault that is a fake written to the published API, and AWS Secrets Manager as `moto`, an emulator.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_controller::secret_stores::{
    AwsConfig, FetchError, SecretStores, StoreConfig, VaultAuth, VaultConfig,
};
use serde_json::{Value, json};

/// A fake of HashiCorp Vault: KV version 2 below `kv`, AppRole, JWT, renewal, revocation.
#[derive(Default, Debug)]
struct Vault {
    logins: u32,
    renewals: u32,
    /// Tokens that are good now, and how often each was used.
    tokens: BTreeMap<String, u32>,
    life_s: u64,
    seen: Vec<String>,
}

fn vault() -> (String, Arc<Mutex<Vault>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let state = Arc::new(Mutex::new(Vault {
        life_s: 3600,
        ..Vault::default()
    }));
    let shared = Arc::clone(&state);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || while answer(&stream, &shared).is_some() {});
        }
    });
    (url, state)
}

fn answer(mut stream: &TcpStream, state: &Mutex<Vault>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader
        .read_line(&mut line)
        .ok()
        .filter(|count| *count > 0)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let length = headers
        .get("content-length")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let token = headers.get("x-vault-token").cloned().unwrap_or_default();
    let (status, reply) = state
        .lock()
        .expect("lock")
        .decide(&method, &path, &token, &body);
    let text = reply.to_string();
    write!(
        stream,
        "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{text}",
        text.len()
    )
    .ok()
}

impl Vault {
    fn issue(&mut self) -> Value {
        self.logins += 1;
        let token = format!("hvs.{}", self.logins);
        self.tokens.insert(token.clone(), 0);
        json!({ "auth": { "client_token": token, "lease_duration": self.life_s, "renewable": true } })
    }

    fn decide(&mut self, method: &str, path: &str, token: &str, body: &Value) -> (u16, Value) {
        self.seen.push(format!("{method} {path}"));
        let denied = (403, json!({ "errors": ["permission denied"] }));
        match (method, path) {
            ("POST", "/v1/auth/approle/login")
                if body["role_id"] == "kiln" && body["secret_id"] == "sid" =>
            {
                (200, self.issue())
            }
            ("POST", "/v1/auth/ci/login") if body["role"] == "kiln" && body["jwt"] == "a.b.c" => {
                (200, self.issue())
            }
            ("POST", "/v1/auth/approle/login" | "/v1/auth/ci/login") => {
                (400, json!({ "errors": ["invalid"] }))
            }
            _ if token != "root" && !self.tokens.contains_key(token) => denied,
            ("POST", "/v1/auth/token/renew-self") => {
                self.renewals += 1;
                (
                    200,
                    json!({ "auth": { "client_token": token, "lease_duration": self.life_s, "renewable": true } }),
                )
            }
            ("GET", "/v1/kv/data/ci/acme/npm") => (
                200,
                json!({ "data": { "data": { "token": "hunter2-vault", "port": 5432 }, "metadata": { "version": 3 } } }),
            ),
            ("GET", "/v1/kv/data/ci/acme/gone") => (
                404,
                json!({ "data": { "data": null, "metadata": { "destroyed": true } } }),
            ),
            ("GET", "/v1/kv/data/ci/acme/sealed") => {
                (503, json!({ "errors": ["Vault is sealed"] }))
            }
            ("GET", "/v1/kv/data/ci/acme/moved") => (307, json!({})),
            _ => (404, json!({ "errors": [] })),
        }
    }
}

fn file(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).expect("write");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("mode");
    path
}

fn store(name: &str) -> StoreConfig {
    StoreConfig {
        name: name.to_owned(),
        grants: BTreeMap::from([(
            "acme".parse().expect("a tenant"),
            vec!["ci/acme/*".to_owned()],
        )]),
        env: false,
        vault: None,
        aws: None,
    }
}

fn of_vault(url: &str, auth: VaultAuth) -> SecretStores {
    let vault = VaultConfig {
        url: url.to_owned(),
        ca: None,
        mount: "kv".to_owned(),
        namespace: None,
        auth,
    };
    SecretStores::new(&[StoreConfig {
        vault: Some(vault),
        ..store("corp")
    }])
    .expect("stores")
}

fn fetch(stores: &SecretStores, text: &str) -> Result<String, FetchError> {
    let tenant = "acme".parse().expect("a tenant");
    let value = stores.fetch(&tenant, &text.parse().expect("a source"))?;
    Ok(String::from_utf8(value).expect("text"))
}

/// Longest wait for a token to be renewed.
const RENEWED_MAX: Duration = Duration::from_secs(60);

#[test]
fn a_vault_is_asked_with_each_kind_of_login_and_its_token_is_kept_alive() {
    let dir = tempfile::tempdir().expect("folder");
    let (url, state) = vault();
    let token = file(dir.path(), "token", "root\n");
    let by_token = of_vault(
        &url,
        VaultAuth::Token {
            file: token.clone(),
        },
    );
    assert_eq!(
        fetch(&by_token, "corp:ci/acme/npm#token"),
        Ok("hunter2-vault".to_owned())
    );
    assert_eq!(
        fetch(&by_token, "corp:ci/acme/npm#port"),
        Ok("5432".to_owned())
    );
    for (text, code) in [
        ("corp:ci/acme/npm", "source_missing"),
        ("corp:ci/acme/npm#none", "source_missing"),
        ("corp:ci/acme/gone#token", "source_missing"),
        ("corp:ci/acme/never#token", "source_missing"),
        ("corp:ci/acme/sealed#token", "source_unavailable"),
        ("corp:ci/acme/moved#token", "source_unavailable"),
        ("corp:ci/other/npm#token", "source_not_granted"),
        ("elsewhere:ci/acme/npm#token", "source_not_granted"),
    ] {
        let error = fetch(&by_token, text).expect_err(text);
        assert_eq!(error.code(), code, "{text}: {error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
    // A file that others may read is no login.
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o640)).expect("mode");
    assert_eq!(
        fetch(&by_token, "corp:ci/acme/npm#token")
            .expect_err("open")
            .code(),
        "source_unavailable"
    );

    let secret_id = file(dir.path(), "secret-id", "sid");
    let by_role = of_vault(
        &url,
        VaultAuth::AppRole {
            role_id: "kiln".to_owned(),
            secret_id_file: secret_id.clone(),
            mount: "approle".to_owned(),
        },
    );
    for _ in 0..3 {
        assert_eq!(
            fetch(&by_role, "corp:ci/acme/npm#token"),
            Ok("hunter2-vault".to_owned())
        );
    }
    assert_eq!(
        state.lock().expect("lock").logins,
        1,
        "one login for many reads"
    );
    // Revoked before its time: a new login, once.
    state.lock().expect("lock").tokens.clear();
    assert_eq!(
        fetch(&by_role, "corp:ci/acme/npm#token"),
        Ok("hunter2-vault".to_owned())
    );
    assert_eq!(state.lock().expect("lock").logins, 2);
    // A wrong login is told without the login.
    file(dir.path(), "secret-id", "wrong-sid");
    state.lock().expect("lock").tokens.clear();
    let error = fetch(&by_role, "corp:ci/acme/npm#token").expect_err("wrong");
    assert!(
        error.to_string().contains("login answered 400") && !error.to_string().contains("sid"),
        "{error}"
    );

    let jwt = file(dir.path(), "jwt", "a.b.c\n");
    let by_jwt = of_vault(
        &url,
        VaultAuth::Jwt {
            role: "kiln".to_owned(),
            file: jwt,
            mount: "ci".to_owned(),
        },
    );
    state.lock().expect("lock").life_s = 1;
    assert_eq!(
        fetch(&by_jwt, "corp:ci/acme/npm#token"),
        Ok("hunter2-vault".to_owned())
    );
    // Past half of a life of one second it is renewed; on a host so slow that all of it has gone by, the next one may be.
    let before = state.lock().expect("lock").renewals;
    let end = Instant::now() + RENEWED_MAX;
    while state.lock().expect("lock").renewals == before {
        assert!(Instant::now() < end, "it always logs in anew");
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(
            fetch(&by_jwt, "corp:ci/acme/npm#token"),
            Ok("hunter2-vault".to_owned())
        );
    }
    // A renewed one is used on, for as long as it lives now.
    state.lock().expect("lock").life_s = 3600;
    let again = || fetch(&by_jwt, "corp:ci/acme/npm#token");
    let counted = || {
        let state = state.lock().expect("lock");
        state.renewals + state.logins
    };
    let _renewed_or_made_anew = again();
    let before = counted();
    assert_eq!(again(), Ok("hunter2-vault".to_owned()));
    assert!(counted() <= before + 1);
    let after = state.lock().expect("lock");
    assert!(
        !after.seen.iter().any(|line| line.contains("other")),
        "{after:?}"
    );
}

/// `moto`'s server, as the test command names it.
struct Moto {
    child: Child,
    url: String,
}

impl Moto {
    #[expect(
        clippy::disallowed_methods,
        clippy::print_stderr,
        reason = "the test command talks to tests this way"
    )]
    fn start() -> Option<Self> {
        let Some(program) = std::env::var_os("KILN_TEST_MOTO") else {
            assert!(
                std::env::var_os("KILN_TEST_REQUIRE_TOOLS").is_none(),
                "KILN_TEST_MOTO is not set"
            );
            eprintln!("skipped: KILN_TEST_MOTO names no moto_server (use make test)");
            return None;
        };
        let port = TcpListener::bind("127.0.0.1:0")
            .expect("a port")
            .local_addr()
            .expect("an address")
            .port();
        let child = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        let moto = Self {
            child,
            url: format!("http://127.0.0.1:{port}"),
        };
        let end = Instant::now() + Duration::from_secs(120);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < end, "moto does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(moto)
    }

    /// Makes a secret; the emulator takes any signature.
    fn keep(&self, body: &Value) {
        let answer = ureq::post(format!("{}/", self.url))
            .header("content-type", "application/x-amz-json-1.1")
            .header("x-amz-target", "secretsmanager.CreateSecret")
            .header("authorization", "AWS4-HMAC-SHA256 Credential=AKID/20260101/eu-central-1/secretsmanager/aws4_request, SignedHeaders=host, Signature=0")
            .send(body.to_string().as_bytes());
        assert_eq!(answer.expect("answers").status(), 200);
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[test]
fn aws_is_asked_for_texts_bytes_and_fields() {
    let Some(moto) = Moto::start() else { return };
    let dir = tempfile::tempdir().expect("folder");
    let credentials = "[default]\naws_access_key_id = AKID\naws_secret_access_key = SECRET\n";
    let aws = AwsConfig {
        region: "eu-central-1".to_owned(),
        endpoint: Some(moto.url.clone()),
        ca: None,
        credentials: file(dir.path(), "credentials", credentials),
        profile: "default".to_owned(),
    };
    let stores = SecretStores::new(&[StoreConfig {
        aws: Some(aws),
        ..store("aws")
    }])
    .expect("stores");
    moto.keep(&json!({ "Name": "ci/acme/plain", "SecretString": "hunter2-aws" }));
    moto.keep(&json!({ "Name": "ci/acme/db", "SecretString": r#"{"user": "ada", "password": "hunter2-db"}"# }));
    moto.keep(&json!({ "Name": "ci/acme/key", "SecretBinary": "aHVudGVyMi1rZXk=" }));
    assert_eq!(
        fetch(&stores, "aws:ci/acme/plain"),
        Ok("hunter2-aws".to_owned())
    );
    assert_eq!(
        fetch(&stores, "aws:ci/acme/db#password"),
        Ok("hunter2-db".to_owned())
    );
    assert_eq!(
        fetch(&stores, "aws:ci/acme/key"),
        Ok("hunter2-key".to_owned())
    );
    for text in ["aws:ci/acme/none", "aws:ci/acme/db#none"] {
        assert_eq!(
            fetch(&stores, text).expect_err(text).code(),
            "source_missing",
            "{text}"
        );
    }
    drop(moto);
    let gone = fetch(&stores, "aws:ci/acme/plain").expect_err("gone");
    assert_eq!(gone.code(), "source_unavailable", "{gone}");
}
