//! A wall clock that only moves when told.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Milliseconds since the Unix epoch at which every fake clock starts: 2026-01-01 00:00:00 UTC.
const START_UNIX_MS: u64 = 1_767_225_600_000;

/// A wall clock for code that takes the time as an argument or as a function. Clones show the same time.
#[derive(Clone, Debug)]
pub struct FakeClock(Arc<AtomicU64>);

impl Default for FakeClock {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(START_UNIX_MS)))
    }
}

impl FakeClock {
    /// The time now, milliseconds since the Unix epoch.
    #[must_use]
    pub fn now_unix_ms(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        let ms = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self.0.fetch_add(ms, Ordering::SeqCst);
    }

    /// Sets the clock, backwards too: a clock jump.
    pub fn set_unix_ms(&self, now: u64) {
        self.0.store(now, Ordering::SeqCst);
    }

    /// The clock as a function.
    pub fn as_fn(&self) -> impl Fn() -> u64 + Send + Sync + 'static {
        let clock = self.clone();
        move || clock.now_unix_ms()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_moves_only_when_told() {
        let clock = FakeClock::default();
        let now = clock.as_fn();
        let start = now();
        clock.advance(Duration::from_secs(2));
        assert_eq!(now() - start, 2000);
        clock.set_unix_ms(1);
        assert_eq!(clock.now_unix_ms(), 1);
    }
}
