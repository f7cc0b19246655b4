//! The decision in its order: limits, then a host, else a reservation and a reason.

use std::collections::{BTreeMap, BTreeSet};

use kiln_core::dispatch::{Assignment, PendingReason, QuotaScope, Room};
use kiln_core::{QueueName, TenantName};

use crate::classes::Classes;
use crate::fleet::{Ask, Fleet, Found, Hold, NEVER, hash};
use crate::order::Order;
use crate::plan::{Estimate, EstimateBasis, Plan, Reservation};
use crate::room;
use crate::timeline::Timeline;
use crate::view::{PendingJob, PoolView, QueueRule, TenantRule, Typical};

/// One host in so many is kept for large jobs at most, but one always may be.
const HOSTS_PER_RESERVATION: usize = 16;
/// Most hosts of one component that are kept.
const RESERVATIONS_MAX: usize = 16;
/// Scale of shares in time lines.
pub(crate) const SHARE_SCALE: u64 = 1 << 32;

/// A job as the decision knows it.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub(crate) pending: &'a PendingJob,
    pub(crate) tenant: usize,
    pub(crate) queue: usize,
    pub(crate) class: usize,
    pub(crate) typical: Option<Typical>,
}

/// A tenant, its rule, and where its limit stands.
#[derive(Debug)]
pub(crate) struct Tenant<'a> {
    pub(crate) name: &'a TenantName,
    pub(crate) rule: TenantRule,
    pub(crate) hash: u64,
    pub(crate) line: Timeline,
}

/// A queue over all tenants.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) rule: QueueRule,
    pub(crate) running: u32,
    pub(crate) line: Timeline,
}

/// Classes that compete for hosts.
#[derive(Debug, Default)]
pub(crate) struct Component {
    pub(crate) total: Room,
    pub(crate) hosts: usize,
    pub(crate) line: Timeline,
    pub(crate) waiting: u32,
    pub(crate) kept: usize,
    /// Tenants for whose jobs a host is kept here in this plan.
    pub(crate) served: BTreeSet<usize>,
    /// Tenants whose later jobs must not pass an overdue one here.
    pub(crate) stopped: BTreeSet<usize>,
}

/// What became of a job.
#[derive(Clone, Debug)]
pub(crate) enum Fate {
    Undecided,
    Assigned,
    Waits(PendingReason, Option<Estimate>),
    /// It waits for room, with how many before it; the reason is worded when all is placed.
    Room(Option<Estimate>),
}

/// A decision under way.
#[derive(Debug)]
pub(crate) struct Decision<'a> {
    pub(crate) view: &'a PoolView,
    pub(crate) fleet: Fleet<'a>,
    pub(crate) classes: Classes<'a>,
    pub(crate) jobs: Vec<Job<'a>>,
    pub(crate) fates: Vec<Fate>,
    pub(crate) order: Order,
    pub(crate) tenants: Vec<Tenant<'a>>,
    pub(crate) queues: Vec<Queue>,
    pub(crate) components: Vec<Component>,
    pub(crate) global: Global,
    /// Hosts that the last plan kept, by job.
    pub(crate) kept: BTreeMap<usize, usize>,
    pub(crate) plan: Plan,
}

/// The limit of the installation.
#[derive(Debug, Default)]
pub(crate) struct Global {
    pub(crate) running: u32,
    /// Running jobs that tenants are sure of and do not have.
    pub(crate) reserved: u32,
    pub(crate) line: Timeline,
}

impl Decision<'_> {
    /// Gives every undecided job that is in the order its turn.
    pub(crate) fn run(&mut self) {
        let mut bursting = Vec::new();
        self.round(&mut bursting, false);
        for tenant in std::mem::take(&mut bursting) {
            self.order.rank_tenant(tenant);
        }
        self.round(&mut bursting, true);
    }

    fn round(&mut self, bursting: &mut Vec<usize>, burst: bool) {
        while let Some((tenant, front)) = self.order.pop() {
            if !burst
                && self.tenants[tenant].rule.burst > 0
                && self.tenant_limit(tenant, false).is_some()
            {
                bursting.push(tenant);
                continue;
            }
            let Some(job) = self.order.pop_of(tenant) else {
                continue;
            };
            self.turn(tenant, job, front, burst);
            self.order.rank_flow(self.order.turns[job].flow);
            self.order.rank_tenant(tenant);
        }
    }

    fn turn(&mut self, tenant: usize, job: usize, front: bool, burst: bool) {
        if let Some((scope, running, limit)) = self.limit(tenant, job, burst) {
            let line = match scope {
                QuotaScope::Tenant => &mut self.tenants[tenant].line,
                QuotaScope::Queue => &mut self.queues[self.jobs[job].queue].line,
                QuotaScope::Global => &mut self.global.line,
            };
            let estimate = line.next(1, self.jobs[job].typical);
            let reason = PendingReason::Quota {
                scope,
                running,
                limit,
            };
            self.fates[job] = Fate::Waits(reason, estimate);
            return;
        }
        let class = self.jobs[job].class;
        let component = self.classes.list[class].component;
        let stopped = self.components[component].stopped.contains(&tenant);
        let found = if stopped || self.classes.list[class].exhausted {
            Found::Nothing
        } else {
            self.find(tenant, job)
        };
        self.order.count(job);
        match found {
            Found::Host(host) => self.assign(tenant, job, host),
            Found::OnlyReserved => {
                let estimate = self.wait(job, component);
                self.fates[job] = Fate::Waits(PendingReason::Reserved, estimate);
            }
            Found::Nothing => {
                self.classes.list[class].exhausted |= !stopped;
                self.wait(job, component);
                let kept = !stopped && self.reserve(job, component);
                let here = &mut self.components[component];
                if kept {
                    here.served.insert(tenant);
                } else if !front
                    && self.order.turns[job].large
                    && self.order.overdue(job)
                    && !here.served.contains(&tenant)
                {
                    here.stopped.insert(tenant);
                }
            }
        }
    }

    /// Which limit keeps a job, how much runs and how much may.
    fn limit(&self, tenant: usize, job: usize, burst: bool) -> Option<(QuotaScope, u32, u32)> {
        if let Some((running, limit)) = self.tenant_limit(tenant, burst) {
            return Some((QuotaScope::Tenant, running, limit));
        }
        let queue = &self.queues[self.jobs[job].queue];
        if let Some(limit) = queue.rule.running_max
            && queue.running >= limit
        {
            return Some((QuotaScope::Queue, queue.running, limit));
        }
        let account = &self.order.tenants[tenant];
        let own = account.reserved.saturating_sub(account.running);
        let limit = self
            .view
            .running_max?
            .saturating_sub(self.global.reserved.saturating_sub(own));
        let running = self.global.running;
        (running >= limit).then_some((QuotaScope::Global, running, limit))
    }

    fn tenant_limit(&self, tenant: usize, burst: bool) -> Option<(u32, u32)> {
        let rule = &self.tenants[tenant].rule;
        let more = if burst { rule.burst } else { 0 };
        let limit = rule.running_max?.saturating_add(more);
        let running = self.order.tenants[tenant].running;
        (running >= limit).then_some((running, limit))
    }

    fn end_of(&self, job: usize) -> u64 {
        self.jobs[job].typical.map_or(NEVER, |typical| {
            self.view.now_unix_ms.saturating_add(typical.p50_ms.max(1))
        })
    }

    fn find(&self, tenant: usize, job: usize) -> Found {
        let pending = self.jobs[job].pending;
        let class = &self.classes.list[self.jobs[job].class];
        let index = &self.fleet.index;
        self.fleet.find(&Ask {
            hosts: &class.hosts,
            need: class.need,
            pinned: class.pinned,
            avoid: &pending.avoid,
            tenant_hash: self.tenants[tenant].hash,
            warm: index.warm.get(self.tenants[tenant].name),
            template: pending
                .template
                .as_ref()
                .and_then(|template| index.template.get(template)),
            end: self.end_of(job),
        })
    }

    fn assign(&mut self, tenant: usize, job: usize, host: usize) {
        let end = self.end_of(job);
        let class = &self.classes.list[self.jobs[job].class];
        self.fleet.take(host, &class.need, class.pinned, end);
        let here = &mut self.components[class.component];
        here.line
            .ends(end, room::dominant(&class.need, &here.total, SHARE_SCALE));
        self.tenants[tenant].line.ends(end, 1);
        let queue = &mut self.queues[self.jobs[job].queue];
        queue.line.ends(end, 1);
        queue.running += 1;
        self.global.line.ends(end, 1);
        self.global.running += 1;
        let account = &mut self.order.tenants[tenant];
        if account.running < account.reserved {
            self.global.reserved = self.global.reserved.saturating_sub(1);
        }
        account.running += 1;
        self.fates[job] = Fate::Assigned;
        self.plan.assignments.push(Assignment {
            attempt: self.jobs[job].pending.attempt.clone(),
            worker: self.fleet.workers[host].id.clone(),
        });
    }

    /// The job takes its place among those that wait for room.
    fn wait(&mut self, job: usize, component: usize) -> Option<Estimate> {
        let here = &mut self.components[component];
        let need = self.classes.list[self.jobs[job].class].need;
        let amount = room::dominant(&need, &here.total, SHARE_SCALE);
        let estimate = here.line.next(amount, self.jobs[job].typical);
        self.fates[job] = match here.waiting {
            0 => Fate::Room(estimate),
            jobs => Fate::Waits(PendingReason::Behind { jobs }, estimate),
        };
        here.waiting = here.waiting.saturating_add(1);
        estimate
    }

    /// Keeps a host for a large job: where there was one kept for it, else where there is room first.
    fn reserve(&mut self, job: usize, component: usize) -> bool {
        let here = &self.components[component];
        let most = (here.hosts / HOSTS_PER_RESERVATION).clamp(1, RESERVATIONS_MAX);
        if here.kept >= most || !self.order.turns[job].large {
            return false;
        }
        let class = &self.classes.list[self.jobs[job].class];
        let avoid = &self.jobs[job].pending.avoid;
        let room_at = |host: usize| {
            let (from, ended, extra) = self.fleet.room_at(host, &class.need, class.pinned)?;
            let avoided = avoid.contains(&self.fleet.workers[host].id);
            Some(((avoided, from, ended, host), extra))
        };
        let before = self
            .kept
            .get(&job)
            .copied()
            .filter(|host| class.hosts.contains(*host));
        let choice = before.and_then(room_at).or_else(|| {
            class
                .hosts
                .iter()
                .filter_map(room_at)
                .min_by_key(|(rank, _)| *rank)
        });
        let Some(((_, from, _, host), extra)) = choice else {
            return false;
        };
        let from_unix_ms = (from != NEVER).then_some(from);
        self.fleet.hold(
            host,
            Hold {
                from: from_unix_ms,
                extra,
            },
        );
        self.components[component].kept += 1;
        let estimate = from_unix_ms.map(|start_unix_ms| Estimate {
            start_unix_ms,
            basis: EstimateBasis::ExpectedEnds,
        });
        self.fates[job] = Fate::Room(estimate);
        self.plan.reservations.push(Reservation {
            job: self.jobs[job].pending.attempt.job.clone(),
            worker: self.fleet.workers[host].id.clone(),
            from_unix_ms,
        });
        true
    }

    /// Words what is left to word, and gives the plan.
    pub(crate) fn finish(mut self) -> Plan {
        let mut best: BTreeMap<usize, Room> = BTreeMap::new();
        for (job, fate) in self.jobs.iter().zip(std::mem::take(&mut self.fates)) {
            let (reason, estimate) = match fate {
                Fate::Assigned => continue,
                Fate::Waits(reason, estimate) => (reason, estimate),
                Fate::Undecided => (PendingReason::New, None),
                Fate::Room(estimate) => {
                    let class = &self.classes.list[job.class];
                    let best = *best.entry(job.class).or_insert_with(|| {
                        let free = |host: usize| self.fleet.free[host];
                        self.fleet
                            .nearest(class.hosts.iter(), &class.need, class.pinned, free)
                    });
                    let need = class.need;
                    (PendingReason::Capacity { need, best }, estimate)
                }
            };
            self.plan
                .reasons
                .push((job.pending.attempt.job.clone(), reason, estimate));
        }
        self.plan
    }
}

impl<'a> Tenant<'a> {
    pub(crate) fn new(view: &PoolView, name: &'a TenantName) -> Self {
        Self {
            name,
            rule: view.tenants.get(name).cloned().unwrap_or_default(),
            hash: hash(name.as_str()),
            line: Timeline::default(),
        }
    }
}

impl Queue {
    pub(crate) fn new(view: &PoolView, name: &QueueName) -> Self {
        Self {
            rule: view.queues.get(name).cloned().unwrap_or_default(),
            running: 0,
            line: Timeline::default(),
        }
    }
}
