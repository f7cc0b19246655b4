//! Decisions, addresses, limits, and how bytes move.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kiln_core::network::{EgressVerdict, RangeException, SpecialRange};
use kiln_network::gateway::dial::BoxedDuplex;
use kiln_network::gateway::{Gateway, GuestService, RelayEnd, Services};
use kiln_network::record::TEXT_BYTES_MAX;
use kiln_network::{BoxFuture, Refusal};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::world::{Guest, PUBLIC, World, config, count, echo, events, policy, verdicts};

const HOST: &str = "a.example.org";

fn raw() -> (World, String) {
    let world = World::default();
    world.name(HOST, &[&[PUBLIC]]);
    (world, format!("{PUBLIC}:9000"))
}

#[tokio::test]
async fn names_ports_and_hosts_are_decided_before_anything_is_asked_or_dialled() {
    let (world, _) = raw();
    let (config, log) = config(&["a.example.org:9000"]);
    let gateway = world.gateway(config);
    assert!(gateway.knows("A.example.org."));
    for _ in 0..3 {
        assert!(!gateway.knows("secret-data.evil.example.org"));
    }
    assert!(!gateway.knows("bad name\0"));
    assert_eq!(
        gateway.connect(HOST, 22).await.expect_err("refused"),
        Refusal::Port {
            host: HOST.to_owned(),
            port: 22
        }
    );
    for host in [
        "b.example.org",
        "x.a.example.org",
        "8.8.4.4",
        "127.0.0.1",
        "::1",
        "a.example.org\0",
        "",
    ] {
        let refusal = gateway.connect(host, 9000).await.expect_err("refused");
        assert!(
            matches!(refusal, Refusal::Host { .. }),
            "{host:?}: {refusal:?}"
        );
    }
    assert!(world.dialled().is_empty());
    let verdicts = verdicts(&log);
    assert_eq!(
        verdicts
            .iter()
            .filter(|v| **v == EgressVerdict::PortRefused)
            .count(),
        1
    );
    assert_eq!(
        verdicts[0],
        EgressVerdict::HostRefused,
        "the DNS question, once"
    );
    assert_eq!(verdicts.len(), 9);
}

#[tokio::test]
async fn special_addresses_are_never_dialled() {
    let cases: &[(&[&str], SpecialRange)] = &[
        (&["169.254.169.254"], SpecialRange::LinkLocal),
        (&["127.0.0.1"], SpecialRange::Loopback),
        (&["::1"], SpecialRange::Loopback),
        (&["::ffff:127.0.0.1"], SpecialRange::Loopback),
        (&["::ffff:8.8.8.8"], SpecialRange::Reserved),
        (&["10.0.0.1", "127.0.0.1"], SpecialRange::Private),
        (&["0.0.0.0"], SpecialRange::NotUnicast),
        (&["64:ff9b::a9fe:a9fe"], SpecialRange::LinkLocal),
        (&["64:ff9b::808:808"], SpecialRange::Reserved),
        (&["168.63.129.16"], SpecialRange::Metadata),
    ];
    for (answer, range) in cases {
        let world = World::default();
        world.name(HOST, &[answer]);
        let (mut config, log) = config(&[HOST]);
        let except = |range: &str| RangeException {
            host: HOST.to_owned(),
            range: range.parse().expect("range"),
        };
        config.exceptions = vec![
            except("127.0.0.0/8"),
            except("169.254.0.0/16"),
            except("::1/128"),
        ];
        let refusal = world
            .gateway(config)
            .connect(HOST, 443)
            .await
            .expect_err("refused");
        let address = events(&log)[0].address.expect("the record has the address");
        assert!(answer.contains(&address.to_string().as_str()), "{address}");
        assert_eq!(
            refusal,
            Refusal::Address {
                host: HOST.to_owned(),
                range: *range,
                address,
            },
            "{answer:?}"
        );
        assert!(
            !refusal.to_string().contains(&address.to_string()),
            "the guest is told: {refusal}"
        );
        assert_eq!(
            verdicts(&log),
            [EgressVerdict::AddressRefused { range: *range }]
        );
        assert!(world.dialled().is_empty(), "{answer:?}");
    }
}

#[tokio::test]
async fn an_exception_admits_its_range_for_its_name_only() {
    let world = World::default();
    world.name(HOST, &[&["10.1.2.3", "127.0.0.1"]]);
    world.name("b.example.org", &[&["10.1.2.3"]]);
    let _server = world.server("10.1.2.3:9000", echo).await;
    let (mut config, _log) = config(&["a.example.org:9000", "b.example.org:9000"]);
    config.exceptions = vec![RangeException {
        host: HOST.to_owned(),
        range: "10.1.0.0/16".parse().expect("range"),
    }];
    let gateway = world.gateway(config);
    let admitted = gateway.connect(HOST, 9000).await.expect("excepted");
    assert_eq!(
        admitted.address(),
        Some("10.1.2.3".parse().expect("address"))
    );
    assert!(gateway.connect("b.example.org", 9000).await.is_err());
    assert_eq!(world.dialled().len(), 1);
}

#[tokio::test]
async fn a_dial_that_failed_says_where_to() {
    let world = World::default();
    world.name(HOST, &[&[PUBLIC]]);
    let (config, log) = config(&["a.example.org:9000"]);
    let refusal = world.gateway(config).connect(HOST, 9000).await;
    let refusal = refusal.expect_err("nobody is there");
    let told = events(&log).pop().expect("an event");
    assert!(matches!(told.verdict, EgressVerdict::Unreachable { .. }));
    assert_eq!(told.address, Some(PUBLIC.parse().expect("address")));
    assert!(!refusal.to_string().contains(PUBLIC), "{refusal}");
}

#[tokio::test]
async fn a_long_name_that_is_none_is_recorded_shortened() {
    let world = World::default();
    let (config, log) = config(&["a.example.org:9000"]);
    let long = "\u{0}".repeat(4_000);
    let refused = world.gateway(config).connect(&long, 443).await;
    let refusal = refused.expect_err("no name");
    let host = events(&log)[0].host.clone();
    assert!(
        host.len() <= TEXT_BYTES_MAX && host.starts_with('"'),
        "{host}"
    );
    assert!(refusal.to_string().len() < 2 * TEXT_BYTES_MAX);
}

#[tokio::test]
async fn a_second_answer_is_never_used_and_the_checked_address_is_dialled() {
    let world = World::default();
    world.name(HOST, &[&[PUBLIC], &["127.0.0.1"], &["169.254.169.254"]]);
    let _server = world.server(&format!("{PUBLIC}:9000"), echo).await;
    let (config, _log) = config(&["a.example.org:9000"]);
    let gateway = world.gateway(config);
    let first = gateway.connect(HOST, 9000).await.expect("public");
    assert_eq!(first.address(), Some(PUBLIC.parse().expect("address")));
    assert!(matches!(
        gateway.connect(HOST, 9000).await,
        Err(Refusal::Address { .. })
    ));
    assert!(matches!(
        gateway.connect(HOST, 9000).await,
        Err(Refusal::Address { .. })
    ));
    assert_eq!(
        world.dialled(),
        [format!("{PUBLIC}:9000").parse().expect("address")]
    );
}

#[tokio::test]
async fn production_gateways_cannot_dial_loopback() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("bind");
    let port = listener.local_addr().expect("address").port();
    let (config, _log) = config(&[&format!("localhost:{port}")]);
    let refusal = Gateway::new(config)
        .connect("localhost", port)
        .await
        .expect_err("refused");
    assert!(
        matches!(
            refusal,
            Refusal::Address {
                range: SpecialRange::Loopback,
                ..
            }
        ),
        "{refusal:?}"
    );
}

#[tokio::test]
async fn an_unresolvable_or_dead_host_is_unreachable() {
    let (world, _) = raw();
    let (config, log) = config(&["a.example.org:9000", "gone.example.org"]);
    let gateway = world.gateway(config);
    assert!(matches!(
        gateway.connect(HOST, 9000).await,
        Err(Refusal::Unreachable { .. })
    ));
    assert!(matches!(
        gateway.connect("gone.example.org", 443).await,
        Err(Refusal::Unreachable { .. })
    ));
    assert!(
        verdicts(&log)
            .iter()
            .all(|v| matches!(v, EgressVerdict::Unreachable { .. }))
    );
}

#[tokio::test]
async fn bytes_are_counted_and_both_half_closes_arrive() {
    let (world, place) = raw();
    let _server = world.server(&place, count).await;
    let (config, log) = config(&["a.example.org:9000"]);
    let gateway = world.gateway(config);
    let mut guest = Guest::start(gateway.connect(HOST, 9000).await.expect("admitted"));
    guest.send(b"\x00hello").await;
    guest.stream.shutdown().await.expect("half-close");
    assert_eq!(
        guest.read_all().await,
        b"got 6",
        "the server saw the end and could still answer"
    );
    let report = guest.report().await;
    assert_eq!(
        (report.bytes_out, report.bytes_in, report.end),
        (6, 5, RelayEnd::Closed)
    );
    let event = events(&log).remove(0);
    assert_eq!((event.bytes_out, event.bytes_in), (6, 5));
    assert_eq!(event.rule.as_deref(), Some("a.example.org:9000"));
    assert_eq!(event.address, Some(PUBLIC.parse().expect("address")));
}

#[tokio::test]
async fn the_server_may_close_first_and_still_listen() {
    let (world, place) = raw();
    let (tell, told) = tokio::sync::oneshot::channel();
    let listener = world.listen(&place).await;
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("accept");
        stream.write_all(b"banner").await.expect("write");
        stream.shutdown().await.expect("half-close");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.expect("read");
        tell.send(all).expect("told");
    });
    let (config, _log) = config(&["a.example.org:9000"]);
    let gateway = world.gateway(config);
    let mut guest = Guest::start(gateway.connect(HOST, 9000).await.expect("admitted"));
    assert_eq!(guest.read_all().await, b"banner", "the server speaks first");
    guest.send(b"\x01late").await;
    assert_eq!(guest.report().await.end, RelayEnd::Closed);
    assert_eq!(told.await.expect("told"), b"\x01late");
}

#[tokio::test]
async fn a_big_transfer_is_counted_to_the_byte() {
    const BYTES: usize = 24 << 20;
    let (world, place) = raw();
    let _server = world.server(&place, echo).await;
    let (config, log) = config(&["a.example.org:9000"]);
    let gateway = world.gateway(config);
    let guest = Guest::start(gateway.connect(HOST, 9000).await.expect("admitted"));
    let (mut from, mut to) = tokio::io::split(guest.stream);
    let write = tokio::spawn(async move {
        let part = vec![0; 1 << 20];
        for _ in 0..BYTES >> 20 {
            to.write_all(&part).await.expect("write");
        }
        to.shutdown().await.expect("end");
    });
    let mut total = 0;
    let mut part = vec![0; 1 << 16];
    loop {
        let len = from.read(&mut part).await.expect("read");
        total += len;
        if len == 0 {
            break;
        }
    }
    write.await.expect("no panic");
    assert_eq!(total, BYTES);
    let event = wait_for_event(&log).await;
    assert_eq!(
        (event.bytes_out, event.bytes_in),
        (BYTES as u64, BYTES as u64)
    );
}

async fn wait_for_event(log: &kiln_network::EgressLog) -> kiln_core::network::EgressEvent {
    let found = async {
        loop {
            if let Some(event) = events(log).pop() {
                return event;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(crate::world::STEP_MAX, found)
        .await
        .expect("in time")
}

#[tokio::test]
async fn the_connection_cap_holds_and_slots_come_back() {
    let (world, place) = raw();
    let _server = world.server(&place, echo).await;
    let (mut config, _log) = config(&["a.example.org:9000"]);
    config.limits.connections_max = 2;
    let gateway = world.gateway(config);
    let one = gateway.connect(HOST, 9000).await.expect("first");
    let two = Guest::start(gateway.connect(HOST, 9000).await.expect("second"));
    assert_eq!(
        gateway.connect(HOST, 9000).await.expect_err("third"),
        Refusal::TooMany { connections_max: 2 }
    );
    drop(one);
    let three = gateway
        .connect(HOST, 9000)
        .await
        .expect("slot of the first");
    two.report().await;
    gateway
        .connect(HOST, 9000)
        .await
        .expect("slot of the second");
    drop(three);
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_ends_and_a_slow_one_does_not() {
    let (world, place) = raw();
    let _server = world
        .server(&place, |mut stream| async move {
            for _ in 0..4 {
                tokio::time::sleep(Duration::from_secs(40)).await;
                let _ = stream.write_all(b"x").await;
            }
            std::future::pending::<()>().await;
        })
        .await;
    let (mut config, log) = config(&["a.example.org:9000"]);
    config.limits.idle = Duration::from_secs(60);
    let gateway = world.gateway(config);
    let (_open, host) = tokio::io::duplex(1024);
    let admitted = gateway.connect(HOST, 9000).await.expect("admitted");
    let start = tokio::time::Instant::now();
    let report = admitted.relay(Box::new(host)).await;
    assert_eq!(report.end, RelayEnd::Idle);
    assert_eq!(report.bytes_in, 4, "slow is not idle");
    assert!(
        start.elapsed() >= Duration::from_secs(220),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(events(&log)[0].bytes_in, 4);
}

#[tokio::test]
async fn narrowing_ends_what_is_no_longer_allowed_and_only_that() {
    let (world, place) = raw();
    world.name("b.example.org", &[&[PUBLIC]]);
    let _server = world.server(&place, echo).await;
    let (config, _log) = config(&["a.example.org:9000", "b.example.org:9000,9001"]);
    let gateway = world.gateway(config);
    let a = Guest::start(gateway.connect(HOST, 9000).await.expect("a"));
    let mut b = Guest::start(gateway.connect("b.example.org", 9000).await.expect("b"));
    gateway.narrow(&policy(&["b.example.org:9000", "c.example.org"]));
    assert_eq!(a.report_open().await.end, RelayEnd::Narrowed);
    b.send(b"\x00still").await;
    assert_eq!(b.read_some(6).await, b"\x00still");
    for (host, port) in [
        (HOST, 9000),
        ("b.example.org", 9001),
        ("c.example.org", 443),
    ] {
        assert!(gateway.connect(host, port).await.is_err(), "{host}:{port}");
    }
    gateway.narrow(&policy(&[]));
    assert_eq!(b.report_open().await.end, RelayEnd::Narrowed);
}

struct Greeter(AtomicUsize);

impl GuestService for Greeter {
    fn serve(&self, mut stream: BoxedDuplex) -> BoxFuture<'static, ()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            let _ = stream.write_all(b"kiln").await;
            let _ = stream.shutdown().await;
        })
    }
}

#[tokio::test]
async fn own_services_answer_and_other_internal_names_never_leave() {
    let world = World::default();
    world.name("other.kiln.internal", &[&[PUBLIC]]);
    let greeter = Arc::new(Greeter(AtomicUsize::new(0)));
    // No rule can name what is kiln's own.
    let (mut config, log) = config(&["example.org"]);
    config.services = Services::default().with("registry.kiln.internal", 80, greeter.clone());
    let gateway = world.gateway(config);
    assert!(gateway.knows("registry.kiln.internal"));
    assert!(!gateway.knows("other.kiln.internal"));
    let mut guest = Guest::start(
        gateway
            .connect("registry.kiln.internal", 80)
            .await
            .expect("own"),
    );
    assert_eq!(guest.read_all().await, b"kiln");
    assert_eq!(guest.report().await.end, RelayEnd::Service);
    assert_eq!(greeter.0.load(Ordering::SeqCst), 1);
    assert!(matches!(
        gateway.connect("other.kiln.internal", 443).await,
        Err(Refusal::Host { .. })
    ));
    assert!(matches!(
        gateway.connect("registry.kiln.internal", 22).await,
        Err(Refusal::Port { .. })
    ));
    assert!(world.dialled().is_empty());
    assert!(
        events(&log)
            .iter()
            .all(|event| event.verdict != EgressVerdict::Allowed)
    );
}

#[tokio::test(start_paused = true)]
async fn bandwidth_is_shared_by_a_machines_connections() {
    let (world, place) = raw();
    let _server = world
        .server(&place, |mut stream| async move {
            let _ = stream.write_all(&vec![7; 500_000]).await;
        })
        .await;
    let (mut config, _log) = config(&["a.example.org:9000"]);
    config.limits.bytes_out_per_second = NonZeroU64::new(100_000);
    config.limits.bytes_in_per_second = NonZeroU64::new(100_000);
    // The sockets are real and time is not: whenever a busy host lets a byte wait, the clock goes on to the next timer there is.
    config.limits.idle = Duration::from_secs(24 * 3600);
    let gateway = world.gateway(config);
    let start = tokio::time::Instant::now();
    let fetch = || async {
        let (mut guest, host) = tokio::io::duplex(1 << 16);
        let admitted = gateway.connect(HOST, 9000).await.expect("admitted");
        let relay = tokio::spawn(admitted.relay(Box::new(host)));
        let mut all = Vec::new();
        guest.read_to_end(&mut all).await.expect("read");
        drop(guest);
        relay.await.expect("no panic").bytes_in
    };
    let (one, two) = tokio::join!(fetch(), fetch());
    assert_eq!((one, two), (500_000, 500_000));
    let took = start.elapsed();
    assert!(
        took >= Duration::from_millis(9_800) && took < Duration::from_secs(12),
        "{took:?}"
    );
}
