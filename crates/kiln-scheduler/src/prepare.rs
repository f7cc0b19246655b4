//! From a view to a decision: jobs get classes, those that cannot start whatever the room get their reason, the rest stand in line.

use std::collections::BTreeMap;

use kiln_core::dispatch::{PendingReason, Room};
use kiln_core::{JobId, Label, QueueName, TenantName};

use crate::classes::Classes;
use crate::decide::{Component, Decision, Fate, Global, Job, Queue, SHARE_SCALE, Tenant};
use crate::fleet::{Fleet, NEVER, hash};
use crate::order::{Account, Flow, Order, PRIORITY_POINT_MS, Share, Turn};
use crate::plan::{Estimate, Plan};
use crate::room;
use crate::timeline::Timeline;
use crate::view::{HistoryKey, PendingJob, PoolView, RunningJob, Typical};

/// Names as numbers. A hash before a name spares comparing texts.
#[derive(Debug, Default)]
struct Names<'a> {
    tenants: BTreeMap<(u64, &'a TenantName), usize>,
    queues: BTreeMap<(u64, &'a QueueName), usize>,
    flows: BTreeMap<(usize, usize), usize>,
    kinds: BTreeMap<(usize, u64, &'a Label), Option<Typical>>,
}

impl<'a> Names<'a> {
    fn tenant(&mut self, name: &'a TenantName) -> usize {
        number(&mut self.tenants, (hash(name.as_str()), name))
    }

    fn queue(&mut self, name: &'a QueueName) -> usize {
        number(&mut self.queues, (hash(name.as_str()), name))
    }
}

fn number<K: Ord>(names: &mut BTreeMap<K, usize>, name: K) -> usize {
    let next = names.len();
    *names.entry(name).or_insert(next)
}

/// Everything that is known before the first turn.
pub(crate) fn decision(view: &PoolView) -> Decision<'_> {
    let mut fleet = Fleet::new(view);
    let mut names = Names::default();
    let mut classes = Classes::default();
    let (jobs, flow_of) = read_jobs(view, &fleet, &mut names, &mut classes);
    for job in &view.running {
        let tenant = names.tenant(&job.tenant);
        let queue = names.queue(&job.queue);
        number(&mut names.flows, (tenant, queue));
    }
    for (name, rule) in &view.tenants {
        if rule.reserved > 0 {
            names.tenant(name);
        }
    }
    let fates = first_fates(view, &jobs, &classes, &names);
    let (count, component_of) = classes.join(fleet.workers.len());
    let components = measure_components(&fleet, count, &component_of);
    let floors = floors(&jobs, &fates, &classes, count);
    let all = floors
        .iter()
        .flatten()
        .copied()
        .reduce(|a, b| room::least(&a, &b));
    fleet.set_floor(all.unwrap_or_default());

    let turns = turns(&jobs, &flow_of, &classes, &components, &floors);
    let (accounts, mut flows) = accounts(view, &names);
    for (job, fate) in fates.iter().enumerate() {
        if matches!(fate, Fate::Undecided) {
            flows[flow_of[job]].jobs.push(job);
        }
    }
    let order = Order::new(turns, accounts, flows, &fleet.total, view.now_unix_ms);
    let mut decision = Decision {
        view,
        tenants: by_number(&names.tenants, |(_, name)| Tenant::new(view, name)),
        queues: by_number(&names.queues, |(_, name)| Queue::new(view, name)),
        kept: kept(view, &fleet, &jobs),
        fleet,
        classes,
        jobs,
        fates,
        order,
        components,
        global: Global::default(),
        plan: Plan::default(),
    };
    decision.order.kept = decision.kept.keys().copied().collect();
    for job in &view.running {
        count_running(&mut decision, &names, &component_of, job);
    }
    let missing = decision
        .order
        .tenants
        .iter()
        .map(|account| account.reserved.saturating_sub(account.running));
    decision.global.reserved = missing.fold(0, u32::saturating_add);
    decision.order.line_up();
    decision
}

/// Jobs in the order they were queued, each with its flow.
fn read_jobs<'a>(
    view: &'a PoolView,
    fleet: &Fleet<'a>,
    names: &mut Names<'a>,
    classes: &mut Classes<'a>,
) -> (Vec<Job<'a>>, Vec<usize>) {
    let mut pending: Vec<&PendingJob> = view.pending.iter().collect();
    pending.sort_by(|a, b| (a.queued_unix_ms, &a.attempt).cmp(&(b.queued_unix_ms, &b.attempt)));
    let mut visible: Vec<u32> = Vec::new();
    let mut jobs = Vec::with_capacity(pending.len());
    let mut flow_of = Vec::with_capacity(pending.len());
    for pending in pending {
        let tenant = names.tenant(&pending.tenant);
        if tenant == visible.len() {
            visible.push(classes.visibility(fleet.index.visible(&pending.tenant)));
        }
        let queue = names.queue(&pending.queue);
        let flow = number(&mut names.flows, (tenant, queue));
        let typical = *names
            .kinds
            .entry((flow, hash(pending.kind.as_str()), &pending.kind))
            .or_insert_with(|| {
                let key = HistoryKey {
                    tenant: pending.tenant.clone(),
                    queue: pending.queue.clone(),
                    kind: pending.kind.clone(),
                };
                view.history.get(&key).copied()
            });
        let class = classes.class_of(fleet, visible[tenant], pending.need, &pending.requires);
        flow_of.push(flow);
        jobs.push(Job {
            pending,
            tenant,
            queue,
            class,
            typical,
        });
    }
    (jobs, flow_of)
}

/// Reasons that no room can change. Who holds a concurrency group is known before the first turn: who runs, else the first that can.
fn first_fates(
    view: &PoolView,
    jobs: &[Job<'_>],
    classes: &Classes<'_>,
    names: &Names<'_>,
) -> Vec<Fate> {
    let mut groups: BTreeMap<(usize, &Label), (&JobId, Timeline)> = BTreeMap::new();
    for job in &view.running {
        if let (Some(group), Some(tenant)) = (
            &job.group,
            names.tenants.get(&(hash(job.tenant.as_str()), &job.tenant)),
        ) {
            let held = groups
                .entry((*tenant, group))
                .or_insert((&job.job, Timeline::default()));
            held.0 = held.0.min(&job.job);
            held.1.ends(
                job.expected_end_unix_ms
                    .map_or(NEVER, |end| end.max(view.now_unix_ms)),
                1,
            );
        }
    }
    let mut fates = Vec::with_capacity(jobs.len());
    for job in jobs {
        let pending = job.pending;
        let stuck = if view.settling {
            Some(PendingReason::Settling)
        } else if view
            .queues
            .get(&pending.queue)
            .is_some_and(|rule| rule.paused)
        {
            Some(PendingReason::Paused {
                queue: pending.queue.clone(),
            })
        } else {
            classes.list[job.class].never.clone()
        };
        let until = pending.not_before_unix_ms;
        let backoff = (until > view.now_unix_ms).then_some(PendingReason::Backoff {
            until_unix_ms: until,
        });
        fates.push(match (stuck, backoff, &pending.group) {
            (Some(reason), _, _) | (None, Some(reason), None) => Fate::Waits(reason, None),
            (None, None, None) => Fate::Undecided,
            (None, backoff, Some(group)) => match groups.entry((job.tenant, group)) {
                std::collections::btree_map::Entry::Vacant(free) => {
                    free.insert((&pending.attempt.job, Timeline::default()));
                    backoff.map_or(Fate::Undecided, |reason| Fate::Waits(reason, None))
                }
                std::collections::btree_map::Entry::Occupied(mut held) => {
                    let (holder, line) = held.get_mut();
                    let estimate = line.next(1, job.typical);
                    backoff.map_or_else(
                        || in_group(group, holder, estimate),
                        |reason| Fate::Waits(reason, None),
                    )
                }
            },
        });
    }
    fates
}

fn in_group(group: &Label, holder: &JobId, estimate: Option<Estimate>) -> Fate {
    let reason = PendingReason::ConcurrencyGroup {
        group: group.clone(),
        // A group belongs to one tenant, so its holder may always be named.
        holder: Some(holder.clone()),
    };
    Fate::Waits(reason, estimate)
}

fn measure_components(
    fleet: &Fleet<'_>,
    count: usize,
    component_of: &[Option<usize>],
) -> Vec<Component> {
    let mut components: Vec<Component> = (0..count).map(|_| Component::default()).collect();
    for (host, component) in component_of.iter().enumerate() {
        if let Some(component) = component {
            let here = &mut components[*component];
            here.total = room::plus(&here.total, &fleet.workers[host].facts.capacity);
            here.hosts += 1;
        }
    }
    components
}

/// The smallest need of each component.
fn floors(
    jobs: &[Job<'_>],
    fates: &[Fate],
    classes: &Classes<'_>,
    count: usize,
) -> Vec<Option<Room>> {
    let mut floors: Vec<Option<Room>> = vec![None; count];
    for (job, fate) in jobs.iter().zip(fates) {
        if matches!(fate, Fate::Undecided) {
            let class = &classes.list[job.class];
            let floor = &mut floors[class.component];
            *floor = Some(floor.map_or(class.need, |floor| room::least(&floor, &class.need)));
        }
    }
    floors
}

fn turns(
    jobs: &[Job<'_>],
    flow_of: &[usize],
    classes: &Classes<'_>,
    components: &[Component],
    floors: &[Option<Room>],
) -> Vec<Turn> {
    let large: Vec<bool> = classes
        .list
        .iter()
        .map(|class| {
            let floor = floors.get(class.component).copied().flatten();
            let hosts = components
                .get(class.component)
                .map_or(0, |component| component.hosts);
            floor != Some(class.need) || (class.hosts.len() as usize) < hosts
        })
        .collect();
    let turn = |(job, flow): (&Job<'_>, &usize)| {
        let pending = job.pending;
        let queued = i64::try_from(pending.queued_unix_ms).unwrap_or(i64::MAX);
        Turn {
            tenant: job.tenant,
            flow: *flow,
            component: classes.list[job.class].component,
            need: pending.need,
            priority: pending.priority.get(),
            since: pending.queued_unix_ms.max(pending.not_before_unix_ms),
            key: queued.saturating_sub(i64::from(pending.priority.get()) * PRIORITY_POINT_MS),
            large: large[job.class],
        }
    };
    jobs.iter().zip(flow_of).map(turn).collect()
}

fn accounts(view: &PoolView, names: &Names<'_>) -> (Vec<Account>, Vec<Flow>) {
    let accounts = by_number(&names.tenants, |(_, name)| {
        let rule = view.tenants.get(name).cloned().unwrap_or_default();
        Account::new(rule.weight, rule.reserved)
    });
    let weights = by_number(&names.queues, |(_, name)| {
        view.queues.get(name).cloned().unwrap_or_default().weight
    });
    let mut flows: Vec<Flow> = names.flows.iter().map(|_| Flow::default()).collect();
    for ((_, queue), flow) in &names.flows {
        flows[*flow].share = Share::new(weights[*queue]);
    }
    (accounts, flows)
}

fn count_running(
    decision: &mut Decision<'_>,
    names: &Names<'_>,
    component_of: &[Option<usize>],
    job: &RunningJob,
) {
    let tenant = names.tenants[&(hash(job.tenant.as_str()), &job.tenant)];
    let queue = names.queues[&(hash(job.queue.as_str()), &job.queue)];
    let flow = names.flows[&(tenant, queue)];
    let now = decision.view.now_unix_ms;
    let end = job.expected_end_unix_ms.map_or(NEVER, |end| end.max(now));
    let component = decision
        .fleet
        .find_host(&job.worker)
        .and_then(|host| component_of[host]);
    if let Some(component) = component {
        let here = &mut decision.components[component];
        here.line
            .ends(end, room::dominant(&job.room, &here.total, SHARE_SCALE));
    }
    let account = &mut decision.order.tenants[tenant];
    account.running += 1;
    for share in [&mut account.share, &mut decision.order.flows[flow].share] {
        share.used = room::plus(&share.used, &job.room);
        if let Some(component) = component {
            let started = share.started.entry(component).or_default();
            *started = (*started).max(job.started_unix_ms);
        }
    }
    decision.tenants[tenant].line.ends(end, 1);
    decision.queues[queue].line.ends(end, 1);
    decision.queues[queue].running += 1;
    decision.global.line.ends(end, 1);
    decision.global.running += 1;
}

/// Hosts that the last plan kept, by job.
fn kept(view: &PoolView, fleet: &Fleet<'_>, jobs: &[Job<'_>]) -> BTreeMap<usize, usize> {
    let by_job: BTreeMap<&JobId, usize> = view
        .reserved
        .iter()
        .filter_map(|kept| Some((&kept.job, fleet.find_host(&kept.worker)?)))
        .collect();
    if by_job.is_empty() {
        return BTreeMap::new();
    }
    let host = |(at, job): (usize, &Job<'_>)| Some((at, *by_job.get(&job.pending.attempt.job)?));
    jobs.iter().enumerate().filter_map(host).collect()
}

fn by_number<K: Copy, T>(names: &BTreeMap<K, usize>, make: impl Fn(K) -> T) -> Vec<T> {
    let mut by_number: Vec<(usize, K)> = names
        .iter()
        .map(|(name, number)| (*number, *name))
        .collect();
    by_number.sort_unstable_by_key(|(number, _)| *number);
    by_number.into_iter().map(|(_, name)| make(name)).collect()
}
