//! The right of one worker to run one attempt. Every side effect carries it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{AttemptId, TenantName, WorkerId};

/// Counts claims of a job. The incarnation changes when a database is restored from a backup, so
/// that no lease from before the restore can be mistaken for a live one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Epoch {
    /// Which life of the database.
    pub incarnation: u64,
    /// Which claim within it.
    pub count: u64,
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.incarnation, self.count)
    }
}

/// A time-limited right of one worker to run one attempt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Lease {
    /// What may be run.
    pub attempt: AttemptId,
    /// For whom.
    pub tenant: TenantName,
    /// By whom.
    pub worker: WorkerId,
    /// Which claim this is; a side effect with an older one is refused.
    pub epoch: Epoch,
    /// When the right ends, in milliseconds since the Unix epoch.
    pub deadline_unix_ms: u64,
}

/// Why a side effect was refused at a door.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum LeaseRefused {
    /// Another worker holds the attempt.
    #[error("attempt {attempt} belongs to worker {holder}, not to {asked}")]
    OtherWorker {
        /// The attempt.
        attempt: AttemptId,
        /// Who holds it.
        holder: WorkerId,
        /// Who asked.
        asked: WorkerId,
    },
    /// The attempt was claimed again since.
    #[error("lease epoch {asked} of attempt {attempt} is stale: the live one is {live}")]
    StaleEpoch {
        /// The attempt.
        attempt: AttemptId,
        /// The epoch presented.
        asked: Epoch,
        /// The live epoch.
        live: Epoch,
    },
    /// The deadline has passed.
    #[error("lease of attempt {attempt} has expired")]
    Expired {
        /// The attempt.
        attempt: AttemptId,
    },
    /// The attempt has ended.
    #[error("attempt {attempt} has ended")]
    Ended {
        /// The attempt.
        attempt: AttemptId,
    },
}

impl Lease {
    /// Checks a presented lease against the live one, at `now_unix_ms`. Every door calls this.
    ///
    /// # Errors
    /// The reason for refusing.
    pub fn check(&self, live: Option<&Lease>, now_unix_ms: u64) -> Result<(), LeaseRefused> {
        let attempt = self.attempt.clone();
        let Some(live) = live.filter(|live| live.attempt == self.attempt) else {
            return Err(LeaseRefused::Ended { attempt });
        };
        if live.worker != self.worker {
            return Err(LeaseRefused::OtherWorker {
                attempt,
                holder: live.worker.clone(),
                asked: self.worker.clone(),
            });
        }
        if live.epoch != self.epoch {
            return Err(LeaseRefused::StaleEpoch {
                attempt,
                asked: self.epoch,
                live: live.epoch,
            });
        }
        if now_unix_ms >= live.deadline_unix_ms {
            return Err(LeaseRefused::Expired { attempt });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease() -> Lease {
        Lease {
            attempt: AttemptId {
                job: "b1".parse().expect("name"),
                number: 1,
            },
            tenant: TenantName::local(),
            worker: "w1".parse().expect("name"),
            epoch: Epoch {
                incarnation: 1,
                count: 4,
            },
            deadline_unix_ms: 100,
        }
    }

    #[test]
    fn each_reason_to_refuse() {
        let live = lease();
        assert_eq!(live.check(Some(&live), 99), Ok(()));
        assert!(matches!(
            live.check(Some(&live), 100),
            Err(LeaseRefused::Expired { .. })
        ));
        assert!(matches!(
            live.check(None, 0),
            Err(LeaseRefused::Ended { .. })
        ));
        let stale = Lease {
            epoch: Epoch {
                incarnation: 0,
                count: 4,
            },
            ..lease()
        };
        assert!(matches!(
            stale.check(Some(&live), 0),
            Err(LeaseRefused::StaleEpoch { .. })
        ));
        let other = Lease {
            worker: "w2".parse().expect("name"),
            ..lease()
        };
        assert!(matches!(
            other.check(Some(&live), 0),
            Err(LeaseRefused::OtherWorker { .. })
        ));
    }
}
