//! Who is asking, and what they may do. Decided by whoever wires the connection, never by the request.
//!
//! The channel of a machine *is* an identity (DESIGN "Network"): a guest holds no credential. A
//! write by an attempt consults its [`LeaseCheck`], so that a stale epoch is refused (DESIGN rule 1).

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_core::lease::LeaseRefused;
use kiln_core::{AttemptId, Lease, TenantName};
use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::name::RepoName;

/// Bytes one attempt may keep in its quarantine unless configured otherwise: 20 GiB.
pub const ATTEMPT_BYTES_MAX: u64 = 20 << 30;

/// What somebody wants to do with a repository.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Read blobs, manifests, tags and referrers.
    Pull,
    /// Write blobs, manifests and tags.
    Push,
    /// Remove them.
    Delete,
}

impl Action {
    /// The word used in tokens and messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "push",
            Self::Delete => "delete",
        }
    }
}

/// Which repositories a grant is about.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Names {
    /// A name and everything below it.
    Tree(String),
    /// One repository.
    Exactly(RepoName),
}

impl Names {
    fn cover(&self, repo: &RepoName) -> bool {
        match self {
            Self::Tree(tree) => repo.is_under(tree),
            Self::Exactly(name) => name == repo,
        }
    }
}

/// Some actions on some repositories.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Grant {
    /// Where.
    pub names: Names,
    /// What.
    pub actions: Vec<Action>,
}

/// Tells whether a lease is live now. Asked at the start of every write and again before it takes effect.
pub trait LeaseCheck: Send + Sync {
    /// Refuses a lease that has ended, expired or been claimed again.
    ///
    /// # Errors
    /// The reason for refusing.
    fn check(&self, lease: &Lease) -> Result<(), LeaseRefused>;
}

/// A guest, speaking through the channel of the machine that runs an attempt.
#[derive(Clone)]
pub struct AttemptAuthority {
    lease: Lease,
    check: Arc<dyn LeaseCheck>,
    push: RepoName,
    pull: Vec<String>,
    sources: Vec<RepoName>,
    bytes_max: u64,
}

/// Repositories at most that an attempt's blobs are looked for in.
pub const SOURCES_MAX: usize = 64;

impl AttemptAuthority {
    /// Push to `quarantine/<job>/<attempt>` only; pull from there, `shared/` and the tenant's `t/<tenant>/`.
    #[must_use]
    pub fn new(lease: Lease, check: Arc<dyn LeaseCheck>) -> Self {
        let push = RepoName::quarantine(&lease.attempt);
        let pull = vec![
            push.as_str().to_owned(),
            "shared".to_owned(),
            RepoName::tenant_tree(&lease.tenant).as_str().to_owned(),
        ];
        Self {
            lease,
            check,
            push,
            pull,
            sources: Vec::new(),
            bytes_max: ATTEMPT_BYTES_MAX,
        }
    }

    /// Sets how many bytes this attempt may store.
    #[must_use]
    pub fn with_bytes_max(mut self, bytes_max: u64) -> Self {
        self.bytes_max = bytes_max;
        self
    }

    /// Sets which trees may be read, beyond the attempt's own quarantine.
    #[must_use]
    pub fn with_pull(mut self, trees: impl IntoIterator<Item = String>) -> Self {
        self.pull.truncate(1);
        self.pull.extend(trees);
        self
    }

    /// Sets the repositories whose blobs need not be pushed again: when the guest asks whether one of them is in its quarantine, it is
    /// mounted there first. Those it may not read count for nothing; no more than [`SOURCES_MAX`] are looked at.
    #[must_use]
    pub fn with_sources(mut self, sources: impl IntoIterator<Item = RepoName>) -> Self {
        self.sources = sources.into_iter().take(SOURCES_MAX).collect();
        self
    }

    /// See [`Self::with_sources`].
    #[must_use]
    pub fn sources(&self) -> &[RepoName] {
        &self.sources
    }

    /// The lease this guest works under.
    #[must_use]
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// Trees that may be read, the attempt's own quarantine first.
    #[must_use]
    pub fn pull_trees(&self) -> &[String] {
        &self.pull
    }

    /// Bytes this attempt may store.
    #[must_use]
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }
}

impl fmt::Debug for AttemptAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttemptAuthority")
            .field("attempt", &self.lease.attempt)
            .field("epoch", &self.lease.epoch)
            .field("pull", &self.pull)
            .finish_non_exhaustive()
    }
}

/// Somebody who showed a token on the loopback door.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct UserAuthority {
    /// Name, for messages and for keeping upload sessions apart.
    pub name: String,
    /// What they may do.
    pub grants: Vec<Grant>,
}

impl UserAuthority {
    /// The owner of an embedded kiln: reads and writes the tenant's own tree, reads `shared/`.
    /// `shared/` is written, and quarantine left, only through the host's own interface.
    #[must_use]
    pub fn embedded(name: &str, tenant: &TenantName) -> Self {
        let tree = |tree: &str, actions: &[Action]| Grant {
            names: Names::Tree(tree.to_owned()),
            actions: actions.to_vec(),
        };
        let own = RepoName::tenant_tree(tenant);
        Self {
            name: name.to_owned(),
            grants: vec![
                tree(own.as_str(), &[Action::Pull, Action::Push, Action::Delete]),
                tree("shared", &[Action::Pull]),
            ],
        }
    }

    /// Whether some grant covers the action on the repository.
    #[must_use]
    pub fn allows(&self, action: Action, repo: &RepoName) -> bool {
        let covers = |grant: &Grant| grant.actions.contains(&action) && grant.names.cover(repo);
        self.grants.iter().any(covers)
    }
}

/// Who is asking.
#[derive(Clone, Debug)]
pub enum Authority {
    /// Host code, in this process or behind the private socket. May do everything.
    Operator,
    /// A guest.
    Attempt(AttemptAuthority),
    /// The holder of a token.
    User(UserAuthority),
    /// Nobody in particular: may pull from these trees and nothing else.
    Anonymous {
        /// Trees that may be read.
        pull: Vec<String>,
    },
}

impl Authority {
    /// Whether the action is allowed at all, before any lease is looked at.
    #[must_use]
    pub fn allows(&self, action: Action, repo: &RepoName) -> bool {
        let pulls = |trees: &[String]| {
            action == Action::Pull && trees.iter().any(|tree| repo.is_under(tree))
        };
        match self {
            Self::Operator => true,
            Self::Attempt(attempt) => {
                pulls(&attempt.pull)
                    || (action == Action::Push && repo.is_under(attempt.push.as_str()))
            }
            Self::User(user) => user.allows(action, repo),
            Self::Anonymous { pull } => pulls(pull),
        }
    }

    /// Checks the right, and for writes by an attempt that its lease is live.
    ///
    /// # Errors
    /// [`StoreError::Denied`] or [`StoreError::Lease`].
    pub fn check(&self, action: Action, repo: &RepoName) -> Result<(), StoreError> {
        if !self.allows(action, repo) {
            return Err(StoreError::Denied {
                action: action.as_str(),
                repo: repo.clone(),
            });
        }
        match action {
            Action::Push | Action::Delete => self.check_live(),
            Action::Pull => Ok(()),
        }
    }

    /// For an attempt: whether its lease is live now. Everybody else has none.
    ///
    /// # Errors
    /// [`StoreError::Lease`].
    pub fn check_live(&self) -> Result<(), StoreError> {
        match self {
            Self::Attempt(attempt) => attempt
                .check
                .check(&attempt.lease)
                .map_err(StoreError::Lease),
            _ => Ok(()),
        }
    }

    /// Keeps upload sessions of different callers apart.
    pub(crate) fn session_owner(&self) -> String {
        match self {
            Self::Operator => "operator".to_owned(),
            Self::Attempt(a) => format!("attempt {} epoch {}", a.lease.attempt, a.lease.epoch),
            Self::User(user) => format!("user {}", user.name),
            Self::Anonymous { .. } => "anonymous".to_owned(),
        }
    }

    /// Whose upload sessions count together: a tenant's, be they of its guests or its people. None for host code.
    pub(crate) fn session_group(&self, repo: &RepoName) -> Option<String> {
        match self {
            Self::Attempt(attempt) => Some(attempt.lease.tenant.to_string()),
            Self::User(_) => Some(tenant_of(repo)),
            Self::Operator | Self::Anonymous { .. } => None,
        }
    }

    /// Tree whose bytes are counted, and the bound, for callers that have one.
    pub(crate) fn quota(&self) -> Option<(&RepoName, u64)> {
        match self {
            Self::Attempt(attempt) => Some((&attempt.push, attempt.bytes_max)),
            _ => None,
        }
    }
}

/// The tenant in whose tree a repository is; its first word where there is none.
fn tenant_of(repo: &RepoName) -> String {
    let text = repo.as_str();
    let inner = text.strip_prefix("t/").unwrap_or(text);
    inner.split('/').next().unwrap_or(inner).to_owned()
}

/// The live leases of this process: what an embedded kiln uses until a database holds them.
pub struct LeaseTable {
    live: Mutex<HashMap<AttemptId, Lease>>,
    now_unix_ms: Box<dyn Fn() -> u64 + Send + Sync>,
}

impl fmt::Debug for LeaseTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseTable").finish_non_exhaustive()
    }
}

impl LeaseTable {
    /// An empty table that reads the time (milliseconds since the Unix epoch) from `now_unix_ms`.
    pub fn new(now_unix_ms: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self {
            live: Mutex::default(),
            now_unix_ms: Box::new(now_unix_ms),
        }
    }

    /// Grants or renews: this lease is now the live one of its attempt.
    pub fn grant(&self, lease: Lease) {
        self.lock().insert(lease.attempt.clone(), lease);
    }

    /// Ends the attempt: every lease of it is refused from now on.
    pub fn end(&self, attempt: &AttemptId) {
        self.lock().remove(attempt);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<AttemptId, Lease>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LeaseCheck for LeaseTable {
    fn check(&self, lease: &Lease) -> Result<(), LeaseRefused> {
        lease.check(self.lock().get(&lease.attempt), (self.now_unix_ms)())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::lease::Epoch;

    fn lease(job: &str, count: u64) -> Lease {
        Lease {
            attempt: AttemptId {
                job: job.parse().expect("name"),
                number: 1,
            },
            tenant: TenantName::local(),
            worker: "w".parse().expect("name"),
            epoch: Epoch {
                incarnation: 1,
                count,
            },
            deadline_unix_ms: 100,
        }
    }

    fn repo(text: &str) -> RepoName {
        text.parse().expect("legal")
    }

    #[test]
    fn a_guest_pushes_to_its_own_quarantine_and_nowhere_else() {
        let table = Arc::new(LeaseTable::new(|| 0));
        table.grant(lease("b1", 1));
        let guest = Authority::Attempt(AttemptAuthority::new(lease("b1", 1), table.clone()));
        let ok = |action, name: &str| guest.check(action, &repo(name)).is_ok();
        assert!(ok(Action::Push, "quarantine/b1/1"));
        assert!(ok(Action::Push, "quarantine/b1/1/side"));
        for name in [
            "quarantine/b1/2",
            "quarantine/b1/10",
            "quarantine/b1",
            "quarantine/b2/1",
            "t/local/app",
            "shared/node",
        ] {
            assert!(!ok(Action::Push, name), "{name}");
            assert!(!ok(Action::Delete, name), "{name}");
        }
        assert!(ok(Action::Pull, "shared/node") && ok(Action::Pull, "t/local/app"));
        assert!(!ok(Action::Pull, "t/other/app") && !ok(Action::Pull, "quarantine/b2/1"));
        assert!(!ok(Action::Delete, "quarantine/b1/1"));
    }

    #[test]
    fn a_claimed_again_lease_may_read_but_not_write() {
        let table = Arc::new(LeaseTable::new(|| 0));
        table.grant(lease("b1", 2));
        let stale = Authority::Attempt(AttemptAuthority::new(lease("b1", 1), table.clone()));
        let push = stale.check(Action::Push, &repo("quarantine/b1/1"));
        assert!(matches!(
            push,
            Err(StoreError::Lease(LeaseRefused::StaleEpoch { .. }))
        ));
        assert!(stale.check(Action::Pull, &repo("shared/x")).is_ok());
        table.end(&lease("b1", 2).attempt);
        let push = stale.check(Action::Push, &repo("quarantine/b1/1"));
        assert!(matches!(
            push,
            Err(StoreError::Lease(LeaseRefused::Ended { .. }))
        ));
    }
}
