//! The name inside the connection must be the name that was admitted.

use std::sync::{Arc, Mutex};

use kiln_core::network::{AllowRule, EgressVerdict, NameFault, Protocol};
use kiln_network::gateway::{RelayEnd, RelayReport};
use kiln_network::{EgressLog, summary};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::world::{Guest, PUBLIC, World, config, verdicts};

const HOST: &str = "a.example.org";

/// What the server got, what the guest got back, how it ended.
struct Seen {
    server: Vec<u8>,
    guest: Vec<u8>,
    report: RelayReport,
    log: Arc<EgressLog>,
}

/// Sends `parts` to `HOST:port`, whose rule says this protocol or none, half-closes, and returns what happened.
async fn send(place: impl std::fmt::Display, parts: &[&[u8]]) -> Seen {
    let rule = format!("{HOST}:{place}");
    let port = rule.parse::<AllowRule>().expect("rule").ports()[0];
    let world = World::default();
    world.name(HOST, &[&[PUBLIC]]);
    let got = Arc::new(Mutex::new(Vec::new()));
    let store = Arc::clone(&got);
    let _server = world
        .server(&format!("{PUBLIC}:{port}"), move |mut stream| {
            let store = Arc::clone(&store);
            async move {
                let mut part = [0; 4096];
                while let Ok(len @ 1..) = stream.read(&mut part).await {
                    store
                        .lock()
                        .expect("no panic")
                        .extend_from_slice(&part[..len]);
                }
                let _ = stream.write_all(b"bye").await;
            }
        })
        .await;
    let (config, log) = config(&[&rule]);
    let gateway = world.gateway(config);
    let mut guest = Guest::start(gateway.connect(HOST, port).await.expect("admitted"));
    for part in parts {
        // A refused guest's stream may be closed already.
        let _ = guest.stream.write_all(part).await;
        tokio::task::yield_now().await;
    }
    let _ = guest.stream.shutdown().await;
    let answer = guest.read_all().await;
    let report = guest.report().await;
    let server = got.lock().expect("no panic").clone();
    Seen {
        server,
        guest: answer,
        report,
        log,
    }
}

pub(crate) fn hello(name: Option<&str>) -> Vec<u8> {
    let mut config = rustls::ClientConfig::builder_with_provider(
        rustls::crypto::ring::default_provider().into(),
    )
    .with_safe_default_protocol_versions()
    .expect("versions")
    .with_root_certificates(rustls::RootCertStore::empty())
    .with_no_client_auth();
    config.enable_sni = name.is_some();
    let name = name.unwrap_or(HOST).to_owned().try_into().expect("name");
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).expect("client");
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).expect("hello");
    bytes
}

/// The same hello with one more extension.
fn extended(mut hello: Vec<u8>, kind: u16, data: &[u8]) -> Vec<u8> {
    let more = [&kind.to_be_bytes()[..], &len16(data.len()), data].concat();
    let u16_at =
        |hello: &[u8], at: usize| usize::from(u16::from_be_bytes([hello[at], hello[at + 1]]));
    // Record and message headers, version, random; session id, cipher suites, compression methods.
    let mut at = 5 + 4 + 2 + 32;
    at += 1 + usize::from(hello[at]);
    at += 2 + u16_at(&hello, at);
    at += 1 + usize::from(hello[at]);
    for (at, len) in [
        (3, hello.len() - 5),
        (7, hello.len() - 9),
        (at, u16_at(&hello, at)),
    ] {
        hello[at..at + 2].copy_from_slice(&len16(len + more.len()));
    }
    [hello, more].concat()
}

fn len16(len: usize) -> [u8; 2] {
    u16::try_from(len).expect("short").to_be_bytes()
}

fn assert_refused(seen: &Seen, said: Option<&str>) {
    assert_fault(seen, said, NameFault::Mismatch);
}

fn assert_fault(seen: &Seen, said: Option<&str>, fault: NameFault) {
    assert!(
        seen.server.is_empty(),
        "nothing may reach the server: {:?}",
        seen.server
    );
    assert!(
        matches!(&seen.report.end, RelayEnd::NameRefused { said: s, .. } if s.as_deref() == said),
        "{:?}",
        seen.report
    );
    assert_eq!(
        verdicts(&seen.log),
        [EgressVerdict::NameMismatch {
            said: said.map(str::to_owned),
            fault,
        }]
    );
    assert_eq!(seen.report.bytes_out, 0);
}

#[tokio::test]
async fn tls_with_the_right_name_passes_on_any_port_and_in_any_pieces() {
    let hello = hello(Some(HOST));
    for place in ["443", "80/tls", "8443/tls"] {
        let parts: Vec<&[u8]> = hello.chunks(60).collect();
        let seen = send(place, &parts).await;
        assert_eq!(seen.server, hello, "{place}");
        assert_eq!(seen.guest, b"bye");
        assert_eq!(verdicts(&seen.log), [EgressVerdict::Allowed]);
    }
}

#[tokio::test]
async fn tls_with_another_name_or_none_is_refused_with_an_alert() {
    let alert = [0x15, 3, 3, 0, 2, 2, 112];
    for place in ["443", "8443/tls"] {
        let seen = send(place, &[&hello(Some("b.example.org"))]).await;
        assert_refused(&seen, Some("b.example.org"));
        assert_eq!(seen.guest, alert);
        let seen = send(place, &[&hello(None)]).await;
        assert_refused(&seen, None);
        assert_eq!(seen.guest, alert);
    }
}

#[tokio::test]
async fn a_hello_that_is_too_long_cut_off_or_no_hello_is_refused() {
    let mut long = vec![0x16, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc];
    long.resize(20_000, 0);
    assert_refused(&send(443, &[&long]).await, None);
    assert_refused(&send(443, &[&hello(Some(HOST))[..80]]).await, None);
    assert_refused(
        &send(443, &[b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00"]).await,
        None,
    );
    assert_refused(&send(443, &[b"\x80\x2e\x01\x03\x01"]).await, None);
    assert_refused(&send(443, &[b"SSH-2.0-x\r\n"]).await, None);
    assert_refused(&send(80, &[b"\x00\x01"]).await, None);
}

#[tokio::test]
async fn http_with_the_right_host_passes() {
    let request = b"GET / HTTP/1.1\r\nHost: a.example.org\r\n\r\n";
    let seen = send(80, &[request, request]).await;
    assert_eq!(seen.server, [&request[..], request].concat());
    assert_eq!(seen.guest, b"bye");
}

#[tokio::test]
async fn http_to_other_hosts_is_refused_before_a_byte_leaves() {
    for place in ["80", "443/http", "8080/http"] {
        let seen = send(
            place,
            &[b"GET / HTTP/1.1\r\nHo", b"st: b.example.org\r\n\r\n"],
        )
        .await;
        assert_refused(&seen, Some("b.example.org"));
        let text = String::from_utf8_lossy(&seen.guest).into_owned();
        assert!(text.starts_with("HTTP/1.1 403 "), "{text}");
        assert!(text.contains("b.example.org"), "{text}");
    }
    assert_refused(&send(80, &[b"GET / HTTP/1.0\r\n\r\n"]).await, None);
    assert_refused(
        &send(
            80,
            &[b"CONNECT b.example.org:443 HTTP/1.1\r\nHost: a.example.org\r\n\r\n"],
        )
        .await,
        Some("b.example.org:443"),
    );
    assert_refused(
        &send(
            80,
            &[b"GET http://b.example.org/ HTTP/1.1\r\nHost: a.example.org\r\n\r\n"],
        )
        .await,
        Some("http://b.example.org/"),
    );
    assert_refused(
        &send(
            "8080/http",
            &[b"\r\n\r\nGET / HTTP/1.1\r\nHost: b.example.org\r\n\r\n"],
        )
        .await,
        Some("b.example.org"),
    );
    let long = [b"GET / HTTP/1.1\r\nX: ", &vec![b'y'; 20_000][..]].concat();
    assert_refused(&send(80, &[&long]).await, None);
}

#[tokio::test]
async fn an_encrypted_client_hello_is_refused_with_its_own_reason() {
    let outer = b"\0\0\x01\0\x01\x07\0\x02kk\0\x03ppp";
    let plain = extended(hello(Some(HOST)), 0xfafa, outer);
    assert_eq!(send(443, &[&plain]).await.server, plain);
    for kind in [0xfe0d, 0xffce] {
        let seen = send(443, &[&extended(hello(Some(HOST)), kind, outer)]).await;
        assert_fault(&seen, None, NameFault::Encrypted);
        assert_eq!(seen.guest, [0x15, 3, 3, 0, 2, 2, 112], "an alert");
        let refused = summary(&seen.log.snapshot().events).refused;
        assert_eq!(refused[0].code, "name_encrypted");
        assert!(
            refused[0].reason.contains("a.example.org:443/raw"),
            "{refused:?}"
        );
    }
}

#[tokio::test]
async fn a_request_for_another_protocol_is_refused_with_its_own_reason() {
    for asks in [
        "GET / HTTP/1.1\r\nHost: a.example.org\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.example.org\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let seen = send(80, &[asks.as_bytes()]).await;
        assert_fault(&seen, None, NameFault::Upgrade);
        let answer = String::from_utf8_lossy(&seen.guest).into_owned();
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
        assert!(answer.contains("only a rule with /raw"), "{answer}");
        let refused = summary(&seen.log.snapshot().events).refused;
        assert_eq!(refused[0].code, "upgrade_refused");
        assert!(
            refused[0].reason.contains("a.example.org:80/raw"),
            "{refused:?}"
        );
    }
}

#[tokio::test]
async fn a_later_request_for_another_host_never_leaves() {
    let first = b"POST / HTTP/1.1\r\nHost: a.example.org\r\nContent-Length: 4\r\n\r\nabcd";
    let second = b"GET / HTTP/1.1\r\nHost: b.example.org\r\n\r\n";
    for parts in [
        vec![[&first[..], second].concat()],
        vec![first.to_vec(), second.to_vec()],
    ] {
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let seen = send(80, &parts).await;
        assert!(
            matches!(seen.report.end, RelayEnd::NameRefused { .. }),
            "{:?}",
            seen.report
        );
        let server = String::from_utf8_lossy(&seen.server).into_owned();
        assert!(!server.contains("b.example.org"), "{server}");
    }
}

/// Nothing is told by the first bytes: 443 is TLS and 80 HTTP unless the rule says more, whatever comes.
#[tokio::test]
async fn a_port_speaks_what_its_rule_or_its_default_says() {
    let tls = hello(Some(HOST));
    let http = b"GET / HTTP/1.1\r\nHost: a.example.org\r\n\r\n";
    let refused = async |place: &str, bytes: &[u8]| {
        let seen = send(place, &[bytes]).await;
        assert_refused(&seen, None);
    };
    refused("443", http).await;
    refused("80", &tls).await;
    for place in ["443", "80", "8443/tls", "8080/http"] {
        refused(place, b"SSH-2.0-x\r\n").await;
    }
    let event = |seen: &Seen| seen.log.snapshot().events.remove(0).protocol;
    for (place, bytes, speaks) in [
        ("22", &b"SSH-2.0-x\r\nmore"[..], Protocol::Raw),
        ("9000", b"no line end", Protocol::Raw),
        ("8443", &hello(Some("b.example.org")), Protocol::Raw),
        ("443", &tls, Protocol::Tls),
        ("80", http, Protocol::Http),
    ] {
        let seen = send(place, &[bytes]).await;
        assert_eq!(seen.server, bytes, "{place}");
        assert_eq!(event(&seen), Some(speaks), "{place}");
    }
}

#[tokio::test]
async fn a_server_may_speak_first_on_any_other_port() {
    let world = World::default();
    world.name(HOST, &[&[PUBLIC]]);
    let _server = world
        .server(&format!("{PUBLIC}:25"), |mut stream| async move {
            let _ = stream.write_all(b"220 ready\r\n").await;
            crate::world::echo(stream).await;
        })
        .await;
    let (config, _log) = config(&[&format!("{HOST}:25")]);
    let admitted = world.gateway(config).connect(HOST, 25).await;
    let mut guest = Guest::start(admitted.expect("admitted"));
    assert_eq!(guest.read_some(11).await, b"220 ready\r\n");
    guest.send(b"EHLO x\r\n").await;
    assert_eq!(guest.read_some(8).await, b"EHLO x\r\n");
}

#[tokio::test(start_paused = true)]
async fn a_name_that_never_comes_is_not_waited_for_forever() {
    let world = World::default();
    world.name(HOST, &[&[PUBLIC]]);
    let _server = world
        .server(&format!("{PUBLIC}:443"), crate::world::echo)
        .await;
    let (config, _log) = config(&[HOST]);
    let hold = config.limits.hold;
    let gateway = world.gateway(config);
    let admitted = gateway.connect(HOST, 443).await.expect("admitted");
    let (mut guest, host) = tokio::io::duplex(1024);
    guest
        .write_all(&hello(Some(HOST))[..20])
        .await
        .expect("write");
    let start = tokio::time::Instant::now();
    let report = admitted.relay(Box::new(host)).await;
    assert!(
        matches!(report.end, RelayEnd::NameRefused { .. }),
        "{report:?}"
    );
    assert!(start.elapsed() >= hold && start.elapsed() < hold * 2);
}
