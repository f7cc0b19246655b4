//! What a build may fork: only a head whose whole chain is what its records say (see [`crate::sealed`]).
//!
//! A tenant's head that is damaged is forgotten and the shared one taken: it only ever was a cache. A damaged shared head is
//! refused, and forgotten so that the next set-up makes it again.

use std::io;

use super::{Head, HeadError, HeadStore, SHARED};
use crate::sealed::{self, Unsound};

/// Name of the note of what was seen of a head's disk.
pub(super) const NOTE: &str = "seen.json";

/// What to fork.
#[derive(Debug)]
pub struct Fork {
    /// The head, its chain sound; `None` when there is none yet.
    pub head: Option<Head>,
    /// The tenant's own head was damaged, for this reason, and has been forgotten.
    pub forgotten: Option<HeadError>,
}

impl HeadStore {
    /// The head a build of a tenant's scope should fork, as [`HeadStore::to_fork`] chooses it, with every file of its chain checked: in full
    /// at the first use after the host booted.
    ///
    /// # Errors
    /// When the shared head is damaged, or the store cannot be read.
    pub fn sound_to_fork(&self, scope: &str, buildkit: &str) -> Result<Fork, HeadError> {
        let mut forgotten = None;
        if scope != SHARED
            && let Err(error) = self.current(scope)
        {
            forgotten = Some(self.forget_damaged(scope, error)?);
        }
        let head = self.to_fork(scope, buildkit).or_else(|error| {
            // The shared head's record: nothing can stand on it.
            Err(self.forget_damaged(SHARED, error)?)
        })?;
        let Some(head) = head else {
            return Ok(Fork { head, forgotten });
        };
        let Err(error) = self.check_chain(&head) else {
            let head = Some(head);
            return Ok(Fork { head, forgotten });
        };
        let error = self.forget_damaged(&head.scope, error)?;
        if head.scope == SHARED {
            return Err(error);
        }
        let shared = self.sound_to_fork(SHARED, buildkit)?;
        Ok(Fork {
            head: shared.head,
            forgotten: Some(error),
        })
    }

    /// Checks every file from a head down to the shared disk.
    fn check_chain(&self, head: &Head) -> Result<(), HeadError> {
        for member in self.chain(head)? {
            let dir = self.dir(&member.scope, &member.id);
            sealed::check(&self.disk(&member), member.disk, &dir.join(NOTE)).map_err(
                |unsound| {
                    let why = match unsound {
                        Unsound::Io(error) if error.kind() != io::ErrorKind::NotFound => {
                            return super::io_error("read", &dir)(error);
                        }
                        other => other.to_string(),
                    };
                    HeadError::Corrupt {
                        id: member.id.clone(),
                        why,
                    }
                },
            )?;
        }
        Ok(())
    }

    /// Forgets a scope's head because of this error; an error that is no damage stays an error.
    fn forget_damaged(&self, scope: &str, error: HeadError) -> Result<HeadError, HeadError> {
        let gone = matches!(&error, HeadError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound);
        if !error.is_damage() && !gone {
            return Err(error);
        }
        let _lock = self.lock(scope)?;
        self.forget(scope)?;
        Ok(error)
    }
}
