//! Every door checks worker and live epoch, and says in the audit log who was refused.

use kiln_core::lease::LeaseRefused;
use kiln_core::{Digest, Epoch, FailureClass, JobState, Lease, WorkerId};
use kiln_db::{Artifact, Cancelled, DbError, Door, DoorError, DoorKind, LogMark};

use crate::on_both;
use crate::support::{World, class, end, failed, id, passed};

on_both!(
    a_stale_lease_opens_no_door,
    a_lease_of_another_worker_opens_no_door,
    an_expired_lease_opens_no_door,
    a_restore_kills_leases,
    doors_close_when_a_job_is_cancelled,
    a_cancel_wins_only_when_it_came_first,
    logs_go_on_where_they_ended,
    bounds_of_events_and_artifacts_hold,
    an_attempt_that_somebody_attends_is_the_last,
);

fn artifact() -> Artifact {
    Artifact {
        name: "out.tar".to_owned(),
        digest: Digest::of(b"x"),
        size: 1,
        media_type: "application/x-tar".to_owned(),
    }
}

fn door(kind: DoorKind) -> Door {
    Door {
        kind,
        detail: "NPM_TOKEN".to_owned(),
    }
}

const KINDS: [DoorKind; 8] = [
    DoorKind::Source,
    DoorKind::Secret,
    DoorKind::RegistryToken,
    DoorKind::RegistryPush,
    DoorKind::Tag,
    DoorKind::HeadCommit,
    DoorKind::Statement,
    DoorKind::Exec,
];

/// Tries every door; gives why each was closed.
async fn every_door(w: &World, lease: &Lease) -> Vec<LeaseRefused> {
    let db = &w.db;
    let mut answers = vec![
        db.check_lease(lease).await,
        db.started(lease).await,
        db.phase(lease, "guest").await.map(drop),
        db.append_event(lease, "step", serde_json::json!({}))
            .await
            .map(drop),
        db.artifact(lease, &artifact()).await,
        db.log_mark(lease, "c1", 0, 5).await.map(drop),
        db.attend(lease).await.map(drop),
        db.finish(lease, end(passed())).await.map(drop),
    ];
    for kind in KINDS {
        answers.push(db.with_lease(lease, door(kind)).await);
    }
    let refused = answers.into_iter().map(|answer| match answer {
        Err(DoorError::Lease(refused)) => refused,
        other => panic!("a door was open: {other:?}"),
    });
    refused.collect()
}

/// Nothing of the live attempt changed, and every refusal is in the audit log.
async fn nothing_happened(w: &World, state: JobState, refused: usize) {
    let found = w.db.job(&id("b1")).await.expect("reads").expect("is there");
    assert_eq!(found.state, state);
    assert_eq!(found.log_bytes, 0);
    assert!(w.db.artifacts(&id("b1")).await.expect("reads").is_empty());
    let rows = w.db.audit_rows(None, 0, 500).await.expect("reads");
    let noted = rows.iter().filter(|row| !row.entry.allowed).count();
    assert_eq!(noted, refused);
    assert!(rows.iter().all(|row| row.entry.action.starts_with("door.")));
}

async fn a_stale_lease_opens_no_door(w: World) {
    let (one, two) = (w.worker("w1").await, w.worker("w2").await);
    let old = w.leased("b1", &one).await;
    w.advance(20_000);
    assert_eq!(w.sweep().await.expired.len(), 1);
    w.advance(10_000);
    let back = w.db.heartbeat(&two, &crate::support::facts(), &[]).await;
    back.expect("is there");
    // The same attempt number with an older epoch, and an attempt that ended.
    let live = w.claim("b1", 2, &two).await;
    let lie = Lease {
        epoch: Epoch {
            count: old.epoch.count,
            ..live.epoch
        },
        ..live.clone()
    };
    let refused = every_door(&w, &lie).await;
    assert!(
        refused
            .iter()
            .all(|why| matches!(why, LeaseRefused::StaleEpoch { .. })),
        "{refused:?}"
    );
    let more = every_door(&w, &old).await;
    assert!(
        more.iter()
            .all(|why| matches!(why, LeaseRefused::Ended { .. })),
        "{more:?}"
    );
    nothing_happened(
        &w,
        JobState::Leased { attempt: 2 },
        refused.len() + more.len(),
    )
    .await;
    // The live one opens all.
    w.db.started(&live).await.expect("opens");
    for kind in KINDS {
        w.db.with_lease(&live, door(kind)).await.expect("opens");
    }
    let rows = w.db.audit_rows(None, 0, 500).await.expect("reads");
    let allowed: Vec<_> = rows.iter().filter(|row| row.entry.allowed).collect();
    assert_eq!(allowed.len(), KINDS.len());
    assert!(rows.windows(2).all(|pair| pair[0].seq < pair[1].seq));
}

async fn a_lease_of_another_worker_opens_no_door(w: World) {
    let one = w.worker("w1").await;
    let live = w.leased("b1", &one).await;
    let stolen = Lease {
        worker: "w2".parse::<WorkerId>().expect("name"),
        ..live
    };
    let refused = every_door(&w, &stolen).await;
    assert!(
        refused
            .iter()
            .all(|why| matches!(why, LeaseRefused::OtherWorker { .. }))
    );
    nothing_happened(&w, JobState::Leased { attempt: 1 }, refused.len()).await;
}

async fn an_expired_lease_opens_no_door(w: World) {
    let one = w.worker("w1").await;
    let live = w.leased("b1", &one).await;
    w.advance(14_999);
    w.db.check_lease(&live)
        .await
        .expect("lives to the last millisecond");
    w.advance(1);
    // Nobody swept yet: the door looks at the clock itself. What a worker says of its end is later than its end.
    let longer = Lease {
        deadline_unix_ms: u64::MAX,
        ..live
    };
    let refused = every_door(&w, &longer).await;
    assert!(
        refused
            .iter()
            .all(|why| matches!(why, LeaseRefused::Expired { .. }))
    );
    nothing_happened(&w, JobState::Leased { attempt: 1 }, refused.len()).await;
}

async fn a_restore_kills_leases(w: World) {
    let one = w.worker("w1").await;
    let old = w.leased("b1", &one).await;
    let begun = w.db.begin_new_life().await.expect("begins");
    assert_eq!((begun.incarnation, begun.leases_ended), (2, 1));
    w.advance(60_000);
    let live = w.claim("b1", 2, &one).await;
    assert_eq!(live.epoch.incarnation, 2);
    assert!(live.epoch > old.epoch);
    let refused = every_door(&w, &old).await;
    // A former life that counted as far as this one is no match either.
    let twin = Lease {
        epoch: Epoch {
            incarnation: 1,
            ..live.epoch
        },
        ..live.clone()
    };
    let more = every_door(&w, &twin).await;
    assert!(
        more.iter()
            .all(|why| matches!(why, LeaseRefused::StaleEpoch { .. }))
    );
    nothing_happened(
        &w,
        JobState::Leased { attempt: 2 },
        refused.len() + more.len(),
    )
    .await;
}

async fn doors_close_when_a_job_is_cancelled(w: World) {
    let one = w.worker("w1").await;
    let lease = w.leased("b1", &one).await;
    w.db.started(&lease).await.expect("starts");
    let asked =
        w.db.cancel(&id("b1"), "user:x", None)
            .await
            .expect("cancels");
    assert_eq!(asked, Cancelled::Asked);
    let again =
        w.db.cancel(&id("b1"), "user:y", None)
            .await
            .expect("cancels");
    assert_eq!(again, Cancelled::Asked);
    for kind in KINDS {
        let answer = w.db.with_lease(&lease, door(kind)).await;
        assert_eq!(
            matches!(answer, Err(DoorError::Cancelled)),
            kind.closes_on_cancel(),
            "{kind:?}"
        );
    }
    w.db.append_event(&lease, "step", serde_json::json!({}))
        .await
        .expect("logs go on");
    let beat =
        w.db.heartbeat(&one, &crate::support::facts(), std::slice::from_ref(&lease))
            .await;
    let beat = beat.expect("answers");
    assert!(matches!(
        beat.leases[0].1,
        kiln_db::LeaseAnswer::Live { cancel: true, .. }
    ));
}

async fn a_cancel_wins_only_when_it_came_first(w: World) {
    let one = w.worker("w1").await;
    let lease = w.leased("b1", &one).await;
    w.db.cancel(&id("b1"), "user:x", Some("mistake"))
        .await
        .expect("cancels");
    let done = w.db.finish(&lease, end(passed())).await.expect("finishes");
    let JobState::Finished { outcome } = done.state else {
        panic!("not over");
    };
    assert_eq!(class(&outcome), Some(FailureClass::Cancelled));
    assert_eq!(outcome.phases_ms, passed().phases_ms);

    let lease = w.leased("b2", &one).await;
    w.db.finish(&lease, end(passed())).await.expect("finishes");
    let late =
        w.db.cancel(&id("b2"), "user:x", None)
            .await
            .expect("answers");
    assert_eq!(late, Cancelled::TooLate(passed()));
    let found = w.db.job(&id("b2")).await.expect("reads").expect("is there");
    assert_eq!(
        (found.state, found.cancel),
        (JobState::Finished { outcome: passed() }, None)
    );

    // A retry is no way around a cancel.
    let lease = w.leased("b3", &one).await;
    w.db.cancel(&id("b3"), "user:x", None)
        .await
        .expect("cancels");
    let done =
        w.db.finish(&lease, end(failed(FailureClass::Infrastructure)))
            .await;
    assert!(done.expect("finishes").state.is_terminal());
}

async fn logs_go_on_where_they_ended(w: World) {
    let one = w.worker("w1").await;
    let lease = w.leased("b1", &one).await;
    let mark = async |from, length| {
        w.db.log_mark(&lease, "c1", from, length)
            .await
            .expect("opens")
    };
    assert_eq!(
        mark(0, 5).await,
        LogMark {
            next: 5,
            taken: true
        }
    );
    assert_eq!(
        mark(0, 5).await,
        LogMark {
            next: 5,
            taken: false
        }
    );
    assert_eq!(
        mark(9, 5).await,
        LogMark {
            next: 5,
            taken: false
        }
    );
    assert_eq!(
        mark(3, 4).await,
        LogMark {
            next: 7,
            taken: true
        }
    );
    assert_eq!(
        mark(7, 0).await,
        LogMark {
            next: 7,
            taken: false
        }
    );
    let found = w.db.job(&id("b1")).await.expect("reads").expect("is there");
    assert_eq!(found.log_bytes, 7);
}

async fn bounds_of_events_and_artifacts_hold(w: World) {
    let one = w.worker("w1").await;
    let lease = w.leased("b1", &one).await;
    let big = serde_json::json!({ "x": "y".repeat(kiln_db::EVENT_BYTES_MAX) });
    let refused = w.db.append_event(&lease, "step", big).await;
    assert!(matches!(refused, Err(DoorError::TooMuch(_))));
    let refused =
        w.db.phase(&lease, &"p".repeat(kiln_db::EVENT_KIND_MAX + 1))
            .await;
    assert!(matches!(refused, Err(DoorError::TooMuch(_))));
    let hostile = serde_json::json!({ "text": "a\0b\u{1b}'; drop table jobs; --" });
    w.db.append_event(&lease, "step", hostile.clone())
        .await
        .expect("keeps");
    let events = w.db.events_after(&id("b1"), 2, 10).await.expect("reads");
    assert_eq!(events[0].data, hostile);
    let mark = || async { w.db.event_mark(&id("b1")).await.expect("reads") };
    let before = mark().await.expect("is there");
    assert_eq!((before.last, before.over), (events[0].seq, false));
    w.db.artifact(&lease, &artifact()).await.expect("keeps");
    let second = Artifact {
        size: 2,
        ..artifact()
    };
    w.db.artifact(&lease, &second).await.expect("replaces");
    let large = Artifact {
        name: "large".to_owned(),
        size: kiln_core::artifact::ARTIFACTS_BYTES_MAX - 1,
        ..artifact()
    };
    let refused = w.db.artifact(&lease, &large).await;
    assert!(matches!(refused, Err(DoorError::TooMuch(_))));
    assert_eq!(w.db.artifacts(&id("b1")).await.expect("reads"), [second]);
    let done = w.db.finish(&lease, end(failed(FailureClass::User))).await;
    assert!(done.expect("keeps hostile text").state.is_terminal());
    let after = mark().await.expect("is there");
    assert_eq!((after.last, after.over), (before.last + 1, true));
    let nothing = w.db.event_mark(&id("nothing")).await.expect("reads");
    assert!(nothing.is_none());
    let unknown: Result<_, DbError> = w.db.job(&id("nothing")).await;
    assert!(unknown.expect("reads").is_none());
}

async fn an_attempt_that_somebody_attends_is_the_last(w: World) {
    let one = w.worker("w1").await;
    let first = w.leased("b1", &one).await;
    assert!(!w.db.attend(&first).await.expect("asked"), "not ready yet");
    // Nothing was given yet: what fails is tried again.
    let lost =
        w.db.finish(&first, end(failed(FailureClass::Infrastructure)))
            .await;
    assert!(!lost.expect("fails").state.is_terminal());
    w.advance(10_000);
    let second = w.claim("b1", 2, &one).await;
    w.db.started(&second).await.expect("starts");
    assert!(w.db.attend(&second).await.expect("attends"));
    assert!(w.db.attend(&second).await.expect("again is no error"));
    w.advance(25_000);
    let swept = w.sweep().await;
    let states: Vec<_> = swept
        .expired
        .iter()
        .map(|one| one.state.is_terminal())
        .collect();
    assert_eq!(states, [true], "it is never tried again");
    let refused = w.db.attend(&second).await;
    assert!(matches!(refused, Err(DoorError::Lease(_))), "{refused:?}");
    // One that should stop is attended by nobody.
    let back = w.db.heartbeat(&one, &crate::support::facts(), &[]).await;
    back.expect("is there");
    let lease = w.leased("b2", &one).await;
    w.db.started(&lease).await.expect("starts");
    w.db.cancel(&id("b2"), "somebody", None)
        .await
        .expect("cancels");
    let refused = w.db.attend(&lease).await;
    assert!(matches!(refused, Err(DoorError::Cancelled)), "{refused:?}");
}
