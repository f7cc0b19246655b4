//! `/worker/v1`: what a worker may ask, each thing about a job under its lease. See `docs/design/control-plane.md` for the table. Here are the
//! routes, heartbeats and polls; [`enrol`], [`inputs`], [`reports`] and [`results`] have the rest.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, State};
use axum::routing::{any, get, post, put};
use axum::{Extension, Json, Router};
use kiln_core::dispatch::{WorkerFacts, WorkerState};
use kiln_core::{JobId, Lease, TenantName};
use kiln_db::{Door, DoorKind, LeaseAnswer as Answer, Wake};
use kiln_proto::fleet::{
    BODY_MAX, Heartbeat, HeartbeatAnswer, Incident, KEPT_MAX, LEASES_MAX, LeaseAnswer, Leased,
    POLL_MS, Poll, PollAnswer, WORKER_ADDRESSES_MAX,
};
use tokio::sync::broadcast::error::RecvError;

use super::refusal::Refused;
use super::reports::EventNumbers;
use super::shield::{self, DoorLimits};
use super::who::Worker;
use super::{
    enrol, inputs, machines, own, policy, record, registry_door, registry_login, reports, results,
};
use crate::access::Peer;
use crate::state::Controller;

/// Bytes of new leases that one answer to a poll has, but for a single larger one: a worker reads no more than [`BODY_MAX`].
const LEASES_BYTES_MAX: usize = BODY_MAX / 4;
/// Most bytes of what a worker says it is: every plan reads it.
const FACTS_BYTES_MAX: usize = 128 * 1024;
/// Most machines without a lease that one heartbeat counts.
const ORPHANS_MAX: u64 = 1_000_000;
/// How long a poll waits before it looks again without having been woken.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

pub(super) type Answered<T> = Result<Json<T>, Refused>;

/// The routes of workers and of the registry, behind their shield; bodies may stand still for `body_stall`.
pub fn router(controller: Controller, body_stall: Duration) -> Router {
    let limits = Arc::new(DoorLimits::new(body_stall));
    let routes = Router::new()
        .route("/worker/v1/join", post(enrol::join))
        .route("/worker/v1/renew", post(enrol::renew))
        .route("/worker/v1/release", post(reports::release))
        .route("/worker/v1/heartbeat", post(heartbeat))
        .route("/worker/v1/poll", post(poll))
        .route("/worker/v1/own", post(own::submit))
        .route("/worker/v1/own-asked", post(own::asked))
        .route("/worker/v1/give-way", post(own::give_way))
        .route("/worker/v1/jobs/{job}/source", get(inputs::source))
        .route("/worker/v1/jobs/{job}/secrets", post(inputs::secrets))
        .route("/worker/v1/jobs/{job}/policy", post(policy::judge))
        .route("/worker/v1/jobs/{job}/event", post(reports::event))
        .route("/worker/v1/jobs/{job}/log", post(reports::log))
        .route(
            "/worker/v1/jobs/{job}/registry-token",
            post(results::registry_token),
        )
        .route("/worker/v1/jobs/{job}/image", post(results::image))
        .route("/worker/v1/jobs/{job}/finish", post(reports::finish))
        .route("/worker/v1/jobs/{job}/keep", post(machines::keep))
        .route("/worker/v1/machines/gone", post(machines::gone))
        .route("/worker/v1/machines/record", post(record::of_machine))
        .route("/worker/v1/machines/calls", post(machines::calls))
        .route("/worker/v1/machines/ways/{way}", get(machines::way))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .route(
            "/worker/v1/jobs/{job}/artifacts/{name}",
            put(results::artifact).layer(DefaultBodyLimit::disable()),
        )
        .route("/v2", any(registry_door::serve))
        .route("/v2/", any(registry_door::serve))
        .route("/v2/token", get(registry_login::token))
        .route("/v2/{*path}", any(registry_door::serve))
        .layer(Extension(Arc::new(EventNumbers::default())))
        .layer(Extension(Arc::clone(&limits)));
    shield::around(routes, &limits).with_state(controller)
}

async fn heartbeat(
    State(controller): State<Controller>,
    worker: Worker,
    peer: Option<Extension<Peer>>,
    Json(mut beat): Json<Heartbeat>,
) -> Answered<HeartbeatAnswer> {
    beat.facts.generation = worker.generation;
    if beat.held.len() > LEASES_MAX || beat.kept.len() > KEPT_MAX {
        return Err(Refused::bad(format!(
            "a worker holds at most {LEASES_MAX} leases and keeps {KEPT_MAX} machines"
        )));
    }
    sane(&beat.facts)?;
    beat.addresses.truncate(WORKER_ADDRESSES_MAX);
    let held: Vec<Lease> = beat
        .held
        .into_iter()
        .map(|held| Lease {
            attempt: held.attempt,
            tenant: TenantName::local(),
            worker: worker.id.clone(),
            epoch: held.epoch,
            deadline_unix_ms: 0,
        })
        .collect();
    let answer = controller
        .db
        .heartbeat(&worker.id, &beat.facts, &held)
        .await?;
    if beat.draining && answer.state == WorkerState::Active {
        let by = format!("worker:{}", worker.id);
        let drained = controller.db.set_worker_state(
            &worker.id,
            WorkerState::Draining,
            &by,
            Some("asked on its host"),
        );
        drained
            .await
            .map_err(|error| Refused::unknown_worker(error.to_string()))?;
    }
    let kept = beat.kept.into_iter().map(|held| (held.attempt, held.epoch));
    let kept: Vec<_> = kept.collect();
    let kept = controller.db.renew_kept(&worker.id, &kept).await?;
    controller.metrics.orphans(beat.orphans.min(ORPHANS_MAX));
    let mut leases = Vec::with_capacity(answer.leases.len());
    for (attempt, answer) in answer.leases {
        leases.push(match answer {
            Answer::Live { cancel, .. } => LeaseAnswer::Live { cancel },
            Answer::Refused(why) => LeaseAnswer::Gone {
                why: why.to_string(),
                incident: incident(&controller, &attempt.job).await?,
            },
        });
    }
    Ok(Json(HeartbeatAnswer {
        ttl_ms: controller.db.lease_times().ttl_ms,
        leases,
        own: controller.own_places(&worker.id, peer.as_deref(), beat.addresses),
        kept: kept.into_iter().map(stays).collect(),
    }))
}

/// What becomes of a kept machine.
fn stays(lives: bool) -> LeaseAnswer {
    match lives {
        true => LeaseAnswer::Live { cancel: false },
        false => LeaseAnswer::Gone {
            why: "nobody keeps this machine any more".to_owned(),
            incident: None,
        },
    }
}

/// That a job was ended as an incident: its worker keeps what tells of it.
async fn incident(controller: &Controller, job: &JobId) -> Result<Option<Incident>, Refused> {
    let ended = controller.db.incident_of(job).await?;
    Ok(ended.map(|ended| Incident {
        by: ended.by,
        note: ended.note,
        at_unix_ms: ended.at_unix_ms,
    }))
}

/// Refuses what no worker is: it is kept, and read whenever jobs are placed.
pub(super) fn sane(facts: &WorkerFacts) -> Result<(), Refused> {
    let bytes = serde_json::to_vec(facts).map_or(usize::MAX, |text| text.len());
    match bytes > FACTS_BYTES_MAX {
        true => Err(Refused::bad(format!(
            "what a worker says of itself has at most {FACTS_BYTES_MAX} bytes"
        ))),
        false => Ok(()),
    }
}

/// Held open until the worker has a lease it did not name, or something became of one that it has. A wake-up that gets lost costs one
/// [`LOOK_AGAIN`].
async fn poll(
    State(controller): State<Controller>,
    worker: Worker,
    Json(poll): Json<Poll>,
) -> Answered<PollAnswer> {
    let mut wakes = controller.db.subscribe();
    let end = tokio::time::Instant::now() + Duration::from_millis(POLL_MS);
    let mut beat = false;
    loop {
        let leases = new_leases(&controller, &worker, &poll).await?;
        let now = tokio::time::Instant::now();
        if !leases.is_empty() || beat || now >= end || controller.closing().is_cancelled() {
            return Ok(Json(PollAnswer { leases, beat }));
        }
        let woken = async {
            loop {
                match wakes.recv().await {
                    Ok(Wake::Worker(woken)) if woken == worker.id => return true,
                    Ok(Wake::Everything) | Err(RecvError::Lagged(_)) => return false,
                    Ok(_) => {}
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        beat = tokio::select! {
            woken = woken => woken && !poll.held.is_empty(),
            () = tokio::time::sleep_until(end.min(now + LOOK_AGAIN)) => false,
            () = controller.closing().cancelled() => false,
        };
    }
}

async fn new_leases(
    controller: &Controller,
    worker: &Worker,
    poll: &Poll,
) -> Result<Vec<Leased>, Refused> {
    let (mut leases, mut bytes) = (Vec::new(), 0_usize);
    for lease in controller.db.leases_of(&worker.id).await? {
        let named = poll
            .held
            .iter()
            .any(|held| held.attempt == lease.attempt && held.epoch == lease.epoch);
        if named {
            continue;
        }
        let Some(job) = controller.db.job(&lease.attempt.job).await? else {
            continue;
        };
        if job.request.generation() > worker.generation {
            // It became older since it was chosen. Without a heartbeat for it the lease ends, and another gets the job.
            tracing::warn!(worker = %worker.id, job = %lease.attempt.job, "a worker is too old for a job it was given");
            continue;
        }
        let (span, _) = crate::traces::of_job(&job.request);
        let leased = Leased {
            lease,
            request: job.request,
            traceparent: Some(span.to_string()),
        };
        // What does not fit comes with the next poll, which names these.
        let more = serde_json::to_vec(&leased).map_or(0, |text| text.len());
        bytes = bytes.saturating_add(more);
        if !leases.is_empty() && bytes > LEASES_BYTES_MAX {
            break;
        }
        leases.push(leased);
        if leases.len() == LEASES_MAX {
            break;
        }
    }
    Ok(leases)
}

/// Opens a door for an effect elsewhere.
pub(super) async fn open_door(
    controller: &Controller,
    lease: &Lease,
    kind: DoorKind,
    detail: String,
) -> Result<(), Refused> {
    let door = Door { kind, detail };
    Ok(controller.db.with_lease(lease, door).await?)
}
