//! Through the operator's HTTP proxy.

use std::sync::{Arc, Mutex};

use kiln_network::Refusal;
use kiln_network::gateway::RelayEnd;
use kiln_network::gateway::proxy::ProxyConfig;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::world::{Guest, PUBLIC, World, config};

const HOST: &str = "a.example.org";

/// A proxy on loopback that remembers request heads; it answers `CONNECT` with `answer` and then echoes.
async fn proxy(world: &World, answer: &'static [u8]) -> Arc<Mutex<Vec<String>>> {
    world.name("proxy.example.org", &[&["127.0.0.1"]]);
    let heads = Arc::new(Mutex::new(Vec::new()));
    let store = Arc::clone(&heads);
    world
        .server("127.0.0.1:3128", move |mut stream: TcpStream| {
            let store = Arc::clone(&store);
            async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else {
                        return;
                    };
                    head.push(byte);
                }
                let head = String::from_utf8(head).expect("text");
                store.lock().expect("no panic").push(head);
                let _ = stream.write_all(answer).await;
                crate::world::echo(stream).await;
            }
        })
        .await;
    heads
}

fn settings() -> ProxyConfig {
    let url = Some("http://user:word@proxy.example.org:3128");
    ProxyConfig::new(url, url, Some("direct.example.org")).expect("legal")
}

#[tokio::test]
async fn a_tunnel_is_opened_and_early_bytes_are_kept() {
    let world = World::default();
    let heads = proxy(&world, b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nbanner").await;
    let (mut config, _log) = config(&["a.example.org:9000"]);
    config.proxy = settings();
    let gateway = world.gateway(config);
    let mut guest = Guest::start(gateway.connect(HOST, 9000).await.expect("admitted"));
    assert_eq!(guest.read_some(6).await, b"banner");
    guest.send(b"\x00hi").await;
    assert_eq!(guest.read_some(3).await, b"\x00hi");
    assert_eq!(guest.report().await.end, RelayEnd::Closed);
    let head = heads.lock().expect("no panic").remove(0);
    assert_eq!(
        head,
        "CONNECT a.example.org:9000 HTTP/1.1\r\nHost: a.example.org:9000\r\nProxy-Authorization: Basic dXNlcjp3b3Jk\r\n\r\n"
    );
}

#[tokio::test]
async fn plain_http_is_forwarded_with_absolute_targets() {
    let world = World::default();
    let heads = proxy(&world, b"HTTP/1.1 204 No Content\r\n\r\n").await;
    let (mut config, _log) = config(&[HOST]);
    config.proxy = settings();
    let gateway = world.gateway(config);
    let mut guest = Guest::start(gateway.connect(HOST, 80).await.expect("admitted"));
    guest
        .send(b"GET /x HTTP/1.1\r\nHost: a.example.org\r\n\r\n")
        .await;
    guest.read_some(27).await;
    guest.report().await;
    let head = heads.lock().expect("no panic").remove(0);
    assert!(
        head.starts_with("GET http://a.example.org/x HTTP/1.1\r\n"),
        "{head}"
    );
    let mut guest = Guest::start(gateway.connect(HOST, 80).await.expect("admitted"));
    guest.send(b"\x16\x03\x01\x00\x01").await;
    guest.read_all().await;
    assert!(matches!(
        guest.report().await.end,
        RelayEnd::NameRefused { .. }
    ));
}

#[tokio::test]
async fn the_policy_and_the_floor_still_hold_and_refusals_are_told() {
    let world = World::default();
    let heads = proxy(&world, b"HTTP/1.1 407 Who Are You\r\n\r\n").await;
    world.name("inside.example.org", &[&[PUBLIC, "10.0.0.1"]]);
    let (mut config, _log) = config(&[HOST, "inside.example.org", "direct.example.org:9000"]);
    config.proxy = settings();
    let gateway = world.gateway(config);
    assert!(matches!(
        gateway.connect("b.example.org", 443).await,
        Err(Refusal::Host { .. })
    ));
    assert!(matches!(
        gateway.connect("inside.example.org", 443).await,
        Err(Refusal::Address { .. })
    ));
    assert!(heads.lock().expect("no panic").is_empty());
    let refusal = gateway
        .connect(HOST, 443)
        .await
        .expect_err("refused by the proxy");
    assert!(refusal.to_string().contains("407"), "{refusal}");
    world.name("direct.example.org", &[&[PUBLIC]]);
    let _server = world
        .server(&format!("{PUBLIC}:9000"), crate::world::echo)
        .await;
    let direct = gateway
        .connect("direct.example.org", 9000)
        .await
        .expect("direct");
    assert!(direct.address().is_some());
}
