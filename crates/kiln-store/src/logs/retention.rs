//! What an ended log says of how long it is wanted. Who decides when it goes is its controller, by the rows of its jobs.

use serde::{Deserialize, Serialize};

/// How long a log was meant to be kept when it ended; a part of its index.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum RetentionClass {
    /// As any other.
    #[default]
    Hot,
    /// About a year.
    Warm,
    /// For years.
    Cold,
}

impl RetentionClass {
    /// Stable short name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }
}
