//! How a worker comes in: a single-use token for a certificate, then the next certificate for the same key.

use axum::extract::State;
use axum::{Extension, Json};
use kiln_db::{Certificate, JoinError, NewAudit, NewWorker, Placement};
use kiln_proto::fleet::{Join, Joined, Renew};

use super::doors::Answered;
use super::refusal::Refused;
use super::who::{Spoken, now_unix_ms};
use crate::access::{Door, Peer, secret_token};
use crate::state::Controller;

pub(super) async fn join(
    State(controller): State<Controller>,
    Spoken(generation): Spoken,
    peer: Option<Extension<Peer>>,
    Json(mut join): Json<Join>,
) -> Answered<Joined> {
    super::doors::sane(&join.facts)?;
    join.facts.generation = generation;
    let worker = join.worker.to_string();
    let joined = joined(&controller, peer, join).await;
    if let Err(refused) = &joined
        && refused.is_forbidden()
    {
        let why = refused.message();
        controller
            .turned_away(Door::Worker, "worker:join", &worker, why)
            .await;
    }
    joined
}

async fn joined(
    controller: &Controller,
    peer: Option<Extension<Peer>>,
    join: Join,
) -> Answered<Joined> {
    let (db, pool) = (&controller.db, controller.settings.pool.clone());
    if peer.is_some_and(|peer| peer.is_owner()) {
        let worker = NewWorker {
            id: join.worker,
            facts: join.facts,
            certificate: None,
        };
        let placement = Placement {
            pool,
            labels: join.labels,
            tenants: None,
        };
        let worker = db
            .admit_worker(worker, placement)
            .await
            .map_err(join_refused)?;
        return Ok(Json(Joined {
            worker: worker.id,
            pool: worker.placement.pool,
            labels: worker.placement.labels,
            certificate: String::new(),
            authority: String::new(),
            expires_unix_ms: 0,
        }));
    }
    let presented = secret_token::parse(secret_token::SecretKind::Join, &join.token)
        .map_err(|error| Refused::unknown_worker(error.to_string()))?;
    let authority = controller.access.authority();
    let made = authority
        .worker_certificate(&join.csr, &join.worker, None, now_unix_ms())
        .map_err(|error| Refused::bad(error.to_string()))?;
    let worker = NewWorker {
        id: join.worker,
        facts: join.facts,
        certificate: Some(Certificate {
            fingerprint: made.key,
            until_unix_ms: made.expires_unix_ms,
        }),
    };
    let worker = db
        .join(&presented.hash, worker)
        .await
        .map_err(join_refused)?;
    controller.metrics.access(Door::Worker.name(), true);
    let row = NewAudit {
        actor: format!("token:{}", presented.id),
        tenant: None,
        action: "worker:join".to_owned(),
        target: worker.id.to_string(),
        allowed: true,
        reason: None,
        detail: None,
    };
    db.audit(row).await?;
    Ok(Json(Joined {
        worker: worker.id,
        pool: worker.placement.pool,
        labels: worker.placement.labels,
        certificate: made.pem,
        authority: authority.pem().to_owned(),
        expires_unix_ms: made.expires_unix_ms,
    }))
}

/// The next certificate of a worker, for the same key. The only door that takes one that has expired, for a while.
pub(super) async fn renew(
    State(controller): State<Controller>,
    peer: Option<Extension<Peer>>,
    Json(renew): Json<Renew>,
) -> Answered<Joined> {
    let renewed = renewed(&controller, peer.as_deref(), &renew).await;
    if let Err(refused) = &renewed
        && refused.is_forbidden()
    {
        let why = refused.message();
        controller
            .turned_away(Door::Worker, "worker:renew", "", why)
            .await;
    }
    renewed
}

async fn renewed(controller: &Controller, peer: Option<&Peer>, renew: &Renew) -> Answered<Joined> {
    let shown = peer.and_then(Peer::worker);
    let shown = shown.ok_or_else(|| Refused::unknown_worker("a worker shows its certificate"))?;
    let now = now_unix_ms();
    if !shown.may_renew(now) {
        return Err(Refused::unknown_worker(
            "the certificate expired too long ago: join again with a new token",
        ));
    }
    let found = controller.db.worker_of_key(&shown.key).await?;
    let worker =
        found.filter(|worker| worker.removed_unix_ms.is_none() && worker.id == shown.worker);
    let worker = worker.ok_or_else(|| {
        Refused::unknown_worker(format!(
            "there is no worker {}, or it was removed",
            shown.worker
        ))
    })?;
    let authority = controller.access.authority();
    let made = authority
        .worker_certificate(&renew.csr, &worker.id, Some(&shown.key), now)
        .map_err(|error| Refused::bad(error.to_string()))?;
    let certificate = Certificate {
        fingerprint: made.key,
        until_unix_ms: made.expires_unix_ms,
    };
    let kept = controller
        .db
        .renew_certificate(&worker.id, certificate)
        .await;
    kept.map_err(|error| Refused::unknown_worker(error.to_string()))?;
    Ok(Json(Joined {
        worker: worker.id,
        pool: worker.placement.pool,
        labels: worker.placement.labels,
        certificate: made.pem,
        authority: authority.pem().to_owned(),
        expires_unix_ms: made.expires_unix_ms,
    }))
}

fn join_refused(error: JoinError) -> Refused {
    match error {
        JoinError::Database(error) => error.into(),
        other => Refused::unknown_worker(other.to_string()),
    }
}
