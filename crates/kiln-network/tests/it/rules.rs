//! Wildcards, protocols, and an open policy on real connections.

use kiln_core::network::{EgressVerdict, NetworkPolicy};
use kiln_network::Refusal;
use kiln_network::gateway::RelayEnd;
use tokio::io::AsyncWriteExt as _;

use crate::world::{Guest, PUBLIC, World, config, echo, policy, verdicts};

/// A world where a few names lead to one address that echoes on these ports.
async fn world(ports: &[u16]) -> World {
    let world = World::default();
    for name in [
        "example.org",
        "a.example.org",
        "a.b.example.org",
        "aexample.org",
    ] {
        world.name(name, &[&[PUBLIC]]);
    }
    for port in ports {
        world.server(&format!("{PUBLIC}:{port}"), echo).await;
    }
    world
}

#[tokio::test]
async fn a_wildcard_admits_names_below_and_never_the_apex() {
    let world = world(&[9000]).await;
    let (config, _log) = config(&["*.example.org:9000/raw"]);
    let gateway = world.gateway(config);
    for (host, want) in [
        ("a.example.org", true),
        ("A.B.example.org.", true),
        ("example.org", false),
        ("aexample.org", false),
        ("*.example.org", false),
    ] {
        assert_eq!(gateway.knows(host), want, "{host}");
        assert_eq!(gateway.connect(host, 9000).await.is_ok(), want, "{host}");
    }
    let refusal = gateway
        .connect("a.example.org", 443)
        .await
        .expect_err("another port");
    assert!(matches!(refusal, Refusal::Port { .. }));
}

#[tokio::test]
async fn a_rule_that_says_raw_looks_at_nothing() {
    let world = world(&[443]).await;
    let (config, log) = config(&["a.example.org:443/raw"]);
    let admitted = world.gateway(config).connect("a.example.org", 443).await;
    let mut guest = Guest::start(admitted.expect("admitted"));
    // An HTTP request for another name, and bytes that are no first line: nobody looks.
    let bytes = b"GET / HTTP/1.1\r\nHost: other.example.org\r\n\r\n\x00\x01";
    guest.send(bytes).await;
    assert_eq!(guest.read_some(bytes.len()).await, bytes);
    guest.report().await;
    assert_eq!(verdicts(&log), [EgressVerdict::Allowed]);
}

#[tokio::test]
async fn a_rule_that_names_a_protocol_admits_nothing_else() {
    let http: &[u8] = b"GET / HTTP/1.1\r\nHost: a.example.org:9000\r\n\r\n";
    let ssh: &[u8] = b"SSH-2.0-x\r\n";
    let tls: &[u8] = b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00";
    for (rule, bytes, passes) in [
        ("a.example.org:9000/http", http, true),
        ("a.example.org:9000/http", ssh, false),
        ("a.example.org:9000/http", tls, false),
        ("a.example.org:9000/tls", http, false),
        ("a.example.org:9000/tls", ssh, false),
        ("a.example.org:9000/tls", tls, false),
        ("a.example.org:9000", ssh, true),
        ("a.example.org:9000/raw", tls, true),
    ] {
        let world = world(&[9000]).await;
        let (config, log) = config(&[rule]);
        let admitted = world.gateway(config).connect("a.example.org", 9000).await;
        let mut guest = Guest::start(admitted.expect("admitted"));
        guest.send(bytes).await;
        // A refusal ends the guest's stream; what passes comes back.
        if passes {
            assert_eq!(guest.read_some(bytes.len()).await, bytes, "{rule}");
        } else {
            let _ = guest.stream.shutdown().await;
            guest.read_all().await;
        }
        let report = guest.report().await;
        assert_eq!(report.bytes_out > 0, passes, "{rule}: {report:?}");
        let refused = matches!(verdicts(&log)[0], EgressVerdict::NameMismatch { .. });
        assert_eq!(refused, !passes, "{rule}: {:?}", verdicts(&log));
    }
}

#[tokio::test]
async fn an_open_policy_admits_names_above_the_floor() {
    let world = world(&[9000]).await;
    world.name("metadata.example.org", &[&["169.254.169.254"]]);
    let (mut config, log) = config(&[]);
    config.policy = NetworkPolicy::Open;
    let gateway = world.gateway(config);
    assert!(gateway.knows("aexample.org") && !gateway.knows("x.kiln.internal"));
    let admitted = gateway
        .connect("aexample.org", 9000)
        .await
        .expect("admitted");
    let mut guest = Guest::start(admitted);
    guest.send(b"any\x00thing").await;
    assert_eq!(guest.read_some(9).await, b"any\x00thing");
    for host in ["169.254.169.254", "8.8.4.4", "x.kiln.internal"] {
        let refusal = gateway.connect(host, 9000).await.expect_err(host);
        assert!(
            matches!(refusal, Refusal::Host { .. }),
            "{host}: {refusal:?}"
        );
    }
    let refusal = gateway
        .connect("metadata.example.org", 9000)
        .await
        .expect_err("floor");
    assert!(matches!(refusal, Refusal::Address { .. }), "{refusal:?}");
    // From open to a list: the flow that the list does not name ends at once.
    gateway.narrow(&policy(&["a.example.org:9000/raw"]));
    assert_eq!(guest.report_open().await.end, RelayEnd::Narrowed);
    assert!(gateway.connect("a.example.org", 9000).await.is_ok());
    assert!(gateway.connect("aexample.org", 9000).await.is_err());
    assert!(verdicts(&log).contains(&EgressVerdict::Allowed));
}

#[tokio::test]
async fn a_flow_ends_when_its_protocol_is_narrowed() {
    let world = world(&[9000]).await;
    let (config, _log) = config(&["*.example.org:9000/raw"]);
    let gateway = world.gateway(config);
    let admitted = gateway
        .connect("a.example.org", 9000)
        .await
        .expect("admitted");
    let mut guest = Guest::start(admitted);
    guest.send(b"x").await;
    assert_eq!(guest.read_some(1).await, b"x");
    // Still the same host and port, now only TLS: what passed unchecked may not go on.
    gateway.narrow(&policy(&["a.example.org:9000/tls"]));
    assert_eq!(guest.report_open().await.end, RelayEnd::Narrowed);
}
