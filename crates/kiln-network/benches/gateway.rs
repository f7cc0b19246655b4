//! The gateway's host half on loopback: bytes per second through one relay, and what a decision adds to a connection.
//!
//! `cargo bench -p kiln-network` prints one JSON line for each measure, raw samples included. `KILN_BENCH_MIB` and `KILN_BENCH_DECISIONS` change how
//! much is done. Measured is what the gateway does on the host; the channel to a guest is not part of it.

#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a bench is a program of its own: it reads its size and prints its numbers"
)]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_core::network::NetworkPolicy;
use kiln_network::gateway::dial::{BoxedDuplex, Dialer, Resolver};
use kiln_network::{BoxFuture, EgressLog, Gateway, GatewayConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const HOST: &str = "a.example.org";
const PUBLIC: &str = "8.8.4.4";
/// Bytes a side writes at once.
const PART: usize = 64 * 1024;
/// Repetitions of a transfer.
const ROUNDS: usize = 5;
/// Rules of the policy: as many as a large project has.
const RULES: usize = 200;

/// Every name is one public address, behind which a server on loopback listens.
#[derive(Clone, Copy)]
struct Loopback(SocketAddr);

impl Resolver for Loopback {
    fn resolve<'a>(&'a self, _: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async { Ok(PUBLIC.parse().into_iter().collect()) })
    }
}

impl Dialer for Loopback {
    fn dial(&self, _: SocketAddr) -> BoxFuture<'static, io::Result<BoxedDuplex>> {
        let to = self.0;
        Box::pin(async move {
            let stream = TcpStream::connect(to).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as BoxedDuplex)
        })
    }
}

fn number(name: &str, usual: usize) -> usize {
    let set = std::env::var(name).ok().and_then(|text| text.parse().ok());
    set.unwrap_or(usual)
}

fn gateway(server: SocketAddr) -> anyhow::Result<Gateway> {
    let rules: Result<Vec<_>, _> = (0..RULES)
        .map(|at| format!("n{at}.example.org:443/tls").parse())
        .chain([format!("{HOST}:9000/raw").parse()])
        .collect();
    let policy = NetworkPolicy::from_rules(rules?);
    let net = Arc::new(Loopback(server));
    let config = GatewayConfig::new(policy, Arc::new(EgressLog::new()));
    Ok(Gateway::with_network(config, Arc::clone(&net) as _, net))
}

/// A server that takes `down` bytes' worth of orders: reads everything or writes everything, as its first byte says.
async fn serve(listener: TcpListener, bytes: usize) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut part = vec![0; PART];
            match stream.read_u8().await {
                Ok(b'd') => {
                    for _ in 0..bytes / PART {
                        if stream.write_all(&part).await.is_err() {
                            return;
                        }
                    }
                }
                Ok(b'u') => {
                    let mut left = bytes;
                    while left > 0 {
                        match stream.read(&mut part).await {
                            Ok(0) | Err(_) => return,
                            Ok(len) => left -= len.min(left),
                        }
                    }
                    let _gone = stream.write_u8(1).await;
                }
                // A decision is measured: one byte back.
                Ok(byte) => drop(stream.write_u8(byte).await),
                Err(_) => {}
            }
        });
    }
}

/// Moves bytes through the gateway from and to a guest that is a socket as well; gives Gbit/s.
async fn transfer(gateway: &Gateway, bytes: usize, order: u8) -> anyhow::Result<f64> {
    let guests = TcpListener::bind("127.0.0.1:0").await?;
    let mut guest = TcpStream::connect(guests.local_addr()?).await?;
    let (host, _) = guests.accept().await?;
    let admitted = gateway.connect(HOST, 9000).await?;
    let relay = tokio::spawn(admitted.relay(Box::new(host)));
    let begun = Instant::now();
    guest.write_u8(order).await?;
    let mut part = vec![0; PART];
    if order == b'd' {
        let mut left = bytes;
        while left > 0 {
            left -= guest.read(&mut part).await?.min(left);
        }
    } else {
        for _ in 0..bytes / PART {
            guest.write_all(&part).await?;
        }
        guest.read_u8().await?;
    }
    let took = begun.elapsed();
    drop(guest);
    relay.await?;
    Ok(bytes as f64 * 8.0 / took.as_secs_f64() / 1e9)
}

/// Microseconds from the question to the admitted connection, and of a plain dial to the same server.
async fn decision(gateway: &Gateway, server: SocketAddr) -> anyhow::Result<(f64, f64)> {
    let begun = Instant::now();
    let admitted = gateway.connect(HOST, 9000).await?;
    let through = begun.elapsed();
    drop(admitted);
    let begun = Instant::now();
    drop(TcpStream::connect(server).await?);
    let plain = begun.elapsed();
    let micros = |took: Duration| took.as_secs_f64() * 1e6;
    Ok((micros(through), micros(plain)))
}

fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let at = sorted.len().saturating_sub(1) * percent / 100;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let bytes = number("KILN_BENCH_MIB", 1024) << 20;
    let decisions = number("KILN_BENCH_DECISIONS", 5_000);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let server = listener.local_addr()?;
    tokio::spawn(serve(listener, bytes));
    let gateway = gateway(server)?;
    for (name, order) in [("down", b'd'), ("up", b'u')] {
        let mut samples = Vec::new();
        for _ in 0..ROUNDS {
            samples.push(transfer(&gateway, bytes, order).await?);
        }
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let line = serde_json::json!({
            "measure": format!("gateway_{name}"), "unit": "gbit_per_s", "p50": percentile(&sorted, 50), "least": sorted.first(), "samples": samples,
        });
        println!("{line}");
    }
    let (mut through, mut added) = (Vec::new(), Vec::new());
    for _ in 0..decisions {
        let (with, plain) = decision(&gateway, server).await?;
        through.push(with);
        added.push(with - plain);
    }
    for (name, samples) in [("decision_and_dial", through), ("decision_added", added)] {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let line = serde_json::json!({
            "measure": name, "unit": "us", "p50": percentile(&sorted, 50), "p99": percentile(&sorted, 99), "most": sorted.last(), "samples": samples,
        });
        println!("{line}");
    }
    Ok(())
}
