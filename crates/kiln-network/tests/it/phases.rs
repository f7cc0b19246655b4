//! Rules of a live machine that are replaced under open connections.

use kiln_core::network::NetworkPolicy;
use kiln_network::Gateway;
use kiln_network::gateway::RelayEnd;

use crate::names::hello;
use crate::world::{Guest, PUBLIC, World, config, echo, events, policy};

const HOST: &str = "a.example.org";
const OTHER: &str = "b.example.org";
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: a.example.org\r\n\r\n";

async fn world() -> World {
    let world = World::default();
    world.name(HOST, &[&[PUBLIC]]);
    world.name(OTHER, &[&[PUBLIC]]);
    for port in [80, 443, 9000] {
        world.server(&format!("{PUBLIC}:{port}"), echo).await;
    }
    world
}

/// One open flow of each protocol, each with bytes already in both directions.
async fn flows(gateway: &Gateway) -> Vec<Guest> {
    let mut flows = Vec::new();
    let first = [
        (443, hello(Some(HOST))),
        (80, REQUEST.to_vec()),
        (9000, b"\x00raw".to_vec()),
    ];
    for (port, bytes) in first {
        let mut guest = Guest::start(gateway.connect(HOST, port).await.expect("admitted"));
        guest.send(&bytes).await;
        assert_eq!(guest.read_some(bytes.len()).await, bytes);
        flows.push(guest);
    }
    flows
}

const ALL: [&str; 3] = [
    "a.example.org:443/tls",
    "a.example.org:80/http",
    "a.example.org:9000/raw",
];

#[tokio::test]
async fn a_new_phase_ends_every_flow_it_does_not_allow() {
    let world = world().await;
    let (config, log) = config(&ALL);
    let gateway = world.gateway(config);
    assert_eq!(gateway.enter("dependencies", policy(&ALL)), policy(&ALL));
    let flows = flows(&gateway).await;
    let run = policy(&["b.example.org:9000/raw"]);
    assert_eq!(gateway.enter("run", run.clone()), run);
    for flow in flows {
        assert_eq!(flow.report_open().await.end, RelayEnd::Narrowed);
    }
    assert!(gateway.connect(HOST, 443).await.is_err());
    // Nothing is inherited, and what the new phase names is reached.
    let mut guest = Guest::start(gateway.connect(OTHER, 9000).await.expect("admitted"));
    guest.send(b"x").await;
    assert_eq!(guest.read_some(1).await, b"x");
    guest.report().await;
    let events = events(&log);
    let of = |phase: &str| {
        let of = events.iter().filter(|e| e.phase.as_deref() == Some(phase));
        of.map(|e| (e.port, e.narrowed)).collect::<Vec<_>>()
    };
    let mut before = of("dependencies");
    before.sort_unstable();
    assert_eq!(before, [(80, true), (443, true), (9000, true)]);
    assert_eq!(of("run"), [(443, false), (9000, false)]);
}

#[tokio::test]
async fn flows_that_the_new_phase_allows_go_on() {
    let world = world().await;
    let (config, log) = config(&ALL);
    let gateway = world.gateway(config);
    let flows = flows(&gateway).await;
    gateway.enter("run", policy(&ALL[1..]));
    let mut flows = flows.into_iter();
    let tls = flows.next().expect("tls");
    assert_eq!(tls.report_open().await.end, RelayEnd::Narrowed);
    for (mut flow, bytes) in flows.zip([REQUEST, b"\x00more"]) {
        flow.send(bytes).await;
        assert_eq!(flow.read_some(bytes.len()).await, bytes);
        assert_eq!(flow.report().await.end, RelayEnd::Closed);
    }
    let narrowed = events(&log).iter().filter(|e| e.narrowed).count();
    assert_eq!(narrowed, 1);
}

#[tokio::test]
async fn no_byte_follows_the_rules_that_forbid_it() {
    let world = world().await;
    let (config, log) = config(&ALL);
    let gateway = world.gateway(config);
    let mut flows = flows(&gateway).await;
    // Admitted under the old rules, not relayed yet.
    let waiting = gateway.connect(HOST, 9000).await.expect("admitted");
    // The runtime has one thread: no flow runs between the two.
    gateway.enter("run", NetworkPolicy::Isolated);
    for flow in &mut flows {
        flow.send(b"after").await;
    }
    let mut late = Guest::start(waiting);
    late.send(b"after").await;
    flows.push(late);
    for flow in flows {
        assert_eq!(flow.report_open().await.end, RelayEnd::Narrowed);
    }
    let sent: u64 = events(&log).iter().map(|event| event.bytes_out).sum();
    let before = hello(Some(HOST)).len() + REQUEST.len() + 4;
    assert_eq!(sent, before as u64, "nothing after the change");
}

#[tokio::test]
async fn after_a_secret_rules_only_narrow() {
    let world = world().await;
    let (config, _log) = config(&[]);
    let gateway = world.gateway(config);
    gateway.enter("dependencies", policy(&ALL[..2]));
    let all = policy(&ALL);
    assert_eq!(gateway.at_most(&all), all, "no secret yet");
    gateway.only_narrow();
    assert_eq!(gateway.at_most(&all), policy(&ALL[..2]));
    let wider = policy(&["a.example.org:443/tls", "b.example.org:9000/raw"]);
    assert_eq!(gateway.enter("run", wider), policy(&ALL[..1]));
    assert_eq!(gateway.enter("run", NetworkPolicy::Open), policy(&ALL[..1]));
    assert!(gateway.connect(OTHER, 9000).await.is_err());
    gateway.enter("run", NetworkPolicy::Isolated);
    gateway.enter("run", policy(&ALL));
    assert_eq!(gateway.policy(), NetworkPolicy::Isolated);
}
