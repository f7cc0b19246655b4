//! What a database that was put back finds of the life it was copied from.

use kiln_store::logs::{LogError, LogName, RetentionClass};

use super::refusal::Refused;
use super::who::now_unix_ms;
use crate::state::Controller;

/// A database that was put back from a backup gives attempts numbers they had before: what is kept under this name, though no byte of it
/// was ever noted here, is of that life.
pub(super) async fn forget(controller: &Controller, name: &LogName) -> Result<(), Refused> {
    let known = controller.db.job(&name.attempt.job).await?;
    if known.is_none_or(|job| job.log_bytes > 0) {
        return Ok(());
    }
    let forgotten = async {
        match controller.logs.status(name).await? {
            Some(status) if status.next > 0 || status.ended => {
                tracing::info!(log = %name, "the log of a former life makes room");
                let now = controller.db.now().await;
                let now = now.unwrap_or_else(|_| now_unix_ms());
                controller.logs.end(name, RetentionClass::Hot, now).await?;
                controller.logs.remove(name).await
            }
            _ => Ok(()),
        }
    };
    forgotten.await.map_err(|error: LogError| {
        tracing::warn!(log = %name, %error, "the log of a former life is in the way");
        Refused::unavailable("the log could not be written")
    })
}
