//! Progress of a build as the guest tells it, line by line, and what is concluded from it at the end.
#![no_main]

use kiln_proto::msg::Exit;
use kiln_worker::solve::Solve;
use kiln_worker::solve_failure;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &str| {
    let mut solve = Solve::default();
    for line in input.lines() {
        let _ = solve.line(line);
    }
    let (hits, all) = solve.cache_hits();
    assert!(hits <= all && all <= solve.steps().len());
    assert!(solve.seconds() >= 0.0 && solve.push_seconds() >= 0.0);
    let exit = Exit {
        code: Some(1),
        signal: None,
        oom: false,
        timed_out: false,
        user_ms: 0,
        system_ms: 0,
        memory_peak: 0,
        output_dropped: 0,
    };
    let _ = solve_failure::classify(&solve, &exit, 0);
});
