//! A pool over virtual time: jobs arrive, are planned, run for as long as they take, and end.

use std::collections::BTreeMap;

use kiln_core::JobId;
use kiln_scheduler::{PendingJob, PoolView, plan};

use crate::build::started;
use crate::check::check;

/// The pool, the true lengths of its jobs, and when each started.
pub(crate) struct Simulation {
    pub(crate) view: PoolView,
    lengths: BTreeMap<JobId, u64>,
    ends: BTreeMap<JobId, u64>,
    /// Waited so long, milliseconds.
    pub(crate) waited: BTreeMap<JobId, u64>,
    /// Whether running jobs are expected to end when they do.
    pub(crate) foresight: bool,
    /// Whether every plan is checked against all rules.
    pub(crate) checked: bool,
}

impl Simulation {
    pub(crate) fn new(view: PoolView) -> Self {
        Self {
            view,
            lengths: BTreeMap::new(),
            ends: BTreeMap::new(),
            waited: BTreeMap::new(),
            foresight: true,
            checked: true,
        }
    }

    /// A job arrives now.
    pub(crate) fn submit(&mut self, mut job: PendingJob, length_ms: u64) {
        job.queued_unix_ms = self.view.now_unix_ms;
        self.lengths.insert(job.attempt.job.clone(), length_ms);
        self.view.pending.push(job);
    }

    /// Time passes, what is over ends, and the next decision is made.
    pub(crate) fn step(&mut self, ms: u64) {
        self.view.now_unix_ms += ms;
        let now = self.view.now_unix_ms;
        let ends = &self.ends;
        self.view.running.retain(|job| ends[&job.job] > now);
        self.decide();
    }

    pub(crate) fn decide(&mut self) {
        let now = self.view.now_unix_ms;
        let plan = plan(&self.view);
        if self.checked {
            check(&self.view, &plan);
        }
        let to: BTreeMap<_, _> = plan
            .assignments
            .iter()
            .map(|new| (&new.attempt.job, &new.worker))
            .collect();
        let pending = std::mem::take(&mut self.view.pending);
        for job in pending {
            let id = job.attempt.job.clone();
            let Some(worker) = to.get(&id) else {
                self.view.pending.push(job);
                continue;
            };
            let end = now + self.lengths[&id];
            self.view
                .running
                .push(started(&job, worker, now, self.foresight.then_some(end)));
            self.waited.insert(id.clone(), now - job.queued_unix_ms);
            self.ends.insert(id, end);
        }
        self.view.reserved = plan.reservations;
    }
}

/// Numbers that look random and are the same every time.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, below: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}
