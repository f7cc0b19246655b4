//! Templates and their clones.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_core::DiskRole;
use kiln_machine::driver::{LaunchError, SpecRefused, Start};
use kiln_machine::template::{Progress, PrunePolicy};
use kiln_proto::msg::Order;

use super::under_test::{CLOCK_SLACK, UnderTest};
use crate::host::{Failed, Host, identity, request};

/// Siblings of one template.
const SIBLINGS: usize = 8;

/// What a machine shows of its identity.
#[derive(Debug)]
struct Shown {
    random: Vec<u8>,
    uuid: String,
    machine_id: String,
    boot_id: String,
    hostname: String,
    /// How far its clock was from the time in which it was asked.
    clock_off: Duration,
}

/// Asks as kiln's own, so that a template may still be made of it.
async fn show(host: &Host) -> Shown {
    let ran = async |argv: &[&str]| {
        let mut request = request(argv);
        request.trusted = true;
        host.exec_with(request, b"").await.expect("ran")
    };
    let random = ran(&["head", "-c", "32", "/dev/urandom"]).await.stdout;
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("clock");
    let before = now().as_nanos();
    let wall = ran(&["date", "+%s%N"]).await.text();
    let after = now().as_nanos();
    let wall: u128 = wall.parse().expect("nanoseconds");
    // However slow the host is, the answer was given in between.
    let off = before.saturating_sub(wall).max(wall.saturating_sub(after));
    Shown {
        random,
        uuid: ran(&["cat", "/proc/sys/kernel/random/uuid"]).await.text(),
        machine_id: ran(&["cat", "/etc/machine-id"]).await.text(),
        boot_id: ran(&["cat", "/proc/sys/kernel/random/boot_id"])
            .await
            .text(),
        hostname: ran(&["hostname"]).await.text(),
        clock_off: Duration::from_nanos(u64::try_from(off).expect("fits")),
    }
}

pub(crate) async fn clone_identity(test: &UnderTest) {
    let spec = test.spec("origin");
    let (origin, host) = test.boot_spec(&spec).await;
    let given = identity(spec.name.as_str());
    host.reidentify(&given).await.expect("an identity");
    host.call(&Order::Thaw).await.expect("thawed");
    let first = show(&host).await;
    let template = test.template_of(&spec, &*origin, host).await;
    test.destroy(&*origin).await;
    let mut clones = Vec::new();
    let mut given = Vec::new();
    for number in 0..SIBLINGS {
        let spec = test.spec(&format!("c{number}"));
        let (machine, host, identity) = test.identified_clone_of(&template, &spec).await;
        host.call(&Order::Thaw).await.expect("thawed");
        clones.push((machine, host));
        given.push(identity);
    }
    let mut shown = Vec::new();
    for ((machine, host), wanted) in clones.iter().zip(&given) {
        let one = show(host).await;
        assert_eq!(one.boot_id, wanted.boot_id, "the one it was given");
        assert_eq!(one.machine_id, wanted.machine_id);
        assert_eq!(one.hostname, machine.name().as_str());
        assert_eq!(one.random.len(), 32);
        assert!(one.clock_off < CLOCK_SLACK, "{one:?}");
        shown.push(one);
    }
    // The template's own are nobody's.
    shown.push(first);
    let distinct = |texts: Vec<String>| texts.into_iter().collect::<BTreeSet<_>>().len();
    let of = |field: fn(&Shown) -> String| distinct(shown.iter().map(field).collect());
    let all = SIBLINGS + 1;
    assert_eq!(of(|s| hex::encode(&s.random)), all, "random bytes repeat");
    assert_eq!(of(|s| s.uuid.clone()), all, "UUIDs repeat");
    assert_eq!(of(|s| s.machine_id.clone()), all, "machine-ids repeat");
    assert_eq!(of(|s| s.boot_id.clone()), all, "boot ids repeat");
    assert_eq!(of(|s| s.hostname.clone()), all, "host names repeat");
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

/// The same file through a link is the same; another file at another place is not, and is said to be so before anything is made.
pub(crate) async fn a_template_of_other_files_is_stale(test: &UnderTest) {
    let mut spec = test.spec("origin");
    spec.disks.push(test.fork_of(DiskRole::State, "head.img"));
    let (origin, host) = test.boot_spec(&spec).await;
    let held = test.template_of(&spec, &*origin, host).await;
    let start = Start::Template(held.template.clone());
    let with = |name: &str, backing: &Path| {
        let mut spec = test.spec(name);
        let mut disk = test.fork_of(DiskRole::State, "head.img");
        disk.backing = Some(backing.to_owned());
        spec.disks.push(disk);
        spec
    };
    let link = test.home.join("a-link");
    std::os::unix::fs::symlink(&test.home, &link).expect("linked");
    let linked = with("linked", &link.join("head.img"));
    assert_eq!(test.driver.validate(&linked, &start), Ok(()));
    let (machine, _host) = test.clone_of(&held, &linked).await;
    test.destroy(&*machine).await;
    let copy = test.home.join("copy.img");
    fs::copy(test.home.join("head.img"), &copy).expect("copied");
    let mut smaller = with("smaller", &test.home.join("head.img"));
    smaller.disks.pop();
    for spec in [with("copied", &copy), smaller] {
        let refused = test.driver.validate(&spec, &start);
        assert!(matches!(refused, Err(SpecRefused::Stale(_))), "{refused:?}");
        let launched = test.driver.launch(&spec, start.clone()).await;
        let error = launched.expect_err("not a clone of it");
        assert!(
            matches!(
                error,
                LaunchError::Template { .. } | LaunchError::Refused(_)
            ),
            "{error:?}"
        );
        assert_eq!(test.leftovers(spec.name.as_str()), [""; 0]);
    }
    test.templates().discard(&held).expect("removed");
    assert!(!held.template.dir.exists());
}

/// How a file may be damaged.
#[derive(Clone, Copy, Debug)]
enum Damage {
    OneBit,
    CutShort,
    Missing,
}

/// Every file of a template, damaged in every way: found at its next use, told in one line, never used, and made again.
pub(crate) async fn damaged_template_is_removed(test: &UnderTest) {
    let mut spec = test.spec("origin");
    spec.disks.push(test.fork_of(DiskRole::State, "head.img"));
    let (origin, host) = test.boot_spec(&spec).await;
    let held = test.template_of(&spec, &*origin, host).await;
    let template = held.template.clone();
    drop(held);
    let key = test.template_key(&spec, "test").await;
    let kept = test.home.join("kept");
    let files = link_all(&template.dir, &kept);
    assert!(files.len() >= 4, "{files:?}");
    for file in &files {
        for damage in [Damage::OneBit, Damage::CutShort, Damage::Missing] {
            let what = format!("{damage:?} {file}");
            let empty = fs::metadata(kept.join(file)).expect("kept").len() == 0;
            if empty && !matches!(damage, Damage::Missing) {
                continue;
            }
            // What was seen in this boot of the host is only a help: without it everything is read.
            let harmless = file == "seen.json";
            damaged(&template.dir.join(file), damage);
            let told = Mutex::new(Vec::new());
            let found = test.templates().find(&key, &|progress| {
                told.lock().expect("lock").push(progress);
            });
            assert_eq!(found.expect("looked").is_some(), harmless, "{what}");
            let told = told.into_inner().expect("lock");
            match told.as_slice() {
                [] => assert!(harmless, "{what}"),
                [Progress::RemovedDamaged(_)] => assert!(!template.dir.exists(), "{what}"),
                other => panic!("{what}: {other:?}"),
            }
            let _ = fs::remove_dir_all(&template.dir);
            link_all(&kept, &template.dir);
        }
    }
    // Whole again, it is used again.
    let found = test.templates().find(&key, &|_| {}).expect("looked");
    drop(found.expect("sound"));
    // A clone of what is not there fails and leaves nothing.
    fs::remove_dir_all(&template.dir).expect("removed");
    let mut none = spec.clone();
    none.name = test.spec("none").name;
    let launched = test.driver.launch(&none, Start::Template(template)).await;
    assert!(launched.is_err());
    assert_eq!(test.leftovers(none.name.as_str()), [""; 0]);
    // And is made again.
    spec.name = test.spec("again").name;
    let (origin, host) = test.boot_spec(&spec).await;
    let held = test.template_of(&spec, &*origin, host).await;
    let mut clone = spec.clone();
    clone.name = test.spec("clone").name;
    let (machine, _host) = test.clone_of(&held, &clone).await;
    test.destroy(&*machine).await;
}

/// Makes a directory with links to all files of another but its lock, which it gets anew; gives their names.
fn link_all(from: &Path, to: &Path) -> Vec<String> {
    fs::create_dir(to).expect("made");
    let mut names = Vec::new();
    for entry in fs::read_dir(from).expect("list").flatten() {
        let name = entry.file_name().into_string().expect("utf-8");
        if name == "lock" {
            File::create_new(to.join(&name)).expect("made");
            continue;
        }
        fs::hard_link(entry.path(), to.join(&name)).expect("linked");
        names.push(name);
    }
    names.sort();
    names
}

/// Damages a file without touching the one it is a link of. Whoever did it hides it: size where it can be, and times, stay.
fn damaged(path: &Path, damage: Damage) {
    use std::os::unix::fs::FileExt as _;
    let modified = fs::metadata(path).expect("there").modified().expect("time");
    let bytes = match damage {
        Damage::Missing => return fs::remove_file(path).expect("removed"),
        Damage::CutShort => Vec::new(),
        Damage::OneBit => fs::read(path).expect("read"),
    };
    let len = bytes.len() as u64;
    fs::remove_file(path).expect("removed");
    let file = File::create_new(path).expect("made");
    file.set_len(len).expect("as long");
    // Page by page, holes left out: a memory file is large and mostly empty.
    for (page, at) in bytes.chunks(4096).zip((0..).step_by(4096)) {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, at).expect("written");
        }
    }
    if let Some(byte) = bytes.get(bytes.len() / 2) {
        file.write_all_at(&[byte ^ 1], len / 2).expect("written");
    }
    file.set_modified(modified).expect("as old");
}
