//! `/worker/v1`: what a worker may ask, each thing about a job under its lease. See `docs/design/control-plane.md` for the table.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::routing::{any, get, post};
use axum::{Extension, Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_core::dispatch::WorkerState;
use kiln_core::{AttemptId, FailureClass, Lease, Outcome, TenantName, Verdict};
use kiln_db::{
    AttemptEnd, Certificate, Door, DoorKind, JoinError, LeaseAnswer as Answer, NewWorker,
    Placement, Wake,
};
use kiln_proto::fleet::{
    AskSecrets, BODY_MAX, Finish, Heartbeat, HeartbeatAnswer, JobEvents, Join, Joined, LEASES_MAX,
    LOG_PIECE_MAX, LeaseAnswer, Leased, LogAnswer, POLL_MS, Poll, PollAnswer, PublishImage,
    RegistryToken, Release, Released, Renew, Secrets,
};
use kiln_store::host::Publish;
use kiln_store::image::{Verify, verify};
use kiln_store::logs::{LogError, LogName, RetentionClass};
use kiln_store::registry::RepoName;
use tokio::sync::broadcast::error::RecvError;

use super::former_life;
use super::refusal::Refused;
use super::registry_door;
use super::sweep::random;
use super::who::{Held, Live, Worker, now_unix_ms};
use crate::access::{Peer, RegistryAction, RepositoryGrant, secret_token};
use crate::metrics::observe_end;
use crate::peers::Home;
use crate::state::Controller;

/// Most names of one image.
const TAGS_MAX: usize = 16;
/// Most events of one message.
const EVENTS_MAX: usize = 256;
/// Attempts whose next event is remembered, so that one that is said twice is kept once.
const ATTEMPTS_MAX: usize = 4_096;
/// How long a poll waits before it looks again without having been woken.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

type Answered<T> = Result<Json<T>, Refused>;

/// Numbers of the next event of attempts that run.
#[derive(Debug, Default)]
pub struct EventNumbers(Mutex<HashMap<AttemptId, u64>>);

/// The routes of workers.
pub fn router(controller: Controller) -> Router {
    let numbers = std::sync::Arc::new(EventNumbers::default());
    Router::new()
        .route("/worker/v1/join", post(join))
        .route("/worker/v1/renew", post(renew))
        .route("/worker/v1/release", post(release))
        .route("/worker/v1/heartbeat", post(heartbeat))
        .route("/worker/v1/poll", post(poll))
        .route("/worker/v1/jobs/{job}/source", get(source))
        .route("/worker/v1/jobs/{job}/secrets", post(secrets))
        .route("/worker/v1/jobs/{job}/event", post(event))
        .route("/worker/v1/jobs/{job}/log", post(log))
        .route("/worker/v1/jobs/{job}/registry-token", post(registry_token))
        .route("/worker/v1/jobs/{job}/image", post(image))
        .route("/worker/v1/jobs/{job}/finish", post(finish))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .route("/v2", any(registry_door::serve))
        .route("/v2/", any(registry_door::serve))
        .route("/v2/{*path}", any(registry_door::serve))
        .layer(Extension(numbers))
        .with_state(controller)
}

async fn join(
    State(controller): State<Controller>,
    peer: Option<Extension<Peer>>,
    Json(join): Json<Join>,
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
async fn renew(
    State(controller): State<Controller>,
    peer: Option<Extension<Peer>>,
    Json(renew): Json<Renew>,
) -> Answered<Joined> {
    let shown = peer.as_ref().and_then(|peer| peer.worker());
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

async fn heartbeat(
    State(controller): State<Controller>,
    worker: Worker,
    Json(beat): Json<Heartbeat>,
) -> Answered<HeartbeatAnswer> {
    if beat.held.len() > LEASES_MAX {
        return Err(Refused::bad(format!(
            "a worker holds at most {LEASES_MAX} leases"
        )));
    }
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
    controller.metrics.orphans(beat.orphans);
    let leases = answer.leases.into_iter().map(|(_, answer)| match answer {
        Answer::Live { cancel, .. } => LeaseAnswer::Live { cancel },
        Answer::Refused(why) => LeaseAnswer::Gone {
            why: why.to_string(),
        },
    });
    Ok(Json(HeartbeatAnswer {
        ttl_ms: controller.db.lease_times().ttl_ms,
        leases: leases.collect(),
        unknown: answer
            .unnamed
            .into_iter()
            .map(|unnamed| unnamed.lease.attempt)
            .collect(),
    }))
}

/// A worker's process has just started or is about to end: its machines are gone, and so are the attempts that ran in them.
async fn release(
    State(controller): State<Controller>,
    worker: Worker,
    Json(release): Json<Release>,
) -> Answered<Released> {
    if release.leaving {
        controller.db.worker_left(&worker.id).await?;
    }
    let mut leases = 0;
    for lease in controller.db.leases_of(&worker.id).await? {
        let end = AttemptEnd {
            outcome: Outcome {
                verdict: Verdict::Failed {
                    class: FailureClass::Lost,
                    message: "the worker's process ended in the middle of the attempt".to_owned(),
                    hint: None,
                    command_code: None,
                },
                phases_ms: Vec::new(),
            },
            receipt: None,
            observed: None,
            jitter: random(),
        };
        match controller.db.finish(&lease, end).await {
            Ok(_) => {
                leases += 1;
                end_log(&controller, &lease).await?;
            }
            // The sweep was faster.
            Err(kiln_db::DoorError::Lease(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Json(Released { leases }))
}

/// Held open until the worker has a lease it did not name. A wake-up that gets lost costs one [`LOOK_AGAIN`].
async fn poll(
    State(controller): State<Controller>,
    worker: Worker,
    Json(poll): Json<Poll>,
) -> Answered<PollAnswer> {
    let mut wakes = controller.db.subscribe();
    let end = tokio::time::Instant::now() + Duration::from_millis(POLL_MS);
    loop {
        let leases = new_leases(&controller, &worker, &poll).await?;
        let now = tokio::time::Instant::now();
        if !leases.is_empty() || now >= end {
            return Ok(Json(PollAnswer { leases }));
        }
        let woken = async {
            loop {
                match wakes.recv().await {
                    Ok(Wake::Worker(woken)) if woken == worker.id => return,
                    Ok(Wake::Everything) | Err(RecvError::Lagged(_)) => return,
                    Ok(_) => {}
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        let _either = tokio::time::timeout_at(end.min(now + LOOK_AGAIN), woken).await;
    }
}

async fn new_leases(
    controller: &Controller,
    worker: &Worker,
    poll: &Poll,
) -> Result<Vec<Leased>, Refused> {
    let mut leases = Vec::new();
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
        leases.push(Leased {
            lease,
            request: job.request,
            traceparent: None,
        });
        if leases.len() == LEASES_MAX {
            break;
        }
    }
    Ok(leases)
}

async fn source(State(controller): State<Controller>, held: Live) -> Result<Body, Refused> {
    let job = controller.db.job(&held.lease.attempt.job).await?;
    let kind = job.map(|job| (job.request.tenant, job.request.kind));
    let Some((tenant, kiln_core::JobKind::SourceBuild(build))) = kind else {
        return Err(Refused::missing("the job has no source"));
    };
    let kiln_core::job::Source::Tree { digest, .. } = build.source else {
        return Err(Refused::missing("the job's source is a git URL"));
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

async fn secrets(
    State(controller): State<Controller>,
    held: Live,
    Json(ask): Json<AskSecrets>,
) -> Answered<Secrets> {
    let job = controller.db.job(&held.lease.attempt.job).await?;
    let named = match job.map(|job| job.request.kind) {
        Some(kiln_core::JobKind::SourceBuild(build)) => build.secrets,
        _ => Vec::new(),
    };
    let mut values = BTreeMap::new();
    for name in ask.names {
        if !named.contains(&name) {
            return Err(Refused::missing("the job names no such secret"));
        }
        open_door(&controller, &held.lease, DoorKind::Secret, name.clone()).await?;
        if let Some(value) = controller.secret_of(&held.lease.attempt.job, &name).await {
            values.insert(name, STANDARD.encode(value));
        }
    }
    Ok(Json(Secrets { values }))
}

async fn open_door(
    controller: &Controller,
    lease: &Lease,
    kind: DoorKind,
    detail: String,
) -> Result<(), Refused> {
    let door = Door { kind, detail };
    Ok(controller.db.with_lease(lease, door).await?)
}

async fn event(
    State(controller): State<Controller>,
    Extension(numbers): Extension<std::sync::Arc<EventNumbers>>,
    held: Live,
    Json(message): Json<JobEvents>,
) -> Answered<serde_json::Value> {
    if message.events.len() > EVENTS_MAX {
        return Err(Refused::bad(format!("at most {EVENTS_MAX} events at once")));
    }
    let lease = &held.lease;
    if message.started {
        controller.db.started(lease).await?;
    }
    let known = numbers.next(&lease.attempt);
    let seen = usize::try_from(known.saturating_sub(message.from)).unwrap_or(usize::MAX);
    let mut number = message.from.max(known);
    for event in message.events.into_iter().skip(seen) {
        let kind = event
            .get("event")
            .and_then(|kind| kind.as_str())
            .unwrap_or("note");
        let kind = kind.to_owned();
        match event.get("name").and_then(|name| name.as_str()) {
            Some(name) if kind == "phase" => controller.db.phase(lease, name).await?,
            _ => controller.db.append_event(lease, &kind, event).await?,
        };
        number += 1;
        numbers.set(&lease.attempt, number);
    }
    Ok(Json(serde_json::json!({})))
}

impl EventNumbers {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<AttemptId, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self, attempt: &AttemptId) -> u64 {
        self.lock().get(attempt).copied().unwrap_or(0)
    }

    fn set(&self, attempt: &AttemptId, next: u64) {
        let mut numbers = self.lock();
        if numbers.len() >= ATTEMPTS_MAX && !numbers.contains_key(attempt) {
            // At worst an event of a long job is kept twice.
            numbers.clear();
        }
        numbers.insert(attempt.clone(), next);
    }

    fn forget(&self, attempt: &AttemptId) {
        self.lock().remove(attempt);
    }
}

async fn log(
    State(controller): State<Controller>,
    held: Live,
    Query(query): Query<HashMap<String, String>>,
    piece: Bytes,
) -> Answered<LogAnswer> {
    let from: Option<u64> = query.get("from").and_then(|from| from.parse().ok());
    let from = from.ok_or_else(|| Refused::bad("the request says no offset: ?from=N"))?;
    if piece.len() > LOG_PIECE_MAX {
        return Err(Refused::bad(format!(
            "a piece has at most {LOG_PIECE_MAX} bytes"
        )));
    }
    let name = log_name(&held.lease);
    let length = piece.len() as u64;
    if from == 0 && length > 0 {
        former_life::forget(&controller, &name).await?;
    }
    match controller.logs.append(&name, from, piece).await {
        Ok(appended) => {
            let home = controller.peers.id();
            controller
                .db
                .log_mark(&held.lease, home, from, length)
                .await?;
            Ok(Json(LogAnswer {
                next: appended.next,
                full: appended.full,
            }))
        }
        Err(LogError::Gap { wanted, .. }) => Ok(Json(LogAnswer {
            next: wanted,
            full: false,
        })),
        Err(LogError::Ended { .. }) => Err(Refused::lease("the log of this attempt has ended")),
        Err(error) => {
            tracing::warn!(log = %name, %error, "a piece of log was not kept");
            Err(Refused::unavailable("the log could not be written"))
        }
    }
}

fn log_name(lease: &Lease) -> LogName {
    LogName {
        tenant: lease.tenant.clone(),
        attempt: lease.attempt.clone(),
    }
}

async fn registry_token(
    State(controller): State<Controller>,
    peer: Option<Extension<Peer>>,
    held: Live,
) -> Answered<RegistryToken> {
    let lease = &held.lease;
    open_door(
        &controller,
        lease,
        DoorKind::RegistryToken,
        "quarantine".to_owned(),
    )
    .await?;
    // A worker on the private socket works in this home: its registry is this one.
    let here = peer.is_some_and(|peer| peer.is_owner());
    let registry = controller.settings.registry_address.as_ref();
    let Some(registry) = registry.filter(|_| !here) else {
        return Ok(Json(RegistryToken {
            registry: String::new(),
            token: String::new(),
            expires_unix_ms: 0,
        }));
    };
    let issued = controller
        .access
        .issue_for_attempt(lease, quarantine_alone(lease), now_unix_ms())
        .map_err(|error| Refused::unavailable(error.to_string()))?;
    Ok(Json(RegistryToken {
        registry: registry.clone(),
        token: issued.text,
        expires_unix_ms: issued.expires_unix_ms,
    }))
}

/// An attempt may push to its own quarantine and nowhere else.
fn quarantine_alone(lease: &Lease) -> Vec<RepositoryGrant> {
    let attempt = &lease.attempt;
    vec![RepositoryGrant {
        name: format!("quarantine/{}/{}", attempt.job, attempt.number),
        actions: vec![RegistryAction::Pull, RegistryAction::Push],
    }]
}

/// Names what the attempt pushed into its quarantine, after every digest of it was read back here.
async fn image(
    State(controller): State<Controller>,
    held: Live,
    Json(publish): Json<PublishImage>,
) -> Answered<serde_json::Value> {
    let lease = &held.lease;
    let own = format!("t/{}/", lease.tenant);
    let foreign = |tag: &&kiln_core::ImageRef| {
        tag.registry.is_some() || tag.digest.is_some() || !tag.repository.starts_with(&own)
    };
    if publish.tags.is_empty() || publish.tags.len() > TAGS_MAX {
        return Err(Refused::bad(format!("an image gets 1 to {TAGS_MAX} names")));
    }
    if let Some(tag) = publish.tags.iter().find(foreign) {
        return Err(Refused::bad(format!("{tag} is not a name of this tenant")));
    }
    let names: Vec<String> = publish.tags.iter().map(ToString::to_string).collect();
    open_door(&controller, lease, DoorKind::Tag, names.join(" ")).await?;
    let from = RepoName::quarantine(&lease.attempt);
    let asked = Verify::image(from.clone(), publish.manifest);
    verify(&controller.registry, &asked)
        .await
        .map_err(|error| {
            Refused::new(
                http::StatusCode::UNPROCESSABLE_ENTITY,
                "image_refused",
                format!("what was pushed is not that image: {error}"),
            )
        })?;
    let authority = registry_door::authority(&controller, lease.clone()).await;
    for tag in publish.tags {
        let to = tag.repository.parse();
        let publish = Publish {
            from: from.clone(),
            manifest: publish.manifest,
            to: to.map_err(|_| Refused::bad(format!("{tag} is not a name")))?,
            tags: vec![tag.tag.clone().unwrap_or_else(|| "latest".to_owned())],
        };
        let named = controller
            .registry
            .publish(&publish, Some(&authority))
            .await;
        named.map_err(|error| Refused::unavailable(error.to_string()))?;
    }
    if let Err(error) = controller.registry.delete_tree(&from).await
        && !error.is_not_found()
    {
        tracing::warn!(%error, "a quarantine was not removed");
    }
    Ok(Json(serde_json::json!({})))
}

/// Whether the job is still under this very lease. Decides nothing: the doors do.
async fn is_live(controller: &Controller, lease: &Lease) -> Result<bool, Refused> {
    let job = controller.db.job(&lease.attempt.job).await?;
    let live = job.and_then(|job| job.lease);
    Ok(live.is_some_and(|live| {
        (&live.attempt, &live.worker, live.epoch) == (&lease.attempt, &lease.worker, lease.epoch)
    }))
}

async fn finish(
    State(controller): State<Controller>,
    Extension(numbers): Extension<std::sync::Arc<EventNumbers>>,
    held: Held,
    Json(finish): Json<Finish>,
) -> Answered<serde_json::Value> {
    let lease = &held.lease;
    if finish.details.is_object() && is_live(&controller, lease).await? {
        // The report is shown, it decides nothing: one that does not fit, or whose lease ends just now, is left out. A finish that is
        // said again, because its answer was lost, has none to add.
        let _left_out = controller
            .db
            .append_event(lease, "report", finish.details)
            .await;
    }
    let observed = finish
        .observed
        .map(|observed| serde_json::to_value(observed).unwrap_or_default());
    let end = AttemptEnd {
        outcome: finish.outcome.clone(),
        receipt: finish.receipt,
        observed,
        jitter: random(),
    };
    let done = controller.db.finish(lease, end).await?;
    if !done.repeated {
        // Which runtime it was is planned on the worker: its word fills a closed set of labels, nothing else.
        let runtime = finish.runtime.as_deref();
        observe_end(&controller.metrics, runtime, &finish.outcome);
    }
    if let Some(why) = &done.quarantined {
        tracing::warn!(worker = %lease.worker, why, "the worker is quarantined");
    }
    numbers.forget(&lease.attempt);
    if done.state.is_terminal() {
        controller.secrets.forget(&lease.attempt.job);
    }
    end_log(&controller, lease).await?;
    Ok(Json(serde_json::json!({ "state": done.state.name() })))
}

async fn end_log(controller: &Controller, lease: &Lease) -> Result<(), Refused> {
    end_log_of(controller, &log_name(lease)).await
}

/// Puts the log of an attempt that is over away, or asks the controller that keeps it to. A log whose keeper is away stays with it until
/// it comes back: what others have may be a part.
async fn end_log_of(controller: &Controller, name: &LogName) -> Result<(), Refused> {
    match controller.home_now(&name.attempt).await? {
        Home::Here => {}
        Home::At(url) => {
            controller.far_log_end(&url, name).await;
            return Ok(());
        }
        Home::Away => return Ok(()),
    }
    let now = controller.db.now().await?;
    if let Err(error) = controller.logs.end(name, RetentionClass::Hot, now).await {
        // The sweep tries again.
        tracing::warn!(log = %name, %error, "the log was not put away");
    }
    Ok(())
}

/// The same, when the database says that the attempt is over.
pub(crate) async fn end_log_if_over(
    controller: &Controller,
    name: &LogName,
) -> Result<(), Refused> {
    let job = controller.db.job(&name.attempt.job).await?;
    let runs = job.and_then(|job| job.lease);
    if runs.is_some_and(|lease| lease.attempt == name.attempt) {
        return Ok(());
    }
    end_log_of(controller, name).await
}
