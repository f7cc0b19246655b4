//! Jobs that need the same of a host are one class: who fits is found once for all of them.

use std::collections::{BTreeMap, BTreeSet};

use kiln_core::dispatch::{PendingReason, Requirements, Room};

use crate::fleet::{Fleet, charge, hash};
use crate::host_set::HostSet;

/// What distinguishes a class: the hosts its tenant may use, the room it needs, what it requires. A hash of the latter comes first, so that
/// looking one up rarely compares texts; two that share it are still two.
type ClassKey<'a> = (u64, u32, Room, &'a Requirements);

/// Jobs that need the same of a host.
#[derive(Debug)]
pub(crate) struct Class {
    /// Hosts that may take it and are large enough when empty.
    pub(crate) hosts: HostSet,
    pub(crate) need: Room,
    pub(crate) pinned: bool,
    /// Classes of one component compete for hosts, directly or through others.
    pub(crate) component: usize,
    /// No host has room for it any more in this plan.
    pub(crate) exhausted: bool,
    /// Why no host can take it at all.
    pub(crate) never: Option<PendingReason>,
}

/// All classes of one view.
#[derive(Debug, Default)]
pub(crate) struct Classes<'a> {
    by_key: BTreeMap<ClassKey<'a>, usize>,
    pub(crate) list: Vec<Class>,
    visible: BTreeMap<HostSet, u32>,
    visible_list: Vec<HostSet>,
}

impl<'a> Classes<'a> {
    /// The number of this set of visible hosts.
    pub(crate) fn visibility(&mut self, hosts: HostSet) -> u32 {
        let next = self.visible_list.len();
        let number = *self
            .visible
            .entry(hosts.clone())
            .or_insert_with(|| u32::try_from(next).unwrap_or(u32::MAX));
        if number as usize == next {
            self.visible_list.push(hosts);
        }
        number
    }

    pub(crate) fn class_of(
        &mut self,
        fleet: &Fleet<'a>,
        visible: u32,
        need: Room,
        requires: &'a Requirements,
    ) -> usize {
        let key = (hash_of(requires), visible, need, requires);
        if let Some(class) = self.by_key.get(&key) {
            return *class;
        }
        let class = self.list.len();
        self.list.push(make(
            fleet,
            &self.visible_list[visible as usize],
            requires,
            need,
        ));
        self.by_key.insert(key, class);
        class
    }

    /// Numbers the components; gives how many there are and which one each host is in.
    pub(crate) fn join(&mut self, hosts: usize) -> (usize, Vec<Option<usize>>) {
        let mut parent: Vec<usize> = (0..hosts).collect();
        let distinct: BTreeSet<&HostSet> = self.list.iter().map(|class| &class.hosts).collect();
        for set in distinct {
            let mut members = set.iter();
            if let Some(first) = members.next() {
                let root = find(&mut parent, first);
                for host in members {
                    let other = find(&mut parent, host);
                    parent[other] = root;
                }
            }
        }
        let mut number: Vec<Option<usize>> = vec![None; hosts];
        let mut count = 0;
        for class in &mut self.list {
            let Some(first) = class.hosts.iter().next() else {
                continue;
            };
            let root = find(&mut parent, first);
            class.component = *number[root].get_or_insert_with(|| {
                count += 1;
                count - 1
            });
        }
        let of_host = (0..hosts)
            .map(|host| number[find(&mut parent, host)])
            .collect();
        (count, of_host)
    }
}

fn hash_of(requires: &Requirements) -> u64 {
    let names = [&requires.arch, &requires.runtime].into_iter().flatten();
    let words = names.chain(
        requires
            .labels
            .iter()
            .flat_map(|(name, value)| [name, value]),
    );
    let start = u64::from(requires.pinned_cpus) ^ (u64::from(requires.generation) << 8);
    words.fold(start, |sum, word| sum.rotate_left(7) ^ hash(word.as_str()))
}

fn find(parent: &mut [usize], mut at: usize) -> usize {
    while parent[at] != at {
        parent[at] = parent[parent[at]];
        at = parent[at];
    }
    at
}

fn make(fleet: &Fleet<'_>, visible: &HostSet, requires: &Requirements, need: Room) -> Class {
    let mut class = Class {
        hosts: visible.clone(),
        need,
        pinned: requires.pinned_cpus,
        component: 0,
        exhausted: false,
        never: None,
    };
    class.never = narrow(fleet, &mut class, requires);
    if class.never.is_some() {
        class.hosts = HostSet::empty(fleet.workers.len());
    }
    class
}

/// Leaves the hosts that can take the class, or says why there is none.
fn narrow(fleet: &Fleet<'_>, class: &mut Class, requires: &Requirements) -> Option<PendingReason> {
    let index = &fleet.index;
    if requires.own().is_none() {
        // Commands' own workers run nothing else.
        class.hosts.drop_all(&index.own);
    }
    let workers = class.hosts.len();
    if workers == 0 {
        return Some(PendingReason::NoWorkers);
    }
    let nothing = HostSet::empty(fleet.workers.len());
    let mut must = |having: Option<&HostSet>, missing: &dyn Fn() -> String| {
        class.hosts.keep(having.unwrap_or(&nothing));
        class
            .hosts
            .is_empty()
            .then(|| PendingReason::NoWorkerMatches {
                missing: missing(),
                workers,
            })
    };
    let arch = requires
        .arch
        .as_ref()
        .and_then(|arch| must(index.arch.get(arch), &|| format!("arch {arch}")));
    if arch.is_some() {
        return arch;
    }
    let runtime = requires
        .runtime
        .as_ref()
        .and_then(|runtime| must(index.runtime.get(runtime), &|| format!("runtime {runtime}")));
    if runtime.is_some() {
        return runtime;
    }
    for pair in &requires.labels {
        let missing = must(index.label.get(&pair), &|| {
            format!("label {}={}", pair.0, pair.1)
        });
        if missing.is_some() {
            return missing;
        }
    }
    let generation = requires.generation;
    if generation > 0 {
        let missing = must(index.speaking(generation).as_ref(), &|| {
            format!(
                "generation {generation} of the workers' protocol, which {}: update the workers",
                match generation {
                    ..kiln_core::dispatch::ATTEND_GENERATION => {
                        "holds a job to its policy and keeps machines"
                    }
                    _ => "lets a command be attended: input, terminal, ports",
                }
            )
        });
        if missing.is_some() {
            return missing;
        }
    }
    large_enough(fleet, class)
}

fn large_enough(fleet: &Fleet<'_>, class: &mut Class) -> Option<PendingReason> {
    let fitting = class.hosts.clone();
    for ((capacity, whole), hosts) in &fleet.index.shape {
        if !capacity.holds(&charge(&class.need, class.pinned, capacity.cpus, *whole)) {
            class.hosts.drop_all(hosts);
        }
    }
    if class.hosts.is_empty() {
        let capacity = |host: usize| fleet.workers[host].facts.capacity;
        return Some(PendingReason::TooLarge {
            need: class.need,
            largest: fleet.nearest(fitting.iter(), &class.need, class.pinned, capacity),
        });
    }
    let workers = class.hosts.len();
    class.hosts.keep(&fleet.active);
    class
        .hosts
        .is_empty()
        .then_some(PendingReason::WorkersUnavailable { workers })
}
