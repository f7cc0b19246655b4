//! The clock that deadlines are counted by where the database has none of its own (SQLite).

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// Tells the time of the database's host.
pub trait Clock: Send + Sync + fmt::Debug {
    /// Milliseconds since the Unix epoch; never goes back while the process lives.
    fn now_unix_ms(&self) -> u64;
}

/// The host's clock, read once as wall time and then carried on by the clock that nobody sets and that goes on in suspend: a
/// deadline neither jumps with the wall clock nor stretches over a night.
#[derive(Debug)]
pub struct SystemClock {
    wall_ms: u64,
    boot_ms: u64,
    last_ms: AtomicU64,
}

impl Default for SystemClock {
    fn default() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH);
        let wall_ms = wall.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(0));
        Self {
            wall_ms,
            boot_ms: boot_ms(),
            last_ms: AtomicU64::new(wall_ms),
        }
    }
}

impl Clock for SystemClock {
    fn now_unix_ms(&self) -> u64 {
        let now = self.wall_ms + boot_ms().saturating_sub(self.boot_ms);
        self.last_ms.fetch_max(now, Ordering::Relaxed).max(now)
    }
}

fn boot_ms() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds * 1000 + nanos / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_starts_at_the_wall_and_never_goes_back() {
        let clock = SystemClock::default();
        let first = clock.now_unix_ms();
        assert!(first > 1_600_000_000_000);
        assert!(clock.now_unix_ms() >= first);
    }
}
