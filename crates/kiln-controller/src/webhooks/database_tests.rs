//! From a change in a real database to a real receiver.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kiln_core::job::{Limits, RunCommand, TrustClass};
use kiln_core::{ByteSize, Dispatch, JobKind, JobRequest, NetworkPolicy, TenantName};
use kiln_db::{Database, DatabaseUrl, NewJob, OpenOptions, Webhook};
use kiln_telemetry::metrics::{Metrics, Prefix};
use tokio_util::sync::CancellationToken;

use super::tests::{local_allowed, receiver};
use super::*;

pub(crate) fn job(id: &str, notify_url: Option<String>) -> NewJob {
    let request = JobRequest {
        id: id.parse().unwrap(),
        tenant: TenantName::local(),
        kind: JobKind::Run(Box::new(RunCommand {
            argv: vec!["true".to_owned()],
            ..RunCommand::default()
        })),
        network: NetworkPolicy::Isolated,
        limits: Limits {
            cpus: 1,
            memory: ByteSize::mib(512),
            disk: ByteSize::gib(1),
            timeout_ms: 60_000,
        },
        trust: TrustClass::Untrusted,
        network_bits: None,
        dispatch: Dispatch::default(),
        traceparent: None,
        policy: None,
    };
    NewJob {
        request,
        idempotency: None,
        submitted_by: "user:tester".to_owned(),
        notify_url,
        labels: BTreeMap::new(),
    }
}

async fn until<F: Future<Output = bool>>(mut holds: impl FnMut() -> F) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait)
        .await
        .expect("in time");
}

#[tokio::test]
async fn a_change_is_told_and_a_dead_letter_can_be_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let url = DatabaseUrl::Sqlite(dir.path().join("kiln.db"));
    let db = Database::open(&url, OpenOptions::default()).await.unwrap();
    let gone = axum::response::IntoResponse::into_response(axum::http::StatusCode::GONE);
    let (hooks, own) = (receiver([gone]).await, receiver([]).await);
    let hook = Webhook {
        id: "all".parse().unwrap(),
        tenant: None,
        url: hooks.url(),
        secret: "key-1".to_owned(),
        old: None,
        kinds: BTreeSet::new(),
        enabled: true,
        created_by: "user:tester".to_owned(),
    };
    db.put_webhook(hook).await.unwrap();
    let stop = CancellationToken::new();
    let signer = Signer::new(&[1; 32]);
    let metrics = Metrics::new(Prefix::Kiln, "0");
    let started = Courier::start(
        db.clone(),
        signer.clone(),
        local_allowed(),
        metrics,
        stop.clone(),
    );
    let (_, running) = started.unwrap();
    db.submit(job("b1", Some(own.url()))).await.unwrap();
    until(async || own.count() == 1).await;
    let (headers, body) = own.got.lock().unwrap()[0].clone();
    let text = |name: &str| headers[name].to_str().unwrap().to_owned();
    let secret = signer.tenant(&TenantName::local());
    let timestamp = text("webhook-timestamp").parse().unwrap();
    let signature = secret.sign(&text("webhook-id"), timestamp, &body);
    assert_eq!(text("webhook-signature"), signature);
    let told: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        (told["type"].as_str(), told["job"].as_str()),
        (Some("job.queued"), Some("b1"))
    );
    let dead = async || db.dead_letters(None, None, 10).await.unwrap();
    until(async || dead().await.len() == 1).await;
    let letter = dead().await.remove(0);
    assert_eq!(
        letter.last_error.as_deref(),
        Some("it answered 410: it wants no more of these")
    );
    assert!(db.replay(&letter.id, None).await.unwrap());
    until(async || hooks.count() == 2).await;
    until(async || db.outbox_next().await.unwrap().is_none()).await;
    assert!(dead().await.is_empty());
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(10), running)
        .await
        .expect("ends")
        .unwrap();
}
