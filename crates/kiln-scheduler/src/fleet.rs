//! The hosts while a decision is made: what is free, who fits what, and which of several is best.

use std::collections::{BTreeMap, BTreeSet};

use kiln_core::dispatch::{OWN_LABEL, Room, WorkerState};
use kiln_core::{Label, TenantName, WorkerId};

use crate::host_set::HostSet;
use crate::room;
use crate::view::{PoolView, Profile, Worker};

/// Above this load of a host, in thousandths, that it is warm counts no more.
const WARM_LOAD_MAX: u64 = 800;
/// Points of a ready template, of a head, of a tenth of load, of a failure. Warmth outweighs any difference of load, a few failures outweigh warmth.
const TEMPLATE_POINTS: u64 = 200;
const HEAD_POINTS: u64 = 200;
const LOAD_POINTS: u64 = 10;
const FAILURE_POINTS: u64 = 60;
const FAILURES_COUNTED: u64 = 10;
/// Points of a host where no earlier attempt failed: more than all others together.
const WANTED_POINTS: u64 = 1 << 20;
/// A job without an end.
pub(crate) const NEVER: u64 = u64::MAX;

/// Room that comes back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Release {
    /// When, [`NEVER`] if nobody knows.
    pub(crate) end: u64,
    pub(crate) room: Room,
}

/// A host that is kept for a job.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hold {
    /// When there should be room for it.
    pub(crate) from: Option<u64>,
    /// What is left then besides.
    pub(crate) extra: Room,
}

/// What is looked for.
#[derive(Debug)]
pub(crate) struct Ask<'s> {
    pub(crate) hosts: &'s HostSet,
    pub(crate) need: Room,
    pub(crate) pinned: bool,
    pub(crate) avoid: &'s BTreeSet<WorkerId>,
    pub(crate) tenant_hash: u64,
    pub(crate) warm: Option<&'s HostSet>,
    pub(crate) template: Option<&'s HostSet>,
    /// When it would end, [`NEVER`] if nobody knows.
    pub(crate) end: u64,
}

/// What was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Found {
    Host(usize),
    /// There is room, but it is kept for another job.
    OnlyReserved,
    Nothing,
}

/// The hosts, sorted by id.
#[derive(Debug)]
pub(crate) struct Fleet<'a> {
    pub(crate) workers: Vec<&'a Worker>,
    /// What is taken of each host; may be more than it has when it became smaller.
    taken: Vec<Room>,
    pub(crate) free: Vec<Room>,
    /// Points by load and failures, which change only as jobs are placed.
    points: Vec<u64>,
    /// Hosts where warmth counts.
    cool: HostSet,
    hash: Vec<u64>,
    releases: Vec<Vec<Release>>,
    holds: BTreeMap<usize, Hold>,
    on_hold: HostSet,
    profile: Profile,
    /// Hosts with room for the smallest job there is.
    open: HostSet,
    floor: Room,
    pub(crate) active: HostSet,
    pub(crate) index: Index<'a>,
    /// Capacity of every host that is not lost.
    pub(crate) total: Room,
}

/// Which hosts have what.
#[derive(Debug)]
pub(crate) struct Index<'a> {
    pub(crate) arch: BTreeMap<&'a Label, HostSet>,
    pub(crate) runtime: BTreeMap<&'a Label, HostSet>,
    pub(crate) label: BTreeMap<(&'a Label, &'a Label), HostSet>,
    pub(crate) template: BTreeMap<&'a Label, HostSet>,
    pub(crate) warm: BTreeMap<&'a TenantName, HostSet>,
    pub(crate) allowed: BTreeMap<&'a TenantName, HostSet>,
    pub(crate) for_all: HostSet,
    /// Workers that are some command's own.
    pub(crate) own: HostSet,
    /// By the generation of the workers' protocol that they speak.
    pub(crate) generation: BTreeMap<u32, HostSet>,
    /// Hosts of one capacity and one number of whole CPUs.
    pub(crate) shape: BTreeMap<(Room, u32), HostSet>,
}

impl<'a> Fleet<'a> {
    pub(crate) fn new(view: &'a PoolView) -> Self {
        let mut workers: Vec<&Worker> = view.workers.iter().collect();
        workers.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        let count = workers.len();
        let mut fleet = Self {
            index: Index::new(&workers),
            taken: Vec::with_capacity(count),
            free: vec![Room::default(); count],
            points: vec![0; count],
            cool: HostSet::empty(count),
            hash: workers
                .iter()
                .map(|worker| hash(worker.id.as_str()))
                .collect(),
            releases: vec![Vec::new(); count],
            holds: BTreeMap::new(),
            on_hold: HostSet::empty(count),
            profile: view.profile,
            open: HostSet::empty(count),
            floor: Room::default(),
            active: HostSet::empty(count),
            total: Room::default(),
            workers,
        };
        let mut used = vec![Room::default(); count];
        let mut pinned_more = vec![0_u32; count];
        for job in &view.running {
            let Some(host) = fleet.find_host(&job.worker) else {
                continue;
            };
            let charge = fleet.charge(host, &job.room, job.pinned_cpus);
            used[host] = room::plus(&used[host], &job.room);
            pinned_more[host] =
                pinned_more[host].saturating_add(charge.cpus.saturating_sub(job.room.cpus));
            fleet.releases[host].push(Release {
                end: job
                    .expected_end_unix_ms
                    .map_or(NEVER, |end| end.max(view.now_unix_ms.saturating_add(1))),
                room: charge,
            });
        }
        for host in 0..count {
            let worker = fleet.workers[host];
            let mut taken = room::most(&worker.held, &used[host]);
            taken.cpus = taken.cpus.saturating_add(pinned_more[host]);
            fleet.taken.push(taken);
            fleet.releases[host].sort_unstable_by_key(|release| (release.end, release.room));
            if worker.state.takes_jobs() {
                fleet.active.insert(host);
            }
            if worker.state != WorkerState::Lost {
                fleet.total = room::plus(&fleet.total, &worker.facts.capacity);
            }
            fleet.weigh(host);
        }
        fleet
    }

    pub(crate) fn find_host(&self, id: &WorkerId) -> Option<usize> {
        self.workers
            .binary_search_by(|worker| worker.id.cmp(id))
            .ok()
    }

    /// Says how small the smallest job is, so that fuller hosts are not looked at.
    pub(crate) fn set_floor(&mut self, floor: Room) {
        self.floor = floor;
        for host in 0..self.free.len() {
            if self.free[host].holds(&floor) {
                self.open.insert(host);
            }
        }
    }

    /// What a job takes of a host: a whole CPU of an overcommitted host is worth several of its capacity.
    pub(crate) fn charge(&self, host: usize, need: &Room, pinned: bool) -> Room {
        let worker = self.workers[host];
        let cpus = worker.facts.capacity.cpus;
        charge(need, pinned, cpus, worker.whole_cpus.unwrap_or(cpus))
    }

    /// Room of a host as such a job would count it: the reverse of [`Self::charge`].
    pub(crate) fn as_counted(&self, host: usize, mut room: Room, pinned: bool) -> Room {
        let worker = self.workers[host];
        let cpus = worker.facts.capacity.cpus;
        if pinned && cpus > 0 {
            let whole = u64::from(room.cpus) * u64::from(worker.whole_cpus.unwrap_or(cpus))
                / u64::from(cpus);
            room.cpus = u32::try_from(whole).unwrap_or(u32::MAX);
        }
        room
    }

    /// The best host that has room, the lowest id among equals: points first, then how near tenant and host are.
    pub(crate) fn find(&self, ask: &Ask<'_>) -> Found {
        let mut best = (0, 0);
        let mut found = Found::Nothing;
        for host in ask.hosts.both(&self.open) {
            let points = self.points_for(host, ask);
            if points < best.0 || !self.free[host].holds(&ask.need) {
                continue;
            }
            if ask.pinned && !self.free[host].holds(&self.charge(host, &ask.need, true)) {
                continue;
            }
            if self.on_hold.contains(host) && !self.may_backfill(host, ask) {
                if found == Found::Nothing {
                    found = Found::OnlyReserved;
                }
                continue;
            }
            let near = if self.cool.contains(host) {
                mix(ask.tenant_hash ^ self.hash[host])
            } else {
                0
            };
            if (points, near) > best || !matches!(found, Found::Host(_)) {
                best = (points, near);
                found = Found::Host(host);
            }
        }
        found
    }

    /// Larger is better, never 0.
    fn points_for(&self, host: usize, ask: &Ask<'_>) -> u64 {
        let mut points = self.points[host];
        if self.cool.contains(host) {
            let has = |set: Option<&HostSet>| u64::from(set.is_some_and(|set| set.contains(host)));
            points += TEMPLATE_POINTS * has(ask.template) + HEAD_POINTS * has(ask.warm);
        }
        if !ask.avoid.is_empty() && !ask.avoid.contains(&self.workers[host].id) {
            points += WANTED_POINTS;
        }
        points
    }

    fn may_backfill(&self, host: usize, ask: &Ask<'_>) -> bool {
        self.holds.get(&host).is_none_or(|hold| {
            let before = hold.from.is_some_and(|from| ask.end <= from);
            before || hold.extra.holds(&self.charge(host, &ask.need, ask.pinned))
        })
    }

    /// Gives a host's room to a job that ends at `end`.
    pub(crate) fn take(&mut self, host: usize, need: &Room, pinned: bool, end: u64) {
        let charge = self.charge(host, need, pinned);
        self.taken[host] = room::plus(&self.taken[host], &charge);
        if let Some(hold) = self.holds.get_mut(&host)
            && hold.from.is_none_or(|from| end > from)
        {
            hold.extra = room::minus(&hold.extra, &charge);
        }
        let at = self.releases[host].partition_point(|release| release.end <= end);
        self.releases[host].insert(at, Release { end, room: charge });
        self.weigh(host);
        if !self.free[host].holds(&self.floor) {
            self.open.remove(host);
        }
    }

    /// When the host has room for the job if nothing else starts there, how many jobs must end for that, and what is left then.
    pub(crate) fn room_at(
        &self,
        host: usize,
        need: &Room,
        pinned: bool,
    ) -> Option<(u64, usize, Room)> {
        if self.on_hold.contains(host) {
            return None;
        }
        let charge = self.charge(host, need, pinned);
        let capacity = &self.workers[host].facts.capacity;
        let mut taken = self.taken[host];
        let mut free = self.free[host];
        let mut ended = 0;
        let mut from = 0;
        for release in &self.releases[host] {
            if free.holds(&charge) && release.end > from {
                break;
            }
            taken = room::minus(&taken, &release.room);
            free = room::minus(capacity, &taken);
            ended += 1;
            from = release.end;
        }
        free.holds(&charge)
            .then(|| (from, ended, room::minus(&free, &charge)))
    }

    pub(crate) fn hold(&mut self, host: usize, hold: Hold) {
        self.on_hold.insert(host);
        self.holds.insert(host, hold);
    }

    /// Of these hosts, the room of the one that comes nearest to the need.
    pub(crate) fn nearest(
        &self,
        hosts: impl Iterator<Item = usize>,
        need: &Room,
        pinned: bool,
        room_of: impl Fn(usize) -> Room,
    ) -> Room {
        let mut best: Option<(u64, Room)> = None;
        for host in hosts {
            let room = self.as_counted(host, room_of(host), pinned);
            let rank = (room::fit(&room, need), room);
            if best.is_none_or(|best| rank > best) {
                best = Some(rank);
            }
        }
        best.map_or_else(Room::default, |(_, room)| room)
    }

    fn weigh(&mut self, host: usize) {
        let worker = self.workers[host];
        self.free[host] = room::minus(&worker.facts.capacity, &self.taken[host]);
        let load = room::dominant(&self.taken[host], &worker.facts.capacity, 1000);
        let tenth = (load / 100).min(10);
        let tenths = if self.profile == Profile::Pack {
            tenth
        } else {
            10 - tenth
        };
        let failures = u64::from(worker.infra_failures).min(FAILURES_COUNTED);
        self.points[host] =
            1 + LOAD_POINTS * tenths + FAILURE_POINTS * (FAILURES_COUNTED - failures);
        if load < WARM_LOAD_MAX {
            self.cool.insert(host);
        } else {
            self.cool.remove(host);
        }
    }
}

/// See [`Fleet::charge`].
pub(crate) fn charge(need: &Room, pinned: bool, cpus: u32, whole: u32) -> Room {
    if !pinned || whole == cpus {
        return *need;
    }
    let counted = (u64::from(need.cpus) * u64::from(cpus)).checked_div(whole.into());
    let rest = u64::from(need.cpus) * u64::from(cpus) % u64::from(whole.max(1));
    let counted = counted.map_or(u64::MAX, |counted| counted + u64::from(rest > 0));
    Room {
        cpus: u32::try_from(counted).unwrap_or(u32::MAX),
        ..*need
    }
}

impl<'a> Index<'a> {
    fn new(workers: &[&'a Worker]) -> Self {
        let count = workers.len();
        let mut index = Self {
            arch: BTreeMap::new(),
            runtime: BTreeMap::new(),
            label: BTreeMap::new(),
            template: BTreeMap::new(),
            warm: BTreeMap::new(),
            allowed: BTreeMap::new(),
            for_all: HostSet::empty(count),
            own: HostSet::empty(count),
            generation: BTreeMap::new(),
            shape: BTreeMap::new(),
        };
        let none = || HostSet::empty(count);
        for (host, worker) in workers.iter().enumerate() {
            let facts = &worker.facts;
            index
                .arch
                .entry(&facts.arch)
                .or_insert_with(none)
                .insert(host);
            index
                .generation
                .entry(facts.generation)
                .or_insert_with(none)
                .insert(host);
            for runtime in &facts.runtimes {
                index
                    .runtime
                    .entry(runtime)
                    .or_insert_with(none)
                    .insert(host);
            }
            if worker.labels.keys().any(|name| name.as_str() == OWN_LABEL) {
                index.own.insert(host);
            }
            for pair in &worker.labels {
                index.label.entry(pair).or_insert_with(none).insert(host);
            }
            for template in &worker.templates {
                index
                    .template
                    .entry(template)
                    .or_insert_with(none)
                    .insert(host);
            }
            for tenant in &facts.warm {
                index.warm.entry(tenant).or_insert_with(none).insert(host);
            }
            match &worker.tenants {
                None => index.for_all.insert(host),
                Some(tenants) => {
                    for tenant in tenants {
                        index
                            .allowed
                            .entry(tenant)
                            .or_insert_with(none)
                            .insert(host);
                    }
                }
            }
            let whole = worker.whole_cpus.unwrap_or(facts.capacity.cpus);
            index
                .shape
                .entry((facts.capacity, whole))
                .or_insert_with(none)
                .insert(host);
        }
        index
    }

    /// Hosts that speak a generation of the workers' protocol, or a newer one.
    pub(crate) fn speaking(&self, generation: u32) -> Option<HostSet> {
        let mut newer = self.generation.range(generation..).map(|(_, hosts)| hosts);
        let mut all = newer.next()?.clone();
        for hosts in newer {
            all.add(hosts);
        }
        Some(all)
    }

    /// Hosts that may serve a tenant, in whatever state.
    pub(crate) fn visible(&self, tenant: &TenantName) -> HostSet {
        let mut hosts = self.for_all.clone();
        if let Some(allowed) = self.allowed.get(tenant) {
            hosts.add(allowed);
        }
        hosts
    }
}

/// FNV-1a: the same on every machine and in every version, so that a tenant's hosts stay the same.
pub(crate) fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// The finaliser of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
