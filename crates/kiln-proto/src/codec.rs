//! Small typed things on a byte stream: JSON messages and tagged chunks.
//!
//! A message is `u32 LE length | JSON`, at most [`MSG_LEN_MAX`] bytes. A chunk is
//! `u8 tag | u32 LE length | body`, at most [`CHUNK_LEN_MAX`] bytes of body; output of commands
//! travels in chunks. Both work on any `AsyncRead` or `AsyncWrite`, a [`crate::Stream`] above all.
//!
//! Readers here are not cancellation-safe: a reader dropped half-way has taken bytes with it.
//! Give each direction of a stream its own task, or finish the read before selecting on it.

use crate::session::CloseReason;
use crate::stream::session_end_of;
use bytes::{Buf, Bytes};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Most bytes of JSON in one message.
pub const MSG_LEN_MAX: usize = 1024 * 1024;
/// Most bytes in the body of one chunk, so that chunk and frame headers fit one frame.
pub const CHUNK_LEN_MAX: usize = 60 * 1024;
/// Bytes allocated before the first bytes of a body arrived; a length alone costs no more.
const FIRST_ALLOCATION: usize = 4096;

/// Why a message or chunk could not be read or written.
#[derive(Debug, Error)]
pub enum CodecError {
    /// The stream ended where a message should begin.
    #[error("the stream ended before the message")]
    Eof,
    /// The stream ended inside a message or chunk.
    #[error("the stream ended inside a message: {missing} of {len} bytes are missing")]
    Truncated {
        /// Bytes that did not come.
        missing: usize,
        /// Bytes the header announced (for a header itself: its own size).
        len: usize,
    },
    /// More bytes than the bound allows.
    #[error("a message of {len} bytes is longer than {max}")]
    TooLong {
        /// Bytes announced or to be written.
        len: usize,
        /// The bound.
        max: usize,
    },
    /// The body is not the expected JSON, or the value has no JSON form.
    #[error("the message is not the JSON expected here")]
    Json(#[source] serde_json::Error),
    /// The stream failed; a reset is in there as [`crate::StreamReset`].
    #[error("the stream failed")]
    Io(#[source] io::Error),
}

impl CodecError {
    /// True if the peer's bytes are at fault, not the transport: those of this message, or those
    /// that ended the session as a protocol error.
    pub fn is_peer_fault(&self) -> bool {
        match self {
            Self::Truncated { .. } | Self::TooLong { .. } | Self::Json(_) => true,
            Self::Io(error) => session_end_of(error).is_some_and(CloseReason::is_peer_fault),
            Self::Eof => false,
        }
    }
}

/// Writes one message and flushes it.
///
/// # Errors
/// [`CodecError::Json`], [`CodecError::TooLong`] beyond [`MSG_LEN_MAX`] (nothing is written
/// then), [`CodecError::Io`].
pub async fn write_msg<T, W>(stream: &mut W, message: &T) -> Result<(), CodecError>
where
    T: Serialize + ?Sized,
    W: AsyncWrite + Unpin + ?Sized,
{
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message).map_err(CodecError::Json)?;
    let len = bytes.len() - 4;
    if len > MSG_LEN_MAX {
        return Err(CodecError::TooLong {
            len,
            max: MSG_LEN_MAX,
        });
    }
    bytes[..4].copy_from_slice(&(len as u32).to_le_bytes());
    stream.write_all(&bytes).await.map_err(CodecError::Io)?;
    stream.flush().await.map_err(CodecError::Io)
}

/// Reads one message of at most `max_len` bytes (and never more than [`MSG_LEN_MAX`]).
///
/// # Errors
/// [`CodecError`]; [`CodecError::Eof`] if the stream ends before the first byte.
pub async fn read_msg<T, R>(stream: &mut R, max_len: usize) -> Result<T, CodecError>
where
    T: DeserializeOwned,
    R: AsyncRead + Unpin + ?Sized,
{
    next_msg(stream, max_len).await?.ok_or(CodecError::Eof)
}

/// Like [`read_msg`], but the end of the stream is `Ok(None)`.
///
/// # Errors
/// [`CodecError`], never [`CodecError::Eof`].
pub async fn next_msg<T, R>(stream: &mut R, max_len: usize) -> Result<Option<T>, CodecError>
where
    T: DeserializeOwned,
    R: AsyncRead + Unpin + ?Sized,
{
    let max = max_len.min(MSG_LEN_MAX);
    let mut header = [0; 4];
    if !read_header(stream, &mut header).await? {
        return Ok(None);
    }
    let body = read_body(stream, u32::from_le_bytes(header), max).await?;
    serde_json::from_slice(&body)
        .map(Some)
        .map_err(CodecError::Json)
}

/// One chunk: a tag and its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// What the bytes are; the meaning belongs to the stream.
    pub tag: u8,
    /// At most [`CHUNK_LEN_MAX`] bytes; may be empty.
    pub body: Bytes,
}

/// Writes one chunk. It does not flush.
///
/// # Errors
/// [`CodecError::TooLong`] beyond [`CHUNK_LEN_MAX`] (nothing is written), [`CodecError::Io`].
pub async fn write_chunk<W>(mut stream: &mut W, tag: u8, body: &[u8]) -> Result<(), CodecError>
where
    W: AsyncWrite + Unpin + ?Sized,
{
    if body.len() > CHUNK_LEN_MAX {
        return Err(CodecError::TooLong {
            len: body.len(),
            max: CHUNK_LEN_MAX,
        });
    }
    let mut header = [tag, 0, 0, 0, 0];
    header[1..].copy_from_slice(&(body.len() as u32).to_le_bytes());
    let mut both = Buf::chain(&header[..], body);
    AsyncWriteExt::write_all_buf(&mut stream, &mut both)
        .await
        .map_err(CodecError::Io)
}

/// Reads one chunk; `Ok(None)` at the end of the stream.
///
/// # Errors
/// [`CodecError`], never [`CodecError::Eof`].
pub async fn read_chunk<R>(stream: &mut R) -> Result<Option<Chunk>, CodecError>
where
    R: AsyncRead + Unpin + ?Sized,
{
    let mut header = [0; 5];
    if !read_header(stream, &mut header).await? {
        return Ok(None);
    }
    let [tag, len @ ..] = header;
    let body = read_body(stream, u32::from_le_bytes(len), CHUNK_LEN_MAX).await?;
    Ok(Some(Chunk {
        tag,
        body: body.into(),
    }))
}

/// Fills `header`; false if the stream ended before its first byte.
async fn read_header<R>(stream: &mut R, header: &mut [u8]) -> Result<bool, CodecError>
where
    R: AsyncRead + Unpin + ?Sized,
{
    let len = header.len();
    let mut filled = 0;
    while filled < len {
        match stream
            .read(&mut header[filled..])
            .await
            .map_err(CodecError::Io)?
        {
            0 if filled == 0 => return Ok(false),
            0 => {
                return Err(CodecError::Truncated {
                    missing: len - filled,
                    len,
                });
            }
            count => filled += count,
        }
    }
    Ok(true)
}

/// Reads a body of `claimed` bytes. Memory grows with what arrives, not with what is claimed.
async fn read_body<R>(stream: &mut R, claimed: u32, max: usize) -> Result<Vec<u8>, CodecError>
where
    R: AsyncRead + Unpin + ?Sized,
{
    let len = claimed as usize;
    if len > max {
        return Err(CodecError::TooLong { len, max });
    }
    let mut body = Vec::with_capacity(len.min(FIRST_ALLOCATION));
    let mut limited = stream.take(u64::from(claimed));
    limited
        .read_to_end(&mut body)
        .await
        .map_err(CodecError::Io)?;
    if body.len() < len {
        return Err(CodecError::Truncated {
            missing: len - body.len(),
            len,
        });
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Greeting {
        name: String,
        count: u32,
    }

    fn greeting() -> Greeting {
        Greeting {
            name: "kiln\n\u{0}".into(),
            count: 7,
        }
    }

    #[tokio::test]
    async fn messages_round_trip_and_end_cleanly() {
        let mut wire = Vec::new();
        write_msg(&mut wire, &greeting()).await.unwrap();
        write_msg(&mut wire, &greeting()).await.unwrap();
        let mut reader = wire.as_slice();
        let first: Greeting = read_msg(&mut reader, 1000).await.unwrap();
        assert_eq!(first, greeting());
        assert_eq!(next_msg(&mut reader, 1000).await.unwrap(), Some(greeting()));
        assert_eq!(
            next_msg::<Greeting, _>(&mut reader, 1000).await.unwrap(),
            None
        );
        let end = read_msg::<Greeting, _>(&mut reader, 1000)
            .await
            .unwrap_err();
        assert!(matches!(end, CodecError::Eof) && !end.is_peer_fault());
    }

    #[tokio::test]
    async fn every_cut_of_a_message_is_a_truncation() {
        let mut wire = Vec::new();
        write_msg(&mut wire, &greeting()).await.unwrap();
        for cut in 1..wire.len() {
            let mut reader = &wire[..cut];
            let error = read_msg::<Greeting, _>(&mut reader, 1000)
                .await
                .unwrap_err();
            assert!(
                matches!(error, CodecError::Truncated { .. }),
                "{cut}: {error}"
            );
            assert!(error.is_peer_fault());
        }
    }

    #[tokio::test]
    async fn long_messages_are_refused_on_both_sides() {
        let mut wire = Vec::new();
        let long = "x".repeat(MSG_LEN_MAX);
        let error = write_msg(&mut wire, &long).await.unwrap_err();
        assert!(matches!(error, CodecError::TooLong { .. }) && wire.is_empty());
        let mut claim = &u32::MAX.to_le_bytes()[..];
        let error = read_msg::<String, _>(&mut claim, usize::MAX)
            .await
            .unwrap_err();
        assert!(
            matches!(
                error,
                CodecError::TooLong {
                    max: MSG_LEN_MAX,
                    ..
                }
            ),
            "{error}"
        );
        write_msg(&mut wire, "abcdef").await.unwrap();
        let error = read_msg::<String, _>(&mut wire.as_slice(), 7)
            .await
            .unwrap_err();
        assert!(
            matches!(error, CodecError::TooLong { len: 8, max: 7 }),
            "{error}"
        );
        let error = read_msg::<u8, _>(&mut wire.as_slice(), 8)
            .await
            .unwrap_err();
        assert!(matches!(error, CodecError::Json(_)), "{error}");
    }

    #[tokio::test]
    async fn chunks_round_trip_with_their_bounds() {
        let big = vec![9; CHUNK_LEN_MAX];
        let mut wire = Vec::new();
        write_chunk(&mut wire, 1, &[]).await.unwrap();
        write_chunk(&mut wire, 2, &big).await.unwrap();
        let too_big = vec![0; CHUNK_LEN_MAX + 1];
        assert!(write_chunk(&mut wire, 3, &too_big).await.is_err());
        let mut reader = wire.as_slice();
        let first = read_chunk(&mut reader).await.unwrap().unwrap();
        assert_eq!(
            first,
            Chunk {
                tag: 1,
                body: Bytes::new()
            }
        );
        let second = read_chunk(&mut reader).await.unwrap().unwrap();
        assert_eq!(
            second,
            Chunk {
                tag: 2,
                body: big.into()
            }
        );
        assert_eq!(read_chunk(&mut reader).await.unwrap(), None);
        let mut claim = &[1, 1, 0xf0, 0, 0][..];
        let error = read_chunk(&mut claim).await.unwrap_err();
        assert!(
            matches!(error, CodecError::TooLong { len: 0xf001, .. }),
            "{error}"
        );
    }
}
