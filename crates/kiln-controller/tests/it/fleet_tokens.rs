//! Every kind of proof at every door of a whole controller: each opens its own and no other, and each refusal is told and kept.

use std::net::SocketAddr;

use kiln_controller::access::{RegistryAction, RepositoryGrant};
use kiln_core::Lease;
use kiln_db::OpenOptions;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fleet_server::Fleet;
use crate::fleet_worker::{Line, facts, send};
use crate::server::{Got, parse};

async fn ask(to: SocketAddr, method: &str, path: &str, token: &str, body: &str) -> Got {
    let mut line = TcpStream::connect(to).await.expect("connects");
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nkiln-generation: 2\r\nkiln-worker: w1\r\n\
         authorization: Bearer {token}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    line.write_all(request.as_bytes()).await.expect("writes");
    let mut answer = Vec::new();
    line.read_to_end(&mut answer).await.expect("reads");
    parse(&answer)
}

async fn made(fleet: &Fleet, path: &str, body: &str) -> String {
    let headers = [("content-type", "application/json")];
    let got = send(&fleet.socket, "POST", path, &headers, body.as_bytes()).await;
    let got = got.expect("answers");
    assert!(got.status < 300, "{path}: {}", got.text());
    got.value()["token"].as_str().expect("a token").to_owned()
}

/// A token for the quarantine of the attempt that a lease is for.
fn for_registry(fleet: &Fleet, lease: &Lease) -> String {
    let attempt = &lease.attempt;
    let grant = RepositoryGrant {
        name: format!("quarantine/{}/{}", attempt.job, attempt.number),
        actions: vec![RegistryAction::Pull, RegistryAction::Push],
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = u64::try_from(now.expect("a clock").as_millis()).expect("a clock");
    let access = &fleet.running.controller.access;
    let issued = access.issue_for_attempt(lease, vec![grant], now);
    issued.expect("a token").text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_token_opens_its_own_door_and_no_other() {
    let folder = tempfile::tempdir().expect("folder");
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let to = fleet.running.addresses[0];
    let line = Line::new(&fleet.socket, "w1");
    line.join(1).await.expect("joins");
    fleet.submit("j1", 1, 1).await;
    let lease = line
        .poll(Vec::new())
        .await
        .expect("answers")
        .remove(0)
        .lease;

    let service = made(
        &fleet,
        "/v1/tokens",
        r#"{"role": "admin", "operator": true}"#,
    )
    .await;
    let exchanged = ask(to, "POST", "/v1/token/exchange", &service, "{}").await;
    assert_eq!(exchanged.status, 200, "{}", exchanged.text());
    let user = exchanged.value()["access_token"]
        .as_str()
        .map(str::to_owned);
    let user = user.expect("a token");
    let join = made(&fleet, "/v1/tokens/join", "{}").await;
    let registry = for_registry(&fleet, &lease);
    let tokens = [
        ("service", service),
        ("user", user),
        ("join", join),
        ("registry", registry),
        ("nobody's", "e30.e30.e30".to_owned()),
    ];
    let mine = format!("/v2/quarantine/j1/{}/tags/list", lease.attempt.number);
    let heartbeat = serde_json::json!({ "facts": facts(1), "held": [] }).to_string();
    let (mut opened, mut refused) = (0, 0);
    for (kind, token) in &tokens {
        for (method, path, body, opens) in [
            ("GET", "/v1/jobs", "", &["service", "user"][..]),
            ("POST", "/v1/token/exchange", "{}", &["service"]),
            ("GET", mine.as_str(), "", &["registry"]),
            ("POST", "/v2/t/local/app/blobs/uploads/", "", &[]),
            ("POST", "/worker/v1/heartbeat", heartbeat.as_str(), &[]),
            ("POST", "/worker/v1/release", "{}", &[]),
            ("POST", "/worker/v1/renew", r#"{"csr": ""}"#, &[]),
            ("GET", "/private/backup", "", &[]),
        ] {
            let got = ask(to, method, path, token, body).await;
            let expected = opens.contains(kind);
            // An attempt that has pushed nothing has no repository yet: that is an answer.
            let open = got.status < 300 || (path == mine && got.status == 404);
            assert_eq!(
                open,
                expected,
                "{kind} at {path}: {} {}",
                got.status,
                got.text()
            );
            assert!(got.status < 500, "{kind} at {path}: {}", got.text());
            opened += usize::from(open);
            refused += usize::from(!open);
        }
        if *kind != "join" {
            let asked = serde_json::json!({ "worker": "w9", "token": token, "facts": facts(1) });
            let got = ask(to, "POST", "/worker/v1/join", token, &asked.to_string()).await;
            assert_eq!(got.status, 403, "{kind} joined: {}", got.text());
            refused += 1;
        }
    }
    // What the tenant has beside the attempt's quarantine is not the attempt's to read.
    let (_, registry) = &tokens[3];
    for other in ["t/local/app", "shared/node", "quarantine/j2/1"] {
        let got = ask(to, "GET", &format!("/v2/{other}/tags/list"), registry, "").await;
        assert_eq!(got.status, 403, "{other}: {}", got.text());
    }
    // A worker's own door over TCP is its certificate: the name in a header is nothing, also with a lease.
    let fleets = fleet.db().workers(None).await.expect("lists");
    assert_eq!(fleets.len(), 1, "somebody joined");
    println!(
        "{} kinds of tokens: {opened} doors opened, {refused} refused",
        tokens.len()
    );
    fleet.stop().await;
}
