//! One error for everything the system refuses, and its translation for the host.

use std::error::Error;
use std::io;

use kiln_proto::msg::{GuestError, GuestErrorCode};
use rustix::io::Errno;

/// A system call or file that failed, and what it was for.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(crate) struct SysError {
    /// What was attempted.
    pub(crate) what: String,
    /// What the system said.
    #[source]
    pub(crate) source: io::Error,
}

impl SysError {
    /// An error that is not the kernel's.
    pub(crate) fn other(what: impl Into<String>, why: &str) -> Self {
        Self {
            what: what.into(),
            source: io::Error::other(why.to_owned()),
        }
    }

    /// Something took too long.
    pub(crate) fn timeout(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            source: io::ErrorKind::TimedOut.into(),
        }
    }
}

/// Adds what was attempted to a failure.
pub(crate) trait Context<T> {
    /// `what` is only made when it is needed.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, SysError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, SysError> {
        self.map_err(|source| SysError {
            what: what(),
            source: source.into(),
        })
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// What the host is told about a failure of the system.
pub(crate) fn code_of(error: &io::Error) -> GuestErrorCode {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT | Errno::NOTDIR) => GuestErrorCode::NotFound,
        Some(Errno::NOSPC | Errno::DQUOT) => GuestErrorCode::DiskFull,
        Some(Errno::LOOP | Errno::XDEV) => GuestErrorCode::UnsafePath,
        Some(Errno::TIMEDOUT) => GuestErrorCode::Timeout,
        Some(_) => GuestErrorCode::System,
        None => match error.kind() {
            io::ErrorKind::TimedOut => GuestErrorCode::Timeout,
            io::ErrorKind::NotFound => GuestErrorCode::NotFound,
            io::ErrorKind::StorageFull => GuestErrorCode::DiskFull,
            _ => GuestErrorCode::System,
        },
    }
}

impl From<SysError> for GuestError {
    fn from(error: SysError) -> Self {
        Self {
            code: code_of(&error.source),
            message: chain(&error),
        }
    }
}

/// An order that makes no sense.
pub(crate) fn invalid(message: impl Into<String>) -> GuestError {
    GuestError {
        code: GuestErrorCode::Invalid,
        message: message.into(),
    }
}

/// A failure with a code of its own.
pub(crate) fn failure(code: GuestErrorCode, message: impl Into<String>) -> GuestError {
    GuestError {
        code,
        message: message.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_told_the_kind_and_the_whole_chain() {
        let failed: Result<(), Errno> = Err(Errno::NOSPC);
        let error = failed.context(|| "write /x".to_owned()).unwrap_err();
        let told = GuestError::from(error);
        assert_eq!(told.code, GuestErrorCode::DiskFull);
        assert!(
            told.message.starts_with("write /x: No space left"),
            "{}",
            told.message
        );
        assert_eq!(
            GuestError::from(SysError::timeout("wait")).code,
            GuestErrorCode::Timeout
        );
    }
}
