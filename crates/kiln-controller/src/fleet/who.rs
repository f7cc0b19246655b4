//! Which worker a request comes from: proven by its connection, never by what it says.

use axum::extract::{FromRequestParts, Path};
use http::request::Parts;
use kiln_core::{AttemptId, JobId, Lease, WorkerId};
use kiln_db::NewAudit;
use kiln_proto::fleet::{GENERATION_HEADER, LEASE_HEADER, LeaseHeader, WORKER_HEADER};

use super::refusal::Refused;
use crate::access::{Door, Peer};
use crate::state::Controller;

/// Oldest generation of `/worker/v1` that a controller of a generation serves: the one before its own.
#[must_use]
pub fn generation_min(own: u32) -> u32 {
    own.saturating_sub(1).max(1)
}

/// A worker whose connection proves it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Worker {
    /// Its name.
    pub id: WorkerId,
    /// Generation of the protocol that this request speaks.
    pub generation: u32,
}

/// The generation that a request speaks, of those that are served. For who has no name yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spoken(pub u32);

impl FromRequestParts<Controller> for Spoken {
    type Rejection = Refused;

    async fn from_request_parts(
        parts: &mut Parts,
        controller: &Controller,
    ) -> Result<Self, Refused> {
        generation(parts, controller.settings.generation).map(Self)
    }
}

impl FromRequestParts<Controller> for Worker {
    type Rejection = Refused;

    async fn from_request_parts(
        parts: &mut Parts,
        controller: &Controller,
    ) -> Result<Self, Refused> {
        let spoken = generation(parts, controller.settings.generation)?;
        let proven = proven(parts, controller, spoken).await;
        if let Err(refused) = &proven
            && refused.is_forbidden()
        {
            let (path, why) = (parts.uri.path(), refused.message());
            controller
                .turned_away(Door::Worker, "worker", path, why)
                .await;
        }
        proven
    }
}

async fn proven(
    parts: &Parts,
    controller: &Controller,
    generation: u32,
) -> Result<Worker, Refused> {
    let peer = parts.extensions.get::<Peer>();
    let peer = peer.ok_or_else(|| Refused::unknown_worker("nobody knows who asks"))?;
    if peer.is_owner() {
        let named = parts.headers.get(WORKER_HEADER);
        let named = named.and_then(|value| value.to_str().ok()?.parse().ok());
        let id = named.ok_or_else(|| Refused::bad("the worker does not say its name"))?;
        return Ok(Worker { id, generation });
    }
    let certificate = peer
        .worker()
        .ok_or_else(|| Refused::unknown_worker("a worker shows its certificate"))?;
    if !certificate.is_current(now_unix_ms()) {
        return Err(Refused::new(
            http::StatusCode::FORBIDDEN,
            "expired_certificate",
            "the worker's certificate has expired: it asks for the next one first",
        ));
    }
    let found = controller.db.worker_of_key(&certificate.key).await?;
    match found.filter(|worker| worker.removed_unix_ms.is_none()) {
        Some(worker) if worker.id == certificate.worker => Ok(Worker {
            id: worker.id,
            generation,
        }),
        _ => Err(Refused::unknown_worker(format!(
            "there is no worker {}, or it was removed",
            certificate.worker
        ))),
    }
}

/// The wall clock: certificates are judged by it.
pub(crate) fn now_unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

fn generation(parts: &Parts, own: u32) -> Result<u32, Refused> {
    let oldest = generation_min(own);
    let header = parts.headers.get(GENERATION_HEADER);
    let spoken: Option<u32> = header.and_then(|value| value.to_str().ok()?.parse().ok());
    match spoken {
        Some(spoken) if (oldest..=own).contains(&spoken) => Ok(spoken),
        Some(spoken) => Err(Refused::new(
            http::StatusCode::UPGRADE_REQUIRED,
            "generation",
            format!(
                "the worker speaks generation {spoken}, this controller {oldest} to {own}: update the older of the two"
            ),
        )),
        None => Err(Refused::bad("the request says no generation")),
    }
}

/// The lease a request about a job is made under; the worker in it is the one whose connection it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// As presented: whether it is the live one is decided by the door, in the transaction of its effect.
    pub lease: Lease,
}

impl FromRequestParts<Controller> for Held {
    type Rejection = Refused;

    async fn from_request_parts(
        parts: &mut Parts,
        controller: &Controller,
    ) -> Result<Self, Refused> {
        let worker = Worker::from_request_parts(parts, controller).await?;
        let path = Path::<std::collections::HashMap<String, String>>::from_request_parts(
            parts, controller,
        );
        let path = path
            .await
            .map_err(|_| Refused::bad("the path names no job"))?;
        let job: Option<JobId> = path.get("job").and_then(|job| job.parse().ok());
        let job = job.ok_or_else(|| Refused::bad("the path names no job"))?;
        let header = parts.headers.get(LEASE_HEADER);
        let header = header.and_then(|value| value.to_str().ok()?.parse::<LeaseHeader>().ok());
        let header = header.ok_or_else(|| Refused::bad("the request says no lease"))?;
        let found = controller.db.job(&job).await?;
        let lie = match &found {
            _ if header.worker != worker.id => Some("the lease is another worker's"),
            None => Some("there is no such job"),
            Some(_) => None,
        };
        let tenant = found.map(|found| found.request.tenant);
        let (None, Some(tenant)) = (lie, tenant.clone()) else {
            let why = lie.unwrap_or_default();
            let claimed = format!("{job}/{}@{}", header.attempt, header.epoch);
            let row = NewAudit {
                actor: format!("worker:{}", worker.id),
                tenant,
                action: "door.lease".to_owned(),
                target: claimed,
                allowed: false,
                reason: Some(why.to_owned()),
                detail: Some(serde_json::json!({ "as": header.worker })),
            };
            controller.db.audit(row).await?;
            return Err(Refused::lease(why));
        };
        Ok(Self {
            lease: Lease {
                attempt: AttemptId {
                    job,
                    number: header.attempt,
                },
                tenant,
                worker: worker.id,
                epoch: header.epoch,
                deadline_unix_ms: 0,
            },
        })
    }
}

/// A lease that was the live one when the request came: nothing is read, judged or answered for any other. The door asks again in the
/// transaction of its effect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Live {
    /// The lease.
    pub lease: Lease,
}

impl FromRequestParts<Controller> for Live {
    type Rejection = Refused;

    async fn from_request_parts(
        parts: &mut Parts,
        controller: &Controller,
    ) -> Result<Self, Refused> {
        let Held { lease } = Held::from_request_parts(parts, controller).await?;
        controller.db.check_lease(&lease).await?;
        Ok(Self { lease })
    }
}
