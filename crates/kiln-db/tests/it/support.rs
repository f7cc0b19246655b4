//! A database with a clock that only moves when told, on either engine, and short words for what tests do all the time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_core::dispatch::{Room, WorkerFacts};
use kiln_core::job::{Limits, RunCommand, TrustClass};
use kiln_core::{
    Assignment, AttemptId, ByteSize, Dispatch, FailureClass, JobId, JobKind, JobRequest, Lease,
    NetworkPolicy, Outcome, PoolName, TenantName, Verdict, WorkerId,
};
use kiln_db::{
    AttemptEnd, Clock, Database, DatabaseUrl, Leadership, NewJob, NewWorker, OpenOptions,
    Placement, Sweep, Swept,
};
use kiln_testkit::FakeClock;
use kiln_testkit::postgres::server;

/// Where the fake clock of PostgreSQL begins.
const START_UNIX_MS: u64 = 1_767_225_600_000;

#[derive(Debug)]
pub(crate) struct TestClock(pub(crate) FakeClock);

impl Clock for TestClock {
    fn now_unix_ms(&self) -> u64 {
        self.0.now_unix_ms()
    }
}

enum Time {
    Fake(FakeClock),
    /// The function that tells PostgreSQL's time reads a table instead.
    Table(String),
}

pub(crate) struct World {
    pub(crate) db: Database,
    pub(crate) url: DatabaseUrl,
    time: Time,
    _folder: Option<tempfile::TempDir>,
}

impl World {
    pub(crate) async fn sqlite() -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let url = file_url(&folder.path().join("kiln.db"));
        let clock = FakeClock::default();
        let options = OpenOptions {
            clock: Arc::new(TestClock(clock.clone())),
            ..OpenOptions::default()
        };
        let db = Database::open(&url, options).await.expect("opens");
        Self {
            db,
            url,
            time: Time::Fake(clock),
            _folder: Some(folder),
        }
    }

    pub(crate) async fn postgres() -> Self {
        let name = server().database();
        let url: DatabaseUrl = server().url(&name).parse().expect("url");
        let options = OpenOptions {
            connections: 8,
            ..OpenOptions::default()
        };
        let db = Database::open(&url, options).await.expect("opens");
        let sql = format!(
            "create table test_clock (now bigint not null); insert into test_clock values ({START_UNIX_MS});
            create or replace function kiln_now() returns bigint language sql volatile as 'select now from test_clock'"
        );
        server().sql(&name, &sql);
        Self {
            db,
            url,
            time: Time::Table(name),
            _folder: None,
        }
    }

    /// A second controller on the same database, with the same clock. PostgreSQL only.
    pub(crate) async fn second(&self) -> Database {
        assert!(self.url.is_shared());
        Database::open(&self.url, OpenOptions::default())
            .await
            .expect("opens")
    }

    pub(crate) fn is_postgres(&self) -> bool {
        matches!(self.time, Time::Table(_))
    }

    /// The name of the PostgreSQL database.
    pub(crate) fn database(&self) -> &str {
        match &self.time {
            Time::Table(name) => name,
            Time::Fake(_) => panic!("not PostgreSQL"),
        }
    }

    /// The file of the SQLite database.
    pub(crate) fn file(&self) -> PathBuf {
        match &self.url {
            DatabaseUrl::Sqlite(path) => path.clone(),
            DatabaseUrl::Postgres(_) => panic!("not SQLite"),
        }
    }

    pub(crate) fn advance(&self, ms: u64) {
        match &self.time {
            Time::Fake(clock) => clock.advance(Duration::from_millis(ms)),
            Time::Table(name) => {
                server().sql(name, &format!("update test_clock set now = now + {ms}"));
            }
        }
    }

    pub(crate) async fn submit(&self, id: &str) -> JobId {
        self.submit_as(job(id)).await
    }

    pub(crate) async fn submit_as(&self, new: NewJob) -> JobId {
        self.db.submit(new).await.expect("submits").job.request.id
    }

    pub(crate) async fn worker(&self, id: &str) -> WorkerId {
        let worker = NewWorker {
            id: id.parse().expect("name"),
            facts: facts(),
            certificate: None,
        };
        let joined = self.db.admit_worker(worker, placement()).await;
        joined.expect("joins").id
    }

    pub(crate) async fn lead(&self) -> Leadership {
        let lead = self
            .db
            .lead(&PoolName::default_pool(), "one", 3_600_000)
            .await;
        lead.expect("answers").expect("nobody else leads")
    }

    /// Submits, claims for a worker, gives the lease.
    pub(crate) async fn leased(&self, id: &str, worker: &WorkerId) -> Lease {
        self.submit(id).await;
        self.claim(id, 1, worker).await
    }

    pub(crate) async fn claim(&self, id: &str, number: u32, worker: &WorkerId) -> Lease {
        let lead = self.lead().await;
        let claimed = self.db.claim(&lead, vec![assign(id, number, worker)]).await;
        let mut claimed = claimed.expect("leads");
        claimed.remove(0).expect("claims")
    }

    /// Expires whatever is due.
    pub(crate) async fn sweep(&self) -> Swept {
        self.db.expire(sweep()).await.expect("sweeps")
    }
}

pub(crate) fn sweep() -> Sweep {
    Sweep {
        not_before_unix_ms: 0,
        grace_ms: 5_000,
        jitter: 1,
    }
}

pub(crate) fn file_url(path: &Path) -> DatabaseUrl {
    DatabaseUrl::Sqlite(path.to_owned())
}

pub(crate) fn id(text: &str) -> JobId {
    text.parse().expect("job id")
}

pub(crate) fn assign(id: &str, number: u32, worker: &WorkerId) -> Assignment {
    Assignment {
        attempt: AttemptId {
            job: id.parse().expect("job id"),
            number,
        },
        worker: worker.clone(),
    }
}

pub(crate) fn request(id: &str) -> JobRequest {
    JobRequest {
        id: id.parse().expect("job id"),
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
    }
}

pub(crate) fn job(id: &str) -> NewJob {
    NewJob {
        request: request(id),
        idempotency: None,
        submitted_by: "user:tester".to_owned(),
        notify_url: None,
        labels: BTreeMap::new(),
    }
}

pub(crate) fn facts() -> WorkerFacts {
    WorkerFacts {
        arch: "amd64".parse().expect("label"),
        runtimes: BTreeSet::new(),
        capacity: Room {
            cpus: 20_000,
            memory: ByteSize::gib(100_000),
            disk: ByteSize::gib(100_000),
            machines: 20_000,
        },
        whole_cpus: None,
        version: "0.1.0".to_owned(),
        generation: kiln_core::dispatch::POLICY_GENERATION,
        warm: BTreeSet::new(),
    }
}

pub(crate) fn placement() -> Placement {
    Placement {
        pool: PoolName::default_pool(),
        labels: BTreeMap::new(),
        tenants: None,
    }
}

pub(crate) fn passed() -> Outcome {
    Outcome {
        verdict: Verdict::Passed,
        phases_ms: vec![("guest".to_owned(), 12)],
    }
}

pub(crate) fn failed(class: FailureClass) -> Outcome {
    Outcome {
        verdict: Verdict::Failed {
            class,
            message: "it failed\0 <b>'\"\u{1b}[2J".to_owned(),
            hint: None,
            command_code: Some(1),
            reason: None,
        },
        phases_ms: Vec::new(),
    }
}

pub(crate) fn end(outcome: Outcome) -> AttemptEnd {
    AttemptEnd {
        outcome,
        receipt: None,
        observed: Some(serde_json::json!({ "schema": 1 })),
        jitter: 3,
    }
}

/// The class a finished outcome failed with.
pub(crate) fn class(outcome: &Outcome) -> Option<FailureClass> {
    match &outcome.verdict {
        Verdict::Passed => None,
        Verdict::Failed { class, .. } => Some(*class),
    }
}
