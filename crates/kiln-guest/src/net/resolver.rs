//! The DNS server: UDP and TCP on the nameserver's address, the host decides which names exist.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_core::network::normal_host;
use kiln_proto::codec;
use kiln_proto::msg::{Resolve, ResolveReply, kind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::dns::{Answer, Malformed, QUERY_MAX, Query};
use super::{NAMESERVER, Net, lock};
use crate::error::{Context, SysError};
use crate::log;
use crate::state::Guest;

const PORT: u16 = 53;
/// Questions that are answered at the same time; more are dropped, and asked again by who cares.
const QUERIES_MAX: usize = 64;
/// DNS connections at the same time.
const CONNECTIONS_MAX: usize = 32;
/// How long the host may take to say whether a name exists. Below the 5 s of usual resolvers.
const RESOLVE_WAIT: Duration = Duration::from_secs(4);
/// How long a DNS connection may be silent.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// Most bytes of the host's answer.
const REPLY_MAX: usize = 4096;

/// Binds both sockets and serves them from now on.
pub(super) fn start(guest: &Arc<Guest>) -> Result<(), SysError> {
    let what = || format!("listen for DNS on {NAMESERVER}");
    let udp = std::net::UdpSocket::bind((NAMESERVER, PORT)).context(what)?;
    let tcp = std::net::TcpListener::bind((NAMESERVER, PORT)).context(what)?;
    udp.set_nonblocking(true).context(what)?;
    tcp.set_nonblocking(true).context(what)?;
    let udp = UdpSocket::from_std(udp).context(what)?;
    let tcp = TcpListener::from_std(tcp).context(what)?;
    tokio::spawn(serve_udp(Arc::clone(guest), Arc::new(udp)));
    tokio::spawn(serve_tcp(Arc::clone(guest), tcp));
    Ok(())
}

async fn serve_udp(guest: Arc<Guest>, socket: Arc<UdpSocket>) {
    let room = Arc::new(Semaphore::new(QUERIES_MAX));
    let mut buffer = [0; QUERY_MAX + 1];
    loop {
        let Ok((len, from)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            continue;
        };
        let (guest, socket, bytes) = (
            Arc::clone(&guest),
            Arc::clone(&socket),
            buffer[..len].to_vec(),
        );
        tokio::spawn(async move {
            let _permit: OwnedSemaphorePermit = permit;
            if let Some(reply) = answer(&guest.net, &bytes).await {
                let _asker_gone = socket.send_to(&reply, from).await;
            }
        });
    }
}

async fn serve_tcp(guest: Arc<Guest>, listener: TcpListener) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let guest = Arc::clone(&guest);
                tokio::spawn(async move {
                    let _permit = permit;
                    let _asker_gone = serve_connection(&guest.net, stream).await;
                });
            }
            Err(error) => {
                log::warn(&format!("DNS over TCP: {error}"));
                tokio::time::sleep(super::relay::ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_connection(net: &Net, mut stream: TcpStream) -> std::io::Result<()> {
    loop {
        let mut query = Vec::new();
        let read = async {
            let len = u64::from(stream.read_u16().await?);
            (&mut stream)
                .take(len.min(QUERY_MAX as u64 + 1))
                .read_to_end(&mut query)
                .await
        };
        tokio::time::timeout(IDLE_MAX, read).await??;
        let Some(reply) = answer(net, &query).await else {
            return Ok(());
        };
        let mut message = (reply.len() as u16).to_be_bytes().to_vec();
        message.extend_from_slice(&reply);
        stream.write_all(&message).await?;
    }
}

async fn answer(net: &Net, bytes: &[u8]) -> Option<Vec<u8>> {
    match Query::parse(bytes) {
        Err(Malformed::Silence) => None,
        Err(Malformed::Reply(reply)) => Some(reply),
        Ok(query) => Some(query.reply(look_up(net, &query.name).await)),
    }
}

async fn look_up(net: &Net, name: &str) -> Answer {
    if name == "localhost" || name.ends_with(".localhost") {
        return Answer::Address(Ipv4Addr::LOCALHOST);
    }
    let Some(name) = normal_host(name).filter(|name| !name.ends_with(".arpa")) else {
        return Answer::NoName;
    };
    let remembered = lock(&net.verdicts).get(&name, Instant::now());
    let known = match remembered {
        Some(known) => Some(known),
        None => ask_host(net, &name).await,
    };
    match known {
        Some(true) => Answer::Address(lock(&net.names).address(&name)),
        Some(false) => Answer::NoName,
        None => Answer::Failure,
    }
}

async fn ask_host(net: &Net, name: &str) -> Option<bool> {
    let session = net.session()?;
    let payload = serde_json::to_vec(&Resolve {
        host: name.to_owned(),
    })
    .ok()?;
    let ask = async {
        let mut stream = session.open(kind::RESOLVE, &payload).await.ok()?;
        let _half_closed = stream.shutdown().await;
        codec::read_msg::<ResolveReply, _>(&mut stream, REPLY_MAX)
            .await
            .ok()
    };
    let reply = tokio::time::timeout(RESOLVE_WAIT, ask).await.ok()??;
    lock(&net.verdicts).put(name, reply.known, Instant::now());
    Some(reply.known)
}
