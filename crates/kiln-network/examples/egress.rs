//! Tries the gateway by hand: what a guest's stream would see, offered on a loopback port.
//!
//! `cargo run -p kiln-network --example egress -- REGISTRIES_TOML HOST PORT CONNECTIONS`, then for example
//! `curl --connect-to HOST:PORT:127.0.0.1:PRINTED_PORT https://HOST/`. Ends after that many connections and
//! prints what was recorded.
#![expect(clippy::print_stdout, reason = "an example prints")]

use std::sync::Arc;

use anyhow::Context as _;
use kiln_core::NetworkPolicy;
use kiln_network::registries::{Registries, Runtime};
use kiln_network::{EgressLog, Gateway, GatewayConfig, summary};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut next = |what| args.next().with_context(|| format!("{what} is missing"));
    let registries = Registries::parse(&std::fs::read_to_string(next("registries.toml")?)?)?;
    let (host, port) = (next("host")?, next("port")?.parse::<u16>()?);
    let connections: usize = next("number of connections")?.parse()?;
    let log = Arc::new(EgressLog::new());
    let rules = Runtime::ALL
        .iter()
        .flat_map(|runtime| registries.rules(*runtime));
    let mut config = GatewayConfig::new(NetworkPolicy::from_rules(rules), log.clone());
    config.exceptions = registries.exceptions();
    let gateway = Gateway::new(config);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?.port());
    for _ in 0..connections {
        let (guest, _) = listener.accept().await?;
        match gateway.connect(&host, port).await {
            Ok(admitted) => println!("{:?}", admitted.relay(Box::new(guest)).await),
            Err(refusal) => println!("refused: {refusal}"),
        }
    }
    let record = log.snapshot();
    println!("{:#?}\n{}", record.events, summary(&record.events));
    Ok(())
}
