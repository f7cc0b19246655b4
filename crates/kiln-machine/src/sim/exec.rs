//! Commands and connections in a simulated guest: the engine around a [`super::Script`], and the commands that are built in.

use std::sync::Arc;
use std::time::Duration;

use kiln_proto::msg::{
    ConnectReply, ExecRequest, Exit, Forward, GuestError, GuestErrorCode, GuestEvent, Signal, chunk,
};
use kiln_proto::{Inbound, Stream, read_chunk, write_chunk, write_msg};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf};
use tokio::sync::mpsc;

use super::fault::Step;
use super::guest::Guest;
use super::orders::{CONTAINER_COMMAND, invalid};
use super::script::{ExecCall, ExecEnd, GuestHandle};
use crate::driver::StopReason;

/// Pieces of standard input that wait for a command which does not read.
const STDIN_PIECES: usize = 8;

/// A port on which every simulated guest echoes.
const ECHO_PORT: u16 = 7;

pub(super) async fn serve(guest: &Arc<Guest>, inbound: Inbound) {
    let stream_id = inbound.stream.id();
    let met = guest.meet(Step::Exec, stream_id).await;
    let (input, mut output) = tokio::io::split(inbound.stream);
    let request = serde_json::from_slice::<ExecRequest>(&inbound.payload)
        .map_err(|error| invalid(&error.to_string()));
    let request = match met.and(guest.may_run()).and(request) {
        Ok(request) => request,
        Err(refusal) => {
            send_last(&mut output, chunk::FAILED, &refusal).await;
            return;
        }
    };
    guest.memory().job_ran |= !request.trusted;
    let (stdin, signals, _reader) = read_input(input);
    let mut call = ExecCall {
        request,
        guest: GuestHandle(Arc::clone(guest)),
        stdin,
        output,
        stream: stream_id,
        sent: 0,
        stdout_at: 0,
        stderr_at: 0,
        dropped: 0,
    };
    let (end, timed_out) = run(guest, &mut call, signals).await;
    if end == ExecEnd::NotFound {
        let error = GuestError {
            code: GuestErrorCode::NotFound,
            message: format!(
                "{}: command not found",
                call.request.argv.first().map_or("", |arg| arg)
            ),
        };
        send_last(&mut call.output, chunk::FAILED, &error).await;
        return;
    }
    let exit = exit_of(end, timed_out, call.dropped);
    send_last(&mut call.output, chunk::EXIT, &exit).await;
}

/// Runs the command until it ends, is signalled, or its time is over.
async fn run(
    guest: &Arc<Guest>,
    call: &mut ExecCall,
    mut signals: mpsc::Receiver<i32>,
) -> (ExecEnd, bool) {
    let timeout = match call.request.timeout_ms {
        0 => Duration::MAX,
        ms => Duration::from_millis(ms),
    };
    let action = guest.script.find(&call.request);
    let work = async {
        match action {
            Some(action) => action(call).await,
            None => builtin(call).await,
        }
    };
    tokio::select! {
        end = work => (end, false),
        Some(signal) = signals.recv() => (ExecEnd::Signal(signal), false),
        () = sleep_or_forever(timeout) => (ExecEnd::Signal(libc::SIGKILL), true),
    }
}

async fn sleep_or_forever(time: Duration) {
    if time == Duration::MAX {
        std::future::pending().await
    } else {
        tokio::time::sleep(time).await;
    }
}

fn exit_of(end: ExecEnd, timed_out: bool, output_dropped: u64) -> Exit {
    let (code, signal) = match end {
        ExecEnd::Code(code) => (Some(code), None),
        ExecEnd::Signal(signal) => (None, Some(signal)),
        ExecEnd::OutOfMemory | ExecEnd::NotFound => (None, Some(libc::SIGKILL)),
    };
    Exit {
        code,
        signal,
        oom: end == ExecEnd::OutOfMemory,
        timed_out,
        user_ms: 1,
        system_ms: 1,
        memory_peak: 1 << 20,
        output_dropped,
    }
}

async fn send_last(
    output: &mut tokio::io::WriteHalf<Stream>,
    tag: u8,
    message: &(impl serde::Serialize + Sync),
) {
    let body = serde_json::to_vec(message).unwrap_or_default();
    if write_chunk(output, tag, &body).await.is_ok() {
        // The host may have gone: then nobody misses the end.
        let _ = output.shutdown().await;
    }
}

/// Splits what the host sends into input and signals. The task ends with its guard.
fn read_input(
    mut input: ReadHalf<Stream>,
) -> (
    mpsc::Receiver<Vec<u8>>,
    mpsc::Receiver<i32>,
    tokio::task::JoinSet<()>,
) {
    let (stdin_sender, stdin) = mpsc::channel(STDIN_PIECES);
    let (signal_sender, signals) = mpsc::channel(STDIN_PIECES);
    let mut task = tokio::task::JoinSet::new();
    task.spawn(async move {
        let mut stdin_sender = Some(stdin_sender);
        while let Ok(Some(piece)) = read_chunk(&mut input).await {
            match piece.tag {
                chunk::STDIN => {
                    if let Some(sender) = &stdin_sender {
                        // A command that ended reads no more.
                        let _ = sender.send(piece.body.to_vec()).await;
                    }
                }
                chunk::STDIN_EOF => stdin_sender = None,
                chunk::SIGNAL => {
                    if let Ok(signal) = serde_json::from_slice::<Signal>(&piece.body) {
                        let _ = signal_sender.send(signal.number).await;
                    }
                }
                _ => {}
            }
        }
        // The host half-closed: input ends, the command goes on.
        drop(stdin_sender);
        std::future::pending::<()>().await;
        drop(signal_sender);
    });
    (stdin, signals, task)
}

/// The commands that every simulated guest has, as far as tests need them.
async fn builtin(call: &mut ExecCall) -> ExecEnd {
    let argv = call.request.argv.clone();
    let args: Vec<&str> = argv.iter().map(String::as_str).collect();
    let result = match args.as_slice() {
        [CONTAINER_COMMAND, ..] => {
            call.request.argv.remove(0);
            return Box::pin(container(call)).await;
        }
        ["true"] => Ok(()),
        ["false"] => return ExecEnd::Code(1),
        ["echo", words @ ..] => {
            call.stdout(format!("{}\n", words.join(" ")).as_bytes())
                .await
        }
        ["sleep", seconds] => {
            let seconds = seconds.parse().unwrap_or(0.0);
            tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
            Ok(())
        }
        ["cat"] => loop {
            match call.stdin().await {
                Some(bytes) => {
                    if let Err(error) = call.stdout(&bytes).await {
                        break Err(error);
                    }
                }
                None => break Ok(()),
            }
        },
        ["cat", path] => match call.guest().read(path) {
            Some(content) => call.stdout(&content).await,
            None => return missing(call, path).await,
        },
        ["tee", path] => return tee(call, path).await,
        ["hostname"] => {
            let name = call.guest().0.memory().hostname.clone();
            call.stdout(format!("{name}\n").as_bytes()).await
        }
        ["uname", "-s"] => call.stdout(b"Linux\n").await,
        ["date", "+%s%N"] => {
            let wall = call.guest().0.memory().wall_ns();
            call.stdout(format!("{wall}\n").as_bytes()).await
        }
        ["head", "-c", count, path @ ("/dev/urandom" | "/dev/zero")] => {
            return head(call, count.parse().unwrap_or(0), path).await;
        }
        ["tail", "/dev/zero"] => return eat_memory(call),
        _ => return ExecEnd::NotFound,
    };
    match result {
        Ok(()) => ExecEnd::Code(0),
        Err(_) => ExecEnd::Signal(libc::SIGPIPE),
    }
}

/// Runs a container's command: by the script, else built in.
async fn container(call: &mut ExecCall) -> ExecEnd {
    match call.guest.0.script.find(&call.request) {
        Some(action) => action(call).await,
        None => builtin(call).await,
    }
}

async fn missing(call: &mut ExecCall, path: &str) -> ExecEnd {
    let _ = call
        .stderr(format!("cat: {path}: No such file or directory\n").as_bytes())
        .await;
    ExecEnd::Code(1)
}

async fn tee(call: &mut ExecCall, path: &str) -> ExecEnd {
    let mut content = Vec::new();
    while let Some(bytes) = call.stdin().await {
        content.extend_from_slice(&bytes);
    }
    if path == "/proc/sysrq-trigger" && content.starts_with(b"c") {
        call.guest().power_off(StopReason::GuestPanic);
        std::future::pending::<()>().await;
    }
    if !call.guest().write(path, content.clone()) {
        let _ = call
            .stderr(format!("tee: {path}: Read-only file system\n").as_bytes())
            .await;
        return ExecEnd::Code(1);
    }
    match call.stdout(&content).await {
        Ok(()) => ExecEnd::Code(0),
        Err(_) => ExecEnd::Signal(libc::SIGPIPE),
    }
}

async fn head(call: &mut ExecCall, count: u64, path: &str) -> ExecEnd {
    let mut left = count;
    while left > 0 {
        let piece = match path {
            "/dev/zero" => vec![0; 48 * 1024],
            _ => call.guest().random().to_vec(),
        };
        let take = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if call.stdout(&piece[..take]).await.is_err() {
            return ExecEnd::Signal(libc::SIGPIPE);
        }
        left -= take as u64;
    }
    ExecEnd::Code(0)
}

/// `tail /dev/zero` keeps everything it reads: the classic way to use up memory.
fn eat_memory(call: &ExecCall) -> ExecEnd {
    let count = {
        let mut memory = call.guest().0.memory();
        memory.oom_kills += 1;
        memory.oom_kills
    };
    call.guest().event(GuestEvent::OomKill {
        cgroup: format!("exec-{}", call.stream),
        count,
    });
    ExecEnd::OutOfMemory
}

/// Connects a stream of the host to a port of the guest.
pub(super) async fn serve_forward(guest: &Arc<Guest>, inbound: Inbound) {
    let mut stream = inbound.stream;
    let wanted: Option<Forward> = serde_json::from_slice(&inbound.payload).ok();
    let met = guest.meet(Step::Forward, stream.id()).await;
    let listener = wanted.map(|forward| (forward.port, guest.script.port(forward.port)));
    let refused = |reason: &str| ConnectReply::Refused {
        reason: reason.to_owned(),
    };
    let reply = match (&met, &listener) {
        (Err(error), _) => refused(&error.message),
        (_, Some((_, Some(_)) | (ECHO_PORT, None))) => ConnectReply::Connected,
        _ => refused("connection refused"),
    };
    let connected = reply == ConnectReply::Connected;
    if write_msg(&mut stream, &reply).await.is_err() || !connected {
        let _ = stream.shutdown().await;
        return;
    }
    match listener {
        Some((_, Some(listener))) => listener(stream).await,
        _ => echo(stream).await,
    }
}

async fn echo(mut stream: Stream) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match stream.read(&mut buffer).await {
            Ok(count) if count > 0 => {
                let sent = stream.write_all(&buffer[..count]).await;
                if sent.is_err() || stream.flush().await.is_err() {
                    return;
                }
            }
            _ => break,
        }
    }
    let _ = stream.shutdown().await;
}
