//! Ports of this host that lead into a run's machine.

use std::sync::Arc;

use kiln_proto::msg::{ConnectReply, Forward, kind};
use kiln_proto::{Session, codec};
use tokio::net::{TcpListener, TcpStream};

use crate::orders;

/// Connections one forwarded port serves at once.
pub const FORWARDS_MAX: usize = 128;

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
