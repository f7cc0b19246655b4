//! What can go wrong with the database itself, under every operation's own refusals.

use std::fmt;

/// The engine's own words. Opaque: callers read the text, never its kind.
#[derive(Debug)]
pub struct Cause(Box<dyn std::error::Error + Send + Sync>);

impl Cause {
    pub(crate) fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(error.into())
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Cause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

/// The database failed, whatever was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// It cannot be reached or does not answer in time. Worth another try; a change may or may not have happened.
    #[error("the database did not answer while kiln wanted to {doing}")]
    Unavailable {
        /// What was being done.
        doing: &'static str,
        /// The engine's words.
        #[source]
        cause: Cause,
    },
    /// Another transaction was in the way, several times.
    #[error("the database was too busy to {doing}")]
    Busy {
        /// What was being done.
        doing: &'static str,
        /// The engine's words.
        #[source]
        cause: Cause,
    },
    /// Its disk is full or cannot be written. Nothing was changed.
    #[error("the database cannot write to its disk: it failed to {doing}")]
    Disk {
        /// What was being done.
        doing: &'static str,
        /// The engine's words.
        #[source]
        cause: Cause,
    },
    /// The file is damaged.
    #[error("the database is damaged: it failed to {doing}")]
    Damaged {
        /// What was being done.
        doing: &'static str,
        /// The engine's words.
        #[source]
        cause: Cause,
    },
    /// A statement failed: a bug of kiln or a database that something else wrote to.
    #[error("the database refused to {doing}")]
    Failed {
        /// What was being done.
        doing: &'static str,
        /// The engine's words.
        #[source]
        cause: Cause,
    },
    /// A row holds what kiln did not write.
    #[error("a row of the database cannot be read: column {column}: {detail}")]
    Unreadable {
        /// The column.
        column: &'static str,
        /// What is there.
        detail: String,
    },
    /// The database was closed.
    #[error("the database is closed")]
    Closed,
}

/// Longest piece of a stored value that an error shows.
const DETAIL_MAX: usize = 200;

impl DbError {
    pub(crate) fn row(column: &'static str, error: sqlx::Error) -> Self {
        Self::unreadable(column, error)
    }

    pub(crate) fn missing(column: &'static str) -> Self {
        Self::unreadable(column, "nothing where something must be")
    }

    pub(crate) fn unreadable(column: &'static str, detail: impl fmt::Display) -> Self {
        Self::Unreadable {
            column,
            detail: detail.to_string().chars().take(DETAIL_MAX).collect(),
        }
    }

    pub(crate) fn arguments(cause: Cause) -> Self {
        Self::Failed {
            doing: "take the values of a statement",
            cause,
        }
    }

    /// Sorts an engine's error by what a caller can do about it.
    pub(crate) fn query(doing: &'static str, error: sqlx::Error) -> Self {
        use sqlx::Error as E;
        let code = error
            .as_database_error()
            .and_then(|error| error.code())
            .map(std::borrow::Cow::into_owned);
        let postgres = error.as_database_error().is_some_and(|error| {
            error
                .try_downcast_ref::<sqlx::postgres::PgDatabaseError>()
                .is_some()
        });
        let cause = |error| Cause(Box::new(error));
        match (&error, code.as_deref()) {
            // A certificate that nobody vouches for does not get better by waiting.
            (E::Io(io), _) if io.kind() == std::io::ErrorKind::InvalidData => Self::Failed {
                doing,
                cause: cause(error),
            },
            (E::Io(_) | E::PoolTimedOut | E::PoolClosed | E::WorkerCrashed, _) => {
                Self::Unavailable {
                    doing,
                    cause: cause(error),
                }
            }
            (_, Some(code)) => Self::coded(doing, code, postgres, cause(error)),
            _ => Self::Failed {
                doing,
                cause: cause(error),
            },
        }
    }

    fn coded(doing: &'static str, code: &str, postgres: bool, cause: Cause) -> Self {
        if postgres {
            return match code {
                // Serialization failure, deadlock, lock timeout.
                "40001" | "40P01" | "55P03" => Self::Busy { doing, cause },
                // Disk full.
                "53100" => Self::Disk { doing, cause },
                // Data or index corrupted.
                "XX001" | "XX002" => Self::Damaged { doing, cause },
                // Too many connections, shutdown, recovery, statement timeout, connection exceptions.
                "53300" | "57P01" | "57P02" | "57P03" | "57014" | "25006" => {
                    Self::Unavailable { doing, cause }
                }
                code if code.starts_with("08") => Self::Unavailable { doing, cause },
                _ => Self::Failed { doing, cause },
            };
        }
        // Extended result codes of SQLite: the low byte is the kind.
        match code.parse::<u32>().unwrap_or(0) & 0xff {
            5 | 6 => Self::Busy { doing, cause },
            8 | 10 | 13 => Self::Disk { doing, cause },
            11 | 26 => Self::Damaged { doing, cause },
            14 => Self::Unavailable { doing, cause },
            _ => Self::Failed { doing, cause },
        }
    }

    /// What a transaction is told whose neighbour in the same commit failed like this and took it along: the same kind, so that whoever
    /// asked can do the same about it.
    pub(crate) fn of_neighbour(&self) -> Self {
        let doing = "commit together with another transaction";
        let cause = Cause::other(match std::error::Error::source(self) {
            Some(cause) => format!("{self}: {cause}"),
            None => self.to_string(),
        });
        match self {
            Self::Disk { .. } => Self::Disk { doing, cause },
            Self::Unavailable { .. } => Self::Unavailable { doing, cause },
            Self::Damaged { .. } => Self::Damaged { doing, cause },
            Self::Closed => Self::Closed,
            // What was wrong with the other one is nothing that is wrong with this one.
            Self::Busy { .. } | Self::Failed { .. } | Self::Unreadable { .. } => {
                Self::Busy { doing, cause }
            }
        }
    }

    /// Whether the same transaction may simply be tried again.
    pub(crate) fn is_contention(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_is_told_what_it_can_do_something_about() {
        let disk = DbError::coded("submit", "13", false, Cause::other("disk full"));
        let told = disk.of_neighbour();
        assert!(matches!(told, DbError::Disk { .. }), "{told:?}");
        let words = std::error::Error::source(&told)
            .expect("a cause")
            .to_string();
        assert!(
            words.contains("submit") && words.contains("disk full"),
            "{words}"
        );
        let bug = DbError::missing("column");
        assert!(bug.of_neighbour().is_contention(), "worth another try");
    }
}
