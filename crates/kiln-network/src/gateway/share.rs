//! What the machines of one process share: threads that resolve names, dials under way, and turns at moving bytes.
//!
//! Each is a number of places that are given out by machine, one after the other, never by how many connections a machine has:
//! a thousand connections of one machine wait in that machine's own line. Places for resolving and dialling, which a guest can hold for
//! seconds with names and addresses that do not answer, have a bound per machine as well. A turn at moving bytes lasts for one
//! try at one write: it is never held while a peer is slow.
//!
//! Machines in other processes (each `kiln run` without a server is one) share through the operating system instead.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;

use tokio::sync::oneshot;

/// Names that one process resolves at once: each holds a thread.
pub const RESOLVES_MAX: usize = 128;
/// Of these, most of one machine.
pub const RESOLVES_OF_MACHINE_MAX: usize = 16;
/// Connections that one process dials at once.
pub const DIALS_MAX: usize = 512;
/// Of these, most of one machine.
pub const DIALS_OF_MACHINE_MAX: usize = 64;

/// Shares of one process. Cheap to clone through its `Arc`.
#[derive(Debug)]
pub struct HostShare {
    pub(super) resolves: Arc<Turns>,
    pub(super) dials: Arc<Turns>,
    pub(super) moves: Arc<Turns>,
    machines: AtomicU64,
}

impl Default for HostShare {
    fn default() -> Self {
        let cores = available_parallelism().map_or(1, usize::from);
        Self {
            resolves: Turns::new(RESOLVES_MAX, RESOLVES_OF_MACHINE_MAX),
            dials: Turns::new(DIALS_MAX, DIALS_OF_MACHINE_MAX),
            moves: Turns::new(cores, cores),
            machines: AtomicU64::new(0),
        }
    }
}

impl HostShare {
    /// The shares of this process.
    #[must_use]
    pub fn of_process() -> Arc<Self> {
        static SHARE: LazyLock<Arc<HostShare>> = LazyLock::new(Arc::default);
        Arc::clone(&SHARE)
    }

    /// Shares of these sizes: dials at once, of them of one machine, and moves at once.
    #[must_use]
    pub fn of(dials: usize, dials_of_machine: usize, moves: usize) -> Self {
        Self {
            dials: Turns::new(dials, dials_of_machine),
            moves: Turns::new(moves, moves),
            ..Self::default()
        }
    }

    pub(super) fn machine(&self) -> Machine {
        Machine(self.machines.fetch_add(1, Ordering::Relaxed))
    }
}

/// Which machine asks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Machine(u64);

/// Places that go around among machines.
#[derive(Debug)]
pub(super) struct Turns {
    of_machine: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    free: usize,
    /// Machines that hold places, wait, or have flows.
    machines: BTreeMap<Machine, Line>,
    /// Places given so far: the clock of who was served when.
    given: u64,
    /// Machines with open flows.
    moving: usize,
}

#[derive(Debug, Default)]
struct Line {
    held: usize,
    flows: usize,
    /// When it got a place last.
    served: u64,
    waiting: VecDeque<oneshot::Sender<Turn>>,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Arc<Turns>,
    machine: Machine,
    given_back: bool,
}

/// An open flow of a machine, until it is dropped.
#[derive(Debug)]
pub(super) struct Moving {
    turns: Arc<Turns>,
    machine: Machine,
}

impl Turns {
    fn new(places: usize, of_machine: usize) -> Arc<Self> {
        let state = State {
            free: places.max(1),
            ..State::default()
        };
        Arc::new(Self {
            of_machine: of_machine.max(1),
            state: Mutex::new(state),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place.
    pub(super) async fn turn(self: &Arc<Self>, machine: Machine) -> Turn {
        loop {
            let waits = {
                let mut state = self.lock();
                let room = state.free > 0;
                let line = state.machines.entry(machine).or_default();
                if room && line.held < self.of_machine && line.waiting.is_empty() {
                    state.take(machine);
                    return Turn {
                        turns: Arc::clone(self),
                        machine,
                        given_back: false,
                    };
                }
                let (sender, receiver) = oneshot::channel();
                line.waiting.push_back(sender);
                receiver
            };
            // A place may have become free before somebody who gave up its own: look once.
            self.give();
            if let Ok(turn) = waits.await {
                return turn;
            }
        }
    }

    /// Gives free places to those who wait: first the machine that was served longest ago.
    fn give(self: &Arc<Self>) {
        let mut state = self.lock();
        while state.free > 0 {
            let Some((machine, sender)) = state.next(self.of_machine) else {
                return;
            };
            state.take(machine);
            let turn = Turn {
                turns: Arc::clone(self),
                machine,
                given_back: false,
            };
            if let Err(mut turn) = sender.send(turn) {
                // It gave up just now. Dropped as it is, the turn would lock again.
                turn.given_back = true;
                state.back(machine);
            }
        }
    }

    /// Counts a flow of the machine among those that move bytes.
    pub(super) fn moving(self: &Arc<Self>, machine: Machine) -> Moving {
        let mut state = self.lock();
        let line = state.machines.entry(machine).or_default();
        line.flows += 1;
        let first = line.flows == 1;
        state.moving += usize::from(first);
        Moving {
            turns: Arc::clone(self),
            machine,
        }
    }
}

impl State {
    /// Whose turn it is, of machines that wait and may have one more. Those who gave up are passed over.
    fn next(&mut self, of_machine: usize) -> Option<(Machine, oneshot::Sender<Turn>)> {
        let mut emptied = Vec::new();
        let waiting = self.machines.iter_mut().filter_map(|(machine, line)| {
            let before = line.waiting.len();
            while line.waiting.front().is_some_and(oneshot::Sender::is_closed) {
                line.waiting.pop_front();
            }
            if before > 0 && line.waiting.is_empty() {
                emptied.push(*machine);
            }
            let may = !line.waiting.is_empty() && line.held < of_machine;
            may.then_some((line.served, *machine))
        });
        let next = waiting.min();
        for machine in emptied {
            self.forget(machine);
        }
        let (_, machine) = next?;
        let line = self.machines.get_mut(&machine)?;
        Some((machine, line.waiting.pop_front()?))
    }

    fn take(&mut self, machine: Machine) {
        self.free -= 1;
        self.given += 1;
        let line = self.machines.entry(machine).or_default();
        line.held += 1;
        line.served = self.given;
    }

    fn back(&mut self, machine: Machine) {
        self.free += 1;
        if let Some(line) = self.machines.get_mut(&machine) {
            line.held = line.held.saturating_sub(1);
        }
        self.forget(machine);
    }

    /// Forgets a machine of which nothing is left.
    fn forget(&mut self, machine: Machine) {
        let gone = |line: &Line| line.held == 0 && line.flows == 0 && line.waiting.is_empty();
        if self.machines.get(&machine).is_some_and(gone) {
            self.machines.remove(&machine);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.given_back {
            return;
        }
        self.turns.lock().back(self.machine);
        self.turns.give();
    }
}

impl Moving {
    /// Does one thing with bytes in the machine's turn, which ends at the first wait for a peer.
    pub(super) async fn step<F: Future>(&self, work: F) -> F::Output {
        let turn = self.turns.turn(self.machine).await;
        // Others that could move now get to say so, before this one goes on; alone, nobody waits.
        if self.turns.lock().moving > 1 {
            tokio::task::yield_now().await;
        }
        let mut turn = Some(turn);
        let mut work = pin!(work);
        std::future::poll_fn(|context| {
            let polled = work.as_mut().poll(context);
            turn.take();
            polled
        })
        .await
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        let mut state = self.turns.lock();
        if let Some(line) = state.machines.get_mut(&self.machine) {
            line.flows = line.flows.saturating_sub(1);
            let last = line.flows == 0;
            state.moving = state.moving.saturating_sub(usize::from(last));
        }
        state.forget(self.machine);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn machines_take_turns_however_many_wait() {
        let turns = Turns::new(1, 1);
        let (a, b, c) = (Machine(0), Machine(1), Machine(2));
        let first = turns.turn(a).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = tokio::task::JoinSet::new();
        for machine in [a, a, a, a, b, c, c] {
            let (turns, order) = (Arc::clone(&turns), Arc::clone(&order));
            tasks.spawn(async move {
                let _turn = turns.turn(machine).await;
                order.lock().expect("no panics inside").push(machine);
            });
        }
        tokio::task::yield_now().await;
        drop(first);
        tasks.join_all().await;
        let order = order.lock().expect("no panics inside").clone();
        assert_eq!(order, [b, c, a, c, a, a, a]);
        assert!(turns.lock().machines.is_empty() && turns.lock().free == 1);
    }

    #[tokio::test]
    async fn those_who_give_up_lose_no_place() {
        let turns = Turns::new(2, 1);
        let (a, b) = (Machine(0), Machine(1));
        let held = turns.turn(a).await;
        // A's own bound holds although a place is free.
        let second = tokio::spawn({
            let turns = Arc::clone(&turns);
            async move { turns.turn(a).await }
        });
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        let other = turns.turn(b).await;
        second.abort();
        assert!(second.await.is_err());
        drop((held, other));
        let again = (turns.turn(a).await, turns.turn(b).await);
        drop(again);
        let state = turns.lock();
        assert!(state.free == 2 && state.machines.is_empty(), "{state:?}");
    }
}
