//! A client of QEMU's machine protocol: one private socket, commands in flight by id, events to one receiver.
//!
//! It knows JSON lines and descriptors, nothing of machines. Every wait has a deadline of the caller's. QEMU is
//! a program that a guest may have taken over: lines and the event queue are bounded.
//! Source: QEMU's `docs/interop/qmp-spec.rst`; `add-fd` in its QMP reference.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

/// Longest line that is read. `query-*` answers of a small machine stay below 100 KiB.
const LINE_BYTES_MAX: u64 = 1024 * 1024;
/// Events that wait for the monitor. Only [`HEEDED`] ones are kept: a guest that makes QEMU tell a flood of others (its clock set, its
/// port opened) cannot push out the one that matters.
const EVENTS_MAX: usize = 256;
/// Events that somebody heeds.
const HEEDED: [&str; 4] = ["SHUTDOWN", "BLOCK_IO_ERROR", "MIGRATION", "STOP"];
/// Bytes of an error's text that are kept.
const ERROR_BYTES_MAX: usize = 2048;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    /// QEMU refused it.
    #[error("{0}")]
    Refused(String),
    /// The socket ended: QEMU is gone.
    #[error("the control socket ended")]
    Ended,
    /// The socket failed.
    #[error("the control socket failed")]
    Io(#[source] io::Error),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

type Answer = Result<Value, QmpError>;

#[derive(Debug, Default)]
struct Pending {
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    ended: bool,
}

/// The client. Dropping it ends the connection.
#[derive(Debug)]
pub(crate) struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    pending: Arc<Mutex<Pending>>,
    next: AtomicU64,
}

/// One event of QEMU.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    /// `SHUTDOWN`, `BLOCK_IO_ERROR`, `MIGRATION`, ...
    pub(crate) name: String,
    /// Its data, or null.
    pub(crate) data: Value,
}

impl Qmp {
    /// Takes a connected socket. Commands may be sent at once; QEMU reads them when it is up.
    pub(crate) fn new(stream: UnixStream) -> (Self, mpsc::Receiver<Event>) {
        let (reader, writer) = stream.into_split();
        let pending = Arc::new(Mutex::new(Pending::default()));
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        tokio::spawn(read_lines(reader, Arc::clone(&pending), events));
        let qmp = Self {
            writer: tokio::sync::Mutex::new(writer),
            pending,
            next: AtomicU64::new(1),
        };
        (qmp, receiver)
    }

    /// Sends a command and waits for its answer.
    pub(crate) async fn call(&self, command: &str, arguments: Value, deadline: Duration) -> Answer {
        self.call_with_fd(command, arguments, None, deadline).await
    }

    /// As [`Self::call`], with a descriptor beside it.
    pub(crate) async fn call_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Duration,
    ) -> Answer {
        let work = async {
            let answer = self.send(command, arguments, fd).await?;
            answer.await.unwrap_or(Err(QmpError::Ended))
        };
        tokio::time::timeout(deadline, work)
            .await
            .unwrap_or(Err(QmpError::Timeout(deadline)))
    }

    /// Sends a command; the answer is awaited apart, so that several are on their way at once.
    pub(crate) async fn send(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<oneshot::Receiver<Answer>, QmpError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut message = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let line = format!("{message}\n");
        let (sender, receiver) = oneshot::channel();
        {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            if pending.ended {
                return Err(QmpError::Ended);
            }
            pending.waiting.insert(id, sender);
        }
        let writer = self.writer.lock().await;
        write_all(writer.as_ref(), line.as_bytes(), fd)
            .await
            .map_err(QmpError::Io)?;
        Ok(receiver)
    }
}

/// Writes everything; the descriptor goes with the first byte.
async fn write_all(
    stream: &UnixStream,
    mut bytes: &[u8],
    mut fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        let sent = stream.try_io(Interest::WRITABLE, || send_once(stream, bytes, fd));
        match sent {
            Ok(count) => {
                bytes = &bytes[count..];
                fd = None;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn send_once(stream: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let fds = fd.as_slice();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let parts = [IoSlice::new(bytes)];
    sendmsg(stream.as_fd(), &parts, &mut control, SendFlags::NOSIGNAL).map_err(io::Error::from)
}

/// Hands answers to their callers and events to the receiver until the socket ends.
async fn read_lines(
    reader: OwnedReadHalf,
    pending: Arc<Mutex<Pending>>,
    events: mpsc::Sender<Event>,
) {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let got = (&mut reader)
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut line)
            .await;
        if !matches!(got, Ok(count) if count > 0) || line.last() != Some(&b'\n') {
            break;
        }
        let Ok(message) = serde_json::from_slice::<Value>(&line) else {
            break;
        };
        if let Some(name) = message["event"].as_str() {
            if !HEEDED.contains(&name) {
                continue;
            }
            let event = Event {
                name: name.to_owned(),
                data: message["data"].clone(),
            };
            // A full queue means that the first of these was heeded long ago, and it ends the machine.
            let _ = events.try_send(event);
        } else if let Some(id) = message["id"].as_u64() {
            let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(waiter) = pending.waiting.remove(&id) {
                let _ = waiter.send(answer_of(&message));
            }
        }
    }
    let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
    pending.ended = true;
    pending.waiting.clear();
}

fn answer_of(message: &Value) -> Answer {
    match message.get("return") {
        Some(value) => Ok(value.clone()),
        None => {
            let text = message["error"]["desc"]
                .as_str()
                .unwrap_or("an error without words");
            Err(QmpError::Refused(
                text.chars().take(ERROR_BYTES_MAX).collect(),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    const SOON: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn answers_find_their_callers_and_events_the_receiver() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (qmp, mut events) = Qmp::new(near);
        let first = qmp.send("a", Value::Null, None).await.unwrap();
        let second = qmp.send("b", json!({"x": 1}), None).await.unwrap();
        far.write_all(
            b"{\"QMP\": {}}\n{\"return\": 2, \"id\": 2}\n{\"event\": \"STOP\"}\n\
              {\"error\": {\"desc\": \"no\"}, \"id\": 1}\n",
        )
        .await
        .unwrap();
        assert_eq!(second.await.unwrap().unwrap(), json!(2));
        assert!(matches!(first.await.unwrap(), Err(QmpError::Refused(text)) if text == "no"));
        assert_eq!(events.recv().await.unwrap().name, "STOP");
    }

    #[tokio::test]
    async fn a_flood_of_events_that_nobody_heeds_hides_nothing() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (_qmp, mut events) = Qmp::new(near);
        let flood =
            "{\"event\": \"RTC_CHANGE\", \"data\": {\"offset\": 1}}\n".repeat(4 * EVENTS_MAX);
        far.write_all(flood.as_bytes()).await.unwrap();
        far.write_all(b"{\"event\": \"BLOCK_IO_ERROR\", \"data\": {\"action\": \"stop\"}}\n")
            .await
            .unwrap();
        let event = tokio::time::timeout(SOON, events.recv()).await;
        assert_eq!(event.expect("told").unwrap().name, "BLOCK_IO_ERROR");
    }

    #[tokio::test]
    async fn an_end_or_a_line_without_end_frees_every_caller() {
        let (near, far) = UnixStream::pair().unwrap();
        let (qmp, _events) = Qmp::new(near);
        let waiting = qmp.send("a", Value::Null, None).await.unwrap();
        drop(far);
        assert!(waiting.await.is_err());
        assert!(matches!(
            qmp.call("b", Value::Null, SOON).await,
            Err(QmpError::Ended | QmpError::Io(_))
        ));

        let (near, mut far) = UnixStream::pair().unwrap();
        let (qmp, _events) = Qmp::new(near);
        let waiting = qmp.send("a", Value::Null, None).await.unwrap();
        let flood =
            tokio::spawn(async move { while far.write_all(&[b' '; 65536]).await.is_ok() {} });
        assert!(
            tokio::time::timeout(SOON, waiting)
                .await
                .expect("bounded")
                .is_err()
        );
        drop(qmp);
        tokio::time::timeout(SOON, flood)
            .await
            .expect("bounded")
            .unwrap();
    }

    #[tokio::test]
    async fn silence_ends_at_the_deadline() {
        let (near, _far) = UnixStream::pair().unwrap();
        let (qmp, _events) = Qmp::new(near);
        let answer = qmp.call("a", Value::Null, Duration::from_millis(10)).await;
        assert!(matches!(answer, Err(QmpError::Timeout(_))));
    }
}
