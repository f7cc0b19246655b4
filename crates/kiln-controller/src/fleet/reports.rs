//! What a worker says of an attempt: its events and its log while it runs, and its end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::{Extension, Json};
use kiln_core::{AttemptId, FailureClass, JobState, Lease, Outcome, Verdict};
use kiln_db::AttemptEnd;
use kiln_proto::fleet::{Finish, JobEvents, LOG_PIECE_MAX, LogAnswer, Release, Released};
use kiln_store::logs::{LogError, LogName, RetentionClass};

use super::doors::Answered;
use super::former_life;
use super::record;
use super::refusal::Refused;
use super::sweep::random;
use super::who::{Held, Live, Worker};
use crate::metrics::{Egress, observe_egress, observe_end};
use crate::peers::Home;
use crate::pipelines;
use crate::state::Controller;

/// Most events of one message.
const EVENTS_MAX: usize = 256;
/// Attempts whose next event is remembered, so that one that is said twice is kept once.
const ATTEMPTS_MAX: usize = 4_096;

/// Numbers of the next event of attempts that run.
#[derive(Debug, Default)]
pub(super) struct EventNumbers(Mutex<HashMap<AttemptId, u64>>);

pub(super) async fn event(
    State(controller): State<Controller>,
    Extension(numbers): Extension<Arc<EventNumbers>>,
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

pub(super) async fn log(
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

/// Whether the job is still under this very lease. Decides nothing: the doors do.
async fn is_live(controller: &Controller, lease: &Lease) -> Result<bool, Refused> {
    let job = controller.db.job(&lease.attempt.job).await?;
    let live = job.and_then(|job| job.lease);
    Ok(live.is_some_and(|live| {
        (&live.attempt, &live.worker, live.epoch) == (&lease.attempt, &lease.worker, lease.epoch)
    }))
}

pub(super) async fn finish(
    State(controller): State<Controller>,
    Extension(numbers): Extension<Arc<EventNumbers>>,
    held: Held,
    Json(finish): Json<Finish>,
) -> Answered<serde_json::Value> {
    let lease = &held.lease;
    let told = Egress::told(&finish.details);
    // A finish that is said again, because its answer was lost, has no report to add.
    if finish.details.is_object() && is_live(&controller, lease).await? {
        let record = record::of("report", finish.details, finish.egress);
        match controller.db.append_record(lease, record).await {
            Ok(_) => {}
            // The report is shown, it decides nothing: the end itself says what becomes of an attempt whose lease ends just now.
            Err(kiln_db::DoorError::Lease(_)) => {}
            Err(kiln_db::DoorError::TooMuch(why)) => {
                tracing::warn!(attempt = %lease.attempt, why, "the record of an attempt is left out");
            }
            Err(error) => return Err(error.into()),
        }
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
        observe_egress(&controller.metrics, &told);
    }
    if let Some(why) = &done.quarantined {
        tracing::warn!(worker = %lease.worker, why, "the worker is quarantined");
    }
    if !done.repeated && done.state.is_terminal() {
        over(&controller, lease, done.failed_in_a_row).await;
    }
    forget(&controller, &numbers, lease, &done.state);
    end_log(&controller, lease).await?;
    Ok(Json(serde_json::json!({ "state": done.state.name() })))
}

/// Tells of a job that is over. What cannot be read is not told: the job has ended all the same.
async fn over(controller: &Controller, lease: &Lease, failed_in_a_row: u32) {
    let Ok(Some(job)) = controller.db.job(&lease.attempt.job).await else {
        return;
    };
    pipelines::ended(controller, &job.request, failed_in_a_row);
    // Every sweep shows it anew.
    let _later = pipelines::observe(controller).await;
    if controller.tracer.is_on()
        && let Ok(attempts) = controller.db.attempts(&lease.attempt.job).await
    {
        let first = attempts.first().map(|attempt| attempt.leased_unix_ms);
        crate::traces::ended(&controller.tracer, &job, first);
    }
}

/// What is remembered in memory of an attempt that ended.
fn forget(controller: &Controller, numbers: &EventNumbers, lease: &Lease, now: &JobState) {
    numbers.forget(&lease.attempt);
    if now.is_terminal() {
        controller.secrets.forget(&lease.attempt.job);
    }
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

/// A worker's process has just started or is about to end: its machines are gone, and so are the attempts that ran in them.
pub(super) async fn release(
    State(controller): State<Controller>,
    Extension(numbers): Extension<Arc<EventNumbers>>,
    worker: Worker,
    Json(release): Json<Release>,
) -> Answered<Released> {
    if release.leaving {
        controller.db.worker_left(&worker.id).await?;
    }
    let _kept = controller.db.forget_kept_of(&worker.id).await?;
    let mut leases = 0;
    for lease in controller.db.leases_of(&worker.id).await? {
        let end = AttemptEnd {
            outcome: Outcome {
                verdict: Verdict::Failed {
                    class: FailureClass::Lost,
                    message: "the worker's process ended in the middle of the attempt".to_owned(),
                    hint: None,
                    command_code: None,
                    reason: None,
                },
                phases_ms: Vec::new(),
            },
            receipt: None,
            observed: None,
            jitter: random(),
        };
        match controller.db.finish(&lease, end).await {
            Ok(done) => {
                leases += 1;
                forget(&controller, &numbers, &lease, &done.state);
                end_log(&controller, &lease).await?;
            }
            // The sweep was faster.
            Err(kiln_db::DoorError::Lease(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if release.leaving {
        controller.db.forget_own_worker(&worker.id).await?;
    }
    Ok(Json(Released { leases }))
}
