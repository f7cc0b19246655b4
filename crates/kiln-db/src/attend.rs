//! Commands that somebody attends: from the first byte that reaches one on, no other attempt follows.

use kiln_core::{JobState, Lease};

use crate::database::{Database, write_tx};
use crate::door::{DoorError, enter};
use crate::engine::args;

impl Database {
    /// Notes, under the live lease of an attempt that runs, that somebody attends its command: what he gives it is given once, so this attempt is the
    /// last one, however it ends. False when its machine is not ready yet; then nothing is noted.
    ///
    /// # Errors
    /// When the lease is not the live one, or somebody asked to stop the job.
    pub async fn attend(&self, lease: &Lease) -> Result<bool, DoorError> {
        let lease = lease.clone();
        write_tx!(self, "attend a command", [lease], |tx| {
            let live = match enter(tx, &lease, "attend").await? {
                Ok(live) => live,
                Err(refused) => return Ok(Err(refused)),
            };
            if live.cancel.is_some() {
                return Ok(Err(DoorError::Cancelled));
            }
            if !matches!(live.state, JobState::Running { .. }) {
                return Ok(Ok(false));
            }
            let sql = "update jobs set attempts_max = $3 where id = $1 and epoch = $2";
            let number = live.attempt().number;
            tx.exec(sql, args![live.id.as_str(), live.epoch.count, number])
                .await?;
            Ok(Ok(true))
        })?
    }
}
