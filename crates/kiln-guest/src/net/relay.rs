//! TCP between programs in the machine and the host, in both directions.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_proto::codec;
use kiln_proto::msg::{CONNECTIONS_MOST, Connect, ConnectReply, Forward, OTHER_STREAMS, kind};
use kiln_proto::stream::Stream;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::{Net, lock, steer};
use crate::error::{Context, SysError};
use crate::log;
use crate::state::Guest;

/// Connections to the host at the same time, unless it allows more. More wait in the kernel's queue.
pub(crate) const CONNECTIONS_MAX: usize = 192;
/// Pause after a failed accept, which the kernel reports when it is short of something.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long the host may take to connect.
const CONNECT_WAIT: Duration = Duration::from_secs(60);
/// How long a program in the machine may take to accept the host's connection.
const FORWARD_WAIT: Duration = Duration::from_secs(5);
/// Most bytes of the host's answer.
const REPLY_MAX: usize = 16 * 1024;

/// Takes every TCP connection to a synthetic address from now on.
pub(super) fn start(guest: &Arc<Guest>) -> Result<(), SysError> {
    let what = || "listen for connections to names".to_owned();
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context(what)?;
    listener.set_nonblocking(true).context(what)?;
    steer::attach(&listener)?;
    let listener = TcpListener::from_std(listener).context(what)?;
    tokio::spawn(accept(Arc::clone(guest), listener));
    Ok(())
}

async fn accept(guest: Arc<Guest>, listener: TcpListener) {
    let room = Arc::clone(&guest.net.room.places);
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((program, _)) => {
                let guest = Arc::clone(&guest);
                tokio::spawn(async move {
                    let _permit = permit;
                    let _counted = guest.count_stream();
                    connect(&guest, program).await;
                });
            }
            Err(error) => {
                log::warn(&format!("connections to names: {error}"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// How many connections there may be.
#[derive(Debug)]
pub(super) struct Room {
    places: Arc<Semaphore>,
    most: Mutex<usize>,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            places: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            most: Mutex::new(CONNECTIONS_MAX),
        }
    }
}

impl Net {
    /// Allows this many connections, never fewer than before.
    pub(crate) fn allow_connections(&self, most: u32) {
        let most = usize::try_from(most.min(CONNECTIONS_MOST)).unwrap_or(CONNECTIONS_MAX);
        if let Some(session) = self.session() {
            session.may_open(most + OTHER_STREAMS);
        }
        let mut now = lock(&self.room.most);
        self.room.places.add_permits(most.saturating_sub(*now));
        *now = most.max(*now);
    }
}

async fn connect(guest: &Guest, mut program: TcpStream) {
    let finished = match open(guest, &program).await {
        Ok(mut host) => relay(&mut program, &mut host).await,
        Err(why) => {
            log::debug(&why);
            false
        }
    };
    if !finished {
        abort(&program);
    }
}

/// Asks the host for the connection that a program wants.
async fn open(guest: &Guest, program: &TcpStream) -> Result<Stream, String> {
    // The steered connection's own address is where the program meant to go.
    let Ok(SocketAddr::V4(target)) = program.local_addr() else {
        return Err("a connection without a target".to_owned());
    };
    let named = lock(&guest.net.names).name(*target.ip());
    let host = named.ok_or_else(|| format!("{target} stands for no name"))?;
    let session = guest
        .net
        .session()
        .ok_or_else(|| "no host is connected".to_owned())?;
    let request = Connect {
        host,
        port: target.port(),
    };
    let payload = serde_json::to_vec(&request).map_err(|error| error.to_string())?;
    let ask = async {
        let mut stream = session
            .open(kind::CONNECT, &payload)
            .await
            .map_err(|error| error.to_string())?;
        match codec::read_msg::<ConnectReply, _>(&mut stream, REPLY_MAX).await {
            Ok(ConnectReply::Connected) => Ok(stream),
            Ok(ConnectReply::Refused { reason }) => Err(format!(
                "{}:{} was refused: {reason}",
                request.host, request.port
            )),
            Err(error) => Err(error.to_string()),
        }
    };
    tokio::time::timeout(CONNECT_WAIT, ask)
        .await
        .unwrap_or_else(|_| Err("the host did not connect in time".to_owned()))
}

/// Copies both ways, each direction to its own end. False when a side broke off.
async fn relay(program: &mut TcpStream, host: &mut Stream) -> bool {
    let _delays_stay = program.set_nodelay(true);
    kiln_proto::relay::relay(host, program).await.is_ok()
}

/// Makes the close that follows a reset instead of an orderly end.
fn abort(program: &TcpStream) {
    let _already_gone = rustix::net::sockopt::set_socket_linger(program, Some(Duration::ZERO));
}

/// Serves one connection of the host to a port in the machine.
pub(crate) async fn forward(request: Forward, mut host: Stream) {
    let connecting = TcpStream::connect((Ipv4Addr::LOCALHOST, request.port));
    let connected = match tokio::time::timeout(FORWARD_WAIT, connecting).await {
        Ok(Ok(program)) => Ok(program),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_late) => Err("it does not accept connections".to_owned()),
    };
    let mut program = match connected {
        Ok(program) => program,
        Err(why) => {
            let reason = format!("port {}: {why}", request.port);
            let _host_gone = codec::write_msg(&mut host, &ConnectReply::Refused { reason }).await;
            let _host_gone = host.shutdown().await;
            return;
        }
    };
    if codec::write_msg(&mut host, &ConnectReply::Connected)
        .await
        .is_err()
    {
        return;
    }
    if !relay(&mut program, &mut host).await {
        abort(&program);
    }
}
