//! What came of an attempt: the verdict, whose fault a failure was, and the exit code it gives.

use serde::{Deserialize, Serialize};

/// Whose fault a failure was. Decides the exit code and whether the job is tried again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// The user's build or command failed.
    User,
    /// The request itself is wrong: usage, configuration, unreadable source.
    Usage,
    /// A deadline the user or policy set has passed.
    Timeout,
    /// The machine's or a step's memory limit was hit.
    OutOfMemory,
    /// A policy refused what was asked.
    Policy,
    /// The guest broke the protocol or claimed what the host disproved. Never retried, never counted against a host.
    GuestFault,
    /// kiln or its host failed.
    Infrastructure,
    /// The worker vanished.
    Lost,
    /// Somebody asked to stop it.
    Cancelled,
}

impl FailureClass {
    /// Only failures that are nobody's decision and not the guest's are tried again.
    #[must_use]
    pub fn is_retried(self) -> bool {
        matches!(self, Self::Infrastructure | Self::Lost)
    }

    /// Exit code of the `kiln` command for this class. Stable: see COMPATIBILITY.md.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::User | Self::OutOfMemory => 1,
            Self::Usage => 2,
            Self::Infrastructure | Self::Lost => 3,
            Self::Policy => 4,
            Self::GuestFault => 5,
            Self::Timeout => 124,
            Self::Cancelled => 130,
        }
    }
}

/// Final verdict of an attempt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum Verdict {
    /// It did what was asked.
    Passed,
    /// It did not.
    Failed {
        /// Whose fault.
        class: FailureClass,
        /// One sentence for a person.
        message: String,
        /// What to try, if kiln knows.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
        /// Exit code of the user's own command, where one ran.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        command_code: Option<i32>,
    },
}

/// Verdict plus what was measured on the way.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Passed or failed.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// Wall time of each phase in milliseconds, in order.
    pub phases_ms: Vec<(String, u64)>,
}

impl Outcome {
    /// Exit code of the `kiln` command that waited for this outcome.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match &self.verdict {
            Verdict::Passed => 0,
            Verdict::Failed { class, .. } => class.exit_code(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_infrastructure_and_lost_are_retried() {
        use FailureClass::*;
        let all = [
            User,
            Usage,
            Timeout,
            OutOfMemory,
            Policy,
            GuestFault,
            Infrastructure,
            Lost,
            Cancelled,
        ];
        let retried: Vec<_> = all.into_iter().filter(|c| c.is_retried()).collect();
        assert_eq!(retried, [Infrastructure, Lost]);
        assert_eq!(GuestFault.exit_code(), 5);
    }
}
