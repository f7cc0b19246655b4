//! The end of a trusted, successful build: its overlay becomes the next cache head of the scope that it forked (`crate::fork`).
//!
//! DESIGN "Rules", 5: stop BuildKit, unmount, flush, put the overlay on the head itself (what a template wrote in between is
//! copied into it), compare and set. Any doubt means no commit: the next build forks the old head.

use kiln_core::machine::DiskFormat;
use kiln_core::{DiskRole, Lease};
use kiln_image::heads::{Candidate, Commit, Head, OVERLAYS_MAX, SHARED};
use kiln_machine::disk;
use kiln_proto::msg::Order;

use crate::attempt::{Attempt, STOP_TIMEOUT};
use crate::failure::Failure;
use crate::host::{Host, now_unix_ms};
use crate::orders;

/// Commits the disk of a machine that [`seal`] ended; gives the new head's id, or `None` when another build was first.
///
/// # Errors
/// When the disk tools or the filesystem failed.
pub async fn commit(
    host: &Host,
    attempt: &Attempt,
    lease: &Lease,
    scope: &str,
    parent: &Head,
) -> Result<Option<String>, Failure> {
    let overlay = attempt.machine.take_disk(DiskRole::State)?;
    let below = if parent.depth >= OVERLAYS_MAX {
        root_of(host, parent)?
    } else {
        parent.clone()
    };
    let disk_failure = |error: disk::DiskError| Failure::infrastructure(&error);
    disk::rebase(&overlay, &host.heads.disk(&below), DiskFormat::Qcow2)
        .await
        .map_err(disk_failure)?;
    let name = host.heads.name_below(&below);
    disk::name_backing(&overlay, &name, DiskFormat::Qcow2)
        .await
        .map_err(disk_failure)?;
    let heads = host.heads.clone();
    let (scope, parent) = (scope.to_owned(), parent.clone());
    let written_by = lease.attempt.to_string();
    let buildkit = host.image.buildkit.clone();
    let done = tokio::task::spawn_blocking(move || {
        let candidate = Candidate {
            file: &overlay,
            stands_on: Some(&below),
            written_by,
            buildkit,
            now_unix_ms: now_unix_ms(),
        };
        heads.commit(&scope, Some(&parent), &candidate)
    })
    .await
    .map_err(|error| Failure::infrastructure(&error))?
    .map_err(|error| Failure::infrastructure(&error))?;
    match done {
        Commit::Committed(head) => Ok(Some(head.id)),
        Commit::LostRace { .. } => Ok(None),
    }
}

/// Stops BuildKit, unmounts its disk and powers the machine off.
///
/// # Errors
/// When any of it did not end cleanly.
pub async fn seal(attempt: &Attempt) -> Result<(), Failure> {
    crate::buildkit::stop(&attempt.session).await?;
    let unmount = Order::Unmount {
        serial: DiskRole::State.serial().to_owned(),
    };
    orders::call_done(&attempt.session, "unmount its disk", &unmount, STOP_TIMEOUT).await?;
    attempt.power_off().await
}

fn root_of(host: &Host, head: &Head) -> Result<Head, Failure> {
    let chain = host
        .heads
        .chain(head)
        .map_err(|error| Failure::infrastructure(&error))?;
    chain
        .into_iter()
        .find(|member| member.scope == SHARED)
        .ok_or_else(|| {
            Failure::new(
                kiln_core::FailureClass::Infrastructure,
                format!("head {} has no shared root", head.id),
            )
        })
}
