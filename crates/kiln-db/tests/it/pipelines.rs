//! Builds of a pipeline that fail in a row: counted by the database, for all controllers and over restarts.

use std::collections::BTreeMap;

use kiln_core::job::{Source, SourceBuild};
use kiln_core::{Digest, FailureClass, JobKind, Outcome};
use kiln_db::{Database, NewJob, OpenOptions, Retention};

use crate::on_both;
use crate::support::{World, end, failed, job, passed};

on_both!(
    three_in_a_row_count_and_a_pass_ends_it,
    they_are_bounded_and_forgotten
);

fn build(id: &str, name: &str) -> NewJob {
    let mut new = job(id);
    new.request.kind = JobKind::SourceBuild(SourceBuild {
        source: Source::Tree {
            digest: Digest::of(b""),
            size: 0,
        },
        name: name.to_owned(),
        dockerfile: None,
        dockerfile_text: None,
        target: None,
        build_args: BTreeMap::new(),
        secrets: Vec::new(),
        stored_secrets: Vec::new(),
        tags: Vec::new(),
        no_cache: false,
        only_network: false,
        repository_policy: false,
        policy_ref: None,
    });
    new
}

/// Runs a job to its end; gives how many of its pipeline failed in a row.
async fn ended(w: &World, new: NewJob, outcome: Outcome) -> u32 {
    let worker = w.worker("w1").await;
    let id = w.submit_as(new).await;
    let lease = w.claim(id.as_str(), 1, &worker).await;
    let done = w.db.finish(&lease, end(outcome)).await.expect("finishes");
    done.failed_in_a_row
}

async fn three_in_a_row_count_and_a_pass_ends_it(w: World) {
    let user = || failed(FailureClass::User);
    let failing = async || w.db.pipelines_failing(3).await.expect("counts");
    assert_eq!(ended(&w, build("b1", "app"), user()).await, 1);
    assert_eq!(ended(&w, build("b2", "app"), user()).await, 2);
    assert_eq!(ended(&w, build("o1", "other"), user()).await, 1);
    // Runs are no pipeline, whatever they are called.
    assert_eq!(ended(&w, job("r1"), user()).await, 0);
    let stopped = failed(FailureClass::Cancelled);
    assert_eq!(ended(&w, build("b3", "app"), stopped).await, 0);
    assert_eq!(failing().await, 0);
    assert_eq!(ended(&w, build("b4", "app"), user()).await, 3);
    assert_eq!(ended(&w, build("b5", "app"), user()).await, 4);
    assert_eq!(failing().await, 1);
    assert_eq!(ended(&w, build("o2", "other"), passed()).await, 0);
    assert_eq!(ended(&w, build("o3", "other"), user()).await, 1);
    // Another process, or another controller, sees the same.
    if w.is_postgres() {
        let other = w.second().await;
        assert_eq!(other.pipelines_failing(3).await.expect("counts"), 1);
        other.close().await;
        assert_eq!(ended(&w, build("b6", "app"), passed()).await, 0);
        assert_eq!(failing().await, 0);
    } else {
        w.db.close().await;
        let again = Database::open(&w.url, OpenOptions::default()).await;
        let again = again.expect("opens");
        assert_eq!(again.pipelines_failing(4).await.expect("counts"), 1);
        again.close().await;
    }
}

async fn they_are_bounded_and_forgotten(w: World) {
    assert_eq!(
        ended(&w, build("b1", "app"), failed(FailureClass::User)).await,
        1
    );
    let keep = Retention {
        hot_ms: 1_000,
        ..Retention::default()
    };
    w.db.retention_sweep(keep, false).await.expect("sweeps");
    assert_eq!(w.db.pipelines_failing(1).await.expect("counts"), 1);
    w.advance(2_000);
    w.db.retention_sweep(keep, false).await.expect("sweeps");
    assert_eq!(w.db.pipelines_failing(1).await.expect("counts"), 0);
}
