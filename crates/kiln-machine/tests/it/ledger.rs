//! The ledger between processes: several take turns, and the dead give back what they held.

use std::path::Path;
use std::time::Duration;

use kiln_core::ByteSize;
use kiln_machine::ledger::{Capacity, Ledger, LedgerError, Need};

use crate::child::{Role, say, wait_to_be_killed};

const LONG: Duration = Duration::from_secs(20);

fn ledger(home: &Path) -> Ledger {
    Ledger::new(home, Capacity(Need::of(8, ByteSize::gib(4))))
}

fn need(gib: u64) -> Need {
    Need::of(1, ByteSize::gib(gib))
}

/// A child that takes room and keeps it until it is killed.
pub(crate) fn play_hold(home: &Path, gib: &str) {
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    let gib = gib.parse().expect("a number");
    let ticket = runtime.block_on(ledger(home).acquire(need(gib), "child", LONG, |_| say("waits")));
    let _ticket = ticket.expect("room");
    say("holds");
    wait_to_be_killed();
}

#[tokio::test]
async fn a_killed_holder_gives_its_room_to_the_next_process() {
    let home = tempfile::tempdir().expect("temp");
    let path = home.path().to_str().expect("utf-8");
    let mut first = Role::start(&["hold", path, "3"]);
    first.wait_for("holds");
    let mut second = Role::start(&["hold", path, "3"]);
    second.wait_for("waits");
    let refused = ledger(home.path())
        .acquire(need(3), "parent", Duration::from_millis(10), |_| {})
        .await;
    let error = refused.expect_err("no room");
    let LedgerError::Deadline { reason, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(
        reason.to_string(),
        "3.0 GiB of memory: 1 machine holds 3.0 GiB of 4.0 GiB"
    );
    first.kill();
    second.wait_for("holds");
    // A waiting process that is killed leaves the queue too.
    let mut third = Role::start(&["hold", path, "4"]);
    third.wait_for("waits");
    third.kill();
    second.kill();
    let ticket = ledger(home.path())
        .acquire(need(4), "parent", LONG, |_| {})
        .await;
    drop(ticket.expect("all are gone"));
    assert_eq!(ledger(home.path()).list().await.expect("list"), []);
}

#[tokio::test]
async fn processes_together_never_hold_more_than_there_is() {
    let home = tempfile::tempdir().expect("temp");
    let path = home.path().to_str().expect("utf-8");
    let children: Vec<_> = (0..6).map(|_| Role::start(&["hold", path, "1"])).collect();
    let end = std::time::Instant::now() + LONG;
    let ledger = ledger(home.path());
    loop {
        let entries = ledger.list().await.expect("list");
        let holding = entries.iter().filter(|entry| entry.holds).count();
        assert!(holding <= 4, "{entries:?}");
        if holding == 4 && entries.len() == 6 {
            break;
        }
        assert!(std::time::Instant::now() < end, "{entries:?}");
        tokio::task::yield_now().await;
    }
    drop(children);
    assert_eq!(ledger.list().await.expect("list"), []);
}
