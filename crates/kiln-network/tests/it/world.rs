//! A small internet: names with public addresses, and loopback servers that the dialer puts behind them.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_core::network::{EgressEvent, EgressVerdict, NetworkPolicy};
use kiln_network::gateway::dial::{BoxedDuplex, Dialer, Resolver};
use kiln_network::gateway::{Admitted, Gateway, GatewayConfig, HostShare, RelayReport};
use kiln_network::record::EgressLog;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A public address used for every test server.
pub(crate) const PUBLIC: &str = "8.8.4.4";
/// No test step may take longer.
pub(crate) const STEP_MAX: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Map {
    /// Answers per name: one list per question; the last one is repeated.
    names: HashMap<String, Vec<Vec<IpAddr>>>,
    asked: HashMap<String, usize>,
    /// How many questions about a name still fail, as when its server has trouble.
    failing: HashMap<String, usize>,
    servers: HashMap<SocketAddr, SocketAddr>,
    dialled: Vec<SocketAddr>,
}

#[derive(Clone, Default)]
pub(crate) struct World(Arc<Mutex<Map>>);

impl World {
    fn map(&self) -> std::sync::MutexGuard<'_, Map> {
        self.0.lock().expect("no panics inside")
    }

    pub(crate) fn name(&self, name: &str, answers: &[&[&str]]) {
        let parse = |list: &&[&str]| {
            let addrs = list.iter().map(|text| text.parse().expect("address"));
            addrs.collect::<Vec<IpAddr>>()
        };
        let answers = answers.iter().map(parse).collect();
        self.map().names.insert(name.to_owned(), answers);
    }

    /// The next so many questions about this name get no answer.
    pub(crate) fn fails(&self, name: &str, times: usize) {
        self.map().failing.insert(name.to_owned(), times);
    }

    pub(crate) fn asked(&self, name: &str) -> usize {
        self.map().asked.get(name).copied().unwrap_or_default()
    }

    /// Listens on loopback behind `public`.
    pub(crate) async fn listen(&self, public: &str) -> TcpListener {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let real = listener.local_addr().expect("address");
        let public = public.parse().expect("address");
        self.map().servers.insert(public, real);
        listener
    }

    /// A server at `public` that does `serve` with each connection.
    pub(crate) async fn server<F, Fut>(&self, public: &str, serve: F) -> JoinHandle<()>
    where
        F: Fn(TcpStream) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let listener = self.listen(public).await;
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream));
            }
        })
    }

    pub(crate) fn dialled(&self) -> Vec<SocketAddr> {
        self.map().dialled.clone()
    }

    /// Without a share of its own, it has one: what a test of another clock waits for would be waited for here.
    pub(crate) fn gateway(&self, mut config: GatewayConfig) -> Gateway {
        if Arc::ptr_eq(&config.share, &HostShare::of_process()) {
            config.share = Arc::default();
        }
        Gateway::with_network(config, Arc::new(self.clone()), Arc::new(self.clone()))
    }
}

impl Resolver for World {
    fn resolve<'a>(&'a self, host: &'a str) -> Boxed<'a, io::Result<Vec<IpAddr>>> {
        let mut map = self.map();
        let turn = map.asked.entry(host.to_owned()).or_default();
        let now = *turn;
        *turn += 1;
        if let Some(left @ 1..) = map.failing.get_mut(host) {
            *left -= 1;
            return Box::pin(async { Err(io::Error::other("SERVFAIL")) });
        }
        let answer = map
            .names
            .get(host)
            .map(|lists| lists[now.min(lists.len() - 1)].clone());
        Box::pin(async move { answer.ok_or_else(|| io::ErrorKind::NotFound.into()) })
    }
}

impl Dialer for World {
    fn dial(&self, addr: SocketAddr) -> Boxed<'static, io::Result<BoxedDuplex>> {
        let mut map = self.map();
        map.dialled.push(addr);
        let real = map.servers.get(&addr).copied();
        Box::pin(async move {
            let real = real.ok_or(io::ErrorKind::ConnectionRefused)?;
            Ok(Box::new(TcpStream::connect(real).await?) as BoxedDuplex)
        })
    }
}

pub(crate) fn policy(rules: &[&str]) -> NetworkPolicy {
    NetworkPolicy::from_rules(rules.iter().map(|rule| rule.parse().expect("rule")))
}

/// A configuration with these rules, and its log.
pub(crate) fn config(rules: &[&str]) -> (GatewayConfig, Arc<EgressLog>) {
    let log = Arc::new(EgressLog::new());
    (GatewayConfig::new(policy(rules), log.clone()), log)
}

/// The guest's end of a running relay.
pub(crate) struct Guest {
    pub(crate) stream: DuplexStream,
    relay: JoinHandle<RelayReport>,
}

impl Guest {
    pub(crate) fn start(admitted: Admitted) -> Self {
        let (guest, host) = tokio::io::duplex(64 * 1024);
        Self {
            stream: guest,
            relay: tokio::spawn(admitted.relay(Box::new(host))),
        }
    }

    /// The guest's stream alone; the relay goes on.
    pub(crate) fn take_stream(&mut self) -> DuplexStream {
        std::mem::replace(&mut self.stream, tokio::io::duplex(1).0)
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        timeout(STEP_MAX, self.stream.write_all(bytes))
            .await
            .expect("in time")
            .expect("sent");
    }

    /// Reads until the relay closes the guest's side.
    pub(crate) async fn read_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let read = self.stream.read_to_end(&mut all);
        timeout(STEP_MAX, read)
            .await
            .expect("in time")
            .expect("read");
        all
    }

    pub(crate) async fn read_some(&mut self, len: usize) -> Vec<u8> {
        let mut all = vec![0; len];
        let read = self.stream.read_exact(&mut all);
        timeout(STEP_MAX, read)
            .await
            .expect("in time")
            .expect("read");
        all
    }

    pub(crate) async fn report(self) -> RelayReport {
        drop(self.stream);
        timeout(STEP_MAX, self.relay)
            .await
            .expect("in time")
            .expect("no panic")
    }

    /// Waits for the end while the guest keeps its side open.
    pub(crate) async fn report_open(self) -> RelayReport {
        let report = timeout(STEP_MAX, self.relay)
            .await
            .expect("in time")
            .expect("no panic");
        drop(self.stream);
        report
    }
}

pub(crate) fn verdicts(log: &EgressLog) -> Vec<EgressVerdict> {
    events(log).into_iter().map(|event| event.verdict).collect()
}

pub(crate) fn events(log: &EgressLog) -> Vec<EgressEvent> {
    log.snapshot().events
}

/// Echoes until the client ends, then ends.
pub(crate) async fn echo(mut stream: TcpStream) {
    let (mut from, mut to) = stream.split();
    let _ = tokio::io::copy(&mut from, &mut to).await;
    let _ = to.shutdown().await;
}

/// Collects everything and answers with its length.
pub(crate) async fn count(mut stream: TcpStream) {
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all).await;
    let _ = stream
        .write_all(format!("got {}", all.len()).as_bytes())
        .await;
}
