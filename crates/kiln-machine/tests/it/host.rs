//! A plain host for tests: gives orders over a machine's channel and reads the answers, with a deadline on everything.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_machine::driver::Machine;
use kiln_proto::msg::{
    CallResult, ExecRequest, Exit, GuestError, GuestEvent, Identity, Order, OrderReply, Quiesced,
    Reidentified, chunk, kind,
};
use kiln_proto::{
    Hello, Incoming, Session, SessionError, SessionLimits, Stream, read_chunk, read_msg,
    write_chunk,
};
use tokio::io::AsyncWriteExt as _;

/// Most bytes of an answer.
const REPLY_MAX: usize = 64 * 1024;

/// Why the guest did not do what it was told.
#[derive(Debug)]
#[expect(dead_code, reason = "what is inside is shown when a test fails")]
pub(crate) enum Failed {
    /// It said no.
    Refused(GuestError),
    /// It broke the protocol or went away.
    Broken(String),
    /// It said nothing.
    Timeout,
}

/// One host's session with one machine.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) session: Session,
    pub(crate) hello: Hello,
    pub(crate) events: Arc<Mutex<Vec<GuestEvent>>>,
    deadline: Duration,
    _incoming: tokio::task::JoinSet<()>,
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit: Exit,
}

impl Ran {
    pub(crate) fn text(&self) -> String {
        assert_eq!(self.exit.code, Some(0), "{self:?}");
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }
}

pub(crate) fn broken(error: &dyn std::error::Error) -> Failed {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    Failed::Broken(text)
}

impl Host {
    /// Connects; `deadline` holds for the greeting and later for each order.
    pub(crate) async fn connect(machine: &dyn Machine, deadline: Duration) -> Result<Self, Failed> {
        let channel = machine.channel().await.map_err(|error| broken(&error))?;
        let connected = Session::connect(channel, SessionLimits::default(), deadline).await;
        let (session, hello, incoming) = connected.map_err(|error| match error {
            SessionError::Deadline { .. } => Failed::Timeout,
            other => broken(&other),
        })?;
        Ok(Self::of(session, hello, incoming, deadline))
    }

    /// A host of a session that somebody else began.
    pub(crate) fn of(
        session: Session,
        hello: Hello,
        incoming: Incoming,
        deadline: Duration,
    ) -> Self {
        let events = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(take_streams(incoming, Arc::clone(&events)));
        Self {
            session,
            hello,
            events,
            deadline,
            _incoming: tasks,
        }
    }

    /// A host of a session whose incoming streams somebody else takes.
    pub(crate) fn borrowing(session: Session, hello: Hello, deadline: Duration) -> Self {
        Self {
            session,
            hello,
            events: Arc::default(),
            deadline,
            _incoming: tokio::task::JoinSet::new(),
        }
    }

    pub(crate) async fn within<T>(
        &self,
        work: impl Future<Output = Result<T, Failed>>,
    ) -> Result<T, Failed> {
        tokio::time::timeout(self.deadline, work)
            .await
            .unwrap_or(Err(Failed::Timeout))
    }

    pub(crate) async fn open(
        &self,
        kind: u8,
        payload: &(impl serde::Serialize + Sync),
    ) -> Result<Stream, Failed> {
        let payload = serde_json::to_vec(payload).expect("json");
        let opened = self.session.open(kind, &payload).await;
        opened.map_err(|error| broken(&error))
    }

    pub(crate) async fn call(&self, order: &Order) -> Result<OrderReply, Failed> {
        self.within(async {
            let mut stream = self.open(kind::CALL, order).await?;
            // The guest may be gone already: reading says how.
            let _ = stream.shutdown().await;
            let reply: CallResult = read_msg(&mut stream, REPLY_MAX)
                .await
                .map_err(|error| broken(&error))?;
            reply.map_err(Failed::Refused)
        })
        .await
    }

    pub(crate) async fn quiesce(&self) -> Result<Quiesced, Failed> {
        match self.call(&Order::Quiesce).await? {
            OrderReply::Quiesced(state) => Ok(state),
            other => Err(Failed::Broken(format!("{other:?}"))),
        }
    }

    pub(crate) async fn reidentify(&self, identity: &Identity) -> Result<Reidentified, Failed> {
        match self.call(&Order::Reidentify(identity.clone())).await? {
            OrderReply::Reidentified(answer) => Ok(answer),
            other => Err(Failed::Broken(format!("{other:?}"))),
        }
    }

    /// Mounts a disk; gives its path.
    pub(crate) async fn mount(&self, serial: &str, read_only: bool) -> Result<String, Failed> {
        let order = Order::Mount(kiln_proto::msg::Mount {
            serial: serial.to_owned(),
            read_only,
            format_blank: !read_only,
            memory_bytes: 0,
            timeout_ms: 20_000,
        });
        match self.call(&order).await? {
            OrderReply::Mounted(mounted) => Ok(mounted.path),
            other => Err(Failed::Broken(format!("{other:?}"))),
        }
    }

    pub(crate) async fn exec(&self, argv: &[&str]) -> Result<Ran, Failed> {
        self.exec_with(request(argv), b"").await
    }

    /// Runs a command with this input.
    pub(crate) async fn exec_with(
        &self,
        request: ExecRequest,
        stdin: &[u8],
    ) -> Result<Ran, Failed> {
        self.within(async {
            let stream = self.open(kind::EXEC, &request).await?;
            let (mut input, mut output) = tokio::io::split(stream);
            // Both at once: a command that answers while it is fed must not stop either.
            let feed = async {
                for piece in stdin.chunks(32 * 1024) {
                    if write_chunk(&mut output, chunk::STDIN, piece).await.is_err() {
                        return;
                    }
                }
                if write_chunk(&mut output, chunk::STDIN_EOF, b"")
                    .await
                    .is_ok()
                {
                    // A guest that is gone shows when it is read.
                    let _ = output.flush().await;
                }
            };
            let (ran, ()) = tokio::join!(collect(&mut input), feed);
            let _ = output.shutdown().await;
            ran
        })
        .await
    }
}

/// Reads a command's output to its end and checks the offsets.
pub(crate) async fn collect(
    input: &mut (impl tokio::io::AsyncRead + Unpin),
) -> Result<Ran, Failed> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        let next = read_chunk(input).await.map_err(|error| broken(&error))?;
        let Some(piece) = next else {
            return Err(Failed::Broken(
                "the output ended without an exit".to_owned(),
            ));
        };
        let sink = match piece.tag {
            chunk::STDOUT => &mut stdout,
            chunk::STDERR => &mut stderr,
            chunk::EXIT => {
                let exit = serde_json::from_slice(&piece.body).map_err(|error| broken(&error))?;
                return Ok(Ran {
                    stdout,
                    stderr,
                    exit,
                });
            }
            chunk::FAILED => {
                let error = serde_json::from_slice(&piece.body).map_err(|error| broken(&error))?;
                return Err(Failed::Refused(error));
            }
            tag => return Err(Failed::Broken(format!("chunk with tag {tag}"))),
        };
        let Some((at, bytes)) = piece.body.split_first_chunk::<8>() else {
            return Err(Failed::Broken("output without an offset".to_owned()));
        };
        if u64::from_le_bytes(*at) != sink.len() as u64 {
            return Err(Failed::Broken("output with a wrong offset".to_owned()));
        }
        sink.extend_from_slice(bytes);
    }
}

/// A command of a job, without input unless the caller gives some.
pub(crate) fn request(argv: &[&str]) -> ExecRequest {
    ExecRequest {
        argv: argv.iter().map(|arg| (*arg).to_owned()).collect(),
        env: vec![(
            "PATH".to_owned(),
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        )],
        stdin: true,
        ..ExecRequest::default()
    }
}

/// A fresh identity for a clone of this name.
pub(crate) fn identity(hostname: &str) -> Identity {
    let mut random = [0_u8; 64];
    getrandom::fill(&mut random).expect("random");
    let hex = hex::encode(random);
    let b = &hex[64..96];
    let wall = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("clock");
    Identity {
        seed: hex[..64].to_owned(),
        wall_unix_ns: u64::try_from(wall.as_nanos()).expect("fits"),
        boot_id: format!(
            "{}-{}-4{}-8{}-{}",
            &b[..8],
            &b[8..12],
            &b[13..16],
            &b[17..20],
            &b[20..32]
        ),
        machine_id: hex[96..].to_owned(),
        hostname: hostname.to_owned(),
    }
}

/// Takes the guest's streams; keeps its events and refuses everything else.
async fn take_streams(mut incoming: Incoming, events: Arc<Mutex<Vec<GuestEvent>>>) {
    let mut tasks = tokio::task::JoinSet::new();
    while let Some(inbound) = incoming.next().await {
        if inbound.kind != kind::EVENTS {
            continue;
        }
        let mut stream = inbound.stream;
        let events = Arc::clone(&events);
        tasks.spawn(async move {
            while let Ok(event) = read_msg::<GuestEvent, _>(&mut stream, REPLY_MAX).await {
                events.lock().expect("lock").push(event);
            }
        });
    }
}
