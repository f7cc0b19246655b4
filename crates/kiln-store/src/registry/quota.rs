//! How many bytes each attempt has stored, against its bound.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::error::StoreError;
use super::name::RepoName;

/// What every stored name (link, manifest, tag) is charged with, so that names are bounded too.
pub(super) const NAME_CHARGE: u64 = 4096;

/// One attempt's account.
#[derive(Debug)]
pub(super) struct Account {
    used: AtomicU64,
    max: u64,
}

impl Account {
    /// Takes bytes from what is left.
    pub(super) fn charge(&self, bytes: u64) -> Result<(), StoreError> {
        let add = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.max);
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, add)
            .map(drop)
            .map_err(|_| StoreError::Quota { max: self.max })
    }

    /// Gives bytes back that were not stored in the end.
    pub(super) fn refund(&self, bytes: u64) {
        let sub = |used: u64| Some(used.saturating_sub(bytes));
        let _ = self
            .used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, sub);
    }
}

/// Accounts by the tree they are about.
#[derive(Debug, Default)]
pub(super) struct Quotas {
    accounts: Mutex<HashMap<RepoName, Arc<Account>>>,
}

impl Quotas {
    /// The account of a tree; when it is new, `stored` says what is there already.
    pub(super) fn account(
        &self,
        tree: &RepoName,
        max: u64,
        stored: impl FnOnce() -> Result<u64, StoreError>,
    ) -> Result<Arc<Account>, StoreError> {
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(account) = accounts.get(tree)
            && account.max == max
        {
            return Ok(account.clone());
        }
        let account = Arc::new(Account {
            used: AtomicU64::new(stored()?),
            max,
        });
        accounts.insert(tree.clone(), account.clone());
        Ok(account)
    }

    /// Forgets accounts at and below a tree that was removed.
    pub(super) fn forget(&self, tree: &RepoName) {
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        accounts.retain(|name, _| !name.is_under(tree.as_str()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_to_the_byte() {
        let quotas = Quotas::default();
        let tree: RepoName = "quarantine/b1/1".parse().expect("legal");
        let account = quotas.account(&tree, 10, || Ok(4)).expect("opens");
        assert!(account.charge(6).is_ok());
        assert!(account.charge(1).is_err());
        account.refund(1);
        let same = quotas.account(&tree, 10, || Ok(0)).expect("opens");
        assert!(same.charge(1).is_ok() && same.charge(1).is_err());
        assert!(same.charge(u64::MAX).is_err());
    }
}
