//! Time as leases are counted: it goes on while the host sleeps, and no wall clock moves it.

use rustix::time::{ClockId, clock_gettime};

/// Milliseconds since the host started, time asleep included.
#[must_use]
pub fn boot_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds
        .saturating_mul(1000)
        .saturating_add(nanos / 1_000_000)
}
