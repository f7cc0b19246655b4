//! Simulated machines between two owners: their guests are tasks of this process, and wait here for the next.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_core::MachineSpec;
use tokio::sync::watch;

use super::guest::Guest;
use crate::driver::{MachineState, TemplateRef};

/// What a machine that may be kept has beyond others.
#[derive(Debug)]
pub(super) struct Keepable {
    /// What the machine is made of; disks are those of the start.
    pub(super) spec: MachineSpec,
    pub(super) template: Option<TemplateRef>,
}

/// A guest without an owner.
#[derive(Clone, Debug)]
pub(super) struct Living {
    pub(super) guest: Arc<Guest>,
    pub(super) state: Arc<watch::Sender<MachineState>>,
}

/// By the machine's token.
static LIVING: Mutex<BTreeMap<String, Living>> = Mutex::new(BTreeMap::new());

/// Leaves a guest for the next owner.
pub(super) fn leave(token: &str, living: Living) {
    let mut all = LIVING.lock().unwrap_or_else(PoisonError::into_inner);
    // The reaper ends those that nobody took in time.
    all.retain(|_, living| !living.state.borrow().is_terminal());
    all.insert(token.to_owned(), living);
}

/// Takes a guest that lives.
pub(super) fn take(token: &str) -> Option<Living> {
    let mut all = LIVING.lock().unwrap_or_else(PoisonError::into_inner);
    let living = all.remove(token)?;
    let lives = !living.state.borrow().is_terminal();
    lives.then_some(living)
}
