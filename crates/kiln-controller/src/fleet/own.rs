//! A command of this home hands in the job that it runs itself: queued, scheduled and leased like any other, and run by nobody else.

use axum::extract::State;
use axum::{Extension, Json};
use http::StatusCode;
use kiln_core::Action;
use kiln_db::{NewAudit, NewJob, SubmitError};
use kiln_proto::fleet::{Own, Owned};

use super::refusal::Refused;
use super::who::Worker;
use crate::access::Peer;
use crate::state::Controller;

/// Only on the private socket, whose peer is this home's own user: what it may use was decided where it asked. The job is tried once, since
/// its terminal, its folder and its secrets go with its process.
pub(super) async fn submit(
    State(controller): State<Controller>,
    peer: Option<Extension<Peer>>,
    worker: Worker,
    Json(own): Json<Own>,
) -> Result<Json<Owned>, Refused> {
    if !peer.is_some_and(|peer| peer.is_owner()) {
        return Err(Refused::unknown_worker(
            "only a command of the controller's own home runs its own jobs",
        ));
    }
    let mut request = own.request;
    request.dispatch.requires.only_own(&worker.id);
    request.dispatch.attempts_max = 1;
    let row = NewAudit {
        actor: "user:owner".to_owned(),
        tenant: Some(request.tenant.clone()),
        action: Action::JobSubmit.name().to_owned(),
        target: request.id.to_string(),
        allowed: true,
        reason: None,
        detail: Some(serde_json::json!({ "own": worker.id })),
    };
    controller.db.audit(row).await?;
    let new = NewJob {
        request,
        idempotency: None,
        submitted_by: "owner".to_owned(),
        notify_url: None,
        labels: own.labels,
    };
    match controller.db.submit(new).await {
        Ok(submitted) => Ok(Json(Owned {
            job: submitted.job.request.id,
        })),
        Err(SubmitError::Database(error)) => Err(error.into()),
        Err(refused) => Err(Refused::bad(refused.to_string())),
    }
}

/// A controller that stays, of the same home, asks the one of a command to make room.
pub(super) async fn give_way(
    State(controller): State<Controller>,
    peer: Option<Extension<Peer>>,
) -> Result<Json<serde_json::Value>, Refused> {
    if !peer.is_some_and(|peer| peer.is_owner()) {
        return Err(Refused::unknown_worker(
            "only its own user moves a controller",
        ));
    }
    if !controller.ask_for_room() {
        let message = "this controller stays: it was started by `kiln serve`";
        return Err(Refused::new(StatusCode::CONFLICT, "stays", message));
    }
    Ok(Json(serde_json::json!({})))
}
