//! What time takes away: leases nobody renewed, workers that fell silent, logs and sources whose jobs are over.

use std::time::Duration;

use kiln_db::{DbError, Retention, Sweep};
use kiln_store::logs::RetentionClass;
use tokio_util::sync::CancellationToken;

use crate::state::Controller;

/// Time between two looks at leases.
pub const EVERY: Duration = Duration::from_secs(1);
/// Time between two looks at what has grown old.
const RETAIN_EVERY: Duration = Duration::from_secs(3600);
/// Looks at leases between two rounds of tidying.
const TIDY_EVERY: u32 = 10;

/// Sweeps until `stop`.
pub async fn run(controller: Controller, stop: CancellationToken) {
    let mut not_before = None;
    let mut round: u32 = 0;
    loop {
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = expire(&controller, &mut not_before).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "leases were not swept"
            );
            continue;
        }
        round = round.wrapping_add(1);
        if round.is_multiple_of(TIDY_EVERY)
            && let Err(error) = tidy(&controller).await
        {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "not everything was tidied"
            );
        }
    }
}

/// Lets finished jobs grow old, until `stop`.
pub async fn retain(controller: Controller, retention: Retention, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(RETAIN_EVERY) => {}
            () = stop.cancelled() => return,
        }
        loop {
            match crate::retention::sweep(&controller.db, &controller.logs, retention, false).await
            {
                Ok(aged) if aged.is_empty() => break,
                Ok(aged) => tracing::info!(jobs = aged.len(), "finished jobs grew older"),
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "not swept");
                    break;
                }
            }
        }
    }
}

async fn expire(controller: &Controller, not_before: &mut Option<u64>) -> Result<(), DbError> {
    // Workers get one TTL to report to a controller that has just started.
    let from = match *not_before {
        Some(from) => from,
        None => *not_before.insert(controller.db.sweep_from().await?),
    };
    loop {
        let swept = controller
            .db
            .expire(Sweep {
                not_before_unix_ms: from,
                grace_ms: controller.db.lease_times().grace_ms,
                jitter: random(),
            })
            .await?;
        for worker in &swept.lost {
            tracing::warn!(%worker, "the worker is silent: it is lost");
        }
        for expired in &swept.expired {
            tracing::warn!(
                attempt = %expired.lease.attempt, worker = %expired.lease.worker,
                now = expired.state.name(), "a lease was not renewed in time"
            );
        }
        if swept.expired.is_empty() {
            return Ok(());
        }
        let count = u64::try_from(swept.expired.len()).unwrap_or(u64::MAX);
        controller.metrics.leases_expired(count);
    }
}

async fn tidy(controller: &Controller) -> Result<(), DbError> {
    for job in controller.secrets.jobs() {
        let over = controller
            .db
            .job(&job)
            .await?
            .is_none_or(|job| job.state.is_terminal());
        if over {
            controller.secrets.forget(&job);
        }
    }
    let Ok(logs) = controller.logs.unarchived().await else {
        return Ok(());
    };
    for name in logs {
        let job = controller.db.job(&name.attempt.job).await?;
        let ended = job.is_none_or(|job| {
            job.state.is_terminal()
                || job
                    .lease
                    .is_some_and(|lease| lease.attempt.number > name.attempt.number)
        });
        if ended {
            let now = controller.db.now().await?;
            if let Err(error) = controller.logs.end(&name, RetentionClass::Hot, now).await {
                tracing::warn!(log = %name, %error, "a log was not put away");
            }
        }
    }
    Ok(())
}

/// A random number, for backoffs and names; 0 without the kernel's help.
pub(crate) fn random() -> u64 {
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => 0,
    }
}
