//! Who asks a keeper: the commands of the machine's owner.

use std::io::{self, Read};
use std::path::PathBuf;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use futures_util::future::BoxFuture;
use kiln_proto::codec;
use kiln_proto::msg::Exit;
use kiln_store::private_socket;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::ask::{Answer, Ask, ExecAsk, MESSAGE_BYTES_MAX, Refused, Reply, tree};
use super::{Facts, socket_of};
use crate::orders::{self, CallError, Control, ExecIo};
use crate::run::INTERRUPT_GRACE;

/// Longest wait for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest wait for the end of a machine that may power off by itself.
const STOP_TIMEOUT: Duration = Duration::from_secs(90);
/// Longest wait for a port's connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(40);
/// Pieces of a tree that wait to be written.
const PIECES: usize = 16;
/// Most characters of a guest's reason.
const REASON_CHARS_MAX: usize = 400;

/// Why a keeper did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody answers: it ended just now, or its machine is another user's.
    #[error("the keeper of machine {id} cannot be reached")]
    Gone {
        /// Which.
        id: String,
        /// How that shows.
        #[source]
        source: io::Error,
    },
    /// The controller between does not lead there.
    #[error("{0}")]
    NoWay(Box<dyn std::error::Error + Send + Sync>),
    /// It refused.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It ended while it answered.
    #[error("machine {id} ended while it was asked: {why}")]
    Ended {
        /// Which.
        id: String,
        /// How that shows.
        why: String,
    },
    /// The command's stream broke.
    #[error(transparent)]
    Command(#[from] CallError),
}

/// A connection to a keeper.
pub trait Line: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Line for T {}

/// How a keeper is reached: by its socket on this host, or through a controller.
pub trait Reach: Send + Sync {
    /// The machine's id, for messages.
    fn id(&self) -> &str;

    /// Connects, for one question. Nothing of the question is sent yet.
    fn dial<'a>(&'a self, ask: &'a Ask) -> BoxFuture<'a, Result<Box<dyn Line>, AskError>>;
}

/// A keeper on this host.
#[derive(Clone, Debug)]
pub struct Near {
    /// The home that its machine lies in.
    pub home: PathBuf,
    /// The machine.
    pub facts: Facts,
}

impl Reach for Near {
    fn id(&self) -> &str {
        self.facts.id()
    }

    fn dial<'a>(&'a self, _: &'a Ask) -> BoxFuture<'a, Result<Box<dyn Line>, AskError>> {
        Box::pin(async move {
            let socket = socket_of(&self.home, &self.facts.machine.machine);
            let stream = private_socket::connect(&socket).await;
            let stream = stream.map_err(|source| AskError::Gone {
                id: self.id().to_owned(),
                source,
            })?;
            Ok(Box::new(stream) as Box<dyn Line>)
        })
    }
}

/// Asks; gives the answer, and the connection for what follows it.
///
/// # Errors
/// [`AskError`].
pub async fn ask(reach: &dyn Reach, ask: &Ask) -> Result<(Reply, Box<dyn Line>), AskError> {
    let id = || reach.id().to_owned();
    let mut stream = reach.dial(ask).await?;
    let ended = |why: String| AskError::Ended { id: id(), why };
    let sent = codec::write_msg(&mut stream, ask).await;
    let answered = async {
        // One that refuses may have hung up before it read everything: its answer says more.
        let answer = codec::read_msg::<Answer, _>(&mut stream, MESSAGE_BYTES_MAX).await;
        match (answer, sent) {
            (Ok(answer), _) => Ok(answer),
            (Err(_), Err(error)) | (Err(error), Ok(())) => Err(ended(orders::chain(&error))),
        }
    };
    let most = match ask {
        Ask::Stop => STOP_TIMEOUT,
        Ask::Forward { .. } | Ask::Exec(_) => CONNECT_TIMEOUT,
        _ => ANSWER_TIMEOUT,
    };
    let answer = tokio::time::timeout(most, answered).await;
    let answer = answer.map_err(|_| ended("it does not answer".to_owned()))??;
    Ok((answer?, stream))
}

/// Asks for something that is answered at once.
///
/// # Errors
/// [`AskError`].
pub async fn answer(reach: &dyn Reach, what: &Ask) -> Result<Reply, AskError> {
    Ok(ask(reach, what).await?.0)
}

/// Runs a command to its end. A cancel interrupts it, tells it to end soon after, and lets go of it then: its keeper ends it.
///
/// # Errors
/// [`AskError`]; a program that does not exist is a [`CallError::Refused`].
pub async fn exec(
    reach: &dyn Reach,
    command: ExecAsk,
    io: ExecIo<'_>,
    cancel: &CancellationToken,
) -> Result<Option<Exit>, AskError> {
    let (_begins, stream) = ask(reach, &Ask::Exec(command)).await?;
    let ExecIo {
        stdin,
        output,
        mut control,
    } = io;
    let (orders_in, orders_out) = mpsc::channel(16);
    let io = ExecIo {
        stdin,
        output,
        control: orders_out,
    };
    let run = orders::exec_over(stream, "run the command", io);
    let pass_on = async {
        loop {
            tokio::select! {
                order = control.recv() => match order {
                    Some(order) => drop(orders_in.send(order).await),
                    None => std::future::pending().await,
                },
                () = cancel.cancelled() => break,
            }
        }
        for number in [2, 15] {
            let _ended = orders_in.send(Control::Signal(number)).await;
            tokio::time::sleep(INTERRUPT_GRACE / 2).await;
        }
    };
    tokio::select! {
        exit = run => Ok(Some(exit?)),
        () = pass_on => Ok(None),
    }
}

/// A tree on its way out of a machine, for a thread that reads it. Its end without an error is the tree's.
///
/// # Errors
/// [`AskError`], before anything of the tree came.
pub async fn tree(reach: &dyn Reach, path: &str) -> Result<TreeReader, AskError> {
    let wanted = Ask::Tree {
        path: path.to_owned(),
    };
    let (_begins, mut stream) = ask(reach, &wanted).await?;
    let (sender, pieces) = mpsc::channel(PIECES);
    tokio::spawn(async move {
        loop {
            let piece = match codec::read_chunk(&mut stream).await {
                Ok(Some(chunk)) if chunk.tag == tree::DATA => Ok(chunk.body),
                Ok(Some(chunk)) if chunk.tag == tree::END => return,
                Ok(Some(chunk)) => {
                    let text = String::from_utf8_lossy(&chunk.body);
                    let text: String = text.chars().take(REASON_CHARS_MAX).collect();
                    Err(io::Error::other(text))
                }
                Ok(None) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => Err(io::Error::other(error)),
            };
            let last = piece.is_err();
            if sender.send(piece).await.is_err() || last {
                return;
            }
        }
    });
    Ok(TreeReader {
        pieces,
        piece: Bytes::new(),
        began: false,
    })
}

/// See [`tree`]. Reads block: not for async threads.
#[derive(Debug)]
pub struct TreeReader {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
    began: bool,
}

impl TreeReader {
    /// Waits for the first bytes, so that a path that cannot be given is known before anything is made for it.
    ///
    /// # Errors
    /// Why the machine does not give it.
    pub async fn begin(&mut self) -> io::Result<()> {
        if !self.began {
            self.began = true;
            self.piece = self.pieces.recv().await.transpose()?.unwrap_or_default();
        }
        Ok(())
    }
}

impl Read for TreeReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                None => return Ok(0),
                Some(piece) => self.piece = piece?,
            }
        }
        let count = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
