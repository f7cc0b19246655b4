//! `kiln exec` and `kiln console`: commands in a kept machine, their streams, their terminal.

use std::io::{self, IsTerminal as _};

use kiln_core::{FailureClass, Overrun};
use kiln_proto::msg::Exit;
use kiln_worker::kept::ask::ExecAsk;
use kiln_worker::kept::client;
use kiln_worker::orders::{Control, ExecIo};
use kiln_worker::run::exit_code;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Machine, refused};
use crate::args::{ConsoleArgs, ExecArgs, ServerArgs};
use crate::commands::source;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::Screen;
use crate::terminal::{self, RawMode, Shown, USUAL_SIZE};

/// Exit code when nobody reads the output any more: 128 and SIGPIPE, as a shell has it.
const READER_GONE: u8 = 141;
/// Exit code of an interrupt.
const INTERRUPTED: u8 = 130;
/// What leaves a console when it comes twice in a row: Ctrl-].
const LEAVE: u8 = 0x1d;
/// Keys that wait for a machine that does not read.
const KEYS: usize = 64 * 1024;
/// A shell that every image with a shell has, and the better one where it is.
const SHELL: [&str; 3] = [
    "/bin/sh",
    "-c",
    "command -v bash >/dev/null 2>&1 && exec bash || exec sh",
];

/// `kiln exec`.
pub(in crate::commands) async fn run(
    args: ExecArgs,
    said: &ServerArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    if args.tty && screen.json() {
        return Err(no_screen("-t"));
    }
    let env = source::pairs(&args.env, "--env")?;
    let machine = Machine::named(said, &args.id).await?;
    let tty = args.tty.then(|| terminal::size().unwrap_or(USUAL_SIZE));
    let ask = ExecAsk {
        argv: args.command,
        env: env.into_iter().collect(),
        cwd: args.workdir.unwrap_or_default(),
        stdin: tty.is_some() || args.interactive || terminal::stdin_is_piped(),
        tty,
        in_machine: false,
    };
    let code = attach(&machine, ask, screen, None, &cancel).await?;
    if screen.json() {
        let told = serde_json::json!({ "event": "exit", "machine": machine.id(), "code": code });
        screen.data(&told, String::new);
    }
    Ok(code)
}

/// Events of `--json` leave no place for a screen.
fn no_screen(what: &str) -> CliError {
    let error = CliError::usage(format!("{what} shows a terminal, --json prints events"));
    error.hint("leave one of them out")
}

/// `kiln console`.
pub(in crate::commands) async fn console(
    args: ConsoleArgs,
    said: &ServerArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    if screen.json() {
        return Err(
            no_screen("a console").hint("kiln exec runs a command and tells its output as events")
        );
    }
    let env = source::pairs(&args.env, "--env")?;
    let machine = Machine::named(said, &args.id).await?;
    stand_in(
        &machine,
        (args.command, env.into_iter().collect()),
        screen,
        &cancel,
    )
    .await
}

/// A shell, or another command, on this process's terminal.
///
/// # Errors
/// When there is no terminal, or what the keeper says.
pub(in crate::commands) async fn stand_in(
    machine: &Machine,
    (command, env): (Vec<String>, Vec<(String, String)>),
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<u8> {
    if !terminal::is_interactive() {
        return Err(
            CliError::usage("a console needs a terminal on both ends").hint(format!(
                "kiln exec {} -- COMMAND runs a command without one",
                machine.id()
            )),
        );
    }
    let argv = match command.is_empty() {
        true => SHELL.map(str::to_owned).to_vec(),
        false => command,
    };
    screen.note(&format!(
        "in {}; Ctrl-] twice leaves, and ends what runs here",
        machine.shown()
    ));
    let ask = ExecAsk {
        argv,
        env,
        tty: Some(terminal::size().unwrap_or(USUAL_SIZE)),
        stdin: true,
        ..ExecAsk::default()
    };
    let left = CancellationToken::new();
    let code = attach(machine, ask, screen, Some(&left), cancel).await?;
    if left.is_cancelled() {
        screen.note(&format!("left {}", machine.shown()));
    }
    Ok(code)
}

/// Runs a command with this process's streams. With `left`, two [`LEAVE`] in a row leave it.
async fn attach(
    machine: &Machine,
    ask: ExecAsk,
    screen: Screen,
    left: Option<&CancellationToken>,
    cancel: &CancellationToken,
) -> Result<u8> {
    let (output, chunks) = mpsc::channel(64);
    let (control_in, control) = mpsc::channel::<Control>(16);
    let raw = (ask.tty.is_some() && io::stdin().is_terminal()).then(RawMode::enter);
    let raw = raw.transpose().or_infrastructure()?;
    let stop = cancel.child_token();
    let shown = match (screen.json(), ask.tty) {
        (true, _) => Shown::Events,
        (false, Some(_)) => Shown::Terminal,
        (false, None) => Shown::Streams,
    };
    let printing = tokio::spawn(terminal::print(chunks, stop.clone(), shown));
    let resizing = ask
        .tty
        .map(|_| tokio::spawn(terminal::watch_size(control_in.clone())));
    // A closed control channel would mean nobody can signal the command any more.
    let _control = control_in;
    let stdin: Option<Box<dyn AsyncRead + Send + Unpin>> = match (ask.stdin, left) {
        (false, _) => None,
        (true, None) => Some(terminal::stdin()),
        (true, Some(left)) => Some(Box::new(keys(terminal::stdin(), left.clone()))),
    };
    let io = ExecIo {
        stdin,
        output,
        control,
    };
    let leaves = async {
        match left {
            Some(left) => left.cancelled().await,
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        ended = client::exec(machine.reach(), ask, io, &stop) => ended.map_err(refused),
        // Dropped, the keeper ends the command.
        () = leaves => Ok(None),
    };
    let printed = printing.await.unwrap_or(Ok(()));
    if let Some(task) = resizing {
        task.abort();
    }
    drop(raw);
    let code = match ended? {
        Some(exit) => {
            let code = u8::try_from(exit_code(&exit)).unwrap_or(1);
            out_of_memory(&exit, code)?;
            code
        }
        None if left.is_some_and(CancellationToken::is_cancelled) => 0,
        None => INTERRUPTED,
    };
    match printed {
        Ok(()) => Ok(code),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(READER_GONE),
        Err(error) => Err(CliError::new(
            FailureClass::Infrastructure,
            format!("the command's output could not be written: {error}"),
        )),
    }
}

/// A command that the machine's memory was too small for is told by that name; the exit code is the command's own.
fn out_of_memory(exit: &Exit, code: u8) -> Result<()> {
    if !exit.oom {
        return Ok(());
    }
    let message = "the command ran out of memory";
    Err(CliError {
        command_code: Some(code),
        reason: Some(Overrun::OutOfMemory),
        ..CliError::new(FailureClass::OutOfMemory, message)
            .hint("a machine keeps the memory that it began with: begin another with --memory")
    })
}

/// Passes keys on; the one that leaves is held until it is known whether another follows.
fn keys(
    mut from: impl AsyncRead + Send + Unpin + 'static,
    left: CancellationToken,
) -> DuplexStream {
    let (mut to, keys) = tokio::io::duplex(KEYS);
    tokio::spawn(async move {
        let mut leaving = Leaving::default();
        let mut buffer = vec![0; 4096];
        loop {
            let count = from.read(&mut buffer).await.unwrap_or(0);
            if count == 0 {
                return;
            }
            let (passed, leaves) = leaving.passes(&buffer[..count]);
            let written = to.write_all(&passed).await;
            if leaves {
                left.cancel();
            }
            if leaves || written.is_err() {
                return;
            }
        }
    });
    keys
}

/// Whether the last key was a [`LEAVE`] that was not passed on yet.
#[derive(Debug, Default)]
struct Leaving(bool);

impl Leaving {
    /// What reaches the machine, and whether its user leaves.
    fn passes(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(bytes.len() + 1);
        for byte in bytes {
            match (std::mem::take(&mut self.0), *byte == LEAVE) {
                (true, true) => return (passed, true),
                (false, true) => self.0 = true,
                (true, false) => passed.extend([LEAVE, *byte]),
                (false, false) => passed.push(*byte),
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_two_in_a_row_leave() {
        let mut leaving = Leaving::default();
        assert_eq!(leaving.passes(b"ls\r"), (b"ls\r".to_vec(), false));
        assert_eq!(leaving.passes(b"a\x1d"), (b"a".to_vec(), false));
        assert_eq!(leaving.passes(b"b"), (b"\x1db".to_vec(), false));
        assert_eq!(leaving.passes(b"\x1d"), (Vec::new(), false));
        assert_eq!(leaving.passes(b"\x1dx"), (Vec::new(), true));
    }

    #[tokio::test]
    async fn leaving_ends_the_keys_and_says_so() {
        let left = CancellationToken::new();
        let (mut typed, from) = tokio::io::duplex(64);
        let mut keys = keys(from, left.clone());
        typed.write_all(b"x\x1d\x1dy").await.expect("typed");
        let mut passed = Vec::new();
        keys.read_to_end(&mut passed).await.expect("read");
        assert_eq!(passed, b"x");
        left.cancelled().await;
    }
}
