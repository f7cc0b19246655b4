//! The user's terminal as `kiln run` hands it to a command: raw mode, size, input, output byte for byte.

use std::io::{self, IsTerminal, Read as _, Write};
use std::sync::{Mutex, PoisonError};

use kiln_proto::msg::TtySize;
use kiln_worker::orders::Control;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::io::AsyncRead;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::neutral::Neutral;
use crate::printed::Printed;
use crate::show::json_line;

/// Whether both ends are a terminal.
pub(crate) fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Whether standard input comes from a file or pipe that somebody connected on purpose.
pub(crate) fn stdin_is_piped() -> bool {
    use rustix::fs::{FileType, fstat};
    let Ok(stat) = fstat(io::stdin()) else {
        return false;
    };
    matches!(
        FileType::from_raw_mode(stat.st_mode),
        FileType::Fifo | FileType::RegularFile
    )
}

/// Size of a terminal that does not say its own.
pub(crate) const USUAL_SIZE: TtySize = TtySize { rows: 24, cols: 80 };

/// Size of the terminal.
pub(crate) fn size() -> Option<TtySize> {
    let size = tcgetwinsize(io::stdout()).ok()?;
    Some(match (size.ws_row, size.ws_col) {
        (0, _) | (_, 0) => USUAL_SIZE,
        (rows, cols) => TtySize { rows, cols },
    })
}

/// Standard input of this process.
pub(crate) fn stdin() -> Box<dyn AsyncRead + Send + Unpin> {
    Box::new(tokio::io::stdin())
}

/// How a command's output is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Shown {
    /// Each stream as this process's own. A terminal is not driven by it.
    Streams,
    /// The command has the terminal, and drives it.
    Terminal,
    /// As events on standard output.
    Events,
}

/// Writes the command's output to this process's own streams until the command ends. When that fails, `stop` ends the command, as a pipe
/// without a reader ends any program that writes to it; gives the first error.
pub(crate) async fn print(
    chunks: mpsc::Receiver<(u8, Vec<u8>)>,
    stop: CancellationToken,
    shown: Shown,
) -> io::Result<()> {
    match shown {
        Shown::Events => print_events(chunks, stop).await,
        Shown::Streams | Shown::Terminal => {
            print_bytes(chunks, stop, shown == Shown::Terminal).await
        }
    }
}

async fn print_events(
    mut chunks: mpsc::Receiver<(u8, Vec<u8>)>,
    stop: CancellationToken,
) -> io::Result<()> {
    let mut streams = [Printed::of("stdout"), Printed::of("stderr")];
    let mut first = Ok(());
    while let Some((stream, bytes)) = chunks.recv().await {
        if first.is_err() {
            continue;
        }
        first = match streams[usize::from(stream != 1)].event(&bytes) {
            Some(event) => write(1, format!("{}\n", json_line(&event)).as_bytes()),
            None => Ok(()),
        };
        if first.is_err() {
            stop.cancel();
        }
    }
    for event in streams.iter_mut().filter_map(Printed::rest) {
        if first.is_ok() {
            first = write(1, format!("{}\n", json_line(&event)).as_bytes());
        }
    }
    first
}

async fn print_bytes(
    mut chunks: mpsc::Receiver<(u8, Vec<u8>)>,
    stop: CancellationToken,
    interactive: bool,
) -> io::Result<()> {
    let shown = |terminal: bool| (terminal && !interactive).then(Neutral::default);
    let mut streams = [
        shown(io::stdout().is_terminal()),
        shown(io::stderr().is_terminal()),
    ];
    let mut first = Ok(());
    while let Some((stream, mut bytes)) = chunks.recv().await {
        if first.is_err() {
            continue;
        }
        if let Some(neutral) = &mut streams[usize::from(stream != 1)] {
            bytes = neutral.text(&bytes).into_bytes();
        }
        first = write(stream, &bytes);
        if first.is_err() {
            stop.cancel();
        }
    }
    for (stream, neutral) in (1..).zip(&mut streams) {
        let rest = neutral.as_mut().map(Neutral::rest).unwrap_or_default();
        if first.is_ok() && !rest.is_empty() {
            first = write(stream, rest.as_bytes());
        }
    }
    first
}

fn write(stream: u8, bytes: &[u8]) -> io::Result<()> {
    if stream == 1 {
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush())
    } else {
        let mut err = io::stderr().lock();
        err.write_all(bytes).and_then(|()| err.flush())
    }
}

/// Tells the command when the window changes.
pub(crate) async fn watch_size(control: mpsc::Sender<Control>) {
    let Ok(mut changed) = signal(SignalKind::window_change()) else {
        return;
    };
    while changed.recv().await.is_some() {
        let Some(size) = size() else { continue };
        if control.send(Control::Resize(size)).await.is_err() {
            return;
        }
    }
}

/// How the terminal was, while it is in raw mode: for ways out of the process that drop nothing.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Puts the terminal back as it was, when it is in raw mode. For every way out: also a panic, and an exit that drops nothing.
pub(crate) fn restore() {
    // A panic inside must not leave it raw.
    let mut before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(before) = before.take() {
        let _terminal_gone = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// Reads a line that is not shown as it is typed; at most this many bytes, without its newline.
///
/// # Errors
/// When standard input is no terminal.
pub(crate) fn hidden_line(most: usize) -> io::Result<Vec<u8>> {
    let _quiet = Quiet::enter()?;
    let mut line = Vec::new();
    let mut input = io::stdin().lock();
    while line.len() < most {
        let mut byte = [0];
        if input.read(&mut byte)? == 0 || byte[0] == b'\n' {
            break;
        }
        line.push(byte[0]);
    }
    Ok(line)
}

/// The terminal without echo, until this is dropped.
#[derive(Debug)]
struct Quiet {
    before: Termios,
}

impl Quiet {
    fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        quiet.local_modes.insert(LocalModes::ECHONL);
        // What was typed before the question is no answer to it.
        tcsetattr(io::stdin(), OptionalActions::Flush, &quiet)?;
        Ok(Self { before })
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        let _terminal_gone = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// The terminal in raw mode, until this is dropped.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Enters raw mode on standard input.
    ///
    /// # Errors
    /// When it is no terminal.
    pub(crate) fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let raw_mode = Self(());
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(raw_mode)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}
