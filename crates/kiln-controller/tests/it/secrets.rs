//! `/v1/secrets` over HTTP: what goes in never comes out, and only those who may change it do.

use serde_json::json;

use crate::policies::Granting;
use crate::server::{Client, Server, archive};

const VALUE: &str = "hunter2-hunter2";

fn set(client: &Client, name: &str) -> u16 {
    let path = format!("/v1/secrets/{name}");
    client.json("PUT", &path, &json!({ "value": VALUE })).status
}

#[test]
fn a_value_goes_in_and_never_comes_out() {
    let server = Server::start();
    let acme = server.member("acme", "build-engineer");
    assert_eq!(set(&acme, "TOKEN"), 201);
    assert_eq!(set(&acme, "TOKEN"), 200);
    let base64 = json!({ "value_base64": "aHVudGVyMi1odW50ZXIy", "scope": { "uses": ["run"] } });
    let rotated = acme.json("POST", "/v1/secrets/TOKEN/rotate", &base64);
    assert_eq!(rotated.status, 200, "{}", rotated.text());
    assert_eq!(rotated.value()["version"], 3);
    let scope = json!({ "repositories": ["https://Git.example/team/*"], "uses": ["build"] });
    let scoped = acme.json("POST", "/v1/secrets/TOKEN/scope", &scope);
    assert_eq!(
        scoped.value()["scope"],
        json!({ "repositories": ["git.example/team/*"], "uses": ["build"] })
    );
    let admin = server.member("acme", "admin");
    for path in [
        "/v1/secrets",
        "/v1/secrets/TOKEN",
        "/v1/secrets/TOKEN/accesses",
        "/v1/audit",
    ] {
        let got = admin.get(path);
        assert_eq!(got.status, 200, "{path}: {}", got.text());
        assert!(!got.text().contains("hunter2"), "{path}: {}", got.text());
        assert!(got.text().contains("TOKEN"), "{path}: {}", got.text());
    }
    let log = admin.get("/v1/secrets/TOKEN/accesses").value();
    let actions: Vec<_> = log["items"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| row["action"].clone())
        .collect();
    assert_eq!(
        actions.iter().filter(|one| *one == "secret:write").count(),
        4
    );
    assert_eq!(acme.delete("/v1/secrets/TOKEN").status, 204);
    assert_eq!(acme.delete("/v1/secrets/TOKEN").status, 404);
    assert_eq!(acme.get("/v1/secrets/TOKEN").status, 404);
    let rotated = acme.json("POST", "/v1/secrets/TOKEN/rotate", &base64);
    assert_eq!(rotated.status, 404, "only what is there is rotated");
}

#[test]
fn what_is_wrong_is_refused_without_its_value() {
    let server = Server::start();
    let acme = server.member("acme", "admin");
    let long = "x".repeat(kiln_core::secret::SECRET_VALUE_MAX + 1);
    for (path, body) in [
        ("/v1/secrets/A", json!({})),
        ("/v1/secrets/A", json!({ "value": "" })),
        ("/v1/secrets/A", json!({ "value": long })),
        (
            "/v1/secrets/A",
            json!({ "value": VALUE, "value_base64": "aGk" }),
        ),
        ("/v1/secrets/A", json!({ "value_base64": VALUE })),
        ("/v1/secrets/A", json!({ "value": [VALUE] })),
        ("/v1/secrets/A", json!({ "value": { "x": VALUE } })),
        (
            "/v1/secrets/A",
            json!({ "value": VALUE, "scope": { "uses": ["deploy"] } }),
        ),
        (
            "/v1/secrets/A",
            json!({ "value": VALUE, "scope": { "repositories": ["*"] } }),
        ),
        ("/v1/secrets/.A", json!({ "value": VALUE })),
        ("/v1/secrets/a%2Fb", json!({ "value": VALUE })),
        ("/v1/secrets/A", json!({ "value": VALUE, "nosuch": 1 })),
    ] {
        let got = acme.json("PUT", path, &body);
        assert_eq!(got.status, 422, "{path}: {}", got.text());
        assert!(!got.text().contains("hunter2"), "{}", got.text());
    }
    assert_eq!(acme.get("/v1/secrets").value()["items"], json!([]));
}

#[test]
fn roles_and_tenants_decide() {
    let server = Server::start();
    let rival = server.member("rival", "admin");
    assert_eq!(set(&rival, "TOKEN"), 201);
    let matrix = [
        // Role, then: see, set, remove, who had it.
        ("admin", [200, 201, 204, 200]),
        ("build-engineer", [200, 201, 204, 403]),
        ("security", [200, 403, 404, 200]),
        ("developer", [200, 403, 403, 403]),
        ("read-only", [403, 403, 403, 403]),
    ];
    for (role, want) in matrix {
        let one = server.member("acme", role);
        let got = [
            one.get("/v1/secrets").status,
            set(&one, "OWN"),
            one.delete("/v1/secrets/OWN").status,
            one.get("/v1/secrets/OWN/accesses").status,
        ];
        assert_eq!(got, want, "{role}");
        for (method, path) in [
            ("GET", "/v1/secrets?tenant=rival"),
            ("PUT", "/v1/secrets/TOKEN?tenant=rival"),
            ("DELETE", "/v1/secrets/TOKEN?tenant=rival"),
            ("GET", "/v1/secrets/TOKEN/accesses?tenant=rival"),
        ] {
            let got = one.json(method, path, &json!({ "value": "x" })).status;
            assert!(matches!(got, 403 | 404), "{role} {method} {path}: {got}");
        }
    }
    let owner = server.owner();
    assert_eq!(owner.get("/v1/secrets/TOKEN?tenant=rival").status, 200);
    assert_eq!(
        rival.get("/v1/secrets").value()["items"][0]["name"],
        "TOKEN"
    );
}

#[test]
fn a_job_that_cannot_have_its_secrets_is_not_queued() {
    let here = Granting::start();
    here.grant("[tenant.acme]\ntrusted_uploads = true\ntrusted_refs = ['git.example/team/app@HEAD', 'git.example/other/app@HEAD']\n");
    let server = &here.server;
    let admin = server.member("acme", "admin");
    let asked = json!({ "tenant": "acme", "role": "developer", "trusted": true });
    let (untrusted, trusted) = (server.member("acme", "developer"), server.token(&asked));
    let run = |client: &Client, word: &str| {
        let ask = json!({ "argv": ["true"], "secrets": [word] });
        let got = client.json("POST", "/v1/runs", &ask);
        (got.status, got.code())
    };
    assert_eq!(run(&trusted, "TOKEN"), (422, "invalid".to_owned()));
    assert_eq!(set(&admin, "TOKEN"), 201);
    assert_eq!(run(&untrusted, "TOKEN"), (403, "secret_refused".to_owned()));
    assert_eq!(run(&trusted, "TOKEN=NPM_TOKEN").0, 202);
    assert_eq!(run(&trusted, "TOKEN:file").0, 202);
    assert_eq!(run(&trusted, "TOKEN=1X").0, 422);
    let twice = json!({ "argv": ["true"], "secrets": ["TOKEN=A"], "env": { "A": "b" } });
    assert_eq!(trusted.json("POST", "/v1/runs", &twice).status, 422);
    let git = |url: &str| {
        let ask = json!({ "git_url": url, "secrets": ["TOKEN"] });
        trusted.json("POST", "/v1/builds", &ask).status
    };
    let scope = json!({ "repositories": ["git.example/team/**"] });
    let scoped = admin.json("POST", "/v1/secrets/TOKEN/scope", &scope);
    assert_eq!(scoped.status, 200);
    assert_eq!(git("https://git.example/team/app.git"), 202);
    assert_eq!(git("https://git.example/other/app.git"), 403);
    assert_eq!(
        git("http://git.example/team/app.git"),
        403,
        "http proves no host"
    );
    assert_eq!(run(&trusted, "TOKEN").0, 403, "a run proves no repository");
    let ask = json!({ "secrets": ["TOKEN"] }).to_string();
    let upload = |parts: &[(&str, &[u8])]| {
        let mut all: Vec<(&str, &[u8])> = vec![("request", ask.as_bytes())];
        all.extend(parts);
        trusted.form("/v1/builds", &all).status
    };
    let source = archive();
    assert_eq!(upload(&[("source", &source)]), 403);
    let own: [(&str, &[u8]); 2] = [("source", &source), ("secret.TOKEN", b"mine")];
    assert_eq!(upload(&own), 202, "its own value is its own to give");
    let log = admin.get("/v1/secrets/TOKEN/accesses").value();
    let refused: Vec<_> = log["items"]
        .as_array()
        .expect("rows")
        .iter()
        .filter(|row| row["action"] == "secret.read")
        .map(|row| row["reason"].clone())
        .collect();
    let want = [
        "missing",
        "untrusted",
        "repository",
        "untrusted",
        "no_repository",
        "no_repository",
    ];
    assert_eq!(refused, want);
}
