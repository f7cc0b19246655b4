//! What goes through the egress gateway: from and to a real machine, end to end, and beside it the host's half alone in the same run.
//!
//! The server is the benchmark's own, at an address of this host that is not loopback, which no exception covers. Its name resolves here alone;
//! policy, floor and dialling are those of every job. Both halves use one gateway, one server and one number of bytes, and take turns.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_core::FailureClass;
use kiln_core::network::{NetworkPolicy, RangeException};
use kiln_machine::bring_up::Ready;
use kiln_network::gateway::dial::{Resolver, TcpDialer};
use kiln_network::{BoxFuture, EgressLog, Gateway, GatewayConfig};
use kiln_proto::Session;
use kiln_proto::msg::ExecRequest;
use kiln_worker::orders::{self, ExecIo};
use kiln_worker::services::Services;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::mpsc;

use super::Bench;
use super::machines::Machines;
use super::report::Report;
use super::series::{Promise, Unit};
use crate::error::{CliError, OrInfrastructure as _, Result};

/// The name that the machine asks for.
const NAME: &str = "server.example.org";
/// An address that nobody has (RFC 5737): asking for the way to it sends nothing.
const ELSEWHERE: &str = "198.51.100.1:9";
/// Bytes of one transfer.
const BYTES: usize = 32 * 1024 * 1024;
/// Bytes that a side reads or writes at once.
const PART: usize = 128 * 1024;
/// Longest time for one transfer.
const TRANSFER_MAX: Duration = Duration::from_secs(120);
/// What the host's half is promised to carry, bytes per second.
const HOST_HALF: f64 = 125e6;
/// Most bytes that a command says.
const SAID_MAX: usize = 4096;
/// Reads everything and says how much that was; or writes as much as it is told to and waits for the answer.
const CLIENT: &str = r#"set -e
exec 3<>"/dev/tcp/$1/$2"; printf %s "$3" >&3
if [ "$3" = d ]; then wc -c <&3
else dd if=/dev/zero bs=128k count="$4" status=none >&3; head -c 1 <&3 >/dev/null; echo sent; fi"#;

/// Which way the bytes go, seen from the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Down,
    Up,
}

impl Way {
    /// The byte by which a client asks for it.
    fn order(self) -> u8 {
        match self {
            Self::Down => b'd',
            Self::Up => b'u',
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Up => "up",
        }
    }
}

/// Every name is the server's address.
#[derive(Clone, Copy, Debug)]
struct Here(IpAddr);

impl Resolver for Here {
    fn resolve<'a>(&'a self, _: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async { Ok(vec![self.0]) })
    }
}

/// `egress`.
pub(super) async fn egress(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let Some(address) = own_address() else {
        let why = "egress: left out, as this host has no IPv4 address besides loopback";
        bench.screen.note(why);
        return Ok(());
    };
    let listener = TcpListener::bind((address, 0)).await.or_infrastructure()?;
    let server = listener.local_addr().or_infrastructure()?;
    let gateway = gateway(server)?;
    let machines = bench
        .unless_cancelled(Machines::open(bench, report))
        .await?;
    let ticket = bench.unless_cancelled(machines.ticket()).await?;
    let Ready {
        machine,
        session,
        incoming,
        ..
    } = bench
        .unless_cancelled(machines.start(&machines.clone()))
        .await?;
    let services = Services::new(gateway.clone(), machines.events());
    let serving = services.serve(incoming);
    let turns = async {
        for _ in 0..bench.samples {
            for way in [Way::Down, Way::Up] {
                turn(&gateway, &session, &listener, way, report).await?;
            }
        }
        Ok(())
    };
    let measured = bench.unless_cancelled(turns).await;
    machines.put_away(&*machine, &session).await;
    serving.abort();
    drop((services, ticket));
    machines.close().await;
    measured
}

/// The address from which this host would talk to others.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect(ELSEWHERE).ok()?;
    let own = socket.local_addr().ok()?.ip();
    (!own.is_loopback() && !own.is_unspecified()).then_some(own)
}

fn gateway(server: SocketAddr) -> Result<Gateway> {
    let rule = format!("{NAME}:{}/raw", server.port());
    let rule = rule.parse().or_infrastructure()?;
    let policy = NetworkPolicy::from_rules(vec![rule]);
    let mut config = GatewayConfig::new(policy, Arc::new(EgressLog::new()));
    config.exceptions = vec![RangeException {
        host: NAME.to_owned(),
        range: server.ip().into(),
    }];
    let here = Arc::new(Here(server.ip()));
    Ok(Gateway::with_network(config, here, Arc::new(TcpDialer)))
}

/// The host's half, then the whole way.
async fn turn(
    gateway: &Gateway,
    session: &Session,
    listener: &TcpListener,
    way: Way,
    report: &mut Report,
) -> Result<()> {
    let port = listener.local_addr().or_infrastructure()?.port();
    let half = timed(serve(listener, way), from_here(gateway, port, way)).await?;
    let whole = timed(serve(listener, way), from_machine(session, port, way)).await?;
    let promise = Some(Promise::MedianAtLeast(HOST_HALF));
    let name = format!("{}: gateway's host half", way.name());
    report.add(&name, Unit::BytesPerSecond, promise, half);
    let name = format!("{}: a machine, end to end", way.name());
    report.add(&name, Unit::BytesPerSecond, None, whole);
    Ok(())
}

/// Bytes per second of a transfer as its server saw it.
async fn timed(
    server: impl Future<Output = io::Result<Duration>>,
    client: impl Future<Output = Result<()>>,
) -> Result<f64> {
    let both = async {
        let server = async { server.await.or_infrastructure() };
        tokio::try_join!(server, client)
    };
    let ended = tokio::time::timeout(TRANSFER_MAX, both).await;
    let (took, ()) = ended.or_infrastructure()??;
    #[expect(clippy::cast_precision_loss, reason = "few bytes")]
    let bytes = BYTES as f64;
    Ok(bytes / took.as_secs_f64())
}

/// Serves one client, from its order until the last byte was taken.
async fn serve(listener: &TcpListener, way: Way) -> io::Result<Duration> {
    let (mut stream, _) = listener.accept().await?;
    let mut part = vec![0; PART];
    if stream.read_u8().await? != way.order() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let began = Instant::now();
    let took = match way {
        Way::Down => {
            for _ in 0..BYTES / PART {
                stream.write_all(&part).await?;
            }
            stream.shutdown().await?;
            // The client ends its side once it has everything.
            while stream.read(&mut part).await? > 0 {}
            began.elapsed()
        }
        Way::Up => {
            take(&mut stream, &mut part).await?;
            let took = began.elapsed();
            stream.write_u8(1).await?;
            took
        }
    };
    Ok(took)
}

/// Takes every byte of a transfer.
async fn take(from: &mut (impl tokio::io::AsyncRead + Unpin), part: &mut [u8]) -> io::Result<()> {
    let mut left = BYTES;
    while left > 0 {
        match from.read(part).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => left -= count.min(left),
        }
    }
    Ok(())
}

/// A client in this process, where else a machine's stream is.
async fn from_here(gateway: &Gateway, port: u16, way: Way) -> Result<()> {
    let (mut client, machine) = UnixStream::pair().or_infrastructure()?;
    let admitted = gateway.connect(NAME, port).await.or_infrastructure()?;
    let relay = tokio::spawn(admitted.relay(Box::new(machine)));
    let talk = async {
        let mut part = vec![0; PART];
        client.write_u8(way.order()).await?;
        if way == Way::Down {
            take(&mut client, &mut part).await?;
        } else {
            for _ in 0..BYTES / PART {
                client.write_all(&part).await?;
            }
            client.read_u8().await?;
        }
        client.shutdown().await
    };
    talk.await.or_infrastructure()?;
    drop(client);
    relay.await.or_infrastructure()?;
    Ok(())
}

/// A client in the machine.
async fn from_machine(session: &Session, port: u16, way: Way) -> Result<()> {
    let order = char::from(way.order()).to_string();
    let (port, parts) = (port.to_string(), (BYTES / PART).to_string());
    let words = ["bash", "-c", CLIENT, "bash", NAME, &port, &order, &parts];
    let request = ExecRequest {
        argv: words.map(str::to_owned).to_vec(),
        env: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
        ..ExecRequest::default()
    };
    let (output, mut chunks) = mpsc::channel(4);
    let (_open, control) = mpsc::channel(1);
    let io = ExecIo {
        stdin: None,
        output,
        control,
    };
    let mut said = Vec::new();
    let hear = async {
        while let Some((_, chunk)) = chunks.recv().await {
            let room = SAID_MAX.saturating_sub(said.len()).min(chunk.len());
            said.extend_from_slice(&chunk[..room]);
        }
    };
    let running = orders::exec(session, "measure", &request, io);
    let (ended, ()) = tokio::join!(running, hear);
    let exit = ended.or_infrastructure()?;
    let said = String::from_utf8_lossy(&said);
    let wanted = match way {
        Way::Down => BYTES.to_string(),
        Way::Up => "sent".to_owned(),
    };
    if exit.code == Some(0) && said.trim() == wanted {
        return Ok(());
    }
    let what = format!("the machine's client ended with {exit:?}: {}", said.trim());
    Err(CliError::new(FailureClass::Infrastructure, what))
}
