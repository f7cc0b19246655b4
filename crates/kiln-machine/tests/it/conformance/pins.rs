//! Machines with CPUs of their own, and those that keep off them.

use std::collections::BTreeSet;
use std::time::Duration;

use kiln_core::{ByteSize, MachineSpec};
use kiln_machine::driver::Machine;
use kiln_machine::ledger::{Capacity, Ledger, Need};
use kiln_machine::pins;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity};

use super::under_test::UnderTest;

/// CPUs of every thread of a machine's VMM; all must agree.
fn cpus_of(test: &UnderTest, machine: &dyn Machine) -> BTreeSet<u32> {
    let pid = test.vmm_pid(machine);
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let sets = threads.flatten().map(|thread| {
        let number = thread
            .file_name()
            .to_string_lossy()
            .parse()
            .expect("a number");
        let set = sched_getaffinity(Pid::from_raw(number)).expect("affinity");
        (0..CpuSet::MAX_CPU)
            .filter(|cpu| set.is_set(*cpu))
            .map(|cpu| u32::try_from(cpu).expect("few"))
            .collect::<BTreeSet<u32>>()
    });
    let sets: BTreeSet<BTreeSet<u32>> = sets.collect();
    assert_eq!(sets.len(), 1, "threads on different CPUs: {sets:?}");
    sets.into_iter().next().expect("a thread")
}

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) async fn whole_cpus(test: &UnderTest) {
    let all = pins::usable().expect("affinity");
    if all.len() < 2 {
        eprintln!("skipped: this host has one CPU");
        return;
    }
    let cpus = u32::try_from(all.len()).expect("few");
    let capacity = Capacity(Need::of(cpus * 4, ByteSize::gib(64)));
    let ledger = Ledger::new(&test.home, capacity);
    let deadline = Duration::from_secs(20);
    let (shares, _shares_host) = test.boot("shares").await;
    assert_eq!(cpus_of(test, &*shares), all);
    let need = Need::pinned(1, ByteSize::gib(1));
    let ticket = ledger.acquire(need, "pinned", deadline, |_| {}).await;
    let ticket = ticket.expect("a CPU");
    let own: BTreeSet<u32> = ticket.cpus().iter().copied().collect();
    let others: BTreeSet<u32> = all.difference(&own).copied().collect();
    assert_eq!(own.len(), 1);
    assert_eq!(cpus_of(test, &*shares), others, "moved while it runs");
    let spec = MachineSpec {
        host_cpus: ticket.cpus().to_vec(),
        ..test.spec("pinned")
    };
    let (pinned, host) = test.boot_spec(&spec).await;
    assert_eq!(cpus_of(test, &*pinned), own);
    host.exec(&["true"]).await.expect("ran");
    let (late, _late_host) = test.boot("late").await;
    assert_eq!(cpus_of(test, &*late), others, "keeps off from its start");
    test.destroy(&*pinned).await;
    drop(ticket);
    assert_eq!(cpus_of(test, &*shares), all, "given back");
    assert_eq!(cpus_of(test, &*late), all, "given back");
    for machine in [shares, late] {
        test.destroy(&*machine).await;
    }
}
