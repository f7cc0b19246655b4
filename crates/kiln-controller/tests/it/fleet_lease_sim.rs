//! The lease protocol in a world without sockets: a virtual clock, a seed, and everything that can go wrong on a wire or a host.
//!
//! The workers' half is the real one, [`crate::fence`]; the controller's half is a model of what `kiln-db` does, on the real
//! [`Lease::check`] and [`JobState::apply`]. A schedule that breaks an invariant prints its seed; `KILN_SIM_SEED` replays it and
//! `KILN_SIM_SCHEDULES` runs more of them.

use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::time::Instant;

use kiln_core::{AttemptId, Epoch, Lease};

use crate::fence::Fence;
use crate::fleet_lease_model::{Controller, Finished};

/// Schedules of a short run.
const SCHEDULES: u64 = 3_000;
/// Schedules in which a broken rule must be found out.
const SCHEDULES_OF_A_MUTANT: u64 = 3_000;
const WORKERS: usize = 3;
const JOBS: usize = 5;
/// Faults happen until then.
const FAULTS_MS: u64 = 90_000;
/// Everything is over by then.
const END_MS: u64 = 2_000_000;
const TTL_MS: u64 = 15_000;
/// How long a new lease waits for the heartbeat that confirms it.
const CONFIRM_MS: u64 = 10_000;
const BEAT_MS: u64 = 5_000;
const TIMEOUT_MS: u64 = 10_000;
const RETRY_MS: u64 = 500;
/// A host that wakes up has its fence looked at within this.
const WAKE_MS: u64 = 600;

/// Which rule of the protocol is broken on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Broken {
    Nothing,
    /// A worker counts its TTL from when the answer came.
    CountsFromTheAnswer,
    /// A worker begins before a heartbeat confirmed the lease.
    BeginsUnconfirmed,
    /// A door does not look at the epoch or the worker.
    DoorIgnoresEpoch,
    /// The controller gives jobs away without the grace.
    NoGrace,
}

/// Numbers that follow from the seed alone.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(crate) fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from)
    }

    fn chance(&mut self, of_hundred: u64) -> bool {
        self.below(100) < of_hundred
    }
}

/// One attempt on a worker.
struct Run {
    epoch: Epoch,
    arrived_ms: u64,
    /// Since when it works, by the world's clock.
    since: Option<u64>,
    /// The last side effect of it that the controller took, by the world's clock.
    taken: Option<u64>,
    steps: u64,
    cancelled: bool,
}

struct Worker {
    /// Counts its restarts: what was for an earlier life is lost.
    life: u64,
    fence: Fence,
    runs: BTreeMap<AttemptId, Run>,
    /// Its clock: an offset of up to an hour and a rate of up to a hundredth.
    offset: u64,
    rate: u64,
    asleep_until: u64,
    awake_since: u64,
    cut_until: u64,
    /// What it sends is lost; answers that are on their way arrive.
    mute_until: u64,
    request: u64,
    /// The one timer of its fence: earlier ones are forgotten.
    timer: u64,
    /// The heartbeat and the poll whose answers are waited for; 0 is none.
    waiting: [u64; 2],
}

impl Worker {
    fn clock(&self, now: u64) -> u64 {
        self.offset + now * self.rate / 1_000
    }

    /// Whether this was the request that was waited for; it is no longer.
    fn no_longer_waits(&mut self, number: u64) -> bool {
        let slot = self.waiting.iter_mut().find(|slot| **slot == number);
        slot.map(|slot| *slot = 0).is_some()
    }

    /// A machine works for this lease right now.
    fn works(&self, attempt: &AttemptId, epoch: Epoch, now: u64) -> bool {
        let run = self.runs.get(attempt).filter(|run| run.epoch == epoch);
        let awake = self.asleep_until <= now && now >= self.awake_since + WAKE_MS;
        awake && run.is_some_and(|run| run.since.is_some() && run.steps > 0)
    }
}

#[derive(Clone)]
enum Ask {
    Beat(Vec<(AttemptId, Epoch)>),
    Poll(Vec<(AttemptId, Epoch)>),
    Log(AttemptId, Epoch),
    Finish(AttemptId, Epoch),
}

#[derive(Clone)]
enum Told {
    Beat(Vec<(AttemptId, Epoch, Option<bool>)>),
    Poll(Vec<Lease>),
    Log(AttemptId, Epoch, bool),
    Finish(AttemptId, Epoch),
}

/// A request on its way, and what its worker remembers of it.
#[derive(Clone)]
struct Letter {
    worker: usize,
    life: u64,
    number: u64,
    sent_ms: u64,
    ask: Ask,
}

#[derive(Clone)]
enum Step {
    Sweep,
    Claim,
    Fault,
    Deliver(Letter),
    Answer(Letter, Told),
    Up,
    Rejoin(usize, u64),
    Beat(usize, u64),
    Poll(usize, u64),
    Timeout(usize, u64, u64, bool),
    Fence(usize, u64, u64),
    Work(usize, u64, AttemptId, Epoch),
}

/// What a schedule did, so that a run can show that it was not idle.
#[derive(Default, Debug)]
struct Tally {
    schedules: u64,
    steps: u64,
    passed: u64,
    lost_for_good: u64,
    cancelled: u64,
    expired: u64,
    fenced: u64,
    stale_refused: u64,
    repeated: u64,
    restarts: u64,
}

struct World {
    broken: Broken,
    rng: Rng,
    now: u64,
    order: u64,
    heap: BinaryHeap<std::cmp::Reverse<(u64, u64)>>,
    steps: HashMap<u64, Step>,
    workers: Vec<Worker>,
    controller: Controller,
    down: bool,
    /// Of a hundred messages, how many are lost, and how many are late.
    loss: u64,
    late: u64,
    tally: Tally,
}

type Checked = Result<(), String>;

impl World {
    fn new(seed: u64, broken: Broken) -> Self {
        let mut rng = Rng(seed);
        let workers = (0..WORKERS)
            .map(|_| Worker {
                life: 0,
                fence: Fence::default(),
                runs: BTreeMap::new(),
                offset: rng.below(7_200_000),
                rate: rng.between(990, 1_011),
                asleep_until: 0,
                awake_since: 0,
                cut_until: 0,
                mute_until: 0,
                request: 0,
                timer: 0,
                waiting: [0; 2],
            })
            .collect();
        let controller = Controller::new(JOBS, rng.below(7_200_000), broken);
        let (loss, late) = (rng.below(25), rng.below(40));
        let mut world = Self {
            broken,
            loss,
            late,
            rng,
            now: WAKE_MS,
            order: 0,
            heap: BinaryHeap::new(),
            steps: HashMap::new(),
            workers,
            controller,
            down: false,
            tally: Tally::default(),
        };
        world.after(1_000, Step::Sweep);
        world.after(10, Step::Claim);
        world.after(500, Step::Fault);
        for worker in 0..WORKERS {
            world.begin(worker);
        }
        world
    }

    fn after(&mut self, ms: u64, step: Step) {
        self.order += 1;
        self.heap
            .push(std::cmp::Reverse((self.now + ms, self.order)));
        self.steps.insert(self.order, step);
    }

    fn begin(&mut self, worker: usize) {
        let life = self.workers[worker].life;
        self.after(0, Step::Beat(worker, life));
        self.after(0, Step::Poll(worker, life));
    }

    /// Runs the schedule to its end.
    fn run(&mut self) -> Checked {
        while let Some(std::cmp::Reverse((at, order))) = self.heap.pop() {
            let Some(step) = self.steps.remove(&order) else {
                continue;
            };
            self.now = at;
            self.tally.steps += 1;
            self.step(step)?;
            if at > FAULTS_MS && self.controller.all_over() && self.workers_idle() {
                return self.check_end();
            }
            if at > END_MS {
                return Err(format!(
                    "after {at} ms not everything is over: {:?}; workers hold {:?}",
                    self.controller.states(),
                    self.workers
                        .iter()
                        .map(|worker| worker.fence.held())
                        .collect::<Vec<_>>()
                ));
            }
        }
        Err("nothing happens any more".to_owned())
    }

    fn check_end(&mut self) -> Checked {
        let ends = self.controller.check_end()?;
        self.tally.passed += ends.passed;
        self.tally.lost_for_good += ends.lost;
        self.tally.cancelled += ends.cancelled;
        Ok(())
    }

    fn workers_idle(&self) -> bool {
        let idle = |worker: &Worker| worker.runs.is_empty() && worker.fence.held().is_empty();
        self.workers.iter().all(idle)
    }

    /// A step of a host that sleeps waits until it wakes.
    fn sleeps(&mut self, worker: usize, step: &Step) -> bool {
        let until = self.workers[worker].asleep_until;
        if until <= self.now {
            return false;
        }
        let late = until - self.now + self.rng.below(400);
        self.after(late, step.clone());
        true
    }

    fn step(&mut self, step: Step) -> Checked {
        match &step {
            Step::Beat(worker, life)
            | Step::Poll(worker, life)
            | Step::Timeout(worker, life, ..)
            | Step::Fence(worker, life, _)
            | Step::Work(worker, life, ..) => {
                let (worker, life) = (*worker, *life);
                if self.workers[worker].life != life || self.sleeps(worker, &step) {
                    return Ok(());
                }
            }
            Step::Answer(letter, _) => {
                let (worker, life) = (letter.worker, letter.life);
                let cut = self.workers[worker].cut_until > self.now;
                if self.workers[worker].life != life || cut || self.sleeps(worker, &step) {
                    return Ok(());
                }
            }
            _ => {}
        }
        match step {
            Step::Sweep => self.sweep()?,
            Step::Claim => self.claim()?,
            Step::Fault => self.fault(),
            Step::Deliver(letter) => self.deliver(&letter)?,
            Step::Answer(letter, told) => self.answer(&letter, told),
            Step::Up => self.up(),
            Step::Rejoin(worker, life) if self.workers[worker].life == life => self.begin(worker),
            Step::Rejoin(..) => {}
            Step::Beat(worker, _) => {
                let held = self.workers[worker].fence.held();
                self.send_timed(worker, Ask::Beat(held), true);
            }
            Step::Poll(worker, _) => {
                let runs = self.workers[worker].runs.iter();
                let held = runs.map(|(attempt, run)| (attempt.clone(), run.epoch));
                let held = held.collect();
                self.send_timed(worker, Ask::Poll(held), false);
            }
            Step::Timeout(worker, life, number, beat) => {
                // The request that this was for may have been answered, and the next one sent.
                if self.workers[worker].no_longer_waits(number) {
                    self.again(worker, life, beat, RETRY_MS);
                }
            }
            Step::Fence(worker, _, timer) if self.workers[worker].timer == timer => {
                self.fence(worker);
            }
            Step::Fence(..) => {}
            Step::Work(worker, life, attempt, epoch) => self.work(worker, life, &attempt, epoch),
        }
        Ok(())
    }

    fn sweep(&mut self) -> Checked {
        self.after(1_000, Step::Sweep);
        if self.down {
            return Ok(());
        }
        for lease in self.controller.expire(self.now) {
            self.tally.expired += 1;
            self.nobody_works(&lease.attempt, lease.epoch, "a lease was given away")?;
        }
        Ok(())
    }

    fn claim(&mut self) -> Checked {
        let wait = self.rng.between(50, 1_000);
        self.after(wait, Step::Claim);
        if self.down {
            return Ok(());
        }
        let worker = usize::try_from(self.rng.below(WORKERS as u64)).unwrap_or(0);
        if let Some(lease) = self.controller.claim(self.now, worker) {
            for number in 1..lease.attempt.number {
                let earlier = AttemptId {
                    number,
                    ..lease.attempt.clone()
                };
                let epochs: Vec<_> = self.epochs_of(&earlier);
                for epoch in epochs {
                    self.nobody_works(&earlier, epoch, "a job was leased again")?;
                }
            }
        }
        Ok(())
    }

    fn epochs_of(&self, attempt: &AttemptId) -> Vec<Epoch> {
        let runs = self.workers.iter().filter_map(|w| w.runs.get(attempt));
        runs.map(|run| run.epoch).collect()
    }

    fn nobody_works(&self, attempt: &AttemptId, epoch: Epoch, when: &str) -> Checked {
        for (number, worker) in self.workers.iter().enumerate() {
            if worker.works(attempt, epoch, self.now) {
                return Err(format!(
                    "{when} while worker {number} still works for {attempt} at {} ms, epoch {epoch}",
                    self.now
                ));
            }
        }
        Ok(())
    }

    fn fault(&mut self) {
        if self.now >= FAULTS_MS {
            return;
        }
        let wait = self.rng.between(200, 8_000);
        self.after(wait, Step::Fault);
        let number = usize::try_from(self.rng.below(WORKERS as u64)).unwrap_or(0);
        let long = self.rng.between(100, 40_000);
        match self.rng.below(10) {
            0..=1 => self.workers[number].cut_until = self.now + long,
            2 => self.workers[number].mute_until = self.now + long,
            3..=4 => {
                let worker = &mut self.workers[number];
                if worker.asleep_until <= self.now {
                    worker.asleep_until = self.now + long;
                    worker.awake_since = self.now + long;
                }
            }
            5..=6 => {
                let worker = &mut self.workers[number];
                worker.life += 1;
                worker.fence = Fence::default();
                worker.runs.clear();
                let life = worker.life;
                self.after(long / 2, Step::Rejoin(number, life));
            }
            7 if !self.down => {
                self.down = true;
                self.tally.restarts += 1;
                self.after(long / 4, Step::Up);
            }
            8 => {
                let job = usize::try_from(self.rng.below(JOBS as u64)).unwrap_or(0);
                if self.rng.chance(30) && !self.down {
                    self.controller.cancel(job);
                }
            }
            _ => {}
        }
    }

    fn up(&mut self) {
        self.down = false;
        // The wall clock may have been set while nobody looked.
        let offset = self.rng.below(7_200_000);
        self.controller.restarted(self.now, offset);
    }

    /// Sends a request whose answer decides when the next one is sent.
    fn send_timed(&mut self, worker: usize, ask: Ask, beat: bool) {
        let number = self.send(worker, ask);
        let life = self.workers[worker].life;
        self.workers[worker].waiting[usize::from(beat)] = number;
        self.after(TIMEOUT_MS, Step::Timeout(worker, life, number, beat));
    }

    fn again(&mut self, worker: usize, life: u64, beat: bool, wait: u64) {
        let step = match beat {
            true => Step::Beat(worker, life),
            false => Step::Poll(worker, life),
        };
        self.after(wait, step);
    }

    fn send(&mut self, worker: usize, ask: Ask) -> u64 {
        let sender = &mut self.workers[worker];
        sender.request += 1;
        let letter = Letter {
            worker,
            life: sender.life,
            number: sender.request,
            sent_ms: sender.clock(self.now),
            ask,
        };
        let number = letter.number;
        if sender.cut_until.max(sender.mute_until) > self.now || self.lost() {
            return number;
        }
        if self.now < FAULTS_MS && self.rng.chance(8) {
            let delay = self.delay();
            self.after(delay, Step::Deliver(letter.clone()));
        }
        let delay = self.delay();
        self.after(delay, Step::Deliver(letter));
        number
    }

    fn lost(&mut self) -> bool {
        self.now < FAULTS_MS && self.rng.chance(self.loss)
    }

    fn delay(&mut self) -> u64 {
        if self.now < FAULTS_MS && self.rng.chance(self.late) {
            return self.rng.between(500, 14_000);
        }
        self.rng.between(1, 60)
    }

    fn deliver(&mut self, letter: &Letter) -> Checked {
        if self.down || self.workers[letter.worker].cut_until > self.now {
            return Ok(());
        }
        let (now, worker) = (self.now, letter.worker);
        let told = match &letter.ask {
            Ask::Beat(held) => {
                let answers = held.iter().map(|(attempt, epoch)| {
                    let live = self.controller.beat(now, worker, attempt, *epoch);
                    (attempt.clone(), *epoch, live)
                });
                Told::Beat(answers.collect())
            }
            Ask::Poll(held) => Told::Poll(self.controller.leases_of(worker, held)),
            Ask::Log(attempt, epoch) => {
                let taken = self.controller.effect(now, worker, attempt, *epoch)?;
                if taken {
                    self.taken(letter, attempt, *epoch)?;
                } else {
                    self.tally.stale_refused += 1;
                }
                Told::Log(attempt.clone(), *epoch, taken)
            }
            Ask::Finish(attempt, epoch) => {
                match self.controller.finish(now, worker, attempt, *epoch)? {
                    Finished::Now => self.taken(letter, attempt, *epoch)?,
                    Finished::Before => self.tally.repeated += 1,
                    Finished::Refused => self.tally.stale_refused += 1,
                }
                Told::Finish(attempt.clone(), *epoch)
            }
        };
        if !self.lost() {
            let delay = self.delay();
            self.after(delay, Step::Answer(letter.clone(), told));
        }
        Ok(())
    }

    /// A side effect was taken. Nobody else who believes in the job may have had one taken since both believe in it.
    fn taken(&mut self, letter: &Letter, attempt: &AttemptId, epoch: Epoch) -> Checked {
        let (now, own) = (self.now, &mut self.workers[letter.worker]);
        let run = own.runs.get_mut(attempt).filter(|run| run.epoch == epoch);
        let Some(run) = run.filter(|_| own.life == letter.life) else {
            return Ok(());
        };
        run.taken = Some(now);
        let since = run.since.unwrap_or(now);
        for (number, worker) in self.workers.iter().enumerate() {
            let others = worker.runs.iter().filter(|(other, run)| {
                let both = since.max(run.since.unwrap_or(now));
                let same = other.job == attempt.job && number != letter.worker;
                same && run.since.is_some() && run.taken.is_some_and(|taken| taken >= both)
            });
            if let Some((other, _)) = others.into_iter().next() {
                return Err(format!(
                    "side effects of {attempt} of worker {} and of {other} of worker {number} were both taken while both believed",
                    letter.worker
                ));
            }
        }
        Ok(())
    }

    fn answer(&mut self, letter: &Letter, told: Told) {
        let (worker, life) = (letter.worker, letter.life);
        let in_time = self.workers[worker].no_longer_waits(letter.number);
        match told {
            Told::Beat(leases) => {
                // Also one that comes too late is believed here: it may change nothing.
                for (attempt, epoch, live) in leases {
                    self.heard(letter, &attempt, epoch, live);
                }
                if in_time {
                    self.again(worker, life, true, BEAT_MS);
                }
            }
            Told::Poll(leases) => {
                for lease in leases {
                    self.start(worker, &lease);
                }
                if in_time {
                    let wait = self.rng.between(100, 2_000);
                    self.again(worker, life, false, wait);
                }
            }
            Told::Log(attempt, epoch, taken) => {
                if !taken {
                    self.destroy(worker, &attempt, epoch);
                }
            }
            Told::Finish(attempt, epoch) => self.destroy(worker, &attempt, epoch),
        }
    }

    fn heard(&mut self, letter: &Letter, attempt: &AttemptId, epoch: Epoch, live: Option<bool>) {
        let (now, number) = (self.now, letter.worker);
        let Some(cancel) = live else {
            self.destroy(number, attempt, epoch);
            return;
        };
        let worker = &mut self.workers[number];
        let from = match self.broken {
            Broken::CountsFromTheAnswer => worker.clock(now),
            _ => letter.sent_ms,
        };
        worker.fence.renewed(attempt, epoch, from, TTL_MS);
        let holds = worker.fence.until_ms(attempt).is_some();
        let run = worker.runs.get_mut(attempt).filter(|r| r.epoch == epoch);
        let Some(run) = run.filter(|_| holds) else {
            return;
        };
        run.cancelled |= cancel;
        let begins = run.since.is_none() && letter.sent_ms >= run.arrived_ms;
        if begins {
            run.since = Some(now);
            self.after(10, Step::Work(number, letter.life, attempt.clone(), epoch));
        }
        self.watch(number);
    }

    /// Looks at the fence when it is next due, a little late as timers are.
    fn watch(&mut self, number: usize) {
        let worker = &self.workers[number];
        let Some(next) = worker.fence.next_ms() else {
            return;
        };
        let wait = next.saturating_sub(worker.clock(self.now)) * 1_000 / worker.rate + 1;
        let late = self.rng.below(50);
        let worker = &mut self.workers[number];
        worker.timer += 1;
        let step = Step::Fence(number, worker.life, worker.timer);
        self.after(wait + late, step);
    }

    fn fence(&mut self, number: usize) {
        let now = self.now;
        let worker = &mut self.workers[number];
        let clock = worker.clock(now);
        for attempt in worker.fence.expire(clock) {
            worker.runs.remove(&attempt);
            self.tally.fenced += 1;
        }
        self.watch(number);
    }

    fn destroy(&mut self, number: usize, attempt: &AttemptId, epoch: Epoch) {
        let worker = &mut self.workers[number];
        if worker
            .runs
            .get(attempt)
            .is_some_and(|run| run.epoch == epoch)
        {
            worker.runs.remove(attempt);
            worker.fence.ended(attempt);
        }
    }

    fn start(&mut self, number: usize, lease: &Lease) {
        let (now, life) = (self.now, self.workers[number].life);
        let (attempt, epoch) = (lease.attempt.clone(), lease.epoch);
        if self.workers[number].runs.contains_key(&attempt) {
            return;
        }
        let steps = self.rng.between(1, 24);
        let worker = &mut self.workers[number];
        let clock = worker.clock(now);
        let at_once = self.broken == Broken::BeginsUnconfirmed;
        let ttl = if at_once { TTL_MS } else { CONFIRM_MS };
        worker.fence.granted(attempt.clone(), epoch, clock, ttl);
        let run = Run {
            epoch,
            arrived_ms: clock,
            since: at_once.then_some(now),
            taken: None,
            steps,
            cancelled: false,
        };
        worker.runs.insert(attempt.clone(), run);
        if at_once {
            self.after(10, Step::Work(number, life, attempt, epoch));
        }
        self.watch(number);
        // A lease that arrived is asked about at once.
        let held = self.workers[number].fence.held();
        self.send(number, Ask::Beat(held));
    }

    /// One step of an attempt: a line of log, and at last its end, said again until somebody answers.
    fn work(&mut self, number: usize, life: u64, attempt: &AttemptId, epoch: Epoch) {
        let wait = self.rng.between(100, 3_000);
        let run = self.workers[number].runs.get_mut(attempt);
        let Some(run) = run.filter(|run| run.epoch == epoch) else {
            return;
        };
        if run.cancelled {
            run.steps = 0;
        }
        let ask = match run.steps {
            0 => Ask::Finish(attempt.clone(), epoch),
            _ => Ask::Log(attempt.clone(), epoch),
        };
        run.steps = run.steps.saturating_sub(1);
        self.send(number, ask);
        self.after(wait, Step::Work(number, life, attempt.clone(), epoch));
    }
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.schedules += 1;
        self.steps += other.steps;
        self.passed += other.passed;
        self.lost_for_good += other.lost_for_good;
        self.cancelled += other.cancelled;
        self.expired += other.expired;
        self.fenced += other.fenced;
        self.stale_refused += other.stale_refused;
        self.repeated += other.repeated;
        self.restarts += other.restarts;
    }
}

fn schedule(seed: u64, broken: Broken) -> Result<Tally, String> {
    let mut world = World::new(seed, broken);
    world.run()?;
    Ok(world.tally)
}

#[expect(
    clippy::disallowed_methods,
    reason = "a failed schedule is replayed by its seed"
)]
pub(crate) fn asked(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn no_schedule_breaks_the_lease_protocol() {
    let started = Instant::now();
    let mut all = Tally::default();
    let seeds = match asked("KILN_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..asked("KILN_SIM_SCHEDULES").unwrap_or(SCHEDULES),
    };
    for seed in seeds.clone() {
        match schedule(seed, Broken::Nothing) {
            Ok(tally) => all.add(&tally),
            Err(why) => panic!("{why}\nreplay: KILN_SIM_SEED={seed}"),
        }
    }
    println!("{all:?} in {:?}", started.elapsed());
    println!("jobs lost 0, published twice 0, leases leaked 0");
    if seeds.end - seeds.start >= SCHEDULES {
        // It was no idle world.
        for (what, count) in [
            ("leases expired", all.expired),
            ("workers fenced themselves", all.fenced),
            ("stale side effects were refused", all.stale_refused),
            ("finishes were said twice", all.repeated),
            ("restarts", all.restarts),
            ("jobs ended as lost", all.lost_for_good),
            ("jobs were cancelled", all.cancelled),
        ] {
            assert!(count > SCHEDULES / 100, "{what}: {count}");
        }
    }
}

/// The simulation finds what it is there to find.
#[test]
fn each_broken_rule_is_found_out() {
    for broken in [
        Broken::CountsFromTheAnswer,
        Broken::BeginsUnconfirmed,
        Broken::DoorIgnoresEpoch,
        Broken::NoGrace,
    ] {
        let found = (0..SCHEDULES_OF_A_MUTANT).find_map(|seed| {
            let why = schedule(seed, broken).err()?;
            Some((seed, why))
        });
        let (seed, why) = found.unwrap_or_else(|| panic!("{broken:?} was not found out"));
        println!("{broken:?}: found by schedule {seed}: {why}");
    }
}
