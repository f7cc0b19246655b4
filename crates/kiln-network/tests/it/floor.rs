//! Addresses that only this host knows to be special.

use std::sync::Arc;

use kiln_core::network::{RangeException, SpecialRange};
use kiln_network::{Gateway, OwnPlaces, Refusal};

use crate::world::{World, config, echo};

const HOST: &str = "a.example.org";

/// The range for which a connection to a name with this address is refused; none when it is admitted.
async fn refused(
    world: &World,
    address: &str,
    own: &[&str],
    except: &[&str],
) -> Option<SpecialRange> {
    world.name(HOST, &[&[address]]);
    let (mut config, _log) = config(&["a.example.org:9000"]);
    config.own = Arc::new(OwnPlaces::default());
    config.own.set("test", own.iter().copied());
    let exception = |range: &&str| RangeException {
        host: HOST.to_owned(),
        range: range.parse().expect("range"),
    };
    config.exceptions = except.iter().map(exception).collect();
    match world.gateway(config).connect(HOST, 9000).await {
        Ok(_) => None,
        Err(Refusal::Address { range, .. }) => Some(range),
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test]
async fn places_of_the_installation_are_refused_however_public() {
    let world = World::default();
    world.name("db.example.net", &[&["8.8.4.4", "2600::5"]]);
    let place = "8.8.4.4:9000";
    let _server = world.server(place, echo).await;
    assert_eq!(refused(&world, "8.8.4.4", &[], &[]).await, None);
    for own in ["8.8.4.4", "8.8.0.0/16", "DB.example.net", "db.example.net."] {
        let got = refused(&world, "8.8.4.4", &["1.2.3.4", own], &[]).await;
        assert_eq!(got, Some(SpecialRange::Own), "{own}");
    }
    let by_name = refused(&world, "2600::5", &["db.example.net"], &[]).await;
    assert_eq!(by_name, Some(SpecialRange::Own));
    let excepted = refused(&world, "8.8.4.4", &["8.8.4.4"], &["8.8.4.4/32"]).await;
    assert_eq!(excepted, None, "the operator says so");
}

#[tokio::test]
async fn a_name_of_the_installation_that_stops_resolving_is_where_it_was() {
    let world = World::default();
    world.name("db.example.net", &[&["8.8.4.4"]]);
    world.name(HOST, &[&["8.8.4.4"]]);
    let (mut config, _log) = config(&["a.example.org:9000"]);
    config.own = Arc::new(OwnPlaces::default());
    config.own.set("test", ["db.example.net"]);
    let gateway = world.gateway(config);
    for answer in [&["8.8.4.4"][..], &[]] {
        world.name("db.example.net", &[answer]);
        let refusal = gateway.connect(HOST, 9000).await.expect_err("own");
        assert!(
            matches!(
                refusal,
                Refusal::Address {
                    range: SpecialRange::Own,
                    ..
                }
            ),
            "{refusal}"
        );
    }
}

#[tokio::test]
async fn addresses_of_this_host_are_refused() {
    let world = World::default();
    let outward = std::net::UdpSocket::bind("0.0.0.0:0").expect("socket");
    if outward.connect("192.0.2.250:9").is_err() {
        // A host without a route has loopback alone, which other tests cover.
        return;
    }
    let own = outward.local_addr().expect("address").ip().to_string();
    assert!(refused(&world, &own, &[], &[]).await.is_some(), "{own}");
    assert!(world.dialled().is_empty());
}

#[tokio::test]
async fn a_translators_prefix_is_found_and_hides_nothing() {
    for (answer, hiding) in [
        // Prefixes of 96, 64 and 32 bits; each hides 169.254.169.254.
        ("2600:aaaa::c000:aa", "2600:aaaa::a9fe:a9fe"),
        ("2600:bbbb:1:2:c0:0:aa00:0", "2600:bbbb:1:2:a9:fea9:fe00:0"),
        ("2600:cccc:c000:ab::", "2600:cccc:a9fe:a9fe::"),
    ] {
        let world = World::default();
        assert_eq!(
            refused_or_unreachable(&world, hiding).await,
            None,
            "public without a translator"
        );
        world.name("ipv4only.arpa", &[&[answer, "192.0.0.170"]]);
        let all = ["::/0", "0.0.0.0/0"];
        let got = refused(&world, hiding, &[], &all).await;
        assert_eq!(
            got,
            Some(SpecialRange::LinkLocal),
            "{hiding}: never by an exception"
        );
        assert!(
            world
                .dialled()
                .iter()
                .all(|addr| addr.ip().to_string() == hiding)
        );
    }
}

/// A resolver in trouble says nothing about a translator: IPv6 waits until one is known to be there or not, IPv4 does not.
#[tokio::test]
async fn without_a_definite_answer_about_a_translator_no_ipv6_address_is_dialled() {
    let hiding = "2600:aaaa::a9fe:a9fe";
    let world = World::default();
    let _six = world.server(&format!("[{hiding}]:9000"), echo).await;
    let _four = world.server("8.8.4.4:9000", echo).await;
    world.name(HOST, &[&[hiding]]);
    let (mut config, _log) = config(&["a.example.org:9000"]);
    config.own = Arc::new(OwnPlaces::default());
    let gateway = world.gateway(config);
    let range = async |gateway: &Gateway| match gateway.connect(HOST, 9000).await {
        Ok(_) => None,
        Err(Refusal::Address { range, .. }) => Some(range),
        Err(other) => panic!("{other}"),
    };
    world.fails("ipv4only.arpa", usize::MAX);
    assert_eq!(range(&gateway).await, Some(SpecialRange::Reserved));
    assert_eq!(world.asked("ipv4only.arpa"), 3, "bounded");
    world.name(HOST, &[&[hiding, "8.8.4.4"]]);
    assert_eq!(range(&gateway).await, None, "IPv4 is not held up");
    // What failed is not kept: the next connection asks again, and passes over two more errors.
    world.name(HOST, &[&[hiding]]);
    world.name("ipv4only.arpa", &[&["2600:aaaa::c000:aa"]]);
    world.fails("ipv4only.arpa", 2);
    assert_eq!(range(&gateway).await, Some(SpecialRange::LinkLocal));
    let asked = world.asked("ipv4only.arpa");
    assert_eq!(range(&gateway).await, Some(SpecialRange::LinkLocal));
    assert_eq!(world.asked("ipv4only.arpa"), asked, "what is known is kept");
    let dialled = world.dialled();
    assert!(dialled.iter().all(|addr| addr.is_ipv4()), "{dialled:?}");
}

/// As [`refused`], where nobody listens.
async fn refused_or_unreachable(world: &World, address: &str) -> Option<SpecialRange> {
    let _server = world.server(&format!("[{address}]:9000"), echo).await;
    refused(world, address, &[], &[]).await
}
