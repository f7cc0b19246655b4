//! One command of a run: its input and output, its signals, and how it ends.

use std::sync::Arc;
use std::time::Duration;

use kiln_core::{ByteSize, FailureClass, Overrun};
use kiln_proto::Session;
use kiln_proto::msg::{ExecRequest, Exit};
use tokio::io::AsyncRead;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::shown::Shown;
use crate::failure::Failure;
use crate::fleet::mask::Mask;
use crate::joblog::JobLog;
use crate::orders::{self, Control, ExecIo};

/// How long a command may take to end after it was interrupted.
pub const INTERRUPT_GRACE: Duration = Duration::from_secs(2);

/// What a command is connected to.
pub(super) struct ExecParts<'a> {
    /// Standard input, if connected.
    pub(super) stdin: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Gets its output.
    pub(super) output: mpsc::Sender<(u8, Vec<u8>)>,
    /// What it may still write, both streams together.
    pub(super) room: &'a mut Room,
    /// Signals and window sizes.
    pub(super) control: &'a mut mpsc::Receiver<Control>,
    /// The log that is kept.
    pub(super) log: Arc<JobLog>,
    /// Secrets that neither of them gets.
    pub(super) mask: &'a Mask,
}

/// Runs the command; a cancel is an interrupt to it first, and the machine's end soon after.
pub(super) async fn run_exec(
    session: &Session,
    exec: &ExecRequest,
    parts: ExecParts<'_>,
    cancel: &CancellationToken,
) -> Result<Exit, Failure> {
    let ExecParts {
        stdin,
        output,
        room,
        control,
        log,
        mask,
    } = parts;
    let (sender, chunks) = mpsc::channel::<(u8, Vec<u8>)>(64);
    let (orders_in, orders_out) = mpsc::channel(16);
    let relay = Shown::new(mask, output, log).relay(chunks, room);
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
        // What was asked for before, above all a hang-up, comes first; more than the queue holds does not.
        while let Ok(order) = control.try_recv() {
            let _ended = orders_in.send(order).await;
        }
        let _ended = orders_in.send(Control::Signal(2)).await;
        tokio::time::sleep(INTERRUPT_GRACE / 2).await;
        let _ended = orders_in.send(Control::Signal(15)).await;
        tokio::time::sleep(INTERRUPT_GRACE / 2).await;
    };
    let io = ExecIo {
        stdin: stdin.map(|reader| reader as _),
        output: sender,
        control: orders_out,
    };
    let run = async {
        let exec = orders::exec(session, "run the command", exec, io);
        tokio::try_join!(
            async { exec.await.map_err(|error| start_failure(error, Place::New)) },
            relay
        )
    };
    tokio::select! {
        exit = run => {
            let (exit, ()) = exit?;
            if cancel.is_cancelled() { Err(Failure::cancelled()) } else { Ok(exit) }
        }
        () = pass_on => Err(Failure::cancelled()),
    }
}

/// What a job's commands may still write.
#[derive(Debug)]
pub(super) struct Room {
    most: Option<u64>,
    left: u64,
}

impl Room {
    /// For so many bytes; none means no bound.
    pub(super) fn of(most: Option<u64>) -> Self {
        Self {
            most,
            left: most.unwrap_or(u64::MAX),
        }
    }

    /// Cuts off what does not fit.
    pub(super) fn take(&mut self, bytes: &mut Vec<u8>) -> Result<(), Failure> {
        let kept = usize::try_from(self.left).unwrap_or(usize::MAX);
        let over = bytes.len() > kept;
        bytes.truncate(kept);
        self.left = self.left.saturating_sub(bytes.len() as u64);
        match (over, self.most) {
            (true, Some(most)) => Err(output_limit(most)),
            _ => Ok(()),
        }
    }
}

/// The command wrote more than its policy allows. Its machine is destroyed next, and the command with it.
fn output_limit(most: u64) -> Failure {
    let message = format!(
        "output_limit: the command wrote more than {}",
        ByteSize(most)
    );
    Failure::new(FailureClass::User, message)
        .because(Overrun::OutputLimit)
        .hint("write less, or raise limits.output of the policy")
}

/// Where a command was to start: what can be done about one that did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a machine of its own.
    New,
    /// In one that was kept.
    Kept,
}

/// A command that does not exist is the user's error, as in any shell: 127, and 126 where it cannot be run.
#[must_use]
pub fn start_failure(error: orders::CallError, place: Place) -> Failure {
    match error {
        orders::CallError::Refused { error, .. } => {
            let not_found = error.code == kiln_proto::msg::GuestErrorCode::NotFound;
            let failure = Failure::new(FailureClass::User, error.message);
            if !not_found {
                return Failure {
                    command_code: Some(126),
                    ..failure
                };
            }
            let of_folder = failure.message.contains("working directory");
            Failure {
                command_code: Some(127),
                ..failure.hint(match (of_folder, place) {
                    (true, _) => "name a folder that is there, or make it first",
                    (false, Place::New) => "there is no such program in the machine; `--image NAME` runs an image that has it",
                    (false, Place::Kept) => "there is no such program in the machine",
                })
            }
        }
        other => Failure::from(other),
    }
}

#[cfg(test)]
mod tests {
    use kiln_core::command_line::CommandTooLong;
    use kiln_proto::msg::{GuestError, GuestErrorCode};

    use super::*;

    #[test]
    fn what_can_be_sent_to_no_machine_is_its_users_mistake_and_told_with_the_bound() {
        let long = CommandTooLong { len: 20_000 };
        for place in [Place::New, Place::Kept] {
            let failure = start_failure(orders::CallError::TooLong(long), place);
            assert_eq!(
                (failure.class, failure.command_code),
                (FailureClass::Usage, None)
            );
            assert_eq!(failure.message, long.to_string());
            assert_eq!(failure.hint.as_deref(), Some(CommandTooLong::HINT));
        }
    }

    #[test]
    fn what_did_not_start_gets_a_hint_that_fits() {
        let refused = |message: &str, place| {
            let error = GuestError {
                code: GuestErrorCode::NotFound,
                message: message.to_owned(),
            };
            let what = "run the command";
            let failure = start_failure(orders::CallError::Refused { what, error }, place);
            assert_eq!(failure.command_code, Some(127));
            failure.hint.unwrap_or_default()
        };
        let program = "start nosuch: No such file or directory";
        assert!(refused(program, Place::New).contains("--image"));
        let kept = refused(program, Place::Kept);
        assert!(
            kept.contains("no such program") && !kept.contains("--image"),
            "{kept}"
        );
        for place in [Place::New, Place::Kept] {
            let hint = refused("the working directory \"/nosuch\" does not exist", place);
            assert!(
                hint.contains("folder") && !hint.contains("program"),
                "{hint}"
            );
        }
    }
}
