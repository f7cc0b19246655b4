//! Webhooks as their users see them: made with a secret that is shown once, told, given up, sent again, removed; and invisible to others.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_controller::server::start_with;
use kiln_controller::webhooks::{ReceiverPolicy, Secret, sign_with};
use kiln_core::network::RangeException;
use kiln_db::OpenOptions;
use serde_json::{Value, json};

use crate::fleet_server::{Fleet, PATIENCE, config};
use crate::fleet_worker::send;
use crate::server::{Got, Server};

const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

/// Head, in lower case, and body of a message.
type Letter = (Vec<String>, String);

/// A receiver of this test: keeps what it is sent, and says 410 until it is told to take it.
struct Receiver {
    port: u16,
    takes: Arc<AtomicBool>,
    got: Arc<Mutex<Vec<Letter>>>,
}

impl Receiver {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let port = listener.local_addr().expect("address").port();
        let (takes, got) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (open, kept) = (Arc::clone(&takes), Arc::clone(&got));
        std::thread::spawn(move || {
            for line in listener.incoming().flatten() {
                answer(line, open.load(Ordering::SeqCst), &kept);
            }
        });
        Self { port, takes, got }
    }
}

fn answer(mut line: TcpStream, takes: bool, got: &Mutex<Vec<Letter>>) {
    let mut reader = BufReader::new(line.try_clone().expect("clones"));
    let mut head = Vec::new();
    loop {
        let mut text = String::new();
        if reader.read_line(&mut text).unwrap_or(0) == 0 {
            return;
        }
        let text = text.trim_end().to_ascii_lowercase();
        if text.is_empty() {
            break;
        }
        head.push(text);
    }
    let length = value(&head, "content-length").parse().expect("a length");
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("the body");
    let body = String::from_utf8(body).expect("text");
    got.lock().expect("lock").push((head, body));
    let status = if takes { "204 No Content" } else { "410 Gone" };
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    let _gone = line.write_all(answer.as_bytes());
}

fn value(head: &[String], name: &str) -> String {
    let found = head
        .iter()
        .find_map(|line| line.strip_prefix(&format!("{name}: ")));
    found
        .unwrap_or_else(|| panic!("no {name} in {head:?}"))
        .to_owned()
}

async fn ask(fleet: &Fleet, method: &str, path: &str, body: &Value) -> Got {
    let body = body.to_string();
    let got = send(&fleet.socket, method, path, &JSON, body.as_bytes()).await;
    got.expect("answers")
}

async fn dead(fleet: &Fleet) -> Vec<Value> {
    let got = ask(fleet, "GET", "/v1/deliveries?state=dead", &json!({})).await;
    got.value()["items"].as_array().expect("items").clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_was_given_up_is_sent_again_and_proves_itself() {
    let folder = tempfile::tempdir().expect("folder");
    let mut config = config(folder.path()).await;
    config.receivers = ReceiverPolicy {
        exceptions: vec![RangeException {
            host: "127.0.0.1".to_owned(),
            range: "127.0.0.0/8".parse().expect("range"),
        }],
        allow_http: true,
    };
    let fleet = Fleet::of(
        start_with(config, OpenOptions::default())
            .await
            .expect("starts"),
    );
    let receiver = Receiver::start();
    let url = format!("http://127.0.0.1:{}/hook", receiver.port);
    let made = ask(
        &fleet,
        "POST",
        "/v1/webhooks",
        &json!({"url": url, "kinds": ["queued"]}),
    )
    .await;
    assert_eq!(made.status, 201, "{}", made.text());
    let made = made.value();
    let id = made["webhook"]["id"].as_str().expect("id").to_owned();
    let first = Secret::from_text(made["secret"].as_str().expect("secret")).expect("a secret");
    let job = fleet.submit("j1", 1, 1).await;
    let given_up = async {
        while dead(&fleet).await.is_empty() {
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        dead(&fleet).await.remove(0)
    };
    let letter = tokio::time::timeout(PATIENCE, given_up)
        .await
        .expect("given up");
    assert_eq!(letter["job"], job.as_str());
    assert_eq!(
        (&letter["kind"], &letter["tries"]),
        (&json!("queued"), &json!(1))
    );
    // Another secret beside it from now on; the message keeps its name and its body.
    let rotated = ask(
        &fleet,
        "POST",
        &format!("/v1/webhooks/{id}/rotate"),
        &json!({}),
    )
    .await;
    let second = rotated.value()["secret"]
        .as_str()
        .expect("secret")
        .to_owned();
    assert_ne!(second, first.reveal());
    let second = Secret::from_text(&second).expect("a secret");
    receiver.takes.store(true, Ordering::SeqCst);
    let name = letter["id"].as_str().expect("id");
    let replay = format!("/v1/deliveries/{name}/replay");
    assert_eq!(ask(&fleet, "POST", &replay, &json!({})).await.status, 204);
    let delivered = async {
        loop {
            let all = ask(&fleet, "GET", "/v1/deliveries", &json!({}))
                .await
                .value();
            if all["items"].as_array().expect("items").is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    };
    tokio::time::timeout(PATIENCE, delivered)
        .await
        .expect("delivered");
    assert_eq!(
        ask(&fleet, "POST", &replay, &json!({})).await.status,
        404,
        "once"
    );
    let got = receiver.got.lock().expect("lock").clone();
    assert_eq!(got.len(), 2);
    // While receivers change over, each finds a signature of the secret it has.
    for ((head, body), secrets) in got.iter().zip([vec![first.clone()], vec![second, first]]) {
        assert_eq!(value(head, "webhook-id"), name.to_ascii_lowercase());
        let timestamp: u64 = value(head, "webhook-timestamp").parse().expect("a time");
        let signature = sign_with(&secrets, name, timestamp, body.as_bytes());
        assert_eq!(
            value(head, "webhook-signature"),
            signature.to_ascii_lowercase()
        );
    }
    assert_eq!(got[0].1, got[1].1);
    rotations_are_bounded_and_listed(&fleet, &id).await;
    fleet.stop().await;
}

/// One overlap at a time, shown, and ended early by who says so alone.
async fn rotations_are_bounded_and_listed(fleet: &Fleet, id: &str) {
    let rotate = format!("/v1/webhooks/{id}/rotate");
    let listed = async || {
        let all = ask(fleet, "GET", "/v1/webhooks", &json!({})).await.value();
        all["items"][0]["overlap_until_unix_ms"].clone()
    };
    assert!(listed().await.is_u64(), "the first overlap runs");
    let refused = ask(fleet, "POST", &rotate, &json!({})).await;
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (409, "overlap_runs"),
        "{}",
        refused.text()
    );
    let long = json!({"overlap_s": 700_000, "end_overlap": true});
    let long = ask(fleet, "POST", &rotate, &long).await;
    assert_eq!(long.status, 422, "{}", long.text());
    let ended = json!({"overlap_s": 0, "end_overlap": true});
    let ended = ask(fleet, "POST", &rotate, &ended).await;
    assert_eq!(ended.status, 200, "{}", ended.text());
    assert!(listed().await.is_null());
}

#[test]
fn webhooks_are_their_tenants_and_their_secrets_are_shown_once() {
    let server = Server::start();
    let admin = server.member("acme", "admin");
    let developer = server.member("acme", "developer");
    let engineer = server.member("acme", "build-engineer");
    let rival = server.member("rival", "admin");
    let new = json!({"url": "https://hooks.example.org/x", "kinds": ["finished"]});
    assert_eq!(developer.json("POST", "/v1/webhooks", &new).status, 403);
    let made = engineer.json("POST", "/v1/webhooks", &new);
    assert_eq!(made.status, 201, "{}", made.text());
    let made = made.value();
    let (id, secret) = (
        made["webhook"]["id"].as_str().expect("id"),
        made["secret"].as_str().expect("secret"),
    );
    assert!(secret.starts_with("whsec_"));
    let all = json!({"url": "https://hooks.example.org/y", "all_tenants": true});
    assert_eq!(
        admin.json("POST", "/v1/webhooks", &all).status,
        403,
        "for operators"
    );
    let whole = server.owner().json("POST", "/v1/webhooks", &all);
    let whole = whole.value()["webhook"]["id"]
        .as_str()
        .expect("id")
        .to_owned();
    for (client, sees) in [
        (&admin, 1),
        (&developer, 1),
        (&rival, 0),
        (&server.owner(), 2),
    ] {
        let list = client.get("/v1/webhooks");
        assert_eq!(list.value()["items"].as_array().expect("items").len(), sees);
        assert!(!list.text().contains("whsec_"), "{}", list.text());
    }
    let shown = developer.get(&format!("/v1/webhooks/{id}"));
    assert_eq!(
        (shown.status, &shown.value()["kinds"]),
        (200, &json!(["finished"]))
    );
    assert!(!shown.text().contains("secret"));
    let nowhere = rival.get("/v1/webhooks/kwh-0000000000000000").text();
    for path in [
        format!("/v1/webhooks/{id}"),
        format!("/v1/webhooks/{whole}"),
    ] {
        for (method, path) in [
            ("GET", path.clone()),
            ("POST", path.clone()),
            ("DELETE", path.clone()),
            ("POST", format!("{path}/rotate")),
        ] {
            let got = rival.json(method, &path, &json!({}));
            assert_eq!(got.status, 404, "{method} {path}");
            let word = path.split('/').nth(3).expect("id");
            assert_eq!(got.text().replace(word, "kwh-0000000000000000"), nowhere);
        }
    }
    assert_eq!(
        developer
            .json(
                "POST",
                &format!("/v1/webhooks/{id}"),
                &json!({"enabled": false})
            )
            .status,
        403
    );
    let changed = admin.json(
        "POST",
        &format!("/v1/webhooks/{id}"),
        &json!({"enabled": false, "kinds": []}),
    );
    assert_eq!(
        (changed.status, &changed.value()["enabled"]),
        (200, &json!(false))
    );
    for (field, value) in [
        ("url", json!("http://hooks.example.org/")),
        ("url", json!("file:///etc/passwd")),
        ("url", json!("https://a:b@hooks.example.org/")),
        ("kinds", json!(["finished'; drop table webhooks; --"])),
        ("tenant", json!("no such")),
        ("tenant", json!("nobody")),
        ("secret", json!("mine")),
    ] {
        let mut asked = json!({"url": "https://hooks.example.org/"});
        asked[field] = value.clone();
        let got = server.owner().json("POST", "/v1/webhooks", &asked);
        assert_eq!(got.status, 422, "{field} {value}: {}", got.text());
    }
    let own = |client: &crate::server::Client| client.get("/v1/notify-secret");
    assert_eq!(own(&developer).status, 403);
    assert_ne!(own(&admin).value()["secret"], own(&rival).value()["secret"]);
    assert_eq!(
        rival.get(&format!("/v1/deliveries?webhook={id}")).status,
        404
    );
    assert_eq!(rival.get("/v1/deliveries?state=lost").status, 422);
    assert_eq!(
        rival
            .json("POST", "/v1/deliveries/a.1.b/replay", &json!({}))
            .status,
        404
    );
    assert_eq!(admin.delete(&format!("/v1/webhooks/{id}")).status, 204);
    assert_eq!(admin.delete(&format!("/v1/webhooks/{id}")).status, 404);
    for _ in 0..kiln_db::WEBHOOKS_MAX {
        assert_eq!(rival.json("POST", "/v1/webhooks", &new).status, 201);
    }
    let many = rival.json("POST", "/v1/webhooks", &new);
    assert_eq!((many.status, many.code().as_str()), (409, "too_many"));
}
