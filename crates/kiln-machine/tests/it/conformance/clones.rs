//! Templates and their clones.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_core::DiskRole;
use kiln_machine::driver::Start;
use kiln_machine::template::{Progress, PrunePolicy};
use kiln_proto::msg::Order;

use super::under_test::UnderTest;
use crate::host::{Failed, Host, identity, request};

/// Siblings of one template.
const SIBLINGS: usize = 8;
/// How far a clone's clock may be off right after it was set.
const CLOCK_SLACK: Duration = Duration::from_secs(10);

/// What a clone shows of its identity.
#[derive(Debug)]
struct Shown {
    random: Vec<u8>,
    uuid: String,
    machine_id: String,
    boot_id: String,
    hostname: String,
    clock_off: Duration,
}

async fn show(host: &Host) -> Shown {
    let ran = async |argv: &[&str]| host.exec(argv).await.expect("ran");
    let random = ran(&["head", "-c", "32", "/dev/urandom"]).await.stdout;
    let wall = ran(&["date", "+%s%N"]).await.text();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("clock")
        .as_nanos();
    let wall: u128 = wall.parse().expect("nanoseconds");
    let off = Duration::from_nanos(u64::try_from(now.abs_diff(wall)).expect("fits"));
    Shown {
        random,
        uuid: ran(&["cat", "/proc/sys/kernel/random/uuid"]).await.text(),
        machine_id: ran(&["cat", "/etc/machine-id"]).await.text(),
        boot_id: ran(&["cat", "/proc/sys/kernel/random/boot_id"])
            .await
            .text(),
        hostname: ran(&["hostname"]).await.text(),
        clock_off: off,
    }
}

pub(crate) async fn clone_identity(test: &UnderTest) {
    let spec = test.spec("origin");
    let (origin, host) = test.boot_spec(&spec).await;
    let template = test.template_of(&spec, &*origin, host).await;
    test.destroy(&*origin).await;
    let mut clones = Vec::new();
    for number in 0..SIBLINGS {
        let spec = test.spec(&format!("c{number}"));
        let (machine, host) = test.clone_of(&template, &spec).await;
        host.call(&Order::Thaw).await.expect("thawed");
        clones.push((machine, host));
    }
    let mut shown = Vec::new();
    for (_, host) in &clones {
        shown.push(show(host).await);
    }
    let distinct = |texts: Vec<String>| texts.into_iter().collect::<BTreeSet<_>>().len();
    let of = |field: fn(&Shown) -> String| distinct(shown.iter().map(field).collect());
    assert_eq!(
        of(|s| hex::encode(&s.random)),
        SIBLINGS,
        "random bytes repeat"
    );
    assert_eq!(of(|s| s.uuid.clone()), SIBLINGS, "UUIDs repeat");
    assert_eq!(of(|s| s.machine_id.clone()), SIBLINGS, "machine-ids repeat");
    assert_eq!(of(|s| s.boot_id.clone()), SIBLINGS, "boot ids repeat");
    for ((machine, _), shown) in clones.iter().zip(&shown) {
        assert_eq!(shown.hostname, machine.name().as_str());
        assert_eq!(shown.random.len(), 32);
        assert!(shown.clock_off < CLOCK_SLACK, "{shown:?}");
    }
    for (machine, _) in &clones {
        test.destroy(&**machine).await;
    }
    let store = test.templates();
    let everything = PrunePolicy {
        bytes_max: 0,
        unused_max: Duration::ZERO,
    };
    assert_eq!(store.prune(everything).expect("pruned").removed, [""; 0]);
    drop((template, clones));
    // A child that another test is just starting may have the lock for a moment longer.
    let end = tokio::time::Instant::now() + test.deadline;
    while store.prune(everything).expect("pruned").removed.is_empty() {
        assert!(tokio::time::Instant::now() < end, "never pruned");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(store.list().expect("listed"), []);
}

pub(crate) async fn nothing_runs_before_thaw(test: &UnderTest) {
    let spec = test.spec("origin");
    let (origin, host) = test.boot_spec(&spec).await;
    let template = test.template_of(&spec, &*origin, host).await;
    let (machine, host) = test.clone_of(&template, &test.spec("frozen")).await;
    for trusted in [false, true] {
        let mut early = request(&["echo", "ran"]);
        early.trusted = trusted;
        let early = host.exec_with(early, b"").await;
        assert!(matches!(early, Err(Failed::Refused(_))), "{early:?}");
    }
    let again = host.reidentify(&identity("again")).await.expect("answers");
    assert_eq!(again.workload_ran, 0);
    host.call(&Order::Thaw).await.expect("thawed");
    assert_eq!(
        host.exec(&["echo", "ran"]).await.expect("ran").text(),
        "ran"
    );
    test.destroy(&*machine).await;
}

pub(crate) async fn template_disks_are_frozen_with_it(test: &UnderTest) {
    let mut spec = test.spec("origin");
    spec.disks.push(test.fork_of(DiskRole::State, "head.img"));
    let (origin, host) = test.boot_spec(&spec).await;
    let path = host.mount("kiln-state", false).await.expect("mounted");
    let file = format!("{path}/from-template");
    let mut write = request(&["tee", &file]);
    // What prepares a template is kiln's own, not a job's.
    write.trusted = true;
    host.exec_with(write, b"warm").await.expect("ran");
    let template = test.template_of(&spec, &*origin, host).await;
    for _ in 0..2 {
        let mut spec = test.spec("c");
        spec.disks.push(test.fork_of(DiskRole::State, "head.img"));
        let (machine, host) = test.clone_of(&template, &spec).await;
        host.call(&Order::Thaw).await.expect("thawed");
        let ran = host.exec(&["cat", &file]).await.expect("ran");
        assert_eq!(ran.text(), "warm", "mounted, with the template's writes");
        let own = format!("{path}/own");
        let before = host.exec(&["cat", &own]).await.expect("ran");
        assert_ne!(before.exit.code, Some(0), "a sibling's write shows");
        host.exec_with(request(&["tee", &own]), b"mine")
            .await
            .expect("ran");
        test.destroy(&*machine).await;
    }
}

pub(crate) async fn damaged_template_is_removed(test: &UnderTest) {
    let spec = test.spec("origin");
    let (origin, host) = test.boot_spec(&spec).await;
    let held = test.template_of(&spec, &*origin, host).await;
    let template = held.template.clone();
    drop(held);
    let mut files: Vec<_> = fs::read_dir(&template.dir)
        .expect("list")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_none_or(|end| end != "json") || test.kind == "sim")
        .collect();
    files.retain(|path| !path.ends_with("meta.json") && !path.ends_with("seen.json"));
    files.sort_by_key(|path| fs::metadata(path).map_or(0, |meta| meta.len()));
    flip_a_byte(files.last().expect("files"));
    let key = test.template_key(&spec, "test").await;
    let told = Mutex::new(Vec::new());
    let found = test.templates().find(&key, &|progress| {
        told.lock().expect("lock").push(progress);
    });
    assert!(found.expect("looked").is_none(), "never used");
    let told = told.into_inner().expect("lock");
    assert!(
        matches!(told.as_slice(), [Progress::RemovedDamaged(_)]),
        "{told:?}"
    );
    assert!(!template.dir.exists());
    // A clone of what is not there fails and leaves nothing.
    let spec = test.spec("none");
    let launched = test.driver.launch(&spec, Start::Template(template)).await;
    assert!(launched.is_err());
    assert_eq!(test.leftovers(spec.name.as_str()), [""; 0]);
}

fn flip_a_byte(path: &Path) {
    use std::os::unix::fs::FileExt as _;
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("open");
    let at = file.metadata().expect("size").len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 1], at).expect("write");
}
