//! What a keeper does with each question. Whoever asks is its owner; what the machine says is hostile and passed on bounded.

use std::sync::atomic::Ordering;
use std::time::Duration;

use kiln_core::command_line::CommandTooLong;
use kiln_proto::msg::{ExecRequest, GetTree, MachineStats, Order, OrderReply, kind};
use kiln_proto::session::OpenError;
use kiln_proto::{Stream, codec, relay, reset_of};
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, split};
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::ask::{Answer, Ask, ExecAsk, MESSAGE_BYTES_MAX, Refused, Reply, Status, Used, tree};
use super::copy::{BYTES_MAX, ENTRIES_MAX};
use super::keeper::{CONNECTIONS_MAX, Held, Wish, Wished};
use crate::collect::CONTAINER_ROOT;
use crate::orders;
use crate::run;

/// How long a question may take to arrive.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the guest may take to say what it uses.
const STATS_TIMEOUT: Duration = Duration::from_secs(5);
/// The environment every command starts from.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where commands start in a machine without an image.
const HOME: &str = "/root";
/// Bytes on their way in one direction of a command.
const BUFFER: usize = 60 * 1024;
/// Most bytes of a guest's reason that are passed on.
const REASON_CHARS_MAX: usize = 400;

pub(super) async fn too_many(mut asker: UnixStream) {
    let message =
        format!("{CONNECTIONS_MAX} commands, copies and connections use this machine already");
    let answer: Answer = Err(Refused::failed(message));
    let _asker_gone =
        tokio::time::timeout(ASK_TIMEOUT, codec::write_msg(&mut asker, &answer)).await;
}

/// Answers one question.
pub(super) async fn serve(held: &Held, mut asker: UnixStream) {
    let asked = codec::read_msg::<Ask, _>(&mut asker, MESSAGE_BYTES_MAX);
    let ask = match tokio::time::timeout(ASK_TIMEOUT, asked).await {
        Ok(Ok(ask)) => ask,
        // Also one that a newer kiln knows alone.
        Ok(Err(error)) => {
            let text = format!("the question is not understood: {}", orders::chain(&error));
            return say(&mut asker, Err(Refused::usage(text))).await;
        }
        Err(_) => return,
    };
    match ask {
        Ask::Show => say(&mut asker, Ok(Reply::Shown(Box::new(status(held))))).await,
        Ask::Stats => {
            let used = used(held).await;
            say(&mut asker, used.map(Reply::Used)).await;
        }
        Ask::Console => {
            let text = held.machine.console_tail();
            say(&mut asker, Ok(Reply::Text { text })).await;
        }
        Ask::Exec(ask) => exec(held, ask, asker).await,
        Ask::Tree { path } => send_tree(held, path, asker).await,
        Ask::Forward { port } => forward(held, port, asker).await,
        Ask::Attend { .. } => {
            let refused = Refused::usage("the command of this machine is over: nobody attends it");
            say(&mut asker, Err(refused)).await;
        }
        Ask::Stop => end(held, Wish::Stop, asker).await,
        Ask::Remove => end(held, Wish::Remove, asker).await,
        Ask::Incident { note } => end(held, Wish::Incident(note), asker).await,
    }
}

async fn say(asker: &mut UnixStream, answer: Answer) {
    let _asker_gone = codec::write_msg(asker, &answer).await;
}

fn root_of(held: &Held) -> &'static str {
    match held.beside {
        Some(_) => CONTAINER_ROOT,
        None => "",
    }
}

fn status(held: &Held) -> Status {
    Status {
        facts: held.facts.clone(),
        left_ms: held.left_ms(),
        // This question is one of them.
        busy: held.busy.load(Ordering::Relaxed).saturating_sub(1),
        root: root_of(held).to_owned(),
        egress: held.egress_line(),
    }
}

async fn used(held: &Held) -> Result<Used, Refused> {
    let host = held.machine.stats().await;
    let host = host.map_err(|error| Refused::failed(orders::chain(&error)))?;
    let asked = orders::call(
        &held.session,
        "say what it uses",
        &Order::Stats,
        STATS_TIMEOUT,
    )
    .await;
    let guest: Option<MachineStats> = match asked {
        Ok(OrderReply::Stats(stats)) => Some(stats),
        _ => None,
    };
    Ok(Used {
        rss: host.rss.0,
        pss: host.pss.0,
        cpu_ms: host.cpu_ms,
        guest,
    })
}

async fn end(held: &Held, wish: Wish, mut asker: UnixStream) {
    let (answer, answered) = oneshot::channel();
    let (said, told) = oneshot::channel();
    let wished = Wished { wish, answer, told };
    if held.wishes.send(wished).await.is_err() {
        return;
    }
    if let Ok(reply) = answered.await {
        say(&mut asker, Ok(reply)).await;
        let _flushed = asker.shutdown().await;
    }
    let _keeper_gone = said.send(());
}

/// Opens a stream to the guest.
async fn open(held: &Held, kind: u8, payload: &(impl Serialize + Sync)) -> Result<Stream, Refused> {
    let payload =
        serde_json::to_vec(payload).map_err(|error| Refused::failed(error.to_string()))?;
    let opened = held.session.open(kind, &payload).await;
    opened.map_err(|error| match error {
        OpenError::Payload { len } => Refused::usage(CommandTooLong { len }.to_string()),
        error => Refused::failed(orders::chain(&error)),
    })
}

/// What the guest is told to run.
async fn request(held: &Held, ask: ExecAsk) -> Result<ExecRequest, Refused> {
    if ask.argv.is_empty() {
        return Err(Refused::usage("there is no command"));
    }
    if !ask.cwd.is_empty() && !ask.cwd.starts_with('/') {
        return Err(Refused::usage(
            "the working directory is an absolute path in the machine",
        ));
    }
    let mut env = vec![("PATH".to_owned(), PATH.to_owned())];
    if let Some(beside) = held.beside.as_ref().filter(|_| !ask.in_machine) {
        let argv = beside.prepare(&held.session, &ask).await?;
        return Ok(ExecRequest {
            argv,
            env,
            cwd: "/".to_owned(),
            tty: ask.tty,
            stdin: ask.stdin,
            ..ExecRequest::default()
        });
    }
    env.push(("HOME".to_owned(), HOME.to_owned()));
    if ask.tty.is_some() && !ask.env.iter().any(|(key, _)| key == "TERM") {
        env.push(("TERM".to_owned(), "xterm-256color".to_owned()));
    }
    env.retain(|(key, _)| !ask.env.iter().any(|(name, _)| name == key));
    env.extend(ask.env);
    let first = held.facts.machine.cwd.as_deref();
    let cwd = match ask.cwd.is_empty() {
        // Beside a container its working directory is not the machine's.
        true if held.beside.is_some() => HOME.to_owned(),
        true => first.unwrap_or(HOME).to_owned(),
        false => ask.cwd,
    };
    Ok(ExecRequest {
        argv: ask.argv,
        env,
        cwd,
        tty: ask.tty,
        stdin: ask.stdin,
        ..ExecRequest::default()
    })
}

async fn exec(held: &Held, ask: ExecAsk, mut asker: UnixStream) {
    // Its name alone: arguments may hold what nobody should read later.
    let name = ask.argv.first().cloned().unwrap_or_default();
    held.journal.note("command", &name);
    let stream = match request(held, ask).await {
        Ok(request) => open(held, kind::EXEC, &request).await,
        Err(refused) => Err(refused),
    };
    let stream = match stream {
        Ok(stream) => stream,
        Err(refused) => return say(&mut asker, Err(refused)).await,
    };
    say(&mut asker, Ok(Reply::Begins)).await;
    pass_command(stream, asker).await;
    held.journal.note("command over", &name);
}

/// Passes chunks both ways until the command is over. An asker never ends its direction (the end of standard input is a chunk): when it does, it is
/// gone, and its command is ended.
async fn pass_command(stream: Stream, asker: UnixStream) {
    let (mut from_guest, mut to_guest) = split(stream);
    let (mut from_asker, mut to_asker) = asker.into_split();
    let inward = async {
        let mut buffer = vec![0; BUFFER];
        loop {
            match from_asker.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    if to_guest.write_all(&buffer[..count]).await.is_err() {
                        // The command is over: what it said decides.
                        return std::future::pending().await;
                    }
                }
            }
        }
    };
    let outward = async {
        let mut buffer = vec![0; BUFFER];
        loop {
            match from_guest.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    if to_asker.write_all(&buffer[..count]).await.is_err() {
                        return;
                    }
                }
            }
        }
        let _asker_gone = to_asker.shutdown().await;
    };
    tokio::select! {
        () = inward => {}
        () = outward => {}
    }
}

async fn send_tree(held: &Held, path: String, mut asker: UnixStream) {
    if !path.starts_with('/') || path.contains('\0') {
        let refused = Refused::usage("a path in the machine is absolute");
        return say(&mut asker, Err(refused)).await;
    }
    held.journal.note("copied out", &path);
    let order = GetTree {
        path: format!("{}{path}", root_of(held)),
        bytes_max: BYTES_MAX,
        entries_max: ENTRIES_MAX,
    };
    let mut stream = match open(held, kind::GET_TREE, &order).await {
        Ok(stream) => stream,
        Err(refused) => return say(&mut asker, Err(refused)).await,
    };
    let _refused_already = stream.shutdown().await;
    say(&mut asker, Ok(Reply::Begins)).await;
    let mut buffer = vec![0; BUFFER];
    loop {
        let (tag, body) = match stream.read(&mut buffer).await {
            Ok(0) => (tree::END, Vec::new()),
            Ok(count) => {
                if codec::write_chunk(&mut asker, tree::DATA, &buffer[..count])
                    .await
                    .is_err()
                {
                    return;
                }
                continue;
            }
            Err(error) => (tree::FAILED, reason(&error).into_bytes()),
        };
        let _asker_gone = codec::write_chunk(&mut asker, tag, &body).await;
        let _asker_gone = asker.shutdown().await;
        return;
    }
}

/// Why a guest ended a stream, in its own words where it has some.
fn reason(error: &std::io::Error) -> String {
    let text = match reset_of(error) {
        Some(reset) => match serde_json::from_str::<kiln_proto::msg::GuestError>(&reset.reason) {
            Ok(error) => error.message,
            Err(_) => reset.reason.clone(),
        },
        None => orders::chain(error),
    };
    text.chars().take(REASON_CHARS_MAX).collect()
}

async fn forward(held: &Held, port: u16, mut asker: UnixStream) {
    let mut stream = match run::connect(&held.session, port).await {
        Ok(stream) => stream,
        Err(refused) => return say(&mut asker, Err(refused)).await,
    };
    say(&mut asker, Ok(Reply::Begins)).await;
    // A broken connection is its two ends' to see.
    let _ended = relay::relay(&mut stream, &mut asker).await;
}
