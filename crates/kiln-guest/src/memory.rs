//! Memory of the workload: every kill is told to the host once, and a group that only thrashes is ended.
//!
//! The kernel kills when reclaim finds nothing. Without swap a process that takes all memory leaves nothing to reclaim but
//! the files it runs from: they are dropped and read again for minutes before the kernel gives up. So this watches the
//! bounded groups while they are at their bound, and ends the largest one below when three things hold for
//! [`STRAIN_MAX`]: the group is at its bound, hardly a file is left to drop, and it waits for memory (pressure stall
//! information, kernel documentation `accounting/psi`). Page cache alone never does that: it can be dropped.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_proto::msg::GuestEvent;

use crate::cgroup::{Cgroup, Watch, keyed};
use crate::error::chain;
use crate::log;
use crate::state::Guest;

/// Pause between two looks while a group is at its bound: the kernel says so up to a hundred times a second.
const LOOK_PAUSE: Duration = Duration::from_millis(250);
/// How long a group may do nothing but wait for memory.
const STRAIN_MAX: Duration = Duration::from_secs(3);
/// Longest time between two looks that belong together.
const LOOK_GAP_MAX: Duration = Duration::from_secs(2);
/// When a group thrashes: at most this part of its bound, and at most so many bytes, are files; and for at least so many percent
/// of the time all of it waits for memory. Measured in a thrashing group of 48 MiB: 20 to 190 KB of files, 15 to 60 percent,
/// for half a minute. No program runs in so few pages; one with room for some of its files must hardly get on at all.
const THRASHING: [(u64, u64, u128); 2] = [(64, 4 * MIB, 10), (8, 64 * MIB, 50)];
const MIB: u64 = 1024 * 1024;
/// A group is at its bound when at most this part of it is free.
const FREE_PART: u64 = 32;

/// What is known of kills for memory.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    told: Mutex<Told>,
    /// Groups that were ended here.
    ended: Mutex<HashSet<PathBuf>>,
    /// Their number since boot.
    ended_count: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    /// Kills in the workload since boot, whoever did them.
    pub(crate) fn kills(&self, workload: &Cgroup) -> u64 {
        workload.value("memory.events", "oom_kill") + self.ended_count.load(Ordering::Relaxed)
    }

    /// True if this group, or one below it, was out of memory.
    pub(crate) fn was_short(&self, group: &Cgroup) -> bool {
        group.value("memory.events", "oom_kill") > 0 || lock(&self.ended).contains(group.path())
    }

    /// Forgets a group that is about to be removed.
    pub(crate) fn forget(&self, group: &Cgroup) {
        lock(&self.ended).remove(group.path());
    }

    /// Tells the host of kills that it was not told of.
    pub(crate) fn tell(&self, workload: &Cgroup) {
        // One at a time, and the sum first: what happens in between is then counted by its group, never as unknown.
        let mut told = lock(&self.told);
        let sum = workload.value("memory.events", "oom_kill");
        for (cgroup, count) in told.news(sum, &workload.oom_kills()) {
            log::emit(GuestEvent::OomKill { cgroup, count });
        }
    }

    fn end(&self, victim: &Cgroup, workload: &Cgroup) {
        lock(&self.ended).insert(victim.path().to_owned());
        let number = self.ended_count.fetch_add(1, Ordering::Relaxed) + 1;
        let relative = victim.path().strip_prefix(workload.path());
        let cgroup = relative.unwrap_or(victim.path()).display().to_string();
        log::info(&format!("{cgroup} is out of memory and is ended"));
        let count = number + victim.value("memory.events", "oom_kill");
        log::emit(GuestEvent::OomKill { cgroup, count });
        if let Err(error) = victim.kill() {
            log::warn(&chain(&error));
        }
    }
}

/// Kills the host was told of.
#[derive(Debug, Default)]
struct Told {
    /// By group, of those that are still there.
    by_group: HashMap<String, u64>,
    /// All of them.
    sum: u64,
}

impl Told {
    /// Groups with kills that were not told, each with its count. Kills of groups that have gone are those of group "".
    fn news(&mut self, sum: u64, now: &[(String, u64)]) -> Vec<(String, u64)> {
        let mut news = Vec::new();
        for (group, count) in now {
            let before = self.by_group.get(group).copied().unwrap_or(0);
            if *count > before {
                self.sum += count - before;
                news.push((group.clone(), *count));
            }
        }
        self.by_group = now.iter().cloned().collect();
        if sum > self.sum {
            news.push((String::new(), sum - self.sum));
            self.sum = sum;
        }
        news
    }
}

/// What one look at a bounded group saw.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Look {
    /// Its bound, bytes.
    max: u64,
    /// What it has, bytes.
    current: u64,
    /// What of that could be dropped: files and reclaimable kernel memory, bytes.
    files: u64,
}

impl Look {
    fn of(group: &Cgroup) -> Option<Self> {
        let max = group.number("memory.max");
        if max == 0 {
            return None;
        }
        let stat = group.read("memory.stat").ok()?;
        let part = |key: &str| keyed(&stat, key).unwrap_or(0);
        Some(Self {
            max,
            current: group.number("memory.current"),
            files: part("active_file") + part("inactive_file") + part("slab_reclaimable"),
        })
    }

    /// True if all that could be dropped is needed again at once, in a group that waits this part of its time.
    fn thrashes(&self, percent: u128) -> bool {
        let free = self.max.saturating_sub(self.current);
        free <= self.max / FREE_PART
            && THRASHING.iter().any(|(part, bytes, waits)| {
                self.files <= (self.max / part).min(*bytes) && percent >= *waits
            })
    }
}

/// The time that every process of a group waited for memory at once, from its `memory.pressure`.
fn stalled(text: &str) -> Option<Duration> {
    let line = text.lines().find(|line| line.starts_with("full "))?;
    let total = line
        .split(' ')
        .find_map(|word| word.strip_prefix("total="))?;
    Some(Duration::from_micros(total.parse().ok()?))
}

/// One bounded group over several looks.
#[derive(Debug)]
struct Strain {
    seen: Instant,
    stalled: Duration,
    /// How long it has done nothing but wait.
    lasted: Duration,
}

impl Strain {
    fn new(now: Instant, stalled: Duration) -> Self {
        Self {
            seen: now,
            stalled,
            lasted: Duration::ZERO,
        }
    }

    /// Takes a look into account; true when the group will not recover.
    fn add(
        &mut self,
        now: Instant,
        stalled: Duration,
        look: impl FnOnce() -> Option<Look>,
    ) -> bool {
        let passed = now.duration_since(self.seen);
        let waited = stalled.saturating_sub(self.stalled);
        (self.seen, self.stalled) = (now, stalled);
        let percent = waited.as_micros() * 100 / passed.as_micros().max(1);
        let together = passed <= LOOK_GAP_MAX;
        // Most looks end here, without a look at all of the group's statistics.
        let waits = THRASHING.iter().any(|(_, _, waits)| percent >= *waits);
        if waits && together && look().is_some_and(|look| look.thrashes(percent)) {
            self.lasted += passed;
        } else {
            self.lasted = Duration::ZERO;
        }
        self.lasted >= STRAIN_MAX
    }
}

/// Groups that have a bound of their own: the workload, all RUN steps together, commands.
fn bounded(workload: &Cgroup) -> Vec<Cgroup> {
    let mut groups = vec![workload.clone()];
    groups.extend(
        workload
            .children()
            .into_iter()
            .filter(|group| group.number("memory.max") > 0),
    );
    groups
}

/// What is ended when this group is out of memory: it itself if it is a command or a step, else the largest below it.
fn victim(group: &Cgroup, workload: &Cgroup) -> Option<Cgroup> {
    let steps = workload.child("steps");
    let candidates = if group == workload {
        let mut all = steps.children();
        all.extend(workload.children().into_iter().filter(is_command));
        all
    } else if *group == steps {
        steps.children()
    } else if is_command(group) {
        vec![group.clone()]
    } else {
        Vec::new()
    };
    candidates
        .into_iter()
        .map(|group| {
            (
                group.value("memory.stat", "anon") + group.value("memory.stat", "shmem"),
                group,
            )
        })
        .filter(|(bytes, _)| *bytes > 0)
        .max_by_key(|(bytes, _)| *bytes)
        .map(|(_, group)| group)
}

fn is_command(group: &Cgroup) -> bool {
    let name = group.path().file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with("exec-"))
}

/// Watches the workload's memory for ever.
pub(crate) async fn watch(guest: Arc<Guest>) {
    let workload = &guest.workload;
    let mut watch = match Watch::new(&workload.path().join("memory.events")) {
        Ok(watch) => watch,
        Err(error) => return log::error(&chain(&error)),
    };
    let mut strains = Strains::default();
    loop {
        // A group at its bound makes the kernel speak all the time; silence means that nothing strains.
        if !strains.any() && watch.changed().await.is_err() {
            return;
        }
        guest.memory.tell(workload);
        let strained = strains.look(&bounded(workload), Instant::now());
        if let Some(victim) = strained.and_then(|group| victim(&group, workload)) {
            guest.memory.end(&victim, workload);
            strains = Strains::default();
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

/// All bounded groups over several looks.
#[derive(Debug, Default)]
struct Strains(HashMap<PathBuf, Strain>);

impl Strains {
    fn any(&self) -> bool {
        self.0.values().any(|strain| !strain.lasted.is_zero())
    }

    /// The first of the groups that will not recover.
    fn look(&mut self, groups: &[Cgroup], now: Instant) -> Option<Cgroup> {
        self.0
            .retain(|path, _| groups.iter().any(|group| group.path() == path));
        groups
            .iter()
            .find(|group| self.strained(group, now))
            .cloned()
    }

    fn strained(&mut self, group: &Cgroup, now: Instant) -> bool {
        let text = group.read("memory.pressure");
        let Some(stalled) = text.ok().and_then(|text| stalled(&text)) else {
            return false;
        };
        match self.0.get_mut(group.path()) {
            Some(strain) => strain.add(now, stalled, || Look::of(group)),
            None => {
                let path: &Path = group.path();
                self.0.insert(path.to_owned(), Strain::new(now, stalled));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(news: &[(&str, u64)]) -> Vec<(String, u64)> {
        news.iter()
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect()
    }

    #[test]
    fn every_kill_is_told_once_also_that_of_a_group_that_has_gone() {
        let mut told = Told::default();
        assert_eq!(told.news(0, &[]), []);
        assert_eq!(told.news(2, &names(&[("a", 2)])), names(&[("a", 2)]));
        assert_eq!(told.news(2, &names(&[("a", 2)])), []);
        assert_eq!(
            told.news(3, &names(&[("a", 2), ("b", 1)])),
            names(&[("b", 1)])
        );
        // Both groups went, and a third came and went unseen.
        assert_eq!(told.news(7, &[]), names(&[("", 4)]));
        assert_eq!(told.news(7, &[]), []);
        // A name may come again, and a kill may come between the sum and the groups.
        assert_eq!(told.news(7, &names(&[("a", 1)])), names(&[("a", 1)]));
        assert_eq!(told.news(8, &names(&[("a", 1)])), []);
    }

    #[test]
    fn full_stalls_are_read() {
        let text = "some avg10=1.00 avg60=0.50 avg300=0.10 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1234567\n";
        assert_eq!(stalled(text), Some(Duration::from_micros(1_234_567)));
        for bad in ["", "some total=1", "full avg10=1", "full total=x"] {
            assert_eq!(stalled(bad), None, "{bad}");
        }
    }

    fn look(max: u64, current: u64, files: u64) -> Look {
        Look {
            max: max * MIB,
            current: current * MIB,
            files: files * MIB,
        }
    }

    #[test]
    fn only_a_group_at_its_bound_without_files_thrashes() {
        let tiny = Look {
            files: 190_000,
            ..look(48, 48, 0)
        };
        assert!(tiny.thrashes(10) && !tiny.thrashes(9));
        assert!(look(48, 48, 2).thrashes(50) && !look(48, 48, 2).thrashes(49));
        assert!(look(2048, 2040, 60).thrashes(50) && !look(2048, 2040, 60).thrashes(20));
        assert!(!look(48, 48, 40).thrashes(100), "page cache");
        assert!(!look(48, 40, 0).thrashes(100), "room");
        assert!(
            !look(2048, 2048, 100).thrashes(100),
            "files of a large group"
        );
    }

    /// Looks at a group every quarter of a second for ten seconds; when it is ended, if it is.
    fn ended_after(percent: u32, files: impl Fn(u32) -> u64) -> Option<Duration> {
        let begun = Instant::now();
        let mut strain = Strain::new(begun, Duration::ZERO);
        (1..=40).find_map(|tick| {
            let passed = LOOK_PAUSE * tick;
            let seen = look(48, 48, files(tick));
            strain
                .add(begun + passed, passed * percent / 100, || Some(seen))
                .then_some(passed)
        })
    }

    #[test]
    fn thrashing_ends_a_group_soon_and_page_cache_never() {
        assert_eq!(ended_after(90, |_| 2), Some(STRAIN_MAX));
        assert_eq!(ended_after(90, |_| 40), None, "files can be dropped");
        assert_eq!(ended_after(20, |_| 2), None, "it gets on");
        assert_eq!(
            ended_after(90, |tick| if tick % 8 == 0 { 20 } else { 2 }),
            None,
            "it recovers"
        );
    }

    #[test]
    fn a_look_long_after_the_last_one_says_nothing() {
        let begun = Instant::now();
        let mut strain = Strain::new(begun, Duration::ZERO);
        let hour = Duration::from_secs(3600);
        assert!(!strain.add(begun + hour, hour, || Some(look(48, 48, 1))));
        assert!(strain.lasted.is_zero());
    }

    #[test]
    fn the_largest_step_or_command_is_ended_and_never_buildkit() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, anon: u64| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("memory.stat"), format!("anon {anon}\nshmem 1\n")).unwrap();
        };
        for (path, anon) in [
            ("", 99),
            ("buildkit", 50),
            ("steps", 40),
            ("steps/a", 10),
            ("steps/b", 30),
            ("exec-1", 20),
        ] {
            put(path, anon);
        }
        let workload = Cgroup::at(dir.path());
        let name = |group: Cgroup| {
            victim(&group, &workload).map(|victim| {
                victim
                    .path()
                    .strip_prefix(dir.path())
                    .unwrap()
                    .display()
                    .to_string()
            })
        };
        assert_eq!(name(workload.clone()).as_deref(), Some("steps/b"));
        assert_eq!(name(workload.child("steps")).as_deref(), Some("steps/b"));
        assert_eq!(name(workload.child("exec-1")).as_deref(), Some("exec-1"));
        assert_eq!(name(workload.child("buildkit")), None);
        put("exec-2", 60);
        assert_eq!(name(workload.clone()).as_deref(), Some("exec-2"));
    }
}
