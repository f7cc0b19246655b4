//! When leases end without a word from anybody: pure bookkeeping of what was granted and when the worker last asked.
//!
//! A lease lives for its TTL from when the request that was answered was *sent*: what the controller granted it granted later, so the
//! worker always believes a lease over before the controller does. Times are those of [`super::clock`].

use std::collections::BTreeMap;

use kiln_core::{AttemptId, Epoch};

/// The leases of one worker.
#[derive(Clone, Debug, Default)]
pub struct Fence {
    held: BTreeMap<AttemptId, Held>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Held {
    epoch: Epoch,
    until_ms: u64,
}

impl Fence {
    /// A lease was granted in answer to a request sent at `sent_ms`.
    pub fn granted(&mut self, attempt: AttemptId, epoch: Epoch, sent_ms: u64, ttl_ms: u64) {
        let until_ms = sent_ms.saturating_add(ttl_ms);
        self.held.insert(attempt, Held { epoch, until_ms });
    }

    /// A heartbeat sent at `sent_ms` was answered: this lease lives. An answer about another epoch, and one that came after a later
    /// one, change nothing.
    pub fn renewed(&mut self, attempt: &AttemptId, epoch: Epoch, sent_ms: u64, ttl_ms: u64) {
        if let Some(held) = self.held.get_mut(attempt)
            && held.epoch == epoch
        {
            held.until_ms = held.until_ms.max(sent_ms.saturating_add(ttl_ms));
        }
    }

    /// The attempt is over, or the controller took it away.
    pub fn ended(&mut self, attempt: &AttemptId) {
        self.held.remove(attempt);
    }

    /// Takes out the leases that are over at `now_ms`: what runs for them is to be destroyed at once.
    pub fn expire(&mut self, now_ms: u64) -> Vec<AttemptId> {
        let over = |held: &Held| held.until_ms <= now_ms;
        let expired: Vec<_> = self
            .held
            .iter()
            .filter(|(_, held)| over(held))
            .map(|(attempt, _)| attempt.clone())
            .collect();
        self.held.retain(|_, held| !over(held));
        expired
    }

    /// When the next lease ends, if nothing renews it.
    #[must_use]
    pub fn next_ms(&self) -> Option<u64> {
        self.held.values().map(|held| held.until_ms).min()
    }

    /// End of one lease.
    #[must_use]
    pub fn until_ms(&self, attempt: &AttemptId) -> Option<u64> {
        self.held.get(attempt).map(|held| held.until_ms)
    }

    /// Everything held, for the next heartbeat.
    #[must_use]
    pub fn held(&self) -> Vec<(AttemptId, Epoch)> {
        let pairs = self.held.iter();
        pairs
            .map(|(attempt, held)| (attempt.clone(), held.epoch))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(number: u32) -> AttemptId {
        AttemptId {
            job: "b1".parse().expect("name"),
            number,
        }
    }

    fn epoch(count: u64) -> Epoch {
        Epoch {
            incarnation: 1,
            count,
        }
    }

    #[test]
    fn a_lease_is_over_a_ttl_after_the_last_answered_request_was_sent() {
        let mut fence = Fence::default();
        fence.granted(attempt(1), epoch(1), 100, 15);
        assert_eq!(fence.next_ms(), Some(115));
        assert!(fence.expire(114).is_empty());
        fence.renewed(&attempt(1), epoch(1), 110, 15);
        assert!(fence.expire(124).is_empty());
        assert_eq!(fence.expire(125), [attempt(1)]);
        assert!(fence.held().is_empty() && fence.next_ms().is_none());
    }

    #[test]
    fn late_and_foreign_answers_change_nothing() {
        let mut fence = Fence::default();
        fence.granted(attempt(1), epoch(2), 100, 15);
        fence.renewed(&attempt(1), epoch(1), 200, 15);
        fence.renewed(&attempt(1), epoch(2), 90, 15);
        fence.renewed(&attempt(2), epoch(2), 200, 15);
        assert_eq!(fence.until_ms(&attempt(1)), Some(115));
        // One that expired is not revived by an answer that was on its way.
        assert_eq!(fence.expire(115), [attempt(1)]);
        fence.renewed(&attempt(1), epoch(2), 114, 15);
        assert!(fence.held().is_empty());
    }
}
