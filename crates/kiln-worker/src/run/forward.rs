//! Ports of this host that lead into a run's machine.

use std::sync::Arc;
use std::time::Duration;

use kiln_proto::kept::Refused;
use kiln_proto::msg::{ConnectReply, Forward, kind};
use kiln_proto::{Session, Stream, codec};
use tokio::net::{TcpListener, TcpStream};

use crate::orders;

/// Connections one forwarded port serves at once.
pub const FORWARDS_MAX: usize = 128;
/// Longest wait for a port's connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Most characters of a guest's reason that are passed on.
const REASON_CHARS_MAX: usize = 400;

/// Serves one forwarded port until it is aborted.
pub(super) async fn forward(session: Session, listener: TcpListener, port: u16) {
    let slots = Arc::new(tokio::sync::Semaphore::new(FORWARDS_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let Ok((client, _)) = listener.accept().await else {
            continue;
        };
        let session = session.clone();
        tokio::spawn(async move {
            let _slot = slot;
            // A client's broken connection is the client's to see.
            let _ended = forward_one(&session, client, port).await;
        });
    }
}

async fn forward_one(session: &Session, mut client: TcpStream, port: u16) -> std::io::Result<()> {
    let payload = serde_json::to_vec(&Forward { port })?;
    let mut stream = session
        .open(kind::FORWARD, &payload)
        .await
        .map_err(std::io::Error::other)?;
    let reply: ConnectReply = codec::read_msg(&mut stream, orders::REPLY_BYTES_MAX)
        .await
        .map_err(std::io::Error::other)?;
    if reply == ConnectReply::Connected {
        client.set_nodelay(true)?;
        kiln_proto::relay::relay(&mut stream, &mut client).await?;
    }
    Ok(())
}

/// Connects to a port of a machine, for whoever asked from elsewhere.
///
/// # Errors
/// In the guest's words, where it has some.
pub(crate) async fn connect(session: &Session, port: u16) -> Result<Stream, Refused> {
    let failed = |error: &dyn std::error::Error| Refused::failed(orders::chain(error));
    let connected = async {
        let payload = serde_json::to_vec(&Forward { port }).map_err(|error| failed(&error))?;
        let opened = session.open(kind::FORWARD, &payload).await;
        let mut stream = opened.map_err(|error| failed(&error))?;
        let reply = codec::read_msg::<ConnectReply, _>(&mut stream, orders::REPLY_BYTES_MAX).await;
        match reply.map_err(|error| failed(&error))? {
            ConnectReply::Connected => Ok(stream),
            ConnectReply::Refused { reason } => {
                let reason: String = reason.chars().take(REASON_CHARS_MAX).collect();
                let message = format!("port {port} of the machine: {reason}");
                Err(Refused::failed(message))
            }
        }
    };
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, connected).await;
    connected.unwrap_or_else(|_| {
        let message = format!("port {port} of the machine does not answer");
        Err(Refused::failed(message))
    })
}
