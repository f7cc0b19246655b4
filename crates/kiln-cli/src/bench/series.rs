//! Samples of one quantity, what is promised of it, and the statistics that are shown. Knows no benchmark.

use serde::Serialize;

/// What a sample counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Unit {
    /// Milliseconds.
    Milliseconds,
    /// Bytes.
    Bytes,
    /// One quantity divided by another.
    Ratio,
    /// Things.
    Count,
    /// Things per second.
    PerSecond,
    /// Bytes per second.
    BytesPerSecond,
}

impl Unit {
    /// A value with its unit, for people.
    pub(super) fn text(self, value: f64) -> String {
        match self {
            Self::Milliseconds if value.abs() >= 10_000.0 => format!("{:.1} s", value / 1e3),
            Self::Milliseconds if value.abs() < 100.0 && value.fract() != 0.0 => {
                format!("{value:.1} ms")
            }
            Self::Milliseconds => format!("{value:.0} ms"),
            Self::Bytes => format!("{:.1} MB", value / 1e6),
            Self::Ratio => format!("{value:.2} x"),
            Self::Count => format!("{value:.0}"),
            Self::PerSecond => format!("{value:.0}/s"),
            Self::BytesPerSecond => format!("{:.1} MB/s", value / 1e6),
        }
    }
}

/// What PROMISES.md says of a series.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
#[serde(rename_all = "snake_case", tag = "rule", content = "value")]
pub(super) enum Promise {
    /// The median is at most this.
    MedianAtMost(f64),
    /// The median is at least this.
    MedianAtLeast(f64),
    /// No sample is above this.
    EachAtMost(f64),
    /// The 99th percentile is at most this.
    P99AtMost(f64),
}

/// Samples in the order they were taken.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Series {
    /// What was measured.
    pub name: String,
    /// Of each sample.
    pub unit: Unit,
    /// What is promised, if anything.
    pub promise: Option<Promise>,
    /// Raw.
    pub samples: Vec<f64>,
}

/// The numbers that are shown.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub(super) struct Statistics {
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Least.
    pub min: f64,
    /// Most.
    pub max: f64,
}

impl Series {
    /// Nearest-rank percentiles; `None` without samples.
    pub(super) fn statistics(&self) -> Option<Statistics> {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).copied()
        };
        Some(Statistics {
            p50: rank(50)?,
            p95: rank(95)?,
            p99: rank(99)?,
            min: *sorted.first()?,
            max: *sorted.last()?,
        })
    }

    /// Whether the promise held; `None` when nothing is promised or measured.
    pub(super) fn kept(&self) -> Option<bool> {
        let numbers = self.statistics()?;
        Some(match self.promise? {
            Promise::MedianAtMost(limit) => numbers.p50 <= limit,
            Promise::MedianAtLeast(limit) => numbers.p50 >= limit,
            Promise::EachAtMost(limit) => numbers.max <= limit,
            Promise::P99AtMost(limit) => numbers.p99 <= limit,
        })
    }

    /// The promise for people, and whether it held.
    pub(super) fn promise_text(&self) -> String {
        let Some(promise) = self.promise else {
            return String::new();
        };
        let limit = match promise {
            Promise::MedianAtMost(limit) | Promise::EachAtMost(limit) => {
                format!("<= {}", self.unit.text(limit))
            }
            Promise::P99AtMost(limit) => format!("p99 <= {}", self.unit.text(limit)),
            Promise::MedianAtLeast(limit) => format!(">= {}", self.unit.text(limit)),
        };
        match self.kept() {
            Some(true) => format!("{limit} kept"),
            Some(false) => format!("{limit} MISSED"),
            None => limit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(promise: Promise, samples: &[f64]) -> Series {
        Series {
            name: "s".to_owned(),
            unit: Unit::Milliseconds,
            promise: Some(promise),
            samples: samples.to_vec(),
        }
    }

    #[test]
    fn percentiles_are_samples_by_nearest_rank() {
        let samples: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        let numbers = series(Promise::MedianAtMost(1.0), &samples).statistics();
        let expected = Statistics {
            p50: 10.0,
            p95: 19.0,
            p99: 20.0,
            min: 1.0,
            max: 20.0,
        };
        assert_eq!(numbers, Some(expected));
        assert_eq!(series(Promise::MedianAtMost(1.0), &[]).statistics(), None);
    }

    #[test]
    fn a_promise_is_kept_or_missed_by_its_own_rule() {
        let samples = [1.0, 2.0, 9.0];
        assert_eq!(
            series(Promise::MedianAtMost(2.0), &samples).kept(),
            Some(true)
        );
        assert_eq!(
            series(Promise::EachAtMost(2.0), &samples).kept(),
            Some(false)
        );
        assert_eq!(
            series(Promise::MedianAtLeast(3.0), &samples).kept(),
            Some(false)
        );
        let text = series(Promise::EachAtMost(2.0), &samples).promise_text();
        assert_eq!(text, "<= 2 ms MISSED");
    }
}
