//! A command that takes all memory ends soon and is reported; one that only fills the page cache goes on.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_proto::msg::GuestEvent;
use kiln_proto::stream::Incoming;

use crate::host::{exec, request, sh, shell};
use crate::vm::{Spec, Vm};

/// From the start of a hog to the report of its end. One that nobody ends thrashes for as long as it may; the rest is for an
/// emulated machine on a busy host, which was seen to take 18 s.
const HOG_MAX: Duration = Duration::from_secs(90);
const MIB: u64 = 1 << 20;

/// Keeps the groups that the guest tells of.
fn listen(mut incoming: Incoming) -> Arc<Mutex<Vec<String>>> {
    let told = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&told);
    tokio::spawn(async move {
        let Some(mut events) = incoming.next().await.map(|inbound| inbound.stream) else {
            return;
        };
        while let Ok(event) = kiln_proto::codec::read_msg(&mut events, 65536).await {
            match event {
                GuestEvent::OomKill { cgroup, .. } => keep.lock().unwrap().push(cgroup),
                other => println!("{other:?}"),
            }
        }
    });
    told
}

#[tokio::test]
async fn hogs_end_soon_and_page_cache_is_no_hog() {
    let Some(vm) = Vm::start(&Spec {
        root: true,
        memory_mib: 256,
        ..Spec::default()
    }) else {
        return;
    };
    let (session, _, incoming) = vm.session().await;
    let told = listen(incoming);
    // Twice many files of the root through a bound that holds a part of them, with half of it taken.
    let mut reader = shell(
        "perl -e '$x = \"x\" x 8e6; for (1..2) { system(\"cat /usr/bin/[a-m]* > /dev/null\") }'",
    );
    reader.memory_max = 32 * MIB;
    let begun = Instant::now();
    let ran = exec(&session, &reader, &[]).await;
    println!("page cache: {:?}, {:?}", begun.elapsed(), ran.exit);
    let exit = ran.exit.unwrap();
    assert_eq!((exit.code, exit.oom), (Some(0), false), "{exit:?}");
    assert!(told.lock().unwrap().is_empty());
    // The bound of a command, that of the whole workload, and a hog that forked.
    let hogs = [
        (48 * MIB, "exec tail /dev/zero"),
        (0, "exec tail /dev/zero"),
        (
            48 * MIB,
            "tail /dev/zero & tail /dev/zero & wait; sleep 1000",
        ),
        (
            40 * MIB,
            "head -c 1000000000 /dev/zero > /dev/shm/full; sleep 1000",
        ),
    ];
    for (number, (bound, script)) in hogs.into_iter().enumerate() {
        let mut hog = shell(script);
        hog.memory_max = bound;
        let begun = Instant::now();
        let exit = exec(&session, &hog, &[]).await.exit.unwrap();
        let took = begun.elapsed();
        println!("{script}: {took:?}, {exit:?}");
        assert!(exit.oom && exit.code != Some(0), "{exit:?}");
        assert!(took < HOG_MAX, "{script} took {took:?}");
        let deadline = Instant::now() + Duration::from_secs(60);
        while told.lock().unwrap().len() <= number {
            assert!(Instant::now() < deadline, "no event for {script}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        sh(&session, "rm -f /dev/shm/full").await.ok();
    }
    let told = told.lock().unwrap().clone();
    println!("{told:?}");
    let fine = |group: &String| group.starts_with("exec-") || group.is_empty();
    assert!(told.iter().all(fine), "{told:?}");
    assert!(exec(&session, &request(&["true"]), &[]).await.exit.is_ok());
}
