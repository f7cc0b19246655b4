//! A machine's share of the host's network: one bucket per direction, for all its connections together.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Traffic that may pass at once before the rate applies.
const BURST: Duration = Duration::from_millis(100);

/// Which way bytes go.
#[derive(Clone, Copy, Debug)]
pub(super) enum Direction {
    /// From the guest.
    Out,
    /// To the guest.
    In,
}

#[derive(Debug)]
pub(super) struct Bandwidth {
    /// Bytes per second of each direction.
    rates: [Option<NonZeroU64>; 2],
    /// When the bytes admitted so far will have passed at the given rate, for each direction.
    busy_until: [Mutex<Option<Instant>>; 2],
}

impl Bandwidth {
    pub(super) fn new(out: Option<NonZeroU64>, into: Option<NonZeroU64>) -> Self {
        Self {
            rates: [out, into],
            busy_until: Default::default(),
        }
    }

    /// Waits until `bytes` more may pass.
    pub(super) async fn admit(&self, direction: Direction, bytes: usize) {
        let Some(rate) = self.rates[direction as usize] else {
            return;
        };
        let took = Duration::from_secs_f64(bytes as f64 / rate.get() as f64);
        let until = {
            let slot = &self.busy_until[direction as usize];
            let mut busy = slot.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let until = busy.map_or(now, |until| until.max(now)) + took;
            *busy = Some(until);
            until
        };
        if let Some(wake) = until.checked_sub(BURST) {
            sleep_until(wake).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_holds_over_connections_and_directions_are_apart() {
        let bandwidth = Bandwidth::new(NonZeroU64::new(1_000_000), None);
        let start = Instant::now();
        for _ in 0..20 {
            bandwidth.admit(Direction::Out, 100_000).await;
        }
        let took = start.elapsed();
        assert!(
            took >= Duration::from_millis(1_880) && took <= Duration::from_millis(2_000),
            "{took:?}"
        );
        let start = Instant::now();
        bandwidth.admit(Direction::In, 100_000_000).await;
        assert!(start.elapsed() < Duration::from_millis(10));
    }
}
