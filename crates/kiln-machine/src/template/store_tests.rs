use super::super::key::tests::key;
use super::*;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

const FOREVER: Duration = Duration::from_secs(1 << 30);

async fn fill(template: TemplateRef) -> io::Result<()> {
    fs::write(template.dir.join("ram"), vec![7; 100_000])?;
    fs::write(template.dir.join("state"), b"state")
}

async fn made(store: &TemplateStore, name: &str) -> Held {
    store
        .get_or_make(&key(name), &|_| {}, fill)
        .await
        .expect("made")
}

fn store() -> (tempfile::TempDir, TemplateStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = TemplateStore::open(&dir.path().join("templates")).unwrap();
    (dir, store)
}

#[tokio::test]
async fn many_askers_share_one_making() {
    let (_dir, store) = store();
    let makings = Arc::new(AtomicU32::new(0));
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (store, makings) = (store.clone(), Arc::clone(&makings));
            tokio::spawn(async move {
                let make = |template| async move {
                    makings.fetch_add(1, Ordering::SeqCst);
                    tokio::task::yield_now().await;
                    fill(template).await
                };
                store
                    .get_or_make(&key("x"), &|_| {}, make)
                    .await
                    .expect("had")
                    .template
            })
        })
        .collect();
    for task in tasks {
        assert!(task.await.unwrap().dir.join("ram").exists());
    }
    assert_eq!(makings.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_failed_or_dropped_making_leaves_nothing_and_frees_the_turn() {
    let (_dir, store) = store();
    let fail = |template: TemplateRef| async move {
        fs::write(template.dir.join("ram"), b"half")?;
        Err::<(), _>(io::Error::other("no"))
    };
    let failed = store.get_or_make(&key("x"), &|_| {}, fail).await;
    assert!(matches!(failed, Err(MakeError::Make(_))));
    let hang = |_| std::future::pending::<io::Result<()>>();
    let wanted = key("x");
    let dropped = tokio::time::timeout(
        Duration::from_millis(20),
        store.get_or_make(&wanted, &|_| {}, hang),
    );
    assert!(dropped.await.is_err());
    let names: Vec<_> = fs::read_dir(store.root())
        .unwrap()
        .flatten()
        .map(|e| e.file_name())
        .collect();
    assert_eq!(names, [MAKE_DIR]);
    made(&store, "x").await;
}

#[tokio::test]
async fn damage_is_found_removed_and_made_again() {
    let (_dir, store) = store();
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("ram", |dir| {
            let path = dir.join("ram");
            let mut bytes = fs::read(&path).unwrap();
            bytes[50_000] ^= 1;
            fs::write(&path, bytes).unwrap();
        }),
        ("meta.json", |dir| {
            fs::write(dir.join(META_FILE), b"{").unwrap()
        }),
        ("state", |dir| fs::remove_file(dir.join("state")).unwrap()),
        ("lock", |dir| fs::remove_file(dir.join(LOCK_FILE)).unwrap()),
    ];
    for (what, damage) in damages {
        let dir = made(&store, "x").await.template.dir;
        damage(&dir);
        let told = Mutex::new(Vec::new());
        let found = store
            .find(&key("x"), &|p| told.lock().unwrap().push(p))
            .unwrap();
        assert!(found.is_none(), "{what}");
        assert!(
            matches!(told.lock().unwrap()[..], [Progress::RemovedDamaged(_)]),
            "{what}"
        );
        assert!(!dir.exists(), "{what}");
    }
}

#[tokio::test]
async fn a_template_that_its_driver_refuses_goes_unless_it_was_made_anew() {
    let (_dir, store) = store();
    let held = made(&store, "x").await;
    let user = store.find(&key("x"), &|_| {}).unwrap().expect("shared");
    store.discard(&held).unwrap();
    assert!(!held.template.dir.exists());
    let again = made(&store, "x").await;
    // Another process refuses the old one only now.
    store.discard(&user).unwrap();
    assert!(again.template.dir.join("ram").exists());
    assert!(store.find(&key("x"), &|_| {}).unwrap().is_some());
}

#[tokio::test]
async fn digests_are_computed_again_in_another_boot() {
    let (_dir, store) = store();
    let dir = made(&store, "x").await.template.dir;
    let seen = dir.join(SEEN_FILE);
    let text = fs::read_to_string(&seen)
        .unwrap()
        .replace(&proc::boot_id(), "another-boot");
    fs::write(&seen, text).unwrap();
    assert!(store.find(&key("x"), &|_| {}).unwrap().is_some());
    assert!(
        fs::read_to_string(&seen)
            .unwrap()
            .contains(&proc::boot_id())
    );
    assert!(store.scrub().unwrap().is_empty());
}

#[tokio::test]
async fn pruning_spares_what_is_used_and_takes_the_oldest_first() {
    let (_dir, store) = store();
    let old = made(&store, "old").await.template;
    let new = made(&store, "new").await;
    let used = made(&store, "used").await;
    let back = |template: &TemplateRef, hours: u64| {
        let time = SystemTime::now() - Duration::from_secs(hours * 3600);
        File::open(template.dir.join(LOCK_FILE))
            .unwrap()
            .set_modified(time)
            .unwrap();
    };
    back(&used.template, 9);
    back(&old, 8);
    let new = {
        let template = new.template.clone();
        drop(new);
        template
    };
    back(&new, 1);
    let one = store.list().unwrap()[1].bytes;
    assert!(store.list().unwrap().iter().any(|listed| listed.in_use));
    let policy = PrunePolicy {
        bytes_max: 2 * one + one / 2,
        unused_max: FOREVER,
    };
    assert_eq!(store.prune(policy).unwrap().removed, [old.key]);
    let policy = PrunePolicy {
        bytes_max: u64::MAX,
        unused_max: Duration::ZERO,
    };
    assert_eq!(store.prune(policy).unwrap().removed, [new.key]);
    assert!(used.template.dir.exists());
    assert!(lock_for_use(&new_ref(&store, "gone")).is_err());
}

fn new_ref(store: &TemplateStore, id: &str) -> TemplateRef {
    TemplateRef {
        key: id.to_owned(),
        dir: store.root().join(id),
    }
}

#[test]
fn what_is_no_file_is_waited_for_by_nobody() {
    use crate::own_file::tests::{fifo, in_time};

    let (_dir, store) = store();
    let id = "0".repeat(32);
    fs::create_dir(store.root().join(&id)).unwrap();
    for file in [LOCK_FILE, META_FILE] {
        fifo(&store.root().join(&id).join(file));
    }
    let listed = in_time(move || store.list()).unwrap();
    assert_eq!((listed.len(), listed[0].in_use), (1, false));
    assert!(listed[0].key.is_none());
}
