//! The scheduling loop of each pool: looks, plans, claims. Woken by what was committed, and by a sweep that makes a lost wake-up harmless.
//! A pool is scheduled from when a queue uses it.
//!
//! Only the controller that leads the pool plans; each claim asserts its leadership, so one that lost it without knowing claims nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kiln_core::dispatch::Room;
use kiln_core::{ByteSize, Label, PendingReason, PoolName, QueueName, TenantName};
use kiln_db::{CLAIM_MAX, ClaimError, DbError, Estimate, Filling, Leadership, PoolRows, Wake};
use kiln_scheduler::{
    EstimateBasis, HistoryKey, PendingJob, Plan, PoolView, Profile, QueueRule, Reservation,
    RunningJob, TenantRule, Typical, Worker,
};
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::metrics::{PoolsNow, observe_lease};
use crate::state::Controller;

/// Life of a leadership where several controllers share the database. With [`SWEEP`] it bounds how long nobody schedules after the
/// one that did died. Claims assert the epoch, so a short life risks no second scheduler: a database that stalls for longer costs a renewal.
pub const LEAD_TTL: Duration = Duration::from_secs(4);
/// Life of a leadership that nobody else can want: a file has one controller, which takes it over when it opens the file.
pub const LEAD_TTL_ALONE: Duration = Duration::from_secs(12);
/// A leadership is renewed, or asked for, this many times in its life.
const ASKS: u32 = 4;
/// Longest time without a plan.
pub const SWEEP: Duration = Duration::from_secs(2);
/// Most pools that one controller schedules; operators make them, with their queues.
pub const POOLS_MAX: usize = 64;
/// Most waiting jobs one plan looks at.
pub const PENDING_MAX: u32 = 10_000;
/// How long wake-ups that come together are collected.
const COLLECT: Duration = Duration::from_millis(3);
/// Longest time a controller that stops waits to give its right back.
const RESIGN_TIMEOUT: Duration = Duration::from_secs(2);
/// Wait after the database failed.
const RETRY: Duration = Duration::from_millis(500);
/// Longest time until a new pool is found.
const POOLS_EVERY: Duration = Duration::from_secs(10);

/// Schedules every pool until `stop`, and gives the right to do so back then: another controller need not wait for its end.
pub async fn run(controller: Controller, stop: CancellationToken) {
    let (seen, tasks) = (PoolsNow::default(), TaskTracker::new());
    let mut known = BTreeSet::new();
    let mut full = false;
    let mut wakes = controller.db.subscribe();
    loop {
        let pools = pools(&controller).await;
        for pool in pools {
            if known.len() >= POOLS_MAX && !known.contains(&pool) {
                if !full {
                    tracing::warn!(%pool, "more pools than one controller schedules: nothing of it begins");
                }
                full = true;
            } else if known.insert(pool.clone()) {
                tasks.spawn(run_pool(
                    controller.clone(),
                    pool,
                    seen.clone(),
                    stop.clone(),
                ));
            }
        }
        let new = async {
            loop {
                match wakes.recv().await {
                    Ok(Wake::Queue(pool)) if !known.contains(&pool) => return,
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        tokio::select! {
            () = new, if !full => {}
            () = tokio::time::sleep(POOLS_EVERY) => {}
            () = stop.cancelled() => break,
        }
    }
    tasks.close();
    tasks.wait().await;
}

/// The controller's own pool, and those of queues.
async fn pools(controller: &Controller) -> BTreeSet<PoolName> {
    let mut pools = BTreeSet::from([controller.settings.pool.clone()]);
    match controller.db.queues().await {
        Ok(queues) => pools.extend(queues.into_iter().map(|queue| queue.pool)),
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "pools were not looked for"
            );
        }
    }
    pools
}

async fn run_pool(controller: Controller, pool: PoolName, seen: PoolsNow, stop: CancellationToken) {
    let mut lead = Lead::new(pool, seen, controller.db.is_shared());
    tokio::select! {
        never = plans(&controller, &mut lead) => match never {},
        () = stop.cancelled() => {}
    }
    if let Some(own) = lead.own {
        let resigned = tokio::time::timeout(RESIGN_TIMEOUT, controller.db.resign(&own)).await;
        if !matches!(resigned, Ok(Ok(()))) {
            tracing::warn!("the right to schedule was not given back: it ends by itself");
        }
    }
}

/// What is known of the right to schedule.
#[derive(Debug)]
struct Lead {
    pool: PoolName,
    seen: PoolsNow,
    ttl: Duration,
    own: Option<Leadership>,
    /// When the database was asked last.
    asked: Option<Instant>,
}

impl Lead {
    fn new(pool: PoolName, seen: PoolsNow, shared: bool) -> Self {
        Self {
            pool,
            seen,
            ttl: if shared { LEAD_TTL } else { LEAD_TTL_ALONE },
            own: None,
            asked: None,
        }
    }

    /// Time between two askings.
    fn every(&self) -> Duration {
        self.ttl / ASKS
    }

    /// Whether it is to be asked for: now and then, whether it is ours or another's.
    fn is_stale(&self) -> bool {
        self.asked
            .is_none_or(|asked| asked.elapsed() >= self.every())
    }

    /// Nothing is known any more.
    fn forget(&mut self) {
        (self.own, self.asked) = (None, None);
    }
}

enum Never {}

async fn plans(controller: &Controller, lead: &mut Lead) -> Never {
    let mut wakes = controller.db.subscribe();
    let mut reserved = Vec::new();
    loop {
        let done = one(controller, lead, &mut reserved).await;
        let again = match done {
            Ok(again) => again,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "no plan was made");
                lead.forget();
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        if again {
            continue;
        }
        let patience = SWEEP.min(lead.every());
        let woken = async {
            loop {
                match wakes.recv().await {
                    Ok(Wake::Queue(pool)) if pool == lead.pool => return,
                    Ok(Wake::Lead(pool)) if pool == lead.pool => {
                        lead.asked = None;
                        return;
                    }
                    Ok(Wake::Everything) | Err(RecvError::Lagged(_)) => return,
                    Ok(_) => {}
                    // The database is closing: the loop is about to be stopped.
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        if tokio::time::timeout(patience, woken).await.is_ok() {
            tokio::time::sleep(COLLECT).await;
            while let Ok(wake) = wakes.try_recv() {
                if matches!(wake, Wake::Lead(_)) {
                    lead.asked = None;
                }
            }
        }
    }
}

/// One look, plan and claim. True when the world changed under it and it should look again at once.
async fn one(
    controller: &Controller,
    lead: &mut Lead,
    reserved: &mut Vec<Reservation>,
) -> Result<bool, DbError> {
    let (db, pool) = (&controller.db, lead.pool.clone());
    if lead.is_stale() {
        let asked = Instant::now();
        let ttl_ms = u64::try_from(lead.ttl.as_millis()).unwrap_or(u64::MAX);
        let own = db.lead(&pool, &controller.holder, ttl_ms).await?;
        if own.is_none() && lead.own.is_some() {
            tracing::warn!("another controller schedules now");
        }
        (lead.own, lead.asked) = (own, Some(asked));
    }
    let Some(leadership) = lead.own.clone() else {
        // Another controller plans for this pool.
        reserved.clear();
        return Ok(false);
    };
    let rows = db.pool_view(&pool, PENDING_MAX).await?;
    lead.seen.observe(&controller.metrics, &pool, &rows);
    if rows.pending.is_empty() {
        reserved.clear();
        return Ok(false);
    }
    let now_unix_ms = rows.now_unix_ms;
    let waiting: BTreeMap<_, _> = rows
        .pending
        .iter()
        .map(|job| {
            // Nobody had to tell it why it waits: a worker had room when it was first looked at.
            let at_once = job.reason == PendingReason::New;
            let times = (job.created_unix_ms, job.ready_unix_ms, at_once);
            (job.attempt.job.clone(), times)
        })
        .collect();
    let view = view(rows, std::mem::take(reserved));
    let planned = tokio::task::spawn_blocking(move || kiln_scheduler::plan(&view)).await;
    let Ok(plan) = planned else {
        tracing::error!("the scheduler panicked");
        return Ok(false);
    };
    let Plan {
        assignments,
        reasons,
        reservations,
    } = plan;
    *reserved = reservations;
    let mut refused = 0;
    let claimed = assignments.len();
    for part in assignments.chunks(CLAIM_MAX) {
        match db.claim(&leadership, part.to_vec()).await {
            Ok(answers) => {
                for lease in answers.iter().flatten() {
                    let waits = waiting.get(&lease.attempt.job).copied();
                    let (created, ready, at_once) =
                        waits.unwrap_or((now_unix_ms, now_unix_ms, false));
                    observe_lease(&controller.metrics, created, ready, now_unix_ms, at_once);
                }
                for why in answers.into_iter().filter_map(Result::err) {
                    tracing::debug!(%why, "an assignment was not claimed");
                    refused += 1;
                }
            }
            Err(ClaimError::Database(error)) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "this controller no longer leads");
                lead.forget();
                return Ok(false);
            }
        }
    }
    let reasons = reasons
        .into_iter()
        .map(|(job, reason, estimate)| {
            let estimate = estimate.map(|estimate| told(&estimate, now_unix_ms));
            (job, reason, estimate)
        })
        .collect();
    db.store_reasons(reasons).await?;
    // What was refused has changed since the look; without any claim that went through, looking again at once would spin.
    Ok(refused > 0 && refused < claimed)
}

fn told(estimate: &kiln_scheduler::Estimate, now_unix_ms: u64) -> Estimate {
    let (samples, basis) = match &estimate.basis {
        EstimateBasis::ExpectedEnds => (0, "when jobs that run now should end".to_owned()),
        EstimateBasis::P50 { runs } => (*runs, format!("the median of {runs} earlier jobs")),
    };
    Estimate {
        wait_ms: estimate.start_unix_ms.saturating_sub(now_unix_ms),
        samples,
        basis,
    }
}

/// Rows of the database as the scheduler's input.
#[must_use]
pub fn view(rows: PoolRows, reserved: Vec<Reservation>) -> PoolView {
    let label = |text: &str| text.parse::<Label>().ok();
    let history: BTreeMap<HistoryKey, Typical> = rows
        .history
        .iter()
        .filter_map(|learnt| {
            let key = HistoryKey {
                tenant: learnt.tenant.clone(),
                queue: learnt.queue.clone(),
                kind: label(&learnt.kind)?,
            };
            let typical = Typical {
                p50_ms: learnt.run_p50_ms,
                runs: learnt.samples,
            };
            Some((key, typical))
        })
        .collect();
    let expected = |job: &kiln_db::HeldJob| {
        let key = HistoryKey {
            tenant: job.lease.tenant.clone(),
            queue: job.queue.clone(),
            kind: label(&job.kind)?,
        };
        Some(job.leased_unix_ms.saturating_add(history.get(&key)?.p50_ms))
    };
    let running = rows
        .held
        .iter()
        .map(|job| RunningJob {
            job: job.lease.attempt.job.clone(),
            tenant: job.lease.tenant.clone(),
            queue: job.queue.clone(),
            worker: job.lease.worker.clone(),
            room: job.need,
            pinned_cpus: job.pinned_cpus,
            group: job.group.clone(),
            started_unix_ms: job.leased_unix_ms,
            expected_end_unix_ms: expected(job),
        })
        .collect();
    let pending = rows
        .pending
        .into_iter()
        .filter_map(|job| {
            Some(PendingJob {
                attempt: job.attempt,
                tenant: job.tenant,
                queue: job.queue,
                priority: job.priority,
                requires: job.requires,
                need: job.need,
                group: job.group,
                queued_unix_ms: job.created_unix_ms,
                not_before_unix_ms: job.ready_unix_ms,
                avoid: job.avoid,
                kind: label(&job.kind)?,
                template: None,
            })
        })
        .collect();
    PoolView {
        now_unix_ms: rows.now_unix_ms,
        settling: false,
        profile: match rows.limits.filling {
            Filling::Spread => Profile::Spread,
            Filling::Pack => Profile::Pack,
        },
        running_max: rows.limits.running_max,
        pending,
        running,
        workers: rows.workers.into_iter().map(worker).collect(),
        tenants: rows.tenants.into_iter().map(tenant).collect(),
        queues: rows.queues.into_iter().map(queue).collect(),
        history,
        reserved,
    }
}

fn tenant(tenant: kiln_db::Tenant) -> (TenantName, TenantRule) {
    let rule = TenantRule {
        weight: tenant.weight,
        running_max: tenant.quota.running_max,
        burst: tenant.quota.burst,
        reserved: tenant.quota.reserved,
    };
    (tenant.name, rule)
}

fn queue(queue: kiln_db::Queue) -> (QueueName, QueueRule) {
    let rule = QueueRule {
        weight: queue.weight,
        paused: queue.paused.is_some(),
        running_max: queue.running_max,
    };
    (queue.name, rule)
}

fn worker((worker, left): (kiln_db::Worker, Room)) -> Worker {
    let all = worker.facts.capacity;
    let held = Room {
        cpus: all.cpus.saturating_sub(left.cpus),
        memory: ByteSize(all.memory.0.saturating_sub(left.memory.0)),
        disk: ByteSize(all.disk.0.saturating_sub(left.disk.0)),
        machines: all.machines.saturating_sub(left.machines),
    };
    Worker {
        id: worker.id,
        state: worker.state,
        labels: worker.placement.labels,
        tenants: worker.placement.tenants,
        held,
        whole_cpus: worker.facts.whole_cpus,
        infra_failures: worker.infra_failures,
        templates: std::collections::BTreeSet::new(),
        facts: worker.facts,
    }
}
