//! What a worker prepares while nothing runs, and that it stops at once.

use std::time::Duration;

use kiln_core::job::Limits;
use kiln_core::{ByteSize, TenantName};
use kiln_image::heads::{Candidate, Commit, Head, SHARED};
use kiln_machine::sim::{Fault, Step, Trouble};
use kiln_worker::event::Events;
use kiln_worker::fleet::idle::{Done, Recent, prepare_next};

use crate::workshop::{Guest, Workshop};

fn recent() -> Recent {
    let mut recent = Recent::default();
    let limits = Limits {
        cpus: 1,
        memory: ByteSize::mib(512),
        disk: ByteSize::gib(1),
        timeout_ms: 60_000,
    };
    recent.built("local", &limits);
    recent
}

fn events() -> Events {
    let (events, mut told) = Events::channel();
    tokio::spawn(async move { while told.recv().await.is_some() {} });
    events
}

/// The tenant's next head, as a build would leave it.
fn commit(shop: &Workshop, number: u64) -> Head {
    let (heads, tenant) = (&shop.host.heads, TenantName::local());
    let forked = heads.to_fork(tenant.as_str(), "v0").expect("readable");
    let forked = forked.expect("a head");
    let file = shop.host.home.heads().join(format!("next-{number}"));
    std::fs::write(&file, format!("overlay {number}")).expect("write");
    let candidate = Candidate {
        file: &file,
        stands_on: Some(&forked),
        written_by: "test".to_owned(),
        buildkit: "v0".to_owned(),
        now_unix_ms: number,
    };
    let parent = (forked.scope != SHARED).then_some(&forked);
    match heads.commit(tenant.as_str(), parent, &candidate) {
        Ok(Commit::Committed(head)) => head,
        other => panic!("{other:?}"),
    }
}

fn on_heads(shop: &Workshop) -> Vec<String> {
    let listed = shop.host.templates.list().expect("a list");
    let keys = listed.into_iter().filter_map(|template| template.key);
    let heads = keys.flat_map(|key| key.heads.into_iter().map(|(_, head)| head));
    heads.collect()
}

#[tokio::test]
async fn the_template_of_the_last_head_is_prepared_once_and_replaces_the_one_before() {
    let shop = Workshop::open_with(Guest::Honest, true).await;
    let (recent, events) = (recent(), events());
    let next = || prepare_next(&shop.host, &recent, &events);
    let done = next().await.expect("looks");
    assert_eq!(done, Done::Nothing, "no head of the tenant yet");
    let mut before: Option<String> = None;
    for number in 1..3 {
        let head = commit(&shop, number).id;
        assert_eq!(next().await.expect("prepares"), Done::Made);
        let now = on_heads(&shop);
        assert!(now.contains(&head), "{now:?}");
        assert!(
            before.iter().all(|old| !now.contains(old)),
            "{before:?} {now:?}"
        );
        assert_eq!(next().await.expect("looks"), Done::Nothing);
        before = Some(head);
    }
}

#[tokio::test]
async fn a_job_that_comes_ends_the_preparation_and_nothing_is_left() {
    let shop = Workshop::open_with(Guest::Honest, true).await;
    let (recent, events) = (recent(), events());
    commit(&shop, 1);
    let before = shop.host.templates.list().expect("a list").len();
    // It never gets ready.
    shop.driver
        .inject_always(Fault::At(Step::StartBuildkit, Trouble::Silent));
    let machines = shop.host.home.data.join("machines");
    let comes = async {
        loop {
            let entries = std::fs::read_dir(&machines).into_iter().flatten().flatten();
            let mut names = entries.map(|entry| entry.file_name());
            if names.any(|name| name != ".lock") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::select! {
        done = prepare_next(&shop.host, &recent, &events) => panic!("{done:?}"),
        () = comes => {}
    }
    let held = shop.host.ledger.list().await.expect("a list");
    assert!(held.is_empty(), "{held:?}");
    assert_eq!(shop.host.templates.list().expect("a list").len(), before);
    shop.assert_left(&[], "given up").await;
}
