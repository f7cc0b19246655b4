use super::*;

fn candidate<'a>(file: &'a Path, stands_on: Option<&'a Head>) -> Candidate<'a> {
    Candidate {
        file,
        stands_on,
        written_by: "b1/1".to_owned(),
        buildkit: "v1".to_owned(),
        now_unix_ms: 1,
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    store: HeadStore,
    shared: Head,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().expect("temp dir");
    let store = HeadStore::open(&dir.path().join("heads")).expect("store");
    let shared = store
        .seal_shared(&candidate(&file(&dir, "base"), None))
        .expect("sealed");
    Fixture { dir, store, shared }
}

fn file(dir: &tempfile::TempDir, text: &str) -> PathBuf {
    let path = dir.path().join(text);
    fs::write(&path, text).expect("write");
    path
}

fn committed(commit: Commit) -> Head {
    match commit {
        Commit::Committed(head) => head,
        Commit::LostRace { current } => panic!("lost against {current:?}"),
    }
}

#[test]
fn two_builds_fork_one_head_and_one_of_them_wins() {
    let f = fixture();
    let fork = f
        .store
        .to_fork("local", "v1")
        .expect("read")
        .expect("shared");
    assert_eq!(fork, f.shared);
    let (first, second) = (file(&f.dir, "first"), file(&f.dir, "second"));
    let won = committed(
        f.store
            .commit("local", Some(&fork), &candidate(&first, Some(&fork)))
            .expect("io"),
    );
    let lost = f
        .store
        .commit("local", Some(&fork), &candidate(&second, Some(&fork)))
        .expect("io");
    assert_eq!(
        lost,
        Commit::LostRace {
            current: Some(won.id.clone())
        }
    );
    assert!(second.exists(), "the loser's overlay stays the caller's");
    assert_eq!(
        f.store.to_fork("local", "v1").expect("read").map(|h| h.id),
        Some(won.id.clone())
    );
    let next = committed(
        f.store
            .commit("local", Some(&won), &candidate(&second, Some(&won)))
            .expect("io"),
    );
    assert_eq!(f.store.chain(&next).expect("chain").len(), 3);
    let flat = file(&f.dir, "flat");
    let flat = committed(
        f.store
            .commit("local", Some(&next), &candidate(&flat, Some(&f.shared)))
            .expect("io"),
    );
    assert_eq!(
        (
            flat.depth,
            flat.follows.clone(),
            f.store.chain(&flat).expect("chain").len()
        ),
        (1, Some(next.id), 2)
    );
}

#[test]
fn what_a_tenant_cached_is_forked_by_no_other() {
    let f = fixture();
    let own = f
        .store
        .commit(
            "acme",
            Some(&f.shared),
            &candidate(&file(&f.dir, "own"), Some(&f.shared)),
        )
        .expect("io");
    let own = committed(own);
    let forks = |tenant: &str| f.store.to_fork(tenant, "v1").expect("read").map(|h| h.id);
    assert_eq!(forks("acme"), Some(own.id));
    for other in ["local", "acm", "acme2", SHARED] {
        assert_eq!(forks(other), Some(f.shared.id.clone()), "{other}");
    }
}

#[test]
fn a_new_shared_head_or_buildkit_starts_a_tenant_over() {
    let f = fixture();
    let own = f
        .store
        .commit(
            "local",
            Some(&f.shared),
            &candidate(&file(&f.dir, "own"), Some(&f.shared)),
        )
        .expect("io");
    let own = committed(own);
    assert_eq!(
        f.store.to_fork("local", "v2").expect("read").map(|h| h.id),
        Some(f.shared.id.clone())
    );
    let shared = f
        .store
        .seal_shared(&candidate(&file(&f.dir, "base2"), None))
        .expect("sealed");
    assert_eq!(
        f.store.to_fork("local", "v1").expect("read").map(|h| h.id),
        Some(shared.id.clone())
    );
    let stale = f
        .store
        .commit(
            "local",
            Some(&own),
            &candidate(&file(&f.dir, "late"), Some(&own)),
        )
        .expect("io");
    let over = f
        .store
        .commit(
            "local",
            Some(&shared),
            &candidate(&file(&f.dir, "over"), Some(&shared)),
        )
        .expect("io");
    assert!(matches!(stale, Commit::Committed(_)) || matches!(over, Commit::Committed(_)));
}

#[test]
fn prune_keeps_what_is_reached_or_pinned() {
    let f = fixture();
    let own = committed(
        f.store
            .commit(
                "local",
                Some(&f.shared),
                &candidate(&file(&f.dir, "own"), Some(&f.shared)),
            )
            .expect("io"),
    );
    let pin = f.store.pin(&own).expect("pin");
    f.store.forget("local").expect("forget");
    assert_eq!(f.store.prune().expect("prune"), 0, "pinned");
    drop(pin);
    assert_eq!(f.store.prune().expect("prune"), 3);
    assert_eq!(
        f.store.list().expect("list").len(),
        1,
        "the shared head stays"
    );
}

#[test]
fn damage_is_found_and_never_used() {
    let f = fixture();
    let disk = f.store.disk(&f.shared);
    fs::remove_file(&disk).expect("remove");
    fs::write(&disk, "bas3").expect("write");
    assert!(matches!(
        f.store.verify(&f.shared),
        Err(HeadError::Corrupt { .. })
    ));
    fs::write(&disk, "longer").expect("write");
    assert!(matches!(
        f.store.current(SHARED),
        Err(HeadError::Corrupt { .. })
    ));
    fs::write(f.store.root.join("shared/HEAD"), "../../etc").expect("write");
    assert!(matches!(
        f.store.current(SHARED),
        Err(HeadError::Damaged { .. })
    ));
}

/// Changes a byte as a failing disk would, in a file that is sealed.
fn rot(path: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).expect("unseal");
    let mut bytes = fs::read(path).expect("read");
    bytes[0] ^= 1;
    fs::write(path, bytes).expect("write");
}

/// A tenant's head on the shared one.
fn own(f: &Fixture, text: &str) -> Head {
    let overlay = file(&f.dir, text);
    let commit = f.store.commit(
        "local",
        Some(&f.shared),
        &candidate(&overlay, Some(&f.shared)),
    );
    committed(commit.expect("io"))
}

#[test]
fn a_corrupt_head_of_a_tenant_is_forgotten_and_the_shared_one_taken() {
    let f = fixture();
    let head = own(&f, "own");
    let fork = f.store.sound_to_fork("local", "v1").expect("read");
    assert_eq!(fork.head.as_ref(), Some(&head));
    assert!(fork.forgotten.is_none());
    rot(&f.store.disk(&head));
    let fork = f.store.sound_to_fork("local", "v1").expect("read");
    assert_eq!(fork.head.as_ref(), Some(&f.shared));
    assert!(
        matches!(fork.forgotten, Some(HeadError::Corrupt { .. })),
        "{fork:?}"
    );
    assert_eq!(
        f.store.current("local").expect("read"),
        None,
        "never used again"
    );
    own(&f, "next");
}

#[test]
fn a_tenants_broken_record_does_not_stop_its_builds() {
    let f = fixture();
    for broken in ["meta.json", "HEAD"] {
        let head = own(&f, broken);
        let scope = f.dir.path().join("heads/local");
        let path = match broken {
            "HEAD" => scope.join("HEAD"),
            name => scope.join(&head.id).join(name),
        };
        fs::write(&path, "{").expect("write");
        let fork = f.store.sound_to_fork("local", "v1").expect("read");
        assert_eq!(fork.head.as_ref(), Some(&f.shared), "{broken}");
        assert!(fork.forgotten.is_some(), "{broken}");
    }
}

#[test]
fn a_corrupt_shared_head_is_refused_under_every_tenant_and_made_again() {
    let f = fixture();
    own(&f, "own");
    rot(&f.store.disk(&f.shared));
    // The tenant's chain ends in the corrupt file, and so does the way around it.
    let refused = f.store.sound_to_fork("local", "v1").expect_err("refused");
    assert!(refused.is_damage(), "{refused}");
    let after = f.store.sound_to_fork("local", "v1").expect("read");
    assert!(after.head.is_none(), "never used: {after:?}");
    let again = f
        .store
        .seal_shared(&candidate(&file(&f.dir, "again"), None))
        .expect("sealed");
    let fork = f.store.sound_to_fork("local", "v1").expect("read");
    assert_eq!(fork.head, Some(again));
}

#[test]
fn a_tenants_scopes_are_its_own_and_neither_reads_the_other() {
    let tenant: TenantName = "acme".parse().expect("a name");
    let (own, plain) = (own_scope(&tenant), plain_scope(&tenant));
    let odd: TenantName = SHARED.parse().expect("a name");
    let scopes = [
        own.clone(),
        plain.clone(),
        own_scope(&odd),
        plain_scope(&odd),
    ];
    let names: std::collections::BTreeSet<&str> = scopes.iter().map(String::as_str).collect();
    assert!(names.len() == 4 && !names.contains(SHARED), "{names:?}");
    assert_eq!(
        scopes.each_ref().map(|scope| tenant_of(scope)),
        [
            Some(tenant.clone()),
            Some(tenant),
            Some(odd.clone()),
            Some(odd)
        ]
    );
    assert_eq!(tenant_of(SHARED), None);
    let f = fixture();
    let disk = file(&f.dir, "with a secret");
    let head = f
        .store
        .commit(&own, Some(&f.shared), &candidate(&disk, Some(&f.shared)));
    let head = committed(head.expect("io"));
    let fork = |scope: &str| f.store.sound_to_fork(scope, "v1").expect("reads").head;
    assert_eq!(fork(&own), Some(head.clone()));
    assert_eq!(fork(&plain), Some(f.shared.clone()));
    // Nor does what stands on it get there.
    let next = file(&f.dir, "without one");
    let lost = f
        .store
        .commit(&plain, Some(&head), &candidate(&next, Some(&head)));
    assert!(matches!(lost, Ok(Commit::LostRace { .. })), "{lost:?}");
    let next = f
        .store
        .commit(&plain, Some(&f.shared), &candidate(&next, Some(&f.shared)));
    let next = committed(next.expect("io"));
    assert_eq!((fork(&plain), fork(&own)), (Some(next), Some(head)));
    f.store.prune().expect("prunes");
    assert_eq!(f.store.list().expect("lists").len(), 3);
}
