//! Secrets of the store, from the API to a command in a simulated machine: given to whom they are for, and nowhere to be found afterwards.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_controller::access::SealedAs;
use kiln_controller::server::Running;
use kiln_core::job::TrustClass;
use kiln_core::secret::SecretScope;
use kiln_core::{FailureClass, JobKind, JobState, SecretName, TenantName, Verdict};
use kiln_db::{NewJob, NewValue, SecretValue, Written};
use kiln_machine::driver::BoxFuture;
use kiln_machine::sim::{ExecCall, ExecEnd, SimConfig, SimDriver};
use kiln_worker::fleet::http::Target;
use kiln_worker::fleet::job::Workshop;
use tokio_util::sync::CancellationToken;

use crate::fleet_sim::{
    LEASE, Ledgered, PATIENCE, Pace, controller, job, machines, machines_of, until, work_near,
    workshop,
};

/// Nothing else in a home has these bytes.
const VALUE: &str = "Zq7-vulpine-9341-hush";

async fn keep(running: &Running, name: &str, value: &[u8], scope: Option<SecretScope>) {
    let (tenant, name): (TenantName, SecretName) =
        (TenantName::local(), name.parse().expect("name"));
    let about = SealedAs {
        tenant: &tenant,
        name: &name,
        version: 1,
    };
    let sealed = running.controller.access.seal_secret(about, value);
    let new = NewValue {
        tenant: tenant.clone(),
        name: name.clone(),
        version: 1,
        value: SecretValue::Sealed(sealed.expect("seals")),
        scope,
        by: "owner".to_owned(),
    };
    let kept = running.controller.db.write_secret(new).await;
    assert_eq!(kept.expect("answers"), Written::Kept);
}

/// A command that prints what it was given.
fn asks(id: &str, secrets: &[&str], trust: TrustClass) -> NewJob {
    let mut new = job(id);
    let JobKind::Run(run) = &mut new.request.kind else {
        panic!("a run");
    };
    run.argv = vec!["show".to_owned()];
    run.secrets = secrets
        .iter()
        .map(|word| word.parse().expect("a secret"))
        .collect();
    new.request.trust = trust;
    new
}

/// A worker whose machines have a command that shows its variables and one file.
async fn shop(folder: &Path, target: Target) -> Workshop {
    let ledger = Arc::new(Ledgered::default());
    let pace: Pace = Arc::default();
    let mut shop = workshop(folder, "w1", target, &ledger, &pace).await;
    let config = machines_of("w1", &ledger, &pace);
    let script =
        config
            .script
            .clone()
            .on(&["show"], |call: &mut ExecCall| -> BoxFuture<'_, ExecEnd> {
                Box::pin(async move {
                    let env = format!("{:?}\n", call.request.env);
                    let file = call
                        .guest()
                        .read("/run/kiln/secrets/KEY")
                        .unwrap_or_default();
                    let (text, argv) =
                        (String::from_utf8_lossy(&file), call.request.argv.join(" "));
                    assert!(!argv.contains(VALUE), "{argv}");
                    let out = format!("{env}{text} {}\n", env.contains(VALUE));
                    match call.stdout(out.as_bytes()).await {
                        Ok(()) => ExecEnd::Code(0),
                        Err(_) => ExecEnd::Code(9),
                    }
                })
            });
    let config = SimConfig { script, ..config };
    shop.host.driver = Arc::new(SimDriver::new(&shop.host.home.data, config));
    shop
}

async fn ended(running: &Running, new: NewJob) -> (Verdict, String) {
    let id = running
        .controller
        .db
        .submit(new)
        .await
        .expect("submits")
        .job
        .request
        .id;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let job = running
            .controller
            .db
            .job(&id)
            .await
            .expect("answers")
            .expect("is there");
        if let JobState::Finished { outcome } = job.state {
            let name = kiln_store::logs::LogName::new(TenantName::local(), id.clone(), 1);
            let log = running.controller.logs.read(&name, 0, 1 << 20).await;
            let log = log.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            return (outcome.verdict, log.unwrap_or_default());
        }
        assert!(tokio::time::Instant::now() < deadline, "{id} did not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Files below a folder that hold a text.
fn holders(folder: &Path, text: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().expect("stat"));
        if kind.is_dir() {
            found.extend(holders(&path, text));
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).unwrap_or_default();
            if bytes.windows(text.len()).any(|window| window == text) {
                found.push(path.display().to_string());
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_has_its_secrets_and_nothing_else_does() {
    let folder = tempfile::tempdir().expect("folder");
    let running = controller(folder.path(), Vec::new(), Vec::new(), LEASE).await;
    keep(&running, "TOKEN", VALUE.as_bytes(), None).await;
    keep(&running, "KEY", format!("-{VALUE}-\n").as_bytes(), None).await;
    keep(&running, "BYTES", &[0xff, 0], None).await;
    let home = folder.path().join("worker");
    std::fs::create_dir_all(&home).expect("folder");
    let shop = shop(&home, Target::Socket(running.socket.clone())).await;
    let stop = CancellationToken::new();
    work_near(shop, "w1", 1, stop.clone()).await;

    let words = ["TOKEN=NPM_TOKEN", "KEY:file"];
    let (verdict, log) = ended(&running, asks("r1", &words, TrustClass::Trusted)).await;
    assert_eq!(verdict, Verdict::Passed, "{log}");
    assert!(log.contains("NPM_TOKEN") && log.contains("***"), "{log}");
    assert!(log.trim_end().ends_with("*** true"), "it had both: {log}");
    assert!(!log.contains(VALUE), "{log}");

    // A scope may change while a job waits: the door decides, and no machine is started.
    let refused = ended(&running, asks("r2", &["TOKEN"], TrustClass::Untrusted)).await;
    let Verdict::Failed { class, message, .. } = refused.0 else {
        panic!("it may not have it: {refused:?}");
    };
    assert_eq!(class, FailureClass::Policy, "{message}");
    assert!(
        message.contains("TOKEN") && message.contains("untrusted"),
        "{message}"
    );
    for (id, word) in [("r3", "NOSUCH"), ("r4", "BYTES")] {
        let (verdict, _) = ended(&running, asks(id, &[word], TrustClass::Trusted)).await;
        let Verdict::Failed { class, message, .. } = verdict else {
            panic!("{id} cannot have it");
        };
        assert_eq!(class, FailureClass::Usage, "{message}");
        assert!(message.contains(word), "{message}");
    }
    // Nor does an untrusted job learn, however it came into the queue.
    let mut learns = asks("r5", &[], TrustClass::Untrusted);
    let digest = kiln_core::Digest::of(b"a policy");
    let policy = serde_json::json!({"file": digest, "hash": digest, "learn": true});
    learns.request.policy = Some(serde_json::from_value(policy).expect("a policy"));
    let (verdict, _) = ended(&running, learns).await;
    let Verdict::Failed { class, message, .. } = verdict else {
        panic!("its machine would be open");
    };
    assert_eq!(class, FailureClass::Policy, "{message}");
    assert!(message.contains("only trusted jobs learn"), "{message}");
    for id in ["r2", "r3", "r4", "r5"] {
        let attempts = running
            .controller
            .db
            .attempts(&id.parse().expect("id"))
            .await;
        let attempts = attempts.expect("answers");
        assert!(
            attempts.iter().all(|one| one.started_unix_ms.is_none()),
            "{id}: {attempts:?}"
        );
    }
    until("the machines to go", || machines(&home).is_empty()).await;
    for text in [VALUE.as_bytes(), b"vulpine"] {
        assert_eq!(holders(folder.path(), text), Vec::<String>::new());
    }
    stop.cancel();
    running.stop().await;
    assert_eq!(
        holders(folder.path(), VALUE.as_bytes()),
        Vec::<String>::new()
    );
}
