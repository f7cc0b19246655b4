//! A stream joined with a connection: what either side says reaches the other, each direction to its own end.
//!
//! Not `tokio::io::copy_bidirectional`: that gives up both directions at the first error of either. A peer that answers, ends its
//! direction and drops the stream has said all it wants to say, and its Reset may arrive together with the answer; the
//! error that the other direction then meets must not take the answer away.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};

use crate::stream::Stream;

/// Bytes on their way in each direction.
pub const RELAY_BUFFER: usize = 64 * 1024;

/// Which side of a direction broke.
enum Broke {
    Reading(io::Error),
    Writing(io::Error),
}

/// Copies both ways until both directions have ended. What the peer said before it dropped the stream reaches the connection.
///
/// # Errors
/// The connection broke, or the peer reset the stream before the end of what it had to say.
pub async fn relay<C>(stream: &mut Stream, connection: &mut C) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let (mut stream_in, mut stream_out) = split(stream);
    let (mut connection_in, mut connection_out) = split(connection);
    let to_peer = async {
        match one_way(&mut connection_in, &mut stream_out).await {
            // A stream takes nothing after its Reset or the session's end only: the other direction learns of both, after
            // everything that came before.
            Ok(()) | Err(Broke::Writing(_)) => Ok(()),
            Err(Broke::Reading(error)) => Err(error),
        }
    };
    let from_peer = async {
        let copied = one_way(&mut stream_in, &mut connection_out).await;
        copied.map_err(|(Broke::Reading(error) | Broke::Writing(error))| error)
    };
    tokio::try_join!(to_peer, from_peer).map(drop)
}

/// Neither kind of side needs a flush before its end.
async fn one_way(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> Result<(), Broke> {
    let mut buffer = vec![0; RELAY_BUFFER];
    loop {
        let count = from.read(&mut buffer).await.map_err(Broke::Reading)?;
        if count == 0 {
            return to.shutdown().await.map_err(Broke::Writing);
        }
        let written = to.write_all(&buffer[..count]).await;
        written.map_err(Broke::Writing)?;
    }
}
