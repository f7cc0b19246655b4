//! A stream joined with a connection, or two connections: what either side says reaches the other, each direction to its own end.
//!
//! Not `tokio::io::copy_bidirectional`: that gives up both directions at the first error of either, and what it had read and not
//! written yet. A peer that answers, ends its direction and drops the stream has said all it wants to say, and its Reset may arrive
//! together with the answer; the error that the other direction then meets must not take the answer away.

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
        // A stream takes nothing after its Reset or the session's end only: the other direction learns of both, after
        // everything that came before.
        unless_full(one_way(&mut connection_in, &mut stream_out, &|| {}).await)
    };
    let from_peer = async {
        let copied = one_way(&mut stream_in, &mut connection_out, &|| {}).await;
        copied.map_err(|(Broke::Reading(error) | Broke::Writing(error))| error)
    };
    tokio::try_join!(to_peer, from_peer).map(drop)
}

/// Joins two connections until both directions have ended; `moved` is told of each piece that went either way. A side that takes nothing
/// more ends that direction alone: what it says itself still arrives.
///
/// # Errors
/// A side broke off what it had to say. Everything before that reached the other.
pub async fn join<A, B>(a: &mut A, b: &mut B, moved: impl Fn()) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut a_in, mut a_out) = split(a);
    let (mut b_in, mut b_out) = split(b);
    let to_b = async { unless_full(one_way(&mut a_in, &mut b_out, &moved).await) };
    let to_a = async { unless_full(one_way(&mut b_in, &mut a_out, &moved).await) };
    tokio::try_join!(to_b, to_a).map(drop)
}

/// A direction whose far side takes nothing more is over, as one that was said whole.
fn unless_full(ended: Result<(), Broke>) -> io::Result<()> {
    match ended {
        Ok(()) | Err(Broke::Writing(_)) => Ok(()),
        Err(Broke::Reading(error)) => Err(error),
    }
}

/// Each piece is flushed: what was read has been said when the next piece is waited for.
async fn one_way(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    moved: &impl Fn(),
) -> Result<(), Broke> {
    let mut buffer = vec![0; RELAY_BUFFER];
    loop {
        let count = from.read(&mut buffer).await.map_err(Broke::Reading)?;
        if count == 0 {
            return to.shutdown().await.map_err(Broke::Writing);
        }
        to.write_all(&buffer[..count])
            .await
            .map_err(Broke::Writing)?;
        to.flush().await.map_err(Broke::Writing)?;
        moved();
    }
}
