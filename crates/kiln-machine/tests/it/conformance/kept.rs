//! Machines that outlive their owner: who may adopt them, what they can afterwards, and when they go.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kiln_core::{DiskRole, MachineName, MachineSpec};
use kiln_machine::bring_up::{self, BringUpError, Deadlines, FalseAnswer, Ready};
use kiln_machine::driver::{
    AdoptError, Kept, Machine, MachineError, MachineState, Start, StopReason,
};
use kiln_machine::sim::SimConfig;
use kiln_proto::msg::{Order, kind};
use kiln_proto::read_chunk;

use super::under_test::UnderTest;
use crate::child::{Role, say, wait_to_be_killed};
use crate::host::{Host, request};

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(3600);

fn in_ms(from_now: Duration) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let then = now.expect("clock") + from_now;
    u64::try_from(then.as_millis()).expect("fits")
}

fn kept_spec(test: &UnderTest, name: &str) -> MachineSpec {
    MachineSpec {
        keepable: true,
        ..test.spec(name)
    }
}

fn deadlines(test: &UnderTest) -> Deadlines {
    Deadlines {
        clone_hello: test.deadline,
        order: test.deadline,
    }
}

/// A machine that is ready, and kept from now on.
async fn ready(test: &UnderTest, spec: &MachineSpec) -> Ready {
    let started = bring_up::start(&*test.driver, spec, &Start::Cold, deadlines(test)).await;
    let ready = started.expect("ready");
    assert_eq!(ready.machine.kept(), None, "nobody said so");
    let kept = Kept {
        until_unix_ms: in_ms(LONG),
        identity: ready.identity.clone(),
    };
    ready.machine.keep(kept).expect("kept");
    ready
}

async fn adopted(test: &UnderTest, name: &MachineName) -> (Arc<dyn Machine>, Host) {
    let ready = bring_up::adopt(&*test.driver, name, deadlines(test)).await;
    let ready = ready.expect("adopted");
    let machine = Arc::clone(&ready.machine);
    let host = Host::of(ready.session, ready.hello, ready.incoming, test.deadline);
    (machine, host)
}

/// The child's part: a kept machine with a command that runs; then it waits to be killed.
pub(crate) fn play(kind: &str, home: &Path, name: &str) {
    let test = UnderTest::named(kind, home, SimConfig::default());
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    runtime.block_on(async {
        let mut spec = kept_spec(&test, "child");
        spec.name = super::under_test::machine_name(name);
        spec.disks.push(UnderTest::new_disk(DiskRole::Scratch));
        let ready = ready(&test, &spec).await;
        let host = Host::of(ready.session, ready.hello, ready.incoming, test.deadline);
        begin_long_command(&host).await;
        say("kept");
        wait_to_be_killed();
    });
}

/// A command that runs as long as its session: its first output is awaited.
async fn begin_long_command(host: &Host) {
    let endless = request(&["head", "-c", "1000000000", "/dev/zero"]);
    let mut stream = host.open(kind::EXEC, &endless).await.expect("opened");
    let piece = read_chunk(&mut stream).await.expect("output");
    assert!(piece.is_some());
    // Dropping the stream would end the command.
    std::mem::forget(stream);
}

/// Makes a kept machine whose owner then dies without a word.
async fn orphan(test: &UnderTest) -> MachineName {
    let mut spec = kept_spec(test, "orphan");
    spec.disks.push(UnderTest::new_disk(DiskRole::Scratch));
    let name = spec.name.clone();
    if test.kind == "sim" {
        // Its guest lives in this process, which has to live on.
        let ready = ready(test, &spec).await;
        let host = Host::of(ready.session, ready.hello, ready.incoming, test.deadline);
        begin_long_command(&host).await;
        let owned = test.driver.adopt(&name).await;
        assert!(matches!(owned, Err(AdoptError::Owned(_))), "{owned:?}");
        test.abandon(&name);
        return name;
    }
    let home = test.home.to_str().expect("utf-8");
    let mut child = Role::start(&["keeper", test.kind, home, name.as_str()]);
    child.wait_for("kept");
    let owned = test.driver.adopt(&name).await;
    assert!(matches!(owned, Err(AdoptError::Owned(_))), "{owned:?}");
    child.kill();
    name
}

pub(crate) async fn kept_survives_its_owner(test: &UnderTest) {
    let name = orphan(test).await;
    for _ in 0..2 {
        let report = test.driver.reap().await;
        assert!(
            report.reaped.is_empty() && report.leaks.is_empty(),
            "{report:?}"
        );
    }
    assert_eq!(test.driver.adoptable().await, std::slice::from_ref(&name));
    let again = test
        .driver
        .launch(&kept_named(test, &name), Start::Cold)
        .await;
    assert!(again.is_err(), "its name is taken");
    let (machine, host) = adopted(test, &name).await;
    assert_eq!(machine.state(), MachineState::Running);
    assert_eq!(test.driver.adoptable().await, []);
    assert!(test.driver.reap().await.reaped.is_empty());
    let ran = host.exec(&["uname", "-s"]).await.expect("ran");
    assert_eq!(ran.text(), "Linux");
    if test.kind == "qemu" {
        // The command of the dead owner's session ended with it.
        let running = "cat /proc/[0-9]*/comm | grep -cx head; true";
        let ran = host.exec(&["sh", "-c", running]).await.expect("ran");
        assert_eq!(ran.text(), "0");
    }
    machine.stats().await.expect("stats");
    assert_eq!(machine.name(), &name);
    let added = test.fork_of(DiskRole::State, "head.img");
    machine.attach_disk(&added).await.expect("added");
    // Once more, with the disk that came later.
    drop(host);
    machine.release().expect("released");
    let released = MachineState::Stopped(StopReason::Released);
    assert_eq!(
        (machine.state(), machine.stopped().await),
        (released, released)
    );
    assert!(machine.channel().await.is_err() && machine.release().is_err());
    assert!(
        machine.destroy().await.leaks.is_empty(),
        "another's to destroy"
    );
    drop(machine);
    let (machine, host) = adopted(test, &name).await;
    host.mount(DiskRole::State.serial(), false)
        .await
        .expect("it is there");
    let _ = host.call(&Order::Shutdown).await;
    let state = machine.stop(test.deadline).await;
    assert_eq!(state, MachineState::Stopped(StopReason::PoweredOff));
    let disk = machine.take_disk(DiskRole::State).expect("its writes");
    assert!(disk.is_file());
    test.destroy(&*machine).await;
    let gone = test.driver.adopt(&name).await;
    assert!(matches!(gone, Err(AdoptError::Unknown(_))), "{gone:?}");
}

fn kept_named(test: &UnderTest, name: &MachineName) -> MachineSpec {
    MachineSpec {
        name: name.clone(),
        ..kept_spec(test, "same")
    }
}

pub(crate) async fn one_of_many_adopters_wins(test: &UnderTest) {
    let spec = kept_spec(test, "race");
    let ready = ready(test, &spec).await;
    drop((ready.session, ready.incoming));
    ready.machine.release().expect("released");
    for _ in 0..3 {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..6 {
            let (driver, name) = (Arc::clone(&test.driver), spec.name.clone());
            tasks.spawn(async move { driver.adopt(&name).await });
        }
        let mut won = Vec::new();
        for result in tasks.join_all().await {
            match result {
                Ok(machine) => won.push(machine),
                Err(AdoptError::Owned(_)) => {}
                Err(error) => panic!("{error:?}"),
            }
        }
        assert_eq!(won.len(), 1);
        won[0].release().expect("released");
    }
    // One who takes it for another guest than it is.
    let machine = test.driver.adopt(&spec.name).await.expect("adopted");
    let mut kept = machine.kept().expect("kept");
    assert_eq!(kept.identity, ready.identity);
    kept.identity.boot_id = kept.identity.boot_id.replace(char::is_alphanumeric, "0");
    machine.keep(kept).expect("kept");
    machine.release().expect("released");
    let refused = bring_up::adopt(&*test.driver, &spec.name, deadlines(test)).await;
    let expected = |error: &BringUpError| {
        matches!(error, BringUpError::False(FalseAnswer::NotTaken("boot id")))
    };
    assert!(refused.as_ref().is_err_and(expected), "{refused:?}");
    assert_eq!(test.leftovers(spec.name.as_str()), [""; 0]);
}

pub(crate) async fn kept_until_its_time_is_over(test: &UnderTest) {
    let spec = kept_spec(test, "time");
    let ready = ready(test, &spec).await;
    let identity = ready.identity.clone();
    drop((ready.session, ready.incoming));
    let kept = |from_now| Kept {
        until_unix_ms: in_ms(from_now),
        identity: identity.clone(),
    };
    let far = ready.machine.keep(kept(100 * LONG));
    assert!(matches!(far, Err(MachineError::Control { .. })), "{far:?}");
    let short = Duration::from_millis(300);
    ready.machine.keep(kept(short)).expect("kept");
    let over = Instant::now() + short + Duration::from_millis(50);
    tokio::time::sleep(over.saturating_duration_since(Instant::now())).await;
    let report = test.driver.reap().await;
    assert!(report.reaped.is_empty(), "its owner lives: {report:?}");
    ready.machine.release().expect("released");
    drop(ready.machine);
    let late = test.driver.adopt(&spec.name).await;
    assert!(matches!(late, Err(AdoptError::Expired(_))), "{late:?}");
    assert_eq!(test.driver.adoptable().await, []);
    let report = test.driver.reap().await;
    assert_eq!(report.reaped, [spec.name.as_str()]);
    assert_eq!(report.leaks, [""; 0]);
    assert_eq!(test.leftovers(spec.name.as_str()), [""; 0]);
}

pub(crate) async fn adoption_is_refused_by_reason(test: &UnderTest) {
    let unknown = test.driver.adopt(&kept_spec(test, "nobody").name).await;
    assert!(
        matches!(unknown, Err(AdoptError::Unknown(_))),
        "{unknown:?}"
    );
    // Kept, then ended while nobody owned it.
    let spec = kept_spec(test, "gone");
    let ready = ready(test, &spec).await;
    let late = Kept {
        until_unix_ms: 1,
        identity: ready.identity.clone(),
    };
    let late = ready.machine.keep(late);
    assert!(
        matches!(&late, Err(MachineError::Control { command, .. }) if command == "keep"),
        "{late:?}"
    );
    drop((ready.session, ready.incoming));
    ready.machine.release().expect("released");
    test.kill_vmm(&*ready.machine);
    let end = Instant::now() + test.deadline;
    while !test.driver.adoptable().await.is_empty() {
        assert!(Instant::now() < end, "its end does not show");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let gone = test.driver.adopt(&spec.name).await;
    assert!(matches!(gone, Err(AdoptError::Gone { .. })), "{gone:?}");
    assert_eq!(test.leftovers(spec.name.as_str()), [""; 0]);
}

/// An owner that is killed before its machine was made ready: nobody may adopt it, the reaper removes it at once.
pub(crate) async fn not_kept_before_it_is_ready(test: &UnderTest) {
    for moment in ["dir", "launching", "running", "hello"] {
        let name = test.spec(moment).name;
        let home = test.home.to_str().expect("utf-8");
        let mut child = Role::start(&["machine-to-keep", test.kind, home, name.as_str(), moment]);
        match moment {
            "hello" => child.wait_for(moment),
            early => super::crash::wait_for_record(test, &name, early),
        }
        child.kill();
        assert_eq!(test.driver.adoptable().await, []);
        match test.driver.adopt(&name).await {
            Err(AdoptError::NotKept(_) | AdoptError::Unknown(_)) => {}
            other => panic!("{moment}: {other:?}"),
        }
        let report = test.driver.reap().await;
        assert!(report.leaks.is_empty(), "{moment}: {report:?}");
        assert_eq!(test.leftovers(name.as_str()), [""; 0], "{moment}");
    }
}

/// An adopter that stops half-way leaves the machine to the next.
pub(crate) async fn adoption_given_up_changes_nothing(test: &UnderTest) {
    let spec = kept_spec(test, "half");
    let ready = ready(test, &spec).await;
    drop((ready.session, ready.incoming));
    ready.machine.release().expect("released");
    drop(ready.machine);
    for micros in [0, 100, 500, 1000, 3000, 10_000] {
        let adoption = bring_up::adopt(&*test.driver, &spec.name, deadlines(test));
        let cut = tokio::time::timeout(Duration::from_micros(micros), adoption).await;
        if let Ok(done) = cut {
            done.expect("adopted").machine.release().expect("released");
        }
        let end = Instant::now() + test.deadline;
        while test.driver.adoptable().await.is_empty() {
            assert!(Instant::now() < end, "lost after {micros} µs");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    let (machine, host) = adopted(test, &spec.name).await;
    assert_eq!(
        host.exec(&["uname", "-s"]).await.expect("ran").text(),
        "Linux"
    );
    test.destroy(&*machine).await;
}
