//! Whose turn it is: tenant, then queue, then job, each by S = (dominant share of what runs and of this job) / weight * 2^(-priority/100).
//!
//! A job that gets no room still counts as if it ran, so that the order is the one in which jobs will start. Ageing: see [`Order::lane`].

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use kiln_core::dispatch::Room;

use crate::room;

/// One point of priority is worth so much earlier queueing within a queue, milliseconds: 100 points are ten minutes.
pub(crate) const PRIORITY_POINT_MS: i64 = 6_000;
/// A job that could start and waited so long is overdue, milliseconds.
pub(crate) const OVERDUE_MS: u64 = 600_000;

/// What the order must know of a job.
#[derive(Debug)]
pub(crate) struct Turn {
    pub(crate) tenant: usize,
    pub(crate) flow: usize,
    pub(crate) component: usize,
    pub(crate) need: Room,
    pub(crate) priority: i16,
    /// Since when it could start.
    pub(crate) since: u64,
    /// Where it stands in its queue: when it came, moved by its priority.
    pub(crate) key: i64,
    /// It needs more than the smallest job it competes with, or takes fewer hosts: others could take its room for ever.
    pub(crate) large: bool,
}

/// A tenant, or one of its queues: what it has now.
#[derive(Debug, Default)]
pub(crate) struct Share {
    pub(crate) used: Room,
    pub(crate) weight: f64,
    /// When it started something last, by component.
    pub(crate) started: BTreeMap<usize, u64>,
}

impl Share {
    pub(crate) fn new(weight: u32) -> Self {
        Self {
            weight: f64::from(weight.max(1)),
            ..Self::default()
        }
    }
}

/// A queue of a tenant.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    pub(crate) share: Share,
    pub(crate) jobs: Vec<usize>,
    next: usize,
}

/// A tenant.
#[derive(Debug, Default)]
pub(crate) struct Account {
    pub(crate) share: Share,
    /// Jobs that it is sure of.
    pub(crate) reserved: u32,
    pub(crate) running: u32,
    flows: BinaryHeap<Reverse<Rank>>,
}

impl Account {
    pub(crate) fn new(weight: u32, reserved: u32) -> Self {
        Self {
            share: Share::new(weight),
            reserved,
            ..Self::default()
        }
    }
}

/// Lane, then S (or age) as bits of a positive number, then the job's place among all, then whose it is.
type Rank = (u8, u64, usize, usize);

/// All turns still to come.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) turns: Vec<Turn>,
    pub(crate) flows: Vec<Flow>,
    pub(crate) tenants: Vec<Account>,
    /// Jobs with a reservation from the last plan.
    pub(crate) kept: BTreeSet<usize>,
    total: [f64; 4],
    now: u64,
    heap: BinaryHeap<Reverse<Rank>>,
}

impl Order {
    pub(crate) fn new(
        turns: Vec<Turn>,
        tenants: Vec<Account>,
        flows: Vec<Flow>,
        total: &Room,
        now: u64,
    ) -> Self {
        Self {
            turns,
            flows,
            tenants,
            kept: BTreeSet::new(),
            total: parts(total).map(|part| part.max(1.0)),
            now,
            heap: BinaryHeap::new(),
        }
    }

    /// Puts every flow and tenant with jobs in line. Jobs of a flow must be in the order they were queued.
    pub(crate) fn line_up(&mut self) {
        for flow in 0..self.flows.len() {
            let turns = &self.turns;
            self.flows[flow].jobs.sort_by_key(|job| turns[*job].key);
            self.rank_flow(flow);
        }
        for tenant in 0..self.tenants.len() {
            self.rank_tenant(tenant);
        }
    }

    /// The next tenant in turn, and whether ageing brought it to the front; it is out of line until [`Self::rank_tenant`].
    pub(crate) fn pop(&mut self) -> Option<(usize, bool)> {
        let Reverse((lane, _, _, tenant)) = self.heap.pop()?;
        Some((tenant, lane == 0))
    }

    /// The next job of a tenant. Its flow is out of line until [`Self::rank_flow`].
    pub(crate) fn pop_of(&mut self, tenant: usize) -> Option<usize> {
        let Reverse((_, _, _, flow)) = self.tenants[tenant].flows.pop()?;
        let flow = &mut self.flows[flow];
        let job = flow.jobs[flow.next];
        flow.next += 1;
        Some(job)
    }

    pub(crate) fn rank_flow(&mut self, flow: usize) {
        let share = &self.flows[flow];
        let Some(job) = share.jobs.get(share.next).copied() else {
            return;
        };
        let (lane, value) = self.rank(&share.share, job, false);
        self.tenants[self.turns[job].tenant]
            .flows
            .push(Reverse((lane, value, job, flow)));
    }

    pub(crate) fn rank_tenant(&mut self, tenant: usize) {
        let account = &self.tenants[tenant];
        let Some(Reverse((_, _, job, _))) = account.flows.peek().copied() else {
            return;
        };
        let first = account.running < account.reserved;
        let (lane, value) = self.rank(&account.share, job, first);
        self.heap.push(Reverse((lane, value, job, tenant)));
    }

    /// Counts a job as one that its tenant and queue have, started or with a turn.
    pub(crate) fn count(&mut self, job: usize) {
        let turn = &self.turns[job];
        for share in [
            &mut self.tenants[turn.tenant].share,
            &mut self.flows[turn.flow].share,
        ] {
            share.used = room::plus(&share.used, &turn.need);
            share.started.insert(turn.component, self.now);
        }
    }

    pub(crate) fn overdue(&self, job: usize) -> bool {
        self.now.saturating_sub(self.turns[job].since) >= OVERDUE_MS
    }

    fn rank(&self, share: &Share, job: usize, first: bool) -> (u8, u64) {
        let turn = &self.turns[job];
        match self.lane(share, job, first) {
            0 => (0, turn.since),
            lane => {
                let used = room::plus(&share.used, &turn.need);
                let parts = parts(&used);
                let dominant = (0..4)
                    .map(|at| parts[at] / self.total[at])
                    .fold(0.0, f64::max);
                let factor = (-f64::from(turn.priority) / 100.0).exp2();
                (lane, (dominant / share.weight * factor).to_bits())
            }
        }
    }

    /// 0: ageing. The job is overdue, and where it competes nothing of this tenant (or queue) started since it is, or a host is kept for it.
    /// So whoever waits gets a turn, and one with many jobs gets no more than that. 1: below what is reserved for it. 2: by S.
    fn lane(&self, share: &Share, job: usize, first: bool) -> u8 {
        let turn = &self.turns[job];
        let due = turn.since.saturating_add(OVERDUE_MS);
        let passed_over = || {
            share
                .started
                .get(&turn.component)
                .is_none_or(|started| *started < due)
        };
        if self.overdue(job) && (passed_over() || turn.large && self.kept.contains(&job)) {
            0
        } else if first {
            1
        } else {
            2
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "shares need no more than 52 bits"
)]
fn parts(room: &Room) -> [f64; 4] {
    [
        f64::from(room.cpus),
        room.memory.0 as f64,
        room.disk.0 as f64,
        f64::from(room.machines),
    ]
}
