//! Controllers of one database: what they agree on, who schedules, who keeps a log.

use kiln_core::PoolName;
use kiln_db::{Controller, Settled, Wake};

use crate::on_both;
use crate::support::World;

on_both!(
    a_fact_is_the_first_ones_until_it_is_replaced,
    controllers_know_each_other,
    a_right_that_is_given_back_is_told_and_taken_by_another,
    the_home_of_a_log_moves_with_its_pieces,
);

async fn a_fact_is_the_first_ones_until_it_is_replaced(w: World) {
    assert_eq!(w.db.settled("store").await.expect("reads"), None);
    let settle =
        async |value, replace| w.db.settle("store", value, replace).await.expect("settles");
    assert_eq!(settle("a", false).await, Settled::Same);
    assert_eq!(settle("a", false).await, Settled::Same);
    assert_eq!(settle("b", false).await, Settled::Other("a".to_owned()));
    assert_eq!(settle("b", true).await, Settled::Same);
    let known = w.db.settled("store").await.expect("reads");
    assert_eq!(known.as_deref(), Some("b"));
}

async fn controllers_know_each_other(w: World) {
    let one = |name: &str, url: Option<&str>| Controller {
        id: name.to_owned(),
        process: format!("{name}-1"),
        url: url.map(str::to_owned),
        keys: "k".to_owned(),
        seen_unix_ms: 0,
    };
    let lives = async |one: &Controller| w.db.controller_lives(one).await.expect("says it");
    lives(&one("c1", Some("https://c1"))).await;
    w.advance(5_000);
    lives(&one("c2", None)).await;
    let (all, now) = w.db.controllers().await.expect("lists");
    let seen: Vec<_> = all
        .iter()
        .map(|one| (one.id.as_str(), now - one.seen_unix_ms >= 5_000))
        .collect();
    assert_eq!(seen, [("c2", false), ("c1", true)]);
    // A newer process of the same folder is not told off by the older one's last word.
    let newer = Controller {
        process: "c1-2".to_owned(),
        ..one("c1", Some("https://c1:2"))
    };
    lives(&newer).await;
    w.db.controller_leaves("c1", "c1-1").await.expect("leaves");
    let url = async || {
        let (all, _) = w.db.controllers().await.expect("lists");
        let found = all.into_iter().find(|one| one.id == "c1");
        found.expect("is there").url
    };
    assert_eq!(url().await.as_deref(), Some("https://c1:2"));
    w.db.controller_leaves("c1", "c1-2").await.expect("leaves");
    assert_eq!(url().await, None);
}

async fn a_right_that_is_given_back_is_told_and_taken_by_another(w: World) {
    let pool = PoolName::default_pool();
    let lead = async |holder| w.db.lead(&pool, holder, 10_000).await.expect("answers");
    let own = lead("a").await.expect("is free");
    assert_eq!(lead("b").await, None);
    let mut wakes = w.db.subscribe();
    w.db.resign(&own).await.expect("resigns");
    let told =
        async { while !matches!(wakes.recv().await, Ok(Wake::Lead(told)) if told == pool) {} };
    let told = tokio::time::timeout(std::time::Duration::from_secs(20), told).await;
    told.expect("others are told");
    let next = lead("b").await.expect("is free");
    assert!(next.epoch > own.epoch);
    // What was given back cannot be given back again.
    w.db.resign(&own).await.expect("answers");
    assert_eq!(lead("a").await, None);
}

async fn the_home_of_a_log_moves_with_its_pieces(w: World) {
    let worker = w.worker("w1").await;
    let lease = w.leased("j1", &worker).await;
    let home = async || w.db.log_home(&lease.attempt).await.expect("reads");
    assert_eq!(home().await, None);
    let mark = async |home, from, length| {
        let marked = w.db.log_mark(&lease, home, from, length).await;
        marked.expect("opens")
    };
    assert!(mark("c1", 0, 5).await.taken);
    assert_eq!(home().await.as_deref(), Some("c1"));
    // Another one that is sent it all again keeps it from then on.
    assert!(!mark("c2", 0, 5).await.taken);
    assert_eq!(home().await.as_deref(), Some("c2"));
}
