//! How long a decision takes, and how many placements that makes per second.
//!
//! `cargo bench -p kiln-scheduler [-- PART OF A NAME]` prints one line per case: median and slowest of the samples, what was placed, what that is per second.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark prints or fails"
)]

use std::time::Instant;

use kiln_scheduler::{PoolView, plan, sample};

const SAMPLES: usize = 30;

/// Nanoseconds this thread was on a CPU: what a decision costs on a host that has more to do.
fn cpu_nanos() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ')
        .next()
        .and_then(|nanos| nanos.parse().ok())
        .unwrap_or(0)
}

fn measure(name: &str, view: &PoolView) {
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    if wanted.is_some_and(|wanted| !name.contains(&wanted)) {
        return;
    }
    let mut millis: Vec<f64> = Vec::new();
    let cpu = cpu_nanos();
    let mut placed = 0;
    for _ in 0..SAMPLES {
        let begun = Instant::now();
        let plan = plan(std::hint::black_box(view));
        millis.push(begun.elapsed().as_secs_f64() * 1e3);
        assert_eq!(
            plan.assignments.len() + plan.reasons.len(),
            view.pending.len()
        );
        placed = plan.assignments.len();
    }
    millis.sort_by(f64::total_cmp);
    let on_cpu = (cpu_nanos() - cpu) as f64 / 1e6 / SAMPLES as f64;
    let (median, most) = (millis[millis.len() / 2], millis[millis.len() - 1]);
    let rate = placed as f64 / median * 1e3;
    println!(
        "{name:<66} p50 {median:>7.2} ms (on CPU {on_cpu:>6.2})  max {most:>7.2} ms   placed {placed:>5}   {rate:>7.0}/s"
    );
}

fn view(jobs: usize, hosts: usize, classes: usize, free_every: usize) -> PoolView {
    sample::pool(jobs, hosts, classes, free_every).unwrap()
}

fn main() {
    measure(
        "10,000 jobs, 500 hosts, 200 classes, all hosts full",
        &view(10_000, 500, 200, 0),
    );
    measure(
        "10,000 jobs, 500 hosts, 200 classes, 100 hosts with a slot",
        &view(10_000, 500, 200, 5),
    );
    measure(
        "10,000 jobs, 500 hosts, 200 classes, all hosts empty",
        &view(10_000, 500, 200, 1),
    );
    measure(
        "10,000 jobs, 500 hosts, every job its own class, all full",
        &view(10_000, 500, 10_000, 0),
    );
    measure(
        "10,000 jobs, 500 hosts, every job its own class, 100 slots",
        &view(10_000, 500, 10_000, 5),
    );
    measure(
        "10,000 jobs, 500 hosts, every job its own class, all empty",
        &view(10_000, 500, 10_000, 1),
    );
    measure(
        "10,000 jobs, 5,000 hosts, 200 classes, all hosts empty",
        &view(10_000, 5_000, 200, 1),
    );
    measure(
        "10,000 jobs, 5,000 hosts, 200 classes, 1,000 hosts with a slot",
        &view(10_000, 5_000, 200, 5),
    );
}
