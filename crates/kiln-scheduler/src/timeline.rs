//! When a waiting job should start: what runs now ends when it is expected to, and what waits takes its turn in order.
//!
//! An estimate, not a plan: it counts the scarcest part of the room of all competing hosts as one heap, so it knows no fragmentation.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::fleet::NEVER;
use crate::plan::{Estimate, EstimateBasis};
use crate::view::Typical;

/// Ends of jobs, and the turns of those that wait.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    ends: BinaryHeap<Reverse<(u64, u64)>>,
    freed: u64,
    at: u64,
    runs: Option<u32>,
    lost: bool,
}

impl Timeline {
    /// A job that ends then gives back so much.
    pub(crate) fn ends(&mut self, end: u64, amount: u64) {
        if end != NEVER {
            self.ends.push(Reverse((end, amount)));
        }
    }

    /// The next in order takes so much, and gives it back after its typical time.
    pub(crate) fn next(&mut self, amount: u64, typical: Option<Typical>) -> Option<Estimate> {
        while !self.lost && self.freed < amount {
            let Some(Reverse((end, more))) = self.ends.pop() else {
                self.lost = true;
                break;
            };
            self.at = self.at.max(end);
            self.freed = self.freed.saturating_add(more);
        }
        if self.lost {
            return None;
        }
        self.freed -= amount;
        let estimate = Estimate {
            start_unix_ms: self.at,
            basis: self
                .runs
                .map_or(EstimateBasis::ExpectedEnds, |runs| EstimateBasis::P50 {
                    runs,
                }),
        };
        if let Some(typical) = typical {
            self.ends(self.at.saturating_add(typical.p50_ms), amount);
            self.runs = Some(
                self.runs
                    .map_or(typical.runs, |runs| runs.min(typical.runs)),
            );
        }
        Some(estimate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_come_as_jobs_end_and_say_what_they_rest_on() {
        let mut line = Timeline::default();
        line.ends(100, 1);
        line.ends(50, 1);
        line.ends(NEVER, 1);
        let typical = Some(Typical {
            p50_ms: 10,
            runs: 7,
        });
        let next = |line: &mut Timeline| line.next(1, typical).map(|e| (e.start_unix_ms, e.basis));
        assert_eq!(next(&mut line), Some((50, EstimateBasis::ExpectedEnds)));
        assert_eq!(next(&mut line), Some((60, EstimateBasis::P50 { runs: 7 })));
        assert_eq!(line.next(2, None).map(|e| e.start_unix_ms), Some(100));
        assert_eq!(
            line.next(1, typical),
            None,
            "nobody knows when what runs last ends"
        );
    }
}
