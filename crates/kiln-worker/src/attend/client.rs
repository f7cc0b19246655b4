//! The attender's side: holds a command's streams until it is over.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_proto::codec::{self, CodecError};
use kiln_proto::kept::Ask;
use kiln_proto::kept::attend::{
    ALIVE, ALIVE_EVERY, OVER, RESIZE, ROOM, SIGNAL, STDERR, STDIN, STDIN_END, STDIN_ROOM, STDOUT,
};
use kiln_proto::msg::{Signal, TtySize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};
use tokio::sync::{Notify, mpsc};

use crate::kept::client::{self, AskError, Line, Reach};
use crate::orders::{Control, ExecIo};

/// Most bytes of one chunk of standard input.
const STDIN_CHUNK: usize = 32 * 1024;

/// Why a command's streams are held no more, though it is not over.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// The connection to it ended.
    #[error("the connection to the command ended")]
    Ended(#[source] Option<CodecError>),
    /// What came is not the protocol.
    #[error("the server does not speak the protocol: {0}")]
    Strange(String),
    /// Standard input could not be read.
    #[error("standard input could not be read")]
    Input(#[source] io::Error),
}

/// Opens the way to a command that waits for its attender.
///
/// # Errors
/// [`AskError`].
pub async fn open(reach: &dyn Reach, tty: Option<TtySize>) -> Result<Box<dyn Line>, AskError> {
    Ok(client::ask(reach, &Ask::Attend { tty }).await?.1)
}

/// Holds the streams of a command until it has said everything. How it ended is its job's to say.
///
/// # Errors
/// [`HoldError`]: then the command ends soon.
pub async fn hold(line: impl AsyncRead + AsyncWrite, io: ExecIo<'_>) -> Result<(), HoldError> {
    let ExecIo {
        stdin,
        output,
        control,
    } = io;
    let (mut from, mut to) = split(line);
    let room = Room::default();
    let heard = hear(&mut from, output, &room);
    let said = say(&mut to, stdin, control, &room);
    tokio::pin!(heard, said);
    tokio::select! {
        biased;
        over = &mut heard => return over,
        said = &mut said => match said {
            Ok(never) => match never {},
            Err(HoldError::Ended(_)) => {}
            // Nobody may take for whole what is not.
            Err(failed) => return Err(failed),
        }
    }
    // What came before the connection broke is shown.
    heard.await
}

/// How much of standard input may be sent.
#[derive(Debug)]
struct Room {
    bytes: AtomicUsize,
    more: Notify,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            bytes: AtomicUsize::new(STDIN_ROOM),
            more: Notify::new(),
        }
    }
}

impl Room {
    async fn some(&self) -> usize {
        loop {
            match self.bytes.load(Ordering::Acquire) {
                0 => self.more.notified().await,
                bytes => return bytes,
            }
        }
    }
}

async fn hear(
    from: &mut (impl AsyncRead + Unpin),
    output: mpsc::Sender<(u8, Vec<u8>)>,
    room: &Room,
) -> Result<(), HoldError> {
    loop {
        let chunk = codec::read_chunk(from).await;
        let chunk = chunk.map_err(|error| HoldError::Ended(Some(error)))?;
        let chunk = chunk.ok_or(HoldError::Ended(None))?;
        match chunk.tag {
            STDOUT | STDERR => {
                let stream = if chunk.tag == STDOUT { 1 } else { 2 };
                let _reader_gone = output.send((stream, chunk.body.to_vec())).await;
            }
            ROOM => {
                let bytes: Result<[u8; 4], _> = chunk.body.as_ref().try_into();
                let bytes =
                    bytes.map_err(|_| HoldError::Strange("a room of no size".to_owned()))?;
                let more = usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(STDIN_ROOM);
                let before = room.bytes.fetch_add(more.min(STDIN_ROOM), Ordering::AcqRel);
                if before.saturating_add(more) > STDIN_ROOM {
                    let message = "room for more than there is".to_owned();
                    return Err(HoldError::Strange(message));
                }
                room.more.notify_one();
            }
            OVER => return Ok(()),
            other => return Err(HoldError::Strange(format!("an unknown chunk {other}"))),
        }
    }
}

/// Says what there is to say until nobody takes it.
async fn say(
    to: &mut (impl AsyncWrite + Unpin),
    mut stdin: Option<Box<dyn AsyncRead + Send + Unpin + '_>>,
    mut control: mpsc::Receiver<Control>,
    room: &Room,
) -> Result<std::convert::Infallible, HoldError> {
    let mut buffer = vec![0; STDIN_CHUNK];
    let mut controlled = true;
    let mut alive = tokio::time::interval(ALIVE_EVERY);
    loop {
        let read = async {
            let Some(stdin) = stdin.as_mut() else {
                return std::future::pending().await;
            };
            let most = room.some().await.min(STDIN_CHUNK);
            stdin.read(&mut buffer[..most]).await
        };
        let (tag, body) = tokio::select! {
            _ = alive.tick() => (ALIVE, Vec::new()),
            order = control.recv(), if controlled => match order {
                None => {
                    controlled = false;
                    continue;
                }
                Some(Control::Signal(number)) => (SIGNAL, json(&Signal { number })?),
                Some(Control::Resize(size)) => (RESIZE, json(&size)?),
            },
            got = read => match got.map_err(HoldError::Input)? {
                0 => {
                    stdin = None;
                    (STDIN_END, Vec::new())
                }
                count => {
                    room.bytes.fetch_sub(count, Ordering::AcqRel);
                    (STDIN, buffer[..count].to_vec())
                }
            },
        };
        let sent = codec::write_chunk(to, tag, &body).await;
        sent.map_err(|error| HoldError::Ended(Some(error)))?;
        let flushed = to.flush().await.map_err(CodecError::Io);
        flushed.map_err(|error| HoldError::Ended(Some(error)))?;
    }
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>, HoldError> {
    serde_json::to_vec(value).map_err(|error| HoldError::Strange(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn hold_against(chunks: &[(u8, &[u8])]) -> (Result<(), HoldError>, Vec<u8>) {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        for (tag, body) in chunks {
            codec::write_chunk(&mut far, *tag, body)
                .await
                .expect("says");
        }
        far.shutdown().await.expect("ends");
        let (output, mut said) = mpsc::channel(16);
        let (_nobody, control) = mpsc::channel(1);
        let io = ExecIo {
            stdin: None,
            output,
            control,
        };
        let held = hold(near, io).await;
        let mut all = Vec::new();
        while let Some((_, bytes)) = said.recv().await {
            all.extend(bytes);
        }
        (held, all)
    }

    #[tokio::test]
    async fn only_a_command_that_said_everything_is_over() {
        let (held, said) = hold_against(&[(STDOUT, b"a"), (STDERR, b"b"), (OVER, b"")]).await;
        held.expect("over");
        assert_eq!(said, b"ab");
        let (held, said) = hold_against(&[(STDOUT, b"a")]).await;
        assert!(matches!(held, Err(HoldError::Ended(None))), "{held:?}");
        assert_eq!(said, b"a", "what came is shown");
    }

    #[tokio::test]
    async fn a_worker_gives_no_more_room_than_there_is() {
        let room = 1_u32.to_le_bytes();
        for wrong in [(ROOM, &room[..]), (ROOM, b"x"), (77, b"")] {
            let (held, _) = hold_against(&[wrong, (OVER, b"")]).await;
            assert!(
                matches!(held, Err(HoldError::Strange(_))),
                "{wrong:?} {held:?}"
            );
        }
    }
}
