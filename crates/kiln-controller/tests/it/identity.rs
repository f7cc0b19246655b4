//! Who may come in by which door, and what they may do there.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::json;

use crate::server::Server;

/// The same with another last character.
fn changed(token: &str) -> String {
    let (rest, last) = token.split_at(token.len() - 1);
    let other = if last == "0" { "1" } else { "0" };
    format!("{rest}{other}")
}

#[test]
fn nobody_comes_in_without_a_good_token() {
    let server = Server::start();
    let good = server.member("acme", "developer");
    assert_eq!(good.get("/v1/whoami").value()["tenant"], "acme");
    let session = good.json("POST", "/v1/token/exchange", &json!({})).value();
    let jwt = session["access_token"].as_str().expect("token").to_owned();
    assert_eq!(server.client(&jwt).get("/v1/whoami").status, 200);
    let join = server
        .owner()
        .json("POST", "/v1/tokens/join", &json!({}))
        .value();
    let join = join["token"].as_str().expect("token").to_owned();
    let none = jwt.rsplit_once('.').expect("dots").0.to_owned() + ".";
    let other = Server::start().member("acme", "developer").token;
    let flipped = changed(&good.token);
    for (what, token) in [
        ("nothing", ""),
        ("nonsense", "x"),
        ("a join token", &join),
        ("a token without its signature", &none),
        ("another installation's", &other),
        ("a changed one", &flipped),
        ("two words", "a b"),
    ] {
        let got = server.client(token).get("/v1/jobs");
        assert_eq!(got.status, 401, "{what}: {}", got.text());
        assert_eq!(got.code(), "unauthenticated", "{what}");
        assert!(
            got.headers["www-authenticate"].starts_with("Bearer"),
            "{what}"
        );
        assert_eq!(
            got.headers["content-type"], "application/problem+json",
            "{what}"
        );
    }
    let basic = [("authorization", "Basic YTpi")];
    assert_eq!(
        server
            .client("")
            .send("GET", "/v1/jobs", &basic, b"")
            .status,
        401
    );
    let twice = [("authorization", "Bearer x")];
    assert_eq!(good.send("GET", "/v1/jobs", &twice, b"").status, 400);
    let named = [
        ("x-forwarded-for", "127.0.0.1"),
        ("x-real-ip", "10.102.0.1"),
        ("kiln-worker", "w1"),
    ];
    assert_eq!(
        server
            .client("")
            .send("GET", "/v1/jobs", &named, b"")
            .status,
        401
    );
    let refused = server.parts.attempts.lock().expect("lock").clone();
    for code in ["none", "kind", "unknown", "malformed"] {
        let seen = refused
            .iter()
            .any(|(what, why)| *what == "authenticate" && *why == Some(code));
        assert!(seen, "no count of {code}");
    }
}

#[test]
fn a_revoked_token_is_dead_at_once_with_all_that_came_of_it() {
    let server = Server::start();
    let service = server.member("acme", "developer");
    let session = service
        .json("POST", "/v1/token/exchange", &json!({"expires_in": 600}))
        .value();
    let session = server.client(session["access_token"].as_str().expect("token"));
    assert_eq!(session.get("/v1/jobs").status, 200);
    let again = session.json("POST", "/v1/token/exchange", &json!({}));
    assert_eq!(again.status, 401, "a session is not renewed by itself");
    let tokens = server.owner().get("/v1/tokens").value();
    let ours = tokens["items"].as_array().expect("items").iter();
    let id = ours
        .filter(|t| t["tenant"] == "acme")
        .find_map(|t| t["id"].as_str())
        .expect("id");
    assert_eq!(
        service.delete(&format!("/v1/tokens/{id}")).status,
        403,
        "not a developer's"
    );
    assert_eq!(
        server.owner().delete(&format!("/v1/tokens/{id}")).status,
        204
    );
    assert_eq!(service.get("/v1/jobs").status, 401);
    assert_eq!(session.get("/v1/jobs").status, 401);
    assert_eq!(server.owner().delete("/v1/tokens/no-such").status, 404);
    let short = server.token(&json!({"tenant": "acme", "role": "developer", "expires_in": 1}));
    let end = std::time::Instant::now() + crate::server::PATIENCE;
    while short.get("/v1/jobs").status == 200 {
        assert!(std::time::Instant::now() < end, "it never expires");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(
        short.json("POST", "/v1/token/exchange", &json!({})).status,
        401
    );
}

#[test]
fn a_token_never_gives_more_than_its_maker_has() {
    let server = Server::start();
    let admin = server.member("acme", "admin");
    let make = |asked: serde_json::Value| admin.json("POST", "/v1/tokens", &asked).status;
    assert_eq!(make(json!({"role": "developer"})), 201);
    assert_eq!(make(json!({"role": "admin", "operator": true})), 403);
    assert_eq!(make(json!({"role": "developer", "priority_max": 1})), 403);
    assert_eq!(make(json!({"role": "developer", "trusted": true})), 403);
    assert_eq!(
        make(json!({"role": "developer", "tenant": "local"})),
        404,
        "another tenant"
    );
    assert_eq!(make(json!({"role": "king"})), 422);
    assert_eq!(make(json!({"role": "developer", "scopes": ["all"]})), 422);
    assert_eq!(make(json!({"role": "developer", "expires_in": 0})), 422);
    let short = server.token(&json!({"tenant": "acme", "role": "admin", "expires_in": 600}));
    let session = short.json("POST", "/v1/token/exchange", &json!({})).value();
    let session = server.client(session["access_token"].as_str().expect("token"));
    for maker in [&short, &session] {
        let child = maker
            .json("POST", "/v1/tokens", &json!({"role": "developer"}))
            .value();
        let tokens = server.owner().get("/v1/tokens").value();
        let ends = |id: &serde_json::Value| {
            let all = tokens["items"].as_array().expect("items").iter();
            let mut all = all.filter(|token| token["id"] == *id);
            all.next()
                .and_then(|token| token["expires_unix_ms"].as_u64())
                .expect("ends")
        };
        let parent = short.token.split('_').nth(1).expect("id").into();
        assert!(
            ends(&child["id"]) <= ends(&parent),
            "a child outlives its maker's token"
        );
    }
    let scoped = server.token(&json!({
        "tenant": "acme", "role": "admin", "scopes": ["token:create", "job:read"]}));
    let make = |asked: serde_json::Value| scoped.json("POST", "/v1/tokens", &asked);
    assert_eq!(
        make(json!({"role": "admin", "scopes": ["job:submit"]})).status,
        403
    );
    let child = make(json!({"role": "admin"}));
    assert_eq!(child.status, 201);
    let child = server.client(child.value()["token"].as_str().expect("token"));
    let scopes = child.get("/v1/whoami").value()["scopes"].clone();
    assert_eq!(
        scopes,
        json!(["job:read", "token:create"]),
        "its maker's scopes"
    );
    assert_eq!(
        child
            .json("POST", "/v1/runs", &json!({"argv": ["x"]}))
            .status,
        403
    );
}

#[test]
fn roles_may_what_the_matrix_says() {
    let server = Server::start();
    let run = json!({"argv": ["true"]});
    let cases = [
        ("developer", 202, 403, 200),
        ("read-only", 403, 403, 200),
        ("security", 403, 403, 200),
        ("admin", 202, 403, 200),
        ("build-engineer", 202, 403, 200),
    ];
    for (role, submit, workers, jobs) in cases {
        let client = server.member("acme", role);
        assert_eq!(
            client.json("POST", "/v1/runs", &run).status,
            submit,
            "{role}"
        );
        assert_eq!(
            client.get("/v1/workers").status,
            workers,
            "{role}: members see no fleet"
        );
        assert_eq!(client.get("/v1/jobs").status, jobs, "{role}");
        let pause = client.json("POST", "/v1/queues/default", &json!({"paused": true}));
        assert_eq!(pause.status, 403, "{role}");
        assert_eq!(
            client
                .json("POST", "/v1/tenants", &json!({"name": "x"}))
                .status,
            403,
            "{role}"
        );
    }
    let engineer = server.token(&json!({
        "tenant": "acme", "role": "build-engineer", "operator": true}));
    assert_eq!(engineer.get("/v1/workers").status, 200);
    assert_eq!(
        engineer
            .json("POST", "/v1/queues/default", &json!({"paused": true}))
            .status,
        200
    );
    assert_eq!(
        engineer
            .json("POST", "/v1/tenants", &json!({"name": "x"}))
            .status,
        403
    );
    assert_eq!(engineer.get("/v1/audit").status, 403);
    let auditor = server.token(&json!({"tenant": "acme", "role": "security", "operator": true}));
    let rows = auditor.get("/v1/audit").value();
    let rows = rows["items"].as_array().expect("rows");
    let seen = |action: &str, allowed: bool| {
        rows.iter()
            .any(|row| row["action"] == action && row["allowed"] == allowed)
    };
    assert!(seen("tenant:control", true) && seen("tenant:control", false));
    assert!(seen("job:submit", true) && seen("job:submit", false));
}

#[test]
fn another_tenants_things_are_not_there() {
    let server = Server::start();
    let (acme, rival) = (
        server.member("acme", "admin"),
        server.member("rival", "admin"),
    );
    let job = acme.run();
    let lease = server.lease(&job);
    server.log(&job, b"secret plans\n");
    let paths = [
        format!("/v1/jobs/{job}"),
        format!("/v1/jobs/{job}/events"),
        format!("/v1/jobs/{job}/logs"),
        format!("/v1/jobs/{job}/artifacts"),
        format!("/v1/jobs/{job}/artifacts/x"),
    ];
    for path in &paths {
        let foreign = rival.get(path);
        let nowhere = rival.get(&path.replace(&job, "b00000000000000000"));
        assert_eq!(foreign.status, 404, "{path}");
        let told = |got: &crate::server::Got, id: &str| got.text().replace(id, "ID");
        let same = told(&foreign, &job) == told(&nowhere, "b00000000000000000");
        assert!(same, "{path}: {} {}", foreign.text(), nowhere.text());
    }
    assert_eq!(rival.delete(&paths[0]).status, 404);
    assert_eq!(
        rival
            .json("POST", &format!("{}/retry", paths[0]), &json!({}))
            .status,
        404
    );
    assert_eq!(rival.get(&format!("/builds/{job}")).status, 404);
    assert_eq!(rival.get("/v1/jobs").value()["items"], json!([]));
    assert_eq!(rival.get("/v1/jobs?tenant=acme").status, 404);
    assert_eq!(rival.get("/v1/tenants/acme/usage").status, 404);
    let names: Vec<_> = rival.get("/v1/tenants").value()["items"]
        .as_array()
        .expect("items")
        .clone();
    assert_eq!(names.len(), 1);
    let queues = rival.get("/v1/queues").value();
    assert_eq!(
        queues["items"][0]["running"], 0,
        "how much others run is theirs"
    );
    let run = json!({"argv": ["true"], "tenant": "acme"});
    assert_eq!(rival.json("POST", "/v1/runs", &run).status, 404);
    // The same key in two tenants is two keys.
    let key = [
        ("content-type", "application/json"),
        ("idempotency-key", "k1"),
    ];
    let body = br#"{"argv": ["true"]}"#;
    let (a, b) = (
        acme.send("POST", "/v1/runs", &key, body),
        rival.send("POST", "/v1/runs", &key, body),
    );
    assert_eq!((a.status, b.status), (202, 202));
    assert_ne!(a.value()["id"], b.value()["id"]);
    // A cursor of one is none of the other's.
    acme.run();
    let next = acme.get("/v1/jobs?limit=1").value()["next"]
        .as_str()
        .expect("next")
        .to_owned();
    assert_eq!(
        acme.get(&format!("/v1/jobs?limit=1&cursor={next}")).status,
        200
    );
    assert_eq!(
        rival.get(&format!("/v1/jobs?limit=1&cursor={next}")).status,
        422
    );
    assert_eq!(
        acme.get(&format!("/v1/jobs?state=queued&cursor={next}"))
            .status,
        422
    );
    server.finish(&lease, Server::passed());
}

#[test]
fn the_private_socket_needs_no_token_and_others_get_nothing_by_it() {
    let server = Server::start();
    let who = server.owner().get("/v1/whoami").value();
    assert_eq!(
        (&who["role"], &who["operator"]),
        (&json!("admin"), &json!(true))
    );
    assert_eq!(who["tenant"], "local");
    let keys = server.client("").get("/.well-known/jwks.json").value();
    assert_eq!(keys["keys"][0]["alg"], "ES256");
    assert!(keys["keys"][0].get("d").is_none(), "no private half");
}

/// An issuer of identity tokens on loopback.
struct Issuer {
    url: String,
    pair: EcdsaKeyPair,
}

impl Issuer {
    fn start() -> Self {
        let random = SystemRandom::new();
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &random).expect("key");
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref(), &random).expect("key");
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let url = format!("http://{}", listener.local_addr().expect("address"));
        let point = pair.public_key().as_ref().to_vec();
        let key = json!({"kty": "EC", "crv": "P-256", "kid": "k1",
            "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..])});
        let discovery = json!({"issuer": url, "jwks_uri": format!("{url}/keys")}).to_string();
        let keys = json!({"keys": [key]}).to_string();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut request = [0; 2048];
                let got = stream.read(&mut request).unwrap_or(0);
                let wants_keys = request[..got].starts_with(b"GET /keys ");
                let body = if wants_keys { &keys } else { &discovery };
                let length = body.len();
                let _gone = write!(
                    stream,
                    "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
                );
            }
        });
        Self { url, pair }
    }

    fn token(&self, subject: &str, audience: &str) -> String {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("clock");
        let now = since.as_secs();
        let header = json!({"alg": "ES256", "kid": "k1"}).to_string();
        let claims = json!({"iss": self.url, "aud": audience, "sub": subject,
            "iat": now, "exp": now + 300})
        .to_string();
        let text = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header),
            URL_SAFE_NO_PAD.encode(claims)
        );
        let signed = self.pair.sign(&SystemRandom::new(), text.as_bytes());
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signed.expect("signs")))
    }
}

/// Many jobs of a CI system begin at once, when the issuer's keys are not known yet or have grown old.
#[test]
fn tokens_that_come_while_keys_are_fetched_wait_for_them() {
    let issuer = Issuer::start();
    let trusted = json!([{"issuer": issuer.url, "audience": "kiln",
        "rules": [{"subject": "repo:acme/*", "tenant": "acme", "role": "developer"}]}]);
    let server = Server::trusting(serde_json::from_value(trusted).expect("trust"));
    server.member("acme", "developer");
    let asked = json!({"subject_token": issuer.token("repo:acme/app", "kiln")});
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let one = || {
            let nobody = server.client("");
            nobody.json("POST", "/v1/token/exchange", &asked).status
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|status| status.expect("asked")).collect()
    });
    assert_eq!(statuses, [200; 8]);
}

#[test]
fn a_ci_systems_token_is_exchanged_and_opens_nothing_itself() {
    let issuer = Issuer::start();
    let trusted = json!([{"issuer": issuer.url, "audience": "kiln",
        "rules": [{"subject": "repo:acme/*", "tenant": "acme", "role": "developer"}]}]);
    let server = Server::trusting(serde_json::from_value(trusted).expect("trust"));
    server.member("acme", "developer");
    let nobody = server.client("");
    let exchange = |token: &str| {
        nobody.json(
            "POST",
            "/v1/token/exchange",
            &json!({"subject_token": token}),
        )
    };
    let good = issuer.token("repo:acme/app", "kiln");
    let got = exchange(&good);
    assert_eq!(got.status, 200, "{}", got.text());
    let session = server.client(got.value()["access_token"].as_str().expect("token"));
    let who = session.get("/v1/whoami").value();
    assert_eq!(
        (&who["tenant"], &who["role"]),
        (&json!("acme"), &json!("developer"))
    );
    session.run();
    assert_eq!(
        server.client(&good).get("/v1/jobs").status,
        401,
        "only exchanged"
    );
    for (subject, audience) in [("repo:rival/app", "kiln"), ("repo:acme/app", "other")] {
        assert_eq!(
            exchange(&issuer.token(subject, audience)).status,
            401,
            "{subject} {audience}"
        );
    }
    assert_eq!(
        exchange(&Issuer::start().token("repo:acme/app", "kiln")).status,
        401
    );
    let id = got.value()["id"].as_str().expect("id").to_owned();
    let admin = server.token(&json!({"tenant": "acme", "role": "admin"}));
    let path = format!("/v1/tokens/{id}");
    assert_eq!(
        admin.delete(&path).status,
        404,
        "whose it is, only operators need not know"
    );
    assert_eq!(server.owner().delete(&path).status, 204);
    assert_eq!(session.get("/v1/jobs").status, 401);
    let other = exchange(&issuer.token("repo:acme/lib", "kiln")).value();
    let path = format!("/v1/tokens/{}", other["id"].as_str().expect("id"));
    let other = server.client(other["access_token"].as_str().expect("token"));
    assert_eq!(
        other.delete(&path).status,
        204,
        "everybody may end their own session"
    );
    assert_eq!(other.get("/v1/jobs").status, 401);
}
