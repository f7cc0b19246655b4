//! The machines this host really has against the leases it holds: every ten seconds, what nobody answers for is destroyed and counted.
//!
//! Machines of dead kiln processes of this home go at once. One of this process goes when it had no live lease in two looks: the first may
//! have met it while it was being ended.

use std::collections::BTreeSet;
use std::time::Duration;

use kiln_core::{AttemptId, MachineName};
use kiln_machine::reap;

use crate::host::Host;

/// Time between two looks.
pub const EVERY: Duration = Duration::from_secs(10);
/// What machines of leases are for; others (templates that are made, checkouts) belong to whoever made them.
const ROLES: [&str; 2] = ["build", "run"];

/// What one look found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Found {
    /// Machines of processes that are gone, removed now.
    pub reaped: Vec<String>,
    /// Machines of this process without a lease, destroyed now.
    pub ended: Vec<MachineName>,
    /// What could not be removed.
    pub leaks: Vec<String>,
}

impl Found {
    /// Machines that were destroyed.
    #[must_use]
    pub fn orphans(&self) -> u64 {
        u64::try_from(self.reaped.len() + self.ended.len()).unwrap_or(u64::MAX)
    }
}

/// Looks again and again.
#[derive(Debug, Default)]
pub struct Reconciler {
    /// Had no lease when they were looked at last.
    suspects: BTreeSet<MachineName>,
}

impl Reconciler {
    /// One look. `held` are the attempts that have a live lease here; take them before this is called, so that a machine is not taken for an
    /// orphan whose lease came in between.
    pub async fn look(&mut self, host: &Host, held: &BTreeSet<AttemptId>) -> Found {
        let report = host.reap().await;
        let home = host.home.data.clone();
        let own = tokio::task::spawn_blocking(move || reap::own_machines(&home)).await;
        let is_orphan = |name: &MachineName| {
            AttemptId::of_machine(name)
                .is_some_and(|(attempt, role)| ROLES.contains(&role) && !held.contains(&attempt))
        };
        let without: BTreeSet<_> = own
            .unwrap_or_default()
            .into_iter()
            .filter(is_orphan)
            .collect();
        let ended: Vec<_> = without.intersection(&self.suspects).cloned().collect();
        self.suspects = &without - &ended.iter().cloned().collect();
        let mut leaks = report.leaks;
        for name in &ended {
            tracing::warn!(machine = %name, "a machine without a lease is destroyed");
            let (home, name) = (host.home.data.clone(), name.clone());
            match tokio::task::spawn_blocking(move || reap::end_own(&home, &name)).await {
                Ok(report) => leaks.extend(report.leaks),
                Err(error) => leaks.push(error.to_string()),
            }
        }
        for leak in &leaks {
            tracing::warn!(leak, "could not be reaped");
        }
        Found {
            reaped: report.reaped,
            ended,
            leaks,
        }
    }
}
