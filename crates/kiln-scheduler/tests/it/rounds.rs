//! Over many rounds: nothing waits for ever, and nobody pays for another's flood.

use kiln_scheduler::TenantRule;
use proptest::prelude::*;

use crate::build::{host, job, tenant, typical, view};
use crate::simulation::{Dice, Simulation};

const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;

/// An overload without end.
#[derive(Clone, Copy, Debug)]
struct Overload {
    seed: u64,
    /// The favoured tenant brings fewer than this in ten seconds.
    favoured: u64,
    /// Its jobs are of 1 to so many CPUs.
    sizes: u64,
    /// Running jobs are expected to end when they do.
    foresight: bool,
    /// Waiting jobs have a p50.
    estimates: bool,
}

/// Two hosts of four CPUs under more work than they can do, without end: a favoured tenant, the tenant of one large job with small jobs of its
/// own, and a neglected tenant with two jobs. Those of the first minute must start in bounded time.
fn overloaded(load: Overload) {
    let mut dice = Dice(load.seed);
    let mut pool = view(vec![host("w0", 4), host("w1", 4)], Vec::new());
    for (name, weight) in [("favoured", 1000), ("busy", 100), ("neglected", 1)] {
        let rule = TenantRule {
            weight,
            ..TenantRule::default()
        };
        pool.tenants.insert(tenant(name), rule);
    }
    if load.estimates {
        typical(&mut pool, "favoured", MINUTE);
        typical(&mut pool, "busy", MINUTE);
    }
    let mut sim = Simulation::new(pool);
    sim.foresight = load.foresight;
    for round in 0..300_u64 {
        for at in 0..dice.roll(load.favoured) {
            let size = 1 + dice.roll(load.sizes) as u32;
            sim.submit(
                job(&format!("f{round}-{at}"), "favoured", size),
                30 * SECOND + dice.roll(MINUTE),
            );
        }
        sim.submit(
            job(&format!("s{round}"), "busy", 1),
            30 * SECOND + dice.roll(MINUTE),
        );
        if round == 2 {
            sim.submit(job("large", "busy", 4), MINUTE);
            sim.submit(job("lonely", "neglected", 1), MINUTE);
            sim.submit(job("lonely-large", "neglected", 4), MINUTE);
        }
        sim.step(10 * SECOND);
    }
    for id in ["large", "lonely", "lonely-large"] {
        let waited = sim.waited.get(&crate::build::job_id(id));
        assert!(
            waited.is_some_and(|waited| *waited <= 20 * MINUTE),
            "{load:?}: {id} waited {waited:?}"
        );
    }
}

#[test]
fn nothing_waits_for_ever_in_an_overload_without_end() {
    for seed in [0, 3] {
        for (favoured, sizes) in [(2, 1), (3, 1), (5, 1), (2, 3), (3, 3)] {
            for (foresight, estimates) in [(true, true), (true, false), (false, false)] {
                overloaded(Overload {
                    seed,
                    favoured,
                    sizes,
                    foresight,
                    estimates,
                });
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn everything_runs_in_bounded_rounds(
        jobs in proptest::collection::vec((0..3_usize, 1..5_u32, 1..4_u64, any::<bool>()), 1..60),
        weights in proptest::collection::vec(1..1000_u32, 3),
    ) {
        let names = ["ant", "bee", "cat"];
        let mut pool = view(vec![host("w0", 4), host("w1", 5)], Vec::new());
        for (name, weight) in names.iter().zip(&weights) {
            let rule = TenantRule { weight: *weight, running_max: Some(3), burst: 1, ..TenantRule::default() };
            pool.tenants.insert(tenant(name), rule);
        }
        let mut sim = Simulation::new(pool);
        let rounds: u64 = jobs.iter().map(|(_, _, length, _)| length).sum();
        for (at, (owner, size, length, grouped)) in jobs.iter().enumerate() {
            let mut job = job(&format!("j{at}"), names[*owner], *size);
            job.group = grouped.then(|| crate::build::label("deploy"));
            sim.submit(job, length * MINUTE);
        }
        sim.decide();
        // One after the other would take as many rounds as all are long.
        for _ in 0..rounds {
            sim.step(MINUTE);
        }
        prop_assert!(sim.view.pending.is_empty(), "{:?}", sim.view.pending);
    }
}

/// Waits of a light tenant that brings a job a second to 400 slots, the 95th of a hundred.
fn light_p95(seed: u64, flood: usize) -> u64 {
    let mut dice = Dice(seed);
    let mut sim = Simulation::new(view(
        (0..100).map(|at| host(&format!("w{at}"), 4)).collect(),
        Vec::new(),
    ));
    sim.checked = false;
    for at in 0..flood {
        sim.submit(
            job(&format!("flood-{at}"), "heavy", 1),
            SECOND + dice.roll(MINUTE),
        );
    }
    sim.decide();
    for round in 0..100 {
        sim.view.now_unix_ms += SECOND / 2;
        sim.submit(
            job(&format!("light-{round}"), "light", 1),
            SECOND + dice.roll(MINUTE),
        );
        sim.step(SECOND / 2);
    }
    let light = |(id, waited): (&kiln_core::JobId, &u64)| {
        id.as_str().starts_with("light").then_some(*waited)
    };
    let mut waits: Vec<u64> = sim.waited.iter().filter_map(light).collect();
    waits.resize(100, u64::MAX);
    waits.sort_unstable();
    waits[94]
}

#[test]
fn a_flood_of_ten_thousand_jobs_at_most_doubles_the_waits_of_a_light_tenant() {
    let idle = light_p95(7, 0);
    let flooded = light_p95(7, 10_000);
    assert!(
        idle > 0 && flooded <= 2 * idle,
        "p95 {flooded} ms with the flood, {idle} ms without"
    );
}
