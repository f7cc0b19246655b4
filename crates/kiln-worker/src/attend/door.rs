//! The worker's side: one attender for a command, from before it begins until it is over, and connections to the ports that its job names.
//!
//! Whoever attends is heard all the time, whatever the command does: his input waits in a bounded box, his orders in a bounded queue. What the command
//! prints waits for him, as for any pipe. When he is gone the command is told to end, and its job is over as cancelled; his input has no end then that
//! the command could take for a whole one.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use kiln_core::FailureClass;
use kiln_core::job::RunAttend;
use kiln_proto::kept::attend::{
    ALIVE, OVER, RESIZE, ROOM, SIGNAL, SILENCE_MAX, STDERR, STDIN, STDIN_END, STDOUT,
};
use kiln_proto::kept::{Answer, Ask, MESSAGE_BYTES_MAX, Refused, Reply};
use kiln_proto::msg::{Signal, TtySize};
use kiln_proto::{Session, codec, relay};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, split};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::ATTEND_TIMEOUT;
use super::inbox::Inbox;
use crate::failure::Failure;
use crate::kept::client::Line;
use crate::orders::Control;
use crate::run;

/// How long a question may take to arrive, and an answer to be taken.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// Pieces of output that wait for the attender.
const OUTPUT_PIECES: usize = 64;
/// Signals and window sizes that wait for the command; more are left out.
const ORDERS: usize = 16;
/// How long an attender may take to read the last of the output when the command is over: the log has it all.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// Highest number of a signal.
const SIGNAL_MAX: i32 = 64;
/// What a terminal that hangs up sends.
pub(crate) const HANGUP: i32 = 1;

/// Where whoever attends a command arrives.
#[derive(Debug)]
pub struct Door {
    ports: BTreeSet<u16>,
    /// The machine, from when it is ready.
    session: OnceLock<Session>,
    /// Taken by the first.
    place: Mutex<Option<oneshot::Sender<Arrived>>>,
    over: CancellationToken,
}

/// Somebody who attends.
struct Arrived {
    way: Box<dyn Line>,
    tty: Option<TtySize>,
}

/// Waits at a door.
#[derive(Debug)]
pub struct Attend {
    door: Arc<Door>,
    arrival: oneshot::Receiver<Arrived>,
}

/// The streams of a command that is attended.
pub(crate) struct Streams {
    pub(crate) stdin: Box<dyn AsyncRead + Send + Unpin>,
    /// As the attender has it.
    pub(crate) tty: Option<TtySize>,
    pub(crate) output: mpsc::Sender<(u8, Vec<u8>)>,
    pub(crate) control: mpsc::Receiver<Control>,
}

/// Somebody who attends a command until it is over.
#[derive(Debug)]
pub(crate) struct Attended {
    pump: JoinHandle<()>,
    why: Arc<OnceLock<&'static str>>,
}

impl std::fmt::Debug for Arrived {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrived")
            .field("tty", &self.tty)
            .finish_non_exhaustive()
    }
}

impl Door {
    /// Of one attempt, and who waits at it.
    #[must_use]
    pub fn of(wanted: &RunAttend) -> (Arc<Self>, Attend) {
        let (place, arrival) = oneshot::channel();
        let door = Arc::new(Self {
            ports: wanted.ports.iter().copied().collect(),
            session: OnceLock::new(),
            place: Mutex::new(Some(place)),
            over: CancellationToken::new(),
        });
        let attend = Attend {
            door: Arc::clone(&door),
            arrival,
        };
        (door, attend)
    }

    /// Serves one way that leads here, until it is over; one who attends is passed on.
    pub async fn serve(&self, mut way: Box<dyn Line>) {
        let asked = codec::read_msg::<Ask, _>(&mut way, MESSAGE_BYTES_MAX);
        let Ok(Ok(ask)) = tokio::time::timeout(ASK_TIMEOUT, asked).await else {
            return;
        };
        match ask {
            Ask::Attend { tty } => {
                let place = self
                    .place
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take();
                let Some(place) = place else {
                    let refused = Refused::usage("somebody attends this command already");
                    return say(&mut way, Err(refused)).await;
                };
                // Nobody waits any more when the job is over.
                let _over = place.send(Arrived { way, tty });
            }
            Ask::Forward { port } => tokio::select! {
                () = self.forward(port, way) => {}
                () = self.over.cancelled() => {}
            },
            _ => {
                let refused = Refused::usage("a command that runs is attended, nothing else");
                say(&mut way, Err(refused)).await;
            }
        }
    }

    async fn forward(&self, port: u16, mut way: Box<dyn Line>) {
        if !self.ports.contains(&port) {
            let refused = Refused::usage(format!("the job names no port {port}"));
            return say(&mut way, Err(refused)).await;
        }
        let Some(session) = self.session.get() else {
            let refused = Refused::failed("the job's machine is not ready yet");
            return say(&mut way, Err(refused)).await;
        };
        match run::connect(session, port).await {
            Ok(mut stream) => {
                say(&mut way, Ok(Reply::Begins)).await;
                // A broken connection is its two ends' to see.
                let _ended = relay::relay(&mut stream, &mut way).await;
            }
            Err(refused) => say(&mut way, Err(refused)).await,
        }
    }

    /// The job is over: nothing leads into its machine any more.
    pub fn close(&self) {
        self.over.cancel();
    }
}

async fn say(way: &mut (impl AsyncWrite + Unpin), answer: Answer) {
    let said = codec::write_msg(way, &answer);
    let _asker_gone = tokio::time::timeout(ASK_TIMEOUT, said).await;
}

impl Attend {
    /// Waits until somebody attends the command of a machine that is ready. When he is gone before the command is over, it is told to hang up, and
    /// `gone` is cancelled.
    ///
    /// # Errors
    /// When nobody came in time.
    pub(crate) async fn wait(
        self,
        session: &Session,
        stdin: bool,
        gone: CancellationToken,
    ) -> Result<(Attended, Streams), Failure> {
        let _once = self.door.session.set(session.clone());
        let arrived = arrives(self.arrival).await?;
        Ok(arrived.begin(stdin, gone))
    }
}

async fn arrives(arrival: oneshot::Receiver<Arrived>) -> Result<Arrived, Failure> {
    if let Ok(Ok(arrived)) = tokio::time::timeout(ATTEND_TIMEOUT, arrival).await {
        return Ok(arrived);
    }
    let message = format!("nobody attended this command within {ATTEND_TIMEOUT:?}");
    let hint = "who submits it opens GET /v1/jobs/ID/ways/attend when its phase is `attend`, as `kiln run -i` does";
    Err(Failure::new(FailureClass::User, message).hint(hint))
}

impl Arrived {
    fn begin(self, stdin: bool, gone: CancellationToken) -> (Attended, Streams) {
        let (output, pieces) = mpsc::channel(OUTPUT_PIECES);
        let (orders, control) = mpsc::channel(ORDERS);
        let (inbox, why) = (Inbox::default(), Arc::new(OnceLock::new()));
        let streams = Streams {
            stdin: Box::new(inbox.reader()),
            tty: self.tty,
            output,
            control,
        };
        let heard = Heard {
            inbox: inbox.clone(),
            stdin,
            orders,
        };
        let told = Arc::clone(&why);
        let pump = tokio::spawn(async move {
            let (mut from, mut to) = split(self.way);
            say(&mut to, Ok(Reply::Begins)).await;
            let left = tokio::select! {
                why = heard.listen(&mut from) => why,
                ended = tell(&mut to, pieces, &inbox) => match ended {
                    true => return,
                    false => "the connection broke",
                },
            };
            let _once = told.set(left);
            // Asked before it is told to end: who catches it knows why.
            let _full = heard.orders.try_send(Control::Signal(HANGUP));
            gone.cancel();
        });
        (Attended { pump, why }, streams)
    }
}

/// What comes from an attender.
struct Heard {
    inbox: Inbox,
    stdin: bool,
    orders: mpsc::Sender<Control>,
}

impl Heard {
    /// Takes what comes until its sender is gone; gives how that shows.
    async fn listen(&self, from: &mut (impl AsyncRead + Unpin)) -> &'static str {
        loop {
            let read = tokio::time::timeout(SILENCE_MAX, codec::read_chunk(from)).await;
            let chunk = match read {
                Ok(Ok(Some(chunk))) => chunk,
                Ok(Ok(None)) => return "the connection ended",
                Ok(Err(_)) => return "the connection broke",
                Err(_) => return "nothing was heard for too long",
            };
            let taken = match chunk.tag {
                STDIN => self.stdin && self.inbox.put(&chunk.body),
                STDIN_END => {
                    self.inbox.end();
                    true
                }
                SIGNAL => serde_json::from_slice::<Signal>(&chunk.body)
                    .ok()
                    .filter(|signal| (1..=SIGNAL_MAX).contains(&signal.number))
                    .is_some_and(|signal| self.order(Control::Signal(signal.number))),
                RESIZE => serde_json::from_slice(&chunk.body)
                    .is_ok_and(|size: TtySize| self.order(Control::Resize(size))),
                ALIVE => true,
                _ => false,
            };
            if !taken {
                return "what came is not the protocol";
            }
        }
    }

    /// Always heard: what the command has no time for is left out.
    fn order(&self, order: Control) -> bool {
        let _full_or_over = self.orders.try_send(order);
        true
    }
}

/// Tells what the command prints, and what of its input it took, until it is over. False when nobody takes it.
async fn tell(
    to: &mut (impl AsyncWrite + Unpin),
    mut pieces: mpsc::Receiver<(u8, Vec<u8>)>,
    inbox: &Inbox,
) -> bool {
    loop {
        let said = tokio::select! {
            piece = pieces.recv() => match piece {
                Some((stream, bytes)) => print(to, stream, &bytes).await,
                None => break,
            },
            room = inbox.room() => codec::write_chunk(to, ROOM, &room.to_le_bytes()).await,
        };
        if said.is_err() || to.flush().await.is_err() {
            return false;
        }
    }
    let ended = async {
        let _gone = codec::write_chunk(to, OVER, &[]).await;
        let _gone = to.shutdown().await;
    };
    ended.await;
    true
}

async fn print(
    to: &mut (impl AsyncWrite + Unpin),
    stream: u8,
    bytes: &[u8],
) -> Result<(), codec::CodecError> {
    let tag = if stream == 1 { STDOUT } else { STDERR };
    for piece in bytes.chunks(codec::CHUNK_LEN_MAX) {
        codec::write_chunk(to, tag, piece).await?;
    }
    Ok(())
}

impl Attended {
    /// The command is over, and nothing holds its output any more: waits until the attender has the last of it. Gives what becomes of a command
    /// whose attender went before.
    pub(crate) async fn end(mut self) -> Option<Failure> {
        if tokio::time::timeout(LAST_WORDS, &mut self.pump)
            .await
            .is_err()
        {
            self.pump.abort();
        }
        let why = self.why.get()?;
        let message = format!("whoever attended this command is gone: {why}");
        Some(Failure::new(FailureClass::Cancelled, message))
    }
}

impl Drop for Attended {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;
    use tokio::time::Instant;

    use super::*;

    /// Somebody attends a command that does nothing of its own.
    async fn begun() -> (DuplexStream, Attended, Streams, CancellationToken) {
        let (mut near, far) = tokio::io::duplex(1 << 20);
        let arrived = Arrived {
            way: Box::new(far),
            tty: None,
        };
        let gone = CancellationToken::new();
        let (attended, streams) = arrived.begin(true, gone.clone());
        let begins = codec::read_msg::<Answer, _>(&mut near, MESSAGE_BYTES_MAX).await;
        assert_eq!(begins.expect("answers"), Ok(Reply::Begins));
        (near, attended, streams, gone)
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_waited_for_without_end() {
        let (_place, arrival) = oneshot::channel();
        let since = Instant::now();
        let failed = arrives(arrival).await.expect_err("nobody comes");
        assert_eq!(since.elapsed(), ATTEND_TIMEOUT);
        assert_eq!(failed.class, FailureClass::User);
        assert!(failed.message.contains("nobody attended") && failed.hint.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn one_who_says_nothing_is_gone_and_one_who_says_he_is_there_is_not() {
        let (mut near, attended, mut streams, gone) = begun().await;
        for _ in 0..10 {
            tokio::time::sleep(SILENCE_MAX / 2).await;
            codec::write_chunk(&mut near, ALIVE, &[])
                .await
                .expect("says");
        }
        assert!(!gone.is_cancelled());
        let since = Instant::now();
        gone.cancelled().await;
        assert_eq!(since.elapsed(), SILENCE_MAX);
        let Some(Control::Signal(HANGUP)) = streams.control.recv().await else {
            panic!("the command is not told to hang up");
        };
        drop(streams);
        let failed = attended.end().await.expect("he went before");
        assert_eq!(failed.class, FailureClass::Cancelled);
        assert!(failed.message.contains("too long"), "{}", failed.message);
    }

    #[tokio::test]
    async fn orders_without_end_hold_up_nobody() {
        let (mut near, _attended, mut streams, gone) = begun().await;
        let signal = serde_json::to_vec(&Signal { number: 15 }).expect("JSON");
        for _ in 0..ORDERS * 4 {
            let sent = codec::write_chunk(&mut near, SIGNAL, &signal).await;
            sent.expect("taken");
        }
        // All of it is heard by the time that his end is.
        drop(near);
        gone.cancelled().await;
        let mut told = 0;
        while streams.control.try_recv().is_ok() {
            told += 1;
        }
        assert_eq!(told, ORDERS);
    }

    #[tokio::test]
    async fn what_is_not_the_protocol_ends_it() {
        let wrong: [(u8, &[u8]); 4] = [
            (SIGNAL, br#"{"number":0}"#),
            (SIGNAL, b"x"),
            (RESIZE, b"[]"),
            (99, b""),
        ];
        for (tag, body) in wrong {
            let (mut near, attended, streams, gone) = begun().await;
            codec::write_chunk(&mut near, tag, body)
                .await
                .expect("says");
            gone.cancelled().await;
            drop(streams);
            let failed = attended.end().await.expect("it is ended");
            assert!(failed.message.contains("protocol"), "{tag}");
        }
    }
}
