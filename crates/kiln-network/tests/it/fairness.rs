//! Machines beside each other: what one floods, the other still gets. Counted, never timed.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use kiln_network::gateway::dial::{BoxedDuplex, Dialer, Resolver};
use kiln_network::gateway::{Gateway, HostShare};
use kiln_network::{BoxFuture, EgressLog, GatewayConfig, Refusal};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::world::{Guest, PUBLIC, policy};

const HOST: &str = "a.example.org";

/// A guest that always has more to say, and a server that takes everything.
struct Endless(Arc<AtomicU64>);

impl AsyncRead for Endless {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // As every real stream: after a while somebody else runs.
        let budget = std::task::ready!(tokio::task::coop::poll_proceed(context));
        let room = buf.initialize_unfilled();
        let len = room.len();
        buf.advance(len);
        budget.made_progress();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Endless {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The server's end: counts what it is sent and says nothing.
struct Sink(Arc<AtomicU64>);

impl AsyncRead for Sink {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

impl AsyncWrite for Sink {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// One machine's network: every name leads to a server that counts.
#[derive(Clone, Default)]
struct Counted(Arc<AtomicU64>);

impl Resolver for Counted {
    fn resolve<'a>(&'a self, _: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async { Ok(vec![PUBLIC.parse().expect("address")]) })
    }
}

impl Dialer for Counted {
    fn dial(&self, _: SocketAddr) -> BoxFuture<'static, io::Result<BoxedDuplex>> {
        let sink = Sink(Arc::clone(&self.0));
        Box::pin(async move { Ok(Box::new(sink) as BoxedDuplex) })
    }
}

fn machine<N: Resolver + Dialer + Clone + 'static>(share: &Arc<HostShare>, net: &N) -> Gateway {
    let mut config = GatewayConfig::new(
        policy(&["a.example.org:9000/raw"]),
        Arc::new(EgressLog::new()),
    );
    config.share = Arc::clone(share);
    Gateway::with_network(config, Arc::new(net.clone()), Arc::new(net.clone()))
}

#[tokio::test]
async fn a_flood_of_bytes_leaves_the_other_machine_its_half() {
    const FLOWS: usize = 200;
    const ENOUGH: u64 = 8 << 20;
    let share = Arc::new(HostShare::of(64, 64, 1));
    let (flood, quiet) = (Counted::default(), Counted::default());
    let (a, b) = (machine(&share, &flood), machine(&share, &quiet));
    let mut flows = Vec::new();
    for at in 0..=FLOWS {
        let gateway = if at == FLOWS { &b } else { &a };
        flows.push(gateway.connect(HOST, 9000).await.expect("admitted"));
    }
    let mut relays = JoinSet::new();
    for admitted in flows {
        relays.spawn(admitted.relay(Box::new(Endless(Arc::default()))));
    }
    while quiet.0.load(Ordering::SeqCst) < ENOUGH {
        tokio::task::yield_now().await;
    }
    let (flood, quiet) = (
        flood.0.load(Ordering::SeqCst),
        quiet.0.load(Ordering::SeqCst),
    );
    assert!(
        flood < 3 * quiet,
        "{FLOWS} flows moved {flood}, one of the other machine {quiet}"
    );
    assert!(flood > quiet / 3, "nor is the other way round: {flood}");
    relays.abort_all();
}

/// Dials that end when the test says so, in the order they began.
#[derive(Clone)]
struct Slow {
    machine: &'static str,
    began: Arc<Mutex<Vec<&'static str>>>,
    ends: Arc<Semaphore>,
}

impl Resolver for Slow {
    fn resolve<'a>(&'a self, _: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async { Ok(vec![PUBLIC.parse().expect("address")]) })
    }
}

impl Dialer for Slow {
    fn dial(&self, _: SocketAddr) -> BoxFuture<'static, io::Result<BoxedDuplex>> {
        self.began
            .lock()
            .expect("no panics inside")
            .push(self.machine);
        let ends = Arc::clone(&self.ends);
        Box::pin(async move {
            ends.acquire().await.expect("open").forget();
            Err(io::ErrorKind::ConnectionRefused.into())
        })
    }
}

#[tokio::test]
async fn a_flood_of_opens_leaves_the_other_machine_its_place() {
    let share = Arc::new(HostShare::of(4, 3, 1));
    let (began, ends) = (Arc::default(), Arc::new(Semaphore::new(0)));
    let net = |machine| Slow {
        machine,
        began: Arc::clone(&began),
        ends: Arc::clone(&ends),
    };
    let gateways = ["a", "b"].map(|name| (name, machine(&share, &net(name))));
    let mut opens = JoinSet::new();
    for (name, gateway) in &gateways {
        for _ in 0..if *name == "a" { 200 } else { 3 } {
            let gateway = gateway.clone();
            opens.spawn(async move { gateway.connect(HOST, 9000).await.is_err() });
        }
    }
    let begun = || began.lock().expect("no panics inside").clone();
    while begun().len() < 4 {
        tokio::task::yield_now().await;
    }
    // Three at once is all that one machine has of four places; the fourth is there for another.
    assert_eq!(begun(), ["a", "a", "a", "b"]);
    ends.add_permits(4);
    while begun().len() < 8 {
        tokio::task::yield_now().await;
    }
    let more = begun().iter().filter(|name| **name == "b").count();
    assert_eq!(
        more,
        3,
        "the other machine is done after its turns: {:?}",
        begun()
    );
    ends.add_permits(1000);
    assert!(opens.join_all().await.into_iter().all(|refused| refused));
}

#[tokio::test]
async fn more_connections_than_the_default_where_a_policy_says_so() {
    const MANY: usize = 600;
    let net = Counted::default();
    let mut config = GatewayConfig::new(
        policy(&["a.example.org:9000/raw"]),
        Arc::new(EgressLog::new()),
    );
    config.limits.connections_max = MANY;
    let gateway = Gateway::with_network(config, Arc::new(net.clone()), Arc::new(net));
    let mut open = Vec::new();
    for _ in 0..MANY {
        open.push(gateway.connect(HOST, 9000).await.expect("admitted"));
    }
    let refusal = gateway.connect(HOST, 9000).await.expect_err("one too many");
    assert!(matches!(
        refusal,
        Refusal::TooMany {
            connections_max: MANY
        }
    ));
    open.pop();
    assert!(gateway.connect(HOST, 9000).await.is_ok());
}

/// A server in memory that sends back what it gets; with real sockets a clock that stands still would run away.
#[derive(Clone)]
struct Echo;

impl Resolver for Echo {
    fn resolve<'a>(&'a self, _: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async { Ok(vec![PUBLIC.parse().expect("address")]) })
    }
}

impl Dialer for Echo {
    fn dial(&self, _: SocketAddr) -> BoxFuture<'static, io::Result<BoxedDuplex>> {
        let (near, far) = tokio::io::duplex(64 * 1024);
        tokio::spawn(async move {
            let (mut from, mut to) = tokio::io::split(far);
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
        Box::pin(async move { Ok(Box::new(near) as BoxedDuplex) })
    }
}

#[tokio::test(start_paused = true)]
async fn each_direction_of_a_machine_has_its_own_rate() {
    const BYTES: usize = 1_000_000;
    for (out, into, least) in [
        (500_000, 0, 1_800),
        (0, 250_000, 3_800),
        (500_000, 250_000, 3_800),
    ] {
        let mut config = GatewayConfig::new(
            policy(&["a.example.org:9000/raw"]),
            Arc::new(EgressLog::new()),
        );
        config.limits.bytes_out_per_second = NonZeroU64::new(out);
        config.limits.bytes_in_per_second = NonZeroU64::new(into);
        let gateway = Gateway::with_network(config, Arc::new(Echo), Arc::new(Echo));
        let begun = tokio::time::Instant::now();
        // Two connections have one rate together.
        let mut both = JoinSet::new();
        for _ in 0..2 {
            let mut guest = Guest::start(gateway.connect(HOST, 9000).await.expect("admitted"));
            both.spawn(async move {
                let (mut from, mut to) = tokio::io::split(guest.take_stream());
                let said = tokio::spawn(async move {
                    to.write_all(&vec![7; BYTES / 2]).await.expect("sent");
                    to
                });
                let mut got = vec![0; BYTES / 2];
                from.read_exact(&mut got).await.expect("echo");
                said.await.expect("no panic");
            });
        }
        both.join_all().await;
        // The clock moves only where a rate makes somebody wait: this is arithmetic, not speed.
        let took = begun.elapsed();
        let least = Duration::from_millis(least);
        assert!(took >= least && took <= least * 2, "{out} {into}: {took:?}");
    }
}
