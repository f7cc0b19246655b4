//! Why a job failed: the class decides the exit code, the message and hint are for the person.

use kiln_core::command_line::CommandTooLong;
use kiln_core::{FailureClass, Overrun, Verdict};
use kiln_machine::driver::{LaunchError, MachineError, MachineState, StopReason};
use kiln_proto::CloseReason;
use kiln_proto::msg::GuestErrorCode;

use crate::orders::{CallError, chain};

/// What the system and the database say of a full disk.
const DISK_FULL: [&str; 2] = ["No space left on device", "database or disk is full"];
/// What to do about one.
pub(crate) const ROOM_HINT: &str = "free some space (`kiln cache prune`) and try again";

/// A job's failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Whose fault.
    pub class: FailureClass,
    /// One sentence.
    pub message: String,
    /// What to try.
    pub hint: Option<String>,
    /// The user's command's own exit code.
    pub command_code: Option<i32>,
    /// The bound that was run over.
    pub reason: Option<Overrun>,
}

impl Failure {
    /// A failure of this class.
    #[must_use]
    pub fn new(class: FailureClass, message: impl Into<String>) -> Self {
        Self {
            class,
            message: message.into(),
            hint: None,
            command_code: None,
            reason: Overrun::of_class(class),
        }
    }

    /// Names the bound that was run over.
    #[must_use]
    pub fn because(mut self, reason: Overrun) -> Self {
        self.reason = Some(reason);
        self
    }

    /// kiln's or the host's failure, with its causes.
    #[must_use]
    pub fn infrastructure(error: &dyn std::error::Error) -> Self {
        let failure = Self::new(FailureClass::Infrastructure, chain(error));
        // However deep it happened, the way out is the same.
        match DISK_FULL.iter().any(|full| failure.message.contains(full)) {
            true => failure.hint(ROOM_HINT),
            false => failure,
        }
    }

    /// Somebody asked to stop.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::new(FailureClass::Cancelled, "cancelled")
    }

    /// Adds a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// As a verdict.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        Verdict::Failed {
            class: self.class,
            message: self.message.clone(),
            hint: self.hint.clone(),
            command_code: self.command_code,
            reason: self.reason,
        }
    }

    /// What a stopped machine means for its job, when the machine's end explains more than the error that was seen first.
    #[must_use]
    pub fn explained_by(self, state: MachineState) -> Self {
        let MachineState::Stopped(reason) = state else {
            return self;
        };
        let (class, message, hint) = match reason {
            StopReason::GuestPanic => (
                FailureClass::GuestFault,
                "the kernel inside the machine panicked".to_owned(),
                Some("if it ran out of memory, try --memory with a larger size".to_owned()),
            ),
            StopReason::HostIo => (
                FailureClass::Infrastructure,
                "the host's disk failed or is full".to_owned(),
                Some(ROOM_HINT.to_owned()),
            ),
            StopReason::VmmDied => (
                FailureClass::Infrastructure,
                format!("QEMU ended unexpectedly ({self})"),
                None,
            ),
            StopReason::PoweredOff | StopReason::Reset => (
                FailureClass::GuestFault,
                "the machine powered itself off during the job".to_owned(),
                None,
            ),
            StopReason::Killed | StopReason::Saved | StopReason::Released => return self,
        };
        Self {
            class,
            message,
            hint,
            command_code: None,
            reason: None,
        }
    }

    /// What the end of the channel means.
    #[must_use]
    pub fn from_close(reason: &CloseReason) -> Self {
        match reason {
            CloseReason::Protocol(error) => Self::new(
                FailureClass::GuestFault,
                format!("the guest broke the protocol: {}", chain(error)),
            ),
            other => Self::new(
                FailureClass::Lost,
                format!("the channel to the machine ended: {other:?}"),
            ),
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        let class = match &error {
            CallError::GuestFault { .. } => FailureClass::GuestFault,
            CallError::Refused { error, .. } => match error.code {
                GuestErrorCode::DiskFull | GuestErrorCode::LimitExceeded => FailureClass::User,
                GuestErrorCode::NotFound => FailureClass::User,
                _ => FailureClass::Infrastructure,
            },
            CallError::TooLong(long) => {
                return Self::new(FailureClass::Usage, long.to_string()).hint(CommandTooLong::HINT);
            }
            CallError::Gone { .. } => FailureClass::Lost,
            CallError::Timeout { .. } | CallError::Source(_) => FailureClass::Infrastructure,
        };
        Self::new(class, chain(&error))
    }
}

impl From<LaunchError> for Failure {
    fn from(error: LaunchError) -> Self {
        let failure = Self::infrastructure(&error);
        match error {
            LaunchError::DiskFull(_) => failure.hint(ROOM_HINT),
            LaunchError::Vmm { .. } => {
                failure.hint("`kiln doctor` says how to install what is missing")
            }
            LaunchError::Template { .. } => {
                failure.hint("`kiln template prune --all` removes templates; they are made again")
            }
            _ => failure,
        }
    }
}

impl From<MachineError> for Failure {
    fn from(error: MachineError) -> Self {
        Self::infrastructure(&error)
    }
}
