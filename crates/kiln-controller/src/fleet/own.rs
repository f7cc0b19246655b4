//! A command of this home hands in the job that it runs itself: queued, scheduled and leased like any other, and run by nobody else.

use axum::extract::State;
use axum::{Extension, Json};
use http::StatusCode;
use kiln_core::Action;
use kiln_db::{NewAudit, NewJob, Opened, SubmitError};
use kiln_proto::fleet::{AskOwn, NO_SECRET, Own, Owned};

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
    if let Some((name, opened)) = controller.db.refused_secret(&new.request).await? {
        let row = crate::stored::refusal(&new, &name, &opened);
        controller.db.audit(row).await?;
        return Err(match opened {
            Opened::Refused(why) => {
                let text = format!("this job may not have the secret {name}: {why}");
                Refused::new(StatusCode::FORBIDDEN, "secret_refused", text)
            }
            _ => {
                let text = format!("there is no secret {name} in this home's store");
                Refused::new(StatusCode::BAD_REQUEST, NO_SECRET, text)
            }
        });
    }
    match controller.db.submit(new).await {
        Ok(submitted) => Ok(Json(Owned {
            job: submitted.job.request.id,
        })),
        Err(SubmitError::Database(error)) => Err(error.into()),
        Err(refused) => Err(Refused::bad(refused.to_string())),
    }
}

/// What a finished job of a command's own was asked for: its command line and environment are this home's user's own.
pub(super) async fn asked(
    State(controller): State<Controller>,
    peer: Option<Extension<Peer>>,
    Json(ask): Json<AskOwn>,
) -> Result<Json<Own>, Refused> {
    if !peer.is_some_and(|peer| peer.is_owner()) {
        return Err(Refused::unknown_worker(
            "only a command of the controller's own home runs its jobs again",
        ));
    }
    let job = controller.db.job(&ask.job).await?;
    let job = job.ok_or_else(|| Refused::missing("there is no such job"))?;
    if job.request.dispatch.requires.own().is_none() {
        return Err(Refused::bad("this job is no command's own"));
    }
    if !job.state.is_terminal() {
        return Err(Refused::bad("the job is not over yet"));
    }
    Ok(Json(Own {
        request: job.request,
        labels: job.labels,
    }))
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
