//! The one error a person sees: what happened, whose fault it was, and what to try.

use std::fmt;

use kiln_core::{FailureClass, Overrun};

/// An error at the edge.
#[derive(Debug)]
pub(crate) struct CliError {
    /// Decides the exit code.
    pub class: FailureClass,
    /// One sentence.
    pub message: String,
    /// What to try.
    pub hints: Vec<String>,
    /// A command's own exit code, passed through by `kiln run`.
    pub command_code: Option<u8>,
    /// The bound that was run over.
    pub reason: Option<Overrun>,
}

/// Result of a verb.
pub(crate) type Result<T, E = CliError> = std::result::Result<T, E>;

impl CliError {
    /// An error of this class.
    pub(crate) fn new(class: FailureClass, message: impl Into<String>) -> Self {
        Self {
            class,
            message: message.into(),
            hints: Vec::new(),
            command_code: None,
            reason: None,
        }
    }

    /// Wrong usage or configuration.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(FailureClass::Usage, message)
    }

    /// kiln's own or the host's failure, with its causes.
    pub(crate) fn infrastructure(error: &dyn std::error::Error) -> Self {
        Self::from_failure(kiln_worker::failure::Failure::infrastructure(error))
    }

    /// Adds a hint.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// From a job's failure.
    pub(crate) fn from_failure(failure: kiln_worker::failure::Failure) -> Self {
        let kiln_worker::failure::Failure {
            class,
            message,
            hint,
            command_code,
            reason,
        } = failure;
        let command_code = command_code.and_then(|code| u8::try_from(code).ok());
        Self {
            class,
            message,
            hints: hint.into_iter().collect(),
            command_code,
            reason,
        }
    }

    /// The exit code of the process.
    pub(crate) fn exit_code(&self) -> u8 {
        self.command_code.unwrap_or_else(|| self.class.exit_code())
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CliError {}

/// Turns any error with causes into an infrastructure error.
pub(crate) trait OrInfrastructure<T> {
    /// See the trait.
    fn or_infrastructure(self) -> Result<T>;
}

impl<T, E: std::error::Error> OrInfrastructure<T> for std::result::Result<T, E> {
    fn or_infrastructure(self) -> Result<T> {
        self.map_err(|error| CliError::infrastructure(&error))
    }
}
