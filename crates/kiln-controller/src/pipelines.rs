//! Pipelines whose builds fail again and again: counted without naming them, named in the log.
//!
//! A pipeline is a tenant's builds of one name in one queue. The database counts, for all controllers.

use kiln_core::{JobKind, JobRequest};
use kiln_db::DbError;

use crate::state::Controller;

/// Failed builds in a row that make a pipeline count.
pub const FAILURES: u32 = 3;

/// A build is over, and this many of its pipeline have failed in a row now.
pub(crate) fn ended(controller: &Controller, request: &JobRequest, failed_in_a_row: u32) {
    let JobKind::SourceBuild(build) = &request.kind else {
        return;
    };
    if failed_in_a_row == FAILURES {
        controller.metrics.pipeline_failed();
        let (tenant, queue) = (&request.tenant, &request.dispatch.queue);
        tracing::warn!(%tenant, %queue, name = build.name, job = %request.id, "{FAILURES} builds of a pipeline failed in a row");
    }
}

/// Shows how many fail now, whichever controller ended their builds.
///
/// # Errors
/// When the database does not answer.
pub(crate) async fn observe(controller: &Controller) -> Result<(), DbError> {
    let failing = controller.db.pipelines_failing(FAILURES).await?;
    controller.metrics.failing_pipelines(failing);
    Ok(())
}
