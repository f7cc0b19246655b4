//! Admission between tasks here; between processes in `tests/it`.

use super::*;
use std::sync::{Arc, Mutex};
use std::task::Poll;

const LONG: Duration = Duration::from_secs(20);

fn need(gib: u64) -> Need {
    Need::of(1, ByteSize::gib(gib))
}

fn ledger(home: &Path, cpus: u32, gib: u64) -> Ledger {
    Ledger::new(home, Capacity(Need::of(cpus, ByteSize::gib(gib))))
}

async fn take(ledger: &Ledger, gib: u64) -> Ticket {
    ledger
        .acquire(need(gib), "test", LONG, |_| {})
        .await
        .expect("room")
}

#[tokio::test]
async fn room_is_given_back_and_the_reason_is_said() {
    let home = tempfile::tempdir().expect("temp");
    let ledger = ledger(home.path(), 8, 6);
    let first = take(&ledger, 3).await;
    let second = take(&ledger, 2).await;
    let reasons = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&reasons);
    let third = {
        let ledger = ledger.clone();
        tokio::spawn(async move {
            ledger
                .acquire(need(2), "third", LONG, |reason| {
                    seen.lock().expect("lock").push(reason.to_string());
                })
                .await
        })
    };
    while reasons.lock().expect("lock").is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(
        reasons.lock().expect("lock")[0],
        "2.0 GiB of memory: 2 machines hold 5.0 GiB of 6.0 GiB"
    );
    let listed = ledger.list().await.expect("list");
    assert_eq!(listed.iter().filter(|holder| holder.holds).count(), 2);
    assert_eq!(listed[2].who, "third");
    drop(second);
    let third = third.await.expect("join").expect("room");
    drop((first, third));
    assert_eq!(ledger.list().await.expect("list"), []);
    let left = std::fs::read_dir(home.path().join("ledger")).expect("list");
    assert_eq!(left.count(), 2, "only the lock and the counter stay");
}

#[tokio::test]
async fn what_can_never_fit_is_refused_at_once() {
    let home = tempfile::tempdir().expect("temp");
    let small = ledger(home.path(), 2, 6);
    let memory = small.acquire(need(7), "big", LONG, |_| {}).await;
    assert!(matches!(memory, Err(LedgerError::NeverFits { .. })));
    let cpus = small
        .acquire(Need::of(3, ByteSize(1)), "wide", LONG, |_| {})
        .await;
    assert_eq!(
        cpus.expect_err("refused").to_string(),
        "1 B and 3 CPUs can never be given: this host has 6.0 GiB and 2 CPUs for machines"
    );
    assert!(!home.path().join("ledger").exists(), "no side effect");
}

#[tokio::test]
async fn the_deadline_names_the_reason_and_leaves_no_place_in_the_queue() {
    let home = tempfile::tempdir().expect("temp");
    let ledger = ledger(home.path(), 1, 6);
    let held = take(&ledger, 1).await;
    let late = ledger
        .acquire(need(1), "late", Duration::from_millis(20), |_| {})
        .await;
    let error = late.expect_err("no room").to_string();
    assert!(
        error.contains("1.0 CPUs: 1 machine holds 1.0 of 1.0"),
        "{error}"
    );
    assert_eq!(ledger.list().await.expect("list").len(), 1);
    drop(held);
    take(&ledger, 1).await;
}

#[tokio::test]
async fn a_dropped_wait_leaves_the_queue() {
    let home = tempfile::tempdir().expect("temp");
    let ledger = ledger(home.path(), 8, 4);
    let held = take(&ledger, 4).await;
    {
        let mut wait = Box::pin(ledger.acquire(need(4), "gone", LONG, |_| {}));
        let polled = futures_poll_until(&mut wait, &ledger).await;
        assert!(polled.is_pending());
    }
    drop(held);
    let end = std::time::Instant::now() + LONG;
    while !ledger.list().await.expect("list").is_empty() {
        assert!(std::time::Instant::now() < end, "the entry stayed");
    }
    take(&ledger, 4).await;
}

/// Polls a wait until it stands in the queue.
async fn futures_poll_until<F: Future + Unpin>(wait: &mut F, ledger: &Ledger) -> Poll<F::Output> {
    loop {
        let polled = std::future::poll_fn(|context| {
            Poll::Ready(std::pin::Pin::new(&mut *wait).poll(context))
        })
        .await;
        let queued = ledger.list().await.expect("list").len() == 2;
        if polled.is_ready() || queued {
            return polled;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_need_is_passed_but_never_starved() {
    let home = tempfile::tempdir().expect("temp");
    let ledger = ledger(home.path(), 1000, 4);
    let mut small = take(&ledger, 1).await;
    let started = Arc::new(tokio::sync::Notify::new());
    let waiting = Arc::clone(&started);
    let large = {
        let ledger = ledger.clone();
        tokio::spawn(async move {
            ledger
                .acquire(need(4), "large", LONG, |_| waiting.notify_one())
                .await
        })
    };
    started.notified().await;
    // A stream of small needs, each started before the one before it ends: without the bound the large one never fits.
    let mut passes = 0;
    loop {
        let next = ledger
            .acquire(need(1), "small", Duration::from_millis(50), |_| {})
            .await;
        match next {
            Ok(next) => {
                small = next;
                passes += 1;
                assert!(passes <= PASSES_MAX, "the large need is starved");
            }
            Err(LedgerError::Deadline { reason, .. }) => {
                assert_eq!(reason.resource, Resource::Turn);
                assert_eq!(reason.to_string(), "its turn: 1 waited longer");
                break;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(passes, PASSES_MAX);
    drop(small);
    large.await.expect("join").expect("room at last");
}

#[tokio::test]
async fn damaged_and_dead_entries_do_not_block_or_lie() {
    let home = tempfile::tempdir().expect("temp");
    let ledger = ledger(home.path(), 8, 4);
    let dir = home.path().join("ledger");
    std::fs::create_dir_all(&dir).expect("dir");
    std::fs::write(dir.join("next"), "garbage").expect("write");
    std::fs::write(dir.join("lease-7-aa.json"), "{").expect("write");
    std::fs::write(dir.join("unrelated"), "x").expect("write");
    let ticket = take(&ledger, 4).await;
    assert!(!dir.join("lease-7-aa.json").exists(), "nobody locked it");
    assert!(dir.join("unrelated").exists());
    // A live entry that cannot be read counts as everything.
    drop(ticket);
    let live = std::fs::File::create(dir.join("lease-9-bb.json")).expect("make");
    live.lock().expect("lock");
    let refused = ledger
        .acquire(need(1), "x", Duration::from_millis(10), |_| {})
        .await;
    assert!(matches!(refused, Err(LedgerError::Deadline { .. })));
    live.unlock().expect("unlock");
    take(&ledger, 4).await;
}

#[tokio::test]
async fn a_machine_between_two_owners_holds_what_it_takes() {
    use crate::driver::{Kept, PublicIdentity};
    use crate::record::{MachineDir, unix_ms};
    let home = tempfile::tempdir().expect("temp");
    let ledger = ledger(home.path(), 8, 6);
    drop(take(&ledger, 1).await);
    // Ends with its input, however this test ends.
    let mut vmm = std::process::Command::new("cat")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("cat");
    let mut spec = crate::template::tests_spec();
    spec.memory = ByteSize::gib(4);
    let dir = MachineDir::create(home.path(), &spec.name, "sim").expect("made");
    dir.set_running(vmm.id()).expect("recorded");
    let identity = PublicIdentity {
        boot_id: "b".to_owned(),
        machine_id: "m".to_owned(),
        hostname: "h".to_owned(),
    };
    let kept = Kept {
        until_unix_ms: unix_ms() + 600_000,
        identity,
    };
    crate::adopt::keep(&dir, kept, &spec, None).expect("kept");
    assert_eq!(
        ledger.list().await.expect("list"),
        [],
        "its owner's entry counts"
    );
    dir.abandon();
    let held = ledger.list().await.expect("list");
    assert_eq!(held.len(), 1, "{held:?}");
    assert!(held[0].holds && held[0].need.memory == ByteSize::gib(4));
    let need = Need::of(1, ByteSize::gib(3));
    let soon = Duration::from_millis(50);
    let late = ledger.acquire(need, "next", soon, |_| {}).await;
    assert!(
        matches!(late, Err(LedgerError::Deadline { .. })),
        "{late:?}"
    );
    vmm.kill().expect("killed");
    vmm.wait().expect("waited");
    let admitted = ledger.acquire(need, "next", soon, |_| {}).await;
    admitted.expect("its room is free again");
    let report = crate::reap::reap_home(home.path());
    assert_eq!(report.reaped, [spec.name.as_str()]);
}

fn pinning(home: &Path, cpus: &[u32]) -> Ledger {
    let capacity = u32::try_from(cpus.len()).expect("few") * 4;
    ledger(home, capacity, 64).with_cpus(cpus.iter().copied().collect())
}

async fn pin(ledger: &Ledger, cpus: u32) -> Result<Ticket, LedgerError> {
    let need = Need::pinned(cpus, ByteSize::gib(1));
    ledger
        .acquire(need, "pinned", Duration::from_millis(50), |_| {})
        .await
}

#[tokio::test]
async fn whole_cpus_are_given_to_one_each_and_freed() {
    let home = tempfile::tempdir().expect("temp");
    // Two processes of one home, as far as the ledger knows.
    let (one, two) = (
        pinning(home.path(), &[0, 1, 4, 5]),
        pinning(home.path(), &[0, 1, 4, 5]),
    );
    let plain = take(&one, 1).await;
    assert_eq!(plain.cpus(), [0_u32; 0]);
    let first = pin(&one, 2).await.expect("two CPUs");
    let second = pin(&two, 1).await.expect("a third");
    assert_eq!((first.cpus(), second.cpus()), (&[5, 4][..], &[1][..]));
    // The last one has the machine that shares: only its share of the capacity is left.
    let third = pin(&two, 1)
        .await
        .expect_err("no whole CPU's worth is left");
    assert!(third.to_string().contains("CPUs"), "{third}");
    drop(plain);
    let third = pin(&two, 1).await.expect("now it is");
    assert_eq!(third.cpus(), [0]);
    let none = one
        .acquire(need(1), "shares", Duration::from_millis(50), |_| {})
        .await;
    assert!(none.is_err(), "nothing is left to share");
    drop(first);
    let again = pin(&two, 2).await.expect("given back");
    assert_eq!(again.cpus(), [5, 4]);
    drop((second, third, again));
    assert!(
        !home.path().join("ledger/pinned").exists(),
        "nobody has any"
    );
}

#[tokio::test]
async fn more_whole_cpus_than_there_are_can_never_be_given() {
    let home = tempfile::tempdir().expect("temp");
    let refused = pin(&pinning(home.path(), &[0, 1]), 3).await;
    assert!(matches!(refused, Err(LedgerError::NeverFits { .. })));
}

#[test]
fn what_is_no_file_is_no_entry_and_waited_for_by_nobody() {
    use crate::own_file::tests::{fifo, in_time};

    let home = tempfile::tempdir().expect("temp");
    let dir = home.path().join("ledger");
    std::fs::create_dir(&dir).expect("dir");
    let theirs = home.path().join("theirs");
    std::fs::write(&theirs, "precious").expect("write");
    let lease = dir.join("lease-00000000000000000001-00000000.json");
    let wait = dir.join("wait-00000000000000000002-00000000.json");
    fifo(&lease);
    std::os::unix::fs::symlink(&theirs, &wait).expect("link");
    let list = || {
        let book = Book::new(dir.clone(), Need::default(), BTreeSet::new());
        in_time(move || book.list())
    };
    assert_eq!(list().expect("list"), []);
    assert!(!lease.exists() && !wait.is_symlink());
    assert!(theirs.exists(), "the link went, not what it led to");
    let lock = dir.join("lock");
    std::fs::remove_file(&lock).expect("the lock");
    fifo(&lock);
    assert!(matches!(list(), Err(LedgerError::Io { .. })));
}
