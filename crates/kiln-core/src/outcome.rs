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

/// A bound that was run over, by its name for programs. The class says whose fault it was; this says what there was too little of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overrun {
    /// Time.
    Timeout,
    /// Memory of the machine, or of a step.
    OutOfMemory,
    /// The machine's own disk.
    DiskFull,
    /// Bytes of output that its policy allows.
    OutputLimit,
    /// Processes that its policy allows.
    ProcessLimit,
    /// One that this kiln does not know.
    #[serde(other)]
    Other,
}

impl Overrun {
    /// The one that a class says already.
    #[must_use]
    pub fn of_class(class: FailureClass) -> Option<Self> {
        match class {
            FailureClass::Timeout => Some(Self::Timeout),
            FailureClass::OutOfMemory => Some(Self::OutOfMemory),
            _ => None,
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
        /// Which bound was run over, if one was.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<Overrun>,
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
    fn a_bound_has_a_name_and_one_of_later_is_read() {
        let failed = |reason: &str| {
            let text = format!(
                r#"{{"verdict":"failed","class":"user","message":"m"{reason},"phases_ms":[]}}"#
            );
            let outcome: Outcome = serde_json::from_str(&text).expect("an outcome");
            match outcome.verdict {
                Verdict::Failed { reason, .. } => reason,
                Verdict::Passed => panic!("it failed"),
            }
        };
        assert_eq!(failed(""), None);
        assert_eq!(failed(r#","reason":"disk_full""#), Some(Overrun::DiskFull));
        assert_eq!(failed(r#","reason":"of_later""#), Some(Overrun::Other));
        let word = serde_json::to_string(&Overrun::ProcessLimit).expect("JSON");
        assert_eq!(word, "\"process_limit\"");
    }

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
