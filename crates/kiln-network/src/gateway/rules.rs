//! What a live machine may reach, and how that changes under open connections.
//!
//! The rules are one value that every flow watches. A flow looks at it again before each write, so once a call of
//! [`Gateway::enter`] or [`Gateway::narrow`] returned, no byte that was not already being written leaves over a
//! flow that the new rules do not allow; the flow itself ends as soon as its task runs.

use std::collections::BTreeSet;
use std::sync::Arc;

use kiln_core::network::{NameVerdict, NetworkPolicy, Protocol};
use kiln_core::secret::Repository;
use tokio::sync::watch;

use super::Gateway;

/// The rules of one moment.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) policy: NetworkPolicy,
    /// Repositories that the git gateway serves.
    pub(super) git: Arc<BTreeSet<Repository>>,
    /// The phase they belong to, as its events name it.
    pub(super) phase: Option<Arc<str>>,
    /// Only less from now on.
    narrow_only: bool,
}

impl Rules {
    pub(super) fn new(policy: NetworkPolicy) -> Self {
        Self {
            policy,
            git: Arc::default(),
            phase: None,
            narrow_only: false,
        }
    }
}

impl Rules {
    /// What a phase that asks for this gets now.
    fn next(&self, asked: NetworkPolicy) -> NetworkPolicy {
        match self.narrow_only {
            true => self.policy.and(&asked),
            false => asked,
        }
    }
}

impl Gateway {
    /// Begins a phase of a live machine: from now on `policy` holds, and nothing of the phase before is inherited.
    ///
    /// - Connections that are open or being opened and that `policy` does not allow end at once: by name, port and protocol,
    ///   whatever rule admitted them. Those it allows go on and keep the phase they began in in their events.
    /// - What begins now is recorded with `phase`, which is a word of the policy's own (`dependencies`, `run`).
    /// - After [`Gateway::only_narrow`] the phase gets what `policy` and the rules before both allow.
    /// - kiln's own services are not part of a policy and stay.
    ///
    /// - The git gateway serves nothing in it: see [`Gateway::enter_with_git`].
    ///
    /// Returns what holds. It takes effect before it returns; it waits for nothing.
    pub fn enter(&self, phase: &str, policy: NetworkPolicy) -> NetworkPolicy {
        self.enter_with_git(phase, policy, BTreeSet::new())
    }

    /// As [`Gateway::enter`], of a phase that reads these repositories through the git gateway. Requests for others that are under way end at
    /// once, and after [`Gateway::only_narrow`] it reads what was read before alone.
    pub fn enter_with_git(
        &self,
        phase: &str,
        policy: NetworkPolicy,
        git: BTreeSet<Repository>,
    ) -> NetworkPolicy {
        let mut holds = NetworkPolicy::Isolated;
        self.inner.rules.send_modify(|rules| {
            rules.phase = Some(Arc::from(phase));
            rules.policy = rules.next(policy);
            rules.git = Arc::new(match rules.narrow_only {
                true => git.intersection(&rules.git).cloned().collect(),
                false => git,
            });
            holds = rules.policy.clone();
        });
        self.refused_names().clear();
        holds
    }

    /// From now on rules only narrow: to be called before a secret's first byte goes into the machine.
    pub fn only_narrow(&self) {
        self.inner
            .rules
            .send_modify(|rules| rules.narrow_only = true);
    }

    /// Allows only what the old and this policy both allow, within the phase that runs, and ends connections that are no
    /// longer allowed. A policy says nothing of repositories: the git gateway serves none from then on.
    pub fn narrow(&self, policy: &NetworkPolicy) {
        self.inner.rules.send_modify(|rules| {
            rules.policy = rules.policy.and(policy);
            rules.git = Arc::default();
        });
    }

    /// What whoever goes on with the machine may let it reach: this, and after [`Gateway::only_narrow`] no more than what it may reach now.
    #[must_use]
    pub fn at_most(&self, asked: &NetworkPolicy) -> NetworkPolicy {
        self.inner.rules.borrow().next(asked.clone())
    }

    /// What the machine may reach now.
    #[must_use]
    pub fn policy(&self) -> NetworkPolicy {
        self.inner.rules.borrow().policy.clone()
    }
}

/// One flow's view of the rules.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    name: String,
    port: u16,
    protocol: Protocol,
    rules: watch::Receiver<Rules>,
}

impl Watched {
    /// `rules` was subscribed to before the decision that admitted the flow, so a change in between is seen.
    pub(super) fn new(
        name: &str,
        port: u16,
        protocol: Protocol,
        rules: watch::Receiver<Rules>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            port,
            protocol,
            rules,
        }
    }

    /// Whether the flow may still move bytes. Cheap while nothing changes.
    pub(super) fn allows(&mut self) -> bool {
        if !self.rules.borrow().has_changed() {
            return true;
        }
        let rules = self.rules.borrow_and_update().policy.clone();
        let allowed = self.admits(&rules);
        if !allowed {
            // The next look finds it again.
            self.rules.mark_changed();
        }
        allowed
    }

    /// Returns once the flow may no longer move bytes.
    pub(super) async fn ended(&mut self) {
        while self.allows() {
            if self.rules.changed().await.is_err() {
                // The gateway is gone: nobody can narrow any more.
                std::future::pending::<()>().await;
            }
            self.rules.mark_changed();
        }
    }

    fn admits(&self, policy: &NetworkPolicy) -> bool {
        let now = policy.decide(&self.name, self.port);
        // A flow that may speak this may go on where a rule of today admits as much.
        matches!(now, NameVerdict::Allowed(rule) if rule.speaks(self.port).and(self.protocol) == Some(self.protocol))
    }
}
