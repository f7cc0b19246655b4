//! Machines that workers keep: their leases, and the ways to them.
//!
//! A controller never dials a worker. Whoever wants to reach a machine leaves a call ([`Ways::open`]); the worker, which keeps one request open for
//! that, takes it and opens a connection of its own, which is handed to who called. What goes over it is `kiln_proto::kept`, and passes here unread.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Path, State};
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use http::{HeaderValue, StatusCode, header};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use kiln_core::{AttemptId, Epoch, Lease, WorkerId};
use kiln_db::{KeepError, Kept, NewKept};
use kiln_proto::fleet::{
    AwaitCalls, Calls, KEPT_MAX, KeepMachine, MACHINE_UPGRADE, MachineCall, MachinesGone, MayStay,
    POLL_MS,
};
use tokio::sync::{Notify, oneshot};

use super::doors::Answered;
use super::refusal::Refused;
use super::who::{Live, Worker};
use crate::peers::Home;
use crate::state::Controller;

/// Longest wait for a worker to open a way.
pub(crate) const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest time in which it is looked which controller hears a worker.
const HEARD_TIMEOUT: Duration = Duration::from_secs(5);
/// Time between two of these looks.
const HEARD_AGAIN: Duration = Duration::from_millis(250);
/// Calls of one worker that wait.
const WAITING_MAX: usize = 256;
/// Most bytes of what is kept of a machine for lists.
const FACTS_BYTES_MAX: usize = 256 * 1024;

/// A connection that a worker opened to a machine it keeps.
pub type Way = TokioIo<Upgraded>;

/// Why there is no way to a machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoWay {
    /// Its worker did not open one in time.
    #[error("the worker that keeps this machine does not answer")]
    Silent,
    /// Too many wait for this worker.
    #[error("too many wait to reach machines of this worker")]
    TooMany,
    /// The controller that its worker speaks to is away.
    #[error("the controller that leads to this machine is away")]
    Away,
}

/// Calls that workers have not answered yet.
#[derive(Debug, Default)]
pub struct Ways {
    inner: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Not told to their workers.
    calls: HashMap<WorkerId, (VecDeque<MachineCall>, Arc<Notify>)>,
    /// By the way's name: who may open it, and who waits for it.
    open: HashMap<String, Opening>,
}

#[derive(Debug)]
struct Opening {
    worker: WorkerId,
    to: oneshot::Sender<Way>,
}

/// A name that nobody can guess.
fn name() -> Option<String> {
    let mut random = [0_u8; 16];
    getrandom::fill(&mut random).ok()?;
    Some(hex::encode(random))
}

impl Ways {
    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the worker has opened a way to a machine it keeps.
    ///
    /// # Errors
    /// See [`NoWay`].
    pub async fn open(
        &self,
        worker: &WorkerId,
        attempt: &AttemptId,
        epoch: Epoch,
    ) -> Result<Way, NoWay> {
        let way = name().ok_or(NoWay::Silent)?;
        let (to, opened) = oneshot::channel();
        {
            let mut waiting = self.lock();
            let all = waiting.open.values();
            if all.filter(|open| open.worker == *worker).count() >= WAITING_MAX {
                return Err(NoWay::TooMany);
            }
            let worker = worker.clone();
            let opening = Opening {
                worker: worker.clone(),
                to,
            };
            waiting.open.insert(way.clone(), opening);
            let (calls, told) = waiting.calls.entry(worker).or_default();
            calls.push_back(MachineCall {
                way: way.clone(),
                attempt: attempt.clone(),
                epoch,
            });
            told.notify_one();
        }
        let _gone = Gone(self, worker, &way);
        match tokio::time::timeout(OPEN_TIMEOUT, opened).await {
            Ok(Ok(way)) => Ok(way),
            Ok(Err(_)) | Err(_) => Err(NoWay::Silent),
        }
    }

    /// Calls that the worker has not heard of. Told once: who calls waits for so long and then gives up.
    fn take(&self, worker: &WorkerId) -> (Vec<MachineCall>, Arc<Notify>) {
        let mut waiting = self.lock();
        let (calls, told) = waiting.calls.entry(worker.clone()).or_default();
        (calls.drain(..).collect(), Arc::clone(told))
    }

    /// Whether the worker has a request held open here just now.
    pub(crate) fn hears(&self, worker: &WorkerId) -> bool {
        let waiting = self.lock();
        let told = waiting.calls.get(worker);
        told.is_some_and(|(_, told)| Arc::strong_count(told) > 1)
    }

    /// Who waits for this way, if this worker may open it. Good once.
    fn opened(&self, worker: &WorkerId, way: &str) -> Option<oneshot::Sender<Way>> {
        let mut waiting = self.lock();
        let known = waiting.open.get(way)?;
        if known.worker != *worker {
            return None;
        }
        waiting.open.remove(way).map(|open| open.to)
    }
}

/// Forgets a call when nobody waits for it any more.
struct Gone<'a>(&'a Ways, &'a WorkerId, &'a str);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        let mut waiting = self.0.lock();
        waiting.open.remove(self.2);
        if let Some((calls, told)) = waiting.calls.get_mut(self.1) {
            calls.retain(|call| call.way != self.2);
            // The worker's own request holds the other one.
            if calls.is_empty() && Arc::strong_count(told) == 1 {
                waiting.calls.remove(self.1);
            }
        }
    }
}

/// `POST jobs/{job}/keep`: the attempt's machine is to stay when it ends.
pub(super) async fn keep(
    State(controller): State<Controller>,
    held: Live,
    Json(asked): Json<KeepMachine>,
) -> Answered<MayStay> {
    let lease = &held.lease;
    let job = controller.db.job(&lease.attempt.job).await?;
    let wanted = job.and_then(|job| match job.request.kind {
        kiln_core::JobKind::Run(run) => run.keep,
        _ => None,
    });
    let wanted = wanted.ok_or_else(|| Refused::bad("nobody asked for this job's machine"))?;
    let facts = serde_json::to_value(&asked.facts).unwrap_or_default();
    if facts.to_string().len() > FACTS_BYTES_MAX {
        return Err(Refused::bad("what is told of the machine is too long"));
    }
    let new = NewKept {
        stays_ms: wanted.stays_ms.min(controller.settings.kept.stays_max_ms),
        facts,
        tenant_max: controller.settings.kept.tenant_max,
        home: controller.peers.id().to_owned(),
    };
    let stays_ms = new.stays_ms;
    match controller.db.keep_machine(lease, new).await {
        Ok(_kept) => Ok(Json(MayStay { stays_ms })),
        Err(KeepError::Door(error)) => Err(error.into()),
        Err(error @ KeepError::TooMany { .. }) => Err(Refused::new(
            StatusCode::CONFLICT,
            "too_many_kept",
            error.to_string(),
        )),
    }
}

/// `POST machines/gone`.
pub(super) async fn gone(
    State(controller): State<Controller>,
    worker: Worker,
    Json(told): Json<MachinesGone>,
) -> Answered<serde_json::Value> {
    if told.gone.len() > KEPT_MAX {
        return Err(Refused::bad("a worker does not keep so many machines"));
    }
    for held in &told.gone {
        let (db, attempt) = (&controller.db, &held.attempt);
        let _known = db.forget_kept(&worker.id, attempt, held.epoch).await?;
    }
    Ok(Json(serde_json::json!({})))
}

/// `POST machines/calls`: held open until somebody calls.
pub(super) async fn calls(
    State(controller): State<Controller>,
    worker: Worker,
    Json(_): Json<AwaitCalls>,
) -> Answered<Calls> {
    let home = controller.peers.id();
    controller.db.kept_home(&worker.id, home).await?;
    let end = tokio::time::Instant::now() + Duration::from_millis(POLL_MS);
    loop {
        let (calls, told) = controller.ways.take(&worker.id);
        let now = tokio::time::Instant::now();
        if !calls.is_empty() || now >= end || controller.closing().is_cancelled() {
            return Ok(Json(Calls { calls }));
        }
        tokio::select! {
            () = told.notified() => {}
            () = tokio::time::sleep_until(end) => {}
            () = controller.closing().cancelled() => {}
        }
    }
}

/// `GET machines/ways/{way}`: the worker opens a way that somebody waits for.
pub(super) async fn way(
    State(controller): State<Controller>,
    worker: Worker,
    Path(way): Path<String>,
    upgrade: Option<Extension<OnUpgrade>>,
) -> Result<Response, Refused> {
    let Some(Extension(upgrade)) = upgrade else {
        return Err(Refused::bad("a way to a machine is an upgraded connection"));
    };
    let to = controller.ways.opened(&worker.id, &way);
    let to = to.ok_or_else(|| Refused::missing("nobody waits for this way any more"))?;
    tokio::spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            // Who gave up meanwhile closes it by not taking it.
            let _nobody_waits = to.send(TokioIo::new(upgraded));
        }
    });
    Ok(switching())
}

/// The answer after which a connection is a way to a machine.
pub(crate) fn switching() -> Response {
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(MACHINE_UPGRADE));
    response
}

impl Controller {
    /// Opens a way to a kept machine, through whichever controller its worker speaks to.
    ///
    /// # Errors
    /// See [`NoWay`].
    pub async fn way_to(&self, kept: &Kept) -> Result<Way, NoWay> {
        match self.peers.judge(&kept.home) {
            Home::Here => self.near_way(kept).await,
            Home::At(url) => self.far_way(&url, kept).await.map_err(|error| {
                let job = &kept.attempt.job;
                tracing::warn!(%job, error = &error as &dyn std::error::Error, "no way to a machine");
                NoWay::Silent
            }),
            Home::Away => Err(NoWay::Away),
        }
    }

    /// Opens a way to a command that runs and is attended.
    ///
    /// # Errors
    /// See [`NoWay`].
    pub async fn way_to_attempt(&self, lease: &Lease) -> Result<Way, NoWay> {
        // A worker asks again at once when its request was answered: between two of them nobody hears it.
        let deadline = tokio::time::Instant::now() + HEARD_TIMEOUT;
        while tokio::time::Instant::now() < deadline {
            if self.peers.others().is_empty() || self.ways.hears(&lease.worker) {
                return self.near_way_to_attempt(lease).await;
            }
            if let Some(way) = self.far_way_to_attempt(lease).await {
                return Ok(way);
            }
            tokio::time::sleep(HEARD_AGAIN).await;
        }
        Err(NoWay::Silent)
    }

    /// As [`Controller::way_to_attempt`], of a worker that speaks to this controller.
    pub(crate) async fn near_way_to_attempt(&self, lease: &Lease) -> Result<Way, NoWay> {
        let ways = &self.ways;
        ways.open(&lease.worker, &lease.attempt, lease.epoch).await
    }

    /// As [`Controller::way_to`], of a worker that speaks to this controller.
    pub(crate) async fn near_way(&self, kept: &Kept) -> Result<Way, NoWay> {
        let ways = &self.ways;
        ways.open(&kept.worker, &kept.attempt, kept.epoch).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt() -> AttemptId {
        AttemptId {
            job: "r1".parse().expect("a name"),
            number: 1,
        }
    }

    const EPOCH: Epoch = Epoch {
        incarnation: 1,
        count: 1,
    };

    #[tokio::test(start_paused = true)]
    async fn a_call_nobody_takes_is_forgotten() {
        let ways = Ways::default();
        let worker: WorkerId = "w1".parse().expect("a name");
        let said = ways.open(&worker, &attempt(), EPOCH).await;
        assert_eq!(said.err(), Some(NoWay::Silent));
        let waiting = ways.lock();
        assert!(waiting.open.is_empty() && waiting.calls.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_worker_that_is_called_opens_the_way_and_once() {
        let ways = Arc::new(Ways::default());
        let [one, other]: [WorkerId; 2] = ["w1", "w2"].map(|name| name.parse().expect("a name"));
        let calling = tokio::spawn({
            let (ways, one) = (Arc::clone(&ways), one.clone());
            async move { ways.open(&one, &attempt(), EPOCH).await.err() }
        });
        tokio::task::yield_now().await;
        assert!(ways.take(&other).0.is_empty());
        let (calls, _told) = ways.take(&one);
        let way = &calls[0].way;
        assert!(ways.take(&one).0.is_empty(), "told once");
        assert!(ways.opened(&other, way).is_none());
        assert!(ways.opened(&one, way).is_some());
        assert!(ways.opened(&one, way).is_none());
        // Who opened it let go of it.
        assert_eq!(calling.await.expect("ends"), Some(NoWay::Silent));
    }

    #[tokio::test(start_paused = true)]
    async fn calls_are_bounded() {
        let ways = Arc::new(Ways::default());
        let worker: WorkerId = "w1".parse().expect("a name");
        let attempt = attempt();
        let mut waiting: Vec<_> = (0..WAITING_MAX)
            .map(|_| Box::pin(ways.open(&worker, &attempt, EPOCH)))
            .collect();
        for call in &mut waiting {
            let started = futures_util::poll!(call.as_mut());
            assert!(started.is_pending());
        }
        let said = ways.open(&worker, &attempt, EPOCH).await;
        assert_eq!(said.err(), Some(NoWay::TooMany));
    }
}
