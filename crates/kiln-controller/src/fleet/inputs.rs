//! What a worker fetches for an attempt: the uploaded tree, and the values of secrets that the request names.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use kiln_core::secret::JOB_SECRETS_MAX;
use kiln_db::DoorKind;
use kiln_proto::fleet::{AskSecrets, Secrets};

use super::doors::{Answered, open_door};
use super::refusal::Refused;
use super::who::Live;
use crate::state::Controller;

pub(super) async fn source(
    State(controller): State<Controller>,
    held: Live,
) -> Result<Body, Refused> {
    let job = controller.db.job(&held.lease.attempt.job).await?;
    let kind = job.map(|job| (job.request.tenant, job.request.kind));
    let (tenant, kind) = kind.ok_or_else(|| Refused::missing("there is no such job"))?;
    let Some(source) = kind.source() else {
        return Err(Refused::missing("the job has no source"));
    };
    let kiln_core::job::Source::Tree { digest, .. } = *source else {
        return Err(Refused::missing("the job's source was not uploaded"));
    };
    open_door(
        &controller,
        &held.lease,
        DoorKind::Source,
        digest.to_string(),
    )
    .await?;
    match controller.sources.open_source(&tenant, &digest).await {
        Ok((pieces, _)) => Ok(Body::from_stream(pieces)),
        Err(error) if error.is_absent() => Err(Refused::missing("the source is gone")),
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "a source was not read"
            );
            Err(Refused::unavailable("the source cannot be read now"))
        }
    }
}

pub(super) async fn secrets(
    State(controller): State<Controller>,
    held: Live,
    Json(ask): Json<AskSecrets>,
) -> Answered<Secrets> {
    if ask.names.len() > JOB_SECRETS_MAX {
        return Err(Refused::bad("a job asks for too many secrets"));
    }
    let job = controller.db.job(&held.lease.attempt.job).await?;
    let job = job.ok_or_else(|| Refused::missing("there is no such job"))?;
    let given = controller.secrets_for(&held.lease, &job.request, ask.names);
    Ok(Json(given.await?))
}
